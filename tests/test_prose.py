"""Numbers and words of the prose: names, lists and what is glued."""

import pytest

from fmlib import prose, runs
from fmlib.stats import Interval


@pytest.mark.parametrize(
    ("name", "key"),
    [("random:efficientnet_lite0", "random_efficientnet_lite0"), ("blocks.4", "blocks_4")],
)
def test_key(name, key):
    assert prose.key(name) == key


@pytest.mark.parametrize(
    ("names", "said"),
    [([], "none"), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_listed(names, said):
    assert prose.listed(names) == said
    assert prose.listed(iter(names), none="none") == said


def test_text_is_that_of_metrics():
    found = Interval(0.8312, 0.7991, 0.8604, 9)
    assert prose.text(found) == runs.format_interval(0.8312, 0.7991, 0.8604)
    assert prose.text(found) == "0.83 [0.80, 0.86]"


def test_say_glues_plain_text(monkeypatch):
    glued = []
    monkeypatch.setattr("myst_nb.glue", lambda *a, **k: glued.append((a, k)))
    prose.say("count", 3)
    assert glued == [(("count", "3"), {"display": False})]
