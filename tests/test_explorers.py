"""The shift explorer: what it carries, what it refuses, and how it answers in a real browser."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from fmlib import explorers, shift

PLACES = shift.grid(40, 20, 10)  # 3 × 3 positions
COUNT = len(PLACES.positions)
NAMES = ("cat", "dog")
DEEP, SHALLOW, OTHER = ("one", "deep"), ("one", "shallow"), ("two", "deep")


def cosine_matrices(seed: int) -> np.ndarray:
    """(2, P, P) cosines of random vectors, as a network would give them."""
    vectors = np.random.default_rng(seed).uniform(0.2, 1, (2, COUNT, 5))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return np.einsum("opd,oqd->opq", vectors, vectors)


COSINES = {name: cosine_matrices(seed) for seed, name in enumerate((SHALLOW, DEEP, OTHER))}
FLOORS = {name: [0.25, 0.5] for name in COSINES}


def cutouts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, 20, 20, generator=generator).clamp_min(0.1) for _ in NAMES]


def explorer(**changes) -> str:
    options = {
        "cosines": COSINES, "objects": cutouts(), "places": PLACES, "names": NAMES,
        "between": FLOORS, "start": DEEP,
    } | changes  # fmt: skip
    objects, places = options.pop("objects"), options.pop("places")
    return str(explorers.shift_explorer(options.pop("cosines"), objects, places, **options).data)


def carried(text: str) -> dict:
    """The data of the one call in the page's script."""
    (found,) = re.findall(r'mount\(document\.getElementById\("[^"]+"\), (.*)\);\n</script>', text)
    return json.loads(found)


def test_every_cosine_is_carried():
    data = carried(explorer())
    upper = np.triu_indices(COUNT, 1)
    assert [(m["encoder"], m["layer"]) for m in data["maps"]] == [SHALLOW, DEEP, OTHER]
    for found in data["maps"]:
        steps = np.frombuffer(base64.b64decode(found["values"]), "<u2").reshape(2, -1)
        values = found["low"] + steps / 65535 * (1 - found["low"])
        expected = COSINES[found["encoder"], found["layer"]][:, upper[0], upper[1]]
        assert np.abs(values - expected).max() <= 0.51 * (1 - found["low"]) / 65535


def test_a_page_can_hold_anything_in_a_name():
    text = explorer(names=("</script><b>", 'a"b'))
    assert text.count("</script>") == 1
    assert [one["name"] for one in carried(text)["objects"]] == ["</script><b>", 'a"b']


def test_the_same_data_give_the_same_page_and_others_another():
    assert explorer() == explorer()
    assert explorer() != explorer(title="another")


def test_a_constant_layer_can_be_shown():
    flat = {DEEP: np.ones((2, COUNT, COUNT))}
    assert carried(explorer(cosines=flat, between=None))["maps"][0]["low"] < 1


@pytest.mark.parametrize("background", ["grey", 0.5, torch.rand(3, 40, 40)])
def test_backgrounds_are_a_colour_or_a_picture(background):
    shown = carried(explorer(background=background))["background"]
    picture = isinstance(background, torch.Tensor)
    assert shown.startswith("data:image/png" if picture else "#80")


