"""From trajectories to labelled steps: drives a labeler, answering its checks with rollouts (SAPO.md: SAPS).

The labeler decides which prefixes to check and what the estimates mean; this module runs the rollouts of a check, with
early exit by sample number, and keeps what they were made of.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sapo_ray.data import Estimate, LabelledTrajectory, Question, Rollout, Trajectory
from sapo_ray.estimate import PrefixCheck
from sapo_ray.labelers import LabelingConfig, Labels, MakeLabeler, expand, label_correct
from sapo_ray.requests import Sampling
from sapo_ray.sampler import Solution, Solver


@dataclass
class Annotation:
    """The labelled trajectory first, then the rows that expansion made of its rollouts."""

    labelled: list[LabelledTrajectory]
    rollouts: list[Rollout] = field(default_factory=list)
    checks: int = 0


class Annotator:
    """Labels trajectories with one labeler and one reasoner."""

    def __init__(self, solver: Solver, make_labeler: MakeLabeler, config: LabelingConfig, sampling: Sampling) -> None:
        self._solver, self._make_labeler, self._config, self._sampling = solver, make_labeler, config, sampling
        self.needs_scores = config.uses_scores

    async def annotate(
        self, question: Question, trajectory: Trajectory, scores: tuple[float, ...] | None, stage: str
    ) -> Annotation:
        """Label one trajectory. A right one needs no rollout; a wrong one is checked as its labeler asks.

        `stage` begins the rollouts' request ids. Raises ValueError for scores that are not numbers.
        """
        if trajectory.correct:
            return Annotation([self.labelled(trajectory, label_correct(trajectory), scores)])
        labeler = self._make_labeler(trajectory, scores)
        estimates: list[Estimate] = []
        runs: list[_Check] = []
        try:
            steps = next(labeler)
            while True:
                batch = [self._check(question, trajectory, step, stage) for step in steps]
                runs += batch
                answers = await asyncio.gather(*(run.estimate() for run in batch))
                estimates += answers
                steps = labeler.send(tuple(answer.value for answer in answers))
        except StopIteration as end:
            labels = end.value
        rollouts = [rollout for run in runs for rollout in await run.rollouts()]
        labelled = self.labelled(trajectory, labels, scores, tuple(estimates))
        expanded = expand(labelled, rollouts) if self._config.expand else []
        return Annotation([labelled, *expanded], rollouts, len(estimates))

    def _check(self, question: Question, trajectory: Trajectory, step: int, stage: str) -> _Check:
        return _Check(self._solver, self._config, self._sampling, question, trajectory, step, stage)

    def labelled(
        self,
        trajectory: Trajectory,
        labels: Labels,
        scores: tuple[float, ...] | None = None,
        estimates: tuple[Estimate, ...] = (),
    ) -> LabelledTrajectory:
        """A trajectory with its labels and what they were made from."""
        return LabelledTrajectory(
            trajectory=trajectory,
            labeler=self._config.labeler,
            step_labels=labels.step_labels,
            scores=scores,
            predicted_first_error=labels.predicted_first_error,
            estimates=estimates,
            case=labels.case,
        )


class _Check:
    """The rollouts of one prefix, a few in flight at a time, until the estimate is decided."""

    def __init__(
        self,
        solver: Solver,
        config: LabelingConfig,
        sampling: Sampling,
        question: Question,
        trajectory: Trajectory,
        step: int,
        stage: str,
    ) -> None:
        self._solver, self._sampling, self._question, self._trajectory = solver, sampling, question, trajectory
        self._step, self._id = step, f"{stage}/{trajectory.id}/step-{step}"
        self._rule = PrefixCheck(config.rollouts, config.rollouts_in_flight, config.early_exit)
        self._solutions: dict[int, asyncio.Task[Solution]] = {}

    async def estimate(self) -> Estimate:
        """Run rollouts until the first success by sample number is known, or all have failed."""
        while not self._rule.decided:
            for sample in self._rule.launch():
                self._solutions[sample] = asyncio.create_task(self._solve(sample))
            running = [task for task in self._solutions.values() if not task.done()]
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()  # a failed rollout fails its check
        kept = self._rule.kept
        return Estimate(
            self._step, self._rule.value, self._rule.successes, len(kept), tuple(map(self._rollout_id, kept))
        )

    async def rollouts(self) -> list[Rollout]:
        """Every rollout of this check, those after the deciding one included."""
        return [
            self._rollout(sample, await task, sample in self._rule.kept) for sample, task in self._solutions.items()
        ]

    async def _solve(self, sample: int) -> Solution:
        prefix = self._trajectory.steps[: self._step + 1]
        solution = await self._solver.solve(self._question, prefix, self._rollout_id(sample), self._sampling)
        self._rule.record(sample, solution.correct)
        return solution

    def _rollout_id(self, sample: int) -> str:
        return f"{self._id}/{sample}"

    def _rollout(self, sample: int, solution: Solution, kept: bool) -> Rollout:
        return Rollout(
            id=self._rollout_id(sample),
            trajectory_id=self._trajectory.id,
            question_id=self._question.id,
            branch_step=self._step,
            sample=sample,
            steps=solution.steps,
            answer=solution.answer,
            correct=solution.correct,
            truncated=solution.truncated,
            kept=kept,
        )
