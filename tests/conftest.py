"""Fixtures shared by the tests; encoders are loaded once per run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmlib import encoders

BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker, which share what it loaded; a notebook's on their own."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        path = parameters.get("path")
        notebook = isinstance(path, Path) and path.suffix == ".ipynb"
        group = path.stem if notebook and path else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One browser context for all pages of a run: they share a cache of scripts."""
    names = ("chromium", "google-chrome", "chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no chromium or google-chrome on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=BROWSER_FLAGS)
        yield running.new_context()
        running.close()


@pytest.fixture(scope="session")
def encoder() -> Callable[[str], encoders.Encoder]:
    """Load an encoder by name, once per run; do not change what it gives."""
    known: dict[str, encoders.Encoder] = {}

    def load(name: str) -> encoders.Encoder:
        if name not in known:
            known[name] = encoders.load(name)
        return known[name]

    return load


@pytest.fixture(scope="session")
def lite0(encoder: Callable[[str], encoders.Encoder]) -> encoders.Encoder:
    """The default encoder; do not change it."""
    return encoder("efficientnet_lite0")


@pytest.fixture(scope="session")
def squeezenet(encoder: Callable[[str], encoders.Encoder]) -> encoders.Encoder:
    """The smallest packaged encoder; do not change it."""
    return encoder("squeezenet1_1")


def _square(pixels: object, size: int) -> Tensor:
    image = torch.tensor(pixels).permute(2, 0, 1).float() / 255
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[:, top : top + side, left : left + side]
    scaled = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)
    return scaled[0].clamp(0, 1)


@pytest.fixture(scope="session")
def picture() -> Callable[[str, int], Tensor]:
    """A classic photograph, centre-cropped to 3×size×size in [0, 1], without `fmlib.images`."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    def make(name: str, size: int) -> Tensor:
        if name in ("china", "flower"):
            return _square(load_sample_image(f"{name}.jpg"), size)
        return _square(getattr(data, name)(), size)

    return make
