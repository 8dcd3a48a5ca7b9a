"""Read any layer of an encoder, and run the rest of the network from a changed layer.

Layers go by their dotted ``named_modules()`` name. Feature maps and token grids come as
(N, C, H, W), vectors as (N, C), class and register tokens apart. Nothing here rewrites or
symbolically traces a network (dynamic padding defeats that): plain forward hooks are used, and they
are removed even when the network raises.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .encoders import Encoder

__all__ = ["Layer", "Reader", "Tail", "features", "read", "receptive_fields", "tail", "trace"]


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no ``except Exception`` keeps it."""


# ------------------------------------------------------------------------------ what a layer gives


@dataclass(frozen=True)
class _Layout:
    """How a module's output lies in memory: ``form`` is NCHW, NHWC, NTC, NC or raw."""

    form: str
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)

    @property
    def kind(self) -> str:
        return {"NCHW": "map", "NHWC": "map", "NTC": "tokens", "NC": "vector"}.get(
            self.form, "other"
        )


_RAW = _Layout("raw")
_SPATIAL = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


def _same_aspect(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a grid can be a subsampled image; unpadded convolutions may lose a few rows."""
    if size[0] == size[1]:
        return grid[0] == grid[1] <= size[0]
    return abs(grid[0] * size[1] / size[0] - grid[1]) <= 3 and grid[0] <= size[0]


def _token_grid(
    tokens: int, size: tuple[int, int], patch: int | None, prefix: int
) -> tuple[int, tuple[int, int]] | None:
    """Number of prefix tokens and (rows, columns) of a token sequence; None if no grid fits."""
    strides = [patch * 2**k for k in range(5)] if patch else [4, 8, 16, 32, 2, 64, 1]
    for extra in dict.fromkeys((prefix, 0)):
        for stride in strides:
            for rounding in (math.floor, math.ceil):
                rows, columns = (max(1, rounding(side / stride)) for side in size)
                if rows * columns + extra == tokens:
                    return extra, (rows, columns)
    return None


def _layout(
    module: nn.Module, output: object, *, batch: int, size: tuple[int, int], encoder: Encoder
) -> _Layout:
    """Recognise a map, a token sequence or a vector in a module's output.

    The module's type decides where it can (a convolution is channels-first, a linear layer
    channels-last). Otherwise the axes whose aspect ratio is the image's are the spatial ones, and
    the network's declared ``output_fmt`` (timm) settles a tie.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return _RAW
    if output.ndim < 2 or output.shape[0] != batch:
        return _RAW
    if output.ndim == 2:
        return _Layout("NC")
    if output.ndim == 3:
        found = _token_grid(output.shape[1], size, encoder.patch_size, encoder.num_prefix_tokens)
        return _Layout("NTC", *found) if found else _RAW
    if output.ndim == 4:
        first = (int(output.shape[1]), int(output.shape[2]))
        last = (int(output.shape[2]), int(output.shape[3]))
        channels_last = isinstance(module, nn.Linear) or (
            isinstance(module, nn.LayerNorm) and "2d" not in type(module).__name__.lower()
        )
        if channels_last:
            return _Layout("NHWC", 0, first) if _same_aspect(first, size) else _RAW
        if isinstance(module, _SPATIAL):
            return _Layout("NCHW", 0, last)
        forms = {"NCHW": last, "NHWC": first}
        fits = [form for form, grid in forms.items() if _same_aspect(grid, size)]
        if len(fits) == 2:
            declared = str(getattr(encoder.net, "output_fmt", "NCHW")).rpartition(".")[2]
            fits = [declared if declared in fits else "NCHW"]
        if fits:
            return _Layout(fits[0], 0, forms[fits[0]])
    return _RAW


def _from_native(output: Tensor, layout: _Layout) -> tuple[Tensor, Tensor | None]:
    """A copy as features (N,C,H,W) or (N,C), and the prefix tokens (N,T,C) or None."""
    if layout.form == "NHWC":
        return output.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format), None
    if layout.form == "NTC":
        grid = output[:, layout.prefix :].transpose(1, 2).unflatten(2, layout.grid)
        prefix = output[:, : layout.prefix].clone() if layout.prefix else None
        return grid.clone(memory_format=torch.contiguous_format), prefix
    return output.clone(memory_format=torch.contiguous_format), None


