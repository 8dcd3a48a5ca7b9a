"""Pre-images: formulas against plain loops, published numbers, toy problems with known answers."""

import dataclasses
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmlib import descriptors, encoders, preimage, stats, store
from fmlib.preimage import (
    Adam,
    AlphaNorm,
    Bounds,
    Clamp,
    Config,
    DecayedAdagrad,
    DeepImagePrior,
    Fourier,
    Jitter,
    Momentum,
    NormBall,
    Phase,
    Pixels,
    RandomRotation,
    RandomScale,
    Taps,
    Term,
    TotalVariation,
)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SHAPE = (3, 6, 5)
#: An invertible linear descriptor, well conditioned.
MIX = torch.linalg.qr(rand(90, 90, seed=3) - 0.5)[0] @ torch.diag(0.7 + 0.6 * rand(90, seed=4))


def linear(images):
    return images.flatten(1) @ MIX.to(images).T


def curved(images):
    return {"soft": torch.tanh(3 * images), "pooled": F.avg_pool2d(images, 2)}


def config(steps=150, *, rate=0.4, **options):
    options = {"optimiser": Momentum(rate), "schedule": (Phase(steps),), **options}
    return Config(**options)


QUICK = config(12, rate=0.05, priors=(AlphaNorm(0.01), TotalVariation(0.5)))
SPECTRAL = config(12, parameterisation=Fourier(), optimiser=Adam(0.05), keep="best")


def invert(images, matcher=linear, settings=QUICK, **options):
    known = preimage.codes(matcher, images)
    return preimage.invert(known, matcher, settings, shape=images.shape[1:], **options)


def small_encoder(*, dead=False):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    if dead:
        net[2].register_parameter("bias", nn.Parameter(torch.full((6,), -1e4)))
    return encoders.Encoder(net, name="small", input_size=32)


# ----------------------------------------------------------------------------------------- priors


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 3.0])
def test_total_variation_is_the_papers_sum(beta):
    x = rand(2, 3, 5, 4).numpy()
    wanted = np.zeros(2)
    for n, c, i, j in np.ndindex(x.shape):
        across = x[n, c, i, j + 1] - x[n, c, i, j] if j + 1 < 4 else 0.0
        down = x[n, c, i + 1, j] - x[n, c, i, j] if i + 1 < 5 else 0.0
        wanted[n] += (across**2 + down**2) ** (beta / 2)
    found = preimage.total_variation(torch.from_numpy(x), beta)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("joint", [False, True])
def test_alpha_norm_is_the_papers_sum(joint):
    x = rand(2, 3, 4, 3).numpy() - 0.5
    wanted = np.zeros(2)
    for n, i, j in np.ndindex(2, 4, 3):
        if joint:
            wanted[n] += sum(x[n, c, i, j] ** 2 for c in range(3)) ** 3
        else:
            wanted[n] += sum(abs(x[n, c, i, j]) ** 6 for c in range(3))
    found = preimage.alpha_norm(torch.from_numpy(x), 6, joint=joint)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "prior",
    [
        AlphaNorm(1.0),
        AlphaNorm(1.0, 3.0, joint=True),
        TotalVariation(1.0),
        TotalVariation(1.0, 1.0, per="pixels"),
        TotalVariation(1.0, 1.5),
        Bounds(1.0),
    ],
)
def test_gradients_of_priors(prior):
    x = (600 * (rand(2, 3, 4, 3) - 0.5)).requires_grad_()
    mean = torch.full((3, 1, 1), 100.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: prior(x, mean), (x,))


