"""Codes of pictures by name: layers of an encoder or descriptors, and changes done to them.

A name is a layer, ``logits``, ``probabilities`` or a descriptor, and after bars what is done to the
code: ``blocks.6|binarise``, ``probabilities|round:2``. :class:`Codes` computes several from one
forward pass; :func:`make` gives a change alone, to be called on codes.

Changes keep a code's shape. Those of §5 of Dosovitskiy & Brox 2016 (binarised codes, dropout,
all but the largest probabilities) are among them; what is random is drawn for each image from the
seed and the code alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import preimage, taps
from .errors import named_value, require_whole, unknown

if TYPE_CHECKING:
    from .encoders import Encoder

__all__ = ["CHANGES", "Change", "Codes", "make"]


# ------------------------------------------------------------------------------------ changes


def _flat(code: Tensor) -> Tensor:
    return code.flatten(1)


def _per_image(values: Tensor, code: Tensor) -> Tensor:
    """(N,) as (N, 1, ...) beside a code."""
    return values.reshape(-1, *[1] * (code.ndim - 1))


def _with_norm_of(changed: Tensor, code: Tensor) -> Tensor:
    """Each image's changed code, as long as the code was (‖·‖₂); an all-zero one stays."""
    before, after = (_flat(x).norm(dim=1) for x in (code, changed))
    return changed * _per_image(before / after.clamp_min(1e-30), code)


def _generators(code: Tensor, seed: int) -> Iterator[torch.Generator]:
    """One for each image, of the seed and its code alone: a batch's other images do not matter."""
    for one in code.detach().float().cpu():
        # torch takes 32 bits of a seed
        content = zlib.crc32(one.contiguous().numpy().tobytes(), seed)
        yield torch.Generator().manual_seed(content)


def _binarise(code: Tensor, _value: float, _population: Tensor, _seed: int) -> Tensor:
    return _with_norm_of(code.sign(), code)


def _quantise(code: Tensor, bits: float, population: Tensor, _seed: int) -> Tensor:
    over = [d for d in range(population.ndim) if d != 1]
    low, high = population.amin(over), population.amax(over)
    shape = (1, -1, *[1] * (code.ndim - 2))
    low, step = low.reshape(shape), ((high - low) / (2**bits - 1)).reshape(shape)
    place = (code - low) / torch.where(step > 0, step, 1)
    return low + step * place.round().clamp(0, 2**bits - 1)


def _dropout(code: Tensor, share: float, _population: Tensor, seed: int) -> Tensor:
    kept = torch.stack([torch.rand(code.shape[1:], generator=g) >= share
                        for g in _generators(code, seed)])  # fmt: skip
    return _with_norm_of(code * kept.to(code), code)


def _dead(code: Tensor, share: float, _population: Tensor, seed: int) -> Tensor:
    channels = code.shape[1]
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    changed = code.clone()
    changed[:, order[: round(share * channels)].to(code.device)] = 0
    return changed


def _noise(code: Tensor, ratio: float, _population: Tensor, seed: int) -> Tensor:
    drawn = torch.stack([torch.randn(code.shape[1:], generator=g)
                         for g in _generators(code, seed)])  # fmt: skip
    return code + ratio * _with_norm_of(drawn.to(code), code)


def _permute(code: Tensor, _value: float, _population: Tensor, seed: int) -> Tensor:
    order = torch.randperm(code.shape[1], generator=torch.Generator().manual_seed(seed))
    return code[:, order.to(code.device)]


def _shuffle(code: Tensor, _value: float, _population: Tensor, seed: int) -> Tensor:
    changed = _flat(code).clone()
    for row, generator in zip(changed, _generators(code, seed), strict=True):
        place = row.nonzero().flatten()
        order = torch.randperm(len(place), generator=generator).to(code.device)
        row[place] = row[place].abs()[order] * row[place].sign()
    return changed.view_as(code)


def _softmax(code: Tensor, _value: float, _population: Tensor, _seed: int) -> Tensor:
    return code.softmax(1)


def _temperature(code: Tensor, value: float, _population: Tensor, _seed: int) -> Tensor:
    return (code.clamp_min(1e-30).log() / value).softmax(1)


