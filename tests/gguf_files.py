"""GGUF files of tiny models, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    TokenType,
    get_tensor_name_map,
    quantize,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.families import Family

F32 = GGMLQuantizationType.F32


def gguf_tensors(family: Family, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's weights by their names in a GGUF file, laid out as there."""
    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == family.name)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tensors = {}
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight" and family.tied:
            continue
        array = weights.numpy()
        if family.name == "llama" and "q_proj" in name:
            array = _interleaved(array, model.config.num_attention_heads)
        if family.name == "llama" and "k_proj" in name:
            array = _interleaved(array, model.config.num_key_value_heads)
        if family.name == "gemma2" and "norm" in name:
            array = array + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return tensors


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotation, which turns neighbours, not halves."""
    return weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    family: Family,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    architecture: str | None = None,
    **metadata: Any,
) -> Path:
    """Write a model with its tokenizer, every tensor as `types` says (F32), and return the path.

    `metadata` has keys with `__` for `.`; they win, and None leaves a key out.
    """
    config, name = model.config, architecture or family.name
    keys: dict[str, Any] = {
        "general.name": f"tiny {family.name}",
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{name}.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        f"{name}.vocab_size": config.vocab_size,
        **_tokenizer_keys(family, tokenizer),
    }
    if family.name == "gemma2":
        keys |= {
            "gemma2.attention.key_length": config.head_dim,
            "gemma2.attention.sliding_window": config.sliding_window,
        }
    keys |= {key.replace("__", "."): value for key, value in metadata.items()}
    writer = GGUFWriter(path, name)
    for key, value in keys.items():
        _add(writer, key, value)
    for tensor, array in (gguf_tensors(family, model) if tensors is None else tensors).items():
        kind = (types or {}).get(tensor, F32)
        data = array.astype(np.float32) if kind == F32 else quantize(array.astype(np.float32), kind)
        writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer_keys(family: Family, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": family.kind,
        "tokenizer.ggml.pre": family.pre,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [
            int(TokenType.CONTROL if t in special else TokenType.BYTE if t.startswith("<0x") else TokenType.NORMAL)
            for t in vocabulary
        ],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    if family.kind == "gpt2":
        return keys | {
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
            "tokenizer.ggml.add_bos_token": False,
        }
    return keys | {
        "tokenizer.ggml.scores": [-float(number) for number in range(len(vocabulary))],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.convert_tokens_to_ids("<unk>"),
        "tokenizer.ggml.add_bos_token": True,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
