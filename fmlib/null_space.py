r"""Walks through images that leave a code alone: along the null space of a layer's Jacobian.

For a representation Φ, a photograph x₀ and its code Φ₀ = Φ(x₀), let φ = Φ / ‖Φ₀‖, so that code
changes are relative. The change of an image by a small d changes its code by J d, with the Jacobian
J = dφ/dx. Directions with J d ≈ 0 go unnoticed. They are found without ever forming J, by conjugate
gradients with products J u and Jᵀ v, as

    P w = μ (JᵀJ + μ I)⁻¹ w:                                                    (filter)

along a singular vector of J with singular value s it keeps the share μ / (s² + μ) of w. The damping
μ = (tolerance / reach)² says which directions count as unnoticed: those along which a move of
`reach` (root mean square over values, in units of [0, 1]) changes the code by less than
`tolerance`. The trace of I − P is the number of directions that are noticed, the effective degrees
of freedom of ridge regression (:func:`noticed`).

:func:`walk` goes towards other images by such steps. J is that of the place reached, and after each
step Gauss–Newton steps return to the code (:math:`-J^\top e`, the same system).

Products with J are exact: Jᵀ v by reverse-mode and J u by forward-mode differentiation. The other
ways are worse: a second backward pass is many times slower for convolutions by groups, and finite
differences are off by several percent in networks of ReLUs, which bend everywhere.

Images are (N, C, H, W) in [0, 1]; items do not interact.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import preimage, store
from .errors import require_positive, require_whole, unknown

__all__ = ["Walk", "code_error", "noise", "noticed", "same_distance", "walk"]


@dataclass(frozen=True, eq=False)
class Walk:
    """Where N walks went; all tensors on the device of the images."""

    images: Tensor  #: (N, C, H, W) in [0, 1], the last place reached
    code_error: Tensor  #: (steps, N) relative ‖Φ(x) − Φ₀‖ / ‖Φ₀‖ after each step
    distance: Tensor  #: (steps, N) root mean square of x − x₀, in units of [0, 1]
    remaining: Tensor  #: (steps, N) root mean square of the way left to the goal
    accepted: Tensor  #: (steps, N) whether the step was taken; else the item stayed


# --------------------------------------------------------------------------------------- checks


def _check_images(images: Tensor, what: str = "images") -> None:
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"{what} must be floating point (N, C, H, W) with N of at least 1, not "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if not bool(images.isfinite().all()) or float(images.min()) < 0 or float(images.max()) > 1:
        raise ValueError(f"{what} must lie within [0, 1]")


def _seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    numbers = list(range(count)) if seeds is None else [int(seed) for seed in seeds]
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} seeds for {count} images")
    return numbers


def _wide(x: Tensor) -> Tensor:
    """(N, values) in float64 where the device has it."""
    return x.flatten(1).to(torch.float32 if x.device.type == "mps" else torch.float64)


def _rms(x: Tensor) -> Tensor:
    return _wide(x).square().mean(1).sqrt()


def _per_item(values: Tensor, x: Tensor) -> Tensor:
    """(N,) to be multiplied with images x."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


# ------------------------------------------------------------------------------ a linearised code


def _selected(
    matcher: Callable[[Tensor], Any], term: preimage.Term | None, images: Tensor
) -> Tensor:
    """(N, entries) of the code that is watched."""
    found = matcher(images)
    codes = dict(found) if isinstance(found, Mapping) else {"codes": found}
    if term is None:
        if len(codes) > 1:
            raise ValueError(f"several codes: say which by term ({', '.join(codes)})")
        term = preimage.Term(next(iter(codes)))
    if term.code not in codes:
        raise unknown("code of this matcher", term.code, codes)
    return term.select(codes[term.code])


@contextlib.contextmanager
def _opened(matcher: Callable[[Tensor], Any]) -> Iterator[None]:
    # fused attention has no forward-mode derivative
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if isinstance(matcher, preimage.Taps):
            stack.enter_context(matcher.opened())
        yield


