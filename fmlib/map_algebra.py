r"""Computing with linear maps between features: spectra, composition, powers, commutators.

If the edits a and b act on features as x ↦ W_a x + b_a and x ↦ W_b x + b_b, then b followed by a
should act as W_a W_b, an edit undone as W⁻¹, half an edit as W^½, and four quarter turns as the
identity. Whether they do is a question for truly composed edits, and the one Krey, Neukirch &
Strodthoff (2026) leave to pictures. Here is the algebra; the maps come from :mod:`maps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import stats
from .errors import unknown
from .grids import GridAction, named_action
from .maps import AffineMap, Origin

__all__ = [
    "Spectrum",
    "commutator",
    "compose",
    "contributions",
    "exponential",
    "generator",
    "interpolate",
    "inverse",
    "power",
    "spectrum",
]


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _check_negative(negative: str) -> None:
    choices = ("error", "real_part")
    if negative not in choices:
        raise unknown("negative", negative, choices)


# ---------------------------------------------------------------------------------------- spectra


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ of W and what they say."""

    singular_values: Tensor  #: (C,) descending
    effective_rank: float  #: exp of the entropy of σ² / Σσ²: C if all are equal, 1 for rank one
    energy: Tensor  #: (C,) share of Σσ² in the first k = 1, 2, ...
    rotation_distance: float  #: root mean square of σ − 1: distance from the nearest orthogonal map
    scaled_rotation_distance: float  #: the same about the mean σ, over that mean
    near_one: float  #: share of σ within 0.1 of 1


def spectrum(fitted: AffineMap | Tensor) -> Spectrum:
    """Singular spectrum of a map's W (paper, linear analysis).

    The distance of W = UΣVᵀ from its nearest orthogonal map UVᵀ is ‖W − UVᵀ‖_F = ‖σ − 1‖, given
    over √C.

    Raises:
        ValueError: a matrix that is zero or not finite.
    """
    matrix = stats.float64(fitted.matrix if isinstance(fitted, AffineMap) else fitted)
    if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
        raise ValueError(f"W must be a finite matrix other than 0, not {tuple(matrix.shape)}")
    values = torch.linalg.svdvals(matrix)
    shares = values.square() / values.square().sum()
    mean = values.mean()
    return Spectrum(
        singular_values=values,
        effective_rank=float(torch.exp(-torch.xlogy(shares, shares).sum())),
        energy=shares.cumsum(0),
        rotation_distance=float((values - 1).square().mean().sqrt()),
        scaled_rotation_distance=float((values - mean).square().mean().sqrt() / mean),
        near_one=float(((values - 1).abs() < 0.1).double().mean()),
    )


def contributions(fitted: AffineMap, x: Tensor) -> dict[str, Tensor]:
    """How much of Wx + b is the weight's and how much the bias's, for each image.

    Wx is computed without the bias. (The released code of the paper takes the output of a linear
    layer for Wx, which contains b already, and so adds it twice.)

    Returns:
        (N,) float64 each, means over positions: "weight" ‖Wx‖, "bias" ‖b‖, "weight_share"
        ‖Wx‖ / (‖Wx‖ + ‖b‖), and "cosine" of Wx and Wx + b.

    Raises:
        ValueError: as `FeatureMap.apply`.
    """
    bias = fitted.bias.to(stats.float64(x).device)
    product = replace(fitted, bias=torch.zeros_like(bias)).apply(stats.float64(x))
    product = product[:, :, None, None] if product.ndim == 2 else product
    length, constant = product.norm(dim=1), bias.norm().expand(len(x)).clone()
    share = length / (length + bias.norm()).clamp(min=1e-300)
    cosine = stats.cosine_similarity(product, product + bias[:, None, None], dim=1)
    return {
        "weight": length.mean((1, 2)),
        "bias": constant,
        "weight_share": share.mean((1, 2)),
        "cosine": cosine.mean((1, 2)),
    }


# ------------------------------------------------------------------------- composition, inverse


