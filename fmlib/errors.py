"""Errors that name what was wrong, what would be right, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, given: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not among the choices: it lists them, and names the closest."""
    choices = list(choices)
    close = difflib.get_close_matches(str(given), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {given!r}: {', '.join(choices)}{hint}")
