"""Closed-form maps against scikit-learn, NumPy, planted answers and brute force."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV

from fmlib import maps, store
from fmlib.grids import GridAction, grid_action
from fmlib.maps import Moments, Origin, PositionStatistics, Statistics

ORIGIN = Origin("tiny", "abc", "features.3", "blur")


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(size, *, seed=0):
    q, r = torch.linalg.qr(randn(size, size, seed=seed))
    return q * r.diagonal().sign()


def pairs(images=12, channels=6, side=3, *, noise=0.3, out=None, seed=0):
    """Features with unequal variances and a mean, and a noisy affine image of them."""
    x = (
        randn(images, channels, side, side, seed=seed)
        * torch.linspace(0.2, 2, channels).double()[None, :, None, None]
        + 3
    )
    weight = randn(out or channels, channels, seed=seed + 1)
    y = torch.einsum("oc,nchw->nohw", weight, x) - 1
    return x, y + noise * randn(*y.shape, seed=seed + 2), weight


def rows(x):
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).numpy()


def statistics(x, y, **options):
    return Statistics(**options).update(x, y)


# -------------------------------------------------------------------------------------- statistics


def same(a: Moments, b: Moments, tolerance=1e-9):
    assert (a.positions, a.images) == (b.positions, b.images)
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        found, wanted = getattr(a, name), getattr(b, name)
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max())


def test_moments_are_numpys():
    x, y, _ = pairs(out=4)
    total = statistics(x, y).total
    joint = np.cov(rows(x), rows(y), rowvar=False, bias=True) * total.positions
    assert np.allclose(total.xx, joint[:6, :6])
    assert np.allclose(total.xy, joint[:6, 6:])
    assert np.allclose(total.yy, joint[6:, 6:])


@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True))
def test_streamed_is_one_shot(cuts):
    x, y, _ = pairs()
    whole = statistics(x, y)
    streamed = Statistics()
    for start, stop in itertools.pairwise([0, *sorted(cuts), 12]):
        streamed.update(x[start:stop], y[start:stop])
    same(streamed.total, whole.total)
    for a, b in zip(streamed.parts, whole.parts, strict=True):
        assert a is not None
        assert b is not None
        same(a, b)


def test_shards_add_in_any_order():
    x, y, _ = pairs()
    names = [f"photo {i // 2}" for i in range(12)]
    a, b, c = (
        Statistics().update(x[i : i + 4], y[i : i + 4], groups=names[i : i + 4]) for i in (0, 4, 8)
    )
    same(((a + b) + c).total, (a + (b + c)).total)
    same((c + a + b).total, Statistics().update(x, y, groups=names).total)
    for part, whole in zip((b + a + c).parts, Statistics().update(x, y, groups=names).parts,
                           strict=True):  # fmt: skip
        assert (part is None) == (whole is None)
        if part and whole:
            same(part, whole)


def test_a_large_mean_costs_no_digits():
    x, y, _ = pairs(images=40)
    plain = statistics(x, y)
    moved = Statistics()
    for i in range(0, 40, 3):
        moved.update(x[i : i + 3] + 1e4, y[i : i + 3] - 1e4)
    assert torch.allclose(moved.total.xx, plain.total.xx, rtol=1e-8, atol=1e-7)
    naive = torch.from_numpy(rows(x + 1e8).astype(np.float32))  # what single sums would do
    raw = naive.T @ naive - len(naive) * torch.outer(naive.mean(0), naive.mean(0))
    assert not torch.allclose(raw.double(), plain.total.xx, rtol=0.1)
    assert torch.allclose(maps.linear(moved).matrix, maps.linear(plain).matrix, atol=1e-7)


def test_memory_does_not_grow_with_images():
    def size(value):
        return sum(t.untyped_storage().nbytes() for part in value.parts if part
                   for t in vars(part).values() if isinstance(t, torch.Tensor))  # fmt: skip

    x, y, _ = pairs(images=10)
    value = statistics(x, y)
    first = size(value)
    for _ in range(20):
        value.update(x, y)
    assert value.images == 210
    assert size(value) == first == 5 * (3 * 36 + 12) * 8
    local = PositionStatistics().update(x, y)
    before = local.xx.nbytes + local.xy.nbytes
    assert local.update(x, y).xx.nbytes + local.xy.nbytes == before


def test_groups_stay_together():
    x, y, _ = pairs(images=4)
    value = Statistics(folds=2).update(x, y, groups=["a", "a", "a", "a"])
    assert sorted(part.images if part else 0 for part in value.parts) == [0, 4]
    with pytest.raises(ValueError, match="4 images fill 1 fold of 2"):
        maps.ridge_path(value)
    numbered = Statistics(folds=2).update(x, y, groups=torch.tensor([0, 1, 0, 1]))
    assert [part.images for part in numbered.parts if part] == [2, 2]
    same_names = Statistics(folds=2).update(x, y, groups=list(np.array([0, 1, 0, 1])))
    same(same_names.total, numbered.total, tolerance=0)
    assert same_names.parts[1] is not None
    assert torch.equal(same_names.parts[1].mean_x, numbered.parts[1].mean_x)  # pyright: ignore


@pytest.mark.parametrize("side", [1, 3])  # at 1, rows could be a view of the features
def test_features_are_left_as_they_were(side):
    x, y, _ = pairs(side=side)
    before = x.clone(), y.clone()
    Statistics().update(x, y)
    Statistics().update(x[..., 0, 0], y[..., 0, 0])
    PositionStatistics().update(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_chunks_change_nothing(monkeypatch):
    x, y, _ = pairs()
    whole = statistics(x, y)
    monkeypatch.setattr(maps, "_NUMBERS", 100)
    same(statistics(x, y).total, whole.total)


def test_swapped_and_difference():
    x, y, _ = pairs()
    total = statistics(x, y).total
    same(total.swapped(), statistics(y, x).total)
    same(total.difference(), statistics(x, y - x).total)


def test_vectors_are_maps_of_one_position():
    x, y, _ = pairs(side=1)
    same(statistics(x[..., 0, 0], y[..., 0, 0]).total, statistics(x, y).total)
    fitted = maps.fit("ridge", (x[..., 0, 0], y[..., 0, 0]), penalty=1.0)
    assert torch.equal(fitted.apply(x[..., 0, 0]), fitted.apply(x)[..., 0, 0])


def test_statistics_are_saved(tmp_path):
    x, y, _ = pairs(images=3)
    value = Statistics(grid_action="rot90", origin=ORIGIN).update(x, y)
    value.save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors")
    same(back.total, value.total)
    assert back.grid_action == value.grid_action
    assert back.origin == ORIGIN
    assert [part is None for part in back.parts] == [part is None for part in value.parts]
    maps.additive(value).save(tmp_path / "m.safetensors")
    with pytest.raises(store.MismatchError, match="statistics"):
        Statistics.load(tmp_path / "m.safetensors")


def test_bad_pairs_are_refused():
    x, y, _ = pairs()
    value = Statistics()
    holed = x.clone()
    holed[7, 2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="x of image 7 of the batch is not finite"):
        value.update(holed, y)
    with pytest.raises(ValueError, match="y of image 7"):
        value.update(x, holed)
    with pytest.raises(ValueError, match="same pictures"):
        value.update(x, y[:5])
    with pytest.raises(ValueError, match="one grid, not 3x3 and 2x2"):
        value.update(x, y[..., :2, :2])
    with pytest.raises(ValueError, match="floating point"):
        value.update(x.long(), y)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        value.update(x[0], y[0])
    with pytest.raises(ValueError, match="groups has 2 entries for 12"):
        value.update(x, y, groups=[1, 2])
    assert value.images == 0
    with pytest.raises(ValueError, match="no images"):
        maps.linear(value)
    value.update(x, y)
    with pytest.raises(ValueError, match="6 and 5 channels after"):
        value.update(x, y[:, :5])
    with pytest.raises(ValueError, match="folds"):
        Statistics(folds=1)


def test_statistics_of_different_origin_do_not_add():
    x, y, _ = pairs()
    with pytest.raises(store.MismatchError, match="layer: 'a' and 'b'"):
        _ = statistics(x, y, origin=Origin(layer="a")) + statistics(x, y, origin=Origin(layer="b"))
    with pytest.raises(store.MismatchError, match="grid_action"):
        _ = statistics(x, y) + statistics(x, y, grid_action="hflip")
    with pytest.raises(store.MismatchError, match="folds"):
        _ = statistics(x, y) + statistics(x, y, folds=3)


# ------------------------------------------------------------------------------------------- ridge


def test_ridge_is_scikit_learns():
    x, y, _ = pairs(out=4)
    value = statistics(x, y)
    path = maps.ridge_path(value, select="gcv")
    for i, gamma in enumerate(path.penalties):
        oracle = Ridge(alpha=gamma).fit(rows(x), rows(y))
        found = path.map(i)
        assert np.abs(found.matrix.numpy() - oracle.coef_).max() < 1e-6
        assert np.abs(found.bias.numpy() - oracle.intercept_).max() < 1e-6
        prediction = found.apply(x)
        assert np.abs(rows(prediction) - oracle.predict(rows(x))).max() < 1e-6
    assert len(path.penalties) == 20


def test_linear_is_scikit_learns():
    x, y, _ = pairs(out=4)
    oracle = LinearRegression().fit(rows(x), rows(y))
    assert np.abs(maps.linear(statistics(x, y)).matrix.numpy() - oracle.coef_).max() < 1e-9


def test_folds_are_brute_force():
    x, y, _ = pairs(noise=2.0)
    value = statistics(x, y, folds=3)
    gammas = [0.0, 0.5, 20.0, 500.0]
    path = maps.ridge_path(value, gammas)
    for i, gamma in enumerate(gammas):
        total = 0.0
        for fold in range(3):
            held = np.arange(12) % 3 == fold
            model = LinearRegression() if gamma == 0 else Ridge(alpha=gamma)
            model.fit(rows(x[~held]), rows(y[~held]))
            error = np.square(model.predict(rows(x[held])) - rows(y[held])).sum()
            assert path.unit_errors is not None
            assert np.isclose(float(path.unit_errors[i, fold]), error / (4 * 9))
            total += error
        assert np.isclose(float(path.errors[i]), total / (12 * 9))
    assert path.map().info["penalty"] == gammas[path.best]


def test_gcv_is_its_formula_and_leave_one_out():
    x, y, _ = pairs(images=20, side=1, noise=1.0)
    value = statistics(x, y)
    design = np.c_[np.ones(20), rows(x) - rows(x).mean(0)]
    for gamma, found in zip(*gcv(value, [0.1, 3.0, 50.0]), strict=True):
        penalty = gamma * np.diag([0.0] + [1.0] * 6)
        hat = design @ np.linalg.solve(design.T @ design + penalty, design.T)
        residual = rows(y) - hat @ rows(y)
        wanted = np.square(residual).mean(0).sum() / (1 - np.trace(hat) / 20) ** 2
        assert np.isclose(found, wanted)
    # Where every sample has the same leverage, GCV *is* leaving one out: columns of a Fourier basis
    t = np.arange(15) * 2 * np.pi / 15
    columns = [f(k * t) for k in (1, 2, 3) for f in (np.cos, np.sin)]
    x = torch.tensor(np.stack(columns, 1))
    y = randn(15, 3, seed=4)
    for gamma, found in zip(*gcv(statistics(x, y), [0.1, 2.0]), strict=True):
        errors = []
        for i in range(15):
            keep = np.arange(15) != i
            model = Ridge(alpha=gamma).fit(x[keep].numpy(), y[keep].numpy())
            errors.append(np.square(model.predict(x[i : i + 1].numpy()) - y[i].numpy()).sum())
        assert np.isclose(found, np.mean(errors))


def gcv(value, gammas):
    path = maps.ridge_path(value, gammas, select="gcv")
    return path.penalties, path.errors.tolist()


@pytest.mark.parametrize("side", [2, 4])  # fewer positions than channels, and more
@pytest.mark.parametrize("action", [None, "rot90"])
def test_leave_one_image_out_is_brute_force(side, action):
    x, y, _ = pairs(images=8, side=side, noise=1.0)
    groups = [0, 1, 2, 2, 3, 4, 5, 6]
    value = Statistics(grid_action=action).update(x, y, groups=groups)
    batches = [(x[:4], y[:4], groups[:4]), (x[4:], y[4:], groups[4:])]
    path = maps.leave_one_image_out(value, batches, [0.3, 30.0])
    turned = grid_action(action)(x)
    for i, gamma in enumerate(path.penalties):
        total = 0.0
        for unit in range(7):
            held = np.array(groups) == unit
            model = Ridge(alpha=gamma).fit(rows(turned[~held]), rows(y[~held]))
            error = np.square(model.predict(rows(turned[held])) - rows(y[held])).sum()
            assert path.unit_errors is not None
            assert np.isclose(float(path.unit_errors[i, unit]), error / len(rows(x[held])))
            total += error
        assert np.isclose(float(path.errors[i]), total / len(rows(x)))


def test_leave_one_out_is_scikit_learns_ridgecv():
    x, y, _ = pairs(images=25, side=1, noise=1.0)
    gammas = [0.1, 1.0, 10.0]
    path = maps.leave_one_image_out(statistics(x, y), [(x, y)], gammas)
    oracle = RidgeCV(gammas, store_cv_results=True).fit(rows(x), rows(y))
    assert np.allclose(path.errors, oracle.cv_results_.mean(0).sum(0))


def test_leave_one_image_out_refuses_other_pairs():
    x, y, _ = pairs()
    value = statistics(x, y)
    with pytest.raises(ValueError, match="45 positions came, but the statistics are of 108"):
        maps.leave_one_image_out(value, [(x[:5], y[:5])])
    with pytest.raises(ValueError, match="above 0"):
        maps.leave_one_image_out(value, [(x, y)], [0.0])
    with pytest.raises(ValueError, match="group 1 came in two batches"):
        maps.leave_one_image_out(value, [(x[:1], y[:1], [1]), (x[1:2], y[1:2], [1])])


def test_positions_of_one_image_are_not_independent():
    """GCV's optimism: one vector per image, repeated at all positions, looks like much data."""
    x = randn(10, 8, 1, 1).expand(-1, -1, 4, 4)
    y = randn(10, 8, 1, 1, seed=1).expand(-1, -1, 4, 4)  # nothing to learn
    value = statistics(x, y)
    folds, gcv_path = maps.ridge_path(value), maps.ridge_path(value, select="gcv")
    assert folds.penalties[folds.best] > gcv_path.penalties[gcv_path.best]