def test_flat_images_have_no_gradient_of_total_variation():
    x = torch.ones(1, 3, 4, 4, requires_grad=True)
    preimage.total_variation(x, 1.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == torch.zeros(1, 3, 4, 4).tolist()


def test_bounds_clamp_and_ball():
    mean = torch.full((3, 1, 1), 128.0)
    levels = 255 * torch.tensor([-0.5, 0.5, 1.2]).view(1, 3, 1, 1) - mean
    assert float(Bounds(1.0)(levels, mean)) == pytest.approx((0.25 + 0.04) / 3, rel=1e-5)
    back = (Clamp()(levels, mean) + mean) / 255
    assert back.flatten().tolist() == pytest.approx([0, 0.5, 1])
    ball = NormBall(10.0)
    x = torch.tensor([3.0, 4, 0]).view(1, 3, 1, 1)
    assert torch.equal(ball(x, mean), x)
    assert ball(10 * x, mean).flatten().tolist() == pytest.approx([6, 8, 0], rel=1e-6)


# ---------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("group", preimage.LAMBDAS_2015)
def test_objective_of_2015_is_the_published_formula(group):
    """E = ‖Φ(σx) − Φ₀‖²/‖Φ₀‖² + 2.16e8 Σ|x|⁶ + λ TV²(x), at 227 px, in NumPy."""
    settings = preimage.preset("mahendran2015", group=group)
    lambdas = {"shallow": 0.5, "middle": 5.0, "deep": 50.0}
    shape = (3, 227, 227)
    images = rand(1, *shape)
    matcher = nn.AvgPool2d(8)
    reference = preimage.codes(matcher, rand(1, *shape, seed=1))
    found = preimage.invert(
        reference, matcher, replace(settings, schedule=(Phase(1),)), shape=shape, start=images
    )
    mean = np.array([123.68, 116.78, 103.94]).reshape(3, 1, 1)
    sigma = (2.16e8 / 4e-10) ** 0.25
    assert settings.rms * math.sqrt(math.prod(shape)) == pytest.approx(sigma)
    x = (255 * images[0].numpy() - mean) / sigma
    across = np.diff(x, axis=2, append=x[:, :, -1:])
    down = np.diff(x, axis=1, append=x[:, -1:])
    y0 = reference["codes"][0].numpy()
    y = matcher(images)[0].numpy()
    wanted = (
        ((y - y0) ** 2).sum() / (y0**2).sum()
        + 2.16e8 * (x**6).sum()
        + lambdas[group] * (across**2 + down**2).sum()
    )
    assert float(found.history["total"][0]) == pytest.approx(wanted, rel=1e-9)


def test_schedules_are_published():
    first = preimage.preset("mahendran2015")
    assert [(p.steps, p.factor) for p in first.schedule] == [(100, 1), (200, 0.1), (100, 0.01)]
    shallow = preimage.preset("mahendran2015_descriptors")
    assert shallow.steps == 800
    assert [p.factor for p in shallow.schedule] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert (first.optimiser.rate, first.optimiser.momentum) == (0.004, 0.9)
    assert first.transforms == ()
    later = preimage.preset("mahendran2016", group="relu4", stride=16)
    assert [(p.steps, p.factor) for p in later.schedule] == [(300, 1), (50, 0.1)]
    assert [p.transforms for p in later.schedule] == [True, False]
    assert later.optimiser.rate == pytest.approx(0.05 * 80**2 / 6)
    assert later.optimiser.momentum == 0.9
    assert later.data_weight == 100
    assert later.transforms == (Jitter(4),)
    assert later.projection == NormBall(160.0)
    assert [preimage.jitter_for_stride(s) for s in (1, 2, 4, 10, 32)] == [1, 1, 1, 3, 8]


def test_objective_of_2016_is_the_published_formula():
    """E = C‖Φ(x) − Φ₀‖²/‖Φ₀‖² + Σ(‖x_p‖/80)⁶/HW + (6.5/80)² TV²(x)/HW, x in levels."""
    settings = replace(preimage.preset("mahendran2016", group="relu3"), schedule=(Phase(1),))
    images = rand(1, *SHAPE)
    found = invert(rand(1, *SHAPE, seed=1), settings=settings, start=images)
    x = 255 * images[0].numpy() - np.array([123.68, 116.78, 103.94]).reshape(3, 1, 1)
    y, y0 = (linear(v)[0].numpy() for v in (images, rand(1, *SHAPE, seed=1)))
    across = np.diff(x, axis=2, append=x[:, :, -1:])
    down = np.diff(x, axis=1, append=x[:, -1:])
    wanted = (
        300 * ((y - y0) ** 2).sum() / (y0**2).sum()
        + (((x**2).sum(0)) ** 3).sum() / 30 / 80**6
        + (6.5 / 80) ** 2 * (across**2 + down**2).sum() / 30
    )
    assert float(found.history["total"][0]) == pytest.approx(wanted, rel=1e-9)


def objective(settings, reference, weights):
    """The objective as a function of levels, written apart."""
    mean = torch.tensor([123.68, 116.78, 103.94], dtype=torch.float64).view(3, 1, 1)

    def value(x):
        y = linear((x + mean) / 255)
        total = weights["data"] * (y - reference).square().sum() / reference.square().sum()
        for prior in settings.priors:
            total = total + prior.weight * prior(x, mean).sum()
        return total

    return value, mean


def test_steps_of_2015_by_hand():
    """Momentum on x/σ, begun anew where the learning rate changes."""
    settings = replace(preimage.preset("mahendran2015"), schedule=(Phase(2), Phase(2, 0.1)))
    truth, start = rand(1, *SHAPE), rand(1, *SHAPE, seed=1)
    found = invert(truth, settings=settings, start=start)
    value, mean = objective(settings, linear(truth), settings.weights())
    sigma = settings.rms * math.sqrt(90)
    x, m = (255 * start - mean) / sigma, 0.0
    for step, rate in enumerate((0.004, 0.004, 0.0004, 0.0004)):
        m = 0.0 if step == 2 else m
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(sigma * x), x)
        m = 0.9 * m - rate * gradient
        x = x + m
    wanted = (sigma * x.detach() + mean) / 255
    torch.testing.assert_close(found.images[:, 0, 0], wanted, rtol=1e-10, atol=1e-12)


def test_steps_of_2016_by_hand():
    settings = replace(
        preimage.preset("mahendran2016", group="relu3"), schedule=(Phase(3), Phase(2, 0.1))
    )
    truth, start = rand(1, *SHAPE), 1.6 * rand(1, *SHAPE, seed=1)
    found = invert(truth, settings=settings, start=start)
    value, mean = objective(settings, linear(truth), settings.weights())
    x, m, squares = 255 * start - mean, 0.0, 0.0
    for step in range(5):
        rate = 30 * 0.05 * 80**2 / 6 * (1 if step < 3 else 0.1)
        if step == 3:
            m = squares = 0.0
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        squares = 0.9 * squares + gradient**2
        m = 0.9 * m - gradient / (1 / rate + squares**0.5)
        x = x + m
        norm = x.square().sum(1, keepdim=True).sqrt()
        x = x * (160 / norm).clamp(max=1)
    wanted = (x.detach() + mean) / 255
    torch.testing.assert_close(found.images[:, 0, 0], wanted, rtol=1e-10, atol=1e-12)


