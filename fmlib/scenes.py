"""Shift protocols: a picture as a function of a position, whole or fractional.

Lee, Yang & Wang (2020) move an object over a plain canvas (:func:`paste`) and slide a window over a
photograph (:func:`crop`, as Zhang 2019 does); Chaman & Dokmanić (2021) shift circularly
(:func:`circular`). In a photograph with an object (:func:`composite`) three more shifts can be told
apart: the object moves, its background moves, or both do, as when the camera turns.

Fractions of a pixel are band-limited: the phase of each Fourier component is turned
(:func:`translate`). Whole positions never pass through a transform and are exact.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import extract, shift, stats, taps
from .encoders import Encoder

__all__ = [
    "Scene",
    "by_displacement",
    "circular",
    "composite",
    "cosines",
    "crop",
    "features",
    "grid",
    "line",
    "overshoot",
    "paste",
    "pictures",
    "recovery",
    "soften",
    "translate",
    "vectors",
]

Ends = Literal["circular", "mirror"]
Moving = Literal["object", "background", "both"]
Pool = Literal["mean", "flatten"]

#: Transparent pixels on each side of a cut-out while it is moved by a fraction of a pixel: room for
#: the ringing of its edges.
MARGIN = 16

_WHOLE = 1e-9  # a position this near to a whole number is one


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture for every position between two corners; made by the functions of this module."""

    protocol: str  #: "paste", "crop", "circular", "object", "background" or "both"
    shape: tuple[int, int]  #: height and width of the pictures, px
    low: tuple[float, float]  #: least position (y, x), px
    high: tuple[float, float]  #: greatest position (y, x), px
    draw: Callable[[float, float], Tensor] = field(repr=False)
    """One picture (3, H, W), not yet clamped to [0, 1]; use :func:`pictures`."""


# ---------------------------------------------------------------------------------------- checks


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}{hint}")


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
    return value


def _photo(image: Any, name: str = "a photograph") -> Tensor:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"{name} is a tensor of shape (3, h, w), not {shape}")
    if not image.is_floating_point() or not bool(((image > -1e-5) & (image < 1 + 1e-5)).all()):
        raise ValueError(f"{name} must be float, finite and lie in [0, 1]")
    return image.float()


def _room(image: Tensor, window: int) -> tuple[int, int]:
    """Largest whole position of a window in an image."""
    height, width = image.shape[-2:]
    if min(height, width) < window:
        raise ValueError(
            f"a photograph of {height}x{width} px is smaller than the window of {window} px"
        )
    return height - window, width - window


def _cutout(obj: Any, window: int) -> tuple[int, int]:
    """Height and width of a checked RGBA cut-out that fits into the window."""
    largest = max(obj.shape[-2:]) if isinstance(obj, Tensor) and obj.ndim == 3 else window
    # compose knows what an object must be
    shift.compose(obj, torch.zeros(1, 2, dtype=torch.long), canvas=max(largest, 1))
    if largest > window:
        raise ValueError(f"an object of {largest} px does not fit in a window of {window} px")
    return obj.shape[1], obj.shape[2]


def _pair(name: str, value: Sequence[int], high: tuple[int, int]) -> tuple[int, int]:
    y, x = (int(part) for part in value)
    if (y, x) != tuple(value) or not (0 <= y <= high[0] and 0 <= x <= high[1]):
        raise ValueError(
            f"{name} must be whole numbers (y, x) between (0, 0) and {high}, not {tuple(value)}"
        )
    return y, x


def _positions(positions: Any) -> Tensor:
    """Positions as (P, 2) float64, finite."""
    at = torch.as_tensor(positions, dtype=torch.float64, device="cpu")
    if at.ndim != 2 or at.shape[1] != 2 or not len(at):
        raise ValueError(f"positions are numbers (P, 2), at least one, not {tuple(at.shape)}")
    if not bool(torch.isfinite(at).all()):
        bad = int((~torch.isfinite(at)).any(1).nonzero()[0, 0])
        raise ValueError(f"position {bad} is not finite: {tuple(at[bad].tolist())}")
    return at


