r"""Pre-images: find images whose codes match a given code (Mahendran & Vedaldi 2015, 2016).

For a code Φ₀ and a representation Φ, minimise over images x

    w · ℓ(Φ(x), Φ₀) + Σ λ_k R_k(x),      ℓ = ‖Φ(x) − Φ₀‖² / ‖Φ₀‖²  by default.

Three axes are independent of one another:

* what to match: any callable images -> codes, or layers of an encoder (:class:`Taps`), several at
  once, a region of positions or a group of channels (:class:`Term`);
* how an image is written (:class:`Pixels`, :class:`Fourier`, :class:`DeepImagePrior`);
* what images are likely: priors (:class:`AlphaNorm`, :class:`TotalVariation`, :class:`Bounds`),
  projections (:class:`Clamp`, :class:`NormBall`), and random transforms under which the code has to
  hold (:class:`Jitter`, :class:`RandomScale`, :class:`RandomRotation`).

:func:`preset` gives the published configurations. Images are (N, C, H, W) in [0, 1]; priors see
*levels*: 255 · image − mean, as the papers' networks do. Priors are means over pixels, of levels
over a scale, so that a weight means the same at every image size.

Where the released code and the text of 2015 differ, in effect or at other image sizes:

* λ_α = 2.16e8 and σ belong together: the code has 4e-10 Σx⁶ / σ² + (λ/2) Σ|∇x|² / σ² (its constants
  are halved), so that σ = (2.16e8 / 4e-10)^¼ = 2.711e4, the norm of an image of 227·227·3 levels.
  Here σ grows with the root of the number of values, and the priors stay what they were.
* It restarts many images with the norms of the whole batch, so that the data term weakens with the
  number of restarts; here every item has its own.
* It subtracts a mean image, here a mean colour.

That of 2016 runs its two phases as two calls, so that momentum and Adagrad's sum both begin anew;
the layers at which its data weights change are known from a re-implementation only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import map_scores, stats, store, taps
from .errors import require_positive, require_whole, unknown

if TYPE_CHECKING:
    from .encoders import Encoder

__all__ = [
    "DATA_WEIGHTS_2016",
    "LAMBDAS_2015",
    "LBFGS",
    "OBJECTIVES",
    "PRESETS",
    "Adam",
    "AlphaNorm",
    "Bounds",
    "Clamp",
    "ClippedMomentum",
    "Config",
    "DecayedAdagrad",
    "DeepImagePrior",
    "Discrepancy",
    "Errors",
    "Fourier",
    "Inversion",
    "Jitter",
    "Momentum",
    "NonFiniteError",
    "NormBall",
    "Phase",
    "Pixels",
    "Progress",
    "RandomRotation",
    "RandomScale",
    "Taps",
    "Term",
    "TotalVariation",
    "alpha_norm",
    "check",
    "codes",
    "discrepancy",
    "errors",
    "invert",
    "jitter_for_stride",
    "plateau",
    "preset",
    "structural_similarity",
    "target_error",
    "total_variation",
    "with_contrast_of",
]

OBJECTIVES = ("l2", "inner", "cosine", "squared")
#: Values of a 227 × 227 colour image, and the norm σ that the constants of 2015 imply for it.
_COUNT_2015 = 3 * 227 * 227
_ALPHA_RAW_2015 = 4e-10  # half of the released lambdaL2, as the code halves it
_LAMBDA_ALPHA_2015 = 2.16e8
_SIGMA_2015 = (_LAMBDA_ALPHA_2015 / _ALPHA_RAW_2015) ** 0.25
_RMS_2015 = _SIGMA_2015 / math.sqrt(_COUNT_2015)
_SCALE_2016 = 80.0

#: Pixels of a batch on a CPU: with more, activations leave the caches (`benchmarks/preimage.py`).
_CPU_PIXELS = 400_000

#: λ of TV^β by layers of CaffeNet (2015, figure 6): 1-6, 7-12, 13-20.
LAMBDAS_2015 = {"shallow": 0.5, "middle": 5.0, "deep": 50.0}
#: Weight C of the data term by depth (2016): up to relu3, up to relu4, up to relu5, deeper.
DATA_WEIGHTS_2016 = {"relu3": 300.0, "relu4": 100.0, "relu5": 20.0, "deeper": 1.0}


class NonFiniteError(RuntimeError):
    """The objective or its gradient was no longer finite; `result` holds the images so far."""

    def __init__(self, message: str, result: Inversion) -> None:
        super().__init__(message)
        self.result = result


# ------------------------------------------------------------------------------- 1. what to match


class Taps:
    """Layers of an encoder as a matcher: images (N, 3, H, W) to a dict layer -> codes.

    The forward pass ends after the deepest layer, and gradients reach the images. Raises
    ValueError for layers that cannot be read (see `taps.read`).
    """

    def __init__(self, encoder: Encoder, layers: str | Sequence[str]) -> None:
        self.encoder = encoder
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self._reader: taps.Reader | None = None
        with taps.read(encoder, self.layers):
            pass

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Leave the hooks on for many calls; they go even when something raises."""
        with taps.read(self.encoder, self.layers) as reader:
            self._reader = reader
            try:
                yield
            finally:
                self._reader = None

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Codes by layer."""
        if self._reader is not None:
            return self._reader(images)
        with taps.read(self.encoder, self.layers) as reader:
            return reader(images)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"weights": self.encoder.weight_hash, "layers": list(self.layers)}


#: A callable images -> codes (a tensor, or a dict of them), or several by name.
Matcher = Callable[[Tensor], Any] | Mapping[str, Callable[[Tensor], Any]]


def _call(matcher: Matcher, images: Tensor) -> dict[str, Tensor]:
    """Codes by name: "codes" for a lone tensor, "name/layer" for taps among several matchers."""
    if isinstance(matcher, Mapping):
        found: dict[str, Tensor] = {}
        for name, part in matcher.items():
            for inner, value in _call(part, images).items():
                found[name if inner == "codes" else f"{name}/{inner}"] = value
        return found
    value = matcher(images)
    result = dict(value) if isinstance(value, Mapping) else {"codes": value}
    for name, code in result.items():
        if not isinstance(code, Tensor) or code.ndim < 2 or len(code) != len(images):
            got = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
            raise ValueError(
                f"a matcher must give a tensor (N, ...) for N images, or a dict of them; "
                f"{name!r} is {got} for {len(images)} images"
            )
    return result


def _leaves(matcher: Matcher) -> list[Callable[[Tensor], Any]]:
    if isinstance(matcher, Mapping):
        return [leaf for part in matcher.values() for leaf in _leaves(part)]
    return [matcher]


@contextlib.contextmanager
def _opened(matcher: Matcher) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for leaf in {id(x): x for x in _leaves(matcher)}.values():
            if isinstance(leaf, Taps):
                stack.enter_context(leaf.opened())
        yield


def _identity(matcher: Matcher) -> Any:
    if isinstance(matcher, Mapping):
        return {name: _identity(part) for name, part in matcher.items()}
    if isinstance(matcher, Taps):
        return matcher.identity()
    if isinstance(matcher, torch.nn.Module):
        return [type(matcher).__name__, repr(matcher), store.digest(dict(matcher.state_dict()))]
    return getattr(matcher, "__qualname__", type(matcher).__name__)


def codes(matcher: Matcher, images: Tensor, *, batch_size: int | None = None) -> dict[str, Tensor]:
    """Codes of images (N, C, H, W) by name, without gradients: what :func:`invert` takes.

    A matcher that gives one tensor has it under the name "codes".

    Raises:
        ValueError: no images, or a matcher that gives no tensors (N, ...).
    """
    if not len(images) or (batch_size is not None and batch_size < 1):
        raise ValueError("images must not be empty and batch_size must be at least 1")
    with torch.no_grad(), _opened(matcher):
        parts = [_call(matcher, part) for part in images.split(batch_size or len(images))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, eq=False)
class Term:
    """One thing to match.

    Attributes:
        code: name of the code (a layer, or "codes" for a matcher with one).
        objective: of `OBJECTIVES`. "l2": ‖Φ − Φ₀‖² / ‖Φ₀‖²; "inner": −⟨Φ, Φ₀⟩ / ‖Φ₀‖²; "cosine":
            1 − cos(Φ, Φ₀); "squared": ‖Φ − Φ₀‖². All over the chosen entries only.
        weight: of this term.
        positions: None for all; n for the central n × n units (2015, §4.2: 5); (top, left, height,
            width) in units; or a boolean mask (h, w).
        channels: None for all; indices; or "first", "second" for half of them (2015, figure 10).
    """

    code: str = "codes"
    objective: str = "l2"
    weight: float = 1.0
    positions: int | tuple[int, int, int, int] | Tensor | None = None
    channels: Sequence[int] | str | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        require_positive("the weight of a term", self.weight)
        if isinstance(self.channels, str) and self.channels not in ("first", "second"):
            raise unknown("group of channels", self.channels, ["first", "second"])

    def describe(self) -> dict[str, Any]:
        """As JSON, for checkpoints."""
        plain = {name: getattr(self, name) for name in ("code", "objective", "weight")}
        where = self.positions
        plain["positions"] = where.tolist() if isinstance(where, Tensor) else where
        plain["channels"] = list(self.channels) if self.channels is not None else None
        return plain

    def select(self, code: Tensor) -> Tensor:
        """The chosen entries of codes (N, C, ...) as (N, entries), the order always the same.

        Raises:
            ValueError: positions of a code without any, or positions and channels out of range.
        """
        if self.channels is not None:
            count = code.shape[1]
            if isinstance(self.channels, str):
                half = (count + 1) // 2
                index = range(half) if self.channels == "first" else range(half, count)
            else:
                index = list(self.channels)
            bad = [c for c in index if not 0 <= c < count]
            if bad or not len(index):
                raise ValueError(
                    f"channels of {self.code!r} must be indices from 0 to {count - 1}, "
                    f"not {bad or 'none at all'}"
                )
            code = code[:, torch.as_tensor(list(index), device=code.device)]
        if self.positions is None:
            # channels last, as encoders made faster compute: a view there, while the other order
            # would be copied, and its gradient would reach the network in the wrong layout
            return (code.permute(0, 2, 3, 1) if code.ndim == 4 else code).flatten(1)
        if code.ndim != 4:
            raise ValueError(f"{self.code!r} has no positions: its shape is {tuple(code.shape)}")
        grid = (code.shape[2], code.shape[3])
        if isinstance(self.positions, Tensor):
            mask = self.positions.to(code.device)
            if tuple(mask.shape) != grid or mask.dtype != torch.bool or not bool(mask.any()):
                raise ValueError(
                    f"a mask of positions of {self.code!r} must be boolean {grid} and not empty, "
                    f"not {mask.dtype} {tuple(mask.shape)}"
                )
            return code[:, :, mask].flatten(1)
        if isinstance(self.positions, int):
            n = self.positions
            top, left = (math.ceil((side - n + 1) / 2) - 1 for side in grid)
            rows, columns = n, n
        else:
            top, left, rows, columns = self.positions
        inside = min(top, left) >= 0 and top + rows <= grid[0] and left + columns <= grid[1]
        if min(rows, columns) < 1 or not inside:
            raise ValueError(
                f"positions {self.positions} are not within the {grid[0]}x{grid[1]} grid of "
                f"{self.code!r}"
            )
        return code[:, :, top : top + rows, left : left + columns].flatten(1)

    def loss(self, code: Tensor, reference: Tensor) -> Tensor:
        """(N,) unweighted objective of codes against references already selected (N, entries)."""
        found = self.select(code)
        if self.objective == "cosine":
            return 1 - F.cosine_similarity(found, reference, dim=1, eps=1e-12)
        norm = reference.square().sum(1)
        if self.objective == "inner":
            return -(found * reference).sum(1) / norm
        squares = (found - reference).square().sum(1)
        return squares if self.objective == "squared" else squares / norm


# ------------------------------------------------------------------------- 2. parameterisations


def _draw(generator: torch.Generator, shape: Sequence[int], *, normal: bool = True) -> Tensor:
    draw = torch.randn if normal else torch.rand
    return draw(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Pixels:
    """The variable is the image, in levels.

    Attributes:
        start: "normal": Gaussian noise scaled to the norm σ (2015); "uniform": noise on ±1 over its
            95 % quantile, times 80/√3 (2016); "mean": the mean colour; "faint": uniform noise of
            ±0.1 levels (Xia et al. 2016).
    """

    start: str = "normal"
    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        starts = ["normal", "uniform", "mean", "faint"]
        if self.start not in starts:
            raise unknown("start", self.start, starts)

    def begin(
        self, generators: Sequence[torch.Generator], shape: tuple[int, int, int], rms: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Variables and constants, each with an axis of items first."""
        items = []
        for generator in generators:
            if self.start == "normal":
                x = _draw(generator, shape)
                x = x / x.norm() * rms * math.sqrt(math.prod(shape))
            elif self.start == "uniform":
                x = 2 * _draw(generator, shape, normal=False) - 1
                # kthvalue, since torch.quantile takes no more than 2**24 values
                rank = max(1, min(x.numel(), math.floor(0.95 * x.numel() + 0.5)))
                x = x / x.flatten().kthvalue(rank).values * _SCALE_2016 / math.sqrt(3)
            elif self.start == "faint":
                x = 0.1 * (2 * _draw(generator, shape, normal=False) - 1)
            else:
                x = torch.zeros(shape, dtype=torch.float64)
            items.append(x)
        return [torch.stack(items)], []

    def levels(
        self,
        variables: Sequence[Tensor],
        constants: Sequence[Tensor],
        shape: tuple[int, int, int],
        mean: Tensor,
    ) -> Tensor:
        """Levels (N, C, H, W)."""
        return variables[0]


