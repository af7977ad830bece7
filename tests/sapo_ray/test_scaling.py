"""When a pool grows: worked by hand, and what must hold whatever the load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.scaling import Growth, Load, ScalingConfig, growth, tried_together


@pytest.mark.parametrize(
    ("load", "least", "most", "expected"),
    [
        (Load(waiting=0, ready=0, starting=0, rate=None), 2, 4, 2),  # the least number, whatever waits
        (Load(waiting=0, ready=1, starting=0, rate=5.0), 2, 4, 1),  # one has died
        (Load(waiting=0, ready=0, starting=0, rate=None), 0, 4, None),
        (Load(waiting=1, ready=0, starting=0, rate=None), 0, 4, 1),
        (Load(waiting=900, ready=0, starting=1, rate=None), 0, 4, None),  # no rate is known yet
        (Load(waiting=900, ready=1, starting=0, rate=None), 0, 4, None),
        (Load(waiting=100, ready=1, starting=0, rate=10.0), 0, 4, None),  # 10 s of work
        (Load(waiting=101, ready=1, starting=0, rate=10.0), 0, 4, 1),  # more than that
        (Load(waiting=201, ready=1, starting=1, rate=10.0), 0, 4, 1),  # three would do
        (Load(waiting=900, ready=1, starting=1, rate=10.0), 0, 9, 2),  # at most twice as many at a time
        (Load(waiting=900, ready=2, starting=0, rate=10.0), 0, 3, 1),  # at most `most`
        (Load(waiting=900, ready=2, starting=1, rate=10.0), 0, 3, None),
    ],
)
def test_growth_by_hand(load: Load, least: int, most: int, expected: int | None) -> None:
    decision = growth(load, least, most, grow_after=10.0)
    assert (decision.workers if decision else None) == expected


def test_a_decision_gives_its_figures() -> None:
    decision = growth(Load(waiting=300, ready=1, starting=0, rate=2.5), 0, 8, grow_after=60)
    assert decision == Growth(1, "300 requests would take 120 s at 2.5 a second and worker")


counts = st.integers(0, 50)


@given(
    waiting=st.floats(0, 1e9), ready=counts, starting=counts, rate=st.none() | st.floats(1e-3, 1e3),
    least=counts, more=counts, grow_after=st.floats(1, 1e4),
)  # fmt: skip
def test_a_pool_stays_within_its_bounds_and_comes_to_rest(
    waiting: float, ready: int, starting: int, rate: float | None, least: int, more: int, grow_after: float
) -> None:
    """Growing again and again under the same load ends, with the least number at least and no more than the most."""
    most, workers = least + more, ready + starting
    while decision := growth(Load(waiting, ready, workers - ready, rate), least, most, grow_after):
        assert decision.workers > 0
        workers += decision.workers
    assert workers >= least
    assert workers <= max(most, ready + starting)
    if waiting and most:
        assert workers
    if rate and workers < most:
        assert waiting <= workers * rate * grow_after * (1 + 1e-9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grow_after", 0.0),
        ("shrink_after", -1.0),
        ("hang_after", float("nan")),
        ("max_kills", 1),
        ("hedge_after", -1.0),
    ],
)
def test_impossible_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key} is {value}"):
        ScalingConfig(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kills", "expected"),
    [
        ([1, 1, 1, 1], 4),
        ([1, 1, 2, 2], 2),  # not together with one that may be about to be set aside
        ([2, 1, 1], 1),
        ([2, 2], 1),
    ],
)
def test_who_may_be_set_aside_next_is_tried_alone(kills: list[int], expected: int) -> None:
    assert tried_together(kills, max_kills=3) == expected
    assert tried_together(kills, max_kills=2) == 1
