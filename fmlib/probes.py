"""Probes of position: can it be read off the features? (Lee, Yang & Wang 2020, experiment 2).

For one object at many positions: a linear support vector machine says in which half of the canvas
the object is, a ridge regression where. A probe is only as honest as the positions it is tried on:
neighbouring positions are near duplicates, so a fold that leaves one of them in the training set
asks for memory, not for position. `blocked` folds hold out whole strips with a margin around them;
`unshuffled` and `shuffled` are the folds of the paper and of custom, to compare.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import config_context
from sklearn.linear_model import Ridge
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor
from tqdm import tqdm

from . import extract, phases, shift
from .encoders import Encoder

__all__ = [
    "AXES",
    "SCHEMES",
    "Regression",
    "StreamedRegression",
    "accuracy",
    "blocked",
    "collect",
    "halves",
    "picture_features",
    "position_accuracy",
    "regress",
    "same_phase",
    "shuffled",
    "smooth_field",
    "standardise",
    "unshuffled",
]

#: What is predicted along axis 0 (y) and axis 1 (x) of a grid's positions.
AXES = ("top/bottom", "left/right")
#: How positions are split into folds.
SCHEMES = ("blocked", "unshuffled", "shuffled")

#: Training and test indices into a grid's positions, one pair for each fold.
Folds = list[tuple[np.ndarray, np.ndarray]]

#: A feature whose spread is a smaller share of its size is constant up to rounding in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Regression:
    """How well the position (y, x) in pixels is predicted where it was held out."""

    r2: float  #: share of the variance of y and x together; 0 is the training positions' mean
    axis_r2: tuple[float, float]  #: of y and of x alone
    error_px: float  #: root mean square distance of predicted and true position
    floor_px: float  #: the same for the training positions' mean
    prediction: Tensor | None  #: (P, 2) float64, each where it was held out; None when streamed


# ------------------------------------------------------------------------------------ what is asked


def _axis(axis: int) -> int:
    if isinstance(axis, bool) or axis not in (0, 1):
        raise ValueError(f"axis must be 0 ({AXES[0]}) or 1 ({AXES[1]}), not {axis!r}")
    return axis


def halves(places: shift.Grid, axis: int) -> np.ndarray:
    """(P,) labels: 0 in the top (axis 0) or left (axis 1) half of the grid, 1 in the other.

    Positions exactly in the middle of a grid with an odd number of lines belong to no half: -1. The
    paper's grids are even.
    """
    at = places.positions[:, _axis(axis)].numpy()
    middle = at.min() + at.max()
    return np.where(2 * at == middle, -1, (2 * at > middle).astype(np.int64))


def same_phase(places: shift.Grid, axis: int, period: int = 32) -> np.ndarray:
    """(P,) mask of positions that a phase alone cannot tell apart.

    A network that samples each `period` px may show the remainder of a position by this period
    (aliasing) and nothing else. On the lines kept here, both halves hold every remainder equally
    often, so that knowing it gives an accuracy of one half and no more. Where there is a choice,
    the lines far from the middle are kept.

    Raises:
        ValueError: a bad axis or period, or no line has a partner in the other half.
    """
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"period must be a whole number of pixels, at least 1, not {period!r}")
    at = places.positions[:, _axis(axis)].numpy()
    lines = np.unique(at)
    half = np.sign(2 * lines - (lines[0] + lines[-1]))
    kept: list[int] = []
    for phase in np.unique(lines % period):
        first = lines[(half < 0) & (lines % period == phase)]
        second = lines[(half > 0) & (lines % period == phase)]
        count = min(len(first), len(second))
        kept += [*first[:count], *second[len(second) - count :]]
    if not kept:
        raise ValueError(
            f"no two positions in different halves are a multiple of {period} px apart: take a "
            f"grid whose stride ({places.stride} px) divides {period} px"
        )
    return np.isin(at, kept)


# -------------------------------------------------------------------------------------------- folds


def _count(folds: int, available: int, what: str) -> int:
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds must be a whole number, at least 2, not {folds!r}")
    if available < folds:
        raise ValueError(f"too few positions for {folds} folds: {available} {what}")
    return folds


def _stratified(labels: np.ndarray, splitter: StratifiedKFold) -> Folds:
    used = np.flatnonzero(labels >= 0)
    found = np.unique(labels[used])
    if len(found) < 2:
        raise ValueError(f"all positions are of one class: {found.tolist()}; a probe needs two")
    smallest = min(int((labels == label).sum()) for label in found)
    _count(splitter.n_splits, smallest, "in the smallest class")
    return [
        (used[train], used[test])
        for train, test in splitter.split(np.zeros(len(used)), labels[used])
    ]


def unshuffled(labels: np.ndarray, folds: int = 5) -> Folds:
    """The paper's folds: scikit-learn's default for a classifier, on positions row by row.

    Each fold takes the next share of each class in the order given. Row by row that is a band of
    rows (for left/right), or one band in each half (for top/bottom), without a gap to the training
    positions on either side.

    Args:
        labels: (P,) classes; positions with -1 are left out.
        folds: number of folds.

    Raises:
        ValueError: one class only, or fewer positions of a class than folds.
    """
    labels = _labels(labels)
    return _stratified(labels, StratifiedKFold(_count(folds, len(labels), "in all")))


def shuffled(labels: np.ndarray, folds: int = 5, *, seed: int = 0) -> Folds:
    """Folds drawn at random within each class: nearly every neighbour is in the training set.

    Arguments and errors as :func:`unshuffled`.
    """
    labels = _labels(labels)
    count = _count(folds, len(labels), "in all")
    return _stratified(labels, StratifiedKFold(count, shuffle=True, random_state=seed))


def _labels(labels: Any) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels are whole numbers (P,), not {array.dtype} {array.shape}")
    return array


def blocked(
    places: shift.Grid,
    axis: int,
    folds: int = 5,
    *,
    margin: float = 16,
    keep: np.ndarray | None = None,
) -> Folds:
    """Folds of whole strips: what is predicted along `axis` is tried where no neighbour was seen.

    The strips run along `axis` and share the other one among them, so that each holds all of what
    is to be predicted (for top/bottom: columns from top to bottom), training and test set alike. In
    training, positions within `margin` px of the strip are left out.

    Args:
        places: the grid.
        axis: 0 to predict y, 1 to predict x.
        folds: number of strips.
        margin: in pixels; the nearest training position is further away than this.
        keep: (P,) mask of positions to use, all by default.

    Raises:
        ValueError: fewer lines than folds, or a margin that leaves a fold nothing to train on.
    """
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin must be a distance in pixels, not negative, not {margin!r}")
    across = places.positions[:, 1 - _axis(axis)].numpy()
    keep = np.ones(len(across), bool) if keep is None else np.asarray(keep, bool)
    if keep.shape != across.shape:
        raise ValueError(f"keep has shape {keep.shape} for {len(across)} positions")
    lines = np.unique(across[keep])
    word = "columns" if axis == 0 else "rows"
    result = []
    for strip in np.array_split(lines, _count(folds, len(lines), word)):
        test = keep & np.isin(across, strip)
        near = (across >= strip[0] - margin) & (across <= strip[-1] + margin)
        train = keep & ~near
        if not train.any():
            raise ValueError(
                f"with a margin of {margin} px nothing is left to train on beside the {word} "
                f"{strip[0]} to {strip[-1]} px: take a smaller margin or more folds"
            )
        result.append((np.flatnonzero(train), np.flatnonzero(test)))
    return result


# ------------------------------------------------------------------------------------------- probes


def _matrix(features: Any, count: int | None = None) -> np.ndarray:
    """Features as a finite float64 matrix (P, D)."""
    if isinstance(features, Tensor):
        features = features.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"features are one row for each position, (P, D), not {array.shape}")
    if len(array) < 2:
        raise ValueError("features of a single position: a probe needs at least two")
    if count is not None and len(array) != count:
        raise ValueError(f"{len(array)} rows of features for {count} positions")
    bad = ~np.isfinite(array)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"features[{row}, {column}] is {array[row, column]}, not a finite number")
    return array


def _scale(mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which features vary by more than rounding, and their standard deviations."""
    spread = np.sqrt(variance)
    return spread > _ROUNDING * np.sqrt(mean**2 + variance), spread


