"""The slider over images: what reaches the browser, and what is refused."""

import base64
import html.parser
import io

import ipywidgets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from fmlib import widgets


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def image_tag(widget) -> dict[str, str | None]:
    """Attributes of the one <img> of a widget's HTML, as a browser reads them."""
    found = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Parser().feed(widget.value)
    assert [tag for tag, _ in found] == ["img"]
    return found[0][1]


def stack(number: int = 3, *, value: int = 0) -> ipywidgets.VBox:
    frames = [np.full((3, 4, 6), index / 10) for index in range(number)]
    labels = [f"{index} px" for index in range(number)]
    alts = [f"shifted by {index} pixels" for index in range(number)]
    return widgets.slider_stack(frames, labels, alts, description="Shift", value=value)


def figure(value: float = 1.0) -> Figure:
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, value])
    return made


@given(hnp.arrays(np.float32, (3, 5, 7), elements=st.floats(0, 1, width=32)))
def test_png_keeps_every_pixel_of_an_array(array):
    found = decode(widgets.png(array))
    assert found.shape == (5, 7, 3)
    expected = np.rint(array.astype(np.float64).transpose(1, 2, 0) * 255)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 7), (5, 7)), ((1, 5, 7), (5, 7)), ((3, 5, 7), (5, 7, 3)), ((4, 5, 7), (5, 7, 4))],
)
def test_png_shapes(shape, expected):
    assert decode(widgets.png(torch.zeros(shape))).shape == expected


def test_png_of_bytes_and_small_integers_is_exact():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = widgets.png(levels)
    assert np.array_equal(decode(data), levels)
    assert widgets.png(data) == data


def test_png_does_not_upset_a_tensor_that_has_gradients():
    image = torch.full((3, 2, 2), 0.5, requires_grad=True)
    assert decode(widgets.png(image)).max() == 128


def test_png_is_the_same_for_equal_frames():
    assert widgets.png(figure()) == widgets.png(figure())
    assert widgets.png(figure()) != widgets.png(figure(2.0))
    assert b"Software" not in widgets.png(figure())


def test_png_takes_palette_and_drops_metadata():
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30] * 256)
    palette.info["comment"] = "taken at home"
    data = widgets.png(palette)
    assert decode(data)[0, 0].tolist() == [10, 20, 30]
    assert b"taken at home" not in data


def test_png_reduces_wide_pictures_only():
    wide = Image.new("RGB", (4000, 1000))
    assert decode(widgets.png(wide, max_width=1000)).shape == (250, 1000, 3)
    assert decode(widgets.png(Image.new("L", (8, 8)), max_width=1000)).shape == (8, 8)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((5, 7, 3)), "C×H×W"),
        (np.zeros((2, 3, 5, 7)), "C×H×W"),
        (np.full((3, 2, 2), 200.0), r"\[0, 1\]"),
        (np.full((3, 2, 2), -0.5), r"\[0, 1\]"),
        (np.full((3, 2, 2), np.nan), "finite"),
        (b"GIF89a", "PNG"),
        ("picture.png", "not str"),
    ],
)
def test_png_refuses(frame, message):
    with pytest.raises(ValueError, match=message):
        widgets.png(frame)


def test_slider_is_linked_in_the_browser_and_not_by_the_kernel():
    box = stack()
    slider, images = box.children
    link = vars(box)["_link"]
    assert isinstance(link, ipywidgets.widgets.widget_link.Link)
    assert link._model_module == "@jupyter-widgets/controls"
    assert link.source == (slider, "index")
    assert link.target == (images, "selected_index")
    slider.index = 2
    assert images.selected_index == 0  # the kernel has no part in it


def test_slider_reads_its_labels_and_starts_where_told():
    box = stack(value=2)
    slider, images = box.children
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert slider._options_labels == ("0 px", "1 px", "2 px")
    assert slider.description == "Shift"
    assert slider.index == images.selected_index == 2


def test_images_carry_their_pixels_and_texts():
    box = widgets.slider_stack(
        [np.zeros((2, 2)), np.ones((2, 2))],
        ["a", "b"],
        ["the map <f> & its \"mean\" at 'rest'", "white"],
        description="Value",
        width=300,
    )
    tags = [image_tag(image) for image in box.children[1].children]
    assert [tag["alt"] for tag in tags] == ["the map <f> & its \"mean\" at 'rest'", "white"]
    for tag, level in zip(tags, (0, 255), strict=True):
        head, data = str(tag["src"]).split(",")
        assert head == "data:image/png;base64"
        assert np.array_equal(decode(base64.b64decode(data)), np.full((2, 2), level))
        assert "width:300px" in str(tag["style"])


def test_equal_sliders_hold_equal_images():
    first, second = (stack().children[1].children for _ in range(2))
    assert [image.value for image in first] == [image.value for image in second]


def test_pyplot_figures_are_closed_and_others_survive():
    plt.close("all")
    kept, used = plt.figure(), plt.figure()
    widgets.slider_stack([used, figure()], ["a", "b"], ["one", "two"], description="x")
    assert plt.get_fignums() == [kept.number]
    plt.close("all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": []}, "at least one"),
        ({"labels": ["a"]}, "2, 1 and 2"),
        ({"alts": ["x", "y", "z"]}, "2, 2 and 3"),
        ({"labels": ["a", "a"]}, "different"),
        ({"labels": ["a", " "]}, "not empty"),
        ({"alts": ["x", "  "]}, r"alts\[1\].*'b'"),
        ({"alts": [None, "y"]}, r"alts\[0\].*'a'"),
        ({"description": " "}, "description"),
        ({"value": 2}, "0 to 1"),
        ({"value": -1}, "0 to 1"),
        ({"frames": [np.zeros((2, 2)), np.full((2, 2), 7.0)]}, r"frames\[1\]"),
        ({"max_megabytes": 1e-5}, "MB"),
    ],
)
def test_slider_refuses(change, message):
    call = {
        "frames": [np.zeros((2, 2)), np.ones((2, 2))],
        "labels": ["a", "b"],
        "alts": ["x", "y"],
        "description": "Value",
    }
    with pytest.raises(ValueError, match=message):
        widgets.slider_stack(**call | change)
