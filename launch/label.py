"""`sapo label`: any labeler over a file of trajectories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from launch.checks import Checkpoint, Existing, check_writable
from launch.job import check_outlives_job, job_environment
from launch.progress import ConsoleReporter
from launch.records import read_records
from launch.session import ray_session
from sapo_ray.annotator import Annotation, distinct
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import Question, Trajectory
from sapo_ray.errors import SapoError
from sapo_ray.files import is_uri
from sapo_ray.labelers import fixed_start_score, is_labelled
from sapo_ray.limits import check_engine_length
from sapo_ray.models import Calibration, reasoner_tokenizer
from sapo_ray.store import RunDirectory, label_row, rollout_row, trajectory_of
from sapo_ray.tasks import SPLITS, Task, make_task

Item = tuple[Question, Trajectory]


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("trajectories", type=Existing())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--reasoner", required=True, type=Checkpoint("ForCausalLM"), help="Checkpoint directory.")
@click.option("--verifier", type=Checkpoint("ForTokenClassification"), help="Checkpoint directory; only saps uses it.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="New directory for labels and rollouts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def label(
    config: str,
    trajectories: str,
    overrides: Sequence[str],
    reasoner: str,
    verifier: str | None,
    out: str,
    as_json: bool,
) -> None:
    """Label the steps of TRAJECTORIES (a Parquet file or directory) as CONFIG's `labeling` section says.

    Its columns are those of a run's trajectories, and its questions those of CONFIG's task.

    Leaves out what it leaves out of a run's samples: `truncated`, `fraction` and `right_fraction`. Writes labels and
    rollouts to the data sets OUT/round-0/labels and OUT/round-0/rollouts.

    \b
    Example:
      sapo label configs/local.yaml runs/local/round-1/trajectories --reasoner runs/local/checkpoints/reasoner-0 \\
        --verifier runs/local/checkpoints/verifier-0 --out labels labeling.labeler=saps
    """
    settings = load_config(RunConfig, config, overrides)
    _require_scores(settings, verifier)
    if job_environment() is not None:
        check_outlives_job("--out", out)
    store = RunDirectory(out)
    if (not is_uri(out) and Path(out).exists()) or store.folder.sizes():
        raise SapoError(f"--out {out} exists already; name a new directory")
    check_writable("--out", out)
    task = make_task(settings.task)
    from actors.client import CoordinatorClient

    check_engine_length(settings, task, reasoner_tokenizer(reasoner, task.alphabet))
    items = read_trajectories(task, trajectories)
    chosen = [item for item in items if is_labelled(item[1], settings.labeling, settings.seed)]
    if not chosen:
        raise SapoError(
            f"{trajectories}: labeling.truncated, fraction and right_fraction leave none of {len(items)} rows"
        )
    with (
        ray_session(settings, trains=False),
        ConsoleReporter() as reporter,
        CoordinatorClient(settings, store.location, reporter) as coordinator,
    ):
        coordinator.use(reasoner=reasoner, verifier=verifier)
        reporter.begin("label")
        annotated, notes = coordinator.call("label", chosen, settings.labeling, "label")
        reporter.end(notes)
    figures = {
        "trajectories": len(annotated),
        "left_out": len(items) - len(chosen),
        "quarantined": len(notes.get("quarantined", ())),
        "labels": write_labels(store, [annotation for _, annotation in annotated]),
        **notes["cost"],
    }
    click.echo(json.dumps(figures) if as_json else "\n".join(f"{k}: {v:,}" for k, v in figures.items()))


def read_trajectories(task: Task, path: str) -> list[Item]:
    """A file's trajectories, each with its question. Raises SapoError for a record that does not fit, or for none."""
    questions = {q.id: q for split in SPLITS for q in task.questions(split)}
    ids = set[str]()

    def item(row: Mapping[str, Any]) -> Item:
        trajectory = trajectory_of(row)
        if trajectory.id in ids:
            raise SapoError(
                f"trajectory {trajectory.id!r} comes a second time; labels and rollouts go by ids, so give each its own"
            )
        if trajectory.source == "expanded":
            raise SapoError(
                f"trajectory {trajectory.id!r} is expanded from a check's rollout, which labels of its own would not "
                "name; label the data set `trajectories`, or leave such rows out"
            )
        ids.add(trajectory.id)
        question = questions.get(trajectory.question_id)
        if question is None or question.text != trajectory.question:
            raise SapoError(f"question {trajectory.question_id!r} is not one of the config's task")
        if not trajectory.steps:
            raise SapoError(f"trajectory {trajectory.id!r} has no steps to label")
        return question, trajectory

    return read_records(path, item, "trajectory")


def write_labels(store: RunDirectory, annotations: Sequence[Annotation]) -> int:
    """Write labels and rollouts; the number of labelled rows."""
    with closing(store.writer(0, "labels")) as labels, closing(store.writer(0, "rollouts")) as rollouts:
        labels.extend(map(label_row, distinct(annotations)))
        rollouts.extend(rollout_row(r) for a in annotations for r in a.rollouts)
    return labels.rows


def _require_scores(settings: RunConfig, verifier: str | None) -> None:
    """A labeler that goes by scores needs a verifier, and a score to compare the first step's with."""
    labeling = settings.labeling
    if not labeling.uses_scores:
        return
    if verifier is None:
        raise SapoError(f"labeling.labeler is {labeling.labeler}: name a --verifier, or another labeler")
    if fixed_start_score(labeling) is None and Calibration.load(verifier) is None:
        raise SapoError(f"{verifier} has no calibration.json: set labeling.start_score to a number")
