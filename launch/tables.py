"""Where tables of figures are printed."""

import sys

from rich.console import Console

_PIPED_WIDTH = 160


def table_console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for every table in a pipe. Brackets are plain text."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, markup=False, emoji=False, highlight=False)
