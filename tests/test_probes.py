"""Probes: features whose answer is known, the leak between neighbours, scikit-learn as oracle."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from fmlib import encoders, images, probes, shift, stats
from fmlib.encoders import Encoder

PLACES = shift.grid(224, 125, 8)  # 13×13, odd: the middle lines belong to no half
EVEN = shift.grid(224, 125, 11)  # 10×10


def cutout(side=30, *, seed=0):
    """An opaque square of coloured noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(3, side, side, generator=generator), torch.ones(1, side, side)])


def noise(width=40, *, seed=0, places=PLACES):
    """Features without any structure."""
    return np.random.default_rng(seed).standard_normal((len(places.positions), width))


def position(places=PLACES):
    """Features that are the position, mixed and hidden among constants."""
    mixing = np.array([[1.0, 2.0, 0.0, -1.0], [0.5, -1.0, 0.0, 3.0]])
    return places.positions.numpy() @ mixing + 7


def over_seeds(measure, seeds=12):
    values = [float(np.mean(measure(seed))) for seed in range(seeds)]
    return stats.bootstrap(values, level=0.99)


# ------------------------------------------------------------------------------------ what is asked


def test_halves_of_an_even_grid_are_the_paper_s():
    top = probes.halves(EVEN, 0).reshape(EVEN.shape)
    left = probes.halves(EVEN, 1).reshape(EVEN.shape)
    assert (top[:5] == 0).all()
    assert (top[5:] == 1).all()
    assert (left == top.T).all()


def test_the_middle_line_of_an_odd_grid_is_in_no_half():
    top = probes.halves(PLACES, 0).reshape(PLACES.shape)
    assert (top[6] == -1).all()
    assert (top[:6] == 0).all()
    assert (top[7:] == 1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(40, 110), st.sampled_from([4, 8, 16, 32]))
def test_a_phase_says_nothing_on_the_lines_kept(stride, room, period):
    places = shift.grid(10 + room, 10, stride)
    try:
        mask = probes.same_phase(places, 0, period)
    except ValueError:
        return
    labels = probes.halves(places, 0)
    phase = places.positions[:, 0].numpy() % period
    assert not (mask & (labels < 0)).any()
    for value in np.unique(phase[mask]):
        of_phase = labels[mask & (phase == value)]
        assert (of_phase == 0).sum() == (of_phase == 1).sum()


def test_lines_of_one_phase_keep_what_they_can():
    rows = np.unique(PLACES.positions[probes.same_phase(PLACES, 0, 32), 0])
    assert rows.tolist() == [0, 8, 16, 24, 32, 64, 72, 80, 88, 96]
    assert probes.same_phase(PLACES, 1, 1).sum() == 12 * 13


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: probes.halves(PLACES, 2), "axis"),
        (lambda: probes.same_phase(PLACES, 0, 0), "period"),
        (lambda: probes.same_phase(EVEN, 0, 32), re.escape("stride (11 px) divides 32")),
    ],
)
def test_questions_that_make_no_sense_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# -------------------------------------------------------------------------------------------- folds


def splits(places):
    labels = probes.halves(places, 0)
    yield probes.unshuffled(labels)
    yield probes.shuffled(labels)
    yield probes.blocked(places, 0, keep=labels >= 0)


def test_folds_hold_out_every_position_once_and_share_none():
    for places in (PLACES, EVEN):
        labels = probes.halves(places, 0)
        for folds in splits(places):
            assert len(folds) == 5
            held_out = np.concatenate([test for _, test in folds])
            assert sorted(held_out.tolist()) == np.flatnonzero(labels >= 0).tolist()
            for train, test in folds:
                assert not set(train) & set(test)
                assert set(labels[train]) == set(labels[test]) == {0, 1}


def test_unshuffled_folds_are_the_default_of_scikit_learn():
    """As the paper has it: cross_val_score on the positions, row by row."""
    features = noise(20, places=EVEN) + 0.01 * EVEN.positions.numpy()[:, :1]
    for axis in (0, 1):
        labels = probes.halves(EVEN, axis)
        expected = cross_val_score(LinearSVC(C=1, random_state=0), features, labels, cv=5).mean()
        folds = probes.unshuffled(labels)
        assert probes.accuracy(features, labels, folds) == pytest.approx(expected, abs=1e-12)


