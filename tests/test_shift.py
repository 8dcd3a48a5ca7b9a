"""Sweeps: composition against PIL, cosines against a plain loop, nets whose answer is known."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fmlib import encoders, probes, shift, store
from fmlib.encoders import Encoder


def cutout(height=40, width=30, *, seed=0):
    """A random blob with soft edges and, where it is transparent, invisible black."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(3, height, width, generator=generator)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    alpha = ((1.1 - (y**2 + x**2).sqrt()) * 4).clamp(0, 1)
    return torch.cat([torch.where(alpha > 0, colour, 0.0), alpha[None]])


def noise(side=9, *, seed=0):
    """An opaque square of noise: nothing of it is lost in a resize to its own size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(3, side, side, generator=generator), torch.ones(1, side, side)])


def tiny(*modules, size=32):
    """Build an encoder whose layers go by number."""
    return Encoder(nn.Sequential(*modules), name="tiny", input_size=size)


def weighted(conv, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return conv


# ------------------------------------------------------------------------------------------- grid


def test_grid_of_the_paper():
    places = shift.grid(224, 125, 1)
    assert places.shape == (100, 100)
    assert places.positions[0].tolist() == [0, 0]
    assert places.positions[1].tolist() == [0, 1]  # row by row
    assert places.positions[-1].tolist() == [99, 99]
    assert shift.grid(224, 75, 1).shape == (150, 150)
    assert shift.references(224, 125).tolist() == [[0, 0], [0, 99], [49, 49], [99, 0], [99, 99]]
    assert shift.references(224, 75)[2].tolist() == [74, 74]


@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 20))
def test_grid_positions_fit(canvas, size, stride):
    if size > canvas or canvas - size < stride:
        with pytest.raises(ValueError, match=r"fit|single position"):
            shift.grid(canvas, size, stride)
        return
    places = shift.grid(canvas, size, stride)
    assert len(places.positions) == places.shape[0] * places.shape[1] > 1
    assert places.positions.min() == 0
    assert places.positions.max() + size <= canvas < places.positions.max() + size + stride
    assert places.offsets == sorted(set(places.positions[:, 1].tolist()))


@pytest.mark.parametrize(
    ("canvas", "size", "stride", "words"),
    [
        (224, 225, 1, "does not fit"),
        (224, 125, 0, "stride"),
        (224, 125, -3, "stride"),
        (224, 125, 1.5, "stride"),
        (224, True, 1, "size"),
        (224, 224, 1, "fills the canvas"),
        (224, 125, 100, "at most 99"),
    ],
)
def test_grid_refuses(canvas, size, stride, words):
    with pytest.raises(ValueError, match=words):
        shift.grid(canvas, size, stride)


# ---------------------------------------------------------------------------------------- objects


def test_prepare_leaves_no_dark_fringe():
    """A white disc whose transparent pixels are black stays white on a white canvas."""
    obj = cutout(200, 90)
    obj[:] = (obj[3] > 0).float()  # white where it is opaque, black where it is not
    small = shift.prepare(obj, 31)
    assert small.shape == (4, 31, 31)
    canvas = shift.compose(small, torch.tensor([[3, 5]]), canvas=40, background="white")
    torch.testing.assert_close(canvas, torch.ones_like(canvas))
    naive = F.interpolate(obj[None], (31, 31), mode="bilinear", antialias=True)[0]
    naive = shift.compose(naive, torch.tensor([[3, 5]]), canvas=40, background="white")
    assert naive.min() < 0.8  # what is to be avoided


def test_prepare_matches_pillow():
    obj = cutout(120, 80)
    pixels = (obj.permute(1, 2, 0) * 255).round().byte().numpy()
    oracle = Image.fromarray(pixels, "RGBA").convert("RGBa")
    oracle = np.asarray(oracle.resize((25, 25), Image.Resampling.BILINEAR), float) / 255
    small = shift.prepare(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, 25)
    premultiplied = torch.cat([small[:3] * small[3:], small[3:]]).permute(1, 2, 0).numpy()
    assert np.abs(premultiplied - oracle).max() < 2.1 / 255  # its 8-bit rounding, thrice


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        (torch.rand(3, 9, 9), "alpha"),
        (torch.cat([torch.rand(3, 9, 9), torch.zeros(1, 9, 9)]), "mask is empty"),
        (torch.full((4, 9, 9), 255.0), r"\[0, 1\]"),
        (torch.full((4, 9, 9), float("nan")), "finite"),
        (torch.ones(4, 9, 9, dtype=torch.uint8), "float"),
        (torch.rand(9, 9), "shape"),
        ("cat.png", "shape"),
    ],
)
def test_bad_objects(obj, words):
    with pytest.raises(ValueError, match=words):
        shift.prepare(obj, 5)
    with pytest.raises(ValueError, match=f"object 1: .*{words}"):
        shift.sweep(tiny(nn.Conv2d(3, 2, 1)), [cutout(), obj], ["0"], size=9, canvas=32, stride=8)


# ------------------------------------------------------------------------------------ composition


def test_paint():
    assert shift.paint("white", 4).eq(1).all()
    torch.testing.assert_close(shift.paint("grey", 4), torch.full((3, 4, 4), 128 / 255))
    assert shift.paint(0.25, 4).eq(0.25).all()
    assert shift.paint((0.1, 0.2, 0.3), 4)[:, 2, 1].tolist() == pytest.approx([0.1, 0.2, 0.3])
    photo = torch.rand(3, 4, 4)
    assert torch.equal(shift.paint(photo, 4), photo)
    with pytest.raises(ValueError, match=r"did you mean.*white"):
        shift.paint("whit", 4)
    with pytest.raises(ValueError, match=r"\(3, 4, 4\)"):
        shift.paint(torch.rand(3, 5, 4), 4)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        shift.paint(255.0, 4)


@pytest.mark.parametrize("background", ["white", 0.3, "photograph"])
def test_compose_is_alpha_over(background):
    ground = torch.rand(3, 48, 48) if background == "photograph" else shift.paint(background, 48)
    obj = cutout(20, 17)
    positions = torch.tensor([[0, 0], [28, 31], [5, 9], [11, 0]])
    found = shift.compose(obj, positions, canvas=48, background=ground)
    assert found.shape == (4, 3, 48, 48)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for picture, (y, x) in zip(found, positions.tolist(), strict=True):
        expected = ground.clone()
        under = expected[:, y : y + 20, x : x + 17]
        expected[:, y : y + 20, x : x + 17] = obj[:3] * obj[3:] + under * (1 - obj[3:])
        torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)


def test_compose_matches_pillow_to_its_rounding():
    obj = (cutout(20, 20) * 255).round() / 255
    pixels = Image.fromarray((obj.permute(1, 2, 0) * 255).round().byte().numpy(), "RGBA")
    canvas = Image.new("RGB", (48, 48), "white")
    canvas.paste(pixels, (7, 13), pixels)
    found = shift.compose(obj, torch.tensor([[13, 7]]), canvas=48, background="white")[0]
    oracle = np.asarray(canvas, float).transpose(2, 0, 1) / 255
    assert np.abs(found.numpy() - oracle).max() < 1.01 / 255


@pytest.mark.parametrize(
    "positions",
    [torch.tensor([[-1, 0]]), torch.tensor([[0, 29]]), torch.rand(2, 2), torch.tensor([1, 2])],
)
def test_compose_refuses_positions(positions):
    with pytest.raises(ValueError, match="position"):
        shift.compose(cutout(20, 20), positions, canvas=48)


# ------------------------------------------------------------------------------------------ sweep


def plain_cosines(encoder, obj, layer, positions, *, size, canvas):
    """One picture at a time through the encoder's own forward, cut off by no hook of ours."""
    small = shift.prepare(obj, size)
    values = {}
    module = encoder.net.get_submodule(layer)

    def vector(y, x):
        picture = torch.ones(3, canvas, canvas)
        under = picture[:, y : y + size, x : x + size]
        picture[:, y : y + size, x : x + size] = small[:3] * small[3:] + under * (1 - small[3:])
        handle = module.register_forward_hook(lambda *a: values.update(out=a[2].clone()))
        with torch.no_grad():
            encoder(picture[None])
        handle.remove()
        out = values["out"][0]
        return (out.mean((1, 2)) if out.ndim == 3 else out).double()

    anchors = [vector(*p) for p in shift.references(canvas, size).tolist()]
    return torch.stack(
        [
            torch.stack([F.cosine_similarity(vector(*p), a, dim=0) for p in positions.tolist()])
            for a in anchors
        ]
    )


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1", "random:squeezenet1_1"])
def test_sweep_agrees_with_a_plain_loop(name):
    encoder = encoders.load(name)
    layers = [encoder.recommended[1], encoder.recommended[-1]]
    obj = cutout(150, 90)
    maps = shift.sweep(encoder, [obj], layers, size=125, stride=49, span=3, share=True)
    for layer in layers:
        expected = plain_cosines(
            encoder, obj, layer, maps[layer].grid.positions, size=125, canvas=224
        )
        found = maps[layer].cosine[0].flatten(1)
        assert (found - expected).abs().max() < 1e-5
        assert found[0, 0] == pytest.approx(1, abs=1e-6)  # the first position is a reference


