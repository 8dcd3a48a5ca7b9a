"""Faster copies that give the same features, streams that stay lazy, shards that survive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmlib import encoders, extract, images, store, taps

Load = Callable[[str], encoders.Encoder]


def small(seed: int = 0) -> encoders.Encoder:
    """A network of a few thousand parameters with every case of a batch norm."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.both = nn.Conv2d(8, 8, 1)  # its output is used twice: not foldable
            self.shared = nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 8, 3, groups=8, padding=1)
            self.last = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.first(x)))
            x = self.both(x)
            x = x + self.shared(x)
            x = self.last(self.second(x))
            return self.head(x.mean((2, 3)))

    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean = torch.randn(8)
            module.running_var = torch.rand(8) + 0.5
    return encoders.Encoder(net, name="small", input_size=16, recommended=("norm", "last"))


PIXELS = torch.rand(11, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------- optimise


def test_folds_only_what_nothing_else_uses() -> None:
    encoder = small()
    fast = extract.optimise(encoder)
    assert fast.changed == {"first", "second"}
    modules = dict(fast.net.named_modules())
    assert isinstance(modules["norm"], nn.Identity)
    assert isinstance(modules["last"], nn.Identity)
    assert isinstance(modules["shared"], nn.BatchNorm2d)
    assert set(dict(encoder.net.named_modules())) == set(modules)
    layers = ["norm", "both", "shared", "last"]
    before, after = (taps.features(e, PIXELS, layers) for e in (encoder, fast))
    for layer in layers:
        assert (before[layer] - after[layer]).abs().max() < 1e-5
    assert torch.allclose(encoder(PIXELS), fast(PIXELS), atol=1e-5)
    assert fast.weight_hash == encoder.weight_hash


def test_reading_a_fused_convolution_is_refused_or_kept() -> None:
    encoder = small()
    with pytest.raises(ValueError, match=r"fused.*keep=\['first'\]"):
        taps.features(extract.optimise(encoder), PIXELS, "first")
    fast = extract.optimise(encoder, keep=["first"])
    found = taps.features(fast, PIXELS, "first")["first"]
    assert torch.allclose(found, taps.features(encoder, PIXELS, "first")["first"], atol=1e-6)
    with pytest.raises(ValueError, match="no layer 'frist'"):
        extract.optimise(encoder, keep=["frist"])


def test_the_original_is_left_alone() -> None:
    encoder = small()
    before = store.digest(dict(encoder.net.state_dict()))
    extract.optimise(encoder)
    assert store.digest(dict(encoder.net.state_dict())) == before
    assert encoder.changed == frozenset()
    assert encoder.memory_format == torch.contiguous_format


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "squeezenet1_1", "vit_small_patch14_saliency"]
)
def test_optimised_encoders_give_the_same_features(encoder: Load, name: str) -> None:
    plain = encoder(name)
    fast = extract.optimise(plain)
    pixels = torch.rand(2, 3, plain.input_size, plain.input_size)
    before, after = (taps.features(e, pixels, plain.recommended) for e in (plain, fast))
    for layer in plain.recommended:
        scale = before[layer].abs().max()
        assert (before[layer] - after[layer]).abs().max() < 1e-4 * scale
        cosine = F.cosine_similarity(before[layer].flatten(1), after[layer].flatten(1))
        assert cosine.min() > 0.9999
        assert after[layer].is_contiguous()
    if name == "efficientnet_lite0":
        assert len(fast.changed) == 49  # every convolution of it has a batch norm
        rest = taps.tail(fast, "blocks.4")
        with torch.no_grad():
            expected = plain(pixels)
            assert (rest(after["blocks.4"]) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_folding_changes_no_other_architecture(encoder: Load) -> None:
    """ResNet (norm with activation), DenseNet (norm before convolution), ConvNeXt (none)."""
    for name in ("resnet18", "densenet121", "convnext_atto"):
        plain = encoder(f"random:timm:{name}")
        fast = extract.optimise(plain)
        pixels = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            expected = plain(pixels)
            assert (fast(pixels) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert bool(fast.changed) == (name != "convnext_atto")


# ----------------------------------------------------------------------------------------- stream


def test_stream_equals_reading_at_once() -> None:
    encoder = small()
    parts = list(extract.stream(encoder, PIXELS, ["norm", "last"], batch_size=4, progress=False))
    assert [len(part["norm"]) for part in parts] == [4, 4, 3]
    whole = taps.features(encoder, PIXELS, ["norm", "last"])
    for layer in whole:
        joined = torch.cat([part[layer] for part in parts])
        assert torch.allclose(joined, whole[layer], atol=1e-5)


def test_stream_reduces_on_the_fly() -> None:
    encoder = small()

    def add(state: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        total = values["last"].sum((0, 2, 3))
        return total if state is None else state + total

    found = extract.stream(encoder, PIXELS, "last", batch_size=4, reduce=add, progress=False)
    expected = taps.features(encoder, PIXELS, "last")["last"].sum((0, 2, 3))
    assert torch.allclose(found, expected, atol=1e-3)


def test_stream_reads_nothing_before_it_is_asked() -> None:
    encoder = small()
    photographs = images.load("photos", limit=6)
    asked: list[int] = []
    original = photographs._read

    def counting(row: dict[str, object]) -> Tensor:
        asked.append(1)
        return original(row)

    object.__setattr__(photographs, "_read", counting)
    stream = extract.stream(encoder, photographs, "last", batch_size=2, progress=False)
    assert not asked
    next(stream)
    assert len(asked) == 2
    stream.close()  # type: ignore[attr-defined]
    assert not any(m._forward_hooks for m in encoder.net.modules())
    sizes = [
        part["last"].shape
        for part in extract.stream(
            encoder, photographs, "last", batch_size=4, size=24, progress=False
        )
    ]
    assert sizes == [(4, 8, 24, 24), (2, 8, 24, 24)]


def test_stream_refuses_bad_calls_at_once() -> None:
    with pytest.raises(ValueError, match="closest"):
        extract.stream(small(), PIXELS, "lats")
    with pytest.raises(ValueError, match="batch_size"):
        extract.stream(small(), PIXELS, "last", batch_size=0)
    with pytest.raises(ValueError, match="no images"):
        extract.stream(small(), PIXELS[:0], "last")


def test_autocast_gives_float32_close_to_it() -> None:
    encoder = small()
    (found,) = extract.stream(encoder, PIXELS, "last", batch_size=11, autocast=True, progress=False)
    expected = taps.features(encoder, PIXELS, "last")["last"]
    assert found["last"].dtype == torch.float32
    assert not torch.equal(found["last"], expected)
    assert F.cosine_similarity(found["last"].flatten(1), expected.flatten(1)).min() > 0.995


def test_one_and_two_threads_agree() -> None:
    encoder = extract.optimise(small())
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                torch.cat(
                    [x["last"] for x in extract.stream(encoder, PIXELS, "last", progress=False)]
                )
            )
    finally:
        torch.set_num_threads(before)
    assert (results[0] - results[1]).abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------- shards


def test_shards_hold_what_was_asked(tmp_path: Path) -> None:
    encoder = small()
    directory = extract.write(
        encoder, PIXELS, ["norm", "head"], tmp_path / "features", shard_size=4, batch_size=3,
        progress=False,
    )  # fmt: skip
    shards = extract.open_shards(directory)
    assert len(shards) == 11
    assert shards.layers == ("norm", "head")
    assert list(shards.index.columns) == ["image", "group", "label", "shard", "row"]
    expected = taps.features(encoder, PIXELS, ["norm", "head"])
    assert torch.allclose(shards.read("head"), expected["head"], atol=1e-5)
    order = ["7", "0", "10", "3"]
    chosen = [int(i) for i in order]
    assert torch.allclose(shards.read("norm", order), expected["norm"][chosen], atol=1e-5)
    joined = torch.cat([part["norm"] for part in shards.batches("norm")])
    assert torch.allclose(joined, expected["norm"], atol=1e-5)
    assert shards.config["weight_hash"] == encoder.weight_hash
    with pytest.raises(ValueError, match="holds norm, head"):
        shards.read("last")
    with pytest.raises(ValueError, match="no image '11'"):
        shards.read("norm", ["11"])


def test_shards_of_an_image_set_keep_its_table(tmp_path: Path) -> None:
    photographs = images.load("photos", limit=5)
    extract.write(small(), photographs, "last", tmp_path / "f", shard_size=2, progress=False)
    index = extract.open_shards(tmp_path / "f").index
    assert list(index["image"]) == list(photographs.table["id"])
    assert list(index["group"]) == list(photographs.table["group"])
    assert list(index["row"]) == [0, 1, 0, 1, 0]
    found = pd.read_parquet(tmp_path / "f" / "index.parquet")  # plain Parquet, readable by others
    assert list(found["shard"].unique()) == [f"shard-0000{k}.safetensors" for k in range(3)]


def test_prefix_tokens_are_written(tmp_path: Path, encoder: Load) -> None:
    net = encoder("random:timm:test_vit4")
    pixels = torch.rand(3, 3, net.input_size, net.input_size)
    extract.write(net, pixels, "blocks.0", tmp_path / "f", shard_size=2, progress=False)
    shards = extract.open_shards(tmp_path / "f")
    tokens, prefix = shards.read("blocks.0"), shards.read("blocks.0/prefix")
    assert prefix.shape == (3, net.num_prefix_tokens, tokens.shape[1])
    with torch.no_grad():
        logits = taps.tail(net, "blocks.0")(tokens, prefix)
        assert torch.allclose(logits, net(pixels), atol=1e-5)


class _Failing(nn.Module):
    """Stands in front of a network and fails at a call."""

    def __init__(self, net: nn.Module, at: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.net, self.left, self.act = net, at, act

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 2:  # not a trace's single image
            self.left -= 1
            if self.left == 0:
                self.act()
        return self.net(x)


def _interrupt() -> None:
    raise KeyboardInterrupt


def failing(at: int, act: Callable[[], None] = _interrupt) -> encoders.Encoder:
    plain = small()
    net = _Failing(plain.net, at, act)
    return encoders.Encoder(net, name="small", input_size=16, weight_hash="w")


def test_an_interrupted_write_continues(tmp_path: Path) -> None:
    pixels = PIXELS[:10]
    options = {"shard_size": 4, "batch_size": 2, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        extract.write(failing(at=4), pixels, "net.last", tmp_path / "f", **options)
    assert sorted(x.name for x in (tmp_path / "f").iterdir()) == [
        "config.json",
        "shard-00000.safetensors",
    ]
    with pytest.raises(ValueError, match="not finished"):
        extract.open_shards(tmp_path / "f")
    kept = (tmp_path / "f" / "shard-00000.safetensors").stat().st_mtime_ns
    extract.write(failing(at=4), pixels, "net.last", tmp_path / "f", **options)  # 3 calls remain
    assert (tmp_path / "f" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    whole = extract.write(failing(at=99), pixels, "net.last", tmp_path / "whole", **options)
    one, other = (extract.open_shards(d).read("net.last") for d in (tmp_path / "f", whole))
    assert torch.equal(one, other)
    # a finished directory is not computed again
    extract.write(failing(at=1), pixels, "net.last", tmp_path / "f", **options)


def test_a_killed_process_leaves_whole_shards(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import test_extract as t\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.extract.write(t.failing(4, kill), t.PIXELS[:10], 'net.last', sys.argv[2],\n"
        "                shard_size=4, batch_size=2, progress=False)\n"
    )
    target = tmp_path / "f"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", code, here, str(target)], env=environment, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert [x.name for x in target.glob("shard-*")] == ["shard-00000.safetensors"]
    extract.write(
        failing(99), PIXELS[:10], "net.last", target, shard_size=4, batch_size=2, progress=False
    )
    assert extract.open_shards(target).read("net.last").shape == (10, 8, 16, 16)


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "f"
    options = {"shard_size": 4, "progress": False}
    extract.write(small(), PIXELS, "last", target, **options)
    before = {x.name: x.read_bytes() for x in target.iterdir()}
    other = PIXELS.clone()
    other[3, 0, 0, 0] += 0.01
    calls = {
        "weight_hash": lambda: extract.write(small(seed=1), PIXELS, "last", target, **options),
        "layers": lambda: extract.write(small(), PIXELS, "norm", target, **options),
        "images_hash": lambda: extract.write(small(), other, "last", target, **options),
        "size": lambda: extract.write(small(), PIXELS[..., :8], "last", target, **options),
        "shard_size": lambda: extract.write(
            small(), PIXELS, "last", target, shard_size=5, progress=False
        ),
        "precision": lambda: extract.write(
            small(), PIXELS, "last", target, autocast=True, **options
        ),
    }
    for key, call in calls.items():
        with pytest.raises(store.MismatchError, match="images_hash" if key == "size" else key):
            call()
    assert {x.name: x.read_bytes() for x in target.iterdir()} == before
    # the optimised copy has the same weights: it may finish what the original began
    extract.write(extract.optimise(small()), PIXELS, "last", target, **options)


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(store.MismatchError, match="not empty"):
        extract.write(small(), PIXELS, "last", tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds no features"):
        extract.open_shards(tmp_path)
    target = extract.write(small(), PIXELS, "last", tmp_path / "f", shard_size=4, progress=False)
    (target / "shard-00001.safetensors").write_bytes(
        (target / "shard-00000.safetensors").read_bytes()
    )
    with pytest.raises(store.MismatchError, match="shard-00001"):
        extract.write(small(), PIXELS, "last", target, shard_size=4, progress=False)