class _Linear:
    """φ and its Jacobian at images x; `norm` is ‖Φ₀‖ of each item, (N,)."""

    def __init__(self, code: Callable[[Tensor], Tensor], x: Tensor, norm: Tensor) -> None:
        self.norm = norm[:, None]
        self.function = code
        self.x = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        with torch.enable_grad():
            self.code = code(self.x) / self.norm
        if not self.code.requires_grad:
            raise ValueError("the code receives no gradient from the image")

    def transposed(self, v: Tensor) -> Tensor:
        """Jᵀ v."""
        return torch.autograd.grad(self.code, self.x, v, retain_graph=True)[0]

    def forward(self, u: Tensor) -> Tensor:
        """J u."""
        with torch.no_grad(), forward_ad.dual_level():
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                dual = forward_ad.make_dual(self.x.detach(), u)  # torch scripts something at first
            code = self.function(dual)
            tangent = forward_ad.unpack_dual(code).tangent
        assert tangent is not None  # a code with a gradient has one
        return tangent / self.norm


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) * _wide(b)).sum(1)


def _solve(
    linear: _Linear, right: Tensor, damping: float, iterations: int, free: Tensor | None = None
) -> Tensor:
    """(JᵀJ + μ I) d = right by conjugate gradients, item by item, over the `free` values."""
    free = torch.ones_like(right) if free is None else free
    residual = right * free
    d, direction = torch.zeros_like(right), residual
    size = _dot(residual, residual)
    least = 1e-14 * size
    for _ in range(iterations):
        moved = linear.transposed(linear.forward(direction)) * free + damping * direction
        # an item that is solved stays: 0 / 0 otherwise
        alive = size > least
        step = torch.where(alive, size / _dot(direction, moved).clamp(min=1e-30), 0)
        d = d + _per_item(step, d) * direction
        residual = residual - _per_item(step, d) * moved
        after = _dot(residual, residual)
        ratio = torch.where(alive, after / size.clamp(min=1e-30), 0)
        direction = residual + _per_item(ratio, d) * direction
        size = torch.where(alive, after, size)
        if not bool(alive.any()):
            break
    return d


def _project(
    linear: _Linear, w: Tensor, damping: float, iterations: int, free: Tensor | None = None
) -> Tensor:
    """P w: w less what the code notices of it, of which few iterations find the most."""
    w = w if free is None else w * free
    return w - _solve(linear, linear.transposed(linear.forward(w)), damping, iterations, free)


def _norms(reference: Tensor) -> Tensor:
    norm = reference.norm(dim=1)
    if not bool(reference.isfinite().all()) or bool((norm == 0).any()):
        bad = int(((norm == 0) | ~reference.isfinite().all(1)).nonzero()[0])
        raise ValueError(
            f"the code of image {bad} is zero everywhere or not finite, and changes are relative "
            "to its norm: watch other positions, channels or another layer"
        )
    return norm


def _damping(tolerance: float, reach: float, values: int) -> float:
    """μ for plain sums of squares over `values` values, from moves in root mean square."""
    return (tolerance / reach) ** 2 / values


# --------------------------------------------------------------------------------------- images


def noise(
    shape: Sequence[int], seeds: Sequence[int], *, smooth: float = 0.0, contrast: float = 0.2
) -> Tensor:
    """Noise images (N, C, H, W) in [0, 1], one for each seed: grey plus Gaussian noise, clipped.

    Args:
        shape: (C, H, W).
        seeds: N of them; an item depends on its own alone.
        smooth: standard deviation of a Gaussian low-pass filter, px; 0 for white noise.
        contrast: standard deviation of the values before clipping.

    Raises:
        ValueError: a shape, number of seeds, filter or contrast that is not possible.
    """
    if len(shape) != 3 or min(shape) < 1 or not len(seeds):
        raise ValueError(f"shape must be (C, H, W) and seeds not empty, not {tuple(shape)}")
    if not (math.isfinite(smooth) and smooth >= 0):
        raise ValueError(f"smooth must be at least 0, not {smooth!r}")
    require_positive("contrast", contrast)
    items = []
    for seed in seeds:
        number = int(store.digest([int(seed), "null space"])[:15], 16)
        generator = torch.Generator().manual_seed(number)
        items.append(torch.randn(*shape, generator=generator, dtype=torch.float64))
    x = torch.stack(items)
    if smooth:
        # in the spectrum: periodic, so that borders are no different
        rows = torch.fft.fftfreq(shape[1], dtype=torch.float64)[:, None]
        columns = torch.fft.rfftfreq(shape[2], dtype=torch.float64)
        gain = torch.exp(-2 * (math.pi * smooth) ** 2 * (rows.square() + columns.square()))
        x = torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(shape[1], shape[2]))
    x = x / x.std((2, 3), correction=0, keepdim=True).clamp(min=1e-12)
    return (0.5 + contrast * x).clamp(0, 1).float()


