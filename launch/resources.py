"""Whether a cluster can ever hold what a config asks for: looked at before anything starts."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError
from sapo_ray.plan.hardware import GIB, MOST_GIB
from sapo_ray.plan.memory import misfits
from sapo_ray.plan.shape import model_shape
from sapo_ray.requests import PoolConfig
from sapo_ray.training import TrainerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ACCELERATOR = "accelerator_type:"
"""How Ray begins the name of the resource that says which GPUs a node has."""
_UNLIMITED = sys.maxsize
"""Nodes of a group that may have any number of them: an integer, since none times infinity would be no number."""
_ANYTHING = {"CPU": math.inf, "GPU": math.inf}


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of one kind: those that are up, or those that an autoscaler may add."""

    name: str
    count: int
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Demand:
    """Workers that a section of the config has up at the same time, each on one node."""

    section: str
    workers: int
    resources: Mapping[str, float]


def offered_nodes() -> list[Nodes]:
    """What the connected cluster has, and what its autoscaler may add: anything, where nobody said what.

    `cluster/announce.py` says it. A node that is up without its group's label counts beside its group: too much is
    offered then, never too little.
    """
    import ray

    cluster = ray._private.state.state.get_cluster_config()
    groups = {group.name: group for group in cluster.node_group_configs} if cluster else {}
    sized = {name for name, group in groups.items() if group.resources}
    alive = [(node, node["Labels"].get("ray.io/node-group")) for node in ray.nodes() if node["Alive"]]
    nodes = [
        Nodes(node["NodeManagerHostname"], 1, node["Resources"])
        for node, group in alive
        if group not in sized  # else it is one of those that may be
    ]
    up = Counter(group for _, group in alive)
    for name, group in groups.items():
        count = _UNLIMITED if group.max_count < 0 else max(group.max_count, up[name])  # Ray's -1 is no limit
        if name in sized:
            resources = {kind: math.inf if amount < 0 else amount for kind, amount in group.resources.items()}
            nodes.append(Nodes(f"node type {name}", count, resources))
        elif count > up[name]:  # what these hold is known when they have joined
            nodes.append(Nodes(f"node type {name}, not up yet", count - up[name], _ANYTHING))
    if not cluster and _autoscales():
        nodes.append(Nodes("what the autoscaler adds", 1, _ANYTHING))
    return nodes


