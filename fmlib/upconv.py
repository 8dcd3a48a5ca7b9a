r"""Learned inversion: up-convolutional decoders from codes to images (Dosovitskiy & Brox 2016).

A decoder f is trained to minimise E ‖x − f(Φ(x))‖² over photographs x, so that it estimates the
conditional expectation E[x | Φ(x)]: the mean of all pictures that share a code, which is sharp
where the code decides and blurred where it does not (§2 of the paper).

* :class:`Architecture` and :func:`decoder`: networks for grids and vectors, by the paper's recipe;
* :func:`train`: any number of decoders in one pass over photographs, the encoder frozen;
* :func:`save`, :func:`load`, :func:`trained`: decoders as half-precision files with a card;
* :func:`nearest`: the floor, a picture looked up by its code.

An up-convolution doubles each side by zero insertion (values at the top left of 2 × 2 blocks) and a
5 × 5 convolution. Three quarters of its products are with zeros: it *is* the transposed convolution
of stride 2, which is what runs here.

Sides follow the *ladder* of an image size, ⌈size / 2^k⌉ at level k: grids of networks that pad less
are first resampled to the nearest level, and every up-convolution ends on the next one exactly.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import images as image_sets
from . import stats, store
from .codes import Codes
from .errors import require_positive, require_whole, unknown
from .images import ImageSet

__all__ = [
    "PUBLISHED",
    "SMALL",
    "VARIANTS",
    "Architecture",
    "Autoencoder",
    "Decoder",
    "DivergedError",
    "Result",
    "Target",
    "Training",
    "decoder",
    "errors",
    "ladder",
    "load",
    "nearest",
    "reconstruct",
    "save",
    "train",
    "trained",
    "trained_cards",
]

#: "upconv": 5 × 5 up-convolutions (Dosovitskiy & Brox 2016); "deepsim": 4 × 4 transposed
#: convolutions with 3 × 3 convolutions between them (the generators of DeePSiM, 1602.02644).
VARIANTS = ("upconv", "deepsim")
_SLOPES = {"upconv": 0.2, "deepsim": 0.3}
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DivergedError(RuntimeError):
    """A loss was no longer finite; the message names decoder and step, the checkpoint is kept."""


# ------------------------------------------------------------------------------- architecture


@dataclass(frozen=True)
class Architecture:
    """How a decoder is built; the defaults are the paper's.

    Attributes:
        variant: of `VARIANTS`.
        base: channels at half the image's size; they double with each level down to
        cap: channels at most.
        hidden: units of the fully connected layers that a vector goes through.
        fully: number of fully connected layers, the last of which ends on the first grid.
        convolutions: 3 × 3 convolutions on a grid, before it grows.
        contract: levels that a grid is first halved by, with 5 × 5 convolutions of stride 2; for
            HOG, LBP and SIFT grids the paper goes down until 64 times smaller than the image.
        logarithm: take the logarithm of the code from this floor up, less its mean over channels;
            for probabilities, which so become logits but for a constant.

    Raises:
        ValueError: an option out of range.
    """

    variant: str = "upconv"
    base: int = 32
    cap: int = 256
    hidden: int = 4096
    fully: int = 3
    convolutions: int = 3
    contract: int = 0
    logarithm: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("variant", self.variant, VARIANTS)
        for name in ("base", "cap", "hidden", "fully", "convolutions"):
            require_whole(name, getattr(self, name), 1)
        require_whole("contract", self.contract, 0)
        if self.logarithm is not None:
            require_positive("logarithm", self.logarithm)

    def channels(self, level: int) -> int:
        """At a level of the ladder; 3 at the image's own."""
        return min(self.cap, self.base * 2 ** (level - 1)) if level else 3


PUBLISHED = Architecture()
#: A hundredth of the weights: for small pictures, few of them, and processors.
SMALL = Architecture(base=16, cap=32, hidden=64, fully=2, convolutions=1)


