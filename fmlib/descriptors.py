"""Hand-made image descriptors as torch modules: HOG, dense and sparse SIFT, binary patterns.

Each takes images (N, 3, H, W) in [0, 1], or (N, 1, H, W) that are grey already, and gives
(N, `channels`, h, w) in the images' dtype and on their device. HOG and dense SIFT are small
convolutional networks (Mahendran & Vedaldi 2015, §3): differences along oriented directions, an
assignment to orientation bins, pooling by bilinear kernels, normalisation, clamping. Gradients
reach the image, and are finite everywhere.

* :class:`HOG`: 18 directed + 9 undirected orientations + 4 texture channels in each cell of 8 px;
  hard or bilinear (HOGb) orientation bins; as the published network or as VLFeat and UoCTTI do it.
* :class:`DSIFT`: 4 × 4 cells × 8 orientations.
* :class:`LBP`: histograms of the 58 classes of uniform local binary patterns.
* :class:`SIFTGrid`: SIFT at keypoints, on a grid that is empty elsewhere.
* :func:`make` finds them by name; :func:`glyphs` draws HOG cells as strokes.

Angles are those of the gradient (dark to bright), from the x axis towards the y axis, which points
down: clockwise as seen. Differences and their magnitudes are in grey levels (0 to 255) per pixel.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import unknown

__all__ = [
    "DSIFT",
    "HOG",
    "LBP",
    "Descriptor",
    "Keypoints",
    "SIFTGrid",
    "glyphs",
    "grey",
    "make",
    "oriented_gradients",
]

#: Luma of Rec. 601, as MATLAB's `rgb2gray`; scikit-image's `rgb2gray` has the weights of Rec. 709.
_LUMA = (0.299, 0.587, 0.114)
#: The published networks see 255·grey − 128, so that their zero padding is this level.
_MIDDLE = 128.0
_CLAMP = 0.2


# ------------------------------------------------------------------------------------------ parts


def grey(x: Tensor) -> Tensor:
    """Luma (Rec. 601) of images (N, 3, H, W) as (N, 1, H, W); images with one channel as given."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: sums of squares of grey levels overflow in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _differences(x: Tensor, border: str) -> tuple[Tensor, Tensor]:
    """Central differences along x and y of (N, C, H, W) in [0, 1], in grey levels per pixel."""
    levels = 255 * x
    if border == "grey":
        levels = F.pad(levels - _MIDDLE, (1, 1, 1, 1))
    dx = (levels[..., 1:-1, 2:] - levels[..., 1:-1, :-2]) / 2
    dy = (levels[..., 2:, 1:-1] - levels[..., :-2, 1:-1]) / 2
    if border == "zero":
        return F.pad(dx, (1, 1, 1, 1)), F.pad(dy, (1, 1, 1, 1))
    return dx, dy


def oriented_gradients(
    x: Tensor,
    directions: int = 18,
    *,
    bilinear: bool = False,
    colour: str = "grey",
    border: str = "zero",
) -> Tensor:
    """Magnitude of the gradient at every pixel, in the channel of its direction.

    With g = (∂x, ∂y) and bins at θ_k = 2πk/K, the hard assignment puts ‖g‖ into the nearest bin;
    the bilinear one puts ‖g‖·max(0, 1 − K/2π·arccos⟨u_k, g⟩/‖g‖) into bin k, which is the linear
    interpolation between the two nearest (Mahendran & Vedaldi 2015, §3).

    Derivatives. Where g = 0 the output and its derivative are 0. The hard assignment is constant
    where it is not undefined: its derivative is that of the magnitude in its bin. Half-way between
    two bins (upright gradients, at K = 18) the bin of the smaller angle, in [0, 2π), takes all.
    At a bin's centre the bilinear weights have a kink: the weights are held constant there.

    Args:
        x: (N, 3, H, W) or (N, 1, H, W), floating point in [0, 1].
        directions: K, the number of bins in the full circle.
        bilinear: linear interpolation between bins.
        colour: `grey` (luma), or `strongest`: at each pixel the colour channel of the largest
            gradient, the first of equals (Felzenszwalb et al. 2010, §6).
        border: of the image: `grey` surrounds it by level 128, as the published network's zero
            padding does, and has an edge there; `zero` gives the outermost pixels no gradient, as
            VLFeat does; `crop` leaves them out.

    Returns:
        (N, K, H, W), or (N, K, H − 2, W − 2) for `crop`; grey levels per pixel.

    Raises:
        ValueError: images of another form, an unknown colour or border, fewer than 2 directions.
    """
    _check_images(x, "oriented gradients", 3)
    _check_choice("colour", colour, _COLOURS)
    _check_choice("border", border, ("grey", "zero", "crop"))
    _check_whole("directions", directions, 2)
    wide = _wide(x)
    return _oriented(wide, directions, bilinear=bilinear, colour=colour, border=border).to(x.dtype)


