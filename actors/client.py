"""The coordinator as the driver uses it: calls that show their progress, and models loaded when a call needs them."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.coordinator import Coordinator
from actors.errors import KILLED
from actors.flush import FLUSH_SECONDS
from actors.worker import is_placed
from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError, one_line, told
from sapo_ray.progress import Reporter
from sapo_ray.store import RunDirectory

MAX_DEATHS = 3
"""Deaths of the coordinator in a row, with nothing of the stage recorded before any of them, that end the run."""

HUNG_AFTER = 1800.0
"""Seconds without an answer after which a coordinator that has a node counts as dead: it may be busy so long with
reading all that a run has."""

_LOST = (*KILLED, GetTimeoutError)
"""What a call ends with where the coordinator is no more, or hangs."""


class CoordinatorClient:
    """Starts the coordinator with the first call. Use as a context manager: it and its pools are gone afterwards.

    Where an error or Ctrl-C ends it, nothing is waited for but, by the latter, the record of what is done: Ray ends the
    pools with the coordinator that owns them.
    """

    def __init__(self, config: RunConfig, run_path: str, reporter: Reporter, driver: str | None = None) -> None:
        """Where the run has a lease, `driver` is the id of the one that holds it."""
        self._config, self._run_path, self._reporter, self._driver = config, run_path, reporter, driver
        self.stage: str | None = None
        """The stage that calls are for, where they are part of a run."""
        self._wanted: dict[str, str] = {}
        self._loaded: dict[str, str] = {}
        self._actor: Any = None
        self._paused = False

    def __enter__(self) -> CoordinatorClient:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._actor is None:
            return
        if error is None:
            try:
                ray.get(self._actor.close.remote(), timeout=HUNG_AFTER)
            except GetTimeoutError as timeout:
                self._reporter.warn(f"close: the coordinator {_cause(timeout)}; it is killed")
            except RayError:  # it may have died since, and its pools with it
                pass
        ray.kill(self._actor)

    def use(self, *, reasoner: str | None = None, verifier: str | None = None) -> None:
        """The checkpoints that the next call needs. They are loaded when it comes: a skipped stage loads nothing."""
        models = {"reasoner": reasoner, "verifier": verifier}
        self._wanted |= {role: checkpoint for role, checkpoint in models.items() if checkpoint is not None}

    def pause(self) -> None:
        """Have engines and verifiers give their place to others until the next call.

        Raises SapoError with the cause of a failure.
        """
        if self._actor is None:
            return
        try:
            self._wait(self._actor.pause.remote())
            self._paused = True
        except RayTaskError as error:
            raise SapoError(f"pause: {told(error.cause)}") from error
        except _LOST as error:  # and its pools with it: their place is free
            self._give_up()
            self._reporter.warn(f"pause: the coordinator died ({_cause(error)}); the next stage starts another")

    def call(self, method: str, *args: Any) -> Any:
        """Call the coordinator and show its progress until it answers; if it dies, start it again and call once more.

        Raises SapoError with the cause of a failure, such as what its constructor raised, and where the coordinator
        dies again and again without having recorded anything.
        """
        deaths, recorded = 0, self._recorded()
        while True:
            try:
                self._load(self.stage or method)
                return self._wait(getattr(self._actor, method).remote(*args))
            except RayTaskError as error:
                raise SapoError(f"{method}: {told(error.cause)}") from error
            except _LOST as error:
                self._give_up()
                if isinstance(error, RayActorError) and error.actor_init_failed:  # another would fail alike
                    cause = told(error.args[0].cause)
                    raise SapoError(f"{method}: the coordinator cannot start: {cause}") from error
                before, recorded = recorded, self._recorded()
                deaths = 0 if recorded > before else deaths + 1
                if deaths == MAX_DEATHS:
                    text = f"{method}: the coordinator died {deaths} times without progress: {_cause(error)}"
                    raise SapoError(text) from error
                self._reporter.warn(f"{method}: the coordinator died ({_cause(error)}) and is started again")
            except RayError as error:
                raise SapoError(f"{method}: {told(error)}") from error

    def _recorded(self) -> int:
        """The items of the stage that another coordinator need not do again; 0 of a call that is not part of a run."""
        return RunDirectory(self._run_path).progress(self.stage)["items"] if self.stage else 0

    def _give_up(self) -> None:
        """The next call starts another coordinator. This one may be out of reach only, and would write beside it."""
        ray.kill(self._actor)
        self._actor, self._loaded = None, {}

    def _wait(self, answer: Any) -> Any:
        """The coordinator's answer; what it does or waits for, such as nodes for its workers, is shown meanwhile."""
        try:
            while not ray.wait([answer], timeout=1.0)[0]:
                self._show(ray.get(self._actor.progress.remote(), timeout=HUNG_AFTER))
            return ray.get(answer)
        except KeyboardInterrupt:
            ray.cancel(answer)
            ray.wait([answer], timeout=FLUSH_SECONDS)
            raise

    def _show(self, progress: dict[str, Any]) -> None:
        for event in progress["events"]:
            self._reporter.say(event)
        waits = [f"{count} {name} workers wait for a node" for name, count in progress["unplaced"].items()]
        self._reporter.update(
            progress["done"], progress["total"], ", ".join([f"{progress['tokens']:,} tokens", *waits])
        )

    def _start(self) -> Any:
        """A coordinator, beside the driver where there is room: that node's end is the run's anyway."""
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True, _spill_on_unavailable=True
        )
        made: Any = ray.remote(Coordinator).options(
            num_cpus=self._config.ray.coordinator_cpus, scheduling_strategy=here
        )
        return made.remote(self._config, self._run_path, self._driver)

    def _enter(self, stage: str) -> None:
        """Have the coordinator work for a stage. It may wait for a node as long as it takes, which is shown."""
        entered = self._actor.enter.remote(stage)
        while not ray.wait([entered], timeout=1.0)[0] and not is_placed(self._actor):
            cpus = self._config.ray.coordinator_cpus
            self._reporter.update(0, 0, f"the coordinator waits for a node with {cpus:g} CPU")
        ray.get(entered, timeout=HUNG_AFTER)

    def _load(self, stage: str) -> None:
        if self._actor is None:
            self._actor = self._start()
        self._enter(stage)
        for role, checkpoint in self._wanted.items():
            if self._loaded.get(role) != checkpoint:
                self._wait(getattr(self._actor, f"load_{role}").remote(checkpoint))
                self._loaded[role] = checkpoint
        if self._paused:
            self._wait(self._actor.resume.remote())
        self._paused = False


def _cause(error: RayError) -> str:
    """Why a coordinator is lost."""
    return f"hung: no answer for {HUNG_AFTER:g} s" if isinstance(error, GetTimeoutError) else one_line(error)