def ladder(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sides at levels 0 (the image), 1, 2, ...: ⌈size / 2^k⌉, until one side is 1."""
    steps = [size]
    while min(steps[-1]) > 1:
        steps.append((-(-steps[-1][0] // 2), -(-steps[-1][1] // 2)))
    return steps


def _level(grid: tuple[int, int], steps: Sequence[tuple[int, int]]) -> int:
    """The level nearest to a grid, by the ratio of sides."""

    def distance(level: int) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(grid, steps[level], strict=True))

    return min(range(len(steps)), key=distance)


def _initialise(module: nn.Module, slope: float) -> None:
    """He's initialisation for leaky rectifiers; for strides, of the products that are made."""
    for part in module.modules():
        if not isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        if isinstance(part, nn.Linear):
            inputs = part.in_features
        else:
            area = math.prod(part.kernel_size)
            inputs = part.in_channels * area
            if isinstance(part, nn.ConvTranspose2d):
                inputs = inputs / math.prod(part.stride)
        nn.init.normal_(part.weight, std=math.sqrt(2 / (1 + slope**2) / inputs))
        if part.bias is not None:
            nn.init.zeros_(part.bias)


class _UpConvolution(nn.Module):
    """From one level to the next: twice the sides, less a row where the next level is odd."""

    def __init__(self, before: int, after: int, size: tuple[int, int], kernel: int) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.size = size
        self.layer = nn.ConvTranspose2d(
            before, after, kernel, 2, padding, output_padding=2 + 2 * padding - kernel
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[..., : self.size[0], : self.size[1]]


class _Resample(nn.Module):
    """Bilinear, to a level's sides; nothing where they are right."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == self.size:
            return x
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """A network from codes (N, C, h, w) or (N, C) to images (N, 3, H, W), not clamped.

    Codes are standardised by the mean and deviation of each channel, which :meth:`calibrate`
    measures.

    Attributes:
        code_shape: (C, h, w) or (C,).
        size: (H, W).
        architecture: how it is built.
        origin: what the code is of (`Codes.identity`); empty until trained.
        card: data, steps, seed and errors, once trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, code_shape: Sequence[int], size: tuple[int, int], architecture: Architecture
    ) -> None:
        super().__init__()
        self.code_shape, self.size = tuple(code_shape), size
        self.architecture = architecture
        self.origin: dict[str, Any] = {}
        self.card: dict[str, Any] = {}
        channels = self.code_shape[0]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        steps = ladder(size)
        slope = _SLOPES[architecture.variant]
        if len(self.code_shape) == 1:
            level = _level((4, 4), steps)
            self.start = self._from_vector(level, steps[level], slope)
        else:
            found = max(1, _level((self.code_shape[1], self.code_shape[2]), steps))
            level = min(found + architecture.contract, len(steps) - 1)
            self.start = self._from_grid(found, level, steps, slope)
        self.grow = nn.Sequential(*self._ups(level, steps, slope))
        _initialise(self, slope)

    def _from_vector(self, level: int, grid: tuple[int, int], slope: float) -> nn.Sequential:
        of = self.architecture
        units = of.channels(level) * grid[0] * grid[1]
        widths = [self.code_shape[0], *[of.hidden] * (of.fully - 1), units]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.LeakyReLU(slope)]
        return nn.Sequential(*layers, nn.Unflatten(1, (of.channels(level), *grid)))

    def _from_grid(
        self, found: int, level: int, steps: Sequence[tuple[int, int]], slope: float
    ) -> nn.Sequential:
        of = self.architecture
        layers: list[nn.Module] = [_Resample(steps[found])]
        width = self.code_shape[0]
        for down in range(found + 1, level + 1):
            after = of.channels(down)
            layers += [nn.Conv2d(width, after, 5, 2, 2), nn.LeakyReLU(slope)]
            width = after
        for _ in range(of.convolutions):
            after = of.channels(level)
            layers += [nn.Conv2d(width, after, 3, padding=1), nn.LeakyReLU(slope)]
            width = after
        return nn.Sequential(*layers)

    def _ups(self, level: int, steps: Sequence[tuple[int, int]], slope: float) -> list[nn.Module]:
        of, layers = self.architecture, list[nn.Module]()
        kernel = 5 if of.variant == "upconv" else 4
        for at in range(level, 0, -1):
            before, after = of.channels(at), of.channels(at - 1)
            layers.append(_UpConvolution(before, after, steps[at - 1], kernel))
            if at > 1:
                layers.append(nn.LeakyReLU(slope))
            # as DeePSiM: 3 x 3 convolutions between, but not near the image
            if of.variant == "deepsim" and at > 2:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.LeakyReLU(slope)]
        return layers

    def _prepared(self, code: Tensor) -> Tensor:
        code = code.float()
        if self.architecture.logarithm is not None:
            code = code.clamp_min(self.architecture.logarithm).log()
            code = code - code.mean(1, keepdim=True)
        return code

    @torch.no_grad()
    def calibrate(self, code: Tensor) -> None:
        """Take means and deviations of codes (N, ...), these no less than a tenth of their rms."""
        code = self._prepared(code).double()
        over = [d for d in range(code.ndim) if d != 1]
        mean, std = code.mean(over), code.std(over, correction=0)
        # a channel that is hardly ever on would be blown up when it is
        std = std.clamp_min(0.1 * std.square().mean().sqrt())
        std = torch.where(std > 0, std, 1)
        self.mean.copy_(mean)
        self.std.copy_(std)

    @torch.no_grad()
    def begin_at(self, images: Tensor) -> None:
        """Let an untrained decoder give nearly the mean colour of images (N, 3, H, W)."""
        last = self.grow[-1]
        assert isinstance(last, _UpConvolution)
        assert last.layer.bias is not None
        last.layer.bias.copy_(images.mean((0, 2, 3)))
        last.layer.weight.mul_(0.1)

    def forward(self, code: Tensor) -> Tensor:
        """Images of codes.

        Raises:
            ValueError: codes of another shape.
        """
        if tuple(code.shape[1:]) != self.code_shape:
            raise ValueError(
                f"this decoder takes codes (N, {', '.join(map(str, self.code_shape))}), not "
                f"{tuple(code.shape)}"
            )
        shape = (1, -1, *[1] * (code.ndim - 2))
        code = (self._prepared(code) - self.mean.view(shape)) / self.std.view(shape)
        return self.grow(self.start(code))


class Autoencoder(nn.Module):
    """A decoder and its mirror image as encoder, through a code of the same shape.

    The bound of §5 of the paper: what this decoder could show if the code had been made for it.
    """

    def __init__(self, to_image: Decoder) -> None:
        super().__init__()
        self.decoder = to_image
        of, steps, shape = to_image.architecture, ladder(to_image.size), to_image.code_shape
        slope = _SLOPES[of.variant]
        vector = len(shape) == 1
        level = _level((4, 4) if vector else (shape[1], shape[2]), steps)
        layers: list[nn.Module] = []
        for at in range(level):
            layers += [nn.Conv2d(of.channels(at), of.channels(at + 1), 5, 2, 2),
                       nn.LeakyReLU(slope)]  # fmt: skip
        if vector:
            units = of.channels(level) * steps[level][0] * steps[level][1]
            layers += [nn.Flatten(), nn.Linear(units, shape[0])]
        else:
            layers += [nn.Conv2d(of.channels(level), shape[0], 3, padding=1),
                       _Resample((shape[1], shape[2]))]  # fmt: skip
        self.encoder = nn.Sequential(*layers)
        _initialise(self.encoder, slope)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of its images."""
        return self.decoder.size

    def forward(self, images: Tensor) -> Tensor:
        """Images of images."""
        return self.decoder(self.encoder(images - 0.5))


def decoder(
    code_shape: Sequence[int],
    size: int | tuple[int, int],
    *,
    architecture: Architecture = PUBLISHED,
    seed: int = 0,
) -> Decoder:
    """An untrained decoder.

    A vector goes through `fully` connected layers to the level of the ladder nearest to 4 × 4 (4 ×
    4 × 256 of a 128-pixel image as published), a grid is resampled to its level, contracted by
    `contract` levels and convolved; from there it is up-convolutions and leaky rectifiers to the
    image.

    Args:
        code_shape: (C,) or (C, h, w).
        size: of the images, in pixels: a side, or (H, W).
        architecture: `PUBLISHED`, `SMALL`, or one's own.
        seed: of the initial weights; the global random state is left alone.

    Raises:
        ValueError: no shape of a code, or sides below 8 pixels.
    """
    shape = tuple(int(n) for n in code_shape)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"a code is (C,) or (C, h, w), not {tuple(code_shape)}")
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(sides) < 8:
        raise ValueError(f"images of {sides[0]}x{sides[1]} pixels are too small: 8 at least")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(shape, sides, architecture)


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Target:
    """One decoder to train: of which code, and how it is built."""

    code: str
    architecture: Architecture = PUBLISHED
    autoencoder: bool = False  #: learn the code too: only its shape is that of `code`


@dataclass(frozen=True)
class Training:
    """How decoders are trained; the paper's optimiser and batch by default.

    Raises:
        ValueError: an option out of range.
    """

    size: int = 128  #: side of crops and images, px
    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3  #: falls to 0 along half a cosine
    optimiser: str = "adam"  #: or adamw
    weight_decay: float = 0.0  #: of adamw
    scale: tuple[float, float] = (0.6, 1.0)  #: side of crops over the shorter side
    pool: int = 0  #: fixed crops of each picture; 0: new ones at every step
    feature_weight: float = 0.0  #: of ‖Φ(x̂) − Φ(x)‖² / ‖Φ(x)‖² in the loss
    comparators: tuple[str, ...] = ()  #: codes Φ of the feature loss; the decoder's own by default
    precision: str = "float32"  #: or bfloat16, float16: of decoders' activations, by autocast
    validate_every: int = 250  #: steps between two looks at validation; checkpoints go with them
    workers: int = 1  #: threads that prepare crops
    seed: int = 0  #: of initial weights and crops

    def __post_init__(self) -> None:
        for name, least in (("size", 8), ("steps", 1), ("batch_size", 1), ("pool", 0),
                            ("validate_every", 1), ("workers", 1), ("seed", 0)):  # fmt: skip
            require_whole(name, getattr(self, name), least)
        require_positive("learning_rate", self.learning_rate)
        require_positive("weight_decay", self.weight_decay, zero=True)
        require_positive("feature_weight", self.feature_weight, zero=True)
        if self.optimiser not in ("adam", "adamw"):
            raise unknown("optimiser", self.optimiser, ("adam", "adamw"))
        if self.precision not in _PRECISIONS:
            raise unknown("precision", self.precision, _PRECISIONS)
        if self.comparators and not self.feature_weight:
            raise ValueError("comparators are for the feature loss: give it a feature_weight")


@dataclass(frozen=True)
class Result:
    """What `train` found.

    Attributes:
        decoders: by name, with the weights of the step with the smallest validation error.
        history: an entry for each validation: step, and by name the mean training loss since the
            last one and the validation error (both mean squared, per value of [0, 1] images).
        best: by name, the step and validation error of the weights kept.
    """

    decoders: dict[str, Decoder | Autoencoder]
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, tuple[int, float]] = field(default_factory=dict)


def train(
    codes: Codes,
    targets: Sequence[str] | Mapping[str, Target | Architecture],
    pictures: ImageSet,
    validation: ImageSet,
    *,
    config: Training | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    stop_after: int | None = None,
    progress: bool = False,
    watch: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> Result:
    """Train decoders together: one pass of the frozen encoder feeds all of them.

    The sum of the decoders' losses is minimised; since they share no weights, each is trained as if
    it were alone. Crops and flips of a step depend on the seed and the step alone, so that a run
    that goes on from its checkpoint ends with the very same weights as one never interrupted.

    Args:
        codes: of which the targets are named.
        targets: names of codes (decoders as published), or by name what to train.
        pictures: to train on.
        validation: of other sources; judged by their central crops.
        config: `Training`, as published by default.
        checkpoint: file written at every validation, and when interrupted from the keyboard; the
            same call goes on from it.
        stop_after: leave off after this step (to be continued from the checkpoint).
        progress: show a bar with the mean loss.
        watch: called at every validation with the step and, by name, reconstructions (n, 3, H, W)
            of the first pictures of validation.

    Raises:
        ValueError: no targets, codes that are not computed, no images, or sources of `pictures`
            among those of `validation`.
        DivergedError: a loss was not finite: names decoder and step; the checkpoint stays.
        store.MismatchError: the checkpoint is of other settings, codes or pictures.
    """
    config = config or Training()
    plan = _plan(codes, targets, config)
    if not len(pictures) or not len(validation):
        raise ValueError("pictures to train on and pictures to validate on: neither may be empty")
    shared = set(pictures.table["group"]) & set(validation.table["group"])
    if shared:
        raise ValueError(
            f"{sorted(map(str, shared))[0]!r} is a source of pictures and of validation: split "
            "by source group (ImageSet.split)"
        )
    run = _Run(codes, plan, pictures, validation, config)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_file():
        run.load(path)
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    try:
        run.advance(last, path, progress, watch)
    except KeyboardInterrupt:
        if path is not None:
            run.save(path)
        raise
    return run.result()


def _plan(
    codes: Codes, targets: Sequence[str] | Mapping[str, Target | Architecture], config: Training
) -> dict[str, Target]:
    if isinstance(targets, str):
        targets = (targets,)
    named = dict(targets) if isinstance(targets, Mapping) else dict.fromkeys(targets, PUBLISHED)
    if not named:
        raise ValueError("no decoders to train")
    plan = {}
    for name, given in named.items():
        target = given if isinstance(given, Target) else Target(name, given)
        if target.code not in codes.names:
            raise unknown("code", target.code, codes.names)
        plan[name] = target
    for name in config.comparators:
        if name not in codes.names:
            raise unknown("comparator", name, codes.names)
    return plan


class _Run:
    """The state of one training: all that a checkpoint holds."""

    def __init__(
        self, codes: Codes, plan: dict[str, Target], pictures: ImageSet, validation: ImageSet,
        config: Training,
    ) -> None:  # fmt: skip
        self.codes, self.plan, self.config, self.pictures = codes, plan, config, pictures
        self.device = codes.device
        shapes = codes.shapes(config.size)
        self.networks: dict[str, Decoder | Autoencoder] = {}
        for name, target in plan.items():
            network = decoder(shapes[target.code], config.size, architecture=target.architecture,
                              seed=config.seed)  # fmt: skip
            network.origin = codes.identity(target.code)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                built = Autoencoder(network) if target.autoencoder else network
            self.networks[name] = built.to(self.device)
        self.seen = validation.batch(config.size)
        self.seen_codes = self._read(self.seen)
        self._calibrate()
        kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.AdamW
        weights = [p for network in self.networks.values() for p in network.parameters()]
        self.optimiser = kind(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.half = _PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.precision == "float16" and self.device.type == "cuda"
        )
        self.step = 0
        self.sums = dict.fromkeys(plan, 0.0)
        self.counted = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, tuple[int, float]] = {}
        self.kept = {name: self._weights(name) for name in plan}
        self.expect = {
            "training": {k: v for k, v in asdict(config).items() if k != "workers"},
            "targets": {name: asdict(target) for name, target in plan.items()},
            "codes": {name: codes.identity(t.code) for name, t in plan.items()},
            "data": [pictures.hash, validation.hash],
        }

    def _weights(self, name: str) -> dict[str, Tensor]:
        state = self.networks[name].state_dict()
        return {k: v.detach().cpu().clone() for k, v in state.items()}

    @torch.no_grad()
    def _read(self, images: Tensor) -> dict[str, Tensor]:
        with self.codes.opened():
            parts = [self.codes(part.to(self.device)) for part in images.split(64)]
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def _crops(self, step: int) -> Tensor:
        """The batch of a step, on the CPU."""
        config = self.config
        seed = config.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        count = len(self.pictures)
        # each picture once before any comes again, also where a batch is larger than the set
        order = torch.cat([torch.randperm(count, generator=generator)
                           for _ in range(-(-config.batch_size // count))])  # fmt: skip
        if config.pool:
            seed = config.seed * 1_000_003 + int(
                torch.randint(config.pool, (1,), generator=generator)
            )
        parts = [
            self.pictures.select(part.tolist()).crops(
                config.size, 1, seed=seed + 7_919 * number, scale=config.scale
            )
            for number, part in enumerate(order[: config.batch_size].split(count))
        ]
        return torch.cat(parts)

    def _calibrate(self) -> None:
        batches = range(-max(1, 128 // self.config.batch_size), 0)
        images = torch.cat([self._crops(step) for step in batches])
        codes = self._read(images)
        for name, network in self.networks.items():
            if isinstance(network, Decoder):
                network.calibrate(codes[self.plan[name].code].to(self.device))
                network.begin_at(images.to(self.device))
            else:
                network.decoder.begin_at(images.to(self.device))

    def _input(self, name: str, images: Tensor, codes: Mapping[str, Tensor]) -> Tensor:
        return images if self.plan[name].autoencoder else codes[self.plan[name].code]

    def advance(
        self, last: int, path: Path | None, progress: bool,
        watch: Callable[[int, dict[str, Tensor]], None] | None,
    ) -> None:  # fmt: skip
        """Train up to step `last`; crops of the next steps are prepared meanwhile."""
        config = self.config
        with (
            ThreadPoolExecutor(config.workers) as pool,
            self.codes.opened(),
            tqdm(total=config.steps, initial=self.step, disable=not progress, leave=False) as bar,
        ):
            soon = range(self.step, min(last, self.step + config.workers))
            ahead = [pool.submit(self._crops, step) for step in soon]
            while self.step < last:
                images = ahead.pop(0).result().to(self.device, non_blocking=True)
                if self.step + config.workers < last:
                    ahead.append(pool.submit(self._crops, self.step + config.workers))
                losses = self._train_step(images)
                self.step += 1
                self.counted += 1
                for name, value in losses.items():
                    self.sums[name] += value
                bar.set_postfix_str(f"loss {sum(losses.values()) / len(losses):.4f}")
                bar.update()
                if self.step % config.validate_every == 0 or self.step == config.steps:
                    self._validate(watch)
                    if path is not None:
                        self.save(path)
            if path is not None and self.step % config.validate_every:
                self.save(path)

    def _train_step(self, images: Tensor) -> dict[str, float]:
        config = self.config
        along = math.cos(math.pi * self.step / config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 + along) / 2
        with torch.no_grad():
            codes = self.codes(images)
        losses = {}
        for name, network in self.networks.items():
            network.train()
            with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
                found = network(self._input(name, images, codes)).float()
            losses[name] = F.mse_loss(found, images)
            if config.feature_weight:
                losses[name] = losses[name] + config.feature_weight * self._feature_loss(
                    found, codes, config.comparators or (self.plan[name].code,)
                )
        values = torch.stack(list(losses.values())).detach().cpu()
        if not bool(torch.isfinite(values).all()):
            bad = next(name for name, v in zip(losses, values, strict=True) if not v.isfinite())
            raise DivergedError(
                f"the loss of the decoder of {bad!r} is {float(losses[bad].detach())} at step "
                f"{self.step}: try a smaller learning_rate than {config.learning_rate:g} or "
                "float32; the last checkpoint is as it was"
            )
        # one backward pass each: what a decoder kept for it is freed before the next
        self.optimiser.zero_grad(set_to_none=True)
        for value in losses.values():
            self.scaler.scale(value).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return dict(zip(losses, values.tolist(), strict=True))

    def _feature_loss(
        self, found: Tensor, codes: Mapping[str, Tensor], names: Sequence[str]
    ) -> Tensor:
        again = self.codes(found.clamp(0, 1))
        parts = [
            (again[name] - codes[name]).square().sum() / codes[name].square().sum().clamp_min(1e-30)
            for name in names
        ]
        return torch.stack(parts).mean()

    def _validate(self, watch: Callable[[int, dict[str, Tensor]], None] | None) -> None:
        entry: dict[str, Any] = {"step": self.step, "training": {}, "validation": {}}
        pictures = {}
        for name, network in self.networks.items():
            found = reconstruct(network, self._input(name, self.seen, self.seen_codes))
            error = float((found - self.seen).square().mean())
            entry["training"][name] = self.sums[name] / max(1, self.counted)
            entry["validation"][name] = error
            if name not in self.best or error < self.best[name][1]:
                self.best[name] = (self.step, error)
                self.kept[name] = self._weights(name)
            pictures[name] = found[:8]
        self.history.append(entry)
        self.sums = dict.fromkeys(self.plan, 0.0)
        self.counted = 0
        if watch is not None:
            watch(self.step, pictures)

    def result(self) -> Result:
        for name, network in self.networks.items():
            network.load_state_dict(self.kept[name] if name in self.best else self._weights(name))
            network.eval().requires_grad_(False)
        return Result(dict(self.networks), self.history, dict(self.best))

    def save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            tensors |= {f"now/{name}/{k}": v for k, v in network.state_dict().items()}
            tensors |= {f"best/{name}/{k}": v for k, v in self.kept[name].items()}
        for number, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{number}/{k}": torch.as_tensor(v) for k, v in entry.items()}
        progress = {
            "step": self.step, "history": self.history, "best": self.best, "sums": self.sums,
            "counted": self.counted, "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        store.save_tensors(path, tensors, metadata={**self.expect, "progress": progress})

    def load(self, path: Path) -> None:
        tensors, metadata = store.load_tensors(path, expect=self.expect)
        found = metadata["progress"]
        for name, network in self.networks.items():
            network.load_state_dict(_under(f"now/{name}/", tensors))
            self.kept[name] = _under(f"best/{name}/", tensors)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimiser/", tensors).items():
            number, _, slot = key.partition("/")
            entries.setdefault(int(number), {})[slot] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})
        self.best = {name: (int(s), float(e)) for name, (s, e) in found["best"].items()}
        for name in ("step", "history", "sums", "counted"):
            setattr(self, name, found[name])
        if found["scaler"]:
            self.scaler.load_state_dict(found["scaler"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# ------------------------------------------------------------------------------------------- using


@torch.no_grad()
def reconstruct(network: Decoder | Autoencoder, given: Tensor, *, batch_size: int = 64) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of codes (of images, for an autoencoder), on the CPU."""
    network.eval()
    device = next(network.parameters()).device
    parts = [network(part.to(device)).clamp(0, 1).cpu() for part in given.split(batch_size)]
    return torch.cat(parts)


