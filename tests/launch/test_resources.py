"""Demand that a cluster can never meet is told from demand that only waits for nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from launch.resources import Nodes, check_fits, offered_nodes, phases
from sapo_ray.config import RayConfig, RunConfig
from sapo_ray.errors import SapoError
from sapo_ray.requests import EngineConfig, VerifierConfig
from sapo_ray.tasks import CodeConfig
from sapo_ray.tasks.code import CodeSource
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


def _announced(
    monkeypatch: pytest.MonkeyPatch, groups: Sequence[SimpleNamespace], up: Sequence[tuple[str, str, float]] = ()
) -> list[Nodes]:
    """What is offered where these groups are announced, and nodes of this name, label and number of CPUs are up."""
    monkeypatch.setattr(
        ray._private.state.state, "get_cluster_config", lambda: SimpleNamespace(node_group_configs=groups)
    )
    nodes = [
        {"NodeManagerHostname": name, "Alive": True, "Labels": {"ray.io/node-group": group}, "Resources": {"CPU": cpus}}
        for name, group, cpus in up
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    return offered_nodes()


def test_a_node_that_is_up_is_one_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        SimpleNamespace(name="head", max_count=1, resources={"CPU": 2}),
        SimpleNamespace(name="gpu", max_count=2, resources={"CPU": 16, "GPU": 8}),
    ]
    up = [("a", "head", 2.0), ("b", "gpu", 16.0), ("c", "by hand", 4.0)]
    assert _announced(monkeypatch, groups, up) == [
        Nodes("c", 1, {"CPU": 4.0}),
        Nodes("node type head", 1, {"CPU": 2}),
        Nodes("node type gpu", 2, {"CPU": 16, "GPU": 8}),
    ]


def test_nodes_beyond_an_announced_limit_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the limit of a running cluster is raised."""
    group = SimpleNamespace(name="gpu", max_count=1, resources={"CPU": 16})
    assert _announced(monkeypatch, [group], [("a", "gpu", 16.0), ("b", "gpu", 16.0)])[0].count == 2


def test_machines_of_unknown_size_may_hold_anything_until_all_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [SimpleNamespace(name="machine", max_count=2, resources={})]
    config = _only(1, 16.0, 0.0)
    check_fits(config, _announced(monkeypatch, machines, [("a", "machine", 4.0)]))
    with pytest.raises(SapoError, match=r"engine.cpus_per_worker = 16, .* offers a: 4 CPU, 0 GPU; b: 8 CPU, 0 GPU$"):
        check_fits(config, _announced(monkeypatch, machines, [("a", "machine", 4.0), ("b", "machine", 8.0)]))


