"""Encoders: the right weights in the right network, and errors that say what to do."""

from __future__ import annotations

import importlib.metadata
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmlib import encoders, store, taps

Load = Callable[[str], encoders.Encoder]
Picture = Callable[[str, int], Tensor]


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("name", "photograph", "expected"),
    [
        ("efficientnet_lite0", "chelsea", {"Egyptian cat", "tiger cat"}),
        ("efficientnet_lite0", "coffee", {"espresso"}),
        ("efficientnet_lite0", "rocket", {"missile"}),
        ("efficientnet_lite0", "china", {"palace"}),
        ("efficientnet_lite0", "flower", {"daisy"}),
        ("efficientnet_lite1", "coffee", {"espresso"}),
        ("efficientnet_lite1", "chelsea", {"Egyptian cat"}),
        ("efficientnet_lite2", "coffee", {"espresso"}),
        ("efficientnet_lite2", "chelsea", {"Egyptian cat"}),
        ("squeezenet1_1", "coffee", {"espresso"}),
        ("squeezenet1_1", "chelsea", {"Egyptian cat"}),
    ],
)
def test_predicts_what_is_in_the_photograph(
    encoder: Load, picture: Picture, name: str, photograph: str, expected: set[str]
) -> None:
    net = encoder(name)
    with torch.inference_mode():
        logits = net(picture(photograph, net.input_size)[None])
    assert net.classes is not None
    assert net.classes[int(logits.argmax())] in expected
    if (name, photograph) == ("efficientnet_lite0", "coffee"):
        assert logits.softmax(1).max() > 0.9


@pytest.mark.parametrize("name", encoders.packaged())
def test_packaged_encoder_states_its_facts(encoder: Load, name: str) -> None:
    net = encoder(name)
    assert net.name == name
    assert net.licence
    assert net.source
    assert len(net.weight_hash) == 64
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert len(net.recommended) == 5
    assert store.NOTES["encoder"][name] == net.weight_hash
    assert (net.classes is None) == (name == "vit_small_patch14_saliency")
    if net.classes is not None:
        assert len(set(net.classes)) > 995  # ImageNet names two cranes, two maillots
    # every parameter came from the file: none is left on the meta device
    assert {t.device.type for t in net.state_dict().values()} == {"cpu"}


