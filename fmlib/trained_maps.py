r"""Maps between feature maps that have no closed form: MLP, CNN, transformer, trained by gradients.

The richer families of FeatMap (Krey, Neukirch & Strodthoff 2026), with the same interface as the
closed-form maps of :mod:`maps` (`maps.fit` takes them by name). What each may use of the picture:

* `trained_linear`, `mlp`: one position at a time;
* `cnn`: a neighbourhood of 5x5 positions;
* `transformer`: all positions. Without positions added to its input, as in the paper, it does not
  know *where* anything is: permuting its input permutes its output. It can then place things only
  by what zero padding in the encoder has written into the features.

The recipe is the paper's but for these points. The learning rate is halved after 3 epochs without
progress instead of 8: training stops after 6, so that theirs is never halved. Each epoch has an
order of its own, and an image's source is wholly in training or wholly in validation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import store
from .errors import unknown
from .grids import Action
from .grids import grid_action as _as_action
from .maps import FeatureMap, Origin

__all__ = [
    "FAMILIES",
    "POSITIONS",
    "DivergedError",
    "NetworkMap",
    "Plateau",
    "TrainingConfig",
    "architecture",
    "loss",
    "median_cosine",
    "restore",
    "sinusoidal_positions",
    "split",
    "train",
]

#: What `train` can train.
FAMILIES = ("trained_linear", "mlp", "cnn", "transformer")
#: What a transformer is told of the place of its inputs.
POSITIONS = ("none", "sinusoidal", "learned")
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DivergedError(RuntimeError):
    """The loss was no longer a finite number; the message says where and what to try."""


# --------------------------------------------------------------------------------- architectures


def sinusoidal_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed position codes of a grid: (H·W, width), row by row.

    Half of the channels code the row and half the column, as sines and cosines of wavelengths from
    2π to 10⁴·2π units (Vaswani et al. 2017, §3.5).

    Raises:
        ValueError: a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sinusoidal positions need a width that 4 divides, not {width}")
    rates = 10_000.0 ** (-torch.arange(width // 4) / max(width // 4, 1))
    row, column = torch.meshgrid(
        torch.arange(grid[0]).float(), torch.arange(grid[1]).float(), indexing="ij"
    )
    angles = [place.flatten()[:, None] * rates for place in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


class _PerPosition(nn.Module):
    """Layers for vectors, done at every position."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Transformer(nn.Module):
    """Positions as tokens; post-norm encoder layers as in the paper."""

    positions: Tensor

    def __init__(
        self,
        channels: tuple[int, int],
        grid: tuple[int, int],
        *,
        width: int,
        depth: int,
        heads: int,
        dropout: float,
        positions: str,
    ) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(channels[0], width), nn.Linear(width, channels[1])
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
            for _ in range(depth)
        )
        self.kind, self.grid, self.width = positions, grid, width
        if positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], width))

    def _codes(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        if self.kind == "sinusoidal":
            return sinusoidal_positions(self.width, grid).to(x.device)
        if grid != self.grid:
            raise ValueError(
                f"this transformer learned positions of a {self.grid[0]}x{self.grid[1]} grid, "
                f"not of {grid[0]}x{grid[1]}"
            )
        return self.positions

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inward(x.flatten(2).transpose(1, 2))
        if self.kind != "none":
            tokens = tokens + self._codes(x)
        for block in self.blocks:
            tokens = block(tokens)
        return self.outward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def architecture(
    family: str,
    channels: tuple[int, int],
    grid: tuple[int, int],
    *,
    width: int = 512,
    depth: int = 4,
    heads: int = 8,
    dropout: float = 0.2,
    positions: str = "none",
    seed: int = 0,
) -> nn.Module:
    """A network from features (N, Cx, H, W) to features (N, Cy, H, W), untrained.

    Args:
        family: of `FAMILIES`. "mlp": Linear(width), ReLU, dropout, Linear. "cnn": Conv3x3(width),
            batch norm, ReLU, dropout of channels, Conv3x3, batch norm. "transformer": Linear to
            `width`, `depth` encoder layers, Linear. "trained_linear": the shared linear map.
        channels: (Cx, Cy).
        grid: (H, W); only learned positions depend on it.
        width: hidden channels, 512 in the paper.
        depth: encoder layers of the transformer, 4 in the paper.
        heads: its attention heads, 8 in the paper.
        dropout: 0.2 in the paper.
        positions: of `POSITIONS`, for the transformer; none in the paper.
        seed: of the initial weights; the global random state is left alone.

    Raises:
        ValueError: an unknown family or positions, a width that heads (or 4) do not divide.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    if positions != "none" and family != "transformer":
        raise ValueError(f"positions are for the transformer, not for {family}")
    if family == "transformer" and width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    if positions == "sinusoidal":
        sinusoidal_positions(width, (1, 1))
    before, after = channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "trained_linear":
            return _PerPosition(nn.Linear(before, after))
        if family == "mlp":
            return _PerPosition(
                nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, after)
            )
        if family == "cnn":
            return nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout2d(dropout),
                nn.Conv2d(width, after, 3, padding=1),
                nn.BatchNorm2d(after),
            )
        return _Transformer(
            channels, grid, width=width, depth=depth, heads=heads, dropout=dropout,
            positions=positions,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------- loss


def median_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """(N,) median over positions of the cosine of ŷ and y (N, C, H, W): the upper of two."""
    cosine = F.cosine_similarity(prediction, target, dim=1).flatten(1)
    edge = 1 - 1e-8
    return cosine.clamp(-edge, edge).sort(1).values[:, cosine.shape[1] // 2]


def loss(
    prediction: Tensor, target: Tensor, *, mse_weight: float = 0.3, cosine_weight: float = 0.7
) -> Tensor:
    """The paper's loss: 0.3 · MSE + 0.7 · (1 − mean over images of the median cosine)."""
    value = mse_weight * F.mse_loss(prediction, target)
    if cosine_weight:
        value = value + cosine_weight * (1 - median_cosine(prediction, target).mean())
    return value


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainingConfig:
    """How a map is trained; defaults are the paper's but for `scheduler_patience`.

    Raises:
        ValueError: a value out of range; a scheduler that could never fire because training stops
            first (the released configuration, 8 against 6; None says outright that the learning
            rate stays).
    """

    mse_weight: float = 0.3
    cosine_weight: float = 0.7
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    batch_size: int = 32
    accumulate: int = 2  #: batches for each step of the optimiser
    epochs: int = 100
    patience: int = 6  #: epochs without progress until training stops
    min_delta: float = 1e-3  #: what counts as progress of the validation loss
    scheduler_patience: int | None = 3  #: epochs without progress until the rate falls; 8 there
    factor: float = 0.5  #: by which it falls
    min_learning_rate: float = 1e-6
    validation_share: float = 0.05  #: of the groups
    normalise: bool = True  #: by mean and deviation of each channel of x in training
    precision: str = "float32"  #: or bfloat16, float16: of activations, by autocast
    checkpoint_every: int = 2  #: epochs
    seed: int = 0  #: initial weights, split, order, dropout

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "epochs", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
        for name in ("learning_rate", "min_learning_rate", "factor", "validation_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)!r}")
        if not (self.factor < 1 and self.validation_share < 1):
            raise ValueError("factor and validation_share must be below 1")
        if self.precision not in _PRECISIONS:
            raise unknown("precision", self.precision, list(_PRECISIONS))
        if self.scheduler_patience is not None and not (
            0 <= self.scheduler_patience < self.patience - 1
        ):
            raise ValueError(
                f"scheduler_patience {self.scheduler_patience} must be at least 0 and below "
                f"patience {self.patience} by two: otherwise training stops before a lower "
                "learning rate has been tried; None keeps the rate"
            )


@dataclass
class Plateau:
    """Watches the validation loss: says when to lower the learning rate and when to stop.

    An epoch makes progress if its loss is below the best by more than `min_delta`. After more than
    `scheduler_patience` epochs without, the rate falls (and that count begins anew); after
    `patience` epochs without, training stops.
    """

    config: TrainingConfig
    best: float = math.inf
    waited: int = 0  #: epochs since progress
    since_fall: int = 0  #: epochs since progress or a fall of the rate

    def step(self, value: float, rate: float) -> tuple[float, bool]:
        """Take an epoch's loss and learning rate; gives the next rate and whether to stop."""
        if value < self.best - self.config.min_delta:
            self.best, self.waited, self.since_fall = value, 0, 0
            return rate, False
        self.waited += 1
        self.since_fall += 1
        most = self.config.scheduler_patience
        if most is not None and self.since_fall > most:
            rate = max(rate * self.config.factor, min(rate, self.config.min_learning_rate))
            self.since_fall = 0
        return rate, self.waited >= self.config.patience


def split(groups: Sequence[Any], share: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of training and validation images; images of one group are on one side.

    `share` of the groups validate, one at least.

    Raises:
        ValueError: fewer than two groups.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise ValueError(
            f"{len(names)} group of images: one to train and one to validate, at least"
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[i] for i in order[:count]}
    held = torch.tensor([name in chosen for name in groups])
    return (~held).nonzero().flatten(), held.nonzero().flatten()


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkMap(FeatureMap):
    """A trained network between normalised features; `apply` takes and gives plain ones.

    Gradients flow to x, not to the weights.
    """

    network: nn.Module
    config: dict[str, Any]  #: of `architecture`
    mean: Tensor  #: (C,) taken off x; likewise added to y where they have the same channels
    std: Tensor  #: (C,)
    mean_y: Tensor  #: (Cy,)
    std_y: Tensor  #: (Cy,)
    history: list[dict[str, float]] = field(default_factory=list)  #: one entry for each epoch

    def _apply(self, x: Tensor) -> Tensor:
        channels = self.config["channels"][0]
        if x.shape[1] != channels:
            raise ValueError(
                f"this {self.family} map takes {channels} channels, not {x.shape[1]} "
                f"({tuple(x.shape)})"
            )
        self.network.eval().to(x.device)
        parts = [_normalised(part, self.mean, self.std) for part in x.float().split(64)]
        found = torch.cat([self.network(part) for part in parts])
        scale, shift = (v.to(x.device)[:, None, None] for v in (self.std_y, self.mean_y))
        return (found * scale + shift).to(x.dtype)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        for name in ("mean", "std", "mean_y", "std_y"):
            tensors[name] = getattr(self, name)
        return tensors, {"architecture": self.config, "history": self.history}


def restore(
    tensors: dict[str, Tensor], config: dict[str, Any], common: dict[str, Any]
) -> NetworkMap:
    """A `NetworkMap` from what its file holds; called by `maps.load`."""
    options = config["architecture"]
    network = architecture(**{**options, "channels": tuple(options["channels"]),
                              "grid": tuple(options["grid"])})  # fmt: skip
    network.load_state_dict(_under("network/", tensors))
    scales = {name: tensors[name] for name in ("mean", "std", "mean_y", "std_y")}
    return NetworkMap(
        network=network.eval().requires_grad_(False),
        config=options,
        history=config["history"],
        **scales,
        **common,
    )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    mean, std = (value.to(x.device)[:, None, None] for value in (mean, std))
    return (x - mean) / std


def _scales(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over at most 200 images, as the paper."""
    sample = x[index[:: max(1, len(index) // 200)][:200]].double()
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3), correction=0)
    # a channel that is never on is left alone rather than divided by zero
    return mean.float(), torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, 1).float()


def _check(x: Tensor, y: Tensor) -> None:
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 4 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be floating-point features (N, C, H, W), not {value.dtype} "
                f"{tuple(value.shape)}"
            )
        for start in range(0, len(value), 256):
            finite = torch.isfinite(value[start : start + 256]).flatten(1).all(1)
            if not bool(finite.all()):
                bad = start + int((~finite).nonzero()[0])
                raise ValueError(f"{name} of image {bad} is not finite (NaN or infinite)")
    if len(x) != len(y) or x.shape[2:] != y.shape[2:]:
        raise ValueError(
            f"x and y must be features of the same pictures on one grid, not {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )


def _fingerprint(x: Tensor, y: Tensor) -> str:
    """Tells whether a checkpoint is of these pairs: shapes, and a few images of both."""
    index = torch.linspace(0, len(x) - 1, min(len(x), 8)).long()
    return store.digest([list(x.shape), list(y.shape), x[index], y[index]])


def train(
    family: str,
    x: Tensor,
    y: Tensor,
    *,
    config: TrainingConfig | None = None,
    groups: Sequence[Any] | None = None,
    grid_action: str | Action | None = None,
    origin: Origin | None = None,
    width: int = 512,
    depth: int = 4,
    heads: int = 8,
    dropout: float = 0.2,
    positions: str = "none",
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    stop_after: int | None = None,
    progress: bool = False,
) -> NetworkMap:
    """Train a map of one of `FAMILIES` on pairs x (N, Cx, H, W) -> y (N, Cy, H, W).

    The weights of the epoch with the smallest validation loss are kept. The result depends on the
    data, the configuration and its seed alone; the global random state is left as it was.

    Args:
        family: of `FAMILIES`.
        x: features of the pictures, on the CPU or a device; batches move.
        y: of the edited pictures.
        config: `TrainingConfig`, the paper's by default.
        groups: N sources; those of one source validate or train together.
        grid_action: done to x first (`grids.grid_action`).
        origin: of the features.
        width: this and what follows as :func:`architecture`.
        depth: see there.
        heads: see there.
        dropout: see there.
        positions: see there.
        device: to train on; x's by default.
        checkpoint: file to write every few epochs. The same call goes on from it, to the very same
            result as one that was not interrupted.
        stop_after: leave off after this epoch (to be continued from the checkpoint).
        progress: show a bar.

    Returns:
        the map, with the `history` of epoch, train_loss, validation_loss and learning_rate, and in
        `info` the best epoch, the number of epochs and whether it stopped early.

    Raises:
        ValueError: bad pairs or options.
        DivergedError: the loss was not finite.
        store.MismatchError: the checkpoint is of another configuration, architecture or data.
    """
    config = config or TrainingConfig()
    action = _as_action(grid_action)
    _check(x, y)
    x = action(x.detach())
    y = y.detach()
    _check(x, y)
    names = list(range(len(x))) if groups is None else list(groups)
    if len(names) != len(x):
        raise ValueError(f"groups has {len(names)} entries for {len(x)} images")
    options = {
        "family": family, "channels": (x.shape[1], y.shape[1]),
        "grid": (x.shape[2], x.shape[3]), "width": width, "depth": depth, "heads": heads,
        "dropout": dropout, "positions": positions, "seed": config.seed,
    }  # fmt: skip
    device = torch.device(device or x.device)
    network = architecture(**options).to(device)
    training, validation = split(names, config.validation_share, seed=config.seed)
    scales = _all_scales(x, y, training, config)
    run = _Run(network, config, device)
    expect = {
        "training": asdict(config), "architecture": options, "data": _fingerprint(x, y),
    }  # fmt: skip
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_file():
        run.load(path, expect)
    last = config.epochs if stop_after is None else min(config.epochs, stop_after)
    with tqdm(total=config.epochs, initial=run.epoch, disable=not progress, leave=False) as bar:
        while run.epoch < last and not run.stopped:
            run.advance(x, y, training, validation, scales)
            bar.update()
            done = run.epoch == last or run.stopped
            if path is not None and (done or run.epoch % config.checkpoint_every == 0):
                run.save(path, expect)
    network.load_state_dict(run.best_weights)
    return NetworkMap(
        family=family,
        parameters_count=sum(p.numel() for p in network.parameters()),
        grid_action=action,
        origin=origin or Origin(),
        info={
            "images": len(training),
            "validation_images": len(validation),
            "best_epoch": run.best_epoch,
            "epochs": run.epoch,
            "stopped_early": run.stopped,
            "training": asdict(config),
        },
        network=network.eval().requires_grad_(False),
        config=options,
        mean=scales[0],
        std=scales[1],
        mean_y=scales[2],
        std_y=scales[3],
        history=run.history,
    )


def _all_scales(
    x: Tensor, y: Tensor, training: Tensor, config: TrainingConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and deviations for x and y: those of x for both, as the paper, where widths agree."""
    if not config.normalise:
        zero, one = (torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
        return zero, one, torch.zeros(y.shape[1]), torch.ones(y.shape[1])
    training = training.to(x.device)
    mean, std = (value.cpu() for value in _scales(x, training))
    if x.shape[1] == y.shape[1]:
        return mean, std, mean, std
    mean_y, std_y = (value.cpu() for value in _scales(y, training.to(y.device)))
    return mean, std, mean_y, std_y


class _Run:
    """The state of one training: all that a checkpoint holds.

    Random numbers are drawn from the seed and the number of the epoch, so that no generator's state
    has to be kept for going on exactly.
    """

    def __init__(self, network: nn.Module, config: TrainingConfig, device: torch.device) -> None:
        self.network, self.config, self.device = network, config, device
        self.optimiser = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.half = _PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=config.precision == "float16" and device.type == "cuda"
        )
        self.plateau = Plateau(config)
        self.rate = config.learning_rate
        self.epoch, self.best_epoch, self.stopped = 0, 0, False
        self.best_loss = math.inf
        self.best_weights = self._weights()
        self.history: list[dict[str, float]] = []

    def _weights(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}

    def advance(
        self, x: Tensor, y: Tensor, training: Tensor, validation: Tensor, scales: Sequence[Tensor]
    ) -> None:
        """Train for one epoch and judge it."""
        seed = int(store.digest([self.config.seed, self.epoch])[:12], 16)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            training_loss = self._train(x, y, training, scales)
        value = self._validate(x, y, validation, scales)
        if value < self.best_loss:
            self.best_loss, self.best_epoch = value, self.epoch
            self.best_weights = self._weights()
        self.history.append(
            {
                "epoch": self.epoch,
                "train_loss": training_loss,
                "validation_loss": value,
                "learning_rate": self.rate,
            }
        )
        self.rate, self.stopped = self.plateau.step(value, self.rate)
        self.epoch += 1

    def _loss(self, x: Tensor, y: Tensor, index: Tensor, scales: Sequence[Tensor]) -> Tensor:
        start, target = x[index.to(x.device)], y[index.to(y.device)]
        start = _normalised(start.to(self.device).float(), scales[0], scales[1])
        target = _normalised(target.to(self.device).float(), scales[2], scales[3])
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            prediction = self.network(start)
        value = loss(
            prediction.float(), target,
            mse_weight=self.config.mse_weight, cosine_weight=self.config.cosine_weight,
        )  # fmt: skip
        if not bool(torch.isfinite(value)):
            raise DivergedError(
                f"the loss is {float(value.detach())} in epoch {self.epoch} at learning rate "
                f"{self.rate:g} and precision {self.config.precision}: try a smaller learning "
                "rate, normalise=True or float32"
            )
        return value

    def _train(self, x: Tensor, y: Tensor, training: Tensor, scales: Sequence[Tensor]) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.network.train()
        batches = list(training[torch.randperm(len(training))].split(self.config.batch_size))
        # A last batch that is not full is dropped (its gradient would weigh too much), if it is
        # not the only one.
        if len(batches) > 1 and len(batches[-1]) < self.config.batch_size:
            batches.pop()
        total = 0.0
        for number, index in enumerate(batches):
            first = number - number % self.config.accumulate
            together = min(self.config.accumulate, len(batches) - first)
            value = self._loss(x, y, index, scales)
            self.scaler.scale(value / together).backward()
            total += float(value.detach())
            if number == first + together - 1:
                self.scaler.step(self.optimiser)
                self.scaler.update()
                self.optimiser.zero_grad()
        return total / len(batches)

    def _validate(
        self, x: Tensor, y: Tensor, validation: Tensor, scales: Sequence[Tensor]
    ) -> float:
        self.network.eval()
        total = 0.0
        with torch.no_grad():
            for index in validation.split(self.config.batch_size):
                total += len(index) * float(self._loss(x, y, index, scales))
        return total / len(validation)

    def save(self, path: Path, expect: dict[str, Any]) -> None:
        tensors = {f"now/{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best_weights.items()}
        state = self.optimiser.state_dict()["state"]
        for number, entry in state.items():
            tensors |= {f"optimiser/{number}/{k}": torch.as_tensor(v) for k, v in entry.items()}
        progress = {
            "rate": self.rate,
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "stopped": self.stopped,
            "plateau": [self.plateau.best, self.plateau.waited, self.plateau.since_fall],
            "history": self.history,
            "scaler": self.scaler.state_dict(),
        }
        store.save_tensors(path, tensors, metadata={**expect, "progress": progress})

    def load(self, path: Path, expect: dict[str, Any]) -> None:
        tensors, metadata = store.load_tensors(path, expect=expect)
        found = metadata["progress"]
        self.network.load_state_dict(_under("now/", tensors))
        self.best_weights = _under("best/", tensors)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimiser/", tensors).items():
            number, _, name = key.partition("/")
            entries.setdefault(int(number), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})
        self.plateau = Plateau(self.config, *found["plateau"])
        for name in ("rate", "epoch", "best_epoch", "best_loss", "stopped", "history"):
            setattr(self, name, found[name])
        if found["scaler"]:
            self.scaler.load_state_dict(found["scaler"])
