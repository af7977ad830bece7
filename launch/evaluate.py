"""`sapo evaluate`: what a reasoner, a verifier, or both are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from launch.checks import Checkpoint, Existing
from launch.progress import ConsoleReporter
from launch.records import read_records
from launch.session import ray_session
from launch.tables import table_console
from sapo_ray.cache import local_checkpoint
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory
from sapo_ray.errors import SapoError
from sapo_ray.limits import check_engine_length
from sapo_ray.models import Calibration, load_tokenizer
from sapo_ray.store import labelled_of
from sapo_ray.tasks import make_task


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--reasoner", type=Checkpoint("ForCausalLM"), help="Directory; greedy, pass@k and majority accuracy.")
@click.option("--verifier", type=Checkpoint("ForTokenClassification"), help="Directory; best-of-N, and step scores.")
@click.option("--labels", type=Existing(), help="Labelled steps (Parquet) to hold the verifier against.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def evaluate(
    config: str,
    overrides: Sequence[str],
    reasoner: str | None,
    verifier: str | None,
    labels: str | None,
    as_json: bool,
) -> None:
    """Evaluate a reasoner on CONFIG's task, with a verifier if one is given, or a verifier on labelled steps.

    \b
    Examples:
      sapo evaluate configs/local.yaml --reasoner runs/local/checkpoints/reasoner-2 evaluation.samples=8
      sapo evaluate configs/local.yaml --verifier runs/local/checkpoints/verifier-2 --labels runs/local/round-2/labels
    """
    if labels and (reasoner or not verifier):
        raise SapoError("--labels goes with --verifier alone")
    if not labels and not reasoner:
        raise SapoError("name a --reasoner, or a --verifier with --labels")
    settings = load_config(RunConfig, config, overrides)
    from actors.client import CoordinatorClient

    if reasoner:
        tokenizer = load_tokenizer(local_checkpoint(reasoner, weights=False))
        check_engine_length(settings, make_task(settings.task), tokenizer)
    labelled = read_records(labels, _labelled, "labelled trajectory") if labels else None
    arguments = ("evaluate_labels", labelled) if labelled else ("evaluate", "evaluate")
    with (
        ray_session(settings, trains=False),
        ConsoleReporter() as reporter,
        CoordinatorClient(settings, str(Path.cwd()), reporter) as coordinator,
    ):
        if verifier and Calibration.load(verifier) is None:
            reporter.warn(f"{verifier} has no calibration.json: its threshold is taken as 0.5, its start score as 1")
        coordinator.use(reasoner=reasoner, verifier=verifier)
        reporter.begin("evaluate")
        notes = coordinator.call(*arguments)
        reporter.end(notes)
    figures = {key: notes[key] for key in ("test", "ood", "verifier", "cost") if notes.get(key)}
    quarantined = len(notes.get("quarantined", ()))
    if as_json:
        click.echo(json.dumps({**figures, "quarantined": quarantined}))
    else:
        _print({**figures, "left out": {"quarantined": quarantined}})


def _labelled(row: Mapping[str, Any]) -> LabelledTrajectory:
    labelled = labelled_of(row)
    steps, labels = len(labelled.trajectory.steps), len(labelled.step_labels)
    if not steps:
        raise SapoError(f"trajectory {labelled.trajectory.id!r} has no steps to score")
    if steps != labels:
        raise SapoError(f"trajectory {labelled.trajectory.id!r} has {steps} steps and {labels} labels")
    return labelled


def _print(figures: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "figure", "value")
    for part, values in figures.items():
        for name, value in values.items():
            table.add_row(part, name, f"{value:.4g}" if isinstance(value, float) else str(value))
    table_console().print(table)