def test_a_network_of_torchvision_with_weights_from_a_file(tmp_path):
    """As the paper's own: the name, an @ and a state dict; maps of a fully connected layer."""
    torch.manual_seed(5)
    net = torchvision.models.get_model("mobilenet_v2").eval()
    file = tmp_path / "mine.pth"
    torch.save(net.state_dict(), file)
    encoder = encoders.load(f"torchvision:mobilenet_v2@{file}")
    obj = cutout()
    options: dict[str, Any] = {"size": 125, "stride": 99, "span": 1}
    found = shift.sweep(encoder, [obj], ["classifier.1"], share=True, **options)["classifier.1"]
    places = torch.cat([found.references, found.grid.positions])
    pictures = shift.compose(shift.prepare(obj, 125), places)
    mean, std = torch.tensor([[[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]])[0][..., None, None]
    with torch.no_grad():
        unit = F.normalize(net((pictures - mean) / std).double(), dim=1)
    assert found.cosine[0].shape == (5, 2, 2)
    expected = unit[:5] @ unit[5:].T
    torch.testing.assert_close(found.cosine[0].flatten(1), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-6
    with pytest.raises(ValueError, match="classifier"):
        shift.sweep(encoder, [obj], ["classifier.6"], **options)


def test_layers_that_an_optimisation_would_fuse_keep_their_value():
    encoder = encoders.load("random:efficientnet_lite0")
    options: dict[str, Any] = {"size": 125, "stride": 99, "span": 2}
    fast = shift.sweep(encoder, [cutout()], ["conv_stem", "bn1"], **options)
    slow = shift.sweep(encoder, [cutout()], ["conv_stem", "bn1"], optimise=False, **options)
    for layer in ("conv_stem", "bn1"):
        torch.testing.assert_close(fast[layer].cosine, slow[layer].cosine, atol=1e-6, rtol=0)


def test_invariant_net_gives_one_everywhere():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 1, bias=False)), nn.ReLU())
    maps = shift.sweep(
        encoder, [noise()], ["0", "1"], size=9, canvas=32, background="black", stride=1
    )
    for layer in ("0", "1"):
        torch.testing.assert_close(
            maps[layer].cosine, torch.ones(1, 5, 24, 24).double(), atol=2e-6, rtol=0
        )
        assert maps[layer].wiggle.max() < 1e-6
        assert shift.global_cosine(maps[layer]).item() == pytest.approx(1, abs=1e-6)
    # The flattened map of the same net is equivariant, so it is far from invariant.
    flat = shift.sweep(
        encoder, [noise()], ["0"], size=9, canvas=32, background="black", stride=1, pool="flatten"
    )
    assert shift.global_cosine(flat["0"]).item() < 0.7


