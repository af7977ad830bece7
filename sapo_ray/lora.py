"""LoRA (Hu et al., arXiv 2106.09685) by PEFT: adapters beside a model's frozen weights, and their merge into these."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import peft
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from sapo_ray.errors import SapoError
from sapo_ray.objectives.base import Head
from sapo_ray.training import LoraConfig


def with_adapters(model: PreTrainedModel, config: LoraConfig, head: Head) -> peft.PeftModel:
    """`model` with adapters, drawn from torch's generator; all else is frozen but a token classifier's new head.

    Raises ValueError for a target that is none of its linear layers.
    """
    body = model.base_model_prefix
    layers = {
        name: name.rpartition(".")[2]
        for name, module in model.base_model.named_modules(prefix=body)
        if isinstance(module, nn.Linear)
    }
    kinds = sorted(set(layers.values()))
    targets = kinds if config.targets is None else config.targets
    if unknown := set(targets) - set(kinds):
        raise ValueError(f"lora.targets: {', '.join(sorted(unknown))} is none of the layers {', '.join(kinds)}")
    heads = {name.partition(".")[0] for name, _ in model.named_parameters()} - {body}
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=[name for name, kind in layers.items() if kind in targets],
        modules_to_save=sorted(heads) if head == "token_classification" else None,
    )
    adapted = peft.get_peft_model(model, adapters)
    adapted.register_state_dict_post_hook(_keep_trained)
    return adapted


def _keep_trained(model: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """Make mid-training checkpoints small. DeepSpeed can leave out frozen weights, too, but not those that are tied."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in state.keys() - trained:
        del state[name]


def merge(model: peft.PeftModel, trained: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The plain model that `model` is with the weights `trained`, named as its own: W + alpha / rank · B · A."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    merged: PreTrainedModel = model.merge_and_unload().to(dtype)
    return merged


def quantization(config: LoraConfig, head: Head, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers is to load the frozen weights; `dtype` is what is computed in. Raises SapoError where the
    package for it is missing."""
    if config.quantize is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise SapoError(f"lora.quantize is {config.quantize}, but bitsandbytes is missing: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # A new head is trained. Transformers has these names for one, and would pack it; it leaves a language model's.
        llm_int8_skip_modules=["classifier", "score"] if head == "token_classification" else None,
    )
