"""Grid actions: what an edit that moves places does to the positions of a feature map.

An equivariant layer's features of a turned picture are its features of the picture, turned. So a
map between features of pictures and of edited pictures is looked for after this is undone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import unknown

__all__ = ["Action", "GridAction", "grid_action", "named_action"]


@dataclass(frozen=True)
class GridAction:
    """A permutation of the positions of a feature grid: what a geometric edit does to them.

    In this order: mirror left-right, turn by `turns` quarter turns counter-clockwise, move by
    `shift` units (down, right). A move wraps around, as it must to lose nothing: where the edited
    picture shows a border instead, the grid action is wrong in the strip that came around.

    These actions form a group, so that any sequence of them is one of them again (`after`), and
    each has an `inverse`. A map that is shared by all positions commutes with all of them.
    """

    turns: int = 0
    mirror: bool = False
    shift: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", self.turns % 4)
        object.__setattr__(self, "shift", (int(self.shift[0]), int(self.shift[1])))

    def __call__(self, x: Tensor) -> Tensor:
        """Permute the last two axes of x (..., H, W).

        Raises:
            ValueError: an odd number of quarter turns of a grid that is not square.
        """
        if self.turns % 2 and x.shape[-2] != x.shape[-1]:
            raise ValueError(
                f"{self.name} needs a square grid, not {x.shape[-2]}x{x.shape[-1]}: positions "
                "of the edited picture would not face positions of the original"
            )
        if self.mirror:
            x = x.flip(-1)
        if self.turns:
            x = torch.rot90(x, self.turns, (-2, -1))
        return torch.roll(x, self.shift, (-2, -1)) if any(self.shift) else x

    def _linear(self, vector: tuple[int, int]) -> tuple[int, int]:
        """Where the mirror and the turns take a displacement (down, right)."""
        down, right = vector
        right = -right if self.mirror else right
        for _ in range(self.turns):
            down, right = -right, down
        return down, right

    def after(self, first: GridAction) -> GridAction:
        """The action that does `first`, then this one."""
        down, right = self._linear(first.shift)
        return GridAction(
            turns=self.turns + (-first.turns if self.mirror else first.turns),
            mirror=self.mirror != first.mirror,
            shift=(self.shift[0] + down, self.shift[1] + right),
        )

    def inverse(self) -> GridAction:
        """The action that undoes this one."""
        linear = GridAction(self.turns if self.mirror else -self.turns, self.mirror)
        down, right = linear._linear(self.shift)
        return replace(linear, shift=(-down, -right))

    @property
    def name(self) -> str:
        """As :func:`grid_action` reads it, e.g. ``rot90`` or ``hflip+rot90+shift(0,2)``."""
        steps = []
        if self.mirror and self.turns == 2:
            steps.append("vflip")
        else:
            steps += ["hflip"] * self.mirror + [f"rot{90 * self.turns}"] * bool(self.turns)
        if any(self.shift):
            steps.append(f"shift({self.shift[0]},{self.shift[1]})")
        return "+".join(steps) or "identity"


#: A :class:`GridAction`, or any function of (N, C, H, W) that permutes positions.
Action = GridAction | Callable[[Tensor], Tensor]

_ACTIONS = {
    "identity": GridAction(),
    "rot90": GridAction(turns=1),
    "rot180": GridAction(turns=2),
    "rot270": GridAction(turns=3),
    "hflip": GridAction(mirror=True),
    "vflip": GridAction(turns=2, mirror=True),
}


def grid_action(name: str | Action | None) -> Any:
    """Look up a grid action by name.

    Names are identity, rot90, rot180, rot270 (counter-clockwise), hflip, vflip, shift(down,right)
    in grid units, or several with a + between them, done from left to right. None is the identity;
    a `GridAction` or another function is given back as it is (maps with a function of your own
    cannot be saved, composed or inverted).

    Raises:
        ValueError: an unknown name (naming the closest).
        TypeError: neither a name nor a function.
    """
    if name is None:
        return GridAction()
    if not isinstance(name, str):
        if not callable(name):
            raise TypeError(f"a grid action is a name or a function, not {type(name).__name__}")
        return name
    action = GridAction()
    for step in name.replace(" ", "").split("+"):
        moved = re.fullmatch(r"shift\((-?\d+),(-?\d+)\)", step)
        if moved:
            first = GridAction(shift=(int(moved[1]), int(moved[2])))
        elif step in _ACTIONS:
            first = _ACTIONS[step]
        else:
            raise unknown("grid action", step, [*_ACTIONS, "shift(down,right)"])
        action = first.after(action)
    return action


def named_action(action: Action, purpose: str) -> GridAction:
    """The action itself, if it is a `GridAction`.

    Raises:
        ValueError: it is a mere function, which cannot be `purpose` ("saved", "composed", ...).
    """
    if not isinstance(action, GridAction):
        raise ValueError(f"a map whose grid action is a function cannot be {purpose}: name it")
    return action
