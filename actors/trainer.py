"""Training on Ray: one Ray Train worker group, kept for every training of a run.

The workers take jobs from a `JobBoard`, train them (see `actors.train_loop`) and leave the results there. A job stays
on the board until it has a result, so that workers that replace a crashed group take it up again, from its last
mid-training checkpoint. An interrupted driver has the board tell the workers to write one and to stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
import ray.train
from ray import PlacementGroupID
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import logs
from actors.errors import KILLED
from actors.flush import FLUSH_SECONDS
from actors.telemetry import Telemetry
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, absolute, split
from sapo_ray.training import TrainerConfig, TrainJob, TrainResult, finished

_OUT_OF_MEMORY = "killed due to the node running low on memory"  # ray.exceptions.OutOfMemoryError
CLOSE_SECONDS = 120.0
"""How long workers that are at nothing may take to end."""

OnProgress = Callable[[int, int, str], None]
Updates = list[dict[str, float]]
"""The metrics of updates (see `TrainResult`)."""

logger = logging.getLogger(__name__)


class TrainingError(SapoError):
    """A training failed. The text is the cause as the worker saw it."""


class JobBoard:
    """An actor: a worker group, its jobs, numbered from 0, and how each ended: a result, or the text of an error.

    The group is started here and not by the driver, because Ray Train has to be waited for in a thread, and a process
    that ends its connection to Ray while a thread waits on it may crash.
    """

    def __init__(self) -> None:
        self._jobs: list[TrainJob] = []
        self._outcomes: dict[int, TrainResult | str] = {}
        self._stopped: set[int] = set()
        self._total, self._updates = 0, Updates()
        self._closed = False
        self._changed = asyncio.Condition()

    async def fit(self, config: TrainerConfig, storage_path: str, name: str) -> None:
        """Run a worker group until it has ended. Raises Ray Train's error."""
        from ray.train.torch import TorchTrainer

        board = ray.get_runtime_context().current_actor
        trainer = TorchTrainer(
            _work,
            train_loop_config={"board": board, "threads": config.threads_per_worker},
            scaling_config=_scaling(config),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage_path,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            ),
        )
        await asyncio.to_thread(trainer.fit)

    async def post(self, job: TrainJob) -> int:
        """Put up a job; its number."""
        async with self._changed:
            self._jobs.append(job)
            self._total, self._updates = 0, Updates()
            self._changed.notify_all()
        return len(self._jobs) - 1

    async def next(self, after: int) -> tuple[int, TrainJob] | None:
        """The first job beyond number `after` that has no outcome, once there is one; None when the board closes."""
        async with self._changed:
            while not self._closed:
                for number in range(after + 1, len(self._jobs)):
                    if number not in self._outcomes:
                        return number, self._jobs[number]
                await self._changed.wait()
        return None

    async def settle(self, number: int, outcome: TrainResult | str) -> None:
        """Record how a job ended."""
        async with self._changed:
            self._outcomes[number] = outcome
            self._changed.notify_all()

    async def outcome(self, number: int) -> TrainResult | str:
        """How a job ended, once it has."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._outcomes)
        return self._outcomes[number]

    async def report(self, total: int, updates: Updates) -> None:
        """The training under way has made these updates, of so many in all."""
        self._total = total
        self._updates += updates

    async def news(self) -> tuple[int, Updates]:
        """The updates in all, and those made since the last call."""
        updates, self._updates = self._updates, Updates()
        return self._total, updates

    async def stop(self, number: int) -> tuple[int, Updates]:
        """Have a job stop, and wait until it has, unless it has made no update yet; its last news."""
        async with self._changed:
            self._stopped.add(number)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: number in self._outcomes or not self._total)
        return await self.news()

    async def stopping(self, number: int) -> None:
        """Wait until a job is to stop, or has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._stopped or number in self._outcomes)

    async def close(self) -> bool:
        """Let the workers go when they have finished what they are at; whether they are at nothing."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        return len(self._outcomes) == len(self._jobs)


@dataclass(frozen=True)
class _Group:
    """A running worker group: its board, and the reference of the board's `fit`."""

    board: Any
    fit: Any