def test_what_has_no_limit_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes -1 where nodes of a group, or what they have of a resource, know no limit."""
    nodes = _announced(monkeypatch, [SimpleNamespace(name="any", max_count=-1, resources={"CPU": 16.0, "GPU": -1.0})])
    check_fits(replace(CONFIG, engine=replace(CONFIG.engine, workers=1000)), nodes)
    with pytest.raises(SapoError) as caught:
        check_fits(replace(CONFIG, engine=replace(CONFIG.engine, cpus_per_worker=32)), [HEAD, *nodes])
    assert str(caught.value).endswith(
        "the cluster offers head: 4 CPU, 0 GPU; node type any (any number of them): 16 CPU, any number of GPUs"
    )


def test_a_worker_that_no_node_can_hold_is_named_with_what_is_offered() -> None:
    config = replace(CONFIG, engine=replace(CONFIG.engine, workers=1, gpus_per_worker=8))
    with pytest.raises(SapoError) as caught:
        check_fits(config, [HEAD, GPU_NODES])
    assert str(caught.value) == (
        "no node has engine.cpus_per_worker = 2 and engine.gpus_per_worker = 8, which a worker needs on one node; "
        "the cluster offers head: 4 CPU, 0 GPU; node type gpu (up to 2): 16 CPU, 4 GPU"
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


def test_workers_that_would_have_to_straddle_nodes_are_named_with_how_many_can_be_up() -> None:
    """Six GPUs are there, but three on either node: each holds one worker of two."""
    config = replace(
        CONFIG, placement="colocated", engine=EngineConfig(workers=3, gpus_per_worker=2, tensor_parallel_size=2)
    )
    with pytest.raises(SapoError) as caught:
        check_fits(config, [HEAD, Nodes("a", 1, {"CPU": 16.0, "GPU": 3.0}), Nodes("b", 1, {"CPU": 16.0, "GPU": 3.0})])
    assert str(caught.value) == (
        "engine.workers is 3, but no more than 2 can be up: each needs engine.cpus_per_worker = 1 and "
        "engine.gpus_per_worker = 2 on one node; the cluster offers head: 4 CPU, 0 GPU; a: 16 CPU, 3 GPU; "
        "b: 16 CPU, 3 GPU"
    )


def _sections(config: RunConfig, *, trains: bool = True) -> list[set[str]]:
    return [{demand.section for demand in wanted} for wanted in phases(config, trains=trains)]


def test_what_is_up_at_the_same_time_is_what_a_command_starts() -> None:
    pools = {"ray", "engine", "verifier"}
    assert _sections(CONFIG) == [pools | {"trainer"}]
    assert _sections(CONFIG, trains=False) == [pools]
    assert _sections(replace(CONFIG, verify=False)) == [{"ray", "engine", "trainer"}]
    code = CodeConfig(train_data=CodeSource(path="mbpp.jsonl"), test=10)
    assert _sections(replace(CONFIG, task=code)) == [pools | {"executor", "trainer"}]
    colocated = replace(CONFIG, task=code, placement="colocated")
    assert _sections(colocated) == [pools | {"executor"}, {"ray", "trainer"}]
    sleeping = replace(colocated, engine=EngineConfig(gpus_per_worker=0.6, sleep=True))
    assert _sections(sleeping) == [pools | {"executor"}, {"ray", "engine", "trainer"}]


@pytest.mark.parametrize("gpus", [0.5, 1])
def test_an_engine_that_sleeps_shares_its_gpu_with_the_trainer_and_no_other_engine(gpus: float) -> None:
    with pytest.raises(ValueError, match=rf"gpus_per_worker {gpus}; it must lie above 0.5, or two .*, and below 1"):
        EngineConfig(gpus_per_worker=gpus, sleep=True)


def test_tenths_of_a_cpu_add_up_to_whole_ones() -> None:
    """0.3 / 0.1 is a little less than 3 in binary."""
    check_fits(_only(3, 0.1, 0.0), [Nodes("small", 1, {"CPU": 0.3})])


QUARTERS = st.integers(0, 8).map(lambda quarters: quarters / 4)
"""Amounts that binary fractions hold exactly, so that nothing but the packing decides."""
NODES = st.lists(
    st.builds(
        lambda count, cpu, gpu: Nodes("node", count, {"CPU": cpu, "GPU": gpu}), st.integers(0, 2), QUARTERS, QUARTERS
    ),
    min_size=1,
    max_size=2,
)
SIZES = {"workers": st.integers(1, 2), "cpus_per_worker": QUARTERS, "gpus_per_worker": QUARTERS}


@given(st.builds(EngineConfig, **SIZES), st.builds(VerifierConfig, **SIZES), st.builds(TrainerConfig, **SIZES), NODES)
def test_a_run_whose_workers_can_be_packed_is_never_refused(
    engine: EngineConfig, verifier: VerifierConfig, trainer: TrainerConfig, nodes: list[Nodes]
) -> None:
    config = RunConfig(engine=engine, verifier=verifier, trainer=trainer, ray=RayConfig(coordinator_cpus=0.25))
    if _packable(config, nodes):
        check_fits(config, nodes)


@given(st.integers(1, 4), QUARTERS, QUARTERS, NODES)
def test_workers_of_one_kind_are_refused_where_they_cannot_be_packed(
    workers: int, cpus: float, gpus: float, nodes: list[Nodes]
) -> None:
    config = _only(workers, cpus, gpus)
    if _packable(config, nodes):
        check_fits(config, nodes)
    else:
        with pytest.raises(SapoError, match=r"engine\.|no node"):
            check_fits(config, nodes)


def _only(workers: int, cpus: float, gpus: float) -> RunConfig:
    """A config all of whose demand is its engines'."""
    return RunConfig(
        engine=EngineConfig(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus),
        verifier=VerifierConfig(cpus_per_worker=0),
        trainer=TrainerConfig(cpus_per_worker=0),
        ray=RayConfig(coordinator_cpus=0),
    )


def _packable(config: RunConfig, nodes: Sequence[Nodes]) -> bool:
    """Whether all workers have a node, by trying every way to place them."""
    (wanted,) = phases(config)
    needs = [(d.resources.get("CPU", 0.0), d.resources.get("GPU", 0.0)) for d in wanted for _ in range(d.workers)]
    free = [(node.resources["CPU"], node.resources["GPU"]) for node in nodes for _ in range(node.count)]
    return _place(needs, free)


def _place(needs: Sequence[tuple[float, float]], free: Sequence[tuple[float, float]]) -> bool:
    if not needs:
        return True
    (cpu, gpu), *others = needs
    return any(
        _place(others, [*free[:i], (cpus - cpu, gpus - gpu), *free[i + 1 :]])
        for i, (cpus, gpus) in enumerate(free)
        if cpus >= cpu and gpus >= gpu
    )
