"""Odds-ratio preference optimisation (Hong et al., arXiv 2403.07691):

    L = NLL(chosen) - β · log σ(log odds(chosen) - log odds(rejected)),    odds(p) = p / (1 - p)

where log p is the mean log-probability of the response's tokens. The first part is averaged over the batch's chosen
tokens, the second over its pairs. An example without a rejected solution has the first part only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sapo_ray.encoding import Prompt
from sapo_ray.objectives.base import Batch, Example, Head, Terms, response_nll, response_row, targets

_CERTAIN = -1e-7
"""Highest mean log-probability used. At 0 the odds are infinite and the gradient is not a number."""


@dataclass(frozen=True)
class ORPO:
    beta: float = 0.1
    columns: ClassVar[tuple[str, ...]] = ("question", "chosen_id", "chosen", "rejected_id", "rejected")
    head: ClassVar[Head] = "causal_lm"

    @property
    def weights(self) -> Mapping[str, float]:
        return {"nll": 1.0, "odds_ratio": self.beta}

    def example(
        self, record: Mapping[str, Any], prompt: Callable[[str], Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> Example:
        text = prompt(record["question"])
        solutions = [s for s in (record["chosen"], record["rejected"]) if s is not None]
        rows = tuple(response_row(tokenizer, text, steps, finished=True) for steps in solutions)
        counts = {"nll": targets(rows[0]), "odds_ratio": len(rows) - 1}
        return Example(f"{record['chosen_id']} > {record['rejected_id']}", rows, counts)

    def terms(self, model: nn.Module, batch: Batch) -> Terms:
        nll, row = response_nll(model, batch)
        log_prob = mean_log_probs(nll, row, len(batch.number))
        rejected = batch.number.nonzero()[:, 0]
        return {
            "nll": nll[batch.number[row] == 0].sum(),
            "odds_ratio": odds_ratio_loss(log_prob[rejected - 1], log_prob[rejected]).sum(),
        }


def mean_log_probs(nll: Tensor, row: Tensor, rows: int) -> Tensor:
    """The mean log-probability of each row's response tokens, fp32 [rows], from what `response_nll` gives."""
    return -nll.new_zeros(rows).index_add(0, row, nll) / torch.bincount(row, minlength=rows)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(log odds(chosen) - log odds(rejected)) of mean log-probabilities, fp32 [pairs]."""
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_prob: Tensor) -> Tensor:
    log_prob = log_prob.clamp(max=_CERTAIN)
    return log_prob - torch.log(-torch.expm1(log_prob))
