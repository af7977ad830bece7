"""The labelers' benchmark without engines: which trajectories it takes, its figures, and its line of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import labeling
from sapo_ray.annotator import Annotation
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.cost import Cost
from sapo_ray.data import Estimate, LabelledTrajectory, Question, Trajectory
from sapo_ray.evaluator import true_labels
from sapo_ray.labelers import LabelingConfig, drive, make_labeler
from sapo_ray.store import RunDirectory
from sapo_ray.tasks import Chain
from sapo_ray.tasks.chain import ChainConfig

COUNT = 4
CONFIG: Any = load_config(RunConfig, labeling.CONFIG).task
TASK = Chain(CONFIG)
TOKENS = {"saps": 10, "shepherd": 40, "omega": 20, "random": 10, "outcome": 0}


class Coordinator:
    """Answers as a coordinator whose reasoner errs in the third step, and whose checks say what the oracle says."""

    def __init__(self, *_: Any) -> None:
        self.calls: list[str] = []
        self.set_aside: dict[str, int] = {}  # by labeler the number of an item that it does not label

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None: ...

    def use(self, **_: Any) -> None: ...

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append(method)
        return getattr(self, method, lambda: None)(*args)

    def sample(self, questions: Sequence[Question], stage: str) -> list[tuple[Question, list[Trajectory]]]:
        return [(question, self._solutions(question)) for question in questions]

    def _solutions(self, question: Question) -> list[Trajectory]:
        """A right solution, one that ends too early, one without an answer, and a wrong one."""
        steps = TASK.solve(TASK.parse(question.text))
        written, _, result = steps[2].strip().rpartition("=")
        off = str((int(result) + 1) % CONFIG.modulus)
        rest = TASK.solve(TASK.parse(off + "".join(operations(question.text)[3:])))
        wrong = (*steps[:2], f"{written}={off}\n", *rest)
        texts = [steps, wrong[:-1], (*wrong[:-1], "?"), wrong]
        answers = [TASK.answer(text) for text in texts]
        return [
            Trajectory(f"{question.id}/{k}", question.id, question.text, text, answer, answer == question.answer)
            for k, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]

    def label(self, items: Sequence[labeling.Item], config: LabelingConfig, stage: str) -> Any:
        """`config`'s labeler, answered by the oracle; saps is shown a score that falls into the third step."""
        annotated = []
        items = [item for number, item in enumerate(items) if number != self.set_aside.get(config.labeler)]
        for question, trajectory in items:
            truth = true_labels(TASK, question, trajectory)
            assert truth
            scores = [0.9, 0.9, *[0.1] * (len(truth) - 2)]
            labels = drive(
                make_labeler(config, 0.9, 0)(trajectory, scores),
                lambda steps, truth=truth: tuple(truth[step] for step in steps),  # type: ignore[misc]
            )
            row = LabelledTrajectory(trajectory, config.labeler, labels.step_labels)
            annotated.append(((question, trajectory), Annotation([row])))
        made = TOKENS[config.labeler] * len(items)
        return annotated, {"cost": Cost(checks=len(items), rollouts=2 * len(items), generated_tokens=made).as_dict()}


def operations(text: str) -> list[str]:
    """The operations of an accumulator problem."""
    return re.findall(r"[-+*][0-9]+", text)


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Coordinator:
    """What `main` starts, without Ray: a finished run's directory and a coordinator."""
    made = Coordinator()
    settings = load_config(RunConfig, labeling.CONFIG)

    @contextmanager
    def session(_: RunConfig) -> Iterator[None]:
        yield

    def complete(_: str, overrides: Sequence[str]) -> RunDirectory:
        assert overrides == ["rounds=0", "run_dir=runs/labeling-round-0"]
        return RunDirectory(tmp_path)

    monkeypatch.setattr(labeling, "complete", complete)
    monkeypatch.setattr(labeling, "load_config", lambda *_: settings)
    monkeypatch.setattr(labeling, "ray_session", session)
    monkeypatch.setattr(labeling, "CoordinatorClient", lambda *_: made)
    return made


def test_the_line_of_json_holds_every_labeler_at_every_length(coordinator: Coordinator) -> None:
    result = CliRunner().invoke(labeling.main, ["--json", f"--trajectories={COUNT}"], catch_exceptions=False)
    lengths = json.loads(result.stdout.splitlines()[-1])["lengths"]
    assert list(lengths) == ["5", "8", "12"]
    for length, labelers in lengths.items():
        assert labelers.keys() == TOKENS.keys()
        for name, figures in labelers.items():
            keys = {
                "checks",
                "rollouts",
                "generated_tokens",
                "flops",
                "seconds",
                "label_accuracy",
                "false_successes",
                "program_seconds",
                "n",
            }
            assert figures.keys() == keys
            assert (figures["n"], figures["checks"], figures["rollouts"]) == (COUNT, 1, 2)
            assert figures["generated_tokens"] == TOKENS[name]
            assert figures["false_successes"] is None
        accuracies = {name: figures["label_accuracy"] for name, figures in labelers.items()}
        assert accuracies["saps"] == accuracies["shepherd"] == accuracies["omega"] == 1
        assert accuracies["outcome"] == pytest.approx(1 - 2 / int(length))
    assert coordinator.calls == ["sample", *["reset_prefix_cache", "label"] * 5] * 3


