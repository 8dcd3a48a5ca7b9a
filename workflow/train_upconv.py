"""Train the decoders that come with this project: ``python workflow/train_upconv.py -h``.

Each group is one pass over photographs that feeds all its decoders. Training sees the first part of
``photos`` (the split of `antialias`, so that one set of photographs is unseen by everything that
was trained here) and nine tenths of a folder; the rest of the folder chooses the weights, and the
errors on the second part of ``photos`` go into the cards, beside those of three floors: the mean
image, the picture with the nearest code, and the mean of as many neighbours as suit validation.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fmlib import antialias, descriptors, encoders, extract, images, stats, store, upconv
from fmlib.codes import Codes
from fmlib.images import ImageSet
from fmlib.upconv import SMALL, Target

LITE0 = [f"blocks.{k}" for k in range(7)]
#: Most probabilities are far below 1e-6; what is rounded to 0 gets a tenth of the last decimal.
OF_PROBABILITIES = {"": 1e-12, "round:2": 1e-3}
WIDE = replace(SMALL, cap=48)


def plain(*names: str) -> dict[str, Target]:
    """Small decoders of codes; of probabilities' logarithms."""
    plan = {}
    for name in names:
        base, _, change = name.partition("|")
        floor = OF_PROBABILITIES.get(change, OF_PROBABILITIES[""])
        logarithm = floor if base == "probabilities" else None
        plan[name] = Target(name, replace(SMALL, logarithm=logarithm))
    return plan


def bounds(*names: str) -> dict[str, Target]:
    """Autoencoders through codes of the same shape."""
    return {f"{name}, autoencoder": Target(name, SMALL, autoencoder=True) for name in names}