def skewed() -> np.ndarray:
    found = COSINES[DEEP].copy()
    found[0, 0, 1] += 0.01
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cosines": {}, "between": None}, "at least one object and one layer"),
        ({"objects": [], "names": []}, "at least one object and one layer"),
        ({"names": ("cat", "cat")}, "different name"),
        ({"names": ("cat",)}, "different name"),
        ({"objects": [torch.ones(4, 9, 9)] * 2}, "'cat' must be"),
        ({"start": ("one", "deepest")}, "none of the maps"),
        ({"between": {DEEP: [0.1, 0.2]}}, "between must have a value for each"),
        ({"between": {**FLOORS, DEEP: [0.1]}}, "not 2, one for each object"),
        ({"cosines": {DEEP: np.ones((2, 4, 4))}, "between": None}, r"must be \(2, 9, 9\)"),
        ({"cosines": {DEEP: 2 * COSINES[DEEP]}, "between": None}, r"not all in \[-1, 1\]"),
        ({"cosines": {DEEP: np.full((2, 9, 9), np.nan)}, "between": None}, "not all in"),
        ({"cosines": {DEEP: skewed()}, "between": None}, "not symmetric"),
        ({"max_megabytes": 0.001}, "coarser"),
    ],
)
def test_what_cannot_be_shown_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        explorer(**changes)


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The explorer alone in a page without network; nothing may go wrong there."""
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(f"<!doctype html><meta charset='utf-8'><body>{explorer()}", encoding="utf-8")
    shown = browser.new_page()
    shown.set_viewport_size({"width": 900, "height": 800})
    problems: list[str] = []
    shown.on("console", lambda m: m.type == "error" and problems.append(m.text))
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on("request", lambda r: r.url.startswith("http") and problems.append(r.url))
    shown.goto(path.as_uri())
    shown.wait_for_function("document.querySelector('.fm-values')?.textContent")
    yield shown
    shown.close()
    assert problems == []


def said(page) -> dict[str, float | tuple[int, int]]:
    """What the read-out says: positions as (top, left)."""
    text = page.inner_text(".fm-values")
    found: dict = {}
    for name, pattern in {"reference": "Reference", "other": "Cosine at"}.items():
        place = re.search(pattern + r" \(left (\d+), top (\d+)\)", text)
        if place:
            found[name] = (int(place[2]), int(place[1]))
    numbers = {
        "cosine": r"px: ([\d.]+)\. ",
        "mean": r"mean ([\d.]+),",
        "least": r"least ([\d.]+)\.",
        "floor": r"in its place: ([\d.]+)\.",
    }
    for name, pattern in numbers.items():
        number = re.search(pattern, text)
        if number:
            found[name] = float(number[1])
    return found


def expect(page, name: tuple[str, str], item: int, reference: tuple[int, int]) -> None:
    """The read-out agrees with the matrix that the explorer was made from."""
    index = PLACES.positions.tolist().index(list(reference))
    row = np.delete(COSINES[name][item, index], index)
    found = said(page)
    assert found["reference"] == reference
    assert found["mean"] == pytest.approx(row.mean(), abs=1e-4)
    assert found["least"] == pytest.approx(row.min(), abs=1e-4)
    assert found["floor"] == FLOORS[name][item]


def test_it_starts_at_the_centre_of_the_layer_asked_for(page):
    page.reload()
    page.wait_for_function("document.querySelector('.fm-values')?.textContent")
    expect(page, DEEP, 0, (10, 10))
    assert "other" not in said(page)


def test_arrow_keys_move_the_reference_and_stop_at_the_border(page):
    page.reload()
    page.focus(".fm-heat")
    page.keyboard.press("ArrowRight")
    expect(page, DEEP, 0, (10, 20))
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    expect(page, DEEP, 0, (0, 20))
    page.keyboard.press("Home")
    expect(page, DEEP, 0, (10, 10))


def test_shift_and_arrows_compare(page):
    page.reload()
    page.focus(".fm-heat")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowLeft")
    found = said(page)
    index = PLACES.positions.tolist().index
    expected = COSINES[DEEP][0, index([10, 10]), index([20, 0])]
    assert (found["reference"], found["other"]) == ((10, 10), (20, 0))
    assert found["cosine"] == pytest.approx(expected, abs=1e-4)
    page.keyboard.press("Escape")
    assert "other" not in said(page)


def test_menus_choose_object_encoder_and_layer(page):
    page.reload()
    page.get_by_label("Object").select_option("dog")
    expect(page, DEEP, 1, (10, 10))
    page.get_by_label("Layer").select_option("shallow")
    expect(page, SHALLOW, 1, (10, 10))
    page.get_by_label("Encoder").select_option("two")
    expect(page, OTHER, 1, (10, 10))
    page.get_by_label("Encoder").select_option("one")  # the same layer again
    expect(page, DEEP, 1, (10, 10))


def test_a_click_makes_a_position_the_reference_and_pointing_compares(page):
    page.reload()
    box = page.locator(".fm-heat").bounding_box()
    corner = {"x": 46 + 4, "y": 6 + 4}  # the margins of the axes
    page.locator(".fm-heat").click(position=corner)
    expect(page, DEEP, 0, (0, 0))
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 12)
    assert said(page)["other"] == (0, 20)
    page.mouse.move(0, 0)
    assert "other" not in said(page)


def test_the_object_can_be_dragged(page):
    page.reload()
    box = page.locator(".fm-picture").bounding_box()
    scale = box["width"] / PLACES.canvas
    page.mouse.move(box["x"] + 20 * scale, box["y"] + 20 * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + 11 * scale, box["y"] + 28 * scale)
    page.mouse.up()
    expect(page, DEEP, 0, (20, 0))


def test_screen_readers_are_told_what_there_is(page):
    page.reload()
    assert page.get_by_role("group", name="Shift explorer").count() == 1
    assert page.get_by_role("img", name="cat on the canvas, left edge at 10 px").count() == 1
    assert page.get_by_role("application").get_attribute("aria-label").startswith("Cosine of every")
    assert page.locator(".fm-values").get_attribute("aria-live") == "polite"


def test_the_map_is_drawn(page):
    """The reference itself, in the centre, has the colour of a cosine of 1."""
    page.reload()
    page.wait_for_timeout(50)
    colours = page.evaluate(
        """() => {
          const node = document.querySelector('.fm-heat');
          const pen = node.getContext('2d');
          const ratio = node.width / node.clientWidth;
          const cell = (node.clientWidth - 52) / 3;
          const at = (c, r) => [...pen.getImageData(
            Math.round(ratio * (46 + (c + 0.1) * cell)), Math.round(ratio * (6 + (r + 0.1) * cell)),
            1, 1).data].slice(0, 3);
          return {own: at(1, 1), corner: at(0, 0)};
        }"""
    )
    top = [int(carried(explorer())["colours"][-6:][i : i + 2], 16) for i in (0, 2, 4)]
    assert colours["own"] == top
    assert colours["corner"] != top