def test_ridge_options_are_checked():
    x, y, _ = pairs()
    value = statistics(x, y)
    with pytest.raises(ValueError, match="did you mean 'folds'"):
        maps.ridge(value, select="fold")
    with pytest.raises(ValueError, match="at least 0"):
        maps.ridge(value, penalty=-1.0)
    with pytest.raises(ValueError, match="needs Statistics"):
        maps.ridge(value.total)
    with pytest.raises(ValueError, match="nothing to fit"):
        maps.ridge(statistics(torch.ones_like(x), y))
    with pytest.raises(ValueError, match="count"):
        maps.penalties(value, 0)


def test_rank_deficient_statistics():
    x, y, _ = pairs()
    x[:, 2] = 0  # a channel that is never on
    value = statistics(x, y)
    fitted = maps.linear(value)
    assert fitted.info["directions"] == 5
    oracle = LinearRegression().fit(rows(x), rows(y))
    assert np.allclose(rows(fitted.apply(x)), oracle.predict(rows(x)))
    assert float(fitted.matrix[:, 2].abs().max()) < 1e-9
    with pytest.raises(ValueError, match="varies in 5 of 6 directions over 108 positions of 12"):
        maps.linear(value, rank_deficient="error")
    with pytest.raises(ValueError, match="did you mean"):
        maps.linear(value, rank_deficient="errors")


