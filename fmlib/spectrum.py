"""Spectra of shift maps: aliasing and positional bias told apart by their frequency.

The cosine C(p) between the features of an object at position p and at a reference is a signal over
p. Sampling every s-th value of a map makes it repeat itself with period s, so what a stride adds
lies at the frequencies k/s cycles per pixel and nowhere else (Zhang 2019, §3: features are shift
equivariant modulo the stride only). What the border adds follows the way travelled and lies at low
frequencies. The same two errors are separated in the feature map itself by shifting it back and
leaving out the units that see the border.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import extract, phases, shift, stats, taps
from .encoders import Encoder

__all__ = [
    "Aliasing",
    "Drift",
    "Equivariance",
    "Parts",
    "Scan",
    "Spectrum",
    "aliasing_power",
    "decompose",
    "drift",
    "equivariance",
    "harmonics",
    "interior",
    "psd",
    "scan",
    "window",
]

#: A line must hold this many periods of a stride: with a Hann window a harmonic fills the bin it
#: falls on and one on either side, and the next bin must be free of the next harmonic too.
PERIODS = 4


@dataclass(frozen=True)
class Spectrum:
    """Power by frequency of lines (..., L) or maps (..., H, W).

    Lines: one-sided, frequencies 0 to 1/2. Maps: two-sided along both axes, -1/2 to 1/2, zero in
    the middle. The power sums to the variance about the trend, weighted by the squared window.
    """

    power: Tensor  #: (..., F) or (..., F, G) float64, in squared units of the signal
    frequency: tuple[Tensor, ...]  #: of each axis, cycles per sample (pixel)
    lengths: tuple[int, ...]  #: samples along each axis


@dataclass(frozen=True)
class Aliasing:
    """What lies at the harmonics of a stride; all of the leading shape of the spectrum."""

    power: Tensor  #: within the bandwidth of the harmonics, in squared units of the signal
    share: Tensor  #: of the spectrum's total power; 0 where there is none
    background: Tensor  #: what the same bins would hold if they were like their neighbours between
    excess: Tensor  #: power above the background, summed over the harmonics that have any
    ratio: Tensor  #: power over background, geometric mean over the harmonics; 1 without any
    by_period: dict[int, Tensor]  #: the excess by period: 2, 4, ... samples, as in `harmonics`


@dataclass(frozen=True)
class Parts:
    """A line (..., L) as the sum of three."""

    slow: Tensor  #: polynomial, with the mean
    ripple: Tensor  #: repeats itself with the stride
    rest: Tensor  #: neither


@dataclass(frozen=True)
class Drift:
    """The slow part of a line (..., L), of the line's leading shape."""

    slope: Tensor  #: of the straight line through it, signal per sample
    power: Tensor  #: its variance, in squared units of the signal


@dataclass(frozen=True)
class Scan:
    """Cosines of one layer with the central reference, for O objects at single-pixel steps."""

    cosine: Tensor  #: (O, 2, L) down and across, or (O, W, W)
    offsets: Tensor  #: (L,) or (W,) int64 way from the reference along an axis, px
    stride: int  #: of the layer, px


@dataclass(frozen=True)
class Equivariance:
    """How far a layer is from moving with its input; O objects, S shifts.

    All errors are in units of the mean distance between different objects, on the same units.
    """

    bilinear: Tensor  #: (O, S) after shifting the map back, fractions of a unit interpolated
    nearest: Tensor  #: (O, S) after shifting the map back by whole units
    still: Tensor  #: (O, S) without shifting it back: what is not invariant
    shifts: Tensor  #: (S, 2) int64 (y, x), px
    stride: int  #: of the layer, px
    units: tuple[int, int]  #: rows and columns of units that were compared


# ------------------------------------------------------------------------------------ frequencies


def _stride(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"stride must be a whole number of pixels, at least 1, not {value!r}")
    return value


