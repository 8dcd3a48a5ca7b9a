"""The packaged sets are what their cards and lists say."""

import csv
import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from fmlib import images, store

ROOT = Path(__file__).resolve().parent.parent / "data"
FREE = r"LicenseRef-PublicDomain|CC0-1\.0|CC-BY(-SA)?-\d\.\d"
COLUMNS = ["author", "licence", "source_package", "source_path", "sha256", "width", "height"]
Rows = list[dict[str, str]]


def rows(name: str) -> Rows:
    with (ROOT / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photos() -> Rows:
    return rows("photos.csv")


@pytest.fixture(scope="module")
def objects() -> Rows:
    return rows("objects.csv")


def jpeg_markers(content: bytes) -> set[int]:
    """Kinds of the segments of a JPEG file."""
    place, found = 2, set()
    while content[place + 1] != 0xD9:
        marker = content[place + 1]
        found.add(marker)
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xDA:  # coded data follow, up to the next real marker
            while content[place] != 0xFF or content[place + 1] in (0, *range(0xD0, 0xD8)):
                place += 1
    return found


def png_chunks(content: bytes) -> set[bytes]:
    """Kinds of the chunks of a PNG file."""
    place, found = 8, set()
    while place < len(content):
        found.add(content[place + 4 : place + 8])
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return found


@pytest.mark.parametrize(("name", "label"), [("photos", "subject"), ("objects", "class")])
def test_every_listed_file_is_there_unchanged_and_no_other(name: str, label: str) -> None:
    table = rows(f"{name}.csv")
    assert list(table[0]) == ["file", "group", label, *COLUMNS]
    on_disk = {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*.*")}
    assert {row["file"] for row in table} == on_disk
    assert len({row["sha256"] for row in table}) == len(table)
    for row in table:
        assert store.sha256_file(ROOT / row["file"]) == row["sha256"], row["file"]
        assert all(value.strip() for value in row.values()), row["file"]


def test_nothing_else_lies_in_the_folder() -> None:
    apart = ("photos", "objects", "weights")  # with tests of their own
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*")
        if path.is_file() and path.relative_to(ROOT).parts[0] not in apart
    }
    assert found == {
        "README.md",
        "photos.csv",
        "objects.csv",
        "extra/photos_provenance.csv",
        "extra/objects_provenance.csv",
        "extra/licenses/GPL-2.0.txt",
    }


def test_photographs_are_plain_small_jpegs(photos: Rows) -> None:
    for row in photos:
        name = row["file"]
        assert re.fullmatch(r"photos/\d{3}_[a-z0-9_]+\.jpg", name)
        with Image.open(ROOT / name) as image:
            assert (str(image.width), str(image.height)) == (row["width"], row["height"]), name
            assert 256 <= min(image.size) <= 288, name
            assert (image.format, image.mode) == ("JPEG", "RGB"), name
            assert JpegImagePlugin.get_sampling(image) == 2, name
        # no metadata: nothing but tables, frame and scans
        markers = jpeg_markers((ROOT / name).read_bytes())
        assert markers <= {0xE0, 0xDB, 0xC2, 0xC4, 0xDA, 0xDD}, name


def test_objects_are_tight_cut_outs_with_alpha(objects: Rows) -> None:
    for row in objects:
        name = row["file"]
        with Image.open(ROOT / name) as image:
            assert (str(image.width), str(image.height)) == (row["width"], row["height"]), name
            assert 128 <= max(image.size) <= 256, name
            assert (image.format, image.mode) == ("PNG", "RGBA"), name
            alpha = np.asarray(image)[..., 3]
        assert alpha.min() == 0, name
        assert alpha.max() >= 250, name
        assert 0.05 < (alpha > 127).mean() < 0.97, name
        assert min(edge.max() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])) > 8
        assert png_chunks((ROOT / name).read_bytes()) <= {b"IHDR", b"IDAT", b"IEND"}, name
        assert name.split("/")[1] == row["class"], name


def test_licences(photos: Rows, objects: Rows) -> None:
    for row in photos:
        assert re.fullmatch(FREE, row["licence"]), row["file"]
    for row in objects:
        assert re.fullmatch(rf"{FREE}|CC-BY(-SA)?-2\.5|GPL-2\.0-(only|or-later)", row["licence"])