def _to_native(features: Tensor, prefix: Tensor | None, layout: _Layout) -> Tensor:
    """Inverse of :func:`_from_native`; a copy too, since an in-place ReLU may come next."""
    if layout.form == "NHWC":
        features = features.permute(0, 2, 3, 1)
    elif layout.form == "NTC":
        features = features.flatten(2).transpose(1, 2)
        if prefix is not None:
            prefix = prefix.expand(len(features), -1, -1).to(features)
            return torch.cat([prefix, features], dim=1)
    return features.clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------ trace


@dataclass(frozen=True)
class Layer:
    """What one module did in one forward pass.

    ``order`` counts modules by when they end (``begin`` by when they start; one clock for both),
    ``calls`` how often it ran, ``kind`` is map, tokens, vector or other; ``separates`` says that
    the network's output depends on the image only through this layer's output, ``value`` numbers
    the tensors, so that two modules that give the very same one share it.
    """

    name: str
    type: str
    begin: int
    order: int
    calls: int
    kind: str
    layout: _Layout
    channels: int
    height: int
    width: int
    separates: bool
    value: int
    image_height: int


def _size(encoder: Encoder, size: int | tuple[int, int] | None) -> tuple[int, int]:
    size = encoder.input_size if size is None else size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _cache(encoder: Encoder) -> dict[Any, Any]:
    return encoder.__dict__.setdefault("_cache", {})


def _signature(net: nn.Module) -> int:
    """Changes when a module is replaced, so that surgery on a network voids what was cached."""
    return hash(tuple((name, id(module)) for name, module in net.named_modules()))


