"""Tiny random models of the families that runs start from, each with a tokenizer of the family's kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    TokenizersBackend,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.\n",
    "She sold 48/2 = 24 clips in May.\nAltogether that's 48+24 = 72.\n#### 72",
    "Let x  = 1234;\n\n\treturn  x + 56.7  # don't",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """`pre` and `kind` are what a GGUF file calls the tokenizer's; `tied` says whether the embeddings are shared."""

    name: str
    config: type
    pre: str
    kind: str
    tied: bool
    extra: dict[str, Any]


FAMILIES = {
    "qwen2": Family("qwen2", Qwen2Config, "qwen2", "gpt2", False, {}),
    "llama": Family("llama", LlamaConfig, "smollm", "gpt2", True, {}),
    "gemma2": Family("gemma2", Gemma2Config, "default", "llama", True, {"head_dim": 32, "sliding_window": 16}),
}


def tiny_tokenizer(family: Family) -> PreTrainedTokenizerBase:
    """A byte-level BPE that cuts words as the family does, or for Gemma a sentencepiece-like one that begins texts."""
    return _gemma_tokenizer() if family.kind == "llama" else _byte_level_tokenizer(family.pre)


def _byte_level_tokenizer(pre: str) -> PreTrainedTokenizerBase:
    first = {
        "qwen2": pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        "smollm": pre_tokenizers.Digits(individual_digits=True),
    }[pre]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([first, bytes_]), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    pad = "<|endoftext|>" if pre == "qwen2" else None  # most Llamas have none
    return TokenizersBackend(tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad, chat_template=CHATML)


def _gemma_tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=384, special_tokens=[*special, *bytes_]))
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))  # bytes are no special tokens, which engines leave out of texts
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return TokenizersBackend(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA_CHAT
    )


def tiny_model(family: Family, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedModel:
    """A causal LM of two layers with random fp32 weights, norms and biases included."""
    keys: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family.tied,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = family.config(**keys | family.extra | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[family.config](config)
        for weights in model.parameters():
            torch.nn.init.normal_(weights, std=0.1)
    return model.eval()