def test_unshuffled_folds_are_bands_of_rows():
    """What scikit-learn's default comes to on a raster: half a shuffle, half a block."""
    y = EVEN.positions[:, 0].numpy() // EVEN.stride
    bands = [sorted(set(y[test])) for _, test in probes.unshuffled(probes.halves(EVEN, 1))]
    assert bands == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    bands = [sorted(set(y[test])) for _, test in probes.unshuffled(probes.halves(EVEN, 0))]
    assert bands == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 16), st.integers(60, 120), st.integers(0, 24), st.integers(2, 6), st.booleans()
)
def test_blocked_folds_keep_their_distance(stride, room, margin, folds, across):
    places = shift.grid(10 + room, 10, stride)
    axis = int(across)
    try:
        found = probes.blocked(places, axis, folds, margin=margin)
    except ValueError:  # too few lines, or too wide a margin: tested below
        return
    at = places.positions.numpy()
    for train, test in found:
        lines = [np.unique(at[part, 1 - axis]) for part in (train, test)]
        away = np.abs(lines[0][:, None] - lines[1])
        assert away.min() > margin
        # whole strips: all that is to be predicted is in training and in test
        assert set(at[train, axis]) == set(at[test, axis]) == set(at[:, axis])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: probes.blocked(shift.grid(40, 10, 10), 0), "too few positions for 5 folds: 4 col"),
        (lambda: probes.blocked(shift.grid(40, 10, 10), 1), "4 rows"),
        (lambda: probes.blocked(PLACES, 0, 1), "folds must be"),
        (lambda: probes.blocked(PLACES, 0, margin=60), "nothing is left to train on"),
        (lambda: probes.blocked(PLACES, 0, margin=-1), "margin"),
        (lambda: probes.blocked(PLACES, 0, margin=float("nan")), "margin"),
        (lambda: probes.blocked(PLACES, 0, keep=np.ones(3)), "keep has shape"),
        (lambda: probes.unshuffled(np.zeros(20, int)), "one class"),
        (lambda: probes.shuffled(np.array([0, 1] * 3)), "too few positions for 5 folds: 3"),
        (lambda: probes.unshuffled(np.array([0, 1] * 2)), "too few positions for 5 folds: 4"),
        (lambda: probes.unshuffled(np.zeros((4, 2), int)), "labels"),
        (lambda: probes.unshuffled(np.array([0.0, 1.0])), "labels"),
    ],
)
def test_folds_that_cannot_be_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------- features with an answer


@pytest.mark.parametrize("scheme", probes.SCHEMES)
def test_features_that_hold_the_position_are_read_perfectly(scheme):
    x = probes.standardise(position())
    assert probes.position_accuracy(x, PLACES, scheme=scheme).tolist() == [1, 1]


def test_position_in_the_features_is_regressed_to_the_pixel():
    found = probes.regress(probes.standardise(position()), PLACES, ridge=1e-9)
    assert found.r2 == pytest.approx(1)
    assert found.axis_r2 == pytest.approx((1, 1))
    assert found.error_px < 1e-3
    assert found.prediction is not None
    np.testing.assert_allclose(found.prediction, PLACES.positions, atol=1e-3)
    # the constant predictor's error: the spread of 13 positions 8 px apart, along two axes
    assert found.floor_px == pytest.approx(8 * np.sqrt(2 * (13**2 - 1) / 12))


def test_one_coordinate_alone_is_half_of_the_variance():
    y = PLACES.positions.numpy()[:, :1].astype(float)
    found = probes.regress(probes.standardise(y), PLACES, ridge=1e-9)
    assert found.axis_r2 == pytest.approx((1, 0), abs=1e-9)
    assert found.r2 == pytest.approx(0.5)
    one, other = probes.position_accuracy(probes.standardise(y), PLACES)
    assert one == 1
    assert other == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("scheme", probes.SCHEMES)
def test_noise_is_at_chance(scheme):
    found = over_seeds(
        lambda seed: probes.position_accuracy(noise(30, seed=seed), PLACES, scheme=scheme),
        seeds=24,
    )
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.1


def test_noise_predicts_no_position():
    found = over_seeds(lambda seed: probes.regress(noise(30, seed=seed), PLACES, ridge=1).r2)
    assert found.high < 0


def test_permuted_labels_are_at_chance():
    x = probes.standardise(position())
    found = over_seeds(
        lambda seed: probes.position_accuracy(x, PLACES, permute=True, seed=seed), seeds=20
    )
    assert found.low < 0.5 < found.high
    constant = probes.standardise(np.ones((169, 3)))
    assert probes.position_accuracy(constant, PLACES, permute=True).tolist() == [0.5, 0.5]


