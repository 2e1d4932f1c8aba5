"""Scan orders are permutations with inverses; their names mean what the surveys say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambacompress.models.orders import CONTINUOUS, CROSS, DOWN, LEFT, RIGHT, START, UP, Merge, Order

NAMES = sorted({*CROSS, *CONTINUOUS})
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(st.sampled_from(NAMES), grids)
def test_an_order_is_a_permutation_and_invert_undoes_apply(name: str, grid: tuple[int, int]) -> None:
    length = grid[0] * grid[1]
    order = Order(name)
    assert order.permutation(length, grid).sort().values.tolist() == list(range(length))
    x = torch.randn(2, length, 3)
    assert torch.equal(order.invert(order.apply(x, grid), grid), x)
    assert torch.equal(order.apply(x, grid)[:, 0], x[:, order.permutation(length, grid)[0]])


@given(st.sampled_from([name for name in NAMES if not name.endswith("flip")]), grids)
def test_flip_reverses(name: str, grid: tuple[int, int]) -> None:
    length = grid[0] * grid[1]
    flipped = "flip" if name == "identity" else f"{name}-flip"
    assert torch.equal(Order(flipped).permutation(length, grid), Order(name).permutation(length, grid).flip(0))


@given(st.sampled_from(CONTINUOUS), grids)
def test_continuous_orders_move_by_one_and_say_where(name: str, grid: tuple[int, int]) -> None:
    length = grid[0] * grid[1]
    perm = Order(name).permutation(length, grid)
    moves = {RIGHT: (0, 1), LEFT: (0, -1), UP: (-1, 0), DOWN: (1, 0)}
    steps = Order(name).directions(length, grid).tolist()
    assert steps[0] == START
    for before, after, step in zip(perm[:-1].tolist(), perm[1:].tolist(), steps[1:], strict=True):
        moved = (after // grid[1] - before // grid[1], after % grid[1] - before % grid[1])
        assert moved == moves[step]


@pytest.mark.parametrize(("name", "expected"), [
    ("identity", [0, 1, 2, 3, 4, 5]), ("flip", [5, 4, 3, 2, 1, 0]), ("transposed", [0, 3, 1, 4, 2, 5]),
    ("transposed-flip", [5, 2, 4, 1, 3, 0]), ("serpentine", [0, 1, 2, 5, 4, 3]),
    ("serpentine-transposed", [0, 3, 4, 1, 2, 5]),
])
def test_orders_of_a_2_by_3_grid(name: str, expected: list[int]) -> None:
    assert Order(name).permutation(6, (2, 3)).tolist() == expected


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="'spiral'"):
        Order("spiral")
    with pytest.raises(ValueError, match="needs the grid"):
        Order("transposed").permutation(6)
    with pytest.raises(ValueError, match="2 x 2 does not hold 6"):
        Order("identity").permutation(6, (2, 2))
    with pytest.raises(ValueError, match="'max'"):
        Merge("max")


def test_merges() -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(Merge()([a, b]), a + b)
    assert torch.equal(Merge("mean")([a, b]), (a + b) / 2)
    assert torch.equal(Merge("mean")([a]), a)