def code_error(
    images: Tensor,
    matcher: Callable[[Tensor], Any],
    originals: Tensor,
    *,
    term: preimage.Term | None = None,
) -> Tensor:
    """(N,) relative ‖Φ(x) − Φ(x₀)‖ / ‖Φ(x₀)‖ of images x against originals x₀.

    Raises:
        ValueError: shapes that differ, or an original whose code is zero.
    """
    if images.shape != originals.shape:
        raise ValueError(f"images {tuple(images.shape)} and {tuple(originals.shape)} differ")
    with torch.no_grad(), _opened(matcher):
        reference = _selected(matcher, term, originals)
        found = _selected(matcher, term, images)
    return (found - reference).norm(dim=1) / _norms(reference)


def same_distance(images: Tensor, toward: Tensor, distance: Tensor) -> Tensor:
    """Images (N, C, H, W) on the straight line towards others, at a given distance (N,), RMS.

    The control of a walk: as long a way, without heed of the code. Where the distance is longer
    than the way it ends at the goal.

    Raises:
        ValueError: shapes that differ.
    """
    if images.shape != toward.shape or distance.shape != (len(images),):
        raise ValueError(
            f"images {tuple(images.shape)}, goals {tuple(toward.shape)} and distances "
            f"{tuple(distance.shape)} do not fit"
        )
    way = toward - images
    share = (distance.to(way.device) / _rms(way).clamp(min=1e-12)).clamp(max=1)
    return images + _per_item(share, way) * way


# ----------------------------------------------------------------------------- local dimension