def test_steps_of_adam_by_hand():
    settings = config(6, optimiser=Adam(2.0))
    truth, start = rand(1, *SHAPE), rand(1, *SHAPE, seed=1)
    found = invert(truth, settings=settings, start=start)
    value, mean = objective(settings, linear(truth), settings.weights())
    x, m, v = 255 * start - mean, 0.0, 0.0
    for t in range(1, 7):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 2.0 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    torch.testing.assert_close(found.images[:, 0, 0], (x.detach() + mean) / 255)


def test_starts_have_the_published_scale():
    for start, check in (
        ("normal", lambda x: x.norm() / math.sqrt(x.numel())),
        ("uniform", lambda x: x.flatten().sort().values[int(0.95 * x.numel())]),
    ):
        settings = config(1, parameterisation=Pixels(start))
        found = invert(rand(1, 3, 40, 40), matcher=nn.AvgPool2d(4), settings=settings,
                       snapshots=[0])  # fmt: skip
        mean = torch.tensor(settings.mean).double().view(3, 1, 1)
        level = float(check(255 * found.snapshots[0][0, 0, 0] - mean))
        wanted = settings.rms if start == "normal" else 80 / math.sqrt(3)
        assert level == pytest.approx(wanted, rel=1e-3)


# ------------------------------------------------------------------------------- toy problems


def test_a_linear_invertible_descriptor_gives_the_image_back():
    truth = rand(2, *SHAPE)
    found = invert(truth, settings=config(400), restarts=2)
    for restart in range(2):
        torch.testing.assert_close(found.images[:, restart, 0], truth, rtol=0, atol=1e-6)
    assert float(found.error["codes"].max()) < 1e-6
    assert found.images.shape == (2, 2, 1, *SHAPE)
    assert found.history["data"].shape == (400, 2, 2, 1)
    assert found.status == "finished"
    assert found.steps.tolist() == [[[400]] * 2] * 2
    # relative error is the root of what was matched, one step later
    last = found.history["data"][-1].sqrt()
    assert bool((found.error["codes"] <= last).all())


@pytest.mark.parametrize("objective", ["cosine", "inner"])
def test_other_objectives(objective):
    truth = rand(1, *SHAPE)
    settings = config(400, projection=Clamp() if objective == "inner" else None)
    found = invert(truth, settings=settings, terms=[Term(objective=objective)])
    y, y0 = linear(found.images[:, 0, 0]), linear(truth)
    if objective == "cosine":
        assert float(F.cosine_similarity(y, y0)) > 0.999
        assert float(found.history["data"][-1]) < 1e-3
    else:  # the box's corner that points along y0
        gain = (linear(torch.eye(90).double().view(90, *SHAPE)) * y0).sum(1).view(SHAPE)
        assert torch.equal(found.images[0, 0, 0].round(), (gain > 0).double())
        expected = -(linear((gain > 0).double()[None]) * y0).sum() / y0.square().sum()
        assert float(found.history["data"][-1]) == pytest.approx(float(expected), rel=1e-6)


def test_several_codes_with_weights():
    truth = rand(1, 3, 8, 8)
    terms = [Term("soft", weight=2.0), Term("pooled", "cosine", weight=0.5)]
    found = invert(truth, matcher=curved, terms=terms, snapshots=[0])
    images = found.snapshots[0][:, 0, 0]
    y, y0 = curved(images), curved(truth)
    first = (y["soft"] - y0["soft"]).square().sum() / y0["soft"].square().sum()
    second = 1 - F.cosine_similarity(y["pooled"].flatten(1), y0["pooled"].flatten(1))
    wanted = float(2 * first + 0.5 * second)
    assert float(found.history["data"][0]) == pytest.approx(wanted, rel=1e-9)
    assert set(found.error) == {"soft", "pooled"}


def test_matchers_of_several_kinds_together():
    encoder = small_encoder().double()
    matcher = {"net": Taps(encoder, ["0", "2"]), "mean": nn.AvgPool2d(4)}
    found = preimage.codes(matcher, rand(2, 3, 32, 32))
    assert {name: tuple(code.shape[1:]) for name, code in found.items()} == {
        "net/0": (4, 16, 16),
        "net/2": (6, 8, 8),
        "mean": (3, 8, 8),
    }
    settings = replace(QUICK, optimiser=Momentum())
    result = preimage.invert(found, matcher, settings, shape=(3, 32, 32))
    assert set(result.error) == set(found)
    assert float(result.history["data"][-1].max()) < float(result.history["data"][0].min())


def test_descriptors_plug_in():
    hog = descriptors.make("hogb")
    truth = rand(1, 1, 48, 48, seed=2)
    found = invert(truth, matcher=hog, settings=replace(QUICK, schedule=(Phase(3),)))
    assert found.images.shape == (1, 1, 1, 1, 48, 48)
    assert bool(found.images.isfinite().all())


def test_the_forward_pass_ends_at_the_deepest_tap():
    encoder = small_encoder()
    ran = []
    for name, module in encoder.net.named_children():
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
    tap = Taps(encoder, ["2", "0"])
    found = invert(rand(1, 3, 32, 32, dtype=torch.float32), tap, replace(QUICK, check_every=2))
    assert set(found.error) == {"2", "0"}
    ran.clear()
    tap(rand(1, 3, 32, 32, dtype=torch.float32))
    assert ran in (["0", "1"], ["0", "1", "2"])  # the stop may come before this hook of "2"
    hooks = [len(module._forward_hooks) for module in encoder.net.children()]
    assert hooks == [1] * 8


