"""Checkpoints: a random start for tasks that bring their own alphabet, and the verifier's head.

Everything here reads and writes the Hugging Face format with safetensors weights, so that transformers and vLLM load a
4M-parameter toy and a 7B model through the same code.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sapo_ray.errors import SapoError
from sapo_ray.store import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Tokenizer


@dataclass(kw_only=True)
class ModelConfig:
    path: str | None = None
    """A Hugging Face checkpoint directory to start from; if null, a Qwen2 with random weights as the keys below say."""
    hidden_size: int = 128
    """Width of the residual stream."""
    layers: int = 6
    """Transformer blocks."""
    heads: int = 4
    """Attention heads; the same number of key-value heads."""
    intermediate_size: int = 384
    """Width of the feed-forward layers."""
    max_length: int = 512
    """Longest sequence, in tokens."""
    tie_embeddings: bool = True
    """Share the input and output embeddings."""

    def __post_init__(self) -> None:
        for key in ("hidden_size", "layers", "heads", "intermediate_size", "max_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.hidden_size % (32 * self.heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of 32 * heads = {32 * self.heads}: "
                "vLLM's attention takes heads 32, 64, 96 … wide"
            )


def character_tokenizer(alphabet: str, max_length: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer without merges: one token a character of `alphabet`, after `<pad>` (0) and `<eos>` (1).

    It is a Qwen2 tokenizer because AutoTokenizer chooses the class by the model's type, whatever class was saved. A
    character that is not in `alphabet` becomes `<pad>`.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [byte_level.pre_tokenize_str(character)[0][0] for character in alphabet]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(["<pad>", "<eos>", *characters])},
        merges=[],
        unk_token="<pad>",
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=max_length,
    )


def save_random_reasoner(config: ModelConfig, alphabet: str, seed: int, path: Path) -> None:
    """Write a Qwen2 causal LM with random fp32 weights, and its character tokenizer, to the directory `path`.

    The directory appears when it is complete.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = character_tokenizer(alphabet, config.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_length,
                tie_word_embeddings=config.tie_embeddings,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
    unfinished = path.with_name(path.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    _save(model, unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.replace(path)


def _save(model: PreTrainedModel, path: Path) -> None:
    """What `model.save_pretrained` writes. That would import every training engine it finds, and one of them prints."""
    from safetensors.torch import save_file

    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(path)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a verifier's scores mean, stored with its checkpoint.

    `start_score` is the mean ĉ_0 over at most 1,000 right first steps of the samples it was trained on; expansions and
    worked solutions are left out unless there is nothing else. None: there were none. `threshold` is the lowest step
    score that a trajectory without an error has.
    """

    start_score: float | None
    threshold: float

    @staticmethod
    def load(checkpoint: Path) -> Calibration | None:
        """The calibration stored with a checkpoint, or None."""
        path = checkpoint / "calibration.json"
        return Calibration(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save(self, checkpoint: Path) -> None:
        write_text(checkpoint / "calibration.json", json.dumps(asdict(self)))


def parameter_count(checkpoint: Path) -> int:
    """Number of weights in a checkpoint directory's safetensors files, read from their headers."""
    from safetensors import safe_open

    count = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if count == 0:
        raise FileNotFoundError(f"{checkpoint} holds no safetensors weights")
    return count


def base_tokenizer(config: ModelConfig, alphabet: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model that the config names or describes. Raises SapoError where it names none."""
    if config.path is not None:
        if not Path(config.path, "config.json").is_file():
            raise SapoError(f"model.path {config.path} is no checkpoint directory: config.json is missing")
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.path)
        return tokenizer
    return character_tokenizer(alphabet, config.max_length)
