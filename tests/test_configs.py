"""Every config that comes with the project can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import ConfigError, load_config
from sapo_ray.tasks import SPLITS, MathConfig, make_task
from sapo_ray.training import LoraConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_loads(path: Path) -> None:
    config = load_config(RunConfig, path)
    if isinstance(config.task, MathConfig):
        assert make_task(config.task).prompt("1+1?")
        assert config.model.path


def test_adapters_of_quantized_weights_need_gpus() -> None:
    quantized = ["align.lora.quantize=nf4", "align.lora.rank=8"]
    with pytest.raises(
        ConfigError, match=r"^command line: align.lora.quantize is nf4; it needs GPUs: set trainer.gpus"
    ):
        load_config(RunConfig, CONFIGS / "local.yaml", quantized)
    config = load_config(RunConfig, CONFIGS / "local.yaml", [*quantized, "trainer.gpus_per_worker=1"])
    assert config.align.lora == LoraConfig(rank=8, quantize="nf4")
    assert config.sft.lora is None


@pytest.mark.parametrize(
    ("name", "files", "sizes"),
    [
        (
            "gsm8k",
            ["train_data.path={}/gsm8k/train.jsonl", "test_data.path={}/gsm8k/test.jsonl"],
            (96, 1000, 60, 1319),
        ),
        ("svamp", ["train_data.path={}/svamp/SVAMP.json", "test_data=null", "test=300"], (96, 544, 60, 300)),
    ],
)
def test_local_files_stand_in_for_the_hub(data: Path, name: str, files: list[str], sizes: tuple[int, ...]) -> None:
    """By the overrides that the comments of those configs give."""
    config = load_config(RunConfig, CONFIGS / name / "qwen2.5-coder-0.5b-cpu.yaml", [f"task.{file.format(data)}" for file in files])
    task = make_task(config.task)
    assert tuple(len(task.questions(split)) for split in SPLITS) == (*sizes, 0)
