"""Numbers and words for the prose of a chapter.

A chapter's text quotes what its cells measured: ``say("name", ...)`` in a cell and
``{glue:text}`name``` in the text. Measured numbers with a name of their own go through
`runs.metric` instead, which also records them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from . import runs
from .stats import Interval

__all__ = ["key", "listed", "say", "text"]


def key(name: str) -> str:
    """A name of an encoder, layer or edit as part of a metric's name: other signs become _."""
    return re.sub(r"\W+", "_", name)


def text(found: Interval) -> str:
    """An interval as the prose shows it: ``0.83 [0.80, 0.86]`` (see `runs.format_interval`)."""
    return runs.format_interval(float(found.value), float(found.low), float(found.high))


def listed(names: Iterable[str], *, none: str = "none") -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"; `none` for no names."""
    every = list(names)
    if len(every) < 2:
        return every[0] if every else none
    return f"{', '.join(every[:-1])} and {every[-1]}"


def say(name: str, value: Any) -> None:
    """Glue plain text for the prose, shown by ``{glue:text}`name```."""
    from myst_nb import glue

    glue(name, str(value), display=False)
