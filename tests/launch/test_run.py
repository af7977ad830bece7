"""One full round as a user starts it, on a two-CPU Ray, and what it leaves behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from sapo_ray.audit import audit
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import Trajectory
from sapo_ray.encoding import encode
from sapo_ray.evaluator import split_validation
from sapo_ray.metrics import best_threshold
from sapo_ray.models import Calibration
from sapo_ray.scoring import load_verifier, score
from sapo_ray.store import RunDirectory, labelled_of, rollout_of, trajectory_of
from sapo_ray.tasks import make_task

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
LABEL_COLUMNS = {
    *("trajectory_id", "question_id", "question", "steps", "answer", "correct", "source", "labeler", "scores"),
    *("predicted_first_error", "estimates", "case", "step_labels", "parent_id", "branch_step", "rollout_id"),
}
ACCURACY = {
    *("greedy_accuracy", "n", "ci95", "sampled_accuracy", "k", "pass_at_k", "majority_accuracy", "repetitiveness"),
}
SUMMARY = {
    "test": ACCURACY,
    "ood": ACCURACY,
    "verifier": {
        *("step_accuracy", "threshold", "auroc", "brier", "first_error_hit_rate", "random_hit_rate"),
        *("wrong_trajectories", "best_of_n_accuracy", "self_verification_error", "self_verification"),
    },
    "samples": {
        *("trajectories", "labels", "cases", "step_labels", "mean_largest_drop", "repetitiveness", "duplicates"),
        "empty",
    },
    "pairs": {"trajectories", "pairs", "unpaired", "share_unlike_outcome", "share_unlike_by_chance"},
    "cost": {
        *("trajectories", "checks", "rollouts", "prompt_tokens", "cached_tokens", "generated_tokens", "scored_tokens"),
        *("trained_tokens", "programs", "program_timeouts", "program_seconds", "flops", "seconds", "stages"),
    },
}
"""The sections of a round's summary, as docs/run-directory.md lists them."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def sapo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)


def test_summary_has_every_round_in_its_documented_shape(finished: RunDirectory) -> None:
    rounds = finished.summary()["rounds"]
    assert [entry["round"] for entry in rounds] == [0, 1]
    shapes = [{name: set(entry[name]) for name in SUMMARY if entry[name] is not None} for entry in rounds]
    assert shapes == [{name: keys for name, keys in SUMMARY.items() if name != "pairs"}, SUMMARY]
    assert all(entry.keys() == {"round", *SUMMARY, "quarantined", "warnings"} for entry in rounds)
    for entry in rounds:
        assert entry["test"]["n"] == 20
        low, high = entry["test"]["ci95"]
        assert 0 <= low <= entry["test"]["greedy_accuracy"] <= high <= 1
        assert entry["cost"]["generated_tokens"] > 0
        assert entry["cost"]["seconds"]["evaluate"] > 0
    assert not math.isnan(json.loads(json.dumps(rounds[1]))["cost"]["flops"])


def test_checkpoints_load_with_transformers_alone(finished: RunDirectory) -> None:
    for number in (0, 1):
        AutoModelForCausalLM.from_pretrained(finished.checkpoint("reasoner", number))
        verifier = AutoModelForTokenClassification.from_pretrained(finished.checkpoint("verifier", number))
        assert verifier.config.num_labels == 1
        assert not list(Path(finished.checkpoint("verifier", number)).glob("*.bin"))


def test_the_resolved_config_is_kept(finished: RunDirectory) -> None:
    kept = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert kept["task"]["modulus"] == 5
    assert kept["labeling"]["labeler"] == "saps"
    assert load_config(RunConfig, finished.path / "config.yaml").run_dir == str(finished.path)


@pytest.mark.parametrize("number", [0, 1])
def test_every_label_follows_from_labels_and_rollouts(finished: RunDirectory, number: int) -> None:
    rows = list(finished.read(number, "labels"))
    assert rows[0].keys() >= LABEL_COLUMNS
    labeling = load_config(RunConfig, finished.path / "config.yaml").labeling
    rollouts = map(rollout_of, finished.read(number, "rollouts"))
    assert list(audit([labelled_of(row) for row in rows], rollouts, labeling)) == []
    texts = [(row["question_id"], tuple(row["steps"])) for row in rows]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("number", [0, 1])
def test_a_verifiers_calibration_follows_from_its_scores(finished: RunDirectory, number: int) -> None:
    checkpoint = finished.checkpoint("verifier", number)
    task = make_task(load_config(RunConfig, finished.path / "config.yaml").task)
    model, tokenizer = load_verifier(str(checkpoint)), AutoTokenizer.from_pretrained(checkpoint)

    def scores(trajectories: list[Trajectory]) -> list[list[float]]:
        return score(model, [encode(tokenizer, task.prompt(t.question), t.steps) for t in trajectories], 4096)

    rows = [labelled_of(row) for row in finished.read(number, "labels")]
    right = [row.trajectory for row in rows if row.step_labels[0] == 1 and row.trajectory.source == "sampled"]
    validation = [trajectory_of(row) for row in finished.read(0, "validation")]
    tuning, _ = split_validation(validation, 20)
    calibration = Calibration.load(checkpoint)
    assert calibration is not None
    assert calibration.start_score == pytest.approx(fmean(first for first, *_ in scores(right)), abs=1e-5)
    threshold = best_threshold([min(row) for row in scores(tuning)], [t.correct for t in tuning])
    assert calibration.threshold == pytest.approx(threshold, abs=1e-5)


def test_saps_labels_carry_scores_and_cases(finished: RunDirectory) -> None:
    wrong = [row for row in finished.read(1, "labels") if row["source"] == "sampled" and not row["correct"]]
    assert wrong
    for row in wrong:
        assert len(row["scores"]) == len(row["steps"])
        assert row["case"] in ("a", "b", "c", "d")
        assert len(row["estimates"]) <= 2


def test_a_finished_run_is_not_done_again(finished: RunDirectory) -> None:
    before = _times(finished)
    result = sapo("run", str(TINY), f"run_dir={finished.path}")
    assert result.returncode == 0, result.stderr
    assert _times(finished) == before


def test_another_config_on_the_same_run_is_refused(finished: RunDirectory) -> None:
    result = sapo("run", str(TINY), f"run_dir={finished.path}", "sft.epochs=3")
    assert result.returncode == 2
    assert "sft.epochs" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def _times(run: RunDirectory) -> Mapping[str, Any]:
    files = [*run.path.glob("round-*/*/*.parquet"), *run.path.glob("checkpoints/*/*.safetensors")]
    return {str(file): file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
def test_colocated_engines_and_training_take_turns_where_only_one_of_them_fits(tmp_path: Path) -> None:
    """Two CPUs: engines, verifier and coordinator need 1.8, training and coordinator 1.8."""
    places = ["engine.cpus_per_worker=1.5", "engine.threads=1", "trainer.cpus_per_worker=1.7"]
    refused = sapo("run", str(TINY), f"run_dir={tmp_path / 'separate'}", *places)
    assert (refused.returncode, (tmp_path / "separate").exists()) == (2, False)
    assert "the run needs 3.5 CPUs" in refused.stderr
    result = sapo("run", str(TINY), f"run_dir={tmp_path / 'turns'}", "placement=colocated", *places)
    assert result.returncode == 0, result.stderr
    rounds = RunDirectory(tmp_path / "turns").summary()["rounds"]
    assert [entry["verifier"]["auroc"] is not None for entry in rounds] == [True, True]
