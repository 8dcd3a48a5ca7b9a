"""How many inversions a minute: one tensor of many against the usual loop, and where time goes.

    python benchmarks/preimage.py [--clock wall|cpu] [--threads N] [--repeats 3] [--size 224]
        [--steps 12] [--images 4] [--batches 1 2 4 8 16] [--device cpu] [--encoders NAME=LAYER ...]

The usual loop, written here as it is found in many repositories: one image at a time; the whole
network, classifier included; a forward hook on every layer that keeps its output; the objective of
Mahendran & Vedaldi (2015), its momentum written out, the gradient by `backward`. Ours is
`preimage.invert` on `extract.optimise(encoder)`: it ends after the layer, folds batch norms, and
takes all images at once. Both have the same starts, constants and steps, in turns within one run;
`difference` says how far the final losses are apart, relative to the usual loop's.

Inversions of 400 steps (the published number) per minute are counted, for the middle one of the
encoder's recommended layers, once per batch size of ours. The ratio is that of the medians of
seconds for each image and step.

`shares` says where our time goes, for the best batch: the encoder there and back, the objective
and priors, the update and bookkeeping; as shares of a whole step, from timed parts.

Only ratios mean anything. On a machine that others use as well, let the clock be "cpu", the
processor time of this process, and set OMP_WAIT_POLICY=passive. On a GPU the clock has to be
"wall". Results go to results/benchmarks/preimage.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import CLOCKS, waited
from torch import Tensor, nn

from fmlib import encoders, extract, images, preimage, store

PUBLISHED_STEPS = 400
#: Wanted: inversions per minute over those of the usual loop, at the middle layer.
TARGET = 3.0


def usual_loop(
    encoder: encoders.Encoder, layer: str, references: Tensor, starts: Tensor, config: Any
) -> Tensor:
    """(N,) final relative squared errors, image by image."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            kept[name] = output

        return hook

    hooks = [m.register_forward_hook(keep(n)) for n, m in encoder.named_modules() if n]
    # layers of the public names, whatever module holds the network
    inner = next(n for n, _ in encoder.named_modules() if n.endswith(layer))
    encoder.requires_grad_(False)
    alpha, smooth = config.priors

    def code(reference: Tensor) -> Tensor:
        """The layer's output as a grid; tokens before those of places are left out."""
        found = kept[inner][0]
        if found.ndim == 2:
            found = found[-reference[0].numel() :].T.reshape(reference.shape)
        return found

    size = starts.shape[1:].numel()
    mean = torch.tensor(config.mean, device=starts.device).view(1, 3, 1, 1)
    errors = []
    for reference, start in zip(references, starts, strict=True):
        levels = (255 * start[None] - mean).requires_grad_()
        momentum = torch.zeros_like(levels)
        for phase in config.schedule:
            momentum.zero_()
            for _ in range(phase.steps):
                encoder((levels + mean) / 255)
                loss = (code(reference) - reference).square().sum() / reference.square().sum()
                x = levels / alpha.scale
                right = x[..., :, 1:] - x[..., :, :-1]
                down = x[..., 1:, :] - x[..., :-1, :]
                total = loss + alpha.weight * x.abs().pow(6).sum() / size
                total = total + smooth.weight * (right.square().sum() + down.square().sum()) / size
                levels.grad = None
                total.backward()
                rate = config.optimiser.rate * phase.factor * config.rms**2 * size
                with torch.no_grad():
                    momentum = config.optimiser.momentum * momentum - rate * levels.grad
                    levels += momentum
        with torch.no_grad():
            encoder((levels + mean) / 255)
            errors.append((code(reference) - reference).square().sum() / reference.square().sum())
    for hook in hooks:
        hook.remove()
    return torch.stack(errors)


