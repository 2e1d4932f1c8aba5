"""Native nm_linear on float values, and the rows of a stream: against the expanded weight, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native, nm_linear, registry
from mambacompress.kernels.tolerances import rms_ratio
from mambacompress.nm import Pattern, nm_mask

PATTERNS = [(2, 4), (1, 4), (1, 8), (2, 8), (4, 8), (1, 3), (3, 6), (5, 16), (9, 64)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
needs_native = pytest.mark.skipif(native.library() is None, reason="no native library here")


def problem(rows: int, outputs: int, groups: int, keep: int, of: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight [O, I], mask, bias; stored zeros and negative zeros among the weights."""
    generator = torch.Generator().manual_seed(rows + 31 * groups + 17 * outputs + keep)
    inputs = groups * of
    mask = nm_mask(torch.rand(outputs, inputs, generator=generator), Pattern(keep, of))
    weight = torch.randn(outputs, inputs, generator=generator).masked_fill(~mask, 0).to(dtype)
    weight[0, mask[0].nonzero()[0]] = 0.0
    x = torch.randn(rows, inputs, generator=generator)
    return x, weight, mask, torch.randn(outputs, generator=generator)


def in_stream(weight: Tensor, mask: Tensor, keep: int, of: int) -> Tensor:
    return nm_linear.pack_stream(nm_linear.kept_values(weight, mask), mask, keep, of)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keep", "of"), PATTERNS)
@pytest.mark.parametrize(("outputs", "groups"), [(1, 1), (16, 4), (45, 7)])
def test_stream_there_and_back(dtype: torch.dtype, keep: int, of: int, outputs: int, groups: int) -> None:
    _, weight, mask, _ = problem(1, outputs, groups, keep, of, dtype)
    stream = in_stream(weight, mask, keep, of)
    assert stream.dtype == dtype
    assert stream.nbytes == nm_linear.stream_bytes(outputs, groups * of, keep, of, dtype.itemsize)
    values, kept = nm_linear.unpack_stream(stream, outputs, groups * of, keep, of)
    assert torch.equal(kept, mask)
    assert torch.equal(values, nm_linear.kept_values(weight, mask))
    assert torch.equal(nm_linear.expand_stream(stream, outputs, groups * of, keep, of), weight)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 31])
@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_is_the_product_of_the_expanded_weight(level: str, keep: int, of: int, rows: int, dtype: torch.dtype) -> None:
    for outputs, groups in ((1, 1), (16, 9), (45, 7), (83, 5)):
        x, weight, mask, bias = problem(rows, outputs, groups, keep, of, dtype)
        expected = x.double() @ weight.double().T + bias.double()
        arguments = {"keep": keep, "of": of, "activation": "none"}
        stream = in_stream(weight, mask, keep, of)
        with registry.backend("native"):
            y = nm_linear.nm_linear_stream(x, stream, None, bias, outputs=outputs, **arguments)
            packed = nm_linear.nm_linear(x, nm_linear.kept_values(weight, mask),
                                         nm_linear.pack_positions(mask, keep, of), None, bias, **arguments)
        assert rms_ratio(y, expected) < nm_linear.TOLERANCE, f"[{outputs}, {groups * of}] on {level}"
        assert torch.equal(packed, y)
        with registry.backend("reference"):
            reference = nm_linear.nm_linear_stream(x, stream, None, bias, outputs=outputs, **arguments)
        assert rms_ratio(reference, expected) < nm_linear.TOLERANCE


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_rows_do_not_matter(level: str, threads: int) -> None:
    x, weight, mask, _ = problem(120, 200, 10, 2, 8, torch.float16)
    stream, before = in_stream(weight, mask, 2, 8), torch.get_num_threads()
    arguments = {"keep": 2, "of": 8, "activation": "none", "outputs": 200}
    whole = nm_linear.nm_linear_stream(x, stream, **arguments)
    try:
        torch.set_num_threads(threads)
        for rows in (1, 3, 8, 9, 50, 120):
            assert torch.equal(nm_linear.nm_linear_stream(x[:rows], stream, **arguments), whole[:rows]), rows
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_input(dtype: torch.dtype) -> None:
    x, weight, mask, bias = problem(3, 45, 9, 2, 4, torch.float16)
    arguments = {"keep": 2, "of": 4, "activation": "none", "outputs": 45}
    y = nm_linear.nm_linear_stream(x.to(dtype), in_stream(weight, mask, 2, 4), None, bias, **arguments)
    assert y.dtype == dtype
    expected = x.to(dtype).double() @ weight.double().T + bias.double()
    assert rms_ratio(y, expected) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}[dtype]


def test_gradient_and_nan() -> None:
    x, weight, mask, _ = problem(3, 45, 9, 2, 4, torch.float16)
    stream = in_stream(weight, mask, 2, 4)
    arguments = {"keep": 2, "of": 4, "activation": "none", "outputs": 45}
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (a @ weight.float().T).square().sum().backward()
    nm_linear.nm_linear_stream(b, stream, **arguments).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
    x[1, 5] = float("nan")
    y = nm_linear.nm_linear_stream(x, stream, **arguments)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_rows_are_those_of_the_weight(level: str, keep: int, of: int, kind: str) -> None:
    dtype = getattr(torch, kind)
    for outputs, groups in ((1, 1), (45, 7)):
        _, weight, mask, scale = problem(1, outputs, groups, keep, of, torch.float32)
        weight = (weight * 30).to(dtype)
        factor = scale.abs() if kind == "int8" else None
        stream, ids = in_stream(weight, mask, keep, of), torch.randint(outputs, (70,))
        expected = weight[ids].float() if factor is None else weight[ids].float() * factor[ids, None]
        for backend in ("auto", "reference"):
            with registry.backend(backend):
                found = nm_linear.nm_rows(ids, stream, factor, outputs=outputs, inputs=groups * of, keep=keep, of=of)
            assert torch.equal(found, expected), f"{backend} on {level}"
        with pytest.raises(IndexError):
            nm_linear.nm_rows(torch.tensor([16 * outputs]), stream, factor, outputs=outputs, inputs=groups * of,
                              keep=keep, of=of)


def test_refuses_what_does_not_fit() -> None:
    x, weight, mask, scale = problem(3, 45, 9, 2, 4, torch.float16)
    stream = in_stream(weight, mask, 2, 4)
    for wrong in (stream[:-1], stream.view(torch.int16), stream.view(torch.bfloat16)[None]):
        with pytest.raises(ValueError, match="a stream of"):
            nm_linear.nm_linear_stream(x, wrong, keep=2, of=4, outputs=45, activation="none")
    with pytest.raises(ValueError, match="a stream of"):
        nm_linear.nm_linear_stream(x, stream, scale, keep=2, of=4)
    with pytest.raises(ValueError, match="how many outputs"):
        nm_linear.nm_linear_stream(x, stream, keep=2, of=4, activation="none")
    with pytest.raises(ValueError, match="float activations"):
        nm_linear.nm_linear_stream(x, stream, keep=2, of=4, outputs=45)
