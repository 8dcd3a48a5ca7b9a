"""Edits against Pillow, their grid actions against networks, pairs against ground truth."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from fmlib import edits, images

KINDS = list(edits.catalogue()["kind"])
GEOMETRIC = ["rotation:90", "rotation:180", "rotation:270", "mirror:horizontal", "mirror:vertical"]


@pytest.fixture(scope="module")
def photos(picture) -> torch.Tensor:
    return torch.stack([picture(name, 96) for name in ("chelsea", "coffee", "astronaut")])


def there(found: Any) -> Any:
    """What must not be None here."""
    assert found is not None
    return found


def pillow(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 255


def smooth(size: int) -> torch.Tensor:
    """A picture without fine detail, which resampling leaves as it is."""
    line = torch.linspace(0, 1, size)
    waves = [torch.sin(2 * line[:, None] + k) * torch.cos(3 * line + k) for k in range(3)]
    return torch.stack(waves)[None] / 2 + 0.5


# ------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_edits_a_batch_and_leaves_it_alone(kind, photos):
    before = photos.clone()
    edited = edits.make(kind)(photos)
    assert edited.shape == photos.shape
    assert edited.dtype == torch.float32
    assert 0 <= edited.min() <= edited.max() <= 1
    assert torch.equal(photos, before)
    assert all((one - two).abs().max() > 0.05 for one, two in zip(edited, photos, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_edited_the_same_in_any_batch(kind, photos):
    edit = edits.make(kind)
    together = edit(photos, ids=["a", "b", "c"], seed=3)
    alone = torch.cat([edit(photos[i : i + 1], ids=["abc"[i]], seed=3) for i in (2, 0, 1)])
    assert (together[[2, 0, 1]] - alone).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_only_random_edits_depend_on_seed_and_id(kind, photos):
    edit = edits.make(kind)
    same = edit(photos, seed=1), edit(photos, seed=1)
    other = edit(photos, seed=2)
    renamed = edit(photos, ids=[7, 8, 9], seed=1)
    assert torch.equal(*same)
    assert torch.equal(same[0], other) is not edit.random
    assert torch.equal(same[0], renamed) is not edit.random


@pytest.mark.parametrize(
    "name",
    [
        *("rotation:0", "rotation:360", "scale:1", "translation:0", "hue:0", "saturation:1"),
        *("contrast:1", "brightness:1", "greyscale:0", "blur:0", "noise:0", "random_mask:0"),
        "patch_shuffle:1",
    ],
)
def test_some_values_change_nothing(name, photos):
    assert (edits.make(name)(photos) - photos).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_read_back(kind):
    edit = edits.make(kind)
    assert edits.make(edit.name) == edit
    assert isinstance(edit, edits.Edit)
    assert edit.at(edit.value) == edit
    assert (edit.strength is None) == isinstance(edit.value, str)


# ------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize(
    ("name", "by_pillow"),
    [
        ("rotation:90", lambda i: i.transpose(Image.Transpose.ROTATE_90)),
        ("rotation:180", lambda i: i.transpose(Image.Transpose.ROTATE_180)),
        ("rotation:270", lambda i: i.transpose(Image.Transpose.ROTATE_270)),
        ("rotation:-90", lambda i: i.transpose(Image.Transpose.ROTATE_270)),
        ("mirror:horizontal", lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        ("mirror:vertical", lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
    ],
)
def test_quarter_turns_and_mirrors_are_pillows(name, by_pillow, photos):
    for x in photos:
        levels = (x * 255).round() / 255
        assert torch.allclose(edits.make(name)(levels[None])[0], tensor(by_pillow(pillow(x))))


def test_any_rotation_turns_as_pillow_does():
    x = smooth(96)
    turned = edits.make("rotation:30")(x)[0]
    expected = tensor(pillow(x[0]).rotate(30, Image.Resampling.BILINEAR))
    inner = slice(30, 66)  # where no border is seen
    assert (turned - expected)[:, inner, inner].abs().max() < 0.01
    again = edits.make("rotation:60")(edits.make("rotation:30")(x))
    assert (again - edits.make("rotation:90")(x))[..., inner, inner].abs().max() < 0.01


def test_hue_is_the_papers(photos):
    """HSV with 256 steps, the hue moved by 60 modulo 256; 8-bit rounding apart."""
    for x in photos:
        hsv = np.array(pillow(x).convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + 60) % 256
        expected = tensor(Image.fromarray(hsv, "HSV").convert("RGB"))
        difference = (edits.make("hue:60")(x[None])[0] - expected).abs()
        assert difference.mean() < 0.01
        assert difference.quantile(0.99) < 0.06


@pytest.mark.parametrize(
    ("name", "by_pillow", "tolerance"),
    [
        ("greyscale:1", lambda i: i.convert("L").convert("RGB"), 0.003),
        ("brightness:1.3", lambda i: ImageEnhance.Brightness(i).enhance(1.3), 0.005),
        ("saturation:1.5", lambda i: ImageEnhance.Color(i).enhance(1.5), 0.012),
        ("contrast:1.5", lambda i: ImageEnhance.Contrast(i).enhance(1.5), 0.012),
    ],
)
def test_colour_edits_are_pillows(name, by_pillow, tolerance, photos):
    for x in photos:
        levels = (x * 255).round() / 255
        expected = tensor(by_pillow(pillow(x)))
        assert (edits.make(name)(levels[None])[0] - expected).abs().max() < tolerance


def test_blur_is_a_gaussian():
    x = torch.zeros(1, 3, 41, 41)
    x[..., 20, 20] = 1
    line = torch.exp(-(torch.arange(-20, 21.0) ** 2) / (2 * 2.0**2))
    expected = torch.outer(line, line) / line.sum() ** 2
    assert (edits.make("blur:2")(x)[0, 0] - expected).abs().max() < 1e-4


def test_blur_resembles_pillows(photos):
    expected = tensor(pillow(photos[0]).filter(ImageFilter.GaussianBlur(2)))
    inner = slice(10, 86)  # borders are treated otherwise
    assert (edits.make("blur:2")(photos)[0] - expected)[:, inner, inner].abs().mean() < 0.004


def test_noise_has_its_strength():
    grey = torch.full((2, 3, 200, 200), 0.5)
    noise = edits.make("noise:25")(grey) - 0.5
    assert noise.std() == pytest.approx(25 / 255, rel=0.01)
    assert abs(noise.mean()) < 1e-3
    assert not torch.equal(noise[0], noise[1])


def test_jpeg_loses_more_at_lower_quality(photos):
    errors = [(edits.make(f"jpeg:{q}")(photos) - photos).square().mean() for q in (95, 50, 10)]
    assert errors == sorted(errors)
    assert errors[0] < 2e-3


@pytest.mark.parametrize(
    ("name", "first", "last", "colour"),
    [
        ("top_left", 26, 103, (1, 0, 0)),
        ("bottom_right", 180, 270, (0, 1, 0)),
        ("big_center", 90, 193, (0, 0, 1)),
        ("small_center", 116, 154, (1, 1, 0)),
    ],
)
def test_masks_are_where_the_paper_has_them(name, first, last, colour):
    x = torch.full((1, 3, 288, 288), 0.4)
    edit = edits.make(f"mask:{name}")
    edited, region = edit(x), there(edit.region(x))
    assert edited[0, :, first, last].tolist() == list(colour)
    assert region.sum() == (last + 1 - first) ** 2
    assert region[0, 0, first, first]
    assert not region[0, 0, first - 1, first]
    assert not region[0, 0, last + 1, last]


@pytest.mark.parametrize("name", ["mask:big_center", "random_mask:0.25"])
def test_outside_its_region_a_mask_changes_nothing(name, photos):
    edit = edits.make(name)
    region = there(edit.region(photos, seed=5)).expand_as(photos)
    edited = edit(photos, seed=5)
    assert torch.equal(edited[~region], photos[~region])
    assert not torch.equal(edited[region], photos[region])


def test_a_random_mask_covers_its_share(photos):
    edit = edits.make("random_mask:0.25")
    assert there(edit.region(photos)).float().mean((1, 2, 3)).tolist() == [0.25] * 3


def test_a_shuffle_keeps_every_patch(photos):
    shuffled = edits.make("patch_shuffle:4")(photos)

    def patches(x):
        found = F.unfold(x, 24, stride=24).transpose(1, 2)
        return sorted(map(tuple, found[0].tolist()))

    assert patches(shuffled[:1]) == patches(photos[:1])


def test_edits_of_all_pixels_have_no_region(photos):
    assert edits.make("hue").region(photos) is None


# --------------------------------------------------------------------- inverses and grid actions


@pytest.mark.parametrize("name", GEOMETRIC)
def test_exact_inverses(name, photos):
    edit = edits.make(name)
    assert torch.equal(there(edit.inverse())(edit(photos)), photos)


@pytest.mark.parametrize("name", ["rotation:20", "scale:1.2", "scale:0.8", "translation:0.1"])
def test_inverses_up_to_resampling(name):
    x = smooth(96)
    edit = edits.make(name)
    inner = slice(24, 72)
    back = there(edit.inverse())(edit(x))
    assert (back - x)[..., inner, inner].abs().max() < 0.01
    assert (edit(x) - x)[..., inner, inner].abs().max() > 0.02


@pytest.mark.parametrize("name", ["hue:60", "saturation:0.7", "brightness:0.8", "contrast:0.8"])
def test_inverses_of_colours_where_nothing_clips(name, photos):
    mild = 0.3 + 0.3 * photos
    edit = edits.make(name)
    assert (there(edit.inverse())(edit(mild)) - mild).abs().max() < 0.02


@pytest.mark.parametrize("name", ["greyscale", "blur", "noise", "jpeg", "mask", "brightness:0"])
def test_what_is_lost_has_no_inverse(name):
    assert edits.make(name).inverse() is None


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_symmetric_layer_is_moved_by_the_grid_action(name, photos):
    """A convolution with a fully symmetric kernel commutes with turns and mirrors."""
    torch.manual_seed(0)
    kernel = torch.rand(4, 3, 3, 3)
    for k in range(1, 4):
        kernel = kernel + torch.rot90(kernel, k, (2, 3))
    kernel = kernel + kernel.flip(3)
    edit = edits.make(name)
    direct = F.conv2d(edit(photos), kernel, padding=1)
    moved = there(edit.grid_action)(F.conv2d(photos, kernel, padding=1))
    assert (direct - moved).abs().max() < 1e-4


def test_a_strided_layer_is_moved_by_whole_units(photos):
    """A shift by a multiple of the stride moves a map by units, borders apart."""
    pool = torch.nn.AvgPool2d(8)
    edit = edits.make("translation:0.25")  # 24 of 96 px, 3 of 12 units
    assert (pool(edit(photos)) - there(edit.grid_action)(pool(photos))).abs().max() < 1e-6


def test_a_translation_moves_to_the_right_and_mirrors_what_comes_in():
    x = torch.arange(8.0)[None, None, None].expand(1, 3, 8, 8) / 8
    moved = edits.make("translation:0.25")(x)
    assert (moved[0, 0, 0] * 8).round().tolist() == [1, 0, 0, 1, 2, 3, 4, 5]
    back = edits.make("translation:-0.25")(x)
    assert (back[0, 0, 0] * 8).round().tolist() == [2, 3, 4, 5, 6, 7, 7, 6]


@settings(deadline=None, max_examples=20)
@given(st.integers(-8, 8))
def test_fractional_translations_meet_the_whole_ones(step):
    x = smooth(32)
    whole = edits.make(f"translation:{step / 32}")(x)
    nearly = edits.make(f"translation:{step / 32 + 1e-6}")(x)
    assert (whole - nearly).abs().max() < 1e-3


def test_shrinking_does_not_alias():
    """Stripes of two pixels become grey, not moiré, when the picture shrinks to a third."""
    stripes = (torch.arange(96) % 2).float().expand(1, 3, 96, 96)
    shrunk = edits.make("scale:0.334")(stripes)
    assert shrunk[..., 40:56, 40:56].std() < 0.05


def test_photometric_edits_have_no_grid_action():
    assert edits.make("hue").grid_action is None


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotatoin:90", r"no edit 'rotatoin'; did you mean rotation"),
        ("mirror:horizontl", "did you mean horizontal"),
        ("mask:nowhere", "top_left"),
        ("hue:much", "must be a number, not 'much'"),
        ("hue:nan", "finite"),
        ("scale:0", r"in \[0.05, 20\]"),
        ("jpeg:50.5", "whole number"),
        ("noise:-1", r"in \[0, 255\]"),
    ],
)
def test_unknown_edits_and_values_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        edits.make(name)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("hue", torch.rand(3, 8, 8), r"\(N, 3, H, W\)"),
        ("hue", torch.rand(1, 1, 8, 8), r"\(N, 3, H, W\)"),
        ("hue", torch.ones(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        ("rotation:90", torch.rand(1, 3, 8, 9), "square"),
        ("rotation:45", torch.rand(1, 3, 8, 9), "square"),
        ("blur:20", torch.rand(1, 3, 32, 32), "too far"),
        ("patch_shuffle:5", torch.rand(1, 3, 32, 32), "do not divide"),
    ],
)
def test_pictures_that_cannot_be_edited(name, x, message):
    with pytest.raises(ValueError, match=message):
        edits.make(name)(x)


def test_ids_must_be_as_many_as_pictures(photos):
    with pytest.raises(ValueError, match="2 ids for 3"):
        edits.make("noise")(photos, ids=[1, 2])


# --------------------------------------------------------------------------------- object scenes


@pytest.fixture(scope="module")
def sets():
    return images.load("photos", limit=3), images.load("objects", limit=4)


@pytest.fixture(scope="module")
def scenes(sets):
    return {
        edit: edits.object_scenes(edit, *sets, size=128, object_size=64)
        for edit in edits.OBJECT_EDITS
    }


@pytest.mark.parametrize("edit", edits.OBJECT_EDITS)
def test_outside_the_region_nothing_changes(edit, scenes):
    pairs = scenes[edit]
    outside = ~pairs.region.expand_as(pairs.before)
    assert torch.equal(pairs.before[outside], pairs.after[outside])
    changed = (pairs.before - pairs.after).abs().amax(1, keepdim=True)
    assert all(
        change[mask].mean() > 0.01 for change, mask in zip(changed, pairs.region, strict=True)
    )
    share = pairs.region.float().mean((1, 2, 3))
    assert (share > 0.02).all()
    assert (share <= 0.25).all()
    assert len(pairs.ids) == len(pairs.groups) == 3


def test_the_edits_are_of_the_same_scenes(scenes):
    insert, remove = scenes["insert"], scenes["remove"]
    assert torch.equal(insert.before, remove.after)
    assert torch.equal(insert.after, remove.before)
    for other in ("replace", "recolour", "relight"):
        assert torch.equal(scenes[other].before, insert.after)


def test_a_scene_does_not_depend_on_the_others(sets, scenes):
    photographs, objects = sets
    alone = edits.object_scenes(
        "replace", photographs.select([2]), objects, size=128, object_size=64
    )
    assert torch.equal(alone.after[0], scenes["replace"].after[2])
    other = edits.object_scenes("replace", *sets, size=128, object_size=64, seed=1)
    assert not torch.equal(other.after, scenes["replace"].after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "recolor"}, "did you mean recolour"),
        ({"object_size": 256}, "does not fit"),
        ({"edit": "replace", "objects": 1}, "at least two"),
        ({"photographs": 0}, "at least one"),
    ],
)
def test_scenes_that_cannot_be_made(options, message, sets):
    photographs, objects = sets
    with pytest.raises(ValueError, match=message):
        edits.object_scenes(
            options.get("edit", "insert"),
            photographs.select(range(options.get("photographs", 3))),
            objects.select(range(options.get("objects", 4))),
            size=128,
            object_size=options.get("object_size", 64),
        )


# --------------------------------------------------------------------------------- edited folders


def write(path, *names, size=(8, 6), level=0):
    for k, name in enumerate(names):
        Image.new("RGB", size, (level + k, 0, 0)).save(path / name)


def test_pairs_are_matched_by_id(tmp_path):
    write(tmp_path, "7_resized.png", "a_b_resized.png", "a_resized.png", "9_resized.png")
    write(tmp_path, "7_hue.png", "a_b_hue.png", "a_hue.png", "7_body_bright_blue.png", level=100)
    write(tmp_path, "8_hue.png", level=200)
    write(tmp_path, "9_hue.png", size=(8, 8))
    found = edits.edited_folder(str(tmp_path))
    assert set(found.edits) == {"hue", "body_bright_blue"}
    before, after = found.before["hue"], found.after["hue"]
    assert sorted(zip(before.table["id"], after.table["id"], strict=True)) == [
        ("7_resized.png", "7_hue.png"),
        ("a_b_resized.png", "a_b_hue.png"),
        ("a_resized.png", "a_hue.png"),
    ]
    assert math.isclose(float(after[0][0].max()) * 255, 100, abs_tol=3)
    assert dict(found.unmatched) == {
        "8_hue.png": "no unedited picture of its id",
        "9_hue.png": "8×8 px, unedited 8×6 px",
        "9_resized.png": "no edited version",
    }


def test_folders_without_pairs_are_refused(tmp_path):
    with pytest.raises(images.ImageError, match="no such folder"):
        edits.edited_folder(str(tmp_path / "none"))
    write(tmp_path, "7_hue.png")
    with pytest.raises(ValueError, match=r"no file is named <id>_resized.*7_hue"):
        edits.edited_folder(str(tmp_path))
    write(tmp_path, "8_resized.png")
    with pytest.raises(ValueError, match="no pair"):
        edits.edited_folder(str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_devices_agree(kind, photos):
    edit = edits.make(kind)
    found = edit(photos.cuda())
    assert found.device.type == "cuda"
    assert (found.cpu() - edit(photos)).abs().max() < 1e-3


# ------------------------------------------------------------------------ one after another


def test_edits_are_done_from_left_to_right(photos):
    both = edits.make("mirror:horizontal+rotation:90")
    first, second = edits.make("mirror:horizontal"), edits.make("rotation:90")
    assert torch.equal(both(photos), second(first(photos)))
    assert both.name == "mirror:horizontal+rotation:90"
    assert edits.make(both.name) == both
    assert torch.equal(there(both.grid_action)(photos), both(photos))
    assert torch.equal(there(both.inverse())(both(photos)), photos)


def test_a_composite_is_as_random_and_as_lossy_as_its_steps(photos):
    noisy = edits.make("noise:20+mirror:horizontal")
    assert noisy.random
    assert noisy.inverse() is None
    ids = ["a", "b", "c", "d"][: len(photos)]
    alone = noisy(photos[1:2], ids=ids[1:2], seed=3)
    assert torch.equal(noisy(photos, ids=ids, seed=3)[1:2], alone)
    assert edits.make("hue:10+greyscale").grid_action is None
    shifted = there(edits.make("translation:0.25+mirror:vertical").grid_action)
    assert shifted(photos).shape == photos.shape
    with pytest.raises(ValueError, match="no edit 'greyscal'"):
        edits.make("hue:10+greyscal")
