"""Every config that comes with the project can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import load_config
from sapo_ray.tasks import SPLITS, MathConfig, make_task

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_loads(path: Path) -> None:
    config = load_config(RunConfig, path)
    if isinstance(config.task, MathConfig):
        assert make_task(config.task).prompt("1+1?")
        assert config.model.path


@pytest.mark.parametrize(
    ("name", "files", "sizes"),
    [
        (
            "gsm8k",
            ["train_data.path={}/gsm8k/train.jsonl", "test_data.path={}/gsm8k/test.jsonl"],
            (500, 2000, 100, 200),
        ),
        ("svamp", ["train_data.path={}/svamp/SVAMP.json", "test_data=null", "test=300"], (200, 400, 100, 300)),
    ],
)
def test_local_files_stand_in_for_the_hub(data: Path, name: str, files: list[str], sizes: tuple[int, ...]) -> None:
    """By the overrides that the comments of those configs give."""
    config = load_config(RunConfig, CONFIGS / name / "local.yaml", [f"task.{file.format(data)}" for file in files])
    task = make_task(config.task)
    assert tuple(len(task.questions(split)) for split in SPLITS) == (*sizes, 0)