def _derived(
    family: str, source: AffineMap, weight: Tensor, bias: Tensor, **more: Any
) -> AffineMap:
    options = {"grid_action": source.grid_action, "origin": source.origin, "info": {}, **more}
    count = weight.numel() + bias.numel()
    return AffineMap(family=family, parameters_count=count, weight=weight, bias=bias, **options)


def _renamed(origin: Origin, pattern: str) -> Origin:
    """The origin of a map made of another: half an edit must not load as the edit."""
    return replace(origin, edit=pattern.format(origin.edit)) if origin.edit else origin


def compose(outer: AffineMap, inner: AffineMap) -> AffineMap:
    """The map x -> outer(inner(x)), again affine: W_a W_b, W_a b_b + b_a.

    W acts on channels and grid actions on positions, so that they commute and the grid action of
    the result is outer's after inner's. The layer of the result is inner's, and its edit names
    both where they are known.

    Raises:
        ValueError: widths that do not meet, or grid actions that are mere functions.
    """
    second = named_action(outer.grid_action, "composed")
    first = named_action(inner.grid_action, "composed")
    if outer.matrix.shape[1] != inner.matrix.shape[0]:
        raise ValueError(
            f"outer takes {outer.matrix.shape[1]} channels, inner gives {inner.matrix.shape[0]}"
        )
    edits = (outer.origin.edit, inner.origin.edit)
    edit = "∘".join(f"({name})" for name in edits) if all(edits) else None
    return _derived(
        "composition", inner, outer.matrix @ inner.matrix,
        outer.matrix @ inner.bias + outer.bias,
        grid_action=second.after(first), origin=replace(inner.origin, edit=edit),
    )  # fmt: skip


def inverse(fitted: AffineMap, *, rcond: float = 1e-6) -> AffineMap:
    """The way back, x = W⁺ (y − b), the grid action undone.

    W⁺ is the pseudo-inverse: singular values below `rcond` times the largest are taken for 0, so
    that what the edit destroyed (a colour, under greyscale) stays lost instead of blowing up noise.
    ``info["rank"]`` says how many are kept.

    Ridge maps have many small singular values, so that a small `rcond` blows up what they got
    wrong. Without a bound to choose it by, the transpose of a `maps.procrustes` map (its inverse)
    or a map fitted backwards (`maps.Statistics.swapped`) does better.

    Raises:
        ValueError: a grid action that is a mere function.
    """
    action = named_action(fitted.grid_action, "inverted").inverse()
    values = torch.linalg.svdvals(fitted.matrix)
    weight = torch.linalg.pinv(fitted.matrix, rtol=rcond)
    rank = int((values > rcond * values[0]).sum())
    return _derived(
        "inverse", fitted, weight, -weight @ fitted.bias,
        grid_action=action, origin=_renamed(fitted.origin, "({})^-1"), info={"rank": rank},
    )  # fmt: skip


# ----------------------------------------------------------------------------- strength of edits


def interpolate(fitted: AffineMap, strength: float) -> AffineMap:
    """(1 − t) x + t f(x): the straight line from the identity (t = 0) through the map (t = 1).

    The simplest guess of a weaker or stronger edit; :func:`power` is the curved one.

    Raises:
        ValueError: a map with a grid action (half a rotation of the grid does not exist) or of two
            widths.
    """
    _check_flow(fitted)
    weight = (1 - strength) * _eye(fitted.bias) + strength * fitted.matrix
    return _derived(
        "interpolation", fitted, weight, strength * fitted.bias,
        origin=_renamed(fitted.origin, f"{strength:g}·({{}})"), info={"strength": strength},
    )  # fmt: skip


def _check_flow(fitted: AffineMap) -> None:
    if fitted.grid_action != GridAction():
        raise ValueError(
            "a fraction of a grid action does not exist: take whole powers, or a map without one"
        )
    if fitted.matrix.shape[0] != fitted.matrix.shape[1]:
        raise ValueError(f"W must be square for powers, not {tuple(fitted.matrix.shape)}")


