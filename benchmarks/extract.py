"""How much faster features are extracted than by a plain loop, in one run on one machine.

    python benchmarks/extract.py [--encoders NAME ...] [--images 32] [--repeats 3]

Ways of getting the recommended layers of the same images, interleaved, medians of the repeats:

* eager 32: the bare network of timm or torchvision, forward hooks, float32, batches of 32;
* eager 8: the same in batches of 8, to show what the batch size alone does;
* optimised: `extract.stream` of `extract.optimise(encoder)`, float32, its default batch size;
* bfloat16: the same with autocast.

Only the ratios mean anything. On a machine that is busy with other work, compare processor
time (user and system) instead of wall time: `OMP_WAIT_POLICY=passive` in the environment, so that
threads do not spend it waiting for each other, and `--clock cpu`. The cosine is the smallest over
images and layers against eager 32. Where bfloat16 is not faster, the profile says why: the
operators that took its time. Results go to results/benchmarks/extract.json.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import CLOCKS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fmlib import encoders, extract, images, store

Ways = dict[str, Callable[[], dict[str, Tensor]]]


def eager(encoder: encoders.Encoder, pixels: Tensor, batch_size: int) -> dict[str, Tensor]:
    """What one writes without this library."""
    values: dict[str, list[Tensor]] = {name: [] for name in encoder.recommended}
    handles = [
        encoder.net.get_submodule(name).register_forward_hook(
            lambda m, a, output, name=name: values[name].append(output)  # pyright: ignore
        )
        for name in encoder.recommended
    ]
    with torch.no_grad():
        for batch in pixels.split(batch_size):
            encoder.net((batch - encoder.mean) / encoder.std)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in values.items()}


def streamed(encoder: encoders.Encoder, pixels: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    parts = list(
        extract.stream(encoder, pixels, encoder.recommended, autocast=autocast, progress=False)
    )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor], *, tokens: int) -> float:
    smallest = 1.0
    for name, value in expected.items():
        # the hook of a token network saw (N, T, C): compare the grid without its prefix
        flat = value[:, tokens:].transpose(1, 2) if value.ndim == 3 else value
        similar = F.cosine_similarity(found[name].flatten(1), flat.flatten(1))
        smallest = min(smallest, float(similar.min()))
    return smallest


def seconds(call: Callable[[], object], clock: str) -> float:
    start = CLOCKS[clock]()
    call()
    return CLOCKS[clock]() - start


def operators(call: Callable[[], object], count: int = 6) -> list[dict[str, object]]:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    table = record.key_averages()
    total = sum(row.self_cpu_time_total for row in table)
    rows = sorted(table, key=lambda row: -row.self_cpu_time_total)[:count]
    return [
        {"operator": row.key, "share": row.self_cpu_time_total / total, "calls": row.count}
        for row in rows
    ]


def measure(name: str, *, count: int, repeats: int, clock: str) -> dict[str, object]:
    encoder = encoders.load(name)
    fast = extract.optimise(encoder)
    pixels = images.load("photos", limit=count).batch(encoder.input_size)
    few = pixels[:2]  # bfloat16 can be many times slower: measured on fewer images
    ways: dict[str, tuple[Callable[[], dict[str, Tensor]], int]] = {
        "eager 32": (lambda: eager(encoder, pixels, 32), len(pixels)),
        "eager 8": (lambda: eager(encoder, pixels, 8), len(pixels)),
        "optimised": (lambda: streamed(fast, pixels, autocast=False), len(pixels)),
        "bfloat16": (lambda: streamed(fast, few, autocast=True), len(few)),
    }
    expected = ways["eager 32"][0]()
    cosines = {}
    for way, (call, number) in ways.items():
        found = call()  # also the warm-up
        if way.startswith("eager"):
            continue
        reference = {key: value[:number] for key, value in expected.items()}
        cosines[way] = cosine(found, reference, tokens=encoder.num_prefix_tokens)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, (call, number) in ways.items():
            times[way].append(seconds(call, clock) / number)
    medians = {way: statistics.median(values) for way, values in times.items()}
    slowest, fastest = max(times["optimised"]), min(times["optimised"])
    return {
        "encoder": name,
        "images": len(pixels),
        "images_per_second": {way: 1 / value for way, value in medians.items()},
        "speed_up": {way: medians["eager 32"] / value for way, value in medians.items()},
        "spread_of_optimised": slowest / fastest,
        "cosine": cosines,
        "profile": {way: operators(ways[way][0]) for way in ("eager 32", "optimised", "bfloat16")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--encoders", nargs="+", default=list(encoders.packaged()))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/extract.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'encoder':28}{'eager 8':>9}{'optimised':>11}{'bfloat16':>10}   cosines")
    for name in arguments.encoders:
        row = measure(
            name, count=arguments.images, repeats=arguments.repeats, clock=arguments.clock
        )
        rows.append(row)
        ratio, similar = row["speed_up"], row["cosine"]
        print(
            f"{name:28}{ratio['eager 8']:8.2f}×{ratio['optimised']:10.2f}×"  # pyright: ignore
            f"{ratio['bfloat16']:9.2f}×   {similar['optimised']:.6f}, "  # pyright: ignore
            f"{similar['bfloat16']:.4f}",  # pyright: ignore
            flush=True,
        )
    for way in ("optimised", "bfloat16"):
        print(f"\n{rows[0]['encoder']}, {way}: share of the time by operator")
        for line in rows[0]["profile"][way]:
            print(f"  {line['share']:6.1%}  {line['operator']} ({line['calls']} calls)")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clock": arguments.clock,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    store.write_json(arguments.output, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
