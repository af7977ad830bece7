from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.tasks.chain import Chain, ChainConfig
from sapo_ray.training import (
    RESULT_FILE,
    LoraConfig,
    TrainConfig,
    TrainJob,
    TrainResult,
    finished,
    is_same_job,
    learning_rate,
)


def test_learning_rates_of_ten_updates() -> None:
    linear = TrainConfig(learning_rate=1.0, warmup_ratio=0.2, schedule="linear", min_lr_ratio=0.0)
    rates = [learning_rate(linear, update, 10) for update in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = TrainConfig(learning_rate=2.0, warmup_ratio=0.0, schedule="cosine", min_lr_ratio=0.5)
    assert learning_rate(cosine, 0, 10) == pytest.approx(2.0)
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.5)
    assert learning_rate(TrainConfig(schedule="constant", warmup_ratio=0.0), 9, 10) == TrainConfig().learning_rate


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    updates=st.integers(1, 50),
)
def test_the_learning_rate_rises_then_falls_within_its_bounds(
    schedule: Any, warmup: float, floor: float, updates: int
) -> None:
    config = TrainConfig(learning_rate=1.0, schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor)
    rates = [learning_rate(config, update, updates) for update in range(updates)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)
    assert all(rate >= floor - 1e-9 for rate in rates[round(warmup * updates) :])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be above 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5; it must lie between 0 and 1"),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be at least 0 and below 1"),
        ({"beta2": -0.1}, "beta2 is -0.1; it must be at least 0 and below 1"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes is -1.0; it must not be negative"),
        ({"zero_stage": 4}, "zero_stage is 4; it must be 0, 1, 2 or 3"),
        (
            {"lora": LoraConfig(quantize="nf4"), "zero_stage": 3},
            "zero_stage is 3; .* lora.quantize packs: set 2, or less",
        ),
        ({"max_tokens": 512, "micro_batch_tokens": 1000}, "micro_batch_tokens is 1000; .* 2 \\* max_tokens = 1024"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0}, "alpha is 0; it must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"targets": []}, "targets is \\[\\]; name a layer, or all by null"),
    ],
)
def test_impossible_adapters_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoraConfig(**values)


def test_a_training_is_known_by_its_adapters_too() -> None:
    """One from before there were any has none."""
    job = TrainJob(
        objective="sft", init="a", data=("b",), out="c", task=Chain(ChainConfig()), config=TrainConfig(), seed=0
    )
    adapting = replace(job, config=TrainConfig(lora=LoraConfig(targets=["q_proj"])))
    stored, plain = (json.loads(json.dumps(j.fingerprint())) for j in (adapting, job))
    assert is_same_job(stored, adapting.fingerprint(), "c/training.json")
    del plain["lora"]
    assert is_same_job(plain, job.fingerprint(), "c/training.json")
    for other in (job, replace(job, config=TrainConfig(lora=LoraConfig(targets=["q_proj"], rank=8)))):
        with pytest.raises(ValueError, match=r"training\.json: lora was .*'rank': 16.* and is now "):
            is_same_job(stored, other.fingerprint(), "c/training.json")


def test_a_checkpoint_is_finished_where_it_was_made_from_what_is_there_now(tmp_path: Path) -> None:
    job = TrainJob(
        objective="sft",
        init=str(tmp_path / "base"),
        data=(str(tmp_path / "original"),),
        out=str(tmp_path / "reasoner-0"),
        task=Chain(ChainConfig()),
        config=TrainConfig(),
        seed=0,
        content=("of base", "of original"),
    )
    counts = {"updates": 1, "examples": 1, "too_long": 0, "empty": 0, "tokens": 1, "resumed_from": 0, "metrics": []}
    result = {"checkpoint": job.out, "flops": 6.0, "seconds": 1.0, "files": {}, **counts}
    Path(job.out).mkdir()
    Path(job.out, RESULT_FILE).write_text(json.dumps({"job": job.fingerprint(), "result": result}))
    for driver in (None, "one", "another"):
        assert finished(replace(job, driver=driver)) == TrainResult(**result)  # type: ignore[arg-type]
    for content in (("of another base", "of original"), ("of base", "of other data"), (None, None)):
        assert finished(replace(job, content=content)) is None
    with pytest.raises(ValueError, match=r"training\.json: seed was 0 and is now 1; restore it or remove "):
        finished(replace(job, seed=1))