def power(fitted: AffineMap, exponent: float, *, negative: str = "error") -> AffineMap:
    r"""fᵗ: the map applied t times, for any real t: f^½ applied twice is f, f⁻¹ undoes it.

    Whole t ≥ 0 are plain products, with any grid action. Otherwise, with W = V diag(λ) V⁻¹,
    Wᵗ = V diag(λᵗ) V⁻¹ by the principal logarithm, and the bias is b_t = V diag(φ) V⁻¹ b with
    φ = (λᵗ − 1)/(λ − 1), or t where λ = 1 (so that t times an additive map adds tδ).

    Complex λ come in conjugate pairs and give a real Wᵗ. A negative real λ has no real principal
    root: a mirror in feature space cannot be done by half. Then with `negative`:

    * "error" refuses, naming how many there are and the largest;
    * "real_part" takes the real part of the complex map, and gives the share of what was cut off,
      ‖Im Wᵗ‖/‖Wᵗ‖, as ``info["imaginary_share"]``. Ridge maps often have tiny negative λ where x
      hardly varies; then the share is small. If it is not, the result means little.

    Where x does not vary at all (a channel that is never on) linear and ridge maps have λ = 0.
    `maps.low_rank_plus_identity` at full rank is the ridge map that leaves such directions alone,
    λ = 1, and the better start for powers and flows.

    Raises:
        ValueError: as above; a grid action with a fractional t; t < 0 of a singular W; a W that
            cannot be diagonalised to working precision.
    """
    _check_negative(negative)
    if float(exponent).is_integer() and exponent >= 0:
        return _whole_power(fitted, int(exponent))
    _check_flow(fitted)
    values, vectors = _eigenvalues(fitted, negative)
    if exponent < 0 and bool((values == 0).any()):
        raise ValueError("W is singular: it has no negative powers (see inverse)")
    logs = torch.where(values == 0, 0, values).log()
    scaled = torch.where(values == 0, 0, torch.exp(exponent * logs))
    ratio = torch.where(values == 0, 1, _expm1(exponent * logs) / _expm1(logs))
    phi = torch.where(logs.abs() < 1e-12, torch.full_like(logs, exponent), ratio)
    weight = _from_eigenvectors(vectors, scaled)
    bias = _from_eigenvectors(vectors, phi) @ fitted.bias.to(vectors.dtype)
    info = {"exponent": exponent, "imaginary_share": _imaginary_share(weight)}
    return _derived(
        "power", fitted, weight.real.contiguous(), bias.real.contiguous(),
        origin=_renamed(fitted.origin, f"({{}})^{exponent:g}"), info=info,
    )  # fmt: skip


def _whole_power(fitted: AffineMap, exponent: int) -> AffineMap:
    result = _derived(
        "power", fitted, _eye(fitted.bias), torch.zeros_like(fitted.bias),
        grid_action=GridAction(),
    )  # fmt: skip
    for _ in range(exponent):
        result = compose(fitted, result)
    return replace(
        result,
        family="power",
        origin=_renamed(fitted.origin, f"({{}})^{exponent}"),
        info={"exponent": exponent, "imaginary_share": 0.0},
    )


def _expm1(z: Tensor) -> Tensor:
    """exp(z) − 1 without cancellation, for complex z (torch has it for real z alone)."""
    half = z / 2
    return 2 * torch.exp(half) * torch.sinh(half)


