"""The panels of the live notebooks: the cells are run here, the widgets used as by a reader."""

import datetime
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from fmlib import widgets

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def opened(name: str, **parameters: Any) -> dict[str, Any]:
    """The names a notebook leaves behind when run to its end."""
    names: dict[str, Any] = {"display": lambda *_: None}
    for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and "runs.finish" not in cell.source:
            exec(compile(cell.source, f"{name}:{cell.id}", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters
    return names


@pytest.fixture(scope="module")
def panel() -> dict[str, Any]:
    names = opened("90_explore_shifts", encoder="squeezenet1_1", stride=33, canvas=160)
    shown: list[Any] = []
    names["display"] = shown.append
    return names | {"shown": shown}


def give(panel: dict[str, Any], name: str, content: bytes) -> None:
    """Upload a file, as the browser would."""
    about = {"name": name, "type": "image/png", "size": len(content)}
    when = datetime.datetime.now(datetime.UTC)
    panel["upload"].value = ({**about, "content": memoryview(content), "last_modified": when},)


def explorer(panel: dict[str, Any]) -> dict[str, Any]:
    """What the figure shown last holds."""
    text = str(panel["shown"][-1].data)
    return json.loads(text.split("), ")[-1].split(");\n</script>")[0])


@pytest.fixture(autouse=True)
def _shows_in_the_list(panel: dict[str, Any]) -> None:
    # the cells' functions look names up in the namespace they were made in
    panel["compute"].__globals__["display"] = panel["shown"].append


def test_it_starts_with_what_the_parameters_say(panel):
    assert (panel["model"].value, panel["pace"].value, panel["side"].value) == (
        "squeezenet1_1", 33, 125,
    )  # fmt: skip
    assert panel["which"].value == "big_cat/lion"
    assert panel["status"].value == "4 positions"


def test_compute_shows_the_choice(panel):
    panel["which"].value = "fish/lionfish"
    panel["levels"].value = ("features.12",)
    panel["side"].value = 96
    panel["button"].click()
    found = explorer(panel)
    assert [one["name"] for one in found["objects"]] == ["lionfish"]
    assert [one["layer"] for one in found["maps"]] == ["features.12"]
    assert (found["size"], found["offsets"]) == (96, [0, 33])
    assert panel["status"].value == "4 positions"
    assert not panel["button"].disabled


def test_a_file_goes_before_the_menu(panel):
    give(panel, "my picture.png", widgets.png(torch.rand(3, 30, 40)))
    panel["button"].click()
    assert explorer(panel)["objects"][0]["name"] == "my picture"
    panel["upload"].value = ()


def test_another_encoder_brings_its_layers(panel):
    panel["model"].value = "random:squeezenet1_1"
    assert list(panel["levels"].options) == list(panel["net"]("squeezenet1_1").recommended)
    assert len(panel["levels"].value) == 3


def test_what_goes_wrong_is_said_and_the_panel_lives_on(panel):
    shown = len(panel["shown"])
    panel["model"].value = "squeezenet1_2"
    assert "squeezenet1_1" in panel["status"].value  # the closest name
    panel["button"].click()
    assert "ValueError" in panel["status"].value
    panel["model"].value = "squeezenet1_1"
    give(panel, "x.png", b"no picture")
    panel["button"].click()
    assert "x.png" in panel["status"].value
    panel["upload"].value = ()
    panel["side"].value = 150  # one position is left
    panel["button"].click()
    assert "single position" in panel["status"].value
    assert len(panel["shown"]) == shown
    assert not panel["button"].disabled
    panel["side"].value = 96
    panel["button"].click()
    assert len(panel["shown"]) == shown + 1


def test_an_unknown_picture_is_named_with_its_closest():
    with pytest.raises(ValueError, match=r"'big_cat/lino'.*big_cat/lion"):
        opened("90_explore_shifts", encoder="squeezenet1_1", picture="big_cat/lino", stride=33)


# --------------------------------------------------------------------------------- inversion


@pytest.fixture(scope="module")
def inverter() -> dict[str, Any]:
    return opened(
        "91_explore_inversion", encoder="squeezenet1_1", layer="features.1", steps=8, size=48,
        previews=2,
    )  # fmt: skip


def worked(inverter: dict[str, Any]) -> str:
    """Wait for the panel's work; what it says."""
    inverter["worker"].join(timeout=120)
    assert not inverter["worker"].is_alive()
    assert (inverter["button"].disabled, inverter["stop"].disabled) == (False, True)
    return inverter["status"].value


def test_invert_shows_every_preview(inverter):
    inverter["kind"].value = "fourier"
    inverter["button"].click()
    assert "8 of 8 steps" in worked(inverter)
    assert inverter["bar"].value == 2
    slider = inverter["result"].children[0]
    assert [label for label, _ in slider.children[0].options] == ["4", "8"]
    assert bytes(inverter["preview"].value).startswith(widgets.PNG_SIGNATURE)


def test_parts_are_one_run(inverter):
    image = inverter["photograph"]("035_butterfly", 48)
    config = inverter["configured"]("mahendran2015", 5.0, 8)
    parts, layer = inverter["explore"](image, "squeezenet1_1", "features.1", config, count=3)
    whole, _ = inverter["explore"](image, "squeezenet1_1", "features.1", config, count=1)
    assert layer == "features.1"
    assert [inverter["steps_of"](part) for part in parts] == [2, 5, 8]
    assert torch.equal(parts[-1].images, whole[-1].images)


def test_stop_ends_at_the_next_preview(inverter, monkeypatch):
    show = inverter["widgets"].png

    def pressed(frame: Any, **options: Any) -> bytes:
        inverter["stop"].click()  # while the first preview is drawn
        return show(frame, **options)

    monkeypatch.setattr(inverter["widgets"], "png", pressed)
    inverter["button"].click()
    assert "4 of 8 steps" in worked(inverter)
    assert inverter["status"].value.endswith("stopped")
    assert inverter["bar"].value == 1
    assert len(inverter["result"].children) == 1  # what there is


def test_a_wrong_layer_is_named_and_the_panel_lives_on(inverter):
    inverter["level"].value = "features.99"
    inverter["button"].click()
    assert "features.99" in worked(inverter)
    inverter["model"].value = "random:squeezenet1_1"
    assert inverter["level"].value in inverter["net"]("squeezenet1_1").recommended
    inverter["model"].value = "squeezenet1_2"
    assert "squeezenet1_1" in inverter["status"].value  # the closest name
    inverter["model"].value = "squeezenet1_1"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"prior": "TV"}, "mahendran2015, fourier"),
        ({"picture": "035_buterfly"}, "035_butterfly"),
        ({"layer": "features.77"}, "features.77"),
        ({"previews": 0}, "previews"),
    ],
)
def test_bad_parameters_of_an_inversion_are_named(parameters, said):
    usual = {"encoder": "squeezenet1_1", "steps": 4, "size": 48, "previews": 2}
    with pytest.raises(ValueError, match=said):
        opened("91_explore_inversion", **(usual | parameters))


