"""Tiny twins of the paper's grid: each of its configs, with a random two-layer model of its architecture, without GPUs.

What the configs say of prompts, steps, placement, DeepSpeed and dtypes stays as it is. What is changed is what the
machine asks for, where data come from, and sizes: one round, more epochs, higher rates. No
model can know the answers: each is one of two, by no rule. So a model that has learned to answer at all is right now
and then, and every stage has something to work on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.store import RunDirectory
from tests.families import FAMILIES, tiny_model, tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
TWINS = [
    (task, name, family)
    for task in ("gsm8k", "mbpp")
    for name, family in (("qwen2.5-0.5b", "qwen2"), ("llama-3.2-1b", "llama"), ("gemma-2-2b", "gemma2"))
]
MACHINE = [
    "ray.num_cpus=2",
    *("engine.gpus_per_worker=0", "engine.cpus_per_worker=1", "engine.kv_cache_gib=0.2", "engine.enforce_eager=true"),
    *("verifier.gpus_per_worker=0", "verifier.cpus_per_worker=0.5", "executor.cpus_per_worker=0.3"),
    *("trainer.gpus_per_worker=0", "trainer.cpus_per_worker=1.5"),
]
SIZES = [
    *("rounds=1", "task.worked=40", "task.pool=30", "task.validation=10", "task.test=8"),
    *("engine.max_model_len=320", "sampling.max_tokens=64", "sampling.samples=4", "sampling.max_samples=4"),
    *("evaluation.samples=2", "evaluation.sampled_questions=8", "evaluation.verification=10"),
    *("sft.epochs=30", "sft.batch_size=4", "sft.learning_rate=5e-3", "labeling.fraction=1", "labeling.rollouts=4"),
    *("prm.learning_rate=1e-3", "pairs.eta=0", "align.learning_rate=1e-4"),
]

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(1200)]


def gsm8k(number: int) -> dict[str, Any]:
    bit = _bit(number)
    return {"question": f"{number}?", "answer": f"{number} is <<{bit}={bit}>>it.\nSo {bit}.\n#### {bit}"}


def mbpp(number: int) -> dict[str, Any]:
    bit = _bit(number)
    return {
        "text": f"{number}?",
        "code": f"def f():\r\n    x = {bit}\r\n    return x",
        "test_list": [f"assert f() in (0, 1) # {number}"],
        "test_setup_code": "",
        "challenge_test_list": [f"assert f() == {bit}"],  # which no prompt shows
    }


def math500(number: int) -> dict[str, Any]:
    return {"problem": f"{number}?", "solution": f"It is $\\boxed{{{_bit(number)}}}$.", "answer": str(_bit(number))}


def humaneval(number: int) -> dict[str, Any]:
    check = f"def check(candidate):\n    assert candidate() == {_bit(number)}"
    return {"prompt": f'def f():\n    """{number}?"""\n', "entry_point": "f", "test": check}


def _bit(number: int) -> int:
    return number * 7919 % 31 % 2


@pytest.mark.parametrize(("task", "name", "family"), TWINS)
def test_a_twin_runs_to_its_end(
    tmp_path: Path, task: str, name: str, family: str, request: pytest.FixtureRequest
) -> None:
    if task == "mbpp":
        request.getfixturevalue("needs_bubblewrap")
    tokenizer = tiny_tokenizer(FAMILIES[family])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(FAMILIES[family], tokenizer, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    config, overrides = CONFIGS / task / f"{name}.yaml", [*_data(tmp_path, task), *MACHINE, *SIZES]
    overrides += [f"model.path={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}"]

    assert _sapo("run", str(config), *overrides).returncode == 0

    store = RunDirectory(tmp_path / "run")
    stages, (_, last) = store.stages(), store.summary()["rounds"]
    assert stages["round-1/sample"]["labels"] > 0
    assert stages["round-1/pairs"]["pairs"] > 0
    assert stages["round-1/align"]["updates"] > 0
    assert (last["test"]["n"], last["ood"]["n"]) == (8, 4)
    assert last["verifier"]["self_verification_error"] is not None
    assert (last["cost"]["programs"] > 0) == (task == "mbpp")
    assert AutoModelForCausalLM.from_pretrained(store.checkpoint("reasoner", 1)).config.model_type == family
    kept, given = load_config(RunConfig, tmp_path / "run" / "config.yaml"), load_config(RunConfig, config)
    assert (kept.align.zero_stage, kept.align.dtype, kept.placement) == (2, "bf16", "colocated")
    assert kept.task.prompt == given.task.prompt  # type: ignore[union-attr]
    assert _sapo("audit", str(tmp_path / "run")).returncode == 0


def _data(folder: Path, task: str) -> Sequence[str]:
    """Overrides that have the config's data read from files of their form."""
    make, other = {"gsm8k": (gsm8k, math500), "mbpp": (mbpp, humaneval)}[task]
    splits = {"train": (make, range(100, 200)), "test": (make, range(200, 220)), "ood": (other, range(220, 224))}
    for split, (record, numbers) in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record(number)) + "\n" for number in numbers))
    return [f"task.{split}_data.path={folder}/{split}.jsonl" for split in splits]


def _sapo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    print(result.stdout[-4000:], result.stderr[-4000:])
    return result
