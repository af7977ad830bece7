"""Adapters by PEFT, and the plain model that comes of them, as transformers loads it."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from sapo_ray.errors import SapoError
from sapo_ray.lora import merge, quantization, with_adapters
from sapo_ray.models import ModelConfig, save_random_reasoner
from sapo_ray.objectives.base import Head
from sapo_ray.tasks.chain import VOCABULARY
from sapo_ray.training import LoraConfig

IDS = torch.tensor([[2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2]])
CONFIG = LoraConfig(rank=4, alpha=12)
both_heads = pytest.mark.parametrize("head", ["causal_lm", "token_classification"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "base"
    save_random_reasoner(
        ModelConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128), VOCABULARY, seed=0, path=path
    )
    return path


def load(path: Path, head: Head, **options: Any) -> Any:
    """Without dropout, its head drawn from a seed where the checkpoint has none."""
    torch.manual_seed(1)
    if head == "causal_lm":
        return AutoModelForCausalLM.from_pretrained(path, **options)
    return AutoModelForTokenClassification.from_pretrained(path, num_labels=1, **options)


def trained(model: peft.PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def learn(model: peft.PeftModel) -> dict[str, Tensor]:
    """Three updates; the first moves no A, since B begins at 0. The weights that were trained."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model(input_ids=IDS, use_cache=False).logits - 1).square().mean().backward()
        optimizer.step()
    return trained(model)


@both_heads
def test_a_merged_model_says_what_its_adapters_say(base: Path, tmp_path: Path, head: Head) -> None:
    adapted = with_adapters(load(base, head), CONFIG, head)
    before = adapted(input_ids=IDS).logits
    weights = learn(adapted)
    after = adapted(input_ids=IDS).logits
    assert (after - before).abs().max() > 0.1
    merged = merge(with_adapters(load(base, head), CONFIG, head), weights, torch.float32)
    torch.testing.assert_close(merged(IDS).logits, after, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    loaded, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(IDS).logits, after, atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@both_heads
def test_nothing_but_targets_and_a_new_head_changes(base: Path, head: Head) -> None:
    config = LoraConfig(rank=4, targets=["q_proj", "down_proj"])
    adapted = with_adapters(load(base, head), config, head)
    weights = learn(adapted)
    merged = merge(with_adapters(load(base, head), config, head), weights, torch.float32)
    before = load(base, head).state_dict()
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    targets = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert changed == targets | ({"score.weight", "score.bias"} if head == "token_classification" else set())


@both_heads
def test_the_state_of_a_training_is_what_it_trains(base: Path, head: Head) -> None:
    """The tied output embeddings, too, are frozen and left out."""
    adapted = with_adapters(load(base, head), CONFIG, head)
    assert adapted.state_dict().keys() == trained(adapted).keys()
    layers = 7 * 2
    assert len(adapted.state_dict()) == 2 * layers + (2 if head == "token_classification" else 0)


def test_merged_weights_may_be_narrower_than_those_that_were_trained(base: Path) -> None:
    adapt = partial(with_adapters, config=CONFIG, head="causal_lm")
    weights = learn(adapt(load(base, "causal_lm")))
    exact, rounded = (
        merge(adapt(load(base, "causal_lm")), weights, dtype).state_dict() for dtype in (torch.float32, torch.bfloat16)
    )
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in rounded.items())


def test_gradients_are_the_same_with_gradient_checkpointing(base: Path) -> None:
    gradients = []
    for on in (False, True):
        model = load(base, "causal_lm").train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted = with_adapters(model, CONFIG, "causal_lm")
        adapted(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert any(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "layers"])
def test_a_target_that_is_no_layer_of_the_model_is_named(base: Path, target: str) -> None:
    config = LoraConfig(targets=["v_proj", target])
    with pytest.raises(
        ValueError, match=rf"^lora.targets: {target} is none of the layers down_proj, gate_proj, k_proj"
    ):
        with_adapters(load(base, "causal_lm"), config, "causal_lm")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_named() -> None:
    assert quantization(LoraConfig(), "causal_lm", torch.float32) is None
    with pytest.raises(
        SapoError, match=r"^lora.quantize is nf4, but bitsandbytes is missing: pip install bitsandbytes$"
    ):
        quantization(LoraConfig(quantize="nf4"), "causal_lm", torch.float32)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which no lock pins")
@both_heads
def test_adapters_of_quantized_weights_are_merged_into_the_exact_ones(base: Path, head: Head) -> None:
    config = LoraConfig(rank=4, alpha=12, quantize="nf4")
    packed = load(base, head, quantization_config=quantization(config, head, torch.float32))
    adapted = with_adapters(packed, config, head)
    weights = learn(adapted)
    merged = merge(with_adapters(load(base, head), CONFIG, head), weights, torch.float32)
    assert {weight.dtype for weight in merged.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(merged(IDS).logits, adapted(input_ids=IDS).logits, atol=0.2, rtol=0)