def test_unpooled_stride_shows_its_period():
    """Sampling every second pixel: the mean feature depends on the parity of the position alone."""
    encoder = tiny(weighted(nn.Conv2d(3, 8, 1, stride=2, bias=False)))
    maps = shift.sweep(encoder, [noise()], ["0"], size=9, canvas=32, background="black", stride=1)[
        "0"
    ]
    cosine = maps.cosine[0, 2]
    torch.testing.assert_close(cosine[2:], cosine[:-2], atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine[:, 2:], cosine[:, :-2], atol=1e-6, rtol=0)
    assert (cosine[1:] - cosine[:-1]).abs().min() > 1e-5
    # The centre is (11, 11): odd positions agree with it exactly, even ones do not.
    torch.testing.assert_close(cosine[1::2, 1::2], torch.ones(12, 12).double(), atol=1e-6, rtol=0)
    assert cosine[0::2, 0::2].max() < 1 - 1e-5


def test_wiggle_of_a_coarse_grid_is_that_of_a_line():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3, stride=4, bias=False)))
    fine = shift.sweep(encoder, [noise()], ["0"], size=9, canvas=32, background="black", stride=1)[
        "0"
    ]
    coarse = shift.sweep(
        encoder, [noise()], ["0"], size=9, canvas=32, background="black", stride=8, span=10
    )["0"]
    assert fine.profile_offsets.tolist() == list(range(-11, 13))
    assert coarse.profile_offsets.tolist() == list(range(-5, 6))
    torch.testing.assert_close(fine.profile[0, 0], fine.cosine[0, 2, :, 11])
    torch.testing.assert_close(fine.profile[0, 1], fine.cosine[0, 2, 11, :])
    torch.testing.assert_close(coarse.profile[0], fine.profile[0, :, 6:17])
    centre = fine.cosine[0, 2]
    by_hand = torch.cat([centre.diff(dim=0).flatten(), centre.diff(dim=1).flatten()]).abs().mean()
    torch.testing.assert_close(fine.wiggle[0], by_hand)
    torch.testing.assert_close(coarse.wiggle[0], coarse.profile.diff(dim=2).abs().mean())
    torch.testing.assert_close(coarse.cosine, fine.cosine[..., ::8, ::8])