def test_fewer_positions_than_channels():
    x, y, _ = pairs(images=4, channels=10, side=1)
    value = statistics(x, y)
    fitted = maps.linear(value)  # of minimum norm: through all points
    assert fitted.info["directions"] == 3
    assert torch.allclose(fitted.apply(x), y)
    wanted = np.linalg.pinv(rows(x) - rows(x).mean(0)) @ (rows(y) - rows(y).mean(0))
    assert np.allclose(fitted.matrix, wanted.T)
    assert bool(torch.isfinite(maps.ridge(value).matrix).all())


# ------------------------------------------------------------------------------- other closed forms


def test_additive():
    x, _, _ = pairs()
    delta = randn(6, seed=9)
    fitted = maps.additive(statistics(x, x + delta[:, None, None]))
    assert torch.allclose(fitted.bias, delta)
    assert torch.allclose(fitted.apply(x), x + delta[:, None, None])
    assert fitted.parameters_count == 6


@pytest.mark.parametrize("scale", [False, True])
def test_procrustes_recovers_a_planted_rotation(scale):
    x, _, _ = pairs(noise=0)
    planted, factor = rotation(6, seed=5), 1.7 if scale else 1.0
    y = factor * torch.einsum("oc,nchw->nohw", planted, x - 2) + 40
    fitted = maps.procrustes(statistics(x, y), scale=scale)
    assert torch.allclose(fitted.matrix, factor * planted)
    assert torch.allclose(fitted.apply(x), y)  # a large mean offset is no penalty
    assert fitted.info["scale"] == pytest.approx(factor)


