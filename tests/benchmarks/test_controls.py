"""The comparison with controls without a run: what each arm is asked for, and the paired bootstrap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import controls
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config

CONFIG = "configs/chain.yaml"


def evaluation(*correct: bool) -> dict[str, Any]:
    return {"test": {"greedy_accuracy": sum(correct) / len(correct)}, "correct": list(correct)}


def cost(trained: int, generated: int = 0) -> dict[str, Any]:
    return {"cost": {"trained_tokens": trained, "generated_tokens": generated}}


SAPO_STAGES = {
    "round-0/sft": cost(1000),
    "round-0/evaluate": evaluation(True, False, False, False) | cost(0, 9999),
    "round-0/warnings": {"signs": []},
    "round-1/sample": cost(0, 300),
    "round-1/prm": cost(150),
    "round-1/self-verification": cost(0, 9999),
    "round-1/align": cost(50),
    "round-3/evaluate": evaluation(True, True, True, False) | cost(0, 9999),
}
CONTROLS = {"sft": evaluation(True, True, False, False), "rft": evaluation(True, False, True, False)}


@pytest.mark.parametrize("seeds", ["", "0,a", "0,,1", "-1", "1,01"])
def test_seeds_are_different_whole_numbers(seeds: str) -> None:
    result = CliRunner().invoke(controls.main, [f"--seeds={seeds}"])
    assert result.exit_code == 2
    assert f"{seeds!r} is no list of different whole numbers, such as 0,1,2" in result.stderr


def test_each_seed_runs_sapo_longer_sft_and_right_samples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Sequence[str]] = {}

    def complete(config: str, overrides: Sequence[str]) -> Any:
        assert config == CONFIG
        *given, run_dir = overrides
        name = run_dir.removeprefix("run_dir=runs/")
        asked[name] = given
        if name.startswith("chain"):
            stages: dict[str, Any] = SAPO_STAGES
        else:
            stages = {f"round-{0 if 'sft' in name else 3}/evaluate": CONTROLS[name.split("-")[1]]}
        return SimpleNamespace(stages=lambda: stages)

    monkeypatch.setattr(controls, "complete", complete)
    result = CliRunner().invoke(controls.main, ["--seeds=0,7", "--json", "align.beta=0.2"], catch_exceptions=False)
    made = json.loads(result.stdout.splitlines()[-1])
    assert made["seeds"] == [{"start": 0.25, "sapo": 0.75, "sft": 0.5, "rft": 0.5}] * 2
    assert made["sapo_minus"]["sft"]["difference"] == made["sapo_minus"]["rft"]["difference"] == 0.25
    assert list(asked) == [f"{arm}-{seed}" for seed in (0, 7) for arm in ("chain", "control-sft", "control-rft")]
    # Rounds trained on 200 tokens and generated 300: SFT for half as many again as its own 1,000.
    epochs = round(1.5 * load_config(RunConfig, CONFIG).sft.epochs)
    assert {"seed=7", "align.beta=0.2", "rounds=0", f"sft.epochs={epochs}"} <= set(asked["control-sft-7"])
    assert asked["control-rft-7"] == ["align.beta=0.2", "seed=7", "verify=false", "pairs.max_per_question=0"]
    assert asked["chain-0"] == ["align.beta=0.2", "seed=0"]


def test_the_difference_is_paired_by_question() -> None:
    """400 questions, two seeds. SAPO is right where the control is and on 40 more in each seed: 10 points, never fewer
    than none on any question. The same accuracies unpaired would leave an interval over 10 points wide."""
    rng = np.random.default_rng(0)
    control = rng.random((2, 400)) < 0.5
    full = control.copy()
    for seed in range(2):
        full[seed, np.flatnonzero(~control[seed])[:40]] = True
    made = controls._difference(control.tolist(), full.tolist())
    assert made["difference"] == pytest.approx(0.1)
    gains = np.mean(full, axis=0) - np.mean(control, axis=0)
    means = rng.choice(gains, (4000, 400)).mean(axis=1)
    assert made["ci95"] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.01)
    assert 0 < made["ci95"][0] < 0.1 < made["ci95"][1] < 0.15


def test_the_interval_of_no_difference_holds_zero_and_changes_sides_with_the_arms() -> None:
    rng = np.random.default_rng(1)
    one, other = ([(rng.random(300) < 0.6).tolist()] for _ in range(2))
    made, turned = controls._difference(one, other), controls._difference(other, one)
    assert made["ci95"][0] < 0 < made["ci95"][1]
    assert turned["difference"] == pytest.approx(-made["difference"])
    assert turned["ci95"] == pytest.approx([-made["ci95"][1], -made["ci95"][0]], abs=0.01)
