r"""Maps between the features of a picture and of its edited version (FeatMap).

An encoder's layer turns a picture into features x (C, H, W), and the edited picture into y. Which
edits act on features like a simple map, y ≈ f(x), the same at every position? (Krey, Neukirch &
Strodthoff 2026.) This module reads in the order of the question:

1. *statistics*: means and covariances of (x, y), streamed, all that a linear fit ever needs;
2. *maps*, and their *closed-form fits*: additive, linear, ridge, reduced rank, Procrustes, ...;
3. *errors* on other pairs, from their statistics alone;
4. *floors and ceilings*, between which an error is to be read.

Throughout, x is a column vector of C channels at one position, and W acts from the left:
y ≈ W x + b. What an edit does to places is done to x first (:mod:`grids`). Means are x̄, ȳ,
and S_xy = Σ (x − x̄)(y − ȳ)ᵀ over all positions of all images.
Maps that are trained step by step (MLP, CNN, transformer) are in :mod:`trained_maps`, scores for
each image in :mod:`map_scores`, and what can be computed with linear maps (spectra, composition,
powers, commutators) in :mod:`map_algebra`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import stats, store
from .encoders import Encoder
from .errors import unknown
from .grids import Action, GridAction, named_action
from .grids import grid_action as _as_action

__all__ = [
    "CLOSED_FORM",
    "TRAINED",
    "AffineMap",
    "FeatureMap",
    "Moments",
    "NeighbourMap",
    "Origin",
    "PositionMap",
    "PositionStatistics",
    "RankPath",
    "RidgePath",
    "Statistics",
    "additive",
    "discrepancy",
    "explained",
    "fit",
    "floors",
    "identity",
    "leave_one_image_out",
    "linear",
    "load",
    "low_rank_plus_identity",
    "nearest_neighbours",
    "penalties",
    "position_specific",
    "procrustes",
    "rank_path",
    "reduced_rank",
    "ridge",
    "ridge_path",
    "ridge_paths",
    "squared_error",
]

_NUMBERS = 1 << 23  # turned into float64 at once, 64 MB


# --------------------------------------------------------------------------------- 1. statistics


@dataclass(frozen=True)
class Origin:
    """Where features come from: a map fitted on one encoder, layer and edit means nothing else."""

    encoder: str | None = None  #: the encoder's name
    weight_hash: str | None = None  #: of its weights
    layer: str | None = None  #: dotted name
    edit: str | None = None  #: name of the edit, with its strength

    @classmethod
    def of(cls, encoder: Encoder, layer: str, edit: str) -> Origin:
        """The origin of features of this layer of a loaded encoder."""
        return cls(encoder.name, encoder.weight_hash, layer, edit)


@dataclass(frozen=True)
class Moments:
    """Counts, means and centred second moments of pairs (x, y), in float64.

    `xx`, `xy`, `yy` are sums over positions, not averages: S_xx = Σ (x − x̄)(x − x̄)ᵀ.
    """

    positions: int
    images: int
    mean_x: Tensor  #: (Cx,)
    mean_y: Tensor  #: (Cy,)
    xx: Tensor  #: (Cx, Cx)
    xy: Tensor  #: (Cx, Cy)
    yy: Tensor  #: (Cy, Cy)

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *, images: int) -> Moments:
        """Of float64 rows x (n, Cx) and y (n, Cy), which are centred in place."""
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x.sub_(mean_x), y.sub_(mean_y)
        return cls(len(x), images, mean_x, mean_y, _gram(x), x.T @ y, _gram(y))

    def __add__(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub & LeVeque 1983, eq. 2.1).

        Each part is centred on its own mean and the parts' means differ by a vector δ, which adds
        n₁n₂/(n₁+n₂) δδᵀ. No large sums are subtracted, so features far from zero lose no digits.
        """
        n = self.positions + other.positions
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.positions * other.positions / n
        return Moments(
            n,
            self.images + other.images,
            self.mean_x + dx * (other.positions / n),
            self.mean_y + dy * (other.positions / n),
            (self.xx + other.xx).addr_(dx, dx, alpha=weight),
            (self.xy + other.xy).addr_(dx, dy, alpha=weight),
            (self.yy + other.yy).addr_(dy, dy, alpha=weight),
        )

    def about(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S_xx, S_xy and S_yy about other centres than the means: S + n (x̄ − x)(ȳ − y)ᵀ."""
        dx, dy, n = self.mean_x - x, self.mean_y - y, self.positions
        return (
            torch.addr(self.xx, dx, dx, alpha=n),
            torch.addr(self.xy, dx, dy, alpha=n),
            torch.addr(self.yy, dy, dy, alpha=n),
        )

    def swapped(self) -> Moments:
        """Moments of (y, x), to fit the way back."""
        return replace(
            self, mean_x=self.mean_y, mean_y=self.mean_x, xx=self.yy, xy=self.xy.T, yy=self.xx
        )

    def difference(self) -> Moments:
        """Moments of (x, y − x), to fit what an edit changes."""
        _same_width(self, "y - x")
        return replace(
            self,
            mean_y=self.mean_y - self.mean_x,
            xy=self.xy - self.xx,
            yy=self.yy - self.xy - self.xy.T + self.xx,
        )


def _gram(x: Tensor) -> Tensor:
    """xᵀx. On a CPU by NumPy, which computes one triangle of a symmetric product: half the time."""
    if x.device.type != "cpu":
        return x.T @ x
    rows = x.numpy()
    with np.errstate(all="ignore"):  # some BLAS raise flags though all is well
        return torch.from_numpy(rows.T @ rows)


def _same_width(moments: Moments, what: str) -> None:
    if len(moments.mean_x) != len(moments.mean_y):
        raise ValueError(
            f"{what} needs x and y of one width, not {len(moments.mean_x)} and "
            f"{len(moments.mean_y)} channels"
        )


def _pair(x: Tensor, y: Tensor, action: Action) -> tuple[Tensor, Tensor]:
    """Check a batch of pairs and apply the grid action to x; vectors become 1x1 grids."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or value.ndim not in (2, 4) or not value.numel():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be features (N, C, H, W) or (N, C), not {shape}")
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {value.dtype}")
        finite = torch.isfinite(value).flatten(1).all(1)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"{name} of image {bad[0]} of the batch is not finite (NaN or infinite), in "
                f"{len(bad)} of {len(value)} images"
            )
    if x.ndim != y.ndim or len(x) != len(y):
        raise ValueError(
            f"x and y must be features of the same pictures, one to one, not {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    if x.ndim == 2:
        x, y = x[:, :, None, None], y[:, :, None, None]
    x = action(x)
    if x.shape[2:] != y.shape[2:]:
        raise ValueError(
            f"x and y must have one grid, not {x.shape[2]}x{x.shape[3]} and "
            f"{y.shape[2]}x{y.shape[3]}"
        )
    return x.detach(), y.detach()


def _rows(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as new float64 rows (N·H·W, C): every position is a sample."""
    device = "cpu" if x.device.type == "mps" else x.device
    layout = torch.contiguous_format
    wide = x.permute(0, 2, 3, 1).to(device, torch.float64, copy=True, memory_format=layout)
    return wide.flatten(0, 2)


def _group_names(groups: Sequence[Any] | Tensor | None, n: int, start: int) -> list[Any]:
    if groups is None:
        return list(range(start, start + n))
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != n:
        raise ValueError(f"groups has {len(names)} entries for {n} images")
    return names


class Statistics:
    r"""Everything a shared linear fit needs of any number of pairs, in memory O(folds·C²).

    Pairs stream through :meth:`update`. They are kept as `Moments`, one for each of a few *folds*:
    an image goes wholly into the fold that its group decides (positions of one image resemble each
    other, so an error estimated on positions of images that were fitted is too small). Leaving out
    each fold in turn gives an honest choice of penalty and rank from this one pass.

    Shards made in several processes are added: ``a + b``. With groups left out, images count as
    their own groups; give `groups` where several share a source.
    """

    def __init__(
        self,
        *,
        folds: int = 5,
        grid_action: str | Action | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Begin with no pairs.

        Args:
            folds: how many parts images are put in, at least 2.
            grid_action: what the edit does to the grid (:func:`grid_action`), done to x first.
            origin: of the features; kept in the maps fitted.

        Raises:
            ValueError: folds below 2 or an unknown action.
        """
        if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
            raise ValueError(f"folds must be a whole number, at least 2, not {folds!r}")
        self.grid_action: Action = _as_action(grid_action)
        self.origin = origin or Origin()
        self.parts: list[Moments | None] = [None] * folds

    @property
    def images(self) -> int:
        """Number of pairs seen."""
        return sum(part.images for part in self.parts if part)

    def update(
        self, x: Tensor, y: Tensor, *, groups: Sequence[Any] | Tensor | None = None
    ) -> Statistics:
        """Take in a batch of pairs; gives itself.

        Args:
            x: features of the pictures, (N, Cx, H, W) or (N, Cx).
            y: of the edited pictures, (N, Cy, H, W) or (N, Cy).
            groups: N names (text or numbers) of the pictures' sources; pictures of one source go
                to the same fold. By default each is its own.

        Raises:
            ValueError: values that are not finite (the image is named), shapes that do not match
                each other or earlier batches, a non-square grid under a quarter turn. The
                statistics are then as before.
        """
        x, y = _pair(x, y, self.grid_action)
        names = _group_names(groups, len(x), self.images)
        known = next((part for part in self.parts if part), None)
        if known and (x.shape[1], y.shape[1]) != (len(known.mean_x), len(known.mean_y)):
            raise ValueError(
                f"features of {x.shape[1]} and {y.shape[1]} channels after features of "
                f"{len(known.mean_x)} and {len(known.mean_y)}"
            )
        where = torch.tensor([_fold(name, len(self.parts)) for name in names], device=x.device)
        step = max(1, _NUMBERS // max(x[0].numel(), y[0].numel()))
        for fold in where.unique().tolist():
            for index in (where == fold).nonzero().flatten().split(step):
                new = Moments.of(_rows(x[index]), _rows(y[index]), images=len(index))
                old = self.parts[fold]
                self.parts[fold] = old + new if old else new
        return self

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of pairs.

        Raises:
            store.MismatchError: another number of folds, grid action or origin.
            ValueError: other widths.
        """
        ours = {**asdict(self.origin), "folds": len(self.parts), "grid_action": self.grid_action}
        theirs = {
            **asdict(other.origin), "folds": len(other.parts), "grid_action": other.grid_action,
        }  # fmt: skip
        for key, value in ours.items():
            if value != theirs[key]:
                raise store.MismatchError(
                    f"statistics of different {key}: {value!r} and {theirs[key]!r}"
                )
        result = Statistics(folds=len(self.parts), grid_action=self.grid_action, origin=self.origin)
        for fold, (a, b) in enumerate(zip(self.parts, other.parts, strict=True)):
            if a and b and (a.xy.shape != b.xy.shape):
                raise ValueError(f"statistics of widths {tuple(a.xy.shape)}, {tuple(b.xy.shape)}")
            result.parts[fold] = a + b if a and b else a or b
        return result

    @property
    def total(self) -> Moments:
        """Moments of all pairs.

        Raises:
            ValueError: there are none.
        """
        return _sum(part for part in self.parts if part)

    def splits(self) -> Iterator[tuple[Moments, Moments]]:
        """Training and held-out moments, each fold held out once; empty folds are passed over.

        Raises:
            ValueError: all images are in one fold.
        """
        parts = [part for part in self.parts if part]
        if len(parts) < 2:
            raise ValueError(
                f"{self.images} images fill {len(parts)} fold of {len(self.parts)}: to hold one "
                "out takes images of two groups in different folds; add images, or give the penalty"
            )
        for i, held_out in enumerate(parts):
            yield _sum(parts[:i] + parts[i + 1 :]), held_out

    def swapped(self) -> Statistics:
        """Statistics of (y, x), to fit the way back; the grid action is undone.

        The origin is left out: the way back is not the edit.

        Raises:
            ValueError: the grid action is a mere function, whose inverse is not known.
        """
        action = named_action(self.grid_action, "inverted").inverse()
        result = Statistics(folds=len(self.parts), grid_action=action)
        result.parts = [part.swapped() if part else None for part in self.parts]
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; :meth:`load` reads it."""
        tensors = {
            f"{fold}/{name}": getattr(part, name)
            for fold, part in enumerate(self.parts)
            if part
            for name in ("mean_x", "mean_y", "xx", "xy", "yy")
        }
        counts = [(part.positions, part.images) if part else None for part in self.parts]
        action = named_action(self.grid_action, "saved").name
        metadata = {"statistics": counts, "grid_action": action, **asdict(self.origin)}
        store.save_tensors(path, tensors, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            store.MismatchError: the file holds something else.
            FileNotFoundError, ValueError: as `store.load_tensors`.
        """
        tensors, metadata = store.load_tensors(path)
        counts = metadata.get("statistics")
        if counts is None:
            raise store.MismatchError(f"{path}: 'statistics' expected, found nothing")
        origin = Origin(**{key: metadata.get(key) for key in asdict(Origin())})
        result = cls(folds=len(counts), grid_action=metadata["grid_action"], origin=origin)
        for fold, count in enumerate(counts):
            if count:
                names = ("mean_x", "mean_y", "xx", "xy", "yy")
                result.parts[fold] = Moments(*count, *(tensors[f"{fold}/{x}"] for x in names))
        return result


def _fold(name: Any, folds: int) -> int:
    """The fold of a group: of its name alone, so that shards made apart agree."""
    name = name.item() if hasattr(name, "item") else name  # NumPy's numbers
    if isinstance(name, int):
        return name % folds
    return int(store.digest(name)[:12], 16) % folds


def _sum(parts: Iterable[Moments]) -> Moments:
    result = None
    for part in parts:
        result = result + part if result else part
    if result is None:
        raise ValueError("the statistics hold no images: update them first")
    return result


def _moments(statistics: Statistics | Moments) -> Moments:
    return statistics.total if isinstance(statistics, Statistics) else statistics


# --------------------------------------------------------------------------------------- 2. maps


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMap:
    """A map from features of pictures to predicted features of the edited pictures.

    All families share :meth:`apply`, :meth:`save` and :func:`load`; see :func:`fit`.
    """

    family: str
    parameters_count: int  #: numbers that were fitted
    grid_action: Action = field(default_factory=GridAction)  #: done to x before all else
    origin: Origin = Origin()  #: of the features it was fitted on
    info: dict[str, Any] = field(default_factory=dict)  #: what the fit chose and found

    def apply(self, x: Tensor) -> Tensor:
        """Predicted features (N, Cy, H, W) of features x (N, Cx, H, W); (N, C) gives (N, C).

        Raises:
            ValueError: another number of channels or axes, or a grid the map does not fit.
        """
        if x.ndim not in (2, 4):
            raise ValueError(f"features are (N, C, H, W) or (N, C), not {tuple(x.shape)}")
        grid = x[:, :, None, None] if x.ndim == 2 else x
        if x.dtype in (torch.float16, torch.bfloat16):
            grid = grid.float()  # sums over channels lose too much in half precision
        result = self._apply(self.grid_action(grid)).to(x.dtype)
        return result[:, :, 0, 0] if x.ndim == 2 else result

    def _apply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and what else a file must hold to make the map again."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map to one safetensors file, atomically; :func:`load` reads it.

        Raises:
            ValueError: the grid action is a function without a name.
        """
        tensors, config = self._content()
        metadata = {
            "map": type(self).__name__,
            "family": self.family,
            "grid_action": named_action(self.grid_action, "saved").name,
            "parameters_count": self.parameters_count,
            "info": self.info,
            "config": config,
            **asdict(self.origin),
        }
        store.save_tensors(path, tensors, metadata=metadata)


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineMap(FeatureMap):
    """y = W x + b, the same at every position (a 1x1 convolution)."""

    weight: Tensor | None  #: (Cy, Cx) float64; None is the identity
    bias: Tensor  #: (Cy,) float64

    @property
    def matrix(self) -> Tensor:
        """W (Cy, Cx), the identity written out."""
        return _eye(self.bias) if self.weight is None else self.weight

    def _apply(self, x: Tensor) -> Tensor:
        width = len(self.bias) if self.weight is None else self.weight.shape[1]
        _check_width(self, x, width)
        bias = self.bias.to(x.device, x.dtype)
        if self.weight is None:
            return x + bias[:, None, None]
        product = self.weight.to(x.device, x.dtype) @ x.flatten(2)
        return (product + bias[:, None]).unflatten(2, x.shape[2:])

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"bias": self.bias}
        if self.weight is not None:
            tensors["weight"] = self.weight
        return tensors, {}


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _check_width(fitted: FeatureMap, x: Tensor, width: int) -> None:
    if x.shape[1] != width:
        raise ValueError(
            f"this {fitted.family} map takes {width} channels, not {x.shape[1]} ({tuple(x.shape)})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionMap(FeatureMap):
    """y[h,w] = W[h,w] x[h,w] + b[h,w]: every position of the grid has a map of its own."""

    weight: Tensor  #: (H, W, Cy, Cx) float32
    bias: Tensor  #: (H, W, Cy) float32

    def _apply(self, x: Tensor) -> Tensor:
        _check_width(self, x, self.weight.shape[3])
        if x.shape[2:] != self.weight.shape[:2]:
            raise ValueError(
                f"this position-specific map was fitted on a {self.weight.shape[0]}x"
                f"{self.weight.shape[1]} grid, not {x.shape[2]}x{x.shape[3]}"
            )
        weight, bias = (value.to(x.device, x.dtype) for value in (self.weight, self.bias))
        product = torch.einsum("hwoc,nchw->nohw", weight, x)
        return product + bias.permute(2, 0, 1)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"weight": self.weight, "bias": self.bias}, {}


@dataclass(frozen=True, kw_only=True, eq=False)
class NeighbourMap(FeatureMap):
    """The mean over the k training positions whose x is nearest; see `nearest_neighbours`."""

    keys: Tensor  #: (M, Cx)
    values: Tensor  #: (M, Cy): y, or y − x where `residual`
    k: int
    residual: bool

    def _apply(self, x: Tensor) -> Tensor:
        _check_width(self, x, self.keys.shape[1])
        keys, values = (value.to(x.device, x.dtype) for value in (self.keys, self.values))
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        found = []
        for part in rows.split(max(1, 20_000_000 // len(keys))):
            nearest = torch.cdist(part, keys).topk(self.k, largest=False).indices
            found.append(values[nearest].mean(1))
        result = torch.cat(found).unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2)
        return result + x if self.residual else result

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"keys": self.keys, "values": self.values}
        return tensors, {"k": self.k, "residual": self.residual}


def load(
    path: str | os.PathLike[str],
    *,
    encoder: Encoder | None = None,
    layer: str | None = None,
    edit: str | None = None,
    family: str | None = None,
) -> Any:
    """Read a map written by `FeatureMap.save`.

    What is given must be what the map was fitted on: the encoder by the hash of its weights (a map
    for a network's weights is noise for the same network retrained), the layer, edit and family by
    name.

    Raises:
        store.MismatchError: names what differs, and both values.
        FileNotFoundError: no such file.
        ValueError: not a complete tensor file.
    """
    wanted = {"layer": layer, "edit": edit, "family": family}
    expect = {key: value for key, value in wanted.items() if value is not None}
    if encoder is not None:
        expect["weight_hash"] = encoder.weight_hash
    tensors, found = store.load_tensors(path, expect=expect)
    kinds = {kind.__name__: kind for kind in (AffineMap, PositionMap, NeighbourMap)}
    if found.get("map") not in (*kinds, "NetworkMap"):
        raise store.MismatchError(
            f"{path}: 'map' expected {', '.join(kinds)} or NetworkMap, found {found.get('map')!r}"
        )
    common = {
        "family": found["family"],
        "parameters_count": found["parameters_count"],
        "grid_action": _as_action(found["grid_action"]),
        "origin": Origin(**{key: found.get(key) for key in asdict(Origin())}),
        "info": found["info"],
    }
    if found["map"] == "NetworkMap":
        from . import trained_maps

        return trained_maps.restore(tensors, found["config"], common)
    kind = kinds[found["map"]]
    if kind is AffineMap:
        tensors.setdefault("weight", None)  # pyright: ignore[reportArgumentType]
    return kind(**tensors, **found["config"], **common)


# --------------------------------------------------------------------------- 2a. shared linear fits


@dataclass(frozen=True)
class _Sample:
    """What a fit is of, as it was then: statistics go on changing."""

    moments: Moments
    grid_action: Action
    origin: Origin

    @classmethod
    def of(cls, statistics: Statistics | Moments) -> _Sample:
        if isinstance(statistics, Moments):
            return cls(statistics, GridAction(), Origin())
        return cls(statistics.total, statistics.grid_action, statistics.origin)


def _affine(
    family: str,
    sample: _Sample,
    weight: Tensor | None,
    bias: Tensor,
    *,
    parameters: int,
    **info: Any,
) -> AffineMap:
    seen = {"images": sample.moments.images, "positions": sample.moments.positions}
    return AffineMap(
        family=family,
        parameters_count=parameters,
        grid_action=sample.grid_action,
        origin=sample.origin,
        info={**seen, **info},
        weight=weight,
        bias=bias,
    )


def additive(statistics: Statistics | Moments) -> AffineMap:
    """The least-squares translation: y = x + δ with δ = ȳ − x̄."""
    sample = _Sample.of(statistics)
    _same_width(sample.moments, "an additive map")
    delta = sample.moments.mean_y - sample.moments.mean_x
    return _affine("additive", sample, None, delta, parameters=len(delta))


@dataclass(frozen=True)
class _Eigen:
    r"""S_xx = Q diag(d) Qᵀ and A = Qᵀ S_xy: from these, the ridge map of any penalty γ is cheap.

    W_γ = Aᵀ diag(s) Qᵀ with the filter s = 1/(d + γ), since
    W_γ = S_yx (S_xx + γ I)⁻¹ is the minimum of Σ ‖y − ȳ − W (x − x̄)‖² + γ ‖W‖².
    """

    moments: Moments
    d: Tensor  #: (Cx,) eigenvalues, ascending
    q: Tensor  #: (Cx, Cx) eigenvectors in columns
    a: Tensor  #: (Cx, Cy)

    @classmethod
    def of(cls, moments: Moments) -> _Eigen:
        d, q = torch.linalg.eigh(moments.xx)
        return cls(moments, d.clamp(min=0), q, q.T @ moments.xy)

    @property
    def present(self) -> Tensor:
        """(Cx,) mask of directions in which x varies by more than rounding."""
        smallest = float(self.d[-1]) * len(self.d) * torch.finfo(self.d.dtype).eps
        return self.d > smallest

    def filters(self, gammas: Sequence[float]) -> Tensor:
        """(K, Cx): 1/(d + γ); for γ = 0, zero where x does not vary (the minimum-norm map)."""
        rows = []
        for gamma in gammas:
            if gamma > 0:
                rows.append(1 / (self.d + gamma))
            else:
                rows.append(torch.where(self.present, 1 / self.d.clamp(min=1e-300), 0))
        return torch.stack(rows)

    def weight(self, gamma: float) -> Tensor:
        """W_γ, (Cy, Cx)."""
        return (self.a * self.filters([gamma])[0][:, None]).T @ self.q.T

    def errors(self, held_out: Moments, gammas: Sequence[float]) -> Tensor:
        r"""(K,) sums of squared errors on other moments, all penalties at once.

        With S′ the held-out moments about the *fitted* means,
        E(γ) = tr S′_yy − 2 Σᵢ sᵢ (A ∘ QᵀS′_xy)ᵢ· + sᵀ (QᵀS′_xxQ ∘ AAᵀ) s: after two matrix
        products for the fold, each penalty costs O(C²).
        """
        xx, xy, yy = held_out.about(self.moments.mean_x, self.moments.mean_y)
        s = self.filters(gammas)
        cross = (self.a * (self.q.T @ xy)).sum(1)
        kernel = (self.q.T @ xx @ self.q) * (self.a @ self.a.T)
        return yy.trace() - 2 * s @ cross + ((s @ kernel) * s).sum(1)

    def gcv(self, gammas: Sequence[float]) -> Tensor:
        """(K,) generalised cross-validation: n · RSS / (n − tr H)², times n as the other errors.

        Golub, Heath & Wahba 1979. tr H = 1 + Σ d/(d + γ): the mean is fitted as well.
        """
        n = self.moments.positions
        s = self.filters(gammas)
        power = self.a.square().sum(1)
        residual = self.moments.yy.trace() - 2 * s @ power + (s.square() * self.d) @ power
        freedom = n - 1 - (s * self.d).sum(1)
        score = residual.clamp(min=0) / (freedom.clamp(min=1e-300) / n) ** 2
        return torch.where(freedom > 1e-9 * n, score, torch.inf)


def penalties(
    statistics: Statistics | Moments, count: int = 20, *, plus_identity: bool = False
) -> list[float]:
    """A path of ridge penalties: 10⁻⁷ to 10 times the mean eigenvalue of S_xx, evenly in logarithm.

    With `plus_identity` (:func:`ridge_path`) 10⁻⁵ to 10³ times, since leaving features alone, the
    limit of a large penalty, is often best.

    Raises:
        ValueError: x does not vary at all, or count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    moments = _moments(statistics)
    scale = float(moments.xx.diagonal().mean())
    if not scale > 0:
        raise ValueError("x is the same at every position of every image: there is nothing to fit")
    low, high = (-5, 3) if plus_identity else (-7, 1)
    return (scale * torch.logspace(low, high, count, dtype=torch.float64)).tolist()


def _check_penalties(gammas: Sequence[float]) -> list[float]:
    values = [float(gamma) for gamma in gammas]
    if not values or not all(0 <= gamma < math.inf for gamma in values):
        raise ValueError(f"penalties must be numbers, at least 0, not {list(gammas)}")
    return values


@dataclass(frozen=True)
class RidgePath:
    """Ridge maps of a whole path of penalties, and the error each is expected to have.

    `errors` are mean squared errors per position, ‖y − ŷ‖² summed over channels, on images that
    were left out (method "folds", "leave_one_image_out") or as GCV estimates them.
    """

    penalties: list[float]
    errors: Tensor  #: (K,)
    unit_errors: Tensor | None  #: (K, folds or groups), of each that was left out; None for "gcv"
    method: str
    plus_identity: bool  #: whether it is W − I that is penalised
    _sample: _Sample = field(repr=False)
    _eigen: _Eigen = field(repr=False)

    @property
    def best(self) -> int:
        """Index of the penalty with the smallest error."""
        return int(self.errors.argmin())

    def map(self, index: int | None = None) -> AffineMap:
        """The ridge map with the penalty of this index, by default the best."""
        index = self.best if index is None else index
        return _ridge_map(
            self._sample, self._eigen, self.penalties[index],
            "ridge_plus_identity" if self.plus_identity else "ridge",
            plus_identity=self.plus_identity,
            expected_error=float(self.errors[index]), chosen_by=self.method,
        )  # fmt: skip


def _ridge_map(
    sample: _Sample,
    eigen: _Eigen,
    gamma: float,
    family: str = "ridge",
    *,
    plus_identity: bool = False,
    **info: Any,
) -> AffineMap:
    weight = eigen.weight(gamma)
    if plus_identity:
        weight = weight + _eye(weight)
    bias = sample.moments.mean_y - weight @ sample.moments.mean_x
    return _affine(
        family, sample, weight, bias, parameters=weight.numel() + bias.numel(),
        penalty=gamma, directions=int(eigen.present.sum()), **info,
    )  # fmt: skip


def ridge_path(
    statistics: Statistics | Moments,
    gammas: Sequence[float] | None = None,
    *,
    select: str = "folds",
    plus_identity: bool = False,
) -> RidgePath:
    """Ridge maps for a path of penalties from one eigendecomposition, with their expected errors.

    Args:
        statistics: of the pairs; Moments only for `select="gcv"`.
        gammas: penalties γ of Σ‖y − Wx − b‖² + γ‖W‖² (b is not penalised), :func:`penalties` by
            default. 0 is ordinary least squares (of minimum norm where S_xx is singular).
        select: how errors are estimated. "folds": images of one fold are left out at a time, one
            more decomposition for each fold; exact and honest. "gcv": from the one decomposition
            alone, but it takes the positions of an image for independent samples and so chooses too
            small a penalty where they are not. Leaving out single images takes a second pass over
            the pairs: :func:`leave_one_image_out`.
        plus_identity: penalise W − I instead of W, so that a large penalty gives the additive map
            rather than the mean of y. With few images this is the safer prior: most edits leave
            most of a picture's features as they are.

    Raises:
        ValueError: no images, images of one fold only, bad penalties, an unknown `select`; x and y
            of different widths with `plus_identity`.
    """
    if select not in ("folds", "gcv"):
        raise unknown("select", select, ["folds", "gcv"])
    return _ridge_path(statistics, gammas, select, _Eigen.of, plus_identity)


def _ridge_path(
    statistics: Statistics | Moments,
    gammas: Sequence[float] | None,
    select: str,
    decompose: Callable[[Moments], _Eigen],
    plus_identity: bool,
) -> RidgePath:
    def view(moments: Moments) -> Moments:
        return moments.difference() if plus_identity else moments

    sample = _Sample.of(statistics)
    if gammas is None:
        values = penalties(sample.moments, plus_identity=plus_identity)
    else:
        values = _check_penalties(gammas)
    eigen = decompose(view(sample.moments))
    if select == "gcv":
        errors = eigen.gcv(values) / sample.moments.positions
        return RidgePath(values, errors, None, select, plus_identity, sample, eigen)
    if isinstance(statistics, Moments):
        raise ValueError("select='folds' needs Statistics, which keep folds; Moments do not")
    sums, counts = [], []
    for train, held_out in statistics.splits():
        sums.append(decompose(view(train)).errors(view(held_out), values))
        counts.append(held_out.positions)
    errors = torch.stack(sums, 1)
    each = errors / torch.tensor(counts).to(errors)
    return RidgePath(
        values, errors.sum(1) / sum(counts), each, select, plus_identity, sample, eigen
    )


def ridge_paths(
    statistics: Mapping[Any, Statistics],
    gammas: Sequence[float] | None = None,
    *,
    plus_identity: bool = False,
) -> dict[Any, RidgePath]:
    """`ridge_path` of several edits of the same pictures, each with a penalty of its own.

    Their S_xx is the same, fold by fold, and so is its decomposition, nearly all of a path's time:
    it is made once for all (and again where S_xx differs, as under a grid action that resamples).

    Raises:
        ValueError: as :func:`ridge_path`.
    """
    known: list[_Eigen] = []

    def shared(moments: Moments) -> _Eigen:
        for eigen in known:
            ours, theirs = moments.xx, eigen.moments.xx
            scale = float(theirs.diagonal().mean())
            if ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-9, 1e-9 * scale):
                return replace(eigen, moments=moments, a=eigen.q.T @ moments.xy)
        known.append(_Eigen.of(moments))
        return known[-1]

    return {
        key: _ridge_path(one, gammas, "folds", shared, plus_identity)
        for key, one in statistics.items()
    }


def leave_one_image_out(
    statistics: Statistics,
    batches: Iterable[tuple[Any, ...]],
    gammas: Sequence[float] | None = None,
) -> RidgePath:
    r"""Exact leave-one-image-out errors of a ridge path, from one decomposition of all images.

    For rows Z of one image in the basis of eigenvectors, with the fit's residuals R there and its
    block of the hat matrix H = 1/n + Z diag(1/(d + γ)) Zᵀ, the residuals of the fit *without* the
    image are (I − H)⁻¹ R. So nothing is fitted again, but the pairs must come a second time.

    Args:
        statistics: of the pairs.
        batches: the same pairs again: (x, y) or (x, y, groups). The images of a group are left out
            together, and must come in one batch.
        gammas: penalties, all above 0; :func:`penalties` by default.

    Returns:
        a `RidgePath` whose `unit_errors` are (K, groups).

    Raises:
        ValueError: a penalty of 0; other pairs than the statistics are of (their number tells).
    """
    sample = _Sample.of(statistics)
    moments = sample.moments
    values = penalties(moments) if gammas is None else _check_penalties(gammas)
    if min(values) <= 0:
        raise ValueError("leave_one_image_out needs penalties above 0")
    eigen, n = _Eigen.of(moments), moments.positions
    filters = eigen.filters(values)
    sums: list[Tensor] = []
    counts: list[int] = []
    seen: set[Any] = set()
    images = 0
    for x, y, *rest in batches:
        x, y = _pair(x, y, statistics.grid_action)
        names = _group_names(rest[0] if rest else None, len(x), images)
        images += len(x)
        for name in dict.fromkeys(names):
            if name in seen:
                raise ValueError(f"images of group {name!r} came in two batches")
            seen.add(name)
            index = torch.tensor([i for i, other in enumerate(names) if other == name])
            z = (_rows(x[index]) - moments.mean_x) @ eigen.q
            target = _rows(y[index]) - moments.mean_y
            sums.append(torch.stack([_left_out(eigen, s, z, target, n) for s in filters]))
            counts.append(len(z))
    if sum(counts) != n:
        raise ValueError(f"{sum(counts)} positions came, but the statistics are of {n}")
    errors = torch.stack(sums, 1)
    each = errors / torch.tensor(counts).to(errors)
    return RidgePath(values, errors.sum(1) / n, each, "leave_one_image_out", False, sample, eigen)


def _left_out(eigen: _Eigen, s: Tensor, z: Tensor, target: Tensor, n: int) -> Tensor:
    """Sum of squared errors on rows z of a fit without them."""
    residual = target - (z * s) @ eigen.a
    if len(z) <= z.shape[1]:
        hat = 1 / n + (z * s) @ z.T
        return torch.linalg.solve(_eye(hat) - hat, residual).square().sum()
    # More rows than channels: (I − UKUᵀ)⁻¹ = I + U (K⁻¹ − UᵀU)⁻¹ Uᵀ with U = [1, Z] is smaller.
    u = torch.cat([torch.ones_like(z[:, :1]), z], 1)
    middle = torch.diag(torch.cat([s.new_tensor([float(n)]), 1 / s])) - u.T @ u
    return (residual + u @ torch.linalg.solve(middle, u.T @ residual)).square().sum()


def ridge(
    statistics: Statistics | Moments,
    *,
    penalty: float | None = None,
    gammas: Sequence[float] | None = None,
    select: str = "folds",
    plus_identity: bool = False,
) -> AffineMap:
    """W = S_yx (S_xx + γI)⁻¹, b = ȳ − W x̄.

    Args:
        statistics: of the pairs.
        penalty: γ; by default the best of the path `gammas` (see :func:`ridge_path`).
        gammas: the path to choose from.
        select: how to choose.
        plus_identity: penalise W − I (see :func:`ridge_path`).

    The paper's γ = 1 is next to nothing for sums over 10⁵ positions; ask for it with `penalty=1`.

    Raises:
        ValueError: as :func:`ridge_path`.
    """
    if penalty is None:
        return ridge_path(statistics, gammas, select=select, plus_identity=plus_identity).map()
    (gamma,) = _check_penalties([penalty])
    sample = _Sample.of(statistics)
    moments = sample.moments.difference() if plus_identity else sample.moments
    family = "ridge_plus_identity" if plus_identity else "ridge"
    return _ridge_map(sample, _Eigen.of(moments), gamma, family, plus_identity=plus_identity)


def linear(statistics: Statistics | Moments, *, rank_deficient: str = "minimum_norm") -> AffineMap:
    """Ordinary least squares, W = S_yx S_xx⁻¹.

    Where S_xx is singular (fewer positions than channels; a channel that is never on), many W fit
    equally well. "minimum_norm" takes the smallest (the pseudo-inverse) and says in
    ``info["directions"]`` in how many directions x was seen to vary; "error" refuses.

    Raises:
        ValueError: singular statistics under `rank_deficient="error"`.
    """
    if rank_deficient not in ("minimum_norm", "error"):
        raise unknown("rank_deficient", rank_deficient, ["minimum_norm", "error"])
    sample = _Sample.of(statistics)
    eigen = _Eigen.of(sample.moments)
    directions, width = int(eigen.present.sum()), len(eigen.d)
    if directions < width and rank_deficient == "error":
        raise ValueError(
            "the statistics are rank-deficient: x varies in "
            f"{directions} of {width} directions over "
            f"{eigen.moments.positions} positions of {eigen.moments.images} images; use ridge, "
            "more images, or rank_deficient='minimum_norm'"
        )
    return _ridge_map(sample, eigen, 0.0, "linear")


# ---------------------------------------------------------------------------------- 2b. few ranks


@dataclass(frozen=True)
class RankPath:
    r"""The best map of every rank, from one decomposition (reduced-rank regression, Izenman 1975).

    Of all W of rank at most r, the one with the smallest Σ‖y − ȳ − W(x − x̄)‖² + γ‖W‖² is
    W_r = V_r V_rᵀ W_γ, where the columns of V_r are the leading eigenvectors of the covariance of
    the *predictions* W_γ x. That is not the truncated singular value decomposition of W, which
    keeps directions that are large in W though x may never go there.

    Index r of `errors` and `map(r)` is the rank; rank 0 predicts the mean (with `plus_identity`:
    is the additive map).
    """

    singular_values: Tensor  #: (R,) of the predictions over all positions, descending
    penalty: float
    plus_identity: bool  #: whether W = I + W_r
    errors: Tensor  #: (R + 1,) left-out mean squared error per position, NaN if not asked for
    fold_errors: Tensor  #: (R + 1, folds)
    _sample: _Sample = field(repr=False)
    _weight: Tensor = field(repr=False)  # (Cy, Cx) of full rank
    _basis: Tensor = field(repr=False)  # (Cy, R)

    @property
    def best(self) -> int:
        """The rank with the smallest left-out error."""
        if not bool(torch.isfinite(self.errors).all()):
            raise ValueError(
                "no errors were estimated: that takes Statistics with images in two folds"
            )
        return int(self.errors.argmin())

    def map(self, rank: int | None = None) -> AffineMap:
        """The best map of this rank, by default of the best.

        Raises:
            ValueError: a rank that is negative or larger than there is.
        """
        rank = self.best if rank is None else rank
        most = self._basis.shape[1]
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= most:
            raise ValueError(f"rank must be a whole number from 0 to {most}, not {rank!r}")
        basis = self._basis[:, :rank]
        weight = basis @ (basis.T @ self._weight)
        moments = self._sample.moments
        if self.plus_identity:
            weight = weight + _eye(weight)
        bias = moments.mean_y - weight @ moments.mean_x
        wide, narrow = weight.shape[1], weight.shape[0]
        return _affine(
            "low_rank_plus_identity" if self.plus_identity else "reduced_rank",
            self._sample, weight, bias,
            parameters=rank * (wide + narrow) + len(bias), penalty=self.penalty, rank=rank,
        )  # fmt: skip

    def held_out(self, moments: Statistics | Moments) -> Tensor:
        """(R + 1,) mean squared error per position on other pairs, for every rank at once."""
        fitted, other = self._sample.moments, _moments(moments)
        if self.plus_identity:
            fitted, other = fitted.difference(), other.difference()
        return _rank_errors(fitted, self._weight, self._basis, other) / other.positions


def _rank_parts(eigen: _Eigen, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """W_γ, the basis V of predictions (Cy, R), and their singular values."""
    root = eigen.filters([gamma])[0].sqrt()
    _, values, basis = torch.linalg.svd(root[:, None] * eigen.a, full_matrices=False)
    return eigen.weight(gamma), basis.T, values


def _rank_errors(fitted: Moments, weight: Tensor, basis: Tensor, held_out: Moments) -> Tensor:
    """Sums of squared errors for ranks 0..R: both terms in W_r are traces of projected matrices."""
    xx, xy, yy = held_out.about(fitted.mean_x, fitted.mean_y)
    projected = basis.T @ weight  # (R, Cx)
    cross = ((projected @ xy) * basis.T).sum(1)
    square = ((projected @ xx) * projected).sum(1)
    gain = (2 * cross - square).cumsum(0)
    return yy.trace() - torch.cat([gain.new_zeros(1), gain])


def rank_path(
    statistics: Statistics | Moments,
    *,
    penalty: float | None = None,
    plus_identity: bool = False,
    left_out: bool = True,
) -> RankPath:
    """Maps of every rank, with left-out errors for every rank where folds were kept.

    Args:
        statistics: of the pairs; Moments give maps but no errors, and need `penalty`.
        penalty: γ; by default ridge's own choice by folds, at full rank.
        plus_identity: fit y − x instead, so that W = I + (rank r).
        left_out: estimate errors by leaving out folds, one more decomposition for each of them.

    Raises:
        ValueError: as :func:`ridge_path`; x and y of different widths with `plus_identity`.
    """

    def view(moments: Moments) -> Moments:
        return moments.difference() if plus_identity else moments

    known = isinstance(statistics, Statistics)
    if penalty is None:
        if not known:
            raise ValueError("to choose the penalty takes Statistics with folds: give `penalty`")
        viewed = Statistics(folds=len(statistics.parts))
        viewed.parts = [view(part) if part else None for part in statistics.parts]
        path = ridge_path(viewed)
        gamma = path.penalties[path.best]
    else:
        (gamma,) = _check_penalties([penalty])
    sample = _Sample.of(statistics)
    eigen = _Eigen.of(view(sample.moments))
    weight, basis, values = _rank_parts(eigen, gamma)
    count = basis.shape[1] + 1
    each = values.new_full((count, 1), torch.nan)
    errors = each[:, 0]
    if known and left_out and sum(part is not None for part in statistics.parts) > 1:
        sums, counts = [], []
        for train, held_out in statistics.splits():
            part = _Eigen.of(view(train))
            w, v, _ = _rank_parts(part, gamma)
            sums.append(_rank_errors(part.moments, w, v, view(held_out)))
            counts.append(held_out.positions)
        total = torch.stack(sums, 1)
        errors = total.sum(1) / sum(counts)
        each = total / torch.tensor(counts).to(total)
    return RankPath(values, gamma, plus_identity, errors, each, sample, weight, basis)


def reduced_rank(
    statistics: Statistics | Moments, *, rank: int | None = None, penalty: float | None = None
) -> AffineMap:
    """The best map of a given rank, by default of the rank that does best on left-out images.

    See `RankPath` for the mathematics and :func:`rank_path` for arguments and errors.
    """
    return rank_path(statistics, penalty=penalty).map(rank)


def low_rank_plus_identity(
    statistics: Statistics | Moments, *, rank: int | None = None, penalty: float | None = None
) -> AffineMap:
    """W = I + U Vᵀ: the edit leaves features alone but for a few directions.

    Reduced-rank regression of y − x on x; arguments and errors as :func:`rank_path`.
    """
    return rank_path(statistics, penalty=penalty, plus_identity=True).map(rank)


def procrustes(statistics: Statistics | Moments, *, scale: bool = False) -> AffineMap:
    r"""The orthogonal map that best takes x − x̄ to y − ȳ (Schönemann 1966).

    From S_yx = U Σ Vᵀ: W = s U Vᵀ with s = 1, or s = tr Σ / tr S_xx with `scale`; b = ȳ − W x̄.
    Reflections are allowed. It is fitted centred and applied centred: leaving the means out, as
    the released code of the paper does when it applies the map, adds an error that is not the
    rotation's. Where S_yx has not full rank the rotation of the rest is arbitrary;
    ``info["directions"]`` tells.

    Raises:
        ValueError: x and y of different widths, or x that does not vary (with `scale`).
    """
    sample = _Sample.of(statistics)
    moments = sample.moments
    _same_width(moments, "a Procrustes map")
    u, values, vt = torch.linalg.svd(moments.xy.T)
    factor = 1.0
    if scale:
        spread = float(moments.xx.trace())
        if not spread > 0:
            raise ValueError("x is the same everywhere: a scale cannot be fitted")
        factor = float(values.sum()) / spread
    weight = factor * (u @ vt)
    width = len(weight)
    tolerance = float(values[0]) * width * torch.finfo(values.dtype).eps
    return _affine(
        "procrustes_scaled" if scale else "procrustes", sample, weight,
        moments.mean_y - weight @ moments.mean_x,
        parameters=width * (width - 1) // 2 + width + scale,
        scale=factor, directions=int((values > tolerance).sum()),
    )  # fmt: skip


# ------------------------------------------------------------------ 2c. one map for each position


class PositionStatistics:
    """Streamed statistics of every position apart: memory 8·H·W·(Cx² + Cx·Cy) bytes.

    A 7x7 grid of 320 channels takes 80 MB, one of 81 positions and 1024 channels 1.4 GB. Each
    position has one sample for each image, so images are soon fewer than channels.
    """

    def __init__(
        self,
        *,
        grid_action: str | Action | None = None,
        origin: Origin | None = None,
        max_gigabytes: float = 2.0,
    ) -> None:
        """Begin with no pairs; arguments as for `Statistics`."""
        self.grid_action: Action = _as_action(grid_action)
        self.origin = origin or Origin()
        self.max_gigabytes = max_gigabytes
        self.images = 0
        self.grid = (0, 0)
        self.mean_x = self.mean_y = self.xx = self.xy = self.yy = torch.empty(0)

    def update(self, x: Tensor, y: Tensor) -> PositionStatistics:
        """Take in a batch x (N, Cx, H, W), y (N, Cy, H, W); gives itself.

        Raises:
            ValueError: as `Statistics.update`; another grid than before; more than `max_gigabytes`
                (naming what it would take).
        """
        x, y = _pair(x, y, self.grid_action)
        cx, cy, grid = x.shape[1], y.shape[1], (x.shape[2], x.shape[3])
        size = 8e-9 * grid[0] * grid[1] * (cx * cx + cx * cy)
        if size > self.max_gigabytes:
            raise ValueError(
                f"a map for each of {grid[0]}x{grid[1]} positions of {cx} and {cy} channels takes "
                f"{size:.3g} GB of statistics, more than {self.max_gigabytes:g}: take a deeper "
                "layer with a smaller grid, or raise max_gigabytes"
            )
        wide_x, wide_y = (stats.float64(v).flatten(2).permute(2, 0, 1) for v in (x, y))  # (P, N, C)
        if not self.images:
            places, zero = grid[0] * grid[1], wide_x.new_zeros
            self.grid = grid
            self.mean_x, self.mean_y = zero(places, cx), zero(places, cy)
            self.xx, self.xy = zero(places, cx, cx), zero(places, cx, cy)
            self.yy = zero(places)
        elif grid != self.grid or self.xy.shape[1:] != (cx, cy):
            raise ValueError(
                f"a {grid[0]}x{grid[1]} grid of {cx} and {cy} channels after one of "
                f"{self.grid[0]}x{self.grid[1]} and {self.xy.shape[1]}, {self.xy.shape[2]}"
            )
        n = len(x)
        share = n / (self.images + n)
        new_x, new_y = wide_x.mean(1), wide_y.mean(1)
        dx, dy = new_x - self.mean_x, new_y - self.mean_y
        centred_x, centred_y = wide_x - new_x[:, None], wide_y - new_y[:, None]
        weight = self.images * share
        self.xx.baddbmm_(centred_x.mT, centred_x)
        self.xx.baddbmm_(weight * dx[:, :, None], dx[:, None])
        self.xy.baddbmm_(centred_x.mT, centred_y)
        self.xy.baddbmm_(weight * dx[:, :, None], dy[:, None])
        self.yy += centred_y.square().sum((1, 2)) + weight * dy.square().sum(1)
        self.mean_x += share * dx
        self.mean_y += share * dy
        self.images += n
        return self


def position_specific(
    statistics: PositionStatistics,
    *,
    penalty: float | None = None,
    gammas: Sequence[float] | None = None,
) -> PositionMap:
    """A ridge map for every position, with one penalty for all.

    The penalty is chosen by GCV summed over positions: here each sample is another image, so that
    GCV's independence holds. By default from 10⁻⁵ to 10³ times the mean eigenvalue.

    Raises:
        ValueError: fewer than two images; no penalty (0) with no more images than channels.
    """
    n, width = statistics.images, statistics.mean_x.shape[-1]
    if n < 2:
        raise ValueError(f"position-specific statistics of {n} images: two at least")
    scale = float(statistics.xx.diagonal(dim1=1, dim2=2).mean())
    if not scale > 0:
        raise ValueError("x is the same in every image: there is nothing to fit")
    if penalty is not None:
        values = _check_penalties([penalty])
    elif gammas is not None:
        values = _check_penalties(gammas)
    else:
        values = (scale * torch.logspace(-5, 3, 20, dtype=torch.float64)).tolist()
    if n <= width and min(values) == 0:
        raise ValueError(
            f"{n} images for {width} channels: at each position an unpenalised map fits them all "
            "exactly and means nothing; give a penalty above 0 or more images"
        )
    errors = torch.zeros(len(values), dtype=torch.float64, device=statistics.xx.device)
    if len(values) > 1:
        for place in range(len(statistics.xx)):
            errors += _position_moments(statistics, place).gcv(values)
    gamma = values[int(errors.argmin())]
    weights, biases = [], []
    for place in range(len(statistics.xx)):
        eigen = _position_moments(statistics, place)
        weight = eigen.weight(gamma)
        weights.append(weight.float())
        biases.append((eigen.moments.mean_y - weight @ eigen.moments.mean_x).float())
    weight, bias = torch.stack(weights), torch.stack(biases)
    return PositionMap(
        family="position_specific",
        parameters_count=weight.numel() + bias.numel(),
        grid_action=statistics.grid_action,
        origin=statistics.origin,
        info={"images": n, "penalty": gamma},
        weight=weight.unflatten(0, statistics.grid),
        bias=bias.unflatten(0, statistics.grid),
    )


def _position_moments(statistics: PositionStatistics, place: int) -> _Eigen:
    xx, xy = statistics.xx[place], statistics.xy[place]
    total = statistics.yy[place].reshape(1, 1)  # its trace is all that GCV asks of S_yy
    moments = Moments(
        statistics.images, statistics.images, statistics.mean_x[place], statistics.mean_y[place],
        xx, xy, total,
    )  # fmt: skip
    return _Eigen.of(moments)


# -------------------------------------------------------------------------- 2d. fit, by family name

#: Families with a closed form -> their function of statistics.
CLOSED_FORM: dict[str, Callable[..., FeatureMap]] = {
    "additive": additive,
    "procrustes": procrustes,
    "linear": linear,
    "ridge": ridge,
    "reduced_rank": reduced_rank,
    "low_rank_plus_identity": low_rank_plus_identity,
    "position_specific": position_specific,
}
#: Families that are trained step by step, in :mod:`trained_maps`.
TRAINED = ("trained_linear", "mlp", "cnn", "transformer")


def fit(
    family: str,
    data: Statistics | PositionStatistics | tuple[Tensor, Tensor],
    *,
    grid_action: str | Action | None = None,
    origin: Origin | None = None,
    groups: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """Fit a map of any family.

    Args:
        family: of `CLOSED_FORM` or `TRAINED`.
        data: statistics, or the pairs themselves (x, y), each (N, C, H, W). Trained families need
            the pairs.
        grid_action: done to x first; with statistics it is theirs.
        origin: of the features; with statistics it is theirs.
        groups: source of each image, for folds and validation; with statistics they are in them.
        options: of the family's own function (`penalty`, `rank`, ...; `trained_maps.train`).

    Raises:
        ValueError: an unknown family (naming the closest), data of the wrong kind, and what the
            family's function raises.
    """
    if family in TRAINED:
        if not isinstance(data, tuple):
            raise ValueError(f"{family} is trained on the pairs: give (x, y), not statistics")
        from . import trained_maps

        return trained_maps.train(
            family, *data, grid_action=grid_action, origin=origin, groups=groups, **options
        )
    if family not in CLOSED_FORM:
        raise unknown("family", family, [*CLOSED_FORM, *TRAINED])
    local = family == "position_specific"
    if isinstance(data, tuple):
        x, y = data
        if local:
            data = PositionStatistics(grid_action=grid_action, origin=origin).update(x, y)
        else:
            data = Statistics(grid_action=grid_action, origin=origin).update(x, y, groups=groups)
    elif grid_action is not None or origin is not None or groups is not None:
        raise ValueError("grid_action, origin and groups were given to the statistics already")
    if not isinstance(data, PositionStatistics if local else Statistics):
        wanted = "PositionStatistics" if local else "Statistics"
        raise ValueError(f"{family} is fitted on {wanted}, not {type(data).__name__}")
    return CLOSED_FORM[family](data, **options)


# -------------------------------------------------------------------------------------- 3. errors


def _matching(fitted: AffineMap, statistics: Statistics | Moments) -> Moments:
    if isinstance(statistics, Statistics) and statistics.grid_action != fitted.grid_action:
        raise ValueError("the statistics were made with another grid action than the map's")
    moments = _moments(statistics)
    if fitted.matrix.shape != (len(moments.mean_y), len(moments.mean_x)):
        raise ValueError(
            f"a map {tuple(fitted.matrix.shape)} on statistics of {len(moments.mean_x)} and "
            f"{len(moments.mean_y)} channels"
        )
    return moments


def squared_error(fitted: AffineMap, statistics: Statistics | Moments) -> float:
    """Mean of ‖y − Wx − b‖² over the positions of other pairs, from their statistics alone.

    Raises:
        ValueError: statistics of other widths or another grid action.
    """
    moments = _matching(fitted, statistics)
    w, b = fitted.matrix.to(moments.xx), fitted.bias.to(moments.xx)
    offset = moments.mean_y - w @ moments.mean_x - b
    within = moments.yy.trace() - 2 * (w.T * moments.xy).sum() + ((w @ moments.xx) * w).sum()
    return max(float(within) / moments.positions, 0.0) + float(offset.square().sum())


def explained(
    fitted: AffineMap, statistics: Statistics | Moments, *, floor: Tensor | None = None
) -> float:
    """Share R² of the variation of y that a map explains on other pairs, from their statistics.

    1 − Σ‖y − ŷ‖² / Σ‖y − floor‖²; `floor` (Cy,) is by default the mean of those pairs' own y.

    Raises:
        ValueError: y does not vary; as :func:`squared_error`.
    """
    moments = _matching(fitted, statistics)
    spread = float(moments.yy.trace()) / moments.positions
    if floor is not None:
        spread += float((moments.mean_y - floor.to(moments.mean_y)).square().sum())
    if not spread > 0:
        raise ValueError("R² is undefined: y equals its floor everywhere")
    return 1 - squared_error(fitted, moments) / spread


def discrepancy(first: AffineMap, second: AffineMap, statistics: Statistics | Moments) -> float:
    """Mean of ‖f(x) − g(x)‖² over the x of these statistics, as a share of the spread of f(x).

    Maps may differ wildly in directions that x never takes; this counts those that it does. Both
    maps see x after their own grid actions, which must be the same.

    Raises:
        ValueError: maps of other widths or grid actions, or a first map that is constant.
    """
    if first.grid_action != second.grid_action:
        raise ValueError("two maps with different grid actions cannot be compared by statistics")
    moments = _moments(statistics)
    own = first.matrix.to(moments.xx)
    w = own - second.matrix.to(moments.xx)
    b = (first.bias - second.bias.to(first.bias)).to(moments.xx)
    apart = ((w @ moments.xx) * w).sum() / moments.positions
    apart = float(apart + (w @ moments.mean_x + b).square().sum())
    spread = float(((own @ moments.xx) * own).sum()) / moments.positions
    if not spread > 0:
        raise ValueError("the first map gives the same for every x")
    return apart / spread


# -------------------------------------------------------------------------- 4. floors and ceilings


def identity(
    channels: int, *, grid_action: str | Action | None = None, origin: Origin | None = None
) -> AffineMap:
    """The map y = x: nothing happens, or nothing but the grid action."""
    return AffineMap(
        family="identity",
        parameters_count=0,
        grid_action=_as_action(grid_action),
        origin=origin or Origin(),
        weight=None,
        bias=torch.zeros(channels, dtype=torch.float64),
    )


def floors(statistics: Statistics) -> dict[str, AffineMap]:
    """Maps that a worthwhile one must beat.

    "identity"; "grid_action", where there is one, the identity after it; "mean_shift", the
    translation that moves the mean (after the grid action). The other floors are data: the
    features of a random-weight encoder, and `map_scores.random_direction`.

    Raises:
        ValueError: no images, or x and y of different widths.
    """
    moments = statistics.total
    _same_width(moments, "the identity")
    channels, origin = len(moments.mean_x), statistics.origin
    found = {"identity": identity(channels, origin=origin)}
    if statistics.grid_action != GridAction():
        found["grid_action"] = identity(channels, grid_action=statistics.grid_action, origin=origin)
    found["mean_shift"] = replace(additive(statistics), family="mean_shift")
    return found


def nearest_neighbours(
    x: Tensor,
    y: Tensor,
    *,
    k: int = 5,
    residual: bool = True,
    max_vectors: int = 20_000,
    grid_action: str | Action | None = None,
    origin: Origin | None = None,
    seed: int = 0,
) -> NeighbourMap:
    """A map without a form: at each position, what happened to the k nearest vectors in training.

    What is local in feature space it finds whatever its shape, given data; a family that does
    worse is too stiff. It is a reference rather than a bound: with many channels neighbours are
    far, and linear maps often beat it.

    Args:
        x: training features (N, Cx, H, W).
        y: of the edited pictures.
        k: how many neighbours are averaged.
        residual: average y − x and add it to x, rather than average y.
        max_vectors: positions kept, drawn at random from all; apply costs this many distances for
            each position.
        grid_action: done to x first.
        origin: of the features.
        seed: of the draw.

    Raises:
        ValueError: k not from 1 to the number of vectors; different widths with `residual`; as
            `Statistics.update`.
    """
    action = _as_action(grid_action)
    images = len(x)
    x, y = _pair(x, y, action)
    if residual and x.shape[1] != y.shape[1]:
        raise ValueError(f"y - x of {x.shape[1]} and {y.shape[1]} channels: residual=False")
    keys, values = (v.permute(0, 2, 3, 1).flatten(0, 2) for v in (x, y))
    if len(keys) > max_vectors:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(keys), generator=generator)[:max_vectors].to(keys.device)
        keys, values = keys[chosen], values[chosen]
    if not 1 <= k <= len(keys):
        raise ValueError(f"k must be from 1 to the {len(keys)} vectors kept, not {k}")
    return NeighbourMap(
        family="nearest_neighbours",
        parameters_count=keys.numel() + values.numel(),
        grid_action=action,
        origin=origin or Origin(),
        info={"images": images, "vectors": len(keys)},
        keys=keys,
        values=values - keys if residual else values,
        k=k,
        residual=residual,
    )
