"""`sapo model`: models from elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.group(epilog="Example: sapo model import HuggingFaceTB/SmolLM2-135M-Instruct /models/SmolLM2-135M-Instruct")
def model() -> None:
    """Models that runs start from."""


@model.command("import")
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    help="Of the weights. By default what they are in SOURCE; bfloat16 where they are quantized: that is what most "
    "models are published in, and much finer than what was lost.",
)
@click.option("--revision", help="Branch, tag or commit of a model of the hub; its main branch by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def import_(source: str, directory: Path, dtype: str | None, revision: str | None, as_json: bool) -> None:
    """Make DIRECTORY a checkpoint, for `model.path`, of SOURCE: a GGUF file, or a model's name on the Hugging Face hub.

    With HF_HUB_OFFLINE=1 the hub's model is taken from its cache. Weights in other formats than safetensors and GGUF
    are not read, and no code is taken or run.

    \b
    Examples:
      sapo model import qwen2.5-coder-0.5b-instruct-q4_k_m.gguf /models/Qwen2.5-Coder-0.5B-Instruct
      sapo model import Qwen/Qwen2.5-Coder-0.5B-Instruct /models/Qwen2.5-Coder-0.5B-Instruct --revision main
    """
    from sapo_ray.importing import import_model

    made = import_model(source, directory, dtype, revision)
    if as_json:
        click.echo(json.dumps(asdict(made)))
        return
    template = "with" if made.chat else "without"
    click.echo(
        f"{made.directory}: {made.architecture}, {made.parameters:,} parameters in {made.dtype}, "
        f"{made.size / 2**20:,.0f} MiB; its tokenizer ends with {made.ends_with}, {template} a chat template"
    )
