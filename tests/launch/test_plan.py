"""`sapo plan`: the paper's grid, what a plan says, and what it refuses; and what `sapo run` refuses by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch.cli import cli
from launch.resources import Nodes, check_memory
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.models import ModelConfig, base_tokenizer, character_tokenizer
from sapo_ray.plan.hardware import GPUS, MOST_GIB
from sapo_ray.requests import EngineConfig
from sapo_ray.tasks.chain import VOCABULARY
from sapo_ray.training import TrainerConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TINY = ROOT / "tests" / "configs" / "tiny.yaml"
GRID = [
    (task, name, model)
    for task in ("gsm8k", "mbpp")
    for name, model in (
        ("qwen2.5-0.5b", "Qwen2.5-0.5B"),
        ("llama-3.2-1b", "Llama-3.2-1B"),
        ("gemma-2-2b", "Gemma-2-2B"),
    )
]
RECORDS = {
    "gsm8k": [{"question": f"{n}+1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(60)],
    "mbpp": [
        {
            "text": f"Write a function that adds {n}.",
            "code": f"def add(x):\r\n    y = {n}\r\n    return x + y",
            "test_list": [f"assert add(1) == {n + 1}"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for n in range(60)
    ],
}
OOD = {
    "gsm8k": {"problem": "1 + 1?", "answer": "2"},
    "mbpp": {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1"},
}
SIZES = ["task.worked=20", "task.pool=10", "task.validation=5", "task.test=4"]


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides that have each task of the grid read a few records of its form."""
    folder = tmp_path_factory.mktemp("data")
    for task, records in RECORDS.items():
        for split, part in (("train", records[:50]), ("test", records[50:])):
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
        (folder / f"{task}-ood.jsonl").write_text(json.dumps(OOD[task]))
    return {
        task: [f"task.{split}_data.path={folder}/{task}-{split}.jsonl" for split in ("train", "test", "ood")]
        for task in RECORDS
    }


def sapo_plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)])


def planned(*arguments: str | Path) -> dict[str, Any]:
    result = sapo_plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


@pytest.mark.parametrize(("task", "name", "model"), GRID)
def test_the_papers_grid_fits_its_machines(
    models: Path, data_files: dict[str, list[str]], task: str, name: str, model: str
) -> None:
    """On one GPU, a node and four of them; one H100 holds every training's largest forward pass, too."""
    arguments = [CONFIGS / task / f"{name}.yaml", f"model.path={models / model}", *data_files[task], *SIZES]
    one = planned(*arguments, "--gpu", "h100")
    assert one["questions"] == {"worked": 20, "pool": 10, "validation": 5, "test": 4, "ood": 1}
    assert (one["gpus"], one["misfits"], one["remarks"]) == (1, [], [])
    assert one["hours"] > 0
    assert one["dollars"] == pytest.approx(one["hours"] * 3, rel=0.02)
    assert [stage["name"] for stage in one["stages"]][-1] == "round-3/evaluate"
    assert (one["cost"]["programs"] > 0) == (task == "mbpp")
    node = planned(*arguments, f"extends={CONFIGS}/gpu/node.yaml", "--gpu", "h100")
    assert (node["gpus"], node["cost"]) == (8, one["cost"])
    nodes = planned(*arguments, f"extends={CONFIGS}/gpu/nodes.yaml", "--gpu", "a100-80")
    assert (nodes["gpus"], nodes["cost"]) == (32, one["cost"])
    assert nodes["memory"] == node["memory"]


def test_a_prompt_is_shown_as_the_model_sees_it(models: Path, data_files: dict[str, list[str]]) -> None:
    arguments = [
        CONFIGS / "gsm8k" / "qwen2.5-0.5b.yaml",
        f"model.path={models}/Qwen2.5-0.5B",
        *data_files["gsm8k"],
        *SIZES,
    ]
    prompt = planned(*arguments)["prompt"]
    assert prompt.startswith("Question: ")
    assert prompt.endswith("+1?\nAnswer:\n")
    page = sapo_plan(*arguments).stdout
    assert f"A prompt:\n{prompt}\n" in page
    assert 'sft: {"train_micro_batch_size_per_gpu": 1, ' in page
    assert "$" not in page


def test_a_plan_without_a_model_to_start_from() -> None:
    """What --wrong says goes into checks: two of three rollouts each, of the wrong half of 30 questions' samples."""
    found = planned(TINY, "--wrong", "0.5")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["round-1/sample"]["cost"]["checks"] == 30 * 4 // 2 * 2
    assert stages["round-1/sample"]["cost"]["rollouts"] == 30 * 4 // 2 * 2 * 3
    assert planned(TINY, "--wrong", "0")["cost"]["checks"] == 3 * 20  # of self-verification alone
    assert (found["gpu"], found["hours"], found["dollars"]) == (None, None, None)
    assert found["model"]["layers"] == 1
    assert found["lengths"]["steps"] == pytest.approx(2.5, abs=0.4)


