"""Edits of pictures: what is done to an image before its features are compared or mapped.

An :class:`Edit` is a kind and one value, written ``kind:value`` (``rotation:90``, ``hue:60``). It
is applied to whole batches on their device, and says which pixels it touches, what undoes it and,
for geometric edits, what it does to the grid of a feature map. What is random depends on the seed
and an image's own id, never on the batch it comes in. Values follow Krey, Neukirch & Strodthoff
(2026) where they give one; :func:`catalogue` lists all kinds.

Edits that mean something are made in two further ways: :func:`object_scenes` puts cut-outs into
photographs, with exact ground truth, and :func:`edited_folder` reads pairs that an editor has left.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as transforms
from PIL import Image
from torch import Tensor

from . import images as image_sets
from . import shift
from .grids import Action, GridAction
from .images import ImageSet

__all__ = [
    "OBJECT_EDITS",
    "Edit",
    "EditedFolder",
    "Pairs",
    "catalogue",
    "edited_folder",
    "make",
    "object_scenes",
]

Value = float | str
Random = Callable[[int], torch.Generator]

#: Rectangles of Krey et al. (2026) on a picture of 288 px: first and last row and column, colour.
MASKS: dict[str, tuple[int, int, tuple[float, float, float]]] = {
    "top_left": (26, 103, (1.0, 0.0, 0.0)),
    "bottom_right": (180, 270, (0.0, 1.0, 0.0)),
    "big_center": (90, 193, (0.0, 0.0, 1.0)),
    "small_center": (116, 154, (1.0, 1.0, 0.0)),
}
_MASK_CANVAS = 288
#: A random mask covers cells of this grid, in this grey.
_CELLS, _CELL_LEVEL = 8, 0.5


# --- geometry: the same functions move a picture and a feature map ------------------------------


def _affine(x: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """Resample (N, C, H, W): output place = matrix · (x, y, 1) in input places, both in [-1, 1]."""
    theta = torch.tensor(matrix, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _square(x: Tensor, what: str) -> None:
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{what} needs a square grid, not {x.shape[-2]}×{x.shape[-1]}")


def _rotate(x: Tensor, degrees: Value) -> Tensor:
    angle = float(degrees) % 360
    if angle % 180:
        _square(x, "a rotation other than by 180°")
    if angle % 90 == 0:
        return torch.rot90(x, int(angle // 90), (2, 3))
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return _affine(x, [[c, -s, 0.0], [s, c, 0.0]])


def _turned(degrees: Value) -> Action:
    """What a rotation does to places: a permutation for whole quarter turns."""
    turns, rest = divmod(float(degrees), 90)
    return (lambda x: _rotate(x, degrees)) if rest else GridAction(turns=int(turns))


def _mirror(x: Tensor, axis: Value) -> Tensor:
    return x.flip(3 if axis == "horizontal" else 2)


def _zoom(x: Tensor, factor: Value) -> Tensor:
    return _affine(x, [[1 / float(factor), 0.0, 0.0], [0.0, 1 / float(factor), 0.0]])


def _translate(x: Tensor, share: Value) -> Tensor:
    """To the right by a share of the width; exact where that is a whole number of columns."""
    width = x.shape[-1]
    columns = float(share) * width
    if abs(columns - round(columns)) > 1e-9:
        return _affine(x, [[1.0, 0.0, -2 * float(share)], [0.0, 1.0, 0.0]])
    step = round(columns)
    index = torch.arange(width, device=x.device) - step
    # what comes in at the border is the mirror image of what is there (its edge included)
    index = torch.where(index < 0, -1 - index, index)
    index = torch.where(index >= width, 2 * width - 1 - index, index)
    return x[..., index]


def _scale_picture(x: Tensor, factor: Value) -> Tensor:
    shrink = 1 / float(factor)
    if shrink > 1:  # low-pass first, or fine detail comes out as moiré
        x = _gaussian(x, 0.5 * math.sqrt(shrink**2 - 1))
    return _zoom(x, factor)


# --- colour and degradation ---------------------------------------------------------------------


def _hue(x: Tensor, steps: Value) -> Tensor:
    turn = (float(steps) / 256 + 0.5) % 1 - 0.5
    return transforms.adjust_hue(x, turn)


def _grey(x: Tensor, amount: Value) -> Tensor:
    grey = transforms.rgb_to_grayscale(x, num_output_channels=3)
    return x + float(amount) * (grey - x)


def _gaussian(x: Tensor, sigma: Value) -> Tensor:
    radius = math.ceil(3 * float(sigma))
    if radius == 0:
        return x
    if radius >= min(x.shape[-2:]):
        raise ValueError(
            f"a blur of {float(sigma):g} px reaches {radius} px: too far for a picture of "
            f"{x.shape[-2]}×{x.shape[-1]} px"
        )
    return transforms.gaussian_blur(x, [2 * radius + 1] * 2, [float(sigma)] * 2)


def _jpeg(x: Tensor, quality: Value) -> Tensor:
    """Coded and decoded by Pillow, with its default chroma subsampling."""
    coded = []
    for one in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, format="JPEG", quality=int(quality))
        with Image.open(buffer) as decoded:
            coded.append(torch.from_numpy(np.array(decoded)).permute(2, 0, 1))
    return torch.stack(coded).to(x) / 255


def _noise(x: Tensor, sigma: Value, random: Random) -> Tensor:
    each = [torch.randn(x.shape[1:], generator=random(i)) for i in range(len(x))]
    return x + torch.stack(each).to(x) * (float(sigma) / 255)


# --- masks --------------------------------------------------------------------------------------


def _rectangle(x: Tensor, name: Value, _random: Random) -> Tensor:
    first, last, _ = MASKS[str(name)]
    region = torch.zeros(len(x), 1, *x.shape[-2:], dtype=torch.bool, device=x.device)
    sides = [
        slice(round(first * side / _MASK_CANVAS), round((last + 1) * side / _MASK_CANVAS))
        for side in x.shape[-2:]
    ]
    region[..., sides[0], sides[1]] = True
    return region


def _mask(x: Tensor, name: Value, random: Random) -> Tensor:
    colour = torch.tensor(MASKS[str(name)][2]).to(x)[:, None, None]
    return torch.where(_rectangle(x, name, random), colour, x)


def _cells(x: Tensor, share: Value, random: Random) -> Tensor:
    covered = round(float(share) * _CELLS**2)
    masks = torch.zeros(len(x), _CELLS**2)
    for i, mask in enumerate(masks):
        mask[torch.randperm(_CELLS**2, generator=random(i))[:covered]] = 1
    grid = masks.view(len(x), 1, _CELLS, _CELLS)
    return F.interpolate(grid, x.shape[-2:], mode="nearest").bool().to(x.device)


def _random_mask(x: Tensor, share: Value, random: Random) -> Tensor:
    return torch.where(_cells(x, share, random), torch.full_like(x, _CELL_LEVEL), x)


def _shuffle(x: Tensor, number: Value, random: Random) -> Tensor:
    n, channels = int(number), x.shape[1]
    height, width = x.shape[-2:]
    if height % n or width % n:
        raise ValueError(
            f"{n}×{n} patches do not divide a picture of {height}×{width} px: choose another size"
        )
    shape = (len(x), channels, n, height // n, n, width // n)
    patches = x.reshape(shape).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    orders = torch.stack([torch.randperm(n * n, generator=random(i)) for i in range(len(x))])
    patches = patches[torch.arange(len(x), device=x.device)[:, None], orders.to(x.device)]
    patches = patches.view(len(x), n, n, channels, height // n, width // n)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


# --- the kinds ----------------------------------------------------------------------------------


def _number(low: float = -math.inf, high: float = math.inf, *, whole: bool = False) -> Any:
    def check(value: Value) -> Value:
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"must be a number, not {value!r}") from None
        if not (math.isfinite(number) and low <= number <= high):
            raise ValueError(f"must be finite and lie in [{low:g}, {high:g}], not {value!r}")
        if whole and number != round(number):
            raise ValueError(f"must be a whole number, not {value!r}")
        return number

    return check


def _name(*names: str) -> Any:
    def check(value: Value) -> Value:
        if value not in names:
            close = difflib.get_close_matches(str(value), names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"must be one of {', '.join(names)}, not {value!r}{hint}")
        return value

    return check


@dataclass(frozen=True)
class _Kind:
    group: Literal["geometric", "photometric", "degradation", "mask"]
    default: Value
    check: Callable[[Value], Value]
    unit: str
    identity: Value | None  # the value that changes nothing, if there is one
    apply: Callable[[Tensor, Value], Tensor] | None = None
    draw: Callable[[Tensor, Value, Random], Tensor] | None = None  # the same, for random ones
    region: Callable[[Tensor, Value, Random], Tensor] | None = None
    invert: Callable[[float], float] | None = None
    grid: Callable[[Value], Action] | None = None  # what this value does to places


def _minus(x: float) -> float:
    return -x


def _over(x: float) -> float:
    return 1 / x


_FACTOR = _number(0.05, 20)
_KINDS: dict[str, _Kind] = {
    "rotation": _Kind(
        "geometric", 90.0, _number(), "degrees, counter-clockwise", 0.0,
        apply=_rotate, invert=_minus, grid=_turned,
    ),
    "mirror": _Kind(
        "geometric", "horizontal", _name("horizontal", "vertical"), "direction", None,
        apply=_mirror,
        grid=lambda v: GridAction(turns=0 if v == "horizontal" else 2, mirror=True),
    ),
    "scale": _Kind(
        "geometric", 1.25, _FACTOR, "factor about the centre", 1.0,
        apply=_scale_picture, invert=_over, grid=lambda v: lambda x: _zoom(x, v),
    ),
    "translation": _Kind(
        "geometric", 0.125, _number(-1, 1), "share of the width, to the right", 0.0,
        apply=_translate, invert=_minus, grid=lambda v: lambda x: _translate(x, v),
    ),
    "hue": _Kind(
        "photometric", 60.0, _number(), "256ths of a turn", 0.0, apply=_hue, invert=_minus
    ),
    "saturation": _Kind(
        "photometric", 1.5, _number(0, 20), "factor", 1.0,
        apply=lambda x, v: transforms.adjust_saturation(x, float(v)), invert=_over,
    ),
    "brightness": _Kind(
        "photometric", 1.3, _number(0, 20), "factor", 1.0,
        apply=lambda x, v: x * float(v), invert=_over,
    ),
    "contrast": _Kind(
        "photometric", 1.5, _number(0, 20), "factor about the mean grey", 1.0,
        apply=lambda x, v: transforms.adjust_contrast(x, float(v)), invert=_over,
    ),
    "greyscale": _Kind(
        "photometric", 1.0, _number(0, 1), "share of grey", 0.0, apply=_grey
    ),
    "blur": _Kind(
        "degradation", 2.0, _number(0, 100), "standard deviation, px", 0.0, apply=_gaussian
    ),
    "noise": _Kind(
        "degradation", 40.0, _number(0, 255), "standard deviation, 255ths", 0.0, draw=_noise
    ),
    "jpeg": _Kind(
        "degradation", 10.0, _number(1, 100, whole=True), "quality", None, apply=_jpeg
    ),
    "mask": _Kind(
        "mask", "big_center", _name(*MASKS), "rectangle", None, draw=_mask, region=_rectangle
    ),
    "random_mask": _Kind(
        "mask", 0.25, _number(0, 1), "share of the picture", 0.0,
        draw=_random_mask, region=_cells,
    ),
    "patch_shuffle": _Kind(
        "mask", 4.0, _number(1, 64, whole=True), "patches along a side", 1.0, draw=_shuffle
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """One edit with its value; made by :func:`make`, called on pictures."""

    kind: str
    value: Value

    @property
    def name(self) -> str:
        """``kind:value``, what :func:`make` reads."""
        return f"{self.kind}:{self.value:g}" if isinstance(self.value, float) else (
            f"{self.kind}:{self.value}"
        )  # fmt: skip

    @property
    def strength(self) -> float | None:
        """The value where it is a number; None for edits that have only variants."""
        return self.value if isinstance(self.value, float) else None

    @property
    def random(self) -> bool:
        """Whether the result depends on the seed and on the image's id."""
        return self.kind in ("noise", "random_mask", "patch_shuffle")

    def at(self, value: Value) -> Edit:
        """The same edit at another value; errors as :func:`make`."""
        return _made(self.kind, value)

    def inverse(self) -> Edit | None:
        """The edit that undoes this one, up to resampling, clipping and what left the frame.

        Exact for mirrors and rotations by multiples of 90°; None where nothing undoes it.
        """
        if self.kind == "mirror":
            return self
        invert = _KINDS[self.kind].invert
        if invert is None or (self.value == 0 and invert is _over):
            return None
        return self.at(invert(float(self.value)))

    @property
    def grid_action(self) -> Action | None:
        """What the edit does to places, as a function of feature maps (N, C, H, W); or None.

        An equivariant layer's features of the edited picture are its features of the picture, moved
        so. Mirrors and rotations by multiples of 90° are a `GridAction`, with which maps can be
        saved and composed. Others resample, with mirrored borders as in the picture (a translation
        by whole units copies).
        """
        grid = _KINDS[self.kind].grid
        return None if grid is None else grid(self.value)

    def __call__(
        self, images: Tensor, *, ids: Sequence[int | str] | None = None, seed: int = 0
    ) -> Tensor:
        """The edited pictures, the same shape (N, 3, H, W) and device, float32 in [0, 1].

        Args:
            images: (N, 3, H, W) in [0, 1].
            ids: what random edits draw from besides the seed, one for each image: its place by
                default, better its id in the set, so that no batch changes another's result.
            seed: of random edits.

        Raises:
            ValueError: not such pictures, another number of ids, a picture that is not square where
                it is turned, or too small for the edit.
        """
        random = self._generators(images, ids, seed)
        kind = _KINDS[self.kind]
        if self.value == kind.identity:
            return images.clone()
        if kind.apply is not None:
            return kind.apply(images, self.value).clamp(0, 1)
        assert kind.draw is not None
        return kind.draw(images, self.value, random).clamp(0, 1)

    def region(
        self, images: Tensor, *, ids: Sequence[int | str] | None = None, seed: int = 0
    ) -> Tensor | None:
        """Which pixels the edit replaces: (N, 1, H, W) bool; None where it is all of them."""
        random = self._generators(images, ids, seed)
        region = _KINDS[self.kind].region
        return None if region is None else region(images, self.value, random)

    def _generators(self, images: Tensor, ids: Sequence[int | str] | None, seed: int) -> Random:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"{self.name} edits float pictures (N, 3, H, W) in [0, 1], "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        names = list(range(len(images)) if ids is None else ids)
        if len(names) != len(images):
            raise ValueError(f"{len(names)} ids for {len(images)} pictures")

        def generator(index: int) -> torch.Generator:
            text = f"{seed}/{self.kind}/{names[index]}".encode()
            number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
            return torch.Generator().manual_seed(number)  # on the CPU: every device draws the same

        return generator


