"""Spectra, powers and flows of maps: against NumPy, SciPy and maps that are known."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fmlib import map_algebra, maps
from fmlib.grids import GridAction, grid_action
from fmlib.maps import AffineMap, Origin


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(size, *, seed=0, turn=0.5):
    """A proper rotation by angles up to `turn`: its principal root is real."""
    skew = randn(size, size, seed=seed)
    skew = skew - skew.T
    return torch.linalg.matrix_exp(skew * turn / skew.norm())


def affine(weight, bias=None, *, action=None, edit=None):
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias
    return AffineMap(
        family="linear",
        parameters_count=0,
        weight=weight,
        bias=bias,
        grid_action=grid_action(action),
        origin=Origin(edit=edit),
    )


def near_identity(size=5, *, seed=0):
    weight = torch.eye(size).double() + 0.15 * randn(size, size, seed=seed)
    return affine(weight, randn(size, seed=seed + 1))


X = randn(4, 5, 3, 3, seed=9)

# ---------------------------------------------------------------------------------------- spectrum


def test_spectrum_of_known_matrices():
    turned = map_algebra.spectrum(rotation(6))
    assert turned.effective_rank == pytest.approx(6)
    assert turned.rotation_distance == pytest.approx(0, abs=1e-9)
    assert turned.near_one == 1
    doubled = map_algebra.spectrum(2 * rotation(6))
    assert doubled.rotation_distance == pytest.approx(1)
    assert doubled.scaled_rotation_distance == pytest.approx(0, abs=1e-9)
    one = map_algebra.spectrum(torch.outer(randn(6), randn(6, seed=1)))
    assert one.effective_rank == pytest.approx(1)
    assert float(one.energy[0]) == pytest.approx(1)
    two = map_algebra.spectrum(torch.diag(torch.tensor([3.0, 1.0, 0.0])))
    assert two.energy.tolist() == pytest.approx([0.9, 1, 1])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert two.effective_rank == pytest.approx(math.exp(entropy))


def test_rotation_distance_is_to_the_nearest_orthogonal_matrix():
    weight = randn(5, 5)
    u, _ = scipy.linalg.polar(weight.numpy())
    wanted = np.linalg.norm(weight.numpy() - u) / math.sqrt(5)
    assert map_algebra.spectrum(affine(weight)).rotation_distance == pytest.approx(wanted)


def test_spectrum_refuses():
    with pytest.raises(ValueError, match="finite matrix other than 0"):
        map_algebra.spectrum(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="finite matrix"):
        map_algebra.spectrum(torch.full((3, 3), torch.nan))


def test_contributions_count_the_bias_once():
    fitted = affine(
        torch.diag(torch.tensor([3.0, 4.0]).double()), torch.tensor([0.0, 5.0]).double()
    )
    found = map_algebra.contributions(fitted, torch.ones(2, 2, 1, 1).double())
    assert found["weight"].tolist() == pytest.approx([5, 5])
    assert found["bias"].tolist() == pytest.approx([5, 5])
    assert found["weight_share"].tolist() == pytest.approx([0.5, 0.5])
    cosine = (3 * 3 + 4 * 9) / (5 * math.hypot(3, 9))
    assert found["cosine"].tolist() == pytest.approx([cosine, cosine])
    vector = map_algebra.contributions(fitted, torch.ones(2, 2).double())
    assert torch.equal(vector["weight"], found["weight"])
    shift = maps.additive(maps.Statistics().update(X, X + 1))
    assert map_algebra.contributions(shift, X)["cosine"].shape == (4,)


# ----------------------------------------------------------------------------- composition, inverse


@pytest.mark.parametrize("first", ["identity", "rot90", "hflip+shift(1,0)"])
@pytest.mark.parametrize("second", ["identity", "vflip+rot90"])
def test_composition_is_one_map_after_the_other(first, second):
    inner = affine(randn(6, 5), randn(6, seed=1), action=first, edit="a")
    outer = affine(randn(3, 6, seed=2), randn(3, seed=3), action=second, edit="b")
    both = map_algebra.compose(outer, inner)
    assert torch.allclose(both.apply(X), outer.apply(inner.apply(X)))
    assert both.origin.edit == "(b)∘(a)"
    with pytest.raises(ValueError, match="outer takes 5 channels, inner gives 3"):
        map_algebra.compose(inner, outer)


@pytest.mark.parametrize("action", ["identity", "rot90", "hflip+rot90+shift(0,1)"])
def test_inverse_undoes(action):
    fitted = affine(randn(5, 5), randn(5, seed=1), action=action)
    back = map_algebra.inverse(fitted)
    assert torch.allclose(back.apply(fitted.apply(X)), X)
    assert back.info["rank"] == 5


def test_inverse_leaves_lost_what_is_lost():
    weight = torch.diag(torch.tensor([1.0, 2.0, 1e-9]).double())
    back = map_algebra.inverse(affine(weight))
    assert torch.allclose(back.matrix, torch.diag(torch.tensor([1.0, 0.5, 0.0]).double()))
    assert back.info["rank"] == 2


def test_transport_between_encoders():
    """W_B = S W_A S⁺ where features of B are an invertible image S of those of A."""
    stitch, weight = affine(randn(7, 5), randn(7, seed=1)), near_identity()
    moved = map_algebra.compose(map_algebra.compose(stitch, weight), map_algebra.inverse(stitch))
    assert torch.allclose(moved.apply(stitch.apply(X)), stitch.apply(weight.apply(X)))


def test_a_function_cannot_be_composed():
    x = randn(4, 5, 3, 3)
    fitted = maps.fit("additive", (x, x), grid_action=lambda x: x.flip(-1))
    with pytest.raises(ValueError, match="cannot be composed"):
        map_algebra.compose(fitted, fitted)
    with pytest.raises(ValueError, match="cannot be inverted"):
        map_algebra.inverse(fitted)


# ------------------------------------------------------------------------------------------- powers


def test_whole_powers_are_repetitions():
    fitted = affine(randn(5, 5), randn(5, seed=1), action="rot90")
    thrice = map_algebra.power(fitted, 3)
    assert torch.allclose(thrice.apply(X), fitted.apply(fitted.apply(fitted.apply(X))))
    assert map_algebra.power(affine(rotation(5), action="rot90"), 4).grid_action == GridAction()
    assert torch.equal(map_algebra.power(fitted, 0).apply(X), X)


@pytest.mark.parametrize("parts", [2, 3])
def test_roots_repeated_give_the_map(parts):
    fitted = near_identity()
    root = map_algebra.power(fitted, 1 / parts)
    assert torch.allclose(map_algebra.power(root, parts).apply(X), fitted.apply(X))
    assert root.info["imaginary_share"] < 1e-10


def test_powers_are_scipys():
    fitted = near_identity(seed=3)
    wanted = np.real(scipy.linalg.fractional_matrix_power(fitted.matrix.numpy(), 0.3))
    assert np.allclose(map_algebra.power(fitted, 0.3).matrix, wanted)
    back = map_algebra.power(fitted, -1)
    assert torch.allclose(back.apply(fitted.apply(X)), X)


def test_half_a_rotation_is_a_rotation():
    root = map_algebra.power(affine(rotation(5, turn=2)), 0.5)
    assert map_algebra.spectrum(root).rotation_distance < 1e-9


def test_powers_of_a_translation_are_translations():
    shift = maps.additive(maps.Statistics().update(X, X + 2))
    half = map_algebra.power(shift, 0.5)
    assert torch.allclose(half.apply(X), X + 1)
    more = map_algebra.power(shift, 2.5)
    assert torch.allclose(more.apply(X), X + 5)
    nearly = affine(torch.diag(torch.tensor([1 + 1e-9, 1 - 1e-9]).double()), randn(2))
    assert torch.allclose(map_algebra.power(nearly, 0.5).bias, nearly.bias / 2, atol=1e-8)


def test_what_is_made_of_an_edit_is_not_named_like_it():
    fitted = affine(rotation(5), edit="hue 60")
    made = [
        map_algebra.power(fitted, 0.5),
        map_algebra.power(fitted, 2),
        map_algebra.inverse(fitted),
        map_algebra.interpolate(fitted, 0.25),
    ]
    names = [one.origin.edit for one in made]
    assert names == ["(hue 60)^0.5", "(hue 60)^2", "(hue 60)^-1", "0.25·(hue 60)"]


def test_directions_never_seen_are_left_alone():
    """A dead channel: ridge maps it to 0, which has no logarithm; identity plus ridge keeps it."""
    x = randn(40, 5, 2, 2)
    x[:, 3] = 0
    y = 1.2 * x + 1
    y[:, 3] = 0
    value = maps.Statistics().update(x, y)
    with pytest.raises(ValueError, match="no logarithm"):
        map_algebra.generator(maps.linear(value))
    full = maps.low_rank_plus_identity(value, rank=5, penalty=0.0)
    half = map_algebra.power(full, 0.5)
    assert torch.allclose(half.apply(half.apply(x)), y)
    assert float(half.matrix[3, 3]) == pytest.approx(1)


def test_a_mirror_has_no_real_half():
    mirror = affine(torch.diag(torch.tensor([1.0, -1.0, 2.0]).double()))
    with pytest.raises(ValueError, match=r"1 negative real eigenvalues, the largest 0\.5"):
        map_algebra.power(mirror, 0.5)
    with pytest.raises(ValueError, match="no real principal root or logarithm"):
        map_algebra.generator(mirror)
    part = map_algebra.power(mirror, 0.5, negative="real_part")
    assert torch.allclose(part.matrix, torch.diag(torch.tensor([1, 0, 2**0.5]).double()))
    assert part.info["imaginary_share"] == pytest.approx(1 / 2)
    assert torch.allclose(map_algebra.power(mirror, 2).matrix, mirror.matrix @ mirror.matrix)
    with pytest.raises(ValueError, match="did you mean 'real_part'"):
        map_algebra.power(mirror, 0.5, negative="real")


def test_powers_of_singular_maps():
    weight = torch.diag(torch.tensor([4.0, 0.0]).double())
    root = map_algebra.power(affine(weight, torch.ones(2).double()), 0.5)
    assert torch.allclose(root.matrix, torch.diag(torch.tensor([2.0, 0.0]).double()))
    twice = map_algebra.power(root, 2)
    assert torch.allclose(twice.bias, torch.ones(2).double())
    with pytest.raises(ValueError, match="no negative powers"):
        map_algebra.power(affine(weight), -1.0)
    with pytest.raises(ValueError, match="no logarithm"):
        map_algebra.generator(affine(weight))


def test_powers_refuse():
    with pytest.raises(ValueError, match="fraction of a grid action"):
        map_algebra.power(affine(rotation(5), action="rot90"), 0.5)
    with pytest.raises(ValueError, match="must be square"):
        map_algebra.power(affine(randn(3, 5)), 0.5)
    jordan = affine(torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double())
    with pytest.raises(ValueError, match="cannot be diagonalised"):
        map_algebra.power(jordan, 0.5)


# -------------------------------------------------------------------------------------------- flows


def test_flow_and_back():
    fitted = near_identity()
    a, c, lost = map_algebra.generator(fitted)
    assert lost < 1e-10
    assert np.allclose(a, scipy.linalg.logm(fitted.matrix.numpy()))
    assert torch.allclose(map_algebra.exponential(a, c).apply(X), fitted.apply(X))
    half = map_algebra.exponential(a, c, time=0.5)
    assert torch.allclose(half.apply(X), map_algebra.power(fitted, 0.5).apply(X))
    with pytest.raises(ValueError, match=r"A must be \(C, C\)"):
        map_algebra.exponential(a, c[:2])


def test_interpolation_is_a_straight_line():
    fitted = near_identity()
    middle = map_algebra.interpolate(fitted, 0.5).apply(X)
    assert torch.allclose(middle, (X + fitted.apply(X)) / 2)
    assert torch.allclose(map_algebra.interpolate(fitted, 1.0).apply(X), fitted.apply(X))
    with pytest.raises(ValueError, match="grid action"):
        map_algebra.interpolate(affine(rotation(5), action="rot90"), 0.5)


def test_commutator():
    a, b = near_identity(), near_identity(seed=5)
    assert map_algebra.commutator(a, map_algebra.power(a, 2)) == pytest.approx(0, abs=1e-12)
    assert map_algebra.commutator(a, b) == pytest.approx(map_algebra.commutator(b, a))
    left, right = (
        torch.tensor([[0.0, 1], [0, 0]]).double(),
        torch.tensor([[0.0, 0], [1, 0]]).double(),
    )
    # AB = diag(1, 0), BA = diag(0, 1): they differ by √2, and are of size 1
    assert map_algebra.commutator(affine(left), affine(right)) == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="of one width"):
        map_algebra.commutator(a, affine(randn(3, 3)))
    with pytest.raises(ValueError, match="are zero"):
        map_algebra.commutator(affine(left), affine(left))
