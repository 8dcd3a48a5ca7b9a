"""Figures that answer in the page: plain JavaScript inside a notebook's HTML output.

They carry their data and need neither a kernel nor a request, so they work in the rendered book, in
JupyterLab and in an executed notebook opened as a file. What is computed anew for a reader's own
image is in the live notebooks instead.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from IPython.display import HTML
from torch import Tensor

from . import shift, store, widgets

__all__ = ["shift_explorer"]

_LEVELS = 65535  # a cosine is kept in 16 bits


@cache
def _source(name: str) -> str:
    return resources.files("fmlib").joinpath(name).read_text(encoding="utf-8")


def _data_address(picture: Any) -> str:
    return "data:image/png;base64," + base64.b64encode(widgets.png(picture)).decode("ascii")


def _colours(name: str) -> str:
    """256 colours of a map, six hexadecimal digits each."""
    import matplotlib

    table = np.rint(matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255)
    return table.astype(np.uint8).tobytes().hex()


def _packed(cosines: np.ndarray) -> tuple[float, str]:
    """The least cosine, and those of each object's pairs i < j as 16-bit steps from it to 1."""
    upper = np.triu_indices(cosines.shape[1], 1)
    pairs = cosines[:, upper[0], upper[1]]
    low = min(float(pairs.min()), 1 - 1e-9)
    steps = np.rint((pairs - low) / (1 - low) * _LEVELS).clip(0, _LEVELS).astype("<u2")
    return low, base64.b64encode(steps.tobytes()).decode("ascii")


def _checked(name: tuple[str, str], cosines: Any, objects: int, count: int) -> np.ndarray:
    values = np.asarray(cosines.detach().cpu() if isinstance(cosines, Tensor) else cosines, float)
    label = f"{name[0]}, {name[1]}"
    if values.shape != (objects, count, count):
        raise ValueError(
            f"the cosines of {label} must be ({objects}, {count}, {count}) for {objects} objects "
            f"at {count} positions, not {values.shape}"
        )
    if not np.isfinite(values).all() or abs(values).max() > 1 + 1e-6:
        raise ValueError(f"the cosines of {label} are not all in [-1, 1]")
    if not np.allclose(values, values.transpose(0, 2, 1), atol=1e-6):
        raise ValueError(f"the cosines of {label} are not symmetric in their two positions")
    return values


def shift_explorer(
    cosines: Mapping[tuple[str, str], Any],
    objects: Sequence[Tensor],
    places: shift.Grid,
    *,
    names: Sequence[str],
    between: Mapping[tuple[str, str], Any] | None = None,
    background: str | float | Sequence[float] | Tensor = "white",
    start: tuple[str, str] | None = None,
    title: str = "Shift explorer",
    cmap: str = "viridis",
    max_megabytes: float = 8.0,
) -> HTML:
    """Any position as the reference: an object's shift maps, to be looked at in the browser.

    A reader picks object, encoder and layer, moves the object (mouse, finger or arrow keys) and
    sees the cosine of its features there with those at every other position (Lee, Yang & Wang
    2020, §3.1, whose demonstration has five fixed references).

    Args:
        cosines: for each (encoder, layer) the cosines of all pairs of positions (O, P, P), as
            :func:`shift.pairwise` gives them; kept to a 65535th of their range.
        objects: the O cut-outs (4, size, size), float in [0, 1], prepared (:func:`shift.prepare`).
        places: the grid of the P positions.
        names: what each object is called, O different names.
        between: for each (encoder, layer), (O,) mean cosine with the other objects at the same
            place, shown as the floor.
        background: what is behind the objects, see :func:`shift.paint`.
        start: the (encoder, layer) shown first; the first of `cosines` by default.
        title: the figure's name for a screen reader.
        cmap: a perceptually uniform matplotlib colour map.
        max_megabytes: refuse to make a heavier figure.

    Returns:
        HTML to be displayed or glued.

    Raises:
        ValueError: nothing to show, shapes that do not fit, cosines that are not symmetric or not
            in [-1, 1], names repeated or missing, an unknown `start`, or too much data.
    """
    names = [str(name) for name in names]
    if not cosines or not len(objects):
        raise ValueError("a shift explorer needs at least one object and one layer")
    if len(names) != len(objects) or len(set(names)) < len(names):
        raise ValueError(f"give a different name to each of the {len(objects)} objects: {names}")
    for name, obj in zip(names, objects, strict=True):
        if tuple(obj.shape) != (4, places.size, places.size):
            raise ValueError(
                f"object {name!r} must be (4, {places.size}, {places.size}) as the grid says, "
                f"not {tuple(obj.shape)}: prepare it with shift.prepare"
            )
    known = list(cosines)
    start = known[0] if start is None else start
    if start not in cosines:
        raise ValueError(f"start {start} is none of the maps: {', '.join(map(str, known))}")
    if between is not None and set(between) != set(known):
        raise ValueError("between must have a value for each (encoder, layer) of cosines, no other")

    maps = []
    # the first one of an encoder is the one shown when a reader turns to it
    for name in sorted(known, key=lambda name: [name[0] != start[0], known.index(name)]):
        values = _checked(name, cosines[name], len(objects), len(places.positions))
        low, packed = _packed(values)
        one: dict[str, Any] = {"encoder": name[0], "layer": name[1], "low": low, "values": packed}
        if name == start:
            one["start"] = True
        if between is not None:
            floors = np.asarray(between[name], float).reshape(-1)
            if floors.shape != (len(objects),):
                raise ValueError(
                    f"between of {name} has {len(floors)} values, not {len(objects)}, "
                    "one for each object"
                )
            one["between"] = [round(float(x), 6) for x in floors]
        maps.append(one)

    ground = shift.paint(background, places.canvas)
    plain = bool((ground == ground[:, :1, :1]).all())
    levels = (ground[:, 0, 0] * 255).round().int().tolist()
    data = {
        "title": title,
        "canvas": places.canvas,
        "size": places.size,
        "offsets": places.offsets,
        "background": "#{:02x}{:02x}{:02x}".format(*levels) if plain else _data_address(ground),
        "objects": [
            {"name": name, "src": _data_address(obj)}
            for name, obj in zip(names, objects, strict=True)
        ],
        "maps": maps,
        "colours": _colours(cmap),
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    megabytes = len(text) / 1e6
    if megabytes > max_megabytes:
        raise ValueError(
            f"the explorer weighs {megabytes:.1f} MB, more than {max_megabytes}: use a coarser "
            "grid, fewer objects or layers, or raise max_megabytes"
        )
    label = "fm-explorer-" + store.digest(text)[:12]
    return HTML(
        f'<div class="fm-explorer" id="{label}"></div>\n'
        f"<style>{_source('explorer.css')}</style>\n"
        f"<noscript>{html.escape(title)}: this figure needs JavaScript.</noscript>\n"
        # A module of its own: its names do not leak, and it runs once the page is parsed.
        f'<script type="module">\n{_source("shift_explorer.js")}\n'
        f'mount(document.getElementById("{label}"), {text});\n</script>'
    )
