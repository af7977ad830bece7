"""The paper's models, by their dimensions: directories with config.json and a tokenizer, and without weights."""

from __future__ import annotations

import json
import string
from pathlib import Path

from sapo_ray.models import character_tokenizer

ARCHITECTURES = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2",
        "num_hidden_layers": 26,
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 256000,
    },
}


def save_architecture(name: str, folder: Path, **changes: object) -> None:
    """Write the directory `folder`. Its tokenizer has a token for every printable character."""
    character_tokenizer(string.printable, max_length=4096).save_pretrained(folder)
    config = {"tie_word_embeddings": True, "dtype": "bfloat16", **ARCHITECTURES[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
