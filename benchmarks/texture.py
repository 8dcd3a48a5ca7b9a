"""Textures a minute: many in one batch against one at a time, and where the time goes.

    python benchmarks/texture.py [--clock wall|cpu] [--threads N] [--repeats 3] [--size 112]
        [--steps 4] [--batches 4 16 48] [--singles 3] [--long 100] [--device cpu]
        [--only filters grams optimisers]

Three filter textures (`texture.one_filter`, inverted by `texture.invert_codes` in the published
setting without a prior) and one synthesis from Gram matrices (`texture.synthesise`). The baseline,
"one at a time", is the same call with a single texture, for each of `singles` filters or
photographs in turn; batches take turns with it within one run. Steps are timed less what a run of
one step takes, so that starting does not count; textures of 100 steps are counted. Ratios are
medians over repeats. `difference` says how far the losses after all steps are apart, relative to
the baseline's.

`shares` says where the time of a step goes, at the middle batch: the network there, the network
back, statistics and objective, and the rest (update and bookkeeping). `ceilings` compares the
network's part with two ceilings measured here: products of matrices (all products of the network,
counted), and memory (inputs and outputs of all its modules, once there and twice back, which a
cache may hold). `limits` names what holds a step back.

`optimisers`: Adam against L-BFGS on Gram matrices. Both run `long` steps; the loss L-BFGS has
reached when it has taken as much time as Adam is compared with Adam's, image by image.

With `--only` the other sections stay as the file has them, if its settings are the same.

Only ratios mean anything. On a machine that others use as well, let the clock be "cpu", the
processor time of this process, and set OMP_WAIT_POLICY=passive. On a GPU the clock has to be
"wall". Results go to results/benchmarks/texture.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import CLOCKS, waited
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fmlib import encoders, extract, images, preimage, store, texture

#: Steps of one texture, when textures a minute are counted.
USUAL_STEPS = 100
#: Encoders and layers whose filters are shown.
FILTERS = (
    ("squeezenet1_1", "features.4"),
    ("squeezenet1_1", "features.7"),
    ("efficientnet_lite0", "blocks.2.1.bn2"),
)
#: Encoder and layers whose Gram matrices are matched.
GRAMS = ("squeezenet1_1", ("features.1", "features.4", "features.7"))
SECTIONS = ("filters", "grams", "optimisers")
CLOCK_WORDS = {"cpu": "processor time of this process", "wall": "time passed"}
#: A part of a step at a ceiling has at least this share of it.
AT_CEILING = 0.6

#: Makes textures of the chosen targets in so many steps: (targets,) losses.
Make = Callable[[Sequence[int], int], Tensor]


def ceilings(clock: str, device: torch.device) -> dict[str, float]:
    """Operations a second of a large product of matrices, bytes a second of a large copy."""
    side, values = (8192, 2**28) if device.type == "cuda" else (1536, 2**25)
    a = torch.randn(side, side, device=device)
    b, c = torch.ones(2, values, device=device)
    found = {}
    for name, call, amount in (
        ("matrix products", lambda: a @ a, 2 * side**3),
        ("memory", lambda: c.copy_(b), 2 * 4 * values),
    ):
        waited(call, clock, device)
        found[name] = amount / min(waited(call, clock, device)[1] for _ in range(6))
    return found


def network(name: str, device: torch.device) -> encoders.Encoder:
    """The encoder, made faster; max poolings average."""
    found = extract.optimise(encoders.load(name, device=device))
    pools = any(isinstance(module, torch.nn.MaxPool2d) for module in found.net.modules())
    return texture.average_pooling(found) if pools else found


def traffic(encoder: encoders.Encoder, matcher: preimage.Taps, x: Tensor) -> int:
    """Bytes of inputs and outputs of all modules that compute, as far as the layer."""
    total = 0

    def hook(_module: Any, given: Any, output: Any) -> None:
        nonlocal total
        for value in (*given, output):
            total += value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    leaves = [
        module
        for module in encoder.net.modules()
        if not isinstance(module, torch.nn.Identity) and not [*module.children()]
    ]
    hooks = [module.register_forward_hook(hook) for module in leaves]
    with torch.no_grad():
        matcher(x)
    for handle in hooks:
        handle.remove()
    return total


def timed(make: Make, batches: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Batches against one at a time: seconds of a texture's step, ratios, apartness of losses."""
    device = encoders.device(options.device)
    singles = list(range(options.singles))
    groups = {"one at a time": [[number] for number in singles]}
    groups |= {f"{count} at once": [list(range(count))] for count in batches}
    seconds: dict[str, list[float]] = {key: [] for key in groups}
    losses: dict[str, Tensor] = {}
    for key in groups:
        make(groups[key][0], 1)  # warm
    for _ in range(options.repeats):
        for key, parts in groups.items():
            spent, found = 0.0, []
            for part in parts:
                _, begun = waited(lambda part=part: make(part, 1), options.clock, device)
                loss, whole = waited(
                    lambda part=part: make(part, 1 + options.steps), options.clock, device
                )
                spent += whole - begun
                found.append(loss)
            losses[key] = torch.cat(found)
            seconds[key].append(spent / options.steps / len(losses[key]))
    alone, *several = groups
    apart = {}
    for key in several:
        shared = min(len(losses[key]), len(losses[alone]))
        pair = losses[key][:shared], losses[alone][:shared]
        apart[key] = float(((pair[0] - pair[1]).abs() / pair[1]).max())
    each = {key: statistics.median(values) for key, values in seconds.items()}
    ratios = {
        key: [a / b for a, b in zip(seconds[alone], seconds[key], strict=True)] for key in several
    }
    return {
        "textures_per_minute": {k: 60 / (USUAL_STEPS * v) for k, v in each.items()},
        "ratio": {key: statistics.median(values) for key, values in ratios.items()},
        "repeats": ratios,
        "difference": apart,
        "seconds": each,
    }


