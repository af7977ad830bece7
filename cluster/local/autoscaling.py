"""A Ray cluster on one machine that grows and shrinks as one in the cloud does: for tests and for trying things out.

A head that is always there, and 0 to N rollout nodes that Ray's autoscaler (v2) adds when work waits for what they
offer, and removes when they idle. A node is a raylet of its own with its own workers; all share this machine's CPUs.
Everything listens on 127.0.0.1. Several such clusters, and other Rays, can run side by side.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import psutil
import yaml

ANNOUNCE = Path(__file__).parents[1] / "announce.py"
LOOPBACK = "127.0.0.1"
HEAD_TYPE = "ray.head.default"
HEAD_ID = "f" * 51 + "00000"
"""The id that Ray's fake node provider expects its head to have."""
MARK = "SAPO_LOCAL_CLUSTER"
"""The environment variable by which a cluster's processes are known."""
OBJECT_STORE = 200 * 2**20
"""Bytes of shared memory of each node; Ray would promise a third of the machine's memory to every one."""
GRACE = 3
"""Seconds from SIGTERM to SIGKILL."""


class LocalCluster:
    """A context manager: the cluster is up inside it, and its processes are gone behind it.

    `rollout_node: 1` is a resource of rollout nodes only, so work that asks for it waits until there is one. Where the
    block raises, the cluster's directory with its logs stays; otherwise it is removed.
    """

    def __init__(
        self, *, max_nodes: int = 2, head_cpus: int = 2, node_cpus: int = 2, idle_timeout: float = 10.0
    ) -> None:
        """`idle_timeout`: seconds without work after which a node goes. Raises RuntimeError if Ray does not start."""
        self._max_nodes, self._head_cpus, self._node_cpus = max_nodes, head_cpus, node_cpus
        self._idle_timeout = idle_timeout

    def __enter__(self) -> LocalCluster:
        self.directory = Path(tempfile.mkdtemp(prefix="sapo-", dir="/tmp"))  # Ray's sockets need a short path
        self._port, self._dashboard, self._client, *self._metrics = _free_ports(5)
        self.address = f"{LOOPBACK}:{self._port}"
        self.variables = {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{self._dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.directory / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes Ray use the loopback address, not the machine's own
        }
        """What a process needs in its environment to use the cluster and to submit jobs to it."""
        # It ends the cluster when this process closes the pipe, or dies by whatever signal.
        janitor = [sys.executable, __file__, "--clean-up", str(self.directory)]
        self._janitor = subprocess.Popen(janitor, stdin=subprocess.PIPE, start_new_session=True)
        with ExitStack() as undo:
            undo.callback(self._stop)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        if kind is None or issubclass(kind, KeyboardInterrupt):
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        token = self.directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        config = self.directory / "autoscaling.yaml"
        config.write_text(yaml.safe_dump(self._autoscaling()))
        options = {
            "port": self._port,
            "dashboard-host": LOOPBACK,
            "dashboard-port": self._dashboard,
            "ray-client-server-port": self._client,
            "dashboard-agent-listen-port": 0,
            "node-ip-address": LOOPBACK,
            "num-cpus": self._head_cpus,
            "object-store-memory": OBJECT_STORE,
            "temp-dir": self.directory / "ray",
            "autoscaling-config": config,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--include-dashboard=true"]
        command += ["--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
        log = self.directory / "head.log"
        with log.open("wb") as output:
            # In a session of its own, so that Ctrl-C reaches this process alone.
            started = subprocess.run(
                command, env=self._environment(), stdout=output, stderr=output, start_new_session=True, check=False
            )
        if started.returncode:
            raise RuntimeError(f"Ray did not start (exit status {started.returncode}); see {log}")
        announce = [sys.executable, str(ANNOUNCE), "--ray-up", str(config), "--address", self.address]
        subprocess.run(announce, env=self._environment(), stdout=subprocess.DEVNULL, check=True)

    def _autoscaling(self) -> dict[str, object]:
        """What Ray's autoscaler is to know, in the form of a `ray up` file."""
        rollout = {"CPU": self._node_cpus, "rollout_node": 1, "object_store_memory": OBJECT_STORE}
        unused = ("setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files")
        return {
            **{key: [] for key in unused},  # which Ray reads all the same
            "cluster_name": "local",
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
            },
            "auth": {"ssh_user": "nobody"},  # the schema wants one; nothing is reached over SSH
            "max_workers": self._max_nodes,
            "head_node_type": HEAD_TYPE,
            "available_node_types": {
                HEAD_TYPE: {
                    "resources": {"CPU": self._head_cpus},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": 0,
                },
                "rollout": {
                    "resources": rollout,
                    "labels": {"ray.io/node-group": "rollout"},  # as Ray's own node providers have it
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self._max_nodes,
                    "idle_timeout_s": self._idle_timeout,
                },
            },
        }

    def _environment(self) -> dict[str, str]:
        elsewhere = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
        inherited = {name: value for name, value in os.environ.items() if name not in elsewhere}
        return inherited | {
            MARK: str(self.directory),
            "SPT_NOENV": "1",  # workers' titles would otherwise overwrite the mark
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            **{name: value for name, value in self.variables.items() if name not in elsewhere},
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # a busy machine needs longer than Ray's 60 s
            "RAY_JOB_STOP_WAIT_TIME_S": "45",  # a stopped run writes what it has; Ray's 3 s would cut that off
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(self._metrics[0]),
            "DASHBOARD_METRIC_PORT": str(self._metrics[1]),
        }

    def _stop(self) -> None:
        self._janitor.communicate()  # closes what it reads from


def clean_up(directory: str) -> None:
    """End all processes of the cluster that has this directory."""
    while processes := list(processes_of(directory)):  # some may start others while they are ended
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=GRACE)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def processes_of(directory: str) -> Iterator[psutil.Process]:
    """The processes of the cluster that has this directory."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it is gone, or another user's
            if process.environ().get(MARK) == directory:
                yield process


def _free_ports(count: int) -> list[int]:
    """Different ports of the loopback address on which nothing listens now."""
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in bound]


def main() -> None:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A one-machine autoscaling Ray cluster, until Ctrl-C.")
    parser.add_argument("--max-nodes", type=int, default=2, help="most rollout nodes (default: %(default)s)")
    parser.add_argument("--head-cpus", type=int, default=2, help="CPUs that the head offers (default: %(default)s)")
    parser.add_argument("--node-cpus", type=int, default=2, help="CPUs of a rollout node (default: %(default)s)")
    parser.add_argument(
        "--idle-timeout", type=float, default=10.0, help="seconds after which an idle node goes (default: %(default)s)"
    )
    parser.add_argument("--clean-up", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if directory := options.pop("clean_up"):
        sys.stdin.read()  # until its end
        clean_up(directory)
        return
    with suppress(KeyboardInterrupt), LocalCluster(**options) as cluster:
        print("The cluster is up. In another terminal:\n")
        print("export", shlex.join(f"{name}={value}" for name, value in cluster.variables.items()), "\n", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