def test_regions_and_groups():
    code = torch.arange(2 * 4 * 13 * 13).double().view(2, 4, 13, 13)
    central = Term(positions=5).select(code)
    assert torch.equal(central, code[:, :, 4:9, 4:9].flatten(1))
    window = Term(positions=(1, 2, 3, 4), channels="second").select(code)
    assert torch.equal(window, code[:, 2:, 1:4, 2:6].flatten(1))
    mask = torch.zeros(13, 13, dtype=torch.bool)
    mask[0, 3] = mask[7, 7] = True
    picked = Term(positions=mask, channels=[3]).select(code)
    assert torch.equal(picked, torch.stack([code[:, 3, 0, 3], code[:, 3, 7, 7]], 1))
    for term, words in (
        (Term(positions=14), "not within the 13x13 grid"),
        (Term(positions=(0, 10, 2, 4)), "not within"),
        (Term(channels=[4]), "indices from 0 to 3"),
        (Term(positions=mask[:5]), "mask of positions"),
    ):
        with pytest.raises(ValueError, match=words):
            term.select(code)
    with pytest.raises(ValueError, match="no positions"):
        Term(positions=2).select(code.flatten(1))


def test_only_the_chosen_region_is_matched():
    truth = rand(1, 3, 8, 8)
    identity = nn.Identity()
    settings = config(400, parameterisation=Pixels("mean"))
    found = invert(truth, matcher=identity, settings=settings, terms=[Term(positions=2)])
    image = found.images[0, 0, 0]
    torch.testing.assert_close(image[:, 3:5, 3:5], truth[0, :, 3:5, 3:5], rtol=0, atol=1e-6)
    mean = torch.tensor(settings.mean).double() / 255
    torch.testing.assert_close(image[:, 0, 0], mean)


# ------------------------------------------------------------------------------- parameterisation


@pytest.mark.parametrize(
    ("kind", "rate"), [(Fourier(), 0.1), (DeepImagePrior(width=8, depth=2), 0.02)]
)
def test_other_parameterisations_fit_and_stay_within_bounds(kind, rate):
    truth = F.interpolate(rand(2, 3, 4, 4), (17, 14), mode="bilinear")
    settings = config(60, parameterisation=kind, optimiser=Adam(rate))
    matcher = nn.AvgPool2d(2)
    found = invert(truth, matcher=matcher, settings=settings, restarts=2)
    assert found.images.shape == (2, 2, 1, 3, 17, 14)
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1
    data = found.history["data"]
    assert float((data[-1] / data[0]).max()) < 0.2
    alone = preimage.invert(
        preimage.codes(matcher, truth[1:]), matcher, settings, shape=(3, 17, 14), seeds=[1],
    )  # fmt: skip
    torch.testing.assert_close(alone.images[0, 0], found.images[1, 0], rtol=0, atol=1e-7)


def test_the_fourier_start_is_grey_and_smooth():
    settings = config(1, parameterisation=Fourier(), optimiser=Adam(0.1))
    found = invert(rand(1, 3, 16, 16), nn.AvgPool2d(2), settings, snapshots=[0])
    assert float((found.snapshots[0] - 0.5).abs().max()) < 0.1


def test_parameterisations_are_checked():
    with pytest.raises(ValueError, match="use Adam for Fourier"):
        Config(parameterisation=Fourier())
    with pytest.raises(ValueError, match="within \\[0, 1\\] by itself"):
        Config(parameterisation=DeepImagePrior(), optimiser=Adam(), projection=Clamp())
    settings = config(1, parameterisation=DeepImagePrior(depth=3), optimiser=Adam())
    with pytest.raises(ValueError, match="at least 16 x 16 px"):
        invert(rand(1, 3, 12, 12), nn.AvgPool2d(2), settings)
    with pytest.raises(ValueError, match="did you mean 'normal'"):
        Pixels("norml")


# ------------------------------------------------------------------------------------- transforms


def test_jitter_gives_windows_of_a_canvas_and_the_centre_at_the_end():
    seen = []

    def spy(images):
        seen.append(images.detach().clone())
        return images

    settings = config(
        40, rate=1e-9, transforms=(Jitter(4),), schedule=(Phase(40), Phase(1, transforms=False))
    )
    found = invert(rand(1, *SHAPE), spy, settings, validate=False)
    assert {tuple(x.shape) for x in seen} == {(1, *SHAPE)}
    distinct = {store.digest((x * 1e4).round()) for x in seen[1:41]}
    assert 10 < len(distinct) <= 16  # of 16 windows
    torch.testing.assert_close(seen[41], found.images[0, 0], rtol=0, atol=1e-6)


