"""Image sets: named, read lazily, hashed by content, split by source.

Floor 1: no model in sight. An image is float32 in [0, 1], channels x height x width, RGB; a cut-out
object is RGBA with straight alpha. Resizing happens only where a function is asked to.
"""

import ast
import contextlib
import csv
import difflib
import hashlib
import importlib.util
import inspect
import io
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from fmlib import store

MAX_PIXELS = 100_000_000
"""Images with more pixels than this are refused from their header, before any is decoded."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# what Pillow and its plugins raise on damaged files
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
_COLUMNS = ["id", "group", "label", "author", "licence", "path", "sha256"]

# name -> (package, file in it, label, author, licence); only what lies in the wheels themselves
_CLASSICS = {
    "astronaut": ("skimage", "data/astronaut.png", "person", "NASA", "LicenseRef-PublicDomain"),
    "brick": ("skimage", "data/brick.png", "texture", "CC0Textures", "CC0-1.0"),
    "chelsea": ("skimage", "data/chelsea.png", "cat", "Stéfan van der Walt", "CC0-1.0"),
    "china": ("sklearn", "datasets/images/china.jpg", "palace", "danielbuechele", "CC-BY-2.0"),
    "coffee": ("skimage", "data/coffee.png", "cup", "Rachel Michetti", "CC0-1.0"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "flower", "vultilion", "CC-BY-2.0"),
    "grass": ("skimage", "data/grass.png", "texture", "linolafett", "CC0-1.0"),
    "gravel": ("skimage", "data/gravel.png", "texture", "CC0Textures", "CC0-1.0"),
    "rocket": ("skimage", "data/rocket.jpg", "rocket", "SpaceX", "LicenseRef-PublicDomain"),
}


class ImageError(ValueError):
    """An image or image set that cannot be used; the message names the file."""


# ------------------------------------------------------------------------------- single images


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Turn whatever Pillow raises or warns about a damaged file into an `ImageError` naming it."""
    try:
        with warnings.catch_warnings():
            # the size limit is ours, and damaged EXIF does not damage the picture
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{place}: {error}; to allow it, set PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except _DAMAGE as error:
        text = str(error) or type(error).__name__
        raise ImageError(f"{place}: broken or not an image ({text})") from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], max_pixels: int) -> Iterator[Image.Image]:
    """An image file of an admissible format and size, opened but not yet decoded."""
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path}: no such file")
    if path.is_dir():
        raise ImageError(f"{path}: a folder, not an image file")
    with _naming(str(path)), Image.open(path, formats=_FORMATS) as image:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ImageError(
                f"{path}: {image.width}x{image.height} is {pixels / 1e6:.0f} megapixels, the limit "
                f"is {max_pixels / 1e6:g} (option max_pixels)"
            )
        yield image


def _pixels(image: Image.Image) -> np.ndarray:
    """Upright pixels of any Pillow mode as H×W×3, or H×W×4 where there is transparency.

    uint8, or float32 in [0, 1] for grey images of more than 8 bits.
    """
    image.load()
    # a damaged EXIF block counts as "upright", as in viewers
    with contextlib.suppress(*_DAMAGE):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float32)
        top = 1 if image.mode == "F" else 65535
        if not (grey.min() >= 0 and grey.max() <= top):
            raise ValueError(f"values of mode {image.mode} outside 0..{top}: the range is unknown")
        layers = [grey / top] * 3
        if isinstance(image.info.get("transparency"), int):
            layers.append((grey != image.info["transparency"]).astype(np.float32))
        return np.stack(layers, axis=-1)
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
    if image.mode in ("La", "RGBa"):  # premultiplied; Pillow converts these one way only
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return np.asarray(image.convert("RGBA" if transparent else "RGB"))


def _tensor(pixels: np.ndarray, *, alpha: bool) -> torch.Tensor:
    """H×W×(3|4) pixels as C×H×W float32: composed on white, or with alpha kept or added."""
    scale = 255 if pixels.dtype == np.uint8 else 1
    x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).to(torch.float32) / scale
    if alpha:
        return x.contiguous() if len(x) == 4 else torch.cat([x, torch.ones_like(x[:1])])
    if len(x) == 4:
        x = x[:3] * x[3:] + (1 - x[3:])
    return x.contiguous()


