"""Samples, tokens, FLOPs and hours of a small run, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sapo_ray.config import AlignConfig, RunConfig
from sapo_ray.cost import Cost
from sapo_ray.evaluator import EvaluationConfig
from sapo_ray.labelers import LabelingConfig
from sapo_ray.labelers.base import LabelerName
from sapo_ray.pairs import PairsConfig
from sapo_ray.plan.duration import UTILIZATION, Clock, gpus_held, start_seconds, unclocked
from sapo_ray.plan.hardware import GPU
from sapo_ray.plan.shape import Shape
from sapo_ray.plan.workload import Lengths, Stage, Workload
from sapo_ray.requests import EngineConfig, VerifierConfig
from sapo_ray.sampler import SamplingConfig
from sapo_ray.tasks.base import Split
from sapo_ray.training import LoraConfig, TrainConfig, TrainerConfig

N, V = 1_000_000, 900_000
SHAPE = Shape(
    architecture="by hand",
    parameters=N,
    verifier_parameters=V,
    layers=2,
    norms=5,
    hidden=64,
    heads=2,
    kv_heads=2,
    head_dim=32,
    intermediate=128,
    vocabulary=100,
    dtype="bfloat16",
    linears={"q_proj": 20_000, "down_proj": 50_000},
)
QUESTIONS: dict[Split, int] = {"worked": 50, "pool": 100, "validation": 20, "test": 30, "ood": 10}
LENGTHS = Lengths(prompt=100, solution=60, steps=7.4)
CONFIG = replace(
    RunConfig(),
    rounds=1,
    sampling=SamplingConfig(samples=4, max_samples=4, questions=25),
    labeling=LabelingConfig(labeler="saps", rollouts=8, fraction=0.5, right_fraction=0.25),
    pairs=PairsConfig(max_per_question=2, keep_unpaired=False),
    sft=TrainConfig(epochs=3),
    align=AlignConfig(epochs=1),
    evaluation=EvaluationConfig(test=0, ood=5, samples=8, sampled_questions=10, verification=16),
)
ON_GPUS = replace(
    CONFIG,
    engine=EngineConfig(workers=6, gpus_per_worker=1, dtype="bfloat16", kv_cache_gib=0),
    verifier=VerifierConfig(workers=2, gpus_per_worker=1, dtype="bfloat16"),
    trainer=TrainerConfig(workers=8, gpus_per_worker=1),
    sft=TrainConfig(dtype="bf16"),
    prm=TrainConfig(dtype="bf16"),
    align=AlignConfig(dtype="bf16", gradient_checkpointing=True),
)


def costs(config: RunConfig = CONFIG, wrong: float = 0.25) -> dict[str, Cost]:
    return {stage.name: stage.cost for stage in Workload(config, QUESTIONS, LENGTHS, SHAPE, wrong).stages()}


def test_the_stages_are_algorithm_1() -> None:
    assert list(costs()) == [
        "round-0/sft",
        "round-0/validation",
        "round-0/sample",
        "round-0/prm",
        "round-0/calibrate",
        "round-0/self-verification",
        "round-0/evaluate",
        "round-1/sample",
        "round-1/prm",
        "round-1/calibrate",
        "round-1/self-verification",
        "round-1/pairs",
        "round-1/align",
        "round-1/self-verification-aligned",
        "round-1/evaluate",
    ]
    bare = ["round-0/sft", "round-0/validation", "round-0/sample", "round-0/evaluate"]
    assert list(costs(replace(CONFIG, verify=False))) == [*bare, "round-1/sample", "round-1/align", "round-1/evaluate"]


def test_training_takes_six_flops_a_weight_and_token() -> None:
    assert costs()["round-0/sft"] == Cost(trained_tokens=50 * 3 * 160, flops=6 * N * 50 * 3 * 160)
    few = replace(CONFIG, sft=TrainConfig(epochs=3, batch_size=10, max_updates=4))
    assert costs(few)["round-0/sft"].trained_tokens == 4 * 10 * 160


def test_sampling_takes_two_flops_a_weight_and_token_that_is_not_cached() -> None:
    """20 questions, four samples of each; of a prompt's 100 tokens three blocks of 32 are kept."""
    cached = 60 * 96
    expected = Cost(
        prompt_tokens=8000, cached_tokens=cached, generated_tokens=4800, flops=2 * N * (8000 - cached + 4800)
    )
    assert costs()["round-0/validation"] == expected
    uncached = replace(CONFIG, engine=EngineConfig(prefix_caching=False))
    expected = replace(expected, cached_tokens=0, flops=2 * N * (8000 + 4800))
    assert costs(uncached)["round-0/validation"] == expected


def test_labelling_a_round() -> None:
    """100 samples, 25 wrong ones, of which half are labelled: 12.5 with two checks of eight rollouts each."""
    found = costs()["round-1/sample"]
    assert (found.checks, found.rollouts) == (25, 200)
    assert found.trajectories == round(75 * 0.25 + 12.5)
    assert found.generated_tokens == 100 * 60 + 200 * 30
    assert found.prompt_tokens == 100 * 100 + 200 * 130
    assert found.cached_tokens == 75 * 96 + 175 * 128
    assert found.scored_tokens == 12.5 * 160
    computed = found.prompt_tokens - found.cached_tokens + found.generated_tokens
    assert found.flops == pytest.approx(2 * N * computed + 2 * V * found.scored_tokens)


@pytest.mark.parametrize(("labeler", "checks"), [("saps", 2), ("shepherd", 7), ("omega", 3), ("outcome", 0)])
def test_checks_follow_the_labeler(labeler: LabelerName, checks: int) -> None:
    """Of eight steps: 7.4 on average."""
    config = replace(CONFIG, labeling=replace(CONFIG.labeling, labeler=labeler))
    found = costs(config)["round-1/sample"]
    assert found.checks == round(12.5 * checks)
    assert (found.scored_tokens > 0) == (labeler == "saps")
    assert costs(config)["round-0/sample"].checks == round(12.5 * 3)  # by omega