def test_procrustes_is_scipys():
    from scipy.linalg import orthogonal_procrustes

    x, y, _ = pairs()
    centred = [rows(v) - rows(v).mean(0) for v in (x, y)]
    wanted, total = orthogonal_procrustes(*centred)
    fitted = maps.procrustes(statistics(x, y))
    assert np.allclose(fitted.matrix, wanted.T)
    scaled = maps.procrustes(statistics(x, y), scale=True)
    assert scaled.info["scale"] == pytest.approx(total / np.square(centred[0]).sum())


def test_reduced_rank_is_the_svd_formula():
    x, y, _ = pairs(noise=2.0, out=5)
    value = statistics(x, y)
    path = maps.rank_path(value, penalty=0.0)
    xc, yc = rows(x) - rows(x).mean(0), rows(y) - rows(y).mean(0)
    full = np.linalg.lstsq(xc, yc)[0]
    _, values, vt = np.linalg.svd(xc @ full, full_matrices=False)
    assert np.allclose(path.singular_values, values)
    for rank in range(6):
        projector = vt[:rank].T @ vt[:rank]
        fitted = path.map(rank)
        assert np.allclose(fitted.matrix, (full @ projector).T)
        assert fitted.parameters_count == rank * (6 + 5) + 5
        # no other map of this rank is better, that of a truncated W included
        u, s, v = np.linalg.svd(full.T)
        truncated = (u[:, :rank] * s[:rank]) @ v[:rank]
        error = np.square(yc - xc @ fitted.matrix.numpy().T).sum()
        assert error <= np.square(yc - xc @ truncated.T).sum() + 1e-9


