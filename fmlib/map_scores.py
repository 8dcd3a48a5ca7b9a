r"""How good is a predicted feature map? Errors, cosines and meaning, one number for each image.

Predicted features ŷ of an edited picture are compared with the true ones, y: position by position
(:func:`score`), inside and outside the edited region, and by what the rest of the network makes of
them (:func:`semantics`). A score is to be read between a floor and a ceiling: here are the control
by a random direction and the ceiling by test-retest noise, in :mod:`maps` the floors that are maps.
Intervals are over images: `stats.bootstrap` takes what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import stats
from .errors import unknown

__all__ = [
    "Agreement",
    "Scores",
    "agreement",
    "grid_mask",
    "random_direction",
    "retest",
    "score",
    "semantics",
]


def _alike(**features: Tensor) -> None:
    """Check features (N, C, H, W) or (N, C) that face one another."""
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{' and '.join(shapes)} differ in shape: {list(shapes.values())}")
    for name, value in features.items():
        if value.ndim not in (2, 4) or not value.numel():
            raise ValueError(f"{name} must be (N, C, H, W) or (N, C), not {shapes[name]}")
        finite = torch.isfinite(value).flatten(1).all(1)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"{name}: image {bad[0]} is not finite (NaN or infinite), {len(bad)} of "
                f"{len(value)} images in all"
            )


# ------------------------------------------------------------------------------- in feature space


def grid_mask(mask: Tensor, grid: tuple[int, int], *, coverage: float = 0.0) -> Tensor:
    """Which positions of a feature grid an edited region of the picture covers: (N, h, w) bool.

    Args:
        mask: (N, H, W) or (N, 1, H, W), true (or 1) where the picture was edited.
        grid: rows and columns of the feature grid, at most the mask's.
        coverage: a position counts if more than this share of its cell is edited. 0 (any pixel) is
            the max-pooling of the paper. Receptive fields reach further than cells, so features
            outside change as well; that is what the scores outside are there to show.

    Raises:
        ValueError: a mask of another form, or a grid finer than it.
    """
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3:
        raise ValueError(f"mask must be (N, H, W) or (N, 1, H, W), not {tuple(mask.shape)}")
    if grid[0] > mask.shape[1] or grid[1] > mask.shape[2]:
        raise ValueError(f"a {grid[0]}x{grid[1]} grid is finer than a mask {tuple(mask.shape[1:])}")
    if not 0 <= coverage < 1:
        raise ValueError(f"coverage must be at least 0 and below 1, not {coverage}")
    share = F.adaptive_avg_pool2d((mask > 0.5).float(), grid)
    return share > coverage


@dataclass(frozen=True)
class Scores:
    """How far predicted features are from true ones, at every position of every image."""

    squared: Tensor  #: (N, H, W) ‖y − ŷ‖²
    floor: Tensor  #: (N, H, W) ‖y − floor‖²
    cosine: Tensor  #: (N, H, W) of ŷ and y
    mask: Tensor | None = None  #: (N, H, W) bool, the edited region

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of all images of several batches (give :func:`score` one floor for all of them).

        Raises:
            ValueError: no parts, or some with a mask and some without.
        """
        masks = [part.mask for part in parts if part.mask is not None]
        if not parts or len(masks) not in (0, len(parts)):
            raise ValueError(f"{len(masks)} of {len(parts)} scores have a mask: all or none")
        return cls(
            squared=torch.cat([part.squared for part in parts]),
            floor=torch.cat([part.floor for part in parts]),
            cosine=torch.cat([part.cosine for part in parts]),
            mask=torch.cat(masks) if masks else None,
        )

    def _where(self, where: str) -> Tensor:
        if where not in ("all", "inside", "outside"):
            raise unknown("region", where, ["all", "inside", "outside"])
        if where == "all":
            return torch.ones_like(self.squared, dtype=torch.bool)
        if self.mask is None:
            raise ValueError(f"scores {where} the edited region need a mask")
        return self.mask if where == "inside" else ~self.mask

    def per_image(self, measure: str = "r2", where: str = "all") -> Tensor:
        """(N,) float64 scores, one for each image, ready for `stats.bootstrap`.

        Args:
            measure: "error", the squared error in units of the mean ‖y − floor‖² of all images (of
                that region); "r2", one minus this, so that the mean over images is the pooled R²;
                "mean_cosine"; "median_cosine" over positions (the paper's, the upper of two).
            where: "all" positions, those "inside" the edited region or "outside" of it.

        An image without such positions has NaN: leave it out before bootstrapping.

        Raises:
            ValueError: an unknown measure or region, no mask, or y equals its floor everywhere.
        """
        keep = self._where(where).flatten(1)
        counts = keep.sum(1)
        nothing = self.squared.new_tensor(torch.nan)

        def mean(values: Tensor) -> Tensor:
            total = torch.where(keep, values.flatten(1), 0).sum(1)
            return torch.where(counts > 0, total / counts.clamp(min=1), nothing)

        if measure in ("error", "r2"):
            scale = mean(self.floor).nanmean()
            if not float(scale) > 0:
                raise ValueError(f"the error is undefined: y equals its floor everywhere ({where})")
            error = mean(self.squared) / scale
            return error if measure == "error" else 1 - error
        if measure == "mean_cosine":
            return mean(self.cosine)
        if measure == "median_cosine":
            ordered = torch.where(keep, self.cosine.flatten(1), torch.inf).sort(1).values
            middle = ordered.gather(1, (counts // 2).clamp(max=keep.shape[1] - 1)[:, None])[:, 0]
            return torch.where(counts > 0, middle, nothing)
        raise unknown("measure", measure, ["error", "r2", "mean_cosine", "median_cosine"])

    def per_position(self) -> Tensor:
        """(H, W) R² of every position over images.

        NaN where y equals its floor in all of them.
        """
        return 1 - self.squared.mean(0) / self.floor.mean(0).where(
            self.floor.mean(0) > 0, self.floor.new_tensor(torch.nan)
        )


def score(
    prediction: Tensor,
    target: Tensor,
    *,
    floor: Tensor | None = None,
    mask: Tensor | None = None,
) -> Scores:
    """Compare predicted with true features of edited pictures.

    Args:
        prediction: ŷ (N, C, H, W) or (N, C).
        target: y, the same shape.
        floor: what error 1 (R² of 0) means: (C,) such as the mean of the *training* y, or features
            like `target` such as the unedited x. By default the mean of `target` itself.
        mask: (N, H, W) bool on the feature grid, the edited region (:func:`grid_mask`).

    Raises:
        ValueError: shapes that differ, values that are not finite.
    """
    _alike(prediction=prediction, target=target)
    if target.ndim == 2:
        prediction, target = prediction[:, :, None, None], target[:, :, None, None]
    wide_prediction, wide_target = (
        stats.float64(prediction.detach()),
        stats.float64(target.detach()),
    )
    if floor is None:
        base = wide_target.mean((0, 2, 3), keepdim=True)
    else:
        base = stats.float64(floor.detach()).to(wide_target.device)
        base = base[None, :, None, None] if base.ndim == 1 else base
        base = base[:, :, None, None] if base.ndim == 2 else base
        if base.ndim != 4 or base.shape[1] != target.shape[1]:
            raise ValueError(
                f"floor must be (C,) or like the target {tuple(target.shape)}, not "
                f"{tuple(floor.shape)}"
            )
    if mask is not None and mask.shape != (len(target), *target.shape[2:]):
        raise ValueError(
            f"mask must be on the feature grid, {(len(target), *target.shape[2:])}, not "
            f"{tuple(mask.shape)}: see grid_mask"
        )
    return Scores(
        squared=(wide_target - wide_prediction).square().sum(1),
        floor=(wide_target - base).square().sum(1),
        cosine=stats.cosine_similarity(wide_prediction, wide_target, dim=1),
        mask=None if mask is None else mask.to(wide_target.device, torch.bool),
    )


# ------------------------------------------------------------------------- by the rest of the net


@dataclass(frozen=True)
class Agreement:
    """What a network makes of two versions of a picture's features, one number for each image."""

    top1: Tensor  #: (N,) 1 where both have the same first class
    top5: Tensor  #: (N,) 1 where the reference's first class is among the candidate's first five
    divergence: Tensor  #: (N,) Jensen-Shannon, base 2: 0 the same distribution, 1 disjoint
    probability_change: Tensor  #: (N,) candidate − reference, of the reference's first class


def agreement(reference: Tensor, candidate: Tensor) -> Agreement:
    r"""Compare class distributions: softmax of logits (N, K) each.

    The divergence is H(m) − (H(p) + H(q))/2 with m = (p + q)/2 and entropies in bits. With fewer
    than five classes, top5 is over all of them.

    Raises:
        ValueError: shapes that differ, or logits that are not finite.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ValueError(
            f"logits must be (N, K) both, not {tuple(reference.shape)} and {tuple(candidate.shape)}"
        )
    if not bool(torch.isfinite(reference).all() and torch.isfinite(candidate).all()):
        raise ValueError("the logits are not finite")
    p, q = stats.float64(reference).softmax(1), stats.float64(candidate).softmax(1)
    best = p.argmax(1, keepdim=True)
    ranks = q.topk(min(5, q.shape[1]), 1).indices
    divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return Agreement(
        top1=(ranks[:, :1] == best).any(1).double(),
        top5=(ranks == best).any(1).double(),
        divergence=divergence.clamp(0, 1),
        probability_change=(q - p).gather(1, best)[:, 0],
    )


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def semantics(
    tail: Callable[..., Any],
    original: Tensor,
    edited: Tensor,
    mapped: Tensor,
    *,
    original_prefix: Tensor | None = None,
    edited_prefix: Tensor | None = None,
    mapped_prefix: Tensor | None = None,
    batch_size: int = 64,
) -> dict[str, Agreement]:
    """Ask the rest of the network whether mapped features mean what truly edited ones mean.

    Args:
        tail: the rest of the network after the layer (`taps.tail`): features -> logits.
        original: features x of the pictures, (N, C, H, W).
        edited: features y of the edited pictures.
        mapped: predicted features.
        original_prefix: class and register tokens (N, T, C), where the layer has any.
        edited_prefix: those of the edited pictures.
        mapped_prefix: those the mapped grid goes with. By default the original's: the map has not
            seen the edited picture, and its class token would give the answer away.
        batch_size: images at a time.

    Returns:
        "mapped_vs_edited" (how good the map is), "edited_vs_original" (how much the edit changes)
        and "mapped_vs_original" (how much the map changes), the second named the reference.

    Raises:
        ValueError: features of different shapes; what the tail raises.
    """
    _alike(original=original, edited=edited, mapped=mapped)
    if mapped_prefix is None:
        mapped_prefix = original_prefix
    logits = {}
    for name, features, prefix in (
        ("original", original, original_prefix),
        ("edited", edited, edited_prefix),
        ("mapped", mapped, mapped_prefix),
    ):
        parts = []
        with torch.no_grad():
            for start in range(0, len(features), batch_size):
                part = slice(start, start + batch_size)
                extra = () if prefix is None else (prefix[part],)
                parts.append(tail(features[part], *extra))
        logits[name] = torch.cat(parts)
    pairs = [("mapped", "edited"), ("edited", "original"), ("mapped", "original")]
    return {f"{a}_vs_{b}": agreement(logits[b], logits[a]) for a, b in pairs}


# --------------------------------------------------------------------------- floors and ceilings


def random_direction(x: Tensor, y: Tensor, *, factor: float = 1.0, seed: int = 0) -> Tensor:
    """As far from x as the edit, but in any direction: x + factor · ‖y − x‖ u.

    u is a random unit vector of all of an image's features, drawn from `seed`; the norm is each
    image's own (paper, norm-matched noise control). It uses the true y, so it is a control and not
    a prediction. At factor f its expected squared error is (1 + f²) times the identity's.

    Raises:
        ValueError: shapes that differ, values that are not finite.
    """
    _alike(x=x, y=y)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype).flatten(1)
    noise = noise / noise.norm(dim=1, keepdim=True)
    length = (y - x).flatten(1).norm(dim=1, keepdim=True)
    return x + (factor * length * noise).view_as(x)


def retest(first: Tensor, second: Tensor, *, floor: Tensor | None = None) -> Scores:
    """The best score that noise leaves room for, from two noisy versions of the same features.

    If y₁ = s + ε₁ and y₂ = s + ε₂ with independent noise of one size, E‖y₁ − y₂‖² is twice the
    noise, while a perfect prediction of s errs by the noise once: squared errors are halved here.
    Cosines are those of the two versions, somewhat below what is attainable.

    Arguments and errors as :func:`score`.
    """
    found = score(second, first, floor=floor)
    return replace(found, squared=found.squared / 2)