@contextlib.contextmanager
def _measuring(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode, no autocast, no inference mode; the training flags come back after."""
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        with (
            torch.inference_mode(False),
            torch.autocast(device_type=encoder.device.type, enabled=False),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def _noise(encoder: Encoder, size: tuple[int, int], *, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, encoder.mean.shape[-3], *size, generator=generator)
    return images.to(encoder.device, encoder.mean.dtype)


def trace(encoder: Encoder, *, size: int | tuple[int, int] | None = None) -> dict[str, Layer]:
    """Run one image through and record every module that executed, in order of completion.

    ``size`` in pixels (default: the encoder's input size). The result is cached until a module of
    the network is replaced. ``separates`` is read off the autograd graph: a node that no path from
    the image to the output avoids. Cost: one forward pass of one image.
    """
    height_width = _size(encoder, size)
    key = ("trace", height_width, _signature(encoder.net))
    cache = _cache(encoder)
    if key not in cache:
        cache[key] = _trace(encoder, height_width)
    return cache[key]


def _trace(encoder: Encoder, size: tuple[int, int]) -> dict[str, Layer]:
    clock = 0
    begins: dict[str, int] = {}
    records: dict[str, dict[str, Any]] = {}
    nodes: dict[str, Any] = {}

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object) -> None:
            begins[name] = tick()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: object, output: object) -> None:
            layout = _layout(module, output, batch=1, size=size, encoder=encoder)
            channels = 0
            if isinstance(output, Tensor) and output.ndim > 1:
                channels = output.shape[1 if layout.form in ("NCHW", "NC") else -1]
            calls = records[name]["calls"] if name in records else 0
            records[name] = {
                "name": name,
                "type": type(module).__name__,
                "begin": begins[name],
                "order": tick(),
                "calls": calls + 1,
                "kind": layout.kind,
                "layout": layout,
                "channels": channels,
                "height": layout.grid[0],
                "width": layout.grid[1],
            }
            node = output.grad_fn if isinstance(output, Tensor) else None
            nodes[name] = node
            if layout.form == "NCHW" and isinstance(output, Tensor):
                records[name]["height"], records[name]["width"] = output.shape[2:]

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(_measuring(encoder))
        stack.enter_context(torch.enable_grad())
        for name, module in encoder.net.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        images = _noise(encoder, size).requires_grad_()
        output = encoder(images)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{encoder.name} gives a {type(output).__name__}, not a tensor: only networks with "
                "one output can be read"
            )
        cuts = _cuts(output.grad_fn, get_gradient_edge(images).node)

    values: dict[Any, int] = {}
    layers = {}
    for name, record in sorted(records.items(), key=lambda item: item[1]["order"]):
        node = nodes[name]
        value = values.setdefault(node if node is not None else name, len(values))
        separates = node is not None and node in cuts and record["calls"] == 1
        layers[name] = Layer(**record, separates=separates, value=value, image_height=size[0])
    return layers


def _cuts(root: Any, leaf: Any) -> set[Any]:
    """Nodes of the autograd graph that every path from ``root`` to ``leaf`` goes through.

    Sweep the nodes in topological order: one is a cut exactly when no edge jumps over it.
    """
    if root is None:
        return set()
    reaches: dict[Any, bool] = {}
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [(root, False)]
    seen: set[Any] = set()
    while stack:
        node, done = stack.pop()
        following = [edge[0] for edge in node.next_functions if edge[0] is not None]
        if done:
            reaches[node] = node is leaf or any(reaches[other] for other in following)
            if reaches[node]:
                order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((other, False) for other in following if other not in seen)
    order.reverse()
    position = {node: index for index, node in enumerate(order)}
    cuts, furthest = set(), 0
    for index, node in enumerate(order):
        if furthest <= index:
            cuts.add(node)
        for edge in node.next_functions:
            furthest = max(furthest, position.get(edge[0], 0))
    return cuts


# ------------------------------------------------------------------------------------------- read


def _names(encoder: Encoder, layers: str | Iterable[str]) -> tuple[str, ...]:
    """Check names before any work: known, executed, run once. Raises ValueError."""
    names = tuple(dict.fromkeys([layers] if isinstance(layers, str) else layers))
    if not names:
        raise ValueError("no layer was named")
    modules = dict(encoder.net.named_modules())
    modules.pop("", None)
    for name in names:
        if name not in modules:
            close = difflib.get_close_matches(str(name), list(modules), n=5, cutoff=0.3)
            raise ValueError(
                f"{encoder.name} has no layer {name!r}; closest: {', '.join(close) or 'none'} "
                "(encoder.layers() lists what can be read)"
            )
        if name in encoder.changed:
            raise ValueError(
                f"layer {name!r} of {encoder.name} was fused with the batch norm after it and no "
                "longer gives its own output: read the batch norm, or extract.optimise(..., "
                f"keep=[{name!r}])"
            )
    known = trace(encoder)
    for name in names:
        if name not in known:
            raise ValueError(
                f"layer {name!r} of {encoder.name} never executes in a forward pass: nothing to "
                f"read (nearest that do: {', '.join(_nearest(name, list(known)))})"
            )
        if known[name].calls > 1:
            single = [layer.name for layer in known.values() if layer.calls == 1]
            raise ValueError(
                f"layer {name!r} of {encoder.name} runs {known[name].calls} times in a forward "
                "pass, so its output is ambiguous: read the module around it (nearest that run "
                f"once: {', '.join(_nearest(name, single))})"
            )
    return names


def _nearest(name: str, choices: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, choices, n=4, cutoff=0.0)


class Reader:
    """Call it with images to get their features; made by :func:`read`."""

    def __init__(self, encoder: Encoder, layers: str | Iterable[str]) -> None:
        self.encoder = encoder
        self.layers = _names(encoder, layers)
        #: Class and register tokens (N, T, C) of the last call, by layer; only where there are any.
        self.prefix: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] | None = None
        self._shape: tuple[int, tuple[int, int]] = (0, (0, 0))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: object, output: object) -> None:
            if self._values is None:  # the encoder is called by someone else in the meantime
                return
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"layer {name!r} of {self.encoder.name} gives a {type(output).__name__}, not a "
                    "tensor"
                )
            batch, size = self._shape
            layout = _layout(module, output, batch=batch, size=size, encoder=self.encoder)
            self._values[name], prefix = _from_native(output, layout)
            if prefix is not None:
                self.prefix[name] = prefix
            if len(self._values) == len(self.layers):
                raise _Stop

        return hook

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (N,3,H,W) in [0,1], by layer, in the order the layers were named."""
        self._values, self.prefix = {}, {}
        self._shape = (len(images), (int(images.shape[-2]), int(images.shape[-1])))
        try:
            with contextlib.suppress(_Stop):
                self.encoder(images)
            values = self._values
        finally:
            self._values = None
        for name in self.layers:
            if name not in values:
                raise ValueError(
                    f"layer {name!r} of {self.encoder.name} did not execute on these images"
                )
        return {name: values[name] for name in self.layers}


@contextlib.contextmanager
def read(encoder: Encoder, layers: str | Iterable[str]) -> Iterator[Reader]:
    """Open layers for reading; a context manager.

    ``with taps.read(encoder, layers) as read: features = read(images)``

    Gives a dict layer -> tensor: feature maps and token grids (N, C, H, W), whatever the network's
    own layout, contiguous; vectors (N, C); other shapes (attention windows) as they are. Class and
    register tokens are in ``read.prefix[layer]`` (N, T, C). Values are copies (an in-place ReLU
    after a convolution cannot change them) and keep the autograd graph; the forward pass stops
    after the deepest layer asked for; the hooks go even when something raises.

    Raises ValueError for an unknown layer (naming the closest), one that never executes, one that
    runs more than once in a forward pass, or one that gives no tensor.
    """
    reader = Reader(encoder, layers)
    handles = []
    try:
        for name in reader.layers:
            module = encoder.net.get_submodule(name)
            handles.append(module.register_forward_hook(reader._hook(name)))
        yield reader
    finally:
        for handle in handles:
            handle.remove()


def features(
    encoder: Encoder, images: Tensor, layers: str | Iterable[str], *, batch_size: int | None = None
) -> dict[str, Tensor]:
    """Read layers of images (N,3,H,W) once, without gradients; see :func:`read`.

    ``batch_size`` bounds how many images go through at a time (default: all). The images are moved
    to the encoder's device, and the features stay there.
    """
    step = len(images) if batch_size is None else batch_size
    if step < 1:
        raise ValueError(f"batch_size must be at least 1 and images must not be empty, not {step}")
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad(), read(encoder, layers) as reader:
        for start in range(0, len(images), step):
            parts.append(reader(images[start : start + step].to(encoder.device)))
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ------------------------------------------------------------------------------------------- tail


@contextlib.contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _constant(value: Any) -> Callable[..., Any]:
    def forward(*_args: object, **_kwargs: object) -> Any:
        return value

    return forward


class Tail:
    """Call it with features to get logits; made by :func:`tail`."""

    def __init__(
        self,
        encoder: Encoder,
        layer: str,
        *,
        to: str | tuple[str, ...] | None,
        size: tuple[int, int],
    ) -> None:
        self.encoder, self.layer, self.to, self.size = encoder, layer, to, size
        self._record = trace(encoder, size=size)[layer]
        self._skipped = self._front_modules()
        self._fronts: dict[Any, dict[nn.Module, Any]] = {}

    def _front_modules(self) -> list[nn.Module]:
        """The largest modules that end before the layer begins: a constant can stand for them."""
        known = trace(self.encoder, size=self.size)
        skipped: list[nn.Module] = []

        def walk(module: nn.Module, path: str) -> None:
            for child_name, child in module.named_children():
                name = f"{path}{child_name}"
                if name == self.layer:
                    continue
                record = known.get(name)
                if self.layer.startswith(name + ".") or record is None:
                    walk(child, name + ".")
                elif record.calls == 1 and record.order < self._record.begin:
                    skipped.append(child)

        walk(self.encoder.net, "")
        return skipped

    def _front(self, size: tuple[int, int]) -> tuple[dict[nn.Module, Any], Tensor, _Layout]:
        """Outputs of the skipped modules for one blank image, and the layer's own output."""
        kept: dict[nn.Module, Any] = {}
        module = self.encoder.net.get_submodule(self.layer)
        found: list[Tensor] = []

        def keep(module: nn.Module, _args: object, output: object) -> None:
            kept[module] = output

        def stop(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor):
                found.append(output)
            raise _Stop

        images = torch.full_like(_noise(self.encoder, size), 0.5)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_measuring(self.encoder))
            stack.enter_context(torch.no_grad())
            for skipped in self._skipped:
                stack.callback(skipped.register_forward_hook(keep).remove)
            stack.callback(module.register_forward_hook(stop).remove)
            with contextlib.suppress(_Stop):
                self.encoder(images)
        layout = _layout(module, found[0], batch=1, size=size, encoder=self.encoder)
        return kept, found[0], layout

    def _front_for(self, features: Tensor) -> tuple[dict[nn.Module, Any], tuple[int, int], _Layout]:
        """The front at an image size whose features have this grid (rotary positions need it)."""
        grid = tuple(features.shape[2:]) if features.ndim == 4 else ()
        key = (grid, features.device, self.encoder.mean.dtype)
        if key in self._fronts:
            return self._fronts[key]  # pyright: ignore
        own = (self._record.height, self._record.width)
        sizes = [self.size]
        if grid and grid != own:
            strides = [round(side / cells) for side, cells in zip(self.size, own, strict=True)]
            start = [
                round(side * wanted / cells)
                for side, wanted, cells in zip(self.size, grid, own, strict=True)
            ]
            offsets = sorted(range(-max(strides), max(strides) + 1), key=abs)
            sizes = [(start[0] + offset, start[1] + offset) for offset in offsets]
        for size in sizes:
            if min(size) < 1:
                continue
            try:
                kept, output, layout = self._front(size)
            except (RuntimeError, ValueError, AssertionError):
                continue  # the network does not take images of this size
            value, _ = _from_native(output, layout)
            if tuple(value.shape[2:]) == grid:
                if len(self._fronts) > 4:  # each holds a few maps of one image
                    self._fronts.clear()
                self._fronts[key] = (kept, size, layout)  # pyright: ignore
                return kept, size, layout
        raise ValueError(
            f"features of layer {self.layer!r} with a {'x'.join(map(str, grid))} grid fit no image "
            f"size near {start if grid and grid != own else list(self.size)} that "  # pyright: ignore
            f"{self.encoder.name} takes"
        )

    def __call__(self, features: Tensor, prefix: Tensor | None = None) -> Any:
        """Logits (N, K), or the features of the layers ``to``, from features (N, C, ...) here."""
        record = self._record
        ndim = {"vector": 2, "map": 4, "tokens": 4}[record.kind]
        if features.ndim != ndim or features.shape[1] != record.channels:
            shape = "(N, C)" if ndim == 2 else "(N, C, H, W)"
            raise ValueError(
                f"features of layer {self.layer!r} are {shape} with C = {record.channels}, not "
                f"{tuple(features.shape)}"
            )
        if record.layout.prefix and prefix is None:
            raise ValueError(
                f"layer {self.layer!r} carries {record.layout.prefix} class or register tokens: "
                "pass them as prefix (read.prefix[layer] has them)"
            )
        if prefix is not None and not record.layout.prefix:
            raise ValueError(f"layer {self.layer!r} has no class or register tokens: drop prefix")
        kept, size, layout = self._front_for(features)
        native = _to_native(features, prefix, layout)
        net = self.encoder.net
        forwards = {module: _constant(value) for module, value in kept.items()}
        forwards[net.get_submodule(self.layer)] = _constant(native)
        images = torch.full_like(_noise(self.encoder, size), 0.5)
        if self.to is None:
            with _replaced(forwards):
                return self.encoder(images)
        wanted = (self.to,) if isinstance(self.to, str) else self.to
        values: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, _args: object, output: Tensor) -> None:
                at = _layout(module, output, batch=len(native), size=size, encoder=self.encoder)
                values[name] = _from_native(output, at)[0].clone()
                if len(values) == len(wanted):
                    raise _Stop

            return hook

        with contextlib.ExitStack() as stack:
            for name in wanted:
                module = net.get_submodule(name)
                stack.callback(module.register_forward_hook(keep(name)).remove)
            with _replaced(forwards), contextlib.suppress(_Stop):
                self.encoder(images)
        return values[wanted[0]] if isinstance(self.to, str) else {n: values[n] for n in wanted}


