"""What commands look at before they write or start anything."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Literal

import click

from sapo_ray.errors import SapoError


class Checkpoint(click.ParamType):
    """A Hugging Face checkpoint directory with safetensors weights and the given kind of head."""

    name = "directory"

    def __init__(self, head: Literal["ForCausalLM", "ForTokenClassification"]) -> None:
        self._head = head

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = Path(value)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.fail(f"{path} is no checkpoint directory: it has no config.json that can be read", param, ctx)
        architecture = (config.get("architectures") or ["no architecture"])[0]
        if not architecture.endswith(self._head):
            self.fail(f"{path} holds {architecture}; a …{self._head} is needed", param, ctx)
        if not any(path.glob("*.safetensors")):
            self.fail(f"{path} holds no weights (*.safetensors)", param, ctx)
        return value


def check_writable(name: str, path: Path) -> None:
    """Raises SapoError where the directory `path` cannot be made or written. Leaves nothing behind."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".sapo-", dir=existing):
            pass
    except OSError as error:
        raise SapoError(f"{name} {path} cannot be written: {error.strerror}; choose another directory") from error
