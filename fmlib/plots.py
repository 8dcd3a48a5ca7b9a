"""Figures of the book: one style, and functions that take results and return a ``Figure``.

Figures are made without pyplot, so that none is ever shown by itself; :func:`show` displays one,
as vector graphics where it holds lines and as pixels where it holds images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from .stats import Interval

__all__ = [
    "WIDTH",
    "Panel",
    "feature_colours",
    "figure",
    "heat_maps",
    "image_grid",
    "interval_lines",
    "prediction",
    "render",
    "show",
    "use",
]

#: Width of the book's text column in inches, at 100 px an inch.
WIDTH = 7.4
_SALT = "fmlib"


def use() -> None:
    """Set the book's style: seaborn ticks, colour-blind palette, text readable at 740 px."""
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        font="DejaVu Sans",
        rc={
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.6,
            "image.cmap": "viridis",
            "image.interpolation": "nearest",
            # The same figure gives the same file.
            "svg.hashsalt": _SALT,
        },
    )


def figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure of the book, in inches, that pyplot does not know of."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _has_pixels(fig: Figure) -> bool:
    return any(ax.images for ax in fig.axes)


def render(fig: Figure) -> tuple[str, bytes]:
    """The figure as `("svg", bytes)` if it holds only lines, as `("png", bytes)` if images.

    PNG has twice the pixels of the page, for dense screens. Equal figures give equal bytes.
    """
    buffer = io.BytesIO()
    if _has_pixels(fig):
        fig.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return "png", buffer.getvalue()
    with mpl.rc_context({"svg.hashsalt": _SALT}):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "svg", buffer.getvalue()


def show(fig: Figure) -> None:
    """Display a figure in a notebook, once: SVG for lines, PNG for pixels."""
    from IPython.display import SVG, Image, display

    kind, data = render(fig)
    if kind == "svg":
        display(SVG(data.decode()))
    else:
        display(Image(data, width=round(fig.get_figwidth() * 100)))


