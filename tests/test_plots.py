"""Figures: the right kind of file, the same bytes twice, colours that mean the same everywhere."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from fmlib import plots
from fmlib.stats import Interval


@pytest.fixture(autouse=True)
def _style():
    with mpl.rc_context():
        plots.use()
        yield


def interval(*values):
    value = np.array(values, float)
    return Interval(value, value - 0.1, value + 0.1, 5)


def lines():
    panel = plots.Panel(
        ["one", "two"],
        {"a": interval(0.1, 0.2), "b": interval(0.3, 0.1)},
        {"floor": interval(0.0, 0.1)},
    )
    return plots.interval_lines({"": panel}, xlabel="layer", ylabel="cosine")


def single(value, x):
    return plots.interval_lines({"": plots.Panel(x, {"a": value})}, xlabel="px", ylabel="cosine")


def heat(**options):
    maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return plots.heat_maps(
        maps, rows=["r", "s"], columns=["a", "b", "c"], label="cosine", **options
    )


def test_lines_are_vectors_and_images_are_pixels():
    kind, data = plots.render(lines())
    assert kind == "svg"
    assert b"<svg" in data
    kind, data = plots.render(heat())
    assert kind == "png"
    assert data.startswith(b"\x89PNG")
    # Two pixels of the file for one of the page.
    width = int.from_bytes(data[16:20], "big")
    assert width == pytest.approx(2 * 100 * plots.WIDTH, abs=2)


@pytest.mark.parametrize("make", [lines, heat])
def test_same_figure_same_bytes(make):
    assert plots.render(make()) == plots.render(make())


def test_nothing_is_left_open_to_be_shown_twice():
    before = plt.get_fignums()
    lines()
    heat()
    plots.image_grid([torch.rand(3, 5, 5)])
    plots.prediction(torch.rand(3, 5, 5), ["cat"], [0.5])
    assert plt.get_fignums() == before


def test_show_displays_once(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert plots.show(lines()) is None
    assert plots.show(heat()) is None
    svg, png = shown
    assert svg._repr_svg_().startswith("<")
    assert png._repr_png_()[1]["width"] == round(100 * plots.WIDTH)


def test_heat_maps_share_one_scale_or_have_one_each():
    shared = [ax.images[0].get_clim() for ax in heat().axes if ax.images]
    assert len(set(shared)) == 1
    each = [ax.images[0].get_clim() for ax in heat(per_row=True).axes if ax.images]
    assert len(set(each)) == 2
    assert [ax.images[0].get_clim() for ax in heat(limits=(0, 1)).axes if ax.images] == [(0, 1)] * 6
    bars = [ax for ax in heat().axes if not ax.images]
    assert [ax.get_ylabel() for ax in bars] == ["cosine"]


def test_interval_lines_show_the_interval():
    fig = lines()
    (ax,) = fig.axes
    container: Any = ax.containers[0]
    bars = container.lines[2][0].get_segments()
    np.testing.assert_allclose(bars[0][:, 1], [0.0, 0.2])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b", "floor"]
    fig = single(interval(0.1, 0.2), [0, 5])
    (band,) = fig.axes[0].collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [0.0, 0.3])


def test_interval_lines_without_bounds():
    """One object has no interval: the line is drawn, the bars are not."""
    value = np.array([0.1, 0.2])
    unbounded = Interval(value, value * np.nan, value * np.nan, 1)
    for x in (["one", "two"], [0, 1]):
        plots.render(single(unbounded, x))


def test_a_line_keeps_its_colour_in_all_panels():
    both = plots.Panel([0, 1], {"a": interval(0, 1), "b": interval(1, 2)})
    one = plots.Panel([0, 1], {"b": interval(3, 1)})
    fig = plots.interval_lines({"left": both, "right": one}, xlabel="px", ylabel="cosine")
    left, right = fig.axes
    assert right.lines[0].get_color() == left.lines[1].get_color() != left.lines[0].get_color()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.image_grid([]), "at least one"),
        (lambda: plots.image_grid([torch.rand(5, 4, 4)]), "C of 1, 3 or 4"),
        (lambda: plots.image_grid([torch.rand(3, 4, 4)] * 3, ["a", "b"]), "2 titles for 3"),
        (lambda: plots.image_grid([torch.rand(3, 4, 4)], rows=["a", "b"]), "row labels"),
        (
            lambda: plots.heat_maps(torch.rand(2, 2, 2), rows=[""], columns=[""], label=""),
            "to fit the labels",
        ),
        (lambda: plots.interval_lines({}, xlabel="", ylabel=""), "at least one"),
        (lambda: single(interval(1), [1, 2]), "'a' has shape"),
        (lambda: plots.prediction(torch.rand(3, 4, 4), ["a"], []), "1 names for 0"),
        (lambda: plots.feature_colours(torch.rand(3, 4, 4)), "must be"),
        (lambda: plots.feature_colours(torch.full((1, 3, 2, 2), float("nan"))), "finite"),
    ],
)
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_colours_are_the_leading_components():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 16, 6, 6, generator=generator)
    features[:, 3] *= 30  # one channel holds almost all variance: it is the red one
    colours = plots.feature_colours(features)
    assert colours.shape == (2, 3, 6, 6)
    assert colours.min() >= 0
    assert colours.max() <= 1
    both = torch.stack([colours[:, 0].flatten(), features[:, 3].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.99  # positive: the sign does not flip from run to run


def test_equal_features_have_equal_colours_in_all_maps():
    features = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    pair = torch.cat([features, features.roll(1, dims=3)])
    colours = plots.feature_colours(pair)
    torch.testing.assert_close(colours[1], colours[0].roll(1, dims=2))


def test_constant_and_narrow_features_have_colours():
    assert plots.feature_colours(torch.ones(1, 8, 3, 3)).eq(0.5).all()
    assert plots.feature_colours(torch.rand(1, 2, 3, 3))[:, 2].eq(0.5).all()


@pytest.mark.parametrize("share", [True, False])
def test_panels_share_their_vertical_axis_unless_told_not_to(share):
    panels = {
        "low": plots.Panel([0, 1], {"a": interval(0.1, 0.2)}),
        "high": plots.Panel([0, 1], {"a": interval(9.1, 9.2)}),
    }
    fig = plots.interval_lines(panels, xlabel="px", ylabel="cosine", share_y=share)
    low, high = (ax.get_ylim() for ax in fig.axes)
    assert (low == high) is share
    assert share or low[1] < high[0]


@pytest.mark.parametrize("join", [True, False])
def test_named_points_are_joined_only_if_their_order_says_something(join):
    panel = plots.Panel(["one", "two"], {"a": interval(0.1, 0.2)}, {"floor": interval(0.0, 0.1)})
    fig = plots.interval_lines({"": panel}, xlabel="edit", ylabel="way", join=join)
    data = [line for line in fig.axes[0].lines if np.size(line.get_xdata()) == 2]
    joined = [line.get_linestyle() not in ("None", "none", "") for line in data if line.get_label()]
    assert any(joined) is join
