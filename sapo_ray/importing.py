"""Models from elsewhere as checkpoint directories: a GGUF file, or a model of the Hugging Face hub.

Only weights in safetensors and GGUF are read: neither can run code when it is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sapo_ray.errors import SapoError, told
from sapo_ray.files import Folder
from sapo_ray.gguf_model import load_gguf
from sapo_ray.models import check_end, load_tokenizer, parameter_count, save_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
_CONFIG = ("config.json", "generation_config.json")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", _INDEX)
"""Files of a checkpoint on the hub. What else lies there (code, weights in other formats) stays there."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A checkpoint directory that was made. `size` is in bytes, `ends_with` the tokenizer's end-of-sequence token."""

    directory: str
    architecture: str
    parameters: int
    dtype: str
    size: int
    ends_with: str
    chat: bool


def import_model(source: str, directory: Path, dtype: str | None = None, revision: str | None = None) -> Imported:
    """Make `directory` a checkpoint of `source`, the path of a GGUF file or a model's name on the hub.

    `dtype` is torch's name of the type of the weights; None keeps what there is, and takes bfloat16 for quantized ones.
    Raises SapoError where the source cannot be used or the directory not be made; then nothing is left of it.
    """
    import torch

    directory = directory.resolve()
    _check_place(directory)
    wanted: torch.dtype | None = getattr(torch, dtype) if dtype else None
    if Path(source).is_dir():
        raise SapoError(f"{source} is a directory; a checkpoint directory needs no import: name it as model.path")
    if source.endswith(".gguf") and not Path(source).exists():
        raise SapoError(f"{source}: no such file; name a GGUF file, or a model of the Hugging Face hub")
    if Path(source).is_file():
        if revision:
            raise SapoError(f"--revision is {revision}, but {source} is a file, which has none; leave it out")
        return _from_gguf(Path(source), directory, wanted)
    return _from_hub(source, revision, directory, wanted)


def _check_place(directory: Path) -> None:
    if not directory.parent.is_dir():
        raise SapoError(f"{directory.parent} is no directory to make {directory.name} in; make it first")
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise SapoError(f"{directory} exists and is not an empty directory; choose another, or remove it")
    staging = directory.with_name(f"{directory.name}.tmp")
    if staging.exists():
        raise SapoError(
            f"{staging} is where the import works, and exists; remove it, if it is left of one, or rename it"
        )


def _from_gguf(source: Path, directory: Path, dtype: torch.dtype | None) -> Imported:
    model, tokenizer = load_gguf(source, dtype)
    home, name = Folder(directory.parent), directory.name
    with home.staging(name) as made:
        save_model(model, made)
        model.generation_config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        saved = _check(made, str(source))
        probe = "Let x = 1234 + 56.7;  don't\n\n\tπ ≈ 3" + tokenizer.eos_token
        if saved.encode(probe) != tokenizer.encode(probe):
            raise SapoError(f"{source}: its tokenizer gives other tokens once it is saved; import another model")
        imported = _describe(made, directory, saved)
        home.put(made, name)
    return imported


def _from_hub(source: str, revision: str | None, directory: Path, dtype: torch.dtype | None) -> Imported:
    snapshot = _snapshot(source, revision, [*_CONFIG, *_TOKENIZER])
    if not (snapshot / "config.json").is_file():
        raise SapoError(f"{source} on the hub is no model for transformers: it has no config.json; name another")
    tokenizer = _check(snapshot, source)
    snapshot = _snapshot(source, snapshot.name, [*_CONFIG, *_TOKENIZER, *_WEIGHTS])
    shards = _check_weights(snapshot, source)
    home, name = Folder(directory.parent), directory.name
    with home.staging(name) as made:
        copied = [*_TOKENIZER, "generation_config.json"]
        if dtype is None:
            copied += ["config.json", _INDEX, *shards]
        else:
            from transformers import AutoModelForCausalLM

            save_model(AutoModelForCausalLM.from_pretrained(snapshot, dtype=dtype, trust_remote_code=False), made)
        for file in copied:
            if (snapshot / file).is_file():
                shutil.copyfile(snapshot / file, made / file)
        imported = _describe(made, directory, tokenizer)
        home.put(made, name)
    return imported


def _snapshot(source: str, revision: str | None, files: Sequence[str]) -> Path:
    """The folder of the hub's cache that holds these files of a model, as far as it has them."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of the library, the network, or the name
        raise SapoError(
            f"{source} is neither a file nor a model that can be had from the hub or its cache: {told(error)}"
        ) from error


def _check_weights(snapshot: Path, source: str) -> list[str]:
    """The names of a snapshot's weight files. Raises SapoError where one is missing."""
    index = snapshot / _INDEX
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        if not (snapshot / shard).is_file():
            raise SapoError(
                f"{source} has no {shard}: its weights are not, or not all, there as safetensors, and no other format "
                "is read; name another model or revision"
            )
    return shards


def _check(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that transformers and vLLM can use, looked at without its weights.

    Raises SapoError where it is none.
    """
    from transformers import AutoConfig

    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one
        raise SapoError(f"{source} has no tokenizer (none of {', '.join(_VOCABULARIES)}); name another model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # of the library, over whatever the files hold
        raise SapoError(f"{source} cannot be used by transformers: {told(error)}; name another model") from error
    architecture = (config.architectures or ["no architecture"])[0]
    if not architecture.endswith("ForCausalLM"):
        raise SapoError(f"{source} holds {architecture}; a …ForCausalLM is needed")
    if getattr(config, "quantization_config", None):
        raise SapoError(f"{source} is quantized, so that it cannot be trained; name the model it was made from")
    check_end(tokenizer, folder, source)
    return tokenizer


def _describe(made: Path, directory: Path, tokenizer: PreTrainedTokenizerBase) -> Imported:
    config = json.loads((made / "config.json").read_text())
    return Imported(
        directory=str(directory),
        architecture=config["architectures"][0],
        parameters=parameter_count(made),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        size=sum(file.stat().st_size for file in made.iterdir()),
        ends_with=str(tokenizer.eos_token),
        chat=tokenizer.chat_template is not None,
    )