def test_scale_and_rotation_move_as_they_say():
    """A bright pixel off the centre, turned and scaled, is where geometry puts it."""
    spot = torch.zeros(1, 1, 21, 31).double()
    spot[..., 10, 25] = 1  # 10 px right of the centre

    def centroid(transforms, seed):
        seen = []

        def spy(images):
            seen.append(images.detach()[0, 0])
            return images

        settings = config(1, rate=1e-12, transforms=transforms)
        # the code of anything else: what is looked at is the start image, transformed
        preimage.invert(
            rand(1, 1, 21, 31), spy, settings, shape=(1, 21, 31), start=spot, seeds=[seed],
            validate=False,
        )  # fmt: skip
        weight = seen[0].clamp(min=0) / seen[0].clamp(min=0).sum()
        rows, columns = torch.meshgrid(
            torch.arange(21.0) - 10, torch.arange(31.0) - 15, indexing="ij"
        )
        return float((weight * rows).sum()), float((weight * columns).sum())

    assert centroid((), 0) == pytest.approx((0, 10), abs=1e-6)
    row, column = centroid((RandomScale(1.3, 1.3),), 0)
    assert (row, column) == pytest.approx((0, 13), abs=0.3)
    angles = []
    for seed in range(6):
        row, column = centroid((RandomRotation(30.0),), seed)
        assert math.hypot(row, column) == pytest.approx(10, abs=0.3)
        angles.append(math.degrees(math.atan2(row, column)))
    assert max(map(abs, angles)) <= 31
    assert min(angles) < 0 < max(angles)


def test_transforms_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        Jitter(0)
    with pytest.raises(ValueError, match="must not exceed"):
        RandomScale(1.2, 1.0)
    with pytest.raises(ValueError, match="once"):
        Config(transforms=(Jitter(2), Jitter(3)))
    with pytest.raises(ValueError, match="unknown transform 'Clamp'"):
        Config(transforms=(Clamp(),))


# -------------------------------------------------------------- batches, seeds, stopping, resuming


def test_a_result_does_not_depend_on_the_batch():
    truth = rand(3, 3, 16, 16, dtype=torch.float32)
    settings = replace(QUICK, transforms=(Jitter(3), RandomRotation(3.0)))
    tap = Taps(small_encoder(), ["0", "2"])
    options = {"restarts": 2, "penalties": {"tv": [0.5, 5.0]}, "allow_small": True}
    whole = invert(truth, tap, settings, seeds=[7, 8, 9], **options)
    parts = invert(truth, tap, settings, seeds=[7, 8, 9], batch_size=5, **options)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-5)
    alone = invert(truth[2:], tap, settings, seeds=[9], **options)
    torch.testing.assert_close(alone.images[0], whole.images[2], rtol=0, atol=1e-5)
    one = invert(
        truth[1:2], tap, settings.with_weight("tv", 5.0), seeds=[8], allow_small=True
    )  # fmt: skip
    torch.testing.assert_close(one.images[0, 0, 0], whole.images[1, 0, 1], rtol=0, atol=1e-5)
    again = invert(truth, tap, settings, seeds=[7, 8, 9], **options)
    assert torch.equal(again.images, whole.images)
    assert not torch.allclose(whole.images[:, 0], whole.images[:, 1], atol=0.05)


def test_a_bar_and_an_iterable_of_criteria(capsys):
    found = invert(rand(1, *SHAPE), progress=True, stop=[lambda told: told.step >= 10])
    assert found.status == "stopped"
    assert int(found.steps) == 10
    assert "objective" in capsys.readouterr().err


def test_threads_change_nothing_of_note():
    before, settings = torch.get_num_threads(), replace(QUICK, optimiser=Momentum())
    truth, tap = rand(2, 3, 32, 32, dtype=torch.float32), Taps(small_encoder(), "2")
    try:
        torch.set_num_threads(1)
        one, again = invert(truth, tap, settings), invert(truth, tap, settings)
        torch.set_num_threads(2)
        two = invert(truth, tap, settings)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.images, again.images)
    torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-4)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    invert(rand(1, *SHAPE), settings=replace(QUICK, transforms=(Jitter(2),)))
    assert torch.equal(torch.get_rng_state(), state)


def test_penalties_are_those_of_separate_runs():
    truth = rand(2, *SHAPE)
    found = invert(truth, penalties={"tv": [0.5, 1.0, 2.0], "data": [1.0, 2.0, 3.0]})
    assert found.weights["tv"][0, 0].tolist() == [0.5, 1, 2]
    assert found.weights["data"][1, 0].tolist() == [1, 2, 3]
    one = invert(truth, settings=QUICK.with_weight("tv", 2.0).with_weight("data", 3.0))
    torch.testing.assert_close(one.images[:, :, 0], found.images[:, :, 2])
    own = invert(truth, penalties={"tv": torch.tensor([[0.5], [2.0]])})
    other = invert(truth, penalties={"tv": [0.5, 2.0]})
    torch.testing.assert_close(own.images[1, 0, 0], other.images[1, 0, 1])


@pytest.mark.parametrize(
    "settings",
    [
        replace(QUICK, transforms=(Jitter(3), RandomScale())),
        replace(preimage.preset("mahendran2016", stride=8), schedule=(Phase(8), Phase(4, 0.1))),
        SPECTRAL,
    ],
)
def test_resuming_is_exact(settings, tmp_path):
    truth, path = rand(2, *SHAPE, dtype=torch.float32), tmp_path / "run.safetensors"
    options = {"snapshots": [0, 3, 10], "restarts": 2}
    whole = invert(truth, settings=settings, **options)
    first = invert(truth, settings=settings, checkpoint=path, stop_after=5, **options)
    assert first.status == "paused"
    assert list(first.snapshots) == [0, 3]
    second = invert(truth, settings=settings, checkpoint=path, **options)
    assert second.status == "finished"
    assert torch.equal(second.images, whole.images)
    assert all(torch.equal(second.history[k], whole.history[k]) for k in whole.history)
    assert all(torch.equal(second.snapshots[k], whole.snapshots[k]) for k in whole.snapshots)
    with pytest.raises(store.MismatchError, match="config"):
        invert(truth, settings=replace(settings, check_every=3), checkpoint=path, **options)
    with pytest.raises(store.MismatchError, match="references"):
        invert(truth + 0.1, settings=settings, checkpoint=path, **options)