def standardise(features: Any) -> np.ndarray:
    """Features (P, D) with mean 0 and variance 1, rotated into at most P dimensions.

    A penalty such as C = 1 means nothing without a scale, and layers differ by orders of magnitude.
    Mean and variance are those of all positions, held out or not; they know no labels. A feature
    that varies by less than float32 rounds is left out: blown up to variance 1, rounding can spell
    out the position. Rotating changes no linear probe with a quadratic penalty.

    Returns:
        (P, K) float64 with K of at most P and D; (P, 1) zeros if no feature varies.

    Raises:
        ValueError: not (P, D), a single position, or a value that is not finite (named).
    """
    array = _matrix(features)
    mean = array.mean(0)
    centred = array - mean
    varies, spread = _scale(mean, np.square(centred).mean(0))
    if not varies.any():
        return np.zeros((len(array), 1))
    scaled = centred[:, varies] / spread[varies]
    # X' = QR gives X = R'Q': the rows of R' are X in an orthonormal basis of its own rows.
    return (
        np.asarray(np.linalg.qr(scaled.T, mode="r")).T if scaled.shape[1] > len(scaled) else scaled
    )


def accuracy(features: Any, labels: Any, folds: Folds, *, C: float = 1.0, seed: int = 0) -> float:
    """Accuracy of a linear support vector machine, the mean over folds.

    Args:
        features: (P, D), as they are (see :func:`standardise`).
        labels: (P,) classes.
        folds: pairs of training and test indices.
        C: inverse of the penalty, 1 in the paper.
        seed: the solver's order of samples.

    Raises:
        ValueError: features that are not finite, C not above 0, a fold whose training set is of one
            class.
    """
    labels = _labels(labels)
    array = _matrix(features, len(labels))
    if not 0 < C < np.inf:
        raise ValueError(f"C must be a positive number, not {C!r}")
    for k, (train, _) in enumerate(folds):
        found = np.unique(labels[train]).tolist()
        if len(found) < 2:
            raise ValueError(f"the training set of fold {k} is of one class: {found}")
    machine = LinearSVC(C=C, random_state=seed, max_iter=20_000)
    # What cross_val_score does; its checks, made here already, take longer than these small fits.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        scores = []
        for train, test in folds:
            guess = machine.fit(array[train], labels[train]).predict(array[test])
            scores.append((guess == labels[test]).mean())
    return float(np.mean(scores))


