"""One run, as its driver sees it: stages that are each done once, on a coordinator and a trainer.

A finished stage is entered in the run directory's manifest and skipped when the run is started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.client import CoordinatorClient
from actors.trainer import Trainer
from sapo_ray.config import RunConfig
from sapo_ray.cost import Cost
from sapo_ray.errors import SapoError
from sapo_ray.files import absolute
from sapo_ray.manifest import content_of
from sapo_ray.models import save_random_reasoner
from sapo_ray.progress import Reporter
from sapo_ray.report import summary, warning_signs
from sapo_ray.sampler import original_trajectory
from sapo_ray.store import Role, RunDirectory, checkpoint_name, trajectory_row
from sapo_ray.tasks import make_task
from sapo_ray.tracking import Tracking
from sapo_ray.training import TrainConfig, TrainJob

Notes = Mapping[str, Any]


class Run:
    """The stages of a run. Use as a context manager: its actors and workers are gone afterwards.

    Where an error or Ctrl-C ends it, nothing is waited for but, by the latter, the record of what is done: workers end
    with Ray's session.
    """

    def __init__(self, config: RunConfig, store: RunDirectory, reporter: Reporter) -> None:
        self.config, self._store, self._reporter = config, store, reporter
        self._task = make_task(config.task)
        self._notes: dict[str, Notes] = {}
        self._coordinator = CoordinatorClient(config, store.location, reporter, store.driver)
        self._trainer: Trainer | None = None
        self._tracking = Tracking(config, store, reporter.warn)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._trainer and error is None:
            self._trainer.close()
        self._coordinator.__exit__(error)
        self._tracking.close(finished=error is None)

    @property
    def base(self) -> str:
        """The base model M: the config's checkpoint, or a random start made on the spot."""
        if self.config.model.path is not None:
            return absolute(self.config.model.path)
        name, folder = "checkpoints/base", self._store.folder

        def write() -> Notes:
            with folder.staging(name) as directory:
                assert self._task.alphabet is not None  # or there would be a path
                save_random_reasoner(self.config.model, self._task.alphabet, self.config.seed, directory)
                return {"files": self._store.put(directory, name)}

        self._stage("base", write)
        return folder.locate(name)

    def reasoner(self, number: int) -> str:
        return self._store.checkpoint("reasoner", number)

    def verifier(self, number: int) -> str:
        return self._store.checkpoint("verifier", number)

    def originals(self) -> None:
        """D_org: the worked solutions, written as trajectories."""

        def write() -> Notes:
            with closing(self._store.writer(0, "original")) as writer:
                writer.extend(trajectory_row(original_trajectory(q)) for q in self._task.questions("worked"))
            return {"trajectories": writer.rows, "files": writer.files}

        self._stage("round-0/original", write)

    def finetune(self) -> None:
        """M_0 = SFT(M, D_org)."""
        data = self._store.dataset(0, "original")
        self._train("round-0/sft", "sft", self.config.sft, self.base, data, "reasoner", 0)

    def sample_validation(self) -> None:
        self._use(reasoner=0)
        self._stage("round-0/validation", lambda: self._coordinator.call("sample_validation"))

    def sample_and_label(self, number: int) -> None:
        """S_i = Sample(M_{i-1}), L_i = SAPS(V_{i-1}, M_{i-1}, subset of S_i); round 0 by M_0 and the first labeler."""
        self._use(reasoner=max(number - 1, 0), verifier=number - 1)
        self._stage(f"round-{number}/sample", lambda: self._coordinator.call("sample_and_label", number))

    def train_verifier(self, number: int) -> None:
        """V_i = PRM(init M_{i-1}, L_i), calibrated, and its self-verification error against M_{i-1}."""
        init, stage = self.reasoner(max(number - 1, 0)), f"round-{number}/prm"
        if self._notes[f"round-{number}/sample"]["labels"]:
            data = self._store.dataset(number, "labels")
            self._train(stage, "prm", self.config.prm, init, data, "verifier", number)
            self._use(verifier=number)
            self._stage(f"round-{number}/calibrate", lambda: self._coordinator.call("calibrate", number))
        elif number == 0:
            raise SapoError(
                "round 0: no verifier can be trained, for no solution was labelled: no worked one comes to the answer, "
                "and labeling.truncated, fraction and right_fraction leave no sample; set them anew in another run_dir"
            )
        else:
            self._keep(stage, "verifier", number, "no trajectory was labelled")
            self._use(verifier=number)
        self._verify_self(number, "self-verification")

    def make_pairs(self, number: int) -> None:
        """P_i = pairs from Score(V_i, D_i)."""
        self._use(verifier=number)
        self._stage(f"round-{number}/pairs", lambda: self._coordinator.call("make_pairs", number))

    def align(self, number: int) -> None:
        """M_i = ORPO(init, P_i), and what V_i's self-verification error is against it."""
        align, stage = self.config.align, f"round-{number}/align"
        init = {"base": self.base, "sft": self.reasoner(0), "previous": self.reasoner(number - 1)}[align.init]
        pairs = self._notes[f"round-{number}/pairs"]
        if pairs["pairs"] + pairs["unpaired"]:
            data = self._store.dataset(number, "pairs")
            self._train(stage, "orpo", align, init, data, "reasoner", number, beta=align.beta)
        else:
            rest = "no solution is right" if self.config.pairs.keep_unpaired else "pairs.keep_unpaired is false"
            self._keep(stage, "reasoner", number, f"no pair reaches pairs.eta and {rest}")
        if self.config.verify:
            self._use(reasoner=number, verifier=number)
            self._verify_self(number, "self-verification-aligned")

    def evaluate(self, number: int) -> None:
        """Measure M_i and V_i; write summary.json."""
        self._use(reasoner=number, verifier=number)
        self._stage(f"round-{number}/evaluate", lambda: self._coordinator.call("evaluate", f"evaluate-{number}"))
        signs = self._stage(f"round-{number}/warnings", lambda: {"signs": warning_signs(number, self._notes)})["signs"]
        for sign in signs:
            self._reporter.warn(f"round {number}: {sign}")
        self._store.write_summary(summary(self._store.stages(), self.config.rounds))

    def _use(self, reasoner: int | None = None, verifier: int | None = None) -> None:
        """The models that the next stages need: no verifier before there is one, nor in a run without `verify`."""
        if f"round-{verifier}/prm" not in self._notes:
            verifier = None
        self._coordinator.use(
            reasoner=None if reasoner is None else self.reasoner(reasoner),
            verifier=None if verifier is None else self.verifier(verifier),
        )

    def _verify_self(self, number: int, name: str) -> None:
        self._stage(f"round-{number}/{name}", lambda: self._coordinator.call("verify_self", f"{name}-{number}"))

    def _stage(self, name: str, work: Callable[[], Notes]) -> Notes:
        """Do a stage unless the manifest has it; note what it says, its cost and its seconds."""
        notes = self._store.done(name)
        if notes is None:
            self._tracking.open()
            self._coordinator.stage = name
            self._reporter.begin(name)
            before, start = self._store.progress(name)["seconds"], time.monotonic()  # an earlier driver's, and our own
            entry = dict(work())
            entry["seconds"] = before + time.monotonic() - start
            updates = entry.pop("metrics", [])
            notes = {key: value for key, value in entry.items() if key != "files"}
            self._store.log(name, [*updates, notes])
            self._tracking.stage(name, notes)
            self._store.finish(name, entry)
            self._reporter.end(notes)
        self._notes[name] = notes
        return notes

    def _train(
        self,
        stage: str,
        objective: str,
        config: TrainConfig,
        init: str,
        data: str,
        role: Role,
        number: int,
        **params: float,
    ) -> None:
        job = TrainJob(
            objective=objective,
            init=init,
            data=(data,),
            out=self._store.checkpoint(role, number),
            task=self._task,
            config=config,
            seed=self.config.seed,
            params=params,
            run=self._store.name,
            stage=stage,
            driver=self._store.driver,
            attention=self.config.model.attention,
        )
        self._stage(stage, lambda: self._run_job(stage, job, checkpoint_name(role, number)))

    def _run_job(self, stage: str, job: TrainJob, checkpoint: str) -> Notes:
        job = replace(job, content=tuple(map(content_of, (job.init, *job.data))))
        in_turn = self.config.placement == "colocated"
        if in_turn:
            self._coordinator.pause()
        if self._trainer is None:
            keep = self.config.trainer.keep_workers and not in_turn
            workers = replace(self.config.trainer, keep_workers=keep)
            storage = self._store.folder.locate("train")
            self._trainer = Trainer(workers, storage, name="train", warn=self._reporter.warn)
        result = self._trainer.train(job, self._reporter.update, partial(self._tracking.updates, stage))
        if result.too_long:
            limit = f"{Path(stage).name}.max_tokens = {job.config.max_tokens}"
            self._reporter.warn(f"{stage}: {result.too_long} examples are longer than {limit} and were left out")
        return {
            "examples": result.examples,
            "too_long": result.too_long,
            "empty": result.empty,
            "updates": result.updates,
            "loss": result.metrics[-1]["loss"],
            "metrics": result.metrics,
            "files": self._store.trained(checkpoint, result.files),
            "cost": Cost(trained_tokens=result.tokens, flops=result.flops).as_dict(),
        }

    def _keep(self, stage: str, role: Role, number: int, reason: str) -> None:
        """Skip a training that has nothing to learn from: the last checkpoint stands for the new one."""
        previous, out = checkpoint_name(role, number - 1), checkpoint_name(role, number)
        self._stage(stage, lambda: {"skipped": reason, "files": self._store.copy_checkpoint(previous, out)})
        self._reporter.warn(f"{stage} skipped: {reason}; {Path(out).name} is {Path(previous).name}")