def tail(
    encoder: Encoder,
    layer: str,
    *,
    to: str | Iterable[str] | None = None,
    size: int | tuple[int, int] | None = None,
    check: bool = True,
) -> Tail:
    """Rest of the network after ``layer``: a callable ``(features, prefix=None) -> logits``.

    ``features`` as :func:`read` gives them, (N, C, H, W) or (N, C), changed or not; ``prefix``
    (N or 1, T, C) is needed where the layer carries class or register tokens. Gradients flow to
    both. With ``to`` the value is the features of that deeper layer instead of logits, or a dict
    layer -> features where ``to`` names several. Grids of another size than at ``size`` (pixels;
    default: the encoder's input size) are taken where the network takes such images.

    The layer must separate the network: nothing that comes after may use what came before except
    through it (a layer inside a residual branch does not). That is read off the autograd graph, and
    with ``check`` confirmed on two noise images: the tail of their features must give the network's
    own output. The rest runs on the given features alone; what precedes the layer is a constant.

    Raises ValueError for a layer that cannot be read, does not separate the network (naming the
    nearest that do) or fails the check.
    """
    (layer,) = _names(encoder, layer)
    height_width = _size(encoder, size)
    known = trace(encoder, size=height_width)
    record = known[layer]
    if not record.separates or record.kind == "other":
        valid = [x for x in known.values() if x.separates and x.kind != "other"]
        valid.sort(key=lambda x: abs(x.order - record.order))
        names = ", ".join(x.name for x in valid[:4]) or "none"
        why = "gives no map, tokens or vector" if record.separates else "does not separate the net"
        raise ValueError(
            f"layer {layer!r} of {encoder.name} {why}: later layers also use what comes before it "
            f"(a residual branch, say); nearest layers that do: {names}"
            if not record.separates
            else f"layer {layer!r} of {encoder.name} {why}; nearest layers that do: {names}"
        )
    if to is not None:
        targets = _names(encoder, to)
        for name in targets:
            if known[name].order <= record.order or known[name].kind == "other":
                raise ValueError(f"layer {name!r} does not come after {layer!r} in {encoder.name}")
        to = targets[0] if isinstance(to, str) else targets
    rest = Tail(encoder, layer, to=to, size=height_width)
    if check:
        _check(rest)
    return rest


