from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.config_docs import config_docs
from sapo_ray.config import RunConfig
from sapo_ray.config_loader import ConfigError, changeable_keys, describe, load_config

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_code_says() -> None:
    message = "run: python -m launch.config_docs > docs/config.md"
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == config_docs(), message


def test_every_key_has_a_meaning_and_a_row() -> None:
    page = config_docs()
    for key in describe(RunConfig):
        assert key.doc, key.name
        mark = " *" if key.changeable else ""
        assert f"| `{key.name.rpartition('.')[2]}`{mark} | {key.type} |" in page


def test_keys_that_say_how_fast_and_where_a_run_works_may_change() -> None:
    keys = changeable_keys(RunConfig)
    assert keys == {key.name for key in describe(RunConfig) if key.changeable}
    assert keys >= {"run_dir", "engine.workers", "verifier.batch_size", "trainer.gpus_per_worker", "ray.num_cpus"}
    assert keys >= {"sft.checkpoint_every", "prm.micro_batch_tokens", "align.checkpoint_minutes"}
    assert not keys & {"seed", "rounds", "engine.dtype", "engine.extra", "align.learning_rate", "align.beta"}
    assert not any(key.startswith(("task.", "sampling.", "labeling.", "pairs.", "evaluation.")) for key in keys)


@pytest.mark.parametrize("line", re.findall(r"^error: (.*)", config_docs(), re.MULTILINE))
def test_the_mistakes_shown_are_reported_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    key, value = re.findall(r": ([\w.]+) is (?:not a key|'?([\w.]+))", line)[0]
    Path("my.yaml").write_text("" if line.startswith("command") else f"{key}: {value or 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "my.yaml", [f"{key}={value}"] if line.startswith("command") else [])
    assert str(caught.value) == line


def test_the_example_is_a_config(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", config_docs(), re.DOTALL)
    assert found
    (tmp_path / "example.yaml").write_text(found[1].replace("local.yaml", str(ROOT / "configs" / "local.yaml")))
    config = load_config(RunConfig, tmp_path / "example.yaml")
    assert (config.rounds, config.task.pool, config.sampling.questions) == (3, 12000, 3000)