def test_means_leave_a_reference_out_of_its_own_map():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3, stride=4, bias=False)))
    maps = shift.sweep(
        encoder,
        [noise(8), noise(8, seed=1)],
        ["0"],
        size=8,
        canvas=32,
        background="black",
        stride=24,
    )
    cosine = maps["0"].cosine  # positions are the four corners; the centre is not among them
    assert maps["0"].grid.positions.tolist() == [[0, 0], [0, 24], [24, 0], [24, 24]]
    corners = cosine[:, [0, 1, 3, 4]].flatten(2)
    among = maps["0"].reference_cosine
    torch.testing.assert_close(among[:, [0, 1, 3, 4]][:, :, [0, 1, 3, 4]].double(), corners)
    torch.testing.assert_close(among[:, 2, [0, 1, 3, 4]], cosine[:, 2].flatten(1))
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    expected = corners[:, off_diagonal].mean(1)
    torch.testing.assert_close(shift.global_cosine(maps["0"]), expected)
    torch.testing.assert_close(shift.centre_cosine(maps["0"]), cosine[:, 2].flatten(1).mean(1))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40))
def test_batch_size_changes_nothing(batch_size):
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3, stride=2, padding=1)), nn.ReLU())
    arguments: dict[str, Any] = {"size": 9, "canvas": 32, "stride": 6, "span": 4}
    one = shift.sweep(encoder, [cutout()], ["1"], batch_size=batch_size, **arguments)["1"]
    other = shift.sweep(encoder, [cutout()], ["1"], batch_size=16, **arguments)["1"]
    torch.testing.assert_close(one.cosine, other.cosine, atol=1e-6, rtol=0)


