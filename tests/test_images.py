"""Image files of every kind, damaged ones, sets, splits and crops."""

import io
import json
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.transform import resize as skimage_resize

from fmlib import images, store

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    """A smooth colour picture, all different per seed, that JPEG keeps nearly as it is."""
    y, x = np.mgrid[:height, :width]
    layers = [(x * 9 + seed * 31) % 200, (y * 11 + seed * 17) % 200, (x + y) * 5 % 200]
    return Image.fromarray(np.stack(layers, -1).astype(np.uint8))


def make_folder(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed).save(root / name)
    return root


def ids(images_: images.ImageSet) -> list[str]:
    return images_.table["id"].tolist()


class TestRead:
    @pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff", "ppm"])
    def test_lossless_formats_are_exact(self, tmp_path: Path, suffix: str) -> None:
        original = picture()
        original.save(tmp_path / f"a.{suffix}", lossless=True)  # an option of WebP alone
        x = images.read(tmp_path / f"a.{suffix}")
        assert x.dtype == torch.float32
        assert x.shape == (3, 8, 12)
        expected = torch.from_numpy(np.array(original)).permute(2, 0, 1) / 255
        assert torch.equal(x, expected)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_exif_rotation(self, tmp_path: Path, orientation: int, mode: str) -> None:
        upright = picture(32, 16).convert(mode)
        # what a camera stores for the picture to come out upright (EXIF 2.3, tag 0x0112)
        inverse = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        expected = torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1) / 255
        assert torch.equal(images.read(tmp_path / "a.png"), expected)

    def test_damaged_exif_does_not_damage_the_picture(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00broken")
        assert images.read(tmp_path / "a.png").shape == (3, 8, 12)

    @pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
    def test_palette_with_transparency(self, tmp_path: Path, transparency: int | bytes) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        image.save(tmp_path / "plain.png")
        image.save(tmp_path / "holed.png", transparency=transparency)
        plain = images.read(tmp_path / "plain.png")[:, 0].T.tolist()
        assert plain == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        # the second pixel is invisible: white paper, or alpha 0
        on_white = images.read(tmp_path / "holed.png")[:, 0].T.tolist()
        assert on_white == [[1, 0, 0], [1, 1, 1], [0, 0, 1]]
        kept = images.read(tmp_path / "holed.png", alpha=True)[:, 0].T.tolist()
        assert kept == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]

    @pytest.mark.parametrize("suffix", ["jpg", "tiff"])
    def test_cmyk(self, tmp_path: Path, suffix: str) -> None:
        # cyan, magenta and yellow ink are what is missing of red, green and blue
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"a.{suffix}")
        x = images.read(tmp_path / f"a.{suffix}")
        assert x.shape == (3, 16, 16)
        torch.testing.assert_close(x[:, 8, 8], torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0)

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_sixteen_bit_grey_keeps_its_depth(self, tmp_path: Path, suffix: str) -> None:
        values = np.array([[0, 1, 255, 256, 32768, 65535]], np.uint16)
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        x = images.read(tmp_path / f"a.{suffix}")
        # the trap: converting to 8 bits clips everything above 255 to white
        for channel in x:
            np.testing.assert_allclose(channel, values / 65535, atol=1e-7)

    def test_sixteen_bit_grey_rotated(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_allclose(
            images.read(tmp_path / "a.png")[0], np.rot90(values, -1) / 65535, atol=1e-7
        )

    def test_float_grey(self, tmp_path: Path) -> None:
        values = np.array([[0, 0.25, 1]], np.float32)
        Image.fromarray(values).save(tmp_path / "a.tiff")
        assert images.read(tmp_path / "a.tiff")[1].tolist() == values.tolist()
        Image.fromarray(values * 300).save(tmp_path / "b.tiff")
        with pytest.raises(images.ImageError, match=r"b\.tiff.*range is unknown"):
            images.read(tmp_path / "b.tiff")

    def test_one_bit_and_grey(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
        assert images.read(tmp_path / "one.png").tolist() == [[[1, 0]]] * 3
        Image.fromarray(np.array([[51, 255]], np.uint8)).save(tmp_path / "grey.png")
        torch.testing.assert_close(
            images.read(tmp_path / "grey.png"), torch.tensor([[[0.2, 1]]] * 3)
        )

    @pytest.mark.parametrize(("mode", "colour"), [("RGBA", (255, 0, 0, 51)), ("LA", (0, 51))])
    def test_alpha_stands_on_white_or_is_kept_straight(
        self, tmp_path: Path, mode: str, colour: tuple
    ) -> None:
        Image.new(mode, (2, 2), colour).save(tmp_path / "a.png")
        rgb = torch.tensor([1.0, 0, 0] if mode == "RGBA" else [0.0, 0, 0])
        on_white = images.read(tmp_path / "a.png")
        torch.testing.assert_close(on_white[:, 0, 0], 0.2 * rgb + 0.8)
        kept = images.read(tmp_path / "a.png", alpha=True)
        torch.testing.assert_close(kept[:, 0, 0], torch.cat([rgb, torch.tensor([0.2])]))

    def test_grey_and_rgb_with_a_transparent_colour(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "l.png", transparency=9)
        assert images.read(tmp_path / "l.png", alpha=True)[3].tolist() == [[1, 0]]
        image = Image.new("RGB", (2, 1), RED)
        image.putpixel((1, 0), BLUE)
        image.save(tmp_path / "rgb.png", transparency=BLUE)
        assert images.read(tmp_path / "rgb.png", alpha=True)[3].tolist() == [[1, 0]]
        sixteen = np.array([[7, 60000]], np.uint16)
        Image.fromarray(sixteen).save(tmp_path / "i.png", transparency=7)
        assert images.read(tmp_path / "i.png", alpha=True)[3].tolist() == [[0, 1]]

    def test_alpha_of_an_opaque_image_is_one(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        x = images.read(tmp_path / "a.png", alpha=True)
        assert x.shape == (4, 8, 12)
        assert bool((x[3] == 1).all())

    def test_animation_gives_its_first_frame(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert images.read(tmp_path / "a.gif")[:, 0, 0].tolist() == [1, 0, 0]


class TestDamage:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_truncated(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(images.ImageError, match=rf"cut\.{suffix}: broken"):
            images.read(path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("text.jpg", b"hello"), ("empty.png", b""), ("page.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n")],
    )
    def test_not_an_image(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(images.ImageError, match=name):
            images.read(tmp_path / name)

    def test_missing_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(images.ImageError, match=r"nowhere\.jpg: no such file"):
            images.read(tmp_path / "nowhere.jpg")
        with pytest.raises(images.ImageError, match="a folder"):
            images.read(tmp_path)

    @pytest.mark.parametrize("side", [10_001, 13_000, 20_000])
    def test_bomb_is_refused_before_decoding(self, tmp_path: Path, side: int) -> None:
        # 1-bit PNGs of 100, 169 and 400 megapixels: small files, 300 MB and more as colour. Pillow
        # itself only warns of the second, and the third it refuses
        path = tmp_path / "bomb.png"
        Image.new("1", (side, side)).save(path)
        assert path.stat().st_size < 100_000
        tracemalloc.start()
        with pytest.raises(images.ImageError, match=r"bomb\.png"):
            images.read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6

    def test_limit_can_be_moved(self, tmp_path: Path) -> None:
        picture(20, 10).save(tmp_path / "a.png")
        with pytest.raises(images.ImageError, match=r"a\.png: 20x10 .*max_pixels"):
            images.read(tmp_path / "a.png", max_pixels=199)
        assert images.read(tmp_path / "a.png", max_pixels=200).shape == (3, 10, 20)

    @given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"]), st.data())
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_any_damage_is_an_image_error_or_an_image(
        self, tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
    ) -> None:
        buffer = io.BytesIO()
        picture(24, 24).save(buffer, kind)
        content = bytearray(buffer.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.getbasetemp() / "fuzz"
        path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
        try:
            x = images.read(path, max_pixels=100_000)
        except images.ImageError:
            return
        assert x.shape[0] == 3
        assert 0 <= float(x.min()) <= float(x.max()) <= 1


class TestResize:
    def test_shorter_side_or_exact(self) -> None:
        x = torch.rand(3, 20, 40)
        assert images.resize(x, 10).shape == (3, 10, 20)
        assert images.resize(x, (7, 9)).shape == (3, 7, 9)
        assert images.resize(torch.rand(2, 5, 3, 20, 40), 10).shape == (2, 5, 3, 10, 20)
        assert images.resize(x, 20) is x
        with pytest.raises(ValueError, match="cannot resize"):
            images.resize(x, 0)

    def test_antialiased_where_plain_sampling_aliases(self) -> None:
        # the trap: a one-pixel checkerboard becomes black or white instead of grey
        board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
        small = images.resize(board.float().expand(3, 64, 64), 16)
        torch.testing.assert_close(small, torch.full((3, 16, 16), 0.5), atol=0.02, rtol=0)

    def test_close_to_scikit_image_on_a_smooth_picture(self) -> None:
        y, x = np.mgrid[:60, :80] / 20
        smooth = (np.sin(x) * np.cos(y) + 1) / 2
        ours = images.resize(torch.tensor(smooth, dtype=torch.float32).expand(3, 60, 80), (30, 40))
        theirs = skimage_resize(smooth, (30, 40), order=1, anti_aliasing=True)
        assert np.abs(ours[0].numpy() - theirs)[2:-2, 2:-2].max() < 0.005

    def test_invisible_colour_does_not_bleed(self) -> None:
        x = torch.zeros(4, 8, 8)
        x[1] = 1  # invisible pixels are green
        x[:, :, :5] = torch.tensor([1.0, 0, 0, 1])[:, None, None]
        small = images.resize(x, (4, 4))
        seen = small[3] > 0.01
        assert 0 < float(small[3, 0, 2]) < 1
        torch.testing.assert_close(small[0][seen], torch.ones(int(seen.sum())))
        torch.testing.assert_close(small[1][seen], torch.zeros(int(seen.sum())))

    def test_center_crop(self) -> None:
        x = torch.arange(25.0).reshape(1, 5, 5)
        assert images.center_crop(x, 3)[0, 0].tolist() == [6, 7, 8]
        assert images.center_crop(x, (1, 5)).tolist() == [[[10, 11, 12, 13, 14]]]
        with pytest.raises(ValueError, match="cannot crop 6x6 from an image of 5x5"):
            images.center_crop(x, 6)


class TestFolder:
    def test_labels_groups_and_order(self, tmp_path: Path) -> None:
        make_folder(tmp_path, ["b/2.png", "a/1.jpg", "a/2.webp", "top.JPEG", "a/deep/3.png"])
        (tmp_path / "notes.txt").write_text("x")
        (tmp_path / ".cache").mkdir()
        picture().save(tmp_path / ".cache" / "thumb.png")
        found = images.load(f"folder:{tmp_path}")
        assert ids(found) == ["a/1.jpg", "a/2.webp", "a/deep/3.png", "b/2.png", "top.JPEG"]
        assert found.table["label"].tolist() == ["a", "a", "a", "b", None]
        # one source, edited: never on both sides of a split
        assert found.table["group"].tolist() == ["1", "2", "3", "2", "top"]
        assert list(found.table.columns) == [
            *("id", "group", "label", "author", "licence", "path", "sha256")
        ]
        assert found.table["author"].tolist() == [None] * 5

    def test_group_by_choice(self, tmp_path: Path) -> None:
        make_folder(tmp_path, ["7_hue.png", "7_grey.png", "8_hue.png"])
        found = images.load(f"folder:{tmp_path}", group=lambda name: name.split("_")[0])
        assert found.table["group"].tolist() == ["7", "7", "8"]
        with pytest.raises(ValueError, match="options of folder"):
            images.load("classics", group=str)

    def test_own_cut_outs(self, tmp_path: Path) -> None:
        Image.new("RGBA", (3, 2), (255, 0, 0, 51)).save(tmp_path / "a.png")
        assert images.load(f"folder:{tmp_path}", alpha=True)[0].shape == (4, 2, 3)
        assert images.load(f"folder:{tmp_path}")[0].shape == (3, 2, 3)

    def test_hash_is_of_content_not_of_place_or_time(self, tmp_path: Path) -> None:
        names = ["a/1.png", "b/2.png"]
        here = images.load(f"folder:{make_folder(tmp_path / 'x', names)}")
        there = images.load(f"folder:{make_folder(tmp_path / 'y', names)}")
        assert here.hash == there.hash
        picture(seed=9).save(tmp_path / "y" / "b" / "2.png")
        assert images.load(f"folder:{tmp_path / 'y'}").hash != here.hash
        (tmp_path / "x" / "b" / "2.png").rename(tmp_path / "x" / "b" / "3.png")
        assert images.load(f"folder:{tmp_path / 'x'}").hash != here.hash
        assert here.select([0]).hash != here.hash
        assert here.select([1, 0]).hash != here.hash

    def test_empty_and_missing(self, tmp_path: Path) -> None:
        with pytest.raises(images.ImageError, match=f"{tmp_path}: no JPEG"):
            images.load(f"folder:{tmp_path}")
        with pytest.raises(images.ImageError, match="gone: no such folder"):
            images.load(f"folder:{tmp_path / 'gone'}")
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(images.ImageError, match=r"a\.png: not a folder"):
            images.load(f"folder:{tmp_path / 'a.png'}")

    def broken(self, root: Path) -> Path:
        make_folder(root, ["1.png", "2.jpg", "3.png", "4.png"])
        picture(64, 64).save(root / "2.jpg")
        content = (root / "2.jpg").read_bytes()
        (root / "2.jpg").write_bytes(content[: len(content) - 200])
        (root / "3.png").write_bytes(b"nothing")
        Image.new("1", (11_000, 10_000)).save(root / "5.png")
        return root

    def test_broken_file_is_named(self, tmp_path: Path) -> None:
        self.broken(tmp_path)
        with pytest.raises(images.ImageError, match=r"3\.png"):
            images.load(f"folder:{tmp_path}")
        (tmp_path / "3.png").unlink()
        with pytest.raises(images.ImageError, match=r"5\.png: 11000x10000 is 110 megapixels"):
            images.load(f"folder:{tmp_path}")
        (tmp_path / "5.png").unlink()
        # only the header is read at first: a truncated picture shows when it is decoded
        found = images.load(f"folder:{tmp_path}")
        assert found[0].shape == (3, 8, 12)
        with pytest.raises(images.ImageError, match=r"2\.jpg"):
            found[1]

    def test_skip_broken_lists_them(self, tmp_path: Path) -> None:
        self.broken(tmp_path)
        found = images.load(f"folder:{tmp_path}", skip_broken=True)
        assert ids(found) == ["1.png", "4.png"]
        assert [Path(path).name for path, _ in found.skipped] == ["2.jpg", "3.png", "5.png"]
        assert all(Path(path).name in reason for path, reason in found.skipped)
        assert found.batch(8).shape == (2, 3, 8, 8)
        assert images.load(f"folder:{tmp_path}", skip_broken=True, limit=2).batch(4).shape[0] == 2
        for name in ("1.png", "4.png"):
            (tmp_path / name).unlink()
        with pytest.raises(images.ImageError, match=r"no usable image, the first: .*2\.jpg"):
            images.load(f"folder:{tmp_path}", skip_broken=True)

    def test_lazy(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
        for i in range(30):
            Image.fromarray(np.roll(noise, i, 0)).save(tmp_path / f"{i}.png", compress_level=0)
        found = images.load(f"folder:{tmp_path}")
        tracemalloc.start()
        for batch in found.batches(32, 4):
            assert batch.shape[1:] == (3, 32, 32)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30 * noise.nbytes / 4


class TestNames:
    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"'photo'.*did you mean 'photos'"):
            images.load("photo")
        with pytest.raises(ValueError, match="did you mean 'folder:PATH'"):
            images.load("foler:here")
        with pytest.raises(ValueError, match="there are photos, objects, classics"):
            images.load("folder:")

    def test_packaged_data_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FMLIB_DATA", str(tmp_path / "gone"))
        with pytest.raises(images.ImageError, match=r"gone \(FMLIB_DATA names it\)"):
            images.load("photos")
        monkeypatch.setenv("FMLIB_DATA", str(tmp_path))
        with pytest.raises(images.ImageError, match=r"photos\.csv"):
            images.load("photos")

    def test_classics(self) -> None:
        found = images.load("classics")
        assert ids(found) == [
            *("astronaut", "brick", "chelsea", "china", "coffee"),
            *("flower", "grass", "gravel", "rocket"),
        ]
        assert found.select(["chelsea"])[0].shape == (3, 300, 451)
        assert found[1].shape == (3, 512, 512)  # grey in the file
        assert all(found.table[name].notna().all() for name in ("label", "author", "licence"))

    def test_loading_is_noted_for_the_manifest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "NOTES", {})
        whole = images.load("classics")
        part = images.load("classics", limit=2, seed=5)
        expected = {"classics": whole.hash, "classics (limit 2, seed 5)": part.hash}
        assert store.NOTES["images"] == expected


class TestTorchvision:
    def test_fake_data(self) -> None:
        name = "torchvision:FakeData?size=6&image_size=(3,20,30)&num_classes=3"
        found = images.load(name)
        assert len(found) == 6
        assert found[5].shape == (3, 20, 30)
        assert set(found.table["label"]) <= {"0", "1", "2"}
        assert found.hash == images.load(name).hash
        assert found.hash != images.load(name + "&random_offset=1").hash
        assert set(ids(images.load(name, limit=2))) < set(ids(found))
        pickle.loads(pickle.dumps(found))

    def test_real_loader_with_a_local_copy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # the layout that the loader of EuroSAT finds already downloaded
        root = tmp_path / "torchvision" / "eurosat"
        make_folder(
            root / "2750", ["Forest/Forest_1.png", "River/River_1.png", "River/River_2.png"]
        )
        monkeypatch.setenv("FMLIB_CACHE", str(tmp_path))
        found = images.load("torchvision:EuroSAT")
        assert found.table["label"].tolist() == ["Forest", "River", "River"]
        expected = images.read(root / "2750" / "River" / "River_1.png")
        assert torch.equal(found[1], expected)

    def test_image_folder_by_options(self, tmp_path: Path) -> None:
        make_folder(tmp_path, ["cat/1.png", "dog/1.png"])
        found = images.load(f"torchvision:ImageFolder?root={tmp_path}")
        assert found.table["label"].tolist() == ["cat", "dog"]

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no data set 'Imagenete'; did you mean 'Imagenette'"):
            images.load("torchvision:Imagenete")
        with pytest.raises(ValueError, match=r"no option 'spilt'; did you mean 'split'"):
            images.load("torchvision:DTD?spilt=test")
        with pytest.raises(images.ImageError, match="ImageFolder could not be loaded into"):
            images.load(f"torchvision:ImageFolder?root={tmp_path}")
        with pytest.raises(images.ImageError, match=r"DTD could not be loaded into"):
            images.load(f"torchvision:DTD?root={tmp_path}&download=False")


def coco_fixture(root: Path) -> Path:
    """Three images: a triangle, a thing too small, and a large one after a small first one."""
    (root / "annotations").mkdir(parents=True)
    make_folder(root / "val", ["1.png", "2.png", "3.png"])
    for name in ("1.png", "2.png", "3.png"):
        picture(100, 80).save(root / "val" / name)

    def annotation(number: int, image: int, box: list[int], outline: list[int]) -> dict:
        return {
            "id": number,
            "image_id": image,
            "category_id": 5,
            "bbox": box,
            "segmentation": [outline],
            "area": 1,
            "iscrowd": 0,
        }

    content = {
        "licenses": [{"id": 4, "name": "CC-BY-2.0"}],
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 80, "width": 100, "license": 4}
            for i in (1, 2, 3)
        ],
        "categories": [{"id": 5, "name": "kite"}],
        "annotations": [
            annotation(11, 1, [10, 20, 40, 30], [10, 20, 50, 20, 10, 50]),
            annotation(12, 1, [0, 0, 60, 60], [0, 0, 60, 0, 60, 60, 0, 60]),
            annotation(21, 2, [10, 10, 37, 37], [10, 10, 47, 10, 47, 47, 10, 47]),
            annotation(22, 2, [0, 0, 60, 60], [0, 0, 60, 0, 60, 60, 0, 60]),
            annotation(31, 3, [10, 10, 38, 20], [10, 10, 48, 10, 48, 30, 10, 30]),
        ],
    }
    path = root / "annotations" / "instances_val.json"
    path.write_text(json.dumps(content))
    return path


class TestCoco:
    def test_missing_package_says_how_to_get_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        monkeypatch.delitem(sys.modules, "pycocotools.coco", raising=False)
        with pytest.raises(ImportError, match=r"pip install 'fmlib\[coco\]'"):
            images.load(f"coco:{coco_fixture(tmp_path)}")

    def test_missing_file_and_bad_option(self, tmp_path: Path) -> None:
        with pytest.raises(images.ImageError, match=r"none\.json: no such annotation file"):
            images.load(f"coco:{tmp_path / 'none.json'}")
        with pytest.raises(ValueError, match="no option 'image'"):
            images.load(f"coco:{coco_fixture(tmp_path)}?image=x")

    def test_first_annotation_unless_small(self, tmp_path: Path) -> None:
        pytest.importorskip("pycocotools", reason="the extra fmlib[coco] is not installed")
        found = images.load(f"coco:{coco_fixture(tmp_path)}")
        # image 2: its first object is under 37.5 both ways, and the second is not taken instead
        assert ids(found) == ["11", "31"]
        assert found.table["group"].tolist() == ["1", "3"]
        assert found.table["label"].tolist() == ["kite", "kite"]
        assert found.table["licence"].tolist() == ["CC-BY-2.0", "CC-BY-2.0"]
        x = found[0]
        assert x.shape[0] == 4
        assert abs(x.shape[1] - 30) <= 1
        assert abs(x.shape[2] - 40) <= 1
        assert float(x[3].mean()) == pytest.approx(0.5, abs=0.05)  # a triangle fills half its box
        source = images.read(tmp_path / "val" / "1.png")
        torch.testing.assert_close(x[:3, :5, :5], source[:, 20:25, 10:15])

    def test_damage(self, tmp_path: Path) -> None:
        pytest.importorskip("pycocotools", reason="the extra fmlib[coco] is not installed")
        path = coco_fixture(tmp_path)
        found = images.load(f"coco:{path}")
        picture(50, 50).save(tmp_path / "val" / "1.png")
        with pytest.raises(images.ImageError, match=r"1\.png: \(50, 50\) pixels"):
            found[0]
        (tmp_path / "val" / "3.png").write_bytes(b"x")
        with pytest.raises(images.ImageError, match=r"no usable image, the first: .*1\.png"):
            images.load(f"coco:{path}", skip_broken=True)
        picture(100, 80).save(tmp_path / "val" / "1.png")
        assert ids(images.load(f"coco:{path}", skip_broken=True)) == ["11"]
        (tmp_path / "bad.json").write_text("[1]")
        with pytest.raises(images.ImageError, match=r"bad\.json: not a COCO"):
            images.load(f"coco:{tmp_path / 'bad.json'}")
        (tmp_path / "val").rename(tmp_path / "elsewhere")
        with pytest.raises(images.ImageError, match=r"1\.png not found in .*images=FOLDER"):
            images.load(f"coco:{path}")
        elsewhere = f"coco:{path}?images={tmp_path / 'elsewhere'}"
        with pytest.raises(images.ImageError, match=r"3\.png"):
            images.load(elsewhere)


class TestSelect:
    def test_ids_masks_and_positions(self) -> None:
        found = images.load("classics")
        assert ids(found.select(["rocket", "brick"])) == ["rocket", "brick"]
        assert ids(found.select([-1, 0])) == ["rocket", "astronaut"]
        assert ids(found.select(np.array([2]))) == ["chelsea"]
        texture = found.table["label"] == "texture"
        assert ids(found.select(texture)) == ["brick", "grass", "gravel"]
        assert len(found.select([])) == 0

    def test_errors(self) -> None:
        found = images.load("classics")
        with pytest.raises(
            ValueError, match="no image 'rokcet' in classics; did you mean 'rocket'"
        ):
            found.select(["rokcet"])
        with pytest.raises(ValueError, match="no image 9 in classics, which has 9"):
            found.select([9])
        with pytest.raises(ValueError, match="mask has 1 entries for 9"):
            found.select([True])
        with pytest.raises(IndexError, match="image 9 of 9"):
            found[9]

    def test_negative_index_and_iteration(self) -> None:
        found = images.load("classics").select(["brick", "rocket"])
        assert torch.equal(found[-1], found[1])
        assert [x.shape for x in found] == [found[0].shape, found[1].shape]


def bare(groups: list[str]) -> images.ImageSet:
    """A set of that many images without files, for what depends on the table alone."""
    table = pd.DataFrame(
        {
            "id": [f"{i}-{group}" for i, group in enumerate(groups)],
            "group": groups,
            "label": None,
            "author": None,
            "licence": None,
            "path": None,
            "sha256": "",
        }
    )
    return images.ImageSet("bare", table, lambda row: torch.zeros(3, 4, 4))


group_names = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=2, max_size=40).filter(
    lambda groups: len(set(groups)) > 1
)


class TestSplit:
    @given(group_names, st.floats(0.05, 0.95), st.integers(0, 5))
    @settings(deadline=None)
    def test_no_group_on_both_sides_and_nothing_lost(
        self, groups: list[str], fraction: float, seed: int
    ) -> None:
        found = bare(groups)
        first, second = found.split(fraction, seed=seed)
        assert len(first) > 0
        assert len(second) > 0
        assert not set(first.table["group"]) & set(second.table["group"])
        assert sorted(ids(first) + ids(second)) == sorted(ids(found))
        again = found.split(fraction, seed=seed)
        assert ids(again[0]) == ids(first)

    @given(st.integers(0, 5), st.integers(1, 60))
    @settings(deadline=None)
    def test_stable_when_images_come_and_go(self, seed: int, more: int) -> None:
        base = [f"source {i}" for i in range(60)]
        before = bare(base).split(0.7, seed=seed)
        grown = bare([*[f"new {i}" for i in range(more)], *reversed(base), *base[:7]])
        after = grown.split(0.7, seed=seed)
        for old, new in zip(before, after, strict=True):
            assert set(old.table["group"]) <= set(new.table["group"])

    def test_fraction_and_seed(self) -> None:
        found = bare([f"{i}" for i in range(2000)])
        first, _ = found.split(0.8, seed=1)
        assert 0.77 < len(first) / 2000 < 0.83
        assert ids(found.split(0.8, seed=2)[0]) != ids(first)
        smaller, _ = found.split(0.5, seed=1)
        assert set(ids(smaller)) < set(ids(first))

    def test_independent_of_the_choice_by_limit(self) -> None:
        # the trap: one hash for both would put a limited set on one side altogether
        found = images.load("photos", limit=40, seed=0)
        first, second = found.split(0.5, seed=0)
        assert 10 <= len(first) <= 30
        assert len(first) + len(second) == 40

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="1 source group"):
            bare(["a", "a"]).split()
        for fraction in (0, 1, 80):
            with pytest.raises(ValueError, match="between 0 and 1"):
                bare(["a", "b"]).split(fraction)


class TestLimit:
    def test_seeded_nested_ordered_and_spread_over_groups(self) -> None:
        whole = images.load("photos")
        some = images.load("photos", limit=30, seed=1)
        assert len(some) == 30
        assert ids(some) == ids(images.load("photos", limit=30, seed=1))
        assert ids(some) != ids(images.load("photos", limit=30, seed=2))
        assert set(ids(images.load("photos", limit=10, seed=1))) < set(ids(some))
        assert len(set(some.table["group"])) == 30
        positions = [ids(whole).index(name) for name in ids(some)]
        assert positions == sorted(positions)
        most = images.load("photos", limit=150)
        assert len(set(most.table["group"])) == 150
        assert len(images.load("photos", limit=5000)) == 201

    def test_zero_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="limit must be at least 1"):
            images.load("photos", limit=0)

    def test_only_the_chosen_files_are_touched(self, tmp_path: Path) -> None:
        make_folder(tmp_path, [f"{i}.png" for i in range(6)])
        chosen = ids(images.load(f"folder:{tmp_path}", limit=2))
        for path in tmp_path.iterdir():
            if path.name not in chosen:
                path.write_bytes(b"broken")
        assert ids(images.load(f"folder:{tmp_path}", limit=2)) == chosen