def _check(rest: Tail) -> None:
    encoder = rest.encoder
    images = _noise(encoder, rest.size, batch=2, seed=1)
    with _measuring(encoder), torch.no_grad():
        with read(encoder, rest.layer) as reader:
            value = reader(images)[rest.layer]
            prefix = reader.prefix.get(rest.layer)
        found = rest(value, prefix)
        if rest.to is None:
            expected = encoder(images)
        else:  # the deepest one speaks for all
            layers = (rest.to,) if isinstance(rest.to, str) else rest.to
            deepest = max(layers, key=lambda name: trace(encoder, size=rest.size)[name].order)
            expected = features(encoder, images, deepest)[deepest]
            found = found[deepest] if isinstance(found, dict) else found
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if found.shape != expected.shape or not bool(
        (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)
    ):
        raise ValueError(
            f"the rest of {encoder.name} after layer {rest.layer!r} does not reproduce the "
            "network: it uses something that came before (the batch size or the image itself)"
        )


# ------------------------------------------------------------------------------- receptive fields


def _pass_through(function: Callable[..., Any], linear: Callable[..., Any] | None = None) -> Any:
    """Keep a function's value, but let the gradient of ``linear`` (default: identity) through."""

    def replaced(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value = function(x, *args, **kwargs)
        smooth = x if linear is None else linear(x, *args, **kwargs)
        return smooth + (value - smooth).detach()

    return replaced


def _max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    value: Any = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if return_indices or dilation not in (1, (1, 1), [1, 1]):
        return value
    average = F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode)
    return average + (value - average).detach()