def harmonics(stride: int) -> dict[int, tuple[float, ...]]:
    """Frequencies k/stride up to 1/2 cycles per pixel, by the period that first has them.

    A frequency k/s in lowest terms belongs to the period s: it can appear once the strides so far
    multiply to s, and not before. ``harmonics(8)`` is ``{2: (1/2,), 4: (1/4,), 8: (1/8, 3/8)}``; a
    stride of 1 has none.

    Raises:
        ValueError: `stride` is not a positive whole number.
    """
    table: dict[int, list[float]] = {}
    for k in range(1, _stride(stride) // 2 + 1):
        table.setdefault(stride // math.gcd(k, stride), []).append(k / stride)
    return {period: tuple(table[period]) for period in sorted(table)}


def _signal(values: Any, dims: int) -> Tensor:
    """The values as float64 on the CPU, checked."""
    x = torch.as_tensor(values).detach().cpu().double()
    if x.ndim < dims or min(x.shape[-dims:], default=0) < 4:
        kind = "a line (..., L)" if dims == 1 else "a map (..., H, W)"
        raise ValueError(f"{kind} of at least 4 samples a side is wanted, not {tuple(x.shape)}")
    bad = ~torch.isfinite(x)
    if bad.any():
        raise ValueError(f"the signal is not finite at index {tuple(bad.nonzero()[0].tolist())}")
    return x


def _long_enough(length: int, stride: int) -> None:
    if stride > 1 and length < PERIODS * stride:
        raise ValueError(
            f"{length} samples hold {length / stride:.3g} periods of stride {stride}: harmonics "
            f"cannot be told from what lies between them with fewer than {PERIODS} periods, "
            f"{PERIODS * stride} samples"
        )


def _polynomials(shape: Sequence[int], order: int) -> Tensor:
    """(samples, K) all products of powers of the coordinates up to a total degree."""
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(f"order must be a whole number, 0 or more, not {order!r}")
    if order + 1 >= min(shape):
        raise ValueError(f"a polynomial of order {order} leaves nothing of {min(shape)} samples")
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape]
    columns = []
    if len(axes) == 1:
        columns = [axes[0] ** i for i in range(order + 1)]
    else:
        for i in range(order + 1):
            for j in range(order + 1 - i):
                columns.append((axes[0][:, None] ** i * axes[1] ** j).flatten())
    return torch.stack(columns, 1)


def psd(
    values: Any,
    *,
    dims: int = 1,
    order: int = 1,
    taper: Literal["hann", "none"] = "hann",
) -> Spectrum:
    r"""Power by frequency along the last axis, or over the last two.

    A polynomial is fitted and taken away, the rest is multiplied by a Hann window and transformed.
    With :math:`w` the window and :math:`r` the rest, the power at each frequency is
    :math:`|\hat{wr}|^2 / (N \sum w^2)`, so that by Parseval's theorem it sums to the weighted
    variance :math:`\sum w^2r^2 / \sum w^2`. The fit is weighted by the window, which makes the
    power at frequency 0 exactly zero.

    Args:
        values: lines (..., L), or with ``dims=2`` maps (..., H, W); real numbers.
        dims: 1 or 2.
        order: degree of the polynomial; 0 takes away the mean alone.
        taper: "hann", or "none" for no window: then the power sums to the plain variance, but a
            trend that the polynomial missed leaks into all frequencies.

    Raises:
        ValueError: values that are not finite (the first is named), fewer than 4 samples, or an
            option that is not one of the above.
    """
    if dims not in (1, 2):
        raise ValueError(f"dims must be 1 or 2, not {dims!r}")
    if taper not in ("hann", "none"):
        raise ValueError(f"taper must be 'hann' or 'none', not {taper!r}")
    x = _signal(values, dims)
    shape = tuple(x.shape[-dims:])
    # Periodic window: a sine with a whole number of periods fills exactly three bins.
    sides = [
        torch.hann_window(n, periodic=True, dtype=torch.float64)
        if taper == "hann"
        else torch.ones(n, dtype=torch.float64)
        for n in shape
    ]
    weight = functools.reduce(lambda a, b: a[:, None] * b, sides).flatten()
    basis, _ = torch.linalg.qr(weight.sqrt()[:, None] * _polynomials(shape, order))
    flat = x.reshape(-1, weight.numel())
    # weight·rest = √w·(√w·x − its projection on √w·polynomials)
    scaled = flat * weight.sqrt()
    rest = (scaled - (scaled @ basis) @ basis.T) * weight.sqrt()
    rest = rest.reshape(x.shape)
    scale = weight.numel() * weight.square().sum()
    if dims == 1:
        power = torch.fft.rfft(rest).abs().square() / scale * _sides(shape[0])
        return Spectrum(power, (torch.fft.rfftfreq(shape[0], dtype=torch.float64),), shape)
    power = torch.fft.fftshift(torch.fft.fft2(rest).abs().square() / scale, dim=(-2, -1))
    axes = tuple(torch.fft.fftshift(torch.fft.fftfreq(n, dtype=torch.float64)) for n in shape)
    return Spectrum(power, axes, shape)


def _sides(length: int) -> Tensor:
    """How many of the two-sided bins each one-sided bin stands for."""
    count = torch.full((length // 2 + 1,), 2.0, dtype=torch.float64)
    count[0] = 1
    if length % 2 == 0:
        count[-1] = 1
    return count


def aliasing_power(
    spectrum: Spectrum,
    stride: int,
    *,
    bandwidth: float | None = None,
    rounding: float = 1e-14,
) -> Aliasing:
    """Power at the harmonics k/stride of a layer, against what lies half-way between them.

    The background of a harmonic is the mean density at the frequencies half a spacing,
    1/(2·stride), on either side of it (in two dimensions: at the four corners). White noise gives a
    background equal to the power on average; a spectrum that falls with frequency as a power does
    is convex and gives more. The ratio weighs all harmonics alike, so that no single one decides:
    the lowest has its neighbour where a trend lies, or lay before it was taken away (take away a
    straight line at most, or that neighbour is made too small).

    Args:
        spectrum: of :func:`psd`.
        stride: cumulative stride of the layer, px.
        bandwidth: half-width of a harmonic in cycles per pixel; by default one and a half bins, the
            main lobe of the Hann window.
        rounding: power that counts as none, added to both sides of each ratio. The default is
            that of a cosine of single-precision features.

    Raises:
        ValueError: a bad stride, fewer than `PERIODS` periods, or a bandwidth that is not positive
            or so wide that harmonics meet.
    """
    _stride(stride)
    for length in spectrum.lengths:
        _long_enough(length, stride)
    if bandwidth is not None and not 0 < bandwidth < 0.5 / stride:
        raise ValueError(
            f"bandwidth must lie between 0 and {0.5 / stride:.4g}, half the distance of two "
            f"harmonics of stride {stride}, not {bandwidth!r}"
        )
    dims = len(spectrum.lengths)
    count = _sides(spectrum.lengths[0]) if dims == 1 else torch.ones(())
    density = spectrum.power / count
    steps = (
        torch.arange(0, stride // 2 + 1)
        if dims == 1
        else torch.arange(-(stride // 2), (stride + 1) // 2)
    )
    near, beside = [], []
    for frequency, length in zip(spectrum.frequency, spectrum.lengths, strict=True):
        at = steps.double() / stride
        away = (frequency[None] - at[:, None] + 0.5).remainder(1) - 0.5
        # a little more than its width, for bins that fall on the edge
        near.append((away.abs() <= (bandwidth or 1.5 / length) * (1 + 1e-9)).double())
        bins = torch.stack([(at - 0.5 / stride), (at + 0.5 / stride)], 1) * length
        if dims == 1:  # fold to 0 … 1/2
            bins = bins.abs()
            bins = torch.where(bins > length / 2, length - bins, bins)
            beside.append(bins.round().long().clamp(max=length // 2))
        else:
            beside.append((bins.round().long() + length // 2).remainder(length))
    if dims == 1:
        power = spectrum.power @ near[0].T
        size = near[0] @ count
        floor = density[..., beside[0]].mean(-1) * size
        divisor = torch.gcd(steps, torch.tensor(stride))
    else:
        power = near[0] @ spectrum.power @ near[1].T
        size = near[0].sum(1)[:, None] * near[1].sum(1)
        rows, columns = beside[0][:, :, None, None], beside[1][None, None]
        floor = density[..., rows, columns].mean((-3, -1)) * size
        divisor = torch.gcd(torch.gcd(steps[:, None], steps), torch.tensor(stride))
    period = stride // divisor
    above = (power - floor).clamp_min(0)
    found = {
        int(p): above[..., period == p].sum(-1) for p in torch.unique(period).tolist() if p > 1
    }
    total = spectrum.power.flatten(-dims).sum(-1)
    harmonic = period > 1
    alias, background = power[..., harmonic].sum(-1), floor[..., harmonic].sum(-1)
    logs = ((power + rounding) / (floor + rounding)).log()[..., harmonic]
    return Aliasing(
        power=alias,
        share=torch.where(total > 0, alias / total.clamp_min(1e-300), 0.0),
        background=background,
        excess=above[..., harmonic].sum(-1),
        ratio=(logs.sum(-1) / max(int(harmonic.sum()), 1)).exp(),
        by_period=found,
    )


def decompose(lines: Any, stride: int, *, order: int = 3) -> Parts:
    """Lines (..., L) as slow part, ripple and rest, by one least-squares fit of the first two.

    The slow part is a polynomial, the ripple a sum of sines at the harmonics of the stride; fitted
    together, so that neither takes what the other explains as well.

    Raises:
        ValueError: lines that are not finite or hold fewer than `PERIODS` periods of the stride.
    """
    x = _signal(lines, 1)
    length = x.shape[-1]
    _stride(stride)
    _long_enough(length, stride)
    slow = _polynomials((length,), order)
    place = torch.arange(length, dtype=torch.float64)
    waves = []
    for k in range(1, stride // 2 + 1):
        waves.append(torch.cos(2 * math.pi * k / stride * place))
        if 2 * k < stride:  # at 1/2 a sine is zero everywhere
            waves.append(torch.sin(2 * math.pi * k / stride * place))
    basis = torch.cat([slow, torch.stack(waves, 1)], 1) if waves else slow
    flat = x.reshape(-1, length)
    # the mean apart: it is far larger than all else, and would carry its rounding into the rest
    mean = flat.mean(1, keepdim=True)
    weights = torch.linalg.lstsq(basis, (flat - mean).T).solution
    count = slow.shape[1]
    trend = ((slow @ weights[:count]).T + mean).reshape(x.shape)
    ripple = (basis[:, count:] @ weights[count:]).T.reshape(x.shape)
    return Parts(trend, ripple, x - trend - ripple)


def drift(lines: Any, stride: int, *, order: int = 3) -> Drift:
    """Slope and variance of the slow part of lines (..., L); arguments as :func:`decompose`."""
    slow = decompose(lines, stride, order=order).slow
    length = slow.shape[-1]
    place = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    centred = slow - slow.mean(-1, keepdim=True)
    return Drift((centred @ place) / place.square().sum(), centred.square().mean(-1))


# ------------------------------------------------------------------------------------------ scans


def _strides(encoder: Encoder, layers: Sequence[str], size: int) -> dict[str, int]:
    """Cumulative stride of each layer; of a vector, that of the last map before it."""
    known = taps.trace(encoder, size=size)
    wanted, source = [], {}
    for layer in layers:
        record = known[layer]
        if record.kind not in ("map", "tokens") or record.height < 2:
            before = [
                other
                for other in known.values()
                if other.order < record.order
                and other.kind in ("map", "tokens")
                and other.height > 1
                and other.calls == 1
            ]
            if not before:
                raise ValueError(f"no map comes before layer {layer!r}: it has no stride")
            record = max(before, key=lambda other: other.order)
        source[layer] = record.name
        wanted.append(record.name)
    # the spans are kept from earlier calls; where there are none the field reaches the border
    spans = taps.spans(encoder, list(dict.fromkeys(wanted)), size=size)
    known_strides = {name: seen[0][2] for name, seen in spans.items() if seen}
    missing = [name for name in spans if name not in known_strides]
    if missing:
        fields = taps.receptive_fields(encoder, missing, size=size)
        known_strides |= {name: round(fields[name][1]) for name in missing}
    return {layer: known_strides[name] for layer, name in source.items()}


def _object(objects: Any, i: int, size: int) -> Tensor:
    """An object of its size; errors say which one is wrong."""
    try:
        return shift.prepare(objects[i], size)
    except ValueError as error:
        table = getattr(objects, "table", None)
        name = f"object {i}" if table is None else f"object {table['id'].iloc[i]!r}"
        raise ValueError(f"{name}: {error}") from error


def _canonical(
    encoder: Encoder, layers: Sequence[str], positions: Tensor, *, size: int, canvas: int
) -> dict[str, Tensor]:
    """Layers whose mean over space is the same at many positions: (P, 2) which stands for each.

    Where no unit that sees the object also sees the border, moving the object by a whole stride
    moves the map by one unit and leaves its mean as it is. Only layers with at most half as many
    such positions as there are in all; none where the network's padding forbids it.
    """
    if phases.obstacle(encoder, canvas=canvas):
        return {}
    known = taps.trace(encoder, size=canvas)
    result = {}
    for layer, seen in taps.spans(encoder, layers, size=canvas).items():
        if seen is None or known[layer].kind != "map":
            continue
        units = (known[layer].height, known[layer].width)
        tables = [
            torch.tensor(phases.Axis(*axis, units=n, canvas=canvas, size=size).canonical())
            for axis, n in zip(seen, units, strict=True)
        ]
        stands = torch.stack([tables[0][positions[:, 0]], tables[1][positions[:, 1]]], 1)
        if len(torch.unique(stands, dim=0)) <= len(positions) / 2:
            result[layer] = stands
    return result


def _cosines(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    positions: Tensor,
    *,
    size: int,
    canvas: int,
    background: Any,
    pool: shift.Pool,
    batch_size: int | None,
    optimise: bool,
    share: bool | None,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(O, P) cosines of each layer with the central reference, and the layers' strides."""
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is a list of at least one name, not {layers!r}")
    layers = list(dict.fromkeys(layers))
    if not len(objects):
        raise ValueError("no objects to move")
    with taps.read(encoder, layers):  # an unknown layer is named here, with its closest
        pass
    strides = _strides(encoder, layers, canvas)
    ground = shift.paint(background, canvas)
    fast = extract.optimise(encoder, keep=layers) if optimise else encoder
    plain = bool((ground == ground[:, :1, :1]).all())
    share = plain and (fast.device.type == "cpu" if share is None else share)
    reference = shift.references(canvas, size)[shift.REFERENCES.index("centre")]
    places = torch.cat([reference[None], positions])

    same = {}
    if share and pool == "mean":
        same = _canonical(encoder, layers, places, size=size, canvas=canvas)
    jobs: list[tuple[list[str], Tensor, phases.Chain | None]] = []
    if same:
        jobs.append((list(same), torch.unique(torch.cat(list(same.values())), dim=0), None))
    rest = [layer for layer in layers if layer not in same]
    if rest:
        unique = torch.unique(places, dim=0)
        chain = None
        if share:
            stages = phases.plan(fast, rest, unique, size=(size, size), canvas=canvas)
            empty = ground[None].to(fast.device)
            chain = phases.Chain(fast, rest, stages, empty=empty) if stages else None
        jobs.append((rest, unique, chain))

    def codes(at: Tensor) -> Tensor:
        return at[:, 0] * canvas + at[:, 1]

    result = {
        layer: torch.empty(len(objects), len(positions), dtype=torch.float64) for layer in layers
    }
    total = len(objects) * sum(len(at) for _, at, _ in jobs)
    with tqdm(total=total, unit="pos", disable=not progress, leave=False) as bar:
        for i in range(len(objects)):
            obj = _object(objects, i, size)
            for names, at, chain in jobs:
                parts: dict[str, list[Tensor]] = {layer: [] for layer in names}
                for index, vectors in shift.features(
                    fast, obj, at, names, canvas=canvas, background=ground, pool=pool,
                    batch_size=batch_size, chain=chain,
                ):  # fmt: skip
                    for layer, vector in vectors.items():
                        parts[layer].append(vector.cpu().double())
                    bar.update(len(index))
                for layer in names:
                    # `at` is sorted row by row, and so are its codes
                    where = torch.searchsorted(codes(at), codes(same.get(layer, places)))
                    unit = F.normalize(torch.cat(parts[layer]), dim=1)
                    anchor = unit[where[0]]
                    result[layer][i] = (unit @ anchor)[where[1:]].clamp(-1, 1)
    return result, strides


def _offsets(length: int, *, size: int, canvas: int, name: str) -> Tensor:
    """`length` single-pixel steps that are as central as can be: way from the reference."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 8:
        raise ValueError(f"{name} must be a whole number of positions, at least 8, not {length!r}")
    middle = int(shift.references(canvas, size)[shift.REFERENCES.index("centre"), 0])
    room = canvas - size + 1
    if length > room:
        raise ValueError(
            f"{name} is {length} positions, but an object of {size} px on a canvas of {canvas} px "
            f"has only {room}: take a smaller object or a larger canvas"
        )
    low = min(max(0, middle - length // 2 + 1), room - length)
    return torch.arange(low, low + length) - middle


def scan(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    *,
    length: int = 128,
    size: int = 75,
    canvas: int = 224,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: shift.Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
    share: bool | None = None,
    progress: bool = False,
) -> dict[str, Scan]:
    """Cosine to the central reference along two lines of single-pixel steps, down and across.

    Args:
        encoder: a loaded encoder.
        objects: an `ImageSet` of RGBA cut-outs, or a sequence of tensors (4, h, w).
        layers: dotted layer names.
        length: positions along each line; best a multiple of all strides, so that each of their
            harmonics falls on a bin of the spectrum.
        size: side of the object on the canvas, px.
        canvas: side of the canvas, px.
        background: see :func:`shift.paint`.
        pool: see :func:`shift.features`.
        batch_size: positions per forward pass; chosen for the device by default.
        optimise: run a faster copy of the encoder (:func:`extract.optimise`).
        share: use that early layers repeat themselves with their stride (:mod:`phases`): the same
            features, faster on one colour. By default on a CPU only.
        progress: show a bar.

    Returns:
        For each layer its :class:`Scan`, on the CPU.

    Raises:
        ValueError: a bad object, layer, background or pool, or a line longer than there is room.
    """
    offsets = _offsets(length, size=size, canvas=canvas, name="length")
    middle = shift.references(canvas, size)[shift.REFERENCES.index("centre"), 0]
    line, still = offsets + middle, torch.full_like(offsets, int(middle))
    positions = torch.cat([torch.stack([line, still], 1), torch.stack([still, line], 1)])
    found, strides = _cosines(
        encoder, objects, layers, positions, size=size, canvas=canvas, background=background,
        pool=pool, batch_size=batch_size, optimise=optimise, share=share, progress=progress,
    )  # fmt: skip
    return {
        layer: Scan(cosine.reshape(-1, 2, length), offsets, strides[layer])
        for layer, cosine in found.items()
    }


def window(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    *,
    side: int = 64,
    size: int = 75,
    canvas: int = 224,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: shift.Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
    share: bool | None = None,
    progress: bool = False,
) -> dict[str, Scan]:
    """Cosine to the central reference at all side×side single-pixel positions around it.

    Arguments and errors as :func:`scan`; `side` is that of the window in positions.
    """
    offsets = _offsets(side, size=size, canvas=canvas, name="side")
    middle = shift.references(canvas, size)[shift.REFERENCES.index("centre"), 0]
    positions = torch.cartesian_prod(offsets + middle, offsets + middle)
    found, strides = _cosines(
        encoder, objects, layers, positions, size=size, canvas=canvas, background=background,
        pool=pool, batch_size=batch_size, optimise=optimise, share=share, progress=progress,
    )  # fmt: skip
    return {
        layer: Scan(cosine.reshape(-1, side, side), offsets, strides[layer])
        for layer, cosine in found.items()
    }


# ----------------------------------------------------------------------------------- equivariance


def interior(
    encoder: Encoder, layers: Sequence[str], *, canvas: int
) -> dict[str, tuple[range, range] | None]:
    """Rows and columns of units that see nothing beyond the border of the canvas.

    None where there are none, or the receptive field does not fit into the canvas and they cannot
    be known (:func:`taps.spans`).
    """
    known = taps.trace(encoder, size=canvas)
    result: dict[str, tuple[range, range] | None] = {}
    for layer, seen in taps.spans(encoder, layers, size=canvas).items():
        result[layer] = None
        if seen is None or known[layer].kind != "map":
            continue
        sides = []
        for (low, high, step), units in zip(
            seen, (known[layer].height, known[layer].width), strict=True
        ):
            first = max(0, math.ceil(-low / step))
            last = min(units - 1, (canvas - 1 - high) // step)
            sides.append(range(first, last + 1))
        if all(sides):
            result[layer] = (sides[0], sides[1])
    return result


def equivariance(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    shifts: Tensor | Sequence[tuple[int, int]],
    *,
    size: int = 75,
    canvas: int = 448,
    background: str | float | Sequence[float] | Tensor = "white",
    units: Literal["interior", "all"] = "interior",
    batch_size: int | None = None,
    optimise: bool = True,
    progress: bool = False,
) -> dict[str, Equivariance]:
    r"""Features of the shifted picture against shifted features of the picture.

    For an object's picture x, a shift d and a layer of stride s the error is
    :math:`\lVert f(T_d x) - T_{d/s} f(x) \rVert` over the mean distance :math:`\lVert f(x) - f(x')
    \rVert` of different objects. With ``units="interior"`` only units count that see nothing beyond
    the border: the error is then zero for shifts by whole strides, and what is left for others is
    aliasing (and interpolation). With "all" every unit counts, and the error for whole strides is
    the border's.

    Args:
        encoder: a loaded encoder.
        objects: at least two RGBA cut-outs, an `ImageSet` or a sequence of tensors (4, h, w).
        layers: dotted names of feature maps.
        shifts: (S, 2) whole numbers (y, x), px. The object starts so that the shifts are
            centred on the canvas.
        size: side of the object, px.
        canvas: side of the canvas, px.
        background: see :func:`shift.paint`.
        units: "interior" or "all".
        batch_size: pictures per forward pass; chosen for the device by default.
        optimise: run a faster copy of the encoder (:func:`extract.optimise`).
        progress: show a bar.

    Raises:
        ValueError: fewer than two objects, a layer that gives no map or has no unit left to
            compare on this canvas, a shift off the canvas, or an unknown option.
    """
    if units not in ("interior", "all"):
        raise ValueError(f"units must be 'interior' or 'all', not {units!r}")
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is a list of at least one name, not {layers!r}")
    layers = list(dict.fromkeys(layers))
    if len(objects) < 2:
        raise ValueError("at least 2 objects are needed: their distance is the error's unit")
    by = torch.as_tensor(shifts)
    if by.ndim != 2 or by.shape[1] != 2 or not len(by) or by.is_floating_point():
        raise ValueError(f"shifts are whole numbers (S, 2), not {by.dtype} {tuple(by.shape)}")
    with taps.read(encoder, layers):
        pass
    known = taps.trace(encoder, size=canvas)
    flat = [layer for layer in layers if known[layer].kind not in ("map", "tokens")]
    if flat:
        raise ValueError(f"layer {flat[0]!r} of {encoder.name} gives no map: nothing to shift back")
    inner = interior(encoder, layers, canvas=canvas) if units == "interior" else {}
    strides = _strides(encoder, layers, canvas)
    regions = {
        layer: _region(layer, known[layer], inner.get(layer), strides[layer], by, units, canvas)
        for layer in layers
    }
    # The object starts where the middle of the shifts puts it at the centre of the canvas.
    start = (canvas - size - by.amax(0).clamp(min=0) - by.amin(0).clamp(max=0)) // 2
    places = torch.cat([start[None], start + by])
    fast = extract.optimise(encoder, keep=layers) if optimise else encoder
    ground = shift.paint(background, canvas, device=fast.device)
    step = batch_size or (8 if fast.device.type == "cpu" else 64)

    base: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    errors: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with (
        torch.no_grad(),
        taps.read(fast, layers) as read,
        tqdm(
            total=len(objects) * len(places), unit="pos", disable=not progress, leave=False
        ) as bar,
    ):
        for i in range(len(objects)):
            obj = _object(objects, i, size).to(fast.device)
            first: dict[str, Tensor] = {}
            parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            for index in torch.arange(len(places)).split(step):
                images = shift.compose(obj, places[index], canvas=canvas, background=ground)
                for layer, maps in read(images).items():
                    rows, columns = regions[layer]
                    maps = maps.float()
                    if index[0] == 0:
                        first[layer], maps = maps[0], maps[1:]
                        base[layer].append(_part(first[layer], rows, columns).cpu())
                    ways = by[index[index > 0] - 1].tolist()
                    for here, way in zip(maps, ways, strict=True):
                        parts[layer].append(
                            _errors(here, first[layer], way, strides[layer], rows, columns)
                        )
                bar.update(len(index))
            for layer in layers:
                errors[layer].append(torch.stack(parts[layer]))
    result = {}
    for layer in layers:
        scale = stats.mean_pairwise_distance(torch.stack(base[layer]))
        if not scale > 0:
            raise ValueError(f"layer {layer!r} is the same for all objects: the error has no unit")
        bilinear, nearest, still = (torch.stack(errors[layer]) / scale).unbind(-1)
        rows, columns = regions[layer]
        result[layer] = Equivariance(
            bilinear, nearest, still, by, strides[layer], (len(rows), len(columns))
        )
    return result


def _region(
    layer: str,
    record: taps.Layer,
    inner: tuple[range, range] | None,
    stride: int,
    shifts: Tensor,
    units: str,
    canvas: int,
) -> tuple[range, range]:
    """Units that can be compared for every shift: they, and where they come from, count."""
    if units == "interior" and inner is None:
        raise ValueError(
            f"layer {layer!r} has no unit whose receptive field lies on a canvas of {canvas} px: "
            "take a larger canvas, or units='all'"
        )
    allowed = inner or (range(record.height), range(record.width))
    sides = []
    for axis, side in enumerate(allowed):
        # from here on: a unit and the one before it are needed at the smallest and largest shift
        most = max(math.ceil(d / stride) for d in [0, *shifts[:, axis].tolist()])
        least = min(math.floor(d / stride) for d in [0, *shifts[:, axis].tolist()])
        sides.append(range(side.start + most, side.stop + least))
    if not all(sides):
        raise ValueError(
            f"layer {layer!r}: no {units} unit of a canvas of {canvas} px stays one over shifts of "
            f"up to {int(shifts.abs().max())} px: take a larger canvas or smaller shifts"
        )
    return sides[0], sides[1]


def _part(map_: Tensor, rows: range, columns: range, down: int = 0, across: int = 0) -> Tensor:
    """Those units of a map (C, H, W), or the ones so far before them."""
    return map_[
        :, rows.start - down : rows.stop - down, columns.start - across : columns.stop - across
    ]


def _errors(
    here: Tensor, first: Tensor, way: Sequence[int], stride: int, rows: range, columns: range
) -> Tensor:
    """(3,) distances of a map (C, H, W) to the first one shifted: bilinear, nearest, not at all."""
    target = _part(here, rows, columns)
    smooth = torch.zeros_like(target)
    exact = [d / stride for d in way]
    whole = [math.floor(d) for d in exact]
    for down in (0, 1):
        for across in (0, 1):
            weight = 1.0
            for d, w, more in zip(exact, whole, (down, across), strict=True):
                weight *= (d - w) if more else (1 - d + w)
            if weight:
                smooth += weight * _part(first, rows, columns, whole[0] + down, whole[1] + across)
    near = [math.floor(d + 0.5) for d in exact]
    moved = _part(first, rows, columns, near[0], near[1])
    still = _part(first, rows, columns)
    others = torch.stack([smooth, moved, still]).double()
    return (others - target.double()).flatten(1).norm(dim=1).cpu()