def _made(kind: str, value: Value | None) -> Edit:
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind, _KINDS, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"no edit {kind!r}{hint} Kinds: {', '.join(_KINDS)}")
    known = _KINDS[kind]
    try:
        return Edit(kind, known.check(known.default if value is None else value))
    except ValueError as error:
        raise ValueError(f"the value of {kind} ({known.unit}) {error}") from None


@dataclass(frozen=True)
class Composite:
    """Edits done one after another, from left to right; made by :func:`make`."""

    steps: tuple[Edit, ...]

    @property
    def name(self) -> str:
        """The names of the steps with a ``+`` between them, what :func:`make` reads."""
        return "+".join(step.name for step in self.steps)

    @property
    def random(self) -> bool:
        """Whether any step is."""
        return any(step.random for step in self.steps)

    def inverse(self) -> Composite | None:
        """The inverses in the other order; None where a step has none."""
        undone = [step.inverse() for step in reversed(self.steps)]
        known = tuple(step for step in undone if step is not None)
        return Composite(known) if len(known) == len(undone) else None

    @property
    def grid_action(self) -> Action | None:
        """What all steps do to places, as `Edit.grid_action`; None where none does anything."""
        actions = [step.grid_action for step in self.steps if step.grid_action is not None]
        result = actions[0] if actions else None
        for action in actions[1:]:
            result = _after(action, result)
        return result

    def __call__(
        self, images: Tensor, *, ids: Sequence[int | str] | None = None, seed: int = 0
    ) -> Tensor:
        """The edited pictures; arguments and errors as for `Edit`."""
        for step in self.steps:
            images = step(images, ids=ids, seed=seed)
        return images

    def region(
        self, images: Tensor, *, ids: Sequence[int | str] | None = None, seed: int = 0
    ) -> Tensor | None:
        """None: steps move what earlier ones replaced."""
        return None


