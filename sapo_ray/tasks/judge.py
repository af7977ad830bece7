"""The process in which math-verify compares answers: it may take any time, or all memory, over `9^{9^9}`.

Run as a script by `answers.py`. A line of JSON, a number, gold and answer, is answered by the number and `1` or `0`, by
a fork of it. The kernel ends the fork that works too long on one, also where Python would not notice; the next one
takes over, everything imported, and a line says `died`. Over which question, if over any, nobody knows: it is asked
again. math-verify's own time limits, by signals to the main thread, cannot do that, and nothing at all in an actor.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import warnings

CPU_SECONDS = 1.0
"""CPU time after which a comparison ends, its answer wrong."""

_MEMORY = 4 * 2**30
_WARMING = ((r"\frac{1}{2}", "0.5"), (r"2\sqrt{3}", r"\sqrt{12}"), ("(1,x)", "(1,2)"), ("x+1", "y^2"), ("1,2", "2,3"))
"""Compared before the first question: what that imports, compiles and builds, every fork has then."""


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who ask
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for gold, answer in _WARMING:
        agrees(gold, answer)
    print("ready", flush=True)
    while (child := os.fork()) != 0:
        if os.waitpid(child, 0)[1] == 0:
            return
        print("died", flush=True)
    answer_all()


def answer_all() -> None:
    """Answer until the input ends, or a question takes too much."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:  # one at a time: who asks waits for the verdict
        number, gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # which ends who has no handler for it
        verdict = agrees(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(number, int(verdict), flush=True)


def agrees(gold: str, answer: str) -> bool:
    """What math-verify says of two answers in LaTeX."""
    from math_verify import parse, verify

    parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*parsed, timeout_seconds=None))


if __name__ == "__main__":
    main()
