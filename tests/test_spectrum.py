"""Spectra against known signals, and networks whose strides say where the peaks must be."""

import math
from typing import Any, cast

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fmlib import encoders, shift, spectrum
from fmlib.encoders import Encoder

LENGTH = 64


def wave(frequency, length=LENGTH, *, amplitude=1.0, phase=0.3):
    place = torch.arange(length, dtype=torch.float64)
    return amplitude * torch.sin(2 * math.pi * frequency * place + phase)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cutouts(count=2, side=60):
    """Noise of pixel size, which strides alias, within soft discs."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    alpha = ((1.1 - (y**2 + x**2).sqrt()) * 4).clamp(0, 1)
    generator = torch.Generator().manual_seed(1)
    return [
        torch.cat([torch.rand(3, side, side, generator=generator), alpha[None]])
        for _ in range(count)
    ]


class Blur(nn.Module):
    """Binomial filter with stride 2."""

    def forward(self, x):
        line = x.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
        return F.conv2d(x, kernel, stride=2, padding=2, groups=x.shape[1])


class Ramp(nn.Module):
    """Half of the channels grow from left to right: a positional bias, but no stride."""

    def forward(self, x):
        gain = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        first, second = x.chunk(2, dim=1)
        return torch.cat([first * gain, second], dim=1)


def convolution(inputs, outputs, stride, *, seed):
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return conv


def net(*strides, last=(), blur=False):
    """Convolution and ReLU for each stride; with `blur` subsampled by a binomial filter after."""
    modules, inputs = [], 3
    for seed, stride in enumerate(strides):
        wide = blur and stride == 2
        modules += [convolution(inputs, 8, 1 if wide else stride, seed=seed), nn.ReLU()]
        modules += [Blur()] if wide else []
        inputs = 8
    return Encoder(nn.Sequential(*modules, *last), name="hand-made", input_size=128)


def deepest(encoder):
    return list(encoder.net.named_children())[-1][0]


def spectra(encoder, *, stride, **options):
    """On black, which the networks leave black: all that they see is the object."""
    options = {"length": LENGTH, "size": 60, "canvas": 160, "background": "black"} | options
    found = spectrum.scan(encoder, cutouts(), [deepest(encoder)], **options)[deepest(encoder)]
    return found, spectrum.aliasing_power(spectrum.psd(found.cosine), stride)


# ------------------------------------------------------------------------------------ frequencies


def test_harmonics_by_hand():
    assert spectrum.harmonics(1) == {}
    assert spectrum.harmonics(2) == {2: (0.5,)}
    assert spectrum.harmonics(8) == {2: (0.5,), 4: (0.25,), 8: (0.125, 0.375)}
    assert spectrum.harmonics(14) == {
        2: (0.5,),
        7: (1 / 7, 2 / 7, 3 / 7),
        14: (1 / 14, 3 / 14, 5 / 14),
    }


@given(st.integers(1, 200))
def test_harmonics_are_all_multiples_once(stride):
    table = spectrum.harmonics(stride)
    every = sorted(f for values in table.values() for f in values)
    assert every == [k / stride for k in range(1, stride // 2 + 1)]
    for period, values in table.items():
        assert stride % period == 0
        for frequency in values:
            assert frequency * period == pytest.approx(round(frequency * period))


@pytest.mark.parametrize("stride", [0, -2, 1.5, True])
def test_bad_strides(stride):
    with pytest.raises(ValueError, match="stride"):
        spectrum.harmonics(stride)
    with pytest.raises(ValueError, match="stride"):
        spectrum.aliasing_power(spectrum.psd(noise(LENGTH)), stride)
    with pytest.raises(ValueError, match="stride"):
        spectrum.decompose(noise(LENGTH), stride)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 70), st.integers(0, 3), st.integers(0, 1000))
def test_power_sums_to_the_variance(length, order, seed):
    x = noise(3, length, seed=seed).cumsum(-1) + 100
    plain = spectrum.psd(x, order=order, taper="none")
    place = np.linspace(-1, 1, length)
    rest = np.stack([y - np.polyval(np.polyfit(place, y, order), place) for y in x.numpy()])
    np.testing.assert_allclose(plain.power.sum(-1), rest.var(1), rtol=1e-8)
    assert plain.power.shape == (3, length // 2 + 1)
    assert plain.frequency[0].tolist() == pytest.approx(np.fft.rfftfreq(length).tolist())
    # with a window: the variance weighted by its square
    weight = np.asarray(scipy.signal.get_window("hann", length))
    fits = [np.polyfit(place, y, order, w=np.sqrt(weight)) for y in x.numpy()]
    rest = np.stack([y - np.polyval(fit, place) for y, fit in zip(x.numpy(), fits, strict=True)])
    expected = (weight**2 * rest**2).sum(1) / (weight**2).sum()
    tapered = spectrum.psd(x, order=order)
    np.testing.assert_allclose(tapered.power.sum(-1), expected, rtol=1e-6)
    assert tapered.power[:, 0].max() < 1e-12 * tapered.power.sum(-1).max()


def test_power_equals_scipy_periodogram():
    x = noise(2, LENGTH)
    x = x - x.mean(-1, keepdim=True)
    _, expected = scipy.signal.periodogram(x.numpy(), scaling="density", detrend="constant")
    found = spectrum.psd(x, order=0, taper="none").power
    np.testing.assert_allclose(found, expected / LENGTH, rtol=1e-10, atol=1e-14)


def test_power_of_maps_sums_to_the_variance():
    sides = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (24, 32)]
    y, x = torch.meshgrid(*sides, indexing="ij")
    maps = noise(2, 24, 32)
    found = spectrum.psd(maps + 5 * y - 3 * x + 7, dims=2, order=1, taper="none")
    again = spectrum.psd(maps, dims=2, order=1, taper="none")
    torch.testing.assert_close(found.power, again.power, rtol=1e-8, atol=1e-12)
    basis = torch.stack([torch.ones_like(y), y, x], -1).reshape(-1, 3)
    flat = maps.reshape(2, -1).T
    rest = flat - basis @ torch.linalg.lstsq(basis, flat).solution
    torch.testing.assert_close(found.power.sum((-2, -1)), rest.square().mean(0))
    assert found.frequency[0][12] == 0
    assert found.frequency[1][16] == 0


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 15])
def test_a_sine_lands_in_its_bin(k):
    frequency = k / LENGTH * 2
    found = spectrum.psd(2.0 + wave(frequency, amplitude=3), order=0)
    at = int(found.power.argmax())
    assert float(found.frequency[0][at]) == frequency
    assert float(found.power.sum()) == pytest.approx(4.5, rel=0.02)  # amplitude² / 2
    aside = found.power.clone()
    aside[max(at - 1, 0) : at + 2] = 0
    assert aside.sum() < (1e-20 if k > 1 else 0.02)


def test_a_sine_at_an_eighth_is_of_the_third_halving():
    found = spectrum.aliasing_power(spectrum.psd(wave(1 / 8), order=0), 16)
    assert float(found.share) == pytest.approx(1, abs=1e-6)
    assert float(found.by_period[8]) == pytest.approx(0.5, rel=1e-3)
    others = sum(float(found.by_period[p]) for p in (2, 4, 16))
    assert others < 1e-3
    assert float(found.ratio) > 30  # one of eight harmonics, by itself above 1e12


def test_a_sine_between_harmonics_is_background():
    found = spectrum.aliasing_power(spectrum.psd(wave(3 / 16)), 8)
    assert float(found.share) < 1e-6
    assert float(found.excess) < 1e-6
    assert float(found.ratio) < 1e-2


def test_a_map_at_an_eighth_across():
    maps = wave(1 / 8, 32).expand(32, 32)
    found = spectrum.psd(maps, dims=2, order=0)
    parts = spectrum.aliasing_power(found, 8)
    assert float(parts.share) == pytest.approx(1, abs=1e-6)
    assert float(parts.by_period[8]) == pytest.approx(0.5, rel=0.05)
    row, column = divmod(int(found.power.argmax()), 32)
    assert float(found.frequency[0][row]) == 0
    assert abs(float(found.frequency[1][column])) == 1 / 8
    diagonal = wave(1 / 2, 32, phase=1)[:, None] * wave(1 / 4, 32)
    parts = spectrum.aliasing_power(spectrum.psd(diagonal, dims=2, order=0), 4)
    assert float(parts.by_period[4] / parts.power) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_a_ramp_has_no_ripple(stride):
    line = 0.9 - 0.01 * torch.arange(LENGTH, dtype=torch.float64)
    found = spectrum.aliasing_power(spectrum.psd(line), stride)
    assert float(found.power) < 1e-20
    assert float(found.ratio) == pytest.approx(1)
    parts = spectrum.decompose(line, stride)
    assert parts.ripple.abs().max() < 1e-12
    torch.testing.assert_close(parts.slow, line)
    slow = spectrum.drift(line, stride)
    assert float(slow.slope) == pytest.approx(-0.01)
    assert float(slow.power) == pytest.approx(float(line.var(correction=0)))


def test_white_noise_has_a_ratio_of_one_and_a_falling_spectrum_less():
    white = spectrum.aliasing_power(spectrum.psd(noise(4000, 128)), 8)
    assert float(white.power.mean() / white.background.mean()) == pytest.approx(1, rel=0.05)
    red = spectrum.aliasing_power(spectrum.psd(noise(4000, 128).cumsum(-1)), 8)
    assert float(red.power.mean() / red.background.mean()) < 1
    assert float(white.ratio.log().mean()) < 0.02
    assert float(red.ratio.log().mean()) < 0


@pytest.mark.parametrize("width", [5, 20, 60])
def test_a_cusp_at_the_reference_is_no_peak(width):
    """As of a random walk's correlation: all frequencies, none of them a harmonic."""
    line = torch.exp(-(torch.arange(128, dtype=torch.float64) - 63).abs() / width)
    found = spectrum.aliasing_power(spectrum.psd(line), 32)
    assert float(found.ratio) < 1.1
    assert float(found.excess) < 0.02 * float(line.var())