def _oriented(x: Tensor, directions: int, *, bilinear: bool, colour: str, border: str) -> Tensor:
    dx, dy = _differences(grey(x) if colour == "grey" else x, border)
    energy = dx * dx + dy * dy
    if energy.shape[1] > 1:
        one = F.one_hot(energy.argmax(1), energy.shape[1]).movedim(-1, 1).to(energy)
        dx, dy = (dx * one).sum(1, keepdim=True), (dy * one).sum(1, keepdim=True)
        energy = (energy * one).sum(1, keepdim=True)
    # Square root and angle have no derivative at 0: they are taken of a stand-in there.
    flat = energy < torch.finfo(energy.dtype).tiny
    dx, dy = dx.masked_fill(flat, 1.0), dy.masked_fill(flat, 0.0)
    magnitude = (dx * dx + dy * dy).sqrt().masked_fill(flat, 0.0)
    position = torch.atan2(dy, dx) * (directions / (2 * math.pi))
    bins = x.new_zeros(len(x), directions, *magnitude.shape[2:])
    if not bilinear:
        nearest = (position.detach().remainder(directions) - 0.5).ceil().long()
        return bins.scatter_(1, nearest.remainder(directions), magnitude)
    below = position.detach().floor()
    share = position - below
    share = share.masked_fill(share == 0, 0.0)  # at the kink: 0, between the slopes of its sides
    index = torch.cat([below, below + 1], 1).long().remainder(directions)
    return bins.scatter_(1, index, magnitude * torch.cat([1 - share, share], 1))


def _triangles(size: int, count: int, width: float, first: float, like: Tensor) -> Tensor:
    """(count, size) weights max(0, 1 − |pixel − centre|/width), centres at first + i·width."""
    pixel = torch.arange(size, dtype=like.dtype, device=like.device)
    centre = first + width * torch.arange(count, dtype=like.dtype, device=like.device)
    return F.relu(1 - (pixel - centre[:, None]).abs() / width)


def _pool(maps: Tensor, grid: tuple[int, int], width: int, first: float) -> Tensor:
    """Bilinear pooling of (N, C, H, W) to the cells of `grid`: a separable triangular filter."""
    rows = _triangles(maps.shape[2], grid[0], width, first, maps)
    columns = _triangles(maps.shape[3], grid[1], width, first, maps)
    return (rows @ maps) @ columns.T  # rows first: half the time of columns first


# ----------------------------------------------------------------------------------------- checks

_COLOURS = ("grey", "strongest")


