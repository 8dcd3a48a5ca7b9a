"""How much faster an object is swept over a canvas than in the straightforward way; how it scales.

    python benchmarks/shift.py [--encoders NAME ...] [--strides 1 8] [--repeats 3]
        [--clock wall|cpu] [--threads N] [--whole ENCODER] [--no-scaling]

Four ways of getting the deepest recommended layer's vector at the positions of a grid, in turns,
medians of the repeats:

* straightforward: PIL paste, ToTensor and Normalize in a DataLoader with 2 workers, batches of 32,
  the bare network in float32, as the authors' scripts do it;
* composed: pictures composed as tensors, in small batches, the encoder as it is;
* optimised: the same after `extract.optimise`: channels-last, batch norm folded;
* shared: the same with the early layers once per stride phase (`fmlib.phases`), the default.

The cost of the first three does not depend on the place, so a sample of positions will do. That of
the last does: windows are made once and used many times. So its parts are timed, each stage's
windows and the rest of the network, and put together with the number of windows that the grid
needs: rate = P / (five references + sum over stages of windows·time + P·time of the rest), for one
object, P positions. `--whole NAME` runs all P positions of the coarsest stride for that encoder
and reports the rate beside the one put together. What is done once for all objects (folding,
planning) is left out of the rates and given apart, as `setup_seconds`.

Only ratios mean anything. On a machine that others use as well, let the clock be "cpu", the
processor time of this process and its workers, and set OMP_WAIT_POLICY=passive, so that threads do
not spend it waiting. The error is the largest difference in cosine to the five references from the
composed way; the straightforward way differs from it by the rounding to 8 bits.

The scaling table runs `shift.sweep` in a process of its own for each line: seconds of the sweep,
the peak of resident memory during it (MB), how much that is above what the process held before
(having swept the four corners), and the size of the result. Memory may grow until the windows kept
have filled their share (`phases._CACHE_BYTES` for each stage), and not beyond.
Results go to results/benchmarks/shift.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import memory
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fmlib import encoders, extract, images, phases, shift, store

SIZE, CANVAS = 125, 224
#: (stride, objects, layers) of the scaling table; one thing grows at a time.
SCALING = [(16, 1, 1), (8, 1, 1), (4, 1, 1), (2, 1, 1), (8, 2, 1), (8, 4, 1), (8, 1, 3), (8, 1, 5)]


class Pasted(Dataset):
    """An object at each position, as one would write it."""

    def __init__(self, obj: Tensor, positions: Tensor, encoder: encoders.Encoder) -> None:
        pixels = (obj.permute(1, 2, 0) * 255).round().byte().numpy()
        self.object = Image.fromarray(pixels, "RGBA")
        self.positions = positions.tolist()
        mean, std = encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        y, x = self.positions[index]
        canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
        canvas.paste(self.object, (x, y), self.object)
        return self.transform(canvas)


def straightforward(
    encoder: encoders.Encoder, obj: Tensor, positions: Tensor, layer: str
) -> Tensor:
    """Vectors (P, D)."""
    values: list[Tensor] = []
    module = encoder.net.get_submodule(layer)

    def keep(_module: Any, _args: Any, output: Tensor) -> None:
        if output.ndim == 3:  # tokens (N, T, C)
            output = output[:, encoder.num_prefix_tokens :].transpose(1, 2)
        values.append(output.flatten(2).mean(2))

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        for batch in DataLoader(Pasted(obj, positions, encoder), batch_size=32, num_workers=2):
            encoder.net(batch)
    handle.remove()
    return torch.cat(values)


def swept(
    encoder: encoders.Encoder, obj: Tensor, positions: Tensor, layer: str, chain: Any = None
) -> Tensor:
    """Vectors (P, D)."""
    found = shift.features(encoder, obj, positions, [layer], canvas=CANVAS, chain=chain)
    return torch.cat([vectors[layer] for _, vectors in found])


def wall() -> float:
    return time.perf_counter()


def cpu() -> float:
    """Processor seconds of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> tuple[Any, float]:
    gc.collect()  # what an earlier call left behind is not paid for in this one
    start = clock()
    result = call()
    return result, clock() - start