def test_features_stream_every_position_once():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3)))
    positions = shift.grid(32, 9, 5).positions
    seen = []
    for index, vectors in shift.features(
        encoder, shift.prepare(cutout(), 9), positions, ["0"], canvas=32, batch_size=7
    ):
        assert vectors["0"].shape == (len(index), 8)
        assert len(index) <= 7
        seen += index.tolist()
    assert sorted(seen) == list(range(len(positions)))


def test_same_seed_same_bits_and_threads_agree():
    encoder = encoders.load("efficientnet_lite0")
    arguments: dict[str, Any] = {"size": 125, "stride": 99, "span": 2}
    layer = encoder.recommended[-1]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            results.append(shift.sweep(encoder, [cutout()], [layer], **arguments)[layer])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].cosine, results[1].cosine)
    assert (results[0].cosine - results[2].cosine).abs().max() < 1e-5


def test_sweep_refuses():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3)))
    good: dict[str, Any] = {"size": 9, "canvas": 32, "stride": 8}
    with pytest.raises(ValueError, match="'00'"):
        shift.sweep(encoder, [cutout()], ["00"], **good)
    with pytest.raises(ValueError, match="list of names"):
        shift.sweep(encoder, [cutout()], "0", **good)
    with pytest.raises(ValueError, match="at least one layer"):
        shift.sweep(encoder, [cutout()], [], **good)
    with pytest.raises(ValueError, match="no objects"):
        shift.sweep(encoder, [], ["0"], **good)
    with pytest.raises(ValueError, match="pool"):
        shift.sweep(encoder, [cutout()], ["0"], pool="max", **good)  # pyright: ignore
    with pytest.raises(ValueError, match="batch_size"):
        shift.sweep(encoder, [cutout()], ["0"], batch_size=0, **good)
    with pytest.raises(ValueError, match="span"):
        shift.sweep(encoder, [cutout()], ["0"], span=0, **good)


# ------------------------------------------------------------------------------ shards, bad input

SMALL: dict[str, Any] = {"size": 9, "canvas": 32, "stride": 6, "span": 4}


def strided(seed=0):
    return tiny(weighted(nn.Conv2d(3, 8, 3, stride=2, padding=1), seed=seed), nn.ReLU())


def same(a, b):
    """Whether two results of a sweep are equal to the last bit."""
    assert list(a) == list(b)
    for layer in a:
        for field in dataclasses.fields(shift.ShiftMaps):
            x, y = getattr(a[layer], field.name), getattr(b[layer], field.name)
            assert x.offsets == y.offsets if field.name == "grid" else torch.equal(x, y)
    return True


@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 5), parts=st.integers(1, 5), stride=st.sampled_from([1, 6]))
def test_parts_make_one_run(count, parts, stride):
    parts = min(count, parts)
    objects = [cutout(seed=i) for i in range(count)]
    options = {**SMALL, "stride": stride}
    whole = shift.sweep(strided(), objects, ["0", "1"], **options)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "maps"
        for i in reversed(range(parts)):
            mine = shift.sweep(
                strided(), objects, ["0", "1"], directory=directory, part=(i, parts), **options
            )
            assert torch.equal(mine["1"].cosine, whole["1"].cosine[i::parts])
        assert same(shift.read(directory), whole)
        before = {x: x.stat().st_mtime_ns for x in directory.iterdir()}
        again = shift.sweep(strided(), objects, ["0", "1"], directory=directory, **options)
        assert same(again, whole)
        assert before == {x: x.stat().st_mtime_ns for x in directory.iterdir()}