#: Square root of the covariance of colours in ImageNet, up to scale (Olah, Mordvintsev & Schubert
#: 2017, "Feature visualization"): columns are decorrelated colour axes.
_COLOUR = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


@dataclass(frozen=True)
class Fourier:
    """The variable is the spectrum, weighted as natural images are; a sigmoid keeps to [0, 1].

    Olah, Mordvintsev & Schubert (2017): amplitudes fall with frequency^−`decay`, and colours are
    those of decorrelated axes if `decorrelate` (which needs 3 channels).
    """

    decay: float = 1.0
    decorrelate: bool = True
    deviation: float = 0.01  #: of the spectrum at the start
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive("decay", self.decay, zero=True)
        require_positive("deviation", self.deviation)

    def begin(
        self, generators: Sequence[torch.Generator], shape: tuple[int, int, int], rms: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Variables and constants, each with an axis of items first."""
        size = (shape[0], shape[1], shape[2] // 2 + 1, 2)
        return [torch.stack([self.deviation * _draw(g, size) for g in generators])], []

    def levels(
        self,
        variables: Sequence[Tensor],
        constants: Sequence[Tensor],
        shape: tuple[int, int, int],
        mean: Tensor,
    ) -> Tensor:
        """Levels (N, C, H, W)."""
        channels, height, width = shape
        spectrum = variables[0]
        rows = torch.fft.fftfreq(height, device=spectrum.device, dtype=spectrum.dtype)
        columns = torch.fft.rfftfreq(width, device=spectrum.device, dtype=spectrum.dtype)
        frequency = (rows[:, None].square() + columns.square()).sqrt()
        gain = frequency.clamp(min=1 / max(height, width)) ** -self.decay
        scaled = torch.view_as_complex(spectrum.contiguous()) * (gain * math.sqrt(height * width))
        x = torch.fft.irfft2(scaled, s=(height, width)) / 4
        if self.decorrelate and channels == 3:
            mix = x.new_tensor(_COLOUR)
            x = torch.einsum("oc,nchw->nohw", mix / mix.norm(dim=0).max(), x)
        return 255 * torch.sigmoid(x) - mean


@dataclass(frozen=True)
class DeepImagePrior:
    """The variables are weights of a small hour-glass network fed with fixed noise.

    Ulyanov, Vedaldi & Lempitsky (2018): `depth` convolutions 3 × 3 of stride 2, each undone by an
    upsampling and a convolution; instance norm, leaky ReLU; a sigmoid keeps to [0, 1]. Every item
    has a network of its own (all run at once, as groups).
    """

    width: int = 32  #: channels
    depth: int = 3
    noise: int = 8  #: channels of the input
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("width", "depth", "noise"):
            require_whole(name, getattr(self, name), 1)

    def _sizes(self, channels: int) -> list[tuple[int, int, int]]:
        inner = [(self.width, self.noise, 3)] + [(self.width, self.width, 3)] * (2 * self.depth - 1)
        return [*inner, (channels, self.width, 1)]

    def begin(
        self, generators: Sequence[torch.Generator], shape: tuple[int, int, int], rms: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Variables and constants, each with an axis of items first."""
        step = 2**self.depth
        if min(shape[1:]) < 2 * step:
            raise ValueError(
                f"a deep image prior of depth {self.depth} needs images of at least "
                f"{2 * step} x {2 * step} px, not {shape[1]} x {shape[2]}"
            )
        rows, columns = (math.ceil(side / step) * step for side in shape[1:])
        items, noise = [], []
        for generator in generators:
            noise.append(0.1 * _draw(generator, (self.noise, rows, columns), normal=False))
            weights = []
            for out, into, kernel in self._sizes(shape[0]):
                deviation = math.sqrt(2 / (into * kernel * kernel))
                weights += [deviation * _draw(generator, (out, into, kernel, kernel))]
                weights += [torch.zeros(out, dtype=torch.float64)]
            items.append(weights)
        return [torch.stack(part) for part in zip(*items, strict=True)], [torch.stack(noise)]

    def levels(
        self,
        variables: Sequence[Tensor],
        constants: Sequence[Tensor],
        shape: tuple[int, int, int],
        mean: Tensor,
    ) -> Tensor:
        """Levels (N, C, H, W)."""
        items = len(variables[0])

        def convolve(x: Tensor, number: int, stride: int) -> Tensor:
            weight, bias = variables[2 * number].flatten(0, 1), variables[2 * number + 1]
            pad = weight.shape[-1] // 2
            x = F.conv2d(x, weight, stride=stride, padding=pad, groups=items)
            last = number == 2 * self.depth
            x = x if last else F.instance_norm(x)
            x = x + bias.reshape(1, -1, 1, 1)
            return x if last else F.leaky_relu(x, 0.2)

        x = constants[0].reshape(1, -1, *constants[0].shape[2:])
        for number in range(self.depth):
            x = convolve(x, number, 2)
        for number in range(self.depth, 2 * self.depth):
            x = convolve(F.interpolate(x, scale_factor=2, mode="nearest"), number, 1)
        x = convolve(x, 2 * self.depth, 1).view(items, -1, *x.shape[2:])
        return 255 * torch.sigmoid(x[..., : shape[1], : shape[2]]) - mean


# ---------------------------------------------------------------- 3. priors, bounds, transforms


def _check_levels(x: Tensor, what: str) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{what} is of floating-point images (N, C, H, W), not {tuple(x.shape)}")


def alpha_norm(x: Tensor, alpha: float = 6.0, *, joint: bool = False) -> Tensor:
    """‖x‖_α^α = Σ |x|^α of images (N, C, H, W): (N,) (2015, §3.2).

    With `joint`, Σ over pixels of (Σ over channels of x²)^{α/2} (2016, eq. 5).

    Raises:
        ValueError: α below 1, or x of another form.
    """
    _check_levels(x, "the α-norm")
    if not alpha >= 1:
        raise ValueError(f"alpha must be at least 1, not {alpha!r}")
    if not joint:
        return _power(x.square(), alpha / 2).sum((1, 2, 3))
    return _power(x.square().sum(1), alpha / 2).sum((1, 2))


def total_variation(x: Tensor, beta: float = 2.0) -> Tensor:
    """TV^β of images (N, C, H, W), each channel apart: (N,) (2015, §3.2).

    Σ_{i,j} ((x_{i,j+1} − x_{ij})² + (x_{i+1,j} − x_{ij})²)^{β/2}; the differences across the last
    row and column are 0 (the border is repeated), as in the released code. Where both are 0 the
    gradient is taken as 0, also for β = 1.

    Raises:
        ValueError: β below 1, or x of another form.
    """
    _check_levels(x, "total variation")
    if not beta >= 1:
        raise ValueError(f"beta must be at least 1, not {beta!r}")
    across = F.pad(x[..., :, 1:] - x[..., :, :-1], (0, 1))
    down = F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    return _power(across.square() + down.square(), beta / 2).sum((1, 2, 3))


def _power(squares: Tensor, exponent: float) -> Tensor:
    """A power with gradient 0 rather than infinite at 0."""
    if exponent == 3:  # of α = 6, many times faster than pow
        return squares * squares * squares
    if exponent >= 1:
        return squares if exponent == 1 else squares.pow(exponent)
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1).pow(exponent), 0)


