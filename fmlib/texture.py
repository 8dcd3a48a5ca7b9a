r"""Texture: statistics that forget where things are, and codes whose energy is moved about.

A layer's code of one image is F ∈ R^{C × M}: C channels (filters) at M positions. Statistics over
positions describe texture (:func:`gram_matrix` and the rest of `STATISTICS`); :class:`Statistics`
makes them a matcher of `preimage`, so that :func:`synthesise` finds images with given statistics
by inversion (Gatys, Ecker & Bethge 2015, 2016), any number at once.

Xia et al. (2016) move the energy of a code among its channels and invert what comes out: all of it
into one filter (:func:`one_filter`), at random (:func:`reallocate`) or as another image has it
(:func:`match_sums`, :func:`match_ranks`). Energy of a channel is its sum over positions.

Li et al. (2017): the distance of Gram matrices is a maximum mean discrepancy between positions
(:func:`mmd_squared`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from torch import Tensor, nn

from . import preimage, taps
from .encoders import Encoder
from .errors import named_value, require_positive, require_whole, unknown

__all__ = [
    "KERNELS",
    "STATISTICS",
    "STYLE_WEIGHTS",
    "SYNTHESIS",
    "Statistics",
    "along",
    "average_pooling",
    "channel_sums",
    "colours",
    "covariance",
    "energy",
    "frequency",
    "gram_matrix",
    "invert_codes",
    "match_ranks",
    "match_sums",
    "mean_vector",
    "mmd_squared",
    "moments",
    "no_prior",
    "nonnegative_mixture",
    "one_filter",
    "orientation_entropy",
    "reallocate",
    "relative_distances",
    "sliced_quantiles",
    "style_loss",
    "sum_matching_gradient",
    "synthesise",
]


# --------------------------------------------------------------------------------- statistics


def _positions(code: Tensor, what: str = "a code", *, least: int = 1) -> Tensor:
    """(N, C, M) of a code (N, C, h, w)."""
    if code.ndim != 4 or not code.shape[1]:
        raise ValueError(f"{what} must be a grid (N, C, h, w), not {tuple(code.shape)}")
    flat = code.flatten(2)
    if flat.shape[2] < least:
        raise ValueError(
            f"{what} has {flat.shape[2]} position ({code.shape[2]} x {code.shape[3]}): a statistic "
            f"over positions needs at least {least}; take a shallower layer or larger images"
        )
    return flat


def gram_matrix(code: Tensor) -> Tensor:
    """G = F Fᵀ / M, (N, C, C), of codes (N, C, h, w): which filters are on together.

    Dividing by the M positions makes images of different sizes comparable. G/M of the code of Gatys
    (2015); Gatys et al. (2016) have F Fᵀ and divide the loss by M² instead, see `STYLE_WEIGHTS`.

    Raises:
        ValueError: no grid, or a grid of one position (its Gram matrix is the code itself).
    """
    flat = _positions(code, least=2)
    return flat @ flat.mT / flat.shape[2]


def mean_vector(code: Tensor) -> Tensor:
    """μ = F 1 / M, (N, C), of codes (N, C, h, w): first moments; raises as :func:`gram_matrix`."""
    return _positions(code, least=2).mean(2)


def covariance(code: Tensor) -> Tensor:
    """G − μ μᵀ, (N, C, C), of codes (N, C, h, w); raises as :func:`gram_matrix`."""
    flat = _positions(code, least=2)
    centred = flat - flat.mean(2, keepdim=True)
    return centred @ centred.mT / flat.shape[2]


def moments(code: Tensor, order: int = 4) -> Tensor:
    """(N, order, C): means, and per channel the k-th roots of the absolute central moments' size.

    Row k ≥ 2 is sign(m_k) |m_k|^(1/k) of m_k = E(f − μ)^k, so that all rows have the code's unit.
    Row 2 is the standard deviation: with `order` 2 the statistics of batch norm (Li et al. 2017).
    """
    require_whole("the order of moments", order, 1)
    flat = _positions(code, least=2)
    mean = flat.mean(2, keepdim=True)
    rows = [mean[..., 0]]
    for k in range(2, order + 1):
        m = (flat - mean).pow(k).mean(2)
        # the root has an infinite slope at 0, where a channel is constant
        rows.append(m.sign() * (m.abs() + 1e-12).pow(1 / k))
    return torch.stack(rows, 1)


def sliced_quantiles(
    code: Tensor, directions: int = 64, *, quantiles: int = 128, seed: int = 0
) -> Tensor:
    """Quantiles of positions along random directions, (N, directions, quantiles).

    Squared distances between them, averaged, are sliced Wasserstein distances between the clouds of
    positions (Heitz et al. 2021); all moments enter. Directions are unit vectors of the seed; the
    quantiles are interpolated, so that images may differ in size.
    """
    require_whole("directions", directions, 1)
    require_whole("quantiles", quantiles, 2)
    flat = _positions(code, least=2)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(directions, flat.shape[1], generator=generator, dtype=torch.float64)
    drawn = F.normalize(drawn, dim=1).to(flat)
    ordered = torch.einsum("dc,ncm->ndm", drawn, flat).sort(2).values
    return F.interpolate(ordered, size=quantiles, mode="linear", align_corners=True)


@dataclass(frozen=True)
class _Kind:
    does: Callable[[Tensor, int], Tensor]
    says: str
    default: int | None = None  # None: it takes no value


_KINDS = {
    "means": _Kind(lambda code, _: mean_vector(code), "mean of each channel"),
    "moments": _Kind(moments, "means and central moments up to an order", 4),
    "gram": _Kind(lambda code, _: gram_matrix(code), "products of channels, F Fᵀ / M"),
    "covariance": _Kind(lambda code, _: covariance(code), "centred products of channels"),
    "sliced": _Kind(sliced_quantiles, "quantiles along so many random directions", 64),
}

#: Statistics over positions, by the names :class:`Statistics` takes, and in words.
STATISTICS = {name: kind.says for name, kind in _KINDS.items()}

#: Factor of ‖G − Ĝ‖² (G = F Fᵀ / M, C channels) in the style loss of one layer as published.
#: The text of 2015 and that of 2016 agree: 1/(4C²M²) on F Fᵀ is 1/(4C²) on F Fᵀ / M.
STYLE_WEIGHTS: dict[str, Callable[[int], float]] = {
    "gatys2015": lambda channels: 1e9 / (4 * channels**2),  # released code; 1/(4C²) in the text
    "gatys2016": lambda channels: 1 / (4 * channels**2),  # eq. 4
    "gatys2016_code": lambda channels: 1e3 / channels**4,  # weight 1e3/C² of a mean over C² entries
    "li2017": lambda channels: 1 / (4 * channels**2),  # eq. 5: (1/4C²) MMD² of k = (xᵀy)²
}


def style_loss(code: Tensor, style: Tensor, *, convention: str = "gatys2016") -> Tensor:
    """(N,) style loss of one layer between codes (N, C, h, w) and (N or 1, C, h', w').

    Raises:
        ValueError: an unknown convention (of `STYLE_WEIGHTS`), or codes of other channels.
    """
    if convention not in STYLE_WEIGHTS:
        raise unknown("convention of the style loss", convention, STYLE_WEIGHTS)
    _same_channels(code, style)
    difference = gram_matrix(code) - gram_matrix(style)
    return STYLE_WEIGHTS[convention](code.shape[1]) * difference.square().sum((1, 2))


def _same_channels(code: Tensor, style: Tensor) -> None:
    if code.ndim != 4 or style.ndim != 4 or code.shape[1] != style.shape[1]:
        raise ValueError(
            f"codes must be grids (N, C, h, w) of the same channels, not {tuple(code.shape)} and "
            f"{tuple(style.shape)}"
        )
    if len(style) not in (1, len(code)):
        raise ValueError(f"{len(style)} styles for {len(code)} codes: give one, or one each")


#: Kernels of :func:`mmd_squared` (Li et al. 2017, table 1).
KERNELS = ("linear", "quadratic", "polynomial", "gaussian")


def mmd_squared(
    code: Tensor, style: Tensor, *, kernel: str = "quadratic", parameter: float = 1.0
) -> Tensor:
    """(N,) squared maximum mean discrepancy between the positions of two codes (Li et al. 2017).

    mean k(f, f') + mean k(s, s') − 2 mean k(f, s), biased. With "quadratic", k = (xᵀy)², it is
    ‖F Fᵀ/M − S Sᵀ/M'‖²: matching Gram matrices matches the distribution of positions up to second
    moments. "linear" k = xᵀy gives ‖μ_F − μ_S‖²; "polynomial" (xᵀy + parameter)²; "gaussian"
    exp(−parameter ‖x − y‖²).

    Raises:
        ValueError: an unknown kernel, or codes of other channels.
    """
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    _same_channels(code, style)
    require_positive("the parameter of a kernel", parameter, zero=kernel == "polynomial")
    f, s = _positions(code), _positions(style).expand(len(code), -1, -1)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        products = a.mT @ b
        if kernel == "quadratic":
            products = products.square()
        elif kernel == "polynomial":
            products = (products + parameter).square()
        elif kernel == "gaussian":
            squares = a.square().sum(1)[:, :, None] + b.square().sum(1)[:, None] - 2 * products
            products = (-parameter * squares.clamp_min(0)).exp()
        return products.mean((1, 2))

    return mean(f, f) + mean(s, s) - 2 * mean(f, s)


def relative_distances(statistics: Tensor, others: Tensor | None = None) -> Tensor:
    """(N, K) distances ‖a − b‖ / √(‖a‖ ‖b‖) of statistics (N, ...) and (K, ...), or among (N, ...).

    Scaled by both lengths, so that a strong filter's texture is not far from all for that alone.

    Raises:
        ValueError: a statistic that is zero, or others of another shape.
    """
    a = statistics.flatten(1).double()
    b = a if others is None else others.flatten(1).double()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"statistics of {a.shape[1]} and {b.shape[1]} numbers")
    lengths = a.norm(dim=1)[:, None] * b.norm(dim=1)
    if not bool((lengths > 0).all()):
        raise ValueError("a statistic is zero everywhere: it has no relative distance")
    rows = a if others is None else torch.cat([a, b])
    if rows.shape[1] > 2 * len(rows):
        # a rotation into their span keeps distances, of fewer numbers
        rows = torch.linalg.qr(rows.mT, mode="r").R.mT
    a, b = rows[: len(a)], rows[-len(b) :]
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / lengths.sqrt()


class Statistics(preimage.Taps):
    """Statistics of an encoder's layers as a matcher: images (N, 3, H, W) to name -> (N, ...).

    One forward pass gives all of them, and gradients reach the images.

    Args:
        encoder: any encoder.
        names: ``layer|statistic`` or ``layer|statistic:value`` with a statistic of `STATISTICS`
            (``features.3|gram``, ``features.3|sliced:32``), or a layer alone for its code.

    Raises:
        ValueError: no names, an unknown layer or statistic, or a bad value.
    """

    def __init__(self, encoder: Encoder, names: str | Iterable[str]) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        if not self.names:
            raise ValueError("no statistics asked for")
        self._parts: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
        for name in self.names:
            layer, _, statistic = name.partition("|")
            self._parts[name] = layer, _make(statistic)
        super().__init__(encoder, tuple(dict.fromkeys(layer for layer, _ in self._parts.values())))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Statistics by name."""
        found = super().__call__(images)
        values = {}
        for name, (layer, statistic) in self._parts.items():
            try:
                values[name] = statistic(found[layer])
            except ValueError as error:
                raise ValueError(f"{name!r} of {self.encoder.name}: {error}") from error
        return values

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"weights": self.encoder.weight_hash, "statistics": list(self.names)}


