"""Integer linears in Triton: the reference's bits where activations are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacompress.kernels import registry
from mambacompress.kernels.int4_linear import int4_linear
from mambacompress.kernels.int8_linear import BYTES, int8_linear, tile
from mambacompress.kernels.nm_linear import nm_linear, pack_positions
from mambacompress.nm import Pattern, nm_mask
from tests.kernels.gpu.parity import FLOATS, assert_gradients, assert_same, both

SIZES = [(1, 40, 65), (3, 257, 7), (40, 192, 70), (1, 1, 1)]


def int8_weight(device: str, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8).to(device),
            torch.rand(outputs).to(device) * 0.01)


def sparse_weight(device: str, outputs: int, groups: int, keep: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values int8 [O, V], and where they belong."""
    mask = nm_mask(torch.rand(outputs, groups * of), Pattern(keep, of))
    values = torch.randint(-127, 128, (outputs, groups * keep), dtype=torch.int8)
    return values.to(device), pack_positions(mask, keep, of).to(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_int8(device: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, bias = torch.randn(rows, inputs, dtype=dtype).to(device), torch.randn(outputs, dtype=dtype).to(device)
    weight, scale = int8_weight(device, outputs, inputs)
    static = torch.tensor([0.02], device=device)
    for options in ({}, {"act_bits": 4}, {"activation": "tensor", "act_scale": static}):
        got, want = both(int8_linear, x, weight, scale, bias, **options)
        assert torch.equal(got[0], want[0])
    assert_same(*both(int8_linear, x, weight, scale, activation="none"), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("rows", [1, 3, 6, 40])
def test_int4(device: str, dtype: torch.dtype, group_size: int, rows: int) -> None:
    x, bias = torch.randn(rows, 192, dtype=dtype).to(device), torch.randn(37, dtype=dtype).to(device)
    weight = torch.randint(0, 256, (37, 96), dtype=torch.uint8).to(device)
    scale = (torch.rand(37, 192 // group_size) * 0.1).to(device, torch.float16)
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8).to(device)
    for options in ({}, {"activation": "tensor", "act_scale": torch.tensor([0.03], device=device)}):
        for z, s in ((None, scale), (zero, scale.float())):
            got, want = both(int4_linear, x, weight, s, z, bias, group_size=group_size, **options)
            assert torch.equal(got[0], want[0])
    for z in (None, zero):
        assert_same(*both(int4_linear, x, weight, scale, z, bias, group_size=group_size, activation="none"), dtype)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4), (1, 8), (2, 8), (1, 2), (1, 3), (2, 5), (3, 16),
                                          (5, 12), (9, 64), (40, 64)])
def test_sparse(device: str, keep: int, of: int) -> None:
    dtype, groups = torch.float16, 200 // of
    codes, positions = sparse_weight(device, 37, groups, keep, of)
    scale, static = torch.rand(37).to(device) * 0.01, torch.tensor([0.02], device=device)
    for rows in (1, 3, 40):
        x, bias = torch.randn(rows, groups * of, dtype=dtype).to(device), torch.randn(37).to(device)
        for options in ({}, {"act_bits": 4}, {"activation": "tensor", "act_scale": static}):
            got, want = both(nm_linear, x, codes, positions, scale, bias, keep=keep, of=of, **options)
            assert torch.equal(got[0], want[0])
        floats = {"keep": keep, "of": of, "activation": "none"}
        assert_same(*both(nm_linear, x, codes, positions, scale, **floats), dtype)
        assert_same(*both(nm_linear, x, codes.half() / 127, positions, None, bias, **floats), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "groups", "outputs"), [(1, 1, 1), (7, 65, 3), (33, 48, 70), (257, 3, 5)])
