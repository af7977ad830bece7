"""`sapo model import` as a person calls it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.checks import Checkpoint
from launch.cli import cli
from sapo_ray.models import ModelConfig, base_tokenizer, parameter_count
from tests.families import FAMILIES, TEXTS, tiny_model, tiny_tokenizer
from tests.gguf_files import write_gguf


@pytest.fixture
def source(tmp_path: Path) -> str:
    family = FAMILIES["llama"]
    tokenizer = tiny_tokenizer(family)
    return str(write_gguf(tmp_path / "tiny.gguf", family, tiny_model(family, tokenizer), tokenizer))


def test_what_was_made_is_told_in_a_line_and_can_be_named_as_model_path(source: str, tmp_path: Path) -> None:
    made = str(tmp_path / "made")
    result = CliRunner().invoke(cli, ["model", "import", source, made, "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    count = parameter_count(made)
    assert result.stdout == (
        f"{made}: LlamaForCausalLM, {count:,} parameters in bfloat16, 0 MiB; its tokenizer ends with <|im_end|>, "
        "with a chat template\n"
    )
    assert Checkpoint("ForCausalLM").convert(made, None, None) == made
    assert base_tokenizer(ModelConfig(path=made), None).eos_token == "<|im_end|>"
    again = CliRunner().invoke(cli, ["model", "import", source, made])
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"error: {made} exists and is not an empty directory; choose another, or remove it\n"


def test_json(source: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["model", "import", source, str(tmp_path / "made"), "--json"])
    figures = json.loads(result.stdout)
    assert figures["parameters"] == parameter_count(tmp_path / "made")
    assert figures["dtype"] == "float32"


def test_the_group_alone_shows_its_commands() -> None:
    result = CliRunner().invoke(cli, ["model"])
    assert "import" in result.stderr
    assert "error" not in result.stderr


@pytest.fixture(scope="module")
def models() -> Path:
    """Real models, which are no part of the project: GGUF files and the directories they were imported to."""
    path = Path(os.environ.get("SAPO_MODELS", "no such folder"))
    if not path.is_dir():
        pytest.skip("SAPO_MODELS names no folder with SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct")
    return path


@pytest.mark.slow
def test_real_models_write_sense(models: Path) -> None:
    """The tokens are those that SmolLM2's own tokenizer gives."""
    for name in ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"):
        tokenizer = AutoTokenizer.from_pretrained(models / name)
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        assert model.config.tie_word_embeddings
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(ids)
        assert "Paris" in text
        assert text.endswith("<|im_end|>")
        assert all(tokenizer.decode(tokenizer.encode(line)) == line for line in TEXTS)
    smol = AutoTokenizer.from_pretrained(models / "SmolLM2-135M-Instruct")
    assert smol.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert smol.encode("  multiple   spaces") == [216, 2701, 256, 5600]