def _check_choice(what: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise unknown(what, given, choices)


def _check_whole(what: str, given: object, least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {given!r}")


def _check_images(x: Tensor, name: str, smallest: int, *, finite: bool = True) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} takes images (N, 3, H, W) or (N, 1, H, W), got {got}")
    if not x.is_floating_point():
        raise ValueError(f"{name} takes floating-point images in [0, 1], got {x.dtype}")
    height, width = x.shape[2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"{name} takes images of at least {smallest} × {smallest} px, got {height} × {width}"
        )
    if finite and not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
        raise ValueError(f"{name} got an image with NaN or infinite values")


# -------------------------------------------------------------------------------------- interface


class Descriptor(nn.Module):
    """What all descriptors have in common; see :func:`make` for making one by name.

    A descriptor has no parameters and no state. Half-precision images are described in float32.

    Attributes:
        name: as :func:`make` knows it.
        channels: C, of the output.
        cell: side of a cell in pixels.
        stride: pixels between neighbours of the output grid.
        smallest: smallest height and width of an image in pixels.
        differentiable: whether gradients reach the image.
        check_finite: whether NaN and infinite pixels are looked for (on a GPU this waits for it).
    """

    name: str
    channels: int
    cell: int
    stride: int
    smallest: int
    differentiable: bool = True

    def __init__(self, *, check_finite: bool = True) -> None:
        super().__init__()
        self.check_finite = check_finite

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the output for images of `height` × `width` pixels."""
        raise NotImplementedError

    def mirror_permutation(self) -> Tensor:
        """Channels (C,) such that ``describe(mirrored) == describe(x).flip(-1)[:, channels]``.

        For left-right mirrored images whose width the grid fills evenly.
        """
        raise NotImplementedError(f"{self.name} has no mirror permutation")

    def _describe(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) or (N, 1, H, W) in [0, 1] to (N, `channels`, h, w).

        Raises ValueError for another shape, a dtype that is not floating point, an image below
        `smallest`, and NaN or infinite pixels.
        """
        _check_images(x, self.name, self.smallest, finite=self.check_finite)
        with torch.autocast(x.device.type, enabled=False):
            return self._describe(_wide(x)).to(x.dtype)

    def extra_repr(self) -> str:
        """The numbers that matter, for ``print(descriptor)``."""
        return f"{self.name}, channels={self.channels}, cell={self.cell}, stride={self.stride}"


# -------------------------------------------------------------------------------------------- HOG


class HOG(Descriptor):
    """Histograms of oriented gradients (Felzenszwalb et al. 2010, §6), as a network.

    Oriented gradients in 2K directions are pooled bilinearly into cells: h (2K directed values) and
    u_k = h_k + h_{k+K} (K undirected). A cell lies in four blocks of 2 × 2 cells; block b has the
    norm n_b = (Σ over its cells of ‖u‖²)^½. Channels, in this order:

    * 2K directed: ½ Σ_b min(0.2, h/n_b); directions k·180°/K
    * K undirected: ½ Σ_b min(0.2, u/n_b)
    * 4 texture: 18^-½ Σ_k min(0.2, u_k/n_b) for the block up left, up right, down left, down right

    With `variant="uoctti"`, that definition as in VLFeat: differences are not halved,
    n_b = √(· + 1e-4), the outermost pixels have no gradient, blocks beyond the edge repeat the
    outer cells, ⌊H/cell + ½⌋ cells. An offset of brightness changes nothing. UoCTTI's own code sums
    texture over the directed channels and leaves out the outer cells.

    With `variant="network"`, that of the inversion experiments (Mahendran & Vedaldi 2015, §3 and
    their released network): texture is left out (27 channels), n_b = max(·, 1e-6), mid-grey
    surrounds the image (its edge counts as an edge), and cells at the edge have the two blocks, or
    the one, that exist; ⌊H/cell⌋ cells. A factor of contrast about mid-grey changes nothing.

    Away from the border the two agree but for the 1e-4. UoCTTI sees levels 0 to 255, as here;
    VLFeat is often given [0, 1], which makes its 1e-4 count in flat cells.

    Derivatives: see :func:`oriented_gradients`; 0 beyond the clamp and for blocks without gradient.

    Args:
        bilinear: orientation bins by linear interpolation (HOGb) instead of the nearest.
        variant: `uoctti` or `network`.
        cell: in pixels.
        orientations: K.
        colour: `grey` (as in the inversion experiments) or `strongest` (as VLFeat, UoCTTI).
        check_finite: look for NaN and infinite pixels.

    Raises:
        ValueError: an unknown variant or colour, a cell or number of orientations below 2.
    """

    def __init__(
        self,
        *,
        bilinear: bool = False,
        variant: str = "uoctti",
        cell: int = 8,
        orientations: int = 9,
        colour: str = "grey",
        check_finite: bool = True,
    ) -> None:
        super().__init__(check_finite=check_finite)
        _check_choice("HOG variant", variant, ("uoctti", "network"))
        _check_choice("colour", colour, _COLOURS)
        _check_whole("cell", cell, 2)
        _check_whole("orientations", orientations, 2)
        self.name = "hogb" if bilinear else "hog"
        self.bilinear = bool(bilinear)
        self.variant = variant
        self.colour = colour
        self.orientations = orientations
        self.cell = self.stride = cell
        self.channels = 3 * orientations + (4 if variant == "uoctti" else 0)
        self.smallest = max(cell, 3) if variant == "uoctti" else 2 * cell

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the output for images of `height` × `width` pixels."""
        more = self.cell // 2 if self.variant == "uoctti" else 0
        return (height + more) // self.cell, (width + more) // self.cell

    def mirror_permutation(self) -> Tensor:
        """Direction k becomes K − k (modulo 2K, undirected modulo K); blocks swap sides."""
        bins = self.orientations
        directed = [(bins - k) % (2 * bins) for k in range(2 * bins)]
        undirected = [2 * bins + (bins - k) % bins for k in range(bins)]
        texture = [3 * bins + block for block in (1, 0, 3, 2)]
        return torch.tensor((directed + undirected + texture)[: self.channels])

    def _describe(self, x: Tensor) -> Tensor:
        network = self.variant == "network"
        maps = _oriented(
            x,
            2 * self.orientations,
            bilinear=self.bilinear,
            colour=self.colour,
            border="grey" if network else "zero",
        )
        height, width = self.grid(x.shape[2], x.shape[3])
        directed = _pool(maps, (height, width), self.cell, (self.cell - 1) / 2)
        if not network:
            directed = 2 * directed
        undirected = directed[:, : self.orientations] + directed[:, self.orientations :]
        energy = undirected.square().sum(1, keepdim=True)
        if not network:
            energy = F.pad(energy, (1, 1, 1, 1), mode="replicate")
        rows = energy[:, :, 1:] + energy[:, :, :-1]
        blocks = rows[..., 1:] + rows[..., :-1]
        if network:
            # A block that does not exist has factor 0. Clamping before the root: its derivative
            # is 0, not NaN, where there is no gradient.
            factor = F.pad(blocks.clamp(min=1e-12).rsqrt(), (1, 1, 1, 1))
        else:
            factor = (blocks + 1e-4).rsqrt()
        cells = torch.cat([directed, undirected], 1)
        total, texture = torch.zeros_like(cells), []
        for row in (0, 1):
            for column in (0, 1):
                part = factor[:, :, row : row + height, column : column + width]
                clamped = (cells * part).clamp(max=_CLAMP)
                total = total + clamped
                texture.append(clamped[:, 2 * self.orientations :].sum(1, keepdim=True))
        if network:
            return total / 2
        return torch.cat([total / 2, torch.cat(texture, 1) / math.sqrt(18)], 1)


def _strokes(size: int, orientations: int, like: Tensor) -> Tensor:
    """(K, size, size) strokes of one pixel's width across each gradient direction, in [0, 1]."""
    place = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    angle = torch.arange(orientations, dtype=like.dtype, device=like.device)
    angle = (angle * math.pi / orientations).view(-1, 1, 1)
    y, x = place.view(1, -1, 1), place.view(1, 1, -1)
    off = (x * angle.cos() + y * angle.sin()).abs()
    along = (y * angle.cos() - x * angle.sin()).abs()
    return (1 - off).clamp(0, 1) * (size / 2 - along).clamp(0, 1)


def glyphs(features: Tensor, *, size: int = 21, orientations: int = 9) -> Tensor:
    """Draw HOG cells the usual way: a stroke along the edge for each orientation.

    A stroke is across the gradient, as bright as the sum of the orientation's undirected and two
    directed channels. Strokes of a cell are added and cut at the brightest of them, negative
    weights (of a template) are left out, and each picture is scaled to its brightest cell.

    Args:
        features: (N, 3K or 3K + 4, h, w) of :class:`HOG`; texture channels are not drawn.
        size: of a cell in the picture, in pixels.
        orientations: K.

    Returns:
        (N, 3, h·size, w·size) in [0, 1]; black where no cell has a gradient.

    Raises:
        ValueError: features of another shape or not floating point, NaN, or a size below 3.
    """
    _check_whole("size", size, 3)
    _check_whole("orientations", orientations, 2)
    counts = (3 * orientations, 3 * orientations + 4)
    if features.ndim != 4 or features.shape[1] not in counts:
        raise ValueError(
            f"glyphs takes HOG features (N, {counts[0]} or {counts[1]}, h, w) for {orientations} "
            f"orientations, got {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"glyphs takes floating-point features, got {features.dtype}")
    if not bool(features.isfinite().all()):
        raise ValueError("glyphs got features with NaN or infinite values")
    weight = features[:, : 3 * orientations].unflatten(1, (3, orientations)).sum(1).clamp(min=0)
    drawn = torch.einsum("nkij,kyx->niyjx", weight, _strokes(size, orientations, features))
    brightest = weight.amax(1)
    drawn = torch.minimum(drawn, brightest[:, :, None, :, None])
    scale = brightest.amax((1, 2)).clamp(min=torch.finfo(features.dtype).tiny)
    picture = drawn.flatten(3, 4).flatten(1, 2) / scale.view(-1, 1, 1)
    return picture[:, None].repeat(1, 3, 1, 1)


# ------------------------------------------------------------------------------------- dense SIFT


class DSIFT(Descriptor):
    """Dense SIFT as a network (Mahendran & Vedaldi 2015, §3, and their released network).

    Oriented gradients in 8 directions, assigned bilinearly, of all but the outermost pixels, are
    pooled bilinearly into cells. A descriptor stacks 4 × 4 cells, each times exp(−r²/2·1.5²) for
    its distance r (in cells) from the centre; x ← x/√(1e-6 + ‖x‖²), then x ← min(0.2, x), and no
    second normalisation (Lowe 2004, §6.1, has one). Channel (4·row + column)·8 + direction, where
    direction k is k·45°. Neighbours on the grid share a column or row of cells at the default step.

    Beside scikit-image's SIFT: its Gaussian weighs pixels, not cells, with σ of 2 cells; it
    normalises again and rounds to bytes; its bins are in another order.

    Derivatives: see :func:`oriented_gradients`; 0 beyond the clamp.

    Args:
        cell: a spatial bin, in pixels: 5 in the 2015 paper's code, 8 in the 2016 paper's.
        step: cells between neighbouring descriptors.
        colour: `grey` (published) or `strongest`.
        check_finite: look for NaN and infinite pixels.

    Raises:
        ValueError: an unknown colour, a cell below 2 px, or a step below 1.
    """

    _SIDE, _DIRECTIONS, _SIGMA = 4, 8, 1.5

    def __init__(
        self, *, cell: int = 5, step: int = 3, colour: str = "grey", check_finite: bool = True
    ) -> None:
        super().__init__(check_finite=check_finite)
        _check_choice("colour", colour, _COLOURS)
        _check_whole("cell", cell, 2)
        _check_whole("step", step, 1)
        self.name = "dsift"
        self.cell, self.step, self.colour = cell, step, colour
        self.stride = cell * step
        self.channels = self._SIDE**2 * self._DIRECTIONS
        self.smallest = (self._SIDE + 1) * cell + 2

    def _cells(self, size: int) -> int:
        return (size - 2) // self.cell - 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the output for images of `height` × `width` pixels."""
        first, second = ((self._cells(s) - self._SIDE) // self.step + 1 for s in (height, width))
        return first, second

    def mirror_permutation(self) -> Tensor:
        """Direction k becomes 4 − k (modulo 8), column j becomes 3 − j."""
        side, bins = self._SIDE, self._DIRECTIONS
        return torch.tensor(
            [
                (side * row + side - 1 - column) * bins + (bins // 2 - k) % bins
                for row in range(side)
                for column in range(side)
                for k in range(bins)
            ]
        )

    def _describe(self, x: Tensor) -> Tensor:
        side, bins = self._SIDE, self._DIRECTIONS
        maps = _oriented(x, bins, bilinear=True, colour=self.colour, border="crop")
        cells = (self._cells(x.shape[2]), self._cells(x.shape[3]))
        pooled = _pool(maps, cells, self.cell, self.cell - 0.5)
        place = torch.arange(side, dtype=x.dtype, device=x.device) - (side - 1) / 2
        window = (-place.square() / (2 * self._SIGMA**2)).exp()
        stacked = pooled.unfold(2, side, self.step).unfold(3, side, self.step)
        stacked = stacked * (window[:, None] * window)
        flat = stacked.permute(0, 4, 5, 1, 2, 3).flatten(1, 3)
        norm = (flat.square().sum(1, keepdim=True) + 1e-6).sqrt()
        return (flat / norm).clamp(max=_CLAMP)


# --------------------------------------------------------------------------- local binary patterns

#: Neighbours (row, column) of the central pixel: right, then clockwise as seen.
_RING = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def _pattern_classes() -> Tensor:
    """(256,) class of each pattern: 7·start + length − 1 of its run of ones, 56 flat, 57 other."""
    classes = torch.full((256,), 57)
    classes[0] = classes[255] = 56
    for start in range(8):
        for length in range(1, 8):
            classes[sum(1 << (start + i) % 8 for i in range(length))] = 7 * start + length - 1
    return classes


class LBP(Descriptor):
    """Histograms of uniform local binary patterns on a grid, as VLFeat's.

    Dosovitskiy & Brox 2016 (§3) invert it with cells of 16 px. Bit b of a pixel is 1 if its
    neighbour at angle 45°·b is brighter (grey, 3 × 3). 58 classes of patterns: one run of ones
    (channel 7·start + length − 1), none or eight ones (56), all others (57). Each inner pixel's
    class is pooled bilinearly into cells; a cell's histogram p with Σp = 1 gives √p, of unit norm.

    The comparison is a step: its derivative is zero wherever it exists, and the output carries no
    gradient. `softness` τ > 0 makes bit b the probability σ((neighbour − centre)/τ), and a class
    the sum of its patterns' probabilities; this tends to the hard descriptor for τ → 0 (ties apart)
    and is differentiable; √p has derivative 0 below p = 1e-12.

    Beside scikit-image's `local_binary_pattern`: there a tie counts as 1, diagonal neighbours are
    interpolated on the circle, and the run goes counter-clockwise; `nri_uniform` has 59 classes, as
    no ones and eight ones are two.

    Args:
        cell: in pixels.
        softness: τ, in units of image values ([0, 1]); 0 is the descriptor itself.
        check_finite: look for NaN and infinite pixels.

    Raises:
        ValueError: a cell below 3 px or a negative softness.
    """

    classes: Tensor

    def __init__(self, *, cell: int = 16, softness: float = 0.0, check_finite: bool = True) -> None:
        super().__init__(check_finite=check_finite)
        _check_whole("cell", cell, 3)
        if not (isinstance(softness, int | float) and 0 <= softness < math.inf):
            raise ValueError(f"softness must be zero or a positive number, got {softness!r}")
        self.name = "lbp"
        self.cell = self.stride = self.smallest = cell
        self.channels = 58
        self.softness = float(softness)
        self.differentiable = softness > 0
        self.register_buffer("classes", _pattern_classes(), persistent=False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the output for images of `height` × `width` pixels."""
        return height // self.cell, width // self.cell

    def mirror_permutation(self) -> Tensor:
        """A run of ones from `start` becomes one from 5 − start − length (modulo 8)."""
        runs = [
            7 * ((5 - start - length) % 8) + length - 1
            for start in range(8)
            for length in range(1, 8)
        ]
        return torch.tensor([*runs, 56, 57])

    def _assigned(self, image: Tensor) -> Tensor:
        """(N, 58, H − 2, W − 2): the class of each inner pixel, one-hot or in probability."""
        height, width = image.shape[2] - 2, image.shape[3] - 2
        centre = image[..., 1:-1, 1:-1]
        differences = [
            image[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width] - centre
            for row, column in _RING
        ]
        classes = self.classes.to(image.device)
        if not self.differentiable:
            bits = [(d > 0).long() << b for b, d in enumerate(differences)]
            code = classes[torch.stack(bits).sum(0)]
            return image.new_zeros(len(image), 58, height, width).scatter_(1, code, 1.0)
        # log of a pattern's probability: Σ z of its ones − Σ softplus(z). One convolution gives the
        # 58 uniform patterns; what is left of 1 belongs to the others.
        z = torch.cat(differences, 1) / self.softness
        runs = [int((classes == k).nonzero()[0]) for k in range(56)]
        bits = z.new_tensor([[p >> b & 1 for b in range(8)] for p in [*runs, 0, 255]])
        likely = (F.conv2d(z, bits[:, :, None, None]) - F.softplus(z).sum(1, keepdim=True)).exp()
        flat, other = likely[:, 56:].sum(1, keepdim=True), 1 - likely.sum(1, keepdim=True)
        return torch.cat([likely[:, :56], flat, other.clamp_min(0)], 1)

    def _describe(self, x: Tensor) -> Tensor:
        assigned = self._assigned(grey(x))
        # Cell centres are those of the whole image, of which the outermost pixels are left out.
        grid = self.grid(x.shape[2], x.shape[3])
        counts = _pool(assigned, grid, self.cell, (self.cell - 1) / 2 - 1)
        share = counts / counts.sum(1, keepdim=True)
        tiny = share < 1e-12
        return share.masked_fill(tiny, 1.0).sqrt().masked_fill(tiny, 0.0)


# ------------------------------------------------------------------------------------ sparse SIFT


@dataclass(frozen=True)
class Keypoints:
    """SIFT keypoints of one image, in scikit-image's order.

    Attributes:
        x: (K,) column of the centre in pixels; the first pixel's centre is 0.
        y: (K,) row, likewise.
        scale: (K,) blur σ in pixels.
        angle: (K,) of the gradient, from the x axis towards the y axis (down), in radians.
        descriptors: (K, 128) of about unit norm.
    """

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray
    descriptors: np.ndarray


class SIFTGrid(Descriptor):
    """Sparse SIFT arranged on a grid, as the learned inverter takes it.

    Dosovitskiy & Brox 2016, §3: the image is divided into cells of d × d pixels; a cell with a
    keypoint holds its 128-dimensional descriptor and x mod d, y mod d (pixels), sin α, cos α, and
    log s (natural, s in pixels), in this order; a cell without is 0. Of several keypoints in a cell
    one is picked at random, with a seed per image, so that an image's features do not depend on its
    batch. Keypoints and descriptors (rounded to multiples of 1/512, rows × columns × orientations
    relative to α) are those of scikit-image's SIFT (Lowe 2004); its angle, from the rows' axis, is
    turned to this module's convention.

    Nothing is differentiable: the output carries no gradient. It is computed on the CPU, image by
    image (0.2 s or more for 128 × 128 px): describe a data set once and keep the result.

    Args:
        cell: d, in pixels.
        seed: of the pick.
        upsampling: of the image before detection, 1, 2 or 4; 2 is Lowe's.
        check_finite: look for NaN and infinite pixels.

    Raises:
        ValueError: a cell below 1 px, a negative seed, or another upsampling.
    """

    differentiable = False

    def __init__(
        self, *, cell: int = 4, seed: int = 0, upsampling: int = 2, check_finite: bool = True
    ) -> None:
        super().__init__(check_finite=check_finite)
        _check_whole("cell", cell, 1)
        _check_whole("seed", seed, 0)
        if upsampling not in (1, 2, 4):
            raise ValueError(f"upsampling must be 1, 2 or 4, got {upsampling!r}")
        self.name = "sift_grid"
        self.cell = self.stride = cell
        self.seed, self.upsampling = seed, upsampling
        self.channels = 128 + 5
        self.smallest = 16

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the output for images of `height` × `width` pixels: ⌈H/d⌉, ⌈W/d⌉."""
        return -(-height // self.cell), -(-width // self.cell)

    def keypoints(self, image: Tensor) -> Keypoints:
        """The keypoints of one image (3, H, W) or (1, H, W); possibly none."""
        from skimage.feature import SIFT

        _check_images(image[None], self.name, self.smallest, finite=self.check_finite)
        pixels = grey(image[None].detach().double())[0, 0].cpu().numpy()
        sift = SIFT(upsampling=self.upsampling)
        try:
            with np.errstate(all="ignore"):  # a flat neighbourhood divides 0 by 0, and is dropped
                sift.detect_and_extract(pixels)
        except RuntimeError as error:
            if "found no features" not in str(error):
                raise
            none = np.zeros(0)
            return Keypoints(none, none, none, none, np.zeros((0, 128)))
        positions, descriptors = np.asarray(sift.positions), np.asarray(sift.descriptors)
        return Keypoints(
            x=positions[:, 1],
            y=positions[:, 0],
            scale=np.asarray(sift.sigmas),
            angle=np.pi / 2 - np.asarray(sift.orientations),
            descriptors=descriptors / 512.0,
        )

    def _describe(self, x: Tensor) -> Tensor:
        height, width = self.grid(x.shape[2], x.shape[3])
        out = np.zeros((len(x), self.channels, height, width))
        for n, image in enumerate(x):
            found = self.keypoints(image)
            order = np.random.default_rng(self.seed).permutation(len(found.x))
            rows = (found.y[order] // self.cell).astype(int)
            columns = (found.x[order] // self.cell).astype(int)
            filled: set[tuple[int, int]] = set()
            for k, row, column in zip(order, rows, columns, strict=True):
                if (row, column) in filled:
                    continue
                filled.add((row, column))
                out[n, :128, row, column] = found.descriptors[k]
                out[n, 128:, row, column] = (
                    found.x[k] % self.cell,
                    found.y[k] % self.cell,
                    np.sin(found.angle[k]),
                    np.cos(found.angle[k]),
                    np.log(found.scale[k]),
                )
        return torch.from_numpy(out).to(x)


# ------------------------------------------------------------------------------------------ lookup

#: Name: the class, and what the name fixes.
_KINDS: dict[str, tuple[Callable[..., Descriptor], dict[str, Any]]] = {
    "hog": (HOG, {"bilinear": False}),
    "hogb": (HOG, {"bilinear": True}),
    "dsift": (DSIFT, {}),
    "lbp": (LBP, {}),
    "sift_grid": (SIFTGrid, {}),
}


def make(name: str, **options: Any) -> Descriptor:
    """The descriptor `name`: `hog`, `hogb`, `dsift`, `lbp` or `sift_grid`.

    `options` are those of :class:`HOG` (all but `bilinear`, which the name says), :class:`DSIFT`,
    :class:`LBP` or :class:`SIFTGrid`. The published inversions of HOG are of
    ``make("hog", variant="network")``.

    Raises ValueError, naming the choices, for an unknown name or option, or a bad value.
    """
    if name not in _KINDS:
        raise unknown("descriptor", name, _KINDS)
    kind, fixed = _KINDS[name]
    known = [option for option in inspect.signature(kind).parameters if option not in fixed]
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
    return kind(**fixed, **options)
