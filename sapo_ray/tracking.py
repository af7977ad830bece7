"""Where a run's figures go beside metrics.jsonl: to TensorBoard, Weights & Biases, MLflow, or nowhere else.

A figure has a group, a name and a step. A training's group is its stage, such as `round-1/align`, its steps are the
updates, from 1; what a stage notes about itself is grouped by the stage's kind, such as `evaluate`, and its step is the
round. What is done again after an interruption falls on the same steps again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError, one_line
from sapo_ray.store import RunDirectory

PROJECT = "sapo_ray"
"""Project of Weights & Biases and experiment of MLflow, where the environment names no other."""
_IDS = "tracking.json"
_PARAMS = 100  # most that MLflow takes at a time


class Tracker(Protocol):
    """A place for figures."""

    def log(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        """Take figures of a group at a step."""

    def flush(self) -> None:
        """A stage has ended."""

    def close(self, finished: bool) -> None:
        """Nothing more comes: the run is finished, or has failed."""


def check_installed(config: RunConfig) -> None:
    """Raises SapoError where the package that `tracking` names is not installed."""
    package = config.tracking
    if package != "none" and find_spec(package) is None:
        raise SapoError(f"tracking is {package}, which is not installed: pip install {package}")


def open_tracker(config: RunConfig, store: RunDirectory) -> Tracker | None:
    """The tracker that `tracking` names. Nothing is sent anywhere unless it names one that sends."""
    match config.tracking:
        case "tensorboard":
            return TensorBoard(store)
        case "wandb":
            return WeightsAndBiases(config, store)
        case "mlflow":
            return MLflow(config, store)
        case _:
            return None


class Tracking:
    """A run's tracker, opened when the first stage begins. One that fails later is let go, with a warning."""

    def __init__(self, config: RunConfig, store: RunDirectory, warn: Callable[[str], None]) -> None:
        self._config, self._store, self._warn = config, store, warn
        self._tracker: Tracker | None = None
        self._opened = False

    def open(self) -> None:
        """Open the tracker, unless that has been done. Raises SapoError with its own cause where it cannot be."""
        if self._opened:
            return
        self._opened = True
        try:
            self._tracker = open_tracker(self._config, self._store)
        except Exception as error:
            raise SapoError(f"tracking by {self._config.tracking} cannot begin: {_reason(error)}") from error

    def updates(self, stage: str, updates: Iterable[Mapping[str, float]]) -> None:
        """Take updates of a training."""
        for update in updates:
            figures = dict(update)
            self._log(stage, int(figures.pop("update")), figures)

    def stage(self, stage: str, notes: Mapping[str, Any]) -> None:
        """Take what a finished stage notes about itself; the last loss of a training is known from its updates."""
        prefix, _, kind = stage.rpartition("/")
        figures = {name: value for name, value in flat(notes, "/") if type(value) in (int, float) and name != "loss"}
        self._log(kind, int(prefix.removeprefix("round-") or 0), figures)
        self._attempt(lambda tracker: tracker.flush())

    def close(self, finished: bool) -> None:
        """Let the tracker go."""
        self._attempt(lambda tracker: tracker.close(finished))
        self._tracker = None

    def _log(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        self._attempt(lambda tracker: tracker.log(group, step, figures))

    def _attempt(self, what: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        except Exception as error:
            self._tracker = None
            reason = f"tracking by {self._config.tracking} ends here: {_reason(error)}"
            self._warn(f"{reason}; metrics.jsonl goes on and has every figure")


def flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping with its path, such as `test/greedy_accuracy`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value


class TensorBoard:
    """Event files in RUN/tensorboard, a folder a group. A group that goes on replaces what it had from that step on.

    Where RUN lies in an object store they are made on this machine, and copied there when a stage ends.
    """

    def __init__(self, store: RunDirectory) -> None:
        self._run, self._away = store.folder, store.folder.path is None
        self._folder = Path(tempfile.mkdtemp(prefix="sapo-")) if self._away else store.path / "tensorboard"
        self._writers: dict[str, Any] = {}
        threading.excepthook = _unless_kept

    def log(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        if group not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[group] = SummaryWriter(str(self._folder / group), purge_step=step, flush_secs=10)
        for name, value in figures.items():
            self._writers[group].add_scalar(f"{Path(group).name}/{name}", value, step)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()
        if self._away:
            files = [str(file.relative_to(self._folder)) for file in self._folder.rglob("*") if file.is_file()]
            self._run.add(self._folder, files, "tensorboard")

    def close(self, finished: bool) -> None:
        self.flush()
        for writer in self._writers.values():
            writer.close()
        if self._away:
            shutil.rmtree(self._folder)


def _unless_kept(error: threading.ExceptHookArgs, print_it: Any = threading.excepthook) -> None:
    """A thread of TensorBoard's keeps the error that ends it for the next call, and need not print it, too."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        print_it(error)


class WeightsAndBiases:
    """One run of Weights & Biases, which is gone on with when this one is. The environment says where: WANDB_…"""

    def __init__(self, config: RunConfig, store: RunDirectory) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._groups: set[str] = set()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=store.name,
            id=_run_id(store, "wandb", lambda: uuid4().hex),
            resume="allow",
            dir=store.folder.path,
            config=asdict(config),
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, finish_timeout=5, finish_timeout_raises=False
            ),
        )

    def log(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({f"{group}/step": step, **{f"{group}/{name}": value for name, value in figures.items()}})

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=int(not finished))


class MLflow:
    """One run of MLflow, which is gone on with when this one is. The environment says where: MLFLOW_TRACKING_URI …"""

    def __init__(self, config: RunConfig, store: RunDirectory) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))

        def start() -> str:
            run_id: str = mlflow.start_run(run_name=store.name).info.run_id
            params = list(flat(asdict(config), "."))
            for first in range(0, len(params), _PARAMS):
                mlflow.log_params(dict(params[first : first + _PARAMS]))
            return run_id

        run_id = _run_id(store, "mlflow", start)
        if mlflow.active_run() is None:
            mlflow.start_run(run_id=run_id)

    def log(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        named = {f"{group}/{name}": value for name, value in figures.items()}
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run("FINISHED" if finished else "FAILED")


def _run_id(store: RunDirectory, tool: str, make: Callable[[], str]) -> str:
    """The tool's id of this run, kept in RUN/tracking.json from the first time on."""
    ids: dict[str, str] = json.loads(store.folder.read(_IDS)) if store.folder.has(_IDS) else {}
    if tool not in ids:
        ids[tool] = make()
        store.folder.write(_IDS, json.dumps(ids))
    return ids[tool]


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
