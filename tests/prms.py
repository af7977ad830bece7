"""Small PRMs with random weights, one of every format, whose scores are spread over (0, 1)."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForTokenClassification,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from sapo_ray.models import ModelConfig, character_tokenizer, save_random_reasoner

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SIZE = {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 2048}


def save_sapo(path: Path) -> None:
    """A verifier of this project: one token a character."""
    size = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=2048)
    save_random_reasoner(size, string.printable, 0, path)
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(path, num_labels=1)
    _spread(model)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path)


def save_math_shepherd(path: Path) -> None:
    """A Mistral whose tokenizer is Llama's: a word begins with ▁, and the tag and the signs are a token each."""
    merges = [("▁", "к"), ("▁к", "и"), ("▁", "+"), ("▁", "-")]
    tokens = ["<unk>", "<s>", "</s>", "▁", *string.printable, "к", "и", *("".join(pair) for pair in merges)]
    LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, add_bos_token=True
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokens), num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **SIZE
    )
    model = MistralForCausalLM(config)
    _spread(model)
    model.save_pretrained(path)


def save_qwen_math(path: Path) -> None:
    """Laid out as Qwen2.5-Math-PRM-7B: a config that names code of its own, a language model's head beside `score`."""
    size = ModelConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_length=2048, tie_embeddings=False)
    save_random_reasoner(size, string.printable, 0, path)
    tokenizer = character_tokenizer(string.printable, 2048)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer))
    _spread(model)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig", "AutoModel": "modeling_qwen2_rm.Qwen2ForProcess"}
    config |= {"architectures": ["Qwen2ForProcessRewardModel"], "auto_map": names}
    (path / "config.json").write_text(json.dumps(config))
    head = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (2, 32), "2.bias": (2,)}
    weights = {f"score.{name}": 0.5 * torch.randn(shape) for name, shape in head.items()}
    file = path / "model.safetensors"
    save_file(load_file(file) | weights, file, metadata={"format": "pt"})


def _spread(model: PreTrainedModel) -> None:
    """Weights large enough for a step's score to depend on the steps before it."""
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.3)


SAVE = {"sapo": save_sapo, "math-shepherd": save_math_shepherd, "qwen2.5-math-prm": save_qwen_math}