def shares(
    matcher: preimage.Taps, reference: Tensor, config: Any, shape: tuple[int, int, int],
    whole: float, clock: str, repeats: int,
) -> dict[str, float]:  # fmt: skip
    """Shares of a step of a batch: encoder, objective and priors, the rest."""
    count = len(reference)
    device = reference.device
    x = torch.rand(count, *shape, device=device)
    term = preimage.Term()
    target = term.select(reference)
    mean = torch.zeros(1, 3, 1, 1, device=device)

    def encoder() -> None:
        with matcher.opened():
            leaf = x.clone().requires_grad_()
            code = matcher(leaf)[matcher.layers[0]]
            torch.autograd.grad(code, leaf, torch.ones_like(code))

    def objective() -> None:
        leaf = (255 * x).requires_grad_()
        code = reference.clone().requires_grad_()
        total = term.loss(code, target)
        for prior in config.priors:
            total = total + prior.weight * prior(leaf, mean)
        torch.autograd.grad(total.sum(), [leaf, code])

    seconds = {}
    for name, call in (("encoder", encoder), ("objective and priors", objective)):
        call()
        times = [waited(call, clock, device)[1] for _ in range(max(3, repeats))]
        seconds[name] = statistics.median(times)
    found = {name: value / whole for name, value in seconds.items()}
    return found | {"update and bookkeeping": max(0.0, 1 - sum(found.values()))}


def measure(name: str, layer: str, options: argparse.Namespace) -> dict[str, Any]:
    """One encoder and layer."""
    device = encoders.device(options.device)
    plain = encoders.load(name, device=device)
    layer = layer or plain.recommended[len(plain.recommended) // 2]
    patch = 14 if "patch14" in name else 1
    size = options.size // patch * patch
    fast = extract.optimise(encoders.load(name, device=device))
    matcher = preimage.Taps(fast, layer)
    most = max(*options.batches, options.images)
    x = images.load("photos", limit=most, seed=0).batch(size=size).to(device)
    shape = (3, size, size)
    # a slow rate keeps the few steps stable for every layer, so that final losses can be compared
    config = dataclasses.replace(
        preimage.preset("mahendran2015", group="middle"),
        schedule=(preimage.Phase(options.steps, 0.01),),
    )
    codes = preimage.codes(preimage.Taps(plain, layer), x)[layer]
    starts = 0.5 + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def ours(count: int) -> Tensor:
        found = preimage.invert(
            {layer: codes[:count]}, matcher, config, shape=shape, start=starts[:count],
            batch_size=count, validate=False,
        )  # fmt: skip
        return found.error[layer][:, 0, 0].square()

    def usual() -> Tensor:
        few = options.images
        return usual_loop(plain, layer, codes[:few], starts[:few], config)

    times: dict[Any, list[float]] = {key: [] for key in ("usual", *options.batches)}
    ours(1)  # warm
    for _ in range(options.repeats):
        baseline, seconds = waited(usual, options.clock, device)
        times["usual"].append(seconds / options.images)
        for count in options.batches:
            found, seconds = waited(lambda count=count: ours(count), options.clock, device)
            times[count].append(seconds / count)
    shared = min(len(found), len(baseline))
    apart = (found[:shared].cpu() - baseline[:shared].cpu()).abs() / baseline[:shared].cpu()
    each = {key: statistics.median(value) / options.steps for key, value in times.items()}
    best = min(options.batches, key=lambda count: each[count])
    result = {
        "layer": layer,
        "size": size,
        "ms_per_image_and_step": {str(key): 1e3 * value for key, value in each.items()},
        "inversions_per_minute": {
            str(key): 60 / (PUBLISHED_STEPS * value) for key, value in each.items()
        },
        "ratio": {str(count): each["usual"] / each[count] for count in options.batches},
        "difference": float(apart.max()),
        "shares": shares(
            matcher, codes[:best], config, shape, each[best] * best, options.clock, options.repeats
        ),
    }
    print(name, json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--encoders", nargs="+", metavar="NAME[=LAYER]",
        default=["squeezenet1_1", "efficientnet_lite0", "vit_small_patch14_saliency"],
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=4, help="of the usual loop")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/preimage.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for text in options.encoders:
        name, _, layer = text.partition("=")
        found[name] = measure(name, layer, options)
    met = {name: max(one["ratio"].values()) >= TARGET for name, one in found.items()}
    print("target:", ", ".join(f"{name} {'met' if ok else 'missed'}" for name, ok in met.items()))
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "encoders")}
    versions = {"torch": torch.__version__}
    device = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    whole = {"machine": device, "versions": versions, "settings": settings}
    store.write_json(options.output, {**whole, "target": TARGET, "met": met, "encoders": found})


if __name__ == "__main__":
    main()