def _pixels(image: Any) -> np.ndarray:
    """An image as matplotlib wants it: (H, W, 3), (H, W, 4) or (H, W), in [0, 1]."""
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().numpy()
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] in (1, 3, 4):
        image = image.transpose(1, 2, 0)
        image = image[..., 0] if image.shape[2] == 1 else image
    elif image.ndim != 2:
        raise ValueError(f"an image is (H, W) or (C, H, W) with C of 1, 3 or 4, not {image.shape}")
    return image.clip(0, 1)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def image_grid(
    images: Sequence[Any],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    rows: Sequence[str] | None = None,
    width: float = WIDTH,
    frame: bool = False,
) -> Figure:
    """Images in rows, read left to right.

    Args:
        images: (C, H, W) or (H, W), in [0, 1].
        titles: one for each image, or one for each column (over the first row).
        columns: images in a row; by default all, at most six.
        rows: a label left of each row.
        width: of the figure in inches.
        frame: a thin line around each image, for white canvases on a white page.

    Raises:
        ValueError: no images, a wrong shape, or titles or row labels of another number.
    """
    if not len(images):
        raise ValueError("image_grid needs at least one image")
    columns = columns or min(len(images), 6)
    count = math.ceil(len(images) / columns)
    if titles is not None and len(titles) not in (len(images), columns):
        raise ValueError(f"{len(titles)} titles for {len(images)} images in {columns} columns")
    if rows is not None and len(rows) != count:
        raise ValueError(f"{len(rows)} row labels for {count} rows")
    pictures = [_pixels(image) for image in images]
    height, breadth = pictures[0].shape[:2]
    each = (width - (0.5 if rows else 0.0)) / columns
    titled = 0 if titles is None else (1 if len(titles) < len(images) else count)
    lines = 1 + max((title.count("\n") for title in titles or [""]), default=0)
    fig = figure(count * each * height / breadth + 0.18 * lines * titled + 0.1, width=width)
    axes = fig.subplots(count, columns, squeeze=False)
    for i, ax in enumerate(axes.flat):
        _bare(ax)
        if i >= len(pictures):
            continue
        ax.imshow(pictures[i], vmin=0, vmax=1, cmap="gray")
        if frame:
            ax.spines[:].set(visible=True, color="0.6", linewidth=0.6)
        if titles is not None and i < len(titles) and titles[i]:
            ax.set_title(titles[i], pad=3)
        if rows is not None and i % columns == 0:
            ax.set_ylabel(rows[i // columns])
    return fig


def heat_maps(
    maps: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    extent: tuple[float, float, float, float] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    limits: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, float]] | None = None,
    per_row: bool = False,
    cmap: str = "viridis",
) -> Figure:
    """Maps (rows, columns, H, W) on common axes with a colour bar.

    Args:
        maps: array or tensor.
        rows: label of each row.
        columns: label of each column.
        label: what the colours are, with the unit, along the colour bar.
        extent: left, right, bottom, top in the units of the axes; in cells by default.
        xlabel: of the x axis, with its unit.
        ylabel: of the y axis, with its unit.
        limits: of the colours; the range of the values by default.
        marks: a point (x, y) for each column, in the units of the axes.
        per_row: a colour bar for each row instead of one for all.
        cmap: a perceptually uniform colour map.

    Raises:
        ValueError: `maps` is not four-dimensional or the labels do not fit it.
    """
    values = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps)
    if values.ndim != 4 or values.shape[:2] != (len(rows), len(columns)):
        raise ValueError(
            f"maps must be ({len(rows)}, {len(columns)}, H, W) to fit the labels, "
            f"not {values.shape}"
        )
    each = (WIDTH - 2.2) / len(columns)
    fig = figure(
        len(rows) * (each * values.shape[2] / values.shape[3] + 0.2) + 0.65 + 0.05 * len(rows)
    )
    axes = fig.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for r, row in enumerate(rows):
        used = values[r] if per_row else values
        low, high = limits or (float(used.min()), float(used.max()))
        if high <= low:  # a constant map still needs a colour scale
            low, high = low - 0.5e-3, high + 0.5e-3
        for c, column in enumerate(columns):
            ax = axes[r, c]
            drawn = ax.imshow(
                values[r, c], vmin=low, vmax=high, extent=extent, cmap=cmap, origin="upper"
            )
            ax.spines[:].set_visible(True)
            if marks is not None:
                ax.plot(
                    *marks[c], marker="o", ms=6, mfc="none", mec="white", mew=2.4, clip_on=False
                )
                ax.plot(*marks[c], marker="o", ms=6, mfc="none", mec="black", mew=1, clip_on=False)
            if r == 0:
                ax.set_title(column)
            if r == len(rows) - 1:
                ax.set_xlabel(xlabel if c == len(columns) // 2 else "")
            if c == 0:
                ax.set_ylabel(f"{row}\n{ylabel}" if ylabel else row)
        if per_row:
            bar = fig.colorbar(drawn, ax=list(axes[r]), pad=0.015, fraction=0.03)
            bar.outline.set_visible(False)  # pyright: ignore
            if r == len(rows) // 2:
                bar.set_label(label)
    if not per_row:
        bar = fig.colorbar(drawn, ax=axes, pad=0.015, fraction=0.03, aspect=30, label=label)
        bar.outline.set_visible(False)  # pyright: ignore
    return fig


@dataclass(frozen=True)
class Panel:
    """One pair of axes of :func:`interval_lines`."""

    x: Sequence[Any]  #: numbers, or names of the points
    lines: Mapping[str, Interval]  #: name -> an interval of arrays as long as `x`
    floors: Mapping[str, Interval] = field(default_factory=dict)  #: drawn dashed and grey


def interval_lines(
    panels: Mapping[str, Panel],
    *,
    xlabel: str,
    ylabel: str,
    height: float = 3.4,
    limits: tuple[float | None, float | None] | None = None,
    columns: int = 3,
    join: bool = True,
    share_y: bool = True,
) -> Figure:
    """Lines with their intervals: error bars over named points, bands over numbers.

    Args:
        panels: title -> what it holds; a line has one colour in all panels.
        xlabel: of the x axis, with its unit.
        ylabel: of the y axis, with its unit.
        height: of one row of panels in inches.
        limits: of the y axis.
        columns: panels in a row.
        join: draw lines between named points; not where their order says nothing.
        share_y: one y axis for all panels; without it each has its own, which a caption must say.

    Raises:
        ValueError: no lines, or a line of another length than its `x`.
    """
    if not panels or not any(panel.lines for panel in panels.values()):
        raise ValueError("interval_lines needs at least one line")
    for panel in panels.values():
        for name, line in (*panel.lines.items(), *panel.floors.items()):
            if np.shape(line.value) != (len(panel.x),):
                shape = np.shape(line.value)
                raise ValueError(f"line {name!r} has shape {shape} for {len(panel.x)} points")
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.lines))
    floors = list(dict.fromkeys(name for panel in panels.values() for name in panel.floors))
    looks: dict[str, dict[str, Any]] = {
        name: {"color": colour, "ls": "-", "marker": "osD^vPX*"[i % 8]}
        for i, (name, colour) in enumerate(
            zip(names, sns.color_palette("colorblind", len(names)), strict=True)
        )
    }
    looks |= {
        name: {"color": str(0.35 + 0.2 * (i % 3)), "ls": ["--", ":", "-."][i % 3], "marker": None}
        for i, name in enumerate(floors)
    }
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = figure(height * rows)
    axes = fig.subplots(rows, columns, squeeze=False, sharey=share_y)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        named = any(isinstance(point, str) for point in panel.x)
        places = np.arange(len(panel.x)) if named else np.asarray(panel.x, dtype=float)
        members = [*panel.lines.items(), *panel.floors.items()]
        for k, (name, line) in enumerate(members):
            look = looks[name]
            value, low, high = (np.asarray(part) for part in (line.value, line.low, line.high))
            known = np.isfinite(low)
            if named:
                # Points of several lines stand side by side, or their bars would hide one another.
                shift = 0.1 * (k - (len(members) - 1) / 2)
                bars = np.where(known, np.stack([value - low, high - value]), 0).clip(0)
                style = look if join else look | {"ls": "none", "marker": look["marker"] or "_"}
                ax.errorbar(places + shift, value, bars, capsize=2, elinewidth=1, ms=4, **style)
            else:
                ax.plot(places, value, color=look["color"], ls=looks[name]["ls"])
                if known.all():
                    ax.fill_between(places, low, high, color=look["color"], alpha=0.2, lw=0)
        if named:
            ax.set_xticks(places, [str(point) for point in panel.x], rotation=40, ha="right")
            for label in ax.get_xticklabels():
                label.set_rotation_mode("anchor")
        ax.set_title(title)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    fig.supxlabel(xlabel, fontsize=mpl.rcParams["axes.labelsize"])
    if limits:
        for ax in axes.flat:
            ax.set_ylim(*limits)
    if len(looks) > 1:
        keys = [
            Line2D([], [], color=look["color"], ls=look["ls"], marker=look["marker"], ms=4)
            for look in looks.values()
        ]
        if not any(isinstance(point, str) for panel in panels.values() for point in panel.x):
            for key in keys:
                key.set_marker("")
        fig.legend(keys, list(looks), loc="outside upper center", ncols=min(len(looks), 4))
    return fig