def test_an_interrupt_returns_the_best_so_far_and_can_be_continued(tmp_path):
    calls = []

    def interrupted(images):
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return linear(images)

    truth, path = rand(1, *SHAPE), tmp_path / "run.safetensors"
    # a rate at which the objective rises now and then
    settings = config(12, rate=2.5)
    known = preimage.codes(linear, truth)
    options = {"shape": SHAPE, "validate": False, "checkpoint": path, "snapshots": range(13)}
    found = preimage.invert(known, interrupted, settings, **options)
    assert found.status == "interrupted"
    total = found.history["total"][:, 0, 0, 0]
    assert len(total) == 8
    best = found.snapshots[int(total.argmin())]
    assert torch.equal(found.images, best)
    calls.extend([0] * 100)
    rest = preimage.invert(known, interrupted, settings, **options)
    whole = preimage.invert(known, linear, settings, shape=SHAPE)
    assert torch.equal(rest.images, whole.images)


def test_stop_criteria_end_items_one_by_one():
    truth = torch.cat([rand(1, *SHAPE), 0.05 * rand(1, *SHAPE, seed=1) + 0.45])
    settings = config(200, parameterisation=Pixels("mean"), check_every=1)
    found = invert(truth, settings=settings, stop=preimage.target_error(0.1))
    assert found.status == "stopped"
    steps = found.steps[:, 0, 0].tolist()
    assert steps[1] < steps[0] < 100
    assert float(found.error["codes"].max()) < 0.12
    history = found.history["data"][:, 1, 0, 0]
    assert int(history.isfinite().sum()) == steps[1]
    alone = invert(truth[:1], settings=settings, stop=[preimage.target_error(0.1)])
    torch.testing.assert_close(alone.images[0], found.images[0])
    quiet = invert(truth, settings=settings, stop=preimage.plateau(1e-3, window=5))
    assert quiet.status in ("stopped", "finished")
    with pytest.raises(ValueError, match="stop criterion must give"):
        invert(truth, settings=settings, stop=lambda progress: torch.zeros(2))


def test_plateau():
    loss = torch.tensor([[4.0, 4.0]] * 3 + [[3.999, 2.0]] * 3)
    told = preimage.Progress(6, loss, loss)
    answer = preimage.plateau(1e-2, window=3)(told)
    assert torch.as_tensor(answer).tolist() == [True, False]
    assert preimage.plateau(1e-2, window=4)(told) is False


def test_nan_ends_an_item_at_its_best_image():
    calls = []

    def breaks(images):
        calls.append(0)
        code = linear(images)
        if len(calls) == 5:
            hurt = torch.zeros_like(code)
            hurt[1] = math.nan
            code = code + hurt
        return code

    truth = rand(2, *SHAPE)
    known = preimage.codes(linear, truth)
    options = {"shape": SHAPE, "validate": False, "snapshots": range(13)}
    with pytest.warns(RuntimeWarning, match="1 of 2 items, first at step 4 .image 1, restart 0"):
        found = preimage.invert(known, breaks, QUICK, **options)
    assert found.failed_at[:, 0, 0].tolist() == [-1, 4]
    assert found.steps[:, 0, 0].tolist() == [12, 4]
    # the objective was finite for the images after 0, 1, 2 and 3 steps
    best = int(found.history["total"][:4, 1, 0, 0].argmin())
    assert best > 0
    assert torch.equal(found.images[1], found.snapshots[best][1])
    assert found.history["total"][4:, 1].isnan().all()
    whole = preimage.invert(known, linear, QUICK, shape=SHAPE)
    torch.testing.assert_close(found.images[0], whole.images[0])
    calls.clear()
    with pytest.raises(preimage.NonFiniteError, match="step 4") as caught:
        preimage.invert(known, breaks, QUICK, on_failure="raise", **options)
    assert torch.equal(caught.value.result.images, found.images)


def test_divergence_is_reported():
    with pytest.warns(RuntimeWarning, match="smaller learning rate"):
        found = invert(rand(1, *SHAPE), settings=config(400, rate=1e6))
    assert found.status == "failed"
    assert bool(found.images.isfinite().all())
    assert float(found.images.abs().max()) < 10  # the best it had, not where it went


def test_units_that_are_off_for_noise_can_be_matched():
    matcher = nn.ReLU()

    def shifted(x):
        return {"relu": torch.cat([matcher(x), matcher(x - 2)], 1)}

    truth = 3 * rand(1, *SHAPE)
    preimage.check(
        preimage.codes(shifted, truth), shifted, shape=SHAPE, terms=[Term("relu", channels=[4])]
    )


# ------------------------------------------------------------------------- discrepancy and errors


