"""The coordinator: one actor that streams trajectories through sample -> score -> detect -> verify -> expand.

It knows no labeler by name and does no arithmetic of the method: that is `sapo_ray`'s. One question after another
enters the stream and leaves it written; nothing waits for a whole stage. `sample_validation`, `sample_and_label`,
`calibrate`, `verify_self`, `make_pairs`, `evaluate` and `evaluate_labels` do a stage each, and return what it notes
about itself.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from random import Random
from statistics import fmean
from typing import Any

from actors.engines import Engines, Quarantine, spend
from sapo_ray.annotator import Annotation, Annotator, distinct
from sapo_ray.concurrency import together
from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.data import LabelledTrajectory, Question, Trajectory
from sapo_ray.evaluator import (
    Sampled,
    answer,
    best_of_n_accuracy,
    reasoner_report,
    split_validation,
    step_report,
    verifier_report,
)
from sapo_ray.labelers import (
    LabelingConfig,
    fixed_start_score,
    is_labelled,
    label_correct,
    make_labeler,
)
from sapo_ray.metrics import best_threshold, self_verification_error
from sapo_ray.models import CALIBRATION_FILE, CALIBRATION_ROWS, Calibration
from sapo_ray.pairs import make_pairs, share_unlike, shuffled
from sapo_ray.report import StreamReport
from sapo_ray.sampler import Sampler, Samples, Solver, round_questions
from sapo_ray.shards import Kind, StageWriter
from sapo_ray.store import (
    RunDirectory,
    checkpoint_name,
    label_row,
    labelled_of,
    pair_row,
    rollout_row,
    trajectory_of,
    trajectory_row,
)
from sapo_ray.tasks import make_task

_GC_THRESHOLDS = (100_000, 20, 100)
"""Requests leave little garbage in cycles, but their objects are so many that with Python's own thresholds looking for
it took much of the coordinator's time."""
Item = tuple[Question, Trajectory]

logger = logging.getLogger(__name__)


