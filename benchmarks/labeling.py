"""What each labeler costs and how right its labels are, on the same wrong trajectories of 5, 8 and 12 steps.

All five share the reasoner, the verifier, the engine and the concurrency; the prefix cache is empty when each
starts. They ask for the same rollouts of the same prefix. Truth is the chain task's `reachable` oracle. The models are
those of `configs/labeling.yaml`, trained at the first call:

    python benchmarks/labeling.py [--json] [--no-early-exit] [--trajectories 300]
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import click
from rich.table import Table

from actors.client import CoordinatorClient
from launch.progress import ConsoleReporter
from launch.run import complete
from launch.session import ray_session
from launch.tables import table_console
from sapo_ray.annotator import Annotation
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import Question, Trajectory
from sapo_ray.evaluator import true_labels
from sapo_ray.labelers.base import LabelerName
from sapo_ray.metrics import label_accuracy
from sapo_ray.progress import Reporter
from sapo_ray.tasks import Chain, ChainConfig

CONFIG = Path(__file__).parents[1] / "configs" / "labeling.yaml"
LENGTHS = (5, 8, 12)
Item = tuple[Question, Trajectory]


@click.command()
@click.option("--config", type=click.Path(dir_okay=False), default=str(CONFIG), show_default=True)
@click.option("--trajectories", default=300, show_default=True, help="Wrong trajectories of each length.")
@click.option("--no-early-exit", is_flag=True, help="Sample all T rollouts of every check.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
@click.argument("overrides", nargs=-1)
def main(config: str, trajectories: int, no_early_exit: bool, as_json: bool, overrides: Sequence[str]) -> None:
    store = complete(config, overrides)
    settings = load_config(RunConfig, store.folder.locate("config.yaml"))
    with (
        ray_session(settings),
        ConsoleReporter() as reporter,
        CoordinatorClient(settings, store.location, reporter) as coordinator,
    ):
        coordinator.use(reasoner=store.checkpoint("reasoner", 0), verifier=store.checkpoint("verifier", 0))
        results = {
            str(length): _compare(coordinator, reporter, settings, length, trajectories, not no_early_exit)
            for length in LENGTHS
        }
    _print(results)
    if as_json:
        click.echo(json.dumps({"lengths": results}))


def _compare(
    coordinator: CoordinatorClient, reporter: Reporter, settings: RunConfig, length: int, count: int, early_exit: bool
) -> dict[str, dict[str, Any]]:
    """The figures of every labeler on `count` wrong trajectories of `length` steps."""
    task = Chain(_task_of_length(settings, length, count))
    items = _wrong_trajectories(coordinator, reporter, task, length, count)
    results = {}
    for labeler in get_args(LabelerName):
        labeling = replace(settings.labeling, labeler=labeler, early_exit=early_exit, unproven="keep", expand=False)
        reporter.begin(f"{length} steps: {labeler}")
        coordinator.call("reset_prefix_cache")
        start = time.monotonic()
        annotated, notes = coordinator.call("label", items, labeling, f"length-{length}")
        seconds = time.monotonic() - start
        reporter.end(notes)
        results[labeler] = {
            **_quality(task, annotated),
            **_costs(notes["cost"], seconds, len(annotated)),
            "n": len(annotated),
        }
    return results


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
    coordinator: CoordinatorClient, reporter: Reporter, task: Chain, length: int, count: int
) -> list[Item]:
    """The first `count` sampled trajectories that answer and miss, right ones left out."""
    wrong: list[Item] = []
    pool = task.questions("pool")
    for start in range(0, len(pool), count):
        questions = pool[start : start + count]
        reporter.begin(f"{length} steps: sample")
        sampled = coordinator.call("sample", questions, f"length-{length}")
        reporter.end({})
        wrong += [
            (question, trajectory)
            for question, trajectories in sampled
            for trajectory in trajectories
            if not trajectory.correct and trajectory.answer is not None and len(trajectory.steps) == length
        ]
        if len(wrong) >= count:
            return wrong[:count]
    raise SystemExit(
        f"only {len(wrong)} wrong trajectories of {length} steps in {len(pool)} questions; lower --trajectories"
    )


def _quality(task: Chain, annotated: Sequence[tuple[Item, Annotation]]) -> dict[str, float | None]:
    """Label accuracy against the oracle, and the share of successes from prefixes that it calls unreachable."""
    rows = [
        (annotation.labelled[0], truth)
        for (question, trajectory), annotation in annotated
        if (truth := true_labels(task, question, trajectory)) is not None
    ]
    impossible = [not truth[estimate.step] for row, truth in rows for estimate in row.estimates if estimate.value]
    return {
        "label_accuracy": label_accuracy([row.step_labels for row, _ in rows], [truth for _, truth in rows]),
        "false_successes": fmean(impossible) if impossible else None,
    }


def _costs(cost: dict[str, Any], seconds: float, count: int) -> dict[str, float]:
    """Costs per trajectory."""
    figures = {key: cost[key] / count for key in ("checks", "rollouts", "generated_tokens", "flops")}
    return {**figures, "seconds": seconds / count}


def _print(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    for length, labelers in results.items():
        table = Table(title=f"{length} steps, per wrong trajectory (n = {labelers['saps']['n']})", title_justify="left")
        columns = ("checks", "rollouts", "generated_tokens", "flops", "seconds", "label_accuracy", "false_successes")
        for name in ("labeler", *columns, "tokens / shepherd", "tokens / omega", "seconds / shepherd"):
            table.add_column(name, justify="right")
        for name, figures in labelers.items():
            cells = ["–" if figures[c] is None else f"{figures[c]:.4g}" for c in columns]
            table.add_row(name, *cells, *_ratios(figures, labelers))
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