def position_accuracy(
    features: Any,
    places: shift.Grid,
    *,
    scheme: str = "blocked",
    folds: int = 5,
    margin: float = 16,
    period: int | None = None,
    permute: bool = False,
    C: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Accuracy of telling top from bottom and left from right, for one object: (2,) float64.

    Args:
        features: (P, D) of one object at the grid's positions, as :func:`standardise` gives them.
        places: the grid.
        scheme: of `SCHEMES`: "blocked" (strips with a margin), "unshuffled" (the paper's folds) or
            "shuffled" (at random).
        folds: number of folds, 5 in the paper.
        margin: of blocked folds, in pixels.
        period: use only positions whose phase by this period tells nothing (:func:`same_phase`).
        permute: permute the labels along each line of what is predicted: a floor.
        C: as :func:`accuracy`.
        seed: shuffles, permutation and solver.

    Raises:
        ValueError: as :func:`accuracy` and the functions that make folds; an unknown scheme.
    """
    if scheme not in SCHEMES:
        close = difflib.get_close_matches(str(scheme), SCHEMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown scheme {scheme!r}: {', '.join(SCHEMES)}{hint}")
    array = _matrix(features, len(places.positions))
    result = []
    for axis in (0, 1):
        labels = halves(places, axis)
        if period is not None:
            labels = np.where(same_phase(places, axis, period), labels, -1)
        if permute:
            # Within each line, so that every strip keeps as many of either class.
            rng = np.random.default_rng([seed, axis])
            across = places.positions[:, 1 - axis].numpy()
            for line in np.unique(across):
                used = np.flatnonzero((across == line) & (labels >= 0))
                labels[used] = labels[rng.permutation(used)]
        if scheme == "blocked":
            split = blocked(places, axis, folds, margin=margin, keep=labels >= 0)
        elif scheme == "unshuffled":
            split = unshuffled(labels, folds)
        else:
            split = shuffled(labels, folds, seed=seed)
        result.append(accuracy(array, labels, split, C=C, seed=seed))
    return np.array(result)


def _penalty(ridge: float) -> float:
    if not 0 < ridge < np.inf:
        raise ValueError(f"ridge must be a positive number, not {ridge!r}")
    return ridge


def _summary(
    errors: Sequence[float], floors: Sequence[float], count: int, prediction: Tensor | None
) -> Regression:
    """From the sums of squared errors of y and x, over `count` positions."""
    return Regression(
        r2=1 - sum(errors) / sum(floors),
        axis_r2=(1 - errors[0] / floors[0], 1 - errors[1] / floors[1]),
        error_px=float(np.sqrt(sum(errors) / count)),
        floor_px=float(np.sqrt(sum(floors) / count)),
        prediction=prediction,
    )


def regress(
    features: Any,
    places: shift.Grid,
    *,
    folds: int = 5,
    margin: float = 16,
    ridge: float = 0.1,
) -> Regression:
    """Predict the position in pixels by ridge regression, under blocked folds.

    Each coordinate has its own strips (:func:`blocked`), which hold it in full.

    Args:
        features: (P, D) of one object at the grid's positions, as :func:`standardise` gives them.
        places: the grid.
        folds: number of strips.
        margin: in pixels.
        ridge: the penalty in units of the mean squared length of the centred features, so that it
            depends neither on their scale nor on their number.

    Raises:
        ValueError: as :func:`blocked`, or features that are not finite.
    """
    array = _matrix(features, len(places.positions))
    _penalty(ridge)
    length = float(np.square(array - array.mean(0)).sum(1).mean())
    model = Ridge(alpha=ridge * (length or 1.0))
    truth = places.positions.numpy().astype(np.float64)
    prediction = np.empty_like(truth)
    errors, floors = np.zeros(2), np.zeros(2)
    for axis in (0, 1):
        for train, test in blocked(places, axis, folds, margin=margin):
            target = truth[train, axis]
            guess = model.fit(array[train], target).predict(array[test])
            prediction[test, axis] = guess
            errors[axis] += np.square(guess - truth[test, axis]).sum()
            floors[axis] += np.square(target.mean() - truth[test, axis]).sum()
    return _summary(errors.tolist(), floors.tolist(), len(truth), torch.from_numpy(prediction))


# ---------------------------------------------------------------------------------------- streaming


class _Moments:
    """Sums over samples that a least-squares fit or its error needs, in float64."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.x, self.y, self.yy = np.zeros(width), 0.0, 0.0
        self.xx, self.xy = np.zeros((width, width)), np.zeros(width)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        self.n += len(x)
        self.x += x.sum(0)
        self.y += float(y.sum())
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y @ y)

    def fit(self, active: np.ndarray, spread: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
        """Slopes and intercept of the ridge fit on features divided by `spread`."""
        slopes = np.zeros(len(self.x))
        mean, level = self.x / self.n, self.y / self.n
        if active.any():
            scale = spread[active]
            gram = self.xx[np.ix_(active, active)] - self.n * np.outer(mean[active], mean[active])
            cross = self.xy[active] - self.n * mean[active] * level
            gram = gram / np.outer(scale, scale) + alpha * np.eye(len(scale))
            slopes[active] = np.linalg.solve(gram, cross / scale) / scale
        return slopes, level - float(mean @ slopes)

    def error(self, slopes: np.ndarray, intercept: float) -> float:
        """Sum of squared errors of a linear prediction of these samples."""
        quadratic = slopes @ self.xx @ slopes + 2 * intercept * (slopes @ self.x)
        cross = slopes @ self.xy + intercept * self.y
        return float(self.yy - 2 * cross + quadratic + self.n * intercept**2)


class StreamedRegression:
    """`regress(standardise(features))` without keeping any features.

    For grids of many positions: memory is 4·folds matrices D×D, whatever the number of positions.
    Give it the batches that :func:`shift.features` yields, then ask for the `result`.
    """

    def __init__(
        self, places: shift.Grid, *, folds: int = 5, margin: float = 16, ridge: float = 0.1
    ) -> None:
        self._places, self._ridge = places, _penalty(ridge)
        count = len(places.positions)
        #: (axis, fold, 0 for training or 1 for test, position)
        self._member = np.zeros((2, folds, 2, count), bool)
        for axis in (0, 1):
            for k, pair in enumerate(blocked(places, axis, folds, margin=margin)):
                for part, index in enumerate(pair):
                    self._member[axis, k, part, index] = True
        self._seen = np.zeros(count, bool)
        self._origin: np.ndarray | None = None
        self._sums: dict[tuple[int, int, int], _Moments] = {}

    def update(self, index: Tensor, features: Tensor) -> None:
        """Take the features (B, D) of the positions with these indices (B,).

        Raises:
            ValueError: a position that came before, another width, or a value that is not finite.
        """
        at = index.cpu().numpy()
        x = features.detach().to("cpu", torch.float64).numpy()
        if x.ndim != 2 or len(x) != len(at):
            raise ValueError(f"features are ({len(at)}, D) for {len(at)} indices, not {x.shape}")
        if not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0, 0])
            raise ValueError(f"the features of position {at[row]} are not finite")
        if self._seen[at].any() or len(np.unique(at)) < len(at):
            raise ValueError("a position came twice")
        origin = self._origin
        if origin is None:
            # Sums of squares about a typical vector, not about zero, keep their digits.
            origin = self._origin = x.mean(0)
            keys = np.ndindex(2, len(self._member[0]), 2)
            self._sums = {key: _Moments(x.shape[1]) for key in keys}
        if x.shape[1] != len(origin):
            raise ValueError(f"features of width {x.shape[1]} after {len(origin)}")
        x = x - origin
        self._seen[at] = True
        y = self._places.positions[index.cpu()].numpy().astype(np.float64)
        for (axis, k, part), sums in self._sums.items():
            mine = self._member[axis, k, part, at]
            if mine.any():
                sums.add(x[mine], y[mine, axis])

    def result(self) -> Regression:
        """The regression over all positions; without their predictions, which are not kept.

        Raises:
            ValueError: positions are missing.
        """
        if self._origin is None or not self._seen.all():
            missing = int((~self._seen).sum())
            raise ValueError(f"{missing} of {len(self._seen)} positions have not come yet")
        # The test strips of either axis hold every position once.
        tests = [sums for (axis, _, part), sums in self._sums.items() if (axis, part) == (0, 1)]
        n = len(self._seen)
        mean = sum((sums.x for sums in tests), np.zeros(len(self._origin))) / n
        square = sum((np.diagonal(sums.xx) for sums in tests), np.zeros(len(self._origin))) / n
        variance = np.maximum(square - mean**2, 0)
        active, spread = _scale(self._origin + mean, variance)
        alpha = self._ridge * max(int(active.sum()), 1)
        errors, floors = np.zeros(2), np.zeros(2)
        for axis, k in np.ndindex(2, len(self._member[0])):
            train, test = self._sums[axis, k, 0], self._sums[axis, k, 1]
            errors[axis] += test.error(*train.fit(active, spread, alpha))
            floors[axis] += test.error(np.zeros_like(mean), train.y / train.n)
        return _summary(errors.tolist(), floors.tolist(), n, None)