def smooth_noise(seed):
    """Alike within about 9 px, strangers beyond 24 px, and nowhere aware of position."""
    return probes.standardise(probes.smooth_field(PLACES, 400, length=9, seed=seed))


def test_what_neighbours_share_leaks_into_all_but_blocked_folds():
    """Only strips with a margin see through features that are smooth and nothing else."""

    def measure(scheme):
        return over_seeds(
            lambda seed: probes.position_accuracy(
                smooth_noise(seed), PLACES, scheme=scheme, margin=24
            )
        )

    assert measure("shuffled").low > 0.9
    assert measure("unshuffled").low > 0.7
    found = measure("blocked")
    assert found.low < 0.5 < found.high < 0.6


def test_a_margin_is_needed():
    """Without one, the columns beside a strip give it away."""

    def measure(margin):
        return over_seeds(
            lambda seed: probes.regress(smooth_noise(seed), PLACES, margin=margin).r2, seeds=8
        )

    bare, narrow, wide = measure(0), measure(8), measure(24)
    assert bare.low > 0.5
    assert 0 < narrow.low < narrow.high < bare.low
    assert wide.high < 0.1


def test_a_phase_is_no_position():
    """One unit for each remainder by 32: some accuracy on all lines, none on lines of one phase."""
    phases = PLACES.positions.numpy() % 32 // 8
    x = np.concatenate([np.eye(4)[phases[:, 0]], np.eye(4)[phases[:, 1]]], 1)
    assert (probes.position_accuracy(x, PLACES) > 0.55).all()
    assert (probes.position_accuracy(x, PLACES, period=32) <= 0.5).all()
    known = probes.standardise(position())
    assert probes.position_accuracy(known, PLACES, period=32).tolist() == [1, 1]


# ---------------------------------------------------------------------------------- standardisation


def test_standardising_in_few_dimensions_changes_no_probe():
    rng = np.random.default_rng(0)
    x = PLACES.positions.numpy() @ rng.normal(size=(2, 400)) + 300 * rng.normal(size=(169, 400))
    x = x * np.geomspace(1e-3, 1e3, 400) + 5
    small = probes.standardise(x)
    full = StandardScaler().fit_transform(x)
    assert small.shape == (169, 169)
    np.testing.assert_allclose(small @ small.T, full @ full.T, atol=1e-8)
    labels = probes.halves(PLACES, 0)
    folds = probes.blocked(PLACES, 0, keep=labels >= 0)
    both = [probes.accuracy(form, labels, folds) for form in (small, full)]
    assert both[0] == pytest.approx(both[1], abs=0.01)
    assert 0.6 < both[0] < 1
    kernel = [probes.regress(form, PLACES).r2 for form in (small, full)]
    assert kernel[0] == pytest.approx(kernel[1], abs=1e-9)


def test_rounding_is_not_blown_up_into_a_position():
    """Means over pixels in float32 differ in their last digits, systematically with position."""
    y = PLACES.positions.numpy()[:, :1]
    constant = np.float32(0.7) * (1 + 1e-7 * y) * np.ones((1, 3))
    x = probes.standardise(constant)
    assert x.tolist() == [[0.0]] * 169
    assert probes.position_accuracy(x, PLACES).tolist() == [0.5, 0.5]
    found = probes.regress(x, PLACES)
    assert found.r2 == pytest.approx(0, abs=1e-12)
    assert found.error_px == pytest.approx(found.floor_px)


