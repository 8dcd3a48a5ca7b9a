r"""Features of pictures and of their edited versions: the pairs that maps are fitted on.

Pictures are edited as they are read, go through the encoder once for each edit, and are forgotten:
nothing is stored, whatever the number of pictures, layers and edits. :func:`stream` gives the pairs
batch by batch; :func:`statistics` and :func:`scores` use them up at once, for all edits and layers
in one pass, and :func:`collect` keeps them, for what needs them all (trained maps, tails).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import extract, map_scores
from .edits import Composite, Edit
from .encoders import Encoder
from .errors import unknown
from .images import ImageSet
from .map_scores import Scores
from .maps import FeatureMap, Origin, Statistics

__all__ = ["FeaturePairs", "collect", "scores", "statistics", "stream"]

#: Edit and layer, by name.
Key = tuple[str, str]


@dataclass(frozen=True)
class FeaturePairs:
    """Features of some pictures at some layers, and of all their edited versions."""

    ids: tuple[str, ...]
    groups: tuple[Any, ...]  #: source groups, to split and bootstrap by
    x: dict[str, Tensor]  #: layer -> (N, C, H, W) or (N, C); class tokens under ``layer/prefix``
    y: dict[Key, Tensor]  #: (edit, layer) -> the same of the edited pictures

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.ids)


def _named(edits: Sequence[Edit | Composite]) -> dict[str, Edit | Composite]:
    named = {edit.name: edit for edit in edits}
    if not named or len(named) < len(edits):
        names = [edit.name for edit in edits]
        raise ValueError(f"edits must be at least one, each once, not {names}")
    return named


def stream(
    encoder: Encoder,
    pictures: ImageSet,
    edits: Sequence[Edit | Composite],
    layers: Sequence[str],
    *,
    size: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[FeaturePairs]:
    """Pairs of features, a batch of pictures at a time, in float32 on the encoder's device.

    Args:
        encoder: a loaded encoder (`extract.optimise` makes it faster).
        pictures: photographs, cropped to squares.
        edits: what is done to them, each once; random ones depend on `seed` and a picture's id.
        layers: dotted names.
        size: side of the pictures in pixels, by default the encoder's.
        batch_size: pictures in memory at a time, with all their edited versions.
        seed: of random edits.
        progress: show a bar.

    Raises:
        ValueError: no pictures, no edits or one twice, layers that cannot be read, a size that the
            encoder does not take.
    """
    named = _named(edits)
    if not len(pictures):
        raise ValueError(f"no pictures in {pictures.name}")
    side = encoder.input_size if size is None else size
    ids = tuple(str(name) for name in pictures.table["id"])
    groups = tuple(pictures.table["group"])

    def batches() -> Iterator[FeaturePairs]:
        start = 0
        with tqdm(total=len(pictures), desc=encoder.name, disable=not progress, leave=False) as bar:
            for plain in pictures.batches(side, batch_size):
                part = slice(start, start + len(plain))
                versions = {
                    name: edit(plain, ids=ids[part], seed=seed) for name, edit in named.items()
                }
                x = _read(encoder, plain, layers)
                y = {
                    (name, layer): value
                    for name, version in versions.items()
                    for layer, value in _read(encoder, version, layers).items()
                }
                yield FeaturePairs(ids[part], groups[part], x, y)
                start = part.stop
                bar.update(len(plain))

    return batches()


def _read(encoder: Encoder, pictures: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    batches = extract.stream(encoder, pictures, layers, batch_size=len(pictures), progress=False)
    return next(batches)


def collect(
    encoder: Encoder,
    pictures: ImageSet,
    edits: Sequence[Edit | Composite],
    layers: Sequence[str],
    **options: Any,
) -> FeaturePairs:
    """All pairs of :func:`stream` (which see for options and errors), on the CPU.

    They take 4 (1 + edits) · pictures · C · H · W bytes for each layer.
    """
    parts = list(stream(encoder, pictures, edits, layers, **options))
    return FeaturePairs(
        ids=tuple(name for part in parts for name in part.ids),
        groups=tuple(group for part in parts for group in part.groups),
        x={key: torch.cat([part.x[key].cpu() for part in parts]) for key in parts[0].x},
        y={key: torch.cat([part.y[key].cpu() for part in parts]) for key in parts[0].y},
    )


def statistics(
    encoder: Encoder,
    pictures: ImageSet,
    edits: Sequence[Edit | Composite],
    layers: Sequence[str],
    *,
    grid_action: bool = True,
    folds: int = 5,
    **options: Any,
) -> dict[Key, Statistics]:
    """Statistics for every edit and layer, in one pass: what closed-form maps are fitted on.

    With `grid_action`, what an edit does to places is done to x first. Pictures of one source group
    share a fold. Options and errors as :func:`stream`.
    """
    named = _named(edits)
    found = {
        (name, layer): Statistics(
            folds=folds,
            grid_action=edit.grid_action if grid_action else None,
            origin=Origin.of(encoder, layer, name),
        )
        for name, edit in named.items()
        for layer in layers
    }
    for batch in stream(encoder, pictures, edits, layers, **options):
        for (name, layer), one in found.items():
            one.update(batch.x[layer], batch.y[name, layer], groups=batch.groups)
    return found


def scores(
    fitted: Mapping[Key, Mapping[str, FeatureMap]],
    encoder: Encoder,
    pictures: ImageSet,
    edits: Sequence[Edit | Composite],
    *,
    floors: Mapping[Key, Tensor] | None = None,
    **options: Any,
) -> dict[Key, dict[str, Scores]]:
    """Scores of maps on other pictures, in one pass: (edit, layer) -> name of the map -> scores.

    Args:
        fitted: maps by edit and layer, and by a name of your own.
        encoder: the encoder they were fitted on.
        pictures: pictures they were not fitted on.
        edits: the edits by whose names they go.
        floors: (C,) what counts as no knowledge, the mean y of training (`map_scores.score`); by
            default the mean of each batch's own, which makes R² depend on the batch size.
        **options: as :func:`stream`.

    Raises:
        ValueError: a map for an edit that is not among `edits`; as :func:`stream`.
    """
    named = _named(edits)
    for name, _ in fitted:
        if name not in named:
            raise unknown("edit", name, list(named))
    layers = list(dict.fromkeys(layer for _, layer in fitted))
    parts: dict[Key, dict[str, list[Scores]]] = {
        key: {name: [] for name in candidates} for key, candidates in fitted.items()
    }
    for batch in stream(encoder, pictures, edits, layers, **options):
        for key, candidates in fitted.items():
            x, y = batch.x[key[1]], batch.y[key]
            floor = None if floors is None else floors[key]
            for name, one in candidates.items():
                parts[key][name].append(map_scores.score(one.apply(x), y, floor=floor))
    return {
        key: {name: Scores.joined(one) for name, one in candidates.items()}
        for key, candidates in parts.items()
    }
