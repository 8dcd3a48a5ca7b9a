"""Reading layers and running tails, on networks known by hand and on real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmlib import encoders, taps

Load = Callable[[str], encoders.Encoder]


def wrap(net: nn.Module, size: int = 32, **options: Any) -> encoders.Encoder:
    return encoders.Encoder(net, name="test", input_size=size, weight_hash="0", **options)


class Residual(nn.Module):
    """3 -> C channels, then a block with a skip, a ReLU used twice and a module never used."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.branch = nn.Conv2d(channels, channels, 3, padding=1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.after = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.branch(x))
        x = self.after(x)
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def residual() -> encoders.Encoder:
    torch.manual_seed(0)
    return wrap(Residual())


# ------------------------------------------------------------------------------------------- read


def test_in_place_relu_does_not_change_what_was_read(residual: encoders.Encoder) -> None:
    images = torch.rand(2, 3, 16, 16)
    with taps.read(residual, "stem") as read:
        value = read(images)["stem"]
    net = residual.net
    assert isinstance(net, Residual)
    assert torch.equal(value, net.stem(images))
    assert value.min() < 0


def test_values_by_hand() -> None:
    conv = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(conv.weight, 2.0)
    encoder = wrap(nn.Sequential(conv, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)), size=4)
    images = torch.arange(48.0).view(1, 3, 4, 4) / 48
    found = taps.features(encoder, images, ["0", "1", "2"])
    expected = 2 * images.sum(1, keepdim=True)
    assert torch.allclose(found["0"], expected)
    assert torch.allclose(found["1"], expected[..., 1::2, 1::2])
    assert torch.allclose(found["2"], expected[..., 1::2, 1::2].flatten(1))


def test_stops_after_the_deepest_layer_asked_for(residual: encoders.Encoder) -> None:
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
        for name, module in residual.net.named_children()
    ]
    taps.trace(residual)  # not part of the pass that is counted
    ran.clear()
    taps.features(residual, torch.rand(1, 3, 8, 8), ["branch", "stem"])
    for hook in hooks:
        hook.remove()
    assert ran == ["stem", "relu", "branch"]


def _hooks(encoder: encoders.Encoder) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__)
        for m in encoder.net.modules()
    )


def test_hooks_are_removed_even_on_error(residual: encoders.Encoder) -> None:
    wrong = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    with taps.read(residual, "after") as read:
        assert _hooks(residual) == 1
        with pytest.raises(RuntimeError):
            read(wrong)
    assert _hooks(residual) == 0
    with pytest.raises(KeyboardInterrupt), taps.read(residual, "after"):
        raise KeyboardInterrupt
    assert _hooks(residual) == 0
    rest = taps.tail(residual, "after")
    with pytest.raises(ValueError, match="C = 8"):
        rest(torch.rand(1, 3, 8, 8))
    assert _hooks(residual) == 0


def test_the_encoder_can_be_called_while_read_is_open(residual: encoders.Encoder) -> None:
    images = torch.rand(1, 3, 8, 8)
    expected = residual(images)
    with taps.read(residual, "stem") as read:
        first = read(images)["stem"]
        assert torch.equal(residual(images), expected)
        assert torch.equal(read(images)["stem"], first)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("brunch", "closest: branch"),
        ("unused", "never executes"),
        ("relu", "runs 2 times"),
        ([], "no layer"),
    ],
)
def test_unreadable_layers_are_refused_before_any_work(
    residual: encoders.Encoder, layer: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message), taps.read(residual, layer):
        pass


def test_gradients_flow_through_what_is_read(residual: encoders.Encoder) -> None:
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    with taps.read(residual, ["stem", "after"]) as read:
        values = read(images)
    values["after"].square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert values["stem"].requires_grad


def test_autocast_inference_mode_and_channels_last(residual: encoders.Encoder) -> None:
    images = torch.rand(2, 3, 16, 16)
    expected = taps.features(residual, images, "after")["after"]
    with torch.inference_mode():
        found = taps.features(residual, images, "after")["after"]
    assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = taps.features(residual, images, "after")["after"]
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.05)
    images = images.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(taps.features(residual, images, "after")["after"], expected, atol=1e-6)