def _after(second: Action, first: Any) -> Action:
    if isinstance(second, GridAction) and isinstance(first, GridAction):
        return second.after(first)
    return lambda features: second(first(features))


def make(text: str) -> Edit | Composite:
    """An edit by its name, ``kind`` (at its default value) or ``kind:value``.

    Several with a ``+`` between them are done one after another, from left to right:
    ``hue:60+mirror:horizontal``.

    Raises:
        ValueError: an unknown kind or a value that it does not take, with those that it does.
    """
    steps = []
    for step in text.split("+"):
        kind, colon, value = step.partition(":")
        steps.append(_made(kind.strip(), value.strip() if colon else None))
    return steps[0] if len(steps) == 1 else Composite(tuple(steps))


def catalogue() -> pd.DataFrame:
    """All kinds: kind, group, default (as a name), unit, and whether inverse, grid, random."""
    rows = []
    for kind, known in _KINDS.items():
        edit = _made(kind, None)
        rows.append(
            {
                "kind": kind,
                "group": known.group,
                "default": edit.name,
                "unit": known.unit,
                "inverse": edit.inverse() is not None,
                "grid": edit.grid_action is not None,
                "random": edit.random,
            }
        )
    return pd.DataFrame(rows)


# --- objects in photographs: edits with a meaning, and exact ground truth -----------------------

