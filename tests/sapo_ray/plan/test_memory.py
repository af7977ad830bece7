"""Memory by hand, by autograd's own account, and what is refused for lack of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from sapo_ray.config import AlignConfig, RunConfig
from sapo_ray.models import ModelConfig, base_tokenizer
from sapo_ray.plan.hardware import GIB
from sapo_ray.plan.memory import (
    activation_bytes,
    doubts,
    engine_memory,
    kv_bytes,
    kv_room,
    machine_doubts,
    memories,
    misfits,
    training_memory,
    verifier_memory,
)
from sapo_ray.plan.shape import Shape, model_shape
from sapo_ray.requests import EngineConfig, VerifierConfig
from sapo_ray.training import LoraConfig, TrainConfig, TrainerConfig
from tests.architectures import ARCHITECTURES, save_architecture

BILLION = Shape(
    architecture="by hand",
    parameters=10**9,
    verifier_parameters=9 * 10**8,
    layers=10,
    norms=21,
    hidden=1000,
    heads=10,
    kv_heads=5,
    head_dim=100,
    intermediate=4000,
    vocabulary=50_000,
    dtype="bfloat16",
    linears={"q_proj": 20_000, "down_proj": 50_000},
)
ENGINE = EngineConfig(
    gpus_per_worker=1,
    dtype="bfloat16",
    kv_cache_gib=0,
    max_num_seqs=100,
    max_model_len=1000,
    gpu_memory_utilization=0.9,
)
ON_GPUS = replace(
    RunConfig(),
    engine=ENGINE,
    verifier=VerifierConfig(gpus_per_worker=1, dtype="bfloat16"),
    trainer=TrainerConfig(gpus_per_worker=1),
)


def shape(folder: Path) -> Shape:
    config = ModelConfig(path=str(folder))
    return model_shape(config, base_tokenizer(config, None))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen2.5-0.5B", 494_032_768), ("Llama-3.2-1B", 1_235_814_400), ("Gemma-2-2B", 2_614_341_888)],
)
def test_weights_are_counted_as_their_makers_count_them(models: Path, name: str, parameters: int) -> None:
    found = shape(models / name)
    assert found.parameters == parameters
    assert found.verifier_parameters == parameters + found.hidden + 1  # tied: the head comes on top
    assert found.norms == (4 if name == "Gemma-2-2B" else 2) * found.layers + 1
    assert (found.kv_heads, found.head_dim) == {"Gemma-2-2B": (4, 256), "Llama-3.2-1B": (8, 64)}.get(name, (2, 64))


def test_an_output_layer_of_its_own_counts_for_the_reasoner_only(tmp_path: Path) -> None:
    save_architecture("Qwen2.5-0.5B", tmp_path, tie_word_embeddings=False)
    found = shape(tmp_path)
    assert found.parameters == 494_032_768 + 151_936 * 896
    assert found.verifier_parameters == 494_032_768 + 897


@pytest.mark.parametrize(
    ("dtype", "stage", "weights", "gradients", "optimizer"),
    [
        ("bf16", 0, 2, 2, 12),  # 16 bytes a weight: the paper's mixed-precision Adam, K = 12
        ("bf16", 1, 2, 6, 12 / 4),
        ("bf16", 2, 2, 4 / 4, 12 / 4),
        ("bf16", 3, 2 / 4, 4 / 4, 12 / 4),
        ("fp32", 0, 4, 4, 8),
        ("fp32", 1, 4, 4, 12 / 4),
        ("fp32", 2, 4, 4 / 4, 12 / 4),
        ("fp32", 3, 4 / 4, 4 / 4, 12 / 4),
    ],
)
def test_states_of_a_billion_weights_on_four_workers(
    dtype: str, stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    """In 10^9 bytes, so bytes a weight: arXiv 1910.02054, figure 1, but for gradients summed in fp32. DeepSpeed on two
    CPU workers held as much (docs/plan.md)."""
    memory = training_memory(BILLION, "sft", TrainConfig(dtype=dtype, zero_stage=stage), workers=4)  # type: ignore[arg-type]
    found = (memory.weights, memory.gradients, memory.optimizer)
    assert found == pytest.approx((weights * 1e9, gradients * 1e9, optimizer * 1e9))
    assert memory.states == pytest.approx(sum(found))


def test_a_verifier_in_training_has_its_own_weights_and_no_logits() -> None:
    memory = training_memory(BILLION, "prm", TrainConfig(dtype="bf16", zero_stage=0), workers=1)
    assert memory.states == pytest.approx(16 * 9e8)
    assert memory.logits == 0


@given(stage=st.integers(0, 3), workers=st.integers(1, 64), dtype=st.sampled_from(["fp32", "bf16"]))
def test_more_workers_never_take_more_of_a_gpu(stage: int, workers: int, dtype: str) -> None:
    config = TrainConfig(dtype=dtype, zero_stage=stage)  # type: ignore[arg-type]
    few, many = (training_memory(BILLION, "sft", config, n) for n in (workers, workers + 1))
    assert many.states <= few.states
    assert many.total <= few.total


def test_a_forward_pass_has_no_more_tokens_than_the_batch_gives_a_worker() -> None:
    config = AlignConfig(batch_size=8, max_tokens=100, micro_batch_tokens=1000, dtype="bf16")
    tokens = {workers: training_memory(BILLION, "align", config, workers).logits / 600_000 for workers in (1, 2, 3, 8)}
    assert tokens == {1: 1000, 2: 800, 3: 600, 8: 200}  # pairs of 2 x 100; three of them where three workers share 8


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_keeps(tmp_path: Path, name: str, dtype: torch.dtype, size: int) -> None:
    """Of real forward passes by small models of the three kinds, within a tenth; of checkpointed layers their input."""
    small = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    small |= {"vocab_size": 100, "head_dim": 32}
    folders = {layers: tmp_path / str(layers) for layers in (6, 7)}
    for layers, folder in folders.items():
        save_architecture(name, folder, **small, num_hidden_layers=layers)
    expected = {
        layers: activation_bytes(shape(folder), size, checkpointing=False) for layers, folder in folders.items()
    }
    assert saved_bytes(folders[6], dtype, checkpointing=False) == pytest.approx(expected[6], rel=0.1)
    six, seven = (saved_bytes(folder, dtype, checkpointing=True) for folder in folders.values())
    assert seven - six == size * 128
    inputs = activation_bytes(shape(folders[6]), size, checkpointing=True) - expected[6] / 6
    assert inputs == pytest.approx(6 * (seven - six))


def saved_bytes(model: Path, dtype: torch.dtype, checkpointing: bool) -> float:
    """Bytes a token that autograd keeps of a model's layers."""
    reasoner = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype).train()
    if checkpointing:
        reasoner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {tensor.data_ptr() for tensor in (*reasoner.parameters(), *reasoner.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros((4, 64), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reasoner.model(input_ids=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / ids.numel()


def test_an_engine_by_hand() -> None:
    """A token's cache: a key and a value of 100 numbers of two bytes for each of 5 heads in 10 layers."""
    assert kv_bytes(BILLION, ENGINE) == 2 * 100 * 2 * 5 * 10
    memory = engine_memory(BILLION, ENGINE)
    assert memory.weights == 2e9
    assert memory.kv_cache == 100 * 1000 * 20_000
    assert kv_room(BILLION, ENGINE, 10e9) == pytest.approx(9e9 - 2e9 - memory.activations - memory.logits)
    spread = replace(ENGINE, tensor_parallel_size=2, gpus_per_worker=2)
    assert engine_memory(BILLION, spread).weights == 1e9
    assert kv_bytes(BILLION, spread) == 10_000


def test_auto_is_the_checkpoints_type() -> None:
    assert engine_memory(BILLION, replace(ENGINE, dtype="auto")).weights == 2e9
    assert engine_memory(replace(BILLION, dtype="float32"), replace(ENGINE, dtype="auto")).weights == 4e9


def test_a_verifier_by_hand() -> None:
    memory = verifier_memory(BILLION, VerifierConfig(dtype="bfloat16", batch_tokens=1000))
    assert (memory.weights, memory.activations) == (1.8e9, 1000 * 2 * (2 * 1000 + 3 * 4000))


def test_only_what_a_run_has_is_counted() -> None:
    sections = [memory.section for memory in memories(RunConfig(), BILLION)]
    assert sections == ["sft", "prm", "align", "engine", "verifier"]
    bare = replace(RunConfig(), rounds=0, verify=False, engine=EngineConfig(kind=None))
    assert [memory.section for memory in memories(bare, BILLION)] == ["sft"]


def refused(config: RunConfig, gib: float) -> list[str]:
    return list(misfits(config, BILLION, gib * GIB, "the card"))


def test_what_fits_is_not_refused() -> None:
    assert refused(ON_GPUS, 24) == []


def test_a_training_that_cannot_fit_is_refused_by_key_and_figure() -> None:
    """20 bytes a weight at stage 1 in fp32 of one worker: 4 of weights, 4 of gradients, 12 of the optimizer. A
    verifier has a tenth less."""
    assert refused(ON_GPUS, 18)[0] == (
        "sft.zero_stage = 1, align.zero_stage = 1 with trainer.workers = 1 leave each GPU up to 18.6 GiB of weights, "
        "gradients and optimizer states, but the card has 18 GiB; raise them"
    )
    assert refused(replace(ON_GPUS, trainer=TrainerConfig(workers=4, gpus_per_worker=1)), 18) == []
    assert refused(replace(ON_GPUS, trainer=TrainerConfig()), 18) == []  # on CPUs


def test_what_shares_a_gpu_is_added_up() -> None:
    """Stage 1 in fp32 of two workers: 4 + 4 + 6 bytes a weight each. A verifier weighs 1.68 GiB."""
    halves = replace(ON_GPUS, trainer=TrainerConfig(workers=2, gpus_per_worker=0.5))
    assert refused(halves, 27) == []
    assert "leave each GPU up to 26.1 GiB of weights" in refused(halves, 26)[0]
    thirds = replace(ON_GPUS.verifier, workers=8, gpus_per_worker=0.3)
    config = replace(ON_GPUS, engine=EngineConfig(), trainer=TrainerConfig(), verifier=thirds)
    assert refused(config, 5.1) == []
    assert "makes 5.03 GiB of weights, which are on one GPU" in refused(config, 5)[0]


def test_engines_that_share_a_gpu_are_added_up() -> None:
    """Each has 1.86 GiB of weights and 2 GiB of cache, or the share of the GPU that it may use."""
    fixed = replace(ENGINE, workers=1, max_workers=3, gpus_per_worker=0.4, kv_cache_gib=2)
    config = replace(ON_GPUS, engine=fixed, verifier=VerifierConfig(), trainer=TrainerConfig())
    assert refused(config, 7.8) == []
    assert refused(config, 7.7) == [
        "engine.gpus_per_worker = 0.4 puts 2 engines on a GPU, which take 7.73 GiB, but the card has 7.7 GiB"
    ]
    halves = replace(ENGINE, workers=2, gpus_per_worker=0.5, kv_cache_gib=0)
    assert refused(replace(config, engine=replace(halves, gpu_memory_utilization=0.5)), 80) == []
    assert "take 96 GiB" in refused(replace(config, engine=replace(halves, gpu_memory_utilization=0.6)), 80)[0]


def test_an_engine_and_a_verifier_that_share_a_gpu_are_doubted() -> None:
    engine = replace(ENGINE, gpus_per_worker=0.6, gpu_memory_utilization=0.6)
    verifier = replace(ON_GPUS.verifier, gpus_per_worker=0.4)
    config = replace(ON_GPUS, engine=engine, verifier=verifier, trainer=TrainerConfig())
    taken = 0.6 * 4 + verifier_memory(BILLION, verifier).total / GIB
    found = [line for line in doubts(config, BILLION, 4 * GIB, "the card", 1) if "share a GPU" in line]
    assert found == [
        f"an engine and a verifier may share a GPU, and then take up to {taken:.3g} GiB, and the card has 4 GiB; lower "
        "verifier.batch_tokens or what the engine takes"
    ]
    apart = replace(config, verifier=replace(verifier, gpus_per_worker=0.5))
    for other, gib in ((apart, 4), (config, 8)):
        assert not [line for line in doubts(other, BILLION, gib * GIB, "the card", 1) if "share a GPU" in line]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {},
            "engine.tensor_parallel_size = 1 leaves each GPU 1.86 GiB of weights; with 0.0186 GiB for one longest "
            "sequence that is more than the 1.8 GiB of the card that the engine may use by "
            "engine.gpu_memory_utilization = 0.9",
        ),
        (
            {"kv_cache_gib": 0.5},
            "engine.tensor_parallel_size = 1 leaves each GPU 1.86 GiB of weights; with engine.kv_cache_gib = 0.5 "
            "that is more than the 2 GiB of the card that the engine may use",
        ),
        (
            {"kv_cache_gib": 0.01},
            "engine.kv_cache_gib is 0.01, but a sequence of engine.max_model_len = 1000 tokens takes 0.0186 GiB",
        ),
        ({"tensor_parallel_size": 2, "gpus_per_worker": 2}, None),
    ],
)
def test_an_engine_that_cannot_fit_is_refused_by_key_and_figure(engine: dict[str, object], message: str | None) -> None:
    config = replace(ON_GPUS, engine=replace(ENGINE, **engine), trainer=TrainerConfig())  # type: ignore[arg-type]
    assert refused(config, 2) == ([] if message is None else [message])


def test_a_verifier_that_cannot_fit_is_refused() -> None:
    config = replace(ON_GPUS, engine=EngineConfig(), trainer=TrainerConfig())
    assert refused(config, 1) == [
        "verifier.dtype = bfloat16 makes 1.68 GiB of weights, which are on one GPU, but the card has 1 GiB"
    ]


def test_what_may_not_fit_is_doubted() -> None:
    sft = replace(ON_GPUS.sft, micro_batch_tokens=100_000, batch_size=1000)
    found = list(doubts(replace(ON_GPUS, sft=sft), BILLION, 48 * GIB, "the card", 1000))
    assert [line.partition(":")[0] for line in found] == ["sft"]
    shared = replace(ON_GPUS, engine=replace(ENGINE, gpus_per_worker=0.5, max_num_seqs=4000))
    found = list(doubts(shared, BILLION, 48 * GIB, "the card", 1000))
    assert found[0].startswith("engine: the key-value cache has room for 2")
    assert found[1].startswith("engine.gpu_memory_utilization is 0.9 and engine.gpus_per_worker 0.5: ")


def test_workers_on_cpus_are_added_up_against_the_machine() -> None:
    """Each with its libraries, an engine with those of two processes, and what is beside them."""
    engine = replace(ENGINE, gpus_per_worker=0, workers=1, max_workers=2, kv_cache_gib=2)
    config = replace(ON_GPUS, engine=engine, verifier=VerifierConfig(), trainer=TrainerConfig())
    fixed = engine_memory(BILLION, engine)
    engines = 2 * (fixed.total - fixed.kv_cache + 2 * GIB + 1.4 * GIB)
    verifier = verifier_memory(BILLION, config.verifier).total + 0.7 * GIB
    sft = training_memory(BILLION, "sft", config.sft, 1).total + 0.7 * GIB  # as much as ORPO, more than a verifier
    needed = 2.5 * GIB + engines + verifier + sft
    assert list(machine_doubts(config, BILLION, needed)) == []
    (line,) = machine_doubts(config, BILLION, needed - GIB / 2)
    assert line.startswith(f"workers without a GPU may need {needed / GIB:.3g} GiB at a time, ")
    assert f"(engine: {engines / GIB:.3g} GiB, verifier: {verifier / GIB:.3g} GiB, sft: {sft / GIB:.3g} GiB)" in line
    in_turn = replace(config, placement="colocated")
    assert list(machine_doubts(in_turn, BILLION, needed - GIB / 2)) == []
    assert list(machine_doubts(in_turn, BILLION, 2.5 * GIB + max(engines + verifier, sft) - GIB))
    assert list(machine_doubts(ON_GPUS, BILLION, GIB)) == []


def test_frozen_weights_have_neither_gradients_nor_optimizer_states() -> None:
    """Rank 8 on both layers trains 8 * 70,000 of 10^9 weights; the head of a verifier of width 1,000 is 1,001 more."""
    trained, head = 8 * 70_000, 1001
    lora = TrainConfig(dtype="bf16", zero_stage=0, lora=LoraConfig(rank=8))
    memory = training_memory(BILLION, "sft", lora, 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * 10**9, 2 * trained, 12 * trained)
    assert training_memory(BILLION, "prm", lora, 1).gradients == 2 * (trained + head)
    packed = TrainConfig(dtype="bf16", zero_stage=0, lora=LoraConfig(rank=8, targets=["q_proj"], quantize="nf4"))
    few = 8 * 20_000
    assert training_memory(BILLION, "sft", packed, 1).weights == 0.5 * (10**9 - few) + 2 * few
    shared = TrainConfig(dtype="bf16", zero_stage=3, lora=LoraConfig(rank=8))
    assert training_memory(BILLION, "sft", shared, 4).states == (2 * 10**9 + 16 * trained) / 4