def test_a_plain_pipeline_falls_for_rounding():
    """The trap that the test above guards against is real."""
    y = PLACES.positions.numpy()[:, :1]
    constant = 0.7 * (1 + 1e-7 * y) * np.ones((1, 3))
    naive = make_pipeline(StandardScaler(), LinearSVC(C=1, random_state=0))
    labels = probes.halves(PLACES, 0)
    folds = probes.blocked(PLACES, 0, keep=labels >= 0)
    assert cross_val_score(naive, constant, labels, cv=folds).mean() == 1


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.zeros((1, 3)), "single position"),
        (np.zeros(169), "one row for each position"),
        (np.zeros((169, 0)), "one row for each position"),
        (np.where(np.arange(169 * 2).reshape(169, 2) == 7, np.nan, 0), r"features\[3, 1\] is nan"),
        (np.full((169, 2), np.inf), "not a finite number"),
    ],
)
def test_features_that_are_none_are_refused(features, words):
    with pytest.raises(ValueError, match=words):
        probes.standardise(features)
    with pytest.raises(ValueError, match=words):
        probes.regress(features, PLACES)
    with pytest.raises(ValueError, match=words):
        probes.position_accuracy(features, PLACES)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: probes.position_accuracy(noise(), EVEN), "169 rows of features for 100 positions"),
        (lambda: probes.regress(noise(), EVEN), "169 rows of features for 100 positions"),
        (
            lambda: probes.position_accuracy(noise(), PLACES, scheme="block"),
            "did you mean 'blocked'",
        ),
        (lambda: probes.regress(noise(), PLACES, ridge=0), "ridge"),
        (lambda: probes.position_accuracy(noise(), PLACES, C=0), "C must be"),
        (lambda: probes.StreamedRegression(PLACES, ridge=-1), "ridge"),
        (
            lambda: probes.accuracy(
                noise(3), np.arange(169) // 85, [(np.arange(80), np.arange(80, 169))]
            ),
            "fold 0 is of one class",
        ),
        (lambda: probes.smooth_field(PLACES, 0, length=1), "width"),
        (lambda: probes.smooth_field(PLACES, 1, length=0), "length"),
        (lambda: probes.picture_features(cutout(), PLACES, cells=0), "cells"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------------------------------- streaming


def stream(features, places, sizes=(50, 7), **options):
    """In batches of changing size, in another order than the grid's."""
    regression = probes.StreamedRegression(places, **options)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    start = 0
    while start < len(order):
        size = sizes[start % len(sizes)]
        index = order[start : start + size]
        regression.update(index, torch.as_tensor(features)[index])
        start += size
    return regression


@pytest.mark.parametrize("width", [3, 60, 260])
def test_the_streamed_regression_is_scikit_learn_s(width):
    """Far from zero, as pooled features are: sums of squares would cancel."""
    rng = np.random.default_rng(width)
    x = PLACES.positions.numpy() @ rng.normal(size=(2, width)) + 60 * rng.normal(size=(169, width))
    x = x + 1e5
    x[:, 0] = 3.0  # a dead channel
    options = {"ridge": 0.02, "margin": 16, "folds": 4}
    streamed = stream(x, PLACES, **options).result()
    assert streamed.prediction is None
    stored = probes.regress(probes.standardise(x), PLACES, **options)
    scaled = StandardScaler().fit_transform(x)
    truth = PLACES.positions.numpy()
    errors = 0.0
    for axis in (0, 1):
        for train, test in probes.blocked(PLACES, axis, 4, margin=16):
            model = Ridge(alpha=0.02 * (width - 1)).fit(scaled[train], truth[train, axis])
            errors += np.square(model.predict(scaled[test]) - truth[test, axis]).sum()
    expected = np.sqrt(errors / 169)
    assert 1 < expected < stored.floor_px * 2
    for found in (streamed, stored):
        assert found.error_px == pytest.approx(expected, rel=1e-6)
    assert streamed.r2 == pytest.approx(stored.r2, rel=1e-6)
    assert streamed.axis_r2 == pytest.approx(stored.axis_r2, rel=1e-6)
    assert streamed.floor_px == pytest.approx(stored.floor_px, rel=1e-12)


def test_a_stream_of_constants_is_the_floor():
    found = stream(np.full((169, 2), 0.3), PLACES).result()
    assert found.r2 == pytest.approx(0, abs=1e-9)


def test_a_stream_that_is_not_whole_is_refused():
    regression = probes.StreamedRegression(PLACES)
    with pytest.raises(ValueError, match="169 of 169 positions"):
        regression.result()
    index = torch.arange(10)
    regression.update(index, torch.zeros(10, 4))
    with pytest.raises(ValueError, match="159 of 169 positions"):
        regression.result()
    with pytest.raises(ValueError, match="twice"):
        regression.update(index, torch.zeros(10, 4))
    with pytest.raises(ValueError, match="width 3 after 4"):
        regression.update(index + 10, torch.zeros(10, 3))
    with pytest.raises(ValueError, match="position 12 are not finite"):
        regression.update(
            index + 10, torch.where(torch.arange(10)[:, None] == 2, torch.nan, torch.zeros(10, 4))
        )
    with pytest.raises(ValueError, match="for 10 indices"):
        regression.update(index + 10, torch.zeros(9, 4))


# ------------------------------------------------------------------------ where from, and floors


def borders(padding_mode):
    """A net whose only sense of place is the padding of its convolutions: 3×3, no strides."""
    generator = torch.Generator().manual_seed(0)
    modules = []
    for channels in (3, 16, 16):
        conv = nn.Conv2d(channels, 16, 3, padding=1, padding_mode=padding_mode)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            conv.weight /= (9 * channels) ** 0.5
        modules += [conv, nn.ReLU()]
    return Encoder(nn.Sequential(*modules), name="tiny", input_size=48)


def test_collected_features_are_those_of_the_pictures():
    encoder = borders("zeros")
    places = shift.grid(48, 30, 4)
    objects = [cutout(seed=seed) for seed in (1, 2)]
    found = list(probes.collect(encoder, objects, ["3", "5"], places))
    assert len(found) == 2
    for obj, layers in zip(objects, found, strict=True):
        pictures = shift.compose(obj, places.positions, canvas=48)
        with torch.no_grad():
            at_3 = encoder.net[:4](pictures)  # pyright: ignore[reportIndexIssue]
            at_5 = encoder.net(pictures)
        torch.testing.assert_close(layers["3"], at_3.mean((2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layers["5"], at_5.mean((2, 3)), atol=1e-5, rtol=1e-4)
    flat = next(probes.collect(encoder, objects, ["5"], places, pool="flatten", batch_size=3))
    assert flat["5"].shape == (25, 16 * 48 * 48)


def test_only_the_border_tells_where():
    """Averaged over space, circular padding leaves nothing; zeros at the border leave a trace."""
    places = shift.grid(48, 30, 2)
    found = {}
    for mode in ("circular", "zeros"):
        features = next(probes.collect(borders(mode), [cutout(seed=3)], ["5"], places, share=False))
        x = probes.standardise(features["5"])
        score = probes.position_accuracy(x, places, margin=4)
        found[mode] = score, probes.regress(x, places, margin=4).r2
    assert found["circular"][0].tolist() == [0.5, 0.5]
    assert found["circular"][1] == pytest.approx(0, abs=1e-12)
    assert (found["zeros"][0] > 0.6).all()


def test_a_packaged_encoder_with_and_without_shared_layers(squeezenet):
    layer = squeezenet.recommended[2]
    places = shift.grid(224, 125, 49)
    obj = images.load("objects", limit=1)
    both = [
        next(probes.collect(squeezenet, obj, [layer], places, share=share))[layer]
        for share in (False, True)
    ]
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)
    assert both[0].shape == (9, encoders.load("squeezenet1_1").layers().set_index("layer").loc[
        layer, "channels"
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objects": []}, "no objects"),
        ({"layers": []}, "at least one name"),
        ({"layers": "5"}, "list"),
        ({"layers": ["7"]}, "7"),
        ({"objects": [cutout()[:3]]}, "object 0: .*alpha"),
        ({"pool": "max"}, "pool"),
        ({"background": "gray9000"}, "background"),
    ],
)
def test_collecting_refuses_bad_input(change, words):
    call = {"objects": [cutout()], "layers": ["5"], "places": shift.grid(48, 30, 9)}
    with pytest.raises(ValueError, match=words):
        list(probes.collect(borders("zeros"), **(call | change)))  # pyright: ignore


def test_the_mean_colour_is_the_floor_and_the_layout_the_ceiling():
    objects = images.load("objects", limit=1)
    floor = probes.standardise(probes.picture_features(objects[0], PLACES))
    assert probes.position_accuracy(floor, PLACES).tolist() == [0.5, 0.5]
    ceiling = probes.standardise(probes.picture_features(objects[0], PLACES, cells=14))
    assert probes.position_accuracy(ceiling, PLACES).mean() > 0.95
    assert probes.regress(ceiling, PLACES).r2 > 0.8


def test_smooth_fields_have_the_correlation_asked_for():
    field = probes.smooth_field(PLACES, 4000, length=10, seed=1).reshape(13, 13, -1)
    for lag in (0, 1, 2, 3):
        down = (field[: 13 - lag] * field[lag:]).mean()
        across = (field[:, : 13 - lag] * field[:, lag:]).mean()
        expected = np.exp(-((8 * lag) ** 2) / 200)
        assert float(down) == pytest.approx(expected, abs=0.03)
        assert float(across) == pytest.approx(expected, abs=0.03)
    again = probes.smooth_field(PLACES, 3, length=10, seed=1)
    assert torch.equal(again, probes.smooth_field(PLACES, 3, length=10, seed=1))