@dataclass(frozen=True)
class AlphaNorm:
    """weight · ‖x / scale‖_α^α over the number of values (of pixels if `joint`); x in levels."""

    weight: float
    alpha: float = 6.0
    scale: float = _RMS_2015  #: levels
    joint: bool = False
    name: ClassVar[str] = "alpha"

    def __post_init__(self) -> None:
        require_positive("the weight of a prior", self.weight, zero=True)
        require_positive("scale", self.scale)

    def __call__(self, x: Tensor, mean: Tensor) -> Tensor:
        """(N,) unweighted."""
        count = math.prod(x.shape[2:]) * (1 if self.joint else x.shape[1])
        return alpha_norm(x / self.scale, self.alpha, joint=self.joint) / count


@dataclass(frozen=True)
class TotalVariation:
    """weight · TV^β(x / scale) over the number of values (of pixels if `per` says); x in levels."""

    weight: float
    beta: float = 2.0
    scale: float = _RMS_2015  #: levels
    per: str = "values"  #: or "pixels"
    name: ClassVar[str] = "tv"

    def __post_init__(self) -> None:
        require_positive("the weight of a prior", self.weight, zero=True)
        require_positive("scale", self.scale)
        if self.per not in ("values", "pixels"):
            raise unknown("per", self.per, ["values", "pixels"])

    def __call__(self, x: Tensor, mean: Tensor) -> Tensor:
        """(N,) unweighted."""
        count = math.prod(x.shape[2:]) * (x.shape[1] if self.per == "values" else 1)
        return total_variation(x / self.scale, self.beta) / count


@dataclass(frozen=True)
class Bounds:
    """weight · mean squared excess of the image beyond [low, high]: a penalty, not a wall."""

    weight: float
    low: float = 0.0
    high: float = 1.0
    name: ClassVar[str] = "bounds"

    def __post_init__(self) -> None:
        require_positive("the weight of a prior", self.weight, zero=True)
        if not self.low < self.high:
            raise ValueError(f"low must be below high, not {self.low} and {self.high}")

    def __call__(self, x: Tensor, mean: Tensor) -> Tensor:
        """(N,) unweighted."""
        image = (x + mean) / 255
        return (F.relu(self.low - image) + F.relu(image - self.high)).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Clamp:
    """After every step, put pixels back into [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, not {self.low} and {self.high}")

    def __call__(self, x: Tensor, mean: Tensor) -> Tensor:
        """Levels back in range."""
        return ((x + mean).clamp(255 * self.low, 255 * self.high)) - mean


@dataclass(frozen=True)
class NormBall:
    """After every step, shorten colours whose norm exceeds `radius` levels (2016: B₊ = 160)."""

    radius: float = 2 * _SCALE_2016

    def __post_init__(self) -> None:
        require_positive("radius", self.radius)

    def __call__(self, x: Tensor, mean: Tensor) -> Tensor:
        """Levels back in range."""
        return x * (self.radius / x.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def jitter_for_stride(stride: float) -> int:
    """Jitter of 2016 for a layer's stride in pixels: a quarter of it, at least 1 (none)."""
    require_positive("stride", stride)
    return max(math.floor(stride / 4 + 0.5), 1)


@dataclass(frozen=True)
class Jitter:
    """Match a window at one of `amount` × `amount` places of a canvas that is larger by that − 1.

    1 is none. Priors are of the whole canvas, the result is its centre (2016).
    """

    amount: int

    def __post_init__(self) -> None:
        require_whole("the amount of jitter", self.amount, 1)


@dataclass(frozen=True)
class RandomScale:
    """Match the image enlarged by a random factor, evenly from low to high."""

    low: float = 0.9
    high: float = 1.1

    def __post_init__(self) -> None:
        require_positive("low", self.low)
        if not self.low <= self.high:
            raise ValueError(f"low must not exceed high, not {self.low} and {self.high}")


@dataclass(frozen=True)
class RandomRotation:
    """Match the image turned by a random angle, evenly within ± `degrees`."""

    degrees: float = 5.0

    def __post_init__(self) -> None:
        require_positive("degrees", self.degrees, zero=True)


# ---------------------------------------------------------------------------------- optimisers


@dataclass(frozen=True, eq=False)
class _Moment:
    """What an optimiser is told of one variable at a step."""

    value: Tensor  #: (items, ...), as the gradient and the slots
    gradient: Tensor
    slots: Sequence[Tensor]
    factor: float  #: of the rate
    step: int
    scale: float  #: of the objective, for pixels


@dataclass(frozen=True)
class _Optimiser:
    """What all have: a rate, and an `update` that gives the change and the new slots."""

    rate: float
    slots: ClassVar[int]
    pixels_only: ClassVar[bool] = True
    restarts: ClassVar[bool] = True  #: whether the slots are emptied when the rate changes

    def __post_init__(self) -> None:
        require_positive("rate", self.rate)

    def update(self, at: _Moment) -> tuple[Tensor, list[Tensor]]:
        """The change of the variable (items, ...) and the new slots."""
        raise NotImplementedError


@dataclass(frozen=True)
class Momentum(_Optimiser):
    """m ← momentum · m − rate · σ² · ∇, x ← x + m (2015, code); for pixels.

    σ² = rms² · C · H · W turns the step on x/σ of the paper into one on levels.
    """

    rate: float = 0.004
    momentum: float = 0.9
    slots: ClassVar[int] = 1

    def update(self, at: _Moment) -> tuple[Tensor, list[Tensor]]:
        """The change of the variable and the new slots."""
        m = self.momentum * at.slots[0] - self.rate * at.factor * at.scale * at.gradient
        return m, [m]


@dataclass(frozen=True)
class DecayedAdagrad(_Optimiser):
    """G ← μ G + ∇², m ← μ m − ∇ / (1/rate + √G), x ← x + m (2016, §3.4 and code); for pixels.

    rate = H · W · 0.05 · 80² / 6 for the published `rate`.
    """

    rate: float = 0.05 * _SCALE_2016**2 / 6
    momentum: float = 0.9
    slots: ClassVar[int] = 2

    def update(self, at: _Moment) -> tuple[Tensor, list[Tensor]]:
        """The change of the variable and the new slots."""
        squares = self.momentum * at.slots[1] + at.gradient.square()
        m = self.momentum * at.slots[0] - at.gradient / (
            1 / (self.rate * at.factor * at.scale) + squares.sqrt()
        )
        return m, [m, squares]


@dataclass(frozen=True)
class Adam(_Optimiser):
    """Kingma & Ba (2015); for every parameterisation. For pixels the rate is in levels."""

    rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    slots: ClassVar[int] = 2
    pixels_only: ClassVar[bool] = False
    restarts: ClassVar[bool] = False

    def update(self, at: _Moment) -> tuple[Tensor, list[Tensor]]:
        """The change of the variable and the new slots."""
        first, second = self.betas
        m = first * at.slots[0] + (1 - first) * at.gradient
        v = second * at.slots[1] + (1 - second) * at.gradient.square()
        root = (v / (1 - second ** (at.step + 1))).sqrt() + 1e-8
        return -self.rate * at.factor * m / (1 - first ** (at.step + 1)) / root, [m, v]


@dataclass(frozen=True)
class ClippedMomentum(_Optimiser):
    """m ← μ m − rate (clip(∇) + decay · x), x ← x + m (Xia et al. 2016, code); for pixels.

    Published for a network on levels. One on unit variance has gradients smaller by orders of
    magnitude, so each item's are multiplied by what makes their rms `clip` at the first step. The
    rate then means the same for every network, layer and weight; momentum outlives its changes.
    """

    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    clip: float = 10.0
    slots: ClassVar[int] = 2
    restarts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("decay", self.decay, zero=True)
        require_positive("clip", self.clip)

    def update(self, at: _Moment) -> tuple[Tensor, list[Tensor]]:
        """The change of the variable and the new slots."""
        rms = at.gradient.square().flatten(1).mean(1).sqrt()
        first = _along(self.clip / rms.clamp_min(1e-30), at.gradient)
        gain = torch.where(at.slots[1] > 0, at.slots[1], first)
        clipped = (gain * at.gradient).clamp(-self.clip, self.clip)
        m = self.momentum * at.slots[0] - self.rate * at.factor * (clipped + self.decay * at.value)
        return m, [m, gain]


