"""A task of another package: installed with an entry point, named in a config."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.tasks import CustomConfig, make_task

CODE = """
from sapo_ray.data import Question
from sapo_ray.tasks import Task


class Parity(Task):
    def __init__(self, size: int) -> None:
        self.size = size

    def questions(self, split):
        return [Question(f"{split}-{i}", str(i), "even" if i % 2 == 0 else "odd") for i in range(self.size)]

    def prompt(self, question):
        return question

    def split(self, text):
        return tuple(text.splitlines(keepends=True))

    def answer(self, steps):
        return steps[-1].strip() if steps else None

    def is_correct(self, answer, gold):
        return answer == gold
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installation leaves behind: a module, and metadata beside it that name the entry point."""
    (tmp_path / "parity_task.py").write_text(CODE)
    metadata = tmp_path / "parity_task-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: parity-task\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[sapo_ray.tasks]\nparity = parity_task:Parity\ngone = parity_task:Gone\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("installed")
def test_a_registered_class_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: {kind: custom, name: parity, options: {size: 3}}\nmodel: {path: m}\n")
    task = make_task(load_config(RunConfig, tmp_path / "mine.yaml").task)
    assert [q.answer for q in task.questions("pool")] == ["even", "odd", "even"]
    assert (task.alphabet, task.remarks(), task.oracle(task.questions("pool")[0], ["even"])) == (None, (), None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CustomConfig(name="other"), "task.name is other, but the entry points of the group sapo_ray.tasks are parity"),
        (CustomConfig(name="parity"), "task.name parity cannot be made with task.options: .*'size'"),
        (CustomConfig(name="gone"), "task.name gone cannot be made with task.options: .*Gone"),
    ],
)
def test_what_is_not_there_is_named(config: CustomConfig, message: str) -> None:
    with pytest.raises(SapoError, match=message):
        make_task(config)
