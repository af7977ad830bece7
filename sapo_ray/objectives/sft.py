"""Supervised fine-tuning: the negative log-likelihood of the response, per response token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from sapo_ray.encoding import Prompt
from sapo_ray.objectives.base import Batch, Example, Head, Terms, response_nll, response_row, targets


@dataclass(frozen=True)
class SFT:
    columns: ClassVar[tuple[str, ...]] = ("trajectory_id", "question", "steps", "truncated")
    head: ClassVar[Head] = "causal_lm"

    @property
    def weights(self) -> Mapping[str, float]:
        return {"nll": 1.0}

    def example(
        self, record: Mapping[str, Any], prompt: Callable[[str], Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> Example:
        text = prompt(record["question"])
        row = response_row(tokenizer, text, record["steps"], finished=not record["truncated"])
        return Example(record["trajectory_id"], (row,), {"nll": targets(row)})

    def terms(self, model: nn.Module, batch: Batch) -> Terms:
        return {"nll": response_nll(model, batch)[0].sum()}