def parts(
    chain: phases.Chain, obj: Tensor, places: Tensor, clock: Callable[[], float]
) -> list[tuple[int, float]]:
    """(how often, seconds each) of every stage's windows and of the rest of the network."""
    ground = shift.paint("white", CANVAS)
    paste = functools.partial(shift._paste, obj, background=ground)
    count, result = 24, []
    for depth, stage in enumerate(chain.stages, start=1):
        needed = list(dict.fromkeys(stage.canonical(*p) for p in places.tolist()))
        middle = max(0, len(needed) // 2 - count // 2)
        sample = needed[middle : middle + count]
        sweep = chain.sweep(paste, batch_size=4)
        with torch.no_grad():
            sweep._maps(depth - 1, sample[:1])  # the allocator's and the library's first time
            if depth > 1:
                sweep._maps(depth - 1, sample)
            _, seconds = timed(functools.partial(sweep._maps, depth, sample), clock)
        result.append((len(needed), seconds / len(sample)))
    middle = len(places) // 2
    sample = places[middle : middle + count]
    sweep = chain.sweep(paste, batch_size=4)
    for part in sample.split(8):
        sweep.maps(part)
    _, seconds = timed(lambda: [sweep(part) for part in sample.split(8)], clock)
    return [*result, (len(places), seconds / len(sample))]


def cosines(vectors: Tensor, fixed: Tensor) -> Tensor:
    return F.normalize(vectors.double(), dim=1) @ F.normalize(fixed.double(), dim=1).T


def measure(
    name: str, obj: Tensor, strides: list[int], repeats: int, clock: Callable[[], float], whole: str
) -> list[dict[str, Any]]:
    encoder = encoders.load(name)
    layer = encoder.recommended[-1]
    small, fixed = shift.prepare(obj, SIZE), shift.references(CANVAS, SIZE)
    fast, folding = timed(functools.partial(extract.optimise, encoder, keep=[layer]), clock)
    everywhere = shift.grid(CANVAS, SIZE, 1).positions
    sample = torch.cat([fixed, everywhere[torch.randperm(len(everywhere))[:59]]])  # two batches
    empty = shift.paint("white", CANVAS)[None]

    chains: dict[int, phases.Chain | None] = {}
    setup: dict[int, float] = {}
    for stride in strides:
        places = shift.grid(CANVAS, SIZE, stride).positions
        plan = functools.partial(
            phases.plan, fast, [layer], places, size=(SIZE, SIZE), canvas=CANVAS
        )
        stages, planning = timed(plan, clock)
        chains[stride] = phases.Chain(fast, [layer], stages, empty=empty) if stages else None
        setup[stride] = folding + planning

    ways = {
        "straightforward": functools.partial(straightforward, encoder, small, sample, layer),
        "composed": functools.partial(swept, encoder, small, sample[:32], layer),
        "optimised": functools.partial(swept, fast, small, sample[:32], layer),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    shared: dict[int, list[float]] = {stride: [] for stride in strides}
    windows: dict[int, list[int]] = {}
    vectors: dict[str, Tensor] = {}
    for _ in range(repeats):
        for way, call in ways.items():
            vectors[way], elapsed = timed(call, clock)
            seconds[way].append(elapsed / len(vectors[way]))
        for stride, chain in chains.items():
            places = shift.grid(CANVAS, SIZE, stride).positions
            count, each = len(places), seconds["optimised"][-1]
            total = (count + len(fixed)) * each
            if chain is not None:
                pieces = parts(chain, small, places, clock)
                windows[stride] = [n for n, _ in pieces[:-1]]
                total = sum(n * piece for n, piece in pieces) + len(fixed) * each
            shared[stride].append(total / count)

    expected = cosines(vectors["composed"], vectors["composed"][:5])
    rows = []
    for stride in strides:
        chain = chains[stride]
        found = {way: vectors[way][:32] for way in ("straightforward", "optimised")}
        if chain is not None:
            found["shared"] = swept(fast, small, sample[:32], layer, chain)
        rate = {way: 1 / statistics.median(values) for way, values in seconds.items()}
        rate["shared"] = 1 / statistics.median(shared[stride])
        row = {
            "encoder": name,
            "layer": layer,
            "stride": stride,
            "positions": len(shift.grid(CANVAS, SIZE, stride).positions),
            "windows": windows.get(stride, []),
            "setup_seconds": setup[stride],
            "positions_per_second": rate,
            "ratio": {way: rate[way] / rate["straightforward"] for way in rate},
            "gain": {"sharing": rate["shared"] / rate["optimised"]},
            "error": {
                way: float((cosines(value, value[:5]) - expected).abs().max())
                for way, value in found.items()
            },
        }
        if whole == name and stride == max(strides) and chain is not None:
            places = shift.grid(CANVAS, SIZE, stride).positions
            _, elapsed = timed(functools.partial(swept, fast, small, places, layer, chain), clock)
            _, more = timed(functools.partial(swept, fast, small, fixed, layer), clock)
            row["whole_positions_per_second"] = len(places) / (elapsed + more)
        rows.append(row)
        line = [f"{way} {x:6.1f}/s ×{row['ratio'][way]:.2f}" for way, x in rate.items()]
        error = max(value for way, value in row["error"].items() if way != "straightforward")
        print(f"{name:28s} stride {stride:2d}  {'  '.join(line)}  error {error:.1e}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------- scaling


def one(stride: int, objects: int, layers: int, clock: Callable[[], float]) -> None:
    """In a process of its own: print the seconds of a sweep, and peaks before and after it."""
    encoder = encoders.load("squeezenet1_1")
    cutouts = images.load("objects", limit=objects)
    chosen = list(encoder.recommended[-layers:])
    shift.sweep(encoder, cutouts.select([0]), chosen, size=SIZE, stride=99, span=1)
    gc.collect()
    before, _ = memory(reset=True)
    run = functools.partial(shift.sweep, encoder, cutouts, chosen, size=SIZE, stride=stride, span=1)
    maps, seconds = timed(run, clock)
    _, after = memory()
    result = sum(x.cosine.nbytes for x in maps.values()) / 1e6
    print(json.dumps([seconds, after, after - before, result]))


def scaling(arguments: list[str]) -> list[dict[str, Any]]:
    rows = []
    for stride, objects, layers in SCALING:
        command = [sys.executable, __file__, *arguments]
        command += ["--one", str(stride), str(objects), str(layers)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak, above, result = json.loads(answer.splitlines()[-1])
        positions = len(shift.grid(CANVAS, SIZE, stride).positions)
        rows.append(
            {
                "encoder": "squeezenet1_1",
                "positions": positions,
                "objects": objects,
                "layers": layers,
                "seconds": seconds,
                "peak_mb": peak,
                "above_start_mb": above,
                "result_mb": result,
            }
        )
        print(
            f"{positions:4d} positions  {objects} objects  {layers} layers  {seconds:6.2f} s  "
            f"{peak:6.0f} MB, {above:+5.0f} MB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=list(encoders.packaged()))
    parser.add_argument("--strides", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/shift.json"))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--whole", default="squeezenet1_1")
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    clock = {"wall": wall, "cpu": cpu}[options.clock]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.one:
        stride, objects, layers = options.one
        one(stride, objects, layers, clock)
        return
    (obj,) = images.load("objects", limit=1)
    rows = []
    for name in options.encoders:
        rows += measure(name, obj, options.strides, options.repeats, clock, options.whole)
    same = ["--clock", options.clock, "--threads", str(options.threads)]
    store.write_json(
        options.output,
        {
            "machine": platform.machine(),
            "threads": options.threads,
            "clock": options.clock,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "object_px": SIZE,
            "canvas_px": CANVAS,
            "repeats": options.repeats,
            "rows": rows,
            "scaling": [] if options.no_scaling else scaling(same),
        },
    )


if __name__ == "__main__":
    main()