def test_part_without_a_directory():
    objects = [cutout(seed=i) for i in range(3)]
    whole = shift.sweep(strided(), objects, ["1"], **SMALL)["1"]
    part = shift.sweep(strided(), objects, ["1"], part=(1, 2), **SMALL)["1"]
    assert torch.equal(part.cosine, whole.cosine[1:2])
    for bad in [(0, 0), (2, 2), (-1, 2), (0.0, 2), (3, 4), (1,)]:
        with pytest.raises(ValueError, match="part"):
            shift.sweep(strided(), objects, ["1"], part=bad, **SMALL)


def test_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    objects = [cutout(seed=i) for i in range(4)]
    directory = tmp_path / "maps"
    plain, begun = shift.features, []

    def counting(encoder, obj, positions, layers, **options):
        if len(positions) > 5:  # not the references
            begun.append(obj)
            if len(begun) == 3:
                raise KeyboardInterrupt
        return plain(encoder, obj, positions, layers, **options)

    monkeypatch.setattr(shift, "features", counting)
    with pytest.raises(KeyboardInterrupt):
        shift.sweep(strided(), objects, ["1"], directory=directory, **SMALL)
    names = [f"object-{i:05d}.safetensors" for i in range(4)]
    assert sorted(x.name for x in directory.iterdir()) == ["config.json", *names[:2]]
    with pytest.raises(ValueError, match="lacks 2 of 4 objects"):
        shift.read(directory)
    # a file that a full disk cut short counts as missing
    (directory / names[1]).write_bytes((directory / names[1]).read_bytes()[:100])
    found = shift.sweep(strided(), objects, ["1"], directory=directory, **SMALL)
    assert len(begun) == 3 + 3
    monkeypatch.undo()
    assert same(found, shift.sweep(strided(), objects, ["1"], **SMALL))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": strided(seed=1)}, "weight_hash"),
        ({"layers": ["0"]}, "layers"),
        ({"objects": [cutout(), cutout(seed=2)]}, "objects"),
        ({"objects": [cutout()]}, "count|objects"),
        ({"size": 8}, "size"),
        ({"canvas": 33}, "canvas"),
        ({"stride": 7}, "stride"),
        ({"span": 5}, "span"),
        ({"background": "grey"}, "background"),
        ({"background": torch.rand(3, 32, 32)}, "background"),
        ({"pool": "flatten"}, "pool"),
    ],
)
def test_other_maps_are_refused(tmp_path, change, words):
    base = {"encoder": strided(), "objects": [cutout(), noise()], "layers": ["1"], **SMALL}
    shift.sweep(**base, directory=tmp_path / "maps")
    before = sorted((x.name, x.stat().st_mtime_ns) for x in (tmp_path / "maps").iterdir())
    with pytest.raises(store.MismatchError, match=words):
        shift.sweep(**{**base, **change}, directory=tmp_path / "maps")
    assert sorted((x.name, x.stat().st_mtime_ns) for x in (tmp_path / "maps").iterdir()) == before
    # "white" by another name, and options that do not change the result
    shift.sweep(**base, directory=tmp_path / "maps", background=1.0, share=False, batch_size=3)


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(store.MismatchError, match="not empty"):
        shift.sweep(strided(), [cutout()], ["1"], directory=tmp_path, **SMALL)
    assert [x.name for x in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(ValueError, match="no maps"):
        shift.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objects": [cutout(), torch.rand(3, 9, 9)]}, "object 1: .*alpha channel"),
        ({"objects": [cutout() * torch.tensor([1, 1, 1, 0])[:, None, None]]}, "mask is empty"),
        ({"objects": []}, "no objects"),
        ({"size": 33}, "33 px does not fit on a canvas of 32 px"),
        ({"size": 32}, "single position"),
        ({"stride": 24}, "single position: stride must be at most 23"),
        ({"stride": 0}, "stride must be a whole number of pixels, at least 1, not 0"),
        ({"layers": ["1", "conv"]}, "'conv'"),
        ({"layers": []}, "at least one layer"),
        ({"background": "wite"}, "did you mean.*white"),
        ({"pool": "max"}, "pool"),
        ({"span": 0}, "span"),
        ({"batch_size": 0}, "batch_size"),
        ({"part": (2, 2)}, "part"),
    ],
)
def test_bad_input_leaves_no_trace(tmp_path, monkeypatch, change, words):
    """A clear message, no picture computed, nothing written."""
    monkeypatch.setattr(shift, "features", lambda *a, **o: pytest.fail("something was computed"))
    options = {"encoder": strided(), "objects": [cutout()], "layers": ["1"], **SMALL, **change}
    with pytest.raises(ValueError, match=words):
        shift.sweep(**options, directory=tmp_path / "deep" / "maps")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- pairwise


