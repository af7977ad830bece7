"""Real processes of a real run are killed; it ends by itself, or by the same command, with nothing lost or doubled."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from sapo_ray.store import RunDirectory
from tests.disks import Disk
from tests.launch.runs import DRIVER, NULL, Running, assert_nothing_is_lost, rows, shards

ROLLOUT, ENGINE, VERIFIER = "ray::RolloutWorker", "VLLM::EngineCore", "ray::VerifierWorker"
COORDINATOR, TRAINER = "ray::Coordinator", "ray::RayTrainWorker"
NULL_REASONER, NULL_VERIFIER = "ray::NullReasoner", "ray::NullVerifier"
KILLS = 4
SHARDS = "ray.questions_per_shard=4"

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


@pytest.mark.slow
def test_a_run_whose_workers_and_coordinator_are_killed_ends_by_itself(finished: RunDirectory, tmp_path: Path) -> None:
    run = Running(tmp_path / "run")
    run.wait_for_stage("round-0/validation")
    run.kill_soon(ENGINE)  # while round 0 is sampled
    run.wait_for_stage("round-0/sample")
    run.kill_soon(TRAINER)  # while the first verifier is trained
    run.wait_for_stage("round-0/evaluate")
    run.kill_soon(ROLLOUT)  # while round 1 is sampled
    run.wait_for_stage("round-1/prm")
    run.kill_soon(VERIFIER)  # while it scores
    run.wait_for_stage("round-1/align")
    run.kill_soon(COORDINATOR)
    assert run.end() == 0, "".join(run.lines)
    assert_nothing_is_lost(run.store, finished)
    told = "".join(run.lines)
    assert "the coordinator died" in told
    assert "will be replaced" in told


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_goes_on_with_the_same_command(finished: RunDirectory, tmp_path: Path) -> None:
    run = Running(tmp_path / "run")
    run.wait_for_stage("round-0/sample")
    run.kill(DRIVER)
    run.end()
    before = run.store.stages()
    again = Running(tmp_path / "run")
    assert again.end() == 0, "".join(again.lines)
    assert_nothing_is_lost(again.store, finished)
    assert {name: again.store.stages()[name] for name in before} == before  # what was done is not done again
    _print_share_of_equal_rows("driver killed", again.store, finished)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run with null engines that nothing happens to."""
    run = Running(tmp_path_factory.mktemp("runs") / "null", *NULL)
    assert run.end() == 0, "".join(run.lines)
    return run.store


@pytest.mark.slow
def test_with_null_engines_a_run_that_was_killed_everywhere_is_the_undisturbed_one_byte_for_byte(
    undisturbed: RunDirectory, tmp_path: Path
) -> None:
    run = Running(tmp_path / "run", *NULL)
    run.wait_for_stage("round-0/validation")
    run.kill_soon(NULL_REASONER)  # while round 0 is sampled
    run.wait_for_stage("round-0/sample")
    run.kill_soon(TRAINER)  # while the first verifier is trained
    run.wait_for_stage("round-0/evaluate")
    run.kill_soon(NULL_VERIFIER)  # while round 1 is sampled and scored
    time.sleep(1)
    run.kill_soon(COORDINATOR)
    run.wait_for_stage("round-1/prm")
    run.kill(DRIVER)
    run.end()
    again = Running(tmp_path / "run", *NULL)
    assert again.end() == 0, "".join(again.lines)
    assert_nothing_is_lost(again.store, undisturbed)
    assert rows(again.store) == rows(undisturbed)


@pytest.mark.slow
def test_with_null_engines_a_kill_in_every_stage_changes_no_byte(undisturbed: RunDirectory, tmp_path: Path) -> None:
    """Of a training worker where the stage trains, of the coordinator where it works; once, of the driver."""
    run, killed = Running(tmp_path / "run", *NULL), list[str]()
    for before, stage in pairwise(undisturbed.stages()):
        work = stage.rpartition("/")[2]
        if work in ("original", "base", "warnings"):  # the driver's own
            continue
        victim = {"align": DRIVER, "sft": TRAINER, "prm": TRAINER}.get(work, COORDINATOR)
        run.wait_for_stage(before)
        time.sleep(0.2)
        run.kill_soon(victim, 60)
        killed.append(work)
        if victim == DRIVER:
            run.end()
            run = Running(tmp_path / "run", *NULL)
    assert run.end() == 0, "".join(run.lines)
    assert {"sft", "sample", "prm", "calibrate", "self-verification", "pairs", "align", "evaluate"} <= set(killed)
    assert_nothing_is_lost(run.store, undisturbed)
    assert rows(run.store) == rows(undisturbed)


