"""A task of another package: installed with an entry point, named in a config."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.errors import SapoError
from sapo_ray.tasks import SPLITS, CustomConfig, MathConfig, make_task

PAGE = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")


def example(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installation of docs/tasks.md's example leaves behind: a module, and metadata with the entry point."""
    (tmp_path / "parity_task.py").write_text(example("python"))
    metadata = tmp_path / "parity_task-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: parity-task\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[sapo_ray.tasks]\nparity = parity_task:Parity\ngone = parity_task:Gone\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("installed")
def test_a_registered_class_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(re.findall("`(task: .*)`", PAGE)[0] + "\nmodel: {path: m}\n")
    task = make_task(load_config(RunConfig, tmp_path / "mine.yaml").task)
    for split in SPLITS:
        questions = task.questions(split)
        assert len(questions) == 200
        assert all(task.is_correct(task.answer(q.solution), q.answer) for q in questions)
        assert all(task.split("".join(q.solution)) == q.solution for q in questions)
    assert (task.alphabet, task.remarks(), task.oracle(questions[0], ["yes"])) == (None, (), None)


def test_the_page_shows_both_ways_in_under_40_lines(tmp_path: Path) -> None:
    shown = example("yaml") + example("python")
    assert shown.count("\n") < 40
    (tmp_path / "mine.yaml").write_text(example("yaml"))
    task = load_config(RunConfig, tmp_path / "mine.yaml").task
    assert isinstance(task, MathConfig)
    assert task.train_data.question == "problem"


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
