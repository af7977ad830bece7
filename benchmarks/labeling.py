"""What each labeler costs and how right its labels are, on the same wrong trajectories.

All of them share the reasoner, the verifier, the engine and the concurrency; the prefix cache is empty when each
starts. They ask for the same rollouts of the same prefix, and what no check has proven keeps its pre-assigned label
(`unproven: keep`). Of the task `chain` the trajectories have 5, 8 and 12 steps, and truth is its `reachable` oracle; of
any other task they are of test questions, and truth is what shepherd says. The models are M_0 and V_0 of a config,
trained at the first call, in a run directory of their own:

    python benchmarks/labeling.py [--json] [--no-early-exit] [--trajectories N] [--config configs/labeling.yaml]
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import click
from rich.table import Table

from actors.client import CoordinatorClient
from launch.cli import Benchmark
from launch.progress import ConsoleReporter
from launch.run import complete
from launch.session import ray_session
from launch.tables import table_console
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory, Question, Trajectory
from sapo_ray.evaluator import true_labels
from sapo_ray.labelers.base import LabelerName
from sapo_ray.metrics import label_accuracy
from sapo_ray.progress import Reporter
from sapo_ray.tasks import Chain, ChainConfig, Task, make_task

CONFIG = Path(__file__).parents[1] / "configs" / "labeling.yaml"
LENGTHS = (5, 8, 12)
CHAINS, OTHERS = 300, 40
"""Wrong trajectories by default: of each length of `chain`; of any other task, whose models are far larger."""
Item = tuple[Question, Trajectory]


@click.command(cls=Benchmark)
@click.option("--config", type=click.Path(dir_okay=False), default=str(CONFIG), show_default=True)
@click.option(
    "--trajectories",
    type=click.IntRange(min=1),
    show_default=f"{CHAINS}; {OTHERS} of another task than chain",
    help="Wrong trajectories, of each length.",
)
@click.option("--no-early-exit", is_flag=True, help="Sample all T rollouts of every check.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
@click.argument("overrides", nargs=-1)
def main(config: str, trajectories: int | None, no_early_exit: bool, as_json: bool, overrides: Sequence[str]) -> None:
    run_dir = load_config(RunConfig, config, overrides).run_dir or f"runs/{Path(config).stem}"
    store = complete(config, [*overrides, "rounds=0", f"run_dir={run_dir}-round-0"])
    settings = load_config(RunConfig, store.folder.locate("config.yaml"))
    count = trajectories or (CHAINS if isinstance(settings.task, ChainConfig) else OTHERS)
    with (
        ray_session(settings),
        ConsoleReporter() as reporter,
        CoordinatorClient(settings, store.location, reporter) as coordinator,
    ):
        coordinator.use(reasoner=store.checkpoint("reasoner", 0), verifier=store.checkpoint("verifier", 0))
        results = {
            name: _compare(coordinator, reporter, settings, task, name, count, not no_early_exit)
            for name, task in _tasks(settings, count).items()
        }
    _print(results)
    if as_json:
        click.echo(json.dumps({"lengths": results}))


def _tasks(settings: RunConfig, count: int) -> dict[str, Task]:
    """What trajectories are drawn from: chains of one length each, or the config's own task."""
    if isinstance(settings.task, ChainConfig):
        return {str(length): Chain(_task_of_length(settings, length, count)) for length in LENGTHS}
    return {"test": make_task(settings.task)}


def _compare(
    coordinator: CoordinatorClient,
    reporter: Reporter,
    settings: RunConfig,
    task: Task,
    name: str,
    count: int,
    early_exit: bool,
) -> dict[str, dict[str, Any]]:
    """The figures of every labeler on `count` wrong trajectories.

    Where requests were set aside, costs are means over what a labeler has labelled, and labels are compared on what all
    have.
    """
    items = _wrong_trajectories(coordinator, reporter, task, name, count)
    annotated: dict[str, dict[str, tuple[Item, LabelledTrajectory]]] = {}
    costs = {}
    for labeler in get_args(LabelerName):
        labeling = replace(settings.labeling, labeler=labeler, early_exit=early_exit, unproven="keep", expand=False)
        reporter.begin(f"{_title(name)}: {labeler}")
        coordinator.call("reset_prefix_cache")
        start = time.monotonic()
        rows, notes = coordinator.call("label", items, labeling, f"length-{name}")
        seconds = time.monotonic() - start
        reporter.end(notes)
        if not rows:
            raise SystemExit(f"{_title(name)}: {labeler} has labelled none of {len(items)} trajectories")
        annotated[labeler] = {item[1].id: (item, annotation.labelled[0]) for item, annotation in rows}
        costs[labeler] = _costs(notes["cost"], seconds, len(rows))
    by_shepherd = {i: row.step_labels for i, (_, row) in annotated["shepherd"].items()}
    compared = [trajectory.id for _, trajectory in items if all(trajectory.id in rows for rows in annotated.values())]
    return {
        labeler: {**_quality(task, [rows[i] for i in compared], by_shepherd), **costs[labeler], "n": len(compared)}
        for labeler, rows in annotated.items()
    }


