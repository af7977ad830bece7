"""Demand that a cluster can never meet is told from demand that only waits for nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.resources import Nodes, check_fits
from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError
from sapo_ray.requests import EngineConfig, VerifierConfig
from sapo_ray.training import TrainerConfig

GPU_NODES = Nodes("node type gpu", 2, {"CPU": 16.0, "GPU": 4.0})
HEAD = Nodes("head", 1, {"CPU": 4.0})
CONFIG = replace(
    RunConfig(),
    engine=EngineConfig(workers=4, cpus_per_worker=2, gpus_per_worker=1),
    verifier=VerifierConfig(workers=1, cpus_per_worker=1),
    trainer=TrainerConfig(workers=4, cpus_per_worker=2, gpus_per_worker=1),
)


def test_what_fits_the_nodes_that_may_come_is_let_through() -> None:
    check_fits(CONFIG, [HEAD, GPU_NODES])


def test_a_worker_that_no_node_can_hold_is_named_with_what_is_offered() -> None:
    config = replace(CONFIG, engine=replace(CONFIG.engine, workers=1, gpus_per_worker=8))
    with pytest.raises(SapoError) as caught:
        check_fits(config, [HEAD, GPU_NODES])
    assert str(caught.value) == (
        "no node has engine.cpus_per_worker = 2 and engine.gpus_per_worker = 8, which a worker needs on one node; "
        "the cluster offers head: 4 CPU, 0 GPU; node type gpu: 16 CPU, 4 GPU"
    )


def test_a_total_that_the_cluster_can_never_reach_is_named() -> None:
    with pytest.raises(
        SapoError, match=r"needs 8 GPUs = 4 \(engine.workers \* engine.gpus_per_worker\) \+ 4 \(trainer"
    ):
        check_fits(CONFIG, [HEAD, replace(GPU_NODES, count=1)])


def test_a_pool_that_starts_with_nothing_still_needs_room_for_one_worker() -> None:
    config = replace(CONFIG, engine=replace(CONFIG.engine, workers=0, max_workers=9))
    check_fits(config, [HEAD, replace(GPU_NODES, count=2)])
    with pytest.raises(SapoError, match=r"needs 5 GPUs"):
        check_fits(config, [HEAD, replace(GPU_NODES, count=1)])


def test_colocated_engines_and_training_need_room_for_the_larger_of_the_two() -> None:
    config = replace(CONFIG, placement="colocated")
    check_fits(config, [HEAD, replace(GPU_NODES, count=1)])
    with pytest.raises(SapoError, match=r"needs 8 GPUs = 8 \(trainer.workers"):
        check_fits(replace(config, trainer=replace(config.trainer, workers=8)), [HEAD, replace(GPU_NODES, count=1)])
