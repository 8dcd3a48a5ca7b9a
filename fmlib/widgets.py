"""Interaction that needs no kernel: a slider over pre-rendered frames.

A rendered book has no Python behind it. What it does have is the widgets' own JavaScript, so a
slider whose position is linked in the browser to a stack of images works in the published page,
in JupyterLab and in an executed notebook alike.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["png", "slider_stack"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(frame: Any, *, max_width: int = 1280, dpi: int = 144) -> bytes:
    """One frame as PNG bytes, the same bytes for the same frame.

    Args:
        frame: A matplotlib ``Figure``; a PIL image; PNG bytes (passed through); or an array or
            tensor, H×W or C×H×W with C of 1, 3 or 4, float in [0, 1] or uint8.
        max_width: Pixels; a wider PIL image or array is reduced to it, so that a page with many
            frames stays small. Figures and PNG bytes keep their size.
        dpi: Dots per inch of a figure.

    Raises:
        ValueError: The frame is of another kind or shape, not finite, or outside [0, 1].
    """
    if isinstance(frame, (bytes, bytearray)):
        if not bytes(frame).startswith(PNG_SIGNATURE):
            raise ValueError("bytes given as a frame must be a PNG file")
        return bytes(frame)
    buffer = io.BytesIO()
    if isinstance(frame, Figure):
        # Without the version of matplotlib in the file, equal figures give equal bytes.
        frame.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        return buffer.getvalue()
    picture = frame if isinstance(frame, Image.Image) else _picture(frame)
    if picture.mode not in ("L", "RGB", "RGBA"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.width > max_width:
        height = max(1, round(picture.height * max_width / picture.width))
        picture = picture.resize((max_width, height), Image.Resampling.LANCZOS)
    # A fresh buffer without the metadata of the source file (time, camera, colour profile name).
    picture.save(buffer, format="PNG", optimize=True, icc_profile=None)
    return buffer.getvalue()


def _picture(frame: Any) -> Image.Image:
    if hasattr(frame, "detach"):
        frame = frame.detach().cpu().numpy()
    if not isinstance(frame, np.ndarray):
        raise ValueError(
            f"a frame is a Figure, a PIL image, PNG bytes, an array or a tensor, "
            f"not {type(frame).__name__}"
        )
    array = frame[None] if frame.ndim == 2 else frame
    if array.ndim != 3 or array.shape[0] not in (1, 3, 4):
        raise ValueError(f"an image array is H×W or C×H×W with C of 1, 3 or 4, not {frame.shape}")
    if array.dtype != np.uint8:
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise ValueError("an image array must be finite")
        # A rounding error beyond the ends is no sign of a mistake; 0-255 floats are.
        if array.min(initial=0.0) < -1e-3 or array.max(initial=0.0) > 1 + 1e-3:
            raise ValueError(
                f"an image array lies in [0, 1], not in [{array.min():.4g}, {array.max():.4g}]"
            )
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    array = np.ascontiguousarray(array.transpose(1, 2, 0))
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def slider_stack(
    frames: Sequence[Any],
    labels: Sequence[str],
    alts: Sequence[str],
    *,
    description: str,
    value: int = 0,
    width: int = 640,
    max_megabytes: float = 16.0,
) -> ipywidgets.VBox:
    """A slider that shows one of several images, in the browser alone.

    ``SelectionSlider.index`` is linked by JavaScript to ``Stack.selected_index``: dragging, or the
    arrow, Home and End keys once the handle has the focus, changes the image without a kernel.

    Args:
        frames: Images, see :func:`png`; best all of one size, or the page jumps. Figures made by
            pyplot are closed, or a notebook would print each once more below the cell.
        labels: What the slider reads at each frame, all different.
        alts: A sentence for each frame for readers who cannot see it.
        description: What the slider varies, shown left of it.
        value: Index of the frame shown first.
        width: Width of the images in CSS pixels (they shrink with a narrow page).
        max_megabytes: Refuse to make a heavier widget: each page carries all of its frames.

    Returns:
        The slider above the stack, to be displayed or glued.

    Raises:
        ValueError: No frames, lengths that differ, empty or repeated texts, ``value`` outside the
            frames, a frame that is no image, or more than ``max_megabytes``.
    """
    frames, labels, alts = list(frames), [str(label) for label in labels], list(alts)
    if not frames:
        raise ValueError("slider_stack needs at least one frame")
    if not len(frames) == len(labels) == len(alts):
        raise ValueError(
            "frames, labels and alts must be equally many, "
            f"not {len(frames)}, {len(labels)} and {len(alts)}"
        )
    if not description.strip():
        raise ValueError("description is empty: say what the slider varies")
    if any(not label.strip() for label in labels) or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be different and not empty: {labels}")
    for index, alt in enumerate(alts):
        if not isinstance(alt, str) or not alt.strip():
            raise ValueError(f"alts[{index}] is empty: describe the frame {labels[index]!r}")
    if not 0 <= value < len(frames):
        raise ValueError(f"value is the index of a frame, 0 to {len(frames) - 1}, not {value}")

    pictures = []
    for index, frame in enumerate(frames):
        try:
            pictures.append(png(frame, max_width=2 * width))
        except ValueError as error:
            raise ValueError(f"frames[{index}]: {error}") from error
    megabytes = sum(map(len, pictures)) * 4 / 3 / 1e6  # base64 makes three bytes four
    if megabytes > max_megabytes:
        raise ValueError(
            f"{len(frames)} frames make a widget of {megabytes:.1f} MB, more than {max_megabytes}: "
            "use fewer or smaller frames, or raise max_megabytes"
        )
    _close(frames)

    stack = ipywidgets.Stack(
        [_image(picture, alt, width) for picture, alt in zip(pictures, alts, strict=True)],
        selected_index=value,
    )
    slider = ipywidgets.SelectionSlider(
        options=[(label, index) for index, label in enumerate(labels)],
        index=value,
        description=description,
        continuous_update=True,
        style={"description_width": "initial"},
        layout={"width": f"{max(width, 320)}px", "max_width": "100%"},
    )
    link = ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    box = ipywidgets.VBox([slider, stack], layout={"max_width": "100%"})
    box.add_class("fm-slider-stack")
    # Nothing else refers to the link; with it the box keeps the wiring for as long as it lives.
    box._link = link  # pyright: ignore[reportAttributeAccessIssue]
    return box


def _image(picture: bytes, alt: str, width: int) -> ipywidgets.HTML:
    data = base64.b64encode(picture).decode("ascii")
    return ipywidgets.HTML(
        f'<img class="fm-frame" alt="{html.escape(alt.strip(), quote=True)}" '
        f'src="data:image/png;base64,{data}" '
        f'style="width:{width}px;max-width:100%;height:auto;filter:none">'
    )


def _close(frames: list[Any]) -> None:
    if any(isinstance(frame, Figure) for frame in frames):
        from matplotlib import pyplot as plt

        for frame in frames:
            if isinstance(frame, Figure):
                plt.close(frame)