@pytest.mark.parametrize("name", ["tiny", "random:squeezenet1_1"])
@pytest.mark.parametrize("pool", ["mean", "flatten"])
def test_pairwise_holds_the_maps_of_a_sweep(name, pool):
    """Where the five references are on the grid, their rows are the sweep's maps."""
    if name == "tiny":
        net = tiny(weighted(nn.Conv2d(3, 8, 3, stride=2, padding=1)), nn.ReLU())
        encoder, layers = net, ["0", "1"]
        options: dict[str, Any] = {"size": 9, "canvas": 32, "stride": 1}
    else:
        encoder = encoders.load(name)
        layers = list(encoder.recommended[1::3])
        options = {"size": 124, "canvas": 224, "stride": 50}  # offsets 0, 50, 100; centre 49
    options["pool"] = pool
    objects = [cutout(), noise(seed=1)]
    maps = shift.sweep(encoder, objects, layers, span=2, **options)
    pairs = shift.pairwise(encoder, objects, layers, **options)
    for layer in layers:
        found, expected = pairs[layer].cosine, maps[layer].cosine.flatten(2)
        count = len(pairs[layer].grid.positions)
        assert found.shape == (2, count, count)
        torch.testing.assert_close(found, found.mT)
        torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(2, count))
        where = {tuple(p): i for i, p in enumerate(pairs[layer].grid.positions.tolist())}
        references = [tuple(p) for p in maps[layer].references.tolist()]
        compared = [(r, where[p]) for r, p in enumerate(references) if p in where]
        assert len(compared) == (5 if name == "tiny" else 4)
        for r, row in compared:
            assert (found[:, row].double() - expected[:, r]).abs().max() < 1e-6


def test_pairwise_refuses_what_does_not_fit():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3)))
    options: dict[str, Any] = {"size": 9, "canvas": 32}
    # 24² positions: 4·576² bytes; at stride 2 12² positions: 4·144² = 82 944
    with pytest.raises(ValueError, match=r"0\.00133 GB.*stride of 2 would do"):
        shift.pairwise(encoder, [noise()], ["0"], stride=1, max_gigabytes=1e-4, **options)
    with pytest.raises(ValueError, match="fewer objects or layers"):
        shift.pairwise(encoder, [noise()], ["0"], stride=1, max_gigabytes=1e-9, **options)
    fits = shift.pairwise(encoder, [noise()], ["0"], stride=2, max_gigabytes=1e-4, **options)
    assert fits["0"].cosine.shape == (1, 144, 144)
    with pytest.raises(ValueError, match="no objects"):
        shift.pairwise(encoder, [], ["0"], stride=2, **options)
    with pytest.raises(ValueError, match="single position"):
        shift.pairwise(encoder, [noise()], ["0"], stride=24, **options)


# --------------------------------------------------------------------------------------- reducers


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.0, 1e4]))
def test_moments_do_not_depend_on_the_batches(sizes, offset):
    generator = torch.Generator().manual_seed(sum(sizes))
    vectors = torch.randn(sum(sizes), 5, generator=generator) + offset
    moments, start = shift.Moments(), 0
    for size in sizes:
        moments.update(torch.arange(start, start + size), vectors[start : start + size])
        start += size
    mean, variance = moments.result()
    torch.testing.assert_close(mean, vectors.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        variance, vectors.double().var(0, correction=0), rtol=1e-9, atol=1e-12
    )


