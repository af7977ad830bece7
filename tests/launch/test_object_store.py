"""One full round on an object store, a real S3 server, in which the driver is killed on the way.

Its reasoner is null: vLLM would read a checkpoint through the same cache as the verifier does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from sapo_ray.audit import audit
from sapo_ray.cache import local_checkpoint
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.manifest import Manifest, check_files
from sapo_ray.store import RunDirectory, labelled_of, rollout_of
from tests.launch.runs import DRIVER, TINY, Running

NULL_REASONER = "engine.kind=null"

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def sapo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def begun(s3: str) -> RunDirectory:
    """The run as far as it came when its driver and Ray's daemons were killed."""
    run = Running(s3.format("runs/tiny"), NULL_REASONER, "simulation.token_seconds=0.05")
    run.wait_for_stage("round-0/sample")
    run.kill(DRIVER)
    run.end()
    return run.store


@pytest.fixture(scope="module")
def stored(begun: RunDirectory) -> RunDirectory:
    """The same run, gone on with to its end."""
    before = begun.stages()
    result = sapo("run", str(TINY), NULL_REASONER, f"run_dir={begun.location}", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == begun.summary()
    assert {name: begun.stages()[name] for name in before} == before  # what was done is not done again
    return begun


def test_the_run_is_whole_and_every_file_in_the_manifest(stored: RunDirectory) -> None:
    written = {name for files in Manifest(stored.folder).files().values() for name in files}
    for files in Manifest(stored.folder).files().values():
        check_files(stored.folder, files)
    present = {name for name in stored.folder.sizes() if not name.startswith(("train/", "tensorboard/"))}
    assert present - written == {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json"}
    assert [entry["round"] for entry in stored.summary()["rounds"]] == [0, 1]
    texts = [stored.folder.read(name) for name in present if name.endswith((".json", ".jsonl", ".yaml"))]
    assert not any(os.environ["AWS_SECRET_ACCESS_KEY"].encode() in text for text in texts)


def test_its_labels_follow_from_its_rollouts_and_its_checkpoints_load(stored: RunDirectory) -> None:
    labeling = load_config(RunConfig, stored.folder.locate("config.yaml")).labeling
    rows = [labelled_of(row) for row in stored.read(1, "labels")]
    assert rows
    assert list(audit(rows, map(rollout_of, stored.read(1, "rollouts")), labeling)) == []
    AutoModelForCausalLM.from_pretrained(local_checkpoint(stored.checkpoint("reasoner", 1)))
    AutoModelForTokenClassification.from_pretrained(local_checkpoint(stored.checkpoint("verifier", 1)))


def test_a_finished_run_is_not_done_again_and_can_be_shown(stored: RunDirectory) -> None:
    before = stored.folder.read("manifest.json"), stored.folder.sizes()
    result = sapo("run", str(TINY), NULL_REASONER, f"run_dir={stored.location}", "engine.batch_size=17")
    assert result.returncode == 0, result.stderr
    assert (stored.folder.read("manifest.json"), stored.folder.sizes()) == before
    shown = sapo("show", stored.location, "--json")
    assert json.loads(shown.stdout) == stored.summary()


@pytest.mark.slow
def test_other_commands_read_from_it(stored: RunDirectory) -> None:
    verifier, labels = stored.checkpoint("verifier", 1), stored.dataset(1, "labels")
    result = sapo("evaluate", str(TINY), "--verifier", verifier, "--labels", labels, "--json")
    assert result.returncode == 0, result.stderr
    assert 0 <= json.loads(result.stdout)["verifier"]["brier"] <= 1


def test_a_damaged_shard_stops_it(stored: RunDirectory) -> None:
    name = "round-0/labels/part-00000.parquet"
    good = stored.folder.read(name)
    stored.folder.write(name, good[:-1])
    result = sapo("run", str(TINY), NULL_REASONER, f"run_dir={stored.location}")
    stored.folder.write(name, good)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]  # Ray may have said something before
    assert last.startswith(f"error: {stored.folder.locate(name)} is damaged: {len(good)} bytes were written, ")
    assert last.endswith("sapo run … --redo round-0/sample")