def _eigenvalues(fitted: AffineMap, negative: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues of W, rounding errors around zero set to zero, and its eigenvectors."""
    matrix = fitted.matrix
    values, vectors = torch.linalg.eig(matrix)
    size = float(values.abs().max())
    rounding = len(values) * torch.finfo(matrix.dtype).eps
    values = torch.where(values.abs() <= rounding * size, 0, values)
    off = (_from_eigenvectors(vectors, values) - matrix).norm() / matrix.norm().clamp(min=1e-300)
    if not float(off) < 1e-6:
        raise ValueError(
            f"W cannot be diagonalised to working precision (relative error {float(off):.2g}): its "
            "eigenvectors are nearly dependent"
        )
    below = (values.real < 0) & (values.imag.abs() <= 1e-12 * size)
    if bool(below.any()) and negative == "error":
        largest = float(values.abs()[below].max()) / size
        raise ValueError(
            f"W has {int(below.sum())} negative real eigenvalues, the largest {largest:.2g} of the "
            "spectral radius: it has no real principal root or logarithm; negative='real_part' "
            "takes the real part and says how much is lost"
        )
    return values, vectors


def _from_eigenvectors(vectors: Tensor, values: Tensor) -> Tensor:
    """V diag(values) V⁻¹."""
    return torch.linalg.solve(vectors, vectors * values, left=False)


def _imaginary_share(matrix: Tensor) -> float:
    return float(matrix.imag.norm() / matrix.abs().norm().clamp(min=1e-300))


def generator(fitted: AffineMap, *, negative: str = "error") -> tuple[Tensor, Tensor, float]:
    r"""The flow whose unit time is the map: A (C, C) and c (C,) with dx/dt = A x + c.

    A = log W (principal), c = V diag(log λ/(λ − 1)) V⁻¹ b. :func:`exponential` goes back. The third
    value is the share of A that was imaginary and cut off (0 unless `negative` is "real_part"; see
    :func:`power`).

    Raises:
        ValueError: as :func:`power`, and for a singular W.
    """
    _check_negative(negative)
    _check_flow(fitted)
    values, vectors = _eigenvalues(fitted, negative)
    if bool((values == 0).any()):
        raise ValueError("W is singular: it has no logarithm")
    logs = values.log()
    ratio = torch.where(logs.abs() < 1e-12, torch.ones_like(logs), logs / _expm1(logs))
    a = _from_eigenvectors(vectors, logs)
    c = _from_eigenvectors(vectors, ratio) @ fitted.bias.to(vectors.dtype)
    return a.real.contiguous(), c.real.contiguous(), _imaginary_share(a)


def exponential(
    a: Tensor, c: Tensor, *, time: float = 1.0, origin: Origin | None = None
) -> AffineMap:
    """The map that the flow dx/dt = A x + c takes x to in this time.

    exp of the (C + 1)x(C + 1) matrix [[A, c], [0, 0]] holds W and b.

    Raises:
        ValueError: A that is not square or c of another width.
    """
    if a.ndim != 2 or a.shape != (len(c), len(c)):
        raise ValueError(f"A must be (C, C) and c (C,), not {tuple(a.shape)} and {tuple(c.shape)}")
    width = len(c)
    joint = a.new_zeros(width + 1, width + 1)
    joint[:width, :width], joint[:width, width] = a, c
    whole = torch.linalg.matrix_exp(time * joint)
    return AffineMap(
        family="exponential",
        parameters_count=width * width + width,
        origin=origin or Origin(),
        info={"time": time},
        weight=whole[:width, :width].contiguous(),
        bias=whole[:width, width].contiguous(),
    )


# ---------------------------------------------------------------------------------------- order


def commutator(first: AffineMap, second: AffineMap) -> float:
    """How much the order of two edits matters: ‖AB − BA‖_F over the mean of ‖AB‖_F and ‖BA‖_F.

    0 where the weights commute, at most 2. Both orders are compared on features that occur by
    ``discrepancy(compose(a, b), compose(b, a), statistics)``.

    Raises:
        ValueError: matrices that are not square and of one size, or a product that is zero.
    """
    a, b = first.matrix, second.matrix
    if a.shape != b.shape or a.shape[0] != a.shape[1]:
        raise ValueError(
            f"only square maps of one width can commute, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    ab, ba = a @ b, b @ a
    size = float(ab.norm() + ba.norm()) / 2
    if not size > 0:
        raise ValueError("the products of the two maps are zero")
    return float((ab - ba).norm()) / size