def test_reduced_rank_recovers_a_planted_rank():
    x, _, _ = pairs(images=60)
    planted = randn(6, 2, seed=3) @ randn(2, 6, seed=4)
    clean = torch.einsum("oc,nchw->nohw", planted, x)
    y = clean + 0.5 * randn(*clean.shape, seed=6)
    path = maps.rank_path(statistics(x, y))
    assert path.best == 2
    fitted = maps.reduced_rank(statistics(x, y))
    assert fitted.info["rank"] == 2
    assert torch.allclose(fitted.matrix, planted, atol=0.15)


@pytest.mark.parametrize("plus_identity", [False, True])
def test_rank_errors_are_brute_force(plus_identity):
    x, y, _ = pairs(noise=2.0)
    value = statistics(x, y, folds=3)
    path = maps.rank_path(value, penalty=7.0, plus_identity=plus_identity)
    for rank in (0, 2, 6):
        total = 0.0
        for fold in range(3):
            held = np.arange(12) % 3 == fold
            part = statistics(x[~held], y[~held])
            fitted = maps.rank_path(part, penalty=7.0, plus_identity=plus_identity).map(rank)
            error = float((fitted.apply(x[held]) - y[held]).square().sum())
            assert np.isclose(float(path.fold_errors[rank, fold]), error / 36)
            total += error
        assert np.isclose(float(path.errors[rank]), total / 108)
    other = pairs(seed=20)[:2]
    wanted = [maps.squared_error(path.map(r), statistics(*other)) for r in range(7)]
    assert np.allclose(path.held_out(statistics(*other)), wanted)


def test_ridge_reduced_rank_is_the_penalised_optimum():
    """Penalised reduced rank = plain reduced rank on data with rows √γ I added."""
    x, y, _ = pairs(noise=2.0)
    gamma = 25.0
    xc = np.r_[rows(x) - rows(x).mean(0), np.sqrt(gamma) * np.eye(6)]
    yc = np.r_[rows(y) - rows(y).mean(0), np.zeros((6, 6))]
    full = np.linalg.lstsq(xc, yc)[0]
    vt = np.linalg.svd(xc @ full, full_matrices=False)[2]
    wanted = full @ vt[:3].T @ vt[:3]
    fitted = maps.reduced_rank(statistics(x, y), rank=3, penalty=gamma)
    assert np.allclose(fitted.matrix, wanted.T)


def test_low_rank_plus_identity_recovers_a_planted_map():
    x, _, _ = pairs(images=60)
    planted = randn(6, 1, seed=3) @ randn(1, 6, seed=4)
    clean = x + torch.einsum("oc,nchw->nohw", planted, x) + 2
    fitted = maps.low_rank_plus_identity(statistics(x, clean + 0.3 * randn(*x.shape, seed=8)))
    assert fitted.info["rank"] == 1
    assert torch.allclose(fitted.matrix, torch.eye(6).double() + planted, atol=0.1)
    nothing = maps.low_rank_plus_identity(statistics(x, clean), rank=0, penalty=0.0)
    shift = maps.additive(statistics(x, clean))
    assert torch.allclose(nothing.apply(x), shift.apply(x))


