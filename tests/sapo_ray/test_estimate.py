"""The estimate of one prefix against a definition that sees all samples at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_ray.estimate import PrefixCheck


def run(check: PrefixCheck, truth: list[bool], rng: random.Random) -> int:
    """Drive a check with results that arrive in a random order; the most that ran at once."""
    running: list[int] = []
    most = 0
    while not check.decided:
        running += check.launch()
        most = max(most, len(running))
        sample = running.pop(rng.randrange(len(running)))
        check.record(sample, truth[sample])
    return most


@given(
    truth=st.lists(st.booleans(), min_size=1, max_size=8),
    in_flight=st.integers(1, 9),
    early_exit=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_order_of_arrival_gives_the_same_estimate(
    truth: list[bool], in_flight: int, early_exit: bool, seed: int
) -> None:
    check = PrefixCheck(len(truth), in_flight, early_exit)
    most = run(check, truth, random.Random(seed))

    kept = truth.index(True) + 1 if early_exit and any(truth) else len(truth)
    assert check.kept == range(kept)
    assert check.value == any(truth)
    assert check.successes == sum(truth[:kept])
    assert check.launch() == ()
    assert most <= (in_flight if early_exit else len(truth))


def test_a_success_waits_for_the_samples_before_it() -> None:
    check = PrefixCheck(rollouts=8, in_flight=4, early_exit=True)
    assert check.launch() == (0, 1, 2, 3)
    check.record(3, True)
    assert not check.decided
    assert check.launch() == ()
    check.record(0, False)
    check.record(2, False)
    assert not check.decided
    with pytest.raises(RuntimeError, match="nothing is decided"):
        _ = check.kept
    check.record(1, True)
    assert (check.kept, check.value, check.successes) == (range(2), 1, 1)


def test_a_late_result_changes_nothing() -> None:
    check = PrefixCheck(rollouts=4, in_flight=2, early_exit=True)
    assert check.launch() == (0, 1)
    check.record(0, True)
    check.record(1, True)
    check.record(0, True)
    assert (check.kept, check.successes) == (range(1), 1)


def test_results_from_before_a_restart_are_not_asked_for_again() -> None:
    check = PrefixCheck(rollouts=8, in_flight=2, early_exit=True)
    check.record(0, False)
    check.record(3, True)
    assert check.launch() == (1, 2)
    check.record(2, False)
    check.record(1, False)
    assert (check.decided, check.kept) == (True, range(4))


def test_without_early_exit_all_start_at_once_and_all_are_kept() -> None:
    check = PrefixCheck(rollouts=3, in_flight=1, early_exit=False)
    assert check.launch() == (0, 1, 2)
    for sample in (2, 0, 1):
        check.record(sample, sample != 1)
    assert (check.kept, check.value, check.successes) == (range(3), 1, 2)


def test_impossible_results_are_refused() -> None:
    check = PrefixCheck(rollouts=2, in_flight=2, early_exit=True)
    with pytest.raises(ValueError, match="sample 2 is none of the 2"):
        check.record(2, True)
    check.record(0, True)
    with pytest.raises(ValueError, match="sample 0 has been both"):
        check.record(0, False)
