"""What commands look at before they write or start anything."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Literal
from uuid import uuid4

import click

from sapo_ray.errors import SapoError
from sapo_ray.files import Folder, is_uri, reason


class Checkpoint(click.ParamType):
    """A Hugging Face checkpoint directory with safetensors weights and one of the given kinds of heads."""

    name = "directory"

    def __init__(self, *heads: Literal["ForCausalLM", "ForTokenClassification", "ForProcessRewardModel"]) -> None:
        self._heads = heads

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        folder = Folder(value)
        try:
            config = json.loads(folder.read("config.json"))
        except (OSError, ValueError):
            self.fail(f"{value} is no checkpoint directory: it has no config.json that can be read", param, ctx)
        architecture = (config.get("architectures") or ["no architecture"])[0]
        if not architecture.endswith(self._heads):
            self.fail(f"{value} holds {architecture}; a …{' or …'.join(self._heads)} is needed", param, ctx)
        if not any(name.endswith(".safetensors") for name in folder.sizes()):
            self.fail(f"{value} holds no weights (*.safetensors)", param, ctx)
        return value


class Existing(click.Path):
    """A path that exists, or a URI, of which that is seen when it is read."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(exists=True, file_okay=file_okay)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        return value if is_uri(str(value)) else super().convert(value, param, ctx)


def check_writable(name: str, location: str) -> None:
    """Raises SapoError where the folder `location` cannot be made or written. Leaves nothing behind."""
    folder, probe = Folder(location), f".sapo-{uuid4().hex}"
    try:
        if folder.path is None:
            folder.write(probe, "")
            folder.remove([probe])
        else:
            existing = next(parent for parent in (folder.path, *folder.path.parents) if parent.exists())
            with tempfile.TemporaryDirectory(prefix=".sapo-", dir=existing):
                pass
    except OSError as error:
        raise SapoError(f"{name} {location} cannot be written: {reason(error)}; choose another directory") from error
