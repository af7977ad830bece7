"""`sapo plan`: what a run would come to, seen before it is started and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from launch.tables import table_console
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.plan import GPU, GPUS, Plan, make_plan
from sapo_ray.plan.hardware import GIB
from sapo_ray.tracking import check_installed


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpu", type=click.Choice(list(GPUS)), help="Say what fits it, how long it takes and what it costs.")
@click.option("--price", type=click.FloatRange(min=0), help="US dollars an hour of a GPU, not the assumed price.")
@click.option(
    "--wrong",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the samples taken to miss the answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one line of JSON.")
def plan(
    config: str, overrides: Sequence[str], gpu: str | None, price: float | None, wrong: float, as_json: bool
) -> None:
    """Show what a run of CONFIG would come to: data, a prompt, memory, tokens, FLOPs, hours and cost.

    Reads the data, the tokenizer and the model's config.json, never its weights, and starts nothing. Counts are the
    most that the run comes to if samples are as long as worked solutions. docs/plan.md explains every figure. Exits
    with status 2 where the run cannot fit the GPU.

    \b
    Example:
      sapo plan configs/gsm8k/qwen2.5-0.5b.yaml extends=configs/gpu/node.yaml --gpu h100
    """
    settings = load_config(RunConfig, config, overrides)
    check_installed(settings)
    device = GPUS[gpu] if gpu else None
    if device and price is not None:
        device = replace(device, price=price)
    made = make_plan(settings, device, wrong)
    if as_json:
        click.echo(json.dumps(_rounded(_figures(made, device))))
    else:
        _print(made, device)
    if made.misfits:
        raise SapoError("; ".join(made.misfits))


def _figures(made: Plan, gpu: GPU | None) -> dict[str, Any]:
    """The plan in plain values; memory in bytes."""
    stages = [
        {"name": stage.name, "requests": stage.requests, "cost": stage.cost.as_dict()}
        | (asdict(made.durations[i]) if made.durations else {})
        for i, stage in enumerate(made.stages)
    ]
    return {
        "questions": made.questions,
        "remarks": made.remarks,
        "prompt": made.prompt,
        "lengths": asdict(made.lengths),
        "model": asdict(made.shape),
        "deepspeed": made.deepspeed,
        "memory": [{**asdict(memory), "total": memory.total} for memory in made.memories],
        "stages": stages,
        "cost": made.cost.as_dict(),
        "gpu": asdict(gpu) if gpu else None,
        "gpus": made.gpus,
        "hours": made.hours,
        "dollars": _dollars(made, gpu),
        "misfits": made.misfits,
    }


def _dollars(made: Plan, gpu: GPU | None) -> float | None:
    return None if gpu is None or made.hours is None else made.hours * made.gpus * gpu.price


def _rounded(value: Any) -> Any:
    """Numbers that are no counts, to three digits."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _print(made: Plan, gpu: GPU | None) -> None:
    console, shape, lengths = table_console(), made.shape, made.lengths
    _table(console, "Questions", list(made.questions), [[f"{count:,}" for count in made.questions.values()]])
    click.echo(
        f"On average a prompt has {lengths.prompt:.0f} tokens, a worked solution {lengths.solution:.0f} in "
        f"{lengths.steps:.1f} steps.\n\nA prompt:\n{made.prompt}\n"
    )
    _table(
        console,
        "Model",
        ["architecture", "reasoner", "verifier", "layers", "hidden", "heads", "key-value heads", "vocabulary"],
        [
            [
                shape.architecture,
                _short(shape.parameters),
                _short(shape.verifier_parameters),
                *map(str, (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.vocabulary)),
            ]
        ],
    )
    click.echo("DeepSpeed")
    for name, settings in made.deepspeed.items():
        click.echo(f"{name}: {json.dumps(settings)}")
    click.echo()
    parts = ["weights", "gradients", "optimizer", "buffers", "activations", "logits", "kv_cache", "total"]
    _table(
        console,
        "Memory of a worker, in GiB, at most",
        ["", *(part.replace("kv_cache", "KV cache") for part in parts)],
        [[m.section, *(_gib(getattr(m, part)) for part in parts)] for m in made.memories],
    )
    _print_stages(console, made)
    for remark in made.remarks:
        click.echo(f"warning: {remark}")
    if gpu and (dollars := _dollars(made, gpu)) is not None and made.hours is not None:
        click.echo(
            f"at most some {_rough(made.hours)} hours, {_rough(made.start_seconds / 60)} minutes of them to start "
            f"workers, on {made.gpus:g} x {gpu.name}: ${_rough(dollars)} at ${gpu.price:g} an hour"
        )


def _print_stages(console: Console, made: Plan) -> None:
    counts = {
        "labelled": "trajectories",
        "checks": "checks",
        "rollouts": "rollouts",
        "prompt tokens": "prompt_tokens",
        "cached": "cached_tokens",
        "generated": "generated_tokens",
        "scored": "scored_tokens",
        "trained": "trained_tokens",
    }
    rows = [(stage.name, stage.cost) for stage in made.stages] + [("all", made.cost)]
    cells = [[name, *(_short(getattr(cost, c)) for c in counts.values()), _short(cost.flops)] for name, cost in rows]
    header = ["stage", *counts, "FLOPs"]
    if made.durations:
        header += ["minutes", "bound by"]
        for row, duration in zip(cells, made.durations, strict=False):
            row += [_rough(duration.seconds / 60), duration.bound]
    _table(console, "Stages, at most", header, cells)


def _table(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name in ("", "stage") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _gib(amount: float) -> str:
    return f"{amount / GIB:.3g}" if amount else "–"


def _rough(amount: float) -> str:
    """Two digits."""
    return f"{float(f'{amount:.2g}'):,g}"


def _short(count: float) -> str:
    """Three digits and a unit: 1.23M."""
    if not count:
        return "–"
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 999.5 or unit == "E":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError
