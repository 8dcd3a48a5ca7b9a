"""Anti-aliasing surgery: change how a pretrained encoder subsamples, without training or after it.

Each operation returns a changed copy of the encoder; layers keep their names and can be tapped.

* :func:`blurpool`: low-pass every signal before it is subsampled (Zhang 2019, §3.2).
* :func:`polyphase`: keep the strongest polyphase component instead of the first, with circular
  padding (adaptive polyphase sampling, Chaman & Dokmanić 2021, §3): exactly consistent under
  circular shifts, even untrained.
* :func:`reestimate_batch_norm`: fit the running statistics to the changed activations.
* :func:`distil`: train the changed copy to agree with the original on unlabelled images.
* :func:`twin`: such a copy, trained for this project; :func:`save_twin` and :func:`load_twin` keep
  others, as the differences from the original.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn
from tqdm import tqdm

from . import images as image_sets
from . import store, taps
from .encoders import Encoder
from .encoders import load as load_encoder
from .images import ImageSet

#: How often the box filter of the stride's length is convolved with itself. For stride 2 this gives
#: the kernels [1,1], [1,2,1] and [1,4,6,4,1] that Zhang (2019) calls Rect-2, Tri-3 and Bin-5.
KERNELS = {"rect2": 1, "tri3": 2, "bin5": 4}

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def kernel1d(name: str, stride: int) -> Tensor:
    """The low-pass kernel ``name`` for one dimension: float64, summing to one.

    For stride 2: Zhang's Rect-2, Tri-3, Bin-5. For stride s: the box of length s convolved with
    itself to 1, 2 or 4 factors, which keeps a zero of the response at the sampling frequency 1/s.

    Raises ``ValueError`` for an unknown name or a stride below 2.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown blur kernel {name!r}: choose one of {', '.join(KERNELS)}")
    if stride < 2:
        raise ValueError(f"a blur kernel needs a stride of at least 2, got {stride}")
    box = torch.full((1, 1, stride), 1 / stride, dtype=torch.float64)
    kernel = box
    for _ in range(KERNELS[name] - 1):
        kernel = F.conv1d(kernel, box, padding=stride - 1)
    return kernel[0, 0]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


class Subsampler(nn.Module):
    """A strided convolution or pooling taken apart: its dense (stride 1) form, then a subsampling.

    Point ``s·i`` of the dense output is point ``i`` of the original layer, so that a pretrained
    network sees the signal where it was trained to see it.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        kinds = (nn.Conv2d, Conv2dSame, *_POOLS, MaxPool2dSame, AvgPool2dSame)
        if type(layer) not in kinds:
            raise ValueError(
                f"cannot take {name!r} ({type(layer).__name__}) apart: surgery knows Conv2d,"
                " MaxPool2d, AvgPool2d and their TensorFlow-padded forms"
            )
        self.layer = layer
        self.name = name
        self.kernel_size = _pair(layer.kernel_size)  # type: ignore[arg-type]
        self.stride = _pair(layer.stride)  # type: ignore[arg-type]
        self.dilation = _pair(getattr(layer, "dilation", 1))
        self.ceil_mode = bool(getattr(layer, "ceil_mode", False))
        same = isinstance(layer, Conv2dSame | MaxPool2dSame | AvgPool2dSame)
        padding = getattr(layer, "padding", 0)
        if isinstance(padding, str):  # PyTorch's own "same" exists for stride 1 only
            padding = tuple((self._span(a) - 1) // 2 for a in (0, 1)) if padding == "same" else 0
        self.padding = None if same else _pair(padding)

    def _span(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1

    def _points(self, size: int, axis: int) -> tuple[int, int]:
        """(number of sampling points, reach of the first window before the first pixel)."""
        stride, span = self.stride[axis], self._span(axis)
        if self.padding is None:
            points = math.ceil(size / stride)
            return points, max((points - 1) * stride + span - size, 0) // 2
        pad = self.padding[axis]
        room = size + 2 * pad - span
        points = (math.ceil(room / stride) if self.ceil_mode else room // stride) + 1
        # PyTorch drops a last pooling window that would start beyond the image.
        if self.ceil_mode and (points - 1) * stride >= size + pad:
            points -= 1
        return points, pad

    def _stride_one(self, x: Tensor) -> Tensor:
        """The operation with stride 1 on an already padded input."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, layer.weight, layer.bias, 1, 0, self.dilation, layer.groups)
        if isinstance(layer, nn.MaxPool2d):
            if torch.is_grad_enabled() and x.requires_grad:
                return F.max_pool2d(x, self.kernel_size, 1, 0, self.dilation)
            # Row by row, then column by column: the same, and far faster on a CPU at stride 1.
            for axis, dim in ((0, 2), (1, 3)):
                room = x.shape[dim] - self._span(axis) + 1
                starts = range(0, self._span(axis), self.dilation[axis])
                x = functools.reduce(torch.maximum, [x.narrow(dim, at, room) for at in starts])
            return x
        return F.avg_pool2d(x, self.kernel_size, 1, 0)

    def dense(self, x: Tensor) -> Tensor:
        """Dense output from the first to the last sampling point: s·(H'-1)+1 by s·(W'-1)+1."""
        value = -math.inf if isinstance(self.layer, nn.MaxPool2d) else 0.0
        pads: list[int] = []
        for axis in (1, 0):
            size = x.shape[2 + axis]
            points, left = self._points(size, axis)
            right = (points - 1) * self.stride[axis] + self._span(axis) - left - size
            pads += [left, right]
        return self._stride_one(F.pad(x, pads, value=value))

    def dense_circular(self, x: Tensor) -> Tensor:
        """Dense output on the torus: the same size as ``x``."""
        pads: list[int] = []
        for axis in (1, 0):
            _, left = self._points(x.shape[2 + axis], axis)
            pads += [left, self._span(axis) - 1 - left]
        return self._stride_one(F.pad(x, pads, mode="circular"))


