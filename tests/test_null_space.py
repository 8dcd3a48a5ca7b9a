"""Null-space walks: against a linear map whose null space is known, and the bound on the code."""

import pytest
import torch
from torch import nn

from fmlib import null_space, preimage

SHAPE = (3, 4, 4)
SIZE = 48


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    """10 × 48, so that 38 directions go unnoticed."""
    return torch.randn(10, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.4 + 0.2 * torch.rand(3, *SHAPE, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def goals(images: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float64)
    return images + 0.2 * (noise - 0.5)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
    ).requires_grad_(False)


def pictures(count: int, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def linear(matrix: torch.Tensor):
    return lambda x: x.flatten(1) @ matrix.T


def projected(matrix: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """The part of a way within the null space, by an SVD."""
    rows = torch.linalg.svd(matrix, full_matrices=False).Vh
    flat = way.flatten(1)
    return (flat - flat @ rows.T @ rows).view_as(way)


def test_a_walk_over_a_linear_map_ends_at_the_projected_goal(matrix, images, goals):
    found = null_space.walk(
        images, linear(matrix), toward=goals, steps=12, step_size=0.02, tolerance=1e-3,
        iterations=10,
    )  # fmt: skip
    wanted = images + projected(matrix, goals - images)
    # exact but for the damping: directions hardly noticed may be used within the tolerance
    assert (found.images - wanted).abs().max() < 2e-3
    assert (found.code_error <= 1e-3).all()
    assert found.distance[-1].min() > 0.03
    straight = null_space.same_distance(images, goals, found.distance[-1])
    free = null_space.code_error(straight, linear(matrix), images)
    assert (free > 5 * found.code_error[-1]).all()


def test_the_first_step_is_as_long_as_it_may_be(matrix, images, goals):
    found = null_space.walk(
        images, linear(matrix), toward=goals, steps=1, step_size=0.01, corrections=0
    )
    wanted = torch.full((3,), 0.01, dtype=torch.float64)
    torch.testing.assert_close(found.distance[0], wanted, rtol=1e-6, atol=0)
    assert found.accepted.all()


def test_values_stay_in_range(matrix, images):
    goals = (images > 0.5).double()
    found = null_space.walk(
        images, linear(matrix), toward=goals, steps=20, step_size=0.2, iterations=10
    )
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert ((found.images == 0) | (found.images == 1)).any()
    error = null_space.code_error(found.images, linear(matrix), images)
    torch.testing.assert_close(error, found.code_error[-1])
    assert (error <= 0.05).all()


def test_noticed_directions_are_counted(matrix, images):
    first = images[:1].expand(300, *SHAPE)
    found = null_space.noticed(first, linear(matrix), tolerance=1e-4, reach=1.0, iterations=20)
    norm = (images[0].flatten() @ matrix.T).norm()
    squares = (torch.linalg.svdvals(matrix) / norm) ** 2
    damping = 1e-4**2 / SIZE
    exact = (squares / (squares + damping)).sum() / SIZE
    assert float(exact) == pytest.approx(10 / SIZE, abs=1e-3)
    assert float(found.mean()) == pytest.approx(float(exact), rel=0.03)


def test_few_iterations_count_too_few(matrix, images):
    few, many = (
        null_space.noticed(images, linear(matrix), iterations=n, tolerance=1e-3, reach=1.0)
        for n in (2, 20)
    )
    assert (few < many).all()


def test_the_bound_holds_in_a_network(network):
    x = pictures(4)
    found = null_space.walk(x, network, steps=6, tolerance=0.02)
    error = null_space.code_error(found.images, network, x)
    assert (error <= 0.02 + 1e-6).all()
    assert (found.distance[-1] > 0).all()
    torch.testing.assert_close(error.double(), found.code_error[-1], rtol=1e-2, atol=1e-5)
    left = torch.cat([found.remaining, found.remaining[-1:]])
    assert (left[1:] <= left[:-1]).all()


def test_an_item_does_not_depend_on_its_batch(network):
    x = pictures(4)
    options = {"steps": 3, "seeds": [5, 6, 7, 8]}
    whole = null_space.walk(x, network, **options)
    parts = null_space.walk(x, network, batch_size=3, **options)
    alone = null_space.walk(x[2:3], network, steps=3, seeds=[7])
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.images[2:3], alone.images, rtol=0, atol=1e-5)
    assert torch.equal(whole.images, null_space.walk(x, network, **options).images)


def test_only_the_term_is_kept(network):
    x = pictures(2)
    term = preimage.Term(channels=[0, 1])
    found = null_space.walk(x, network, term=term, steps=6, tolerance=0.02)
    assert (null_space.code_error(found.images, network, x, term=term) <= 0.02 + 1e-6).all()
    whole = null_space.walk(x, network, steps=6, tolerance=0.02)
    assert found.distance[-1].mean() > whole.distance[-1].mean()


def test_noise_is_of_its_seed_alone_and_smooth():
    one = null_space.noise((3, 32, 32), [4, 5], smooth=3)
    assert torch.equal(one[1:], null_space.noise((3, 32, 32), [5], smooth=3))
    assert one.min() >= 0
    assert one.max() <= 1
    rough = null_space.noise((3, 32, 32), [4])
    assert one.diff(dim=3).abs().mean() < rough.diff(dim=3).abs().mean() / 3
    assert float(one.std()) == pytest.approx(0.2, abs=0.02)


def test_the_control_goes_as_far(images, goals):
    found = null_space.same_distance(images, goals, torch.tensor([0.01, 0.02, 9.0]))
    distance = (found - images).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(distance[:2], torch.tensor([0.01, 0.02]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2], goals[2])


BAD = {
    "within": {"images": 2 * pictures(2)},
    "N of at least 1": {"images": pictures(2)[0]},
    "goals": {"toward": 3 * pictures(2)},
    "differ in shape": {"toward": pictures(2, 8)},
    "tolerance must be above 0": {"tolerance": 0.0},
    "step_size must be above 0": {"step_size": float("nan")},
    "steps must be a whole number": {"steps": 0},
    "corrections must be a whole number": {"corrections": -1},
    "iterations must be a whole number": {"iterations": 1.5},
    "batch_size": {"batch_size": 0},
    "1 seeds for 2 images": {"seeds": [0]},
    "unknown code": {"term": preimage.Term("blocks.9")},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input_is_named(network, message):
    options = {"images": pictures(2), **BAD[message]}
    with pytest.raises(ValueError, match=message):
        null_space.walk(options.pop("images"), network, **options)


def test_bad_codes_are_named():
    x = pictures(2)
    with pytest.raises(ValueError, match="code of image 0 is zero"):
        null_space.walk(x, lambda images: images.mean(1) * 0)
    with pytest.raises(ValueError, match="no gradient"):
        null_space.walk(x, lambda images: images.detach() + 1)
    with pytest.raises(ValueError, match="several codes"):
        null_space.noticed(x, lambda images: {"a": images, "b": images})
    with pytest.raises(ValueError, match="differ"):
        null_space.code_error(x, lambda images: images, x[:1])
    with pytest.raises(ValueError, match="do not fit"):
        null_space.same_distance(x, x, torch.ones(1))
    with pytest.raises(ValueError, match="smooth"):
        null_space.noise((3, 8, 8), [0], smooth=-1)