# ------------------------------------------------------------------------------------ decoder


@pytest.fixture(scope="module")
def decoding() -> dict[str, Any]:
    return opened("92_explore_decoder", pool=4, mixtures=2)


def said_after(decoding: dict[str, Any]) -> str:
    """Press Decode; what the panel says."""
    decoding["button"].click()
    assert not decoding["button"].disabled
    return decoding["status"].value


def test_decode_shows_the_choice(decoding):
    decoding["level"].value = "blocks.6"
    decoding["doing"].value = "quantise:2"
    said = said_after(decoding)
    assert bytes(decoding["preview"].value).startswith(widgets.PNG_SIGNATURE)
    for title in ("code as it is", "quantise:2", "mean image"):
        assert f"{title}: 0." in said or f"{title}: 1." in said
    assert "own decoder" not in said  # no decoder was trained for this change


def test_a_decoder_of_its_own_is_shown_beside(decoding):
    decoding["level"].value, decoding["doing"].value = "blocks.6", "binarise"
    assert "binarise, own decoder" in said_after(decoding)


def test_the_share_acts_at_once(decoding):
    decoding["doing"].value = "none"
    decoding["button"].click()
    before = bytes(decoding["preview"].value)
    decoding["mix"].value = 1.0
    assert bytes(decoding["preview"].value) != before
    assert "binarise" not in decoding["status"].value
    decoding["mix"].value = 0.0
    assert bytes(decoding["preview"].value) == before


