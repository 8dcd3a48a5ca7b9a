"""How far features move when an object moves (Lee, Yang & Wang 2020, experiment 1).

An object is pasted at every position of a grid on a plain canvas; the features of each picture are
compared, by their cosine, with the features at five reference positions. Pictures are composed on
the encoder's device and features go through a :class:`Reducer` batch by batch, so memory does not
grow with the number of positions, save for the results.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import extract, phases, stats, store, taps
from .encoders import Encoder

__all__ = [
    "REFERENCES",
    "Cosines",
    "Floors",
    "Grid",
    "Moments",
    "Pairs",
    "Pairwise",
    "Reducer",
    "ShiftMaps",
    "centre_cosine",
    "compose",
    "features",
    "floors",
    "global_cosine",
    "grid",
    "paint",
    "pairwise",
    "prepare",
    "read",
    "reduce",
    "references",
    "sweep",
]

#: The five reference positions, in the order of axis 1 of :attr:`ShiftMaps.cosine`.
REFERENCES = ("top left", "top right", "centre", "bottom left", "bottom right")
_CENTRE = REFERENCES.index("centre")
_CORNERS = [i for i in range(len(REFERENCES)) if i != _CENTRE]

Pool = Literal["mean", "flatten"]

#: Pictures from which sharing early layers repays its planning.
_PAYS = 500


@dataclass(frozen=True)
class Grid:
    """Positions of an object's top-left corner on a square canvas, all in pixels."""

    positions: Tensor  #: (P, 2) int64, (y, x), row by row
    shape: tuple[int, int]  #: (R, C) with R·C = P
    canvas: int
    size: int
    stride: int

    @property
    def offsets(self) -> list[int]:
        """The R coordinates along one axis (the grid is square)."""
        return list(range(0, self.canvas - self.size + 1, self.stride))


@dataclass(frozen=True)
class ShiftMaps:
    """Cosines of one layer, for O objects, 5 references and a grid of R×C positions."""

    cosine: Tensor  #: (O, 5, R, C) float64
    grid: Grid
    references: Tensor  #: (5, 2) int64 positions (y, x) of `REFERENCES`
    reference_cosine: Tensor  #: (O, 5, 5) cosines of the references with one another
    wiggle: Tensor  #: (O,) mean |Δ cosine to the centre| per pixel
    profile: Tensor  #: (O, 2, L) cosine to the centre along a 1-px line: vertical, horizontal
    profile_offsets: Tensor  #: (L,) int64 displacement from the centre reference in pixels


@dataclass(frozen=True)
class Pairwise:
    """Cosines of one layer between any two positions of a grid, for O objects."""

    cosine: Tensor  #: (O, P, P) float32, symmetric; positions as in `grid.positions`
    grid: Grid


@dataclass(frozen=True)
class Floors:
    """What the cosine is when the object is another one, or none. One layer, O objects."""

    between: Tensor  #: (O, O) cosine of objects i and j, both at the centre
    empty: Tensor  #: (O,) cosine of object i at the centre and the empty canvas


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of pixels, at least 1, not {value!r}")
    return value


def _room(canvas: int, size: int) -> int:
    """Largest offset of the object on the canvas."""
    _whole("canvas", canvas)
    _whole("size", size)
    if size > canvas:
        raise ValueError(f"an object of {size} px does not fit on a canvas of {canvas} px")
    return canvas - size


def grid(canvas: int, size: int, stride: int = 1) -> Grid:
    """Every position of a `size` px object that lies wholly on the canvas, each `stride` px.

    At stride 1, 224 px and 125 px these are the 100² positions of Lee et al. (2020), §3.

    Raises:
        ValueError: the object is larger than the canvas, `stride` is not a positive whole number,
            or the grid would have a single position.
    """
    room = _room(canvas, size)
    _whole("stride", stride)
    if room < stride:
        raise ValueError(
            f"an object of {size} px on a canvas of {canvas} px with stride {stride} has a single "
            f"position: stride must be at most {room}"
            if room
            else f"an object of {size} px fills the canvas of {canvas} px: it has a single position"
        )
    line = torch.arange(0, room + 1, stride)
    positions = torch.cartesian_prod(line, line)
    return Grid(positions, (len(line), len(line)), canvas, size, stride)