def test_later_updates_do_not_reach_a_fit():
    x, y, _ = pairs()
    value = statistics(x, y)
    ridge, rank = maps.ridge_path(value), maps.rank_path(value)
    before = [ridge.map().apply(x), rank.map(2).apply(x)]
    value.update(x * 100 + 5, y * -30)
    after = [ridge.map().apply(x), rank.map(2).apply(x)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert rank.map(2).info["images"] == 12


def test_ranks_are_checked():
    x, y, _ = pairs()
    path = maps.rank_path(statistics(x, y))
    with pytest.raises(ValueError, match="from 0 to 6, not 7"):
        path.map(7)
    bare = maps.rank_path(statistics(x, y).total, penalty=1.0)
    assert torch.allclose(bare.map(3).matrix, maps.rank_path(
        statistics(x, y), penalty=1.0).map(3).matrix)  # fmt: skip
    with pytest.raises(ValueError, match="no errors were estimated"):
        _ = bare.best
    with pytest.raises(ValueError, match="give `penalty`"):
        maps.rank_path(statistics(x, y).total)


def test_same_widths_are_needed_where_they_are():
    x, y, _ = pairs(out=4)
    value = statistics(x, y)
    for family in ("additive", "procrustes", "low_rank_plus_identity"):
        with pytest.raises(ValueError, match="one width, not 6 and 4"):
            maps.fit(family, value)
    assert maps.fit("ridge", value).apply(x).shape == y.shape


def test_position_specific_is_one_ridge_for_each_position():
    x, y, _ = pairs(images=30, out=4)
    value = PositionStatistics()
    for i in range(0, 30, 7):
        value.update(x[i : i + 7], y[i : i + 7])
    fitted = maps.position_specific(value, penalty=2.0)
    for row, column in itertools.product(range(3), range(3)):
        oracle = Ridge(alpha=2.0).fit(x[:, :, row, column], y[:, :, row, column])
        assert np.abs(fitted.weight[row, column].numpy() - oracle.coef_).max() < 1e-5
        wanted = oracle.predict(x[:, :, row, column].numpy())
        assert np.abs(fitted.apply(x)[:, :, row, column].numpy() - wanted).max() < 1e-4
    assert fitted.parameters_count == 9 * (24 + 4)


def test_position_specific_finds_what_no_shared_map_can():
    x = randn(200, 3, 2, 2)
    signs = torch.tensor([[1.0, -1], [-1, 1]]).double()
    local, shared = maps.fit("position_specific", (x, x * signs)), maps.fit("ridge", (x, x * signs))
    assert float((local.apply(x) - x * signs).abs().max()) < 1e-3
    assert float((shared.apply(x) - x * signs).square().mean()) > 0.9


def test_position_specific_penalty_is_gcvs():
    x, y, _ = pairs(images=15, noise=3.0, side=2)
    gammas = [0.1, 5.0, 100.0]
    wanted = [
        sum(
            maps.ridge_path(statistics(x[..., r, c], y[..., r, c]), [g], select="gcv").errors.item()
            for r in range(2)
            for c in range(2)
        )
        for g in gammas
    ]
    fitted = maps.position_specific(PositionStatistics().update(x, y), gammas=gammas)
    assert fitted.info["penalty"] == gammas[int(np.argmin(wanted))]


def test_position_specific_refuses():
    x, y, _ = pairs(images=5)
    value = PositionStatistics().update(x, y)
    with pytest.raises(ValueError, match="5 images for 6 channels"):
        maps.position_specific(value, penalty=0.0)
    assert bool(torch.isfinite(maps.position_specific(value).weight).all())
    with pytest.raises(ValueError, match=r"GB of statistics, more than 1e-06"):
        PositionStatistics(max_gigabytes=1e-6).update(x, y)
    with pytest.raises(ValueError, match="2x2 grid of 6 and 6 channels after"):
        value.update(x[..., :2, :2], y[..., :2, :2])
    with pytest.raises(ValueError, match="images: two at least"):
        maps.position_specific(PositionStatistics())
    with pytest.raises(ValueError, match="fitted on a 3x3 grid, not 2x2"):
        maps.position_specific(value).apply(x[..., :2, :2])


# --------------------------------------------------------------------------- interface, grid action


@pytest.mark.parametrize("family", list(maps.CLOSED_FORM))
def test_one_interface(family, tmp_path):
    x, y, _ = pairs(images=20)
    fitted = maps.fit(family, (x.float(), y.float()), grid_action="rot90", origin=ORIGIN)
    assert fitted.family == family
    prediction = fitted.apply(x.float())
    assert prediction.shape == y.shape
    assert prediction.dtype == torch.float32
    fitted.save(tmp_path / "map.safetensors")
    back = maps.load(tmp_path / "map.safetensors", layer="features.3", edit="blur", family=family)
    assert torch.equal(back.apply(x.float()), prediction)
    assert back.origin == ORIGIN
    assert back.info == fitted.info
    assert back.parameters_count == fitted.parameters_count > 0
    with pytest.raises(ValueError, match="takes 6 channels, not 5"):
        back.apply(x[:, :5])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        back.apply(x[0])
    with pytest.raises(ValueError, match="square grid"):
        back.apply(x[..., :2])


def test_half_precision_features_are_summed_in_single():
    x, y, _ = pairs(channels=64)
    fitted = maps.fit("ridge", (x, y), penalty=1.0)
    half = x.half()
    found = fitted.apply(half)
    assert found.dtype == torch.float16
    assert torch.equal(found, fitted.apply(half.float()).half())


def test_load_refuses_another_origin(tmp_path, squeezenet):
    x, y, _ = pairs()
    path = tmp_path / "map.safetensors"
    origin = Origin.of(squeezenet, "features.3", "blur")
    maps.fit("ridge", (x, y), origin=origin).save(path)
    assert maps.load(path, encoder=squeezenet).origin == origin
    with pytest.raises(store.MismatchError, match=r"'layer' expected 'features.4'"):
        maps.load(path, layer="features.4")
    with pytest.raises(store.MismatchError, match="'edit' expected 'hue', found 'blur'"):
        maps.load(path, edit="hue")
    with pytest.raises(store.MismatchError, match="'family' expected 'linear', found 'ridge'"):
        maps.load(path, family="linear")
    maps.fit("ridge", (x, y), origin=ORIGIN).save(path)
    with pytest.raises(store.MismatchError, match="weight_hash"):
        maps.load(path, encoder=squeezenet)
    store.save_tensors(path, {"a": x}, metadata={})
    with pytest.raises(store.MismatchError, match="'map' expected"):
        maps.load(path)
    with pytest.raises(FileNotFoundError):
        maps.load(tmp_path / "none.safetensors")


def test_fit_checks_what_it_is_given():
    x, y, _ = pairs()
    with pytest.raises(ValueError, match="did you mean 'ridge'"):
        maps.fit("rige", (x, y))
    with pytest.raises(ValueError, match="fitted on PositionStatistics, not Statistics"):
        maps.fit("position_specific", statistics(x, y))
    with pytest.raises(ValueError, match="fitted on Statistics, not PositionStatistics"):
        maps.fit("ridge", PositionStatistics().update(x, y))
    with pytest.raises(ValueError, match="given to the statistics already"):
        maps.fit("ridge", statistics(x, y), grid_action="rot90")
    with pytest.raises(ValueError, match="trained on the pairs"):
        maps.fit("mlp", statistics(x, y))


def test_a_function_as_grid_action(tmp_path):
    x, y, _ = pairs()
    fitted = maps.fit("additive", (x, y), grid_action=lambda x: x.flip(-2))
    assert torch.equal(fitted.apply(x), maps.fit("additive", (x, y), grid_action="vflip").apply(x))
    with pytest.raises(ValueError, match="cannot be saved"):
        fitted.save(tmp_path / "map.safetensors")


def test_four_quarter_turns_are_the_identity_on_an_equivariant_net():
    """Filters that come in all four orientations, so that a turn of the picture permutes them."""
    filters = torch.cat([torch.rot90(randn(2, 3, 3, 3), k, (2, 3)) for k in range(4)])
    pictures = randn(30, 3, 8, 8, seed=1)
    x = F.conv2d(pictures, filters, padding=1).relu()
    y = F.conv2d(torch.rot90(pictures, 1, (2, 3)), filters, padding=1).relu()
    for family in ("linear", "procrustes"):
        fitted = maps.fit(family, (x, y), grid_action="rot90")
        assert torch.allclose(fitted.apply(x), y, atol=1e-8)
        round_trip = x
        for _ in range(4):
            round_trip = fitted.apply(round_trip)
        assert torch.allclose(round_trip, x, atol=1e-7)
    blind = maps.fit("linear", (x, y))
    assert float((blind.apply(x) - y).square().mean()) > 0.1 * float(y.var())


# ----------------------------------------------------------------------------------- errors, floors


def test_errors_from_statistics_are_those_of_pairs():
    x, y, _ = pairs(out=4, noise=1.0)
    fitted = maps.fit("ridge", (x[:6], y[:6]), penalty=30.0)
    other = statistics(x[6:], y[6:])
    residual = (fitted.apply(x[6:]) - y[6:]).square().sum(1).mean()
    assert maps.squared_error(fitted, other) == pytest.approx(float(residual))
    spread = (y[6:] - y[6:].mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
    assert maps.explained(fitted, other) == pytest.approx(1 - float(residual / spread))
    floor = torch.ones(4)
    about = (y[6:] - 1).square().sum(1).mean()
    found = maps.explained(fitted, other, floor=floor)
    assert found == pytest.approx(1 - float(residual / about))


def test_discrepancy_is_that_of_predictions():
    x, y, _ = pairs()
    a, b = maps.fit("linear", (x, y)), maps.fit("ridge", (x, y), penalty=50.0)
    apart = (a.apply(x) - b.apply(x)).square().sum(1).mean()
    out = a.apply(x)
    spread = (out - out.mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
    assert maps.discrepancy(a, b, statistics(x, y)) == pytest.approx(float(apart / spread))
    assert maps.discrepancy(a, a, statistics(x, y)) == 0
    with pytest.raises(ValueError, match="grid actions"):
        maps.discrepancy(a, maps.fit("linear", (x, y), grid_action="rot90"), statistics(x, y))


def test_errors_refuse_what_does_not_fit():
    x, y, _ = pairs()
    fitted = maps.fit("linear", (x, y))
    with pytest.raises(ValueError, match="another grid action"):
        maps.squared_error(fitted, statistics(x, y, grid_action="rot90"))
    with pytest.raises(ValueError, match="6 and 4 channels"):
        maps.explained(fitted, statistics(x, y[:, :4]))
    with pytest.raises(ValueError, match="equals its floor"):
        maps.explained(fitted, statistics(x, torch.ones_like(y)))
    constant = maps.rank_path(statistics(x, y)).map(0)
    with pytest.raises(ValueError, match="same for every x"):
        maps.discrepancy(constant, fitted, statistics(x, y))


def test_floors():
    x, y, _ = pairs()
    found = maps.floors(statistics(x, y, grid_action="rot90"))
    assert torch.equal(found["identity"].apply(x), x)
    assert torch.equal(found["grid_action"].apply(x), torch.rot90(x, 1, (2, 3)))
    shifted = found["mean_shift"].apply(x)
    assert torch.allclose(shifted.mean((0, 2, 3)), y.mean((0, 2, 3)))
    assert list(maps.floors(statistics(x, y))) == ["identity", "mean_shift"]


def test_nearest_neighbours():
    x, y, _ = pairs(images=20, side=2)
    first = maps.nearest_neighbours(x, y, k=1)
    assert torch.allclose(first.apply(x), y)  # each is its own neighbour
    from sklearn.neighbors import KNeighborsRegressor

    fitted = maps.nearest_neighbours(x[:15], y[:15], k=3, residual=False)
    oracle = KNeighborsRegressor(3).fit(rows(x[:15]), rows(y[:15]))
    assert np.allclose(rows(fitted.apply(x[15:])), oracle.predict(rows(x[15:])))
    few = maps.nearest_neighbours(x, y, max_vectors=10, seed=1)
    assert len(few.keys) == 10
    assert torch.equal(few.keys, maps.nearest_neighbours(x, y, max_vectors=10, seed=1).keys)
    with pytest.raises(ValueError, match="from 1 to the 80"):
        maps.nearest_neighbours(x, y, k=0)
    with pytest.raises(ValueError, match="residual=False"):
        maps.nearest_neighbours(x, y[:, :3])


def test_nearest_neighbours_are_saved(tmp_path):
    x, y, _ = pairs()
    fitted = maps.nearest_neighbours(x, y, grid_action="hflip", origin=ORIGIN)
    fitted.save(tmp_path / "map.safetensors")
    back = maps.load(tmp_path / "map.safetensors", layer="features.3")
    assert torch.equal(back.apply(x), fitted.apply(x))


def test_rank_paths_without_left_out_errors_have_the_same_maps():
    x, y, _ = pairs(images=20, noise=0.5)
    given = statistics(x, y, grid_action="rot90")
    whole = maps.rank_path(given, penalty=1.0)
    quick = maps.rank_path(given, penalty=1.0, left_out=False)
    assert torch.equal(quick.map(3).matrix, whole.map(3).matrix)
    assert quick.map(3).grid_action == GridAction(turns=1)
    with pytest.raises(ValueError, match="no errors were estimated"):
        _ = quick.best


def test_paths_of_several_edits_share_one_decomposition(monkeypatch):
    """Same maps and errors as one at a time, with a third of the decompositions."""
    x, y, _ = pairs(images=20, noise=0.5)
    turned = torch.rot90(y, 1, (2, 3))
    several = {
        "plain": statistics(x, y),
        "square": statistics(x, y**2),
        "turned": statistics(x, turned, grid_action="rot90"),
        "other": statistics(x + y, y),
    }
    alone = {name: maps.ridge_path(one) for name, one in several.items()}
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda value: calls.append(1) or eigh(value))
    together = maps.ridge_paths(several)
    assert len(calls) == 2 * 6  # two kinds of x, all images and five folds
    for name, path in together.items():
        torch.testing.assert_close(path.errors, alone[name].errors, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(path.map().matrix, alone[name].map().matrix)
        assert path.map().grid_action == several[name].grid_action


def test_ridge_about_the_identity_is_ridge_of_the_change():
    """W = I + ΔW with ΔW from scikit-learn's ridge of y − x on x; a large penalty is additive."""
    x, y, _ = pairs(images=20, noise=0.5)
    given = statistics(x, y)
    found = maps.ridge(given, penalty=7.0, plus_identity=True)
    expected = Ridge(alpha=7.0).fit(rows(x), rows(y) - rows(x))
    np.testing.assert_allclose(found.matrix - torch.eye(6), expected.coef_, atol=1e-8)
    np.testing.assert_allclose(found.bias, expected.intercept_, atol=1e-7)
    assert found.family == "ridge_plus_identity"
    stiff = maps.ridge(given, penalty=1e14, plus_identity=True)
    torch.testing.assert_close(stiff.bias, maps.additive(given).bias, rtol=1e-4, atol=1e-4)
    path = maps.ridge_path(given, plus_identity=True)
    own = maps.ridge_paths({"only": given}, plus_identity=True)["only"]
    torch.testing.assert_close(path.errors, own.errors)
    held_out = []
    for train, left in given.splits():  # every error of the path, by fitting without the fold
        one = maps.ridge(train, penalty=path.penalties[5], plus_identity=True)
        held_out.append(maps.squared_error(one, left) * left.positions)
    assert sum(held_out) / len(rows(x)) == pytest.approx(float(path.errors[5]))
    with pytest.raises(ValueError, match="one width"):
        maps.ridge_path(statistics(x, y[:, :3]), plus_identity=True)


@pytest.mark.parametrize("action", ["identity", "rot90", "hflip+rot90"])
def test_swapped_statistics_fit_the_way_back(action):
    x, y, _ = pairs(images=20)
    forth = statistics(x, y, grid_action=action)
    back = statistics(y, x, grid_action=grid_action(action).inverse())
    found, expected = maps.ridge(forth.swapped()), maps.ridge(back)
    torch.testing.assert_close(found.matrix, expected.matrix)
    torch.testing.assert_close(found.apply(y), expected.apply(y))
    with pytest.raises(ValueError, match="cannot be inverted"):
        statistics(x, y, grid_action=lambda grid: grid).swapped()
