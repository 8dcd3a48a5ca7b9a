"""Train and judge the anti-aliased twin of a packaged encoder: ``python workflow/distil.py -h``.

The twin is ``antialias.blurpool`` of the encoder, batch norms re-estimated, distilled from it on
unlabelled images and saved with a card. It is judged on images that were held out, beside the
original and beside surgery alone. A file that beats surgery goes to ``data/weights``, and its
sha256 into ``fmlib/antialias.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fmlib import antialias, consistency, encoders, extract, images, stats, store
from fmlib.images import ImageSet

#: Features to match (the ends of the stages) and what stays as it is.
LAYERS = {
    "squeezenet1_1": ("features.2", "features.5", "features.8", "features.12"),
    "efficientnet_lite0": ("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
}
FROZEN = ("classifier",)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("encoder", choices=list(LAYERS))
    parser.add_argument("output", type=Path, help="safetensors file of the twin")
    parser.add_argument("--start", type=Path, help="twin to go on from, instead of surgery")
    parser.add_argument("--checkpoint", type=Path, help="to resume from, if it exists")
    parser.add_argument("--kernel", default="tri3", choices=list(antialias.KERNELS))
    parser.add_argument(
        "--folder",
        type=Path,
        help="more images, named nXXXXXXXX_*.jpg by their WordNet id; the labels only judge",
    )
    parser.add_argument("--fraction", type=float, default=0.75, help="of the folder to train on")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="side of the crops, px")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def classes(ids: list[str]) -> torch.Tensor:
    """Class indices from file names that begin with a WordNet id."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    index = {info.index_to_label_name(i): i for i in range(1000)}
    return torch.tensor([index[Path(name).name.split("_")[0]] for name in ids])


def joined(parts: list[ImageSet]) -> ImageSet:
    """Sets of files as one."""
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return dataclasses.replace(parts[0], name="+".join(part.name for part in parts), table=table)


def judged(
    networks: dict[str, encoders.Encoder], held_out: ImageSet, labels: torch.Tensor | None
) -> dict[str, Any]:
    """Consistency and fidelity of each network on images that none was trained on."""
    original = networks["original"]
    fast = {name: extract.optimise(network) for name, network in networks.items()}
    pairs = {
        (name, protocol): consistency.pairs(
            fast[name], held_out, protocol=protocol, count=2, optimise=False, progress=True
        )
        for name in networks
        for protocol in ("crop", "circular")
    }
    result: dict[str, Any] = {"images": len(held_out)}
    for name in networks:
        batches = (images.center_crop(x, 224) for x in held_out.batches(256, 16))
        found = antialias.fidelity(fast[name], fast["original"], batches, labels=labels)
        row: dict[str, Any] = {"agreement": stats.bootstrap(found.same)}
        if found.changed is not None and found.original is not None:
            row["accuracy"] = stats.bootstrap(found.changed)
            row["accuracy_gain"] = stats.paired_difference(found.changed, found.original)
        for protocol in ("crop", "circular"):
            here, there = pairs[name, protocol], pairs["original", protocol]
            row[f"{protocol}_consistency"] = stats.bootstrap(consistency.agreement(here))
            row[f"{protocol}_gain"] = stats.paired_difference(
                consistency.agreement(here), consistency.agreement(there)
            )
            row[f"{protocol}_gain_at_equal_margin"] = consistency.matched(here, there).difference
            both = consistency.alike(here, there)
            row[f"{protocol}_gain_where_alike"] = stats.paired_difference(both.first, both.second)
        row["margin"] = stats.bootstrap(pairs[name, "crop"].margin.mean((1, 2)))
        result[name] = {key: str(value) for key, value in row.items()}
    result["encoder"] = original.name
    return result


def main() -> None:
    """Train, save, judge, print."""
    given = arguments()
    torch.set_num_threads(given.threads)
    train, rest = images.load("photos").split(antialias.TRAIN_FRACTION, seed=antialias.TRAIN_SEED)
    parts = [train]
    held_out: dict[str, tuple[ImageSet, torch.Tensor | None]] = {"photos": (rest, None)}
    if given.folder:
        first, second = images.load(f"folder:{given.folder}").split(given.fraction, seed=0)
        parts.append(first)
        held_out["folder"] = (second, classes(list(second.table["id"])))
    pictures = joined(parts)

    teacher = encoders.load(given.encoder)
    surgery = antialias.blurpool(teacher, kernel=given.kernel)
    antialias.reestimate_batch_norm(surgery, pictures.crop_batches(224, 1, 32, seed=1))
    config = antialias.Distillation(
        layers=LAYERS[given.encoder],
        steps=given.steps,
        batch_size=given.batch_size,
        size=given.size,
        scale=(0.4, 0.8),
        learning_rate=given.learning_rate,
        seed=given.seed,
        frozen=FROZEN,
        save_every=25,
    )
    # channels-last copies: the same networks, trained in half the time
    start = surgery
    if given.start:
        start, _ = antialias.load_twin(given.start, teacher, kernel=given.kernel)
    student = extract.optimise(start, fold_batch_norm=False)
    fast = extract.optimise(teacher, keep=config.layers)
    losses = antialias.distil(
        student, fast, pictures, config, checkpoint=given.checkpoint, progress=True
    )
    card = {
        "settings": dataclasses.asdict(config),
        "started_from": store.sha256_file(given.start) if given.start else "surgery",
        "images": {part.name.partition(":")[0]: len(part) for part in parts},
        "images_hash": pictures.hash,
        "loss_first_and_last_25_steps": [sum(x) / len(x) for x in (losses[:25], losses[-25:])],
        "licence": f"that of the original: {teacher.licence}",
    }
    antialias.save_twin(given.output, student, teacher, kernel=given.kernel, card=card)
    twin, _ = antialias.load_twin(given.output, teacher, kernel=given.kernel)
    networks = {"original": teacher, "surgery": surgery, "twin": twin}
    found = {name: judged(networks, *member) for name, member in held_out.items()}
    card["held_out"] = found
    antialias.save_twin(given.output, student, teacher, kernel=given.kernel, card=card)
    store.write_json(given.output.with_suffix(".json"), card)
    print(given.output.name, store.sha256_file(given.output), given.output.stat().st_size)


if __name__ == "__main__":
    main()