def errors(found: Tensor, images: Tensor, *, reference: Tensor | float | None = None) -> Tensor:
    """(N,) ‖x − x̂‖ over the mean distance between two images (§2.2 of the paper).

    Args:
        found: reconstructions (N, 3, H, W).
        images: the originals.
        reference: images whose mean pairwise distance is the unit, or that distance; `images` by
            default.
    """
    return stats.normalised_error(
        found, images, reference=images if reference is None else reference
    )


def nearest(
    codes: Tensor, known_codes: Tensor, known_images: Tensor, *, k: int = 1, batch_size: int = 64
) -> Tensor:
    """The floor: the mean of the k known images whose codes are nearest (cosine, centred).

    Args:
        codes: (N, ...) to invert.
        known_codes: (M, ...) of known images, the same code.
        known_images: (M, 3, H, W).
        k: neighbours to average; with M it is the mean image.
        batch_size: codes at a time.

    Returns:
        (N, 3, H, W).

    Raises:
        ValueError: shapes that do not match, or k out of range.
    """
    if codes.shape[1:] != known_codes.shape[1:] or len(known_codes) != len(known_images):
        raise ValueError(
            f"codes {tuple(codes.shape)}, known codes {tuple(known_codes.shape)} and "
            f"{len(known_images)} known images do not match"
        )
    require_whole("k", k, 1)
    if k > len(known_images):
        raise ValueError(f"k is {k}, but only {len(known_images)} images are known")
    centre = known_codes.flatten(1).mean(0)
    known = F.normalize(known_codes.flatten(1) - centre, dim=1)
    parts = []
    for part in codes.split(batch_size):
        likeness = F.normalize(part.flatten(1) - centre, dim=1) @ known.T
        parts.append(known_images[likeness.topk(k, 1).indices].mean(1))
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------- files


