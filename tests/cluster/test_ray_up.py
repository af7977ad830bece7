"""The files for `ray up`, by Ray's own validation, and what they start and copy."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).parents[2] / "cluster" / "ray-up"
CLOUDS = ("aws", "gcp")
ALL = (*CLOUDS, "on-premise")
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
S3 = ("ListBucket", "GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")


def config(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ALL)
def test_ray_accepts_it(name: str) -> None:
    validate_config(prepare_config(config(name)))


@pytest.mark.parametrize("name", ALL)
def test_ray_would_name_a_mistake(name: str) -> None:
    wrong = prepare_config(config(name)) | {"worker_setup_comands": []}
    with pytest.raises(jsonschema.ValidationError, match="worker_setup_comands"):
        validate_config(wrong)


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_nodes_come_from_nothing_and_the_head_has_none(name: str) -> None:
    types = prepare_config(config(name))["available_node_types"]
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"]
    assert types["gpu"]["resources"]["GPU"] > 0 == types["head"]["resources"]["GPU"]
    assert "spot" in str(types["gpu"]["node_config"]).lower()


def test_all_machines_of_ones_own_join() -> None:
    prepared = prepare_config(config("on-premise"))
    (node,) = prepared["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(prepared["provider"]["worker_ips"])


@pytest.mark.parametrize("name", ALL)
def test_nothing_secret_is_copied_to_the_nodes_or_written_down(name: str) -> None:
    made = config(name)
    (source,) = made["file_mounts"].values()
    assert (source, made["rsync_exclude"], made["rsync_filter"]) == (".", [".git"], [".gitignore"])
    assert "RAY_AUTH_TOKEN" not in (FOLDER / f"{name}.yaml").read_text()
    for start in (made["head_start_ray_commands"], made["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in start[-1]


def test_the_page_makes_whom_the_gpu_nodes_of_a_cloud_are() -> None:
    page = (FOLDER.parents[1] / "docs" / "aws-gcp.md").read_text(encoding="utf-8")
    aws, gcp = (config(name)["available_node_types"]["gpu"]["node_config"] for name in CLOUDS)
    assert f"create-instance-profile --instance-profile-name {aws['IamInstanceProfile']['Name']}\n" in page
    assert f"--member serviceAccount:{gcp['serviceAccounts'][0]['email']}\n" in page
    policies = [json.loads(policy) for policy in re.findall(r"-policy-document '([^']+)'", page)]
    actions = [statement["Action"] for policy in policies for statement in policy["Statement"]]
    assert actions == ["sts:AssumeRole", [f"s3:{do}" for do in S3], "iam:PassRole"]


@pytest.mark.parametrize("name", ALL)
def test_commands_are_shell_and_name_no_package_index(name: str) -> None:
    for command in (command for key in COMMANDS for command in config(name)[key]):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert not re.search(r"://|index-url", command)
