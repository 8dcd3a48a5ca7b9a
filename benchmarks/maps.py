"""How much faster linear maps between features are fitted in closed form, and how memory grows.

    python benchmarks/maps.py [--clock wall|cpu] [--threads N] [--repeats 3] [--rows 50000]
        [--channels 320] [--images 1000 3000 10000] [--encoder NAME] [--layer NAME] [--crops 2]
        [--epochs 100] [--parts ridge_path memory training]

Three comparisons, each within this run:

* ridge path: 20 penalties and the choice of one, from features to the chosen map. Ours is
  `Statistics.update` over batches of float32 or float64 maps (5x5 grids, 50,000 positions), then
  `ridge_path` by 5 folds of images. Baselines are scikit-learn's `RidgeCV` with the same penalties
  on the same rows: its own leave-one-out ("gcv"), and the 5 folds that ours has ("folds", once and
  in float64 only, for it fits 100 times). Both minimise Σ‖y − Wx − b‖² + γ‖W‖², so that their alpha
  is our γ; the weights at one penalty differ by `difference`, relative to the largest weight.
  Memory (in float64) is the growth of the peak of a fresh process during the fit, data apart.
* memory: growth of the peak of a fresh process in which `Statistics.update` takes in 1,000, 3,000
  and 10,000 synthetic images (7x7 grids), made batch by batch, then `ridge_path`.
* training: `maps.fit("ridge")` against `maps.fit("trained_linear")`, the same linear map fitted by
  AdamW, on features of crops of `photos` and of the crops in grey, three quarters of the source
  groups for fitting. Trained with the paper's loss and recipe, with the squared error alone, and
  with the squared error alone and ten times its learning rate, which is kinder to training than
  the paper is. Held-out R² (the floor is the mean y of the fitted pictures) and median cosine, the
  paper's measure and 0.7 of its loss, with `gain`, ridge minus trained, over images (intervals by
  bootstrap of source groups). Features are the same and not counted.

Only ratios mean anything: ratio = median of a baseline's seconds / median of ours, in turns. On a
machine that others use as well, let the clock be "cpu", the processor time of this process, and set
OMP_WAIT_POLICY=passive. Results go to results/benchmarks/maps.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from measure import CLOCKS, memory
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import PredefinedSplit
from threadpoolctl import threadpool_limits
from torch import Tensor

from fmlib import edits, encoders, images, map_scores, maps, stats, store, taps
from fmlib.trained_maps import TrainingConfig

FOLDS, GRID, BATCH = 5, (5, 5), 64
TYPES = {"float32": torch.float32, "float64": torch.float64}
PARTS = ("ridge_path", "memory", "training")
#: Wanted: seconds of the baseline over ours; MB at the largest number of images.
TARGETS = {"ridge_path": 10.0, "memory_mb": 2000.0, "training": 50.0}


def timed(call: Callable[[], Any], clock: str) -> tuple[Any, float]:
    gc.collect()  # what an earlier call left behind is not paid for in this one
    start = CLOCKS[clock]()
    result = call()
    return result, CLOCKS[clock]() - start


# ------------------------------------------------------------------------------------- ridge path


def planted(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maps (N, C, 5, 5) whose variances fall over three decades, and noisy linear images of them.

    The noise is so large that the best penalty lies inside the path.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = torch.logspace(0, -1.5, channels, dtype=torch.float64)
    mix = spread[:, None] * torch.linalg.qr(normal(channels, channels))[0]
    x = normal(rows, channels) @ mix + 1
    y = x @ normal(channels, channels) / channels**0.5 + normal(rows, channels)
    return tuple(  # pyright: ignore[reportReturnType]
        value.to(dtype).unflatten(0, (-1, *GRID)).permute(0, 3, 1, 2).contiguous()
        for value in (x, y)
    )


def flat(x: Tensor) -> np.ndarray:
    """Maps as rows, as scikit-learn wants them."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous().numpy()


def streamed(x: Tensor, y: Tensor) -> maps.RidgePath:
    """Ours: statistics batch by batch, the path, the chosen map."""
    found = maps.Statistics(folds=FOLDS)
    for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
        found.update(a, b)
    path = maps.ridge_path(found)
    path.map()
    return path


def same_folds(x: Tensor) -> PredefinedSplit:
    """Images numbered n are held out in fold n mod 5, as `Statistics` does it."""
    fold = np.arange(len(x)) % FOLDS
    return PredefinedSplit(np.repeat(fold, x.shape[2] * x.shape[3]))