def _to_image(network: Decoder | Autoencoder) -> Decoder:
    return network.decoder if isinstance(network, Autoencoder) else network


def origin(network: Decoder | Autoencoder) -> dict[str, Any]:
    """What the code of a trained decoder is of, as `Codes.identity` says it."""
    return _to_image(network).origin


def save(
    path: str | os.PathLike[str], network: Decoder | Autoencoder, *, card: Mapping[str, Any]
) -> None:
    """Write a trained decoder in half precision, with what its code is of and a card.

    Args:
        path: a safetensors file, written whole or not at all.
        network: from :func:`train`.
        card: data, steps, seed, errors, licence: any JSON.

    Raises:
        ValueError: it was not trained, or a weight is not finite in half precision.
    """
    part = _to_image(network)
    if not part.origin:
        raise ValueError("this decoder was not trained: it has no origin to be checked against")
    tensors = {
        # means and deviations of codes may be large
        name: value if name.rpartition(".")[2] in ("mean", "std") else value.half()
        for name, value in network.state_dict().items()
    }
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name!r} of the decoder is not finite in half precision")
    metadata = {
        "format": 1,
        "origin": part.origin,
        "autoencoder": isinstance(network, Autoencoder),
        "code_shape": part.code_shape,
        "size": part.size,
        "architecture": asdict(part.architecture),
        "card": card,
    }
    store.save_tensors(path, tensors, metadata=metadata)