def _inside(scene: Scene, positions: Any) -> Tensor:
    at = _positions(positions)
    low, high = at.new_tensor(scene.low), at.new_tensor(scene.high)
    outside = ((at < low - _WHOLE) | (at > high + _WHOLE)).any(1)
    if outside.any():
        first = tuple(at[outside][0].tolist())
        raise ValueError(
            f"position (y, x) = {first} lies outside the protocol {scene.protocol!r}: "
            f"it goes from {scene.low} to {scene.high}"
        )
    return at


def _split(value: float) -> tuple[int, float]:
    """Whole part and fraction in [0, 1)."""
    near = round(value)
    if abs(value - near) < _WHOLE:
        return near, 0.0
    whole = math.floor(value)
    return whole, value - whole


# ------------------------------------------------------------------------------------ translation


def _turn(x: Tensor, fraction: float, axis: int) -> Tensor:
    """Shift a periodic signal by a fraction of a sample: multiply by e^(-2πi·f·fraction)."""
    length = x.shape[axis]
    wide = x.float() if x.device.type == "mps" else x.double()  # mps has no float64
    waves = torch.fft.rfft(wide, dim=axis)
    phase = torch.arange(waves.shape[axis], device=x.device) * (-2 * math.pi * fraction / length)
    ramp = torch.polar(torch.ones_like(phase), phase).to(waves.dtype)
    if length % 2 == 0:
        # ±1/2 are one bin; the two ways of turning it average to a cosine, and stay real
        ramp[-1] = math.cos(math.pi * fraction)
    shape = [1] * x.ndim
    shape[axis] = -1
    return torch.fft.irfft(waves * ramp.reshape(shape), n=length, dim=axis).to(x.dtype)


def translate(x: Tensor, by: tuple[float, float], *, ends: Ends = "circular") -> Tensor:
    r"""Move pictures (..., H, W) down and to the right by (dy, dx) px, fractions band-limited.

    Along each axis the Fourier coefficients :math:`\hat x_k` become
    :math:`\hat x_k e^{-2\pi i k d/n}`: every sine is moved exactly, and nothing is attenuated.
    An even number of samples has one exception, the coefficient at half a cycle per sample, which
    is multiplied by :math:`\cos \pi d`, so that the picture stays real: moving by d and back by -d
    is the identity for odd sizes, and for even ones but for that component. Whole
    parts are moved by copying, without rounding. What has sharp edges rings: values leave [0, 1].

    Args:
        x: float tensor.
        by: (dy, dx) in px; fractions allowed, either sign.
        ends: "circular", what leaves on one side enters on the other; "mirror", the picture is
            reflected at its ends (half-sample symmetric), for photographs, whose opposite ends do
            not fit one another.

    Raises:
        ValueError: a shift that is not finite, unknown `ends`, or not a float picture.
    """
    _choice("ends", ends, ("circular", "mirror"))
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"pictures are float (..., H, W), not {x.dtype} {tuple(x.shape)}")
    if len(by) != 2 or not all(math.isfinite(part) for part in by):
        raise ValueError(f"a shift is two finite numbers (dy, dx), not {tuple(by)}")
    for axis, distance in ((-2, by[0]), (-1, by[1])):
        whole, fraction = _split(float(distance))
        if not whole and not fraction:
            continue
        length = x.shape[axis]
        if ends == "mirror":
            x = torch.cat([x, x.flip(axis)], axis)
        if whole:
            x = x.roll(whole, axis)
        if fraction:
            x = _turn(x, fraction, axis)
        if ends == "mirror":
            x = x.narrow(axis, 0, length)
    return x