def _replacements() -> dict[Any, Callable[..., Any]]:
    """Functions whose backward pass picks positions: a dead ReLU, a clamp, the winner of a pool."""
    clamp = _pass_through(torch.clamp)
    relu = _pass_through(lambda x, inplace=False: torch.relu(x))
    relu6 = _pass_through(lambda x, inplace=False: torch.clamp(x, 0, 6))
    hardtanh = _pass_through(
        lambda x, low=-1.0, high=1.0, inplace=False, **names: torch.clamp(
            x, names.get("min_val", low), names.get("max_val", high)
        )
    )
    hardswish = _pass_through(lambda x, inplace=False: x * torch.clamp(x + 3, 0, 6) / 6)
    hardsigmoid = _pass_through(lambda x, inplace=False: torch.clamp(x / 6 + 0.5, 0, 1))
    adaptive = _pass_through(
        lambda x, size, return_indices=False: F.adaptive_max_pool2d(x, size),
        lambda x, size, return_indices=False: F.adaptive_avg_pool2d(x, size),
    )
    table = {
        F.relu: relu, torch.relu: relu, torch.relu_: relu, Tensor.relu: relu, Tensor.relu_: relu,
        F.relu6: relu6, F.hardtanh: hardtanh, F.hardtanh_: hardtanh,
        F.hardswish: hardswish, F.hardsigmoid: hardsigmoid,
        torch.clamp: clamp, torch.clamp_: clamp, Tensor.clamp: clamp, Tensor.clamp_: clamp,
        F.max_pool2d: _max_pool, torch.max_pool2d: _max_pool,
        F.adaptive_max_pool2d: adaptive,
    }  # fmt: skip
    return table


