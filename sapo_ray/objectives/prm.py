"""Process reward model: the squared error of a step's score against its label (SAPO eq. 6, averaged over steps)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sapo_ray.data import MASKED
from sapo_ray.encoding import Prompt, encode
from sapo_ray.objectives.base import IGNORE, Batch, Example, Head, Row, Terms, targets


@dataclass(frozen=True)
class PRM:
    columns: ClassVar[tuple[str, ...]] = ("trajectory_id", "question", "steps", "step_labels")
    head: ClassVar[Head] = "token_classification"

    @property
    def weights(self) -> Mapping[str, float]:
        return {"mse": 1.0}

    def example(
        self, record: Mapping[str, Any], prompt: Callable[[str], Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> Example:
        steps, step_labels = record["steps"], record["step_labels"]
        if len(step_labels) != len(steps):
            raise ValueError(f"step_labels has {len(step_labels)} entries for {len(steps)} steps")
        encoded = encode(tokenizer, prompt(record["question"]), steps)
        labels = [IGNORE] * len(encoded.ids)
        for end, label in zip(encoded.step_ends, step_labels, strict=True):
            if label not in (0, 1, MASKED):
                raise ValueError(f"step_labels holds {label}; a label is 0, 1 or {MASKED} (masked)")
            labels[end] = IGNORE if label == MASKED else label
        row = Row(encoded.ids, labels)
        return Example(record["trajectory_id"], (row,), {"mse": targets(row)})

    def terms(self, model: nn.Module, batch: Batch) -> Terms:
        logits = model(input_ids=batch.ids, use_cache=False).logits[..., 0]
        mask = batch.labels != IGNORE
        scores = torch.sigmoid(logits[mask].float())
        return {"mse": (scores - batch.labels[mask]).square().sum()}