def test_no_hours_are_told_of_workers_on_cpus() -> None:
    found = planned(TINY, "--gpu", "a10g")
    assert found["hours"] is None
    assert found["remarks"][-1].startswith(
        "no hours are told, since they are those of workers on GPUs in 16 bits: engine."
    )


def test_a_price_of_ones_own(models: Path, data_files: dict[str, list[str]]) -> None:
    arguments = [
        CONFIGS / "gsm8k" / "llama-3.2-1b.yaml",
        f"model.path={models}/Llama-3.2-1B",
        *data_files["gsm8k"],
        *SIZES,
    ]
    page = sapo_plan(*arguments, "--gpu", "h200", "--price", "2.5").stdout
    assert "on 1 x H200 SXM: $" in page
    assert page.endswith(" at $2.5 an hour\n")


def test_a_plan_that_cannot_fit_is_shown_and_refused(models: Path, data_files: dict[str, list[str]]) -> None:
    arguments = [CONFIGS / "gsm8k" / "gemma-2-2b.yaml", f"model.path={models}/Gemma-2-2B", *data_files["gsm8k"], *SIZES]
    result = sapo_plan(*arguments, "--gpu", "a100-40", "--json")
    assert result.exit_code == 2
    line = (
        "sft.zero_stage = 2, prm.zero_stage = 2, align.zero_stage = 2 with trainer.workers = 1 leave each GPU up to "
        "43.8 GiB of weights, gradients and optimizer states, but A100 SXM 40 GB has 40 GiB; raise them"
    )
    assert result.stderr == f"error: {line}\n"
    figures = json.loads(result.stdout)
    assert figures["misfits"] == [line]
    assert figures["hours"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.worked=0"], "error: command line: task.worked is 0; there would be nothing to learn from\n"),
        (["engine.max_model_len=20"], "error: engine.max_model_len is 20; it must be at least "),
        (["--gpu", "abacus"], "error: Invalid value for '--gpu': 'abacus' is not one of 'h100', "),
    ],
)
def test_what_a_run_would_refuse_a_plan_refuses(arguments: Sequence[str], message: str) -> None:
    result = sapo_plan(TINY, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message)


# What `sapo run` refuses, where Ray says which GPUs there are


@pytest.fixture(scope="module")
def gemma(models: Path) -> RunConfig:
    """On a single worker, with GPUs for engine and training."""
    return replace(
        load_config(RunConfig, TINY),
        model=ModelConfig(path=str(models / "Gemma-2-2B")),
        engine=EngineConfig(gpus_per_worker=1, dtype="bfloat16", kv_cache_gib=0),
        trainer=TrainerConfig(gpus_per_worker=1),
    )


def gpu_node(kind: str) -> Nodes:
    return Nodes("node", 1, {"CPU": 8.0, "GPU": 8.0, f"accelerator_type:{kind}": 1.0})


@pytest.mark.parametrize(
    ("kinds", "largest"), [(["A10G"], "A10G has 24 GiB"), (["A10G", "GeForce-RTX-4090"], "has 24 GiB")]
)
def test_a_run_that_fits_no_gpu_of_the_cluster_is_refused(gemma: RunConfig, kinds: list[str], largest: str) -> None:
    """16 bytes for each of 2.6 billion weights."""
    nodes = [Nodes("head", 1, {"CPU": 8.0}), *map(gpu_node, kinds)]
    with pytest.raises(
        SapoError, match=rf"^sft\.zero_stage = 0, .* leave each GPU up to 39 GiB of .*, but .*{largest}"
    ):
        check_memory(gemma, base_tokenizer(gemma.model, None), nodes)


def test_nothing_is_refused_where_a_gpu_may_do_or_is_not_known(gemma: RunConfig) -> None:
    tokenizer = base_tokenizer(gemma.model, None)
    small = gpu_node("A10G")
    for other in (gpu_node("L40S"), gpu_node("Abacus"), Nodes("what may come", 1, {"GPU": 8.0})):
        check_memory(gemma, tokenizer, [small, other])
    check_memory(gemma, tokenizer, [Nodes("this machine", 1, {"CPU": 2.0})])
    on_cpus = replace(gemma, engine=EngineConfig(), trainer=TrainerConfig(), model=ModelConfig())
    check_memory(on_cpus, character_tokenizer(VOCABULARY, 64), [small])


def test_no_card_of_the_table_has_more_memory_than_ray_lets_a_run_hope_for() -> None:
    most = {"h100": "H100", "h200": "H200", "a100-80": "A100", "a100-40": "A100", "l40s": "L40S", "a10g": "A10G"}
    assert {name: MOST_GIB[kind] >= GPUS[name].gib for name, kind in most.items()} == dict.fromkeys(most, True)
    assert GPUS.keys() - most == {"rtx-4090"}
    assert GPUS["rtx-4090"].gib <= MOST_GIB["GeForce-RTX-4090"]
