"""Intervals and error measures.

Floor 1: arrays in, numbers out. Uncertainty is over images, objects or their source groups, never
over pixels: everything resamples axis 0 only.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_CELLS = 4_000_000  # numbers held at once while resampling: about 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    `value`, `low` and `high` are floats, or arrays of one shape; `n` is the number of independent
    units (groups where given); `level` the nominal coverage. With n = 1 the bounds are NaN: one
    unit says nothing of the spread.
    """

    value: Any
    low: Any
    high: Any
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        """`0.83 [0.80, 0.86]` for a scalar; the shape for an array."""
        if np.ndim(self.value):
            return f"Interval of shape {np.shape(self.value)}, n={self.n}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def _array(values: Any, name: str) -> np.ndarray:
    """`values` as a finite float64 array (n, ...); errors name the first bad index."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one unit along axis 0, got {array.shape}")
    bad = ~np.isfinite(array)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        index = place[0] if len(place) == 1 else place
        raise ValueError(
            f"{name}[{index}] is {array[place]}, not a finite number ({int(bad.sum())} such values)"
        )
    return array


def _codes(groups: Sequence[Any] | None, n: int) -> np.ndarray:
    """Group index of each unit, 0..G-1 in order of first appearance."""
    if groups is None:
        return np.arange(n)
    names = list(groups)
    if len(names) != n:
        raise ValueError(f"groups has {len(names)} entries for {n} values")
    index: dict[Any, int] = {}
    return np.array([index.setdefault(name, len(index)) for name in names])


def _draws(units: int, n_resamples: int, seed: int, width: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn, (resamples, units), in chunks of bounded size.

    `width` is how many numbers per resample the caller will hold. The stream of random numbers does
    not depend on the chunk size, so neither does a result.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // max(units, width))
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        picks = rng.integers(units, size=(rows, units))
        picks += np.arange(rows)[:, None] * units
        yield np.bincount(picks.ravel(), minlength=rows * units).reshape(rows, units)


def _means(flat: np.ndarray, codes: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Bootstrap means (n_resamples, columns): resampled group sums over resampled group sizes."""
    units = int(codes.max()) + 1
    sums = flat
    if units < len(flat):
        sums = np.zeros((units, flat.shape[1]))
        np.add.at(sums, codes, flat)
    sizes = np.bincount(codes, minlength=units).astype(np.float64)
    parts = []
    for counts in _draws(units, n_resamples, seed, len(codes)):
        weights = counts.astype(np.float64)
        parts.append(weights @ sums / (weights @ sizes)[:, None])
    return np.concatenate(parts)


