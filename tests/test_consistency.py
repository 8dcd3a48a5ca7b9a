"""Consistency counts what it says, on networks whose answers are known by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fmlib import antialias, consistency, images, taps
from fmlib.encoders import Encoder


class Parity(nn.Module):
    """Names the colour of the top left pixel: class 1 if it is white."""

    def forward(self, x: Tensor) -> Tensor:
        white = x[:, 0, 0, 0]
        return torch.stack([1 - white, white, torch.full_like(white, -1)], 1)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_tensor([0.0, 1.0, 0.5]) + 0 * x.mean((1, 2, 3))[:, None]


def wrap(net: nn.Module, classes: int | None = 3) -> Encoder:
    names = None if classes is None else [str(i) for i in range(classes)]
    return Encoder(net, name="hand", input_size=16, classes=names)


def convolutional() -> Encoder:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 30),
    )
    return Encoder(net, name="small", input_size=32, classes=[str(i) for i in range(30)])


def stripes(side: int = 24, count: int = 5) -> list[Tensor]:
    """Columns in turn black and white."""
    line = torch.arange(side).remainder(2).float()
    return [line.expand(3, side, side).clone() for _ in range(count)]


def noise(count: int, side: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, side, side, generator=generator) for _ in range(count)]


SMALL = {"crop": 16, "picture": None, "reach": 8}


PROTOCOLS = pytest.mark.parametrize("protocol", ["crop", "circular"])


@PROTOCOLS
def test_a_network_of_the_parity_has_the_consistency_of_its_offsets(protocol):
    found = consistency.pairs(wrap(Parity()), stripes(), protocol=protocol, count=40, **SMALL)
    columns = found.offsets[..., 1].remainder(2)
    same = (columns[..., 0] == columns[..., 1]).double()
    assert 0.3 < same.mean() < 0.7
    torch.testing.assert_close(consistency.agreement(found), same.mean(1))
    assert torch.equal(found.top1, columns)  # the image begins with black, in the middle too
    # outputs 1, 0 and -1
    powers = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(found.margin, (powers[0] - powers[1]).expand(found.margin.shape))


def test_a_constant_network_is_consistent():
    found = consistency.pairs(wrap(Constant()), noise(3), **SMALL)
    assert consistency.agreement(found).tolist() == [1, 1, 1]
    track = consistency.diagonal(wrap(Constant()), noise(3), crop=16, picture=None, steps=5)
    assert consistency.steps_kept(track).tolist() == [1, 1, 1]
    assert track.top1.unique().tolist() == [1]


@PROTOCOLS
def test_a_diagonal_takes_one_pixel_after_another(protocol):
    track = consistency.diagonal(
        wrap(Parity()), stripes(), protocol=protocol, crop=16, picture=None, steps=8, batch_size=1
    )
    assert track.top1.shape == (5, 9)
    assert (track.top1.diff(dim=1).abs() == 1).all()
    assert consistency.steps_kept(track).tolist() == [0] * 5
    powers = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(track.probability[:, 0], powers[:1].expand(5))
    torch.testing.assert_close(track.probability[:, 1], powers[1:2].expand(5))


def test_offsets_are_those_of_zhang():
    found = consistency.pairs(wrap(Constant()), noise(6), crop=16, picture=None, count=200)
    assert found.offsets.amin() == 0
    assert found.offsets.amax() == 31
    # uniform, and independent along the axes and between members of a pair
    flat = found.offsets.flatten(2).flatten(0, 1).double()
    assert (flat.mean(0) - 15.5).abs().max() < 1.2
    assert (torch.corrcoef(flat.T) - torch.eye(4)).abs().max() < 0.12


@pytest.fixture
def folder(tmp_path):
    for i, x in enumerate(noise(7)):
        pixels = (x * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return images.load(f"folder:{tmp_path}")


def test_what_an_image_is_shown_depends_on_it_and_the_seed_alone(folder):
    encoder = convolutional()
    layers = ["3"]
    whole = consistency.pairs(encoder, folder, count=3, layers=layers, batch_size=4, **SMALL)
    part = consistency.pairs(
        encoder, folder.select([5, 2]), count=2, layers=layers, batch_size=1, **SMALL
    )
    assert torch.equal(whole.offsets[[5, 2], :2], part.offsets)
    assert torch.equal(whole.top1[[5, 2], :2], part.top1)
    torch.testing.assert_close(whole.margin[[5, 2], :2], part.margin, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.change["3"][[5, 2], :2], part.change["3"], rtol=0, atol=1e-6)
    other = consistency.pairs(encoder, folder, count=3, seed=1, **SMALL)
    assert not torch.equal(other.offsets, whole.offsets)
    assert other.change == {}


@PROTOCOLS
def test_pairs_agree_with_a_plain_loop(protocol):
    encoder, pictures = convolutional(), noise(3, 40)
    options = {"crop": 24, "picture": 36, "reach": 6, "count": 2, "protocol": protocol}
    found = consistency.pairs(encoder, pictures, layers=["2", "7"], batch_size=3, **options)
    for i, picture in enumerate(pictures):
        x = images.resize(picture, 36)
        for k in range(2):
            shown = []
            for y, c in found.offsets[i, k].tolist():
                if protocol == "crop":
                    shown.append(x[:, y : y + 24, c : c + 24])
                else:
                    shown.append(x[:, 6:30, 6:30].roll((y, c), (-2, -1)))
            batch = torch.stack(shown)
            assert torch.equal(found.top1[i, k], encoder(batch).argmax(1))
            for layer in ("2", "7"):
                a, b = taps.features(encoder, batch, [layer])[layer].double()
                if layer == "2":
                    a, b = a.mean((1, 2)), b.mean((1, 2))
                change = 1 - torch.nn.functional.cosine_similarity(a, b, dim=0)
                torch.testing.assert_close(found.change[layer][i, k], change, rtol=1e-3, atol=1e-6)


def test_polyphase_sampling_is_wholly_consistent_under_circular_shifts():
    encoder, pictures = convolutional(), noise(30)
    last = encoder.net.get_submodule("7")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():  # what all pictures share would decide
        seen = taps.features(encoder, torch.stack(pictures), ["6"])["6"].mean(0)
        last.bias.copy_(-last.weight @ seen)
    options = {"crop": 32, "picture": None, "reach": 32, "count": 3}
    plain = consistency.pairs(encoder, pictures, protocol="circular", **options)
    changed = antialias.polyphase(encoder)
    circular = consistency.pairs(changed, pictures, protocol="circular", layers=["4"], **options)
    assert consistency.agreement(circular).mean() == 1
    assert circular.change["4"].max() < 1e-6
    assert consistency.agreement(plain).mean() < 1
    # a crop lets new pixels in, and no sampling can help that
    crops = consistency.pairs(changed, noise(30, 63), **options)
    assert consistency.agreement(crops).mean() < 1
    assert consistency.steps_kept(
        consistency.diagonal(changed, pictures, protocol="circular", crop=32, picture=None, steps=9)
    ).tolist() == [1] * len(pictures)


# ------------------------------------------------------------------------------- controlled forms


def made(top1: Tensor, margin: Tensor | None = None) -> consistency.Pairs:
    margin = torch.full(top1.shape, 0.5, dtype=torch.float64) if margin is None else margin
    return consistency.Pairs(top1, margin, {}, torch.zeros(*top1.shape, 2), "crop")


def test_alike_counts_pictures_that_both_name_alike():
    #            both named, both kept · first flips · second flips, at a common end · never alike
    a = made(torch.tensor([[[1, 1]], [[1, 2]], [[3, 3]], [[4, 4]]]))
    b = made(torch.tensor([[[1, 1]], [[1, 1]], [[3, 5]], [[6, 7]]]))
    found = consistency.alike(a, b)
    assert found.index.tolist() == [0, 1, 2]
    assert found.first.tolist() == [1, 0, 1]
    assert found.second.tolist() == [1, 1, 0]
    assert found.share == pytest.approx(4 / 8)
    right = consistency.alike(a, b, labels=[1, 2, 3, 4])
    assert right.index.tolist() == [0, 2]
    with pytest.raises(ValueError, match="name no picture alike"):
        consistency.alike(a, b, labels=[9, 9, 9, 9])
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for 4 images"):
        consistency.alike(a, b, labels=[1, 2, 3])


def simulated(power: float, lift: float, seed: int, count: int = 600) -> consistency.Pairs:
    """A pair is kept with a probability of its margin (and `lift`); margins are u**power."""
    generator = torch.Generator().manual_seed(seed)
    margin = torch.rand(count, 2, 1, generator=generator, dtype=torch.float64).pow(power)
    keep = (0.3 + 0.5 * margin + lift) > torch.rand(count, 2, 1, generator=generator)
    top1 = torch.cat([torch.zeros(count, 2, 1), (~keep).double()], 2).long()
    return made(top1, margin.expand(count, 2, 2))


def test_at_equal_margins_a_surer_network_is_not_more_consistent():
    sure, unsure = simulated(0.5, 0, 1), simulated(2, 0, 2)
    raw = consistency.agreement(sure).mean() - consistency.agreement(unsure).mean()
    assert raw > 0.1
    found = consistency.matched(sure, unsure, bins=8)
    assert found.difference.low < 0 < found.difference.high
    assert abs(found.difference.value) < raw / 3
    assert found.overlap == 1
    assert (found.first.diff() > -0.1).all()
    assert (found.edges.diff() > 0).all()


def test_and_one_that_is_more_consistent_at_every_margin_stays_so():
    found = consistency.matched(simulated(0.5, 0.15, 1), simulated(2, 0, 2), bins=8)
    assert found.difference.low > 0.05
    assert found.difference.value == pytest.approx(0.15, abs=0.06)


def test_one_bin_is_the_plain_difference_and_groups_widen_it():
    a, b = simulated(1, 0.1, 3, 60), simulated(1, 0, 4, 60)
    plain = consistency.agreement(a).mean() - consistency.agreement(b).mean()
    one = consistency.matched(a, b, bins=1)
    assert one.difference.value == pytest.approx(float(plain))
    assert (one.difference.n, consistency.matched(a, b, groups=[0, 1] * 30).difference.n) == (60, 2)


def test_bins_that_only_one_network_reaches_are_left_out():
    top1 = torch.zeros(10, 1, 2, dtype=torch.int64)
    low = torch.linspace(0, 0.1, 20, dtype=torch.float64).reshape(10, 1, 2)
    found = consistency.matched(made(top1, low), made(top1, low + 0.8), bins=2)
    assert found.overlap == 0
    assert found.difference.value == 0
    assert found.first.isnan().tolist() == [False, True]
    assert found.second.isnan().tolist() == [True, False]


def test_other_pictures_are_not_compared():
    encoder, pictures = wrap(Constant()), noise(2)
    a = consistency.pairs(encoder, pictures, **SMALL)
    b = consistency.pairs(encoder, pictures, seed=1, **SMALL)
    for compare in (consistency.alike, consistency.matched):
        with pytest.raises(ValueError, match="did not see the same pictures"):
            compare(a, b)
        with pytest.raises(ValueError, match="did not see the same pictures"):
            compare(a, dataclasses.replace(a, protocol="circular"))


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reach": 1}, "fewer than 2 nothing moves"),
        ({"reach": 0}, "nothing moves"),
        ({"crop": 0}, "crop .* at least 1"),
        ({"count": 0}, "count .* at least 1"),
        ({"crop": 48}, r"image '0' is 48×48 px.*need 55"),
        ({"picture": 20}, "offsets up to 7 px do not fit into a picture of 20 px.*at least 23"),
        ({"protocol": "shift"}, "'crop' or 'circular', not 'shift'"),
        ({"protocol": "circular", "crop": 4}, "goes round a picture of 4"),
        ({"layers": "0"}, "not the single string"),
        ({"layers": ["9"]}, "'9'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        consistency.pairs(wrap(Constant()), noise(1), **{**SMALL, **options})


def test_what_has_no_classes_is_refused():
    with pytest.raises(ValueError, match=r"names no classes.*unnamed=True"):
        consistency.pairs(wrap(Constant(), None), noise(1), **SMALL)
    found = consistency.pairs(wrap(Constant(), None), noise(1), unnamed=True, **SMALL)
    assert consistency.agreement(found).tolist() == [1]
    with pytest.raises(ValueError, match=r"gives \(6, 3, 16, 16\): a top-1 class"):
        consistency.pairs(wrap(nn.Identity()), noise(1), **SMALL)
    with pytest.raises(ValueError, match="names no classes"):
        consistency.diagonal(wrap(Constant(), None), noise(1), crop=16, picture=None, steps=3)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match="no images"):
        consistency.pairs(wrap(Constant()), [], **SMALL)
    with pytest.raises(ValueError, match=r"image '0' is \(1, 48, 48\)"):
        consistency.pairs(wrap(Constant()), [torch.rand(1, 48, 48)], **SMALL)
    with pytest.raises(ValueError, match="steps"):
        consistency.diagonal(wrap(Constant()), noise(1), steps=0)


def test_one_image_gives_a_value_without_an_interval():
    a = consistency.pairs(convolutional(), noise(1), **SMALL)
    found = consistency.matched(a, a, bins=2)
    assert found.difference.value == 0
    assert np.isnan(found.difference.low)
