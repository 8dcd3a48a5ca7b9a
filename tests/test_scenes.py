"""Scenes: whole positions against slices and rolls, fractions against SciPy and closed forms."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fmlib import images, scenes, shift, stats
from fmlib.encoders import Encoder


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def cutout(height=21, width=16, *, seed=0):
    """A random blob with soft edges, opaque up to its frame in places."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    alpha = ((1.1 - (y**2 + x**2).sqrt()) * 4).clamp(0, 1)
    return torch.cat([noise(3, height, width, seed=seed), alpha[None]])


def smooth(height, width, *, seed=0):
    """A periodic picture of a few low frequencies, and its formula at any shift."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randint(-3, 4, (6, 2), generator=generator).double()
    phases = torch.rand(3, 6, generator=generator).double() * 2 * math.pi

    def at(dy, dx):
        y = (torch.arange(height).double() - dy)[:, None] / height
        x = (torch.arange(width).double() - dx)[None] / width
        inner = waves[:, 0, None, None] * y + waves[:, 1, None, None] * x
        inner = 2 * math.pi * inner[None] + phases[..., None, None]
        return (0.5 + 0.07 * inner.cos().sum(1)).float()

    return at


def tiny(*modules, size=32):
    return Encoder(nn.Sequential(*modules), name="tiny", input_size=size)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return tiny(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1))


# ------------------------------------------------------------------------------------ translation

# the first call of a transform loads its library
unhurried = settings(deadline=None, max_examples=40)
shifts = st.floats(-40, 40, allow_nan=False)
sides = st.integers(2, 12)


@unhurried
@given(sides, sides, st.integers(-30, 30), st.integers(-30, 30))
def test_whole_translation_is_a_roll(height, width, dy, dx):
    x = noise(2, height, width)
    assert torch.equal(scenes.translate(x, (dy, dx)), x.roll((dy, dx), (-2, -1)))


@unhurried
@given(sides, sides, shifts, shifts)
def test_translation_agrees_with_scipy(height, width, dy, dx):
    x = noise(height, width).double()
    expected = x.numpy()
    for by in ((dy, 0), (0, dx)):  # in one go it would mix the highest frequencies of the two axes
        expected = np.fft.ifft2(scipy.ndimage.fourier_shift(np.fft.fft2(expected), by)).real
    np.testing.assert_allclose(scenes.translate(x, (dy, dx)).numpy(), expected, atol=1e-6)


@unhurried
@given(shifts, shifts)
def test_translation_follows_the_formula_of_a_smooth_picture(dy, dx):
    at = smooth(24, 31)
    torch.testing.assert_close(scenes.translate(at(0, 0), (dy, dx)), at(dy, dx), atol=2e-6, rtol=0)


@unhurried
@given(st.integers(1, 6).map(lambda n: 2 * n + 1), shifts, shifts)
def test_odd_sizes_lose_nothing(side, dy, dx):
    x = noise(3, side, side + 2)
    moved = scenes.translate(x, (dy, dx))
    assert float(moved.double().square().sum()) == pytest.approx(
        float(x.double().square().sum()), rel=1e-5
    )
    torch.testing.assert_close(scenes.translate(moved, (-dy, -dx)), x, atol=2e-6, rtol=0)


def test_even_sizes_lose_the_highest_frequency_alone():
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(3, 8)
    assert scenes.translate(stripes, (0, 0.5)).abs().max() < 1e-6
    x = noise(6, 8)
    highest = stripes[:1] * (x * stripes[:1]).mean(1, keepdim=True)
    there_and_back = scenes.translate(scenes.translate(x, (0, 0.3)), (0, -0.3))
    expected = x - highest * math.sin(0.3 * math.pi) ** 2
    torch.testing.assert_close(there_and_back, expected, atol=1e-6, rtol=0)


@unhurried
@given(st.sampled_from([0.5, 0.25, 0.3]), st.sampled_from(["circular", "mirror"]))
def test_two_halves_are_a_whole(part, ends):
    """For band-limited pictures; with mirrored ends only inside, since the ends are cut."""
    at = smooth(24, 30)
    x = at(0, 0)
    once = scenes.translate(scenes.translate(x, (0, part), ends=ends), (0, 1 - part), ends=ends)
    middle = (slice(None), slice(None), slice(8, 22))
    whole = scenes.translate(x, (0, 1), ends=ends)
    room = 2e-6 if ends == "circular" else 5e-3
    torch.testing.assert_close(once[middle], whole[middle], atol=room, rtol=0)


@unhurried
@given(st.integers(0, 6), st.integers(-6, 0))
def test_mirrored_ends_are_numpys(dy, dx):
    x = noise(7, 8)
    padded = np.pad(x.numpy(), 8, mode="symmetric")
    expected = padded[8 - dy : 15 - dy, 8 - dx : 16 - dx]
    np.testing.assert_array_equal(scenes.translate(x, (dy, dx), ends="mirror").numpy(), expected)


def test_mirrored_ends_do_not_see_the_opposite_end():
    ramp = torch.linspace(0, 1, 64).expand(5, 64)
    moved = scenes.translate(ramp, (0, 0.5), ends="mirror")
    assert (moved - (ramp - 0.5 / 63)).abs()[:, 2:-2].max() < 2e-3
    assert moved.min() > -5e-3
    assert moved.max() < 1.005
    assert scenes.translate(ramp, (0, 0.5)).min() < -0.05  # what a circular one would do


@pytest.mark.parametrize("by", [(math.nan, 0), (0, math.inf), (1, 2, 3)])
def test_bad_shift(by):
    with pytest.raises(ValueError, match="finite"):
        scenes.translate(noise(4, 4), by)


def test_bad_ends_and_pictures():
    with pytest.raises(ValueError, match=r"ends.*did you mean 'mirror'"):
        scenes.translate(noise(4, 4), (0, 1), ends="miror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float"):
        scenes.translate(torch.ones(4, 4, dtype=torch.uint8), (0, 1))


# ------------------------------------------------------------------------------------------ paste


@unhurried
@given(st.integers(0, 19), st.integers(0, 24), st.sampled_from(["white", "grey", 0.3, "photo"]))
def test_whole_positions_are_composed_bit_for_bit(y, x, background):
    ground = noise(3, 40, 40, seed=4) if background == "photo" else background
    obj = cutout()
    found = scenes.pictures(scenes.paste(obj, canvas=40, background=ground), [[y, x]])
    expected = shift.compose(obj, torch.tensor([[y, x]]), canvas=40, background=ground)
    assert torch.equal(found, expected)


@unhurried
@given(st.floats(0, 19), st.floats(0, 24))
def test_on_a_plain_canvas_the_whole_picture_is_translated(y, x):
    """The difference from the canvas is: an oracle on a large odd frame, by SciPy."""
    scene = scenes.paste(cutout(), canvas=40, background=0.4)
    raw = scene.draw(y, x).double().numpy() - 0.4
    start = np.zeros((3, 53, 49))
    start[:, 16:37, 16:33] = scene.draw(0, 0).double().numpy()[:, :21, :17] - 0.4
    # the frame of the object: 21+32 by 16+32+1
    row, column = math.floor(y), math.floor(x)
    by = (0, y - row, x - column)
    moved = np.fft.ifftn(scipy.ndimage.fourier_shift(np.fft.fftn(start), by)).real
    expected = np.zeros((3, 100, 100))
    expected[:, 20 + row : 73 + row, 20 + column : 69 + column] = moved
    np.testing.assert_allclose(raw, expected[:, 36:76, 36:76], atol=1e-6)


def test_fractions_lie_between_their_neighbours():
    """A smooth blob at half a pixel is nearer to both neighbours than these to one another."""
    obj = scenes.soften(shift.prepare(cutout(), 24), 2.0)
    found = scenes.pictures(scenes.paste(obj, canvas=60), [[5, 5], [5, 5.5], [5, 6]])
    apart = [float((found[i] - found[j]).norm()) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert max(apart[:2]) < 0.7 * apart[2]
    assert apart[0] == pytest.approx(apart[1], rel=0.02)


def test_ringing_is_measured_and_softening_reduces_it():
    square = torch.ones(4, 20, 20)
    places = torch.tensor([[10, 10], [10, 10.5], [10.5, 10.5]])
    hard = scenes.overshoot(scenes.paste(square, canvas=64, background=0.0), places)
    soft = scenes.overshoot(scenes.paste(scenes.soften(square), canvas=64, background=0.0), places)
    assert hard[0] == soft[0] == 0
    assert hard[1] > 0.02
    assert (soft[1:] < hard[1:] / 8).all()
    found = scenes.pictures(scenes.paste(square, canvas=64, background=0.0), places)
    assert found.min() >= 0
    assert found.max() <= 1


def test_soften_is_a_gaussian_and_keeps_the_mass():
    obj = cutout()
    soft = scenes.soften(obj, 0.7)
    assert soft.shape == (4, 27, 22)
    expected = scipy.ndimage.gaussian_filter(
        np.pad((obj[:3] * obj[3:]).numpy(), ((0, 0), (3, 3), (3, 3))),
        (0, 0.7, 0.7),
        mode="constant",
        radius=3,
    )
    np.testing.assert_allclose((soft[:3] * soft[3:]).numpy(), expected, atol=1e-6)
    assert float(soft[3].sum()) == pytest.approx(float(obj[3].sum()), rel=1e-5)
    assert torch.equal(scenes.soften(obj, 0), obj)
    photo = noise(3, 20, 25)
    expected = scipy.ndimage.gaussian_filter(photo.numpy(), (0, 0.7, 0.7), mode="reflect", radius=3)
    np.testing.assert_allclose(scenes.soften(photo).numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="sigma"):
        scenes.soften(obj, -1.0)
    with pytest.raises(ValueError, match="alpha"):
        scenes.soften(obj[:2])
    with pytest.raises(ValueError, match="mask is empty"):
        scenes.soften(obj * 0)


# ----------------------------------------------------------------------------------- crop, circular


def test_whole_windows_are_slices():
    photo = noise(3, 30, 41)
    scene = scenes.crop(photo, 24)
    assert (scene.low, scene.high) == ((0, 0), (6, 17))
    found = scenes.pictures(scene, [[0, 0], [6, 17], [2, 9]])
    assert torch.equal(found[0], photo[:, :24, :24])
    assert torch.equal(found[1], photo[:, 6:, 17:])
    assert torch.equal(found[2], photo[:, 2:26, 9:33])


def test_fractional_windows_interpolate():
    at = smooth(40, 50)
    scene = scenes.crop(at(0, 0), 24)
    found = scenes.pictures(scene, [[8.25, 13.5]])[0]
    # mirrored ends kink where the formula does not: a little of that reaches the middle
    torch.testing.assert_close(found, at(-8.25, -13.5)[:, :24, :24], atol=4e-3, rtol=0)


def test_photographs_hardly_overshoot():
    photos = images.load("photos", limit=4, seed=0)
    for photo in photos:
        assert scenes.overshoot(scenes.crop(photo, 160), [[8.5, 8.5]]) < 0.01


def test_circular_shift_is_a_roll():
    photo = noise(3, 15, 17)
    found = scenes.pictures(scenes.circular(photo), [[0, 0], [3, -2], [-40, 100]])
    assert torch.equal(found[0], photo)
    assert torch.equal(found[1], photo.roll((3, -2), (1, 2)))
    assert torch.equal(found[2], photo.roll((-40, 100), (1, 2)))


# -------------------------------------------------------------------------------------- composite


def test_all_three_start_from_one_picture():
    obj, photo = cutout(), noise(3, 60, 70)
    start = [
        scenes.pictures(
            scenes.composite(obj, photo, moving=m, window=48, at=(5, 9), place=(3, 20)), [[0, 0]]
        )
        for m in ("object", "background", "both")
    ]
    expected = shift.compose(
        obj, torch.tensor([[3, 20]]), canvas=48, background=photo[:, 5:53, 9:57]
    )
    assert all(torch.equal(found, expected) for found in start)


@unhurried
@given(st.integers(-3, 5), st.integers(-9, 8))
def test_what_moves_moves_and_the_rest_stays(dy, dx):
    obj, photo, options = (
        cutout(),
        noise(3, 60, 70),
        {"window": 48, "at": (5, 10), "place": (3, 20)},
    )
    found = {
        m: scenes.pictures(scenes.composite(obj, photo, moving=m, **options), [[dy, dx]])
        for m in ("object", "background", "both")
    }
    moved, seen = torch.tensor([[3 + dy, 20 + dx]]), (5 - dy, 10 - dx)
    ground = photo[:, seen[0] : seen[0] + 48, seen[1] : seen[1] + 48]
    still = photo[:, 5:53, 10:58]
    stays = torch.tensor([[3, 20]])
    assert torch.equal(found["object"], shift.compose(obj, moved, canvas=48, background=still))
    assert torch.equal(found["background"], shift.compose(obj, stays, canvas=48, background=ground))
    assert torch.equal(found["both"], shift.compose(obj, moved, canvas=48, background=ground))


def test_moving_one_and_then_the_other_is_moving_both():
    """At fractions too, but for the product of colour and alpha; smooth pictures have little."""
    obj = scenes.soften(cutout(), 2.0)
    at = smooth(60, 70)
    options = {"window": 48, "at": (5, 10), "place": (3, 12)}
    by_both = scenes.composite(obj, at(0, 0), moving="both", **options)
    both = scenes.pictures(by_both, [[0.5, 2.5]])
    shifted = scenes.translate(at(0, 0), (0.5, 2.5), ends="mirror")
    by_object = scenes.composite(obj, shifted, moving="object", **options)
    one_by_one = scenes.pictures(by_object, [[0.5, 2.5]])
    assert (both - one_by_one).abs().max() < 5e-3
    assert (both - scenes.pictures(by_both, [[0, 2]])).abs().max() > 0.05


def test_the_object_stays_whole_and_the_background_never_ends():
    obj, photo = cutout(), noise(3, 60, 70)
    options = {"window": 48, "at": (5, 10), "place": (3, 20)}
    found = {
        m: scenes.composite(obj, photo, moving=m, **options)
        for m in ("object", "background", "both")
    }
    assert (found["object"].low, found["object"].high) == ((-3, -20), (24, 12))
    assert (found["background"].low, found["background"].high) == ((-7, -12), (5, 10))
    assert (found["both"].low, found["both"].high) == ((-3, -12), (5, 10))
    for scene in found.values():
        for end in (scene.low, scene.high):
            assert scenes.pictures(scene, [end]).shape == (1, 3, 48, 48)
            beyond = [end[0] + math.copysign(1, end[0]), end[1]]
            with pytest.raises(ValueError, match="outside"):
                scenes.pictures(scene, [beyond])


# ------------------------------------------------------------------------------------- bad input


def test_photograph_smaller_than_the_window():
    for build in (
        lambda: scenes.crop(noise(3, 20, 50), 24),
        lambda: scenes.composite(cutout(), noise(3, 20, 50), moving="object", window=24),
    ):
        with pytest.raises(ValueError, match="20x50 px is smaller than the window of 24 px"):
            build()


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        (noise(3, 9, 9), "alpha"),
        (torch.cat([noise(3, 9, 9), torch.zeros(1, 9, 9)]), "mask is empty"),
        (noise(4, 70, 9), "does not fit"),
        (torch.full((4, 9, 9), math.nan), "finite"),
        ("tiger", "tensor"),
    ],
)
def test_bad_objects(obj, words):
    with pytest.raises(ValueError, match=words):
        scenes.paste(obj, canvas=40)
    with pytest.raises(ValueError, match=words):
        scenes.composite(obj, noise(3, 60, 60), moving="both", window=48)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([[0, math.nan]], "position 0 is not finite"),
        ([[0, 0], [math.inf, 0]], "position 1 is not finite"),
        ([[0, 0], [0, -0.5]], r"\(0.0, -0.5\) lies outside"),
        ([[7, 0]], "outside the protocol 'crop'"),
        ([0, 1], r"\(P, 2\)"),
        (torch.zeros(0, 2), "at least one"),
    ],
)
def test_bad_positions(positions, words):
    with pytest.raises(ValueError, match=words):
        scenes.pictures(scenes.crop(noise(3, 30, 41), 24), positions)


def test_bad_options():
    photo, obj = noise(3, 60, 60), cutout()
    with pytest.raises(ValueError, match=r"moving.*did you mean 'object'"):
        scenes.composite(obj, photo, moving="objekt", window=48)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at must be whole"):
        scenes.composite(obj, photo, moving="both", window=48, at=(13, 0))
    with pytest.raises(ValueError, match="place must be whole"):
        scenes.composite(obj, photo, moving="both", window=48, place=(0.5, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, h, w\)"):
        scenes.circular(obj)
    with pytest.raises(ValueError, match="finite and lie"):
        scenes.crop(photo * 2, 24)
    with pytest.raises(ValueError, match="window"):
        scenes.crop(photo, 0)


# ------------------------------------------------------------------------------------- positions


def test_grid():
    scene = scenes.crop(noise(3, 26, 31), 24)
    places, shape = scenes.grid(scene, 2)
    assert shape == (2, 4)
    assert places.tolist() == [[y, x] for y in (0, 2) for x in (0, 2, 4, 6)]
    assert scenes.grid(scene, 0.5)[1] == (5, 15)
    with pytest.raises(ValueError, match="single position"):
        scenes.grid(scene, 8)
    with pytest.raises(ValueError, match="no ends"):
        scenes.grid(scenes.circular(noise(3, 8, 8)), 1)
    with pytest.raises(ValueError, match="positive"):
        scenes.grid(scene, 0)


def test_line():
    assert scenes.line((1, 2), [0, 0.5]).tolist() == [[1, 2], [1, 2.5]]
    assert scenes.line((1, 2), [0, -1], axis=0).tolist() == [[1, 2], [0, 2]]
    with pytest.raises(ValueError, match="axis"):
        scenes.line((1, 2), [0], axis=2)
    with pytest.raises(ValueError, match="finite"):
        scenes.line((1, 2), [math.nan])


# -------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("pool", ["mean", "flatten"])
def test_cosines_agree_with_a_plain_loop(net, pool):
    photos = [noise(3, 40, 50, seed=i) for i in range(3)]
    members = [scenes.crop(photo, 32) for photo in photos]
    places = torch.tensor([[0, 0], [1, 2], [3.5, 0], [8, 18], [0.25, 7.75]])
    found = scenes.cosines(
        net, members, places, ["1", "2"], references=places[:2],
        pool=pool, batch_size=2,
    )  # fmt: skip
    for layer, depth in (("1", 2), ("2", 3)):
        for i, scene in enumerate(members):
            with torch.no_grad():
                shown = scenes.pictures(scene, places)
                maps = net.net[:depth]((shown - net.mean) / net.std)
            flat = maps.mean((2, 3)) if pool == "mean" else maps.flatten(1)
            expected = stats.cosine_similarity(flat[:2, None].double(), flat[None].double(), -1)
            torch.testing.assert_close(found[layer][i], expected, atol=1e-6, rtol=0)


def test_pairwise_is_what_references_give(net):
    members = [scenes.paste(cutout(seed=i), canvas=32) for i in range(2)]
    places = scenes.line((2, 0), [0, 1, 2.5, 9])
    pairs = scenes.cosines(net, members, places, ["2"])["2"]
    fixed = scenes.cosines(net, members, places, ["2"], references=places)["2"]
    torch.testing.assert_close(pairs, fixed, atol=1e-12, rtol=0)
    torch.testing.assert_close(pairs, pairs.mT)
    unit = scenes.vectors(net, members, places, ["2"])["2"]
    torch.testing.assert_close(unit @ unit.mT, pairs, atol=1e-12, rtol=0)


def test_positions_of_each_scene(net):
    members = [scenes.crop(noise(3, 40, 50, seed=i), 32) for i in range(2)]
    places = torch.tensor([[[0.0, 0], [0, 4]], [[8, 0], [8, 4]]])
    both = scenes.vectors(net, members, places, ["2"])["2"]
    for i in range(2):
        one = scenes.vectors(net, [members[i]], places[i], ["2"])["2"]
        torch.testing.assert_close(both[i], one[0])
    with pytest.raises(ValueError, match="there are more"):
        scenes.vectors(net, [*members, members[0]], places, ["2"])


def test_features_stream_every_position_once(net):
    scene = scenes.circular(noise(3, 32, 32))
    places = scenes.line((0, 0), range(7))
    seen = [
        (index.tolist(), {k: tuple(v.shape) for k, v in batch.items()})
        for index, batch in scenes.features(net, scene, places, ["2"], batch_size=3)
    ]
    assert [index for index, _ in seen] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch["2"] for _, batch in seen] == [(3, 8), (3, 8), (1, 8)]


def test_circular_shifts_by_the_stride_are_exact_on_a_circular_net():
    """A net on the torus with stride 2: its mean is the same after every second pixel only."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    down = nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular")
    net = tiny(conv, nn.ReLU(), down, nn.ReLU())
    scene = scenes.circular(noise(3, 32, 32))
    places = scenes.line((0, 0), [*range(9), 0.5, 1.5, 2.5])
    found = scenes.cosines(net, [scene], places, ["3"], optimise=False)["3"]
    ways, mean = scenes.by_displacement(found, places)
    change = 1 - mean[0]
    across = ways[:, 1]
    whole = across % 2 == 0
    assert change[whole].max() < 1e-12
    assert change[~whole].min() > 1e-7
    assert scenes.recovery(change, across, 2) > 0


