"""Token limits, measured with the prompts as they are: text, and what a chat template makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sapo_ray.config import RunConfig
from sapo_ray.errors import SapoError
from sapo_ray.limits import check_engine_length
from sapo_ray.models import character_tokenizer
from sapo_ray.requests import EngineConfig
from sapo_ray.sampler import SamplingConfig
from sapo_ray.tasks import Math, MathConfig
from sapo_ray.tasks.prompts import PromptConfig
from sapo_ray.tasks.sources import SourceConfig


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_counts_with_its_template(tmp_path: Path, chat: bool) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": 2}\n{"question": "10+10?", "answer": 20}\n')
    (tmp_path / "t.jinja").write_text("{{ question }}=")
    task = MathConfig(
        train_data=SourceConfig(path=str(tmp_path / "q.jsonl")),
        worked=0,
        validation=0,
        test=1,
        prompt=PromptConfig(template=str(tmp_path / "t.jinja"), chat=chat),
    )
    tokenizer = character_tokenizer("0123456789+?=[]", 64)
    tokenizer.chat_template = "[{{ messages[0].content }}]"
    needed = len("10+10?=") + 2 * chat + 5 + 1
    config = RunConfig(
        sampling=SamplingConfig(max_tokens=5), engine=EngineConfig(max_model_len=needed, max_num_batched_tokens=64)
    )
    check_engine_length(config, Math(task), tokenizer)
    short = replace(config, engine=replace(config.engine, max_model_len=needed - 1))
    told = rf"engine.max_model_len is {needed - 1}; it must be at least {needed}: \d+ of the longest question, train-2,"
    with pytest.raises(SapoError, match=told):
        check_engine_length(short, Math(task), tokenizer)