def soften(picture: Tensor, sigma: float = 0.7) -> Tensor:
    """A cut-out or photograph with its finest detail removed by a Gaussian: it rings less.

    At half a cycle per pixel the default leaves a tenth of the amplitude. Pictures that are to be
    moved by fractions need it: band-limited interpolation turns what a camera's sharpening put at
    the highest frequencies into ripples, which networks see at fractions only.

    Args:
        picture: RGBA cut-out (4, h, w) with straight alpha, or photograph (3, h, w); float in
            [0, 1].
        sigma: standard deviation of the Gaussian, px; 0 changes nothing.

    Returns:
        A photograph of the same size, its ends mirrored; or a cut-out (4, h + 2r, w + 2r) with
        straight alpha and r = ceil(3·sigma), for what runs over its edge.

    Raises:
        ValueError: a bad cut-out or photograph, or sigma negative or not finite.
    """
    cutout = isinstance(picture, Tensor) and picture.ndim == 3 and picture.shape[0] == 4
    if cutout:
        _cutout(picture, max(picture.shape[-2:]))
    else:
        _photo(picture, "a picture without alpha")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number of pixels, at least 0, not {sigma!r}")
    picture = picture.float()
    reach = math.ceil(3 * sigma)
    if not reach:
        return picture
    place = torch.arange(-reach, reach + 1, dtype=torch.float32, device=picture.device)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    kernel = kernel / kernel.sum()
    layers = picture
    if cutout:
        layers = F.pad(torch.cat([picture[:3] * picture[3:], picture[3:]]), (2 * reach,) * 4)
    else:
        for axis in (-2, -1):  # half-sample symmetric, as `translate` has it
            ends = layers.narrow(axis, 0, reach), layers.narrow(axis, -reach, reach)
            layers = torch.cat([ends[0].flip(axis), layers, ends[1].flip(axis)], axis)
    layers = F.conv2d(layers[:, None], kernel[None, None, :, None])
    layers = F.conv2d(layers, kernel[None, None, None])[:, 0].clamp(0, 1)
    if not cutout:
        return layers
    alpha = layers[3:]
    colour = torch.where(alpha > 0, layers[:3] / alpha.clamp_min(1e-12), 0.0).clamp(0, 1)
    return torch.cat([colour, alpha])


# ---------------------------------------------------------------------------------------- scenes


def _over(ground: Tensor, front: Tensor, alpha: Tensor, y: int, x: int) -> Tensor:
    """A premultiplied layer over a picture, its corner at (y, x), cut off where it leaves."""
    height, width = ground.shape[-2:]
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + front.shape[-2], height), min(x + front.shape[-1], width)
    rows, columns = slice(top - y, bottom - y), slice(left - x, right - x)
    out = ground.clone()
    under = out[:, top:bottom, left:right]
    out[:, top:bottom, left:right] = under * (1 - alpha[:, rows, columns]) + front[:, rows, columns]
    return out


def _mover(obj: Tensor) -> Callable[[Tensor, float, float], Tensor]:
    """A function that lays the object over a picture at any position of its corner."""
    obj = obj.float()
    alpha = obj[3:]
    front = obj[:3] * alpha
    height, width = obj.shape[1:]
    # an odd frame: then all components are moved alike, and none is lost
    frame = (MARGIN, MARGIN + (width + 1) % 2, MARGIN, MARGIN + (height + 1) % 2)
    padded = F.pad(torch.cat([front, alpha]), frame)

    @functools.lru_cache(maxsize=4)
    def moved(dy: float, dx: float) -> Tensor:
        return translate(padded, (dy, dx))

    def lay(ground: Tensor, y: float, x: float) -> Tensor:
        (row, dy), (column, dx) = _split(y), _split(x)
        if not dy and not dx:
            return _over(ground, front, alpha, row, column)
        layers = moved(dy, dx)
        return _over(ground, layers[:3], layers[3:], row - MARGIN, column - MARGIN)

    return lay


def _slider(image: Tensor, window: int) -> Callable[[float, float], Tensor]:
    """A function that cuts a window with its corner at any position of the image."""

    @functools.lru_cache(maxsize=4)
    def moved(dy: float, dx: float) -> Tensor:
        return translate(image, (-dy, -dx), ends="mirror")

    def cut(y: float, x: float) -> Tensor:
        (row, dy), (column, dx) = _split(y), _split(x)
        source = moved(dy, dx) if dy or dx else image
        return source[:, row : row + window, column : column + window]

    return cut


def paste(
    obj: Tensor,
    *,
    canvas: int = 224,
    background: str | float | Sequence[float] | Tensor = "white",
) -> Scene:
    """An object on a background that stays (Lee et al. 2020, experiment 1).

    The position is that of the object's top-left corner. Whole positions give what
    :func:`shift.compose` gives, bit for bit. At fractions the object's premultiplied layers are
    translated, with `MARGIN` transparent pixels around them; on a plain background that is the
    band-limited translation of the whole picture. Ringing that leaves the canvas is cut off.

    Args:
        obj: (4, h, w) RGBA with straight alpha, float in [0, 1] (:func:`shift.prepare`).
        canvas: side of the picture, px.
        background: see :func:`shift.paint`: a colour or a photograph (3, canvas, canvas).

    Raises:
        ValueError: an object without alpha, with an empty mask or larger than the canvas; a bad
            background.
    """
    height, width = _cutout(obj, _count("canvas", canvas))
    ground = shift.paint(background, canvas, device=obj.device)
    lay = _mover(obj)
    return Scene(
        "paste",
        (canvas, canvas),
        (0.0, 0.0),
        (float(canvas - height), float(canvas - width)),
        lambda y, x: lay(ground, y, x),
    )


