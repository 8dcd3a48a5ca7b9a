"""Training decoders together: one pass of the encoder for all of them, against one pass each.

    python benchmarks/upconv.py [--clock wall|cpu] [--threads N] [--repeats 3] [--size 96]
        [--steps 8] [--batch-size 16] [--device cpu] [--precision float32] [--encoders NAME ...]

Both ways are `upconv.train` on the same crops with the same settings, in turns within one run:
"joint" trains decoders of all recommended layers, and of the logits if there are any, in one pass,
"separate" one after another (each time the encoder only goes as deep as that decoder needs). The
weights come out the same (tests/test_upconv.py). Steps are timed less what a run of one step takes,
so that starting does not count. `share_of_the_encoder` is what it takes, forward alone, of a joint
step.

`zero_insertion` is the ratio of one up-convolution done as published (zeros inserted, 5 x 5
convolution) to ours (the transposed convolution that it equals), forward and back, for the
published widths at the size of a 128-pixel network.

On a GPU, `matrix_share` is the share of the device's ceiling for products of matrices (measured
here, in the precision used) that the products of a joint step reach.

Only ratios mean anything. On a machine that others use as well, let the clock be "cpu", the
processor time of this process, and set OMP_WAIT_POLICY=passive. On a GPU the clock has to be
"wall". Results go to results/benchmarks/upconv.json.
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
import torch.nn.functional as F
from measure import CLOCKS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fmlib import encoders, extract, images, store, upconv
from fmlib.codes import Codes

#: Channels before and after, and the side of the grid, of the published network's up-convolutions.
PUBLISHED = ((256, 256, 4), (256, 128, 8), (128, 64, 16), (64, 32, 32), (32, 3, 64))
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def waited(call: Callable[[], Any], clock: str, device: torch.device) -> float:
    """Seconds of a call once the device has done it."""
    start = CLOCKS[clock]()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def zero_insertion(clock: str, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of the published way over ours, for each of the published up-convolutions."""
    ratios = {}
    for before, after, side in PUBLISHED:
        x = torch.randn(16, before, side, side, device=device, requires_grad=True)
        plain = nn.Conv2d(before, after, 5, padding=2).to(device)
        ours = nn.ConvTranspose2d(before, after, 5, 2, 2, output_padding=1).to(device)

        def published(x: Tensor = x, layer: nn.Module = plain) -> None:
            spread = F.pad(x[..., None, :, None], (0, 1, 0, 0, 0, 1)).flatten(4).flatten(2, 3)
            layer(spread).square().sum().backward()

        def transposed(x: Tensor = x, layer: nn.Module = ours) -> None:
            layer(x).square().sum().backward()

        times: dict[str, list[float]] = {"published": [], "ours": []}
        for _ in range(repeats + 1):
            times["published"].append(waited(published, clock, device))
            times["ours"].append(waited(transposed, clock, device))
        first, second = (statistics.median(values[1:]) for values in times.values())
        ratios[f"{before} to {after} at {side}"] = first / second
    return ratios


def ceiling(device: torch.device, precision: str) -> float:
    """Operations a second of a large product of matrices."""
    a = torch.randn(8192, 8192, device=device, dtype=PRECISIONS[precision])
    waited(lambda: a @ a, "wall", device)
    torch.cuda.synchronize()
    seconds = min(waited(lambda: a @ a, "wall", device) for _ in range(10))
    return 2 * 8192**3 / seconds


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One encoder."""
    device = encoders.device(options.device)
    plain = encoders.load(name, device=device)
    classes = getattr(plain.net, "num_classes", None) != 0
    layers = [*plain.recommended, *(["logits"] if classes else [])]
    fast = extract.optimise(plain, keep=plain.recommended)
    patch = 14 if "patch14" in name else 1
    size = options.size // patch * patch
    train, held = images.load("photos", limit=80, seed=0).split(0.8, seed=0)
    data = train.in_memory(2 * size), held.select(range(2)).in_memory(2 * size)
    architecture = upconv.PUBLISHED if options.published else upconv.SMALL
    both = {"joint": [layers], "separate": [[layer] for layer in layers]}
    config = upconv.Training(
        size=size, batch_size=options.batch_size, steps=1, validate_every=10**6,
        precision=options.precision,
    )  # fmt: skip

    def way(key: str, steps: int) -> None:
        for group in both[key]:
            upconv.train(
                Codes(fast, group), dict.fromkeys(group, architecture), *data,
                config=dataclasses.replace(config, steps=steps),
            )  # fmt: skip

    times: dict[str, list[float]] = {key: [] for key in both}
    way("joint", 1)  # warm
    for _ in range(options.repeats):
        for key in both:
            begun = waited(lambda key=key: way(key, 1), options.clock, device)
            whole = waited(lambda key=key: way(key, 1 + options.steps), options.clock, device)
            times[key].append((whole - begun) / options.steps)
    each = {key: statistics.median(values) for key, values in times.items()}
    codes = Codes(fast, layers)
    batch = torch.rand(options.batch_size, 3, size, size, device=device)

    @torch.no_grad()
    def encoder() -> None:
        with codes.opened():
            codes(batch)

    encoder()
    alone = statistics.median(
        waited(encoder, options.clock, device) for _ in range(max(3, options.repeats))
    )
    result: dict[str, Any] = {
        "decoders": len(layers),
        "size": size,
        "batch_size": options.batch_size,
        "ratio": each["separate"] / each["joint"],
        "repeats": [b / a for a, b in zip(times["joint"], times["separate"], strict=True)],
        "images_per_second": {k: options.batch_size / v for k, v in each.items()},
        "share_of_the_encoder": alone / each["joint"],
    }
    if device.type == "cuda":
        networks = [
            upconv.decoder(shape, size, architecture=architecture).to(device)
            for shape in codes.shapes(size).values()
        ]
        with FlopCounterMode(display=False) as counter:
            for network, code in zip(networks, codes(batch).values(), strict=True):
                network(code.detach()).square().mean().backward()
        reached = counter.get_total_flops() / each["joint"]
        result["matrix_share"] = reached / ceiling(device, options.precision)
    print(name, json.dumps(result, indent=1))
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--encoders", nargs="+", metavar="NAME",
        default=["squeezenet1_1", "efficientnet_lite0", "vit_small_patch14_saliency"],
    )  # fmt: skip
    parser.add_argument("--published", action="store_true", help="decoders of published width")
    parser.add_argument("--size", type=int, default=98)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/upconv.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = encoders.device(options.device)
    found: dict[str, Any] = {
        "settings": {
            "clock": options.clock,
            "threads": options.threads,
            "repeats": options.repeats,
            "steps": options.steps,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "machine": platform.machine(),
            "torch": torch.__version__,
        },
        "zero_insertion": zero_insertion(options.clock, device, options.repeats),
        "encoders": {name: measure(name, options) for name in options.encoders},
    }
    print(json.dumps(found["zero_insertion"], indent=1))
    store.write_json(options.output, found)


if __name__ == "__main__":
    main()