def _autoscales() -> bool:
    """Whether the cluster has an autoscaler that may add nodes.

    Ray's autoscaler v2 says that it is there; v1 says what types of nodes are up, which without a config of its own it
    makes from their ids.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    return any(not re.fullmatch("node_[0-9a-f]+", kind) for kind in report.get("active_nodes", ()))


def phases(config: RunConfig, *, trains: bool = True) -> list[list[Demand]]:
    """What a run holds at the same time: everything, or where it is `colocated`, pools and training in turn.

    Engines that sleep stay where they are.
    """
    sections: dict[str, PoolConfig | TrainerConfig] = {
        "engine": config.engine,
        "verifier": config.verifier,
        "trainer": config.trainer,
        "executor": config.executor,
    }
    engine, verifier, trainer, executor = (
        # A pool that may shrink to nothing still needs one worker to get anywhere.
        Demand(name, max(1, c.workers), {"CPU": c.cpus_per_worker, "GPU": c.gpus_per_worker})
        for name, c in sections.items()
    )
    coordinator = Demand("ray", 1, {"CPU": config.ray.coordinator_cpus})
    pools = [engine, coordinator, *([verifier] if config.verify else []), *([executor] if config.runs_programs else [])]
    if not trains:
        return [pools]
    if config.placement == "colocated":
        return [pools, [*([engine] if config.engine.sleep else []), trainer, coordinator]]
    return [[*pools, trainer]]


def check_fits(config: RunConfig, nodes: Sequence[Nodes], *, trains: bool = True) -> None:
    """Raises SapoError, naming keys and what is offered, for a demand that the nodes can never meet.

    What fits is never refused. What passes may yet not fit: how the workers of several sections share nodes is not
    looked at.
    """
    for wanted in phases(config, trains=trains):
        for demand in wanted:
            if not _held(demand, nodes):
                raise SapoError(f"no node has {_need(demand)}, which a worker needs on one node; {_offer(nodes)}")
        for kind in ("CPU", "GPU"):
            _check_total(wanted, nodes, kind)
        for demand in wanted:
            if (held := _held(demand, nodes)) < demand.workers:
                raise SapoError(
                    f"{demand.section}.workers is {demand.workers}, but no more than {held} can be up: each needs "
                    f"{_need(demand)} on one node; {_offer(nodes)}"
                )


def check_memory(config: RunConfig, tokenizer: PreTrainedTokenizerBase, nodes: Sequence[Nodes]) -> None:
    """Raises SapoError, naming keys and figures, for what no GPU of the nodes has the memory for.

    Where one of them is of a kind that is not known, such as on a node that is yet to come, nothing is refused.
    """
    if not any(section.gpus_per_worker for section in (config.engine, config.verifier, config.trainer)):
        return
    kinds = {kind for node in nodes if node.resources.get("GPU") for kind in _accelerators(node)}
    if not kinds or not kinds <= MOST_GIB.keys():
        return
    largest = max(kinds, key=MOST_GIB.__getitem__)
    refused = list(misfits(config, model_shape(config.model, tokenizer), MOST_GIB[largest] * GIB, largest))
    if refused:
        raise SapoError("; ".join(refused))


def _accelerators(node: Nodes) -> list[str]:
    """The types of a node's GPUs, by Ray's names; an empty one where Ray knows none."""
    return [kind.removeprefix(_ACCELERATOR) for kind in node.resources if kind.startswith(_ACCELERATOR)] or [""]


def _held(demand: Demand, nodes: Sequence[Nodes]) -> int:
    """How many of the workers the nodes could hold if these were all there is: a worker lives on one node."""
    amounts = [(kind, amount) for kind, amount in demand.resources.items() if amount]

    def on_one(node: Nodes) -> int:
        room = (node.resources.get(kind, 0.0) / amount + 1e-9 for kind, amount in amounts)
        return int(min([float(demand.workers), *room]))  # no more than there are: the room may be infinite

    return sum(node.count * on_one(node) for node in nodes)


def _check_total(wanted: Sequence[Demand], nodes: Sequence[Nodes], kind: str) -> None:
    """All that is up at the same time must fit, or the run would wait for ever."""
    available = sum(n.count * n.resources.get(kind, 0.0) for n in nodes)
    amounts = {_terms(d, kind): d.workers * d.resources.get(kind, 0.0) for d in wanted}
    needed = sum(amounts.values())
    if needed > available + 1e-9:
        terms = " + ".join(f"{amount:g} ({keys})" for keys, amount in amounts.items() if amount)
        raise SapoError(f"the run needs {needed:g} {kind}s = {terms}, but Ray offers {available:g}; lower these keys")


def _need(demand: Demand) -> str:
    return " and ".join(f"{_key(demand, kind)} = {amount:g}" for kind, amount in demand.resources.items() if amount)


def _offer(nodes: Sequence[Nodes]) -> str:
    kinds = (f"{n.name}{_limit(n.count)}: {_amount(n, 'CPU')}, {_amount(n, 'GPU')}" for n in nodes)
    return f"the cluster offers {'; '.join(kinds)}"


def _limit(count: int) -> str:
    if count == 1:
        return ""
    return " (any number of them)" if count == _UNLIMITED else f" (up to {count})"


def _amount(nodes: Nodes, kind: str) -> str:
    amount = nodes.resources.get(kind, 0.0)
    return f"any number of {kind}s" if amount == math.inf else f"{amount:g} {kind}"


def _terms(demand: Demand, kind: str) -> str:
    return _key(demand, kind) if demand.section == "ray" else f"{demand.section}.workers * {_key(demand, kind)}"


def _key(demand: Demand, kind: str) -> str:
    return "ray.coordinator_cpus" if demand.section == "ray" else f"{demand.section}.{kind.lower()}s_per_worker"
