"""Early layers once per stride phase: the exact short cut of an exhaustive shift sweep.

An object on a plain canvas, moved by a whole stride of a layer, gives the same feature map moved by
one unit, except where a unit sees the canvas's border. So the early layers are computed for one
position per stride phase, and the map of any other position is put together: the empty canvas's map
with the object's window pasted at its place. Where the window reaches units that see the border,
these alone are computed, from the strip of the earlier map that they see. The rest of the network
runs on that. A chain of such layers is chosen by a cost model; nothing is approximated (the same
idea, over video and occlusions: Krypton, Nakandala et al. 2019).
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import taps
from .encoders import Encoder

#: Reading and writing one number costs about as much as this many multiply-adds.
_MEMORY_COST = 20
#: Cutting out, keeping and pasting one window costs about as much, beside its memory traffic.
_WINDOW_COST = 1.5e7
#: Windows kept for each layer of the chain: enough for all phases of a stride-1 grid's rows.
_CACHE_BYTES = 128 * 2**20
#: Largest difference of a shared map from the plain one, in units of the map's largest value.
_TOLERANCE = 1e-4
_BORDER = (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)


Place = tuple[int, int]
Segment = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Axis:
    """Along one axis: which units of a layer an object touches, and which positions are alike.

    Unit i sees the pixels ``low + i·stride`` to ``high + i·stride``; the canvas has ``canvas``
    pixels, the map ``units``, the object ``size``.
    """

    low: int
    high: int
    stride: int
    units: int
    canvas: int
    size: int

    def window(self, x: int) -> tuple[int, int]:
        """First and last + 1 unit that sees the object at pixel ``x``."""
        first = math.ceil((x - self.high) / self.stride)
        last = (x + self.size - 1 - self.low) // self.stride
        return max(first, 0), min(last, self.units - 1) + 1

    def interior(self, x: int) -> bool:
        """Whether no unit that sees the object also sees the border's padding."""
        first = math.ceil((x - self.high) / self.stride)
        last = (x + self.size - 1 - self.low) // self.stride
        inside = first >= 0 and last < self.units
        return (
            inside
            and self.low + first * self.stride >= 0
            and self.high + last * self.stride < self.canvas
        )

    def canonical(self) -> list[int]:
        """For every position the one whose window serves it: itself, or its phase's first."""
        first: dict[int, int] = {}
        table = []
        for x in range(self.canvas - self.size + 1):
            if self.interior(x):
                table.append(first.setdefault(x % self.stride, x))
            else:
                table.append(x)
        return table


