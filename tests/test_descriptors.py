"""Descriptors against plain loops, scikit-image where definitions meet, and their symmetries."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage import feature, filters
from torch import Tensor

from fmlib import descriptors
from fmlib.descriptors import make

# ------------------------------------------------------------------ the definitions, as plain loops


def loop_gradient(image: np.ndarray, border: str) -> np.ndarray:
    """(2, H, W) from (C, H, W) in [0, 1]: of the channel with the largest gradient."""
    channels, height, width = image.shape
    out = np.zeros((2, height, width))
    for y in range(height):
        for x in range(width):
            edge = y in (0, height - 1) or x in (0, width - 1)
            if edge and border == "zero":
                continue
            best = -1.0
            for c in range(channels):

                def level(row: int, column: int, c: int = c) -> float:
                    inside = 0 <= row < height and 0 <= column < width
                    return 255 * image[c, row, column] if inside else 128

                dx = (level(y, x + 1) - level(y, x - 1)) / 2
                dy = (level(y + 1, x) - level(y - 1, x)) / 2
                if dx**2 + dy**2 > best:
                    best = dx**2 + dy**2
                    out[:, y, x] = dx, dy
    return out


def loop_bins(gradient: np.ndarray, directions: int, bilinear: bool) -> np.ndarray:
    """(K, H, W): the formula of the paper, with its arc cosine."""
    _, height, width = gradient.shape
    out = np.zeros((directions, height, width))
    for y in range(height):
        for x in range(width):
            dx, dy = gradient[:, y, x]
            size = math.hypot(dx, dy)
            if size == 0:
                continue
            cosines = [
                (dx * math.cos(2 * math.pi * k / directions))
                + (dy * math.sin(2 * math.pi * k / directions))
                for k in range(directions)
            ]
            if bilinear:
                for k, cosine in enumerate(cosines):
                    angle = math.acos(max(-1.0, min(1.0, cosine / size)))
                    out[k, y, x] = size * max(0.0, 1 - directions / (2 * math.pi) * angle)
            else:
                out[int(np.argmax(cosines)), y, x] = size
    return out


def loop_cells(maps: np.ndarray, rows: int, columns: int, cell: int) -> np.ndarray:
    """Each pixel gives to its four nearest cells; what falls beside the grid is lost."""
    channels, height, width = maps.shape
    out = np.zeros((channels, rows, columns))
    for y in range(height):
        for x in range(width):
            hy, hx = (y + 0.5) / cell - 0.5, (x + 0.5) / cell - 0.5
            top, left = math.floor(hy), math.floor(hx)
            for i, wy in ((top, 1 - hy + top), (top + 1, hy - top)):
                for j, wx in ((left, 1 - hx + left), (left + 1, hx - left)):
                    if 0 <= i < rows and 0 <= j < columns:
                        out[:, i, j] += wy * wx * maps[:, y, x]
    return out


def loop_hog(image: np.ndarray, variant: str, bilinear: bool, cell: int, half: int) -> np.ndarray:
    """One image (C, H, W); `half` is the number of undirected orientations."""
    network = variant == "network"
    gradient = loop_gradient(image, "grey" if network else "zero")
    if not network:
        gradient = 2 * gradient
    _, height, width = image.shape
    rows, columns = (
        (height // cell, width // cell)
        if network
        else (math.floor(height / cell + 0.5), math.floor(width / cell + 0.5))
    )
    h = loop_cells(loop_bins(gradient, 2 * half, bilinear), rows, columns, cell)
    u = h[:half] + h[half:]
    out = np.zeros((3 * half + (0 if network else 4), rows, columns))
    for i in range(rows):
        for j in range(columns):
            for b, (di, dj) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
                energy = 0.0
                exists = True
                for p in (i, i + di):
                    for q in (j, j + dj):
                        if not (0 <= p < rows and 0 <= q < columns):
                            exists = False
                        p_in, q_in = min(max(p, 0), rows - 1), min(max(q, 0), columns - 1)
                        energy += float((u[:, p_in, q_in] ** 2).sum())
                if network and not exists:
                    continue
                norm = max(math.sqrt(energy), 1e-6) if network else math.sqrt(energy + 1e-4)
                parts = np.minimum(np.concatenate([h[:, i, j], u[:, i, j]]) / norm, 0.2)
                out[: 3 * half, i, j] += parts / 2
                if not network:
                    out[3 * half + b, i, j] = parts[2 * half :].sum() / math.sqrt(18)
    return out


def loop_dsift(image: np.ndarray, cell: int, step: int) -> np.ndarray:
    bins = loop_bins(loop_gradient(image, "zero")[:, 1:-1, 1:-1], 8, True)
    _, height, width = bins.shape

    def cell_value(i: int, j: int) -> np.ndarray:
        total = np.zeros(8)
        for y in range(2 * cell):
            for x in range(2 * cell):
                wy = 1 - abs(y - (2 * cell - 1) / 2) / cell
                wx = 1 - abs(x - (2 * cell - 1) / 2) / cell
                total += wy * wx * bins[:, i * cell + y, j * cell + x]
        return total

    rows, columns = (height - 2 * cell) // cell + 1, (width - 2 * cell) // cell + 1
    places = [[(i, j) for j in range(0, columns - 3, step)] for i in range(0, rows - 3, step)]
    out = np.zeros((128, len(places), len(places[0])))
    for a, line in enumerate(places):
        for b, (i, j) in enumerate(line):
            vector: list[float] = []
            for p in range(4):
                for q in range(4):
                    window = math.exp(-((p - 1.5) ** 2 + (q - 1.5) ** 2) / (2 * 1.5**2))
                    vector += list(window * cell_value(i + p, j + q))
            unit = np.array(vector) / math.sqrt(sum(v * v for v in vector) + 1e-6)
            out[:, a, b] = np.minimum(unit, 0.2)
    return out


def pattern_class(bits: list[bool]) -> int:
    """Class of eight bits, clockwise from the right neighbour."""
    if sum(bits) in (0, 8):
        return 56
    starts = [b for b in range(8) if bits[b] and not bits[b - 1]]
    return 7 * starts[0] + sum(bits) - 1 if len(starts) == 1 else 57


def loop_lbp(image: np.ndarray, cell: int) -> np.ndarray:
    """One grey image (H, W)."""
    height, width = image.shape
    maps = np.zeros((58, height, width))
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            bits = []
            for b in range(8):
                dy, dx = round(math.sin(b * math.pi / 4)), round(math.cos(b * math.pi / 4))
                bits.append(bool(image[y + dy, x + dx] > image[y, x]))
            maps[pattern_class(bits), y, x] = 1
    counts = loop_cells(maps, height // cell, width // cell, cell)
    return np.sqrt(counts / counts.sum(0))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()


def luma(x: Tensor) -> np.ndarray:
    """(H, W) of one image (3, H, W)."""
    r, g, b = x.numpy()
    return 0.299 * r + 0.587 * g + 0.114 * b


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("variant", ["uoctti", "network"])
def test_hog_is_its_definition(variant, bilinear):
    x = noise(2, 3, 20, 29)  # the last row and column of cells are cut differently by the variants
    module = descriptors.HOG(variant=variant, bilinear=bilinear)
    expected = np.stack([loop_hog(luma(i)[None], variant, bilinear, 8, 9) for i in x])
    np.testing.assert_allclose(module(x).numpy(), expected, rtol=1e-9, atol=1e-12)
    assert module.channels == expected.shape[1] == (31 if variant == "uoctti" else 27)


@pytest.mark.parametrize("variant", ["uoctti", "network"])
def test_hog_options_are_their_definition(variant):
    x = noise(1, 3, 15, 21, seed=1)
    module = descriptors.HOG(variant=variant, cell=5, orientations=4, colour="strongest")
    expected = loop_hog(x[0].numpy(), variant, False, 5, 4)
    np.testing.assert_allclose(module(x)[0].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("cell", "step", "size"), [(5, 3, (27, 43)), (3, 1, (20, 18))])
def test_dsift_is_its_definition(cell, step, size):
    x = noise(1, 3, *size)
    module = make("dsift", cell=cell, step=step)
    expected = loop_dsift(luma(x[0])[None], cell, step)
    np.testing.assert_allclose(module(x)[0].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert module.channels == 128
    faint = 0.5 + 1e-7 * x  # where the additive constant counts
    expected = loop_dsift(luma(faint[0])[None], cell, step)
    assert 1e-3 < np.linalg.norm(expected, axis=0).max() < 0.5
    np.testing.assert_allclose(module(faint)[0].numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cell", [16, 5])
def test_lbp_is_its_definition(cell):
    x = (noise(1, 3, 20, 34) * 9).round() / 9  # with ties
    grey = x[:, :1]
    expected = loop_lbp(grey[0, 0].numpy(), cell)
    found = make("lbp", cell=cell)(grey)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12)
    coloured = make("lbp", cell=cell)(noise(1, 3, 20, 34))
    expected = loop_lbp(luma(noise(1, 3, 20, 34)[0]), cell)
    np.testing.assert_allclose(coloured[0].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=1), torch.ones_like(found[:, 0]))


def test_each_of_the_256_patterns_has_its_class():
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    patch = torch.full((256, 1, 3, 3), 0.5)
    for b, (row, column) in enumerate(
        [(1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0), (0, 1), (0, 2)]
    ):
        patch[:, 0, row, column] = bits[:, b].float()
    found = make("lbp", cell=3)(patch)[:, :, 0, 0]
    expected = torch.tensor([pattern_class([bool(b) for b in line]) for line in bits])
    torch.testing.assert_close(found, torch.nn.functional.one_hot(expected, 58).float())
    assert len(set(expected.tolist())) == 58


# ----------------------------------------------------------------------------------- scikit-image


def test_orientation_bins_meet_those_of_scikit_image():
    # Its undirected bins start at 0° and count each pixel whole; ours are centred at 0°. 18 bins of
    # 10° there refine 9 of 20° here. (Its cells are boxes, not triangles, and its blocks are
    # renormalised after the clamp: later steps do not meet. At the border it drops one component of
    # the gradient, ours both: so a frame without any. At the frame's inner edge gradients are
    # upright, where its bins 4 and 5 part the other way.)
    x = torch.nn.functional.pad(noise(1, 1, 20, 14), (2, 2, 2, 2), value=0.5)
    bins = descriptors.oriented_gradients(x, 18, border="zero")[0]
    undirected = (bins[:9] + bins[9:]).numpy()
    options = {"orientations": 18, "cells_per_block": (1, 1), "feature_vector": False}
    fine = feature.hog(x[0, 0].numpy(), pixels_per_cell=(1, 1), block_norm="L2", **options)
    for k in range(9):
        votes = fine[:, :, 0, 0, 2 * k - 1] + fine[:, :, 0, 0, 2 * k]
        inner = np.s_[2:-2]
        np.testing.assert_array_equal(votes[inner] > 0.5, undirected[k][inner] > 0)
    whole = feature.hog(x[0, 0].numpy(), pixels_per_cell=(24, 18), block_norm="L1", **options)
    shares = [whole[0, 0, 0, 0, 2 * k - 1] + whole[0, 0, 0, 0, 2 * k] for k in range(9)]
    shares[4:6] = [sum(shares[4:6])]
    sums = undirected.sum((1, 2))
    sums = np.array([*sums[:4], sums[4] + sums[5], *sums[6:]])
    np.testing.assert_allclose(sums / sums.sum(), shares, rtol=1e-4)


def test_binary_patterns_meet_those_of_scikit_image():
    # Its neighbours lie on a circle: those on the axes meet ours at radius 1, the diagonal ones at
    # √2. A tie counts as brighter there: so no ties. Its bits go counter-clockwise.
    values = np.random.default_rng(0).permutation(24 * 20).reshape(24, 20)
    inner = np.s_[1:-1, 1:-1]
    axial = feature.local_binary_pattern(values, 8, 1.0).astype(int)[inner]
    diagonal = feature.local_binary_pattern(values, 8, math.sqrt(2)).astype(int)[inner]
    codes = (axial & 0b01010101) | (diagonal & 0b10101010)
    bits = np.stack([(codes >> ((8 - b) % 8)) & 1 for b in range(8)], -1)
    expected = [pattern_class([bool(b) for b in line]) for line in bits.reshape(-1, 8)]
    image = torch.from_numpy(values / values.max())
    patches = image.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 1, 3, 3)
    found = make("lbp", cell=3)(patches)[:, :, 0, 0].argmax(1)
    assert found.tolist() == expected


def test_dsift_is_close_to_scikit_image_at_an_upright_keypoint(picture):
    # There: a Gaussian window on pixels (σ of 2 cells), renormalised and rounded to bytes. With
    # σ = 5/3 px its cells have 5 px; the first scale of its first octave has a blur of 1.6 px.
    levels = luma(picture("astronaut", 96).double())
    sift = feature.SIFT(upsampling=1)
    sift.detect(levels)
    places = np.array([[13, 13], [28, 43], [43, 28], [58, 73]])
    count = len(places)
    sift.positions = places.astype(float)
    sift.scales = sift.octaves = np.zeros(count, dtype=int)
    sift.sigmas, sift.orientations = np.full(count, 5 / 3), np.zeros(count)
    sift.extract(levels)
    # Its angles run from the rows' axis to the columns'.
    theirs = np.asarray(sift.descriptors, float).reshape(count, 4, 4, 8)
    theirs = theirs[..., [(2 - k) % 8 for k in range(8)]].reshape(count, 128)
    blurred = filters.gaussian(levels, math.sqrt(1.6**2 - 0.5**2), mode="reflect")
    ours = make("dsift")(torch.from_numpy(blurred)[None, None])[0]
    for vector, (row, column) in zip(theirs, places, strict=True):
        mine = ours[:, (row - 13) // 15, (column - 13) // 15].numpy()
        cosine = mine @ vector / np.linalg.norm(mine) / np.linalg.norm(vector)
        assert cosine > 0.98, (row, column, cosine)


def test_sift_grid_holds_the_keypoints_of_scikit_image(picture):
    x = picture("astronaut", 96).double()
    sift = feature.SIFT()
    sift.detect_and_extract(luma(x))
    grid = make("sift_grid")(x[None])[0]
    assert grid.shape == (133, 24, 24)
    cells: dict[tuple[int, int], list[np.ndarray]] = {}
    for place, sigma, angle, vector in zip(
        np.asarray(sift.positions),
        np.asarray(sift.sigmas),
        np.asarray(sift.orientations),
        np.asarray(sift.descriptors),
        strict=True,
    ):
        y, x_ = place
        # Its angle runs from the rows' axis to the columns': sine and cosine change places.
        rest = [x_ % 4, y % 4, math.cos(angle), math.sin(angle), math.log(sigma)]
        cells.setdefault((int(y // 4), int(x_ // 4)), []).append(np.r_[vector / 512, rest])
    assert max(map(len, cells.values())) > 1  # collisions
    for i in range(24):
        for j in range(24):
            found = grid[:, i, j].numpy()
            choices = cells.get((i, j), [np.zeros(133)])
            assert any(np.allclose(found, choice, atol=1e-9) for choice in choices)


def test_sift_grid_picks_by_seed_and_not_by_batch(picture):
    x = torch.stack([picture("astronaut", 64), picture("coffee", 64)])
    first, second = make("sift_grid", cell=16), make("sift_grid", cell=16, seed=1)
    a, b = first(x), second(x)
    assert (a != b).any()
    assert torch.equal(a, first(x))
    assert torch.equal(a[1:], first(x[1:]))
    assert torch.equal((a != 0).any(1), (b != 0).any(1))
    assert a.dtype == torch.float32


@pytest.mark.parametrize(("axis", "angle"), [(3, 0.0), (2, math.pi / 2)])
def test_keypoint_angles_are_those_of_the_gradient(axis, angle):
    place = torch.arange(64).double() - 31
    blob = (-(place[:, None] ** 2 + place**2) / 50).exp()
    ramp = torch.linspace(0, 0.5, 64).double().view(1, 1, *((1, 64) if axis == 3 else (64, 1)))
    found = make("sift_grid").keypoints((0.3 * blob[None, None] + ramp)[0])  # pyright: ignore
    near = np.hypot(found.x - 31, found.y - 31) < 3
    assert near.any()
    assert np.cos(found.angle[near] - angle).max() > 0.98
    assert 2 < found.scale[near].min() < 9


def test_no_keypoints_leave_the_grid_empty():
    grid = make("sift_grid", cell=5)(torch.full((1, 3, 17, 23), 0.5))
    assert grid.shape == (1, 133, 4, 5)
    assert not grid.any()


# ------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("hog", {"cell": 4}, (8, 9)),
        ("hog", {"cell": 4, "variant": "network", "colour": "strongest"}, (8, 9)),
        ("hogb", {"cell": 4}, (9, 8)),
        ("hogb", {"cell": 4, "variant": "network"}, (9, 8)),
        ("dsift", {"cell": 2, "step": 1}, (12, 13)),
        ("lbp", {"cell": 4, "softness": 0.1}, (6, 8)),
    ],
)
def test_derivatives_are_right(name, options, size):
    module = make(name, **options)
    x = noise(1, 3 if "colour" in options else 1, *size, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(module, x, eps=1e-7, atol=1e-4, rtol=1e-4)


DIFFERENTIABLE = [
    ("hog", {}),
    ("hog", {"variant": "network"}),
    ("hog", {"colour": "strongest"}),
    ("hogb", {}),
    ("hogb", {"variant": "network"}),
    ("dsift", {}),
    ("lbp", {"softness": 0.05}),
    ("lbp", {"softness": 1e-4}),
]


def stripes() -> Tensor:
    """Every gradient is exactly along an axis, or zero: kinks of all kinds."""
    x = torch.zeros(1, 3, 32, 32)
    x[..., 8:16, :] = 1
    x[..., 24:] = 1
    return x


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 3, 32, 32),
        torch.full((1, 3, 32, 32), 0.5),
        stripes(),
        1e-30 * stripes(),
        noise(1, 3, 32, 32),
    ],
    ids=["black", "flat", "stripes", "faint", "noise"],
)
@pytest.mark.parametrize(("name", "options"), DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_everywhere(name, options, image, dtype):
    x = image.to(dtype).requires_grad_()
    y = make(name, **options)(x)
    assert y.isfinite().all()
    (gradient,) = torch.autograd.grad((y * noise(*y.shape).to(y)).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "options"), DIFFERENTIABLE[:-1])  # the last one saturates
def test_gradients_reach_every_pixel_of_noise(name, options):
    module = make(name, **options)
    assert module.differentiable
    size = 42 if name == "dsift" else 32
    x = noise(1, 3, size, size).requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad((y * noise(*y.shape)).sum(), x)
    moved = gradient.abs().sum(1)[:, 1:-1, 1:-1] > 0
    assert moved.double().mean() > 0.95


@pytest.mark.parametrize("name", ["lbp", "sift_grid"])
def test_the_others_say_that_they_have_none(name):
    module = make(name)
    assert not module.differentiable
    assert not module(torch.rand(1, 3, 32, 32).requires_grad_()).requires_grad


def test_the_kink_of_bilinear_bins_is_flat():
    # One slope along x through exactly horizontal gradients: weights would change either way.
    x = torch.linspace(0, 1, 5).double().expand(1, 1, 5, 5).clone().requires_grad_()
    bins = descriptors.oriented_gradients(x, 8, bilinear=True, border="crop")
    assert bins[0, 0].min() > 0
    assert not bins[0, 1:].any()
    (other,) = torch.autograd.grad(bins[0, 1].sum() + bins[0, 7].sum(), x)
    assert not other.any()


def test_soft_patterns_tend_to_the_hard_ones():
    x = noise(1, 3, 32, 32)
    hard = make("lbp")(x)
    errors = [float((make("lbp", softness=s)(x) - hard).abs().max()) for s in (1e-1, 1e-3, 1e-6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


# ------------------------------------------------------------------------------------- symmetries


def vertical(module: descriptors.HOG) -> list[int]:
    k = module.orientations
    return (
        [-i % (2 * k) for i in range(2 * k)]
        + [2 * k + -i % k for i in range(k)]
        + [3 * k + b for b in (2, 3, 0, 1)]
    )[: module.channels]


SYMMETRIC: list[tuple[str, dict, tuple[int, int]]] = [
    ("hog", {}, (32, 40)),
    ("hog", {"variant": "network", "cell": 4}, (20, 24)),
    ("hogb", {"orientations": 6}, (24, 32)),
    ("hogb", {"colour": "strongest"}, (24, 32)),
    ("dsift", {}, (27, 42)),
    ("dsift", {"cell": 3, "step": 1}, (26, 20)),
    ("lbp", {}, (32, 48)),
    ("lbp", {"cell": 8, "softness": 0.1}, (16, 24)),
]


@pytest.mark.parametrize(("name", "options", "size"), SYMMETRIC)
def test_a_mirrored_image_permutes_channels(name, options, size):
    module = make(name, **options)
    x = noise(1, 3, *size)
    channels = module.mirror_permutation()
    assert sorted(channels.tolist()) == list(range(module.channels))
    torch.testing.assert_close(module(x.flip(-1)), module(x).flip(-1)[:, channels])


def test_a_grid_of_keypoints_has_no_mirror():
    with pytest.raises(NotImplementedError, match="sift_grid has no mirror permutation"):
        make("sift_grid").mirror_permutation()


@pytest.mark.parametrize("variant", ["uoctti", "network"])
def test_hog_upside_down_and_turned(variant):
    module = descriptors.HOG(variant=variant)
    x, bins = noise(1, 3, 24, 32), 9
    upside = module(x).flip(-2)[:, vertical(module)]
    torch.testing.assert_close(module(x.flip(-2)), upside)
    half_turn = [(k + bins) % (2 * bins) for k in range(2 * bins)]
    half_turn += [*range(2 * bins, 3 * bins), *(3 * bins + b for b in (3, 2, 1, 0))]
    expected = module(x).flip((-1, -2))[:, half_turn[: module.channels]]
    torch.testing.assert_close(module(x.flip((-1, -2))), expected)


def test_quarter_turns():
    # Counter-clockwise: angles fall by 90°, channel k is filled from k + K/4.
    x = noise(1, 3, 32, 32)
    hog = descriptors.HOG(orientations=8)
    channels = [(k + 4) % 16 for k in range(16)] + [16 + (k + 4) % 8 for k in range(8)]
    channels += [24 + b for b in (1, 3, 0, 2)]
    turned = torch.rot90(hog(x), 1, (-2, -1))[:, channels]
    torch.testing.assert_close(hog(torch.rot90(x, 1, (-2, -1))), turned)
    dsift = make("dsift", cell=4, step=1)
    x = noise(1, 3, 26, 26)
    plain = dsift(x).unflatten(1, (4, 4, 8))
    expected = torch.rot90(torch.rot90(plain, 1, (-2, -1)), 1, (1, 2)).roll(-2, 3).flatten(1, 3)
    torch.testing.assert_close(dsift(torch.rot90(x, 1, (-2, -1))), expected)


@pytest.mark.parametrize(
    ("name", "options"), [("hog", {}), ("hogb", {}), ("dsift", {}), ("lbp", {})]
)
def test_brightness_changes_nothing(name, options):
    module, x = make(name, **options), noise(2, 3, 32, 48) / 2
    torch.testing.assert_close(module(x + 0.3), module(x), rtol=1e-6, atol=1e-8)


def test_brightness_shows_at_the_edge_of_the_published_network_only():
    module, x = make("hogb", variant="network"), noise(1, 3, 64, 64) / 2
    change = (module(x + 0.3) - module(x)).abs().amax(1)[0]
    assert change[2:-2, 2:-2].max() < 1e-9
    assert change[0].min() > 1e-3


def test_contrast_changes_nothing():
    x = noise(1, 3, 32, 48)
    middle = 128 / 255
    network = make("hog", variant="network")
    torch.testing.assert_close(network(middle + 0.2 * (x - middle)), network(x))
    for name in ("hog", "dsift"):  # but for their additive constants
        torch.testing.assert_close(make(name)(0.2 * x), make(name)(x), rtol=1e-5, atol=1e-7)
    assert torch.equal(make("lbp")(0.25 * x), make("lbp")(x))


def test_variants_of_hog_agree_inside():
    x = noise(1, 3, 64, 72)
    for name in ("hog", "hogb"):
        uoctti, network = make(name)(x), make(name, variant="network")(x)
        inner = np.s_[:, :27, 2:-2, 2:-2]
        torch.testing.assert_close(uoctti[inner], network[inner], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "options", "size"), SYMMETRIC)
def test_images_do_not_depend_on_their_batch(name, options, size):
    module, x = make(name, **options), noise(3, 3, *size).float()
    together = module(x)
    for n in range(3):
        torch.testing.assert_close(module(x[n : n + 1]), together[n : n + 1])


def test_values_by_hand():
    # Brighter to the right: direction 0. Brighter downwards: 90°, the centre of DSIFT's bin 2 and
    # half-way between HOG's bins 4 and 5.
    right = torch.linspace(0, 1, 52).expand(1, 3, 52, 52)
    down = right.mT
    slope = torch.tensor(255 / 51)
    for x, k in ((right, 0), (down, 4)):
        bins = descriptors.oriented_gradients(x, 18, border="crop")[0]
        torch.testing.assert_close(bins[k], slope.expand(50, 50), rtol=1e-4, atol=0)
        assert bins.sum(0).allclose(bins[k])
    bins = descriptors.oriented_gradients(down, 18, bilinear=True, border="crop")[0]
    torch.testing.assert_close(bins[4], bins[5], rtol=1e-3, atol=0)
    torch.testing.assert_close(bins[4] + bins[5], slope.expand(50, 50), rtol=1e-4, atol=0)
    for x, k in ((right, 0), (down, 2), (right.flip(-1), 4), (down.flip(-2), 6)):
        y = make("dsift")(x).unflatten(1, (16, 8))
        assert y[:, :, k].min() > 0.05
        assert y[:, :, [i for i in range(8) if i != k]].max() < 1e-3
    # A uniform slope fills one bin of each cell: in a block of four, h/n = ½, clamped to 0.2.
    inner = make("hog")(right)[0, :, 2:-2, 2:-2]
    torch.testing.assert_close(inner[0], torch.full_like(inner[0], 0.4))
    torch.testing.assert_close(inner[18], inner[0])
    torch.testing.assert_close(inner[27:], torch.full_like(inner[27:], 0.2 / math.sqrt(18)))
    assert not inner[1:18].any()
    assert not inner[19:27].any()


def test_the_strongest_colour_sees_what_grey_does_not():
    red, green, _ = 0.299, 0.587, 0.114
    x = torch.zeros(1, 3, 32, 32).double()
    x[:, 0, :, :16] = 0.5 * green  # both sides have the same luma
    x[:, 1, :, 16:] = 0.5 * red
    assert not make("dsift")(x).any()
    assert make("dsift", colour="strongest")(x).any()
    strong = descriptors.oriented_gradients(x, 2, colour="strongest")[0]
    assert strong[0].max() == 0  # the red step falls to the right, and is the larger
    assert strong[1].max() == pytest.approx(255 * 0.5 * green / 2)


# ------------------------------------------------------------------------------- shapes and errors


@pytest.mark.parametrize(
    ("name", "options", "smallest"),
    [
        ("hog", {}, 8),
        ("hog", {"cell": 2}, 3),
        ("hog", {"variant": "network"}, 16),
        ("dsift", {}, 27),
        ("dsift", {"cell": 8}, 42),
        ("lbp", {}, 16),
        ("sift_grid", {}, 16),
    ],
)
def test_sizes(name, options, smallest):
    module = make(name, **options)
    assert module.smallest == smallest
    for height, width in ((smallest, smallest + 13), (smallest + 37, smallest + 5)):
        y = module(torch.rand(2, 3, height, width))
        assert y.shape == (2, module.channels, *module.grid(height, width))
        assert y.isfinite().all()
    with pytest.raises(ValueError, match=f"{name}.* at least {smallest} × {smallest} px, got"):
        module(torch.rand(1, 3, smallest + 20, smallest - 1))


def test_sizes_of_the_learned_inverter():
    x = torch.rand(1, 3, 64, 96)
    assert make("hog")(x).shape == (1, 31, 8, 12)
    assert make("lbp")(x).shape == (1, 58, 4, 6)
    assert make("sift_grid")(x).shape == (1, 133, 16, 24)


@pytest.mark.parametrize("name", ["hog", "hogb", "dsift", "lbp", "sift_grid"])
def test_bad_images(name):
    module = make(name)
    good = torch.rand(1, 3, 48, 48)
    for bad, message in (
        (good[0], r"\(N, 3, H, W\) or \(N, 1, H, W\), got \(3, 48, 48\)"),
        (good.expand(1, 3, 48, 48)[:, :2], r"got \(1, 2, 48, 48\)"),
        (good.numpy(), "got ndarray"),
        ((255 * good).to(torch.uint8), "floating-point images in .*uint8"),
        (good.clone().index_fill_(2, torch.tensor(5), torch.nan), "NaN or infinite"),
        (good.clone().index_fill_(3, torch.tensor(5), torch.inf), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            module(bad)


def test_the_search_for_nan_can_be_left_out():
    x = torch.full((1, 3, 32, 32), torch.nan)
    assert make("hogb", check_finite=False)(x).isnan().any()


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: make("hogg"), "unknown descriptor 'hogg': hog, hogb, .*did you mean 'hog'"),
    (lambda: make("hog", cells=8), "unknown option of hog 'cells': .*did you mean 'cell'"),
    (lambda: make("hog", bilinear=True), "unknown option of hog 'bilinear'"),
    (lambda: make("hog", variant="vlfeat"), "unknown HOG variant 'vlfeat': uoctti, network"),
    (lambda: make("hog", colour="gray"), "unknown colour 'gray': grey, strongest"),
    (lambda: make("dsift", colour="rgb"), "unknown colour"),
    (lambda: make("hog", cell=1), "cell must be a whole number of at least 2, got 1"),
    (lambda: make("hog", cell=8.0), "cell must be a whole number"),
    (lambda: make("hog", orientations=True), "orientations must be a whole number"),
    (lambda: make("dsift", step=0), "step must be a whole number of at least 1"),
    (lambda: make("lbp", cell=2), "cell must be a whole number of at least 3"),
    (lambda: make("lbp", softness=-1), "softness must be zero or a positive number, got -1"),
    (lambda: make("lbp", softness=math.nan), "softness must be"),
    (lambda: make("sift_grid", seed=-1), "seed must be a whole number of at least 0"),
    (lambda: make("sift_grid", upsampling=3), "upsampling must be 1, 2 or 4, got 3"),
    (lambda: make("dsift", border="zero"), "unknown option of dsift"),
    (
        lambda: descriptors.oriented_gradients(torch.rand(1, 3, 8, 8), border="mirror"),
        "unknown border 'mirror': grey, zero, crop",
    ),
    (
        lambda: descriptors.oriented_gradients(torch.rand(1, 3, 8, 8), 1),
        "directions must be a whole number of at least 2",
    ),
    (lambda: descriptors.glyphs(torch.rand(1, 30, 2, 2)), r"\(N, 27 or 31, h, w\)"),
    (lambda: descriptors.glyphs(torch.ones(1, 31, 2, 2).long()), "floating-point"),
    (lambda: descriptors.glyphs(torch.full((1, 31, 2, 2), torch.nan)), "NaN"),
    (lambda: descriptors.glyphs(torch.rand(1, 31, 2, 2), size=2), "size must be"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["hog", "hogb", "dsift", "lbp", "sift_grid"])
def test_modules_are_modules(name):
    module = make(name)
    assert module.name == name
    assert not list(module.parameters())
    assert not module.state_dict()
    assert name in repr(module)
    assert f"channels={module.channels}" in repr(module)


@pytest.mark.parametrize("name", ["hog", "hogb", "dsift", "lbp"])
def test_dtypes(name, picture):
    x = picture("coffee", 64)[None]
    module = make(name)
    expected = module(x.double())
    assert expected.dtype == torch.float64
    torch.testing.assert_close(module(x), expected.float(), rtol=1e-3, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        y = module(rounded)
        assert y.dtype == dtype
        torch.testing.assert_close(y, module(rounded.double()).to(dtype), rtol=1e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, module(x))
    assert descriptors.oriented_gradients(x.half()).dtype == torch.float16


@pytest.mark.parametrize("name", ["hog", "hogb", "dsift", "lbp", "sift_grid"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(name, picture):
    x = picture("coffee", 64)[None].double()
    module = make(name)
    y = module.to("cuda")(x.to("cuda"))
    assert y.device.type == "cuda"
    torch.testing.assert_close(y.cpu(), make(name)(x))


# ----------------------------------------------------------------------------------------- glyphs


def test_glyphs_are_strokes_along_edges():
    right = make("hog")(torch.linspace(0, 1, 32).double().expand(1, 3, 32, 32))
    drawn = descriptors.glyphs(right, size=11)
    assert drawn.shape == (1, 3, 44, 44)
    cell = drawn[0, 0, 11:22, 11:22]
    assert cell[:, 5].min() > 0.4  # the edge is upright
    assert cell[5, 5] == 1
    assert not cell[:, :5].any()
    assert not cell[:, 6:].any()
    assert torch.equal(drawn[:, 0], drawn[:, 2])


def test_glyphs_of_a_mirrored_image_are_mirrored():
    module = make("hogb")
    x = noise(2, 3, 24, 32)
    drawn = descriptors.glyphs(module(x))
    torch.testing.assert_close(descriptors.glyphs(module(x.flip(-1))), drawn.flip(-1))
    assert drawn.shape == (2, 3, 63, 84)
    assert drawn.min() >= 0
    assert drawn.amax((1, 2, 3)).tolist() == [1, 1]


def test_glyphs_cut_sums_negative_weights_and_darkness():
    weights = torch.zeros(3, 27, 1, 2)
    weights[0, 18:, 0, 0] = 1  # all strokes cross in the middle
    weights[0, 18, 0, 1] = 2
    weights[1] = -1
    drawn = descriptors.glyphs(weights, size=9)
    assert drawn[0, 0, 4, 4] == 0.5
    assert drawn[0, 0, 4, 13] == 1
    assert not drawn[1:].any()
