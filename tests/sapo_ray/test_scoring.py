from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel

from sapo_ray.encoding import Encoded
from sapo_ray.errors import SapoError
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.scoring import load_verifier, score
from sapo_ray.tasks.chain import VOCABULARY


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reasoner")
    config = ModelConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_length=128)
    save_random_reasoner(config, VOCABULARY, 0, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(reasoner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verifier")
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(reasoner, num_labels=1)
    torch.nn.init.normal_(model.score.weight)  # scores all over (0, 1), not all near a half
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def verifier(checkpoint: Path) -> PreTrainedModel:
    return load_verifier(str(checkpoint))


def trajectories(count: int) -> list[Encoded]:
    """Trajectories of 1 to 6 steps, in no order of length."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        steps = 1 + (number * 5) % 6
        ids = torch.randint(2, 40, (10 + 8 * steps,), generator=generator).tolist()
        made.append(Encoded(ids, 10, [17 + 8 * j for j in range(steps)]))
    return made


def test_scores_are_the_sigmoid_at_step_ends_of_one_unpadded_trajectory_at_a_time(verifier: PreTrainedModel) -> None:
    encoded = trajectories(20)
    found = score(verifier, encoded, batch_tokens=200)
    for trajectory, scores in zip(encoded, found, strict=True):
        with torch.no_grad():
            logits = verifier(torch.tensor([trajectory.ids])).logits[0, :, 0]
        expected = torch.sigmoid(logits[trajectory.step_ends]).tolist()
        assert scores == pytest.approx(expected, abs=1e-5)
    assert max(map(max, found)) - min(map(min, found)) > 0.3


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 10_000])
def test_scores_do_not_depend_on_the_batch(verifier: PreTrainedModel, batch_tokens: int) -> None:
    encoded = trajectories(13)
    reference = score(verifier, encoded, batch_tokens=128)
    found = score(verifier, encoded[::-1], batch_tokens=batch_tokens)[::-1]
    for scores, expected in zip(found, reference, strict=True):
        assert scores == pytest.approx(expected, abs=1e-5)


def test_a_step_is_scored_without_sight_of_later_ones(verifier: PreTrainedModel) -> None:
    whole = trajectories(6)[5]
    prefix = Encoded(whole.ids[: whole.step_ends[1] + 1], whole.prompt_length, whole.step_ends[:2])
    (of_whole,), (of_prefix,) = score(verifier, [whole], 999), score(verifier, [prefix], 999)
    assert of_whole[:2] == pytest.approx(of_prefix, abs=1e-5)


def test_bf16_scores_are_fp32_numbers_close_to_those_of_fp32(checkpoint: Path, verifier: PreTrainedModel) -> None:
    encoded = trajectories(8)
    rough = score(load_verifier(str(checkpoint), torch.bfloat16), encoded, 500)
    for scores, expected in zip(rough, score(verifier, encoded, 500), strict=True):
        assert scores == pytest.approx(expected, abs=0.05)


def test_attention_changes_scores_by_rounding_alone(checkpoint: Path, verifier: PreTrainedModel) -> None:
    eager, encoded = load_verifier(str(checkpoint), asked="eager"), trajectories(8)
    assert [model.config._attn_implementation for model in (verifier, eager)] == ["sdpa", "eager"]
    for scores, expected in zip(score(eager, encoded, 500), score(verifier, encoded, 500), strict=True):
        assert scores == pytest.approx(expected, abs=1e-5)


def test_nothing_to_score(verifier: PreTrainedModel) -> None:
    assert score(verifier, [], 100) == []
    assert score(verifier, [Encoded([5, 6, 7], 3, [])], 100) == [[]]


def test_a_reasoner_is_refused_as_a_verifier(reasoner: Path) -> None:
    with pytest.raises(SapoError, match=f"{reasoner} holds Qwen2ForCausalLM"):
        load_verifier(str(reasoner))


def test_two_labels_are_refused(reasoner: Path, tmp_path: Path) -> None:
    AutoModelForTokenClassification.from_pretrained(reasoner, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(SapoError, match=f"{tmp_path} .*num_labels = 2"):
        load_verifier(str(tmp_path))
