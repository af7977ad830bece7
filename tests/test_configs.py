"""Every config that comes with the project can be loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sapo_ray.config import RunConfig
from sapo_ray.config_loader import ConfigError, load_config
from sapo_ray.tasks import SPLITS, MathConfig, make_task
from sapo_ray.training import LoraConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_loads(path: Path) -> None:
    config = load_config(RunConfig, path)
    if isinstance(config.task, MathConfig):
        assert make_task(config.task).prompt("1+1?")
        assert config.model.path


def test_the_readmes_config_for_gpus_is_one(tmp_path: Path) -> None:
    """In the checkout's root, where it is named; and its trainings are those of the config that it is to be like."""
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "mine.yaml").write_text(found[1])
    config, like = load_config(RunConfig, tmp_path / "mine.yaml"), load_config(RunConfig, CONFIGS / "cluster.yaml")
    assert config.engine.gpus_per_worker == 1
    assert (config.sft, config.prm, config.align) == (like.sft, like.prm, like.align)


def test_adapters_of_quantized_weights_need_gpus() -> None:
    quantized = ["align.lora.quantize=nf4", "align.lora.rank=8"]
    with pytest.raises(
        ConfigError, match=r"^command line: align.lora.quantize is nf4; it needs GPUs: set trainer.gpus"
    ):
        load_config(RunConfig, CONFIGS / "local.yaml", quantized)
    config = load_config(RunConfig, CONFIGS / "local.yaml", [*quantized, "trainer.gpus_per_worker=1"])
    assert config.align.lora == LoraConfig(rank=8, quantize="nf4")
    assert config.sft.lora is None


def local_files(path: Path, data: Path) -> list[str]:
    """The overrides that a config's comment gives for files under /data, which are under `data`."""
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    found = re.findall(r"'(task\.[^']+)'|\b(task\.\S+)", comment)
    return [(quoted or bare).replace("=/data/", f"={data}/") for quoted, bare in found]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gsm8k", (96, 1000, 60, 1319)),
        ("svamp", (96, 504, 100, 300)),
        ("mbpp", (96, 228, 50, 500)),
    ],
)
def test_local_files_stand_in_for_the_hub(data: Path, name: str, sizes: tuple[int, ...]) -> None:
    """By the overrides that the comments of those configs give."""
    path = CONFIGS / name / "qwen2.5-coder-0.5b-cpu.yaml"
    config = load_config(RunConfig, path, local_files(path, data))
    task = make_task(config.task)
    assert tuple(len(task.questions(split)) for split in SPLITS) == (*sizes, 0)


def test_humaneval_stands_beside_mbpp(data: Path) -> None:
    """All of it: its questions are other ones, and its tests have another form."""
    files = local_files(CONFIGS / "mbpp" / "qwen2.5-coder-0.5b-cpu.yaml", data)
    humaneval = f"task.ood_data.path={data}/humaneval/HumanEval.jsonl.gz"
    config = load_config(RunConfig, CONFIGS / "mbpp" / "gemma-2-2b.yaml", [*files, humaneval])
    task = make_task(config.task)
    assert [len(task.questions(split)) for split in SPLITS] == [160, 160, 54, 500, 164]
    assert (config.evaluation.ood, task.remarks()) == (0, [])
    question = task.questions("ood")[0]
    program = task.program("    return False\n", question.answer)
    assert program is not None
    assert list(program.names) == ["has_close_elements"]
    assert program.solution.startswith(question.text.rstrip())
