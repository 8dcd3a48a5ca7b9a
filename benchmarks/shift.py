"""How much faster an object is swept over a canvas than in the straightforward way.

    python benchmarks/shift.py [--encoders NAME ...] [--strides 16 8] [--objects 3] [--repeats 3]
        [--clock wall|cpu] [--threads N]

Four ways of getting the deepest recommended layer's vector at the positions of a grid, in turns,
medians of the repeats:

* straightforward: PIL paste, ToTensor and Normalize in a DataLoader with 2 workers, batches of 32,
  the bare network in float32. Its cost does not depend on the place, so a sample of positions will
  do;
* composed: `shift.sweep` of the encoder as it is: pictures composed as tensors, in small batches;
* optimised: the same after `extract.optimise`: channels-last, batch norm folded;
* shared: the same with the early layers once per stride phase (`fmlib.phases`), the default.

What a sweep does once for all objects (folding, planning) is left out: the rate is that of every
object after the first. Only the ratios mean anything. On a machine that others use as well, let the
clock be "cpu", the processor time of this process and its workers, and set OMP_WAIT_POLICY=passive,
so that threads do not spend it waiting.
The error is the largest difference in cosine to the five references from the composed way; the
straightforward way differs from it by the rounding to 8 bits.
Results go to results/benchmarks/shift.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fmlib import encoders, images, shift, store

SIZE, CANVAS = 125, 224


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


def wall() -> float:
    return time.perf_counter()


def cpu() -> float:
    """Processor seconds of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> tuple[Any, float]:
    gc.collect()  # workers of an earlier loader end here, not in the time of another
    start = clock()
    result = call()
    gc.collect()
    return result, clock() - start


def measure(
    name: str, objects: list[Tensor], stride: int, repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    encoder = encoders.load(name)
    layer = encoder.recommended[-1]
    small = shift.prepare(objects[0], SIZE)
    places = shift.grid(CANVAS, SIZE, stride)
    fixed = shift.references(CANVAS, SIZE)
    chosen = torch.randint(len(places.positions), (123,))
    sample = torch.cat([fixed, places.positions[chosen]])  # four batches

    def swept(count: int, **options: Any) -> Any:
        options |= {"size": SIZE, "canvas": CANVAS, "stride": stride, "span": 1}
        return shift.sweep(encoder, objects[:count], [layer], **options)[layer]

    ways: dict[str, dict[str, Any]] = {
        "composed": {"optimise": False, "share": False},
        "optimised": {"share": False},
        "shared": {"share": True},
    }
    # five references and two positions of the line beside the centre come on top
    more = (len(objects) - 1) * (len(places.positions) + 7)
    seconds: dict[str, list[float]] = {"straightforward": [], **{way: [] for way in ways}}
    maps: dict[str, Any] = {}
    vectors = torch.empty(0)
    for _ in range(repeats):
        by_pil = functools.partial(straightforward, encoder, small, sample, layer)
        vectors, elapsed = timed(by_pil, clock)
        seconds["straightforward"].append(elapsed / len(sample))
        for way, settings in ways.items():
            _, once = timed(functools.partial(swept, 1, **settings), clock)
            maps[way], elapsed = timed(functools.partial(swept, len(objects), **settings), clock)
            seconds[way].append((elapsed - once) / more)
    rate = {way: 1 / statistics.median(values) for way, values in seconds.items()}

    unit = F.normalize(vectors.double(), dim=1)
    where = {tuple(p): i for i, p in enumerate(places.positions.tolist())}
    index = [where[tuple(p)] for p in sample[5:].tolist()]
    by_hand = (unit[5:] @ unit[:5].T).T
    plain = maps["composed"].cosine
    error = {way: float((maps[way].cosine - plain).abs().max()) for way in ways}
    plain = plain[0].flatten(1)
    error["straightforward"] = float((by_hand - plain[:, index]).abs().max())
    return {
        "encoder": name,
        "layer": layer,
        "stride": stride,
        "positions": len(places.positions),
        "positions_per_second": rate,
        "ratio": {way: rate[way] / rate["straightforward"] for way in ways},
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=list(encoders.packaged()))
    parser.add_argument("--strides", nargs="+", type=int, default=[16, 8])
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/shift.json"))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    clock = {"wall": wall, "cpu": cpu}[options.clock]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    objects = list(images.load("objects", limit=options.objects))
    rows = []
    for name in options.encoders:
        for stride in options.strides:
            row = measure(name, objects, stride, options.repeats, clock)
            rows.append(row)
            rates = row["positions_per_second"]
            print(
                f"{name:28s} stride {stride:2d}  "
                + "  ".join(
                    f"{way} {rate:6.1f}/s"
                    + (f" ×{row['ratio'][way]:.2f}" if way in row["ratio"] else "")
                    for way, rate in rates.items()
                )
                + f"  error {row['error']['shared']:.1e}",
                flush=True,
            )
    store.write_json(
        options.output,
        {
            "machine": platform.machine(),
            "threads": options.threads,
            "clock": options.clock,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "objects": options.objects,
            "object_px": SIZE,
            "canvas_px": CANVAS,
            "repeats": options.repeats,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
