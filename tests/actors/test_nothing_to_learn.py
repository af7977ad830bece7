"""Runs in which there is nothing to learn: they end, and say what was skipped and why (see docs/run-directory.md)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.run import Run
from actors.sapo import sapo
from launch.session import ray_session
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory, Question
from sapo_ray.errors import SapoError
from sapo_ray.labelers import label_correct
from sapo_ray.manifest import Manifest
from sapo_ray.models import Calibration
from sapo_ray.objectives.base import collate
from sapo_ray.objectives.sft import SFT
from sapo_ray.report import warning_signs
from sapo_ray.sampler import original_trajectory
from sapo_ray.store import (
    RunDirectory,
    checkpoint_name,
    label_row,
    labelled_of,
    rollout_of,
    trajectory_of,
    trajectory_row,
)
from sapo_ray.tasks.chain import VOCABULARY, Chain

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
NO_ANSWER = r"""
extends: {tiny}
rounds: 3
task:
  {{min_steps: 1, max_steps: 1, ood_min_steps: 2, ood_max_steps: 2, worked: 10, pool: 12, validation: 6, test: 6}}
# An answer stands behind an equals sign, a second step behind the end of a line.
sampling: {{max_tokens: 16, samples: 2, max_samples: 2, questions: 6, stop: ["=", "\n"]}}
labeling: {{rollouts: 2, truncated: check}}
pairs: {{eta: 1}}
sft: {{epochs: 1, max_updates: 1}}
evaluation: {{test: 6, ood: 2, sampled_questions: 3}}
"""


class Recorder:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def begin(self, stage: str) -> None: ...

    def update(self, done: int, total: int, detail: str) -> None: ...

    def end(self, notes: Mapping[str, Any]) -> None: ...

    def warn(self, sign: str) -> None:
        self.warnings.append(sign)

    def say(self, event: str) -> None: ...


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = tmp_path_factory.mktemp("config") / "no-answer.yaml"
    path.write_text(NO_ANSWER.format(tiny=TINY))
    return load_config(RunConfig, path)


@pytest.fixture(scope="module", autouse=True)
def session(config: RunConfig) -> Iterator[None]:
    with ray_session(config):
        yield


@pytest.fixture(scope="module")
def unanswered(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Recorder]:
    """A whole run on one-step problems: two rounds without an answer, then one whose samples are all right."""
    store, recorder = RunDirectory(tmp_path_factory.mktemp("runs") / "unanswered"), Recorder()
    store.create()
    _all_right(store, config)
    with Run(config, store, recorder) as run:
        sapo(run)
    return store, recorder


def _all_right(store: RunDirectory, config: RunConfig) -> None:
    """Round 3's samples as a perfect reasoner would have drawn them."""
    task = Chain(config.task)

    def solved(question: Question) -> LabelledTrajectory:
        solution = task.solve(task.parse(question.text))
        trajectory = original_trajectory(replace(question, solution=solution))
        trajectory = replace(trajectory, id=f"round-3/{question.id}/0", source="sampled")
        return LabelledTrajectory(trajectory, "saps", label_correct(trajectory).step_labels, case="correct")

    rows = [solved(question) for question in task.questions("pool")]
    with closing(store.writer(3, "trajectories")) as trajectories, closing(store.writer(3, "labels")) as labels:
        trajectories.extend(trajectory_row(row.trajectory) for row in rows)
        labels.extend(label_row(row) for row in rows)
    steps = {"right": len(rows), "wrong": 0, "masked": 0}
    store.finish("round-3/sample", {"labels": len(rows), "step_labels": steps, "seconds": 0.0})


