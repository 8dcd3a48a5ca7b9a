"""Errors that name what was wrong, what would be right, and what was probably meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping


def unknown(what: str, given: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not among the choices: it lists them, and names the closest."""
    choices = list(choices)
    close = difflib.get_close_matches(str(given), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {given!r}: {', '.join(choices)}{hint}")


def named_value(what: str, text: str, defaults: Mapping[str, float | None]) -> tuple[str, str]:
    """``name`` or ``name:value`` as the name and the value's text, the default's if none is given.

    A default of None means that the name takes no value, and its text is "". Raises ValueError for
    an unknown name, or a value that is not wanted.
    """
    name, colon, given = text.partition(":")
    if name not in defaults:
        raise unknown(what, name, defaults)
    default = defaults[name]
    if default is None:
        if colon:
            raise ValueError(f"{name} takes no value, not {given!r}")
        return name, ""
    return name, given if colon else f"{default:g}"


def require_positive(what: str, value: float, *, zero: bool = False) -> None:
    """Raise ValueError unless `value` is finite and above 0, or 0 itself if `zero`."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{what} must be {'at least' if zero else 'above'} 0, not {value!r}")


def require_whole(what: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an int, no bool, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be a whole number, at least {least}, not {value!r}")