def test_random_changes_follow_the_seed(decoding):
    decoding["level"].value, decoding["doing"].value = "blocks.4", "noise:1"
    decoding["button"].click()
    before = bytes(decoding["preview"].value)
    decoding["drawn"].value = 1
    assert bytes(decoding["preview"].value) != before
    decoding["drawn"].value = 0
    assert bytes(decoding["preview"].value) == before


def test_a_mixture_ends_at_both_pictures(decoding):
    by_name, explore = decoding["by_name"], decoding["explore"]
    pair = by_name("028_nuthatch"), by_name("067_toucan")
    _, there, errors = explore(*pair, "efficientnet_lite0", "blocks.2", "none", 1.0, 0)
    _, back, _ = explore(*pair[::-1], "efficientnet_lite0", "blocks.2", "none", 0.0, 0)
    assert torch.allclose(there["code as it is"], back["code as it is"], atol=1e-5)
    to_first, to_second = errors["code as it is"]
    assert to_second < to_first


def test_another_source_brings_its_codes(decoding):
    decoding["model"].value = "descriptors"
    assert "hog" in decoding["level"].options
    decoding["level"].value, decoding["doing"].value = "hog", "none"
    assert "code as it is" in said_after(decoding)
    decoding["model"].value = "efficientnet_lite0"
    assert "blocks.4" in decoding["level"].options


def test_what_cannot_be_decoded_is_said_and_the_panel_lives_on(decoding):
    decoding["doing"].value = "binarize"
    assert "binarise" in said_after(decoding)  # the closest name
    decoding["level"].value, decoding["doing"].value = "blocks.4", "top:5"
    assert "is for vectors" in said_after(decoding)
    decoding["doing"].value = "none"
    give(decoding, "x.png", b"no picture")
    assert "x.png" in said_after(decoding)
    give(decoding, "mine.png", widgets.png(torch.rand(3, 60, 80)))
    assert "code as it is" in said_after(decoding)
    decoding["upload"].value = ()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"encoder": "squeezenet1_2"}, "squeezenet1_1"),
        ({"layer": "blocks.77"}, "blocks.4"),
        ({"change": "binarize"}, "binarise"),
        ({"picture": "028_nuthach"}, "028_nuthatch"),
        ({"pool": 1}, "pool"),
    ],
)
def test_bad_parameters_of_a_decoding_are_named(parameters, said):
    with pytest.raises(ValueError, match=said):
        opened("92_explore_decoder", **({"pool": 4, "mixtures": 2} | parameters))


# ------------------------------------------------------------------------------------ texture


