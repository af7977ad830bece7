"""Cutting a text into steps. Joined with nothing between them they give the text back exactly.

A piece that is only whitespace belongs to the step before it (at the start of the text, to the one after it), so that
every step has content.
"""

from __future__ import annotations

import itertools
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

StepUnit = Literal["line", "paragraph", "sentence", "statement"]

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_PARAGRAPH = re.compile(r"(?s).+?(?:\n[^\S\n]*\n\s*|\Z)")
_SENTENCE_END = re.compile(r"""(?:[.!?…]["'”’)\]}$*]*(?=\s)|\n)\s*""")
_NO_SENTENCE_END = re.compile(
    r"""(?:(?:^|[\s("'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|No|vs|etc|e\.g|i\.e|approx)|^\s*[0-9]+)\.$"""
)
"""A sentence so far whose full stop ends a title, an initial, an abbreviation or the number of a list's item."""
_FENCE = re.compile(r"\s*```[\w+-]*\s*")
_OPEN = "EOF in multi-line"
"""What a `tokenize.TokenError` says of brackets and strings that are never closed, in any version of Python."""


def split_steps(text: str, unit: StepUnit) -> tuple[str, ...]:
    """The steps of a text.

    `line`: ended by a newline. `paragraph`: by one or more blank lines. `sentence`: by `.`, `!`, `?` or `…` before
    whitespace, or by a newline; not by the stop of a common abbreviation, an initial or a list's number. `statement`:
    a logical line of Python, which goes on within brackets and triple quotes; what a cut-off text leaves open is one
    last step, and the fences of a Markdown code block count as whitespace.

    A text without content is one step, and the empty text none.
    """
    cut: dict[StepUnit, Callable[[str], Iterable[str]]] = {
        "line": _LINE.findall,
        "paragraph": _PARAGRAPH.findall,
        "sentence": _sentences,
        "statement": _statements,
    }
    is_empty = _is_fence if unit == "statement" else str.isspace
    return tuple(_with_content(cut[unit](text), is_empty))


def _with_content(pieces: Iterable[str], is_empty: Callable[[str], bool]) -> Iterator[str]:
    step = ""
    for piece in pieces:
        if step and not is_empty(step) and not is_empty(piece):
            yield step
            step = ""
        step += piece
    if step:
        yield step


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for found in _SENTENCE_END.finditer(text):
        if _NO_SENTENCE_END.search(text[start : found.start() + 1]):
            continue
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _statements(text: str) -> Iterator[str]:
    lines, start = _LINE.findall(text), 0
    while start < len(lines):
        end = _statement_end(lines, start)
        yield "".join(lines[start:end])
        start = end


def _is_fence(text: str) -> bool:
    return text.isspace() or _FENCE.fullmatch(text) is not None


def _statement_end(lines: list[str], start: int) -> int:
    """The number of the line after the logical line that begins with the line `start`, whatever its indentation."""
    rest = itertools.chain([lines[start].lstrip(" \t")], itertools.islice(lines, start + 1, None))
    try:
        for number, token in enumerate(tokenize.generate_tokens(lambda: next(rest, ""))):
            if token.type == tokenize.NEWLINE:
                return start + token.start[0]
            if number == 0 and token.type in (tokenize.COMMENT, tokenize.NL):
                return start + 1
    except tokenize.TokenError as error:
        if _OPEN in error.args[0] and not any(map(_FENCE.fullmatch, lines[start + 1 :])):
            return len(lines)  # but prose before a code block, or a block that is no Python, goes a line at a time
    except SyntaxError:  # no Python: a line at a time
        pass
    return start + 1
