"""Native nm_linear: the bits of int8_linear on the expanded weight, on every instruction set and for any number of
threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native, nm_linear, registry
from mambacompress.kernels.int8_linear import BYTES, can_be_tiled, int8_linear, tile
from mambacompress.nm import Pattern, nm_mask
from tests.kernels.scans import available_levels

PATTERNS = [(2, 4), (1, 4), (1, 8), (2, 8), (4, 8)]
ODD = [(1, 3), (2, 5), (3, 6), (5, 16), (1, 2), (7, 8), (9, 64)]
needs_native = pytest.mark.skipif(native.library() is None, reason="no native library here")


def problem(rows: int, groups: int, outputs: int, keep: int, of: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, codes [O, I], mask, scale, bias; the extreme codes and stored zeros among them."""
    generator = torch.Generator().manual_seed(rows + 31 * groups + 17 * outputs + keep)
    inputs = groups * of
    mask = nm_mask(torch.rand(outputs, inputs, generator=generator), Pattern(keep, of))
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8).masked_fill(~mask, 0)
    codes[0] = codes[0].sign() * 127
    x = torch.randn(rows, inputs, generator=generator)
    return x, codes, mask, torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)


def in_stream(codes: Tensor, mask: Tensor, keep: int, of: int) -> Tensor:
    return nm_linear.pack_stream(nm_linear.kept_values(codes, mask), mask, keep, of)


@pytest.fixture(params=[False, True], ids=["as it is", "no expansion"])
def expansion(request: pytest.FixtureRequest) -> Iterator[bool]:
    """With and without the instruction that expands bytes."""
    forbid = native.function("mc_forbid_expansion", (ctypes.c_int,), ctypes.c_int)
    able = bool(forbid(request.param))
    yield able
    forbid(0)


@pytest.mark.parametrize(("keep", "of"), PATTERNS + ODD)
@pytest.mark.parametrize(("outputs", "groups"), [(1, 1), (16, 4), (45, 7)])
def test_stream_there_and_back(keep: int, of: int, outputs: int, groups: int) -> None:
    _, codes, mask, _, _ = problem(1, groups, outputs, keep, of)
    stream = in_stream(codes, mask, keep, of)
    assert len(stream) == nm_linear.stream_bytes(outputs, groups * of, keep, of)
    values, kept = nm_linear.unpack_stream(stream, outputs, groups * of, keep, of)
    assert torch.equal(kept, mask)
    assert torch.equal(values, nm_linear.kept_values(codes, mask))
    assert torch.equal(nm_linear.expand_stream(stream, outputs, groups * of, keep, of), codes)


def test_stream_is_smaller_than_the_dense_weight() -> None:
    dense = 768 * 1536
    shares = {(2, 4): 0.625, (1, 4): 0.375, (1, 8): 0.25, (2, 8): 0.375, (4, 8): 0.625}
    for (keep, of), share in shares.items():
        assert nm_linear.stream_bytes(768, 1536, keep, of) - 64 == share * dense


@needs_native
@pytest.mark.parametrize(("mode", "bits"), [("token", 8), ("token", 4), ("tensor", 8)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 12, 13, 31])
@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_equals_dense(level: str, expansion: bool, keep: int, of: int, rows: int, mode: str, bits: int) -> None:
    for outputs, groups in ((1, 1), (16, 9), (45, 7), (83, 26)):
        x, codes, mask, scale, bias = problem(rows, groups, outputs, keep, of)
        act_scale = torch.tensor(0.03) if mode == "tensor" else None
        expected = int8_linear(x, codes, scale, bias, activation=mode, act_scale=act_scale, act_bits=bits)
        with registry.backend("native"):
            y = nm_linear.nm_linear_stream(x, in_stream(codes, mask, keep, of), scale, bias, keep=keep, of=of,
                                           activation=mode, act_scale=act_scale, act_bits=bits)
        assert torch.equal(y, expected), f"[{outputs}, {groups * of}] on {level}"


@needs_native
@pytest.mark.parametrize("rows", [1, 4, 30])
@pytest.mark.parametrize(("keep", "of"), ODD)
def test_other_patterns(level: str, expansion: bool, keep: int, of: int, rows: int) -> None:
    for outputs, groups in ((16, 3), (45, 5)):
        x, codes, mask, scale, _ = problem(rows, groups, outputs, keep, of)
        y = nm_linear.nm_linear_stream(x, in_stream(codes, mask, keep, of), scale, keep=keep, of=of)
        assert torch.equal(y, int8_linear(x, codes, scale)), f"[{outputs}, {groups * of}] on {level}"


@needs_native
@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize(("keep", "of"), [*PATTERNS, (1, 3)])
def test_float_activations(level: str, expansion: bool, keep: int, of: int, rows: int) -> None:
    """The same bits as the dense weight in the tiles that the processor takes."""
    for outputs, groups in ((16, 9), (45, 7)):
        x, codes, mask, scale, bias = problem(rows, groups, outputs, keep, of)
        dense, tiled = codes.clone(), can_be_tiled(codes, 1)
        if tiled:
            tile(dense, BYTES)
        expected = int8_linear(x, dense, scale, bias, activation="none", tiled=tiled)
        y = nm_linear.nm_linear_stream(x, in_stream(codes, mask, keep, of), scale, bias, keep=keep, of=of,
                                       activation="none")
        assert torch.equal(y, expected), f"[{outputs}, {groups * of}] on {level}"


@needs_native
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_and_rows_do_not_matter(threads: int) -> None:
    x, codes, mask, scale, _ = problem(30, 40, 200, 1, 8)
    stream, before = in_stream(codes, mask, 1, 8), torch.get_num_threads()
    whole = nm_linear.nm_linear_stream(x, stream, scale, keep=1, of=8)
    try:
        torch.set_num_threads(threads)
        for rows in (1, 3, 11, 30):
            assert torch.equal(nm_linear.nm_linear_stream(x[:rows], stream, scale, keep=1, of=8), whole[:rows])
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_packed_rows(dtype: torch.dtype) -> None:
    x, codes, mask, scale, _ = problem(3, 9, 45, 2, 4)
    x = x.to(dtype)
    expected = int8_linear(x, codes, scale)
    assert torch.equal(nm_linear.nm_linear_stream(x, in_stream(codes, mask, 2, 4), scale, keep=2, of=4), expected)
    values, positions = nm_linear.kept_values(codes, mask), nm_linear.pack_positions(mask, 2, 4)
    assert torch.equal(nm_linear.nm_linear(x, values, positions, scale, keep=2, of=4), expected)


def test_gradient_and_nan() -> None:
    x, codes, mask, scale, _ = problem(3, 9, 45, 2, 4)
    stream = in_stream(codes, mask, 2, 4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    int8_linear(a, codes, scale).square().sum().backward()
    nm_linear.nm_linear_stream(b, stream, scale, keep=2, of=4).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-5)
    x[1, 5] = float("nan")
    y = nm_linear.nm_linear_stream(x, stream, scale, keep=2, of=4)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_refuses_what_does_not_fit() -> None:
    x, codes, mask, scale, _ = problem(3, 9, 45, 2, 4)
    stream = in_stream(codes, mask, 2, 4)
    for wrong in (stream[:-1], stream.view(torch.int8), stream[None]):
        with pytest.raises(ValueError, match="stream"):
            nm_linear.nm_linear_stream(x, wrong, scale, keep=2, of=4)
    with pytest.raises(ValueError, match="stream"):
        nm_linear.nm_linear_stream(x, stream, scale, keep=1, of=4)


def test_this_processor_was_tested() -> None:
    assert native.library() is None or "portable" in available_levels()
