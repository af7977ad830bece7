"""Which examples an update learns from, and how they are cut into forward passes.

The global batches depend on the examples, the batch size, the seed and the epoch alone. Only how a batch is cut into
micro-batches depends on the number of workers and their memory, so neither changes what is learned.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 8
"""Batches that are sorted by length together: large enough to save padding, small enough to keep batches mixed."""


class Shape(NamedTuple):
    """What an example asks of a batch: its number of sequences (two for a pair), and the tokens of the longest."""

    rows: int
    tokens: int


def global_batches(shapes: Sequence[Shape], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as indices into `shapes`; each index occurs once, the remainder is a smaller batch.

    Examples are shuffled, sorted by length within windows of `WINDOW` batches, cut, and the batches shuffled again.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(shapes)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda i: shapes[i].tokens)
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches


def micro_batches(
    batch: Sequence[int], shapes: Sequence[Shape], micro_batch_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """A global batch as `[rank][step][example]`, every padded micro-batch within `micro_batch_tokens`.

    All ranks get equally many steps, because each step is a collective; one that has no examples left gets an empty
    step. Raises ValueError for an example that exceeds `micro_batch_tokens` by itself.
    """
    longest_first = sorted(batch, key=lambda i: -shapes[i].tokens)
    ranks = [_cut(longest_first[rank::world_size], shapes, micro_batch_tokens) for rank in range(world_size)]
    steps = max(len(cut) for cut in ranks)
    return [cut + [[] for _ in range(steps - len(cut))] for cut in ranks]


def _cut(longest_first: Sequence[int], shapes: Sequence[Shape], limit: int) -> list[list[int]]:
    steps: list[list[int]] = []
    rows = width = 0
    for i in longest_first:
        if shapes[i].rows * shapes[i].tokens > limit:
            raise ValueError(
                f"example {i} is {shapes[i].rows} x {shapes[i].tokens} tokens, more than micro_batch_tokens = {limit}"
            )
        if not steps or (rows + shapes[i].rows) * width > limit:
            steps.append([])
            rows, width = 0, shapes[i].tokens
        steps[-1].append(i)
        rows += shapes[i].rows
    return steps