def test_efficientnet_mapping_is_the_published_network(lite0: encoders.Encoder) -> None:
    """The same file through a plain re-statement of the architecture: TensorFlow's SAME padding."""
    path = encoders._resource(encoders._PACKAGES["efficientnet_lite0"])
    assert path is not None
    weights = torch.load(path, weights_only=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def convolution(x: Tensor, key: str, *, stride: int = 1, depthwise: bool = False) -> Tensor:
        kernel = weights[f"{key}.weight"]
        side, k = x.shape[-1], kernel.shape[-1]
        total = max((-(-side // stride) - 1) * stride + k - side, 0)
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, kernel, stride=stride, groups=len(kernel) if depthwise else 1)

    def norm(x: Tensor, key: str) -> Tensor:
        stats = [weights[f"{key}.{part}"] for part in ("running_mean", "running_var")]
        affine = [weights[f"{key}.{part}"] for part in ("weight", "bias")]
        return F.batch_norm(x, *stats, *affine, eps=1e-3)

    x = F.relu6(norm(convolution((image - 0.5) / 0.5, "_conv_stem", stride=2), "_bn0"))
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for i in range(16):
        block, before = f"_blocks.{i}", x
        if i:
            x = F.relu6(norm(convolution(x, f"{block}._expand_conv"), f"{block}._bn0"))
        x = convolution(x, f"{block}._depthwise_conv", stride=strides.get(i, 1), depthwise=True)
        x = F.relu6(norm(x, f"{block}._bn1"))
        x = norm(convolution(x, f"{block}._project_conv"), f"{block}._bn2")
        if x.shape == before.shape:
            x = x + before
    x = F.relu6(norm(convolution(x, "_conv_head"), "_bn1")).mean((2, 3))
    expected = F.linear(x, weights["_fc.weight"], weights["_fc.bias"])
    with torch.no_grad():
        assert torch.allclose(lite0(image), expected, atol=1e-4, rtol=1e-5)


def test_squeezenet_fold_equals_the_pipeline_it_was_trained_with(
    squeezenet: encoders.Encoder, picture: Picture
) -> None:
    path = encoders._resource(encoders._PACKAGES["squeezenet1_1"])
    assert path is not None
    with path.open("rb") as file:
        raw = encoders._ArraysOnly(file, encoding="latin1").load()
    image = picture("chelsea", 227)[None]
    bgr = (image * 255).flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    kernel, bias = (torch.from_numpy(np.asarray(part)).float() for part in raw["conv1"])
    expected = F.conv2d(bgr.double(), kernel.permute(3, 2, 0, 1).double(), bias.double(), stride=2)
    found = taps.features(squeezenet, image, "features.0")["features.0"]
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    # the rest of the network on the explicit input, too
    with torch.no_grad():
        logits = taps.tail(squeezenet, "features.0")(expected.float())
        assert (squeezenet(image) - logits).abs().max() < 2e-5


def test_vit_resizes_positions_as_its_graph_does() -> None:
    """Bicubic from 37×37 to 16×16 without anti-aliasing; timm's own resampling anti-aliases."""
    path = encoders._resource(encoders._PACKAGES["vit_small_patch14_saliency"])
    assert path is not None
    import onnx

    graph = onnx.load(str(path)).graph
    (resize,) = (n for n in graph.node if n.op_type == "Resize" and "embeddings" in n.name)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in resize.attribute}
    assert attributes["mode"] == b"cubic"
    assert attributes["cubic_coeff_a"] == -0.75
    assert attributes["coordinate_transformation_mode"] == b"half_pixel"
    assert attributes.get("antialias", 0) == 0
    (grid,) = (x for x in graph.initializer if tuple(x.dims) == (1, 1369, 384))
    source = onnx.numpy_helper.to_array(grid).reshape(37, 37, 384).astype(np.float64)

    def weights(target: int) -> np.ndarray:  # Keys' kernel with a = -0.75, borders repeated
        matrix = np.zeros((target, 37))
        for i in range(target):
            centre = (i + 0.5) * 37 / target - 0.5
            for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                t, a = abs(centre - j), -0.75
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                matrix[i, min(max(j, 0), 36)] += near if t <= 1 else far
        return matrix

    expected = np.einsum("iy,jx,yxc->ijc", weights(16), weights(16), source).reshape(256, 384)
    state = encoders._read_saliency_vit(path)
    assert np.abs(state["pos_embed"][0, 1:].numpy() - expected).max() < 1e-5


def test_vit_takes_other_sizes(encoder: Load) -> None:
    net = encoder("vit_small_patch14_saliency")
    maps = taps.features(net, torch.rand(1, 3, 56, 84), "blocks.1")["blocks.1"]
    assert maps.shape == (1, 384, 4, 6)
    assert net.patch_size == 14
    assert net.num_prefix_tokens == 1


# ----------------------------------------------------------------------------------- bad weights


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("echo pwned",))


def test_pickle_with_code_is_refused() -> None:
    for payload in (_Evil(), {"conv1": [_Evil()]}, np.random.default_rng):
        file = io.BytesIO(pickle.dumps(payload))
        with pytest.raises(pickle.UnpicklingError, match="only NumPy arrays"):
            encoders._ArraysOnly(file).load()
    harmless = {"a": [np.arange(6.0).reshape(2, 3)]}
    read = encoders._ArraysOnly(io.BytesIO(pickle.dumps(harmless, protocol=4))).load()
    assert np.array_equal(read["a"][0], harmless["a"][0])


def test_tampered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = encoders._PACKAGES["squeezenet1_1"]
    original = encoders._resource(package)
    assert original is not None
    copy = tmp_path / original.name
    shutil.copy(original, copy)
    monkeypatch.setattr(encoders, "_resource", lambda _: copy)
    encoders.load("squeezenet1_1")  # an exact copy is fine
    content = bytearray(copy.read_bytes())
    content[-100] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)sha256 .*expected {package.sha256}") as error:
        encoders.load("squeezenet1_1")
    assert store.sha256_file(copy) in str(error.value)
    table = encoders.available().set_index("name")
    assert table.loc["squeezenet1_1", "status"] == "altered"


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(encoders.UnavailableError, match=r"weights\.lock"):
        encoders.load("efficientnet_lite1")
    table = encoders.available().set_index("name")
    assert table.loc["efficientnet_lite1", "status"] == "missing"
    assert "weights.lock" in table.loc["efficientnet_lite1", "how_to_get"]