def crop(photo: Tensor, window: int = 224) -> Scene:
    """A window slid over a photograph (Zhang 2019; Lee et al. 2020's `plane`).

    The position is that of the window's top-left corner; what is seen moves the other way, and
    enters and leaves at the ends. Whole positions are slices. At fractions the whole photograph is
    translated with mirrored ends, so that no window sees the opposite end.

    Args:
        photo: (3, H, W) float in [0, 1].
        window: side of the picture, px.

    Raises:
        ValueError: a bad photograph, or one smaller than the window.
    """
    photo = _photo(photo)
    room = _room(photo, _count("window", window))
    high = (float(room[0]), float(room[1]))
    return Scene("crop", (window, window), (0.0, 0.0), high, _slider(photo, window))


def circular(photo: Tensor) -> Scene:
    """A picture shifted on a torus: what leaves on one side enters on the other.

    The content is always the same, but an edge that is in no photograph runs through it. The
    position is the way the content moves, down and to the right, without limit; whole shifts are
    `torch.roll`. See :func:`translate` for even sizes.

    Args:
        photo: (3, H, W) float in [0, 1].

    Raises:
        ValueError: a bad photograph.
    """
    photo = _photo(photo)
    ends = (math.inf, math.inf)
    return Scene(
        "circular",
        (photo.shape[1], photo.shape[2]),
        (-math.inf, -math.inf),
        ends,
        lambda y, x: translate(photo, (y, x)),
    )