def test_sparse_sizes(device: str, dtype: torch.dtype, rows: int, groups: int, outputs: int) -> None:
    codes, positions = sparse_weight(device, outputs, groups, 2, 4)
    scale, x = torch.rand(outputs).to(device) * 0.01, torch.randn(rows, groups * 4, dtype=dtype).to(device)
    got, want = both(nm_linear, x, codes, positions, scale, keep=2, of=4)
    assert torch.equal(got[0], want[0])
    for values, factors in ((codes, scale), (codes.half() / 127, None)):
        assert_same(*both(nm_linear, x[None], values, positions, factors, keep=2, of=4, activation="none"), dtype)


@pytest.mark.parametrize("options", [{}, {"activation": "tensor", "act_scale": 0.02}])
def test_rows_quantized_outside_the_product(device: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows of a large matrix are quantized once, by a kernel of their own."""
    options = {name: torch.tensor([v], device=device) if name == "act_scale" else v for name, v in options.items()}
    x, (weight, scale) = torch.randn(3, 192).to(device), int8_weight(device, 37, 192)
    codes, positions = sparse_weight(device, 37, 48, 2, 4)
    four = torch.randint(0, 256, (37, 96), dtype=torch.uint8).to(device), torch.rand(37, 6).to(device)
    runs = (lambda: int8_linear(x, weight, scale, **options), lambda: int4_linear(x, *four, group_size=32, **options),
            lambda: nm_linear(x, codes, positions, scale, keep=2, of=4, **options))
    inside = [both(run) for run in runs]
    monkeypatch.setattr("mambacompress.kernels.int8_linear.triton.QUANTIZED_INSIDE", 0)
    for run, (got, want) in zip(runs, inside, strict=True):
        assert torch.equal(got[0], want[0])
        assert torch.equal(both(run)[0][0], want[0])


def test_sparse_gradients(device: str) -> None:
    codes, positions = sparse_weight(device, 9, 8, 1, 4)
    assert_gradients(lambda x: nm_linear(x, codes.half(), positions, keep=1, of=4, activation="none"),
                     {"x": torch.randn(3, 32).to(device)})


def test_what_is_no_number_stays_so(device: str) -> None:
    weight, scale = int8_weight(device, 5, 32)
    x = torch.randn(4, 32, device=device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for options in ({}, {"activation": "tensor", "act_scale": torch.tensor([0.02], device=device)}):
        got, want = both(int8_linear, x, weight, scale, **options)
        assert torch.equal(got[0].isnan(), want[0].isnan())


def test_leading_axes_slices_and_nothing(device: str) -> None:
    weight, scale = int8_weight(device, 9, 32)
    x = torch.randn(2, 5, 64, device=device)
    for part in (x[..., :32], x[..., ::2], x[:0, :, :32]):
        got, want = both(int8_linear, part, weight, scale)
        assert torch.equal(got[0], want[0])


def test_gradients_pass_straight_through(device: str) -> None:
    weight, scale = int8_weight(device, 9, 32)
    assert_gradients(lambda x: int8_linear(x, weight, scale, activation="none"), {"x": torch.randn(3, 32).to(device)})


def test_a_call_it_cannot_take_is_a_fallback_that_strict_forbids(device: str) -> None:
    weight, scale = int8_weight(device, 16, 32)
    tiles = weight.clone()
    tile(tiles, BYTES)
    x, packed = torch.randn(2, 48, device=device), torch.zeros(4, 24, dtype=torch.uint8, device=device)
    calls: list[Any] = [
        lambda: int8_linear(x[:, :32], tiles, scale, tiled=True),
        lambda: int4_linear(x, packed, torch.ones(4, 3, device=device), group_size=16)]
    for call, reason in zip(calls, ("tiles of a processor", "groups of 16"), strict=True):
        with registry.backend("triton"), pytest.raises(registry.KernelFallback, match=reason):
            call()


def test_compiles_into_a_graph(device: str) -> None:
    weight, scale = int8_weight(device, 9, 32)
    x = torch.randn(3, 32, device=device)
    with registry.backend("triton"), torch.inference_mode():
        expected = int8_linear(x * 2, weight, scale).relu()
    with registry.backend("triton"), torch.no_grad():
        got = torch.compile(lambda x: int8_linear(x * 2, weight, scale).relu(), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(got, expected)