#: A run of the texture notebook that takes little.
SMALL = {
    "layer": "features.4", "filters": [3, 60], "shares": 2, "reallocations": 1, "steps": 6,
    "size": 48, "previews": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def weaving() -> dict[str, Any]:
    return opened("93_explore_texture", **SMALL)


@pytest.mark.parametrize(
    ("make", "values", "title"),
    [
        ("one filter", "3, 60", "filter 60"),
        ("mixture", "0, 0.5", "50% of the second"),
        ("reallocation", "7", "draw 7"),
    ],
)
def test_make_shows_every_preview(weaving, make, values, title):
    weaving["doing"].value, weaving["long"].value = make, 8
    weaving["asked"].value = values
    weaving["button"].click()
    said = worked(weaving)
    assert "8 of 8 steps" in said
    assert said.endswith("finished")
    assert weaving["bar"].value == 2
    slider = weaving["result"].children[0]
    assert len(slider.children[0].options) == values.count(",") + 1
    assert title in slider.children[1].children[-1].value  # the alternative text
    assert bytes(weaving["preview"].value).startswith(widgets.PNG_SIGNATURE)


def test_a_thing_to_make_proposes_its_values(weaving):
    weaving["doing"].value = "mixture"
    assert (weaving["asked"].description, weaving["asked"].value) == ("shares", "0, 1")
    weaving["doing"].value = "reallocation"
    assert (weaving["asked"].description, weaving["asked"].value) == ("seeds", "0")
    weaving["doing"].value = "one filter"
    assert (weaving["asked"].description, weaving["asked"].value) == ("filters", "3, 60")


@pytest.mark.parametrize("make", ["one filter", "mixture", "reallocation"])
def test_parts_of_a_texture_are_one_run(weaving, make):
    pair, values = weaving["both"], weaving["wanted"][make]
    at = ("squeezenet1_1", "features.4")
    call = weaving["planned"](make, values, pair, *at, steps=6, spread=3.0)
    parts = weaving["explore"](call, values, 6, 3, noise=0)
    whole = weaving["explore"](call, values, 6, 1, noise=0)
    other = weaving["explore"](call, values, 6, 1, noise=1)
    assert [weaving["steps_of"](part) for part in parts] == [2, 4, 6]
    assert torch.equal(parts[-1].images, whole[-1].images)
    assert not torch.equal(other[-1].images, whole[-1].images)


def test_stopping_a_texture_keeps_what_there_is(weaving, monkeypatch):
    show = weaving["widgets"].png

    def pressed(frame: Any, **options: Any) -> bytes:
        weaving["stop"].click()  # while the first preview is drawn
        return show(frame, **options)

    monkeypatch.setattr(weaving["widgets"], "png", pressed)
    weaving["doing"].value, weaving["long"].value = "one filter", 8
    weaving["button"].click()
    assert "4 of 8 steps" in worked(weaving)
    assert weaving["status"].value.endswith("stopped")
    assert weaving["bar"].value == 1
    assert len(weaving["result"].children) == 1


def test_what_cannot_be_woven_is_said_and_the_last_picture_stays(weaving):
    weaving["doing"].value, weaving["long"].value = "one filter", 8
    weaving["button"].click()
    worked(weaving)
    before = bytes(weaving["preview"].value), weaving["result"].children

    def said(**changes: Any) -> str:
        former = {name: weaving[name].value for name in changes}
        for name, value in changes.items():
            weaving[name].value = value
        weaving["button"].click()
        text = worked(weaving)
        for name, value in former.items():
            weaving[name].value = value
        assert (bytes(weaving["preview"].value), weaving["result"].children) == before
        return text

    assert "from 0 to 127, not 128" in said(asked="3, 128")
    assert "not &#x27;x&#x27;" in said(asked="3, x") or "not 'x'" in said(asked="3, x")
    assert "there are none" in said(asked=" , ")
    assert "features.99" in said(level="features.99")
    assert "negative" in said(level="features.3.squeeze", asked="3")
    assert "receptive field" in said(level="features.12")
    assert "from 0 to 1" in said(doing="mixture", asked="1.5")
    give(weaving, "x.png", b"no picture")
    assert "x.png" in said()
    weaving["upload"].value = ()
    give(weaving, "mine.png", widgets.png(torch.rand(3, 60, 80)))
    weaving["button"].click()
    assert "8 of 8 steps" in worked(weaving)
    assert bytes(weaving["preview"].value) != before[0]
    weaving["upload"].value = ()


def test_another_encoder_brings_layers_without_negative_values(weaving):
    weaving["model"].value = "efficientnet_lite0"
    assert "blocks.2.0.bn2" in weaving["level"].options
    assert "blocks.2" in weaving["level"].options  # recommended: for mixtures
    assert "blocks.2.0.conv_dw" not in weaving["level"].options
    weaving["model"].value = "squeezenet1_2"
    assert "squeezenet1_1" in weaving["status"].value  # the closest name
    weaving["model"].value = "squeezenet1_1"
    assert weaving["status"].value == ""
    weaving["level"].value = "features.4"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"picture": "031_citrus_slice"}, "031_citrus_slices"),
        ({"second": "nowhere.jpg"}, "nowhere.jpg"),
        ({"layer": "features.77"}, "features.77"),
        ({"filters": [128]}, "from 0 to 127, not 128"),
        ({"filters": []}, "no channel"),
        ({"shares": 1}, "shares"),
        ({"steps": 1001}, "1000"),
        ({"layer": "features.3.squeeze", "filters": [3]}, "negative"),
    ],
)
def test_bad_parameters_of_a_texture_are_named(parameters, said):
    with pytest.raises(ValueError, match=said):
        opened("93_explore_texture", **(SMALL | parameters))