# ------------------------------------------------------------------------ where from, and floors


def collect(
    encoder: Encoder,
    objects: Any,
    layers: Sequence[str],
    places: shift.Grid,
    *,
    background: str | float | Sequence[float] | Tensor = "white",
    pool: shift.Pool = "mean",
    batch_size: int | None = None,
    optimise: bool = True,
    share: bool | None = None,
    progress: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The features of one object after another at all positions of a grid.

    Memory is that of one object: for each layer P·D numbers, so pool maps over space ("mean") where
    there are many positions.

    Yields:
        for each object its features, layer -> (P, D) float32 on the CPU.

    Args:
        encoder: where the pictures go.
        objects: an `ImageSet` of RGBA cut-outs, or a sequence of tensors (4, h, w).
        layers: dotted layer names.
        places: the grid; it knows the canvas and the size of the objects.
        background: see :func:`shift.paint`.
        pool: see :func:`shift.features`.
        batch_size: positions per forward pass; chosen for the device by default.
        optimise: run a faster copy of the encoder (:func:`extract.optimise`).
        share: compute early layers once per stride phase (:mod:`phases`) if the background is one
            colour; by default on a CPU only.
        progress: show a bar over all positions of all objects.

    Raises:
        ValueError: a bad object (named), background, layer or pool; none of either.
    """
    if isinstance(layers, str) or not len(layers):
        raise ValueError(f"layers is a list of at least one name, not {layers!r}")
    if not len(objects):
        raise ValueError("no objects to move")
    layers = list(dict.fromkeys(layers))
    fast = extract.optimise(encoder, keep=layers) if optimise else encoder
    ground = shift.paint(background, places.canvas)
    chain = None
    if fast.device.type == "cpu" if share is None else share:
        chain = _chain(fast, layers, places, ground)
    table = getattr(objects, "table", None)
    with tqdm(
        total=len(objects) * len(places.positions), unit="pos", disable=not progress, leave=False
    ) as bar:
        for i in range(len(objects)):
            try:
                obj = shift.prepare(objects[i], places.size)
            except ValueError as error:
                name = f"object {i}" if table is None else f"object {table['id'].iloc[i]!r}"
                raise ValueError(f"{name}: {error}") from error
            found: dict[str, Tensor] = {}
            for index, vectors in shift.features(
                fast, obj, places.positions, layers, canvas=places.canvas, background=ground,
                pool=pool, batch_size=batch_size, chain=chain,
            ):  # fmt: skip
                for layer, vector in vectors.items():
                    if layer not in found:
                        found[layer] = torch.empty(len(places.positions), vector.shape[1])
                    found[layer][index] = vector.float().cpu()
                bar.update(len(index))
            yield found


def _chain(
    encoder: Encoder, layers: Sequence[str], places: shift.Grid, ground: Tensor
) -> phases.Chain | None:
    if bool((ground != ground[:, :1, :1]).any()):
        return None
    stages = phases.plan(
        encoder, layers, places.positions, size=(places.size, places.size), canvas=places.canvas
    )
    empty = ground[None].to(encoder.device)
    return phases.Chain(encoder, layers, stages, empty=empty) if stages else None


def picture_features(
    obj: Tensor,
    places: shift.Grid,
    *,
    background: str | float | Sequence[float] | Tensor = "white",
    cells: int = 1,
    batch_size: int = 64,
) -> Tensor:
    """Mean colours of the pictures over cells×cells fields of the canvas: (P, 3·cells²) float64.

    The floor and the ceiling of what a probe can find. With one cell all positions have the same
    mean colour, since the whole object is always on the canvas; with many, where the object is can
    be seen directly.

    Raises:
        ValueError: a bad object or background, or fewer than one cell.
    """
    if isinstance(cells, bool) or not isinstance(cells, int) or not 1 <= cells <= places.canvas:
        raise ValueError(f"cells must be a whole number from 1 to {places.canvas}, not {cells!r}")
    small = shift.prepare(obj, places.size)
    return torch.cat(
        [
            F.adaptive_avg_pool2d(
                shift.compose(small, part, canvas=places.canvas, background=background).double(),
                cells,
            ).flatten(1)
            for part in places.positions.split(batch_size)
        ]
    )


def smooth_field(places: shift.Grid, width: int, *, length: float, seed: int = 0) -> Tensor:
    """Features that are alike at neighbouring positions and know nothing of position: (P, width).

    Independent Gaussian fields over the canvas with correlation exp(-d²/2·length²) at a distance of
    d px. Whatever accuracy a probe reaches on them is a leak.

    Raises:
        ValueError: width below 1, or a length that is not positive.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a whole number, at least 1, not {width!r}")
    if not 0 < length < np.inf:
        raise ValueError(f"length must be a positive number of pixels, not {length!r}")
    line = np.array(places.offsets, float)
    correlation = np.exp(-np.square(line[:, None] - line) / (2 * length**2))
    # A square root by eigenvalues: long lengths make the matrix singular to rounding.
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(values.clip(0))
    noise = np.random.default_rng(seed).standard_normal((len(line), len(line), width))
    field = np.einsum("ri,cj,ijw->rcw", root, root, noise, optimize=True)
    return torch.from_numpy(field.reshape(-1, width))
