"""The container file, as far as it can be read without building it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster" / "Dockerfile").read_text()
NEEDED = {"Makefile", "pyproject.toml", "requirements.lock", "setup.py", "actors", "cluster", "configs", "launch"}


def instructions(name: str) -> list[str]:
    """The arguments of every `name` instruction, continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))
    return re.findall(rf"^{name} +(.*)$", joined, flags=re.MULTILINE)


def test_the_base_image_is_a_build_argument_with_cuda_by_default() -> None:
    (base,) = [value for value in instructions("ARG") if value.startswith("BASE_IMAGE=")]
    assert "cuda" in base
    assert instructions("FROM") == ["${BASE_IMAGE}"]


def test_what_it_copies_is_there_and_is_all_that_installing_needs() -> None:
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert copied >= NEEDED | {"sapo_ray"}
    assert not [source for source in copied if not (ROOT / source).exists()]


@pytest.mark.parametrize("command", instructions("RUN"))
def test_its_commands_are_shell(command: str) -> None:
    subprocess.run(["bash", "-n", "-c", command], check=True)


def test_it_runs_as_nobody_in_particular() -> None:
    assert instructions("USER")[-1] not in ("root", "0")
    (made,) = [command for command in instructions("RUN") if "useradd" in command]
    assert f"--uid 10001 {instructions('USER')[-1]}" in made  # the one that the pods run as


def test_it_names_no_package_index() -> None:
    assert not re.search(r"://|index-url", TEXT)