def references(canvas: int, size: int) -> Tensor:
    """(5, 2) positions (y, x) of `REFERENCES`: the four extremes and `side // 2 - 1`.

    `side` is the number of stride-1 positions along an axis, so that a coarse grid is compared with
    the very references of the exhaustive one.
    """
    last = _room(canvas, size)
    middle = max((last + 1) // 2 - 1, 0)
    return torch.tensor([[0, 0], [0, last], [middle, middle], [last, 0], [last, last]])


def prepare(obj: Tensor, size: int) -> Tensor:
    """An RGBA cut-out (4, h, w) resized to (4, size, size); straight alpha, float32 in [0, 1].

    The aspect ratio is not kept, as in Lee et al. Colours are resized premultiplied by alpha and
    antialiased: otherwise the invisible colour of transparent pixels bleeds into a dark fringe.

    Raises:
        ValueError: no alpha channel, wrong shape, not a finite number in [0, 1], or an empty mask.
    """
    _whole("size", size)
    _check_object(obj)
    alpha = obj[3:]
    layers = torch.cat([obj[:3] * alpha, alpha])[None].float()
    layers = F.interpolate(
        layers, (size, size), mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
    alpha = layers[3:]
    colour = torch.where(alpha > 0, layers[:3] / alpha.clamp_min(1e-12), 0.0).clamp(0, 1)
    return torch.cat([colour, alpha])


def _levels(x: Tensor) -> bool:
    """Whether all values lie in [0, 1], but for the rounding of a resize; NaN does not."""
    return bool(((x > -1e-5) & (x < 1 + 1e-5)).all())


def _check_object(obj: Any) -> None:
    if not isinstance(obj, Tensor) or obj.ndim != 3:
        shape = tuple(obj.shape) if hasattr(obj, "shape") else type(obj).__name__
        raise ValueError(f"an object is a tensor of shape (4, h, w), not {shape}")
    if obj.shape[0] != 4:
        raise ValueError(
            f"an object needs an alpha channel, shape (4, h, w): this one is {tuple(obj.shape)}"
        )
    if not obj.is_floating_point():
        raise ValueError(f"an object is float in [0, 1], not {obj.dtype}")
    if not _levels(obj):
        raise ValueError("an object must be finite and lie in [0, 1]")
    if not (obj[3] > 0).any():
        raise ValueError("the mask is empty: alpha is 0 everywhere")


def paint(
    background: str | float | Sequence[float] | Tensor,
    canvas: int,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A canvas (3, canvas, canvas), float32 in [0, 1].

    Args:
        background: a colour name or code ("white", "grey", "#808080"), a grey level, three levels
            (r, g, b), or a photograph (3, canvas, canvas); all levels in [0, 1].
        canvas: side in pixels.
        device: where the result lies.

    Raises:
        ValueError: an unknown colour name, a level outside [0, 1], or a photograph of another size.
    """
    _whole("canvas", canvas)
    if isinstance(background, str):
        from PIL import ImageColor

        try:
            levels = [level / 255 for level in ImageColor.getrgb(background)[:3]]
        except ValueError:
            close = difflib.get_close_matches(background.lower(), ImageColor.colormap, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(
                f"unknown background {background!r}: a CSS colour name or #rrggbb{hint}"
            ) from None
        colour = torch.tensor(levels)
    else:
        colour = torch.as_tensor(background, dtype=torch.float32)
    if colour.ndim == 0:
        colour = colour.expand(3)
    if colour.shape == (3,):
        colour = colour[:, None, None].expand(3, canvas, canvas)
    if colour.shape != (3, canvas, canvas):
        raise ValueError(
            f"a background is a colour or an image of shape (3, {canvas}, {canvas}), "
            f"not {tuple(colour.shape)}"
        )
    if not _levels(colour):
        raise ValueError("a background must be finite and lie in [0, 1]")
    return colour.to(device=device, dtype=torch.float32).contiguous()


def compose(
    obj: Tensor,
    positions: Tensor,
    *,
    canvas: int = 224,
    background: str | float | Sequence[float] | Tensor = "white",
) -> Tensor:
    """The object pasted at each position: (P, 3, canvas, canvas), channels-last in memory.

    Args:
        obj: (4, h, w) RGBA with straight alpha, float in [0, 1]; stays at its size.
        positions: (P, 2) whole numbers (y, x) of the object's top-left corner.
        canvas: side in pixels.
        background: see :func:`paint`.

    Raises:
        ValueError: a bad object, or a position where it would leave the canvas.
    """
    _check_object(obj)
    height, width = obj.shape[1:]
    _room(canvas, max(height, width))
    if positions.ndim != 2 or positions.shape[1] != 2 or positions.is_floating_point():
        raise ValueError(
            f"positions are whole numbers (P, 2), not {positions.dtype} {tuple(positions.shape)}"
        )
    limit = positions.new_tensor([canvas - height, canvas - width])
    outside = ((positions < 0) | (positions > limit)).any(1)
    if outside.any():
        first = tuple(positions[outside][0].tolist())
        raise ValueError(f"at position (y, x) = {first} the object leaves the canvas")
    return _paste(obj.float(), positions, paint(background, canvas, device=obj.device))


def _paste(obj: Tensor, positions: Tensor, background: Tensor) -> Tensor:
    """`compose` without the checks: one gather and one scatter for all positions."""
    height, width = obj.shape[1:]
    positions = positions.to(obj.device)
    count = len(positions)
    out = background.permute(1, 2, 0).expand(count, *background.shape[1:], 3).contiguous()
    index = torch.arange(count, device=obj.device)[:, None, None]
    rows = positions[:, :1, None] + torch.arange(height, device=obj.device)[:, None]
    columns = positions[:, 1:, None] + torch.arange(width, device=obj.device)
    alpha = obj[3:].permute(1, 2, 0)
    front = obj[:3].permute(1, 2, 0) * alpha
    # Advanced indexing on the three leading axes: (P, h, w, 3) read and written in one call each.
    out[index, rows, columns] = out[index, rows, columns] * (1 - alpha) + front
    return out.permute(0, 3, 1, 2)


def _vectors(maps: Tensor, pool: Pool) -> Tensor:
    if maps.ndim == 2 or pool == "flatten":
        return maps.flatten(1).float()
    return maps.float().mean(dim=tuple(range(2, maps.ndim)))


def _check_pool(pool: str) -> None:
    if pool not in ("mean", "flatten"):
        raise ValueError(f"pool must be 'mean' or 'flatten', not {pool!r}")


def _batch_size(batch_size: int | None, device: torch.device) -> int:
    # The maps of a few pictures stay in a CPU's caches, and in memory it need not ask for anew.
    if batch_size is None:
        return 4 if device.type == "cpu" else 256
    return _whole("batch_size", batch_size)


def features(
    encoder: Encoder,
    obj: Tensor,
    positions: Tensor,
    layers: Sequence[str],
    *,
    canvas: int = 224,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: Pool = "mean",
    batch_size: int | None = None,
    chain: phases.Chain | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Stream the features of one object at many positions.

    Yields:
        `(index, vectors)`: the indices (B,) into `positions` that this batch covers, and for each
        layer its features (B, D) on the encoder's device. Every index comes exactly once.

    Args:
        encoder: where the pictures go.
        obj: (4, h, w) RGBA, already of its size on the canvas (:func:`prepare`).
        positions: (P, 2) whole numbers (y, x).
        layers: dotted layer names.
        canvas: side in pixels.
        background: see :func:`paint`.
        pool: how a feature map becomes a vector. "mean" over space asks for invariance; "flatten"
            keeps the place of each activation, so that a perfectly equivariant map scores low.
        batch_size: positions per forward pass; chosen for the device by default.
        chain: early layers shared between positions, made for these layers and this canvas
            (:mod:`phases`); without one every position runs through the whole network.

    Raises:
        ValueError: as :func:`compose` and :func:`taps.read`, or an unknown `pool`.
    """
    _check_pool(pool)
    layers = list(layers)
    device = encoder.device
    size = _batch_size(batch_size, device)
    compose(obj, positions[:1], canvas=canvas, background=background)  # the checks
    compose(obj, positions.amin(0, keepdim=True), canvas=canvas, background=background)
    compose(obj, positions.amax(0, keepdim=True), canvas=canvas, background=background)
    ground = paint(background, canvas, device=device)
    obj = obj.float().to(device)
    paste = functools.partial(_paste, obj, background=ground)
    with torch.no_grad(), taps.read(encoder, layers) as read:
        maps_at = chain.sweep(paste, batch_size=size) if chain else lambda at: read(paste(at))
        if chain and batch_size is None and device.type == "cpu":
            size *= 2  # what is left of the network starts from smaller maps
        for index in torch.arange(len(positions)).split(size):
            maps = maps_at(positions[index])
            yield index, {layer: _vectors(maps[layer], pool) for layer in layers}


def _scan(canvas: int, size: int, span: int) -> tuple[Tensor, Tensor]:
    """Stride-1 lines through the centre reference: offsets (L,), positions (2·L, 2)."""
    room = _room(canvas, size)
    middle = int(references(canvas, size)[_CENTRE, 0])
    low = max(0, middle - span // 2)
    line = torch.arange(low, min(room, low + span) + 1)
    still = torch.full_like(line, middle)
    return line - middle, torch.cat([torch.stack([line, still], 1), torch.stack([still, line], 1)])


def _prepared(objects: Any, size: int, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
    """The objects of a set or sequence, prepared; errors say which one is wrong."""
    table = getattr(objects, "table", None)
    for i in range(len(objects)) if indices is None else indices:
        try:
            yield prepare(objects[i], size)
        except ValueError as error:
            name = f"object {i}" if table is None else f"object {table['id'].iloc[i]!r}"
            raise ValueError(f"{name}: {error}") from error


def _checked(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    size: int,
    canvas: int,
    background: str | float | Sequence[float] | Tensor,
    pool: str,
    batch_size: int | None,
) -> tuple[list[str], Tensor]:
    """The layers and the canvas; whatever is wrong is said before anything is computed."""
    layers = _layers(layers)
    _check_pool(pool)
    _room(canvas, size)
    _batch_size(batch_size, encoder.device)
    ground = paint(background, canvas)
    with taps.read(encoder, layers):  # an unknown layer is named here, with its closest
        pass
    if not len(objects):
        raise ValueError("no objects to move")
    for _ in _prepared(objects, size):
        pass
    return layers, ground


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length one, in float64: rounding must not show in cosines next to 1."""
    return F.normalize(stats.float64(vectors), dim=1)


def _layers(layers: Sequence[str]) -> list[str]:
    if isinstance(layers, str):
        raise ValueError(f"layers is a list of names, not the single string {layers!r}")
    if not layers:
        raise ValueError("give at least one layer")
    return list(dict.fromkeys(layers))


def _chain(
    encoder: Encoder, layers: Sequence[str], positions: Tensor, size: int, ground: Tensor
) -> phases.Chain | None:
    """Early layers to share between positions, if the background is one colour and it pays."""
    if bool((ground != ground[:, :1, :1]).any()):
        return None
    canvas = ground.shape[-1]
    stages = phases.plan(encoder, layers, positions, size=(size, size), canvas=canvas)
    empty = ground[None].to(encoder.device)
    return phases.Chain(encoder, layers, stages, empty=empty) if stages else None


# --------------------------------------------------------------------------------------- reducers


class Reducer(Protocol):
    """Takes in the vectors of one object at one layer, batch by batch; see :func:`reduce`."""

    def update(self, index: Tensor, vectors: Tensor) -> None:
        """Vectors (B, D) at the positions with these indices (B,); each position comes once."""
        ...

    def result(self) -> Any:
        """What is left of them."""
        ...


#: Makes a reducer, given the vectors (A, D) at the reference positions (A may be 0).
Make = Callable[[Tensor], Reducer]


class Cosines:
    """Cosines with the references at `count` positions; in memory 8·A numbers each."""

    def __init__(self, references: Tensor, *, count: int) -> None:
        self._anchor = _unit(references)
        self._cosine = self._anchor.new_empty(count, len(references))

    def update(self, index: Tensor, vectors: Tensor) -> None:
        """Compare the vectors (B, D) of the positions `index` (B,)."""
        device = self._cosine.device
        self._cosine[index.to(device)] = (_unit(vectors) @ self._anchor.T).clamp(-1, 1)

    def result(self) -> tuple[Tensor, Tensor]:
        """(count, A) cosines, and (A, A) of the references with one another; float64, CPU."""
        among = (self._anchor @ self._anchor.T).clamp(-1, 1)
        return self._cosine.cpu(), among.cpu()


class Moments:
    """Mean and variance of each feature over positions: which channels move.

    Batches are merged as by Chan, Golub & LeVeque (1983), in float64: no digits are lost where the
    variance is small beside the mean.
    """

    def __init__(self, references: Tensor | None = None) -> None:
        del references  # not needed; so that the class itself can be given to `reduce`
        self._count = 0
        self._mean = self._squares = torch.empty(0)

    def update(self, index: Tensor, vectors: Tensor) -> None:
        """Take in the vectors (B, D) of the positions `index` (B,)."""
        x = stats.float64(vectors)
        count, mean = len(index), x.mean(0)
        squares = (x - mean).square().sum(0)
        if self._count:
            total, step = self._count + count, mean - self._mean
            squares = self._squares + squares + step.square() * (self._count * count / total)
            mean = self._mean + step * (count / total)
        self._count, self._mean, self._squares = self._count + count, mean, squares

    def result(self) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D,) variance over all positions (divided by their number); float64, CPU.

        Raises:
            ValueError: no position has come.
        """
        if not self._count:
            raise ValueError("no position has come yet")
        return self._mean.cpu(), (self._squares / self._count).cpu()


class Pairs:
    """Cosines between any two of `count` positions; keeps the vectors, count·D numbers."""

    def __init__(self, references: Tensor | None = None, *, count: int) -> None:
        del references
        self._count, self._seen = count, 0
        self._vectors = torch.empty(0)

    def update(self, index: Tensor, vectors: Tensor) -> None:
        """Keep the vectors (B, D) of the positions `index` (B,)."""
        if not self._seen:
            self._vectors = vectors.new_empty(self._count, vectors.shape[1])
        self._vectors[index.to(vectors.device)] = vectors
        self._seen += len(index)

    def result(self) -> Tensor:
        """(count, count) cosines; float32, on the CPU.

        Raises:
            ValueError: positions are missing.
        """
        if self._seen != self._count:
            raise ValueError(f"{self._count - self._seen} positions have not come yet")
        unit = _unit(self._vectors)
        return (unit @ unit.T).clamp(-1, 1).float().cpu()


def reduce(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    positions: Tensor,
    reducers: Mapping[str, Make],
    *,
    size: int = 125,
    canvas: int = 224,
    references: Tensor | None = None,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
    share: bool | None = None,
    progress: bool = False,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Show every object at every position once, and let any number of reducers look on.

    Memory is what the reducers keep of one object, however many positions there are. For the maps,
    the moving channels and a linear probe in a single pass::

        places = shift.grid(224, 125)
        reducers = {
            "cosine": functools.partial(shift.Cosines, count=len(places.positions)),
            "moments": shift.Moments,
            "position": lambda _: probes.StreamedRegression(places),
        }
        for found in shift.reduce(
            encoder, objects, layers, places.positions, reducers,
            references=shift.references(224, 125),
        ):
            found["moments"]["blocks.6"]

    Yields:
        for each object, reducer name -> layer -> its result.

    `positions` are (P, 2) whole numbers (y, x). `reducers` maps a name to a function that makes a
    :class:`Reducer` for one object and layer, given the vectors (A, D) at the positions
    `references` (A, 2), which are seen first (none by default). All else as in :func:`sweep`.

    Raises:
        ValueError: a bad object (named; before anything is computed), position, background, layer
            or pool, or no reducers.
    """
    if not reducers:
        raise ValueError("give at least one reducer")
    layers, ground = _checked(encoder, objects, layers, size, canvas, background, pool, batch_size)
    return _reduce(
        encoder, objects, layers, positions, reducers, size=size, ground=ground,
        references=references, pool=pool, batch_size=batch_size, optimise=optimise, share=share,
        progress=progress,
    )  # fmt: skip


def _reduce(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    positions: Tensor,
    reducers: Mapping[str, Make],
    *,
    size: int,
    ground: Tensor,
    references: Tensor | None,
    pool: Pool,
    batch_size: int | None,
    optimise: bool,
    share: bool | None,
    progress: bool,
    indices: Sequence[int] | None = None,
) -> Iterator[dict[str, dict[str, Any]]]:
    """:func:`reduce` for some of the objects, after :func:`_checked`."""
    indices = range(len(objects)) if indices is None else indices
    fast = extract.optimise(encoder, keep=layers) if optimise else encoder
    if share is None:
        pictures = len(indices) * len(positions)
        share = fast.device.type == "cpu" and pictures >= _PAYS
    chain = _chain(fast, layers, positions, size, ground) if share else None
    options: dict[str, Any] = {
        "canvas": ground.shape[-1],
        "background": ground,
        "pool": pool,
        "batch_size": batch_size,
    }
    total = len(indices) * len(positions)
    with tqdm(total=total, unit="pos", disable=not progress, leave=False) as bar:
        for obj in _prepared(objects, size, indices):
            anchors: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            if references is not None and len(references):
                for _, vectors in features(fast, obj, references, layers, **options):
                    for layer, vector in vectors.items():
                        anchors[layer].append(vector)
            anchor = {x: torch.cat(p) if p else torch.empty(0, 0) for x, p in anchors.items()}
            made = {
                name: {layer: make(anchor[layer]) for layer in layers}
                for name, make in reducers.items()
            }
            for index, vectors in features(fast, obj, positions, layers, chain=chain, **options):
                for mine in made.values():
                    for layer, vector in vectors.items():
                        mine[layer].update(index, vector)
                bar.update(len(index))
            yield {name: {x: r.result() for x, r in mine.items()} for name, mine in made.items()}


def sweep(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    *,
    size: int = 125,
    canvas: int = 224,
    stride: int = 1,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: Pool = "mean",
    span: int = 32,
    batch_size: int | None = None,
    optimise: bool = True,
    share: bool | None = None,
    directory: str | Path | None = None,
    part: tuple[int, int] | None = None,
    progress: bool = False,
) -> dict[str, ShiftMaps]:
    r"""Cosine of the features at every grid position with those at five references.

    For object o at position p, features f(o, p) and reference r,
    :math:`S_r(p) = \langle f(o,p), f(o,r)\rangle / (\|f(o,p)\|\,\|f(o,r)\|)` (Lee, Yang & Wang
    2020, §3.1). Memory does not depend on the number of positions, save for the cosines.

    Args:
        encoder: a loaded encoder; the canvas need not be its input size if it takes others.
        objects: an `ImageSet` of RGBA cut-outs, or a sequence of tensors (4, h, w).
        layers: dotted layer names.
        size: side of the object on the canvas in pixels: 125 is Lee et al.'s large, 75 their small.
        canvas: side of the canvas in pixels.
        stride: of the grid in pixels; 1 is exhaustive.
        background: see :func:`paint`.
        pool: see :func:`features`.
        span: length in pixels of the two stride-1 lines through the centre from which the wiggle
            is taken when the grid is coarse; 32 is one period of most networks' stride. At stride 1
            the wiggle is over all neighbours of the grid and the lines cross the whole of it.
        batch_size: positions per forward pass; chosen for the device by default.
        optimise: run a copy of the encoder in channels-last order with batch norm folded into the
            convolutions (:func:`extract.optimise`): the same features, faster.
        share: compute the early layers once per stride phase (:mod:`phases`): the same features,
            faster where the background is one colour. By default on a CPU only, since an
            accelerator computes a position sooner than its map is put together; and only for many
            pictures, since planning takes a second or two.
        directory: keep each object's result here as soon as it is finished, in a file that appears
            whole or not at all. After an interrupt the same call goes on where it stopped. Several
            processes may fill one directory, each with its own `part`; :func:`read` gives what they
            made together.
        part: (i, n): only the objects i, i + n, i + 2n, … of all.
        progress: show a bar over all positions of all objects.

    Returns:
        For each layer its :class:`ShiftMaps`, on the CPU; of the part's objects if one is given.

    Raises:
        ValueError: a bad object (named), grid, background, layer, pool or part. Nothing is
            computed or written then.
        store.MismatchError: `directory` was begun with another encoder (its weights count), layers,
            objects, grid, background or pool, naming what differs; or holds something else.
    """
    _whole("span", span)
    places = grid(canvas, size, stride)
    span = canvas if stride == 1 else span
    layers, ground = _checked(encoder, objects, layers, size, canvas, background, pool, batch_size)
    indices = _part(part, len(objects))
    fixed, (_, _, unique, _) = references(canvas, size), _layout(places, span)
    run = functools.partial(
        _reduce, encoder, objects, layers, unique,
        {"": functools.partial(Cosines, count=len(unique))},
        size=size, ground=ground, references=fixed, pool=pool, batch_size=batch_size,
        optimise=optimise, share=share, progress=progress,
    )  # fmt: skip
    if directory is None:
        results = [found[""] for found in run(indices=indices)]
        return _assemble(results, layers, places, span)
    directory = Path(directory)
    config = {
        "encoder": encoder.name,
        "weight_hash": encoder.weight_hash,
        "layers": layers,
        "objects": store.digest([store.digest(objects[i]) for i in range(len(objects))]),
        "count": len(objects),
        "size": size,
        "canvas": canvas,
        "stride": stride,
        "span": span,
        "background": _colour(ground),
        "pool": pool,
    }
    _begin(directory, config)
    missing = [i for i in indices if _stored(directory, config, i) is None]
    for i, found in zip(missing, run(indices=missing) if missing else (), strict=True):
        tensors = {}
        for layer, (values, mutual) in found[""].items():
            tensors |= {f"{layer}/cosine": values, f"{layer}/references": mutual}
        store.save_tensors(directory / _shard(i), tensors, metadata={**config, "object": i})
    return _collect(directory, config, indices)


def read(directory: str | Path) -> dict[str, ShiftMaps]:
    """The maps of all objects that calls of :func:`sweep` left in a directory.

    Raises:
        ValueError: not such a directory, or objects are missing (their number is named).
    """
    directory = Path(directory)
    if not (directory / _CONFIG).is_file():
        raise ValueError(f"{directory} holds no maps written by shift.sweep")
    config = store.read_json(directory / _CONFIG)
    return _collect(directory, config, range(config["count"]))


_CONFIG = "config.json"
Found = dict[str, tuple[Tensor, Tensor]]


def _shard(i: int) -> str:
    return f"object-{i:05d}.safetensors"


def _part(part: tuple[int, int] | None, count: int) -> range:
    """Indices of the objects that a part holds."""
    if part is None:
        return range(count)
    if len(part) != 2 or not all(isinstance(x, int) for x in part) or not 0 <= part[0] < part[1]:
        raise ValueError(f"part is (i, n) with 0 <= i < n, not {part!r}")
    if part[0] >= count:
        raise ValueError(f"part {part} holds none of {count} objects")
    return range(part[0], count, part[1])


def _colour(ground: Tensor) -> list[float] | str:
    """What tells a background from others: its levels, or a photograph's digest."""
    levels = ground[:, 0, 0]
    if bool((ground == levels[:, None, None]).all()):
        return [round(float(level), 6) for level in levels]
    return store.digest(ground)


def _begin(directory: Path, config: dict[str, Any]) -> None:
    """Start a directory, or check that it was started for the same maps."""
    if not (directory / _CONFIG).is_file():
        # another process may be at the same place: its temporary files begin with a dot
        others = directory.iterdir() if directory.is_dir() else ()
        if any(x.name != _CONFIG and not x.name.startswith(".") for x in others):
            raise store.MismatchError(f"{directory} is not empty and was not begun by shift.sweep")
        store.write_json(directory / _CONFIG, config)
    found = store.read_json(directory / _CONFIG)
    for key, value in config.items():
        if found.get(key) != value:
            raise store.MismatchError(
                f"{directory} holds maps of other origin: {key} is {found.get(key)!r} there, "
                f"{value!r} here; choose another directory or delete this one"
            )


def _stored(directory: Path, config: dict[str, Any], i: int) -> Found | None:
    """One object's result, or None if it is not there in full."""
    path = directory / _shard(i)
    try:
        tensors, _ = store.load_tensors(path, expect={**config, "object": i})
    except FileNotFoundError:
        return None
    except store.MismatchError:
        raise
    except ValueError:  # cut short by a full disk
        return None
    return {x: (tensors[f"{x}/cosine"], tensors[f"{x}/references"]) for x in config["layers"]}


def _collect(
    directory: Path, config: dict[str, Any], indices: Sequence[int]
) -> dict[str, ShiftMaps]:
    found = [_stored(directory, config, i) for i in indices]
    results = [one for one in found if one is not None]
    if len(results) < len(found):
        raise ValueError(
            f"{directory} lacks {len(found) - len(results)} of {len(found)} objects: the same "
            "shift.sweep continues it"
        )
    places = grid(config["canvas"], config["size"], config["stride"])
    return _assemble(results, config["layers"], places, config["span"])


def _layout(places: Grid, span: int) -> tuple[Tensor, int, Tensor, Tensor]:
    """Of grid and scan: offsets (L,), grid's share, unique positions, where each of all is in them.

    They share positions, and every picture is made once.
    """
    offsets, scan = _scan(places.canvas, places.size, span)
    both = torch.cat([places.positions, scan])
    unique, inverse = torch.unique(both, dim=0, return_inverse=True)
    return offsets, len(places.positions), unique, inverse


def _assemble(
    results: Sequence[Found], layers: Sequence[str], places: Grid, span: int
) -> dict[str, ShiftMaps]:
    offsets, count, _, inverse = _layout(places, span)
    fixed = references(places.canvas, places.size)
    maps_of = {}
    for layer in layers:
        values = torch.stack([found[layer][0] for found in results])[:, inverse]
        maps = values[:, :count].transpose(1, 2).reshape(-1, 5, *places.shape)
        profile = values[:, count:, _CENTRE].reshape(-1, 2, len(offsets))
        if places.stride == 1:
            centre = maps[:, _CENTRE]
            steps = [centre.diff(dim=1).flatten(1), centre.diff(dim=2).flatten(1)]
        else:
            steps = [profile.diff(dim=2).flatten(1)]
        wiggle = torch.cat(steps, 1).abs().mean(1)
        among = torch.stack([found[layer][1] for found in results])
        maps_of[layer] = ShiftMaps(
            maps.contiguous(), places, fixed, among, wiggle, profile, offsets
        )
    return maps_of


def pairwise(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    *,
    size: int = 125,
    canvas: int = 224,
    stride: int = 16,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: Pool = "mean",
    max_gigabytes: float = 2.0,
    batch_size: int | None = None,
    optimise: bool = True,
    share: bool | None = None,
    progress: bool = False,
) -> dict[str, Pairwise]:
    """Cosine of the features at any two positions of a grid: every position is a reference.

    The result holds 4·O·L·P² bytes for O objects, L layers and P positions, so grids must be
    coarse: 80 objects and 5 layers at 49 positions (stride 16) make 4 MB, at 10 000 (stride 1)
    160 GB. While one object is computed, its features (P·D numbers a layer) are held as well.

    `max_gigabytes` is the largest result allowed. All else as in :func:`sweep`.

    Returns:
        For each layer its :class:`Pairwise`, on the CPU.

    Raises:
        ValueError: as :func:`sweep`; a result that would be too large, naming its size and the
            stride that would do.
    """
    places = grid(canvas, size, stride)
    layers, ground = _checked(encoder, objects, layers, size, canvas, background, pool, batch_size)

    def gigabytes(positions: int) -> float:
        return 4 * len(objects) * len(layers) * positions**2 / 1e9

    count, room = len(places.positions), canvas - size
    if gigabytes(count) > max_gigabytes:
        fits = [
            s for s in range(stride, room + 1) if gigabytes((room // s + 1) ** 2) <= max_gigabytes
        ]
        raise ValueError(
            f"the cosines of {count} positions with one another, {len(objects)} objects and "
            f"{len(layers)} layers, are {gigabytes(count):.3g} GB, more than {max_gigabytes:g}: "
            + (f"a stride of {fits[0]} would do" if fits else "take fewer objects or layers")
        )
    cosine: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for found in _reduce(
        encoder, objects, layers, places.positions, {"": functools.partial(Pairs, count=count)},
        size=size, ground=ground, references=None, pool=pool, batch_size=batch_size,
        optimise=optimise, share=share, progress=progress,
    ):  # fmt: skip
        for layer, values in found[""].items():
            cosine[layer].append(values)
    return {layer: Pairwise(torch.stack(cosine.pop(layer)), places) for layer in layers}


def _mean_over_positions(maps: ShiftMaps, chosen: Sequence[int]) -> Tensor:
    """Mean over positions and chosen references, without a reference's cosine with itself."""
    totals = []
    for r in chosen:
        keep = (maps.grid.positions != maps.references[r]).any(1)
        totals.append(maps.cosine[:, r].flatten(1)[:, keep].mean(1))
    return torch.stack(totals, 1).mean(1)


def global_cosine(maps: ShiftMaps) -> Tensor:
    """(O,) mean cosine to the four corner references over all other positions."""
    return _mean_over_positions(maps, _CORNERS)


def centre_cosine(maps: ShiftMaps) -> Tensor:
    """(O,) mean cosine to the centre reference over all other positions."""
    return _mean_over_positions(maps, [_CENTRE])


def floors(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    *,
    size: int = 125,
    canvas: int = 224,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
) -> dict[str, Floors]:
    """The scale on which a sweep's cosines are to be read: other objects, and no object.

    Two pictures that share most of a plain canvas have similar features whatever is on them. The
    cosine of different objects at one position, and of an object with the empty canvas, say how
    much of a high cosine is the canvas's. Memory is O·D: take care with `pool="flatten"`.

    Arguments and errors as :func:`sweep`.
    """
    layers, ground = _checked(encoder, objects, layers, size, canvas, background, pool, batch_size)
    fast = extract.optimise(encoder, keep=layers) if optimise else encoder
    centre = references(canvas, size)[_CENTRE:][:1]
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for obj in _prepared(objects, size):
        for _, vectors in features(
            fast, obj, centre, layers, canvas=canvas, background=ground, pool=pool,
            batch_size=batch_size,
        ):  # fmt: skip
            for layer, vector in vectors.items():
                parts[layer].append(_unit(vector))
    with torch.no_grad(), taps.read(fast, layers) as read:
        none = read(ground[None].to(fast.device))
    result = {}
    for layer in layers:
        unit = torch.cat(parts[layer])
        blank = _unit(_vectors(none[layer], pool))
        result[layer] = Floors(
            between=(unit @ unit.T).clamp(-1, 1).cpu(),
            empty=(unit @ blank[0]).clamp(-1, 1).cpu(),
        )
    return result