def noticed(
    images: Tensor,
    matcher: Callable[[Tensor], Any],
    *,
    term: preimage.Term | None = None,
    tolerance: float = 0.05,
    reach: float = 0.05,
    iterations: int = 20,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """(N,) share of image directions that the code notices: tr(I − P) over the number of values.

    Estimated with one random vector of signs for each item (Hutchinson 1989): unbiased but for the
    conjugate gradients, which approach the share from below (few iterations miss directions).
    One minus this is the share of directions along which a move of `reach` (RMS) changes the code
    by less than `tolerance`, with a soft edge: at the edge itself a direction counts half.

    Args:
        images: (N, C, H, W) in [0, 1].
        matcher: images -> codes: a layer (`preimage.Taps`) or any callable.
        term: which code and which entries of it; the only code by default.
        tolerance: relative change of the code.
        reach: move of the image, root mean square in units of [0, 1].
        iterations: of conjugate gradients.
        seeds: of the signs, 0 to N − 1 by default.

    Raises:
        ValueError: bad images or options, or a code that is zero, constant or ambiguous.
    """
    _check_images(images)
    require_positive("tolerance", tolerance)
    require_positive("reach", reach)
    require_whole("iterations", iterations, 1)
    numbers = _seeds(seeds, len(images))
    shape = tuple(images.shape[1:])
    signs = (noise(shape, numbers) > 0.5).to(images) * 2 - 1
    damping = _damping(tolerance, reach, math.prod(shape))

    def code(x: Tensor) -> Tensor:
        return _selected(matcher, term, x)

    with _opened(matcher):
        with torch.no_grad():
            norm = _norms(code(images))
        linear = _Linear(code, images, norm)
        kept = _project(linear, signs, damping, iterations)
    return 1 - _dot(signs, kept) / math.prod(shape)


# ------------------------------------------------------------------------------------------ walk


def walk(
    images: Tensor,
    matcher: Callable[[Tensor], Any],
    *,
    toward: Tensor | None = None,
    term: preimage.Term | None = None,
    steps: int = 10,
    step_size: float = 0.01,
    tolerance: float = 0.05,
    iterations: int = 6,
    corrections: int = 4,
    smooth: float = 2.0,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Walk:
    """Go towards other images while the code stays: ‖Φ(x) − Φ₀‖ ≤ `tolerance` · ‖Φ₀‖.

    Each step projects the way that is left on the directions that the code does not notice, goes
    `step_size` along it (less where less is left), and then takes Gauss–Newton steps back to the
    code, until it is within the tolerance and at most `corrections`. A step that ends outside the
    tolerance, or no nearer to the goal, is not taken, and the item tries half of it next. Values
    stay within [0, 1]: those at a bound that a move would leave through it are held.

    Args:
        images: (N, C, H, W) in [0, 1].
        matcher: images -> codes: a layer (`preimage.Taps`) or any callable.
        toward: (N, C, H, W) goals; by default :func:`noise` of `smooth` and `seeds`.
        term: which code and which entries of it; the only code by default.
        steps: number of steps tried.
        step_size: most that a step moves, root mean square in units of [0, 1].
        tolerance: relative code error that is never exceeded.
        iterations: of conjugate gradients, for each projection and correction.
        corrections: most Gauss–Newton steps after each step.
        smooth: low-pass filter of the default goals, px.
        seeds: of the default goals, 0 to N − 1 by default: give an image's own to have the same
            walk in another batch.
        batch_size: most images at a time (memory); all by default.

    Raises:
        ValueError: images outside [0, 1], goals of another shape, bad options, or a code that is
            zero, receives no gradient, or is one of several without a term.
    """
    _check_images(images)
    require_whole("steps", steps, 1)
    require_whole("iterations", iterations, 1)
    require_whole("corrections", corrections, 0)
    require_positive("step_size", step_size)
    require_positive("tolerance", tolerance)
    if batch_size is not None:
        require_whole("batch_size", batch_size, 1)
    numbers = _seeds(seeds, len(images))
    if toward is None:
        toward = noise(tuple(images.shape[1:]), numbers, smooth=smooth)
    toward = toward.to(images)
    if toward.shape != images.shape:
        raise ValueError(
            f"goals {tuple(toward.shape)} and images {tuple(images.shape)} differ in shape"
        )
    _check_images(toward, "goals")

    def code(x: Tensor) -> Tensor:
        return _selected(matcher, term, x)

    options = (steps, step_size, tolerance, iterations, corrections)
    size = batch_size or len(images)
    with _opened(matcher):
        parts = [
            _walk(code, x, goal, *options)
            for x, goal in zip(images.split(size), toward.split(size), strict=True)
        ]
    names = ("code_error", "distance", "remaining", "accepted")
    return Walk(
        torch.cat([part.images for part in parts]),
        *(torch.cat([getattr(part, name) for part in parts], 1) for name in names),
    )


def _free(x: Tensor, move: Tensor) -> Tensor:
    """1 for values that the move leaves within [0, 1], 0 for those that it takes out of it."""
    return (~(((x <= 0) & (move < 0)) | ((x >= 1) & (move > 0)))).to(x.dtype)


def _walk(
    code: Callable[[Tensor], Tensor],
    start: Tensor,
    goal: Tensor,
    steps: int,
    step_size: float,
    tolerance: float,
    iterations: int,
    corrections: int,
) -> Walk:
    with torch.no_grad():
        reference = code(start)
    norm = _norms(reference)
    target = reference / norm[:, None]
    damping = _damping(tolerance, step_size, math.prod(start.shape[1:]))
    x, error = start, torch.zeros_like(_rms(start))
    longest = torch.full_like(error, step_size)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    linear = _Linear(code, x, norm)
    for _ in range(steps):
        way = goal - x
        free = _free(x, way)
        move = _project(linear, way, damping, iterations, free)
        scale = (longest / _rms(move).clamp(min=1e-12)).clamp(max=1)
        y = (x + _per_item(scale, move) * move).clamp(0, 1)
        there = _Linear(code, y, norm)
        found = _wide(there.code.detach() - target).norm(dim=1)
        for _ in range(corrections):
            outside = _per_item(found > tolerance, y) > 0
            if not bool(outside.any()):
                break
            back = there.transposed(target - there.code.detach())
            change = _solve(there, back, damping, iterations, _free(y, back))
            # an item within the tolerance stays: corrections undo a part of the step
            y = torch.where(outside, (y + change).clamp(0, 1), y)
            there = _Linear(code, y, norm)
            found = _wide(there.code.detach() - target).norm(dim=1)
        good = (found <= tolerance) & (_rms(goal - y) < _rms(way))
        x = torch.where(_per_item(good, x) > 0, y, x).detach()
        error = torch.where(good, found, error)
        longest = torch.where(good, (1.5 * longest).clamp(max=step_size), longest / 2)
        rows.append((error, _rms(x - start), _rms(goal - x), good))
        linear = there if bool(good.all()) else _Linear(code, x, norm)
    return Walk(x, *(torch.stack(part) for part in zip(*rows, strict=True)))