def _along(values: Tensor, like: Tensor) -> Tensor:
    """(items,) as (items, 1, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


@dataclass(frozen=True)
class LBFGS(_Optimiser):
    """Limited-memory BFGS (Nocedal 1980) as style transfer uses it: no line search; for pixels.

    Each item has a memory of its own, so that items do not interact. A pair without positive
    curvature is not remembered; a step is no longer than `reach`, and the first is along the
    gradient with an rms of `first`.
    """

    rate: float = 1.0
    memory: int = 10
    first: float = 1.0  #: levels
    reach: float = 16.0  #: levels, rms over the image

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("memory", self.memory, 1)
        require_positive("first", self.first)
        require_positive("reach", self.reach)

    @property
    def slots(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Last gradient, last change; changes s, then differences of gradients y, newest first."""
        return 2 + 2 * self.memory

    def update(self, at: _Moment) -> tuple[Tensor, list[Tensor]]:
        """The change of the variable and the new slots."""
        before, change, *pairs = at.slots
        old_s, old_y = pairs[: self.memory], pairs[self.memory :]
        difference = at.gradient - before
        curvature = _dot(change, difference)
        taken = curvature > 1e-6 * (_dot(change, change) * _dot(difference, difference)).sqrt()
        s = [_where(taken, a, b) for a, b in zip([change, *old_s[:-1]], old_s, strict=True)]
        y = [_where(taken, a, b) for a, b in zip([difference, *old_y[:-1]], old_y, strict=True)]
        # the two-loop recursion; an empty place has no curvature and changes nothing
        products = [_dot(a, b) for a, b in zip(s, y, strict=True)]
        rho = [torch.where(p > 0, 1 / p.clamp_min(1e-38), 0) for p in products]
        direction, alphas = at.gradient, []
        for a, b, r in zip(s, y, rho, strict=True):
            alphas.append(r * _dot(a, direction))
            direction = direction - _along(alphas[-1], b) * b
        squares = _dot(y[0], y[0])
        length = at.gradient.square().flatten(1).mean(1).sqrt()
        steepest = self.first / length.clamp_min(1e-38)
        known = products[0] > 0
        inverse = torch.where(known, products[0] / squares.clamp_min(1e-38), steepest)
        direction = _along(inverse, direction) * direction
        for a, b, r, alpha in reversed(list(zip(s, y, rho, alphas, strict=True))):
            direction = direction + _along(alpha - r * _dot(b, direction), a) * a
        descends = (_dot(direction, at.gradient) > 0) & direction.flatten(1).isfinite().all(1)
        direction = _where(descends, direction, _along(steepest, at.gradient) * at.gradient)
        rms = direction.square().flatten(1).mean(1).sqrt()
        within = (self.reach / rms.clamp_min(1e-38)).clamp(max=1)
        change = -self.rate * at.factor * _along(within, direction) * direction
        return change, [at.gradient, change, *s, *y]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps at one learning rate.

    When the factor or the transforms change, momentum starts anew (papers of 2015 and 2016, code);
    Adam's averages go on.
    """

    steps: int
    factor: float = 1.0  #: of the optimiser's rate
    transforms: bool = True  #: whether the random transforms are on

    def __post_init__(self) -> None:
        require_whole("steps", self.steps, 1)
        require_positive("factor", self.factor)


# ------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Config:
    """How to invert: everything but what to match.

    Raises:
        ValueError: options that contradict one another, named.
    """

    parameterisation: Any = field(default_factory=Pixels)
    optimiser: Any = field(default_factory=Momentum)
    schedule: tuple[Phase, ...] = (Phase(100), Phase(200, 0.1), Phase(100, 0.01))
    priors: tuple[Any, ...] = ()
    projection: Any = None  #: `Clamp`, `NormBall` or None
    transforms: tuple[Any, ...] = ()
    data_weight: float = 1.0  #: of all that is matched
    rms: float = _RMS_2015  #: levels; σ = rms · √(C · H · W)
    mean: tuple[float, ...] = (123.68, 116.78, 103.94)  #: levels of red, green and blue
    grey_mean: float = 128.0  #: levels, for images of one channel
    keep: str = "last"  #: iterate to return: "last" as published, or "best" (of least objective)
    check_every: int = 10  #: steps between looks at the stop criteria

    def __post_init__(self) -> None:
        if self.keep not in ("last", "best"):
            raise unknown("keep", self.keep, ["last", "best"])
        if not self.schedule:
            raise ValueError("the schedule has no phase")
        require_whole("check_every", self.check_every, 1)
        require_positive("data_weight", self.data_weight)
        require_positive("rms", self.rms)
        bounded = self.parameterisation.bounded
        what = type(self.parameterisation).__name__
        if self.optimiser.pixels_only and not isinstance(self.parameterisation, Pixels):
            raise ValueError(
                f"{type(self.optimiser).__name__} takes steps in levels, for Pixels; "
                f"use Adam for {what}"
            )
        if isinstance(self.optimiser, LBFGS) and (self.projection or self.transforms):
            raise ValueError(
                "LBFGS learns from the steps it takes and an objective that stays the same: "
                "projection must be None and transforms empty (Bounds keeps to a range), or use "
                "Adam"
            )
        if self.projection is not None and bounded:
            raise ValueError(f"{what} is within [0, 1] by itself: projection must be None")
        names = [prior.name for prior in self.priors]
        if len(set(names)) < len(names) or "data" in names or "total" in names:
            raise ValueError(f"priors need names of their own (not data, total): {names}")
        for transform in self.transforms:
            if not isinstance(transform, Jitter | RandomScale | RandomRotation):
                raise unknown(
                    "transform", type(transform).__name__, ["Jitter", "RandomScale",
                                                             "RandomRotation"]
                )  # fmt: skip
        kinds = [type(transform) for transform in self.transforms]
        if len(set(kinds)) < len(kinds):
            raise ValueError("each kind of transform can be given once")

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.schedule)

    def with_weight(self, name: str, weight: float) -> Config:
        """The same with another weight of a prior, or of the data term ("data")."""
        if name == "data":
            return replace(self, data_weight=weight)
        if name not in self.weights():
            raise unknown("penalty", name, list(self.weights()))
        return replace(
            self,
            priors=tuple(
                replace(prior, weight=weight) if prior.name == name else prior
                for prior in self.priors
            ),
        )

    def weights(self) -> dict[str, float]:
        """Weights of the data term and of all priors, by name."""
        return {"data": self.data_weight} | {prior.name: prior.weight for prior in self.priors}


_PRIORS_2015 = (
    AlphaNorm(_LAMBDA_ALPHA_2015 / _COUNT_2015**2, 6.0, _RMS_2015),
    TotalVariation(LAMBDAS_2015["shallow"], 2.0, _RMS_2015),
)
#: The published configurations; :func:`preset` takes them by name.
PRESETS: dict[str, Config] = {
    # 2015, §3.2, §3.3 and invert_nn, experiment_cnn of the released code
    "mahendran2015": Config(priors=_PRIORS_2015),
    # the same for HOG and dense SIFT: twice the steps (experiment_shallow_quantitative)
    "mahendran2015_descriptors": Config(
        schedule=tuple(Phase(200, 10.0**-k) for k in range(4)), priors=_PRIORS_2015
    ),
    # 2016, §3 and nnpreimage, get_defaults, get_preimage_opts of the released code
    "mahendran2016": Config(
        parameterisation=Pixels("uniform"),
        optimiser=DecayedAdagrad(),
        schedule=(Phase(300), Phase(50, 0.1, transforms=False)),
        priors=(
            AlphaNorm(1.0, 6.0, _SCALE_2016, joint=True),
            TotalVariation(6.5**2, 2.0, _SCALE_2016, per="pixels"),
        ),
        projection=NormBall(),
    ),
    # Xia et al. 2016, released code: no prior at all; what ends a run there (an image that changes
    # by less than 0.5 % in a step) is left to `stop`
    "xia2016": Config(
        parameterisation=Pixels("faint"),
        optimiser=ClippedMomentum(),
        schedule=tuple(Phase(10, 0.9**k) for k in range(100)),
    ),
}  # fmt: skip


def preset(name: str, *, group: str | None = None, stride: float | None = None) -> Config:
    """A published configuration.

    Args:
        name: "mahendran2015" (networks, 400 steps), "mahendran2015_descriptors" (HOG and dense
            SIFT, 800 steps), "mahendran2016", or "xia2016" (no prior; 1000 steps).
        group: how deep the layer is, which decides on λ: of `LAMBDAS_2015` (shallow by default) or
            of `DATA_WEIGHTS_2016` ("deeper" by default).
        stride: of the layer in pixels; 2016 jitters by a quarter of it (no jitter without; 2015 has
            none).

    Raises:
        ValueError: an unknown name or group, a group for a preset without any, or a stride for one
            without jitter.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    config = PRESETS[name]
    later = name == "mahendran2016"
    groups = DATA_WEIGHTS_2016 if later else LAMBDAS_2015
    if group is not None and not config.priors:
        raise ValueError(f"{name} has no prior, so no group of layers is needed")
    if group is not None:
        if group not in groups:
            raise unknown(f"group of layers of {name}", group, groups)
        config = config.with_weight("data" if later else "tv", groups[group])
    if stride is not None:
        if not later:
            raise ValueError(f"{name} has no jitter, so no stride is needed")
        config = replace(config, transforms=(Jitter(jitter_for_stride(stride)),))
    return config


