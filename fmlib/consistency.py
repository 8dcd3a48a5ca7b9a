"""Whether a prediction stays when the picture moves: Zhang's (2019) classification consistency.

A picture is shown twice, at two random places, and the consistency is the share of pairs that get
the same top-1 class. Places depend on the seed and the image alone, so that networks are compared
on the very same pictures and a difference can be taken image by image.

A network that is more accurate, or surer, is more consistent without being more invariant: its
decisions lie farther from a boundary. :func:`alike` and :func:`matched` compare two networks where
they decide alike, or are equally sure.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import extract, images, stats, taps
from .encoders import Encoder

__all__ = [
    "Alike",
    "Matched",
    "Pairs",
    "Track",
    "agreement",
    "alike",
    "diagonal",
    "matched",
    "pairs",
    "steps_kept",
]

Protocol = Literal["crop", "circular"]


@dataclass(frozen=True)
class Pairs:
    """What one network makes of K pairs of shifted pictures of each of N images."""

    top1: Tensor  #: (N, K, 2) int64 class with the largest output
    margin: Tensor  #: (N, K, 2) float64 largest minus second largest probability
    change: dict[str, Tensor]  #: layer -> (N, K) float64, 1 - cosine of the two pooled features
    offsets: Tensor  #: (N, K, 2, 2) int64 places (y, x), px
    protocol: str  #: "crop" or "circular"


@dataclass(frozen=True)
class Track:
    """What one network makes of N images at S places, a pixel apart along the diagonal."""

    top1: Tensor  #: (N, S) int64
    probability: Tensor  #: (N, S) float64 of the class that is top-1 at the first place
    protocol: str


@dataclass(frozen=True)
class Alike:
    """Consistency of two networks on the pictures that they name alike; M images have any."""

    first: Tensor  #: (M,) float64 share of those that keep their class, first network
    second: Tensor  #: (M,) second network
    index: Tensor  #: (M,) int64 which images
    share: float  #: of all pictures that are named alike


@dataclass(frozen=True)
class Matched:
    """Consistency of two networks at equal margins, in B bins of the margin."""

    difference: stats.Interval  #: first minus second, bins weighted by both networks' pictures
    edges: Tensor  #: (B + 1,) float64 margins
    first: Tensor  #: (B,) consistency by bin, NaN in an empty one
    second: Tensor  #: (B,)
    overlap: float  #: share of all pictures that lie in bins which both networks reach


# ---------------------------------------------------------------------------------------- pictures


def _number(name: str, value: Any, least: int, unit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of {unit}, at least {least}: {value!r}")
    return value


def _ids(pictures: Any) -> list[str]:
    table = getattr(pictures, "table", None)
    return [str(i) for i in (range(len(pictures)) if table is None else table["id"])]


def _square(x: Tensor, name: str, picture: int | None, least: int) -> Tensor:
    """An image as it is shifted: its shorter side resized, then the central square."""
    if x.ndim != 3 or x.shape[0] not in (3, 4):
        raise ValueError(f"image {name!r} is {tuple(x.shape)}, not a picture (3, H, W)")
    if x.shape[0] == 4:
        x = x[:3] * x[3:] + (1 - x[3:])
    if picture is not None:
        x = images.resize(x, picture)
    side = min(x.shape[1:])
    if side < least:
        raise ValueError(
            f"image {name!r} is {x.shape[1]}×{x.shape[2]} px: crops that move over so many pixels"
            f" need {least}; take smaller crops, a smaller reach, or let `picture` enlarge it"
        )
    return images.center_crop(x, side)


def _show(protocol: str, x: Tensor, at: Sequence[int], crop: int, room: int) -> Tensor:
    """The picture at a place: a window of the image, or the central window turned about."""
    if protocol == "crop":
        return x[:, at[0] : at[0] + crop, at[1] : at[1] + crop]
    middle = x[:, room // 2 : room // 2 + crop, room // 2 : room // 2 + crop]
    return torch.roll(middle, (int(at[0]), int(at[1])), (1, 2))


def _protocol(protocol: str, crop: Any, picture: Any, reach: Any) -> int:
    """The side an image must have, all options checked."""
    if protocol not in ("crop", "circular"):
        raise ValueError(f"protocol must be 'crop' or 'circular', not {protocol!r}")
    _number("crop", crop, 1, "pixels")
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 2:
        raise ValueError(
            f"reach is the number of offsets along an axis: with fewer than 2 nothing moves, "
            f"not {reach!r}"
        )
    least = crop + reach - 1 if protocol == "crop" else crop
    if protocol == "circular" and reach > crop:
        raise ValueError(f"a circular shift by up to {reach - 1} px goes round a picture of {crop}")
    if picture is not None and _number("picture", picture, 1, "pixels") < least:
        raise ValueError(
            f"crops of {crop} px with offsets up to {reach - 1} px do not fit into a picture of "
            f"{picture} px: picture must be at least {least}"
        )
    return least


def _offsets(name: str, count: int, reach: int, seed: int) -> Tensor:
    """(count, 2, 2) places of one image; fewer pairs are the first of more."""
    text = hashlib.sha256(repr(("pairs", seed, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))
    return torch.stack([torch.randint(reach, (2, 2), generator=generator) for _ in range(count)])


# ---------------------------------------------------------------------------------------- networks


def _predictions(logits: Tensor, encoder: Encoder, unnamed: bool) -> Tensor:
    """Probabilities (B, K) in float64."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{encoder.name} gives {tuple(logits.shape)}: a top-1 class needs (N, K) with K > 1"
        )
    if encoder.classes is None and not unnamed:
        raise ValueError(
            f"{encoder.name} names no classes: its outputs are features, and the largest of them "
            "is no prediction. For a network whose outputs are classes without names, as one of "
            "random weights, say unnamed=True"
        )
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    return logits.double().softmax(1)