def composite(
    obj: Tensor,
    photo: Tensor,
    *,
    moving: Moving,
    window: int = 224,
    at: Sequence[int] | None = None,
    place: Sequence[int] | None = None,
) -> Scene:
    """An object in a photograph of which a window is seen; one of the two moves, or both.

    The position is the displacement (dy, dx) of what moves, in the picture, from the start: all
    three show the same picture at (0, 0).

    * "object": the object moves, the background stays: as :func:`paste` on that window.
    * "background": the background moves, the object stays.
    * "both": both move, as if the camera had turned the other way: the :func:`crop` shift of the
      composed photograph.

    The object stays whole in all of them, and the background never ends.

    Args:
        obj: (4, h, w) RGBA with straight alpha, float in [0, 1], of its size.
        photo: (3, H, W) float in [0, 1].
        moving: what moves.
        window: side of the picture, px.
        at: whole (y, x) corner of the window in the photograph at the start; the middle by default.
        place: whole (y, x) corner of the object in the window at the start; the middle by default.

    Raises:
        ValueError: a bad object or photograph, a window larger than the photograph, an object
            larger than the window, a start outside, or unknown `moving`.
    """
    _choice("moving", moving, ("object", "background", "both"))
    photo = _photo(photo)
    rooms = _room(photo, _count("window", window))
    height, width = _cutout(obj, window)
    free = window - height, window - width
    top, left = _pair("at", at if at is not None else (rooms[0] // 2, rooms[1] // 2), rooms)
    y0, x0 = _pair("place", place if place is not None else (free[0] // 2, free[1] // 2), free)
    still = photo[:, top : top + window, left : left + window]
    lay = _mover(obj)
    # how far down and to the right each may move, and how far back
    by_object = ((-y0, -x0), (free[0] - y0, free[1] - x0))
    by_ground = ((top - rooms[0], left - rooms[1]), (top, left))
    if moving == "object":
        low, high = by_object

        def draw(y: float, x: float) -> Tensor:
            return lay(still, y0 + y, x0 + x)

    elif moving == "background":
        low, high = by_ground
        cut = _slider(photo, window)

        def draw(y: float, x: float) -> Tensor:
            return lay(cut(top - y, left - x), y0, x0)

    else:
        low = tuple(max(a, b) for a, b in zip(by_object[0], by_ground[0], strict=True))
        high = tuple(min(a, b) for a, b in zip(by_object[1], by_ground[1], strict=True))
        whole = _slider(lay(photo, top + y0, left + x0), window)

        def draw(y: float, x: float) -> Tensor:
            return whole(top - y, left - x)

    return Scene(
        moving,
        (window, window),
        (float(low[0]), float(low[1])),
        (float(high[0]), float(high[1])),
        draw,
    )


def grid(scene: Scene, step: float) -> tuple[Tensor, tuple[int, int]]:
    """Positions `step` px apart over all of a scene, from its least position on.

    Returns:
        (R·C, 2) float64 positions, row by row, and (R, C).

    Raises:
        ValueError: a step that is not positive, a scene without ends, or a single position.
    """
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be a positive number of pixels, not {step!r}")
    if not all(math.isfinite(end) for end in (*scene.low, *scene.high)):
        raise ValueError(f"the protocol {scene.protocol!r} has no ends: give positions by line")
    sides = [
        low + step * torch.arange(math.floor((high - low) / step + _WHOLE) + 1, dtype=torch.float64)
        for low, high in zip(scene.low, scene.high, strict=True)
    ]
    if len(sides[0]) * len(sides[1]) == 1:
        raise ValueError(
            f"with a step of {step} px the protocol {scene.protocol!r}, from {scene.low} to "
            f"{scene.high}, has a single position"
        )
    return torch.cartesian_prod(*sides), (len(sides[0]), len(sides[1]))


def line(start: Sequence[float], offsets: Any, *, axis: int = 1) -> Tensor:
    """Positions (L, 2) at offsets from a start: down (axis 0) or to the right (axis 1), px.

    Raises:
        ValueError: another axis, a start that is not a pair, no offsets, or numbers not finite.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (down) or 1 (to the right), not {axis!r}")
    away = torch.as_tensor(offsets, dtype=torch.float64).flatten()
    along = torch.zeros(len(away), 2, dtype=torch.float64)
    along[:, axis] = away
    return _positions(_positions(torch.as_tensor(start, dtype=torch.float64)[None]) + along)


def _stack(scene: Scene, at: Tensor) -> Tensor:
    return torch.stack([scene.draw(y, x) for y, x in at.tolist()])


def pictures(scene: Scene, positions: Any) -> Tensor:
    """The pictures at positions (P, 2): (P, 3, H, W) float32 in [0, 1], clamped.

    Raises:
        ValueError: positions that are not finite, of another shape, or outside the scene.
    """
    return _stack(scene, _inside(scene, positions)).clamp(0, 1)


def overshoot(scene: Scene, positions: Any) -> Tensor:
    """(P,) root mean square of what :func:`pictures` clamps away, in grey levels of [0, 1].

    Zero at whole positions. Raises as :func:`pictures`.
    """
    raw = _stack(scene, _inside(scene, positions)).double()
    return (raw - raw.clamp(0, 1)).square().mean((1, 2, 3)).sqrt().cpu()


# --------------------------------------------------------------------------------------- features


def _pooled(maps: Tensor, pool: Pool) -> Tensor:
    if maps.ndim == 2 or pool == "flatten":
        return maps.flatten(1).float()
    return maps.float().mean(dim=tuple(range(2, maps.ndim)))


def _unit(values: Tensor) -> Tensor:
    """Rows of length one, in float64: rounding must not show in cosines next to 1."""
    return F.normalize(stats.float64(values), dim=1)


def _names(layers: Sequence[str]) -> list[str]:
    if isinstance(layers, str):
        raise ValueError(f"layers is a list of names, not the single string {layers!r}")
    if not layers:
        raise ValueError("give at least one layer")
    return list(dict.fromkeys(layers))


def features(
    encoder: Encoder,
    scene: Scene,
    positions: Any,
    layers: Sequence[str],
    *,
    pool: Pool = "mean",
    batch_size: int | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Stream the features of one scene at many positions.

    Yields:
        `(index, vectors)`: the indices (B,) into `positions` of this batch, and for each layer its
        features (B, D) on the encoder's device. Every index comes exactly once, in order.

    Args:
        encoder: where the pictures go.
        scene: what to show; drawn where its tensors lie, so give these on the encoder's device.
        positions: (P, 2) numbers (y, x), px, fractions allowed.
        layers: dotted layer names.
        pool: how a feature map becomes a vector: "mean" over space, or "flatten".
        batch_size: positions per forward pass; chosen for the device by default.

    Raises:
        ValueError: positions as in :func:`pictures`, an unknown `pool` or layer, a bad batch size.
    """
    _choice("pool", pool, ("mean", "flatten"))
    layers = _names(layers)
    at = _inside(scene, positions)
    size = (
        (4 if encoder.device.type == "cpu" else 256)
        if batch_size is None
        else _count("batch_size", batch_size)
    )
    with torch.no_grad(), taps.read(encoder, layers) as read:
        for index in torch.arange(len(at)).split(size):
            maps = read(_stack(scene, at[index]).clamp(0, 1).to(encoder.device))
            yield index, {layer: _pooled(maps[layer], pool) for layer in layers}


def _for_each(positions: Any, i: int) -> Any:
    """Positions of scene i, given (P, 2) for all or (S, P, 2)."""
    at = torch.as_tensor(positions, dtype=torch.float64)
    if at.ndim != 3:
        return at
    if i >= len(at):
        raise ValueError(f"positions are given for {len(at)} scenes, and there are more")
    return at[i]


def _ready(encoder: Encoder, layers: Sequence[str], optimise: bool) -> Encoder:
    with taps.read(encoder, layers):  # an unknown layer is named here, with its closest
        pass
    return extract.optimise(encoder, keep=layers) if optimise else encoder


def vectors(
    encoder: Encoder,
    scenes: Iterable[Scene],
    positions: Any,
    layers: Sequence[str],
    *,
    pool: Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Unit feature vectors of every scene at a few positions: per layer (S, P, D) float64.

    All are held in memory; for many positions use :func:`cosines`. Arguments and errors as there.
    """
    layers = _names(layers)
    fast = _ready(encoder, layers, optimise)
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for i, scene in enumerate(tqdm(scenes, unit="scene", disable=not progress, leave=False)):
        parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        at = _for_each(positions, i)
        for _, batch in features(fast, scene, at, layers, pool=pool, batch_size=batch_size):
            for layer, values in batch.items():
                parts[layer].append(_unit(values).cpu())
        for layer in layers:
            found[layer].append(torch.cat(parts[layer]))
    if not found[layers[0]]:
        raise ValueError("no scenes to show")
    return {layer: torch.stack(values) for layer, values in found.items()}


def cosines(
    encoder: Encoder,
    scenes: Iterable[Scene],
    positions: Any,
    layers: Sequence[str],
    *,
    references: Any = None,
    pool: Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Cosine of the features at every position with those at the references, scene by scene.

    Memory holds one scene's reference vectors and the cosines, whatever the number of positions.

    Args:
        encoder: a loaded encoder; the pictures need not be of its input size if it takes others.
        scenes: S scenes, read one after another.
        positions: (P, 2) numbers (y, x), px, for all scenes, or (S, P, 2).
        layers: dotted layer names.
        references: (R, 2) or (S, R, 2) positions; by default all `positions`, pairwise.
        pool: see :func:`features`.
        batch_size: positions per forward pass; chosen for the device by default.
        optimise: run a faster copy of the encoder (:func:`extract.optimise`): the same features.
        progress: show a bar over the scenes.

    Returns:
        Per layer (S, R, P) float64 in [-1, 1], on the CPU.

    Raises:
        ValueError: no scenes, or as :func:`features`.
    """
    layers = _names(layers)
    fast = _ready(encoder, layers, optimise)
    result: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for i, scene in enumerate(tqdm(scenes, unit="scene", disable=not progress, leave=False)):
        at = _inside(scene, _for_each(positions, i))
        fixed = at if references is None else _inside(scene, _for_each(references, i))
        parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for _, batch in features(fast, scene, fixed, layers, pool=pool, batch_size=batch_size):
            for layer, values in batch.items():
                parts[layer].append(_unit(values))
        anchors = {layer: torch.cat(values) for layer, values in parts.items()}
        if references is None:
            for layer, unit in anchors.items():
                result[layer].append((unit @ unit.T).clamp(-1, 1).cpu())
            continue
        columns = {layer: torch.empty(len(fixed), len(at), dtype=torch.float64) for layer in layers}
        for index, batch in features(fast, scene, at, layers, pool=pool, batch_size=batch_size):
            for layer, values in batch.items():
                cosine = anchors[layer] @ _unit(values).T
                columns[layer][:, index] = cosine.clamp(-1, 1).cpu()
        for layer in layers:
            result[layer].append(columns[layer])
    if not result[layers[0]]:
        raise ValueError("no scenes to show")
    return {layer: torch.stack(values) for layer, values in result.items()}


# --------------------------------------------------------------------------------------- reducers


def by_displacement(
    cosine: Tensor, positions: Any, references: Any = None
) -> tuple[Tensor, Tensor]:
    """Average cosines over all pairs (reference, position) of equal displacement.

    A cosine has no direction, so a displacement and its opposite count as one: the sign is chosen
    such that dy > 0, or dy = 0 and dx >= 0.

    Args:
        cosine: (S, R, P) of :func:`cosines`.
        positions: (P, 2), of any one scene.
        references: (R, 2); by default the positions.

    Returns:
        Displacements (K, 2) float64 in ascending order, and the means (S, K): one value per scene,
        so that an interval can be taken over scenes.

    Raises:
        ValueError: shapes that do not fit.
    """
    at = _positions(positions)
    fixed = at if references is None else _positions(references)
    if cosine.ndim != 3 or tuple(cosine.shape[1:]) != (len(fixed), len(at)):
        raise ValueError(
            f"cosines (S, R, P) of {tuple(cosine.shape)} do not fit {len(fixed)} references and "
            f"{len(at)} positions"
        )
    way = (at[None] - fixed[:, None]).reshape(-1, 2)
    back = (way[:, :1] < -_WHOLE) | ((way[:, :1].abs() <= _WHOLE) & (way[:, 1:] < 0))
    way = torch.where(back, -way, way)
    # rounded, so that .1 + .2 and .3 are one displacement, and without -0
    found, which = torch.unique((way * 1e6).round() / 1e6 + 0.0, dim=0, return_inverse=True)
    total = torch.zeros(len(cosine), len(found), dtype=torch.float64)
    total.index_add_(1, which, cosine.double().flatten(1))
    return found, total / torch.bincount(which, minlength=len(found))


def recovery(change: Tensor, distances: Any, stride: int, *, relative: bool = False) -> Tensor:
    r"""How special multiples of the stride are: the change that is undone there.

    :math:`\langle \tfrac12 (c_{(m-1/2)s} + c_{(m+1/2)s}) - c_{ms} \rangle_m` over the multiples
    m = 1, 2, ... whose neighbours half a stride away were measured on both sides. Zero for a
    change that grows along a straight line, negative for one that levels off; positive only if it
    dips at the multiples, as aliasing makes it do.

    Args:
        change: (..., K), e.g. one minus a cosine, at K distances.
        distances: (K,) px, without sign.
        stride: px.
        relative: as a share of the mean change at the neighbours: 1 if the change is undone
            wholly, 0 where there is none.

    Returns:
        (...) in units of `change`, or a share.

    Raises:
        ValueError: a bad stride, shapes that do not fit, or no multiple that can be judged.
    """
    _count("stride", stride)
    away = torch.as_tensor(distances, dtype=torch.float64).flatten()
    if change.shape[-1] != len(away):
        raise ValueError(f"changes at {change.shape[-1]} distances, of which {len(away)} are given")
    place = {round(float(distance), 6): i for i, distance in enumerate(away)}
    parts, beside = [], []
    for m in range(1, int(away.max() / stride) + 1):
        spots = [place.get(round(m * stride + side, 6)) for side in (-stride / 2, 0, stride / 2)]
        if None not in spots:
            low, mid, high = (change[..., spot] for spot in spots)
            beside.append((low + high) / 2)
            parts.append(beside[-1] - mid)
    if not parts:
        raise ValueError(
            f"no multiple of {stride} px has neighbours {stride / 2:g} px away on both sides among "
            f"the distances"
        )
    undone = torch.stack(parts, -1).mean(-1)
    if not relative:
        return undone
    size = torch.stack(beside, -1).mean(-1)
    return torch.where(size > 0, undone / torch.where(size > 0, size, 1.0), 0.0)
