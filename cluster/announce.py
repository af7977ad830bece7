"""Says in a Ray cluster, on its head, which nodes may come: Ray's autoscalers keep it to themselves.

A run that none of these nodes could hold is then refused (`launch/resources.py`); else it would wait for ever. Ray
Train reads it, too, and fails a training that needs more than all of it, so the head is said to be one of them. Ray's
autoscalers do not read it.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE, GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from ray.exceptions import RayError

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where Kubernetes tells a pod its namespace."""


def ray_cluster() -> dict[str, Any]:
    """What Ray's autoscaler makes, in the form of a `ray up` file, from the RayCluster that this head pod belongs to.

    Raises OSError where Kubernetes does not give it out, ValueError where a group says nothing about its CPUs.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    namespace = NAMESPACE.read_text()
    return AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], namespace)()


def node_groups(config: dict[str, Any]) -> list[NodeGroupConfig]:
    """The node types of a `ray up` file with its defaults filled in; a type of unknown size has no resources."""
    return [
        NodeGroupConfig(
            name=name,
            min_count=kind["min_workers"] + (name == config["head_node_type"]),
            max_count=min(kind["max_workers"], config["max_workers"]) + (name == config["head_node_type"]),
            resources={key: math.ceil(amount) for key, amount in kind.get("resources", {}).items()},
        )
        for name, kind in config["available_node_types"].items()
    ]


def announce(groups: list[NodeGroupConfig], address: str, wait: float) -> None:
    """Write the groups to the GCS at host:port, in place of what was there; for `wait` seconds it may be away.

    Raises OSError when it is away for longer, RayError when it refuses.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    GcsClient(address).internal_kv_put(
        GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(),
        ClusterConfig(node_group_configs=groups).SerializeToString(),
        True,
        GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
    )


def main() -> None:
    """Announce the nodes, or say in one line why not, with exit status 1."""
    parser = argparse.ArgumentParser(description="Say in a Ray cluster, on its head, which nodes may come.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ray-up", type=Path, metavar="FILE", help="those of the file that `ray up` puts on the head")
    source.add_argument("--kuberay", action="store_true", help="those of the RayCluster that this head pod belongs to")
    parser.add_argument("--address", default="127.0.0.1:6379", help="the GCS (default: %(default)s)")
    parser.add_argument(
        "--wait", type=float, default=120.0, help="seconds for which the GCS may be away (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        config = ray_cluster() if options.kuberay else yaml.safe_load(options.ray_up.read_text())
        groups = node_groups(config)
        announce(groups, options.address, options.wait)
    except (OSError, ValueError, LookupError, yaml.YAMLError, RayError) as error:
        sys.exit(f"which nodes may come is not announced, so no run is refused for its size: {error}")
    print("announced:", "; ".join(f"{g.name}: {g.max_count} of {dict(g.resources) or 'unknown size'}" for g in groups))


if __name__ == "__main__":
    main()