def test_discrepancy_principle():
    """Tikhonov-like toy: the identity with a quadratic prior has a closed form."""
    truth = torch.stack([rand(*SHAPE), 0.5 * rand(*SHAPE, seed=1)])

    @dataclasses.dataclass(frozen=True)
    class Ridge:
        weight: float
        name = "ridge"

        def __call__(self, x, mean):
            return ((x + mean) / 255).square().sum((1, 2, 3)) / norm

    # the data term is ‖x − x₀‖²/‖x₀‖²; with ‖x‖²·λ/‖x₀‖² the relative error is λ/(1 + λ)
    found = []
    for i, wanted in ((0, 0.2), (1, 0.05)):
        norm = truth[i].square().sum()
        found.append(
            preimage.discrepancy(
                truth[i : i + 1],
                nn.Identity(),
                config(150, rate=0.3, priors=(Ridge(1.0),)),
                target=wanted,
                shape=SHAPE,
                penalty="ridge",
                low=1e-3,
                high=10.0,
                points=5,
                rounds=4,
            )
        )
        assert bool(found[i].reached)
        assert float(found[i].error) <= wanted
        assert float(found[i].weight) == pytest.approx(wanted / (1 - wanted), rel=0.1)
        assert found[i].tried.shape == (1, 20, 2)
        tried = found[i].tried[0][found[i].tried[0][:, 0] < 5]  # beyond, the steps are too large
        torch.testing.assert_close(tried[:, 1], tried[:, 0] / (1 + tried[:, 0]), atol=1e-3, rtol=0)
        near = (found[i].images - truth[i : i + 1]).norm() / truth[i].norm()
        assert float(near) == pytest.approx(float(found[i].error), rel=1e-6)


