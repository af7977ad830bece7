"""`model.attention` on its way to those who compute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.engines import Engines
from actors.run import Run
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.store import RunDirectory
from sapo_ray.tasks.chain import Chain
from sapo_ray.training import TrainJob

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.fixture
def config() -> RunConfig:
    return load_config(RunConfig, TINY, ["model.attention=eager", "tracking=none"])


def test_verifiers_get_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("actors.engines.verifier_pool", lambda *arguments: asked.append(arguments))
    Engines(config, Chain(config.task), "run")
    assert asked == [(config.verifier, "eager", config.scaling)]


def test_trainings_get_it(config: RunConfig, tmp_path: Path) -> None:
    class AskedError(Exception):
        pass

    class Trainer:
        def train(self, job: TrainJob, *_: object) -> None:
            raise AskedError(job.attention)

    store: Any = RunDirectory(tmp_path)
    store.create()
    reporter: Any = Silent()
    run = Run(config, store, reporter)
    run._trainer = Trainer()  # type: ignore[assignment]
    run.originals()
    with pytest.raises(AskedError, match=r"^eager$"):
        run.finetune()


class Silent:
    """A reporter."""

    def begin(self, stage: str) -> None: ...

    def end(self, notes: object) -> None: ...

    def update(self, *_: object) -> None: ...

    def warn(self, sign: str) -> None: ...