def load(
    path: str | os.PathLike[str], *, origin: Mapping[str, Any] | None = None
) -> Decoder | Autoencoder:
    """What :func:`save` wrote, in single precision on the CPU, with its `origin` and `card`.

    Args:
        path: the file.
        origin: what its code has to be of (`Codes.identity`).

    Raises:
        store.MismatchError: it is of another encoder, other weights or another code.
        FileNotFoundError: no such file.
        ValueError: not a whole file of a decoder.
    """
    expect: dict[str, Any] = {"format": 1}
    if origin is not None:
        expect["origin"] = dict(origin)
    tensors, metadata = store.load_tensors(path, expect=expect)
    height, width = metadata["size"]
    part = decoder(
        metadata["code_shape"],
        (height, width),
        architecture=Architecture(**metadata["architecture"]),
    )
    part.origin, part.card = metadata["origin"], metadata["card"]
    network = Autoencoder(part) if metadata["autoencoder"] else part
    try:
        network.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole decoder: {error}") from error
    return network.eval().requires_grad_(False)


def folder() -> Path:
    """Where the decoders that come with this project lie, and ``cards.json`` about them."""
    return image_sets.data_root() / "weights" / "upconv"


def file_name(origin: Mapping[str, Any], *, autoencoder: bool = False) -> str:
    """Of the file of a trained decoder, by what its code is of."""
    plain = f"{origin['source']}--{origin['code']}{'--autoencoder' if autoencoder else ''}"
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in plain) + ".safetensors"


