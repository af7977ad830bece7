"""What the stages of a run come to at most, in samples, tokens and FLOPs, before any of them has run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost, training_flops
from sapo_ray.encoding import encode
from sapo_ray.labelers import most_checks
from sapo_ray.labelers.base import LabelerName
from sapo_ray.models import CALIBRATION_ROWS
from sapo_ray.plan.shape import Shape
from sapo_ray.tasks.base import Split, Task
from sapo_ray.training import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEASURED = 200


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means over worked questions: tokens of a prompt and of a solution, steps of a solution."""

    prompt: float
    solution: float
    steps: float

    @property
    def sequence(self) -> float:
        """Tokens of a prompt and a solution."""
        return self.prompt + self.solution


def mean_lengths(task: Task, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """Over the first 200 worked questions."""
    questions = task.questions("worked")[:_MEASURED]
    encoded = [encode(tokenizer, task.prompt(q.text), q.solution or (), finished=True) for q in questions]
    return Lengths(
        prompt=fmean(e.prompt_length for e in encoded),
        solution=fmean(len(e.ids) - e.prompt_length for e in encoded),
        steps=fmean(len(e.step_ends) for e in encoded),
    )


@dataclass
class Stage:
    """A stage of a run, its cost, and the requests that the coordinator makes in it."""

    name: str
    cost: Cost = field(default_factory=Cost)
    requests: int = 0


class Workload:
    """The stages of a run, each with the most that it comes to if samples are as long as worked solutions.

    All samples are taken as different, all rollouts of a check as sampled, from half-way on, and as kept by expansion;
    all pairs that there may be as made. `wrong` is the share of samples that miss the answer.
    """

    def __init__(
        self, config: RunConfig, questions: Mapping[Split, int], lengths: Lengths, shape: Shape, wrong: float
    ) -> None:
        self.config, self.questions, self.lengths, self.shape, self.wrong = config, questions, lengths, shape, wrong
        pool, samples = questions["pool"], config.sampling.samples
        self.asked = min(config.sampling.questions or pool, pool)
        """Questions that a round samples from."""
        self.sampled = self.asked * samples
        """Trajectories that a round samples."""
        self.validated = questions["validation"] * samples

    def stages(self) -> list[Stage]:
        """Every stage that costs something, in their order."""
        stages = [self._finetune(), self._sample_validation()]
        for number in range(self.config.rounds + 1):
            stages.append(self._sample_and_label(number))
            if self.config.verify:
                stages += [self._train_verifier(number), self._calibrate(number)]
                stages.append(self._verify_self(f"round-{number}/self-verification"))
            if number and self.config.verify:
                stages.append(self._score_pairs(number))
            if number:
                stages.append(self._align(number))
            if number and self.config.verify:
                stages.append(self._verify_self(f"round-{number}/self-verification-aligned"))
            stages.append(self._evaluate(number))
        return stages

    def _finetune(self) -> Stage:
        stage, worked = Stage("round-0/sft"), self.questions["worked"]
        self._train(stage, "sft", worked, worked)
        return stage

    def _sample_validation(self) -> Stage:
        stage = Stage("round-0/validation")
        self._sample(stage, self.questions["validation"], self.config.sampling.samples)
        return stage

    def _sample_and_label(self, number: int) -> Stage:
        stage = Stage(f"round-{number}/sample")
        self._sample(stage, self.asked, self.config.sampling.samples)
        if self.config.verify:
            right, wrong = self._labelled()
            stage.cost.trajectories = round(right + wrong)
            if number and self.config.labeling.uses_scores:
                self._score(stage, wrong)
            self._check(stage, wrong, self._labeler(number))
        return stage

    def _train_verifier(self, number: int) -> Stage:
        stage, labeling = Stage(f"round-{number}/prm"), self.config.labeling
        rows = sum(self._labelled()) + (self.questions["worked"] if number == 0 else 0)
        if labeling.expand:
            rows += self._labelled()[1] * self._checks(self._labeler(number)) * labeling.rollouts
        self._train(stage, "prm", rows, rows)
        return stage

    def _calibrate(self, number: int) -> Stage:
        stage = Stage(f"round-{number}/calibrate")
        self._score(stage, min(CALIBRATION_ROWS, sum(self._labelled())) + self.validated / 2)
        return stage

    def _verify_self(self, name: str) -> Stage:
        stage, fixed = Stage(name), min(self.config.evaluation.verification, self.validated / 2)
        stage.cost.trajectories = round(fixed)
        self._score(stage, fixed)
        self._check(stage, fixed / 2, "saps")
        return stage

    def _score_pairs(self, number: int) -> Stage:
        stage = Stage(f"round-{number}/pairs")
        self._score(stage, (number + 1) * self.sampled + self.questions["worked"])
        return stage

    def _align(self, number: int) -> Stage:
        """Pairs within each question's samples of all rounds so far, and right solutions that are left over."""
        stage, pairs = Stage(f"round-{number}/align"), self.config.pairs
        questions = min((number + 1) * self.asked, self.questions["pool"])
        each = (number + 1) * self.sampled / questions
        right, wrong = (1 - self.wrong) * each, self.wrong * each
        paired = min(pairs.max_per_question, right * wrong if pairs.require_outcome else math.inf)
        left = min(pairs.max_unpaired_per_question, max(0.0, right - paired)) if pairs.keep_unpaired else 0
        worked = self.questions["worked"] * min(pairs.max_unpaired_per_question, int(pairs.keep_unpaired))
        examples, sequences = questions * (paired + left) + worked, questions * (2 * paired + left) + worked
        self._train(stage, "align", examples, sequences)
        return stage

    def _evaluate(self, number: int) -> Stage:
        stage, config = Stage(f"round-{number}/evaluate"), self.config.evaluation
        test, ood = self.questions["test"], self.questions["ood"]
        test, ood = min(config.test or test, test), min(config.ood or ood, ood)
        drawn = min(config.sampled_questions, test)
        self._sample(stage, test + ood, 1)
        self._sample(stage, drawn, config.samples)
        if self.config.verify:
            self._score(stage, drawn * config.samples)
        return stage

    def _labelled(self) -> tuple[float, float]:
        """Right and wrong trajectories of a round that are labelled."""
        labeling = self.config.labeling
        right, wrong = (1 - self.wrong) * self.sampled, self.wrong * self.sampled
        return right * labeling.right_fraction, wrong * labeling.fraction

    def _labeler(self, number: int) -> LabelerName:
        return self.config.labeling.labeler if number else self.config.initial_labeler

    def _checks(self, labeler: LabelerName) -> int:
        return most_checks(labeler, max(1, math.ceil(self.lengths.steps)))

    def _sample(self, stage: Stage, questions: int, each: int) -> None:
        """So many solutions of each question. The prefix cache keeps prompts for all but the first of them."""
        self._generate(stage, questions * each, questions, self.lengths.prompt, self.lengths.solution)

    def _check(self, stage: Stage, wrong: float, labeler: LabelerName) -> None:
        """All checks of wrong trajectories, from prefixes that are half a solution long, on average."""
        checks, half = wrong * self._checks(labeler), self.lengths.solution / 2
        rollouts = checks * self.config.labeling.rollouts
        stage.cost += Cost(checks=round(checks), rollouts=round(rollouts))
        self._generate(stage, rollouts, checks, self.lengths.prompt + half, half)

    def _generate(self, stage: Stage, completions: float, prefixes: float, prompt: float, generated: float) -> None:
        engine = self.config.engine
        shared = prompt // engine.block_size * engine.block_size if engine.prefix_caching else 0.0  # in whole blocks
        cached = (completions - prefixes) * shared
        stage.requests += round(completions)
        stage.cost += Cost(
            prompt_tokens=round(completions * prompt),
            cached_tokens=round(cached),
            generated_tokens=round(completions * generated),
            programs=round(completions) if self.config.runs_programs else 0,
            flops=2.0 * self.shape.parameters * (completions * (prompt + generated) - cached),
        )

    def _score(self, stage: Stage, trajectories: float) -> None:
        tokens = trajectories * self.lengths.sequence
        stage.requests += round(trajectories)
        stage.cost += Cost(scored_tokens=round(tokens), flops=2.0 * self.shape.verifier_parameters * tokens)

    def _train(self, stage: Stage, name: str, examples: float, sequences: float) -> None:
        """Passes over the examples, which have so many sequences, as far as `max_updates` lets them go."""
        config: TrainConfig = getattr(self.config, name)
        passes = float(config.epochs)
        if config.max_updates is not None:
            passes = min(passes, config.max_updates * config.batch_size / max(1.0, examples))
        tokens = passes * sequences * self.lengths.sequence
        flops = tokens * training_flops(self.shape.count(name), self.shape.trained(name, config.lora))
        stage.cost += Cost(trained_tokens=round(tokens), flops=flops)