def test_parts_add_up_and_each_finds_its_own():
    slow = torch.linspace(-1, 1, LENGTH, dtype=torch.float64) ** 3 + 5
    ripple = wave(1 / 8, amplitude=0.2) + wave(1 / 2, amplitude=0.1, phase=1)
    rest = wave(5 / 64, amplitude=0.05)
    lines = (slow + ripple + rest).expand(2, LENGTH)
    parts = spectrum.decompose(lines, 8)
    torch.testing.assert_close(parts.slow + parts.ripple + parts.rest, lines)
    exact = spectrum.decompose(slow + ripple, 8)
    torch.testing.assert_close(exact.ripple, ripple, rtol=0, atol=1e-10)
    torch.testing.assert_close(exact.slow, slow, rtol=0, atol=1e-10)
    assert float(parts.rest.std()) == pytest.approx(float(rest.std()), rel=0.05)
    # a ripple of period 8 is one
    torch.testing.assert_close(parts.ripple[..., 8:], parts.ripple[..., :-8])


def test_too_short_for_the_stride():
    with pytest.raises(ValueError, match=r"64 samples hold 2 periods of stride 32.*128"):
        spectrum.aliasing_power(spectrum.psd(noise(LENGTH)), 32)
    with pytest.raises(ValueError, match="128 samples"):
        spectrum.decompose(noise(LENGTH), 32)
    with pytest.raises(ValueError, match="stride 16"):
        spectrum.aliasing_power(spectrum.psd(noise(64, 32), dims=2), 16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spectrum.psd(torch.tensor([0.0, 1, math.nan, 2, 3])), r"not finite at index \(2,"),
        (lambda: spectrum.psd(torch.full((2, 9), math.inf)), "not finite"),
        (lambda: spectrum.decompose([0.0] * 15 + [math.nan], 2), "not finite"),
        (lambda: spectrum.psd(noise(3)), "at least 4"),
        (lambda: spectrum.psd(noise(9), dims=2), "map"),
        (lambda: spectrum.psd(noise(9), dims=3), "dims"),
        (lambda: spectrum.psd(noise(9), order=-1), "order"),
        (lambda: spectrum.psd(noise(9), order=8), "leaves nothing"),
        (lambda: spectrum.psd(noise(9), taper=cast(Any, "hamming")), "taper"),
        (lambda: spectrum.aliasing_power(spectrum.psd(noise(64)), 8, bandwidth=0.1), "bandwidth"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------- peaks where strides are


def test_an_unstrided_network_has_no_peaks():
    found, parts = spectra(net(1, 1), stride=4)
    assert found.stride == 1
    assert found.cosine.min() > 1 - 1e-6  # equivariant, then averaged: invariant
    assert parts.power.max() < 1e-13
    assert parts.ratio.max() < 2


def test_an_unstrided_network_with_a_bias_drifts_but_has_no_peaks():
    found, parts = spectra(net(1, 1, last=[Ramp()]), stride=4, share=False)
    across = found.cosine[:, 1]
    slow = spectrum.drift(across, 4)
    assert slow.power.min() > 1e-5
    assert (parts.power[:, 1] < 1e-6 * slow.power).all()
    assert parts.ratio.max() < 1 + 1e-6


def test_stride_two_has_its_peak_at_a_half():
    found, parts = spectra(net(2, 1), stride=2)
    assert found.stride == 2
    power = spectrum.psd(found.cosine)
    assert (power.power.argmax(-1) == LENGTH // 2).all()
    assert parts.share.min() > 0.999
    assert parts.ratio.min() > 1e3
    finer = spectrum.aliasing_power(power, 8)
    assert (finer.by_period[2] > 1e6 * (finer.by_period[4] + finer.by_period[8])).all()


def test_stride_four_has_peaks_at_a_quarter_and_a_half():
    found, parts = spectra(net(2, 2), stride=4)
    assert found.stride == 4
    assert parts.share.min() > 0.999
    assert parts.by_period[2].min() > 1e-11  # rounding is below 1e-13
    assert parts.by_period[4].min() > 1e-11
    finer = spectrum.aliasing_power(spectrum.psd(found.cosine), 16)
    assert (finer.by_period[8] + finer.by_period[16]).max() < 1e-12
    torch.testing.assert_close(
        finer.by_period[2] + finer.by_period[4], parts.power, rtol=1e-3, atol=1e-12
    )


def test_blur_before_subsampling_lowers_the_peaks():
    sharp = spectra(net(2, 2), stride=4)[1]
    soft = spectra(net(2, 2, blur=True), stride=4)[1]
    assert (soft.power < 0.1 * sharp.power).all()


@pytest.mark.parametrize("pool", ["mean", "flatten"])
def test_scan_equals_a_plain_loop(pool):
    """With the border in reach of the object at both ends of the lines."""
    encoder, objects = net(2, 1, 2), cutouts()
    layers = ["1", "3", "5"]
    options = {"size": 20, "canvas": 88, "background": "#a0b0c0", "pool": pool}
    found = spectrum.scan(encoder, objects, layers, length=64, **options)
    alone = spectrum.scan(encoder, objects, layers, length=64, share=False, **options)
    middle = int(shift.references(88, 20)[2, 0])
    assert found["1"].offsets[[0, -1]].tolist() == [middle - 31 - middle, 32]
    line = found["1"].offsets + middle
    still = torch.full_like(line, middle)
    places = torch.cat([torch.stack([line, still], 1), torch.stack([still, line], 1)])
    centre = torch.tensor([[middle, middle]])
    for i, obj in enumerate(objects):
        obj = shift.prepare(obj, 20)
        every = shift.features(
            encoder, obj, torch.cat([centre, places]), layers, canvas=88,
            background="#a0b0c0", pool=pool, batch_size=200,
        )  # fmt: skip
        _, vectors = next(iter(every))
        for layer in layers:
            unit = F.normalize(vectors[layer].double(), dim=1)
            expected = (unit[1:] @ unit[0]).reshape(2, 64)
            torch.testing.assert_close(found[layer].cosine[i], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(alone[layer].cosine[i], expected, rtol=0, atol=1e-5)


def test_window_holds_the_lines_of_a_scan():
    encoder, objects = net(2, 2), cutouts(1)
    options: Any = {"size": 20, "canvas": 64}
    lines = spectrum.scan(encoder, objects, ["3"], length=16, **options)["3"]
    maps = spectrum.window(encoder, objects, ["3"], side=16, **options)["3"]
    zero = maps.offsets.tolist().index(0)
    torch.testing.assert_close(maps.cosine[:, :, zero], lines.cosine[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(maps.cosine[:, zero], lines.cosine[:, 1], rtol=0, atol=1e-6)
    assert float(maps.cosine[0, zero, zero]) == pytest.approx(1)
    parts = spectrum.aliasing_power(spectrum.psd(maps.cosine, dims=2), 4)
    assert float(parts.share) > 0.99


def test_a_vector_has_the_stride_of_the_map_before_it():
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    found, parts = spectra(net(2, 2, last=last), stride=4)
    assert found.stride == 4
    assert parts.share.min() > 0.999


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 120}, "only 109"),
        ({"length": 0}, "length"),
        ({"layers": ["9"]}, "no layer"),
        ({"layers": "3"}, "list"),
        ({"objects": []}, "no objects"),
        ({"objects": [torch.rand(3, 9, 9)]}, "object 0.*alpha"),
        ({"pool": "max"}, "pool"),
    ],
)
def test_scan_refuses(options, words):
    arguments = {"objects": cutouts(1), "layers": ["3"], "length": 16, "size": 20, "canvas": 128}
    arguments |= options
    objects, layers = arguments.pop("objects"), arguments.pop("layers")
    with pytest.raises(ValueError, match=words):
        spectrum.scan(net(2, 2), objects, layers, **arguments)


# ----------------------------------------------------------------------------------- equivariance


def test_interior_units_by_hand():
    # 3×3 with padding 1 and stride 2: unit i sees 2i − 1 to 2i + 1; the next 4i − 3 to 4i + 3
    found = spectrum.interior(net(2, 2), ["1", "3"], canvas=64)
    assert found["1"] == (range(1, 32), range(1, 32))
    assert found["3"] == (range(1, 16), range(1, 16))


def test_whole_strides_have_no_error_inside():
    shifts = [(0, d) for d in range(9)] + [(4, 4), (-4, 8), (2, 2)]
    found = spectrum.equivariance(net(2, 2), cutouts(3), ["1", "3"], shifts, size=20, canvas=64)
    for layer, stride in (("1", 2), ("3", 4)):
        error = found[layer]
        whole = torch.tensor([all(d % stride == 0 for d in way) for way in shifts])
        assert error.stride == stride
        assert error.bilinear.shape == error.still.shape == (3, len(shifts))
        assert error.bilinear[:, whole].max() < 1e-5
        assert error.nearest[:, whole].max() < 1e-5
        assert error.bilinear[:, ~whole].min() > 0.05
        moved = torch.tensor([way != (0, 0) for way in shifts])
        assert error.still[:, moved].min() > 0.1


def test_an_unstrided_network_is_equivariant():
    shifts = [(1, 0), (0, 3), (2, -5)]
    found = spectrum.equivariance(net(1, 1), cutouts(), ["3"], shifts, size=20, canvas=64)["3"]
    assert found.bilinear.max() < 1e-5
    assert found.still.min() > 0.1


def test_the_border_shows_in_units_that_see_it():
    """An object that covers nearly all: shifted by whole strides, its edge meets the padding."""
    shifts = [(0, 4), (4, 0)]
    options = {"size": 58, "canvas": 64, "background": "white"}
    inner = spectrum.equivariance(net(2, 2), cutouts(), ["3"], shifts, **options)["3"]
    every = spectrum.equivariance(net(2, 2), cutouts(), ["3"], shifts, units="all", **options)["3"]
    assert inner.bilinear.max() < 1e-5
    assert every.bilinear.min() > 1e-3
    assert every.units[0] > inner.units[0]


def test_blur_lowers_the_error():
    shifts = [(0, 1), (0, 2), (0, 3)]
    options = {"size": 20, "canvas": 64, "background": "grey"}  # no edge that all objects share
    sharp, soft = net(2, 2), net(2, 2, blur=True)
    found = [
        spectrum.equivariance(encoder, cutouts(), [deepest(encoder)], shifts, **options)
        for encoder in (sharp, soft)
    ]
    first, second = found[0]["3"].bilinear, found[1]["5"].bilinear
    assert (second.mean(0) < first.mean(0)).all()


def test_errors_by_hand():
    """A subsampling by 2 of the picture itself: the map's values are known."""
    encoder = Encoder(nn.Sequential(nn.AvgPool2d(1, 2)), name="sample", input_size=32)
    objects = cutouts(2, 9)
    found = spectrum.equivariance(
        encoder, objects, ["0"], [(0, 1)], size=9, canvas=32, optimise=False
    )["0"]
    start = torch.tensor([[11, 11]])
    pictures = torch.cat([shift.compose(shift.prepare(o, 9), start, canvas=32) for o in objects])
    here = pictures.roll(1, 3)[..., ::2, ::2].double()  # nothing but white comes round
    base = pictures[..., ::2, ::2].double()
    smooth = (base + base.roll(1, 3)) / 2
    unit = (base[0] - base[1]).norm()
    expected = (here - smooth).flatten(1).norm(dim=1) / unit
    torch.testing.assert_close(found.bilinear[:, 0].double(), expected, rtol=1e-5, atol=1e-6)
    nearest = (here - base.roll(1, 3)).flatten(1).norm(dim=1) / unit
    torch.testing.assert_close(found.nearest[:, 0].double(), nearest, rtol=1e-5, atol=1e-6)
    still = (here - base).flatten(1).norm(dim=1) / unit
    torch.testing.assert_close(found.still[:, 0].double(), still, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objects": cutouts(1)}, "at least 2 objects"),
        ({"shifts": [(0, 100)]}, r"smaller shifts|leaves the canvas"),
        ({"shifts": [(0.5, 0.0)]}, "whole numbers"),
        ({"shifts": torch.zeros(0, 2, dtype=torch.long)}, "whole numbers"),
        ({"units": "inner"}, "units"),
        ({"canvas": 24}, r"larger canvas|leaves"),
        ({"layers": ["6"]}, "no map"),
        ({"objects": [torch.ones(4, 9, 9)] * 2}, "same for all objects"),
    ],
)
def test_equivariance_refuses(options, words):
    encoder = net(2, 2, 2, last=[nn.Flatten()])
    arguments = {"objects": cutouts(), "layers": ["5"], "shifts": [(0, 1)], "canvas": 64}
    arguments |= {"size": 20} | options
    objects, layers, by = (arguments.pop(name) for name in ("objects", "layers", "shifts"))
    with pytest.raises(ValueError, match=words):
        spectrum.equivariance(encoder, objects, layers, by, **arguments)


