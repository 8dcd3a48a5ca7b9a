"""Texture: statistics against NumPy, energy that is conserved, published formulas, synthesis."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn

from fmlib import encoders, preimage, store, texture
from fmlib.preimage import LBFGS, Adam, Bounds, Config, Phase, Pixels


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CODE, STYLE = rand(2, 5, 4, 3), rand(2, 5, 3, 3, seed=1)


def small_encoder(*, pool="max"):
    torch.manual_seed(0)
    pools = {"max": nn.MaxPool2d(2), "none": nn.Identity(), "dilated": nn.MaxPool2d(2, dilation=2)}
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        pools[pool],
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    return encoders.Encoder(net, name="small", input_size=32)


QUICK = Config(
    parameterisation=Pixels("uniform"),
    optimiser=Adam(8.0),
    schedule=(Phase(12),),
    priors=(Bounds(1.0),),
    keep="best",
)


@pytest.fixture(scope="module")
def encoder():
    return small_encoder()


@pytest.fixture(scope="module")
def squeezenet():
    return encoders.load("squeezenet1_1")


# ------------------------------------------------------------------------------- statistics


def test_gram_and_covariance_are_sums_over_positions():
    gram, covariance = texture.gram_matrix(CODE), texture.covariance(CODE)
    for n in range(2):
        rows = CODE[n].flatten(1).numpy()
        wanted = np.zeros((5, 5))
        for p in range(rows.shape[1]):
            wanted += np.outer(rows[:, p], rows[:, p])
        np.testing.assert_allclose(gram[n], wanted / rows.shape[1], rtol=1e-12)
        np.testing.assert_allclose(covariance[n], np.cov(rows, bias=True), rtol=1e-10)
    np.testing.assert_allclose(texture.mean_vector(CODE), CODE.mean((2, 3)), rtol=1e-12)


def test_statistics_forget_where_things_are():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = CODE.flatten(2)[:, :, order].unflatten(2, (4, 3))
    for name in texture.STATISTICS:
        statistic = texture._make(name)
        torch.testing.assert_close(statistic(moved), statistic(CODE), rtol=1e-9, atol=1e-12)


def test_moments_are_numpys():
    found = texture.moments(CODE, 4).numpy()
    rows = CODE.flatten(2).numpy()
    mean = rows.mean(2)
    np.testing.assert_allclose(found[:, 0], mean, rtol=1e-12)
    for k in (2, 3, 4):
        m = ((rows - mean[..., None]) ** k).mean(2)
        wanted = np.sign(m) * np.abs(m) ** (1 / k)
        np.testing.assert_allclose(found[:, k - 1], wanted, rtol=1e-4)
    constant = torch.ones(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(texture.moments(constant).sum(), constant)
    assert gradient.isfinite().all()


def test_sliced_quantiles_give_the_wasserstein_distance_in_one_dimension():
    from scipy.stats import wasserstein_distance

    a, b = rand(1, 1, 6, 6), 2 * rand(1, 1, 6, 6, seed=5)
    qa, qb = (texture.sliced_quantiles(x, 1, quantiles=36)[0, 0] for x in (a, b))
    # along a line the unit vector is a sign, which flips both alike
    wanted = wasserstein_distance(a.flatten().numpy(), b.flatten().numpy())
    assert float((qa - qb).abs().mean()) == pytest.approx(wanted, rel=1e-9)


def test_sliced_quantiles_are_of_unit_directions_and_their_seed():
    found = texture.sliced_quantiles(CODE, 7, quantiles=12, seed=3)
    assert found.shape == (2, 7, 12)
    assert bool((found.diff(dim=2) >= 0).all())
    torch.testing.assert_close(found, texture.sliced_quantiles(CODE, 7, quantiles=12, seed=3))
    assert not torch.equal(found, texture.sliced_quantiles(CODE, 7, quantiles=12, seed=4))
    constant = torch.ones(1, 400, 2, 2, dtype=torch.float64) / 20  # of length 1
    assert float(texture.sliced_quantiles(constant, 50).abs().max()) <= 1
    # images of another size have statistics of the same shape
    assert texture.sliced_quantiles(STYLE, 7).shape == texture.sliced_quantiles(CODE, 7).shape


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 6),
    sides=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    seed=st.integers(0, 1000),
)
def test_gram_distance_is_mmd_with_quadratic_kernel(channels, sides, seed):
    """Li et al. (2017), eq. 5: 1/(4N²M²) ‖G − S‖² is 1/(4N²) MMD² of k = (xᵀy)²."""
    code = rand(1, channels, *sides, seed=seed) - 0.3
    style = rand(1, channels, *sides, seed=seed + 1) - 0.3
    m = sides[0] * sides[1]
    f, s = code.flatten(2)[0], style.flatten(2)[0]
    left = (f @ f.T - s @ s.T).square().sum() / (4 * channels**2 * m**2)
    right = texture.mmd_squared(code, style)[0] / (4 * channels**2)
    assert float(left) == pytest.approx(float(right), rel=1e-9, abs=1e-14)
    for convention in ("gatys2016", "li2017"):
        found = texture.style_loss(code, style, convention=convention)
        assert float(found) == pytest.approx(float(left), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("kernel", texture.KERNELS)
def test_mmd_is_a_loop_over_pairs(kernel):
    def k(x, y):
        if kernel == "gaussian":
            return math.exp(-0.7 * float(((x - y) ** 2).sum()))
        product = float(x @ y)
        return {"linear": product, "quadratic": product**2,
                "polynomial": (product + 0.7) ** 2}[kernel]  # fmt: skip

    found = texture.mmd_squared(CODE, STYLE, kernel=kernel, parameter=0.7)
    for n in range(2):
        f, s = CODE[n].flatten(1).T.numpy(), STYLE[n].flatten(1).T.numpy()

        def mean(a, b):
            return np.mean([k(x, y) for x in a for y in b])

        wanted = mean(f, f) + mean(s, s) - 2 * mean(f, s)
        assert float(found[n]) == pytest.approx(wanted, rel=1e-9)


def test_linear_mmd_is_the_distance_of_means():
    wanted = (CODE.mean((2, 3)) - STYLE.mean((2, 3))).square().sum(1)
    torch.testing.assert_close(texture.mmd_squared(CODE, STYLE, kernel="linear"), wanted)


def test_published_conventions():
    difference = (texture.gram_matrix(CODE) - texture.gram_matrix(STYLE)).square()
    wanted = {
        "gatys2015": 1e9 * difference.sum((1, 2)) / 100,
        "gatys2016": difference.sum((1, 2)) / 100,
        "gatys2016_code": 1e3 / 25 * difference.mean((1, 2)),
        "li2017": texture.mmd_squared(CODE, STYLE) / 100,
    }
    assert set(wanted) == set(texture.STYLE_WEIGHTS)
    for convention, value in wanted.items():
        torch.testing.assert_close(texture.style_loss(CODE, STYLE, convention=convention), value)


def test_relative_distances_do_not_depend_on_scale():
    grams = torch.cat([texture.gram_matrix(CODE), texture.gram_matrix(STYLE)])
    found = texture.relative_distances(grams)
    assert found.shape == (4, 4)
    torch.testing.assert_close(found, found.T)
    assert float(found.diagonal().abs().max()) == 0
    difference = float((grams[0] - grams[3]).norm())
    lengths = float(grams[0].norm() * grams[3].norm())
    assert float(found[0, 3]) == pytest.approx(difference / math.sqrt(lengths), rel=1e-9)
    torch.testing.assert_close(texture.relative_distances(7 * grams), found)
    torch.testing.assert_close(texture.relative_distances(grams[:2], grams[2:]), found[:2, 2:])
    with pytest.raises(ValueError, match="zero everywhere"):
        texture.relative_distances(torch.zeros(2, 3))


@pytest.mark.parametrize(
    "statistic", [texture.gram_matrix, texture.covariance, texture.mean_vector, texture.moments,
                  texture.sliced_quantiles]
)  # fmt: skip
def test_one_position_has_no_statistics(statistic):
    with pytest.raises(ValueError, match=r"has 1 position \(1 x 1\).*shallower layer"):
        statistic(torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="must be a grid"):
        statistic(torch.ones(1, 4))


def test_bad_conventions_kernels_and_codes():
    with pytest.raises(ValueError, match=r"unknown convention.*'gatys2016'"):
        texture.style_loss(CODE, STYLE, convention="gatys2061")
    with pytest.raises(ValueError, match=r"unknown kernel.*'quadratic'"):
        texture.mmd_squared(CODE, STYLE, kernel="quadratik")
    with pytest.raises(ValueError, match="same channels"):
        texture.style_loss(CODE, STYLE[:, :3])
    with pytest.raises(ValueError, match="3 styles for 2 codes"):
        texture.mmd_squared(CODE, STYLE[[0, 0, 0]])


# ----------------------------------------------------------------------------- energy of codes


def test_one_filter_has_all_energy_of_every_position():
    target = texture.one_filter(CODE, 3)
    torch.testing.assert_close(target[:, 3], CODE.sum(1))
    assert float(target[:, [0, 1, 2, 4]].abs().max()) == 0
    torch.testing.assert_close(target.sum((1, 2, 3)), CODE.sum((1, 2, 3)))
    several = texture.one_filter(CODE[:1], [4, 0, 3])
    assert several.shape == (3, 5, 4, 3)
    torch.testing.assert_close(several[2], target[0])
    torch.testing.assert_close(texture.energy(several), torch.eye(5).double()[[4, 0, 3]])


@pytest.mark.parametrize("channel", [-1, 5, 99])
def test_channel_out_of_range(channel):
    with pytest.raises(ValueError, match=rf"index from 0 to 4, not {channel}"):
        texture.one_filter(CODE, channel)
    with pytest.raises(ValueError, match=rf"index from 0 to 4, not {channel}"):
        texture.one_filter(CODE[:1], [0, channel])


@pytest.mark.parametrize(
    "does", [lambda c: texture.one_filter(c, 0), texture.reallocate, texture.energy,
             lambda c: texture.along(c, torch.ones(5))]
)  # fmt: skip
def test_codes_without_energy(does):
    with pytest.raises(ValueError, match="image 0 is zero everywhere"):
        does(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="after its ReLU"):
        does(CODE[:1] - 0.5)


def test_several_channels_are_of_one_image():
    with pytest.raises(ValueError, match="of one image, not of 2"):
        texture.one_filter(CODE, [0, 1])
    with pytest.raises(ValueError, match="no channel"):
        texture.one_filter(CODE, [])


def test_along_an_axis_is_one_filter():
    axes = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        texture.along(CODE[:1], axes), texture.one_filter(CODE[:1], range(5))
    )


def test_along_keeps_the_sum_or_the_norm():
    positive, signed = rand(5, seed=4), rand(5, seed=4) - 0.5
    found = texture.along(CODE[:1], torch.stack([positive, signed]))
    torch.testing.assert_close(found[0].sum(0), CODE[0].sum(0))
    torch.testing.assert_close(found[1].norm(dim=0), CODE[0].norm(dim=0))
    for target, v in zip(found, (positive, signed), strict=True):
        cosine = F.cosine_similarity(target.flatten(1).T, v[None], dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    with pytest.raises(ValueError, match="direction is zero"):
        texture.along(CODE[:1], torch.zeros(5))
    with pytest.raises(ValueError, match="not of the channels"):
        texture.along(CODE[:1], torch.ones(4))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), deviation=st.sampled_from([0.0, 0.5, 3.0, 1e3]))
def test_reallocation_keeps_the_sum_and_each_map(seed, deviation):
    found = texture.reallocate(CODE, seed=seed, deviation=deviation)
    total, scale = CODE.sum((1, 2, 3)), found.abs().sum((1, 2, 3))
    assert bool(((found.sum((1, 2, 3)) - total).abs() <= 1e-10 * scale).all())
    ratio = found / CODE
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    torch.testing.assert_close(found, texture.reallocate(CODE, seed=seed, deviation=deviation))


def test_reallocation_gives_dead_channels_nothing():
    code = CODE.clone()
    code[0, 2] = 0
    found = texture.reallocate(code, seed=1)
    assert bool(found.isfinite().all())
    assert float(found[0, 2].abs().max()) == 0
    torch.testing.assert_close(found.sum((1, 2, 3)), code.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)
    even = texture.reallocate(CODE, deviation=0)
    torch.testing.assert_close(texture.energy(even), torch.full((2, 5), 0.2).double())


def test_rank_matching_matches():
    found = texture.match_ranks(CODE, STYLE)
    means, wanted = texture.mean_vector(found), texture.mean_vector(STYLE)
    torch.testing.assert_close(means, wanted)
    content = texture.mean_vector(CODE)
    for n in range(2):
        a, b = content[n].argsort(descending=True), wanted[n].argsort(descending=True)
        for i in range(5):
            map_ = CODE[n, a[i]]
            torch.testing.assert_close(found[n, b[i]] - found[n, b[i]].mean(), map_ - map_.mean())
    torch.testing.assert_close(texture.match_ranks(CODE, CODE), CODE)
    one = texture.match_ranks(CODE, STYLE[1:])
    torch.testing.assert_close(one[1], found[1])


def test_sum_matching_matches():
    found = texture.match_sums(CODE, STYLE)
    torch.testing.assert_close(texture.mean_vector(found), texture.mean_vector(STYLE))
    ratio = found / CODE
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    code = CODE.clone()
    code[0, 1] = 0
    filled = texture.match_sums(code, STYLE)
    torch.testing.assert_close(texture.mean_vector(filled), texture.mean_vector(STYLE))


def test_sum_matching_gradient_is_that_of_the_linear_kernel():
    style = rand(2, 5, 4, 3, seed=8)
    code = CODE.clone().requires_grad_()
    scale = 5 * 12
    sums = (texture.channel_sums(code) - texture.channel_sums(style)).square().sum() / (2 * scale)
    (by_sums,) = torch.autograd.grad(sums, code)
    mmd = texture.mmd_squared(code, style, kernel="linear").sum() * 12**2 / (2 * scale)
    (by_kernel,) = torch.autograd.grad(mmd, code)
    formula = texture.sum_matching_gradient(code.detach(), style)
    torch.testing.assert_close(formula, by_sums)
    torch.testing.assert_close(formula, by_kernel)
    with pytest.raises(ValueError, match="grids of one size"):
        texture.sum_matching_gradient(CODE, STYLE)


@pytest.mark.parametrize("primitives", [3, 9])
def test_nonnegative_mixture_is_scipys(primitives):
    matrix, target = rand(primitives, 4, 5), rand(6, 4, 5, seed=3)
    weights, share = texture.nonnegative_mixture(target, matrix)
    for n in range(6):
        wanted, left = nnls(matrix.flatten(1).T.numpy(), target[n].flatten().numpy())
        np.testing.assert_allclose(weights[n], wanted, atol=1e-8)
        assert float(share[n]) == pytest.approx(1 - left**2 / float(target[n].square().sum()))


def test_nonnegative_mixture_finds_a_mixture():
    matrix = rand(4, 30)
    weights = torch.tensor([[0.5, 0.0, 2.0, 0.1]], dtype=torch.float64)
    found, share = texture.nonnegative_mixture(weights @ matrix, matrix)
    torch.testing.assert_close(found, weights, rtol=1e-6, atol=1e-8)
    assert float(share) == pytest.approx(1)
    with pytest.raises(ValueError, match="target 0 is zero"):
        texture.nonnegative_mixture(torch.zeros(1, 30), matrix)
    with pytest.raises(ValueError, match="29 and 30 numbers"):
        texture.nonnegative_mixture(torch.ones(1, 29), matrix)


# ------------------------------------------------------------------------------------- networks


def test_average_pooling_replaces_every_max(squeezenet):
    changed = texture.average_pooling(squeezenet)
    kinds = [type(m) for m in changed.net.modules()]
    assert nn.MaxPool2d not in kinds
    assert kinds.count(nn.AvgPool2d) == 3
    assert [type(m) for m in squeezenet.net.modules()].count(nn.MaxPool2d) == 3
    assert changed.name == "average-pooling:squeezenet1_1"
    assert changed.weight_hash != squeezenet.weight_hash
    images = rand(1, 3, 67, 67, dtype=torch.float32)
    names = ["features.1", "features.2"]
    before = preimage.codes(preimage.Taps(squeezenet, names), images)
    after = preimage.codes(preimage.Taps(changed, names), images)
    torch.testing.assert_close(after["features.1"], before["features.1"])
    wanted = F.avg_pool2d(before["features.1"], 3, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(after["features.2"], wanted)


def test_average_pooling_of_torchvisions_vgg():
    from torchvision.models import vgg11

    encoder = encoders.Encoder(vgg11(weights=None).features, name="vgg", input_size=64)
    changed = texture.average_pooling(encoder)
    assert sum(isinstance(m, nn.AvgPool2d) for m in changed.net.modules()) == 5
    assert changed.net(torch.rand(1, 3, 64, 64)).shape == (1, 512, 2, 2)


def test_average_pooling_needs_max_pooling():
    with pytest.raises(ValueError, match="small has no max pooling"):
        texture.average_pooling(small_encoder(pool="none"))
    with pytest.raises(ValueError, match="dilated"):
        texture.average_pooling(small_encoder(pool="dilated"))


# ------------------------------------------------------------------- statistics as a matcher


def test_statistics_are_those_of_the_layers(encoder):
    images = rand(3, 3, 16, 16, dtype=torch.float32)
    layers = preimage.codes(preimage.Taps(encoder, ["1", "4"]), images)
    names = ["1|gram", "4|gram", "4|means", "4", "1|moments:2", "4|sliced:3"]
    found = preimage.codes(texture.Statistics(encoder, names), images)
    assert list(found) == names
    torch.testing.assert_close(found["1|gram"], texture.gram_matrix(layers["1"]))
    torch.testing.assert_close(found["4|gram"], texture.gram_matrix(layers["4"]))
    torch.testing.assert_close(found["4|means"], texture.mean_vector(layers["4"]))
    torch.testing.assert_close(found["4"], layers["4"])
    torch.testing.assert_close(found["1|moments:2"], texture.moments(layers["1"], 2))
    torch.testing.assert_close(found["4|sliced:3"], texture.sliced_quantiles(layers["4"], 3))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1|grams", "unknown statistic 'grams'.*'gram'"),
        ("1|gram:3", "gram takes no value, not '3'"),
        ("1|moments:0", "whole number, at least 1, not '0'"),
        ("1|sliced:many", "whole number, at least 1, not 'many'"),
        ("9|gram", "'9'"),
        ([], "no statistics asked for"),
    ],
)
def test_bad_names(encoder, name, said):
    with pytest.raises(ValueError, match=said):
        texture.Statistics(encoder, name)


def test_a_layer_of_one_position_is_named(encoder):
    images = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"'5\|gram' of small: .*1 position"):
        texture.Statistics(encoder, "5|gram")(images)


# ------------------------------------------------------------------------------------ synthesis


def test_synthesis_approaches_the_statistics(encoder):
    examples = rand(2, 3, 20, 24, dtype=torch.float32)
    long = replace(QUICK, schedule=(Phase(60),))
    for name in ("4|gram", "4|means", "4|sliced:8", "4|covariance", "4|moments:3"):
        found = texture.synthesise(examples, encoder, name, size=16, config=long)
        assert found.images.shape == (2, 1, 1, 3, 16, 16)
        total = found.history["total"]
        assert bool((total[-1] < 0.2 * total[0]).all()), name


def test_synthesised_together_or_alone(encoder):
    examples = rand(3, 3, 16, 16, dtype=torch.float64)
    encoder = small_encoder().double()
    together = texture.synthesise(examples, encoder, "1|gram", size=16, config=QUICK)
    for n in range(3):
        alone = texture.synthesise(
            examples[n : n + 1], encoder, "1|gram", size=16, config=QUICK, seeds=[n]
        )
        torch.testing.assert_close(alone.images[0], together.images[n], rtol=1e-9, atol=1e-9)


def test_synthesis_is_seeded(encoder):
    examples = rand(1, 3, 16, 16, dtype=torch.float32)
    one, two = (texture.synthesise(examples, encoder, "1|gram", size=16, config=QUICK, seeds=[5])
                for _ in range(2))  # fmt: skip
    assert torch.equal(one.images, two.images)
    other = texture.synthesise(examples, encoder, "1|gram", size=16, config=QUICK, seeds=[6])
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("scales", [1, 2])
def test_synthesis_resumes(encoder, tmp_path, scales):
    examples = rand(2, 3, 16, 16, dtype=torch.float32)
    options = {"size": 16, "config": QUICK, "scales": scales, "restarts": 2}
    whole = texture.synthesise(examples, encoder, ["1|gram", "4|gram"], **options)
    path = tmp_path / "run.safetensors"
    texture.synthesise(
        examples, encoder, ["1|gram", "4|gram"], checkpoint=path, stop_after=7, **options
    )
    assert len(list(tmp_path.iterdir())) == 1
    resumed = texture.synthesise(
        examples, encoder, ["1|gram", "4|gram"], checkpoint=path, **options
    )
    assert torch.equal(resumed.images, whole.images)
    with pytest.raises(store.MismatchError):
        texture.synthesise(examples, encoder, ["1|gram", "4|means"], checkpoint=path, **options)


def test_scales_start_where_the_last_ended(encoder):
    examples = rand(1, 3, 32, 32, dtype=torch.float32)
    both = texture.synthesise(examples, encoder, "1|gram", size=32, scales=2, config=QUICK)
    assert both.images.shape[-2:] == (32, 32)

    def resized(images, side):
        return F.interpolate(images, size=side, mode="bilinear", antialias=True)

    first = texture.synthesise(resized(examples, 16), encoder, "1|gram", size=16, config=QUICK)
    start = resized(first.images[:, 0, 0], 32).clamp(0, 1)
    second = texture.synthesise(examples, encoder, "1|gram", size=32, config=QUICK, start=start)
    assert torch.equal(both.images, second.images)


def test_mixed_statistics_can_be_given(encoder):
    images = rand(2, 3, 16, 16, dtype=torch.float32)
    grams = preimage.codes(texture.Statistics(encoder, "1|gram"), images)
    mixed = {"1|gram": grams["1|gram"].mean(0, keepdim=True)}
    found = texture.synthesise(
        mixed, encoder, size=16, config=replace(QUICK, schedule=(Phase(40),))
    )
    assert float(found.error["1|gram"]) < 0.5
    with pytest.raises(ValueError, match="statistics alone cannot be shrunk"):
        texture.synthesise(mixed, encoder, size=16, scales=2)


def test_content_is_kept(encoder):
    photographs = rand(2, 3, 16, 16, dtype=torch.float32)
    long = replace(QUICK, schedule=(Phase(60),))
    options = {"size": 16, "config": long, "content": photographs[:1], "content_layers": "4"}
    errors = [
        float(texture.synthesise(photographs[1:], encoder, "1|gram", content_weight=w,
                                 **options).error["4"])
        for w in (1e-3, 10)
    ]  # fmt: skip
    assert errors[1] < 0.7 * errors[0]


def test_published_convention_weighs_layers(encoder):
    examples = rand(1, 3, 16, 16, dtype=torch.float32)
    names = ["1|gram", "4|gram"]
    found = texture.synthesise(
        examples, encoder, names, size=16, config=QUICK, convention="gatys2016",
        weights={"4|gram": 3.0}, content=examples, content_layers="4", content_weight=2.0,
    )  # fmt: skip
    start = texture.synthesise(
        examples,
        encoder,
        names,
        size=16,
        config=replace(QUICK, schedule=(Phase(1),)),
        snapshots=[0],
    ).snapshots[0][0, 0]
    layers = preimage.Taps(encoder, ["1", "4"])
    a, b = preimage.codes(layers, start), preimage.codes(layers, examples)
    wanted = (
        texture.style_loss(a["1"], b["1"])
        + 3 * texture.style_loss(a["4"], b["4"])
        + 0.5 * 2 * (a["4"] - b["4"]).square().sum()
    )
    assert float(found.history["data"][0]) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"statistics": ()}, "no statistics to match"),
        ({"examples": torch.rand(2, 1, 16, 16)}, r"\(N, 3, H, W\) in \[0, 1\]"),
        ({"size": 18, "scales": 3}, "3 scales halve the sides 2 times"),
        ({"size": 0}, "size must be a whole number"),
        ({"weights": {"4|gram": 1.0}}, r"unknown statistic '4\|gram'"),
        ({"convention": "gatys"}, "unknown convention"),
        ({"statistics": "1|means", "convention": "gatys2016"}, "about Gram matrices: 1|means"),
        ({"content": torch.rand(1, 3, 16, 16)}, "content and content_layers go together"),
        ({"examples": torch.zeros(1, 3, 16, 16)}, "zero everywhere"),
    ],
)
def test_bad_synthesis(options, said):
    encoder = small_encoder()
    if "zero everywhere" in said:
        nn.init.zeros_(encoder.net.get_parameter("0.bias"))
    given = {"examples": torch.rand(1, 3, 16, 16), "statistics": "1|gram", "size": 16, **options}
    with pytest.raises(ValueError, match=said):
        texture.synthesise(given.pop("examples"), encoder, given.pop("statistics"), **given)


def test_images_smaller_than_the_receptive_field(squeezenet):
    with pytest.raises(ValueError, match=r"40 x 40 px.*receptive field.*'features\.6', 47 px"):
        texture.synthesise(torch.rand(1, 3, 40, 40), squeezenet, "features.6|gram", size=40)
    code = torch.rand(1, 256, 4, 4)
    with pytest.raises(ValueError, match="receptive field"):
        texture.invert_codes(texture.one_filter(code, 3), squeezenet, "features.6", size=40)


# ------------------------------------------------------------------------------ filter inversion


def test_filters_are_inverted_together_or_alone():
    encoder = small_encoder().double()
    image = rand(1, 3, 16, 16)
    code = preimage.codes(preimage.Taps(encoder, "1"), image)["1"]
    targets = texture.one_filter(code, [0, 2, 5])
    config = texture.no_prior(15)
    together = texture.invert_codes(targets, encoder, "1", size=16, config=config)
    for n in range(3):
        alone = texture.invert_codes(
            targets[n : n + 1], encoder, "1", size=16, config=config, seeds=[n]
        )
        torch.testing.assert_close(alone.images[0], together.images[n], rtol=1e-8, atol=1e-8)


def test_energy_goes_to_the_filter(squeezenet):
    image = rand(1, 3, 48, 48, dtype=torch.float32)
    layer = "features.1"
    code = preimage.codes(preimage.Taps(squeezenet, layer), image)[layer]
    channels = [3, 20, 41]
    found = texture.invert_codes(
        texture.one_filter(code, channels), squeezenet, layer, size=48, config=texture.no_prior(40)
    )
    reached = preimage.codes(preimage.Taps(squeezenet, layer), found.images[:, 0, 0])[layer]
    before = texture.energy(code)[0, channels]
    after = texture.energy(reached)[torch.arange(3), channels]
    assert bool((after > 3 * before).all())


def test_no_prior_is_the_published_setting():
    published = texture.no_prior()
    assert published == preimage.preset("xia2016")
    assert published.steps == 1000
    assert published.priors == ()
    assert [phase.factor for phase in published.schedule[:3]] == pytest.approx([1, 0.9, 0.81])
    first = texture.no_prior(25)
    assert first.steps == 25
    assert [phase.steps for phase in first.schedule] == [10, 10, 5]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            texture.no_prior(steps)
    with pytest.raises(ValueError, match="no prior, so no group"):
        preimage.preset("xia2016", group="deep")


# ---------------------------------------------------------------------- measures of a picture


def test_colours_counts_equal_shares():
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert float(texture.colours(flat)) == pytest.approx(1)
    quarters = torch.zeros(1, 3, 16, 16)
    quarters[:, 0, :8] = 1
    quarters[:, 2, :, :8] = 1
    assert float(texture.colours(quarters)) == pytest.approx(4)
    assert float(texture.colours(rand(1, 3, 64, 64))) > 100


@pytest.mark.parametrize("cycles", [4, 8, 16])
def test_frequency_of_a_grating(cycles):
    x = torch.arange(64) / 64
    grating = (0.5 + 0.4 * torch.sin(2 * math.pi * cycles * x)).expand(1, 3, 64, 64)
    assert float(texture.frequency(grating)) == pytest.approx(cycles / 64, rel=0.05)
    assert math.isnan(float(texture.frequency(torch.full((1, 3, 16, 16), 0.3))))


def test_orientation_entropy_of_stripes_and_noise():
    stripes = (0.5 + 0.4 * torch.sin(torch.arange(64) * 0.7)).expand(1, 3, 64, 64)
    assert float(texture.orientation_entropy(stripes)) == pytest.approx(0, abs=1e-6)
    turned = stripes.transpose(2, 3)
    assert float(texture.orientation_entropy(turned)) == pytest.approx(0, abs=1e-6)
    smooth = F.avg_pool2d(rand(1, 3, 70, 70), 5, 1)
    assert float(texture.orientation_entropy(smooth)) > 0.97 * math.log2(18)
    assert math.isnan(float(texture.orientation_entropy(torch.zeros(1, 3, 8, 8))))


def test_measures_take_pictures():
    for measure in (texture.colours, texture.frequency, texture.orientation_entropy):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
            measure(torch.rand(1, 1, 16, 16))


# ------------------------------------------------------------------------ L-BFGS of pre-images


def quadratic(scales):
    """A matcher whose pre-image is an ill-conditioned least-squares problem."""
    return lambda images: images.flatten(1) * scales.to(images)


def test_lbfgs_is_torchs():
    """`torch.optim.LBFGS` without line search, once the first step is as long."""
    scales = torch.logspace(-0.5, 0.5, 75, dtype=torch.float64)
    target = quadratic(scales)(rand(1, 3, 5, 5))
    levels = torch.full((75,), 3.0, dtype=torch.float64, requires_grad=True)
    start = (levels.detach() / 255).reshape(1, 3, 5, 5)

    def objective():
        distance = (levels / 255 * scales - target[0]).square().sum()
        return 1e4 * (distance / target.square().sum())

    (gradient,) = torch.autograd.grad(objective(), levels)
    first = gradient.square().mean().sqrt() * min(1.0, 1 / float(gradient.abs().sum()))
    config = Config(
        Pixels("mean"), LBFGS(memory=5, first=float(first), reach=1e9), (Phase(30),),
        data_weight=1e4, mean=(0.0, 0.0, 0.0),
    )  # fmt: skip
    found = preimage.invert(target, quadratic(scales), config, shape=(3, 5, 5), start=start)
    theirs = torch.optim.LBFGS(
        [levels], lr=1, max_iter=30, history_size=5, tolerance_grad=0, tolerance_change=0
    )

    def closure():
        theirs.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    theirs.step(closure)
    torch.testing.assert_close(255 * found.images.flatten(), levels.detach(), rtol=1e-6, atol=1e-6)
    assert float(found.error["codes"]) < 0.05


def test_lbfgs_items_do_not_interact():
    scales = torch.logspace(-1, 1, 75, dtype=torch.float64)
    target = quadratic(scales)(rand(3, 3, 5, 5))
    config = Config(Pixels("normal"), LBFGS(memory=4), (Phase(25),))
    together = preimage.invert(target, quadratic(scales), config, shape=(3, 5, 5))
    alone = preimage.invert(target[1:2], quadratic(scales), config, shape=(3, 5, 5), seeds=[1])
    torch.testing.assert_close(alone.images[0], together.images[1], rtol=1e-10, atol=1e-10)


def test_lbfgs_resumes_exactly(tmp_path):
    target = quadratic(torch.ones(75))(rand(1, 3, 5, 5))
    matcher = quadratic(torch.linspace(0.5, 2, 75))
    config = Config(Pixels("normal"), LBFGS(memory=3), (Phase(10), Phase(10, 0.5)))
    options = {"shape": (3, 5, 5), "checkpoint": tmp_path / "run"}
    whole = preimage.invert(target, matcher, config, shape=(3, 5, 5))
    preimage.invert(target, matcher, config, stop_after=7, **options)
    resumed = preimage.invert(target, matcher, config, **options)
    assert torch.equal(resumed.images, whole.images)


def test_lbfgs_steps_are_bounded():
    config = Config(Pixels("normal"), LBFGS(first=2.0, reach=3.0), (Phase(5),), mean=(0, 0, 0))
    steep = quadratic(torch.logspace(-3, 3, 75, dtype=torch.float64))
    found = preimage.invert(
        steep(rand(1, 3, 5, 5)), steep, config, shape=(3, 5, 5), snapshots=range(6)
    )
    moves = [255 * (found.snapshots[k + 1] - found.snapshots[k]) for k in range(5)]
    lengths = [float(move.square().mean().sqrt()) for move in moves]
    assert lengths[0] == pytest.approx(2.0)
    assert max(lengths) <= 3.0 + 1e-9


def test_lbfgs_wants_an_objective_that_stays():
    with pytest.raises(ValueError, match="LBFGS learns from the steps it takes"):
        Config(Pixels("normal"), LBFGS(), (Phase(5),), projection=preimage.Clamp())
    with pytest.raises(ValueError, match="LBFGS learns from the steps it takes"):
        Config(Pixels("normal"), LBFGS(), (Phase(5),), transforms=(preimage.Jitter(4),))
    with pytest.raises(ValueError, match="for Pixels"):
        Config(preimage.Fourier(), LBFGS(), (Phase(5),))
    with pytest.raises(ValueError, match="memory"):
        LBFGS(memory=0)


def test_clipped_momentum_is_the_published_update():
    """With the gain that makes the first gradient's rms the clip; then MXNet's SGD."""
    scales = torch.linspace(0.2, 3, 75, dtype=torch.float64)
    target = quadratic(scales)(rand(1, 3, 5, 5))
    config = replace(texture.no_prior(20), mean=(0.0, 0.0, 0.0))
    found = preimage.invert(target, quadratic(scales), config, shape=(3, 5, 5), snapshots=[0])
    x = 255 * found.snapshots[0].flatten()
    m, gain = torch.zeros_like(x), None
    for step in range(20):
        gradient = 2 * (x / 255 * scales - target[0]) * scales / 255 / target.square().sum()
        if gain is None:
            gain = 10 / gradient.square().mean().sqrt()
        clipped = (gain * gradient).clamp(-10, 10)
        m = 0.9 * m - 0.1 * 0.9 ** (step // 10) * (clipped + 5e-4 * x)
        x = x + m
    torch.testing.assert_close(255 * found.images.flatten(), x, rtol=1e-9, atol=1e-9)


def test_faint_start_is_within_a_tenth_of_a_level():
    config = replace(texture.no_prior(1), mean=(0.0, 0.0, 0.0))
    matcher = quadratic(torch.ones(75, dtype=torch.float64))
    target = matcher(rand(1, 3, 5, 5))
    found = preimage.invert(target, matcher, config, shape=(3, 5, 5), snapshots=[0])
    start = 255 * found.snapshots[0]
    assert 0.05 < float(start.abs().max()) <= 0.1
    assert float(start.min()) < 0


def test_each_restart_can_have_its_start():
    matcher = quadratic(torch.ones(75, dtype=torch.float64))
    target = matcher(rand(2, 3, 5, 5))
    config = Config(Pixels("normal"), Adam(1.0), (Phase(1),))
    start = rand(2, 3, 3, 5, 5, seed=9) * torch.linspace(0.2, 1, 3, dtype=torch.float64).reshape(
        1, 3, 1, 1, 1
    )
    found = preimage.invert(
        target, matcher, config, shape=(3, 5, 5), restarts=3, start=start, snapshots=[0]
    )
    torch.testing.assert_close(found.snapshots[0][:, :, 0], start)
    with pytest.raises(ValueError, match=r"start must be \(2, 3, 5, 5\) or \(2, 3, 3, 5, 5\)"):
        preimage.invert(target, matcher, config, shape=(3, 5, 5), restarts=3, start=start[:, :2])