def compared(name: str, rows: int, channels: int, repeats: int, clock: str) -> dict[str, Any]:
    x, y = planted(rows, channels, TYPES[name])
    flat_x, flat_y = flat(x), flat(y)
    path = streamed(x, y)  # also the warm-up
    fitted: dict[str, Any] = {"gcv": RidgeCV(path.penalties)}
    seconds: dict[str, list[float]] = {"ours": [], "gcv": []}
    for _ in range(repeats):
        seconds["ours"].append(timed(lambda: streamed(x, y), clock)[1])
        seconds["gcv"].append(timed(lambda: fitted["gcv"].fit(flat_x, flat_y), clock)[1])
    if name == "float64":
        folds = RidgeCV(path.penalties, cv=same_folds(x), scoring="neg_mean_squared_error")
        fitted["folds"], elapsed = timed(lambda: folds.fit(flat_x, flat_y), clock)
        seconds["folds"] = [elapsed]
    difference, chosen = {}, {"ours": path.penalties[path.best]}
    for way, other in fitted.items():
        chosen[way] = float(other.alpha_)
        own = path.map(path.penalties.index(chosen[way])).matrix.numpy()
        difference[way] = float(np.abs(other.coef_ - own).max() / np.abs(own).max())
    median = {way: statistics.median(values) for way, values in seconds.items()}
    above = {}
    if name == "float64":
        for way in ("ours", "gcv"):
            above[way] = child("--peak", way, name, str(rows), str(channels))
    return {
        "rows": rows,
        "channels": channels,
        "type": name,
        "penalties": len(path.penalties),
        "seconds": median,
        "all_seconds": seconds,
        "ratio": {way: median[way] / median["ours"] for way in fitted},
        "chosen_penalty": chosen,
        "difference": difference,
        "above_data_mb": above,
    }


def ridge_paths(rows: int, channels: int, repeats: int, clock: str) -> list[dict[str, Any]]:
    result = []
    for name in TYPES:
        row = compared(name, rows, channels, repeats, clock)
        result.append(row)
        ratio = "  ".join(f"{way} ×{value:.1f}" for way, value in row["ratio"].items())
        above = [f"{way} +{value:.0f} MB" for way, value in row["above_data_mb"].items()]
        print(
            f"ridge path, {rows} x {channels} {name}: ours {row['seconds']['ours']:.2f} s  {ratio}"
            f"  difference {max(row['difference'].values()):.1e}  {', '.join(above)}",
            flush=True,
        )
    return result


def peak(way: str, name: str, rows: int, channels: int) -> float:
    """In a process of its own: MB above what it held, data made, before the fit."""
    x, y = planted(rows, channels, TYPES[name])
    penalties = streamed(x[:10], y[:10]).penalties
    flat_x, flat_y = (flat(x), flat(y)) if way == "gcv" else (np.empty(0), np.empty(0))
    if way == "gcv":
        del x, y
    gc.collect()
    before, _ = memory(reset=True)
    if way == "gcv":
        RidgeCV(penalties).fit(flat_x, flat_y)
    else:
        streamed(x, y)  # pyright: ignore[reportPossiblyUnboundVariable]
    return memory()[1] - before


# ----------------------------------------------------------------------------------------- memory


def synthetic(count: int, channels: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, BATCH):
        x = torch.randn(min(BATCH, count - start), channels, 7, 7, generator=generator)
        yield x, 0.5 * x + 0.1 * torch.randn(x.shape, generator=generator)


def grown(count: int, channels: int) -> float:
    """In a process of its own: MB that statistics of so many images and the path take."""
    gc.collect()
    before, _ = memory(reset=True)
    found = maps.Statistics()
    for x, y in synthetic(count, channels):
        found.update(x, y)
    maps.ridge_path(found).map()
    return memory()[1] - before


def child(*arguments: str) -> float:
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    return float(json.loads(answer.stdout.splitlines()[-1]))


def memories(counts: list[int], channels: int) -> list[dict[str, Any]]:
    rows = []
    for count in counts:
        above = child("--grown", str(count), str(channels))
        rows.append({"images": count, "channels": channels, "above_start_mb": above})
        print(f"memory, {count:6d} images: {above:+6.0f} MB", flush=True)
    return rows


# --------------------------------------------------------------------------------------- training


def pairs(encoder: encoders.Encoder, layer: str, chosen: images.ImageSet, crops: int) -> Any:
    """Features of crops and of the crops in grey, (N, C, H, W) each, and their source groups."""
    grey = edits.make("greyscale")
    before, after = [], []
    for batch in chosen.crop_batches(encoder.input_size, crops, 16):
        for kept, pixels in ((before, batch), (after, grey(batch))):
            kept.append(taps.features(encoder, pixels, [layer])[layer].float())
    groups = [group for group in chosen.table["group"] for _ in range(crops)]
    return torch.cat(before), torch.cat(after), groups


def plain(found: stats.Interval) -> list[float]:
    return [float(found.value), float(found.low), float(found.high)]