def test_a_layer_that_sees_everything_has_no_interior(squeezenet: encoders.Encoder):
    assert spectrum.interior(squeezenet, ["features.12"], canvas=96) == {"features.12": None}
    with pytest.raises(ValueError, match="larger canvas"):
        spectrum.equivariance(squeezenet, cutouts(), ["features.12"], [(0, 1)], size=20, canvas=96)


def test_shared_early_layers_of_a_packaged_encoder(squeezenet: encoders.Encoder):
    layers = ["features.1", "features.4", "features.7"]
    options: Any = {"length": 16, "size": 24, "canvas": 128}
    shared = spectrum.scan(squeezenet, cutouts(1), layers, **options)
    plain = spectrum.scan(squeezenet, cutouts(1), layers, share=False, **options)
    for layer in layers:
        torch.testing.assert_close(shared[layer].cosine, plain[layer].cosine, rtol=0, atol=1e-5)
    assert [shared[layer].stride for layer in layers] == [2, 4, 8]


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_positions_stand_for_one_another_only_where_padding_lets_them(mode):
    """Around a torus the object is seen at both borders: no position is an interior one."""
    encoder = net(2, 1, 2)
    for module in encoder.net.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = mode
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    options = {"size": 20, "canvas": 88, "background": "#a0b0c0", "length": 64}
    shared = spectrum.scan(encoder, cutouts(1), ["5"], **options)["5"]
    alone = spectrum.scan(encoder, cutouts(1), ["5"], share=False, **options)["5"]
    torch.testing.assert_close(shared.cosine, alone.cosine, rtol=0, atol=1e-5)
    centre = torch.cartesian_prod(torch.arange(30, 50), torch.arange(30, 50))
    stand = spectrum._canonical(encoder, ["5"], centre, size=20, canvas=88)
    assert bool(stand) is (mode == "zeros")