def test_discrepancy_that_cannot_be_reached_says_so():
    truth = rand(1, *SHAPE)
    known = preimage.codes(linear, truth)
    found = preimage.discrepancy(known, linear, QUICK, target=1e-9, shape=SHAPE, points=3)
    assert not bool(found.reached)
    assert float(found.weight) == pytest.approx(0.05)
    for options, words in (
        ({"penalty": "data"}, "unknown prior"),
        ({"penalty": "tvv"}, "did you mean 'tv'"),
        ({"low": 2.0, "high": 1.0}, "0 < low < high"),
        ({"restarts": 2}, "not options"),
        ({"target": 0.0}, "target must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            preimage.discrepancy(known, linear, QUICK, shape=SHAPE, **{"target": 0.1, **options})


def test_errors_are_the_papers_and_the_codes():
    truth = rand(4, 3, 16, 16)
    guess = (truth + 0.1 * (rand(4, 3, 16, 16, seed=1) - 0.5)).clamp(0, 1)
    matcher = nn.AvgPool2d(2)
    known = preimage.codes(matcher, truth)
    encoder = small_encoder().double()
    found = preimage.errors(guess, matcher, known, originals=truth, classifier=encoder)
    y, y0 = (matcher(v).flatten(1).numpy() for v in (guess, truth))
    apart = [np.linalg.norm(y0[i] - y0[j]) for i in range(4) for j in range(4) if i != j]
    distance = np.linalg.norm(y - y0, axis=1)
    np.testing.assert_allclose(found.normalised, distance / np.mean(apart))
    np.testing.assert_allclose(found.squared, distance**2 / np.mean(np.square(apart)))
    np.testing.assert_allclose(found.relative, distance / np.linalg.norm(y0, axis=1))
    assert found.image is not None
    assert found.ssim is not None
    assert found.image_rms is not None
    assert found.agreement is not None
    flat = (guess - truth).flatten(1).norm(dim=1) / stats.mean_pairwise_distance(truth)
    torch.testing.assert_close(found.image, flat)
    rms = (guess - truth).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(found.image_rms, rms)
    assert bool((found.ssim > 0.8).all())
    assert bool((found.ssim < 1).all())
    same = preimage.errors(truth, matcher, known, originals=truth, classifier=encoder)
    assert float(same.normalised.max()) == 0
    assert same.ssim is not None
    torch.testing.assert_close(same.ssim, torch.ones(4).double())
    assert same.agreement is not None
    assert float(same.agreement.top1.min()) == 1
    scaled = preimage.errors(guess, matcher, known, pool=(2.0, 4.0))
    np.testing.assert_allclose(scaled.normalised, distance / 2)
    with pytest.raises(ValueError, match="at least two items"):
        preimage.errors(guess[:1], matcher, {"codes": known["codes"][:1]})
    with pytest.raises(ValueError, match="at least 11 x 11"):
        preimage.structural_similarity(truth[..., :8, :8], guess[..., :8, :8])


# -------------------------------------------------------------------------------------- bad input


def test_a_code_without_gradient_is_named():
    truth = rand(1, *SHAPE)
    for matcher, words in (
        (lambda x: linear(x).detach(), "receives no gradient from the image"),
        (lambda x: linear(x).round() + 0 * linear(x), "zero everywhere"),
        (lambda x: 0 * linear(x) + 1, "is constant"),
        (lambda x: (linear(x) * math.inf).nan_to_num(nan=1.0) * math.inf, "is not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            preimage.invert({"codes": linear(truth)}, matcher, QUICK, shape=SHAPE)


def test_a_zero_reference_is_named():
    known = linear(rand(3, *SHAPE))
    known[1] = 0
    with pytest.raises(ValueError, match="'codes' of image 1 is zero everywhere"):
        preimage.invert(known, linear, QUICK, shape=SHAPE)
    known[1] = math.nan
    with pytest.raises(ValueError, match="'codes' of image 1 is not finite"):
        preimage.invert(known, linear, QUICK, shape=SHAPE)
    encoder = small_encoder(dead=True)
    tap = Taps(encoder, "3")
    with pytest.raises(ValueError, match="'3' of image 0 is zero"):
        invert(rand(1, 3, 32, 32, dtype=torch.float32), tap)
    # zero where it is looked at, though not elsewhere
    part = torch.ones(1, 3, 4, 4)
    part[:, 1] = 0
    with pytest.raises(ValueError, match="zero everywhere"):
        preimage.invert(part, nn.Identity(), QUICK, shape=(3, 4, 4), terms=[Term(channels=[1])])


def test_images_that_are_too_small_are_named():
    tap = Taps(small_encoder(), "4")
    truth = rand(1, 3, 12, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match="receptive field of layer '4', 15 px"):
        invert(truth, tap)
    assert invert(truth, tap, allow_small=True).status == "finished"
    with pytest.raises(ValueError, match=r"2 x 2 px \(too small"):
        preimage.invert(torch.ones(1, 3, 1, 1), nn.AvgPool2d(4), QUICK, shape=(3, 2, 2))
    with pytest.raises(ValueError, match="at least"):
        preimage.invert(
            torch.ones(1, 27, 1, 1), descriptors.make("hog"), QUICK, shape=(1, 4, 4)
        )  # fmt: skip


def test_shapes_are_compared():
    with pytest.raises(ValueError, match=r"has shape \(90,\), images of 6 x 6 px give"):
        preimage.invert(linear(rand(1, *SHAPE)), lambda x: x.flatten(1), QUICK, shape=(3, 6, 6))
    with pytest.raises(ValueError, match=r"must be \(C, H, W\)"):
        preimage.invert(linear(rand(1, *SHAPE)), linear, QUICK, shape=(6, 5))
    with pytest.raises(ValueError, match="must give a tensor"):
        preimage.codes(lambda x: x.mean(), rand(2, *SHAPE))


def test_unknown_names():
    truth = rand(1, *SHAPE)
    for call, words in (
        (lambda: preimage.preset("mahendran15"), "did you mean 'mahendran2015'"),
        (lambda: preimage.preset("mahendran2015", group="deeep"), "did you mean 'deep'"),
        (lambda: preimage.preset("mahendran2015", stride=4), "no jitter"),
        (lambda: Term(objective="l1"), "unknown objective 'l1'"),
        (lambda: Term(channels="third"), "unknown group of channels"),
        (lambda: Config(keep="worst"), "unknown keep"),
        (lambda: Config(schedule=()), "no phase"),
        (lambda: Config(priors=(AlphaNorm(1.0), AlphaNorm(2.0))), "names of their own"),
        (lambda: invert(truth, penalties={"tvs": [1.0]}), "did you mean 'tv'"),
        (lambda: invert(truth, penalties={"tv": []}), "not none"),
        (lambda: invert(truth, penalties={"tv": [1.0], "alpha": [1.0, 2.0]}), "equally many"),
        (lambda: invert(truth, terms=[Term("code")]), "did you mean 'codes'"),
        (lambda: invert(truth, seeds=[1, 2]), "2 seeds for 1 images"),
        (lambda: invert(truth, snapshots=[13]), "from 0 to 12"),
        (lambda: invert(truth, start=truth[:, :1]), "start must be"),
        (lambda: invert(truth, start=truth, settings=SPECTRAL), "start is for Pixels"),
        (lambda: invert(truth, restarts=0), "restarts must be"),
        (lambda: invert(truth, on_failure="stop"), "unknown on_failure"),
        (lambda: Taps(small_encoder(), "9"), "has no layer '9'"),
        (lambda: TotalVariation(-1.0), "weight of a prior"),
        (lambda: preimage.total_variation(torch.ones(1, 3, 2, 2), 0.5), "beta must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_real_tap_improves(squeezenet, picture):
    """A layer of a trained network, few steps of the published recipe."""
    image = picture("china", 64)[None]
    tap = Taps(squeezenet, "features.0")
    settings = preimage.preset("mahendran2015")
    settings = replace(settings, schedule=(Phase(15), Phase(5, 0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = invert(image, tap, settings)
    total = found.history["total"][:, 0, 0, 0]
    assert float(total[-1]) < 0.5 * float(total[0])
    assert not [m for m in squeezenet.modules() if m._forward_hooks]


def test_optimisers_are_checked():
    for make in (Momentum, DecayedAdagrad, Adam):
        with pytest.raises(ValueError, match="rate must be above 0"):
            make(rate=-1.0)


def test_with_contrast_of_is_the_best_affine_fit():
    originals, found = rand(2, 1, 6, 5), 0.3 + 0.1 * rand(2, 1, 6, 5, seed=1)
    fitted = preimage.with_contrast_of(found, originals)
    for n in range(2):
        x, y = (images[n].flatten().numpy() for images in (found, originals))
        slope, offset = np.polyfit(x, y, 1)
        wanted = np.clip(slope * x + offset, 0, 1)
        np.testing.assert_allclose(fitted[n].flatten().numpy(), wanted, rtol=1e-9)
    dark = 0.2 * originals + 0.1
    torch.testing.assert_close(preimage.with_contrast_of(dark, originals), originals)
    with pytest.raises(ValueError, match="of one shape"):
        preimage.with_contrast_of(found, originals[:1])
