"""From trajectories to labelled steps: drives a labeler, answering its checks with rollouts (SAPO.md: SAPS).

The labeler decides which prefixes to check and what the estimates mean; this module runs the rollouts of a check, with
early exit by sample number, and keeps what they were made of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from sapo_ray.concurrency import abandon, together
from sapo_ray.data import Estimate, LabelledTrajectory, Question, Rollout, Trajectory
from sapo_ray.estimate import PrefixCheck
from sapo_ray.labelers import Labeler, LabelingConfig, Labels, MakeLabeler, expand, label_correct
from sapo_ray.requests import Sampling
from sapo_ray.sampler import Prefix, Solution, Solver


@dataclass
class Annotation:
    """The labelled trajectory first, then the rows that expansion made of its rollouts."""

    labelled: list[LabelledTrajectory]
    rollouts: list[Rollout] = field(default_factory=list)
    checks: int = 0


def distinct(annotations: Sequence[Annotation]) -> list[LabelledTrajectory]:
    """All rows of the annotations, less those that repeat an earlier one (same question, same step texts).

    The given trajectories come first, in their order, then what expansion made of them: the labels of a given
    trajectory go before those of an expansion that happens to equal it.
    """
    given = [annotation.labelled[0] for annotation in annotations]
    expanded = [row for annotation in annotations for row in annotation.labelled[1:]]
    rows: dict[tuple[str, tuple[str, ...]], LabelledTrajectory] = {}
    for row in given + expanded:
        rows.setdefault((row.trajectory.question_id, row.trajectory.steps), row)
    return list(rows.values())


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
        whole = self._solver.prefix(question, trajectory.steps)
        new_check = partial(_Check, self._solver, self._config, self._sampling, whole, trajectory.id, stage)
        checks: list[_Check] = []
        try:
            labels = await _drive(self._make_labeler(trajectory, scores), new_check, checks)
            rollouts = [rollout for check in checks for rollout in await check.rollouts()]
        finally:
            await abandon(task for check in checks for task in check.tasks)
        labelled = self.labelled(trajectory, labels, scores, tuple(check.estimate for check in checks))
        expanded = expand(labelled, rollouts) if self._config.expand else []
        return Annotation([labelled, *expanded], rollouts, len(checks))

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


async def _drive(labeler: Labeler, new_check: Callable[[int], _Check], checks: list[_Check]) -> Labels:
    """Run a labeler to its end; what it asks is decided by new checks, which are added to `checks`."""
    try:
        steps = next(labeler)
        while True:
            asked = [new_check(step) for step in steps]
            checks += asked
            await together(one.decide() for one in asked)
            steps = labeler.send(tuple(one.estimate.value for one in asked))
    except StopIteration as end:
        labels: Labels = end.value
        return labels


class _Check:
    """The rollouts of one prefix, a few in flight at a time, until the estimate is decided."""

    def __init__(
        self,
        solver: Solver,
        config: LabelingConfig,
        sampling: Sampling,
        whole: Prefix,
        trajectory_id: str,
        stage: str,
        step: int,
    ) -> None:
        """`whole` is the trajectory, all of its steps; `stage` begins the rollouts' request ids."""
        self._solver, self._sampling, self._prefix = solver, sampling, whole.until(step)
        self._trajectory_id, self._step, self._id = trajectory_id, step, f"{stage}/{trajectory_id}/step-{step}"
        self._rule = PrefixCheck(config.rollouts, config.rollouts_in_flight, config.early_exit)
        self._solutions: dict[int, asyncio.Task[Solution]] = {}

    async def decide(self) -> None:
        """Run rollouts until the first success by sample number is known, or all have failed."""
        while not self._rule.decided:
            for sample in self._rule.launch():
                self._solutions[sample] = asyncio.create_task(self._solve(sample))
            running = [task for task in self.tasks if not task.done()]
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()  # a failed rollout fails its check

    @property
    def tasks(self) -> Iterable[asyncio.Task[Solution]]:
        return self._solutions.values()

    @property
    def estimate(self) -> Estimate:
        """The estimate. Raises RuntimeError before it is decided."""
        kept = self._rule.kept
        ids = tuple(map(self._rollout_id, kept))
        return Estimate(self._step, self._rule.value, self._rule.successes, len(kept), ids)

    async def rollouts(self) -> list[Rollout]:
        """Every rollout of this check, by sample number: also those after the deciding one, which are waited for."""
        kept = self._rule.kept
        return [self._rollout(sample, await task, sample in kept) for sample, task in self._solutions.items()]

    async def _solve(self, sample: int) -> Solution:
        solution = await self._solver.solve(self._prefix, self._rollout_id(sample), self._sampling)
        self._rule.record(sample, solution.correct)
        return solution

    def _rollout_id(self, sample: int) -> str:
        return f"{self._id}/{sample}"

    def _rollout(self, sample: int, solution: Solution, kept: bool) -> Rollout:
        return Rollout(
            id=self._rollout_id(sample),
            trajectory_id=self._trajectory_id,
            question_id=self._prefix.question.id,
            branch_step=self._step,
            sample=sample,
            steps=solution.steps,
            answer=solution.answer,
            correct=solution.correct,
            truncated=solution.truncated,
            kept=kept,
        )
