"""The error that a person reads."""

from __future__ import annotations


class SapoError(Exception):
    """Something a person can mend. The message is one line: what is wrong, where, and what to do."""
