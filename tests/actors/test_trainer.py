"""Trainings on real Ray Train worker groups: one of one worker, one of two, kept for the whole module."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.exceptions import OutOfMemoryError
from ray.util import placement_group_table
from transformers import AutoModelForCausalLM

from actors.trainer import Trainer, TrainingError, _line
from sapo_ray.data import PAIRS
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig
from sapo_ray.training import LoraConfig, TrainConfig, TrainerConfig, TrainJob, TrainResult
from tests.disks import Disk

pytestmark = pytest.mark.engine

CHAIN = Chain(ChainConfig(worked=21, pool=1, validation=1, test=1, ood=1))
CONFIG = TrainConfig(epochs=2, batch_size=10, max_tokens=128, micro_batch_tokens=512, learning_rate=3e-3)
"""21 examples: batches of 10, 10 and 1, so that the second of two workers has nothing in an epoch's last update."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reasoner in `init` and pairs, a third of them without a rejected solution."""
    home = tmp_path_factory.mktemp("trainer")
    save_random_reasoner(
        ModelConfig(hidden_size=32, layers=2, heads=1, intermediate_size=64), VOCABULARY, 0, home / "init"
    )
    records = []
    for i, question in enumerate(CHAIN.questions("worked")):
        steps = list(question.solution or ())
        wrong = None if i % 3 == 0 else [*steps[:-1], "1+1=9\n"]
        records.append(
            {
                "question": question.text,
                "chosen_id": question.id,
                "chosen": steps,
                "rejected_id": "w",
                "rejected": wrong,
            }
        )
    pq.write_table(pa.Table.from_pylist(records, schema=PAIRS), home / "pairs.parquet")
    return home


@pytest.fixture(scope="module")
def trainers(home: Path) -> Iterator[dict[int, Trainer]]:
    """By number of workers. The lone worker's group survives no crash, the pair's, which is spread, survives one."""
    ray.init(num_cpus=2, log_to_driver=False, _system_config={"metrics_report_interval_ms": 3000})
    lone = TrainerConfig(workers=1, cpus_per_worker=0.5, max_failures=0)
    pair = replace(lone, workers=2, max_failures=1, placement="spread")
    trainers = {
        config.workers: Trainer(config, home / "ray", f"of-{config.workers}", pytest.fail) for config in (lone, pair)
    }
    for trainer in trainers.values():
        trainer.start()
    yield trainers
    for trainer in trainers.values():
        trainer.close()
    ray.shutdown()


def job(home: Path, out: str, task: Any = CHAIN, **changes: Any) -> TrainJob:
    return TrainJob(
        objective="orpo",
        init=str(home / "init"),
        data=(str(home / "pairs.parquet"),),
        out=str(home / out),
        task=task,
        config=replace(CONFIG, **changes),
        seed=1,
        params={"beta": 0.5},
    )


def losses(result: TrainResult) -> list[float]:
    return [metrics["loss"] for metrics in result.metrics]


def task_that_leaves_its_pid(file: Path) -> Any:
    """The chain task; whoever makes prompts with it adds its process id to a file. Pickled by value."""

    class Traced:
        def prompt(self, question: str) -> str:
            with file.open("a") as lines:
                lines.write(f"{os.getpid()}\n")
            return question + "\n"

    return Traced()


def pids(file: Path) -> list[int]:
    return list(dict.fromkeys(map(int, file.read_text().split())))


