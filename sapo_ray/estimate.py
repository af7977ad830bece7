"""The Monte Carlo estimate of one prefix, sample by sample (SAPO, arXiv 2601.20312, eq. 3-5)."""

from __future__ import annotations

from itertools import islice


class PrefixCheck:
    """Decides c_j from samples 0 … T-1 of a prefix: 1 if any reaches the answer.

    With early exit the first success, by sample number and not by arrival, decides; later samples are discarded. So
    what is kept depends on the samples alone, not on how fast each was. Without early exit all samples are kept and,
    since none can be wasted, launched at once.
    """

    def __init__(self, rollouts: int, in_flight: int, early_exit: bool) -> None:
        self._rollouts = rollouts
        self._in_flight = in_flight if early_exit else rollouts
        self._early_exit = early_exit
        self._launched: set[int] = set()
        self._results: dict[int, bool] = {}

    def launch(self) -> tuple[int, ...]:
        """The samples to start now, in order; each is named once. Empty while enough are running or none is needed."""
        room = self._in_flight - len(self._launched - self._results.keys())
        wanted = (s for s in range(self._end) if s not in self._launched and s not in self._results)
        samples = tuple(islice(wanted, max(room, 0)))
        self._launched.update(samples)
        return samples

    def record(self, sample: int, success: bool) -> None:
        """Take in a result, in any order, also one known from before a restart. A repetition of it changes nothing.

        Raises ValueError for a sample out of range or a result that contradicts an earlier one.
        """
        if not 0 <= sample < self._rollouts:
            raise ValueError(f"sample {sample} is none of the {self._rollouts} of this check")
        if self._results.setdefault(sample, success) != success:
            raise ValueError(f"sample {sample} has been both a success and a failure")

    @property
    def decided(self) -> bool:
        """Whether all samples up to the first success (or all there are) have their result."""
        return all(sample in self._results for sample in range(self._end))

    @property
    def kept(self) -> range:
        """The samples that count. Raises RuntimeError before the check is decided."""
        if not self.decided:
            raise RuntimeError(f"the check has results of {sorted(self._results)} only: nothing is decided yet")
        return range(self._end)

    @property
    def successes(self) -> int:
        """Successes among the kept samples."""
        return sum(self._results[sample] for sample in self.kept)

    @property
    def value(self) -> int:
        """The estimate c_j: 1 or 0."""
        return int(self.successes > 0)

    @property
    def _end(self) -> int:
        """One past the last sample that, by what is known so far, is needed."""
        successes = [sample for sample, success in self._results.items() if success and self._early_exit]
        return min(successes, default=self._rollouts - 1) + 1