def read(
    path: str | os.PathLike[str], *, alpha: bool = False, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Read one image file as float32 3×H×W in [0, 1], or 4×H×W RGBA (straight) with `alpha`.

    EXIF rotation is applied. Palette, CMYK, grey, 1-bit and 16-bit grey images become RGB;
    transparency is composed on white unless `alpha`. Of an animation, the first frame. Colour
    profiles are ignored, as in the pipelines the encoders were trained with.

    Raises:
        ImageError: names the file: missing, not an image, truncated, or of more than `max_pixels`
            pixels (found from the header, before decoding).

    """
    with _opened(path, max_pixels) as image:
        return _tensor(_pixels(image), alpha=alpha)


def resize(x: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Antialiased bilinear resize of (..., C, H, W) in [0, 1].

    An int is the length of the shorter side, aspect kept; a pair is (height, width). With four
    channels the colours are weighted by alpha, so that invisible pixels do not bleed into edges.

    Raises:
        ValueError: a size below one pixel.

    """
    height, width = x.shape[-2:]
    if isinstance(size, int):
        short = min(height, width)
        target = (round(height * size / short), round(width * size / short))
    else:
        target = (int(size[0]), int(size[1]))
    if min(target) < 1:
        raise ValueError(f"cannot resize to {target[0]}x{target[1]} pixels")
    if target == (height, width):
        return x
    flat = x.reshape(-1, *x.shape[-3:])
    if flat.shape[1] == 4:
        flat = torch.cat([flat[:, :3] * flat[:, 3:], flat[:, 3:]], 1)
    flat = F.interpolate(flat, target, mode="bilinear", antialias=True, align_corners=False)
    if flat.shape[1] == 4:
        colour = flat[:, :3] / flat[:, 3:].clamp_min(1e-6)
        flat = torch.cat([colour, flat[:, 3:]], 1)
    return flat.clamp(0, 1).reshape(*x.shape[:-2], *target)


def center_crop(x: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """The central `size` (int: square; or (height, width)) of (..., H, W).

    Raises:
        ValueError: the image is smaller.

    """
    h, w = (size, size) if isinstance(size, int) else size
    height, width = x.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"cannot crop {h}x{w} from an image of {height}x{width} pixels")
    top, left = (height - h) // 2, (width - w) // 2
    return x[..., top : top + h, left : left + w]


# --------------------------------------------------------------------------------- image sets


def _unit(*key: Any) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") / 2**64


def _whiten(x: torch.Tensor) -> torch.Tensor:
    return x[:3] * x[3:] + (1 - x[3:]) if len(x) == 4 else x


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that are read when asked for, with a table of what they are.

    Attributes:
        name: the name it was loaded by.
        table: one row per image: id, group (source; split by it), label, author, licence, path
            (None where images do not lie in files of their own), sha256 of the content.
        skipped: (path, reason) of broken images left out with `skip_broken`.

    `len(images)`, `images[i]` (float32 3×H×W, objects 4×H×W; sizes differ between images).

    """

    name: str
    table: pd.DataFrame
    _read: Callable[[dict[str, Any]], torch.Tensor] = field(repr=False)
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def hash(self) -> str:
        """Content hash: ids, groups, labels and the sha256 of each image, in order."""
        rows = self.table[["id", "group", "label", "sha256"]].to_numpy(dtype=object, na_value=None)
        return store.digest(rows.tolist())

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index` (negative counts from the end), float32 C×H×W in [0, 1]."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in {self.name}")
        row: dict[str, Any] = {str(k): v for k, v in self.table.iloc[int(index)].items()}
        return self._read(row)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each image in turn; one in memory at a time."""
        return (self[i] for i in range(len(self)))

    def select(self, which: Iterable[Any]) -> "ImageSet":
        """The images named by ids, a boolean mask or integer positions, in the order given.

        Raises:
            ValueError: an unknown id (closest match named), position or mask length.

        """
        items = list(which)
        if items and all(isinstance(item, bool | np.bool_) for item in items):
            if len(items) != len(self):
                raise ValueError(f"mask has {len(items)} entries for {len(self)} images")
            positions = np.flatnonzero(items)
        elif items and all(isinstance(item, str) for item in items):
            places = {name: i for i, name in enumerate(self.table["id"])}
            for name in items:
                if name not in places:
                    raise ValueError(
                        f"no image {name!r} in {self.name}{_closest(name, list(places))}"
                    )
            positions = np.array([places[name] for name in items])
        else:
            positions = np.array([int(item) for item in items], dtype=int)
            bad = positions[(positions < -len(self)) | (positions >= len(self))]
            if len(bad):
                raise ValueError(f"no image {bad[0]} in {self.name}, which has {len(self)}")
        table = self.table.iloc[positions].reset_index(drop=True)
        return replace(self, table=table)

    def split(self, fraction: float = 0.8, *, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """Two parts that share no source group, the first of about `fraction` of the groups.

        A group's side depends on its name and the seed alone: it stays when other images come or
        go, and the first part at a smaller fraction lies within that at a larger one. The sizes are
        therefore random around the fraction. Should one part come out empty, the group nearest to
        the border changes sides.

        Raises:
            ValueError: `fraction` not between 0 and 1, or fewer than two groups.

        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
        groups = self.table["group"].to_numpy(dtype=object)
        place = {group: _unit("split", seed, group) for group in dict.fromkeys(groups)}
        if len(place) < 2:
            raise ValueError(f"{self.name} has {len(place)} source group(s): a split needs two")
        first = {group for group, unit in place.items() if unit < fraction}
        if not first:
            first = {min(place, key=lambda group: place[group])}
        elif len(first) == len(place):
            first.remove(max(place, key=lambda group: place[group]))
        mask = np.array([group in first for group in groups])
        return self.select(mask), self.select(~mask)

    def in_memory(self, side: int) -> "ImageSet":
        """The same images, read now and kept as bytes, none with a shorter side above `side`.

        For many random crops of small pictures, which would otherwise be decoded again and again:
        about 1.5 · side² · 3 bytes each. Objects are composed on white.

        Raises:
            ValueError: a side below one pixel.

        """
        kept: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self.table["id"]):
            image = _whiten(self[index])
            if min(image.shape[-2:]) > side:
                image = resize(image, side)
            kept[name] = (image * 255).round().to(torch.uint8)
        return replace(self, _read=lambda row: kept[row["id"]].float() / 255)

    def batch(
        self,
        size: int,
        *,
        indices: Sequence[int] | None = None,
        fit: Literal["crop", "squash"] = "crop",
        alpha: bool = False,
    ) -> torch.Tensor:
        """Images as one N×3×size×size tensor (N×4 with `alpha`, else objects stand on white).

        `fit`: "crop" resizes the shorter side and crops the centre; "squash" gives up the aspect.

        Raises:
            ValueError: unknown `fit`, or no images.

        """
        if fit not in ("crop", "squash"):
            raise ValueError(
                f"unknown fit {fit!r}: crop, squash{_closest(fit, ['crop', 'squash'])}"
            )
        indices = range(len(self)) if indices is None else indices
        if len(indices) == 0:
            raise ValueError(f"no images to batch from {self.name}")
        parts = []
        for index in indices:
            x = self[index]
            if alpha and len(x) == 3:
                x = torch.cat([x, torch.ones_like(x[:1])])
            x = center_crop(resize(x, size), size) if fit == "crop" else resize(x, (size, size))
            parts.append(x if alpha else _whiten(x))
        return torch.stack(parts)

    def batches(
        self,
        size: int,
        batch_size: int,
        *,
        indices: Sequence[int] | None = None,
        fit: Literal["crop", "squash"] = "crop",
        alpha: bool = False,
    ) -> Iterator[torch.Tensor]:
        """`batch` in pieces of `batch_size` (the last may be smaller); one in memory at a time."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        chosen = list(range(len(self)) if indices is None else indices)
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            yield self.batch(size, indices=part, fit=fit, alpha=alpha)

    def crops(
        self,
        size: int,
        per_image: int,
        *,
        seed: int = 0,
        scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
    ) -> torch.Tensor:
        """Random square crops, resized, as one (N·per_image)×3×size×size tensor.

        Image by image: crop j is of image j // per_image. The side is uniform in `scale` times the
        shorter side of the image, the place uniform, mirrored half the time with `flip`. A crop
        depends on the seed, the image's id and its number alone, neither on the batch size nor on
        what else is in the set.

        Raises:
            ValueError: an option out of range.

        """
        return torch.cat(
            list(
                self.crop_batches(
                    size, per_image, max(1, per_image), seed=seed, scale=scale, flip=flip
                )
            )
        )

    def crop_batches(
        self,
        size: int,
        per_image: int,
        batch_size: int,
        *,
        seed: int = 0,
        scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
    ) -> Iterator[torch.Tensor]:
        """`crops` in pieces of `batch_size`: the same crops whatever that is, constant memory."""
        low, high = scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {scale}")
        if per_image < 1 or batch_size < 1 or size < 1:
            raise ValueError(
                f"size, per_image and batch_size must be at least 1, got {size}, {per_image}, "
                f"{batch_size}"
            )
        if not len(self):
            raise ValueError(f"no images to crop from {self.name}")
        waiting: list[torch.Tensor] = []
        for index in range(len(self)):
            image = _whiten(self[index])
            height, width = image.shape[-2:]
            for number in range(per_image):
                key = ("crop", seed, self.table["id"].iloc[index], number)
                side = max(
                    1, round(min(height, width) * (low + (high - low) * _unit(*key, "side")))
                )
                top = int(_unit(*key, "top") * (height - side + 1))
                left = int(_unit(*key, "left") * (width - side + 1))
                crop = resize(image[:, top : top + side, left : left + side], (size, size))
                waiting.append(crop.flip(-1) if flip and _unit(*key, "flip") < 0.5 else crop)
                if len(waiting) == batch_size:
                    yield torch.stack(waiting)
                    waiting = []
        if waiting:
            yield torch.stack(waiting)


# ------------------------------------------------------------------------------------- loading


def _closest(name: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class _Source:
    """What a kind of set gives to `load`: candidate rows, how to read one, how to hash one."""

    rows: list[dict[str, Any]]
    read: Callable[[dict[str, Any]], torch.Tensor]
    check: Callable[[dict[str, Any], bool], dict[str, Any]]
    """Raise ImageError if broken (decoding it if asked), else return hash and late columns."""


def data_root() -> Path:
    """The folder of the packaged sets: FMLIB_DATA, or `data` beside the package.

    Raises:
        ImageError: it is not there.

    """
    named = os.environ.get("FMLIB_DATA")
    root = Path(named) if named else Path(__file__).resolve().parent.parent / "data"
    if not root.is_dir():
        how = "FMLIB_DATA names it" if named else "set FMLIB_DATA to the repository's data folder"
        raise ImageError(f"no image data at {root} ({how})")
    return root


def cache_root() -> Path:
    """Where downloaded data sets go: FMLIB_CACHE, or ~/.cache/fmlib."""
    named = os.environ.get("FMLIB_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "fmlib"


@dataclass(frozen=True)
class _FileReader:
    """Reads and checks the file of a row; a class so that sets can be pickled to workers."""

    alpha: bool
    max_pixels: int

    def __call__(self, row: dict[str, Any]) -> torch.Tensor:
        return read(row["path"], alpha=self.alpha, max_pixels=self.max_pixels)

    def check(self, row: dict[str, Any], decode: bool) -> dict[str, Any]:
        if decode:
            self(row)
        else:
            with _opened(row["path"], self.max_pixels):
                pass
        return {"sha256": store.sha256_file(row["path"])}


def _files(rows: list[dict[str, Any]], *, alpha: bool, max_pixels: int) -> _Source:
    reader = _FileReader(alpha, max_pixels)
    return _Source(rows, reader, reader.check)


def _packaged(name: str, *, max_pixels: int) -> _Source:
    root = data_root()
    table = root / f"{name}.csv"
    if not table.is_file():
        raise ImageError(f"{table}: the list of the set {name!r} is missing")
    rows = []
    with table.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            rows.append(
                {
                    "id": str(Path(line["file"]).with_suffix("").relative_to(name).as_posix()),
                    "group": line["group"],
                    "label": line["subject" if name == "photos" else "class"],
                    "author": line["author"],
                    "licence": line["licence"],
                    "path": str(root / line["file"]),
                }
            )
    return _files(rows, alpha=name == "objects", max_pixels=max_pixels)


def _classics(*, max_pixels: int) -> _Source:
    rows = []
    for name, (package, file, label, author, licence) in _CLASSICS.items():
        # found without importing it: that would take seconds
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders:
            raise ImageError(f"{file}: the package {package} is not installed")
        rows.append(
            {
                "id": name,
                "group": name,
                "label": label,
                "author": author,
                "licence": licence,
                "path": str(Path(folders[0]) / file),
            }
        )
    return _files(rows, alpha=False, max_pixels=max_pixels)


def _folder(
    path: str, *, max_pixels: int, group: Callable[[str], str] | None, alpha: bool
) -> _Source:
    root = Path(path).expanduser()
    if not root.is_dir():
        reason = "not a folder" if root.exists() else "no such folder"
        raise ImageError(f"{root}: {reason}")
    found = [
        file
        for file in root.rglob("*")
        if file.suffix.lower() in _SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    if not found:
        raise ImageError(f"{root}: no JPEG, PNG or WebP image in this folder or below it")
    rows = []
    for file in sorted(found, key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        name = relative.as_posix()
        rows.append(
            {
                "id": name,
                "group": group(name) if group else file.stem,
                "label": relative.parts[0] if len(relative.parts) > 1 else None,
                "path": str(file),
            }
        )
    return _files(rows, alpha=alpha, max_pixels=max_pixels)


def _array_hash(x: torch.Tensor) -> str:
    return store.digest((x * 65535).round().to(torch.int32))


@dataclass(frozen=True)
class _DatasetReader:
    """Reads items of a torchvision data set by the position kept in the id."""

    dataset: Any
    name: str
    max_pixels: int

    def item(self, row: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        place = f"torchvision:{self.name} item {row['id']}"
        with _naming(place):
            item = self.dataset[int(row["id"])]
            image, target = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            if isinstance(image, Image.Image):
                pixels = image.width * image.height
                if pixels > self.max_pixels:
                    raise ImageError(f"{place}: {pixels / 1e6:.0f} megapixels, over max_pixels")
                return _tensor(_pixels(image), alpha=False), target
        raise ImageError(f"{place}: gives {type(image).__name__}, not an image")

    def __call__(self, row: dict[str, Any]) -> torch.Tensor:
        return self.item(row)[0]

    def check(self, row: dict[str, Any], decode: bool) -> dict[str, Any]:
        image, target = self.item(row)
        label = None
        if isinstance(target, torch.Tensor) and target.ndim == 0:
            target = target.item()
        if isinstance(target, str):
            label = target
        elif isinstance(target, int | np.integer):
            names = getattr(self.dataset, "classes", None)
            known = isinstance(names, Sequence) and 0 <= target < len(names)
            named = names[int(target)] if known and names is not None else target
            label = ", ".join(named) if isinstance(named, tuple) else str(named)
        return {"sha256": _array_hash(image), "label": label}


def _torchvision(text: str, *, max_pixels: int) -> _Source:
    from torchvision import datasets

    name, _, query = text.partition("?")
    kinds = {
        kind: value
        for kind in datasets.__all__
        if inspect.isclass(value := getattr(datasets, kind))
        and issubclass(value, datasets.VisionDataset)
        and value is not datasets.VisionDataset
    }
    if name not in kinds:
        raise ValueError(
            f"torchvision has no data set {name!r}{_closest(name, list(kinds))} "
            f"(there are {', '.join(sorted(kinds))})"
        )
    known = list(inspect.signature(kinds[name]).parameters)
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise ValueError(
                f"torchvision:{name} has no option {key!r}{_closest(key, known)} "
                f"(there are {', '.join(known)})"
            )
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    if "root" in known:
        options.setdefault("root", str(cache_root() / "torchvision"))
        Path(options["root"]).mkdir(parents=True, exist_ok=True)
    if "download" in known:
        options.setdefault("download", True)
    try:
        # these loaders print what they download
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = kinds[name](**options)
            count = len(dataset)
    except Exception as error:  # each loader fails in ways of its own
        where = f" into {options['root']}" if "root" in options else ""
        raise ImageError(f"torchvision:{name} could not be loaded{where}: {error}") from error
    reader = _DatasetReader(dataset, name, max_pixels)
    rows = [{"id": str(i), "group": str(i)} for i in range(count)]
    return _Source(rows, reader, reader.check)


@dataclass(frozen=True)
class _CocoReader:
    """Cuts the annotated object of a row out of its image."""

    coco: Any
    max_pixels: int

    def __call__(self, row: dict[str, Any]) -> torch.Tensor:
        annotation = self.coco.anns[int(row["id"])]
        x = read(row["path"], max_pixels=self.max_pixels)
        with _naming(f"{row['path']}, annotation {row['id']}"):
            mask = torch.from_numpy(self.coco.annToMask(annotation)).to(x.dtype)
        if mask.shape != x.shape[1:]:
            raise ImageError(
                f"{row['path']}: {tuple(x.shape[1:])} pixels, but annotation {row['id']} is for "
                f"{tuple(mask.shape)}"
            )
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if not len(rows):
            raise ImageError(f"{row['path']}: the mask of annotation {row['id']} is empty")
        cut = torch.cat([x, mask[None]])
        return cut[
            :, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1
        ].contiguous()

    def check(self, row: dict[str, Any], decode: bool) -> dict[str, Any]:
        if decode:
            self(row)
        else:
            with _opened(row["path"], self.max_pixels):
                pass
        annotation = self.coco.anns[int(row["id"])]
        cut = {key: annotation[key] for key in ("segmentation", "bbox")}
        return {"sha256": store.digest([store.sha256_file(row["path"]), cut])}


def _coco(text: str, *, max_pixels: int) -> _Source:
    path, _, query = text.partition("?")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ImageError(f"{file}: no such annotation file")
    options = dict(parse_qsl(query))
    for key in options:
        if key != "images":
            raise ValueError(f"coco: has no option {key!r} (there is images=FOLDER)")
    try:
        from pycocotools.coco import COCO  # pyright: ignore[reportMissingModuleSource]
    except ImportError as error:
        raise ImportError(
            f"coco:{text} needs the package pycocotools: pip install 'fmlib[coco]'"
        ) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
        images, annotations = coco.imgs, list(coco.anns.values())
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ImageError(f"{file}: not a COCO annotation file ({error!r})") from error
    names = [image["file_name"] for image in images.values()]
    # instances_val2017.json in annotations/ goes with images in val2017/ beside that folder
    split = file.stem.rpartition("_")[2]
    folders = (
        [Path(options["images"]).expanduser()]
        if "images" in options
        else [
            file.parent,
            file.parent / "images",
            file.parent.parent / split,
            file.parent.parent / "images",
            file.parent.parent / "images" / split,
        ]
    )
    folder = next((folder for folder in folders if names and (folder / names[0]).is_file()), None)
    if folder is None:
        looked = ", ".join(str(folder) for folder in folders)
        missing = names[0] if names else "any image"
        raise ImageError(f"{file}: {missing} not found in {looked}; add ?images=FOLDER")
    licences = {entry.get("id"): entry.get("name") for entry in coco.dataset.get("licenses", [])}
    rows, seen = [], set()
    for annotation in annotations:
        image = images.get(annotation["image_id"])
        if image is None or annotation["image_id"] in seen:
            continue
        seen.add(annotation["image_id"])
        _, _, width, height = annotation["bbox"]
        # a crowd has no outline of a single object
        if annotation.get("iscrowd") or (width < 37.5 and height < 37.5):
            continue
        rows.append(
            {
                "id": str(annotation["id"]),
                "group": str(annotation["image_id"]),
                "label": coco.cats[annotation["category_id"]]["name"],
                "licence": licences.get(image.get("license")),
                "path": str(folder / image["file_name"]),
            }
        )
    if not rows:
        raise ImageError(f"{file}: no image whose first object is at least 37.5 pixels in size")
    reader = _CocoReader(coco, max_pixels)
    return _Source(rows, reader, reader.check)


def _order(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """Positions in a seeded order that takes one image of every group before the next of any."""
    draws = [_unit("limit", seed, row["group"], row["id"]) for row in rows]
    taken: Counter[str] = Counter()
    key: dict[int, tuple[int, float]] = {}
    for i in sorted(range(len(rows)), key=lambda i: draws[i]):
        group = rows[i]["group"]
        key[i] = (taken[group], _unit("limit", seed, group))
        taken[group] += 1
    return sorted(key, key=lambda i: key[i])


def load(
    name: str,
    *,
    skip_broken: bool = False,
    limit: int | None = None,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    group: Callable[[str], str] | None = None,
    alpha: bool = False,
) -> ImageSet:
    """An image set by name.

    * `photos`: 201 photographs of 150 sources; `objects`: 80 RGBA cut-outs in 22 classes (see
      `data/README.md`; folder from FMLIB_DATA);
    * `classics`: nine pictures of the scikit-image and scikit-learn wheels;
    * `folder:PATH`: every JPEG, PNG and WebP below PATH; label = first sub-folder, group = file
      name without suffix wherever it lies (`a/001.jpg` and `b/001.png` are kept together), or
      `group`;
    * `torchvision:NAME`: a data set of torchvision, downloaded into FMLIB_CACHE if need be; its
      options as `torchvision:DTD?split=test`; every item is a group;
    * `coco:ANNOTATIONS.json`: cut-outs by segmentation mask as in Lee, Yang & Wang 2020: the
      first annotation of each image unless its box is under 37.5 pixels in both directions; the
      image folder is searched beside the file, or `coco:FILE?images=FOLDER`. Needs pycocotools.

    Images are read when asked for, but each is hashed here: files as a stream (the disk's speed,
    once for a whole folder), torchvision items by their decoded pixels (the speed of decoding).
    With `limit` only the chosen images are touched.

    Args:
        name: see above.
        skip_broken: leave broken images out and list them in `.skipped`; decodes every image once.
            Without it the header of each file is read here, and damage further on is raised when
            the image is.
        limit: keep that many images, chosen with `seed`: one of every group before a second of any,
            in the set's own order. A smaller limit gives a subset of a larger one.
        seed: of `limit`.
        max_pixels: refuse larger images from their header.
        group: for `folder:`, source group of an image from its id (path below the folder).
        alpha: for `folder:`, keep or add an alpha channel (your own cut-outs).

    Raises:
        ValueError: unknown name (closest match named) or bad option.
        ImageError: missing or empty folder, broken or too large image; names the file.
        ImportError: `coco:` without pycocotools.

    """
    kind, colon, rest = name.partition(":")
    if not colon and name in ("photos", "objects"):
        source = _packaged(name, max_pixels=max_pixels)
    elif not colon and name == "classics":
        source = _classics(max_pixels=max_pixels)
    elif rest and kind == "folder":
        source = _folder(rest, max_pixels=max_pixels, group=group, alpha=alpha)
    elif rest and kind == "torchvision":
        source = _torchvision(rest, max_pixels=max_pixels)
    elif rest and kind == "coco":
        source = _coco(rest, max_pixels=max_pixels)
    else:
        choices = ["photos", "objects", "classics", "folder:PATH", "torchvision:NAME", "coco:PATH"]
        stems = [choice.partition(":")[0] for choice in choices]
        close = difflib.get_close_matches(kind, stems, n=1, cutoff=0.5)
        hint = f"; did you mean {choices[stems.index(close[0])]!r}?" if close else ""
        raise ValueError(f"unknown image set {name!r}: there are {', '.join(choices)}{hint}")
    if (group is not None or alpha) and kind != "folder":
        raise ValueError(f"group and alpha are options of folder: sets, not of {name!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")

    rows = source.rows
    order = list(range(len(rows))) if limit is None else _order(rows, seed)
    wanted = len(rows) if limit is None else limit
    kept: dict[int, dict[str, Any]] = {}
    skipped: list[tuple[str, str]] = []
    for i in order:
        if len(kept) == wanted:
            break
        try:
            late = source.check(rows[i], skip_broken)
        except ImageError as error:
            if not skip_broken:
                raise
            skipped.append((rows[i].get("path") or rows[i]["id"], str(error)))
            continue
        kept[i] = {**rows[i], **late}
    if not kept:
        first = f", the first: {skipped[0][1]}" if skipped else ""
        raise ImageError(f"{name}: no usable image{first}")
    table = pd.DataFrame([kept[i] for i in sorted(kept)]).reindex(columns=_COLUMNS)
    table = table.astype(object).where(table.notna(), None)
    result = ImageSet(name, table, source.read, tuple(skipped))
    noted = name if limit is None else f"{name} (limit {limit}, seed {seed})"
    store.note("images", noted, result.hash)
    return result