class _Structural(TorchFunctionMode):
    """Makes a backward pass show what an output could depend on, rather than what it does here."""

    def __init__(self) -> None:
        super().__init__()
        self._table = _replacements()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function: Any = self._table.get(func, func)
        return function(*args, **(kwargs or {}))


def receptive_fields(
    encoder: Encoder, layers: Iterable[str], *, size: int | tuple[int, int] | None = None
) -> dict[str, tuple[float, float]]:
    """Receptive field and stride in pixels of the central unit of each layer, measured.

    A NaN gradient is put on all channels of the central unit and sent back to the image: NaN times
    any weight is NaN, so it marks every pixel the unit is connected to, however small the weights,
    and cannot cancel, vanish or underflow. ReLU, clamps and max pooling, which pass gradients only
    where they happen to be open, pass all of them; so the answer is the architecture's, not the
    weights'. The stride is the distance of the fields of two neighbouring units.

    The field is the larger of its two sides, and inf where it reaches the border of the image:
    then it may be larger than can be seen at this ``size`` (self-attention, squeeze-and-excitation
    and global pooling see everything). Where the field is inf, the stride is the product of the
    steps between the map sizes that occur, each rounded.
    """
    known = trace(encoder, size=size)
    result: dict[str, tuple[float, float]] = {}
    for name, extent in _extents(encoder, layers, size=size):
        record = known[name]
        result[name] = (math.inf, math.nan)
        if extent is not None:
            nominal = _nominal_stride(known, record.height)
            result[name] = _field(record, extent, _size(encoder, size), nominal)
    return result


def _nominal_stride(known: Mapping[str, Layer], height: int) -> float:
    """Stride from map heights: 260, 130, 65, 33, 17, 9 are five halvings, though 260/9 = 28.9."""
    heights = {x.height for x in known.values() if x.kind in ("map", "tokens")}
    stride, above = 1, next(iter(known.values())).image_height
    for below in sorted((h for h in heights if height <= h <= above), reverse=True):
        stride, above = stride * round(above / below), below
    return float(stride)