def parts_of(
    matcher: preimage.Taps, objective: Callable[[dict[str, Tensor]], Tensor], x: Tensor,
    make: Make, known: dict[str, float], options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Shares of a step of as many images, and of the ceilings in the network's part."""
    device = x.device
    plain = preimage.Taps(matcher.encoder, matcher.layers)

    def there() -> dict[str, Tensor]:
        return plain(x.detach().requires_grad_())

    def there_and_back() -> None:
        leaf = x.detach().requires_grad_()
        code = plain(leaf)[plain.layers[-1]]
        torch.autograd.grad(code, leaf, torch.ones_like(code))

    codes = {name: value.detach() for name, value in there().items()}

    def judged() -> None:
        leaves = {name: value.detach().requires_grad_() for name, value in codes.items()}
        torch.autograd.grad(objective(leaves).sum(), list(leaves.values()))

    calls = {
        "one": lambda: make(range(len(x)), 1),
        "several": lambda: make(range(len(x)), 1 + options.steps),
        "there": there,
        "both": there_and_back,
        "judged": judged,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with plain.opened():
        for number in range(options.repeats + 1):
            for name, call in calls.items():
                spent = waited(call, options.clock, device)[1]
                if number:  # the first is for warming up
                    times[name].append(spent)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(x)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    moved = 3 * traffic(matcher.encoder, plain, x)
    step = (seconds["several"] - seconds["one"]) / options.steps
    inside = seconds["both"] + seconds["judged"]
    whole = max(step, inside)  # parts timed alone may, by chance, be longer than the whole
    shares = {
        "network, there": seconds["there"] / whole,
        "network, back": (seconds["both"] - seconds["there"]) / whole,
        "statistics and objective": seconds["judged"] / whole,
        "update and bookkeeping": 1 - inside / whole,
    }
    products = 2 * counter.get_total_flops()  # back to the image alone: as many as there
    of_ceilings = {
        "matrix products": products / seconds["both"] / known["matrix products"],
        "memory": moved / seconds["both"] / known["memory"],
    }
    return {"shares": shares, "ceilings": of_ceilings}


def limit(shares: dict[str, float], of_ceilings: dict[str, float]) -> str:
    """What holds a step back, in words."""
    inside = shares["network, there"] + shares["network, back"]
    outside = max(list(shares)[2:], key=lambda name: shares[name])
    products, moves = of_ceilings["matrix products"], of_ceilings["memory"]
    if inside < shares[outside]:
        kind = outside
    elif max(products, moves) < AT_CEILING:
        kind = "the network, with neither ceiling near"
    else:
        kind = f"the network, by {'products' if products > moves else 'moving activations'}"
    return (
        f"{kind}: the network takes {inside:.0%} of a step, {outside} {shares[outside]:.0%}; the "
        f"network's products reach {products:.0%} of the ceiling, its activations move at "
        f"{moves:.0%} of the speed of a plain copy{' (caches hold some)' if moves > 1 else ''}"
    )


def crops(count: int, size: int, device: torch.device) -> Tensor:
    """(count, 3, size, size) middles of photographs, halved."""
    chosen = images.load("photos", limit=count, seed=0)
    return torch.stack(
        [
            images.resize(images.center_crop(image, min(2 * size, *image.shape[1:])), size)
            for image in (chosen[number] for number in range(count))
        ]
    ).to(device)


def filters(
    name: str, layer: str, known: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Textures of one encoder's filters."""
    device = encoders.device(options.device)
    encoder = network(name, device)
    matcher = preimage.Taps(encoder, layer)
    code = preimage.codes(matcher, crops(1, options.size, device))[layer]
    most = max(*options.batches, options.singles)
    targets = texture.one_filter(code, [k % code.shape[1] for k in range(0, 5 * most, 5)])

    def make(chosen: Sequence[int], steps: int) -> Tensor:
        found = texture.invert_codes(
            targets[list(chosen)], encoder, layer, size=options.size, seeds=list(chosen),
            config=texture.no_prior(steps), validate=False,
        )  # fmt: skip
        return found.history["total"][-1, :, 0, 0]

    result = timed(make, options.batches, options)
    some = sorted(options.batches)[len(options.batches) // 2]
    term = preimage.Term()
    wanted = term.select(targets[:some])
    x = torch.rand(some, 3, options.size, options.size, device=device)
    parts = parts_of(
        matcher, lambda codes: term.loss(codes[layer], wanted), x, make, known, options
    )
    return {"made": "one filter", "encoder": name, "layer": layer, **result, **parts}


def grams(known: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Textures from Gram matrices of photographs."""
    device = encoders.device(options.device)
    name, layers = GRAMS
    encoder = network(name, device)
    names = [f"{layer}|gram" for layer in layers]
    matcher = texture.Statistics(encoder, names)
    # a step costs twice that of a filter's: the largest batch is left out
    batches = sorted(options.batches)[:-1] or options.batches
    most = max(*batches, options.singles)
    found = preimage.codes(matcher, crops(most, options.size, device))

    def make(chosen: Sequence[int], steps: int) -> Tensor:
        config = dataclasses.replace(texture.SYNTHESIS, schedule=(preimage.Phase(steps),))
        made = texture.synthesise(
            {key: gram[list(chosen)] for key, gram in found.items()}, encoder, size=options.size,
            seeds=list(chosen), config=config, validate=False,
        )  # fmt: skip
        return made.history["total"][-1, :, 0, 0]

    result = timed(make, batches, options)
    some = sorted(options.batches)[len(options.batches) // 2]
    term = preimage.Term()
    wanted = {key: term.select(gram[:some]) for key, gram in found.items()}

    def objective(codes: dict[str, Tensor]) -> Tensor:
        losses = [
            term.loss(texture.gram_matrix(codes[layer]), wanted[f"{layer}|gram"])
            for layer in layers
        ]
        return torch.stack(losses).sum(0)

    x = torch.rand(some, 3, options.size, options.size, device=device)
    parts = parts_of(matcher, objective, x, make, known, options)
    return {"made": "Gram matrices", "encoder": name, "layer": layers[-1], **result, **parts}


def optimisers(options: argparse.Namespace) -> dict[str, float]:
    """Losses of Adam and of L-BFGS, after equal times and after equal steps."""
    device = encoders.device(options.device)
    name, layers = GRAMS
    encoder = network(name, device)
    names = [f"{layer}|gram" for layer in layers]
    pictures = crops(options.singles, options.size, device)
    found = preimage.codes(texture.Statistics(encoder, names), pictures)
    adam = texture.SYNTHESIS
    first = max(1, round(0.6 * options.long))
    phases = (preimage.Phase(first), preimage.Phase(max(1, options.long - first), 0.3))
    settings = {
        "adam": dataclasses.replace(adam, schedule=phases),
        "lbfgs": dataclasses.replace(
            adam,
            optimiser=preimage.LBFGS(),
            schedule=(preimage.Phase(sum(p.steps for p in phases)),),
        ),
    }

    def run(key: str, steps: int | None = None) -> preimage.Inversion:
        return texture.synthesise(
            found, encoder, size=options.size, config=settings[key], validate=False,
            stop_after=steps,
        )  # fmt: skip

    step: dict[str, list[float]] = {key: [] for key in settings}
    few = min(options.steps + 12, options.long)  # so that L-BFGS's memory of ten is full for most
    for key in settings:
        run(key, 1)  # warm
    for _ in range(options.repeats):
        for key in settings:
            begun = waited(lambda key=key: run(key, 1), options.clock, device)[1]
            whole = waited(lambda key=key: run(key, few), options.clock, device)[1]
            step[key].append((whole - begun) / max(1, few - 1))
    ratio = statistics.median(b / a for a, b in zip(step["adam"], step["lbfgs"], strict=True))
    best = {key: run(key).history["total"][:, :, 0, 0].cummin(0).values for key in settings}
    affordable = max(1, min(len(best["lbfgs"]), int(len(best["adam"]) / ratio)))
    reached = best["adam"][-1]
    # L-BFGS's steps to Adam's last loss, image by image
    sooner = (best["lbfgs"] > reached).sum(0) + 1
    return {
        "images": len(pictures),
        "adam_steps": len(best["adam"]),
        "lbfgs_step_over_adam_step": ratio,
        "lbfgs_steps_in_the_same_time": affordable,
        "adam_loss": float(reached.median()),
        "lbfgs_loss_after_equal_time": float(best["lbfgs"][affordable - 1].median()),
        "loss_ratio_after_equal_time": float((best["lbfgs"][affordable - 1] / reached).median()),
        "loss_ratio_after_equal_steps": float((best["lbfgs"][-1] / reached).median()),
        "images_where_lbfgs_is_lower_after_equal_time": int(
            (best["lbfgs"][affordable - 1] < reached).sum()
        ),
        "time_of_lbfgs_to_adam_loss": float(sooner.double().median()) * ratio / len(best["adam"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16, 48])
    parser.add_argument("--singles", type=int, default=3, help="textures of the baseline")
    parser.add_argument("--long", type=int, default=USUAL_STEPS, help="steps of an optimiser")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/texture.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = encoders.device(options.device)
    if device.type == "cuda" and options.clock != "wall":
        parser.error("on a GPU the clock has to be wall: processor time does not see it work")
    known = ceilings(options.clock, device)
    gpu = device.type == "cuda"
    settings = {
        "clock": f"{options.clock} ({CLOCK_WORDS[options.clock]})",
        "threads": options.threads,
        "repeats": options.repeats,
        "steps": options.steps,
        "size": options.size,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    before = json.loads(options.output.read_text()) if options.output.is_file() else {}
    if before.get("settings") != settings:
        before = {}
    rows = {(row["made"], row["encoder"], row["layer"]): row for row in before.get("rows", [])}
    compared, limits = before.get("optimisers", {}), before.get("limits", {})

    def keep() -> None:
        baseline = f"one at a time: the same call, a single texture, {USUAL_STEPS} steps each"
        whole = {"settings": settings, "baseline": baseline, "rows": list(rows.values())}
        store.write_json(options.output, whole | {"limits": limits, "optimisers": compared})

    calls: list[Callable[[], dict[str, Any]]] = []
    if "filters" in options.only:
        calls += [partial(filters, *one, known, options) for one in FILTERS]
    if "grams" in options.only:
        calls.append(partial(grams, known, options))
    for call in calls:
        row = call()
        key = (row["made"], row["encoder"], row["layer"])
        limits[f"{key[0]}, {key[1]} {key[2]}"] = limit(row["shares"], row["ceilings"])
        seconds = row.pop("seconds")
        row["milliseconds_per_texture_and_step"] = {k: 1e3 * v for k, v in seconds.items()}
        rows[key] = row
        print(json.dumps(row, indent=1), flush=True)
        keep()
    if "optimisers" in options.only:
        compared |= optimisers(options)
        keep()
    print(json.dumps({"limits": limits, "optimisers": compared}, indent=1))


if __name__ == "__main__":
    main()
