"""The KubeRay files against the fields of its custom resources, and what makes them survive spot nodes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())


def manifest(name: str) -> Any:
    return yaml.safe_load((ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text())


@pytest.fixture
def cluster() -> Any:
    return manifest("ray-cluster")["spec"]


@pytest.mark.parametrize("name", ["ray-cluster", "ray-job", "storage"])
def test_every_field_is_one_of_the_resource(name: str) -> None:
    jsonschema.validate(manifest(name), SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("headGroupSpec", "template", "spec", "restartPolicie"), "Never"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 2),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "images"), "sapo:gpu"),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"), "256 GB"),
        (("autoscalerOptions", "version"), "v3"),
    ],
)
def test_the_schema_refuses_a_mistake(path: tuple[str | int, ...], value: object) -> None:
    wrong = manifest("ray-cluster")
    at = wrong["spec"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_the_job_starts_the_same_cluster(cluster: Any) -> None:
    assert manifest("ray-job")["spec"]["rayClusterSpec"] == cluster


def test_ray_is_the_locked_one(cluster: Any) -> None:
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert cluster["rayVersion"] == locked[1]


def test_pods_come_from_nothing_and_may_be_taken_away(cluster: Any) -> None:
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    pod = group["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert any("spot" in toleration["key"] for toleration in pod["tolerations"])
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


def test_a_stopped_run_gets_the_time_to_write(cluster: Any) -> None:
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    (stop_wait,) = [int(entry["value"]) for entry in container["env"] if entry["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert 30 < stop_wait < pod["terminationGracePeriodSeconds"]


def test_the_head_offers_no_gpu(cluster: Any) -> None:
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_no_pod_runs_as_root_or_holds_a_secret(cluster: Any) -> None:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "sapo-ray-token"}


def test_all_pods_see_the_run_directory_of_the_job(cluster: Any) -> None:
    command, action, config, *overrides = shlex.split(manifest("ray-job")["spec"]["entrypoint"])
    assert (command, action) == ("sapo", "run")
    run_dir = load_config(RunConfig, ROOT / Path(config).relative_to("/opt/sapo"), overrides).run_dir
    claim = manifest("storage")["metadata"]["name"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: claims[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts[str(Path(run_dir or "").parent)] == claim