@pytest.mark.slow
def test_a_run_that_meets_a_full_disk_says_so_and_goes_on_once_there_is_space(
    undisturbed: RunDirectory, disk: Disk
) -> None:
    for stage in ("round-0/validation", "round-0/sample"):  # it fills while the next is at work, sampling and training
        run = Running(disk.path / "run", *NULL)
        run.wait_for_stage(stage)
        disk.fill()
        assert run.end() == 2
        *_, last = run.lines
        assert re.fullmatch(rf"error: .*{disk.path}/run/\S+ cannot be written: No space left on device\n", last)
        assert [line for line in run.lines if "died" in line or "lost" in line or "Traceback" in line] == []
        disk.free()
    again = Running(disk.path / "run", *NULL)
    assert again.end() == 0, "".join(again.lines)
    assert_nothing_is_lost(again.store, undisturbed)
    assert rows(again.store) == rows(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_with_null_engines_four_kills_at_random_moments_change_no_byte(
    undisturbed: RunDirectory, tmp_path: Path, seed: int
) -> None:
    victims = [NULL_REASONER, NULL_VERIFIER, COORDINATOR, TRAINER, DRIVER]
    for run in _killed_at_random(tmp_path / "run", random.Random(seed), victims, *NULL, SHARDS):
        assert run.end() in (0, -signal.SIGKILL), "".join(run.lines)
    assert_nothing_is_lost(RunDirectory(tmp_path / "run"), undisturbed)
    assert rows(RunDirectory(tmp_path / "run")) == rows(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_four_kills_at_random_moments_of_one_run(finished: RunDirectory, tmp_path: Path, seed: int) -> None:
    victims = [ROLLOUT, ENGINE, VERIFIER, COORDINATOR, TRAINER, DRIVER]
    for run in _killed_at_random(tmp_path / "run", random.Random(seed), victims, SHARDS):
        assert run.end() in (0, -signal.SIGKILL), "".join(run.lines)
    assert_nothing_is_lost(RunDirectory(tmp_path / "run"), finished)
    _print_share_of_equal_rows(f"seed {seed}", RunDirectory(tmp_path / "run"), finished)


def _print_share_of_equal_rows(name: str, store: RunDirectory, undisturbed: RunDirectory) -> None:
    """What vLLM answers may depend on what else is in its batch, so they need not be all; `pytest -rP` shows it."""
    found, expected = (
        {(kind, json.dumps(row)) for kind, content in rows(s).items() for row in json.loads(content)}
        for s in (store, undisturbed)
    )
    print(f"{name}: {len(found & expected) / len(expected):.1%} of {len(expected)} undisturbed rows are equal")


def _killed_at_random(path: Path, rng: random.Random, victims: Sequence[str], *overrides: str) -> Iterator[Running]:
    """The same command again and again: killed at random until `KILLS` are done, then left to its end.

    Nothing that was stored when something was killed is sampled again: the shards stay as they are.
    """
    kills, stored = 0, dict[str, str]()
    run = Running(path, *overrides)
    while kills < KILLS and (run.process.poll() is None or run.process.returncode != 0):
        time.sleep(rng.uniform(2, 12))
        victim = rng.choice(victims)
        stored |= shards(run.store)
        if run.process.poll() is None and run.kill(victim):
            kills += 1
        if run.process.poll() is not None or victim == DRIVER:
            yield run
            run = Running(path, *overrides)
    assert kills == KILLS, "the run ended before it was killed so often"
    yield run
    assert stored
    assert stored.items() <= shards(run.store).items()
