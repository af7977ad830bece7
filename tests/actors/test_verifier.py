from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForTokenClassification

from actors import verifier
from actors.errors import EngineDeadError, WorkerError
from actors.verifier import VerifierWorker, verifier_pool
from sapo_ray.encoding import Encoded
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.requests import ScoreRequest, VerifierConfig
from sapo_ray.scaling import ScalingConfig
from sapo_ray.scoring import load_verifier, score
from sapo_ray.tasks.chain import VOCABULARY

pytestmark = pytest.mark.engine

CONFIG = VerifierConfig(workers=2, cpus_per_worker=0.2, batch_tokens=100, batch_size=3)
TRAJECTORIES = [Encoded(list(range(2, 12 + 4 * n)), 6, [9 + 4 * j for j in range(n)]) for n in (3, 1, 6, 2, 5, 4, 1)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reasoner")
    shape = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=64, max_length=64)
    save_random_reasoner(shape, VOCABULARY, 0, path)
    return str(path)


def save_verifier(reasoner: str, seed: int, path: Path) -> str:
    torch.manual_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(reasoner, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path)
    return str(path)


def test_a_device_that_fails_ends_the_worker_and_not_the_run(
    reasoner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    worker = VerifierWorker(CONFIG, None, save_verifier(reasoner, 0, tmp_path / "0"))
    worker.ready()
    monkeypatch.setattr(verifier, "score", fail)
    with pytest.raises(EngineDeadError, match=r"^the device failed: .*illegal memory access"):
        worker.score([ScoreRequest("t", TRAJECTORIES[0])])


def test_a_pool_of_verifiers_scores_as_one_model_does_before_and_after_a_reload(reasoner: str, tmp_path: Path) -> None:
    checkpoints = [save_verifier(reasoner, seed, tmp_path / str(seed)) for seed in (0, 1)]

    async def scores() -> list[list[list[float]]]:
        pool = verifier_pool(CONFIG, None, ScalingConfig())
        asked = [ScoreRequest(str(number), encoded) for number, encoded in enumerate(TRAJECTORIES)]
        await pool.load(checkpoints[0])
        before = await asyncio.gather(*map(pool.submit, asked))
        await pool.load(checkpoints[1])
        after = await asyncio.gather(*map(pool.submit, asked))
        with pytest.raises(WorkerError, match=f"load failed: {reasoner} holds Qwen2ForCausalLM"):
            await pool.load(reasoner)
        await pool.close()
        return [before, after]

    found = asyncio.run(scores())
    assert found[0] != found[1]
    for checkpoint, of_all in zip(checkpoints, found, strict=True):
        expected = score(load_verifier(checkpoint), TRAJECTORIES, batch_tokens=10_000)
        for of_one, of_one_expected in zip(of_all, expected, strict=True):
            assert of_one == pytest.approx(of_one_expected, abs=1e-5)


def test_a_failed_request_is_in_the_logs_with_its_run_and_stage(
    reasoner: str, tmp_path: Path, log_lines: Callable[[str], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """In the worker's file, and in the log of the process that the pool lives in."""
    checkpoint = save_verifier(reasoner, 0, tmp_path / "verifier")
    unknown = Encoded([2, 10_000, 3], 1, [2])

    async def ask() -> None:
        pool = verifier_pool(VerifierConfig(cpus_per_worker=0.2), "eager", ScalingConfig())
        pool.enter("local", "round-1/sample")
        await pool.load(checkpoint)
        pool.enter("local", "round-2/sample")
        with pytest.raises(WorkerError, match="IndexError"):
            await pool.submit(ScoreRequest("round-2/q-7/0", unknown))
        await pool.close()

    with caplog.at_level("INFO", "actors"):
        asyncio.run(ask())
    (failed,) = log_lines("request=round-2/q-7/0")
    form = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ERROR run=local stage=round-2/sample request=round-2/q-7/0 score failed"
    assert re.fullmatch(form, failed)
    (loaded,) = log_lines(checkpoint)
    assert "INFO run=local stage=round-1/sample request=- " in loaded
    assert loaded.endswith(f"{checkpoint} is loaded, in float32 on cpu, with eager attention")
    assert [record.request for record in caplog.records if "score failed" in record.message] == ["round-2/q-7/0"]


def test_a_reasoner_is_refused_at_the_start(reasoner: str) -> None:
    with pytest.raises(WorkerError, match=rf"verifier worker \d: start failed: {reasoner} holds Qwen2ForCausalLM"):
        asyncio.run(verifier_pool(CONFIG, None, ScalingConfig()).load(reasoner))
