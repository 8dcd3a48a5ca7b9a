"""Features of many images: a faster copy of an encoder, streams in constant memory, shards on disk.

``stream`` hands out batches of features or folds them into a result as they come; ``write`` keeps
them in shards that survive a kill and can be resumed; both take any `ImageSet` or an image tensor.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

from . import store, taps
from .encoders import Encoder
from .images import ImageSet

__all__ = ["Shards", "open_shards", "optimise", "stream", "write"]


# --------------------------------------------------------------------------------------- optimise


class _Activation(nn.Module):
    """What is left of timm's batch norm with activation once its affine map is folded away."""

    def __init__(self, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


def optimise(
    encoder: Encoder,
    *,
    channels_last: bool = True,
    fold_batch_norm: bool = True,
    keep: Iterable[str] = (),
) -> Encoder:
    """Copy an encoder into a faster one: batch norms folded into convolutions, channels-last.

    A batch norm is folded where it is the only thing that uses a convolution's output; it becomes
    an identity (or its activation), so every layer keeps its name and its value, to 1e-4 of its
    scale. Only the convolution in front of it now gives the normalised value: reading it is refused
    (`Encoder.changed`), unless named in ``keep``. The weights count as the same (`weight_hash`).
    """
    fast = copy.deepcopy(encoder)
    fast._cache = {}
    if fold_batch_norm:
        kept = {*keep, *encoder.recommended}
        modules = dict(fast.net.named_modules())
        unknown = [name for name in keep if name not in modules]
        if unknown:
            raise ValueError(f"{encoder.name} has no layer {unknown[0]!r} to keep")
        changed = set(fast.changed)
        for name, norm_name in _foldable(fast):
            if name in kept:
                continue
            conv, norm = modules[name], modules[norm_name]
            assert isinstance(conv, nn.Conv2d)  # what _foldable lists
            assert isinstance(norm, nn.BatchNorm2d)
            fused = fuse_conv_bn_eval(conv, norm)
            conv.weight, conv.bias = fused.weight, fused.bias
            parts = dict(norm.named_children())
            plain = _Activation(parts["drop"], parts["act"]) if parts else nn.Identity()
            parent, _, own = norm_name.rpartition(".")
            setattr(fast.net.get_submodule(parent), own, plain)
            changed.add(name)
        fast.changed = frozenset(changed)
    if channels_last:
        fast.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        fast.memory_format = torch.channels_last
    fast.eval()
    return fast.requires_grad_(False)


def _foldable(encoder: Encoder) -> list[tuple[str, str]]:
    """Names (convolution, batch norm) where the norm alone uses the convolution's output."""
    # other subclasses change their weights in forward (weight standardisation)
    convolutions = {name for name, m in encoder.net.named_modules() if _plain(m, nn.Conv2d)}
    norms = {name for name, m in encoder.net.named_modules() if _plain(m, nn.BatchNorm2d)}
    known = taps.trace(encoder)
    outputs: dict[str, Any] = {}
    inputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> None:
            if name in convolutions:
                outputs[name] = output.grad_fn
            else:
                inputs[name] = args[0].grad_fn

        return hook

    handles = [
        encoder.net.get_submodule(name).register_forward_hook(keep(name))
        for name in convolutions | norms
    ]
    try:
        with taps._measuring(encoder), torch.enable_grad():
            images = taps._noise(encoder, taps._size(encoder, None)).requires_grad_()
            root = encoder(images).grad_fn
    finally:
        for handle in handles:
            handle.remove()
    users: dict[Any, int] = {}
    waiting, seen = [root], {root}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                users[node] = users.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
    by_node = {node: name for name, node in outputs.items() if known[name].calls == 1}
    pairs = []
    for norm, node in inputs.items():
        conv = by_node.get(node)
        if conv is not None and users.get(node) == 1 and known[norm].calls == 1:
            pairs.append((conv, norm))
    return pairs


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """A module of exactly this kind, or timm's variant that pads or activates beside it."""
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.norm_act import BatchNormAct2d

    exact = {nn.Conv2d: (nn.Conv2d, Conv2dSame), nn.BatchNorm2d: (nn.BatchNorm2d, BatchNormAct2d)}
    if type(module) not in exact[kind]:
        return False
    return not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None


# ----------------------------------------------------------------------------------------- stream

Features = dict[str, Tensor]
State = TypeVar("State")


def _batch_size(encoder: Encoder, batch_size: int | None) -> int:
    if batch_size is None:
        # Maps of few images are recycled by the C allocator; beyond its threshold (32 MB) each one
        # is mapped anew, and the page faults of a batch of 32 cost more than its convolutions.
        return max(8, 2 * torch.get_num_threads()) if encoder.device.type == "cpu" else 64
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size


def _image_batches(
    images: ImageSet | Tensor, size: int, batch_size: int, start: int, stop: int
) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        for first in range(start, stop, batch_size):
            yield images[first : min(first + batch_size, stop)]
    else:
        yield from images.batches(size, batch_size, indices=range(start, stop))


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Read one batch ahead in a thread, while the accelerator works on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


def _features(
    encoder: Encoder,
    images: ImageSet | Tensor,
    layers: Sequence[str],
    *,
    size: int,
    batch_size: int,
    autocast: bool,
    bar: Any,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Features]:
    stop = len(images) if stop is None else stop
    batches = _image_batches(images, size, batch_size, start, stop)
    if encoder.device.type != "cpu":
        batches = _ahead(batches)
    kind = encoder.device.type
    with taps.read(encoder, layers) as read:
        for batch in batches:
            with (
                torch.inference_mode(),
                torch.autocast(kind, dtype=torch.bfloat16, enabled=autocast),
            ):
                values = read(batch.to(encoder.device, non_blocking=True))
                values = {name: value.float() for name, value in values.items()}
                for name, prefix in read.prefix.items():
                    values[f"{name}/prefix"] = prefix.float()
            bar.update(len(batch))
            yield values


@overload
def stream(
    encoder: Encoder,
    images: ImageSet | Tensor,
    layers: str | Sequence[str],
    *,
    size: int | None = ...,
    batch_size: int | None = ...,
    reduce: None = ...,
    autocast: bool = ...,
    progress: bool = ...,
) -> Iterator[Features]: ...


@overload
def stream(
    encoder: Encoder,
    images: ImageSet | Tensor,
    layers: str | Sequence[str],
    *,
    size: int | None = ...,
    batch_size: int | None = ...,
    reduce: Callable[[State | None, Features], State],
    autocast: bool = ...,
    progress: bool = ...,
) -> State: ...


def stream(
    encoder: Encoder,
    images: ImageSet | Tensor,
    layers: str | Sequence[str],
    *,
    size: int | None = None,
    batch_size: int | None = None,
    reduce: Callable[[Any, Features], Any] | None = None,
    autocast: bool = False,
    progress: bool = True,
) -> Any:
    """Features of a set, batch by batch: memory for one batch only, however large the set.

    ``images`` is an `ImageSet` (centre-cropped to ``size`` pixels; default the encoder's input
    size) or a tensor (N, 3, H, W), taken as it is. Without ``reduce`` the value is an iterator of
    dicts layer -> float32 (n, C, H, W) or (n, C), in the set's order, on the encoder's device; the
    class and register tokens of a layer come under ``layer/prefix``. Nothing is read before it is
    asked for. With ``reduce(state, features)``, called first with None, the value is the last
    state.

    ``autocast`` computes in bfloat16, faster only where the hardware has it. ``progress`` shows a
    bar. Raises ValueError for unreadable layers (see `taps.read`) or an empty set.
    """
    names = taps._names(encoder, layers)
    if not len(images):
        raise ValueError("no images to read features of")
    count = _batch_size(encoder, batch_size)
    side = encoder.input_size if size is None else size

    def batches() -> Iterator[Features]:
        with _bar(len(images), encoder.name, progress) as bar:
            yield from _features(
                encoder, images, names, size=side, batch_size=count, autocast=autocast, bar=bar
            )

    if reduce is None:
        return batches()
    state = None
    for values in batches():
        state = reduce(state, values)
    return state


def _bar(total: int, name: str, progress: bool, done: int = 0) -> Any:
    return tqdm(
        total=total, initial=done, desc=name, unit="image", disable=not progress, leave=False
    )


# ----------------------------------------------------------------------------------------- shards

_CONFIG, _INDEX = "config.json", "index.parquet"


def _shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write(
    encoder: Encoder,
    images: ImageSet | Tensor,
    layers: str | Sequence[str],
    directory: str | Path,
    *,
    size: int | None = None,
    shard_size: int = 256,
    batch_size: int | None = None,
    autocast: bool = False,
    progress: bool = True,
) -> Path:
    """Write the features of a set to safetensors shards of ``shard_size`` images; the directory.

    Each shard appears whole or not at all, and ``index.parquet`` (image, group, label, shard, row)
    is written last. After a kill the same call continues with the first shard that is missing. A
    directory begun with another encoder (weights, not only name), layers, images, size, shard size
    or precision is refused with `store.MismatchError` naming what differs. Options as in `stream`.
    """
    names = taps._names(encoder, layers)
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, not {shard_size}")
    if not len(images):
        raise ValueError("no images to write features of")
    directory = Path(directory)
    side = encoder.input_size if size is None else size
    if isinstance(images, Tensor):
        side = int(images.shape[-1])
        image_name, image_hash = "tensor", store.digest(images)
        table = pd.DataFrame({"id": [str(i) for i in range(len(images))]})
        table["group"], table["label"] = table["id"], None
    else:
        image_name, image_hash, table = images.name, images.hash, images.table
    config = {
        "encoder": encoder.name,
        "weight_hash": encoder.weight_hash,
        "layers": list(names),
        "images": image_name,
        "images_hash": image_hash,
        "count": len(images),
        "size": side,
        "shard_size": shard_size,
        "precision": "bfloat16" if autocast else "float32",
    }
    _begin(directory, config)
    count = _batch_size(encoder, batch_size)
    starts = range(0, len(images), shard_size)
    missing = [k for k in range(len(starts)) if not _complete(directory / _shard(k), config, k)]
    done = len(images) - sum(min(shard_size, len(images) - starts[k]) for k in missing)
    with _bar(len(images), f"{encoder.name} -> {directory.name}", progress, done) as bar:
        for k in missing:
            stop = min(starts[k] + shard_size, len(images))
            parts: dict[str, list[Tensor]] = {}
            for values in _features(
                encoder, images, names, size=side, batch_size=count, autocast=autocast, bar=bar,
                start=starts[k], stop=stop,
            ):  # fmt: skip
                for name, value in values.items():
                    parts.setdefault(name, []).append(value.cpu())
            tensors = {name: torch.cat(values) for name, values in parts.items()}
            store.save_tensors(directory / _shard(k), tensors, metadata={**config, "shard": k})
    index = pd.DataFrame(
        {
            "image": table["id"].astype(str),
            "group": table["group"].astype(str),
            "label": table["label"].astype("string"),
            "shard": [_shard(i // shard_size) for i in range(len(images))],
            "row": [i % shard_size for i in range(len(images))],
        }
    )
    with store.atomic_path(directory / _INDEX) as path:
        index.to_parquet(path, index=False)
    return directory


def _begin(directory: Path, config: dict[str, Any]) -> None:
    """Start a directory, or check that it was started for the same features."""
    if (directory / _CONFIG).is_file():
        found = store.read_json(directory / _CONFIG)
        for key, value in config.items():
            if found.get(key) != value:
                raise store.MismatchError(
                    f"{directory} holds features of other origin: {key} is {found.get(key)!r} "
                    f"there, {value!r} here; choose another directory or delete this one"
                )
        return
    if directory.is_dir() and any(directory.iterdir()):
        raise store.MismatchError(f"{directory} is not empty and was not begun by write")
    directory.mkdir(parents=True, exist_ok=True)
    store.write_json(directory / _CONFIG, config)


def _complete(path: Path, config: dict[str, Any], number: int) -> bool:
    """Whether a shard is there; a shard of other features in its place is refused."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        found = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    if found != {**config, "shard": number}:
        raise store.MismatchError(f"{path} does not belong to {path.parent}: delete it")
    return True


@dataclass(frozen=True)
class Shards:
    """Features on disk: ``index`` (image, group, label, shard, row) and the ``config`` they had."""

    directory: Path
    index: pd.DataFrame
    config: dict[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that were written."""
        return tuple(self.config["layers"])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)

    def batches(self, layers: str | Sequence[str] | None = None) -> Iterator[Features]:
        """Features shard by shard, in the set's order (default: all layers, with prefixes)."""
        names = self._named(layers)
        for shard in dict.fromkeys(self.index["shard"]):
            with safe_open(self.directory / shard, framework="pt") as file:
                wanted = names or tuple(file.keys())
                yield {name: file.get_tensor(name) for name in wanted}

    def read(self, layer: str, images: Sequence[str] | None = None) -> Tensor:
        """One layer of some images, by id and in that order (default: all), (n, C, H, W).

        Only the rows asked for are read. Raises ValueError for an unknown layer or image.
        """
        (name,) = self._named(layer)
        index = self.index
        if images is not None:
            places = {image: i for i, image in enumerate(index["image"])}
            unknown = [image for image in images if image not in places]
            if unknown:
                raise ValueError(f"no image {unknown[0]!r} in {self.directory}")
            index = index.iloc[[places[image] for image in images]]
        index = index.reset_index(drop=True)
        parts: list[Tensor] = [torch.empty(0)] * len(index)
        for shard, rows in index.groupby("shard", sort=False):
            with safe_open(self.directory / str(shard), framework="pt") as file:
                whole = file.get_slice(name)
                for position, row in rows["row"].items():
                    parts[int(position)] = whole[int(row) : int(row) + 1]  # pyright: ignore
        return torch.cat(parts)

    def _named(self, layers: str | Sequence[str] | None) -> tuple[str, ...]:
        names = () if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
        for name in names:
            if name.removesuffix("/prefix") not in self.layers:
                raise ValueError(
                    f"no layer {name!r} in {self.directory}; it holds {', '.join(self.layers)}"
                )
        return names


def open_shards(directory: str | Path) -> Shards:
    """Open what `write` wrote. Raises ValueError for a directory that is not, or not finished."""
    directory = Path(directory)
    if not (directory / _CONFIG).is_file():
        raise ValueError(f"{directory} holds no features written by extract.write")
    if not (directory / _INDEX).is_file():
        raise ValueError(f"{directory} is not finished: the same extract.write continues it")
    config = store.read_json(directory / _CONFIG)
    return Shards(directory, pd.read_parquet(directory / _INDEX), config)
