"""What is announced of a cluster's nodes is what its file says, and where nothing can be, one line says so."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.state import GlobalState
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler._private.util import prepare_config
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from cluster import announce

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "announce.py"


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / "cluster" / path).read_text())


def announced(config: dict[str, Any]) -> dict[str, tuple[int, int, dict[str, int]]]:
    """Of each group: how many nodes there always are, at most are, and what each has but for its memory."""
    return {
        group.name: (
            group.min_count,
            group.max_count,
            {kind: amount for kind, amount in group.resources.items() if kind != "memory"},
        )
        for group in announce.node_groups(config)
    }


def of_ray_up(name: str) -> dict[str, Any]:
    """What `ray up` makes of a file and puts on the head, as JSON."""
    return json.loads(json.dumps(prepare_config(read(f"ray-up/{name}.yaml"))))


@pytest.fixture
def of_kuberay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What Kubernetes hands out to the head of cluster/kuberay/ray-cluster.yaml, as Ray's autoscaler reads it."""
    made = read("kuberay/ray-cluster.yaml")
    made["metadata"]["namespace"] = "mine"
    (tmp_path / "namespace").write_text("mine")
    monkeypatch.setattr(announce, "NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "sapo")
    monkeypatch.setattr(KubernetesHttpApiClient, "get", lambda self, path: {"rayclusters/sapo": made}[path])
    return announce.ray_cluster()


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_node_types_of_a_ray_up_file_and_its_head_are_announced(name: str) -> None:
    types = read(f"ray-up/{name}.yaml")["available_node_types"]
    assert announced(of_ray_up(name)) == {
        "head": (1, 1, types["head"]["resources"]),
        "gpu": (0, types["gpu"]["max_workers"], types["gpu"]["resources"]),
    }


def test_no_more_nodes_are_announced_than_the_whole_cluster_may_have() -> None:
    config = of_ray_up("aws")
    config["available_node_types"]["gpu"]["max_workers"] = 100
    assert announced(config)["gpu"][1] == config["max_workers"] == 2


def test_machines_of_ones_own_are_announced_with_the_head_as_one_of_them_and_of_unknown_size() -> None:
    machines = 1 + len(read("ray-up/on-premise.yaml")["provider"]["worker_ips"])
    assert announced(of_ray_up("on-premise")) == {"local.cluster.node": (machines, machines, {})}


def test_the_worker_groups_of_a_ray_cluster_and_its_head_are_announced(of_kuberay: dict[str, Any]) -> None:
    spec = read("kuberay/ray-cluster.yaml")["spec"]
    params = spec["headGroupSpec"]["rayStartParams"]
    groups = {"headgroup": (1, 1, {"CPU": int(params["num-cpus"]), "GPU": int(params["num-gpus"])})}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])}
        groups[group["groupName"]] = (group["minReplicas"], group["maxReplicas"], resources)
    assert announced(of_kuberay) == groups


def test_ray_train_counts_the_head_and_all_pods_that_may_come(of_kuberay: dict[str, Any]) -> None:
    """Two CPUs of the head and 64 of each of four pods: Ray Train fails no training that needs all of them."""
    config = ClusterConfig(node_group_configs=announce.node_groups(of_kuberay))
    assert GlobalState._calculate_max_resource_from_cluster_config(config, "CPU") == 2 + 4 * 64
    assert GlobalState._calculate_max_resource_from_cluster_config(config, "GPU") == 4 * 8


def test_a_gcs_that_does_not_come_up_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(json.dumps(of_ray_up("aws")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, str(SCRIPT), "--ray-up", "cluster.yaml", "--address", address, "--wait", "0"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"which nodes may come is not announced, .*refused\n", done.stderr)


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premise"])
def test_ray_up_announces_when_ray_has_started_and_goes_on_without(name: str) -> None:
    *_, start, last = read(f"ray-up/{name}.yaml")["head_start_ray_commands"]
    environment, python, script, *options = shlex.split(last)
    assert "ray start --head" in start
    assert (environment, Path(python).name, Path(script).name) == ("RAY_AUTH_MODE=token", "python", SCRIPT.name)
    assert options == ["--ray-up", "~/ray_bootstrap_config.yaml", "||", "true"]


def test_a_head_pod_announces_beside_ray(tmp_path: Path) -> None:
    """KubeRay joins `args` and its own command by &&, unless they start Ray themselves."""
    (container,) = read("kuberay/ray-cluster.yaml")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (args,) = container["args"]
    assert "ray start" not in args
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 0.1\necho $* > announced\nexit 1\n")
    python.chmod(0o755)
    command = f"PATH=.:$PATH;  {args}  && ulimit -n 64; echo started; while [ ! -s announced ]; do sleep 0.1; done"
    done = subprocess.run(["bash", "-c", "--", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "started\n"
    script, *options = (tmp_path / "announced").read_text().split()
    assert (ROOT / Path(script).relative_to("/opt/sapo"), options) == (SCRIPT, ["--kuberay"])