def test_verifiers_learn_from_labels_expansions_and_first_from_worked_solutions() -> None:
    labelled = 75 * 0.25 + 12.5
    assert costs()["round-0/prm"].trained_tokens == (50 + labelled + 12.5 * 3 * 8) * 160
    assert costs()["round-1/prm"].trained_tokens == (labelled + 12.5 * 2 * 8) * 160
    plain = replace(CONFIG, labeling=replace(CONFIG.labeling, expand=False))
    assert costs(plain)["round-1/prm"] == Cost(trained_tokens=5000, flops=6 * V * labelled * 160)


def test_pairs_are_of_all_rounds_so_far() -> None:
    """50 questions with four samples each, three of them right: two pairs, or with all samples used one right alone."""
    assert costs()["round-1/align"].trained_tokens == 50 * 2 * 2 * 160
    assert costs()["round-1/pairs"] == Cost(scored_tokens=(200 + 50) * 160, flops=2 * V * 250 * 160)
    kept = replace(CONFIG, pairs=PairsConfig(max_per_question=2, keep_unpaired=True))
    assert costs(kept)["round-1/align"].trained_tokens == (50 * (2 * 2 + 1) + 50) * 160
    again = replace(CONFIG, sampling=replace(CONFIG.sampling, questions=0), pairs=PairsConfig(keep_unpaired=False))
    assert costs(again)["round-1/align"].trained_tokens == 100 * 4 * 2 * 160  # eight samples of the same questions
    assert costs(wrong=0)["round-1/align"].trained_tokens == 0


def test_evaluation() -> None:
    found = costs()["round-1/evaluate"]
    assert found.generated_tokens == (30 + 5 + 10 * 8) * 60
    assert found.scored_tokens == 80 * 160


def test_self_verification_checks_the_wrong_half() -> None:
    found = costs()["round-1/self-verification"]
    assert (found.trajectories, found.checks, found.scored_tokens) == (16, 16, 16 * 160)


# Hours

CARD = GPU("card", gib=10, tflops=100, gb_per_second=1000, price=1)


def seconds(stage: Stage) -> float:
    return Clock(ON_GPUS, SHAPE, LENGTHS, CARD).duration(stage).seconds


def test_training_is_bound_by_flops_on_all_workers() -> None:
    cost = Cost(trained_tokens=1, flops=100e12)
    assert seconds(Stage("round-0/sft", cost)) == pytest.approx(1 / UTILIZATION / 8)


def test_checkpointing_makes_the_forward_pass_once_more() -> None:
    """Two FLOPs a token and weight to the six of a training, or to the four of one with frozen weights."""
    tokens = 10**6
    for flops in (6 * N, 4 * N):
        stage = Stage("round-1/align", Cost(trained_tokens=tokens, flops=flops * tokens))
        assert seconds(stage) == pytest.approx((flops + 2 * N) * tokens / 100e12 / UTILIZATION / 8)


def test_a_small_model_decodes_as_fast_as_steps_come() -> None:
    """64 sequences at a time on each of six engines, 3 ms a token."""
    found = seconds(Stage("round-0/validation", Cost(generated_tokens=6 * 64 * 1000), requests=6 * 64))
    assert found == pytest.approx(3.0)


@pytest.mark.parametrize(("tflops", "expected"), [(1000, 1.0), (100, 300 * 2 * 64 / 30_000)])
def test_a_large_model_decodes_as_fast_as_its_weights_are_read_or_used(tflops: float, expected: float) -> None:
    """2 GB of weights in 1/300 s at 600 GB/s; 2 * 64 GFLOPs at 30 a millisecond."""
    large, card = replace(SHAPE, parameters=10**9), replace(CARD, tflops=tflops)
    stage = Stage("round-0/validation", Cost(generated_tokens=6 * 64 * 300), requests=6 * 64)
    found = Clock(ON_GPUS, large, LENGTHS, card).duration(stage).seconds
    assert found == pytest.approx(expected, rel=0.01)


def test_the_slowest_of_engines_verifiers_and_coordinator_decides() -> None:
    clock = Clock(ON_GPUS, SHAPE, LENGTHS, CARD)
    assert clock.duration(Stage("round-1/pairs", Cost(scored_tokens=10**9), requests=1)).bound == "verifier"
    busy = clock.duration(Stage("round-1/sample", Cost(generated_tokens=1000), requests=10_000))
    assert (busy.bound, busy.seconds) == ("coordinator", pytest.approx(2.3))


def test_gpus_and_starts_by_placement() -> None:
    assert (gpus_held(ON_GPUS), start_seconds(ON_GPUS, trainings=4)) == (16, 120)
    colocated = replace(ON_GPUS, placement="colocated")
    assert (gpus_held(colocated), start_seconds(colocated, trainings=4)) == (8, 480)


def test_hours_are_told_of_gpus_in_16_bits_only() -> None:
    assert unclocked(ON_GPUS) == []
    assert unclocked(replace(ON_GPUS, verifier=VerifierConfig(), prm=TrainConfig())) == [
        "verifier.gpus_per_worker = 0.0",
        "verifier.dtype = float32",
        "prm.dtype = fp32",
    ]


def test_a_frozen_weight_costs_two_thirds_of_a_trained_one() -> None:
    trained = 8 * 70_000
    lora = costs(replace(CONFIG, sft=replace(CONFIG.sft, lora=LoraConfig(rank=8))))["round-0/sft"]
    assert lora.flops == (4 * N + 2 * trained) * lora.trained_tokens
