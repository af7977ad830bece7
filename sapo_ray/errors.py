"""The error that a person reads."""

from __future__ import annotations


class SapoError(Exception):
    """Something a person can mend. The message is one line: what is wrong, where, and what to do."""


_LONGEST = 1000
"""Characters of a foreign error's text that are told: Ray's and compilers' go on for pages."""


def one_line(error: BaseException) -> str:
    """An error's text with its line breaks gone, and cut where it gets long and is not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SapoError) or len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def told(error: BaseException) -> str:
    """An error in one line: the text of a SapoError, that of any other after its type."""
    text = one_line(error)
    return text if isinstance(error, SapoError) else f"{type(error).__name__}: {text}"