def prediction(image: Any, names: Sequence[str], probabilities: Sequence[float]) -> Figure:
    """A picture beside the bars of its most probable classes (best first)."""
    if len(names) != len(probabilities) or not len(names):
        raise ValueError(f"{len(names)} names for {len(probabilities)} probabilities")
    fig = figure(2.6)
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.35])
    left.imshow(_pixels(image))
    _bare(left)
    places = np.arange(len(names))
    right.barh(places, probabilities, color=sns.color_palette("colorblind")[0], height=0.7)
    for place, value in zip(places, probabilities, strict=True):
        right.annotate(
            f"{value:.3f}", (value, place), (3, 0), textcoords="offset points", va="center"
        )
    right.set_yticks(places, names)
    right.invert_yaxis()
    right.set(xlim=(0, 1.12), xlabel="probability", xticks=[0, 0.5, 1])
    right.tick_params(axis="y", length=0)
    return fig


def feature_colours(features: Tensor, *, spread: float = 2.5) -> Tensor:
    """Features as colours: the three leading principal components as red, green and blue.

    The components are those of all N maps together, so equal colours mean equal features across
    them. Each channel is scaled so that `spread` standard deviations either side of the mean fill
    [0, 1]; beyond, it saturates.

    Args:
        features: (N, C, H, W); C of 1 or 2 leaves the other colours at one half.
        spread: standard deviations from grey to the end of the scale.

    Returns:
        (N, 3, H, W) float32 in [0, 1], on the CPU.

    Raises:
        ValueError: another number of dimensions, or values that are not finite.
    """
    if features.ndim != 4:
        raise ValueError(f"features must be (N, C, H, W), not {tuple(features.shape)}")
    features = features.detach().cpu().double()
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite")
    count, channels, height, width = features.shape
    points = features.permute(0, 2, 3, 1).reshape(-1, channels)
    points = points - points.mean(0)
    # Eigenvectors of the C×C covariance: cheap for any number of positions.
    axes = torch.linalg.eigh(points.T @ points / len(points)).eigenvectors.flip(1)[:, :3]
    # An eigenvector's sign is arbitrary; its largest entry decides, so that a rerun looks alike.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scores = points @ axes
    scores = scores / scores.std(0, correction=0).clamp_min(1e-12) / (2 * spread) + 0.5
    colours = torch.full((len(points), 3), 0.5, dtype=torch.float64)
    colours[:, : scores.shape[1]] = scores
    return colours.clamp(0, 1).reshape(count, height, width, 3).permute(0, 3, 1, 2).float()