def _ready(encoder: Encoder, layers: Sequence[str], optimise: bool) -> tuple[Encoder, list[str]]:
    if isinstance(layers, str):
        raise ValueError(f"layers is a list of names, not the single string {layers!r}")
    names = list(dict.fromkeys(layers))
    if names:
        with taps.read(encoder, names):  # an unknown layer is named here, with its closest
            pass
    return extract.optimise(encoder, keep=names) if optimise else encoder, names


def _batches(pieces: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) == size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def _batch_size(batch_size: int | None, device: torch.device) -> int:
    if batch_size is None:
        return 8 if device.type == "cpu" else 128
    return _number("batch_size", batch_size, 1, "pictures")


def _vectors(maps: Tensor) -> Tensor:
    maps = maps.float()
    maps = maps if maps.ndim == 2 else maps.mean(dim=tuple(range(2, maps.ndim)))
    maps = maps.cpu() if maps.device.type == "mps" else maps
    return maps.double()


def _output(encoder: Encoder, image: Tensor) -> str | None:
    """The layer that holds the network's output, if there is one: then one pass gives all."""
    name = list(taps.trace(encoder, size=(image.shape[2], image.shape[3])))[-1]
    found, expected = taps.features(encoder, image, [name])[name], encoder(image)
    found = found.flatten(1)
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    return name if same else None