class Coordinator:
    """Streams the data of a run through its engines, and writes it."""

    def __init__(self, config: RunConfig, run_path: str, driver: str | None = None) -> None:
        """Writes for a `driver` of that id only while it has the run's lease."""
        gc.set_threshold(*_GC_THRESHOLDS)
        self._config, self._store = config, RunDirectory(run_path, driver)
        self._task = make_task(config.task)
        self._engines = Engines(config, self._task, self._store.name)

    async def enter(self, stage: str) -> None:
        """Work for this stage from now on, as logs and metrics see it."""
        gc.collect()
        gc.freeze()  # what is left stays, and is not looked at again
        self._engines.enter(stage)

    async def load_reasoner(self, checkpoint: str) -> None:
        """Hold this reasoner from now on. Raises with the engine's own cause where none can start."""
        await self._engines.load_reasoner(checkpoint)
        engines, execute = self._engines, self._engines.execute if self._config.runs_programs else None
        self._solver = Solver(self._task, engines.tokenizer, engines.generate, self._config.seed, execute)
        self._sampler = Sampler(self._solver, self._config.sampling)

    async def load_verifier(self, checkpoint: str) -> None:
        """Hold this verifier from now on."""
        await self._engines.load_verifier(checkpoint)

    async def reset_prefix_cache(self) -> None:
        """Forget every prompt the reasoner's engines have seen."""
        await self._engines.reset_prefix_cache()

    async def pause(self) -> None:
        """Give the place of engines and verifiers to others until `resume`."""
        await self._engines.pause()

    async def resume(self) -> None:
        await self._engines.resume()

    async def close(self) -> None:
        await self._engines.close()

    async def progress(self) -> dict[str, Any]:
        """How far the stage in progress is, in items, and the tokens it has generated."""
        return self._engines.progress()

    async def sample_validation(self) -> dict[str, Any]:
        """Sample validation questions with M_0: the fixed trajectories that calibrate and check every verifier."""
        with self._writer("round-0/validation", "validation") as writer:
            questions = self._task.questions("validation")[writer.items :]
            self._go_on(writer, len(questions))
            attempts = self._engines.attempts(questions, lambda q: self._sampler.unique(q, "validation"))
            async for _, sampled in attempts:
                await writer.add({"validation": map(trajectory_row, sampled.trajectories if sampled else ())})
        return self._notes(trajectories=writer.rows("validation"), files=writer.files)

    async def sample_and_label(self, round_number: int) -> dict[str, Any]:
        """S_i = Sample(M_{i-1}) and L_i = labels of a subset of S_i by V_{i-1} and M_{i-1}, as one stream."""
        config, stage = self._config, f"round-{round_number}"
        labeling = config.labeling if round_number else replace(config.labeling, labeler=config.initial_labeler)
        annotator = self._annotator(labeling) if config.verify else None
        questions = round_questions(self._task.questions("pool"), round_number, config.sampling.questions)

        async def work(question: Question) -> tuple[Samples, list[Annotation]]:
            samples = await self._sampler.unique(question, stage)
            if annotator is None:
                return samples, []
            chosen = [t for t in samples.trajectories if is_labelled(t, labeling, config.seed)]
            return samples, await together(self._label(annotator, question, t, stage) for t in chosen)

        with self._writer(f"{stage}/sample", "trajectories", "labels", "rollouts") as writer:
            questions = questions[writer.items :]
            report = StreamReport.restored(self._start_score(), labeling.allow_first_step, writer.state.get("report"))
            self._go_on(writer, len(questions), report)
            if annotator and round_number == 0 and not writer.resumed:
                originals = (t for t in map(trajectory_of, self._store.read(0, "original")) if t.correct)
                writer.extend({"labels": (label_row(annotator.labelled(t, label_correct(t))) for t in originals)})
            async for _, result in self._engines.attempts(questions, work):
                if result:
                    report.add(*result)
                samples, annotations = result or (Samples([], 0, 0), [])
                await writer.add(
                    {
                        "trajectories": map(trajectory_row, samples.trajectories),
                        "labels": map(label_row, distinct(annotations)),
                        "rollouts": (rollout_row(r) for a in annotations for r in a.rollouts),
                    }
                )
        return self._notes(**report.notes(), labels=writer.rows("labels"), files=writer.files)

    def _writer(self, stage: str, *kinds: Kind) -> StageWriter:
        return self._store.stage_writer(stage, kinds, self._config.ray.questions_per_shard)

    def _go_on(self, writer: StageWriter, items: int, report: StreamReport | None = None) -> None:
        """Begin what is left of a stage, `items` items, with what the part before has cost and left out."""
        left_out = [Quarantine(**left_out) for left_out in writer.state.get("quarantined", [])]
        self._engines.begin(items, Cost(**writer.state.get("cost", {})), left_out)
        writer.snapshot = lambda: {
            "cost": self._engines.cost.as_dict(),
            "quarantined": [asdict(left_out) for left_out in self._engines.quarantined],
            "report": report and report.state(),
        }

    async def sample(self, questions: Sequence[Question], stage: str) -> list[tuple[Question, list[Trajectory]]]:
        """The loaded reasoner's different trajectories of each question."""
        self._engines.begin(len(questions))
        stream = self._engines.stream(questions, lambda q: self._sampler.unique(q, stage))
        return [(question, samples.trajectories) async for question, samples in stream]

    async def label(
        self, items: Sequence[Item], labeling: LabelingConfig, stage: str
    ) -> tuple[list[tuple[Item, Annotation]], dict[str, Any]]:
        """Label given trajectories with the loaded models: each with its annotation, and the stage's notes."""
        annotator = self._annotator(labeling)
        self._engines.begin(len(items))
        stream = self._engines.stream(items, lambda item: self._label(annotator, *item, stage))
        annotated = [pair async for pair in stream]
        return annotated, self._notes()

    async def calibrate(self, round_number: int) -> dict[str, Any]:
        """Measure and store with V_i its start score and its threshold (see `Calibration`).

        The threshold is tuned on one half of the validation trajectories; the other half measures self-verification.
        """
        labelled = self._calibration_rows(round_number)
        tuning, _ = self._validation()
        self._engines.begin(len(labelled) + len(tuning))
        first_scores = [scores[0] for _, scores in await self._score_all([row.trajectory for row in labelled])]
        tuned = await self._score_all(tuning)
        calibration = Calibration(
            start_score=fmean(first_scores) if first_scores else None,
            threshold=best_threshold([min(scores) for _, scores in tuned], [t.correct for t, _ in tuned]),
        )
        name = f"{checkpoint_name('verifier', round_number)}/{CALIBRATION_FILE}"
        files = self._store.write_file(name, calibration.text())
        self._engines.calibration = calibration
        return self._notes(start_score=calibration.start_score, threshold=calibration.threshold, files=files)

    def _calibration_rows(self, round_number: int) -> list[LabelledTrajectory]:
        """A draw of the labels with a right first step: of sampled trajectories, or of all if none of them has one.

        Worked solutions, on which M_0 was trained, get higher scores than what saps will look at, which is sampled.
        """
        rows = [labelled_of(row) for row in self._store.read(round_number, "labels")]
        right = [row for row in rows if row.step_labels[0] == 1]
        sampled = [row for row in right if row.trajectory.source == "sampled"] or right
        return Random(self._config.seed).sample(sampled, min(CALIBRATION_ROWS, len(sampled)))

    async def verify_self(self, stage: str) -> dict[str, Any]:
        """Self-verification error of the loaded verifier, checked by the loaded reasoner, on fixed trajectories."""
        questions = {q.id: q for q in self._task.questions("validation")}
        _, fixed = self._validation()
        self._engines.begin(2 * len(fixed))
        scored = await self._score_all(fixed)
        annotator = self._annotator(replace(self._config.labeling, labeler="saps", expand=False))
        stream = self._engines.stream(
            scored, lambda item: self._annotate(annotator, questions[item[0].question_id], *item, stage)
        )
        checked = [(annotation.labelled[0], scores) async for (_, scores), annotation in stream]
        error = self_verification_error([row for row, _ in checked], [s for _, s in checked], self._threshold())
        return self._notes(trajectories=len(checked), **error)

    async def make_pairs(self, round_number: int) -> dict[str, Any]:
        """P_i: preference pairs from V_i's mean scores of all of D_i = S_i ∪ D_{i-1}."""
        trajectories = self._store.trajectories_until(round_number)
        self._engines.begin(len(trajectories))
        means: dict[str, float] | None = None
        if self._config.verify:
            scored = await self._score_all(trajectories)
            means = {trajectory.id: fmean(scores) for trajectory, scores in scored}
            trajectories = [trajectory for trajectory, _ in scored]
        pairs = make_pairs(trajectories, means, self._config.pairs)
        by_outcome = make_pairs(trajectories, None, replace(self._config.pairs, require_outcome=True))
        dealt = shuffled(trajectories, means, self._config.seed) if means is not None else None
        by_chance = make_pairs(trajectories, dealt, self._config.pairs)
        with closing(self._store.writer(round_number, "pairs")) as writer:
            writer.extend(pair_row(pair) for pair in pairs)
        return self._notes(
            trajectories=len(trajectories),
            pairs=sum(pair.rejected is not None for pair in pairs),
            unpaired=sum(pair.rejected is None for pair in pairs),
            share_unlike_outcome=share_unlike(pairs, by_outcome),
            share_unlike_by_chance=share_unlike(by_chance, by_outcome),
            files=writer.files,
        )

    async def evaluate(self, stage: str) -> dict[str, Any]:
        """Accuracy of the loaded reasoner on test and ood, and the loaded verifier's scores of its test samples."""
        config = self._config.evaluation
        test = self._task.questions("test")[: config.test or None]
        ood = self._task.questions("ood")[: config.ood or None]
        work = [(q, config.samples if i < config.sampled_questions else 0) for i, q in enumerate(test)]
        work += [(q, 0) for q in ood]
        scored = sum(samples for _, samples in work) if self._engines.has_verifier else 0
        self._engines.begin(len(work) + scored)
        stream = self._engines.stream(work, lambda item: answer(self._sampler, item[0], stage, item[1]))
        answered = [result async for _, result in stream]
        of_test = {question.id for question in test}
        agree = None if self._config.runs_programs else self._task.is_correct
        on_test = [a for a in answered if a.question.id in of_test]
        return self._notes(
            test=await asyncio.to_thread(reasoner_report, on_test, agree),
            ood=await asyncio.to_thread(reasoner_report, [a for a in answered if a.question.id not in of_test], agree),
            verifier=await self._evaluate_verifier(on_test) if self._engines.has_verifier else None,
            correct=[a.greedy.correct for a in on_test],
        )

    async def evaluate_labels(self, labelled: Sequence[LabelledTrajectory]) -> dict[str, Any]:
        """The loaded verifier's scores against given step labels."""
        self._engines.begin(len(labelled))
        stream = self._engines.stream(labelled, lambda row: self._engines.score(row.trajectory))
        scored = [(row.trajectory, row.step_labels, scores) async for row, scores in stream]
        allow_first_step = self._config.labeling.allow_first_step
        return self._notes(verifier=step_report(scored, self._start_score(), self._threshold(), allow_first_step))

    async def _evaluate_verifier(self, answered: Sequence[Sampled]) -> dict[str, Any]:
        questions = {sample.id: a.question for a in answered for sample in a.samples}
        drawn = [sample for a in answered for sample in a.samples if sample.steps]
        scored = [(questions[sample.id], sample, scores) for sample, scores in await self._score_all(drawn)]
        means = {sample.id: fmean(scores) for _, sample, scores in scored}
        report = verifier_report(
            self._task, scored, self._start_score(), self._threshold(), self._config.labeling.allow_first_step
        )
        return {**report, "best_of_n_accuracy": best_of_n_accuracy(answered, means)}

    def _annotator(self, labeling: LabelingConfig) -> Annotator:
        make = make_labeler(labeling, self._start_score(), self._config.seed)
        return Annotator(self._solver, make, labeling, self._config.sampling.decoding())

    async def _label(self, annotator: Annotator, question: Question, trajectory: Trajectory, stage: str) -> Annotation:
        scored = annotator.needs_scores and not trajectory.correct
        scores = await self._engines.score(trajectory) if scored else None
        return await self._annotate(annotator, question, trajectory, scores, stage)

    async def _annotate(
        self,
        annotator: Annotator,
        question: Question,
        trajectory: Trajectory,
        scores: tuple[float, ...] | None,
        stage: str,
    ) -> Annotation:
        annotation = await annotator.annotate(question, trajectory, scores, stage)
        spend(Cost(trajectories=1, checks=annotation.checks, rollouts=len(annotation.rollouts)))
        return annotation

    async def _score_all(self, trajectories: Sequence[Trajectory]) -> list[tuple[Trajectory, tuple[float, ...]]]:
        return [pair async for pair in self._engines.stream(trajectories, self._engines.score)]

    def _start_score(self) -> float | None:
        """The config's; else the loaded verifier's, 1 where its training had no right first step, None without any."""
        fixed = fixed_start_score(self._config.labeling)
        if fixed is not None or self._engines.calibration is None:
            return fixed
        return self._engines.calibration.start

    def _threshold(self) -> float:
        return self._engines.calibration.threshold if self._engines.calibration else 0.5

    def _validation(self) -> tuple[list[Trajectory], list[Trajectory]]:
        trajectories = list(map(trajectory_of, self._store.read(0, "validation")))
        return split_validation(trajectories, self._config.evaluation.verification)

    def _notes(self, **notes: Any) -> dict[str, Any]:
        if self._engines.quarantined:
            notes["quarantined"] = [asdict(left_out) for left_out in self._engines.quarantined]
        cost = self._engines.cost.as_dict()
        logger.info("done, for %s", cost)
        return {**notes, "cost": cost}
