"""Grid actions: a group that acts on feature maps as edits act on places."""

import pytest
import torch

from fmlib.grids import GridAction, grid_action
from fmlib.maps import Statistics

ACTIONS = [
    GridAction(turns, mirror, shift)
    for turns in range(4)
    for mirror in (False, True)
    for shift in ((0, 0), (1, 2))
]


def test_actions_are_those_of_pictures():
    grid = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert torch.equal(grid_action("rot90")(grid)[0, 0, 0], torch.tensor([2.0, 5, 8]))  # ccw
    assert torch.equal(grid_action("hflip")(grid)[0, 0, 0], torch.tensor([2.0, 1, 0]))
    assert torch.equal(grid_action("vflip")(grid)[0, 0, 0], torch.tensor([6.0, 7, 8]))
    assert torch.equal(grid_action("shift(1,0)")(grid)[0, 0, 1], torch.tensor([0.0, 1, 2]))
    assert torch.equal(grid_action(None)(grid), grid)


@pytest.mark.parametrize("outer", ACTIONS)
def test_actions_form_a_group(outer):
    grid = torch.arange(25.0).reshape(5, 5)
    for inner in ACTIONS:
        assert torch.equal(outer.after(inner)(grid), outer(inner(grid)))
    assert torch.equal(outer.inverse()(outer(grid)), grid)
    assert grid_action(outer.name) == outer


def test_action_names_are_checked():
    assert grid_action("hflip + rot90") == GridAction(turns=1).after(GridAction(mirror=True))
    with pytest.raises(ValueError, match="did you mean 'rot90'"):
        grid_action("rot9")
    with pytest.raises(TypeError, match="name or a function"):
        grid_action(3)  # pyright: ignore[reportArgumentType]


def test_quarter_turn_needs_a_square_grid():
    x = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match="rot90 needs a square grid, not 4x5"):
        Statistics(grid_action="rot90").update(x, x)
    Statistics(grid_action="rot180").update(x, x)
