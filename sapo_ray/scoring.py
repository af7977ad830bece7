"""Step scores ĉ_j of a verifier: one forward pass scores every step of every trajectory in it (SAPO, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel

from sapo_ray.encoding import Encoded
from sapo_ray.errors import SapoError
from sapo_ray.models import attention


def load_verifier(
    checkpoint: str, dtype: torch.dtype = torch.float32, device: str = "cpu", asked: str | None = None
) -> PreTrainedModel:
    """The token classifier with one label in the directory `checkpoint`, ready to score; `asked`: see
    `models.attention`.

    Raises SapoError for a checkpoint of another kind, whose head would be missing or ambiguous.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    kind = (config.architectures or ["no architecture"])[0]
    if not kind.endswith("ForTokenClassification") or config.num_labels != 1:
        raise SapoError(
            f"{checkpoint} holds {kind} with num_labels = {config.num_labels}; a verifier is a "
            "…ForTokenClassification with num_labels = 1"
        )
    model: PreTrainedModel = AutoModelForTokenClassification.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation=attention(config, asked), trust_remote_code=False
    )
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()  # type: ignore[no-any-return]


def score(model: PreTrainedModel, encoded: Sequence[Encoded], batch_tokens: int) -> list[list[float]]:
    """ĉ_j of every step, one list a trajectory: see `score_by_length`."""
    scores: list[list[float]] = [[] for _ in encoded]
    for i, found in score_by_length(model, encoded, batch_tokens):
        scores[i] = found
    return scores


def score_by_length(
    model: PreTrainedModel, encoded: Sequence[Encoded], batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """The index of a trajectory and its ĉ_j, one number a step: short trajectories first, each as soon as it is scored.

    ĉ_j is the probability that step j is right by the logits at its last token, in fp32: sigmoid of one logit, or
    softmax of two, for wrong and right. Trajectories of like length share a forward pass of at most `batch_tokens`
    tokens, padding included. A score depends on the company in its batch by rounding alone: less than 1e-5 for an fp32
    model.
    """
    for batch in _batches([len(e.ids) for e in encoded], batch_tokens):
        logits = _logits(model, [encoded[i].ids for i in batch])
        for row, i in zip(logits, batch, strict=True):
            yield i, _right(row[encoded[i].step_ends].float()).tolist()


def _right(logits: torch.Tensor) -> torch.Tensor:
    """The probability of "right" [steps] by logits [steps, 1 or 2]."""
    return torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)[:, 1]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in order of length, cut where one more would exceed `batch_tokens` (count x longest)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _logits(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Logits [rows, longest, 1 or 2] of right-padded rows. Causal attention never looks at the padding on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.cpu()
