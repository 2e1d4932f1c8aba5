"""Scan orders and merge rules: one mixer, many scans.

A selective scan is one-dimensional, an image is not, and a bi-directional text model reads twice. Every such family is
"the same scan over another *order* of the tokens", so an order is data: a permutation of the L positions of a grid, its
inverse, and a name from the field (identity, flip, cross, serpentine). A merge rule says how the scans of several
orders become one sequence again. Names follow the visual-Mamba surveys; VMamba's cross-scan is ``CROSS`` (four orders).

Legend: L tokens, H x W grid (row-major "raster" order), perm[i] = the raster position read at step i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def _identity(grid: tuple[int, int]) -> Tensor:
    return torch.arange(grid[0] * grid[1])


def _transposed(grid: tuple[int, int]) -> Tensor:
    """Column by column, top to bottom."""
    return _identity(grid).view(grid).t().reshape(-1)


def _serpentine(grid: tuple[int, int]) -> Tensor:
    """Row by row, every odd row right to left: neighbours in the scan are neighbours on the grid (PlainMamba)."""
    rows = _identity(grid).view(grid).clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.reshape(-1)


def _serpentine_transposed(grid: tuple[int, int]) -> Tensor:
    columns = _identity(grid).view(grid).t().contiguous()
    columns[1::2] = columns[1::2].flip(1)
    return columns.reshape(-1)


_FORWARD: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "identity": _identity,
    "transposed": _transposed,
    "serpentine": _serpentine,
    "serpentine-transposed": _serpentine_transposed,
}

#: Directions of a step, PlainMamba's numbering.
START, RIGHT, LEFT, UP, DOWN = range(5)
#: VMamba's cross-scan (SS2D): rows, columns, and both reversed.
CROSS = ("identity", "transposed", "flip", "transposed-flip")
#: PlainMamba's continuous 2-D scan.
CONTINUOUS = ("serpentine", "serpentine-flip", "serpentine-transposed", "serpentine-transposed-flip")


@dataclass(frozen=True)
class Order:
    """A named order. ``flip`` alone is the reversed raster; ``<name>-flip`` reverses ``<name>``."""

    name: str = "identity"

    def __post_init__(self) -> None:
        if self._base() not in _FORWARD:
            known = ", ".join([*_FORWARD, "flip", "<name>-flip"])
            raise ValueError(f"unknown scan order {self.name!r}; known: {known}")

    def _base(self) -> str:
        if self.name == "flip":
            return "identity"
        return self.name.removesuffix("-flip")

    @property
    def is_identity(self) -> bool:
        return self.name == "identity"

    def permutation(self, length: int, grid: tuple[int, int] | None = None) -> Tensor:
        """``perm`` of shape [L], int64. ``grid`` is required by the orders that are not one-dimensional.

        Raises ValueError where the grid is missing or does not hold ``length`` tokens.
        """
        if grid is None:
            if self._base() != "identity":
                raise ValueError(f"scan order {self.name!r} needs the grid (H, W) of its {length} tokens")
            grid = (1, length)
        if grid[0] * grid[1] != length:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold {length} tokens")
        return _permutation(self.name, grid)

    def apply(self, x_BLC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Read ``x_BLC`` in this order."""
        return x_BLC if self.is_identity else x_BLC[:, self._on(x_BLC, grid, inverse=False)]

    def invert(self, y_BLC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Put a sequence read in this order back into raster order."""
        return y_BLC if self.is_identity else y_BLC[:, self._on(y_BLC, grid, inverse=True)]

    def _on(self, x_BLC: Tensor, grid: tuple[int, int] | None, *, inverse: bool) -> Tensor:
        """``perm``, or what undoes it, where ``x_BLC`` is."""
        length = len(self.permutation(x_BLC.shape[1], grid))  # it says what is wrong with a grid
        return _placed(self.name, grid or (1, length), x_BLC.device, inverse)

    def directions(self, length: int, grid: tuple[int, int] | None = None) -> Tensor:
        """How each token is reached: [L] of START, RIGHT, LEFT, UP, DOWN (0 to 4), in the order's own sequence.

        A step that crosses rows and columns at once (a raster's line break) counts as the move between rows.
        """
        perm = self.permutation(length, grid)
        width = length if grid is None else grid[1]
        rows, columns = (perm // width).diff(), (perm % width).diff()
        steps = torch.where(columns > 0, RIGHT, LEFT)
        steps = torch.where(rows < 0, UP, torch.where(rows > 0, DOWN, steps))
        return torch.cat([torch.full((1,), START), steps])


#: The raster itself.
IDENTITY = Order()


@lru_cache(maxsize=64)
def _permutation(name: str, grid: tuple[int, int]) -> Tensor:
    order = Order(name)
    perm = _FORWARD[order._base()](grid)
    return perm.flip(0) if name == "flip" or name.endswith("-flip") else perm


@lru_cache(maxsize=128)
def _placed(name: str, grid: tuple[int, int], device: torch.device, inverse: bool) -> Tensor:
    perm = _permutation(name, grid)
    return (torch.argsort(perm) if inverse else perm).to(device)


@dataclass(frozen=True)
class Merge:
    """How the outputs of several paths, all back in raster order, become one: their sum, or their mean (Vim's ÷2)."""

    rule: str = "sum"

    def __post_init__(self) -> None:
        if self.rule not in ("sum", "mean"):
            raise ValueError(f"unknown merge rule {self.rule!r}; known: sum, mean")

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        total = outputs[0]
        for y_BLE in outputs[1:]:
            total = total + y_BLE
        return total / len(outputs) if self.rule == "mean" and len(outputs) > 1 else total


#: The plain sum.
SUM = Merge()
