"""Imports run one way: launch -> actors -> sapo_ray, and the method knows no engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "sapo_ray": {"actors", "launch", "ray", "vllm", "deepspeed"},
    "actors": {"launch"},
    "launch": {"benchmarks", "tests"},
}


def imported(source: str) -> Iterator[str]:
    """The top-level package of every import in `source`, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_form_of_import_is_seen() -> None:
    source = "import a.x, b as y\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n"
    assert set(imported(source)) == {"a", "b", "c", "h"}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {f"{file.relative_to(ROOT)} imports {name}" for file in files for name in imported(file.read_text())}
    assert not {line for line in wrong if line.rpartition(" ")[2] in FORBIDDEN[package]}
