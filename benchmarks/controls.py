"""Does SAPO beat what the same data and tokens give without it? Two controls on three seeds of configs/chain.yaml.

`sft`: supervised fine-tuning alone, for as many more tokens as SAPO trained on and generated. `rft`: the same pool,
samples and rounds, but right samples only: no verifier, no labels, no rejected solutions (rejection-sampling
fine-tuning, arXiv 2308.01825, once a round). The difference is taken question by question on the test split.

    python benchmarks/controls.py [--config configs/chain.yaml] [--seeds 0,1,2] [--json]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from rich.table import Table
from scipy.stats import bootstrap

from launch.cli import Benchmark
from launch.run import complete
from launch.tables import table_console
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.report import MEASURING

RFT = ("verify=false", "pairs.max_per_question=0")


def _numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    seeds = value.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise click.BadParameter(f"{value!r} is no list of different whole numbers, such as 0,1,2")
    return list(map(int, seeds))


@click.command(cls=Benchmark)
@click.option("--config", type=click.Path(dir_okay=False), default="configs/chain.yaml", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers)
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
@click.argument("overrides", nargs=-1)
def main(config: str, seeds: list[int], as_json: bool, overrides: Sequence[str]) -> None:
    results = [_seed(config, seed, overrides) for seed in seeds]
    pooled = {
        name: _difference([r[name]["correct"] for r in results], [r["sapo"]["correct"] for r in results])
        for name in ("sft", "rft")
    }
    _print(seeds, results, pooled)
    if as_json:
        rows = [{name: arm["accuracy"] for name, arm in r.items()} for r in results]
        click.echo(json.dumps({"seeds": rows, "sapo_minus": pooled}))


def _seed(config: str, seed: int, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The three arms of one seed, each as its last round's test accuracy and answers."""
    full = _run(config, f"chain-{seed}", [*overrides, f"seed={seed}"])
    first, spent = full["round-0/sft"], _tokens(full)
    settings = load_config(RunConfig, config, overrides)
    epochs = round(settings.sft.epochs * (1 + spent / first["cost"]["trained_tokens"]))
    more_sft = [*overrides, f"seed={seed}", "rounds=0", "verify=false", "sampling.questions=1", f"sft.epochs={epochs}"]
    return {
        "start": _arm(full, 0),
        "sapo": _arm(full, settings.rounds),
        "sft": _arm(_run(config, f"control-sft-{seed}", more_sft), 0),
        "rft": _arm(_run(config, f"control-rft-{seed}", [*overrides, f"seed={seed}", *RFT]), settings.rounds),
    }


def _run(config: str, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run to the end, or go on with what is there; the notes of every stage."""
    return complete(config, [*overrides, f"run_dir=runs/{name}"]).stages()


def _tokens(stages: dict[str, Any]) -> int:
    """Tokens that SAPO trained on and generated after SFT, stages that only measure left out."""
    others = ("sft", *MEASURING)
    counted = [s["cost"] for name, s in stages.items() if "cost" in s and name.rpartition("/")[2] not in others]
    return sum(cost["trained_tokens"] + cost["generated_tokens"] for cost in counted)


def _arm(stages: dict[str, Any], round_number: int) -> dict[str, Any]:
    notes = stages[f"round-{round_number}/evaluate"]
    return {"accuracy": notes["test"]["greedy_accuracy"], "correct": notes["correct"]}


def _difference(control: list[list[bool]], full: list[list[bool]]) -> dict[str, Any]:
    """Mean difference in accuracy with its 95% bootstrap interval over questions, each averaged over the seeds."""
    paired = np.mean(full, axis=0) - np.mean(control, axis=0)
    interval = bootstrap((paired,), np.mean, rng=0).confidence_interval
    return {"difference": float(paired.mean()), "ci95": [float(interval.low), float(interval.high)]}


def _print(seeds: list[int], results: list[dict[str, dict[str, Any]]], pooled: dict[str, dict[str, Any]]) -> None:
    table = Table("seed", "SFT", "SAPO", "SFT, as many tokens", "right samples only")
    for seed, arms in zip(seeds, results, strict=True):
        table.add_row(str(seed), *(f"{100 * arms[name]['accuracy']:.1f}" for name in ("start", "sapo", "sft", "rft")))
    console = table_console()
    console.print(table)
    for name, difference in pooled.items():
        low, high = (100 * bound for bound in difference["ci95"])
        console.print(f"SAPO - {name}: {100 * difference['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]")


if __name__ == "__main__":
    main()
