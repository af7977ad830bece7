"""`sapo audit` on a run directory written by hand: one wrong trajectory of round 1, checked at its predicted error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launch.cli import cli
from sapo_ray.data import Estimate, LabelledTrajectory, Rollout, Trajectory
from sapo_ray.models import CALIBRATION_FILE, Calibration
from sapo_ray.pairs import PairsConfig, make_pairs
from sapo_ray.sampler import original_trajectory
from sapo_ray.shards import Kind
from sapo_ray.store import RunDirectory, label_row, pair_row, rollout_row, trajectory_row
from sapo_ray.tasks.chain import Chain, ChainConfig

SIZES = {"worked": 2, "pool": 1, "validation": 1, "test": 0, "ood": 0}
TASK = Chain(ChainConfig(**SIZES))
(QUESTION,) = TASK.questions("pool")
GOLD, MISS = QUESTION.answer, str((int(QUESTION.answer) + 1) % 10)
WRONG = Trajectory("w", QUESTION.id, QUESTION.text, ("a", "b", f"={MISS}"), MISS, correct=False)
ROLLOUTS = [
    Rollout(f"w/{step}/0", "w", QUESTION.id, step, 0, (f"={answer}",), answer, answer == GOLD, False, True)
    for step, answer in enumerate((GOLD, MISS))
]
LABELLED = LabelledTrajectory(
    WRONG,
    "saps",
    (1, 0, 0),
    (0.75, 0.25, 0.0),
    predicted_first_error=1,
    estimates=(Estimate(0, 1, 1, 1, ("w/0/0",)), Estimate(1, 0, 0, 1, ("w/1/0",))),
    case="a",
)
CONFIG = f"rounds: 1\ntask: {json.dumps(SIZES)}\n"
NO_CALIBRATION = "has no calibration.json, without which no prediction can be derived again"
CHECKED = {"trajectories": 1, "labels": 1, "rollouts": 2}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    store = RunDirectory(tmp_path / "run")
    store.create()
    (store.path / "config.yaml").write_text(CONFIG + "labeling: {rollouts: 1, expand: false}\n")
    write(store, 1, "trajectories", [trajectory_row(WRONG)])
    write(store, 1, "labels", [label_row(LABELLED)])
    write(store, 1, "rollouts", map(rollout_row, ROLLOUTS))
    store.finish("round-1/sample", {"trajectories": {"sampled": 1}, "labels": 1})
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


def test_rows_that_are_gone_are_missed(run: RunDirectory) -> None:
    run.write_file(f"checkpoints/verifier-0/{CALIBRATION_FILE}", Calibration(0.8, 0.5).text())
    run.finish("round-1/sample", {"trajectories": {"sampled": 3}, "labels": 2})
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    assert json.loads(result.stdout)["problems"] == [
        "round 1: trajectories: 1 rows are stored, but 3 were made",
        "round 1: labels: 1 rows are stored, but 2 were made",
    ]


def test_a_start_score_in_the_config_needs_no_verifier(run: RunDirectory) -> None:
    (run.path / "config.yaml").write_text(CONFIG + "labeling: {rollouts: 1, expand: false, start_score: 0.8}\n")
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    assert json.loads(result.stdout) == {"checked": CHECKED, "problems": []}


@pytest.mark.parametrize(
    ("rollout", "damage", "problem"),
    [
        (0, {"steps": (f"={MISS}",)}, f"answer '{GOLD}' is right, but its steps come to '{MISS}', which is wrong"),
        (1, {"steps": (f"={GOLD}",)}, f"answer '{MISS}' is wrong, but its steps come to '{GOLD}', which is right"),
        (1, {"answer": None}, f"answer None is wrong, but its steps come to '{MISS}', which is wrong"),
        (1, {"truncated": True}, f"answer '{MISS}' is wrong, but its steps come to None, which is wrong"),
        (1, {"question_id": "q"}, "q is no question that is sampled here"),
    ],
)
def test_a_rollout_that_was_tampered_with_is_found(
    run: RunDirectory, rollout: int, damage: Mapping[str, Any], problem: str
) -> None:
    """Labels and estimates follow from what it is said to have reached."""
    run.write_file(f"checkpoints/verifier-0/{CALIBRATION_FILE}", Calibration(0.8, 0.5).text())
    rollouts = [replace(one, **damage) if i == rollout else one for i, one in enumerate(ROLLOUTS)]
    write(run, 1, "rollouts", map(rollout_row, rollouts))
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    (found,) = json.loads(result.stdout)["problems"]
    assert found.startswith(f"round 1: w/{rollout}/0: ")
    assert found.endswith(problem)


def test_a_label_of_a_trajectory_that_is_another_or_gone_is_found(run: RunDirectory) -> None:
    run.write_file(f"checkpoints/verifier-0/{CALIBRATION_FILE}", Calibration(0.8, 0.5).text())
    write(run, 1, "trajectories", [trajectory_row(replace(WRONG, steps=("c", "b", f"={MISS}")))])
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    assert json.loads(result.stdout)["problems"] == [
        "round 1: w: its row in labels is not that of a trajectory of this round"
    ]
    write(run, 1, "rollouts", [rollout_row(replace(ROLLOUTS[0], trajectory_id="v"))])
    result = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    assert "round 1: w/0/0: v is no trajectory that is labelled here" in json.loads(result.stdout)["problems"]


def write(store: RunDirectory, number: int, kind: Kind, rows: Iterable[Mapping[str, Any]]) -> None:
    with closing(store.writer(number, kind)) as writer:
        writer.extend(rows)


def test_validation_samples_and_pairs_that_were_tampered_with_are_found(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "run")
    store.create()
    (store.path / "config.yaml").write_text(CONFIG)
    fixed = replace(original_trajectory(TASK.questions("worked")[0]), id="v", source="sampled")
    question = TASK.questions("validation")[0]
    fixed = replace(fixed, question_id=question.id, question=question.text)
    fixed = replace(fixed, correct=fixed.answer == question.answer)
    right = original_trajectory(TASK.questions("worked")[1])
    wrong = replace(right, id="w", steps=("x",), answer=None, correct=False, source="sampled")
    (pair,) = map(pair_row, make_pairs([right, wrong], {right.id: 0.7, "w": 0.1}, PairsConfig()))
    write(store, 0, "validation", [trajectory_row(fixed)])
    write(store, 0, "original", [trajectory_row(right)])
    write(store, 1, "trajectories", [trajectory_row(wrong)])
    store.finish("round-0/validation", {"trajectories": 1})
    store.finish("round-1/pairs", {"pairs": 1, "unpaired": 0})

    def problems(sample: Mapping[str, Any], *pairs: Mapping[str, Any]) -> list[str]:
        write(store, 0, "validation", [sample])
        write(store, 1, "pairs", pairs)
        found = json.loads(CliRunner().invoke(cli, ["audit", str(store.path), "--json"]).stdout)
        assert found["checked"] == {"validation": 1, "pairs": len(pairs)}
        return [str(problem) for problem in found["problems"]]

    sound = trajectory_row(fixed)
    assert problems(sound, pair) == []
    assert problems({**sound, "correct": not fixed.correct}, pair)[0].startswith("validation: v: its answer ")
    assert problems(sound, {**pair, "rejected_score": 0.65}) == [
        f"round 1: pair {right.id} over w does not follow from its solutions and their scores",
        f"round 1: pair {right.id} alone is missing",
    ]
    assert problems(sound) == ["round 1: pairs: 0 rows are stored, but 1 were made"]


def test_the_worked_solutions_are_those_of_the_task(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "run")
    store.create()
    (store.path / "config.yaml").write_text(CONFIG)
    rows = [trajectory_row(original_trajectory(q)) for q in TASK.questions("worked")]
    store.finish("round-0/original", {"trajectories": 2})

    def problems(*rows: Mapping[str, Any]) -> list[str]:
        write(store, 0, "original", rows)
        found = json.loads(CliRunner().invoke(cli, ["audit", str(store.path), "--json"]).stdout)
        assert found["checked"] == {"original": len(rows)}
        return [str(problem) for problem in found["problems"]]

    one, other = (row["trajectory_id"] for row in rows)
    assert problems(*rows) == []
    assert problems(rows[0], {**rows[1], "correct": False}) == [
        f"{other}: it is not the worked solution that the task has"
    ]
    assert problems(rows[1]) == [f"{one}: it is not the worked solution that the task has"]
    assert problems(*rows, rows[0]) == [f"original: {one} is stored 2 times"]
