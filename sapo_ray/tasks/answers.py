"""Final answers of mathematics: how a solution states one, and whether it agrees with the gold answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

from sapo_ray.errors import SapoError

Convention = Literal["hashes", "boxed"]

MAX_LENGTH = 400
"""Characters of an answer; a longer one is wrong without a look at it, if it is not the gold answer's text."""

_HASHES = re.compile(r"^[^\S\n]*####[^\S\n]*(\S.*?)[^\S\n]*$", re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_UNIT = re.compile(r"\s*(?<!^)\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}(\^(?:\{?\d\}?))?$|(?<=\d)_\{?(\d+)\}?$")
"""What stands behind a value: a unit, or the base that a number is written in."""
_NUMBER = re.compile(
    r"""(?P<sign>[-+−]?)\s*(?:\\?[$€£])?\s*(?P<sign2>[-+−]?)
        (?:(?P<whole>\d+)[ ]+(?=\d+/))?                    # 1 1/2
        (?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)
        (?:/(?P<below>\d+))?
        \s*(?P<percent>\\?%|percent\b)?
        (?P<unit>\s+[A-Za-z]{2,}(?:\s[A-Za-z]+)*(?:/[A-Za-z]+)?|/[A-Za-z]{2,}|\s?°[CF]?|[€£¢])?""",
    re.VERBOSE,
)
_NO_UNIT = re.compile(
    r"""\b(?:hundred|thousand|million|billion|trillion|dozen|grand|percent|pi|half|halve|sqrt|squared|cubed
        |third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth
        |and|or|to|over|mod|plus|minus|times|divided|multiplied|point|remainder|is|are|was|equals?|not)s?\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Words that change a number or stand between two."""
_WORDS = re.compile(r"[A-Za-z]{4,}(?:[ -][A-Za-z]+)*")
_FRACTION_SIGN = re.compile("[¼-¾⅐-⅞]")
_AND = re.compile(r"(?<=[\d)}\]$]),?\s+and\s+(?=[-+−]?[\d.(\[$\\])")
"""Between two values, not between words."""
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|\\left(?![a-z])|\\right(?![a-z])|~|\{,\}(?=\d{3})")


def read_answer(text: str, convention: Convention) -> str | None:
    """The answer that a solution states by a convention, else by the other one; None where it states none.

    `hashes`: the rest of the last line that begins with `####` (GSM8K). `boxed`: the braces of the last `\\boxed{…}`
    or `\\fbox{…}`, or the one character after it (MATH).
    """
    read = {"hashes": _read_hashes, "boxed": _read_boxed}
    first = read.pop(convention)
    (other,) = read.values()
    return first(text) or other(text)


def _read_hashes(text: str) -> str | None:
    found = _HASHES.findall(text)
    return found[-1] if found else None


def _read_boxed(text: str) -> str | None:
    """A box that is not closed states nothing."""
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        return text[start : start + 1].strip() or None
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[start + 1 : start + found.start()].strip() or None
    return None


@lru_cache(maxsize=2**16)
def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers mean the same.

    Equal texts do, words whatever their case, and plain numbers by their exact values: commas and a currency sign do
    not count, and 50% is 50 and 0.5 alike. All else is math-verify's to say. A unit, or a number's base, counts only
    where both state one.
    """
    if answer == gold:
        return True
    if len(answer) > MAX_LENGTH:
        return False
    (one, unit), (other, gold_unit) = _without_unit(_cleaned(answer)), _without_unit(_cleaned(gold))
    if unit and gold_unit and unit != gold_unit:
        return False
    if one == other:
        return True
    if _WORDS.fullmatch(one) or _WORDS.fullmatch(other):  # math-verify takes them for products of their letters
        return one.casefold() == other.casefold()
    number, gold_number = _plain_number(one), _plain_number(other)
    if number is None or gold_number is None:
        return _judge.agrees(number.latex if number else one, gold_number.latex if gold_number else other)
    if number.unit and gold_number.unit and number.unit != gold_number.unit:
        return False
    values = {number.value, gold_number.value}
    if number.percent != gold_number.percent:
        return len(values) == 1 or (number if number.percent else gold_number).value / 100 in values
    return len(values) == 1


def same_text(answer: str, gold: str) -> bool:
    """Whether two answers are the same text, but for letters' case, whitespace and a full stop at the end."""
    one, other = (" ".join(text.split()).casefold().removesuffix(".") for text in (answer, gold))
    return one == other


class _Number(NamedTuple):
    value: Fraction
    percent: bool
    unit: str

    @property
    def latex(self) -> str:
        return f"\\frac{{{self.value.numerator}}}{{{self.value.denominator}}}" + (r"\%" if self.percent else "")


def _plain_number(text: str) -> _Number | None:
    """A number as GSM8K and people write it, with what comes after it; None for anything else."""
    found = _NUMBER.fullmatch(text)
    if found is None or _NO_UNIT.search(found["unit"] or "") or (found["sign"] and found["sign2"]):
        return None
    value = Fraction(found["number"].replace(",", "").removesuffix("."))
    if found["below"]:
        if not int(found["below"]):
            return None
        value = value / int(found["below"]) + int(found["whole"] or 0)
    negative = (found["sign"] or found["sign2"]) in ("-", "−")
    return _Number(-value if negative else value, bool(found["percent"]), _unit(found["unit"] or ""))


def _cleaned(text: str) -> str:
    """Without emphasis and dollar signs around it, spacing commands and a full stop at the end; a text that is all
    `\\text` bare, `½` as `1/2`, and `1 and 2` as `1, 2`."""
    text = _FRACTION_SIGN.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("⁄", "/"), text)
    text = _AND.sub(", ", text)
    text = _SPACING.sub("", text.strip().strip("*`")).removesuffix(".").strip()
    for pattern in (r"\$([^$]*)\$", r"\\\((.*)\\\)", r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}"):
        found = re.fullmatch(pattern, text)
        text = found[1].strip() if found else text
    return re.sub(r"\\[dt]frac", r"\\frac", text)


def _without_unit(text: str) -> tuple[str, str]:
    found = _UNIT.search(text)
    if found is None:
        return text, ""
    value = text[: found.start()]
    if _NO_UNIT.search(found[1] or ""):
        return f"{value} {found[1].strip()}", ""
    return value, "".join(map(_unit, found.groups(default="")))


def _unit(text: str) -> str:
    return text.strip().rstrip(".").casefold().removesuffix("s")


class _Judge:
    """Asks math-verify, in a process of its own that is started when it is needed (see `judge.py`)."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._asked = 0
        self._process: subprocess.Popen[str] | None = None

    def agrees(self, answer: str, gold: str) -> bool:
        """False, too, where math-verify does not come to an end, or makes nothing of one of them.

        Raises SapoError where it cannot be started.
        """
        with self._lock:
            for _ in range(2):  # what answers may have died before it was asked
                verdict = self._ask(answer, gold)
                if verdict is not None:
                    return verdict
            if self._process is None:
                raise SapoError(f"math-verify died twice over the answers {answer!r} and {gold!r}")
        return False

    def _ask(self, answer: str, gold: str) -> bool | None:
        """The verdict. None where a fork of the process died, or the process itself, which is started anew then."""
        process = self._process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        self._asked += 1
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps([self._asked, gold, answer]) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if line == "died\n":
                return None
            number, verdict = line.split()
            if int(number) == self._asked:  # not of a question that was asked again, or whose asker was interrupted
                return verdict == "1"
        process.kill()
        process.wait()
        self._process = None
        return None

    def _start(self) -> subprocess.Popen[str]:
        """-P: what lies beside the script is not what it imports."""
        command = [sys.executable, "-P", str(Path(__file__).with_name("judge.py"))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise SapoError(f"answers cannot be compared: math-verify did not start; try: {' '.join(command)}")
        return process


_judge = _Judge()
