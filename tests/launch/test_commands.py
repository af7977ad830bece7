"""`sapo label`, `sapo evaluate` and `sapo show` on what a finished run left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from actors.client import CoordinatorClient
from launch.cli import cli
from launch.label import read_trajectories, write_labels
from launch.progress import ConsoleReporter
from launch.session import ray_session
from sapo_ray.audit import audit
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory
from sapo_ray.encoding import encode
from sapo_ray.labelers import LabelingConfig
from sapo_ray.labelers.base import LabelerName
from sapo_ray.metrics import brier
from sapo_ray.scoring import load_verifier, score
from sapo_ray.store import RunDirectory, labelled_of, rollout_of
from sapo_ray.tasks import Chain

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def sapo(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def config(finished: RunDirectory) -> Path:
    return finished.path / "config.yaml"


def audited(out: RunDirectory, labeling: LabelingConfig) -> list[LabelledTrajectory]:
    """The labels in a directory, all of which follow from it."""
    rows = [labelled_of(row) for row in out.read(0, "labels")]
    rollouts = [rollout_of(row) for row in out.read(0, "rollouts")]
    assert list(audit(rows, rollouts, labeling)) == []
    return rows


def test_label_by_command(finished: RunDirectory, config: Path, tmp_path: Path) -> None:
    """A right trajectory costs nothing, a wrong one two checks at most; a cut-off one is left out."""
    models = ["--reasoner", finished.checkpoint("reasoner", 0), "--verifier", finished.checkpoint("verifier", 0)]
    given = RunDirectory(tmp_path / "given")
    whole = [row for row in finished.read(1, "trajectories") if not row["truncated"]]
    with closing(given.writer(0, "trajectories")) as writer:
        writer.extend([{**whole[0], "trajectory_id": "cut off", "answer": None, "truncated": True}, *whole])
    result = sapo(
        "label",
        config,
        given.dataset(0, "trajectories"),
        *models,
        "--out",
        tmp_path / "out",
        "--json",
        "labeling.expand=false",
    )
    labeling = replace(load_config(RunConfig, config).labeling, expand=False)
    rows = audited(RunDirectory(tmp_path / "out"), labeling)
    assert [row.trajectory.id for row in rows] == [row["trajectory_id"] for row in whole]
    assert all(len(row.estimates) <= (0 if row.trajectory.correct else 2) for row in rows)
    assert re.search(r"^label: [\d.]+ s$", result.stderr, flags=re.MULTILINE)
    figures = json.loads(result.stdout)
    assert (figures["trajectories"], figures["labels"]) == (len(rows), len(rows))
    assert (figures["left_out"], figures["quarantined"]) == (1, 0)
    assert figures["checks"] == sum(len(row.estimates) for row in rows) > 0
    assert figures["rollouts"] == len(list(RunDirectory(tmp_path / "out").read(0, "rollouts")))


def test_evaluate_a_reasoner_with_a_verifier(finished: RunDirectory, config: Path) -> None:
    """The last round's evaluation, once more: the same questions, another stage and so other seeds."""
    models = ["--reasoner", finished.checkpoint("reasoner", 1), "--verifier", finished.checkpoint("verifier", 1)]
    result = sapo("evaluate", config, *models, "--json")
    assert re.search(r"^evaluate: [\d.]+ s$", result.stderr, flags=re.MULTILINE)
    figures = json.loads(result.stdout)
    last = finished.summary()["rounds"][-1]
    assert figures.keys() == {"test", "ood", "verifier", "cost", "quarantined"}
    for split in ("test", "ood"):
        assert figures[split]["greedy_accuracy"] == last[split]["greedy_accuracy"]
        assert figures[split]["n"] == last[split]["n"]
    assert figures["test"]["k"] == 2
    assert figures["verifier"].keys() >= {"auroc", "brier", "step_accuracy", "best_of_n_accuracy"}