def _outputs(
    encoder: Encoder, batch: Tensor, names: Sequence[str], output: str | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, K), and for each layer its features (B, D) averaged over space."""
    if not names:
        return encoder(batch), {}
    wanted = list(dict.fromkeys([*names, output] if output else names))
    with taps.read(encoder, wanted) as read:
        maps = read(batch)
    logits = maps[output].flatten(1) if output else encoder(batch)
    return logits, {name: _vectors(maps[name]) for name in names}


@torch.no_grad()
def pairs(
    encoder: Encoder,
    pictures: Any,
    *,
    protocol: Protocol = "crop",
    crop: int = 224,
    picture: int | None = 256,
    reach: int = 32,
    count: int = 3,
    layers: Sequence[str] = (),
    seed: int = 0,
    unnamed: bool = False,
    batch_size: int | None = None,
    optimise: bool = True,
    progress: bool = False,
) -> Pairs:
    """Predictions for random pairs of shifted pictures (Zhang 2019, §4.1 and supplement).

    Args:
        encoder: a classifier.
        pictures: an `ImageSet`, or a sequence of tensors (3, H, W) in [0, 1].
        protocol: "crop": windows of the image at two places, Zhang's; what enters on one side is
            new. "circular": the central window, turned about by two shifts (Chaman & Dokmanić
            2021, §4): nothing enters, but an edge runs through the picture.
        crop: side of what the network sees, px.
        picture: side to which the shorter side of the image is resized first, px; None not at all.
        reach: number of offsets along each axis: they are 0 to `reach` - 1 px. Zhang's 32 of a
            picture of 256 px. Two offsets may be equal.
        count: pairs of each image.
        layers: dotted names of layers whose change is wanted too; maps are averaged over space.
        seed: of the offsets, which depend on it and the image's id alone.
        unnamed: take the largest output of an encoder whose outputs have no names.
        batch_size: pairs per forward pass; chosen for the device by default.
        optimise: run a faster copy of the encoder (:func:`extract.optimise`).
        progress: show a bar.

    Raises:
        ValueError: no images, an image or a picture too small for crop and reach, a reach below 2,
            an encoder without classes, an unknown layer or protocol.
    """
    least = _protocol(protocol, crop, picture, reach)
    _number("count", count, 1, "pairs")
    if not len(pictures):
        raise ValueError("no images to shift")
    fast, names = _ready(encoder, layers, optimise)
    ids = _ids(pictures)
    offsets = torch.stack([_offsets(name, count, reach, seed) for name in ids])

    def shown() -> Iterator[Tensor]:
        for i, name in enumerate(ids):
            x = _square(pictures[i], name, picture, least)
            room = x.shape[1] - crop
            for pair in offsets[i].tolist():
                yield torch.stack([_show(protocol, x, at, crop, room) for at in pair])

    top1: list[Tensor] = []
    margin: list[Tensor] = []
    output: str | None = None
    change: dict[str, list[Tensor]] = {layer: [] for layer in names}
    size = _batch_size(batch_size, fast.device)
    with tqdm(total=len(ids) * count, unit="pair", disable=not progress, leave=False) as bar:
        for batch in _batches(shown(), size):
            flat = batch.flatten(0, 1).to(fast.device)
            if names and output is None and not top1:
                output = _output(fast, flat[:1])
            logits, maps = _outputs(fast, flat, names, output)
            best = _predictions(logits, encoder, unnamed).topk(2, 1)
            top1.append(best.indices[:, 0].cpu())
            margin.append((best.values[:, 0] - best.values[:, 1]).cpu())
            for layer, values in maps.items():
                unit = F.normalize(values, dim=1).unflatten(0, (-1, 2))
                cosine = (unit[:, 0] * unit[:, 1]).sum(1).clamp(-1, 1)
                change[layer].append((1 - cosine).cpu())
            bar.update(len(batch))
    shape = len(ids), count
    return Pairs(
        torch.cat(top1).reshape(*shape, 2),
        torch.cat(margin).reshape(*shape, 2),
        {layer: torch.cat(parts).reshape(shape) for layer, parts in change.items()},
        offsets,
        protocol,
    )


@torch.no_grad()
def diagonal(
    encoder: Encoder,
    pictures: Any,
    *,
    protocol: Protocol = "crop",
    crop: int = 224,
    picture: int | None = 256,
    steps: int = 32,
    unnamed: bool = False,
    batch_size: int | None = None,
    optimise: bool = True,
    progress: bool = False,
) -> Track:
    """Predictions along a diagonal of `steps` single-pixel shifts, `steps` + 1 places.

    The path of Zhang (2019), Fig. 1 (right) and of Azulay & Weiss (2019), Fig. 1. Arguments and
    errors as :func:`pairs`.
    """
    _number("steps", steps, 1, "pixels")
    least = _protocol(protocol, crop, picture, steps + 1)
    if not len(pictures):
        raise ValueError("no images to shift")
    fast, _ = _ready(encoder, (), optimise)
    ids = _ids(pictures)

    def shown() -> Iterator[Tensor]:
        for i, name in enumerate(ids):
            x = _square(pictures[i], name, picture, least)
            for at in range(steps + 1):
                yield _show(protocol, x, (at, at), crop, x.shape[1] - crop)

    size = 2 * _batch_size(batch_size, fast.device)
    total = len(ids) * (steps + 1)
    top1, first = [], torch.empty(0, dtype=torch.int64)
    probability: list[Tensor] = []
    with tqdm(total=total, unit="place", disable=not progress, leave=False) as bar:
        done = 0
        for batch in _batches(shown(), size):
            found = _predictions(fast(batch.to(fast.device)), encoder, unnamed).cpu()
            best = found.argmax(1)
            place = torch.arange(done, done + len(batch))
            first = torch.cat([first, best[place % (steps + 1) == 0]])
            probability.append(found[torch.arange(len(batch)), first[place // (steps + 1)]])
            top1.append(best)
            done += len(batch)
            bar.update(len(batch))
    shape = len(ids), steps + 1
    return Track(torch.cat(top1).reshape(shape), torch.cat(probability).reshape(shape), protocol)


# ---------------------------------------------------------------------------------------- measures


def agreement(found: Pairs) -> Tensor:
    """(N,) float64 share of each image's pairs that have one top-1 class: Zhang's consistency."""
    return _same(found).mean(1)


def steps_kept(found: Track) -> Tensor:
    """(N,) float64 share of each image's single-pixel steps that keep the top-1 class."""
    return (found.top1.diff(dim=1) == 0).double().mean(1)