def trained_cards() -> dict[str, dict[str, Any]]:
    """Cards of the decoders that come with this project, by the file's name."""
    path = folder() / "cards.json"
    return store.read_json(path) if path.is_file() else {}


def trained(
    codes: Codes, names: Sequence[str] | str | None = None, *, autoencoder: bool = False
) -> dict[str, Any]:
    """The decoders (or autoencoders) that come with this project, by the names of codes.

    Args:
        codes: of an encoder, or of descriptors.
        names: of them; all by default.
        autoencoder: the bounds: networks from images to images through codes of these shapes.

    Raises:
        ValueError: none was trained for a code (those that were are listed), or its file is not the
            one this project was checked with.
        FileNotFoundError: the data folder lacks the file.
        store.MismatchError: the encoder's weights are not those it was trained on.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names or codes.names)
    cards = trained_cards()
    what = "autoencoder" if autoencoder else "decoder"
    found = {}
    for name in wanted:
        origin = codes.identity(name)
        file = file_name(origin, autoencoder=autoencoder)
        if file not in cards:
            have = [card["origin"]["code"] for card in cards.values()
                    if card["origin"]["source"] == origin["source"]
                    and card["autoencoder"] == autoencoder]  # fmt: skip
            raise ValueError(
                f"no trained {what} of {name!r} of {origin['source']}: there are "
                f"{', '.join(have) or 'none of it'}; upconv.train makes one"
            )
        path = folder() / file
        if not path.is_file():
            raise FileNotFoundError(
                f"the {what} of {name!r} belongs at {path}: fetch the data folder anew"
            )
        sha256 = store.sha256_file(path)
        if sha256 != cards[file]["sha256"]:
            raise ValueError(
                f"{file} is not the file this project was checked with: sha256 {sha256}, expected "
                f"{cards[file]['sha256']}"
            )
        found[name] = load(path, origin=origin)
    return found