def _title(name: str) -> str:
    return f"{name} steps" if name.isdigit() else name


def _task_of_length(settings: RunConfig, length: int, count: int) -> Any:
    """Questions of one length, by another seed than those the models were trained on."""
    assert isinstance(settings.task, ChainConfig)
    return replace(
        settings.task,
        min_steps=length,
        max_steps=length,
        ood_min_steps=length + 1,
        ood_max_steps=length + 1,
        worked=0,
        pool=20 * count,
        validation=0,
        test=0,
        ood=0,
        seed=settings.task.seed + 1000,
    )


def _wrong_trajectories(
    coordinator: CoordinatorClient, reporter: Reporter, task: Task, name: str, count: int
) -> list[Item]:
    """The first `count` sampled trajectories that answer and miss, of the length that `name` is, or of two steps and
    more; right ones are left out."""
    wrong: list[Item] = []
    questions = task.questions("pool" if name.isdigit() else "test")
    for start in range(0, len(questions), count):
        reporter.begin(f"{_title(name)}: sample")
        sampled = coordinator.call("sample", questions[start : start + count], f"length-{name}")
        reporter.end({})
        wrong += [
            (question, trajectory)
            for question, trajectories in sampled
            for trajectory in trajectories
            if not trajectory.correct
            and trajectory.answer is not None
            and (len(trajectory.steps) == int(name) if name.isdigit() else len(trajectory.steps) > 1)
        ]
        if len(wrong) >= count:
            return wrong[:count]
    raise SystemExit(
        f"{_title(name)}: only {len(wrong)} wrong trajectories in {len(questions)} questions; lower --trajectories"
    )


def _quality(
    task: Task, labelled: Sequence[tuple[Item, LabelledTrajectory]], by_shepherd: Mapping[str, tuple[int, ...]]
) -> dict[str, float | None]:
    """Label accuracy against the oracle, and the share of successes from prefixes that it calls unreachable; where
    there is no oracle, the share of labels that are shepherd's."""
    rows = [row for _, row in labelled]
    known = [true_labels(task, question, row.trajectory) for (question, _), row in labelled]
    truth = [labels or by_shepherd[row.trajectory.id] for labels, row in zip(known, rows, strict=True)]
    impossible = [
        not labels[estimate.step]
        for labels, row in zip(known, rows, strict=True)
        if labels is not None
        for estimate in row.estimates
        if estimate.value
    ]
    return {
        "label_accuracy": label_accuracy([row.step_labels for row in rows], truth),
        "false_successes": fmean(impossible) if impossible else None,
    }


def _costs(cost: dict[str, Any], seconds: float, count: int) -> dict[str, float]:
    """Costs per trajectory."""
    figures = {key: cost[key] / count for key in ("checks", "rollouts", "generated_tokens", "flops", "program_seconds")}
    return {**figures, "seconds": seconds / count}


def _print(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    for name, labelers in results.items():
        title = f"{_title(name)}, per wrong trajectory (n = {labelers['saps']['n']})"
        table = Table(title=title, title_justify="left")
        columns = [column for column in labelers["saps"] if column != "n"]
        for column in ("labeler", *columns, "tokens / shepherd", "tokens / omega", "seconds / shepherd"):
            table.add_column(column, justify="right")
        for labeler, figures in labelers.items():
            cells = ["–" if figures[c] is None else f"{figures[c]:.4g}" for c in columns]
            table.add_row(labeler, *cells, *_ratios(figures, labelers))
        table_console().print(table)


def _ratios(figures: dict[str, Any], labelers: dict[str, dict[str, Any]]) -> list[str]:
    shepherd, omega = labelers["shepherd"], labelers["omega"]
    return [
        f"{figures['generated_tokens'] / shepherd['generated_tokens']:.2f}",
        f"{figures['generated_tokens'] / omega['generated_tokens']:.2f}",
        f"{figures['seconds'] / shepherd['seconds']:.2f}",
    ]


if __name__ == "__main__":
    main()
