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
from typing import TYPE_CHECKING, Literal

from sapo_ray.cache import local_checkpoint
from sapo_ray.config_loader import changeable
from sapo_ray.errors import SapoError, told
from sapo_ray.files import Folder
from sapo_ray.manifest import recorded

CALIBRATION_FILE = "calibration.json"
CALIBRATION_ROWS = 1000
"""Most labelled trajectories that a verifier's start score is taken over."""

_STEPS = ["Let x  = 1:\n", "    x + 1 = 2\n\n", "#### 2"]
"""Steps by which a tokenizer is tried."""

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2Tokenizer


@dataclass(kw_only=True)
class ModelConfig:
    path: str | None = None
    """A Hugging Face checkpoint directory to start from (`sapo model import` makes one), or the URI of a checkpoint of
    a run; if null, a Qwen2 with random weights as the keys below say."""
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
    # transformers would take the name of a kernel on a hub, too, and fetch and run its code.
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = changeable(None)
    """How trainings and verifiers compute attention (transformers' `attn_implementation`). Null: by PyTorch's fused
    kernels (`sdpa`), or `eager` where a model caps its logits, as Gemma 2 does. Engines choose for themselves."""

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


def random_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The Qwen2 that a config without a checkpoint describes."""
    from transformers import Qwen2Config

    return Qwen2Config(
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


def save_random_reasoner(config: ModelConfig, alphabet: str, seed: int, path: Path) -> None:
    """Write a Qwen2 causal LM with random fp32 weights, and its character tokenizer, into the directory `path`."""
    import torch
    from transformers import Qwen2ForCausalLM

    tokenizer = character_tokenizer(alphabet, config.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(random_architecture(config, tokenizer))
    save_model(model, path)
    tokenizer.save_pretrained(path)


def save_model(model: PreTrainedModel, path: Path) -> None:
    """What `model.save_pretrained` writes, in one file of weights.

    That would import every training engine it finds, and one of them prints.
    """
    from safetensors.torch import save_file

    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(path)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(path / "config.json", path / "model.safetensors")  # safetensors keeps its files to their owner


def attention(config: PreTrainedConfig, asked: str | None) -> str | None:
    """The attention that transformers has to be asked for: None is its own choice.

    That is PyTorch's fused attention, which leaves out without a word how Gemma 2 caps the logits of its own. Raises
    SapoError where it is asked for nevertheless.
    """
    capped = getattr(config, "attn_logit_softcapping", None)
    if capped and asked == "sdpa":
        raise SapoError(
            f"model.attention is sdpa, which does not cap the logits of attention, as {config.model_type} does; "
            "leave it null or name another"
        )
    return asked or ("eager" if capped else None)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a verifier's scores mean, stored with its checkpoint.

    `start_score` is the mean ĉ_0 over at most 1,000 right first steps of the samples it was trained on; expansions and
    worked solutions are left out unless there is nothing else. None: there were none. `threshold` is the lowest step
    score that a trajectory without an error has.
    """

    start_score: float | None
    threshold: float

    @property
    def start(self) -> float:
        """What detection lets the first step drop from: the start score, 1 where there is none."""
        return 1.0 if self.start_score is None else self.start_score

    @staticmethod
    def load(checkpoint: str) -> Calibration | None:
        """The calibration stored with a checkpoint, or None.

        Raises DamagedError where it is not what was written, SapoError where it is none.
        """
        stored, folder = recorded(checkpoint).get(CALIBRATION_FILE), Folder(checkpoint)
        if stored is None and not folder.has(CALIBRATION_FILE):
            return None
        content = stored.read() if stored else folder.read(CALIBRATION_FILE)
        try:
            return Calibration(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise SapoError(f"{folder.locate(CALIBRATION_FILE)} is no calibration: {error}") from error

    def text(self) -> str:
        """What is stored."""
        return json.dumps(asdict(self))


def parameter_count(checkpoint: str | Path) -> int:
    """Number of weights in a checkpoint's safetensors files, read from their headers: nothing else is fetched."""
    folder, count = Folder(checkpoint), 0
    for name in folder.sizes():
        if name.endswith(".safetensors"):
            with folder.open(name) as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            count += sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
    if count == 0:
        raise FileNotFoundError(f"{checkpoint} holds no safetensors weights")
    return count


def base_tokenizer(config: ModelConfig, alphabet: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model that the config names, or describes for a task with an alphabet.

    Raises SapoError where there is none, or none that solutions can be written with.
    """
    if config.path is not None:
        if not Folder(config.path).has("config.json"):
            raise SapoError(
                f"model.path {config.path} is no checkpoint directory: config.json is missing; "
                "`sapo model import` makes one"
            )
        return reasoner_tokenizer(config.path, alphabet)
    if alphabet is None:
        raise SapoError("model.path is null; a task without an alphabet of its own needs a model: name a checkpoint")
    return character_tokenizer(alphabet, config.max_length)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in a directory of this node. Code that lies there is never run."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def reasoner_tokenizer(checkpoint: str, alphabet: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, for solutions that are encoded step by step and ended by a token.

    Raises SapoError where it changes the text of steps (of the `alphabet`, where a task has one), or has no such token,
    and for a checkpoint of a family that transformers does not know.
    """
    from transformers import AutoConfig

    folder = Path(local_checkpoint(checkpoint, weights=False))
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(folder)
    except ValueError as error:  # of a family that transformers does not know, or would know by code beside the weights
        raise SapoError(
            f"{checkpoint} cannot be loaded ({told(error)}); code that comes with a checkpoint is never run: name "
            "another model"
        ) from error
    check_end(tokenizer, folder, checkpoint)
    steps = _STEPS if alphabet is None else [alphabet, alphabet]
    encoded = tokenizer(steps, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode([token for ids in encoded for token in ids], clean_up_tokenization_spaces=False)
    if decoded != "".join(steps):
        raise SapoError(
            f"{checkpoint}: its tokenizer, given the steps {steps} one by one, makes {decoded!r} of them; those that "
            "put a space before every text (as Llama 2's and Mistral's do) cannot be used: name another model"
        )
    return tokenizer


def check_end(tokenizer: PreTrainedTokenizerBase, folder: Path, name: str) -> None:
    """Raises SapoError where the tokenizer of a checkpoint in `folder` has no token that ends a solution, or where its
    generation_config.json, if it has one, does not stop there. `name` is what a person calls the checkpoint."""
    end, stated = tokenizer.eos_token_id, folder / "generation_config.json"
    if end is None:
        raise SapoError(f"{name}: its tokenizer has no end-of-sequence token, which ends solutions; name another model")
    if not stated.is_file():
        return
    try:
        ends = json.loads(stated.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise SapoError(f"{name}: its generation_config.json cannot be read: {told(error)}") from error
    if end not in (ends if isinstance(ends, list) else [ends]):
        raise SapoError(
            f"{name}: its tokenizer ends texts with {tokenizer.eos_token} ({end}), but generation ends at {ends}; name "
            "a model whose generation_config.json agrees with its tokenizer"
        )
