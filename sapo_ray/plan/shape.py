"""The dimensions of a model, without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapo_ray.cache import local_checkpoint
from sapo_ray.models import ModelConfig, random_architecture
from sapo_ray.training import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder-only transformer with gated feed-forward layers, as reasoner and as verifier."""

    architecture: str
    parameters: int
    """Of the reasoner, a causal language model. Tied embeddings count once."""
    verifier_parameters: int
    """Of the verifier: the same without an output layer of its own, with a head of one unit."""
    layers: int
    norms: int
    """Normalisations over the residual stream's width, in all layers and after the last."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    dtype: str
    """What the checkpoint's weights are stored in."""
    linears: Mapping[str, int]
    """The linear layers that may get LoRA's adapters, by name: inputs and outputs of all of that name together."""

    def count(self, training: str) -> int:
        """Weights of the model that the training of this section has."""
        return self.verifier_parameters if training == "prm" else self.parameters

    def trained(self, training: str, lora: LoraConfig | None) -> int:
        """Those of them that it trains: all, or adapters and a verifier's head."""
        if lora is None:
            return self.count(training)
        targets = self.linears if lora.targets is None else lora.targets
        adapters = lora.rank * sum(self.linears.get(name, 0) for name in targets)
        return adapters + (self.hidden + 1 if training == "prm" else 0)


def model_shape(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Shape:
    """The shape of the base model that a config names or describes, from config.json alone.

    Both models are made on torch's meta device, where tensors have shapes and no memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    if config.path is None:
        architecture = random_architecture(config, tokenizer)
    else:
        architecture = AutoConfig.from_pretrained(local_checkpoint(config.path, weights=False), trust_remote_code=False)
    architecture.num_labels = 1
    with torch.device("meta"):
        reasoner = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
        verifier = AutoModelForTokenClassification.from_config(architecture, trust_remote_code=False)
    hidden, heads = architecture.hidden_size, architecture.num_attention_heads
    linears = Counter[str]()
    for name, module in reasoner.base_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears[name.rpartition(".")[2]] += module.in_features + module.out_features
    norms = [m for m in reasoner.modules() if type(m).__name__.endswith("Norm") and m.weight.numel() == hidden]
    return Shape(
        architecture=type(reasoner).__name__,
        parameters=reasoner.num_parameters(),
        verifier_parameters=verifier.num_parameters(),
        layers=architecture.num_hidden_layers,
        norms=len(norms),
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(architecture, "num_key_value_heads", None) or heads,
        head_dim=getattr(architecture, "head_dim", None) or hidden // heads,
        intermediate=getattr(architecture, "intermediate_size", None) or 4 * hidden,
        vocabulary=architecture.vocab_size,
        dtype=str(architecture.dtype or "float32").removeprefix("torch."),
        linears=dict(linears),  # as JSON has it
    )