def _largest(code: Tensor, count: float) -> Tensor:
    top = code.topk(min(int(count), code.shape[1]), 1).indices
    return torch.zeros_like(code).scatter(1, top, 1.0)


def _top(code: Tensor, count: float, _population: Tensor, _seed: int) -> Tensor:
    return code * _largest(code, count)


def _rest(code: Tensor, count: float, _population: Tensor, _seed: int) -> Tensor:
    return code * (1 - _largest(code, count))


def _round(code: Tensor, decimals: float, _population: Tensor, _seed: int) -> Tensor:
    return (code.double() * 10**decimals).round().div(10**decimals).to(code)


@dataclass(frozen=True)
class _Kind:
    does: Callable[[Tensor, float, Tensor, int], Tensor]
    says: str
    default: float | None = None  # None: it takes no value
    whole: bool = False
    low: float = 0.0
    high: float = math.inf


_KINDS = {
    "binarise": _Kind(_binarise, "the sign of each value times a constant, norm kept"),
    "quantise": _Kind(_quantise, "2^k even steps between a channel's extremes", 4, True, 1, 24),
    "dropout": _Kind(_dropout, "a random share of values to 0, norm kept", 0.5, high=1 - 1e-9),
    "dead": _Kind(_dead, "a share of channels to 0, the same in all images", 0.5, high=1),
    "noise": _Kind(_noise, "Gaussian noise of so many times the code's norm", 1.0),
    "permute": _Kind(_permute, "channels in another order, the same in all images"),
    "shuffle": _Kind(_shuffle, "signs and zeros stay, magnitudes change places"),
    "softmax": _Kind(_softmax, "probabilities of logits"),
    "temperature": _Kind(_temperature, "probabilities p^(1/T), normalised", 2.0, low=1e-6),
    "top": _Kind(_top, "the k largest values, the others 0", 5, True, 1),
    "rest": _Kind(_rest, "all but the k largest values, these 0", 5, True, 1),
    "round": _Kind(_round, "rounded to so many decimals", 2, True, 0, 12),
}