def _weights(checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(Path(checkpoint, "model.safetensors"))


def _same(one: str, other: str) -> bool:
    first, second = _weights(one), _weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def _figures(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _figures(item)
    elif isinstance(value, int | float):
        yield value


def test_every_round_ends_with_figures_that_are_numbers(unanswered: tuple[RunDirectory, Recorder]) -> None:
    rounds = unanswered[0].summary()["rounds"]
    assert [entry["round"] for entry in rounds] == [0, 1, 2, 3]
    assert all(map(math.isfinite, _figures(rounds)))
    for entry in rounds:
        assert entry["test"]["greedy_accuracy"] == entry["test"]["pass_at_k"] == entry["test"]["majority_accuracy"] == 0
        assert entry["verifier"]["self_verification_error"] is None
        assert entry["verifier"]["auroc"] is None or 0 <= entry["verifier"]["auroc"] <= 1


@pytest.mark.parametrize("number", [1, 2])
def test_where_nothing_is_right_every_step_is_wrong(unanswered: tuple[RunDirectory, Recorder], number: int) -> None:
    store, _ = unanswered
    rows = [labelled_of(row) for row in store.read(number, "labels")]
    assert rows
    assert not any(label for row in rows for label in row.step_labels)
    assert {(row.case, len(row.step_labels)) for row in rows if row.parent_id is None} == {("a", 1)}
    rollouts = [rollout_of(row) for row in store.read(number, "rollouts")]
    assert rollouts
    assert not any(rollout.correct or rollout.answer for rollout in rollouts)


def test_a_verifier_that_saw_no_right_step_has_no_start_score_and_detects_all_the_same(
    unanswered: tuple[RunDirectory, Recorder],
) -> None:
    store, _ = unanswered
    assert [_start_score(store, number) is None for number in range(4)] == [False, True, True, False]
    wrong = [row for row in store.read(2, "labels") if row["source"] == "sampled"]
    assert all(row["predicted_first_error"] is not None and row["scores"] for row in wrong)


def _start_score(store: RunDirectory, number: int) -> float | None:
    calibration = Calibration.load(store.checkpoint("verifier", number))
    assert calibration
    return calibration.start_score


def test_without_a_pair_right_solutions_teach_alone(unanswered: tuple[RunDirectory, Recorder]) -> None:
    store, _ = unanswered
    for number, right in ((1, 10), (2, 10), (3, 22)):
        rows = list(store.read(number, "pairs"))
        assert [row["rejected"] for row in rows] == [None] * right
        assert not _same(store.checkpoint("reasoner", number), store.checkpoint("reasoner", 0))


def test_labels_of_one_kind_are_warned_of(unanswered: tuple[RunDirectory, Recorder]) -> None:
    assert [warning for warning in unanswered[1].warnings if "labelled" in warning] == [
        "round 0: no step of a sampled solution is labelled right",
        "round 1: no step of a sampled solution is labelled right",
        "round 2: no step of a sampled solution is labelled right",
        "round 3: no step of a sampled solution is labelled wrong",
    ]


def test_empty_completions_skip_what_needs_samples(
    unanswered: tuple[RunDirectory, Recorder], config: RunConfig, tmp_path: Path
) -> None:
    """Round 1 on the first run's round 0. Every character ends a completion, and one token is all there is."""
    store, recorder = _from_round_zero(unanswered[0], tmp_path / "empty"), Recorder()
    sampling = replace(config.sampling, stop=list(VOCABULARY), max_tokens=1)
    pairs = replace(config.pairs, keep_unpaired=False)
    with Run(replace(config, rounds=1, sampling=sampling, pairs=pairs), store, recorder) as run:
        sapo(run)
    assert not list(store.read(1, "trajectories"))
    assert recorder.warnings[-3:] == [
        "round-1/prm skipped: no trajectory was labelled; verifier-1 is verifier-0",
        "round-1/align skipped: no pair reaches pairs.eta and pairs.keep_unpaired is false; reasoner-1 is reasoner-0",
        "round 1: samples are empty: 100% of a question's samples have no finished step",
    ]
    for role in ("reasoner", "verifier"):
        assert _same(store.checkpoint(role, 1), store.checkpoint(role, 0))
    assert _start_score(store, 1) == _start_score(store, 0)
    zero, one = store.summary()["rounds"]
    assert zero == unanswered[0].summary()["rounds"][0]
    assert (one["samples"]["trajectories"]["sampled"], one["pairs"]["pairs"], one["pairs"]["unpaired"]) == (0, 0, 0)
    assert (
        one["test"]["greedy_accuracy"] == one["test"]["sampled_accuracy"] == one["verifier"]["best_of_n_accuracy"] == 0
    )
    assert (one["verifier"]["auroc"], one["verifier"]["brier"], one["test"]["repetitiveness"]) == (None, None, None)


def test_no_first_verifier_without_a_label(config: RunConfig, tmp_path: Path) -> None:
    """As where all worked solutions miss the answer, and no sample is to be labelled."""
    store = RunDirectory(tmp_path / "unlabelled")
    store.create()
    store.finish("round-0/sample", {"labels": 0, "seconds": 0.0})
    with Run(config, store, Recorder()) as run:
        run.sample_and_label(0)
        with pytest.raises(SapoError, match="round 0: no verifier can be trained, for no solution was labelled"):
            run.train_verifier(0)
    assert not (store.path / "checkpoints/verifier-0").exists()


@pytest.mark.slow
def test_samples_that_are_all_right_are_labelled_without_a_check(
    unanswered: tuple[RunDirectory, Recorder], config: RunConfig, tmp_path: Path
) -> None:
    """Round 1 on the first run's round 0, by a reasoner that knows every solution of the pool by heart."""
    store = _from_round_zero(unanswered[0], tmp_path / "right")
    name = checkpoint_name("reasoner", 0)
    with store.folder.staging(name) as directory:
        _learn_by_heart(store.checkpoint("reasoner", 0), Chain(config.task), directory)
        files = store.put(directory, name)
    store.finish("round-0/sft", {**store.stages()["round-0/sft"], "files": files})
    sampling = replace(config.sampling, stop=[], temperature=0.0)
    with Run(replace(config, rounds=1, sampling=sampling), store, Recorder()) as run:
        run.sample_and_label(0)  # this and the next are done already
        run.train_verifier(0)
        run.sample_and_label(1)
    rows = [labelled_of(row) for row in store.read(1, "labels")]
    assert [row.trajectory for row in rows] == [trajectory_of(row) for row in store.read(1, "trajectories")]
    assert [(row.trajectory.correct, row.case, row.step_labels, row.estimates) for row in rows] == [
        (True, "correct", (1,), ())
    ] * 6
    assert not list(store.read(1, "rollouts"))
    notes = store.stages()["round-1/sample"]
    by_hand = unanswered[0].stages()["round-3/sample"]["step_labels"]
    assert notes["step_labels"] == {kind: count // 2 for kind, count in by_hand.items()}
    assert (notes["cost"]["trajectories"], notes["cost"]["checks"], notes["cost"]["rollouts"]) == (6, 0, 0)
    assert warning_signs(1, store.stages()) == [
        "samples hardly differ: 100% of a question's samples but the first repeat an earlier one, 0% before",
        "no step of a sampled solution is labelled wrong",
    ]


def _learn_by_heart(checkpoint: str, task: Chain, path: Path) -> None:
    """Train a reasoner on the solutions of the pool, into the directory `path`."""
    torch.set_num_threads(1)  # for so small a model the second one only gets in the engines' way
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    solved = [
        trajectory_row(original_trajectory(replace(q, solution=task.solve(task.parse(q.text)))))
        for q in task.questions("pool")
    ]
    batch = collate([SFT().example(row, task.prompt, tokenizer) for row in solved], tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        SFT().terms(model, batch)["nll"].backward()
        optimizer.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _from_round_zero(finished: RunDirectory, path: Path) -> RunDirectory:
    """A run directory that holds another's round 0, done."""
    store = RunDirectory(path)
    store.create()
    shutil.copytree(finished.path / "round-0", path / "round-0")
    for name in ("base", "reasoner-0", "verifier-0"):
        shutil.copytree(finished.path / "checkpoints" / name, path / "checkpoints" / name)
    files = Manifest(finished.folder).files()
    for stage, notes in finished.stages().items():
        if stage.startswith(("base", "round-0/")):
            store.finish(stage, {**notes, "files": files[stage]})
    return store
