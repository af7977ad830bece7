"""The coordinator benchmark: what it makes of its stages, and one small stage for real."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import coordinator
from benchmarks.coordinator import Figures, busy_workers, exponent, stage, utilisation

FIGURES = Figures(trajectories=1000, seconds=10.0, engine_seconds=40.0, cpu_seconds=5.0, peak_mb=500.0)


def test_time_that_grows_with_the_square_has_exponent_two() -> None:
    stages = [replace(FIGURES, trajectories=10**n, seconds=3.0 * 100**n) for n in (2, 3, 5)]
    assert exponent(stages) == pytest.approx(2.0)
    assert exponent(stages[:1]) is None


def test_four_busy_engines_are_half_of_eight() -> None:
    assert utilisation(FIGURES, 8) == 0.5


@pytest.mark.parametrize(
    ("fed", "slow_down", "expected"),
    [
        (1000.0, 1.0, 256),  # no more than are asked for
        (10.0, 1.0, 10),
        (10.0, 0.8, 1),  # none reaches it: the fewest that were tried
        (0.5, 1.0, 1),
    ],
)
def test_workers_are_as_many_as_are_busy(
    monkeypatch: pytest.MonkeyPatch, fed: float, slow_down: float, expected: int
) -> None:
    def simulated(trajectories: int, workers: int, method: str) -> Figures:
        assert (trajectories, method) == (1000, "stream_all")
        return replace(FIGURES, engine_seconds=slow_down * FIGURES.seconds * workers)

    monkeypatch.setattr(coordinator, "stage", simulated)
    assert busy_workers(1000, fed)[0] == expected


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("method", ["stream_all", "sample_then_label"])
def test_a_stage_of_simulated_workers_is_measured(method: str) -> None:
    figures = stage(80, 2, method)
    assert 20 <= figures.trajectories <= 80
    assert figures.seconds > figures.cpu_seconds > 0
    assert figures.engine_seconds > 0
    assert figures.peak_mb > 50
