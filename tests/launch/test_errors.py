"""A user's likely mistakes: one line that says what is wrong, exit status 2, nothing written and nothing started."""

from __future__ import annotations

import importlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import pytest
import ray
from click.testing import CliRunner
from transformers import AutoModelForTokenClassification

from launch.cli import Benchmark, cli
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.data import LabelledTrajectory, Trajectory
from sapo_ray.lease import LEASE
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.sampler import original_trajectory
from sapo_ray.store import RunDirectory, label_row, trajectory_row
from sapo_ray.tasks.chain import VOCABULARY, Chain, ChainConfig

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and data sets that are sound, broken or of the wrong kind."""
    folder = tmp_path_factory.mktemp("files")
    save_random_reasoner(
        ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32), VOCABULARY, 0, folder / "reasoner"
    )
    verifier = AutoModelForTokenClassification.from_pretrained(folder / "reasoner", num_labels=1)
    verifier.save_pretrained(folder / "verifier")
    (folder / "weightless").mkdir()
    (folder / "weightless" / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    (folder / "text.parquet").write_text("no Parquet")
    data = RunDirectory(folder)
    with closing(data.writer(0, "trajectories")) as writer:
        questions = Chain(ChainConfig(modulus=7, max_operand=6, worked=3)).questions("worked")
        writer.extend(trajectory_row(original_trajectory(q)) for q in questions)
    with closing(data.writer(2, "trajectories")) as writer:
        question = Chain(load_config(RunConfig, TINY).task).questions("pool")[0]
        writer.extend([trajectory_row(Trajectory("empty", question.id, question.text, (), None, correct=False))])
    with closing(data.writer(2, "labels")) as writer:
        one = Trajectory("one", question.id, question.text, ("1+1=2\n",), "2", correct=False)
        writer.extend([label_row(LabelledTrajectory(one, "saps", (1, 0)))])
    with closing(data.writer(3, "trajectories")) as writer:
        writer.extend([trajectory_row(replace(one, answer=None, truncated=True))])
    with closing(data.writer(4, "trajectories")) as writer:
        writer.extend([trajectory_row(one), trajectory_row(replace(one, steps=("1+1=3\n",)))])
    with closing(data.writer(5, "trajectories")) as writer:
        writer.extend([trajectory_row(replace(one, source="expanded"))])
    data.writer(1, "trajectories").close()
    data.writer(1, "labels").close()
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("rounds: many\n")
    (broken / "summary.json").write_text("{")
    (folder / "odd").mkdir()
    (folder / "odd" / "summary.json").write_text("{}")
    begun = {"begun": "rounds: 1\n", "tiny": f"extends: {TINY}\n", "driven": f"extends: {TINY}\n"}
    for name, config in begun.items():
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(config)
    lease = {"driver": "other", "host": "far", "pid": 7, "place": "another boot", "started": 1, "since": 0.0}
    (folder / "driven" / LEASE).write_text(json.dumps({**lease, "renewed": time.time(), "seconds": 3600.0}))
    return folder


def mistake(*arguments: str, folder: Path) -> str:
    """The one line with which the command refuses `arguments`."""
    before = _tree(folder)
    result = CliRunner().invoke(cli, [argument.replace("FILES", str(folder)) for argument in arguments])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert _tree(folder) == before
    assert not ray.is_initialized()
    return result.stderr.removeprefix("error: ").removesuffix("\n").replace(str(folder), "FILES")


def _tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft.epcohs=3"], "command line: sft.epcohs is not a key; did you mean sft.epochs?"),
        (["rounds=two"], "command line: rounds is 'two'; it must be int"),
        (["engine.dtype=float99"], "command line: engine.dtype is 'float99'; it must be one of float32, bfloat16, "),
        (
            ["engine.tensor_parallel_size=4", "engine.gpus_per_worker=2"],
            "command line: engine.tensor_parallel_size is 4; a worker has 2 GPUs (gpus_per_worker), ",
        ),
        (["engine.sleep=true"], "command line: engine.sleep is true and gpus_per_worker 0; it must lie above 0.5, "),
        (["engine.extra.trust_remote_code=true"], "command line: engine.extra names trust_remote_code; no code that "),
        (["model.attention=hub/kernel"], "command line: model.attention is 'hub/kernel'; it must be one of eager, "),
        (["scaling.max_kills=1"], "command line: scaling.max_kills is 1; it must be at least 2: "),
        (["engine.workers=0"], "command line: engine.workers is 0 and max_workers None; that allows for no worker"),
        (["engine.max_num_batched_tokens=63"], "command line: engine.max_num_batched_tokens is 63; on a CPU it must "),
        (["trainer.max_failures=-1"], "command line: trainer.max_failures is -1; it must not be negative"),
        (["ray.num_cpus=0"], "command line: ray.num_cpus is 0; it must be at least 1, or null"),
        (["align.beta=-1"], "command line: align.beta is -1.0; it must not be negative"),
        (["task.pool=0"], "command line: task.pool is 0; there would be nothing to learn from"),
        (["verify=false", "pairs.require_outcome=false"], "command line: pairs.require_outcome is false; without "),
        (
            ["task.kind=math", "task.train_data.path=FILES/q.jsonl", "task.test=1"],
            "model.path is null; a task without an alphabet of its own needs a model: name a checkpoint",
        ),
        (
            ["task.kind=math", "task.train_data.path=FILES/q.jsonl", "task.test=1", "engine.kind=null"],
            "command line: engine.kind is null; workers without a model solve the task chain alone",
        ),
        (["task.kind=math"], "command line: task.train_data.path is null and train_data.hub, too; name the data in "),
        (
            ["task.kind=custom", "task.name=none"],
            "task.name is none, but the entry points of the group sapo_ray.tasks ",
        ),
        (
            ["model.path=FILES/absent"],
            "model.path FILES/absent is no checkpoint directory: config.json is missing; `sapo model import` makes one",
        ),
        (["task.pol=1"], "command line: task.pol is not a key; did you mean task.pool?"),
        (["task.worked=100000000"], "task.worked is 100000000, but only "),
        (
            ["engine.max_model_len=40"],
            "engine.max_model_len is 40; it must be at least 41: 12 of the longest question, ",
        ),
        (["engine.max_model_len=65"], "engine.max_model_len is 65; it must be at most model.max_length = 64"),
        (["sampling.max_tokens=52"], "engine.max_model_len is 64; it must be at least 65: "),
        (["sft.max_tokens=20"], "sft.max_tokens is 20; it must be at least 27, the length of the longest worked "),
        (["prm.max_tokens=30"], "prm.max_tokens is 30; it must be at least 37: 8 of the longest question, "),
        (["align.max_tokens=30"], "align.max_tokens is 30; it must be at least 37: 8 of the longest question, "),
        (["run_dir=/proc/x"], "run_dir /proc/x cannot be written: "),
        (["run_dir=FILES/text.parquet"], "run_dir FILES/text.parquet cannot be written: Not a directory"),
        (["run_dir=FILES/broken"], "FILES/broken/config.yaml: rounds is 'many'; it must be int"),
        (["run_dir=FILES/begun"], "FILES/begun was begun with other values of "),
        (
            ["run_dir=FILES/tiny", "engine.dtype=bfloat16", "engine.workers=2"],
            "FILES/tiny was begun with other values of engine.dtype; choose another run_dir",
        ),
        (["run_dir=FILES/tiny", "engine.workers=2", "ray.num_cpus=2"], "the run needs 2.7 CPUs = 1.4 (engine.workers"),
        (
            ["run_dir=FILES/tiny", "--redo", "round-0/sft"],
            "FILES/tiny: round-0/sft is no finished stage; finished are none",
        ),
        (
            ["run_dir=FILES/driven"],
            "FILES/driven has a driver already: host far, pid 7, since 1970-01-01 00:00:00 UTC; ",
        ),
        (["run_dir=s3://KEY:SECRET@bucket/run"], "run_dir: this s3:// URI holds credentials; leave them out and "),
        (["run_dir=s4://bucket/run"], "run_dir: s4://bucket/run cannot be opened: Unrecognized filesystem type in URI"),
        (["ray.num_cpus=1"], "the run needs 2 CPUs = 0.7 (engine.workers * engine.cpus_per_worker) + "),
        (["engine.workers=40"], "the run needs 29.3 CPUs = 28 (engine.workers * engine.cpus_per_worker) + "),
        (["rounds"], "command line: 'rounds' is not of the form key=value, such as "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_be(files: Path, overrides: Sequence[str], message: str) -> None:
    assert mistake("run", TINY, "run_dir=FILES/new", *overrides, folder=files).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "FILES/no.yaml"], "FILES/no.yaml: no such file"),
        (["rnu", TINY], "No such command 'rnu'."),
        (["run"], "Missing argument 'CONFIG'."),
        (["run", TINY, "--jsn"], "No such option"),
        (["show", "FILES/no"], "Invalid value for 'RUN': Directory 'FILES/no' does not exist."),
        (["show", "FILES/verifier"], "FILES/verifier has no summary.json: it is no run directory"),
        (["show", "FILES/begun"], "FILES/begun has no summary.json: no round of it has ended yet"),
        (["show", "FILES/broken"], "FILES/broken/summary.json cannot be read: Expecting property name"),
        (["show", "FILES/odd"], "FILES/odd/summary.json is no summary of a run: it has no rounds"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_is_not_there(files: Path, arguments: Sequence[str], message: str) -> None:
    assert mistake(*arguments, folder=files).startswith(message)


TRAJECTORIES = "FILES/round-0/trajectories"
REASONER, VERIFIER = ["--reasoner", "FILES/reasoner"], ["--verifier", "FILES/verifier"]
OMEGA = [*REASONER, "labeling.labeler=omega"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TRAJECTORIES], "Missing option '--reasoner'."),
        (
            [TRAJECTORIES, "--reasoner", "FILES/no"],
            "Invalid value for '--reasoner': FILES/no is no checkpoint directory",
        ),
        ([TRAJECTORIES, "--reasoner", "FILES"], "Invalid value for '--reasoner': FILES is no checkpoint directory"),
        (
            [TRAJECTORIES, "--reasoner", "FILES/weightless"],
            "Invalid value for '--reasoner': FILES/weightless holds no ",
        ),
        ([TRAJECTORIES, "--reasoner", "FILES/verifier"], "Invalid value for '--reasoner': FILES/verifier holds Qwen2F"),
        ([TRAJECTORIES, *REASONER], "labeling.labeler is saps: name a --verifier, or another labeler"),
        ([TRAJECTORIES, *REASONER, *VERIFIER], "FILES/verifier has no calibration.json: set labeling.start_score"),
        (
            [TRAJECTORIES, *OMEGA, "--out", "FILES/verifier"],
            "--out FILES/verifier exists already; name a new directory",
        ),
        ([TRAJECTORIES, *OMEGA, "--out", "/proc/x"], "--out /proc/x cannot be written: "),
        (
            [TRAJECTORIES, *OMEGA, "engine.max_model_len=30"],
            "engine.max_model_len is 30; it must be at least 41: 12 of ",
        ),
        (
            [TRAJECTORIES, *OMEGA],
            "FILES/round-0/trajectories, record 0: question 'worked-0' is not one of the config's",
        ),
        (
            ["FILES/round-2/trajectories", *OMEGA],
            "FILES/round-2/trajectories, record 0: trajectory 'empty' has no steps to label",
        ),
        (
            ["FILES/round-3/trajectories", *OMEGA],
            "FILES/round-3/trajectories: labeling.truncated, fraction and right_fraction leave none of 1 rows",
        ),
        (
            ["FILES/round-4/trajectories", *OMEGA],
            "FILES/round-4/trajectories, record 1: trajectory 'one' comes a second time; labels and rollouts go by ids",
        ),
        (
            ["FILES/round-5/trajectories", *OMEGA],
            "FILES/round-5/trajectories, record 0: trajectory 'one' is expanded from a check's rollout",
        ),
        (["FILES/round-1/trajectories", *OMEGA], "FILES/round-1/trajectories holds no trajectory"),
        (["FILES/verifier", *OMEGA], "FILES/verifier holds no trajectory"),
        (["FILES/text.parquet", *OMEGA], "FILES/text.parquet cannot be read: "),
        (["FILES/no", *OMEGA], "Invalid value for 'TRAJECTORIES': Path 'FILES/no' does not exist."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_labelling_that_cannot_be(files: Path, arguments: Sequence[str], message: str) -> None:
    assert mistake("label", TINY, "--out", "FILES/new", *arguments, folder=files).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a --reasoner, or a --verifier with --labels"),
        (VERIFIER, "name a --reasoner, or a --verifier with --labels"),
        (["--labels", TRAJECTORIES], "--labels goes with --verifier alone"),
        ([*REASONER, *VERIFIER, "--labels", TRAJECTORIES], "--labels goes with --verifier alone"),
        (["--verifier", "FILES/reasoner"], "Invalid value for '--verifier': FILES/reasoner holds Qwen2ForCausalLM; a "),
        ([*VERIFIER, "--labels", TRAJECTORIES], "FILES/round-0/trajectories, record 0: no labelled trajectory, "),
        ([*VERIFIER, "--labels", "FILES/round-1/labels"], "FILES/round-1/labels holds no labelled trajectory"),
        (
            [*VERIFIER, "--labels", "FILES/round-2/labels"],
            "FILES/round-2/labels, record 0: trajectory 'one' has 1 steps and 2 labels",
        ),
        ([*REASONER, "sampling.max_tokens=400"], "engine.max_model_len is 64; it must be at least 413: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_evaluation_that_cannot_be(files: Path, arguments: Sequence[str], message: str) -> None:
    assert mistake("evaluate", TINY, *arguments, folder=files).startswith(message)


NOWHERE = "no Ray job server answers at "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run_dir is null; a job needs an absolute path or a URI, on storage "),
        (["run_dir=runs/mine"], "run_dir is runs/mine; a job needs an absolute path"),
        (["run_dir=s3://me:secret@bucket/run"], "this s3:// URI holds credentials; leave them out and let "),
        (["run_dir=FILES/new", "sft.epcohs=3"], "command line: sft.epcohs is not a key; did you mean sft.epochs?"),
        (["run_dir=FILES/new", "extends=FILES/x.yaml"], "extends cannot be an argument of a job, which has CONFIG's "),
        (["run_dir=FILES/new", "sft.max_tokens=20"], "sft.max_tokens is 20; it must be at least 27, "),
        (["run_dir=FILES/new", "--address", "127.0.0.1:1"], f"{NOWHERE}http://127.0.0.1:1: [Errno 111] Connection re"),
        (["run_dir=FILES/new", "--address", "ray://me:secret@h:1"], f"{NOWHERE}ray://h:1: No connection adapters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_submission_that_cannot_be(files: Path, arguments: Sequence[str], message: str) -> None:
    assert mistake("submit", TINY, *arguments, folder=files).startswith(message)


def test_a_job_server_that_accepts_and_is_silent(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.submit._ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        message = mistake("submit", TINY, "run_dir=FILES/new", "--address", address, folder=files)
    assert message.startswith(f"{NOWHERE}{address}: Read timed out.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", TINY], "run_dir is null; a job needs an absolute path or a URI, on storage "),
        (["run", TINY, "run_dir=runs/mine"], "run_dir is runs/mine; a job needs an absolute path"),
        (
            ["label", TINY, "FILES/text.parquet", "--reasoner", "FILES/reasoner", "--out", "labels", *OMEGA[2:]],
            "--out is labels; a job needs an absolute path",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_job_writes_nothing_where_it_runs(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], message: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}}')
    assert mistake(*arguments, folder=files).startswith(message)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:port"])
def test_a_cluster_that_does_not_answer(files: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = mistake("run", TINY, "run_dir=FILES/new", folder=files)
    assert message.startswith(f"RAY_ADDRESS is {address}, but no Ray cluster answers there: ")


def test_what_nobody_foresaw_is_one_line_too(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: RunDirectory) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(RunDirectory, "summary", full)
    message = mistake("show", "FILES", folder=files)
    assert message == "RuntimeError: No space left on device (`sapo --debug …` shows where)"


@pytest.mark.parametrize("module", ["controls", "labeling"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--config=none.yaml"], "none.yaml"), ([f"--config={TINY}", "sft.epoch=3"], "sft.epoch .*sft.epochs")],
)
def test_a_benchmark_of_what_cannot_be(
    module: str, arguments: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(importlib.import_module(f"benchmarks.{module}").main, arguments)
    assert result.exit_code == 2
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", result.output), result.output
    assert not list(tmp_path.iterdir())


def test_a_benchmarks_fault_of_its_own_keeps_its_traceback() -> None:
    @click.command(cls=Benchmark)
    def broken() -> None:
        raise FileNotFoundError("a helper's own file")

    assert isinstance(CliRunner().invoke(broken).exception, FileNotFoundError)


def test_limits_that_are_not_reached_are_no_mistake(files: Path) -> None:
    """The next mistake after the token limits is the number of CPUs."""
    drop = ["prm.max_tokens=30", "prm.too_long=drop", "align.max_tokens=30", "rounds=0"]
    assert mistake("run", TINY, "run_dir=FILES/new", *drop, "ray.num_cpus=1", folder=files).startswith("the run needs")


def test_a_process_prints_that_line_alone(files: Path) -> None:
    command = [sys.executable, "-m", "launch", "run", TINY, f"run_dir={files}/new", "engine.max_model_len=40"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: engine.max_model_len is 40")
    assert result.stderr.count("\n") == 1


def test_a_moved_run_is_the_same_run(files: Path) -> None:
    """A run directory is refused for other settings, not for another path."""
    moved = files / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(json.dumps({"extends": TINY, "run_dir": "elsewhere", "ray": {"num_cpus": 1}}))
    arguments = ("run", "FILES/moved/config.yaml", "run_dir=FILES/moved")
    assert mistake(*arguments, folder=files).startswith("the run needs 2 CPUs")