class BlurPool(Subsampler):
    """Dense operation → low-pass filter → subsampling (Zhang 2019, eq. 5 and 6).

    The filter sits directly behind the convolution. Zhang puts it behind the ReLU that follows; the
    two agree up to that ReLU, since a filter that sums to one commutes with the batch norm.
    """

    padding_mode = "reflect"

    def __init__(self, layer: nn.Module, name: str, *, kernel: str) -> None:
        super().__init__(layer, name)
        for axis, stride in enumerate(self.stride):
            one = kernel1d(kernel, stride) if stride > 1 else torch.ones(1, dtype=torch.float64)
            self.register_buffer(f"kernel{axis}", one.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the shape that the original layer gives."""
        x = self.dense(x)
        channels = x.shape[1]
        for axis in (0, 1):
            kernel: Tensor = getattr(self, f"kernel{axis}").to(x)
            total = kernel.numel() - 1
            pads = [0, 0, 0, 0]
            pads[2 - 2 * axis : 4 - 2 * axis] = [total // 2, total - total // 2]
            # Reflection needs more pixels than it adds: tiny maps repeat their border instead.
            mode = "reflect" if total - total // 2 < x.shape[2 + axis] else "replicate"
            weight = kernel.view((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
            stride = [1, 1]
            stride[axis] = self.stride[axis]
            x = F.conv2d(
                F.pad(x, pads, mode=mode),
                weight.expand(channels, *weight.shape[1:]),
                stride=tuple(stride),
                groups=channels,
            )
        return x


class _Phases:
    """The polyphase index that each image chose at each resolution, within one forward pass.

    Paths that are added later (a residual branch and its shortcut) must keep the same phase.
    """

    def __init__(self) -> None:
        self.chosen: dict[tuple[int, ...], Tensor] = {}

    def reset(self, *_: object) -> None:
        self.chosen.clear()


class PolyphaseSampler(Subsampler):
    """Dense circular operation → the polyphase component of largest ℓ2 norm.

    Chaman & Dokmanić 2021, §3.1.
    """

    padding_mode = "circular"

    def __init__(self, layer: nn.Module, name: str, *, phases: _Phases | None) -> None:
        super().__init__(layer, name)
        self.phases = phases  # None: always the first component

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H/s, W/s); ``ValueError`` where s does not divide H or W."""
        x = self.dense_circular(x)
        (sy, sx), (n, _, height, width) = self.stride, x.shape
        if sy == sx == 1:
            return x
        if height % sy or width % sx:
            raise ValueError(
                f"adaptive polyphase sampling at {self.name!r} needs a map whose sides are"
                f" multiples of {sy}×{sx}, got {height}×{width}: choose another image size"
            )
        if self.phases is None:
            return x[:, :, ::sy, ::sx]
        key = (height, width, sy, sx)
        if key not in self.phases.chosen or len(self.phases.chosen[key]) != n:
            energies = [
                torch.linalg.vector_norm(x[:, :, i::sy, j::sx], dim=(1, 2, 3), dtype=_double(x))
                for i in range(sy)
                for j in range(sx)
            ]
            self.phases.chosen[key] = torch.stack(energies, 1).argmax(1)
        chosen = self.phases.chosen[key].tolist()
        return torch.stack([x[k, :, c // sx :: sy, c % sx :: sx] for k, c in enumerate(chosen)])


def _double(x: Tensor) -> torch.dtype:
    """Of sums over many entries; Apple's devices have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def strided(encoder: Encoder) -> list[str]:
    """Names of the layers that subsample: strided convolutions and poolings."""
    kinds = (nn.Conv2d, *_POOLS)
    return [
        name
        for name, module in encoder.net.named_modules()
        if isinstance(module, kinds) and max(_pair(module.stride)) > 1
    ]


def blurpool(
    encoder: Encoder, *, kernel: str = "tri3", layers: Iterable[str] | None = None
) -> Encoder:
    """A copy of ``encoder`` with a blur before every subsampling, or only that of ``layers``.

    The weights are untouched: this is surgery without training. Follow it by
    :func:`reestimate_batch_norm`, since blurring lowers the variance of what follows.

    Raises ``ValueError`` for an unknown kernel, a layer that does not subsample, or an encoder in
    which nothing does.
    """
    present = strided(encoder)
    chosen = present if layers is None else list(layers)
    unknown = [name for name in chosen if name not in present]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} does not subsample in {encoder.name}: choose from {', '.join(present)}"
        )
    if not chosen:
        raise ValueError(f"nothing subsamples in {encoder.name}")
    changed = encoder.derived(f"blurpool-{kernel}")
    for name in chosen:
        changed.replace(name, BlurPool(changed.net.get_submodule(name), name, kernel=kernel))
    return changed


def polyphase(encoder: Encoder, *, adaptive: bool = True) -> Encoder:
    """A copy of ``encoder`` with circular padding and adaptive polyphase sampling at every stride.

    With a global pooling at its end such a network gives the same output for every circular shift
    of its input by whole pixels, whatever its weights. Image sides must be multiples of the total
    stride: the copy's `input_size` is the nearest one below. Shifts by fractions of a pixel are not
    covered.

    Raises ``ValueError`` for token encoders, whose position embedding breaks the circle.
    """
    if encoder.patch_size:
        raise ValueError(
            f"{encoder.name} adds position embeddings to patches: circular padding cannot make it"
            " shift-consistent; choose a convolutional encoder"
        )
    changed = encoder.derived("polyphase" if adaptive else "circular")
    phases = _Phases() if adaptive else None
    for name, module in list(changed.net.named_modules()):
        spatial = isinstance(module, (nn.Conv2d, *_POOLS)) and max(_pair(module.kernel_size)) > 1
        strides = isinstance(module, (nn.Conv2d, *_POOLS)) and max(_pair(module.stride)) > 1
        if spatial or strides:
            changed.replace(name, PolyphaseSampler(module, name, phases=phases))
    if phases is not None:
        changed.net.register_forward_pre_hook(phases.reset)
    changed.input_size = _divisible(changed)
    return changed


@torch.no_grad()
def _divisible(encoder: Encoder) -> int:
    """The largest image size up to the encoder's own that every polyphase sampling divides."""
    reason: ValueError | None = None
    for size in range(encoder.input_size, max(encoder.input_size - 64, 0), -1):
        try:
            encoder(torch.zeros(1, len(encoder.mean), size, size, device=encoder.device))
        except ValueError as error:
            reason = error
            continue
        return size
    raise ValueError(f"{encoder.name} takes no image size near {encoder.input_size}") from reason


@torch.no_grad()
def reestimate_batch_norm(encoder: Encoder, batches: Iterable[Tensor]) -> Encoder:
    """Set the running means and variances to their average over ``batches``, in place.

    ``batches`` yields (N, 3, H, W) images in [0, 1]. An encoder without batch norm is returned as
    it is. Raises ``ValueError`` if ``batches`` is empty or a batch norm was folded away.
    """
    norms = [m for m in encoder.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return encoder
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average over all batches
        norm.train()
    count = 0
    try:
        for batch in batches:
            encoder(batch.to(encoder.device))
            count += 1
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.eval()
    if not count:
        raise ValueError("no batch to re-estimate the batch norms from")
    return encoder


@dataclass(frozen=True)
class Distillation:
    """Settings of :func:`distil`. ``layers`` are the features to match, besides the logits."""

    layers: tuple[str, ...]
    steps: int = 2000
    batch_size: int = 16
    size: int = 224  #: side of the crops in pixels
    scale: tuple[float, float] = (0.5, 1.0)  #: their side before resizing, over the shorter side
    learning_rate: float = 3e-4  #: of Adam, brought to zero along a half cosine
    feature_weight: float = 1.0
    temperature: float = 2.0
    seed: int = 0
    frozen: tuple[str, ...] = ()  #: modules whose parameters stay the teacher's, as a classifier
    save_every: int = 100  #: steps between checkpoints


class DivergedError(RuntimeError):
    """The loss is not finite; the message names the step, the last checkpoint is kept."""


def distil(
    student: Encoder,
    teacher: Encoder,
    images: ImageSet,
    config: Distillation,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> list[float]:
    """Train ``student`` in place to agree with ``teacher`` on unlabelled ``images``.

    The loss is the squared feature error relative to the teacher's features, averaged over
    ``config.layers``, plus T² times the Kullback-Leibler divergence of the logits at temperature T.
    Batch norms keep their statistics (:func:`reestimate_batch_norm` first). Step t sees crops that
    depend on the seed and t alone, so a run resumed from ``checkpoint`` equals one that was never
    interrupted.

    Returns the loss of every step.

    Raises:
        ValueError: no images, or a layer or frozen module that a network lacks.
        store.MismatchError: the checkpoint belongs to other settings, networks or images.
        DivergedError: the loss is not finite.
    """
    if not len(images):
        raise ValueError("no images to distil on")
    device = student.device
    identity = {
        **{key: str(value) for key, value in asdict(config).items() if key != "save_every"},
        "student": student.weight_hash,
        "teacher": teacher.weight_hash,
        "images": images.hash,
    }
    for network in (student, teacher):
        if config.layers:
            with taps.read(network, config.layers):  # an unknown one is named, with its closest
                pass
    parameters = _trainable(student, config.frozen)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters.values(), lr=config.learning_rate)
    history: list[float] = []
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        history = _resume(path, identity, parameters, optimiser)
    try:
        steps = range(len(history), config.steps)
        for step in tqdm(steps, initial=len(history), total=config.steps, disable=not progress):
            batch = _crops(images, config, step).to(device)
            with torch.no_grad():
                target = _outputs(teacher, batch, config.layers)
            loss = _loss(_outputs(student, batch, config.layers), target, config)
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(f"the loss is {value} at step {step}: lower learning_rate")
            # Of the step alone, so that a resumed run needs no schedule of its own.
            along = math.cos(math.pi * step / config.steps)
            optimiser.param_groups[0]["lr"] = config.learning_rate * (1 + along) / 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(value)
            if path is not None and (len(history) % config.save_every == 0 or step == steps[-1]):
                _save(path, identity, parameters, optimiser, history)
    finally:
        student.net.requires_grad_(False)
    return history


def _trainable(student: Encoder, frozen: Sequence[str]) -> dict[str, nn.Parameter]:
    modules = dict(student.net.named_modules())
    for name in frozen:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f"; closest: {', '.join(close)}" if close else ""
            raise ValueError(f"no module {name!r} to freeze in {student.name}{hint}")
    kept = {id(p) for name in frozen for p in modules[name].parameters()}
    chosen = {n: p for n, p in student.net.named_parameters() if id(p) not in kept}
    if not chosen:
        raise ValueError(f"everything in {student.name} is frozen: nothing to train")
    return chosen


def _crops(images: ImageSet, config: Distillation, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    chosen = torch.randperm(len(images), generator=generator)[: config.batch_size].tolist()
    return images.select(chosen).crops(
        config.size, 1, seed=config.seed * 1_000_003 + step, scale=config.scale
    )


def _outputs(encoder: Encoder, batch: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Features and logits from one forward pass: `taps.read` would stop before the logits."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            kept[name] = output.clone()

        return hook

    handles = [encoder.net.get_submodule(n).register_forward_hook(keep(n)) for n in layers]
    try:
        kept["logits"] = encoder(batch)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _loss(student: dict[str, Tensor], teacher: dict[str, Tensor], config: Distillation) -> Tensor:
    errors = [
        (student[name] - teacher[name]).square().sum() / teacher[name].square().sum()
        for name in config.layers
    ]
    t = config.temperature
    divergence = F.kl_div(
        F.log_softmax(student["logits"] / t, 1),
        F.log_softmax(teacher["logits"] / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    feature = torch.stack(errors).mean() if errors else divergence.new_zeros(())
    return config.feature_weight * feature + t * t * divergence


def _save(
    path: Path,
    identity: dict[str, str],
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Adam,
    history: list[float],
) -> None:
    tensors: dict[str, Tensor] = {"history": torch.tensor(history, dtype=torch.float64)}
    for name, parameter in parameters.items():
        state = optimiser.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"mean.{name}"] = state["exp_avg"]
        tensors[f"square.{name}"] = state["exp_avg_sq"]
    store.save_tensors(path, tensors, metadata=identity)


def _resume(
    path: Path,
    identity: dict[str, str],
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Adam,
) -> list[float]:
    tensors, _ = store.load_tensors(path, expect=identity)
    history = tensors["history"].tolist()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(len(history))),
                "exp_avg": tensors[f"mean.{name}"].to(parameter),
                "exp_avg_sq": tensors[f"square.{name}"].to(parameter),
            }
    return history


# ------------------------------------------------------------------------------------------- twins

#: Photographs of the packaged set that twins were trained on are those of the first part of
#: ``split(TRAIN_FRACTION, seed=TRAIN_SEED)``: evaluate on the second.
TRAIN_FRACTION, TRAIN_SEED = 0.5, 0


@dataclass(frozen=True)
class Fidelity:
    """How well a changed network stands in for its original, on N images."""

    same: Tensor  #: (N,) float64, 1 where the top-1 class is the original's
    original: Tensor | None  #: (N,) float64, 1 where the original is right; None without labels
    changed: Tensor | None  #: (N,) float64, 1 where the changed network is right


@torch.no_grad()
def fidelity(
    changed: Encoder, original: Encoder, batches: Iterable[Tensor], *, labels: Any = None
) -> Fidelity:
    """Top-1 agreement of a changed network with its original, and with `labels` their accuracies.

    Args:
        changed: after surgery or training.
        original: what it was made from.
        batches: (N, 3, H, W) images in [0, 1], none of which either was trained on.
        labels: (total,) indices of the true classes.

    Raises:
        ValueError: no images, or labels of another number.
    """
    tops: list[Tensor] = []
    for batch in batches:
        both = [e(batch.to(e.device)).argmax(1).cpu() for e in (changed, original)]
        tops.append(torch.stack(both))
    if not tops:
        raise ValueError("no images to compare the networks on")
    new, old = torch.cat(tops, 1)
    same = (new == old).double()
    if labels is None:
        return Fidelity(same, None, None)
    truth = torch.as_tensor(labels)
    if truth.shape != new.shape:
        raise ValueError(f"labels of shape {tuple(truth.shape)} for {len(new)} images")
    return Fidelity(same, (old == truth).double(), (new == truth).double())


def _state(encoder: Encoder) -> dict[str, Tensor]:
    """Parameters and buffers that are numbers; counters of batches are not."""
    return {k: v for k, v in encoder.net.state_dict().items() if v.is_floating_point()}


def save_twin(
    path: str | Path, twin: Encoder, original: Encoder, *, kernel: str, card: Mapping[str, Any]
) -> None:
    """Write what distinguishes a trained ``twin`` from ``blurpool(original, kernel=kernel)``.

    Parameters go in half precision, statistics of batch norms in single; what equals the original
    (a frozen classifier) is left out. One safetensors file, written whole or not at all, with the
    original's name and weight hash, the kernel and ``card`` (data, steps, seed, errors, licence:
    any JSON) in its metadata.

    Raises:
        ValueError: the twin is not that surgery of the original, a weight is not finite in half
            precision, or nothing distinguishes the two.
    """
    before = _state(blurpool(original, kernel=kernel))
    after = _state(twin)
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        raise ValueError(
            f"{twin.name} is not blurpool({original.name}, kernel={kernel!r}): its layers differ"
        )
    parameters = {name for name, _ in twin.net.named_parameters()}
    kept = {}
    for name, value in after.items():
        if torch.equal(value.cpu(), before[name].cpu()):
            continue
        kept[name] = value.half() if name in parameters else value.float()
        if not torch.isfinite(kept[name]).all():
            raise ValueError(f"{name!r} of {twin.name} is not finite in half precision")
    if not kept:
        raise ValueError(f"{twin.name} has the weights of {original.name}: nothing to save")
    metadata = {
        "format": 1,
        "original": original.name,
        "original_weights": original.weight_hash,
        "kernel": kernel,
        "card": card,
    }
    store.save_tensors(path, kept, metadata=metadata)


def load_twin(
    path: str | Path, original: Encoder, *, kernel: str | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """The twin of ``original`` that :func:`save_twin` wrote, and its card.

    Raises:
        store.MismatchError: it was made from another encoder, other weights, or with a kernel other
            than ``kernel`` where that is given.
        FileNotFoundError: no such file.
        ValueError: not a whole file of a twin.
    """
    expect: dict[str, Any] = {
        "format": 1,
        "original": original.name,
        "original_weights": original.weight_hash,
    }
    if kernel is not None:
        expect["kernel"] = kernel
    kept, metadata = store.load_tensors(path, expect=expect)
    changed = blurpool(original, kernel=metadata["kernel"])
    state = changed.net.state_dict()
    for name, value in kept.items():
        if name not in state or state[name].shape != value.shape:
            raise ValueError(f"{path}: {name!r} does not fit {changed.name}")
        state[name].copy_(value)
    changed.name = f"twin-{metadata['kernel']}:{original.name}"
    changed.weight_hash = store.digest([original.weight_hash, store.sha256_file(path)])
    changed.source = f"{original.source}; anti-aliased and distilled, {Path(path).name}"
    store.note("encoder", changed.name, changed.weight_hash)
    return changed, metadata["card"]


#: Original -> kernel and sha256 of the trained twin's file in ``weights`` of the data folder.
_TWINS: dict[str, tuple[str, str]] = {
    "squeezenet1_1": (
        "tri3",
        "e9a7f3e200f4069894cba11778517e11e3852ef298346f5dba4bb541579ac459",
    ),
}


def twins() -> tuple[str, ...]:
    """Names of the encoders that have a trained twin here."""
    return tuple(_TWINS)


def twin_path(name: str) -> Path:
    """File of the twin of encoder ``name``; ``ValueError`` if none was trained."""
    if name not in _TWINS:
        raise ValueError(
            f"no trained twin of {name!r}: there are twins of {', '.join(_TWINS) or 'none'}; "
            "distil makes one of any encoder"
        )
    return image_sets.data_root() / "weights" / f"{name}-{_TWINS[name][0]}.safetensors"


def twin(name: str, *, device: str | torch.device = "cpu") -> Encoder:
    """The anti-aliased, trained twin of the packaged encoder ``name``.

    BlurPool before every subsampling, then distilled from the original without labels; its card is
    in the file and on the page of models. It has the layers of the original.

    Raises:
        ValueError: none was trained (the names of those that were are given), or its file is not
            the one this project was checked with.
        FileNotFoundError: the data folder lacks the file.
        encoders.UnavailableError: the original's weights are not installed.
    """
    path = twin_path(name)
    kernel, expected = _TWINS[name]
    if not path.is_file():
        raise FileNotFoundError(f"the twin of {name} belongs at {path}: fetch the data folder anew")
    found = store.sha256_file(path)
    if found != expected:
        raise ValueError(
            f"{path.name} is not the file this project was checked with: sha256 {found}, expected "
            f"{expected}"
        )
    return load_twin(path, load_encoder(name), kernel=kernel)[0].to(device)