class Trainer:
    """Trains jobs one after the other on a group of workers, which starts with the first. Needs an initialised Ray."""

    def __init__(self, config: TrainerConfig, storage_path: str | Path, name: str, warn: Callable[[str], None]) -> None:
        """Ray Train keeps its own state under `storage_path`/`name`; the path may be a URI."""
        self._config, self._storage_path, self._name, self._warn = config, absolute(storage_path), name, warn
        self._group: _Group | None = None

    def start(self) -> None:
        """Start the workers, unless they are running. Returns at once; they need some 25 s."""
        if self._group is not None:
            return
        # The board is beside the driver, which cannot do without it: no other node's end takes it away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board: Any = ray.remote(JobBoard).options(num_cpus=0, scheduling_strategy=here).remote()
        self._group = _Group(board, board.fit.remote(self._config, self._storage_path, self._name))

    def train(
        self,
        job: TrainJob,
        on_progress: OnProgress | None = None,
        on_updates: Callable[[Updates], None] | None = None,
    ) -> TrainResult:
        """Train a job and wait for its result. A job that is already finished costs nothing.

        `on_progress` is told updates done, updates in all, and the loss, about once a second; `on_updates` of every
        update once, in their order, but for those before the checkpoint that an earlier call's training goes on from.
        Raises TrainingError with the worker's own cause. The group lives on where the job was at fault. On Ctrl-C, what
        the training has learnt goes into a mid-training checkpoint, which is waited for, but not for long.
        """
        job = _absolute(job)
        stored = finished(job)
        news = _News(job, on_progress, on_updates)
        if stored is not None:
            home, _ = split(job.out)
            Folder(home).clear(job.partial)  # left by one that was killed right after its export
            news.pass_on(stored.updates, stored.metrics)
            return stored
        self.start()
        assert self._group is not None
        try:
            result = self._outcome(self._group, job, news)
        except KILLED as error:
            self._group = None
            raise TrainingError(
                f"{job.out}: the board that its workers take it from died ({_line(error)}); start again to go on "
                "from its last mid-training checkpoint"
            ) from error
        if not self._config.keep_workers:
            self.close()
        if isinstance(result, str):
            raise TrainingError(f"{job.out}: {result}")
        return result

    def _outcome(self, group: _Group, job: TrainJob, news: _News) -> TrainResult | str:
        """What a group makes of a job. Raises TrainingError where the group ends before it, one of KILLED where
        the board does."""
        board, fit = group.board, group.fit
        number = ray.get(board.post.remote(job))
        outcome = board.outcome.remote(number)
        try:
            while not ray.wait([outcome], timeout=1)[0]:
                total, updates = ray.get(board.news.remote())
                news.pass_on(total, updates, _waiting_for(self._config))
                if ray.wait([fit], timeout=0)[0]:
                    self._group = None
                    _raise(job, fit)
        except KeyboardInterrupt:
            with suppress(RayError):  # it takes too long, or the board has died
                news.pass_on(*ray.get(board.stop.remote(number), timeout=FLUSH_SECONDS))
            raise
        news.pass_on(*ray.get(board.news.remote()))
        return ray.get(outcome)

    def close(self) -> None:
        """Let the workers go, and wait until they have, unless they are still at a training that was interrupted.

        Those that are at nothing and do not go are killed, and warned of.
        """
        if self._group is None:
            return
        group, self._group = self._group, None
        with suppress(RayError):  # without their board, the workers fail by themselves
            closed = group.board.close.remote()
            if ray.wait([closed], timeout=CLOSE_SECONDS)[0] and not ray.get(closed):
                return
            if not ray.wait([group.fit], timeout=CLOSE_SECONDS)[0]:
                ray.kill(group.board)
                _remove_groups()
                self._warn(f"the training workers have not ended within {CLOSE_SECONDS:g} s; they are killed")


class _News:
    """Passes on what is heard of a training: each update once, though a group that replaces a crashed one repeats some.

    The loss goes to Ray's metrics, too, again and again: a gauge that is not set goes away.
    """

    def __init__(
        self, job: TrainJob, on_progress: OnProgress | None, on_updates: Callable[[Updates], None] | None
    ) -> None:
        self._on_progress, self._on_updates = on_progress, on_updates
        self._telemetry, self._stage = Telemetry(job.run), job.stage
        self._told, self._last = 0, dict[str, float]()

    def pass_on(self, total: int, updates: Updates, waiting_for: str | None = None) -> None:
        """Take the updates in all, some that have been made since the last call, and what else there is to wait for."""
        new = [update for update in updates if update["update"] > self._told]
        if new and self._on_updates:
            self._on_updates(new)
        if updates:
            self._last = updates[-1]
            self._told = max(self._told, int(self._last["update"]))
        if self._last:
            self._telemetry.set("sapo_loss", self._last["loss"], stage=self._stage)
        if self._on_progress and (self._last or waiting_for):
            loss = f"loss {self._last['loss']:.4f}" if self._last else None
            self._on_progress(int(self._last.get("update", 0)), total, ", ".join(filter(None, [loss, waiting_for])))


