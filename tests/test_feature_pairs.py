"""Streams of features of pictures and their edited versions, against doing it by hand."""

import pytest
import torch

from fmlib import edits, encoders, feature_pairs, images, map_scores, maps, taps
from fmlib.maps import Statistics

LAYERS = ["features.1", "features.4"]
NAMES = ["greyscale:1", "noise:40", "rotation:90", "translation:0.2"]
OPTIONS = {"size": 64, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def encoder():
    return encoders.load("squeezenet1_1")


@pytest.fixture(scope="module")
def photos():
    return images.load("photos", limit=7, seed=0)


@pytest.fixture(scope="module")
def chosen():
    return [edits.make(name) for name in NAMES]


@pytest.fixture(scope="module")
def collected(encoder, photos, chosen):
    return feature_pairs.collect(encoder, photos, chosen, LAYERS, batch_size=3, **OPTIONS)


def test_pairs_are_those_made_by_hand(encoder, photos, chosen, collected):
    pictures = photos.batch(64)
    ids = list(photos.table["id"])
    assert collected.ids == tuple(ids)
    assert collected.groups == tuple(photos.table["group"])
    plain = taps.features(encoder, pictures, LAYERS)
    for layer in LAYERS:
        torch.testing.assert_close(collected.x[layer], plain[layer], rtol=1e-3, atol=1e-3)
        for edit in chosen:
            after = taps.features(encoder, edit(pictures, ids=ids, seed=3), layer)[layer]
            torch.testing.assert_close(collected.y[edit.name, layer], after, rtol=1e-3, atol=1e-3)


def test_batches_do_not_matter(encoder, photos, chosen, collected):
    again = feature_pairs.collect(encoder, photos, chosen, LAYERS, batch_size=7, **OPTIONS)
    for key, value in collected.y.items():
        torch.testing.assert_close(again.y[key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("moved", [True, False])
def test_statistics_are_those_of_all_pairs(encoder, photos, chosen, collected, moved):
    found = feature_pairs.statistics(
        encoder, photos, chosen, LAYERS, batch_size=4, grid_action=moved, **OPTIONS
    )
    assert set(found) == {(name, layer) for name in NAMES for layer in LAYERS}
    for (name, layer), one in found.items():
        action = edits.make(name).grid_action if moved else None
        by_hand = Statistics(grid_action=action).update(
            collected.x[layer], collected.y[name, layer], groups=collected.groups
        )
        assert one.images == 7
        torch.testing.assert_close(one.total.xy, by_hand.total.xy, rtol=1e-3, atol=1)
        assert (one.origin.layer, one.origin.edit) == (layer, name)
        assert one.origin.weight_hash == encoder.weight_hash


def test_scores_are_those_of_all_pairs(encoder, photos, chosen, collected):
    found = feature_pairs.statistics(encoder, photos, chosen, LAYERS, **OPTIONS)
    fitted = {
        key: {"additive": maps.additive(one), "identity": maps.floors(one)["identity"]}
        for key, one in found.items()
    }
    floors = {key: one.total.mean_y for key, one in found.items()}
    scored = feature_pairs.scores(
        fitted, encoder, photos, chosen, floors=floors, batch_size=3, **OPTIONS
    )
    for key, candidates in fitted.items():
        for name, one in candidates.items():
            by_hand = map_scores.score(
                one.apply(collected.x[key[1]]), collected.y[key], floor=floors[key]
            )
            got = scored[key][name]
            torch.testing.assert_close(got.per_image(), by_hand.per_image(), rtol=1e-3, atol=1e-3)


def test_class_tokens_come_along():
    vit = encoders.load("vit_small_patch14_saliency")
    photos = images.load("photos", limit=2, seed=0)
    found = feature_pairs.collect(
        vit, photos, [edits.make("greyscale")], ["blocks.2"], size=56, progress=False
    )
    assert found.x["blocks.2"].shape == (2, 384, 4, 4)
    assert found.y["greyscale:1", "blocks.2/prefix"].shape == (2, 1, 384)


def test_bad_input_is_named(encoder, photos, chosen):
    with pytest.raises(ValueError, match="at least one, each once"):
        feature_pairs.stream(encoder, photos, [chosen[0], chosen[0]], LAYERS)
    with pytest.raises(ValueError, match="at least one, each once"):
        feature_pairs.stream(encoder, photos, [], LAYERS)
    with pytest.raises(ValueError, match="no pictures"):
        feature_pairs.stream(encoder, photos.select([]), chosen, LAYERS)
    with pytest.raises(ValueError, match="did you mean 'greyscale:1'"):
        feature_pairs.scores({("greyscal", LAYERS[0]): {}}, encoder, photos, chosen)
    with pytest.raises(ValueError, match=r"features\.99"):
        list(feature_pairs.stream(encoder, photos, chosen, ["features.99"], size=64))