def test_labels_are_compared_on_what_every_labeler_has_labelled(coordinator: Coordinator) -> None:
    """Shepherd's own among them, which are the measure where there is no oracle."""
    coordinator.set_aside = {"shepherd": 0, "saps": 2}
    reporter, task, settings = _Silent(), Without(), load_config(RunConfig, labeling.CONFIG)
    figures = labeling._compare(coordinator, reporter, settings, task, "test", COUNT, True)  # type: ignore[arg-type]
    assert {name: (row["n"], row["checks"]) for name, row in figures.items()} == dict.fromkeys(TOKENS, (COUNT - 2, 1))
    assert figures["saps"]["label_accuracy"] == figures["shepherd"]["label_accuracy"] == 1


@pytest.mark.parametrize(("config", "count"), [("labeling.yaml", 300), ("gsm8k/qwen2.5-coder-0.5b-cpu.yaml", 40)])
def test_fewer_trajectories_are_asked_of_a_real_model(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, count: int
) -> None:
    settings, asked = load_config(RunConfig, labeling.CONFIG.parent / config), set[int]()
    monkeypatch.setattr(labeling, "load_config", lambda *_: settings)
    monkeypatch.setattr(labeling, "_compare", lambda *arguments: asked.add(arguments[5]))
    monkeypatch.setattr(labeling, "_print", lambda _: None)
    monkeypatch.setattr(labeling, "complete", lambda *_: RunDirectory(tmp_path))
    CliRunner().invoke(labeling.main, catch_exceptions=False)
    assert asked == {count}


def test_the_table_sets_tokens_against_shepherd_and_omega(coordinator: Coordinator) -> None:
    result = CliRunner().invoke(labeling.main, [f"--trajectories={COUNT}"], catch_exceptions=False)
    saps = next(line for line in result.stdout.splitlines() if " saps " in line)
    cells = [cell.strip() for cell in saps.strip("│ ").split("│")]
    assert cells[1] == "1"  # label accuracy, then false successes
    assert cells[3:6] == ["1", "2", "10"]
    assert cells[-3:-1] == ["0.25", "0.50"]


def test_only_whole_wrong_solutions_with_an_answer_are_taken(coordinator: Coordinator) -> None:
    CliRunner().invoke(labeling.main, ["--json", "--trajectories=1"], catch_exceptions=False)
    task = Chain(labeling._task_of_length(load_config(RunConfig, labeling.CONFIG), 8, 2))
    question = task.questions("pool")[0]
    right, early, unanswered, wrong = coordinator._solutions(question)
    assert (right.correct, early.answer is not None, unanswered.answer, wrong.correct) == (True, True, None, False)
    reporter: Any = _Silent()
    items = labeling._wrong_trajectories(coordinator, reporter, task, "8", 2)  # type: ignore[arg-type]
    assert [trajectory.id for _, trajectory in items] == [f"{q.id}/3" for q in task.questions("pool")[:2]]


class Without(Chain):
    """The task without its oracle."""

    def __init__(self) -> None:
        super().__init__(CONFIG)

    def oracle(self, question: Question, steps: Sequence[str]) -> None:
        return None


class _Silent:
    def begin(self, stage: str) -> None: ...

    def end(self, notes: object) -> None: ...


def test_the_questions_are_of_one_length_and_none_that_the_models_were_trained_on() -> None:
    settings = load_config(RunConfig, labeling.CONFIG)
    pool = Chain(labeling._task_of_length(settings, 8, 5)).questions("pool")
    assert len(pool) == 100
    assert {len(operations(question.text)) for question in pool} == {8}
    trained = Chain(replace(settings.task, min_steps=8, max_steps=8, worked=100, pool=100, test=0, ood=0))
    assert not {q.text for q in pool} & {q.text for split in ("worked", "pool") for q in trained.questions(split)}  # type: ignore[arg-type]


def test_successes_from_prefixes_that_the_oracle_calls_unreachable_are_counted() -> None:
    """7+3=9 is wrong. Step 0 is said to reach the answer, by chance, and so is step 1; masked steps count as wrong."""
    task = Chain(ChainConfig(modulus=97, max_operand=5))
    question = Question("q", "7+3*2-5", "15")
    trajectory = Trajectory("t", "q", question.text, ("7+3=10\n", "10*2=21\n", "21-5=16\n"), "16", correct=False)
    estimates = (Estimate(0, 1, 1, 1, ("a",)), Estimate(1, 1, 1, 1, ("b",)), Estimate(2, 0, 0, 1, ("c",)))
    row = LabelledTrajectory(trajectory, "shepherd", (1, 1, -1), estimates=estimates)
    quality = labeling._quality(task, [((question, trajectory), row)], {})
    assert quality == {"label_accuracy": pytest.approx(1 / 3), "false_successes": 0.5}


def test_without_an_oracle_shepherds_labels_are_the_measure() -> None:
    task: Any = Without()
    trajectory = Trajectory("t", "q", "7+3*2-5", ("7+3=10\n", "10*2=21\n", "21-5=16\n"), "16", correct=False)
    row = LabelledTrajectory(trajectory, "saps", (1, 1, 0), estimates=(Estimate(1, 1, 1, 1, ("b",)),))
    quality = labeling._quality(task, [((Question("q", "7+3*2-5", "15"), trajectory), row)], {"t": (1, 0, 0)})
    assert quality == {"label_accuracy": pytest.approx(2 / 3), "false_successes": None}
