"""What an objective is: from a record to an example, and from a micro-batch of examples to sums of loss terms.

A loss is the weighted sum of terms. Each term is normalised over the *global* batch: an objective returns its terms as
sums over the micro-batch, an example knows by how much it raises the count that each term is divided by, and so the
loss of a batch is the same however the batch is cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sapo_ray.batching import Shape
from sapo_ray.encoding import Encoded, Prompt, encode

IGNORE = -100
"""Label of a token that is no target (transformers' value)."""

Head = Literal["causal_lm", "token_classification"]

Terms = dict[str, Tensor]
"""Loss terms by name: scalar fp32 sums over a micro-batch."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence and, for each of its tokens, a label: the target there, or `IGNORE`."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Example:
    """The sequences of one record, and what it adds to the count of each loss term."""

    id: str
    rows: tuple[Row, ...]
    counts: Mapping[str, int]

    @property
    def shape(self) -> Shape:
        return Shape(len(self.rows), max(len(row.ids) for row in self.rows))

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences. No attention mask: under causal attention no token sees the padding behind it."""

    ids: Tensor
    """int64 [rows, width]"""
    labels: Tensor
    """int64 [rows, width]"""
    number: Tensor
    """int64 [rows]: the row's place in its example. The rows of an example follow each other."""
    first: int
    """The first column that holds a label in any row; at least 1 for language models."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.ids.to(device), self.labels.to(device), self.number.to(device), self.first)


class Objective(Protocol):
    """See the module's text."""

    columns: ClassVar[tuple[str, ...]]
    """The Parquet columns that `example` reads."""
    head: ClassVar[Head]
    """The model it trains; `token_classification` has one label."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term in the loss."""

    def example(
        self, record: Mapping[str, Any], prompt: Callable[[str], Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> Example:
        """A stored record as tokens. `prompt` turns a question into what the reasoner goes on from."""

    def terms(self, model: nn.Module, batch: Batch) -> Terms:
        """The loss terms of a micro-batch, from one forward pass."""


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """The rows of all examples, padded on the right."""
    rows = [row for example in examples for row in example.rows]
    width = max(len(row.ids) for row in rows)
    labels = torch.tensor([row.labels + [IGNORE] * (width - len(row.labels)) for row in rows])
    return Batch(
        ids=torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        labels=labels,
        number=torch.tensor([number for example in examples for number in range(len(example.rows))]),
        first=int((labels != IGNORE).any(0).nonzero()[0]),
    )


def response_row(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, steps: Sequence[str], *, finished: bool) -> Row:
    """A solution whose targets are its response tokens: its steps and, where `finished`, the end of sequence."""
    encoded: Encoded = encode(tokenizer, prompt, steps, finished=finished)
    return Row(encoded.ids, [IGNORE] * encoded.prompt_length + encoded.ids[encoded.prompt_length :])


def targets(row: Row) -> int:
    """The number of labelled tokens."""
    return sum(label != IGNORE for label in row.labels)


def response_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of every response token, fp32 [n], and the row each stands in, int64 [n].

    Logits are computed from the shortest prompt's end on, and raised to fp32 where there is a target.
    """
    wanted = batch.labels[:, batch.first :]
    mask = wanted != IGNORE
    # Columns by number, not by how many: for that, models take a slice, and torch's product of a slice and a head that
    # is frozen, as adapters leave it, copies the head once a row.
    before = torch.arange(batch.first - 1, batch.ids.shape[1] - 1, device=batch.ids.device)
    logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=before).logits
    nll = F.cross_entropy(logits[mask].float(), wanted[mask], reduction="none")
    return nll, mask.nonzero()[:, 0]