def test_unknown_layer_pool_and_empty_scenes(net):
    scene = scenes.circular(noise(3, 32, 32))
    with pytest.raises(ValueError, match="9"):
        scenes.cosines(net, [scene], [[0, 0]], ["9"])
    with pytest.raises(ValueError, match="pool"):
        scenes.cosines(net, [scene], [[0, 0]], ["2"], pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single string"):
        scenes.cosines(net, [scene], [[0, 0]], "2")
    with pytest.raises(ValueError, match="at least one layer"):
        scenes.vectors(net, [scene], [[0, 0]], [])
    with pytest.raises(ValueError, match="batch_size"):
        scenes.vectors(net, [scene], [[0, 0]], ["2"], batch_size=0)
    for reduce in (scenes.cosines, scenes.vectors):
        with pytest.raises(ValueError, match="no scenes"):
            reduce(net, [], [[0, 0]], ["2"])


# -------------------------------------------------------------------------------------- reducers


def test_by_displacement_averages_pairs():
    places = torch.tensor([[0, 0], [0, 1], [2, 0], [0, 2]])
    values = torch.arange(32.0).reshape(2, 4, 4)
    values = values + values.mT
    ways, mean = scenes.by_displacement(values, places)
    assert ways.tolist() == [[0, 0], [0, 1], [0, 2], [2, -2], [2, -1], [2, 0]]
    pairs = {(0, 1): [(0, 1), (1, 3)], (0, 2): [(0, 3)], (2, -1): [(1, 2)], (2, 0): [(0, 2)]}
    for way, members in pairs.items():
        k = ways.tolist().index(list(way))
        expected = torch.stack([values[:, i, j] for i, j in members]).mean(0)
        torch.testing.assert_close(mean[:, k], expected.double())


def test_by_displacement_with_references_and_decimals():
    places = scenes.line((0, 0), [0.1, 0.3, 0.4])
    ways, mean = scenes.by_displacement(noise(3, 1, 3), places, places[:1])
    torch.testing.assert_close(ways[:, 1], torch.tensor([0, 0.2, 0.3]).double(), atol=1e-6, rtol=0)
    assert mean.shape == (3, 3)
    ways, _ = scenes.by_displacement(noise(3, 3, 3), places)
    assert len(ways) == 4
    with pytest.raises(ValueError, match="do not fit"):
        scenes.by_displacement(noise(3, 3, 3), places, places[:1])


def test_recovery_of_known_curves():
    away = torch.arange(0, 33).double()
    ripple = (1 - torch.cos(2 * math.pi * away / 8)) / 2
    rising = torch.stack([away, away.sqrt(), ripple, ripple + away])
    found = scenes.recovery(rising, away, 8)
    assert found[0] == pytest.approx(0)
    assert -0.2 < found[1] < 0
    assert found[2] == pytest.approx(1)
    assert found[3] == pytest.approx(1)
    assert scenes.recovery(ripple, away, 4) == pytest.approx((3 - 4) / 7 / 2)  # 4 troughs, 3 tops
    share = scenes.recovery(torch.stack([away, ripple, ripple * 0]), away, 8, relative=True)
    assert share.tolist() == pytest.approx([0, 1, 0])  # the neighbours of 8 are 4 and 12
    # fractions are used where the stride is odd
    halves = torch.tensor([0, 0.5, 1, 1.5])
    assert scenes.recovery(torch.tensor([0.0, 1, 0, 1]), halves, 1) == pytest.approx(1)
    with pytest.raises(ValueError, match="no multiple of 64"):
        scenes.recovery(ripple, away, 64)
    with pytest.raises(ValueError, match="stride"):
        scenes.recovery(ripple, away, 0)
    with pytest.raises(ValueError, match="distances"):
        scenes.recovery(ripple[:3], away, 2)


def test_scene_of_a_packaged_object_and_photograph():
    obj = shift.prepare(images.load("objects", limit=1, seed=0)[0], 64)
    photo = images.load("photos", limit=1, seed=0)[0]
    scene = scenes.composite(scenes.soften(obj), photo, moving="object", window=160)
    found = scenes.pictures(scene, [[0, 0], [0.5, 0], [0, 1]])
    assert found.shape == (3, 3, 160, 160)
    assert float(F.mse_loss(found[0], found[1])) < float(F.mse_loss(found[0], found[2]))
