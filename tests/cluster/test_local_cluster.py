"""The one-machine cluster: real nodes come and go, jobs run on it, and it leaves everything else alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util.metrics import Counter, Gauge

from actors.telemetry import METRICS
from cluster.local.autoscaling import LocalCluster, processes_of
from sapo_ray.store import RunDirectory
from tests.launch.runs import NULL, TINY, Running, assert_nothing_is_lost, rows

RAY = str(Path(sys.executable).with_name("ray"))
NODES = """
import json, time, ray
ray.init()

def nodes():
    return int(ray.cluster_resources().get("rollout_node", 0))

@ray.remote(num_cpus=1, resources={"rollout_node": 1})
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()

before = nodes()
workers = [Worker.remote() for _ in range(2)]
apart = len(set(ray.get([worker.node.remote() for worker in workers])))
during = nodes()
addresses = sorted({node["NodeManagerAddress"] for node in ray.nodes()})
del workers
while nodes():
    time.sleep(0.5)
print(json.dumps({"before": before, "during": during, "apart": apart, "addresses": addresses}))
"""
UNTIL = """
import sys, time, ray
ray.init()
while ray.cluster_resources().get("rollout_node", 0) != int(sys.argv[1]):
    time.sleep(0.2)
"""
"""Returns once there are so many rollout nodes."""
EXPORT = """
import sys, time, urllib.request, ray
from ray.util.metrics import Counter, Gauge
ray.init()
counters, gauges = sys.argv[1].split(","), sys.argv[2].split(",")
made = [Counter(name) for name in counters], [Gauge(name) for name in gauges]
for counter in made[0]:
    counter.inc(1)
for gauge in made[1]:
    gauge.set(1)
(head,) = [node for node in ray.nodes() if node["Alive"]]
text = ""
while not all(name in text for name in counters + gauges):
    time.sleep(1)
    address = f"http://127.0.0.1:{head['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(address).read().decode()
print(text)
"""

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(idle_timeout=3) as cluster:
        yield cluster


def client(cluster: LocalCluster, *command: str) -> str:
    """What a command prints that uses the cluster as a user's does."""
    environment = os.environ | cluster.variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nodes_come_with_the_work_and_go_after_it(cluster: LocalCluster) -> None:
    seen = json.loads(client(cluster, sys.executable, "-c", NODES).splitlines()[-1])
    assert seen == {"before": 0, "during": 2, "apart": 2, "addresses": ["127.0.0.1"]}


def test_a_job_runs_on_it(cluster: LocalCluster) -> None:
    assert "6 x 7 = 42" in client(cluster, RAY, "job", "submit", "--", "echo", "6 x 7 = 42")


def test_a_submitted_run_grows_from_no_node_to_two_goes_back_and_is_the_one_of_local_mode(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """The head has no room for an engine, a node for one; each works on two requests at once, so that many wait."""
    growing = ["engine.cpus_per_worker=2", "engine.workers=0", "engine.max_workers=2", "engine.max_num_seqs=2"]
    scaling = ["scaling.grow_after=1", "scaling.shrink_after=5", f"run_dir={tmp_path / 'submitted'}"]
    command = [sys.executable, "-m", "launch", "run", str(TINY), *NULL, *growing, *scaling]
    until = (sys.executable, "-c", UNTIL)
    client(cluster, *until, "0")
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen(
            [RAY, "job", "submit", "--working-dir", str(TINY.parents[2]), "--", *command],
            env=os.environ | cluster.variables,
            stdout=log,
            stderr=log,
        )
        client(cluster, *until, "2")
        assert job.wait(800) == 0, (tmp_path / "job.log").read_text()
    client(cluster, *until, "0")
    local = Running(tmp_path / "local", *NULL)
    assert local.end() == 0, "".join(local.lines)
    submitted = RunDirectory(tmp_path / "submitted")
    assert_nothing_is_lost(submitted, local.store)
    assert rows(submitted) == rows(local.store)


def test_a_run_that_no_node_of_it_could_ever_hold_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "run", str(TINY), f"run_dir={tmp_path / 'run'}", *NULL]
    refused = subprocess.run(
        [*command, "engine.cpus_per_worker=3"],
        env=os.environ | cluster.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "no node has engine.cpus_per_worker = 3" in refused.stderr
    assert "offers node type ray.head.default: 2 CPU, 0 GPU; node type rollout (up to 2): 2 CPU" in refused.stderr


def test_ray_names_metrics_as_the_dashboard_does(cluster: LocalCluster) -> None:
    counters, gauges = ([name for name, m in METRICS.items() if m.kind is kind] for kind in (Counter, Gauge))
    text = client(cluster, sys.executable, "-c", EXPORT, ",".join(counters), ",".join(gauges))
    exported = set(re.findall(r"^(ray_sapo_\w+)[{ ]", text, re.MULTILINE))
    wanted = {f"ray_{name}_total" for name in counters} | {f"ray_{name}" for name in gauges}
    assert exported >= wanted


def test_another_one_ends_alone_and_keeps_its_logs_if_it_fails(cluster: LocalCluster) -> None:
    other = LocalCluster(max_nodes=1)

    def fail() -> None:
        with other:
            assert list(processes_of(str(other.directory)))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert not list(processes_of(str(other.directory)))
    assert (other.directory / "head.log").exists()
    shutil.rmtree(other.directory)
    alive = "import ray; ray.init(); print(sum(node['Alive'] for node in ray.nodes()))"
    assert client(cluster, sys.executable, "-c", alive) == "1\n"