def _same(found: Pairs) -> Tensor:
    return (found.top1[..., 0] == found.top1[..., 1]).double()


def _comparable(a: Pairs, b: Pairs) -> None:
    if a.protocol != b.protocol or not torch.equal(a.offsets, b.offsets):
        raise ValueError(
            "the two networks did not see the same pictures: use one set of images, protocol, "
            "reach, count and seed"
        )


def alike(a: Pairs, b: Pairs, *, labels: Any = None) -> Alike:
    """Consistency of two networks on pictures that both name alike, or with `labels` rightly.

    Of each pair either member may be the picture that is named; the other says whether the name is
    kept. Where the two decide alike, neither can owe its consistency to more right answers.

    Args:
        a: of the first network.
        b: of the second, on the same pictures.
        labels: (N,) true classes of the images; without them any common class will do.

    Raises:
        ValueError: other pictures, labels of another number, or no picture named alike.
    """
    _comparable(a, b)
    common = a.top1 == b.top1
    if labels is not None:
        truth = torch.as_tensor(labels)
        if truth.shape != (len(a.top1),):
            raise ValueError(f"labels of shape {tuple(truth.shape)} for {len(a.top1)} images")
        common &= a.top1 == truth[:, None, None]
    weight = common.double().sum(2)
    total = weight.sum(1)
    index = (total > 0).nonzero()[:, 0]
    if not len(index):
        raise ValueError("the two networks name no picture alike")
    shares = [((_same(x) * weight).sum(1) / total)[index] for x in (a, b)]
    return Alike(shares[0], shares[1], index, float(common.double().mean()))


def _matched_difference(rows: np.ndarray, bins: int) -> float:
    """Of counts (N, 4·B): pictures and kept ones of the first network, then of the second."""
    count_a, kept_a, count_b, kept_b = rows.sum(0).reshape(4, bins)
    both = (count_a > 0) & (count_b > 0)
    weight = (count_a + count_b)[both]
    gap = kept_a[both] / count_a[both] - kept_b[both] / count_b[both]
    return float((weight * gap).sum() / weight.sum()) if both.any() else 0.0


def matched(
    a: Pairs,
    b: Pairs,
    *,
    bins: int = 5,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Matched:
    """Consistency of two networks at equal margins: what is left when neither is the surer.

    Pictures are sorted by their margin (largest minus second probability) into bins of about as
    many pictures of both networks together; within each the consistencies are compared, and the
    differences averaged with the bins' shares of all pictures (direct standardisation). Needs no
    labels. Bins that one network never reaches are left out, see `overlap`. A margin is only as
    good as the network's calibration: two networks of one margin need not be right equally often.

    Args:
        a: of the first network.
        b: of the second, on the same pictures.
        bins: number of bins of the margin.
        groups: source group of each image, for the interval.
        level: nominal coverage of the interval.
        n_resamples: of the bootstrap over images.
        seed: of the bootstrap.

    Raises:
        ValueError: other pictures, or `bins` below 1.
    """
    _comparable(a, b)
    _number("bins", bins, 1, "bins")
    margins = torch.cat([a.margin.flatten(), b.margin.flatten()])
    edges = torch.quantile(margins, torch.linspace(0, 1, bins + 1, dtype=torch.float64))
    columns = []
    for found in (a, b):
        place = torch.bucketize(found.margin.contiguous(), edges[1:-1].contiguous(), right=True)
        member = F.one_hot(place, bins).double()  # (N, K, 2, B)
        kept = member * _same(found)[:, :, None, None]
        columns += [member.sum((1, 2)), kept.sum((1, 2))]
    rows = torch.cat(columns, 1)
    statistic: Callable[[np.ndarray], Any] = functools.partial(_matched_difference, bins=bins)
    difference = stats.bootstrap(
        rows, groups=groups, statistic=statistic, level=level, n_resamples=n_resamples, seed=seed
    )
    count_a, kept_a, count_b, kept_b = rows.sum(0).reshape(4, bins)
    both = (count_a > 0) & (count_b > 0)
    total = (count_a + count_b).sum()
    return Matched(
        difference,
        edges,
        kept_a / count_a,
        kept_b / count_b,
        float((count_a + count_b)[both].sum() / total),
    )