def test_evaluate_a_verifier_on_labels(finished: RunDirectory, config: Path) -> None:
    """The Brier score in the table is that of the checkpoint's scores, taken without Ray."""
    checkpoint, task = finished.checkpoint("verifier", 0), Chain(load_config(RunConfig, config).task)
    labels = finished.dataset(1, "labels")
    table = sapo("evaluate", config, "--verifier", checkpoint, "--labels", labels).stdout
    rows = [labelled_of(row) for row in finished.read(1, "labels")]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoded = [encode(tokenizer, task.prompt(r.trajectory.question), r.trajectory.steps) for r in rows]
    scores = score(load_verifier(str(checkpoint)), encoded, batch_tokens=4096)
    expected = brier([s for row in scores for s in row], [label for row in rows for label in row.step_labels])
    found = re.search(r"verifier\s*│\s*brier\s*│\s*([\d.e-]+)", table)
    assert found
    assert float(found[1]) == pytest.approx(expected, abs=1e-4)
    wrong = sum(not r.trajectory.correct and 0 in r.step_labels for r in rows)  # nothing is masked here
    assert re.search(rf"wrong_trajectories\s*│\s*{wrong}\s*│", table)
    threshold = json.loads(Path(checkpoint, "calibration.json").read_text())["threshold"]
    assert re.search(rf"threshold\s*│\s*{threshold:.4g}\s*│", table)


@pytest.mark.slow
def test_a_verifier_without_calibration_is_warned_of(finished: RunDirectory, config: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(finished.checkpoint("verifier", 0), tmp_path / "bare")
    (bare / "calibration.json").unlink()
    result = sapo("evaluate", config, "--verifier", bare, "--labels", finished.dataset(1, "labels"), "--json")
    assert f"warning: {bare} has no calibration.json: its threshold is taken as 0.5" in result.stderr
    assert json.loads(result.stdout)["verifier"]["threshold"] == 0.5


def test_show_prints_the_summary(finished: RunDirectory) -> None:
    summary: dict[str, Any] = finished.summary()
    assert json.loads(sapo("show", finished.path, "--json").stdout) == summary
    tables = sapo("show", finished.path).stdout
    for entry in summary["rounds"]:
        assert f"{100 * entry['test']['greedy_accuracy']:.1f}" in tables
        assert f"{entry['cost']['generated_tokens']:,}" in tables
        assert f"{entry['verifier']['brier']:.3f}" in tables


@pytest.fixture(scope="module")
def coordinator(finished: RunDirectory, config: Path) -> Iterator[CoordinatorClient]:
    """One engine for every labeler. Holds Ray until the last test of this file."""
    settings = load_config(RunConfig, config)
    with (
        ray_session(settings),
        ConsoleReporter() as reporter,
        CoordinatorClient(settings, finished.location, reporter) as client,
    ):
        client.use(reasoner=finished.checkpoint("reasoner", 0), verifier=finished.checkpoint("verifier", 0))
        yield client


@pytest.mark.parametrize("labeler", ["saps", "shepherd", "omega", "random", "outcome"])
def test_every_labeler_writes_what_its_labels_follow_from(
    finished: RunDirectory, config: Path, coordinator: CoordinatorClient, tmp_path: Path, labeler: LabelerName
) -> None:
    settings = load_config(RunConfig, config)
    labeling = replace(settings.labeling, labeler=labeler)
    items = read_trajectories(Chain(settings.task), finished.dataset(1, "trajectories"))
    annotated, notes = coordinator.call("label", items, labeling, "label")
    written = write_labels(RunDirectory(tmp_path), [annotation for _, annotation in annotated])
    rows = audited(RunDirectory(tmp_path), labeling)
    given = [row for row in rows if row.parent_id is None]
    assert [row.trajectory for row in given] == [trajectory for _, trajectory in items]
    assert {row.labeler for row in rows} == {labeler}
    assert (written, notes["cost"]["checks"]) == (len(rows), sum(len(row.estimates) for row in given))
    most = {"saps": 2, "random": 2, "outcome": 0}.get(labeler)
    assert all(len(row.estimates) <= (len(row.step_labels) if most is None else most) for row in given)