class TestBatches:
    def test_fit(self, tmp_path: Path) -> None:
        # left third red, middle third green, right third blue
        image = Image.new("RGB", (30, 10), GREEN)
        image.paste(RED, (0, 0, 10, 10))
        image.paste(BLUE, (20, 0, 30, 10))
        image.save(tmp_path / "a.png")
        found = images.load(f"folder:{tmp_path}")
        crop = found.batch(10)
        assert crop.shape == (1, 3, 10, 10)
        assert crop.mean((0, 2, 3)).tolist() == [0, 1, 0]
        squash = found.batch(10, fit="squash")
        torch.testing.assert_close(
            squash.mean((0, 2, 3)), torch.full((3,), 1 / 3), atol=0.02, rtol=0
        )
        with pytest.raises(ValueError, match="did you mean 'squash'"):
            found.batch(10, fit="sqash")  # pyright: ignore[reportArgumentType]

    def test_pieces_are_the_whole(self) -> None:
        found = images.load("classics")
        whole = found.batch(16, indices=[0, 3, 5, 8, 2])
        pieces = list(found.batches(16, 2, indices=[0, 3, 5, 8, 2]))
        assert [len(piece) for piece in pieces] == [2, 2, 1]
        assert torch.equal(torch.cat(pieces), whole)
        assert found.batch(16).shape == (9, 3, 16, 16)
        with pytest.raises(ValueError, match="batch_size"):
            next(found.batches(16, 0))
        with pytest.raises(ValueError, match="no images"):
            found.batch(16, indices=[])

    def test_objects_keep_alpha_or_stand_on_white(self) -> None:
        found = images.load("objects", limit=3)
        kept, flat = found.batch(32, alpha=True), found.batch(32)
        assert kept.shape == (3, 4, 32, 32)
        assert flat.shape == (3, 3, 32, 32)
        # edges aside, where resizing and composing do not commute exactly
        clear = kept[:, 3] == 0
        assert bool(clear.any())
        assert float(flat.permute(0, 2, 3, 1)[clear].min()) > 0.97
        opaque = images.load("classics").batch(8, alpha=True, indices=[0])[0, 3]
        torch.testing.assert_close(opaque, torch.ones(8, 8))


