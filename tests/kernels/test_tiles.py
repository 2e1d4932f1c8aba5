"""Weights in tiles: the same bytes in another order, and the same products on every instruction set."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambacompress.kernels.int4_linear import int4_linear, int4_linear_reference
from mambacompress.kernels.int8_linear import BYTES, can_be_tiled, int8_linear, int8_linear_reference, tile, untiled
from mambacompress.kernels.int8_linear.tiles import rows_of, tiled_outputs
from tests.kernels.test_int_linear import int4_problem, int8_problem

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
SHAPES = [(16, 4), (40, 64), (83, 200), (16, 132), (2100, 8)]


def in_tiles(x: Tensor, unit: int = BYTES) -> Tensor:
    x = x.clone()
    tile(x, unit)
    return x


def tiles_of(problem: dict[str, Tensor]) -> dict[str, Tensor]:
    zero = problem["zero"]
    return problem | {"qweight": in_tiles(problem["qweight"]), "scale": in_tiles(problem["scale"], 1),
                      "zero": None if zero is None else in_tiles(zero, 1)}


@SETTINGS
@given(st.integers(1, 70), st.integers(1, 9), st.sampled_from([BYTES, 1]), st.data())
def test_round_trip(outputs: int, quads: int, unit: int, data: st.DataObject) -> None:
    array = hnp.arrays(np.int8, (outputs, quads * unit), elements=st.integers(-128, 127))
    x = torch.from_numpy(data.draw(array))
    tiles = in_tiles(x, unit)
    assert torch.equal(untiled(tiles, unit), x)
    assert torch.equal(tiles[tiled_outputs(x):], x[tiled_outputs(x):]), "rows behind the last tile were moved"
    picked = torch.from_numpy(data.draw(hnp.arrays(np.int64, 5, elements=st.integers(0, outputs - 1))))
    if outputs >= 16:
        assert torch.equal(rows_of(tiles, picked, unit), x[picked])


def test_layout_is_what_the_kernels_read() -> None:
    x = torch.arange(32 * 8, dtype=torch.int32).reshape(32, 8)
    bytes_of = in_tiles(x).reshape(2, 2, 16, 4)
    assert torch.equal(bytes_of[1, 1, 3], x[19, 4:8])
    assert torch.equal(in_tiles(x, 1).reshape(2, 8, 16)[1, 5, 3], x[19, 5])


@pytest.mark.parametrize(("shape", "groups", "expected"), [
    ((16, 8), 1, True), ((15, 8), 1, False), ((32, 6), 1, False), ((32, 16), 4, True), ((32, 16), 3, False)])
def test_what_can_be_tiled(shape: tuple[int, int], groups: int, expected: bool) -> None:
    assert can_be_tiled(torch.zeros(shape, dtype=torch.uint8), groups) is expected


@pytest.mark.parametrize(("mode", "bits"), [("token", 8), ("token", 4), ("tensor", 8)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 30])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int8_equals_rows(level: str, rows: int, outputs: int, inputs: int, mode: str, bits: int) -> None:
    x, q, scale, bias = int8_problem(rows, inputs, outputs)
    options = {"activation": mode, "act_bits": bits, "act_scale": torch.tensor(0.03) if mode == "tensor" else None}
    expected = int8_linear_reference(x, q, scale, bias, **options)
    assert torch.equal(int8_linear(x, q, scale, bias, **options), expected), f"rows on {level}"
    assert torch.equal(int8_linear(x, in_tiles(q), scale, bias, **options, tiled=True), expected), f"tiles on {level}"


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 30])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [
    (16, 8, 8), (40, 128, 32), (83, 192, 64), (33, 256, 128), (16, 96, 96), (48, 1536, 32)])
def test_int4_equals_rows(level: str, rows: int, outputs: int, inputs: int, group: int, asymmetric: bool) -> None:
    problem = int4_problem(rows, inputs, outputs, group, asymmetric)
    for options in ({"activation": "token"}, {"activation": "tensor", "act_scale": torch.tensor(0.03), "act_bits": 4}):
        expected = int4_linear_reference(*problem.values(), group_size=group, **options)
        assert torch.equal(int4_linear(**problem, group_size=group, **options), expected), f"rows on {level}"
        tiled = int4_linear(**tiles_of(problem), group_size=group, **options, tiled=True)
        assert torch.equal(tiled, expected), f"tiles on {level}"


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(40, 128, 32), (83, 192, 64), (16, 96, 96)])
def test_float_activations(level: str, outputs: int, inputs: int, group: int, asymmetric: bool) -> None:
    """Close to fp64, and a row does not depend on how many there are."""
    four = int4_problem(13, inputs, outputs, group, asymmetric)
    four_x, *four_weights = four.values()
    x, q, scale, bias = int8_problem(13, inputs, outputs)
    runs = {
        "int8": (x, lambda x: int8_linear(x, in_tiles(q), scale, bias, activation="none", tiled=True),
                 int8_linear_reference(x.double(), q, scale, bias, activation="none")),
        "int4": (four_x, lambda x: int4_linear(**tiles_of(four | {"x": x}), group_size=group, activation="none",
                                               tiled=True),
                 int4_linear_reference(four_x.double(), *four_weights, group_size=group, activation="none")),
    }
    for name, (x, run, exact) in runs.items():
        y = run(x)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5, msg=f"{name} on {level}")
        for row in (0, 3, 12):
            assert torch.equal(run(x[row:row + 1])[0], y[row]), f"{name} on {level}: row {row} depends on the others"


def test_gradient_and_tracing() -> None:
    x, q, scale, bias = int8_problem(3, 64, 40)
    four = int4_problem(3, 64, 40, 32, asymmetric=True)
    for rows, tiles in ((lambda x: int8_linear(x, q, scale, bias),
                         lambda x: int8_linear(x, in_tiles(q), scale, bias, tiled=True)),
                        (lambda x: int4_linear(**four | {"x": x}, group_size=32),
                         lambda x: int4_linear(**tiles_of(four | {"x": x}), group_size=32, tiled=True))):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        rows(a).square().sum().backward()
        tiles(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