def _medians(flat: np.ndarray, codes: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Bootstrap medians (n_resamples, columns), from counts and one sort per column."""
    units = int(codes.max()) + 1
    orders = np.argsort(flat, axis=0, kind="stable")
    parts = []
    for counts in _draws(units, n_resamples, seed, len(codes)):
        result = np.empty((len(counts), flat.shape[1]))
        for column in range(flat.shape[1]):
            order = orders[:, column]
            reached = counts[:, codes[order]].cumsum(axis=1)
            total = reached[:, -1:]
            # the two middle members (one if the number is odd) of the repeated, sorted sample
            lower = (reached > (total - 1) // 2).argmax(axis=1)
            upper = (reached > total // 2).argmax(axis=1)
            ranked = flat[order, column]
            result[:, column] = (ranked[lower] + ranked[upper]) / 2
        parts.append(result)
    return np.concatenate(parts)


def _others(
    array: np.ndarray,
    codes: np.ndarray,
    n_resamples: int,
    seed: int,
    statistic: Callable[[np.ndarray], Any],
) -> np.ndarray:
    """Bootstrap values of any statistic, one resample at a time."""
    units = int(codes.max()) + 1
    rows = []
    for counts in _draws(units, n_resamples, seed, len(codes)):
        for count in counts:
            rows.append(np.asarray(statistic(np.repeat(array, count[codes], axis=0)), np.float64))
    return np.stack(rows)


def bootstrap(
    values: Any,
    *,
    groups: Sequence[Any] | None = None,
    statistic: str | Callable[[np.ndarray], Any] = "mean",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic over axis 0 (Efron & Tibshirani 1993, ch. 13).

    Args:
        values: (n,) or (n, ...), one entry per image or object. Trailing axes are carried along: an
            (n, H, W) stack gives (H, W) arrays of value, low and high.
        groups: n source-group names. Whole groups are resampled (cluster bootstrap), since crops of
            one photograph are not independent; the mean of a resample is over its members, so that
            large groups weigh more.
        statistic: "mean", "median", or a callable that takes (m, ...) and reduces axis 0 (slower:
            one Python call per resample).
        level: nominal coverage, in (0, 1).
        n_resamples: number of resamples.
        seed: the result is a function of the data and this seed alone; memory is bounded whatever
            `n` and the trailing shape.

    With one unit (or one group) the bounds are NaN. Percentile intervals are somewhat too narrow
    for small n: on normal data they cover about 0.94 instead of 0.95 at n = 30, 0.90 at n = 8.

    Raises:
        ValueError: a value is not finite (its index is named), lengths differ, or an option is
            out of range.

    """
    array = _array(values, "values")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    codes = _codes(groups, len(array))
    units = int(codes.max()) + 1
    tails = [(1 - level) / 2, (1 + level) / 2]
    if isinstance(statistic, str):
        methods = {"mean": (_means, np.mean), "median": (_medians, np.median)}
        if statistic not in methods:
            close = difflib.get_close_matches(statistic, methods, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown statistic {statistic!r}: mean, median or a callable{hint}")
        resample, plain = methods[statistic]
        value = plain(array, axis=0)
        flat = array.reshape(len(array), -1)
        low, high = np.full((2, flat.shape[1]), np.nan)
        if units > 1:
            # columns in blocks, each with the same draws: bounded memory for whole heat maps
            block = max(1, _CELLS // n_resamples)
            for start in range(0, flat.shape[1], block):
                part = resample(flat[:, start : start + block], codes, n_resamples, seed)
                low[start : start + block], high[start : start + block] = np.quantile(
                    part, tails, axis=0
                )
        low, high = low.reshape(value.shape), high.reshape(value.shape)
    else:
        value = np.asarray(statistic(array), np.float64)
        low = high = np.full(value.shape, np.nan)
        if units > 1:
            low, high = np.quantile(
                _others(array, codes, n_resamples, seed, statistic), tails, axis=0
            )
    if np.ndim(value) == 0:
        return Interval(float(value), float(low), float(high), units, level)
    return Interval(np.asarray(value), np.asarray(low), np.asarray(high), units, level)


def paired_difference(
    a: Any,
    b: Any,
    *,
    groups: Sequence[Any] | None = None,
    statistic: str | Callable[[np.ndarray], Any] = "mean",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a − b, both (n, ...) on the same units; options of `bootstrap`.

    Raises:
        ValueError: the shapes differ, or as `bootstrap`.

    """
    first, second = _array(a, "a"), _array(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"a and b must be paired, got shapes {first.shape} and {second.shape}")
    return bootstrap(
        first - second,
        groups=groups,
        statistic=statistic,
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )


# ------------------------------------------------------------------------------- error measures


def float64(x: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU where their device (MPS) has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float64 where the device has it: sums over 10⁵ and more entries follow."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def cosine_similarity(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosine of the angle between x and y along `dim`; the two broadcast, `dim` disappears.

    Half-precision input is computed in float32. A zero vector has similarity 0 to everything,
    itself included (a feature that is off everywhere points nowhere).
    """
    if x.dtype in (torch.float16, torch.bfloat16) or y.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    return F.cosine_similarity(x, y, dim=dim)


def mean_pairwise_distance(x: torch.Tensor, *, squared: bool = False) -> float:
    """Mean Euclidean distance between all pairs of the M items of x (M, ...), a float.

    With `squared`, the mean of the squared distances.

    Raises:
        ValueError: fewer than two items.

    """
    if x.ndim == 0 or len(x) < 2:
        raise ValueError(
            f"a pairwise distance needs at least two items, got shape {tuple(x.shape)}"
        )
    flat = _wide(x.detach()).flatten(1) if x.ndim > 1 else _wide(x.detach())[:, None]
    m = len(flat)
    if squared:
        # sum over i<j of ‖xi−xj‖² = M Σ‖xi−mean‖²
        return float(2 * (flat - flat.mean(0)).square().sum() / (m - 1))
    chunk = max(1, _CELLS // m)
    total = sum(
        # the matrix-multiplication shortcut loses digits for close items
        float(
            torch.cdist(
                flat[i : i + chunk], flat, compute_mode="donot_use_mm_for_euclid_dist"
            ).sum()
        )
        for i in range(0, m, chunk)
    )
    return total / (m * (m - 1))


def normalised_error(
    x: torch.Tensor, y: torch.Tensor, *, reference: torch.Tensor | float, squared: bool = False
) -> torch.Tensor:
    """Error of reconstructions x (N, ...) of y (N, ...) in units of how far things lie apart.

    ‖x − y‖₂ over the mean pairwise distance of `reference` (Mahendran & Vedaldi 2015). With
    `squared`, ‖x − y‖₂² over the mean pairwise *squared* distance, as their released code computes
    it: the two differ, so report which.

    Args:
        x: reconstructions or their features, (N, ...).
        y: the originals, the same shape.
        reference: (M, ...) items of the same space, e.g. the features of the test images; or the
            mean distance itself (for `squared`: the mean squared distance) as a number.
        squared: see above.

    Returns:
        (N,) float tensor, differentiable in x and y.

    Raises:
        ValueError: shapes differ, or the reference items coincide.

    """
    if x.shape != y.shape or x.ndim == 0:
        raise ValueError(f"x and y differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    if isinstance(reference, torch.Tensor) and reference.ndim > 0:
        if reference.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"reference items have shape {tuple(reference.shape[1:])}, "
                f"x has {tuple(x.shape[1:])}"
            )
        scale = mean_pairwise_distance(reference, squared=squared)
    else:
        scale = float(reference)
    if not scale > 0:
        raise ValueError(f"the reference items must differ; their mean distance is {scale}")
    error = (_wide(x) - _wide(y)).reshape(len(x), -1).square().sum(1)
    return ((error if squared else error.sqrt()) / scale).to(x.dtype)


def r_squared(
    target: torch.Tensor, prediction: torch.Tensor, *, floor: torch.Tensor | float | None = None
) -> float:
    """Share of the target's variation that the prediction explains, pooled over all entries.

    1 − Σ(target − prediction)² / Σ(target − floor)². The default floor is the target's mean over
    axis 0 (per feature: scikit-learn's "variance_weighted"). Give the training mean or the unedited
    features as `floor` to ask what the prediction adds to those. 1 is perfect, 0 no better than the
    floor, negative worse.

    Raises:
        ValueError: shapes differ, or the target equals the floor.

    """
    if target.shape != prediction.shape:
        raise ValueError(
            f"target and prediction differ in shape: {tuple(target.shape)} and "
            f"{tuple(prediction.shape)}"
        )
    wide = _wide(target.detach())
    if floor is None:
        base = wide.mean(0, keepdim=True)
    elif isinstance(floor, torch.Tensor):
        base = _wide(floor.detach())
    else:
        base = torch.tensor(float(floor), dtype=wide.dtype, device=wide.device)
    spread = float((wide - base).square().sum())
    if spread == 0:
        raise ValueError("r_squared is undefined: the target equals its floor everywhere")
    return 1 - float((wide - _wide(prediction.detach())).square().sum()) / spread