#: What :func:`object_scenes` can do to an object in a photograph.
OBJECT_EDITS = ("insert", "remove", "replace", "recolour", "relight")


@dataclass(frozen=True)
class Pairs:
    """Pictures before and after an edit, and where they differ."""

    before: Tensor  #: (N, 3, S, S)
    after: Tensor  #: (N, 3, S, S)
    region: Tensor  #: (N, 1, S, S) bool: outside it the two are equal
    ids: tuple[str, ...]  #: ids of the photographs
    groups: tuple[Any, ...]  #: their source groups, to split by


def _relit(cutout: Tensor, generator: torch.Generator) -> Tensor:
    """Light from one side: a brightness that rises linearly from 0.4 to 1.4 across the object."""
    turn = float(torch.rand((), generator=generator)) * 2 * math.pi
    line = torch.linspace(-1, 1, cutout.shape[-1])
    ramp = (math.sin(turn) * line[:, None] + math.cos(turn) * line) / math.sqrt(2)
    return torch.cat([(cutout[:3] * (0.9 + 0.5 * ramp)).clamp(0, 1), cutout[3:]])


def object_scenes(
    edit: str,
    photographs: ImageSet,
    objects: ImageSet,
    *,
    size: int = 224,
    object_size: int = 96,
    hue: float = 85.0,
    seed: int = 0,
) -> Pairs:
    """A cut-out in each photograph, before and after an edit of that object alone.

    Which object, and where, depends on the seed and the photograph's id, not on the edit: the five
    edits are made of the same scenes.

    Args:
        edit: "insert" (without → with the object), "remove" (the reverse), "replace" (by another
            object in its place), "recolour" (its hue turned) or "relight" (light from one side).
        photographs: backgrounds, cropped to squares.
        objects: RGBA cut-outs.
        size: side of the pictures in pixels.
        object_size: side of the square that the object is fitted into.
        hue: turn of "recolour" in 256ths.
        seed: of objects, places and lights.

    Raises:
        ValueError: an unknown edit, no pictures, fewer than two objects where one is replaced, or
            objects larger than the picture.
    """
    if edit not in OBJECT_EDITS:
        close = difflib.get_close_matches(edit, OBJECT_EDITS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no object edit {edit!r}{hint} Choose from {', '.join(OBJECT_EDITS)}")
    if not len(photographs) or not len(objects):
        raise ValueError("object scenes need at least one photograph and one object")
    if edit == "replace" and len(objects) < 2:
        raise ValueError("replacing an object needs at least two of them")
    if object_size > size:
        raise ValueError(f"an object of {object_size} px does not fit into {size} px")
    before, after, regions = [], [], []
    for index, name in enumerate(photographs.table["id"]):
        ground = photographs.batch(size, indices=[index])[0]
        number = int.from_bytes(hashlib.sha256(f"{seed}/scene/{name}".encode()).digest()[:8], "big")
        generator = torch.Generator().manual_seed(number >> 1)
        order = torch.randperm(len(objects), generator=generator).tolist()
        place = torch.randint(0, size - object_size + 1, (1, 2), generator=generator)
        one, second = shift.prepare(objects[order[0]], object_size), None
        if edit == "replace":
            second = shift.prepare(objects[order[1]], object_size)
        elif edit == "recolour":
            second = torch.cat([_hue(one[None, :3], hue)[0].clamp(0, 1), one[3:]])
        elif edit == "relight":
            second = _relit(one, generator)
        scenes = [
            ground if obj is None
            else shift.compose(obj, place, canvas=size, background=ground)[0]
            for obj in (one, second)
        ]  # fmt: skip
        alpha = one[3] if second is None else torch.maximum(one[3], second[3])
        region = torch.zeros(1, size, size, dtype=torch.bool)
        y, x = place[0].tolist()
        region[:, y : y + object_size, x : x + object_size] = alpha > 0
        first_scene, second_scene = scenes[::-1] if edit == "insert" else scenes
        before.append(first_scene)
        after.append(second_scene)
        regions.append(region)
    return Pairs(
        torch.stack(before).contiguous(),
        torch.stack(after).contiguous(),
        torch.stack(regions),
        tuple(photographs.table["id"]),
        tuple(photographs.table["group"]),
    )


# --- pairs that an editor has left in a folder --------------------------------------------------


@dataclass(frozen=True)
class EditedFolder:
    """Pictures and their edited versions, matched by id."""

    before: dict[str, ImageSet]  #: edit -> the unedited pictures that have this edit
    after: dict[str, ImageSet]  #: edit -> their edited versions, in the same order
    unmatched: tuple[tuple[str, str], ...]  #: (file, reason) of what is left out

    @property
    def edits(self) -> tuple[str, ...]:
        """Names of the edits that have at least one pair."""
        return tuple(self.before)


def edited_folder(path: str, *, original: str = "resized") -> EditedFolder:
    """Pairs of files ``<id>_<edit>.jpg`` (or PNG, WebP) beside ``<id>_<original>.jpg``.

    The layout of Krey et al. (2026), whose unedited key is "resized". Ids and edits may hold
    underscores: an id is whatever precedes ``_<original>`` in a file's name, and the longest id
    wins. Pairs are of one size; what has no partner, or one of another size, is listed.

    Raises:
        images.ImageError: no such folder, or no image in it.
        ValueError: no file of the unedited key, or no pair at all; some file names are given.
    """
    found = image_sets.load(f"folder:{path}")
    stems = {name: re.sub(r"\.[^./]+$", "", name) for name in found.table["id"]}
    key = f"_{original}"
    originals = {stem[: -len(key)]: name for name, stem in stems.items() if stem.endswith(key)}
    shown = ", ".join(list(stems)[:3])
    if not originals:
        raise ValueError(
            f"{path}: no file is named <id>{key}, as the unedited pictures must be; found {shown}"
        )
    files = dict(zip(found.table["id"], found.table["path"], strict=True))

    def size(name: str) -> tuple[int, int]:
        with Image.open(files[name]) as picture:
            return picture.size

    pairs: dict[str, list[tuple[str, str]]] = {}
    unmatched: list[tuple[str, str]] = []
    for name, stem in stems.items():
        if stem.endswith(key):
            continue
        cuts = [match.start() for match in re.finditer("_", stem)]
        owner = next((stem[:cut] for cut in reversed(cuts) if stem[:cut] in originals), None)
        if owner is None:
            unmatched.append((name, "no unedited picture of its id"))
            continue
        source = originals[owner]
        if size(source) != size(name):
            wide = "×".join(map(str, size(source)))
            unmatched.append((name, f"{'×'.join(map(str, size(name)))} px, unedited {wide} px"))
            continue
        pairs.setdefault(stem[len(owner) + 1 :], []).append((source, name))
    used = {source for edit in pairs.values() for source, _ in edit}
    unmatched += [(name, "no edited version") for name in originals.values() if name not in used]
    if not pairs:
        raise ValueError(f"{path}: no pair of an unedited and an edited picture; found {shown}")
    return EditedFolder(
        {edit: found.select([source for source, _ in both]) for edit, both in pairs.items()},
        {edit: found.select([name for _, name in both]) for edit, both in pairs.items()},
        tuple(unmatched),
    )