#: What can be done to a code, and in words.
CHANGES = {name: kind.says for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class Change:
    """One change of codes; made by :func:`make`, called on codes (N, C) or (N, C, h, w)."""

    kind: str
    value: float | None

    @property
    def name(self) -> str:
        """As :func:`make` takes it."""
        return self.kind if self.value is None else f"{self.kind}:{self.value:g}"

    def __call__(self, code: Tensor, *, population: Tensor | None = None, seed: int = 0) -> Tensor:
        """The changed code.

        Args:
            code: (N, C) or (N, C, h, w).
            population: codes that `quantise` takes each channel's extremes from; `code` by default.
            seed: of `dropout`, `dead`, `noise`, `permute` and `shuffle`.

        Raises:
            ValueError: probabilities asked of a grid, or a population of other channels.
        """
        if self.kind in ("softmax", "temperature", "top", "rest") and code.ndim != 2:
            raise ValueError(f"{self.name} is for vectors (N, C), not for {tuple(code.shape)}")
        population = code if population is None else population
        if population.ndim != code.ndim or population.shape[1] != code.shape[1]:
            raise ValueError(
                f"population {tuple(population.shape)} is not of the kind of the code "
                f"{tuple(code.shape)}"
            )
        return _KINDS[self.kind].does(code, self.value or 0.0, population, seed)


def make(text: str) -> Change:
    """A change by its name, ``kind`` (at its default value) or ``kind:value``; see `CHANGES`.

    Raises:
        ValueError: an unknown kind, or a value that is missing, not wanted or out of range.
    """
    defaults = {n: kind.default for n, kind in _KINDS.items()}
    name, given = named_value("change of a code", text, defaults)
    kind = _KINDS[name]
    if kind.default is None:
        return Change(name, None)
    try:
        value = float(given)
    except ValueError:
        raise ValueError(f"{text!r}: {given!r} is not a number") from None
    if not kind.low <= value <= kind.high or (kind.whole and value != int(value)):
        what = "a whole number" if kind.whole else "a number"
        raise ValueError(
            f"{name} takes {what} from {kind.low:g} to {kind.high:g}, not {given or value!r}"
        )
    return Change(name, value)


# -------------------------------------------------------------------------------------- codes


class Codes:
    """Named codes of pictures: images (N, 3, H, W) to a dict name -> (N, C, h, w) or (N, C).

    One forward pass of an encoder, as deep as needed, gives all of them; gradients reach the
    images where changes and descriptors let them through. Usable as a matcher of `preimage`.

    Args:
        source: an encoder, or descriptors by name.
        names: layers of the encoder, ``logits``, ``probabilities``, or keys of the descriptors,
            each with changes after bars. Grids of 1 × 1 come as vectors.
        remember: keep the codes of descriptors that have no gradient (sparse SIFT) by the content
            of the picture, as sparse tensors: for training on a fixed pool of crops.

    Raises:
        ValueError: no names, an unknown layer, descriptor or change, logits of a network without
            classifier.
    """

    def __init__(
        self,
        source: Encoder | Mapping[str, Callable[[Tensor], Tensor]],
        names: str | Sequence[str],
        *,
        remember: bool = False,
    ) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        if not self.names:
            raise ValueError("no codes asked for")
        self.source, self.remember = source, remember
        self._known: dict[bytes, Tensor] = {}
        self._parts: dict[str, tuple[str, tuple[Change, ...]]] = {}
        last: str | None = None
        for name in self.names:
            base, *changes = name.split("|")
            if base == "probabilities":
                base, changes = "logits", ["softmax", *changes]
            if base == "logits" and not isinstance(source, Mapping):
                if getattr(source.net, "num_classes", None) == 0:
                    raise ValueError(
                        f"{source.name} has no classifier: no logits, no probabilities"
                    )
                last = last or list(taps.trace(source))[-1]
                base = last
            self._parts[name] = base, tuple(make(change) for change in changes)
        bases = tuple(dict.fromkeys(base for base, _ in self._parts.values()))
        self._taps: preimage.Taps | None = None
        if isinstance(source, Mapping):
            for base in bases:
                if base not in source:
                    raise unknown("descriptor", base, source)
            self._bases = bases
        else:
            self._taps = preimage.Taps(source, bases)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Codes by name."""
        found = self._taps(images) if self._taps else self._described(images)
        codes = {}
        for name, (base, changes) in self._parts.items():
            code = found[base]
            if code.ndim == 4 and code.shape[2:] == (1, 1):
                code = code.flatten(1)
            for change in changes:
                code = change(code)
            codes[name] = code
        return codes

    def _described(self, images: Tensor) -> dict[str, Tensor]:
        assert isinstance(self.source, Mapping)
        found = {}
        for base in self._bases:
            describe = self.source[base]
            if self.remember and not getattr(describe, "differentiable", True):
                found[base] = torch.stack([self._remembered(base, x) for x in images])
            else:
                found[base] = describe(images)
        return found

    def _remembered(self, base: str, image: Tensor) -> Tensor:
        assert isinstance(self.source, Mapping)
        content = base.encode() + image.detach().cpu().contiguous().numpy().tobytes()
        key = hashlib.sha256(content).digest()
        if key not in self._known:
            self._known[key] = self.source[base](image[None])[0].cpu().to_sparse()
        return self._known[key].to_dense().to(image)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Leave the encoder's hooks on for many calls."""
        with self._taps.opened() if self._taps else contextlib.nullcontext():
            yield

    def shapes(self, size: int | tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shape of each code of one image of ``size`` pixels: (C, h, w) or (C,)."""
        height, width = (size, size) if isinstance(size, int) else size
        require_whole("size", height, 1)
        with torch.no_grad():
            # a picture with edges: detectors of keypoints may refuse or find nothing on a flat one
            found = self(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0),
                                    ).to(self.device))  # fmt: skip
        return {name: tuple(code.shape[1:]) for name, code in found.items()}

    @property
    def device(self) -> torch.device:
        """Where the encoder is; descriptors follow their images, and are begun on the CPU."""
        return torch.device("cpu") if isinstance(self.source, Mapping) else self.source.device

    def identity(self, name: str) -> dict[str, Any]:
        """What one code is of: checked before a stored decoder is used for it."""
        if isinstance(self.source, Mapping):
            describe = self.source[self._parts[name][0]]
            return {"source": "descriptors", "weights": repr(describe), "code": name}
        return {"source": self.source.name, "weights": self.source.weight_hash, "code": name}