def test_trace_is_not_confused_by_inference_mode_or_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    encoder = wrap(nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    encoder.train()
    before = encoder.state_dict()["net.1.running_mean"].clone()
    with torch.inference_mode():
        known = taps.trace(encoder)
    assert all(layer.separates for layer in known.values())
    assert torch.equal(encoder.state_dict()["net.1.running_mean"], before)
    assert encoder.net.training


def test_batches_of_features_join(residual: encoders.Encoder) -> None:
    images = torch.rand(5, 3, 8, 8)
    whole = taps.features(residual, images, ["stem", "pool"])
    parts = taps.features(residual, images, ["stem", "pool"], batch_size=2)
    assert list(parts) == ["stem", "pool"]
    for layer in whole:
        assert torch.allclose(whole[layer], parts[layer], atol=1e-6)
    with pytest.raises(ValueError, match="batch_size"):
        taps.features(residual, images, "stem", batch_size=0)


def test_surgery_voids_the_cached_trace() -> None:
    encoder = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert taps.trace(encoder)["0"].channels == 4
    assert isinstance(encoder.net, nn.Sequential)
    encoder.net[0] = nn.Conv2d(3, 6, 3)
    assert taps.trace(encoder)["0"].channels == 6


# ------------------------------------------------------------------------------------------- tail


def test_a_layer_in_a_branch_is_refused(residual: encoders.Encoder) -> None:
    with pytest.raises(ValueError, match=r"does not separate.*nearest layers that do: .*stem"):
        taps.tail(residual, "branch")
    with pytest.raises(ValueError, match="closest"):
        taps.tail(residual, "nothing")


def test_separating_layers_are_found(residual: encoders.Encoder) -> None:
    known = taps.trace(residual)
    separating = {name for name, layer in known.items() if layer.separates}
    # relu separates in its last call, but which call is meant is ambiguous
    assert separating == {"stem", "after", "pool", "head"}


def test_tail_of_changed_features_by_hand(residual: encoders.Encoder) -> None:
    net = residual.net
    assert isinstance(net, Residual)
    features = torch.rand(3, 8, 5, 5, requires_grad=True)  # another grid than the images give
    rest = taps.tail(residual, "after")
    logits = rest(features)
    assert torch.allclose(logits, net.head(features.mean((2, 3))), atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), features)
    expected = (net.head.weight[0] / 25).view(1, 8, 1, 1).expand_as(features)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_tail_leaves_the_given_features_alone(residual: encoders.Encoder) -> None:
    """The layer is followed by an in-place ReLU, which must not write into them."""
    features = torch.randn(2, 4, 32, 32, requires_grad=True)
    before = features.detach().clone()
    logits = taps.tail(residual, "stem")(features)
    assert torch.equal(features, before)
    assert torch.autograd.grad(logits.sum(), features)[0].shape == features.shape
    net = residual.net
    assert isinstance(net, Residual)
    x = before.relu()
    x = net.after((x + net.branch(x)).relu())
    assert torch.allclose(logits, net.head(x.mean((2, 3))), atol=1e-6)


def test_tail_to_a_deeper_layer(residual: encoders.Encoder) -> None:
    images = torch.rand(2, 3, 32, 32)
    found = taps.features(residual, images, ["stem", "after"])
    assert torch.equal(taps.tail(residual, "stem", to="after")(found["stem"]), found["after"])
    with pytest.raises(ValueError, match="does not come after"):
        taps.tail(residual, "after", to="stem")