def kill_after(updates: int, asked: TrainJob, file: Path) -> threading.Thread:
    """Kill the last worker that joined when the job's mid-training checkpoint holds so many updates."""

    def watch() -> None:
        latest = Path(asked.out + ".partial", "latest.json")
        while not latest.exists() or json.loads(latest.read_text())["progress"]["updates"] < updates:
            time.sleep(0.01)
        os.kill(pids(file)[-1], signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_two_workers_learn_what_one_learns_under_every_zero_stage(home: Path, trainers: dict[int, Trainer]) -> None:
    reference: TrainResult | None = None
    for stage in range(4):
        for workers, trainer in trainers.items():
            result = trainer.train(job(home, f"zero-{stage}-of-{workers}", zero_stage=stage))
            reference = reference or result
            assert losses(result) == pytest.approx(losses(reference), abs=1e-5)
            assert [m["grad_norm"] for m in result.metrics] == pytest.approx(
                [m["grad_norm"] for m in reference.metrics], rel=1e-3
            )
            trained, same = (AutoModelForCausalLM.from_pretrained(r.checkpoint) for r in (result, reference))
            assert trained.dtype == torch.float32
            torch.testing.assert_close(
                dict(trained.named_parameters()), dict(same.named_parameters()), atol=1e-4, rtol=0
            )


def test_two_workers_train_the_adapters_that_one_trains(home: Path, trainers: dict[int, Trainer]) -> None:
    reference: TrainResult | None = None
    for workers, stage in ((1, 2), (2, 2), (2, 3)):
        asked = job(home, f"lora-{stage}-of-{workers}", zero_stage=stage, lora=LoraConfig(rank=4))
        result = trainers[workers].train(asked)
        reference = reference or result
        assert losses(result) == pytest.approx(losses(reference), abs=1e-5)
        trained, same = (AutoModelForCausalLM.from_pretrained(r.checkpoint) for r in (result, reference))
        torch.testing.assert_close(dict(trained.named_parameters()), dict(same.named_parameters()), atol=1e-4, rtol=0)


def test_a_group_is_placed_as_its_config_says(home: Path, trainers: dict[int, Trainer]) -> None:
    for workers, trainer in trainers.items():
        trainer.train(job(home, f"placed-{workers}", max_updates=1))
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert {len(group["bundles"]): group["strategy"] for group in groups} == {1: "PACK", 2: "SPREAD"}


def test_a_job_at_fault_fails_with_its_cause_and_the_group_lives_on(home: Path, trainers: dict[int, Trainer]) -> None:
    bad = replace(job(home, "bad"), init=str(home / "missing"))
    with pytest.raises(TrainingError, match=f"bad: .*{home / 'missing'}"):
        trainers[2].train(bad)
    assert trainers[2].train(job(home, "good", max_updates=1)).updates == 1


def test_a_finished_job_is_not_trained_again(home: Path, trainers: dict[int, Trainer]) -> None:
    first, told = trainers[1].train(job(home, "once", max_updates=2)), list[dict[str, float]]()
    left = Path(job(home, "once").out).with_name("once.partial")  # by one that was killed right after its export
    (left / "update-1").mkdir(parents=True)
    assert trainers[1].train(job(home, "once", max_updates=2), on_updates=told.extend) == first
    assert told == first.metrics
    assert not left.exists()


def test_a_training_is_told_update_by_update_counted_and_logged(
    home: Path,
    trainers: dict[int, Trainer],
    scrape: Callable[[Iterable[str]], list[Any]],
    log_lines: Callable[[str], list[str]],
) -> None:
    asked, told = replace(job(home, "told"), run="local", stage="round-1/align"), list[dict[str, float]]()
    result = trainers[2].train(asked, on_updates=told.extend)
    assert told == result.metrics
    names = {"ray_sapo_trained_tokens_total", "ray_sapo_loss"}
    seen: dict[str, Any] = {}
    while not names <= seen.keys() or seen["ray_sapo_trained_tokens_total"].value < result.tokens:
        seen |= {sample.name: sample for sample in scrape(names - seen.keys()) if sample.labels["run"] == "local"}
    assert seen["ray_sapo_trained_tokens_total"].value == result.tokens
    loss = seen["ray_sapo_loss"]
    assert (loss.labels["stage"], loss.value) == ("round-1/align", pytest.approx(result.metrics[-1]["loss"]))
    assert len(log_lines("run=local stage=round-1/align request=- rank")) == 2


def test_a_killed_worker_is_replaced_and_the_training_goes_on(
    home: Path, trainers: dict[int, Trainer], tmp_path: Path
) -> None:
    lengthy = {"epochs": 20, "checkpoint_every": 1}
    asked = job(home, "killed", task_that_leaves_its_pid(tmp_path / "pids"), **lengthy)
    killer = kill_after(5, asked, tmp_path / "pids")
    told: list[dict[str, float]] = []
    result = trainers[2].train(asked, on_updates=told.extend)
    killer.join()
    assert [update["update"] for update in told] == list(range(1, 61))
    undisturbed = trainers[2].train(job(home, "undisturbed", **lengthy))
    assert len(pids(tmp_path / "pids")) == 4
    assert 5 <= result.resumed_from < 60
    assert losses(result) == pytest.approx(losses(undisturbed), abs=1e-5)


def test_a_training_that_ctrl_c_ends_is_saved_and_goes_on(home: Path, trainers: dict[int, Trainer]) -> None:
    lengthy, told = {"epochs": 80}, list[dict[str, float]]()
    asked = job(home, "interrupted", **lengthy)

    def interrupt(updates: list[dict[str, float]]) -> None:
        told.extend(updates)
        if told == updates:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainers[2].train(asked, on_updates=interrupt)
    saved = json.loads(Path(asked.out + ".partial", "latest.json").read_text())["progress"]
    assert saved["metrics"] == told
    assert 0 < len(told) < 240
    result = trainers[2].train(asked, on_updates=told.extend)
    assert result.resumed_from == saved["updates"]
    assert [update["update"] for update in told] == list(range(1, 241))
    assert losses(result) == pytest.approx(losses(trainers[2].train(job(home, "never", **lengthy))), abs=1e-5)


def test_a_worker_that_cannot_write_ends_the_training_and_no_other_tries_it_again(
    home: Path, trainers: dict[int, Trainer], disk: Disk
) -> None:
    """Each worker learns of it by itself, so that those which wait for it are of no more use."""
    asked = replace(job(home, "full", checkpoint_every=1), out=f"{disk.path}/full")
    disk.fill()
    cause = rf"^{asked.out}: {asked.out}.partial/rank-\d.tmp cannot be written: No space left on device$"
    with pytest.raises(TrainingError, match=cause):
        trainers[2].train(asked)


def test_a_group_that_crashes_too_often_is_an_error(home: Path, trainers: dict[int, Trainer], tmp_path: Path) -> None:
    asked = job(home, "lost", task_that_leaves_its_pid(tmp_path / "pids"), epochs=20, checkpoint_every=1)
    kill_after(5, asked, tmp_path / "pids")
    with pytest.raises(TrainingError, match=r"lost: worker 0: .*died"):
        trainers[1].train(asked)


def test_of_workers_that_are_killed_for_memory_the_reason_is_told_not_the_last_of_the_advice() -> None:
    text = (
        "1 worker(s) were killed due to the node running low on memory.\nMemory was 23 GB.\nRefer to the documentation"
    )
    assert _line(OutOfMemoryError(text)) == (
        "1 worker(s) were killed due to the node running low on memory. A smaller micro_batch_tokens, or "
        "gradient_checkpointing, needs less"
    )
    assert _line(RuntimeError("Traceback\n  File\nValueError: no\n")) == "ValueError: no"