def _make(text: str) -> Callable[[Tensor], Tensor]:
    """A statistic by its name, ``kind`` or ``kind:value``; "" is the code itself."""
    if not text:
        return lambda code: code
    name, given = named_value("statistic", text, {n: kind.default for n, kind in _KINDS.items()})
    kind = _KINDS[name]
    if kind.default is None:
        return lambda code: kind.does(code, 0)
    if not (given.isascii() and given.isdigit() and int(given)):
        raise ValueError(f"{name} takes a whole number, at least 1, not {given!r}")
    value = int(given)
    return lambda code: kind.does(code, value)


# --------------------------------------------------------------- energy and its reallocation


def energy(code: Tensor) -> Tensor:
    """(N, C) share of each channel in the sum of a code (N, C, h, w) without negative values.

    Raises:
        ValueError: a code with negative values, or one that is zero everywhere.
    """
    sums = channel_sums(_energies(code))
    return sums / sums.sum(1, keepdim=True)


def channel_sums(code: Tensor) -> Tensor:
    """S = F 1, (N, C), of codes (N, C, h, w): sums over positions (Xia et al. 2016)."""
    return _positions(code).sum(2)


def _energies(code: Tensor) -> Tensor:
    """The code, with an error where it has no energy."""
    _positions(code)
    lowest = float(code.min())
    if lowest < 0:
        raise ValueError(
            f"energy is a sum of activations, and this code has negative ones (down to "
            f"{lowest:.3g}): take a layer after its ReLU, or rectify it"
        )
    empty = (code.flatten(1).sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the code of image {empty[0]} is zero everywhere: it has no energy")
    return code


def _channel(code: Tensor, channel: int) -> None:
    if isinstance(channel, bool) or not 0 <= int(channel) < code.shape[1]:
        raise ValueError(f"channel must be an index from 0 to {code.shape[1] - 1}, not {channel!r}")


def one_filter(code: Tensor, channels: int | Sequence[int]) -> Tensor:
    """Feature-map inversion's target: all energy at each position into one channel.

    F*_k(p) = Σ_c F_c(p) and F*_j = 0 for j ≠ k (Xia et al. 2016, §3): the sum of the code stays.

    Args:
        code: (N, C, h, w), non-negative.
        channels: k, or K of them for N = 1: one target each.

    Returns:
        (N, C, h, w), or (K, C, h, w).

    Raises:
        ValueError: a channel out of range, several channels of several images, negative values, or
            a code that is zero everywhere.
    """
    several = not isinstance(channels, int)
    wanted = list(channels) if several else [channels]  # pyright: ignore[reportArgumentType]
    if not wanted:
        raise ValueError("no channel asked for")
    for k in wanted:
        _channel(code, k)
    if several and len(code) != 1:
        raise ValueError(f"several channels are taken of one image, not of {len(code)}")
    total = _energies(code).sum(1)
    rows = len(wanted) if several else len(code)
    target = code.new_zeros(rows, *code.shape[1:])
    target[torch.arange(rows), wanted if several else wanted * rows] = total
    return target


def along(code: Tensor, directions: Tensor) -> Tensor:
    """All energy at each position along directions of channel space: :func:`one_filter` for any.

    F*(p) = v Σ_c F_c(p) / Σ_c v_c for v ≥ 0, which keeps the sum of the code; a v with negative
    entries keeps ‖F(p)‖ instead, F*(p) = v ‖F(p)‖ / ‖v‖.

    Args:
        code: (1, C, h, w), non-negative.
        directions: (C,) or (K, C).

    Returns:
        (K, C, h, w).

    Raises:
        ValueError: a direction that is zero or of other channels; and as :func:`one_filter`.
    """
    v = directions.reshape(-1, directions.shape[-1]).to(code)
    if v.shape[1] != code.shape[1] or len(code) != 1:
        raise ValueError(
            f"directions {tuple(directions.shape)} are not of the channels of one code "
            f"{tuple(code.shape)}"
        )
    if not bool((v.norm(dim=1) > 0).all()):
        raise ValueError("a direction is zero")
    positive = (v >= 0).all(1)
    total, norm = _energies(code).sum(1), code.norm(dim=1)
    unit = torch.where(positive[:, None], v / v.sum(1, keepdim=True), F.normalize(v, dim=1))
    amount = torch.where(positive[:, None, None], total, norm)
    return unit[:, :, None, None] * amount[:, None]


def reallocate(code: Tensor, *, seed: int = 0, mean: float = 3.0, deviation: float = 1e3) -> Tensor:
    """Random reallocation of energy, RMCI (Xia et al. 2016): each channel scaled, its map kept.

    F*_c = (Σ F) r_c F_c / Σ_p F_c(p), r drawn from N(mean, deviation²) and divided by its sum: the
    code's sum stays. As published, shares may be negative (and large, where the sum is near 0) and
    such targets are out of the network's reach; a small `deviation` / `mean` keeps them positive.
    Channels without energy get none.

    Raises:
        ValueError: as :func:`energy`; a deviation below 0.
    """
    require_positive("deviation", deviation, zero=True)
    sums = channel_sums(_energies(code))
    generator = torch.Generator().manual_seed(seed)
    r = mean + deviation * torch.randn(code.shape[1], generator=generator, dtype=torch.float64)
    r = r.to(code) * (sums > 0)
    r = r / r.sum(1, keepdim=True)
    factor = sums.sum(1, keepdim=True) * r / torch.where(sums > 0, sums, 1)
    return code * factor[:, :, None, None]


def match_ranks(code: Tensor, style: Tensor) -> Tensor:
    """Purposeful reallocation by ranks (released code of Xia et al. 2016).

    The channel of the style with the i-th largest energy receives the map of the content's channel
    with the i-th largest, shifted to the style's mean: F*_b = F_a − mean F_a + mean S_b.
    Channel means, hence the order of energies, are then the style's.

    Args:
        code: (N, C, h, w).
        style: (N or 1, C, h', w').

    Raises:
        ValueError: codes of other channels.
    """
    _same_channels(code, style)
    content, wanted = mean_vector(code), mean_vector(style).expand(len(code), -1)
    a, b = content.argsort(1, descending=True), wanted.argsort(1, descending=True)
    source = torch.empty_like(a).scatter(1, b, a)  # of each channel of the result
    rows = torch.arange(len(code), device=code.device)[:, None]
    moved = code[rows, source]
    shift = wanted - content.gather(1, source)
    return moved + shift[:, :, None, None]


def match_sums(code: Tensor, style: Tensor) -> Tensor:
    """Each channel's map scaled so that its mean is the style's; a map without energy is filled.

    The nearest code to F along its own maps that solves PMCI's condition s(F*) = s(S) (Xia et al.
    2016), by means since grids may differ. Raises as :func:`match_ranks`, and for negative values.
    """
    _same_channels(code, style)
    content, wanted = mean_vector(_energies(code)), mean_vector(_energies(style))
    wanted = wanted.expand(len(code), -1)
    live = content > 0
    factor = torch.where(live, wanted / torch.where(live, content, 1), 0)
    flat = torch.where(live, 0, wanted)
    return code * factor[:, :, None, None] + flat[:, :, None, None]


def sum_matching_gradient(code: Tensor, style: Tensor) -> Tensor:
    """PMCI's gradient on the code, (s(F) − s(S)) 1ᵀ / (C M) (Xia et al. 2016, released code).

    It is the gradient of ‖s(F) − s(S)‖² / (2 C M), that is of M / (2 C) times the squared MMD of
    the linear kernel (:func:`mmd_squared`): matching of first moments, on grids of M positions.

    Raises:
        ValueError: codes of other channels or grids.
    """
    _same_channels(code, style)
    if code.shape[2:] != style.shape[2:]:
        raise ValueError(
            f"sums are compared over grids of one size, not {tuple(code.shape[2:])} and "
            f"{tuple(style.shape[2:])}"
        )
    difference = channel_sums(code) - channel_sums(style)
    scale = code.shape[1] * code.shape[2] * code.shape[3]
    return (difference / scale)[:, :, None, None].expand_as(code)


def nonnegative_mixture(target: Tensor, primitives: Tensor) -> tuple[Tensor, Tensor]:
    """Weights a ≥ 0 minimising ‖t − Σ_k a_k P_k‖ for each target, and the share it explains.

    Non-negative least squares (Lawson & Hanson 1974). The share is 1 − ‖t − Σ a P‖² / ‖t‖²: of the
    squared length, not of a variance, as a statistic has a zero of its own.

    Args:
        target: statistics (N, ...).
        primitives: (K, ...).

    Returns:
        weights (N, K) and shares (N,).

    Raises:
        ValueError: statistics of other sizes, or a zero target.
    """
    from scipy.optimize import nnls  # comes with scikit-image

    matrix = primitives.flatten(1).double().numpy().T
    rows = target.flatten(1).double().numpy()
    if matrix.shape[0] != rows.shape[1]:
        raise ValueError(f"statistics of {rows.shape[1]} and {matrix.shape[0]} numbers")
    lengths = np.linalg.norm(rows, axis=1)
    if not lengths.all():
        raise ValueError(f"target {int((lengths == 0).argmax())} is zero everywhere")
    if len(matrix) > 2 * matrix.shape[1]:
        # the same problem, with as many rows as primitives (and one for what they cannot reach)
        q, r = np.linalg.qr(matrix)
        fitted = [nnls(r, q.T @ row) for row in rows]
    else:
        fitted = [nnls(matrix, row) for row in rows]
    weights = np.stack([found for found, _ in fitted])
    left = np.linalg.norm(rows - weights @ matrix.T, axis=1)
    return torch.from_numpy(weights), torch.from_numpy(1 - (left / lengths) ** 2)


# ------------------------------------------------------------------------------------ networks


def average_pooling(encoder: Encoder) -> Encoder:
    """A copy whose max poolings average, as Gatys et al. (2015) and Xia et al. (2016) have it.

    Gradients then reach every position under a window. Weights are untouched: activations behind
    the poolings become smaller. Works for any encoder with `nn.MaxPool2d` modules.

    Raises:
        ValueError: an encoder without any, or one whose windows are dilated.
    """
    changed = encoder.derived("average-pooling")
    found = [n for n, m in changed.net.named_modules() if isinstance(m, nn.MaxPool2d)]
    if not found:
        raise ValueError(f"{encoder.name} has no max pooling to replace")
    for name in found:
        pool = changed.net.get_submodule(name)
        assert isinstance(pool, nn.MaxPool2d)
        if pool.dilation not in (1, (1, 1)):
            raise ValueError(f"{name!r} of {encoder.name} has a dilated window, which has no mean")
        average = nn.AvgPool2d(
            pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode,
            count_include_pad=False,
        )  # fmt: skip
        changed.replace(name, average)
    return changed


# ------------------------------------------------------------------------------------ inversion

#: Adam on pixels, from noise; the only prior keeps to the range of images.
SYNTHESIS = preimage.Config(
    parameterisation=preimage.Pixels("uniform"),
    optimiser=preimage.Adam(8.0),
    schedule=(preimage.Phase(60), preimage.Phase(40, 0.3)),
    priors=(preimage.Bounds(1.0),),
    keep="best",
)


def no_prior(steps: int = 1000) -> preimage.Config:
    """The setting of Xia et al. (2016), `preimage.preset`'s "xia2016", its first steps only.

    Raises:
        ValueError: `steps` is not from 1 to the published 1000.
    """
    published = preimage.preset("xia2016")
    require_whole("steps", steps, 1)
    if steps > published.steps:
        raise ValueError(f"the published schedule has {published.steps} steps, not {steps}")
    kept, left = [], steps
    for phase in published.schedule:
        if left > 0:
            kept.append(replace(phase, steps=min(phase.steps, left)))
        left -= phase.steps
    return replace(published, schedule=tuple(kept))


def invert_codes(
    targets: Tensor,
    encoder: Encoder,
    layer: str,
    *,
    size: int | tuple[int, int],
    config: preimage.Config = SYNTHESIS,
    **options: Any,
) -> preimage.Inversion:
    """Images whose codes in a layer are as near the targets (K, C, h, w) as can be, all at once.

    ½ ‖Φ(x) − F*‖² of Xia et al. (2016), divided by ½ ‖F*‖², which no minimum depends on. With
    ``config=preimage.preset("xia2016")`` their setting: no prior, clipped momentum.

    Args:
        targets: as :func:`one_filter`, :func:`along`, :func:`reallocate` give them.
        encoder: any.
        layer: the layer the targets are codes of.
        size: of the images, px.
        config: how.
        options: of `preimage.invert`: restarts, seeds, start, snapshots, checkpoint, progress, ...

    Raises:
        ValueError: targets that are zero, not finite, or of another grid than images of that size
            have; images smaller than the layer's receptive field (unless ``allow_small=True``).
    """
    return preimage.invert(
        {layer: targets}, preimage.Taps(encoder, layer), config,
        shape=(3, *_sides(size)), **options,
    )  # fmt: skip


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    for side in sides:
        require_whole("size", side, 1)
    return sides  # pyright: ignore[reportReturnType]


def synthesise(
    examples: Tensor | Mapping[str, Tensor],
    encoder: Encoder,
    statistics: str | Sequence[str] = (),
    *,
    size: int | tuple[int, int],
    weights: Mapping[str, float] | None = None,
    content: Tensor | None = None,
    content_layers: str | Sequence[str] = (),
    content_weight: float = 1.0,
    convention: str | None = None,
    scales: int = 1,
    config: preimage.Config = SYNTHESIS,
    restarts: int = 1,
    seeds: Sequence[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    allow_small: bool = False,
    progress: bool = False,
    **options: Any,
) -> preimage.Inversion:
    """Images with the statistics of examples, N at once: texture synthesis, and style transfer.

    minimise over x   Σ_l w_l ‖T_l(x) − T_l(example)‖² / ‖T_l(example)‖²
                      + content_weight Σ_l ‖Φ_l(x) − Φ_l(content)‖² / ‖Φ_l(content)‖²

    with statistics T_l. Coarse to fine where `scales` > 1: each scale has twice the pixels a side
    of the one before, starts where that one ended, and has its examples shrunk likewise.

    Args:
        examples: images (N, 3, H, W) in [0, 1], of any size; or their statistics by name, which may
            be mixed or made up (for `scales` = 1).
        encoder: any; see :func:`average_pooling`.
        statistics: names as :class:`Statistics` takes them, ``layer|gram``.
        size: of the images to be made, px.
        weights: w of some of the statistics; 1 by default.
        content: images (N, 3, H, W) to keep the content of (Gatys et al. 2016), resized to `size`.
        content_layers: layers whose codes are kept.
        content_weight: see the formula.
        convention: of `STYLE_WEIGHTS`: Gram distances as published, not relative to ‖T_l‖², and the
            content as ½ ‖Φ − Φ₀‖².
        scales: number of scales.
        config: how; all scales alike.
        restarts: R starts for each example.
        seeds: of each example.
        checkpoint: a file, or with several scales a stem of files, to go on from.
        allow_small: take images smaller than a receptive field.
        progress: show a bar.
        options: further ones of `preimage.invert`.

    Raises:
        ValueError: no statistics, examples that are not images, statistics that are no Gram
            matrices with a convention, a size that scales do not divide, and as `preimage.check`:
            an image smaller than a receptive field, a statistic that is zero.
    """
    sides = _sides(size)
    require_whole("scales", scales, 1)
    given = dict(examples) if isinstance(examples, Mapping) else None
    names = tuple(given) if given is not None and not statistics else (
        (statistics,) if isinstance(statistics, str) else tuple(statistics)
    )  # fmt: skip
    layers = (content_layers,) if isinstance(content_layers, str) else tuple(content_layers)
    if (content is None) != (not layers):
        raise ValueError("content and content_layers go together")
    if given is not None and scales > 1:
        raise ValueError("statistics alone cannot be shrunk: give images for several scales")
    if not names:
        raise ValueError("no statistics to match, such as 'features.3|gram'")
    if any(side % 2 ** (scales - 1) for side in sides):
        raise ValueError(
            f"{scales} scales halve the sides {scales - 1} times, which {sides} do not divide into"
        )
    matcher = Statistics(encoder, (*names, *layers))
    terms = _style_terms(matcher, names, layers, weights or {}, content_weight, convention)
    result: preimage.Inversion | None = None
    for scale in reversed(range(scales)):
        shape = tuple(side // 2**scale for side in sides)
        known = given
        if known is None:
            assert isinstance(examples, Tensor)
            known = _described(matcher, _shrunk(examples, 2**scale, encoder), names)
        if content is not None:
            resized = _resized(content.to(encoder.device), shape)
            known = {**known, **_described(matcher, resized, layers)}
        begin = dict(options)
        if result is not None:
            last = result.images[:, :, 0]
            start = _resized(last.flatten(0, 1), shape).clamp(0, 1)
            begin["start"] = start.unflatten(0, last.shape[:2])
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and scales > 1:
            path = path.with_name(f"{path.stem}-{shape[0]}x{shape[1]}{path.suffix}")
        result = preimage.invert(
            known, matcher, config, shape=(3, *shape), terms=terms, restarts=restarts, seeds=seeds,
            checkpoint=path, allow_small=allow_small, progress=progress, **begin,
        )  # fmt: skip
        if result.status not in ("finished", "stopped"):
            break
    assert result is not None  # there is at least one scale
    return result


def _style_terms(
    matcher: Statistics,
    names: Sequence[str],
    layers: Sequence[str],
    weights: Mapping[str, float],
    content_weight: float,
    convention: str | None,
) -> list[preimage.Term]:
    for name in weights:
        if name not in names:
            raise unknown("statistic", name, names)
    if convention is None:
        terms = [preimage.Term(name, weight=weights.get(name, 1.0)) for name in names]
        return terms + [preimage.Term(name, weight=content_weight) for name in layers]
    if convention not in STYLE_WEIGHTS:
        raise unknown("convention of the style loss", convention, STYLE_WEIGHTS)
    if any(not name.endswith("|gram") for name in names):
        raise ValueError(f"{convention} is about Gram matrices: {', '.join(names)}")
    known = taps.trace(matcher.encoder)
    terms = []
    for name in names:
        factor = STYLE_WEIGHTS[convention](int(known[name.partition("|")[0]].channels or 1))
        weight = factor * weights.get(name, 1.0)
        terms.append(preimage.Term(name, "squared", weight))
    return terms + [preimage.Term(name, "squared", content_weight / 2) for name in layers]


def _described(matcher: Statistics, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    found = preimage.codes(matcher, images)
    return {name: found[name] for name in names}


def _shrunk(images: Tensor, factor: int, encoder: Encoder) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"examples must be images (N, 3, H, W) in [0, 1], not {tuple(images.shape)}"
        )
    shape = tuple(max(1, side // factor) for side in images.shape[2:])
    return _resized(images.to(encoder.device), shape)


def _resized(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(shape):
        return images
    return F.interpolate(images, size=shape, mode="bilinear", antialias=True, align_corners=False)


# ----------------------------------------------------------------------- measures of a picture


def _pictures(images: Tensor) -> np.ndarray:
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 4:
        raise ValueError(
            f"pictures must be (N, 3, H, W) of at least 4 x 4 px, not {tuple(images.shape)}"
        )
    return images.detach().cpu().double().clamp(0, 1).permute(0, 2, 3, 1).numpy()


def colours(images: Tensor, *, width: float = 10.0) -> Tensor:
    """(N,) effective number of colours of images (N, 3, H, W): exp of their histogram's entropy.

    Cells are `width` wide in each axis of CIELAB, where a difference of about 2 can just be seen.
    All pixels alike: 1; K colours in equal shares: K.
    """
    require_positive("width", width)
    found = []
    for picture in rgb2lab(_pictures(images)):
        cells = np.floor(picture.reshape(-1, 3) / width).astype(np.int64)
        _, counts = np.unique(cells, axis=0, return_counts=True)
        p = counts / counts.sum()
        found.append(math.exp(-(p * np.log(p)).sum()))
    return torch.tensor(found, dtype=torch.float64)


def _luma(images: Tensor) -> np.ndarray:
    return _pictures(images) @ np.array([0.299, 0.587, 0.114])


def frequency(images: Tensor) -> Tensor:
    """(N,) mean spatial frequency of images (N, 3, H, W), cycles/px, weighted by power.

    Of the grey image under a Hann window, so that borders do not count; the geometric mean, as
    power falls with a power of frequency. A picture without contrast has NaN.
    """
    grey = _luma(images)
    rows, columns = grey.shape[1:]
    hann = np.outer(np.hanning(rows), np.hanning(columns))
    grey = grey - (grey * hann).sum((1, 2), keepdims=True) / hann.sum()
    power = np.abs(np.fft.rfft2(grey * hann)) ** 2
    radius = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns))
    inside = (radius > 0) & (radius <= 0.5)
    power, logs = power[:, inside], np.log(radius[inside])
    total = power.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.exp((power * logs).sum(1) / total)
    return torch.from_numpy(np.where(total > 1e-12, mean, np.nan))


def orientation_entropy(images: Tensor, *, bins: int = 18) -> Tensor:
    """(N,) entropy of gradient orientations of images (N, 3, H, W), bits; log2 `bins` at most.

    Orientations are weighted by the gradient's length. Stripes: near 0; all orientations alike:
    log2 `bins`. A picture without contrast has NaN.
    """
    require_whole("bins", bins, 2)
    grey = _luma(images)
    down, across = np.gradient(grey, axis=(1, 2))
    angle = np.mod(np.arctan2(down, across), np.pi) / np.pi
    place = np.minimum((angle * bins).astype(int), bins - 1)
    length = np.hypot(down, across)
    found = []
    for where, amount in zip(place, length, strict=True):
        counts = np.bincount(where.ravel(), amount.ravel(), minlength=bins)
        if counts.sum() < 1e-9:
            found.append(math.nan)
            continue
        p = counts[counts > 0] / counts.sum()
        found.append(float(-(p * np.log2(p)).sum()))
    return torch.tensor(found, dtype=torch.float64)