class Leaky(nn.Module):
    """Uses the image again where autograd does not see it: the numeric check has to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * x.detach().mean()


def test_a_path_that_autograd_does_not_see_is_caught() -> None:
    encoder = wrap(Leaky())
    assert taps.trace(encoder)["conv"].separates
    with pytest.raises(ValueError, match="does not reproduce"):
        taps.tail(encoder, "conv")


PACKAGED = [
    (name, layer) for name in encoders.packaged() for layer in encoders._PACKAGES[name].recommended
]


@pytest.mark.parametrize(("name", "layer"), PACKAGED)
def test_tail_is_exact_for_packaged_encoders(encoder: Load, name: str, layer: str) -> None:
    net = encoder(name)
    images = torch.rand(2, 3, net.input_size, net.input_size)
    with torch.inference_mode():
        expected = net(images)
        with taps.read(net, layer) as read:
            value = read(images)[layer]
        rest = taps.tail(net, layer, check=False)
        found = rest(value, read.prefix.get(layer))
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        changed = rest(value + value.std() * torch.randn_like(value), read.prefix.get(layer))
        assert (changed - expected).abs().max() > 1e-3 * expected.abs().max()


def test_tail_of_tokens_needs_their_prefix(encoder: Load) -> None:
    net = encoder("vit_small_patch14_saliency")
    rest = taps.tail(net, "blocks.10", check=False)
    with pytest.raises(ValueError, match="prefix"):
        rest(torch.rand(1, 384, 16, 16))
    net = encoder("squeezenet1_1")
    with pytest.raises(ValueError, match="drop prefix"):
        taps.tail(net, "features.12", check=False)(
            torch.rand(1, 512, 13, 13), torch.rand(1, 1, 512)
        )


# --------------------------------------------------------------------- a contract for architectures

SMALL = [
    ("resnet18", 64),
    ("convnext_atto", 64),
    ("mobilenetv3_small_050", 64),
    ("regnetx_002", 64),
    ("tf_efficientnet_b0", 64),
    ("densenet121", 64),
    ("vit_tiny_patch16_224", 64),
    ("deit_tiny_distilled_patch16_224", 64),
    ("test_vit4", 64),
    ("swin_s3_tiny_224", 224),
    ("mixer_s32_224", 224),
    ("levit_128s", 224),
    ("vit_small_patch16_dinov3", 64),
]


@pytest.mark.parametrize(("name", "size"), SMALL)
def test_contract(encoder: Load, name: str, size: int) -> None:
    """Every architecture: maps are channels-first, grids follow the image, tails are exact."""
    net = encoder(f"random:timm:{name}")
    net.input_size = size  # what a small image is enough for
    layers = net.recommended
    known = taps.trace(net)
    assert 4 <= len(layers) <= 5
    order = [known[layer].order for layer in layers]
    assert order == sorted(order)
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        expected = net(images)
        with taps.read(net, layers) as read:
            values = read(images)
        for layer in layers:
            record, value = known[layer], values[layer]
            assert record.kind in ("map", "tokens")
            assert value.shape == (2, record.channels, record.height, record.width)
            assert value.is_contiguous()
            assert (
                read.prefix[layer].shape[1:] == (net.num_prefix_tokens, record.channels)
                if (net.num_prefix_tokens and record.kind == "tokens")
                else layer not in read.prefix
            )
            # deeper maps are never finer, and channels are no spatial axis
            assert record.height <= size // 2
        heights = [known[layer].height for layer in layers]
        assert heights == sorted(heights, reverse=True)
        for layer in (layers[0], layers[-2]):
            found = taps.tail(net, layer, check=False)(values[layer], read.prefix.get(layer))
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert _hooks(net) == 0


def test_channels_last_networks_give_channels_first_maps(encoder: Load) -> None:
    """Swin computes in NHWC; ConvNeXt does inside its blocks only."""
    swin = encoder("random:timm:swin_s3_tiny_224")
    raw: list[Any] = []
    hook = swin.net.get_submodule("layers.1").register_forward_hook(lambda m, a, o: raw.append(o))
    images = torch.rand(1, 3, 224, 224)
    with taps.read(swin, "layers.1") as read, torch.no_grad():
        value = read(images)["layers.1"]
    hook.remove()
    assert torch.equal(value, raw[-1].permute(0, 3, 1, 2))
    convnext = encoder("random:timm:convnext_atto")
    inner = "stages.0.blocks.0.mlp.fc1"
    value = taps.features(convnext, torch.rand(1, 3, 64, 96), inner)[inner]
    assert value.shape == (1, 160, 16, 24)


def test_tokens_of_non_square_images_are_in_reading_order(encoder: Load) -> None:
    net = encoder("random:timm:test_vit4")
    image = torch.zeros(1, 3, 64, 96)
    patch = net.patch_size
    assert patch is not None
    image[..., patch : 2 * patch, 3 * patch : 4 * patch] = 1  # row 1, column 3
    layer = "patch_embed"
    blank = taps.features(net, torch.zeros_like(image), layer)[layer]
    moved = (taps.features(net, image, layer)[layer] - blank).abs().sum(1)[0]
    assert moved.shape == (64 // patch, 96 // patch)
    assert moved.nonzero().tolist() == [[1, 3]]
    blocks = taps.features(net, image, net.recommended[0])[net.recommended[0]]
    assert blocks.shape[2:] == moved.shape


def test_rotary_positions_follow_the_grid(encoder: Load) -> None:
    """DINOv3 computes positions once, before the blocks: the tail must use those of this grid."""
    net = encoder("random:timm:vit_small_patch16_dinov3")
    net.input_size = 64
    images = torch.rand(2, 3, 48, 80)
    with torch.no_grad():
        expected = net(images)
        with taps.read(net, "blocks.3") as read:
            value = read(images)["blocks.3"]
        found = taps.tail(net, "blocks.3")(value, read.prefix["blocks.3"])
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# ------------------------------------------------------------------------------- receptive fields


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_receptive_fields_of_chains(chain: list[tuple[int, int, int, bool]]) -> None:
    """The field grows by (kernel - 1)·dilation·jump, jump by the stride, whatever the weights."""
    layers: list[nn.Module] = []
    field, jump, expected = 1, 1, []
    for kernel, stride, dilation, pool in chain:
        if pool:
            layers.append(nn.MaxPool2d(kernel, stride, padding=kernel // 2))
            dilation = 1
        else:
            conv = nn.Conv2d(
                3, 3, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation
            )
            nn.init.constant_(conv.weight, -1e-30)  # dead after the ReLU, and tiny
            layers.append(nn.Sequential(conv, nn.ReLU(inplace=True)))
        field, jump = field + (kernel - 1) * dilation * jump, jump * stride
        expected.append((float(field), float(jump)))
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = wrap(net, size=256)
    names = [str(i) for i in range(len(layers))]
    known = taps.trace(encoder)
    found = taps.receptive_fields(encoder, names)
    for name, pair in zip(names, expected, strict=True):
        if known[name].height >= 8:
            if math.isinf(found[name][0]):  # only where the field nearly fills the image
                assert pair[0] > 128
            else:
                assert found[name] == pair


def test_receptive_fields_where_convolutions_are_not_direct(
    squeezenet: encoders.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other processors the plain convolution is used, silently, and gives the same fields."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = taps.receptive_fields(squeezenet, ["features.1", "features.4"], size=64)
    assert found == {"features.1": (3.0, 2.0), "features.4": (23.0, 4.0)}
    assert torch.backends.mkldnn.is_available()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 4, 4)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Hardsigmoid())
        self.out = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return F.relu6(self.out(x * self.gate(x))).mean((2, 3))


def test_global_pooling_sees_everything() -> None:
    found = taps.receptive_fields(wrap(Attention(), size=64), ["embed", "out"])
    assert found == {"embed": (4.0, 4.0), "out": (math.inf, 4.0)}


def test_receptive_field_agrees_with_changing_pixels(squeezenet: encoders.Encoder) -> None:
    """An independent measurement: which pixels change the central unit, in float64."""
    import copy

    net = copy.deepcopy(squeezenet).double()
    layer = "features.4"
    image = torch.rand(1, 3, 227, 227, dtype=torch.float64)
    centre = (taps.trace(net)[layer].height - 1) // 2

    def unit(column: int | None) -> Tensor:
        changed = image.clone()
        if column is not None:
            changed[..., column] = 1 - changed[..., column]
        return taps.features(net, changed, layer)[layer][0, :, centre, centre]

    blank = unit(None)
    field, stride = taps.receptive_fields(squeezenet, [layer])[layer]
    assert (field, stride) == (23.0, 4.0)
    start = centre * 4 - 8  # two padded 3×3 fire modules at stride 4 reach 8 pixels up
    for column, inside in (
        (start - 1, False),
        (start, True),
        (start + 22, True),
        (start + 23, False),
    ):
        assert bool((unit(column) != blank).any()) == inside