class TestCrops:
    @given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
    @settings(max_examples=15, deadline=None)
    def test_batch_size_does_not_matter(self, batch: int, per_image: int, seed: int) -> None:
        found = images.load("objects", limit=3)
        whole = found.crops(12, per_image, seed=seed)
        assert whole.shape == (3 * per_image, 3, 12, 12)
        pieces = list(found.crop_batches(12, per_image, batch, seed=seed))
        assert all(len(piece) == batch for piece in pieces[:-1])
        assert torch.equal(torch.cat(pieces), whole)

    def test_company_does_not_matter(self) -> None:
        found = images.load("classics")
        alone = found.select(["coffee"]).crops(16, 3, seed=7)
        among = found.select(["rocket", "coffee"]).crops(16, 5, seed=7)
        assert torch.equal(among[5:8], alone)
        assert not torch.equal(alone, found.select(["coffee"]).crops(16, 3, seed=8))

    def test_places_sizes_and_flips_are_uniform(self) -> None:
        # one channel holds x, one y: a crop tells where it was cut
        ramp = torch.linspace(0, 1, 101)
        image = torch.stack(
            [
                ramp.expand(101, 101),
                ramp[:, None].expand(101, 101),
                ramp * 0 + ramp.expand(101, 101),
            ]
        )
        found = images.ImageSet("ramp", bare(["a"]).table, lambda row: image)
        crops = found.crops(8, 1000, scale=(0.4, 0.6))
        spans = (crops[:, 1].amax((1, 2)) - crops[:, 1].amin((1, 2))).numpy()
        assert 0.3 < spans.min() < 0.37
        assert 0.5 < spans.max() < 0.6
        flipped = (crops[:, 0, 0, 0] > crops[:, 0, 0, -1]).float().mean()
        assert 0.45 < float(flipped) < 0.55
        centres = crops.mean((2, 3))[:, :2]
        torch.testing.assert_close(centres.mean(0), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)
        assert float(centres.min()) < 0.26
        assert float(centres.max()) > 0.74
        straight = found.crops(8, 50, flip=False)
        assert bool((straight[:, 0, 0, 0] < straight[:, 0, 0, -1]).all())

    def test_whole_image_at_scale_one(self) -> None:
        found = images.load("classics").select(["brick"])
        crop = found.crops(512, 1, scale=(1, 1), flip=False)[0]
        assert torch.equal(crop, found[0])

    @pytest.mark.parametrize(
        "options",
        [{"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"scale": (0.5, 2)}, {"per_image": 0}],
    )
    def test_errors(self, options: dict) -> None:
        with pytest.raises(ValueError, match="must"):
            images.load("classics").crops(8, **{"per_image": 1, **options})
        with pytest.raises(ValueError, match="no images"):
            images.load("classics").select([]).crops(8, 1)


def test_sets_can_be_sent_to_workers() -> None:
    found = pickle.loads(pickle.dumps(images.load("photos", limit=2)))
    assert found[1].shape[0] == 3