def _plain(value: Any) -> Any:
    """A configuration as JSON, with the names of its classes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        content = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **content}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# ---------------------------------------------------------------------------------- stop criteria


@dataclass(frozen=True)
class Progress:
    """What a stop criterion is told; tensors stay on their device."""

    step: int  #: updates done
    loss: Tensor  #: (steps so far, items) objective
    data: Tensor  #: (steps so far, items) what is matched, weighted within but not by data_weight


#: Says which items to stop: a bool for all, or (items,).
Stop = Callable[[Progress], "Tensor | bool"]


def target_error(level: float) -> Stop:
    """Stop an item whose relative feature error ‖Φ − Φ₀‖ / ‖Φ₀‖ is at most `level`.

    For one l2 term of weight 1 (else the root of the weighted sum of what is matched).
    """
    require_positive("level", level)

    def stop(progress: Progress) -> Tensor:
        return progress.data[-1] <= level**2

    return stop


def plateau(tolerance: float = 1e-3, *, window: int = 50) -> Stop:
    """Stop an item whose objective fell by less than a share `tolerance` within `window` steps.

    Compares means of the last and of the last but one `window` steps.
    """
    require_positive("tolerance", tolerance)
    require_whole("window", window, 1)

    def stop(progress: Progress) -> Tensor | bool:
        if len(progress.loss) < 2 * window:
            return False
        before = progress.loss[-2 * window : -window].mean(0)
        return before - progress.loss[-window:].mean(0) < tolerance * before.abs()

    return stop


# ------------------------------------------------------------------------------------- results


@dataclass(frozen=True, eq=False)
class Inversion:
    """Pre-images of N codes, from R starts, at P penalties; all tensors on the CPU."""

    images: Tensor  #: (N, R, P, C, H, W) in [0, 1]; pixels without a projection can lie outside
    error: dict[str, Tensor]  #: term -> (N, R, P) relative ‖Φ − Φ₀‖ / ‖Φ₀‖ of chosen entries
    history: dict[str, Tensor]  #: (steps, N, R, P): total, data, priors unweighted; NaN past an end
    snapshots: dict[int, Tensor]  #: step -> images; 0 is the start
    steps: Tensor  #: (N, R, P) updates done
    failed_at: Tensor  #: (N, R, P) step at which the objective was not finite, −1 where never
    weights: dict[str, Tensor]  #: (N, R, P) of the data term and the priors
    seeds: list[int]  #: (N,)
    status: str  #: finished, stopped (criteria), interrupted, paused, or failed (all items)
    config: Config


def _shape(shape: Sequence[int]) -> tuple[int, int, int]:
    sides = tuple(shape)
    whole = all(isinstance(side, int) and side > 0 for side in sides)
    if len(sides) != 3 or not whole or sides[0] not in (1, 3):
        raise ValueError(f"shape must be (C, H, W) of the images, C = 1 or 3, not {tuple(shape)}")
    return sides  # pyright: ignore


def _references(references: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(references) if isinstance(references, Mapping) else {"codes": references}
    if not found:
        raise ValueError("no reference code was given")
    counts = {len(code) for code in found.values() if code.ndim > 1}
    if any(code.ndim < 2 for code in found.values()) or len(counts) != 1 or 0 in counts:
        shapes = {name: tuple(code.shape) for name, code in found.items()}
        raise ValueError(f"references must be codes (N, ...) of the same N ≥ 1 images: {shapes}")
    for name, code in found.items():
        if not code.is_floating_point():
            raise ValueError(f"reference {name!r} must be floating point, not {code.dtype}")
    return {name: code.detach() for name, code in found.items()}


def _terms(terms: Sequence[Term] | None, references: Mapping[str, Tensor]) -> tuple[Term, ...]:
    chosen = tuple(Term(name) for name in references) if terms is None else tuple(terms)
    if not chosen:
        raise ValueError("no term to match")
    for term in chosen:
        if term.code not in references:
            raise unknown("code", term.code, references)
    return chosen


def _targets(terms: Sequence[Term], references: Mapping[str, Tensor]) -> list[Tensor]:
    """Chosen entries of the references (N, entries) by term; they must be finite and not zero."""
    targets = []
    for term in terms:
        target = term.select(references[term.code])
        norm = target.norm(dim=1)
        for what, bad in (
            ("not finite (NaN or infinite)", ~target.isfinite().all(1)),
            ("zero everywhere, and the objective divides by its norm: match other positions, "
             "channels or another layer", norm == 0),
        ):  # fmt: skip
            if bool(bad.any()):
                raise ValueError(
                    f"reference code {term.code!r} of image {int(bad.nonzero()[0])} is {what}"
                )
        targets.append(target)
    return targets


class _Run:
    """The state of one optimisation: all that a checkpoint holds."""

    def __init__(
        self,
        references: Mapping[str, Tensor],
        matcher: Matcher,
        config: Config,
        *,
        shape: tuple[int, int, int],
        terms: Sequence[Term],
        layout: tuple[int, int, int],
        seeds: Sequence[int],
        weights: Mapping[str, Tensor],
        start: Tensor | None,
        batch_size: int | None,
        snapshots: Sequence[int],
    ) -> None:
        self.matcher, self.config, self.terms = matcher, config, terms
        self.shape, self.layout = shape, layout
        images, restarts, penalties = layout
        self.items = images * restarts * penalties
        first = next(iter(references.values()))
        self.device, self.dtype = first.device, first.dtype
        self.targets = _targets(terms, references)
        self.owner = torch.arange(self.items, device=self.device) // (restarts * penalties)
        self.batch_size = batch_size or (
            max(1, _CPU_PIXELS // math.prod(shape[1:])) if self.device.type == "cpu" else self.items
        )
        mean = config.mean if shape[0] == 3 else (config.grey_mean,)
        self.mean = torch.tensor(mean, dtype=self.dtype, device=self.device).view(-1, 1, 1)
        self.weights = {name: self._put(value.flatten()) for name, value in weights.items()}
        jitter = [t.amount for t in config.transforms if isinstance(t, Jitter)]
        self.jitter = jitter[0] if jitter else 1
        margin = self.jitter - 1
        self.canvas = (shape[0], shape[1] + margin, shape[2] + margin)
        names = [(seeds[i], r) for i in range(images) for r in range(restarts)]
        self.plan = [
            (phase, number == 0 and index > 0 and _differ(phase, config.schedule[index - 1]))
            for index, phase in enumerate(config.schedule)
            for number in range(phase.steps)
        ]
        draws = torch.stack([self._draws(*name) for name in names])
        self.draws = draws.repeat_interleave(penalties, 0)
        variables, constants = config.parameterisation.begin(
            [_generator(*name, "start") for name in names], self.canvas, config.rms
        )
        if start is not None:
            variables = [self._begin_at(start, restarts)]
        self.constants = [self._put(v.repeat_interleave(penalties, 0)) for v in constants]
        self.variables = [self._put(v.repeat_interleave(penalties, 0)) for v in variables]
        self.best = self.variables
        self.slots = [
            [torch.zeros_like(v) for _ in range(config.optimiser.slots)] for v in self.variables
        ]
        self.step = 0
        self.active = torch.ones(self.items, dtype=torch.bool, device=self.device)
        self.failed_at = torch.full((self.items,), -1, device=self.device)
        self.updates = torch.zeros(self.items, dtype=torch.long, device=self.device)
        self.best_loss = torch.full((self.items,), math.inf, dtype=self.dtype, device=self.device)
        self.names = ["total", "data", *(prior.name for prior in config.priors)]
        self.history = torch.full(
            (len(self.plan), len(self.names), self.items), math.nan,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        self.wanted = set(snapshots)
        self.snapshots: dict[int, Tensor] = {}
        self._snap()

    def _put(self, value: Tensor) -> Tensor:
        # rounded once from float64, so that a start does not depend on the device
        return value.to(self.device, self.dtype).contiguous()

    def _draws(self, seed: int, restart: int) -> Tensor:
        return torch.rand(
            len(self.plan), 4, generator=_generator(seed, restart, "transforms"),
            dtype=torch.float64,
        )  # fmt: skip

    def _begin_at(self, start: Tensor, restarts: int) -> Tensor:
        levels = 255 * start.to(self.device, self.dtype) - self.mean
        low = (self.jitter - 1) // 2
        high = self.jitter - 1 - low
        if levels.ndim == 4:
            levels = levels[:, None].expand(-1, restarts, -1, -1, -1)
        return F.pad(levels.flatten(0, 1), (low, high, low, high))

    # ---------------------------------------------------------------------------------- images

    def _levels(self, variables: Sequence[Tensor], part: slice) -> Tensor:
        constants = [value[part] for value in self.constants]
        return self.config.parameterisation.levels(variables, constants, self.canvas, self.mean)

    def _window(self, levels: Tensor, offsets: Sequence[Sequence[int]] | None) -> Tensor:
        if self.jitter == 1:
            return levels
        _, height, width = self.shape
        if offsets is None:
            low = (self.jitter - 1) // 2
            return levels[..., low : low + height, low : low + width]
        return torch.stack(
            [x[:, a : a + height, b : b + width] for x, (a, b) in zip(levels, offsets, strict=True)]
        )

    def _transformed(self, levels: Tensor, draws: Tensor) -> Tensor:
        """Images (N, C, H, W) to be described: a window of the canvas, enlarged and turned."""
        offsets = (draws[:, :2] * self.jitter).long().clamp(max=self.jitter - 1).tolist()
        images = (self._window(levels, offsets) + self.mean) / 255
        scale = torch.ones(len(draws), dtype=torch.float64)
        angle = torch.zeros(len(draws), dtype=torch.float64)
        for transform in self.config.transforms:
            if isinstance(transform, RandomScale):
                scale = transform.low + (transform.high - transform.low) * draws[:, 2]
            elif isinstance(transform, RandomRotation):
                angle = (2 * draws[:, 3] - 1) * math.radians(transform.degrees)
        if bool((scale == 1).all()) and bool((angle == 0).all()):
            return images
        # grid coordinates run from -1 to 1 on both axes: a turn needs the aspect ratio
        aspect = images.shape[3] / images.shape[2]
        cosine, sine = angle.cos() / scale, angle.sin() / scale
        zero = torch.zeros_like(scale)
        rows = [
            torch.stack([cosine, -sine / aspect, zero], 1),
            torch.stack([sine * aspect, cosine, zero], 1),
        ]
        theta = torch.stack(rows, 1).to(images)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def images(self, variables: Sequence[Tensor]) -> Tensor:
        """(items, C, H, W) in [0, 1], without transforms."""
        parts = []
        with torch.no_grad():
            for part in self._parts():
                levels = self._levels([v[part] for v in variables], part)
                parts.append((self._window(levels, None) + self.mean) / 255)
        return torch.cat(parts)

    def _parts(self) -> list[slice]:
        size = self.batch_size
        return [slice(i, min(i + size, self.items)) for i in range(0, self.items, size)]

    def _snap(self) -> None:
        if self.step in self.wanted and self.step not in self.snapshots:
            self.snapshots[self.step] = self._folded(self.images(self.variables))

    def _folded(self, value: Tensor) -> Tensor:
        return value.detach().cpu().unflatten(0, self.layout)

    # ------------------------------------------------------------------------------- objective

    def losses(self, variables: Sequence[Tensor], part: slice, phase: Phase, step: int) -> Tensor:
        """(1 + 1 + priors, items of the part): total, data, priors."""
        levels = self._levels(variables, part)
        if phase.transforms:
            images = self._transformed(levels, self.draws[part, step])
        else:
            levels = self._window(levels, None)
            images = (levels + self.mean) / 255
        found = _call(self.matcher, images)
        data = torch.zeros(len(levels), dtype=self.dtype, device=self.device)
        for term, target in zip(self.terms, self.targets, strict=True):
            reference = target[self.owner[part]]
            data = data + term.weight * term.loss(found[term.code], reference)
        total = self.weights["data"][part] * data
        rows = [data]
        for prior in self.config.priors:
            value = prior(levels, self.mean)
            total = total + self.weights[prior.name][part] * value
            rows.append(value)
        return torch.stack([total, *rows])

    def _evaluate(self, phase: Phase) -> tuple[Tensor, list[Tensor]]:
        rows, gradients = [], []
        for part in self._parts():
            leaves = [v[part].detach().requires_grad_() for v in self.variables]
            with torch.enable_grad():
                value = self.losses(leaves, part, phase, self.step)
                gradients.append(torch.autograd.grad(value[0].sum(), leaves))
            rows.append(value.detach())
        return torch.cat(rows, 1), [torch.cat(parts) for parts in zip(*gradients, strict=True)]

    def advance(self) -> None:
        """One step of all items still active. The state changes only once all is computed."""
        phase, fresh = self.plan[self.step]
        config = self.config
        rows, gradients = self._evaluate(phase)
        good = rows[0].isfinite()
        better = self.active & good & (rows[0] < self.best_loss)
        best = [_where(better, v, b) for v, b in zip(self.variables, self.best, strict=True)]
        pixels = math.prod(self.shape[1:])
        scale = pixels * (
            config.rms**2 * self.shape[0] if isinstance(config.optimiser, Momentum) else 1.0
        )
        moved, slots = [], []
        for value, gradient, slot in zip(self.variables, gradients, self.slots, strict=True):
            if fresh and config.optimiser.restarts:
                slot = [torch.zeros_like(s) for s in slot]
            change, new = config.optimiser.update(
                _Moment(value, gradient, slot, phase.factor, self.step, scale)
            )
            after = value + change
            if config.projection is not None:
                after = config.projection(after, self.mean)
            # one number that is not finite makes its sum so: a single pass over each
            good &= (gradient.flatten(1).sum(1) + after.flatten(1).sum(1)).isfinite()
            moved.append(after)
            slots.append(new)
        bad, active = self.active & ~good, self.active & good
        # an item that failed stays at its best image: its last may be far off, or not finite
        rest = [_where(bad, b, v) for b, v in zip(best, self.variables, strict=True)]
        moved = [_where(active, m, r) for m, r in zip(moved, rest, strict=True)]
        self.history[self.step] = torch.where(self.active, rows, math.nan)
        failed_at = torch.where(bad, self.step, self.failed_at)
        best_loss = torch.where(better, rows[0], self.best_loss)
        updates = self.updates + active
        # stores alone, no calls among them: an interrupt finds a whole step or none
        self.failed_at, self.best_loss, self.updates = failed_at, best_loss, updates
        self.best, self.variables, self.slots = best, moved, slots
        self.active = active
        self.step += 1
        self._snap()

    def stop(self, criteria: Sequence[Stop]) -> None:
        """Let the criteria end items."""
        told = Progress(self.step, self.history[: self.step, 0], self.history[: self.step, 1])
        for criterion in criteria:
            answer = torch.as_tensor(criterion(told), device=self.device)
            if answer.dtype != torch.bool or answer.shape not in ((), (self.items,)):
                raise ValueError(
                    f"a stop criterion must give a bool or ({self.items},) of them, not "
                    f"{answer.dtype} {tuple(answer.shape)}"
                )
            self.active = self.active & ~answer

    # ----------------------------------------------------------------------------- checkpoints

    def save(self, path: Path, expect: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {
            name: getattr(self, name)
            for name in ("active", "failed_at", "updates", "best_loss", "history")
        }
        for name in ("variables", "best"):
            tensors |= {f"{name}/{i}": v for i, v in enumerate(getattr(self, name))}
        for i, slot in enumerate(self.slots):
            tensors |= {f"slots/{i}/{k}": v for k, v in enumerate(slot)}
        tensors |= {f"snapshots/{step}": v for step, v in self.snapshots.items()}
        store.save_tensors(path, tensors, metadata={**expect, "step": self.step})

    def load(self, path: Path, expect: Mapping[str, Any]) -> None:
        tensors, metadata = store.load_tensors(path, expect=expect)
        tensors = {name: value.to(self.device) for name, value in tensors.items()}
        for name in ("active", "failed_at", "updates", "best_loss", "history"):
            setattr(self, name, tensors[name])
        count = len(self.variables)
        for name in ("variables", "best"):
            setattr(self, name, [tensors[f"{name}/{i}"] for i in range(count)])
        self.slots = [
            [tensors[f"slots/{i}/{k}"] for k in range(self.config.optimiser.slots)]
            for i in range(count)
        ]
        self.snapshots = {
            int(name.removeprefix("snapshots/")): value.cpu()
            for name, value in tensors.items()
            if name.startswith("snapshots/")
        }
        self.step = metadata["step"]
        self._snap()  # an interrupt may have come between a step and its snapshot

    # ---------------------------------------------------------------------------------- result

    def result(self, status: str, seeds: Sequence[int]) -> Inversion:
        take_best = self.config.keep == "best" or status == "interrupted"
        # before the first step nothing has been judged, and best is the start
        final = self.images(self.best if take_best else self.variables)
        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for part in self._parts():
                value = _call(self.matcher, final[part])
                for number, (term, target) in enumerate(zip(self.terms, self.targets, strict=True)):
                    wanted = target[self.owner[part]]
                    error = (term.select(value[term.code]) - wanted).norm(dim=1)
                    key = term.code
                    if sum(t.code == key for t in self.terms) > 1:
                        key = f"{key}#{number}"
                    found.setdefault(key, []).append(error / wanted.norm(dim=1))
        history = self.history[: self.step].detach().cpu()
        return Inversion(
            images=self._folded(final),
            error={name: self._folded(torch.cat(parts)) for name, parts in found.items()},
            history={
                name: history[:, i].unflatten(1, self.layout) for i, name in enumerate(self.names)
            },
            snapshots=dict(sorted(self.snapshots.items())),
            steps=self._folded(self.updates),
            failed_at=self._folded(self.failed_at),
            weights={name: self._folded(value) for name, value in self.weights.items()},
            seeds=list(seeds),
            status=status,
            config=self.config,
        )


def _differ(a: Phase, b: Phase) -> bool:
    return a.factor != b.factor or a.transforms != b.transforms


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # mostly all items are alike; asking would make a GPU wait
    if mask.device.type == "cpu" and (bool(mask.all()) or not bool(mask.any())):
        return a if bool(mask.all()) else b
    return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)


def _generator(seed: int, restart: int, purpose: str) -> torch.Generator:
    number = int(store.digest([seed, restart, purpose])[:15], 16)
    return torch.Generator().manual_seed(number)


# --------------------------------------------------------------------------------------- invert


def check(
    references: Tensor | Mapping[str, Tensor],
    matcher: Matcher,
    *,
    shape: Sequence[int],
    terms: Sequence[Term] | None = None,
    allow_small: bool = False,
) -> None:
    """Look for mistakes before a long run, with two noise images: seconds.

    Args:
        references: as :func:`invert`, this and what follows.
        matcher: see there.
        shape: see there.
        terms: see there.
        allow_small: see there.

    Raises:
        ValueError: references of other shapes than the matcher gives, that are zero or not finite;
            images smaller than a layer's receptive field or than the matcher takes; a code through
            which no gradient reaches the image, or that is the same for different images.
    """
    sizes = _shape(shape)
    known = _references(references)
    chosen = _terms(terms, known)
    first = next(iter(known.values()))
    if not allow_small:
        for leaf in _leaves(matcher):
            if isinstance(leaf, Taps):
                _check_fields(leaf, sizes)
    noise = torch.rand(2, *sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = noise.to(first.device, first.dtype).requires_grad_()
    with torch.enable_grad(), _opened(matcher):
        try:
            found = _call(matcher, images)
        except ValueError:
            raise
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the matcher does not take images of {sizes[1]} x {sizes[2]} px (too small for "
                f"its layers?): {error}"
            ) from error
        for term in chosen:
            if term.code not in found:
                raise unknown("code of this matcher", term.code, found)
            code, reference = found[term.code], known[term.code]
            if code.shape[1:] != reference.shape[1:]:
                raise ValueError(
                    f"reference code {term.code!r} has shape {tuple(reference.shape[1:])}, images "
                    f"of {sizes[1]} x {sizes[2]} px give {tuple(code.shape[1:])}"
                )
        targets = _targets(chosen, known)
        for term, target in zip(chosen, targets, strict=True):
            _check_gradient(term, found[term.code], target, images)


def _check_gradient(term: Term, code: Tensor, target: Tensor, images: Tensor) -> None:
    what = f"code {term.code!r}"
    if not code.requires_grad:
        raise ValueError(
            f"{what} receives no gradient from the image: it is detached, integer, or computed "
            "under no_grad"
        )
    if not bool(code.isfinite().all()):
        raise ValueError(f"{what} of a noise image is not finite (NaN or infinite)")
    if torch.equal(code[0], code[1]):
        raise ValueError(f"{what} is constant: two noise images have the very same one")
    # of the whole code: a chosen unit may well be off for noise
    some = torch.linspace(1, 2, code[0].numel(), dtype=code.dtype, device=code.device)
    total = (code * some.view_as(code[0])).sum()
    (gradient,) = torch.autograd.grad(total, images, retain_graph=True, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise ValueError(f"{what} receives no gradient from the image: it is zero everywhere")
    loss = term.loss(code, target[:1].expand(len(code), -1)).sum()
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    if not bool(gradient.isfinite().all()):
        raise ValueError(f"the gradient of {what} at a noise image is not finite")


def _check_fields(leaf: Taps, sizes: tuple[int, int, int]) -> None:
    """A field that is finite at the encoder's own size must fit; one that is not can't be judged.

    Only smaller images can be too small, so nothing is measured for others.
    """
    side = min(sizes[1:])
    if side >= leaf.encoder.input_size:
        return
    fields = taps.receptive_fields(leaf.encoder, leaf.layers)
    for layer, (extent, _) in fields.items():
        if math.isfinite(extent) and extent > side:
            raise ValueError(
                f"images of {sizes[1]} x {sizes[2]} px are smaller than the receptive field of "
                f"layer {layer!r}, {extent:g} px: invert a shallower layer, larger images, or say "
                "allow_small=True"
            )


def _all_weights(
    config: Config,
    penalties: Mapping[str, Sequence[float] | Tensor] | None,
    images: int,
    restarts: int,
) -> tuple[dict[str, Tensor], int]:
    """Weights (N, R, P) by name, and P."""
    given = {
        name: torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        for name, values in (penalties or {}).items()
    }
    for name, values in given.items():
        if name not in config.weights():
            raise unknown("penalty", name, list(config.weights()))
        if values.ndim not in (1, 2) or (values.ndim == 2 and len(values) != images):
            raise ValueError(
                f"penalties of {name!r} must be (P,) or (N, P) with N = {images}, not "
                f"{tuple(values.shape)}"
            )
        if not values.numel() or not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"penalties of {name!r} must be numbers of at least 0, and not none")
    counts = {values.shape[-1] for values in given.values()}
    if len(counts) > 1:
        raise ValueError(f"all penalties must be equally many, not {sorted(counts)}")
    count = counts.pop() if counts else 1
    weights = {}
    for name, value in config.weights().items():
        values = given.get(name, torch.full((count,), value, dtype=torch.float64))
        rows = values if values.ndim == 2 else values.expand(images, count)
        weights[name] = rows[:, None].expand(images, restarts, count).contiguous()
    return weights, count


def invert(
    references: Tensor | Mapping[str, Tensor],
    matcher: Matcher,
    config: Config,
    *,
    shape: Sequence[int],
    terms: Sequence[Term] | None = None,
    restarts: int = 1,
    penalties: Mapping[str, Sequence[float] | Tensor] | None = None,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    snapshots: Sequence[int] = (),
    stop: Stop | Sequence[Stop] = (),
    batch_size: int | None = None,
    validate: bool = True,
    allow_small: bool = False,
    on_failure: str = "warn",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    stop_after: int | None = None,
    progress: bool = False,
) -> Inversion:
    """Find images with the given codes: N codes × R restarts × P penalties as one tensor.

    Items do not interact: an item depends on its code, seed, restart and weights, not on what else
    is in the batch (up to rounding, where a library sums in another order for another batch size).
    Restarts differ in their random numbers; penalties of one restart share them.

    Args:
        references: codes (N, ...) by name, as :func:`codes` gives them, or one tensor. Device and
            precision of the run are theirs.
        matcher: a callable images -> codes (a descriptor, :class:`Taps`), or several by name.
        config: see :func:`preset`.
        shape: (C, H, W) of the images; C = 1 for descriptors of grey images.
        terms: what to match; by default every reference, by l2.
        restarts: R, the number of starts for each code.
        penalties: name of a prior (or "data") -> P weights, or (N, P) of them, in place of the
            configuration's. Several names go together, value by value.
        seeds: N of them, 0 to N − 1 by default: give an image's own to have the same result in
            another batch.
        start: images (N, C, H, W) in [0, 1] to start from instead of noise, or (N, R, C, H, W) for
            each restart its own; for `Pixels`.
        snapshots: steps (updates done; 0 is the start) at which to keep the images.
        stop: criteria, asked every `config.check_every` steps; an item they stop stays as it is.
        batch_size: most items that go through the matcher at a time (memory); by default as many
            as stay in the caches of a CPU, elsewhere all.
        validate: do :func:`check` first.
        allow_small: take images smaller than a layer's receptive field.
        on_failure: where an item's objective or gradient is not finite, it ends with the best image
            it had (of least objective: the last one, if it was falling). At the end "warn" (with
            the step), or "raise" `NonFiniteError`, or "ignore".
        checkpoint: file to write now and then, and on an interrupt; the same call goes on from it,
            to the very same result as one that was not interrupted.
        checkpoint_every: steps between writes.
        stop_after: leave off after this step (to be continued from the checkpoint).
        progress: show a bar.

    Returns:
        the images, errors and history. A keyboard interrupt ends the run and gives the best images
        so far (of least objective), with status "interrupted".

    Raises:
        ValueError: see :func:`check`; bad options.
        NonFiniteError: see `on_failure`; its `result` is what would have been returned.
        store.MismatchError: the checkpoint is of another run.
    """
    sizes = _shape(shape)
    known = _references(references)
    chosen = _terms(terms, known)
    images = len(next(iter(known.values())))
    require_whole("restarts", restarts, 1)
    require_whole("checkpoint_every", checkpoint_every, 1)
    if batch_size is not None:
        require_whole("batch_size", batch_size, 1)
    if on_failure not in ("warn", "raise", "ignore"):
        raise unknown("on_failure", on_failure, ["warn", "raise", "ignore"])
    numbers = list(range(images)) if seeds is None else [int(seed) for seed in seeds]
    if len(numbers) != images:
        raise ValueError(f"{len(numbers)} seeds for {images} images")
    late = [s for s in snapshots if not 0 <= s <= config.steps]
    if late:
        raise ValueError(f"snapshots must be from 0 to {config.steps} steps, not {late}")
    if start is not None:
        if not isinstance(config.parameterisation, Pixels):
            raise ValueError("start is for Pixels: other parameterisations start at noise")
        if tuple(start.shape) not in ((images, *sizes), (images, restarts, *sizes)):
            raise ValueError(
                f"start must be {(images, *sizes)} or {(images, restarts, *sizes)}, "
                f"not {tuple(start.shape)}"
            )
    if validate:
        check(known, matcher, shape=sizes, terms=chosen, allow_small=allow_small)
    weights, count = _all_weights(config, penalties, images, restarts)
    run = _Run(
        known, matcher, config, shape=sizes, terms=chosen, layout=(images, restarts, count),
        seeds=numbers, weights=weights, start=start, batch_size=batch_size, snapshots=snapshots,
    )  # fmt: skip
    path = None if checkpoint is None else Path(checkpoint)
    expect = {}
    if path is not None:
        expect = {
            "config": _plain(config), "shape": sizes, "layout": run.layout, "seeds": numbers,
            "terms": [term.describe() for term in chosen], "matcher": _identity(matcher),
            "references": store.digest(known), "weights": store.digest(weights),
            "start": store.digest(start), "snapshots": sorted(run.wanted),
        }  # fmt: skip
        if path.is_file():
            run.load(path, expect)
    criteria = [stop] if callable(stop) else list(stop)
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    status = _drive(run, criteria, last, path, expect, checkpoint_every, progress)
    with _opened(matcher):
        result = run.result(status, numbers)
    _report(result, on_failure)
    return result


def _drive(
    run: _Run,
    criteria: Sequence[Stop],
    last: int,
    path: Path | None,
    expect: Mapping[str, Any],
    every: int,
    progress: bool,
) -> str:
    """Step until the end, and say which."""
    written = run.step
    status = "finished"
    total = len(run.plan)
    with (
        _opened(run.matcher),
        tqdm(total=total, initial=run.step, disable=not progress, leave=False) as bar,
    ):
        try:
            alive = bool(run.active.any())
            while run.step < last and alive:
                run.advance()
                bar.update()
                # looking at the criteria waits for the device, so not at every step
                if run.step % run.config.check_every == 0 or run.step == total:
                    run.stop(criteria)
                    alive = bool(run.active.any())
                    if progress:
                        loss = run.history[run.step - 1, 0].nanmean()
                        bar.set_postfix(objective=f"{float(loss):.4g}")
                if path is not None and run.step % every == 0:
                    run.save(path, expect)
                    written = run.step
        except KeyboardInterrupt:
            status = "interrupted"
        else:
            if not alive:
                status = "failed" if bool((run.failed_at >= 0).all()) else "stopped"
            elif run.step < total:
                status = "paused"
        if path is not None and (run.step != written or not path.is_file()):
            run.save(path, expect)
    return status


def _report(result: Inversion, on_failure: str) -> None:
    failed = (result.failed_at >= 0).nonzero()
    if not len(failed) or on_failure == "ignore":
        return
    place = failed[result.failed_at[tuple(failed.T)].argmin()].tolist()
    message = (
        f"the objective or its gradient was not finite for {len(failed)} of "
        f"{result.failed_at.numel()} items, first at step {int(result.failed_at[tuple(place)])} "
        f"(image {place[0]}, restart {place[1]}, penalty {place[2]}); they keep their best "
        "images so far. Try a smaller learning rate or weight"
    )
    if on_failure == "raise":
        raise NonFiniteError(message, result)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


# --------------------------------------------------------------------- λ by the discrepancy


@dataclass(frozen=True, eq=False)
class Discrepancy:
    """The largest penalty that still matches each code well enough."""

    weight: Tensor  #: (N,) chosen
    error: Tensor  #: (N,) relative feature error there
    reached: Tensor  #: (N,) whether it is at most the target; else `weight` is the lowest tried
    images: Tensor  #: (N, C, H, W) its pre-images, of the first restart
    tried: Tensor  #: (N, rounds · points, 2) weights and errors, in the order tried


def discrepancy(
    references: Tensor | Mapping[str, Tensor],
    matcher: Matcher,
    config: Config,
    *,
    target: float | Sequence[float] | Tensor,
    shape: Sequence[int],
    penalty: str = "tv",
    low: float = 0.05,
    high: float = 50.0,
    points: int = 5,
    rounds: int = 2,
    **options: Any,
) -> Discrepancy:
    """Choose λ by the discrepancy principle (Morozov 1966), for every code.

    The data need be matched only as well as they are known: λ is the largest for which
    ‖Φ(x) − Φ₀‖ / ‖Φ₀‖ ≤ `target`. Each round inverts at `points` values between two bounds, evenly
    in log λ, as one batch, and goes on between the last that reaches the target and its successor.

    Args:
        references: as :func:`invert`, with the next two and `shape`.
        matcher: see there.
        config: see there.
        target: relative feature error, one for all or (N,).
        shape: see there.
        penalty: the prior whose weight is λ.
        low: smallest λ tried.
        high: largest; the recipe of 2015 is unstable beyond about 60 (rate · 16 λ > 3.8).
        points: of each round.
        rounds: the bracket shrinks by points − 1 (later rounds: points + 1) with each, in log λ.
        options: more of :func:`invert`'s (terms, seeds, batch_size, ...). Where a run was not
            finite its best image counts, without a warning unless `on_failure` says so.

    With several terms, the error is the root of the mean of their squares. For "data" the direction
    would be the other way round: use a prior.

    Raises:
        ValueError: bad bounds or target, an unknown prior, or as :func:`invert`.
    """
    if penalty == "data" or penalty not in config.weights():
        raise unknown("prior", penalty, [prior.name for prior in config.priors])
    if not 0 < low < high < math.inf:
        raise ValueError(f"0 < low < high is needed, not {low} and {high}")
    require_whole("points", points, 2)
    require_whole("rounds", rounds, 1)
    if "penalties" in options or options.get("restarts", 1) != 1:
        raise ValueError("penalties and restarts are not options of discrepancy")
    known = _references(references)
    count = len(next(iter(known.values())))
    wanted = torch.as_tensor(target, dtype=torch.float64).expand(count).cpu()
    if not bool((wanted > 0).all()):
        raise ValueError("target must be above 0")
    edges = torch.tensor([[math.log(low), math.log(high)]]).double().repeat(count, 1)
    weight = torch.full((count,), low, dtype=torch.float64)
    error = torch.full((count,), math.inf, dtype=torch.float64)
    reached = torch.zeros(count, dtype=torch.bool)
    images: Tensor | None = None
    tried = []
    for number in range(rounds):
        share = torch.linspace(0, 1, points + (2 if number else 0), dtype=torch.float64)
        share = share[1:-1] if number else share  # the ends of a bracket have been tried
        grid = (edges[:, :1] + (edges[:, 1:] - edges[:, :1]) * share).exp()
        result = invert(
            known, matcher, config, shape=shape, penalties={penalty: grid},
            **{
                "on_failure": "ignore",
                **options,
                "validate": options.get("validate", True) and number == 0,
            },
        )  # fmt: skip
        squares = torch.stack([value[:, 0].double() ** 2 for value in result.error.values()])
        errors_now = squares.mean(0).sqrt()
        tried.append(torch.stack([grid, errors_now], -1))
        if images is None:
            images, error = result.images[:, 0, 0].clone(), errors_now[:, 0].clone()
        for i in range(count):
            good = (errors_now[i] <= wanted[i]).nonzero().flatten()
            if len(good):
                best = int(good[-1])
                weight[i], error[i], reached[i] = grid[i, best], errors_now[i, best], True
                images[i] = result.images[i, 0, best]
                after = grid[i, best + 1].log() if best + 1 < grid.shape[1] else edges[i, 1]
                edges[i] = torch.stack([grid[i, best].log(), after])
            elif number:
                edges[i, 1] = grid[i, 0].log()
    assert images is not None
    return Discrepancy(weight, error, reached, images, torch.cat(tried, 1))


# --------------------------------------------------------------------------------------- errors


@dataclass(frozen=True, eq=False)
class Errors:
    """How good pre-images are, one number (N,) for each image; None where it was not asked for."""

    normalised: Tensor  #: ‖Φ(x) − Φ₀‖ over the mean pairwise distance of references (2015, text)
    squared: Tensor  #: ‖Φ(x) − Φ₀‖² over the mean pairwise squared distance (2015, released code)
    relative: Tensor  #: ‖Φ(x) − Φ₀‖ / ‖Φ₀‖ (2016)
    image: Tensor | None = None  #: ‖x − x₀‖ over the mean pairwise distance of the originals
    image_rms: Tensor | None = None  #: root of the mean squared difference, in units of [0, 1]
    ssim: Tensor | None = None  #: 1 for the same image
    agreement: map_scores.Agreement | None = None  #: of the classifier about x₀ and x


def with_contrast_of(found: Tensor, originals: Tensor) -> Tensor:
    """Images (N, C, H, W) with the brightness and contrast that fit the originals best, in [0, 1].

    For looking at pre-images of codes that know neither, such as HOG. Raises ValueError for
    originals of another shape.
    """
    if found.shape != originals.shape or found.ndim != 4:
        raise ValueError(
            f"images (N, C, H, W) of one shape are needed, not {tuple(found.shape)} and "
            f"{tuple(originals.shape)}"
        )
    a, b = (images.double().flatten(1) for images in (found, originals.to(found.device)))
    a, mean = a - a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    gain = (a * (b - mean)).sum(1, keepdim=True)
    gain = gain / a.square().sum(1, keepdim=True).clamp_min(1e-12)
    return (gain * a + mean).view_as(found).clamp(0, 1).to(found)


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """(N,) SSIM of images (N, C, H, W) in [0, 1], mean over channels (Wang et al. 2004).

    scikit-image's, with Gaussian windows of deviation 1.5 (11 × 11 pixels) and population moments.

    Raises:
        ValueError: shapes that differ, or images smaller than a window.
    """
    from skimage.metrics import structural_similarity as ssim

    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"images differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 px, not {tuple(x.shape[2:])}")
    pairs = zip(x.detach().double().cpu().numpy(), y.detach().double().cpu().numpy(), strict=True)
    return torch.tensor(
        [
            ssim(
                a, b, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in pairs
        ]
    )  # fmt: skip


def errors(
    images: Tensor,
    matcher: Matcher,
    references: Tensor | Mapping[str, Tensor],
    *,
    term: Term | None = None,
    pool: Tensor | float | tuple[float, float] | None = None,
    originals: Tensor | None = None,
    classifier: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
) -> Errors:
    """Judge pre-images (N, C, H, W) of N codes.

    Codes are of the images as they are; the image-space errors and the classifier see them clamped
    to [0, 1], as a file would hold them.

    Args:
        images: pre-images, e.g. ``inversion.images[:, 0, 0]``.
        matcher: as :func:`invert`.
        references: their codes.
        term: which code and entries; the only code by default.
        pool: codes (M, ...) whose mean pairwise distance is the unit: all test images, with M ≥ 2.
            By default the references. Or that distance and the mean squared one, as two numbers.
        originals: (N, C, H, W) the images the codes are of.
        classifier: images -> logits (an `Encoder`), to compare originals and pre-images.
        batch_size: most images through the matcher and the classifier at a time.

    Raises:
        ValueError: shapes that differ, several codes without a term, a pool of one image.
    """
    known = _references(references)
    if term is None:
        if len(known) > 1:
            raise ValueError(f"several codes: say which by term ({', '.join(known)})")
        term = Term(next(iter(known)))
    (chosen,) = _terms([term], known)
    (target,) = _targets([chosen], known)
    if len(images) != len(target):
        raise ValueError(f"{len(images)} images for {len(target)} references")
    moved = images.to(target.device, target.dtype)
    found = chosen.select(codes(matcher, moved, batch_size=batch_size)[chosen.code])
    if isinstance(pool, tuple):
        plain, square = pool
    elif isinstance(pool, float | int):
        raise ValueError("a pool given by numbers needs two: mean distance, mean squared distance")
    else:
        items = target if pool is None else chosen.select(pool)
        plain, square = (stats.mean_pairwise_distance(items, squared=s) for s in (False, True))
    values: dict[str, Any] = {
        "normalised": stats.normalised_error(found, target, reference=plain).cpu(),
        "squared": stats.normalised_error(found, target, reference=square, squared=True).cpu(),
        "relative": ((found - target).norm(dim=1) / target.norm(dim=1)).cpu(),
    }
    if originals is not None:
        if originals.shape != images.shape:
            raise ValueError(
                f"originals {tuple(originals.shape)} and images {tuple(images.shape)} differ in "
                "shape (grey pre-images need grey originals)"
            )
        inside, truth = images.detach().clamp(0, 1).cpu(), originals.detach().cpu()
        truth = truth.to(inside.dtype)
        values["image_rms"] = (inside - truth).square().mean((1, 2, 3)).sqrt()
        if len(truth) > 1:
            values["image"] = stats.normalised_error(inside, truth, reference=truth)
        values["ssim"] = structural_similarity(inside, truth)
    if classifier is not None:
        if originals is None:
            raise ValueError("agreement of a classifier needs the originals")
        both = [
            codes(classifier, part.to(target.device, target.dtype), batch_size=batch_size)["codes"]
            for part in (originals, images.detach().clamp(0, 1))
        ]
        values["agreement"] = map_scores.agreement(both[0].cpu(), both[1].cpu())
    return Errors(**values)
