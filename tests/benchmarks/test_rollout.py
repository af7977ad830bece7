"""The throughput benchmark without engines: its prompts, its turns, and the ratios it ends with."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks import rollout
from sapo_ray.requests import EngineConfig, GenerateRequest

LOAD = rollout.Load(prompts=6, prompt_tokens=4, tokens=5, repetitions=3)


class Contender:
    """Takes a second less a turn; writes down what it was asked."""

    def __init__(self, tokens: int = LOAD.prompts * LOAD.tokens) -> None:
        self.tokens, self.asked = tokens, list[list[GenerateRequest]]()

    def generate(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        self.asked.append(requests)
        return self.tokens, 5.0 - len(self.asked)


def test_prompts_are_new_in_every_turn_and_the_same_for_all() -> None:
    turns = [rollout.draw(LOAD, turn, vocabulary=50) for turn in range(3)]
    assert turns == [rollout.draw(LOAD, turn, vocabulary=50) for turn in range(3)]
    prompts = {tuple(request.prompt_ids) for requests in turns for request in requests}
    assert len(prompts) == len({request.id for requests in turns for request in requests}) == 18
    assert {len(prompt) for prompt in prompts} == {4}
    assert {token for prompt in prompts for token in prompt} <= set(range(2, 50))
    assert {(r.sampling.max_tokens, r.sampling.ignore_eos) for requests in turns for r in requests} == {(5, True)}


def test_the_first_turn_warms_up_and_every_contender_gets_the_same_requests() -> None:
    one, other = Contender(), Contender()
    rates = rollout.measure({"one": one, "other": other}, LOAD, vocabulary=50)
    assert rates == {"one": [10.0, 15.0, 30.0], "other": [10.0, 15.0, 30.0]}
    assert one.asked == other.asked
    assert len(one.asked) == 4


def test_a_contender_that_makes_fewer_tokens_is_no_contender() -> None:
    with pytest.raises(RuntimeError, match="other made 29 tokens, not 6 x 5"):
        rollout.measure({"one": Contender(), "other": Contender(tokens=29)}, LOAD, vocabulary=50)


def test_ratios_are_medians_of_the_ratios_within_a_turn() -> None:
    """A slow second turn hits all three alike. The ratio of the medians would be 100 / 120."""
    rates = {
        "pool": [90.0, 5.0, 100.0, 120.0],
        "vllm": [100.0, 10.0, 125.0, 120.0],
        "transformers": [10.0, 1.0, 25.0, 10.0],
    }
    assert rollout.ratios(rates) == {"pool_over_vllm": 0.85, "vllm_over_transformers": 10.0}


def test_the_command_compares_what_its_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(config: EngineConfig, model: str, load: rollout.Load, default_processes: bool) -> dict[str, float]:
        assert (config.max_model_len, model, load, default_processes) == (9, "a/model", LOAD, False)
        return {"pool_over_vllm": 1.5}

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(rollout.ray, "init", lambda **_: None)
    monkeypatch.setattr(rollout, "compare", compare)
    arguments = ["--model=a/model", "--prompts=6", "--prompt-tokens=4", "--tokens=5", "--repetitions=3"]
    found = CliRunner().invoke(rollout.main, [*arguments, "--json"], catch_exceptions=False)
    assert found.stdout == '{"pool_over_vllm": 1.5}\n'
    assert CliRunner().invoke(rollout.main, [*arguments, "--dtype=auto"]).exit_code == 2
