"""`sapo audit` on a run directory written by hand: one wrong trajectory of round 1, checked at its predicted error."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import cli
from sapo_ray.data import Estimate, LabelledTrajectory, Rollout, Trajectory
from sapo_ray.models import CALIBRATION_FILE, Calibration
from sapo_ray.store import RunDirectory, label_row, rollout_row

WRONG = Trajectory("w", "q", "?", ("a", "b", "c"), "9", correct=False)
ROLLOUTS = [Rollout(f"w/{step}/0", "w", "q", step, 0, ("8",), "8", step == 0, False, True) for step in (0, 1)]
LABELLED = LabelledTrajectory(
    WRONG,
    "saps",
    (1, 0, 0),
    (0.75, 0.25, 0.0),
    predicted_first_error=1,
    estimates=(Estimate(0, 1, 1, 1, ("w/0/0",)), Estimate(1, 0, 0, 1, ("w/1/0",))),
    case="a",
)
NO_CALIBRATION = "has no calibration.json, without which no prediction can be derived again"
CHECKED = {"trajectories": 0, "labels": 1, "rollouts": 2}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    store = RunDirectory(tmp_path / "run")
    store.create()
    (store.path / "config.yaml").write_text("rounds: 1\nlabeling: {rollouts: 1, expand: false}\n")
    with closing(store.writer(1, "labels")) as labels, closing(store.writer(1, "rollouts")) as rollouts:
        labels.extend([label_row(LABELLED)])
        rollouts.extend(map(rollout_row, ROLLOUTS))
    store.finish("round-1/sample", {"labels": 1})
    return store


@pytest.mark.parametrize(
    ("start_score", "problems"),
    [
        (0.8, []),
        (None, []),
        (1.4, ["round 1: w: the predicted first error is 1, not 0"]),
        ("lost", [f"round 1: checkpoints/verifier-0 {NO_CALIBRATION}"]),
    ],
)
def test_predictions_follow_from_the_last_verifiers_start_score(
    run: RunDirectory, start_score: float | str | None, problems: list[str]
) -> None:
    if not isinstance(start_score, str):
        run.write_file(f"checkpoints/verifier-0/{CALIBRATION_FILE}", Calibration(start_score, 0.5).text())
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    assert json.loads(result.stdout) == {"checked": CHECKED, "problems": problems}
    assert result.exit_code == bool(problems)


def test_a_start_score_in_the_config_needs_no_verifier(run: RunDirectory) -> None:
    (run.path / "config.yaml").write_text("rounds: 1\nlabeling: {rollouts: 1, expand: false, start_score: 0.8}\n")
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    assert json.loads(result.stdout) == {"checked": CHECKED, "problems": []}