def test_one_pass_feeds_several_reducers():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3, stride=2, padding=1)), nn.ReLU())
    objects = [cutout(), noise()]
    places = shift.grid(48, 9, 4)
    fixed = shift.references(48, 9)
    count, passes = len(places.positions), 0

    class Count:
        def __init__(self, references):
            assert references.shape == (5, 8)
            self.seen = torch.zeros(count)

        def update(self, index, vectors):
            assert vectors.shape == (len(index), 8)
            nonlocal passes
            passes += len(index)
            self.seen[index] += 1

        def result(self):
            return self.seen

    reducers = {
        "cosine": lambda anchor: shift.Cosines(anchor, count=count),
        "moments": shift.Moments,
        "pairs": lambda _: shift.Pairs(count=count),
        "position": lambda _: probes.StreamedRegression(places, margin=2),
        "count": Count,
    }
    options: dict[str, Any] = {"size": 9, "canvas": 48}
    found = list(
        shift.reduce(
            encoder, objects, ["0", "1"], places.positions, reducers, references=fixed, **options
        )
    )
    assert len(found) == 2
    assert passes == 2 * 2 * count  # objects, layers
    maps = shift.sweep(encoder, objects, ["0", "1"], stride=4, **options)
    features = list(probes.collect(encoder, objects, ["0", "1"], places))
    for i, one in enumerate(found):
        for layer in ("0", "1"):
            assert one["count"][layer].eq(1).all()
            torch.testing.assert_close(
                one["cosine"][layer][0].T, maps[layer].cosine[i].flatten(1), rtol=0, atol=1e-6
            )
            x = features[i][layer].double()
            mean, variance = one["moments"][layer]
            torch.testing.assert_close(mean, x.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(variance, x.var(0, correction=0), rtol=1e-4, atol=1e-9)
            unit = F.normalize(x, dim=1)
            torch.testing.assert_close(
                one["pairs"][layer].double(), unit @ unit.T, rtol=0, atol=1e-6
            )
        # not of "0": averaged, a linear layer does not depend on the place
        plain = probes.regress(probes.standardise(features[i]["1"]), places, margin=2)
        assert one["position"]["1"].r2 == pytest.approx(plain.r2, abs=1e-3)


def test_reduce_refuses():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3)))
    places = shift.grid(32, 9, 4).positions
    options: dict[str, Any] = {"size": 9, "canvas": 32}
    with pytest.raises(ValueError, match="reducer"):
        shift.reduce(encoder, [noise()], ["0"], places, {}, **options)
    with pytest.raises(ValueError, match="'00'"):  # at once, not when the first is asked for
        shift.reduce(encoder, [noise()], ["00"], places, {"": shift.Moments}, **options)
    with pytest.raises(ValueError, match="leaves the canvas"):
        next(shift.reduce(encoder, [noise()], ["0"], places + 9, {"": shift.Moments}, **options))
    with pytest.raises(ValueError, match="not come"):
        shift.Pairs(count=3).result()
    with pytest.raises(ValueError, match="no position"):
        shift.Moments().result()


# ----------------------------------------------------------------------------------------- floors


def test_floors():
    encoder = tiny(weighted(nn.Conv2d(3, 8, 3)), nn.ReLU())
    objects = [noise(), noise(seed=1), noise()]
    scale = shift.floors(encoder, objects, ["1"], size=9, canvas=32, background="black")["1"]
    assert scale.between.shape == (3, 3)
    torch.testing.assert_close(scale.between.diagonal(), torch.ones(3).double())
    torch.testing.assert_close(scale.between, scale.between.T)
    assert scale.between[0, 2] == pytest.approx(1, abs=1e-6)
    assert scale.between[0, 1] < 1 - 1e-5
    # An object of the canvas's own colour is no object.
    ghost = torch.ones(4, 9, 9)
    scale = shift.floors(encoder, [ghost], ["1"], size=9, canvas=32, background="white")["1"]
    assert scale.empty[0] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="no objects"):
        shift.floors(encoder, [], ["1"])