def test_provenance_covers_every_file(photos: Rows, objects: Rows) -> None:
    for name, table in (("photos", photos), ("objects", objects)):
        provenance = rows(f"extra/{name}_provenance.csv")
        assert {row["file"] for row in provenance} == {row["file"] for row in table}


def test_crops_of_a_source_share_its_group_and_no_pixel(photos: Rows) -> None:
    boxes = {row["file"]: row["crop_box"] for row in rows("extra/photos_provenance.csv")}
    source = {row["file"]: row["source_sha256"] for row in rows("extra/photos_provenance.csv")}
    groups = defaultdict(list)
    for row in photos:
        groups[row["group"]].append(row["file"])
    # one source picture, one group: otherwise a split by group would leak
    assert len({source[files[0]] for files in groups.values()}) == len(groups)
    for files in groups.values():
        assert len({source[file] for file in files}) == 1
        assert len(files) <= 3
        for a, b in itertools.combinations(files, 2):
            left, top, right, bottom = map(int, boxes[a].split())
            left_b, top_b, right_b, bottom_b = map(int, boxes[b].split())
            apart_x = min(right, right_b) <= max(left, left_b)
            apart_y = min(bottom, bottom_b) <= max(top, top_b)
            assert apart_x or apart_y, (a, b)


def test_no_near_duplicates() -> None:
    small = images.load("photos").batch(24, fit="squash").flatten(1)
    small = (small - small.mean(1, keepdim=True)) / small.std(1, correction=0, keepdim=True)
    correlation = (small @ small.T / small.shape[1]).fill_diagonal_(0)
    assert float(correlation.max()) < 0.95


def test_the_card_counts_what_is_there(photos: Rows, objects: Rows) -> None:
    card = (ROOT / "README.md").read_text(encoding="utf-8")

    def counts(table: Rows, column: str) -> str:
        return ", ".join(
            f"{key} {count}" for key, count in Counter(r[column] for r in table).most_common()
        )

    def same(text: str, table: Rows, column: str) -> bool:
        return sorted(text.rstrip(".").split(", ")) == sorted(counts(table, column).split(", "))

    by = re.findall(r"^By (licence|subject|class): (.*?\d)\.(?: .*)?$", card, re.MULTILINE)
    assert [kind for kind, _ in by] == ["licence", "subject", "class", "licence"]
    assert same(by[0][1], photos, "licence")
    assert same(by[1][1], photos, "subject")
    assert same(by[2][1], objects, "class")
    assert same(by[3][1].split(". ")[0], objects, "licence")
    boxes = [row["crop_box"] for row in rows("extra/photos_provenance.csv")]
    assert f"{sum(map(bool, boxes))} of {len(photos)} photos are crops" in card
    size = sum((ROOT / row["file"]).stat().st_size for row in photos)
    groups = len({row["group"] for row in photos})
    assert f"{len(photos)} JPEG natural photographs from {groups} source images, {size:,}" in card
    gpl = sum(row["licence"].startswith("GPL") for row in objects)
    assert f"**{gpl} of {len(objects)} are GPL**" in card
    for path in re.findall(r"`((?:extra|photos|objects)/[\w/.-]*\.\w+)`", card):
        assert (ROOT / path).exists(), path


def test_the_page_of_the_book_says_the_same(photos: Rows, objects: Rows) -> None:
    page = (ROOT.parent / "book" / "data.md").read_text(encoding="utf-8")
    gpl = sum(row["licence"].startswith("GPL") for row in objects)
    assert f"{len(photos)} photographs" in page
    assert f"{len({row['group'] for row in photos})} source" in page
    assert f"{gpl} of the {len(objects)} cut-outs" in page
    for licence, count in Counter(row["licence"] for row in photos).items():
        assert f"{licence.removeprefix('LicenseRef-')} {count}" in page


def test_loaded_sets_follow_the_lists(photos: Rows, objects: Rows) -> None:
    for name, table, label in (("photos", photos, "subject"), ("objects", objects, "class")):
        found = images.load(name)
        for column, key in (("group", "group"), ("label", label), ("sha256", "sha256")):
            assert found.table[column].tolist() == [row[key] for row in table]
        assert found.table["licence"].tolist() == [row["licence"] for row in table]
        assert found.table["id"].is_unique
        x = found[0]
        assert x.shape == (
            4 if name == "objects" else 3,
            *map(int, (table[0]["height"], table[0]["width"])),
        )