def training(
    name: str, layer: str, crops: int, epochs: int, repeats: int, clock: str
) -> dict[str, Any]:
    encoder = encoders.load(name)
    fitting, held_out = images.load("photos").split(0.75)
    x, y, groups = pairs(encoder, layer, fitting, crops)
    held_x, held_y, held_groups = pairs(encoder, layer, held_out, crops)
    floor = y.double().mean((0, 2, 3))
    squared: dict[str, Any] = {"mse_weight": 1.0, "cosine_weight": 0.0}
    recipes = {
        "paper": TrainingConfig(epochs=epochs),
        "squared error": TrainingConfig(epochs=epochs, **squared),
        "squared error, rate 1e-3": TrainingConfig(epochs=epochs, learning_rate=1e-3, **squared),
    }
    pair = (x, y)
    maps.fit("ridge", (x[:64], y[:64]), groups=groups[:64])  # the library's first time
    own = [timed(lambda: maps.fit("ridge", pair, groups=groups), clock) for _ in range(repeats)]
    fitted, seconds = {"ridge": own[0][0]}, {"ridge": [elapsed for _, elapsed in own]}
    for recipe, config in recipes.items():
        fitted[recipe], elapsed = timed(
            lambda config=config: maps.fit("trained_linear", pair, groups=groups, config=config),
            clock,
        )
        again, more = timed(lambda: maps.fit("ridge", pair, groups=groups), clock)
        del again
        seconds[recipe] = [elapsed]
        seconds["ridge"].append(more)  # in turns with the slow ones
    median = {way: statistics.median(values) for way, values in seconds.items()}
    scores = {
        way: map_scores.score(found.apply(held_x), held_y, floor=floor)
        for way, found in fitted.items()
    }
    measures = ("r2", "median_cosine")
    rows = []
    for way, found in fitted.items():
        row: dict[str, Any] = {
            "way": way,
            "seconds": median[way],
            "ratio": median[way] / median["ridge"],
            "epochs": found.info.get("epochs"),
            "stopped_early": found.info.get("stopped_early"),
        }
        for measure in measures:
            value = scores[way].per_image(measure)
            row[measure] = plain(stats.bootstrap(value, groups=held_groups, seed=0))
            if way != "ridge":
                gain = stats.paired_difference(
                    scores["ridge"].per_image(measure), value, groups=held_groups, seed=0
                )
                row[f"gain_{measure}"] = plain(gain)
        rows.append(row)
        print(
            f"{name} {layer}, {way:26s} {row['seconds']:7.2f} s  ×{row['ratio']:.1f}  "
            f"R² {row['r2'][0]:.4f}  cosine {row['median_cosine'][0]:.4f}  "
            f"epochs {row['epochs']}",
            flush=True,
        )
    return {
        "encoder": name,
        "layer": layer,
        "edit": "greyscale",
        "fitted_images": len(x),
        "held_out_images": len(held_x),
        "shape": list(x.shape[1:]),
        "all_seconds": seconds,
        "rows": rows,
    }


def judged(part: str, found: Any) -> dict[str, bool]:
    """Which targets a part's results meet."""
    if part == "ridge_path":
        slowest = min(min(row["ratio"].values()) for row in found)
        return {
            "ridge_path": slowest >= TARGETS["ridge_path"],
            "ridge_path_same_map": all(max(row["difference"].values()) < 1e-6 for row in found),
        }
    if part == "memory":
        highest = max(row["above_start_mb"] for row in found)
        return {"memory": highest < TARGETS["memory_mb"]}
    met = {}
    for row in found["rows"][1:]:
        no_worse = row["gain_r2"][0] >= 0 and row["gain_median_cosine"][0] >= 0
        met[f"training, {row['way']}"] = bool(row["ratio"] >= TARGETS["training"] and no_worse)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--images", nargs="+", type=int, default=[1_000, 3_000, 10_000])
    parser.add_argument("--encoder", default="efficientnet_lite0")
    parser.add_argument("--layer", default="blocks.6")
    parser.add_argument("--crops", type=int, default=2, help="of each photograph")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/maps.json"))
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--grown", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)  # of NumPy's and scikit-learn's libraries
    if options.peak:
        way, name, rows, channels = options.peak
        print(json.dumps(peak(way, name, int(rows), int(channels))))
        return
    if options.grown:
        print(json.dumps(grown(*options.grown)))
        return
    if options.rows % (GRID[0] * GRID[1]):
        parser.error(f"--rows must be a multiple of {GRID[0] * GRID[1]}, not {options.rows}")
    parts = {
        "ridge_path": lambda: ridge_paths(
            options.rows, options.channels, options.repeats, options.clock
        ),
        "memory": lambda: memories(options.images, options.channels),
        "training": lambda: training(
            options.encoder, options.layer, options.crops, options.epochs, options.repeats,
            options.clock,
        ),
    }  # fmt: skip
    found = {name: parts[name]() for name in options.parts}
    met = {key: ok for name, value in found.items() for key, ok in judged(name, value).items()}
    print("targets:", ", ".join(f"{key} {'met' if ok else 'missed'}" for key, ok in met.items()))
    # parts that were not run now are kept as they are in the file
    old = store.read_json(options.output) if options.output.is_file() else {}
    old_met = old.pop("met", {})
    machine = {
        "machine": platform.machine(),
        "threads": options.threads,
        "clock": options.clock,
        "repeats": options.repeats,
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    whole = {**old, **machine, "targets": TARGETS, "met": old_met | met, **found}
    store.write_json(options.output, whole)


if __name__ == "__main__":
    main()