def _work(config: dict[str, Any]) -> None:
    """What every worker does: train job after job, until the board closes."""
    device = ray.train.torch.get_device()
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed reads it when it is imported
    import torch
    from transformers.utils import logging

    from actors.train_loop import JobError, train

    torch.set_num_threads(config["threads"])
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    board, rank = config["board"], ray.train.get_context().get_world_rank()
    number = -1
    while (posted := ray.get(board.next.remote(number))) is not None:
        number, job = posted
        logs.enter(job.run, job.stage)
        logger.info("rank %d trains %s from %s on %s, on %s", rank, job.out, job.init, ", ".join(job.data), device)
        outcome: TrainResult | str
        stopping = board.stopping.remote(number)
        try:
            outcome = train(job, device, _report_to(board, job.run), partial(_has_come, stopping))
            logger.info("trained in %.0f s", outcome.seconds)
        except JobError as error:
            outcome = str(error)
            logger.error("%s", outcome)
        except SapoError as error:
            # Seen by this rank alone, which leaves the others waiting: the group ends with it, and its successor is not
            # to try again.
            ray.get(board.settle.remote(number, str(error)))
            raise
        if rank == 0:
            ray.get(board.settle.remote(number, outcome))


def _has_come(answer: Any) -> bool:
    """Whether an answer is there; asks nobody."""
    return bool(ray.wait([answer], timeout=0)[0])


def _report_to(board: Any, run: str) -> Callable[[int, Updates], None]:
    telemetry = Telemetry(run)

    def report(total: int, updates: Updates) -> None:
        telemetry.count("sapo_trained_tokens", sum(update["tokens"] for update in updates))
        board.report.remote(total, updates)

    return report


def _scaling(config: TrainerConfig) -> ray.train.ScalingConfig:
    return ray.train.ScalingConfig(
        num_workers=config.workers,
        use_gpu=config.gpus_per_worker > 0,
        resources_per_worker=_resources(config),
        placement_strategy=config.placement.upper(),
    )


def _resources(config: TrainerConfig) -> dict[str, float]:
    """What each worker reserves."""
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    return resources


def _waiting_for(config: TrainerConfig) -> str | None:
    """The nodes that a worker group of this config waits for, as its placement group says; None where it has them."""
    resources = _resources(config)
    bundles = [resources] * config.workers
    groups = _placement_groups().values()
    if not any(g["state"] in ("PENDING", "RESCHEDULING") and [*g["bundles"].values()] == bundles for g in groups):
        return None
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
    return f"{config.workers} training workers wait for nodes with {each} each"


def _remove_groups() -> None:
    """Remove the placement groups, which outlive the board that they were made for, and what runs in them."""
    for name in _placement_groups():
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _placement_groups() -> dict[str, Any]:
    """What Ray says of this job's placement groups, by their ids, which end with the job's. Only trainings make any."""
    job, table = ray.get_runtime_context().get_job_id(), ray.util.placement_group_table()
    return {name: group for name, group in table.items() if name.endswith(job)}


def _absolute(job: TrainJob) -> TrainJob:
    """Ray Train's workers run in a directory of their own. An `init` that is no path here may be a name on a hub."""
    init = absolute(job.init) if Path(job.init).exists() else job.init
    return replace(job, init=init, data=tuple(map(absolute, job.data)), out=absolute(job.out))


def _raise(job: TrainJob, fit: Any) -> NoReturn:
    """Raise why a group ended under a job: of every worker's error, else of Ray Train's own, the line that says it."""
    try:
        ray.get(fit)
    except RayTaskError as error:
        cause = error.cause
        failures = cause.worker_failures if isinstance(cause, ray.train.WorkerGroupError) else {}
        lines = [f"worker {rank}: {_line(failure)}" for rank, failure in failures.items()]
        raise TrainingError(f"{job.out}: {'; '.join(lines) or _line(cause)}") from error
    raise TrainingError(f"{job.out}: the workers were let go while it was training")


def _line(error: BaseException) -> str:
    """The last line of a trace; of what Ray says at length when its memory monitor kills, the first."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    if killed := next((line for line in lines if _OUT_OF_MEMORY in line), None):
        return f"{killed} A smaller micro_batch_tokens, or gradient_checkpointing, needs less"
    return lines[-1]