@dataclass(frozen=True)
class Edge:
    """Along one axis: the units that see the border, and what of the earlier map they need.

    Units before ``low`` see the border at the start and are those of the earlier map's crop
    [0, ``start``); units from ``high`` on see the one at the end. The crop from ``end`` on gives
    them: its first unit is unit ``skip`` of the whole. Both crops are aligned with the stride.
    """

    low: int
    high: int
    start: int
    end: int
    skip: int
    homes: tuple[int | None, ...]  #: for each position the first of its phase away from the border
    share: float  #: of the earlier map that the two crops make up

    @classmethod
    def of(cls, axis: Axis, before: Axis) -> Edge:
        """For a layer that follows another (or the picture: one unit a pixel)."""
        ratio = axis.stride // before.stride
        low = max(0, math.ceil(-axis.low / axis.stride))
        high = min(axis.units, (axis.canvas - 1 - axis.high) // axis.stride + 1)
        start = end = skip = 0
        if low:
            last = math.ceil((axis.high - before.high) / before.stride) + (low - 1) * ratio
            start = min(last + 1 + (before.units - last - 1) % ratio, before.units)
        end = before.units
        if high < axis.units:
            first = (axis.low - before.low) // before.stride + high * ratio
            skip = max(first, 0) // ratio
            end = skip * ratio
        inner: dict[int, int] = {}
        places = range(axis.canvas - axis.size + 1)
        for x in places:
            if axis.interior(x):
                inner.setdefault(x % axis.stride, x)
        homes = tuple(inner.get(x % axis.stride) for x in places)
        share = 1.0 if low >= high else (start + before.units - end) / before.units
        return cls(low, high, start, end, skip, homes, share)


@dataclass(frozen=True)
class Stage:
    """One layer of the chain: where its windows lie and which position serves which."""

    layer: str
    rows: Axis
    columns: Axis
    row_table: tuple[int, ...]
    column_table: tuple[int, ...]

    def canonical(self, y: int, x: int) -> tuple[int, int]:
        """The position whose window is pasted for (y, x)."""
        return self.row_table[y], self.column_table[x]

    def window(self, y: int, x: int) -> tuple[slice, slice, slice]:
        """The units of a (C, H, W) map that see the object at (y, x)."""
        return slice(None), slice(*self.rows.window(y)), slice(*self.columns.window(x))

    def edges(self, before: Stage | None) -> tuple[Edge, Edge]:
        """Rows and columns of this layer's border, after ``before`` or the picture."""
        axes = (self.rows, self.columns)
        if before is None:
            sources = [Axis(0, 0, 1, axis.canvas, axis.canvas, axis.size) for axis in axes]
        else:
            sources = [before.rows, before.columns]
        rows, columns = (Edge.of(axis, source) for axis, source in zip(axes, sources, strict=True))
        return rows, columns

    def inner(self, y: int, x: int) -> bool:
        """Whether the object at (y, x) shares no unit with the border."""
        return self.rows.interior(y) and self.columns.interior(x)


#: Strips are computed on their own if they make up less than this of the earlier map.
_STRIPS = 0.8


def _work(encoder: Encoder, canvas: int) -> list[tuple[int, float]]:
    """Cumulative multiply-adds and memory traffic after each module that computes, by order."""
    total, table = 0.0, []
    for name, record in taps.trace(encoder, size=canvas).items():
        module = encoder.net.get_submodule(name)
        if any(True for _ in module.children()) or isinstance(module, nn.Identity):
            continue
        elements = record.channels * max(record.height, 1) * max(record.width, 1)
        weight = getattr(module, "weight", None)
        per = weight[0].numel() if isinstance(weight, Tensor) and weight.ndim > 1 else 0
        total += elements * (per + _MEMORY_COST)
        table.append((record.order, total))
    return table


class _Watch(TorchFunctionMode):
    """Notes operations that carry pixels to units beyond their receptive field."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad and len(args) > 1:
            mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
            if mode != "constant":
                self.found = f"padding by {mode}"
        elif func in (torch.roll, Tensor.roll):
            self.found = "torch.roll"
        return func(*args, **kwargs)


def obstacle(encoder: Encoder, *, canvas: int) -> str | None:
    """What in the network forbids to share anything, in words; None if nothing is known to.

    Padding by reflection, repetition or wrapping shows an object to units that, away from the
    border, would not see it; rolling does too. (Padding by a constant of any value does not: a unit
    that sees it is at the border, and computed for itself.) What such a list cannot know,
    features that depend on the place or on the whole picture's values, :func:`plan` finds by
    comparing maps.
    """
    for name, module in encoder.net.named_modules():
        mode = getattr(module, "padding_mode", "zeros")
        if mode != "zeros":
            return f"layer {name!r} pads by {mode}"
        if isinstance(module, _BORDER):
            return f"layer {name!r} is a {type(module).__name__}"
    picture = torch.full((1, encoder.mean.shape[0], canvas, canvas), 0.5, device=encoder.device)
    with torch.no_grad(), _Watch() as watch:
        encoder(picture)
    return watch.found


def _holds(encoder: Encoder, stages: Sequence[Stage], size: tuple[int, int], canvas: int) -> bool:
    """Whether the chain's last map is the plain one, for noise at telling positions."""
    last, cut = stages[-1], stages[-1].layer
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(encoder.mean.shape[0], *size, generator=generator).to(encoder.device)
    empty = torch.full((1, len(noise), canvas, canvas), 0.5, device=encoder.device)

    def paint(positions: Tensor) -> Tensor:
        pictures = empty.repeat(len(positions), 1, 1, 1)
        for picture, (y, x) in zip(pictures, positions.tolist(), strict=True):
            picture[:, y : y + size[0], x : x + size[1]] = noise
        return pictures

    def line(axis: Axis) -> list[int]:
        """Both ends, and inner positions that are served by another one's window, if any."""
        table = axis.canonical()
        served = [x for x, y in enumerate(table) if x != y] or [len(table) // 2]
        ends = [0, len(table) // 8, len(table) - 1 - len(table) // 8, len(table) - 1]
        return [*ends[:2], served[0], served[len(served) // 2], served[-1], *ends[2:]]

    rows, columns = line(last.rows), line(last.columns)
    # The first of a phase comes before those that it serves, as in a sweep.
    places = torch.tensor(
        [*zip(rows, columns, strict=True), *zip(rows, columns[::-1], strict=True)]
    )
    try:
        chain = Chain(encoder, [], stages, empty=empty)
        found = chain.sweep(paint, batch_size=4).maps(places)
    except (RuntimeError, ValueError):  # the network takes maps of one size only
        return False
    expected = taps.features(encoder, paint(places), [cut], batch_size=4)[cut]
    return float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def plan(
    encoder: Encoder,
    layers: Sequence[str],
    positions: Tensor,
    *,
    size: tuple[int, int],
    canvas: int,
) -> list[Stage]:
    """The chain of layers that makes a sweep over ``positions`` (P, 2) cheapest; maybe empty.

    ``size`` is the object's (height, width) in pixels. Candidates are the feature maps before the
    first of ``layers`` that separate the network (:func:`taps.tail`) and whose receptive field is
    smaller than the canvas. The chain is empty, and nothing shared, where the network forbids it
    (:func:`obstacle`), or where the maps of a noise object are found to differ from the plain ones.
    """
    if obstacle(encoder, canvas=canvas) is not None:
        return []
    known = taps.trace(encoder, size=canvas)
    first = min(known[name].order for name in taps._names(encoder, layers))
    candidates, seen = [], set()
    for name, record in known.items():
        small = record.kind == "map" and record.separates and record.order < first
        # a convolution that took in its batch norm gives another value than its name promises
        if not small or record.value in seen or name in encoder.changed:
            continue
        seen.add(record.value)
        candidates.append(name)
    spans = taps.spans(encoder, candidates, size=canvas) if candidates else {}
    stages: list[Stage] = []
    for name in candidates:
        seen_by = spans[name]
        if seen_by is None:
            continue
        axes = [
            Axis(*span, units=units, canvas=canvas, size=side)
            for span, units, side in zip(
                seen_by, (known[name].height, known[name].width), size, strict=True
            )
        ]
        tables = [tuple(axis.canonical()) for axis in axes]
        stages.append(Stage(name, axes[0], axes[1], tables[0], tables[1]))

    work = _work(encoder, canvas)

    def done(order: int) -> float:
        return max((cost for at, cost in work if at <= order), default=0.0)

    places = {tuple(p) for p in positions.tolist()}
    count = len(places)
    windows = [{stage.canonical(*p) for p in places} for stage in stages]
    inner = [
        sum(stage.inner(*p) for p in found) for stage, found in zip(stages, windows, strict=True)
    ]

    def needed(i: int, j: int | None) -> float:
        """Runs of stage i after stage j: whole ones, and strips as parts of one."""
        edges = stages[i].edges(None if j is None else stages[j])
        share = sum(edge.share for edge in edges)
        return inner[i] + (len(windows[i]) - inner[i]) * (share if share < _STRIPS else 1)

    costs = [done(known[stage.layer].order) for stage in stages]
    # Pasting writes each map once and reads it once.
    paste = [
        2.0 * _MEMORY_COST * known[s.layer].channels * known[s.layer].height * known[s.layer].width
        for s in stages
    ]
    made = [len(found) * _WINDOW_COST for found in windows]
    total = done(max(known[name].order for name in layers))
    # Shortest path from the picture through any chain of stages to the layers wanted.
    best: list[tuple[float, int | None]] = []
    for i in range(len(stages)):
        options: list[tuple[float, int | None]] = [(needed(i, None) * costs[i] + made[i], None)]
        options += [
            (
                best[j][0]
                + needed(i, j) * (costs[i] - costs[j])
                + len(windows[i]) * paste[j]
                + made[i],
                j,
            )
            for j in range(i)
        ]
        best.append(min(options, key=lambda option: option[0]))
    ends: list[tuple[float, int | None]] = [(count * total, None)]
    ends += [(best[i][0] + count * (total - costs[i] + paste[i]), i) for i in range(len(stages))]
    at = min(ends, key=lambda end: end[0])[1]
    chain: list[Stage] = []
    while at is not None:
        chain.append(stages[at])
        at = best[at][1]
    chain.reverse()
    return chain if chain and _holds(encoder, chain, size, canvas) else []


class Chain:
    """The stages of :func:`plan` joined; call it with an object's painter to get a `Sweep`.

    ``empty`` is the canvas without the object, (1, 3, S, S). Nothing here depends on the object, so
    one chain serves all objects of a size.
    """

    def __init__(
        self, encoder: Encoder, layers: Sequence[str], stages: Sequence[Stage], *, empty: Tensor
    ) -> None:
        self.stages = tuple(stages)
        self.edges = [
            stage.edges(before) for before, stage in zip([None, *stages], stages, strict=False)
        ]
        cuts = [stage.layer for stage in stages]
        self.segments: list[Segment] = []
        wanted = [*([cut] for cut in cuts), list(layers)]
        for start, to in zip([None, *cuts], wanted, strict=True):
            if not to:
                continue
            if start is None:
                self.segments.append(functools.partial(taps.features, encoder, layers=to))
            else:
                size = empty.shape[-1]
                self.segments.append(taps.tail(encoder, start, to=to, size=size, check=False))
        self.empty = list(taps.features(encoder, empty, cuts).values()) if cuts else []

    def sweep(self, paint: Callable[[Tensor], Tensor], *, batch_size: int) -> Sweep:
        """For the object that ``paint`` puts on the canvas: positions (B, 2) to (B, 3, S, S)."""
        return Sweep(self, paint, batch_size)


class Sweep:
    """Feature maps of one object at any positions of a plain canvas.

    Memory is bounded: windows unused for longest are dropped, and made again when needed.
    """

    def __init__(self, chain: Chain, paint: Callable[[Tensor], Tensor], batch_size: int) -> None:
        self._chain, self._paint, self._batch_size = chain, paint, batch_size
        self._windows: list[OrderedDict[Place, Tensor]] = [OrderedDict() for _ in chain.stages]

    @torch.no_grad()
    def __call__(self, positions: Tensor) -> dict[str, Tensor]:
        """The layers' maps (B, C, H, W) at ``positions`` (B, 2): whole numbers (y, x)."""
        places = [(int(y), int(x)) for y, x in positions.tolist()]
        return self._chain.segments[-1](self._maps(len(self._windows), places))

    @torch.no_grad()
    def maps(self, positions: Tensor) -> Tensor:
        """The last stage's maps alone (B, C, H, W)."""
        return self._maps(len(self._windows), [(int(y), int(x)) for y, x in positions.tolist()])

    def _maps(self, depth: int, places: Sequence[Place]) -> Tensor:
        """Maps of stage ``depth - 1``, or the pictures at depth 0: (B, C, H, W)."""
        if depth == 0:
            return self._paint(torch.tensor(places))
        stage, windows = self._chain.stages[depth - 1], self._windows[depth - 1]
        empty = self._chain.empty[depth - 1]
        keys = [stage.canonical(*place) for place in places]
        missing = [key for key in dict.fromkeys(keys) if key not in windows]
        homes = {key: self._home(depth, key) for key in missing}
        whole = [key for key in missing if homes[key] is None]
        whole += [home for home in homes.values() if home is not None and home not in windows]
        whole = list(dict.fromkeys(whole))
        for start in range(0, len(whole), self._batch_size):
            part = whole[start : start + self._batch_size]
            values = self._segment(depth, self._maps(depth - 1, part))
            for key, value in zip(part, values, strict=True):
                windows[key] = value[stage.window(*key)].clone()
        near = {key: home for key, home in homes.items() if home is not None}
        if near:
            windows.update(self._near_border(depth, near))
        maps = empty.expand(len(places), *empty.shape[1:]).clone(memory_format=torch.channels_last)
        for map_, place, key in zip(maps, places, keys, strict=True):
            map_[stage.window(*place)] = windows[key]
            windows.move_to_end(key)
        room = _CACHE_BYTES // (empty.numel() * empty.element_size())
        while len(windows) > max(room, 1):
            windows.popitem(last=False)
        return maps

    def _segment(self, depth: int, maps: Tensor) -> Tensor:
        """The next stage's maps of whole maps or of strips of them."""
        layer, segment = self._chain.stages[depth - 1].layer, self._chain.segments[depth - 1]
        if isinstance(segment, taps.Tail):
            # A strip need not be the map of any image: what stands for the layers before it may as
            # well be that of the whole picture, since nothing of it is used.
            key = (tuple(maps.shape[2:]), maps.device, segment.encoder.mean.dtype)
            if key not in segment._fronts:
                front = segment._front_for(self._chain.empty[depth - 2])
                segment._fronts[key] = front  # pyright: ignore[reportArgumentType]
        values = segment(maps)[layer]
        if values.shape[1] != self._chain.empty[depth - 1].shape[1]:
            raise ValueError(f"a strip before {layer!r} was taken for a map of another layout")
        return values

    def _home(self, depth: int, key: Place) -> Place | None:
        """The inner position of the same phase, for a window that only strips differ in."""
        edges = self._chain.edges[depth - 1]
        if self._chain.stages[depth - 1].inner(*key) or sum(e.share for e in edges) >= _STRIPS:
            return None
        y, x = (edge.homes[place] for edge, place in zip(edges, key, strict=True))
        return None if y is None or x is None else (y, x)

    def _near_border(self, depth: int, homes: dict[Place, Place]) -> dict[Place, Tensor]:
        """Windows of positions near the border: the inner one, moved, with strips of their own."""
        stage, windows = self._chain.stages[depth - 1], self._windows[depth - 1]
        keys, axes = list(homes), (stage.rows, stage.columns)
        before = self._maps(depth - 1, keys)
        channels = next(iter(windows.values())).shape[0]
        result = {}
        for key, home in homes.items():
            spans, targets, sources = [], [], []
            for axis, edge, x, h in zip(axes, self._chain.edges[depth - 1], key, home, strict=True):
                first, last = axis.window(x)
                low, high = max(first, edge.low), min(last, edge.high)
                moved = (h - x) // axis.stride - axis.window(h)[0]
                spans.append(last - first)
                targets.append(slice(low - first, max(high, low) - first))
                sources.append(slice(low + moved, max(high, low) + moved))
            result[key] = before.new_empty(channels, *spans)
            result[key][:, targets[0], targets[1]] = windows[home][:, sources[0], sources[1]]
        for dim, (axis, edge) in enumerate(zip(axes, self._chain.edges[depth - 1], strict=True)):
            ends = (
                (0, edge.low, 0, edge.start, 0),
                (edge.high, axis.units, edge.end, None, edge.skip),
            )
            for first, last, start, stop, skip in ends:
                spans = [axis.window(key[dim]) for key in keys]
                chosen = [n for n, (a, b) in enumerate(spans) if a < last and b > first]
                if not chosen or first >= last:
                    continue
                crop = before[chosen].narrow(
                    2 + dim, start, (stop or before.shape[2 + dim]) - start
                )
                for n, strip in zip(chosen, self._segment(depth, crop), strict=True):
                    a, b = spans[n]
                    low, high = max(a, first), min(b, last)
                    other = slice(*axes[1 - dim].window(keys[n][1 - dim]))
                    source = [slice(low - skip, high - skip), other][:: 1 if dim == 0 else -1]
                    target = [slice(low - a, high - a), slice(None)][:: 1 if dim == 0 else -1]
                    result[keys[n]][:, target[0], target[1]] = strip[:, source[0], source[1]]
        return result
