"""The published numbers are whole, belong to chapters that exist, and decide the claims."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = sorted((ROOT / "results" / "reference").glob("*/*/metrics.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: "/".join(p.parts[-3:-1]))
def test_published_run_is_whole(path):
    metrics = json.loads(path.read_text())["metrics"]
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert (ROOT / "notebooks" / f"{path.parent.name}.ipynb").is_file()
    assert manifest["profile"] == path.parent.parent.name
    assert metrics
    for record in metrics.values():
        if record["low"] is not None:
            assert record["low"] <= record["value"] <= record["high"]


def test_every_chapter_is_published_with_what_its_claims_need():
    published = {path.parent.name: path for path in PUBLISHED if path.parts[-3] == "default"}
    chapters = {path.stem for path in (ROOT / "notebooks").glob("[0-8]*.ipynb")}
    assert set(published) == chapters, "make reference"
    for claim in yaml.safe_load((ROOT / "book" / "claims.yml").read_text()):
        metrics = json.loads(published[claim["notebook"]].read_text())["metrics"]
        assert claim["metric"] in metrics