#: Group -> source of its codes, side of its pictures, what is trained.
GROUPS: dict[str, tuple[str, int, dict[str, Target]]] = {
    "efficientnet_lite0": (
        "efficientnet_lite0",
        96,
        plain(*LITE0, "global_pool", "logits")
        | bounds("blocks.2", "blocks.6"),
    ),
    "efficientnet_lite0-changed": (
        "efficientnet_lite0",
        96,
        plain("blocks.6|binarise", "blocks.6|dropout:0.5"),
    ),
    "efficientnet_lite0-probabilities": (
        "efficientnet_lite0",
        96,
        plain(
            "probabilities", "probabilities|top:5", "probabilities|rest:5", "probabilities|round:2"
        ),
    ),
    "squeezenet1_1": (
        "squeezenet1_1",
        96,
        plain(
            "features.1", "features.4", "features.7", "features.10", "features.12", "logits",
            "features.12|binarise",
        ),
    ),
    "squeezenet1_1-probabilities": ("squeezenet1_1", 96, plain("probabilities")),
    "vit": (
        "vit_small_patch14_saliency",
        98,
        plain("blocks.2", "blocks.6", "blocks.10", "fc_norm"),
    ),
    "random": (
        "random:efficientnet_lite0",
        96,
        plain("blocks.2", "blocks.4", "blocks.6", "global_pool"),
    ),
    "descriptors": (
        "descriptors",
        96,
        {"hog": Target("hog", replace(WIDE, contract=1)), "lbp": Target("lbp", WIDE)},
    ),
    "sift": (
        "descriptors",
        96,
        {"sift_grid": Target("sift_grid", replace(WIDE, contract=2))},
    ),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("group", choices=list(GROUPS))
    parser.add_argument("--output", type=Path, help="folder; that of the data by default")
    parser.add_argument("--checkpoint", type=Path, help="to resume from, if it exists")
    parser.add_argument("--folder", type=Path, help="more photographs, each a source of its own")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def joined(parts: list[ImageSet]) -> ImageSet:
    """Sets of files as one."""
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return replace(parts[0], name="+".join(part.name for part in parts), table=table)


def interval(values: Tensor, groups: list[Any]) -> list[float]:
    """Mean and 95 % interval over sources."""
    found = stats.bootstrap(values, groups=groups)
    return [round(float(v), 4) for v in (found.value, found.low, found.high)]


@torch.no_grad()
def read(codes: Codes, pictures: Tensor) -> dict[str, Tensor]:
    """Codes of many pictures."""
    with codes.opened():
        parts = [codes(part.to(codes.device)) for part in pictures.split(64)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def judged(
    codes: Codes, plan: dict[str, Target], result: upconv.Result, size: int,
    sets: dict[str, ImageSet],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Errors of decoders and floors on the photographs that were held out."""
    seen = {name: part.batch(size) for name, part in sets.items()}
    coded = {name: read(codes, pictures) for name, pictures in seen.items()}
    test, known = seen["test"], seen["train"]
    unit = stats.mean_pairwise_distance(test)
    groups = list(sets["test"].table["group"])

    def error(found: Tensor, of: str = "test") -> Tensor:
        return upconv.errors(found, seen[of], reference=unit)

    means = error(known.mean(0, keepdim=True).expand_as(test))
    report = {}
    for name, target in plan.items():
        inputs = {k: seen[k] if target.autoencoder else coded[k][target.code]
                  for k in ("test", "validation")}  # fmt: skip
        own = error(upconv.reconstruct(result.decoders[name], inputs["test"]))
        card = {"error": own, "mean_image": means, "gain_over_mean_image": means - own}
        if not target.autoencoder:
            of = {part: coded[part][target.code] for part in seen}
            by_k = {
                k: float(error(upconv.nearest(of["validation"], of["train"], known, k=k),
                               "validation").mean())
                for k in (1, 2, 4, 8, 16, 32, 64, 128)
            }  # fmt: skip
            best = min(by_k, key=by_k.__getitem__)
            card["nearest"] = error(upconv.nearest(of["test"], of["train"], known))
            card["neighbours"] = error(upconv.nearest(of["test"], of["train"], known, k=best))
            card["gain_over_neighbours"] = card["neighbours"] - own
        report[name] = {key: interval(values, groups) for key, values in card.items()}
        if not target.autoencoder:
            report[name]["neighbours_averaged"] = best
    return report


def main() -> None:
    """Train, judge, write files and cards."""
    given = arguments()
    torch.set_num_threads(given.threads)
    source, size, plan = GROUPS[given.group]
    train, test = images.load("photos").split(antialias.TRAIN_FRACTION, seed=antialias.TRAIN_SEED)
    if given.folder:
        more, validation = images.load(f"folder:{given.folder}").split(0.9, seed=0)
        parts = {"photos": train, "folder": more}
    else:
        train, validation = train.split(0.9, seed=0)
        parts = {"photos": train}
    kept = {name: part.in_memory(160) for name, part in parts.items()}
    pictures = joined(list(kept.values()))
    readers = {str(i): part for part in kept.values() for i in part.table["id"]}
    pictures = replace(pictures, _read=lambda row: readers[row["id"]]._read(row))
    validation, test = validation.in_memory(160), test.in_memory(160)

    names = list(dict.fromkeys(target.code for target in plan.values()))
    if source == "descriptors":
        codes = Codes(
            {name: descriptors.make(name) for name in names}, names, remember=given.group == "sift"
        )
    else:
        encoder = encoders.load(source, device=given.device)
        bases = [n.split("|")[0] for n in names]
        layers = [n for n in bases if n not in ("logits", "probabilities")]
        codes = Codes(extract.optimise(encoder, keep=layers), names)
    config = upconv.Training(
        size=size, steps=given.steps, batch_size=given.batch_size, seed=given.seed,
        pool=2 if given.group == "sift" else 0, validate_every=100,
    )  # fmt: skip
    result = upconv.train(
        codes, plan, pictures, validation, config=config, checkpoint=given.checkpoint,
        progress=True,
    )  # fmt: skip
    report = judged(codes, plan, result, size,
                    {"train": pictures, "validation": validation, "test": test})  # fmt: skip
    folder = given.output or upconv.folder()
    cards = upconv.trained_cards() if folder == upconv.folder() else {}
    for name, target in plan.items():
        network = result.decoders[name]
        origin = upconv.origin(network)
        card = {
            "errors": report[name],
            "unit": "mean distance between two test photographs; 95 % intervals over sources",
            "best_step": result.best[name][0],
            "training": dataclasses.asdict(config),
            "images": {part: len(kept[part]) for part in kept}
            | {"validation": len(validation), "test": len(test)},
            "images_hash": pictures.hash,
            "licence": "MIT",
        }
        file = upconv.file_name(origin, autoencoder=target.autoencoder)
        upconv.save(folder / file, network, card=card)
        cards[file] = {
            "origin": origin,
            "autoencoder": target.autoencoder,
            "sha256": store.sha256_file(folder / file),
            **card,
        }
        print(f"{name:32} {report[name]}", flush=True)
    store.write_json(folder / "cards.json", dict(sorted(cards.items())))


if __name__ == "__main__":
    main()
