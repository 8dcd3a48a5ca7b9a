"""Scores against hand-computed values, SciPy and a real network's tail."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from fmlib import map_scores, stats, taps


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


Y = randn(6, 4, 3, 3)
GUESS = Y + 0.5 * randn(6, 4, 3, 3, seed=1)


def test_r2_is_the_pooled_one():
    found = map_scores.score(GUESS, Y).per_image("r2")
    flat = [v.permute(0, 2, 3, 1).reshape(-1, 4) for v in (Y, GUESS)]
    assert found.shape == (6,)
    assert float(found.mean()) == pytest.approx(stats.r_squared(*flat))
    error = map_scores.score(GUESS, Y).per_image("error")
    assert torch.allclose(error, 1 - found)
    interval = stats.bootstrap(found)
    assert interval.low < interval.value < interval.high


def test_r2_of_the_floor_is_zero():
    base = torch.tensor([1.0, 2, 3, 4]).double()
    flat = base[None, :, None, None].expand_as(Y)
    assert float(map_scores.score(flat, Y, floor=base).per_image().mean()) == pytest.approx(0)
    assert float(map_scores.score(GUESS, Y, floor=GUESS).per_image().mean()) == pytest.approx(0)
    assert torch.equal(map_scores.score(Y, Y).per_image(), torch.ones(6).double())


def test_r2_per_position():
    found = map_scores.score(GUESS, Y).per_position()
    here, guess, mean = Y[:, :, 1, 2], GUESS[:, :, 1, 2], Y.mean((0, 2, 3))
    wanted = 1 - float((here - guess).square().sum() / (here - mean).square().sum())
    assert float(found[1, 2]) == pytest.approx(wanted)


def test_cosines():
    angles = torch.tensor([[0.0, 90, 60, 180], [0, 0, 90, 90]]).double().deg2rad()
    target = torch.stack([torch.ones(2, 4), torch.zeros(2, 4)], 1).double().view(2, 2, 2, 2)
    guess = torch.stack([angles.cos(), angles.sin()], 1).view(2, 2, 2, 2)
    found = map_scores.score(guess, target, floor=torch.zeros(2))
    assert found.per_image("mean_cosine").tolist() == pytest.approx([0.125, 0.5])
    # sorted[n // 2]: the upper of the two in the middle
    assert found.per_image("median_cosine").tolist() == pytest.approx([0.5, 1.0], abs=1e-9)


def test_inside_and_outside():
    mask = torch.zeros(6, 3, 3, dtype=torch.bool)
    mask[:5, :2, :2] = True  # nothing edited in the last image
    found = map_scores.score(GUESS, Y, mask=mask)
    inside = found.per_image("mean_cosine", "inside")
    assert torch.allclose(inside[:5], found.cosine[:5, :2, :2].mean((1, 2)))
    assert math.isnan(inside[5])
    assert math.isnan(found.per_image("median_cosine", "inside")[5])
    squared = (GUESS - Y).square().sum(1)
    about = (Y - Y.mean((0, 2, 3), keepdim=True)).square().sum(1)
    wanted = 1 - squared[0, :2, :2].mean() / about[:5, :2, :2].mean()
    assert float(found.per_image("r2", "inside")[0]) == pytest.approx(float(wanted))
    one = found.per_image("median_cosine", "outside")[0]
    assert float(one) == float(found.cosine[0][~mask[0]].sort().values[5 // 2])
    everywhere = found.per_image("median_cosine")
    assert float(everywhere[0]) == float(found.cosine[0].flatten().sort().values[4])


def test_batches_are_joined():
    mask, floor = randn(6, 3, 3, seed=5) > 0, torch.zeros(4)
    whole = map_scores.score(GUESS, Y, floor=floor, mask=mask)
    parts = [
        map_scores.score(GUESS[i : i + 2], Y[i : i + 2], floor=floor, mask=mask[i : i + 2])
        for i in (0, 2, 4)
    ]
    joined = map_scores.Scores.joined(parts)
    for where in ("all", "inside", "outside"):
        assert torch.equal(joined.per_image("r2", where), whole.per_image("r2", where))
    with pytest.raises(ValueError, match="1 of 2 scores have a mask"):
        map_scores.Scores.joined([whole, map_scores.score(GUESS, Y)])


def test_scores_refuse():
    with pytest.raises(ValueError, match="differ in shape"):
        map_scores.score(GUESS[:3], Y)
    holed = Y.clone()
    holed[2, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="target: image 2 is not finite"):
        map_scores.score(GUESS, holed)
    with pytest.raises(ValueError, match="floor must be"):
        map_scores.score(GUESS, Y, floor=torch.zeros(3))
    with pytest.raises(ValueError, match="see grid_mask"):
        map_scores.score(GUESS, Y, mask=torch.zeros(6, 9, 9))
    found = map_scores.score(GUESS, Y)
    with pytest.raises(ValueError, match="did you mean 'r2'"):
        found.per_image("r")
    with pytest.raises(ValueError, match="did you mean 'inside'"):
        found.per_image("r2", "insid")
    with pytest.raises(ValueError, match="need a mask"):
        found.per_image("r2", "inside")
    with pytest.raises(ValueError, match="equals its floor"):
        map_scores.score(GUESS, Y, floor=Y).per_image()


def test_grid_mask():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, 3, 3] = 1
    mask[1, 0, :4, :] = 1
    assert map_scores.grid_mask(mask, (2, 2)).tolist() == [
        [[True, False], [False, False]],
        [[True, True], [False, False]],
    ]
    assert not map_scores.grid_mask(mask, (2, 2), coverage=0.5)[0].any()
    assert torch.equal(map_scores.grid_mask(mask[:, 0].bool(), (2, 2)), map_scores.grid_mask(
        mask, (2, 2)))  # fmt: skip
    pooled = torch.nn.functional.max_pool2d(mask, 2)[:, 0] > 0
    assert torch.equal(map_scores.grid_mask(mask, (4, 4)), pooled)
    with pytest.raises(ValueError, match="finer than a mask"):
        map_scores.grid_mask(mask, (9, 9))
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        map_scores.grid_mask(mask[0, 0], (2, 2))
    with pytest.raises(ValueError, match="coverage"):
        map_scores.grid_mask(mask, (2, 2), coverage=1)


# ------------------------------------------------------------------------------------------ meaning


def test_divergence_is_scipys():
    a, b = randn(5, 9), 3 * randn(5, 9, seed=1)
    found = map_scores.agreement(a, b)
    p, q = a.softmax(1).numpy(), b.softmax(1).numpy()
    wanted = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)]
    assert np.allclose(found.divergence, wanted)
    assert torch.allclose(found.divergence, map_scores.agreement(b, a).divergence)
    best = p.argmax(1)
    assert np.allclose(found.probability_change, (q - p)[np.arange(5), best])
    assert found.top1.tolist() == (q.argmax(1) == best).astype(float).tolist()
    five = [best[i] in np.argsort(-q[i])[:5] for i in range(5)]
    assert found.top5.tolist() == [float(x) for x in five]


def test_agreement_at_the_ends():
    sure = 1000.0 * torch.eye(4)
    same, other = map_scores.agreement(sure, sure), map_scores.agreement(sure, sure.roll(1, 1))
    assert same.divergence.tolist() == [0] * 4
    assert same.top1.tolist() == [1] * 4
    assert other.divergence.tolist() == pytest.approx([1] * 4)
    assert other.top1.tolist() == [0] * 4
    assert other.top5.tolist() == [1] * 4  # four classes only
    assert other.probability_change.tolist() == pytest.approx([-1] * 4)
    with pytest.raises(ValueError, match="both"):
        map_scores.agreement(sure, sure[:2])
    with pytest.raises(ValueError, match="not finite"):
        map_scores.agreement(sure, sure * torch.nan)


def test_semantics_through_a_real_tail(squeezenet, picture):
    images = torch.stack([picture(name, 64) for name in ("astronaut", "coffee", "chelsea")])
    layer = squeezenet.recommended[2]
    x = taps.features(squeezenet, images, layer)[layer]
    y = taps.features(squeezenet, images.flip(-1) * 0.4, layer)[layer]
    rest = taps.tail(squeezenet, layer, size=64)
    found = map_scores.semantics(rest, x, y, y, batch_size=2)
    assert found["mapped_vs_edited"].top1.tolist() == [1, 1, 1]
    assert float(found["mapped_vs_edited"].divergence.max()) < 1e-9
    for a, b in zip(vars(found["edited_vs_original"]).values(),
                    vars(found["mapped_vs_original"]).values(), strict=True):  # fmt: skip
        assert torch.allclose(a, b)
    assert float(found["edited_vs_original"].divergence.min()) > 1e-4
    logits = squeezenet(images)
    p = squeezenet(images.flip(-1) * 0.4).softmax(1)
    best = logits.argmax(1, keepdim=True)
    change = (p - logits.softmax(1)).gather(1, best)[:, 0]
    found_change = found["edited_vs_original"].probability_change
    assert torch.allclose(found_change, change.double(), atol=1e-5)


def test_prefix_of_mapped_is_the_originals():
    seen = []

    def tail(features, prefix):
        seen.append(float(prefix.mean()))
        return features.mean((2, 3))

    ones = torch.ones(6, 1, 4)
    map_scores.semantics(tail, Y, Y, Y, original_prefix=ones, edited_prefix=2 * ones)
    assert seen == [1, 2, 1]
    with pytest.raises(ValueError, match="differ in shape"):
        map_scores.semantics(tail, Y, Y, Y[:2])


# -------------------------------------------------------------------------------- floors, ceilings


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_random_direction_has_the_length_asked_for(factor):
    x, y = randn(200, 8, 4, 4), randn(200, 8, 4, 4, seed=1)
    found = map_scores.random_direction(x, y, factor=factor)
    length, wanted = (found - x).flatten(1).norm(dim=1), (y - x).flatten(1).norm(dim=1)
    assert torch.allclose(length, factor * wanted)
    assert torch.equal(found, map_scores.random_direction(x, y, factor=factor))
    error = map_scores.score(found, y, floor=x).per_image("error")
    assert float(error.mean()) == pytest.approx(1 + factor**2, rel=0.03)


def test_retest_is_the_ceiling_of_a_perfect_prediction():
    clean = randn(400, 4, 3, 3)
    first, second = (clean + 0.5 * randn(400, 4, 3, 3, seed=seed) for seed in (1, 2))
    ceiling = map_scores.retest(first, second).per_image().mean()
    perfect = map_scores.score(clean, first).per_image().mean()
    assert float(ceiling) == pytest.approx(float(perfect), abs=0.01)
    assert float(perfect) == pytest.approx(0.8, abs=0.01)