def spans(
    encoder: Encoder, layers: Iterable[str], *, size: int | tuple[int, int] | None = None
) -> dict[str, tuple[tuple[int, int, int], tuple[int, int, int]] | None]:
    """Which pixels each unit sees: for rows and for columns, (low, high, stride).

    Unit i of the axis is connected to the pixels low + i·stride to high + i·stride of an image
    without borders; measured at the centre as in :func:`receptive_fields`. None where the field
    reaches the border of an image of this ``size``, or the layer is no map. The result is cached
    like that of :func:`trace`.
    """
    known = trace(encoder, size=size)
    sides = _size(encoder, size)
    names = _names(encoder, layers)
    cache = _cache(encoder).setdefault(("spans", sides, _signature(encoder.net)), {})
    missing = [name for name in names if name not in cache]
    for name, extent in _extents(encoder, missing, size=size) if missing else ():
        record = known[name]
        cache[name] = None
        if extent is None or min(record.height, record.width) < 3:
            continue
        at = (record.height // 2, record.width // 2)
        here, before = extent(*at), extent(at[0] - 1, at[1] - 1)
        inside = all(
            low > 0 and high < side - 1
            for pixels in (here, before)
            for (low, high), side in zip(pixels, sides, strict=True)
        )
        if inside:
            axes = []
            for unit, (low, high), (earlier, _) in zip(at, here, before, strict=True):
                stride = low - earlier
                axes.append((low - unit * stride, high - unit * stride, stride))
            cache[name] = (axes[0], axes[1])
    return {name: cache[name] for name in names}


def _extents(
    encoder: Encoder, layers: Iterable[str], *, size: int | tuple[int, int] | None
) -> Iterator[tuple[str, Callable[[int, int], list[tuple[int, int]]] | None]]:
    """For each layer a function (row, column) -> first and last pixel of that unit, by axis."""
    height_width = _size(encoder, size)
    names = _names(encoder, layers)
    known = trace(encoder, size=height_width)
    values: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            values[name] = output.clone()  # an in-place operation may follow

        return hook

    if encoder.device.type != "cpu":
        encoder = copy.deepcopy(encoder).to("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_measuring(encoder))
        stack.enter_context(torch.enable_grad())
        # Winograd and FFT convolutions mix neighbouring pixels and would spread the marker: cuDNN
        # and the Arm library use them, oneDNN on x86 does not.
        if platform.machine().lower() not in ("x86_64", "amd64"):
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # about Intel GPUs
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        for name in names:
            module = encoder.net.get_submodule(name)
            stack.callback(module.register_forward_hook(keep(name)).remove)
        images = _noise(encoder, height_width).requires_grad_()
        with _Structural():
            encoder(images)
        for name in names:
            record, value = known[name], values.pop(name)
            seen = record.kind in ("map", "tokens") and value.grad_fn is not None
            yield name, functools.partial(_extent, record, value, images) if seen else None


def _extent(
    record: Layer, value: Tensor, images: Tensor, row: int, column: int
) -> list[tuple[int, int]]:
    """First and last pixel of a unit's field, by axis."""
    mark = torch.zeros_like(value)
    if record.layout.form == "NCHW":
        mark[0, :, row, column] = math.nan
    elif record.layout.form == "NHWC":
        mark[0, row, column, :] = math.nan
    else:
        mark[0, record.layout.prefix + row * record.width + column, :] = math.nan
    (gradient,) = torch.autograd.grad(value, images, mark, retain_graph=True)
    seen = gradient[0].isnan().any(dim=0)
    pixels = []
    for axis in (0, 1):
        where = seen.any(dim=1 - axis).nonzero()
        pixels.append((int(where.min()), int(where.max())) if len(where) else (0, -1))
    return pixels


def _field(
    record: Layer,
    extent: Callable[[int, int], list[tuple[int, int]]],
    sides: tuple[int, int],
    nominal: float,
) -> tuple[float, float]:
    height, width = record.height, record.width
    row, column = (height - 1) // 2, (width - 1) // 2
    spans = extent(row, column)
    if any(low <= 0 or high >= side - 1 for (low, high), side in zip(spans, sides, strict=True)):
        return math.inf, nominal
    field = max(high - low + 1 for low, high in spans)
    stride = nominal
    if height > 1 and width > 1:
        other = extent(row + 1, column + 1)
        apart = max(there[0] - here[0] for here, there in zip(spans, other, strict=True))
        if apart > 0:  # 0 for two units of one attention window
            stride = float(apart)
    return float(field), stride
