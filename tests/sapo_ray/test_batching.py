from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.batching import WINDOW, Shape, global_batches, micro_batches

LIMIT = 200
SHAPES = st.lists(st.builds(Shape, rows=st.integers(1, 2), tokens=st.integers(1, LIMIT // 2)), min_size=1, max_size=60)


@given(shapes=SHAPES, batch_size=st.integers(1, 9), seed=st.integers(0, 5), epoch=st.integers(0, 2))
def test_an_epoch_holds_every_example_once_in_full_batches_and_one_remainder(
    shapes: list[Shape], batch_size: int, seed: int, epoch: int
) -> None:
    batches = global_batches(shapes, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    full, remainder = divmod(len(shapes), batch_size)
    assert sorted(len(batch) for batch in batches) == [remainder] * (remainder > 0) + [batch_size] * full


@given(shapes=SHAPES, limit=st.integers(LIMIT, 2 * LIMIT), world_size=st.integers(1, 5))
def test_micro_batches_keep_within_the_limit_and_give_every_rank_equally_many_steps(
    shapes: list[Shape], limit: int, world_size: int
) -> None:
    batch = list(range(len(shapes)))
    ranks = micro_batches(batch, shapes, limit, world_size)
    assert sorted(i for rank in ranks for step in rank for i in step) == batch
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1
    for step in (step for rank in ranks for step in rank if step):
        assert sum(shapes[i].rows for i in step) * max(shapes[i].tokens for i in step) <= limit


def test_seed_and_epoch_change_the_order() -> None:
    shapes = [Shape(1, 10)] * 100
    plans = [global_batches(shapes, 10, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert plans[0] == plans[3]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


def test_batches_hold_examples_of_like_length() -> None:
    """Two lengths, half each: sorted windows leave few batches that mix them, shuffled ones nearly all."""
    shapes = [Shape(1, 10 + 90 * (i % 2)) for i in range(2 * WINDOW * 16)]
    batches = global_batches(shapes, 16, seed=0, epoch=0)
    assert sum(len({shapes[i].tokens for i in batch}) > 1 for batch in batches) <= 2


def test_a_batch_is_spread_over_the_ranks_even_where_it_fits_one() -> None:
    assert micro_batches([0, 1, 2], [Shape(1, 5)] * 3, 100, world_size=2) == [[[0, 2]], [[1]]]


def test_a_rank_without_examples_steps_all_the_same() -> None:
    assert micro_batches([0], [Shape(1, 5)], 100, world_size=3) == [[[0]], [[]], [[]]]


def test_an_example_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="example 1 is 2 x 60 tokens, more than micro_batch_tokens = 100"):
        micro_batches([0, 1], [Shape(1, 5), Shape(2, 60)], 100, world_size=1)