def test_available_lists_all() -> None:
    table = encoders.available()
    assert list(table.columns) == ["name", "status", "input_size", "licence", "how_to_get"]
    assert set(encoders.packaged()) < set(table["name"])
    ready = table.set_index("name").loc[list(encoders.packaged()), "status"]
    assert set(ready) == {"ready"}


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet_lite", "efficientnet_lite0"),
        ("resnet18", "timm:NAME"),
        ("timm:resnet81", "resnet18"),
        ("timm:resnet18.nosuch", "resnet18.a1_in1k"),
        ("torchvision:resnet81", "resnet18"),
        ("random:squeezenet", "squeezenet1_1"),
        ("random:squeezenet1_1@x.pth", "no checkpoint"),
        ("squeezenet1_1@x.pth", "no checkpoint"),
        ("timm:resnet18@missing.pth", r"missing\.pth"),
    ],
)
def test_bad_name_names_the_closest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoders.load(name)


@pytest.mark.parametrize("hub", ["timm:resnet18.a1_in1k", "torchvision:resnet18"])
def test_unreachable_hub_says_what_works(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("name resolution failed")

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(encoders.UnavailableError) as error:
        encoders.load(hub)
    for part in (hub, "connection", "efficientnet_lite0", "random:NAME", "@PATH"):
        assert part in str(error.value)


def test_hub_path_resolves_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `timm:NAME` does, but for the download."""
    original = timm.create_model

    def offline(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        assert pretrained
        return original(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    net = encoders.load("timm:convnext_atto.d2_in1k")
    assert net.input_size == 224
    assert net.classes is not None
    assert net.classes[0] == "tench"
    assert net.licence == "apache-2.0"
    assert torch.allclose(net.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    net = encoders.load("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert torch.allclose(net.std.flatten(), torch.tensor([0.5, 0.5, 0.5]))
    assert taps.features(net, torch.rand(1, 3, 64, 96), "blocks.0")["blocks.0"].shape[2:] == (4, 6)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_checkpoints(tmp_path: Path, suffix: str) -> None:
    import torchvision

    torch.manual_seed(3)
    images = torch.rand(2, 3, 64, 64)
    cases = {
        "torchvision": ("resnet18", torchvision.models.get_model("resnet18")),
        "timm": ("test_resnet", timm.create_model("test_resnet")),
    }
    for family, (architecture, net) in cases.items():
        net.eval()
        file = tmp_path / f"{family}{suffix}"
        if suffix == ".pth":
            torch.save({"state_dict": net.state_dict()}, file)
        else:
            safetensors.torch.save_file(net.state_dict(), file)
        loaded = encoders.load(f"{family}:{architecture}@{file}")
        same = encoders.load(f"{family}:{architecture}", checkpoint=file)
        assert loaded.weight_hash == same.weight_hash == store.sha256_file(file)
        assert loaded.name == f"{family}:{architecture}@{file.name}"
        with torch.no_grad():
            expected = net((images - loaded.mean) / loaded.std)
            assert torch.equal(loaded(images), expected)
    with pytest.raises(ValueError, match="does not fit"):
        encoders.load(f"timm:resnet34@{tmp_path / f'timm{suffix}'}")


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        encoders.load(f"timm:resnet18@{tmp_path / 'evil.pth'}")


# ----------------------------------------------------------------------------------------- random


@pytest.mark.parametrize(
    "name", ["random:squeezenet1_1", "random:timm:test_resnet", "random:torchvision:resnet18"]
)
def test_random_weights_are_seeded_and_leave_the_generator_alone(name: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (encoders.load(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert first.weight_hash == again.weight_hash != other.weight_hash
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.name == name
    assert first.classes is None


def test_random_control_differs_from_trained(squeezenet: encoders.Encoder) -> None:
    control = encoders.load("random:squeezenet1_1")
    assert control.weight_hash != squeezenet.weight_hash
    assert control.recommended == squeezenet.recommended
    assert control.input_size == squeezenet.input_size


# ---------------------------------------------------------------------------------------- encoder


def test_normalisation_lives_inside() -> None:
    net = encoders.Encoder(
        nn.Flatten(), name="flat", input_size=2, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)
    )
    image = torch.rand(1, 3, 2, 2)
    shift = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    scale = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert torch.equal(net(image), ((image - shift) / scale).flatten(1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), "batch axis"),
        (torch.rand(1, 4, 8, 8), r"\(N, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point"),
    ],
)
def test_wrong_images_are_refused(
    squeezenet: encoders.Encoder, images: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        squeezenet(images)


def test_device() -> None:
    assert encoders.device("cpu") == torch.device("cpu")
    assert encoders.device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"available: .*cpu"):
        encoders.device("tpu")


def test_one_and_two_threads_agree(lite0: encoders.Encoder, picture: Picture) -> None:
    image = picture("coffee", 224)[None]
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                outputs.append(lite0(image))
    finally:
        torch.set_num_threads(before)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()


# ------------------------------------------------------------------------------- table of layers


def test_table_of_squeezenet_follows_its_arithmetic(squeezenet: encoders.Encoder) -> None:
    table = squeezenet.layers().set_index("layer")
    # kernel 3 stride 2, then each fire module adds 2 strides, each pool 2 strides and doubles
    arithmetic = {
        "features.0": (3, 2, 113),
        "features.2": (7, 4, 56),
        "features.3": (15, 4, 56),
        "features.4": (23, 4, 56),
        "features.5": (31, 8, 28),
        "features.7": (63, 8, 28),
        "features.8": (79, 16, 14),
        "features.9": (111, 16, 14),
        "features.12": (207, 16, 14),
    }
    for layer, expected in arithmetic.items():
        found = tuple(table[column][layer] for column in ("receptive_field", "stride", "height"))
        assert found == expected, layer
    assert tuple(table[table["recommended"]].index) == squeezenet.recommended
    assert list(table.loc[list(squeezenet.recommended), "stride"]) == [2, 4, 8, 16, 16]


def test_table_of_the_default_encoder(lite0: encoders.Encoder) -> None:
    table = lite0.layers()
    columns = "layer kind channels stride receptive_field height width recommended"
    assert list(table.columns) == columns.split()
    rows = table.set_index("layer").loc[list(lite0.recommended)]
    assert list(rows["channels"]) == [16, 24, 40, 112, 320]
    assert list(rows["stride"]) == [2, 4, 8, 16, 32]
    assert list(rows["receptive_field"][:3]) == [7, 19, 67]
    assert np.isinf(rows["receptive_field"].iloc[-1])
    # on a larger image the field of a deeper layer fits: 147 + 3 kernels of 5 at stride 16
    larger = taps.receptive_fields(lite0, ["blocks.4"], size=512)
    assert larger["blocks.4"] == (339.0, 16.0)
    table.loc[:, "channels"] = 0  # a copy: the cached table is not the caller's
    assert lite0.layers()["channels"].iloc[0] == 32


def test_table_of_every_layer(squeezenet: encoders.Encoder) -> None:
    table = squeezenet.layers(every=True)
    names = {name for name, _ in squeezenet.net.named_modules()} - {""}
    assert set(table["layer"]) == names
    assert table["layer"].is_unique
    assert "features.3.expand3x3" in set(table["layer"])


def test_table_of_tokens(encoder: Load) -> None:
    table = encoder("vit_small_patch14_saliency").layers()
    row = dict(zip(table["layer"], table.drop(columns="layer").to_numpy().tolist(), strict=True))
    # kind, channels, stride, receptive field, height, width, recommended
    assert row["blocks.6"] == ["tokens", 384, 14.0, np.inf, 16, 16, True]
    assert row["patch_embed"] == ["map", 384, 14.0, 14.0, 16, 16, False]
    assert set(table["stride"]) == {14.0}
