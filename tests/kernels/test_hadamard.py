"""The Hadamard transform: one table, orthonormal, fast = dense, transposes explicit, nothing padded."""

from __future__ import annotations

import pytest
import torch

from mambacompress.kernels import native, registry
from mambacompress.kernels.hadamard import (
    base_matrix,
    hadamard,
    hadamard_matrix,
    hadamard_reference,
    largest_block,
    supported,
)

SUPPORTED = [n for n in range(1, 5121) if supported(n)]
SAMPLE = [1, 2, 8, 12, 20, 28, 36, 48, 72, 96, 112, 160, 192, 384, 768, 1536, 2560, 3584, 4608, 5120]


def signs_of(n: int) -> torch.Tensor:
    return (torch.randint(0, 2, (n,)) * 2 - 1).to(torch.int8)


def test_sizes() -> None:
    assert {4, 48, 96, 160, 192, 384, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120} <= set(SUPPORTED)
    assert not any(supported(n) for n in (-4, 0, 3, 6, 24 * 7, 3712, 44))
    assert len(SUPPORTED) == 13 + sum(1 for base in (12, 20, 28, 36) for k in range(9) if base << k <= 5120)


@pytest.mark.parametrize("n", [n for n in SUPPORTED if n <= 1536])
def test_orthonormal(n: int) -> None:
    H = hadamard_matrix(n)
    assert torch.allclose(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(H.abs(), torch.full_like(H, n**-0.5), rtol=1e-15, atol=0)


@pytest.mark.parametrize("n", [n for n in SUPPORTED if n > 1536])
def test_orthonormal_through_its_parts(n: int) -> None:
    """H Hᵀ = I for the large orders, on random rows by the fast transform (equal to the dense one, see below)."""
    x = torch.randn(4, n, dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(x), transpose=True), x, rtol=0, atol=1e-12)
    assert torch.allclose(hadamard(hadamard(x, transpose=True)), x, rtol=0, atol=1e-12)
    unit = torch.zeros(1, n, dtype=torch.float64).index_fill_(1, torch.tensor([n // 3]), 1.0)
    assert torch.allclose(hadamard(unit).abs(), torch.full_like(unit, n**-0.5), rtol=1e-15, atol=0)


@pytest.mark.parametrize("m", [1, 12, 20, 28, 36])
def test_bases_are_exact(m: int) -> None:
    base = base_matrix(m).long()
    assert torch.equal(base @ base.T, m * torch.eye(m, dtype=torch.long))
    assert base.abs().unique().tolist() == [1]


def test_the_table_holds_asymmetric_matrices() -> None:
    assert not torch.equal(base_matrix(12), base_matrix(12).T)  # else a forgotten transpose would go unnoticed


@pytest.mark.parametrize("n", SAMPLE)
@pytest.mark.parametrize("transpose", [False, True])
def test_fast_is_dense(n: int, transpose: bool) -> None:
    x, signs = torch.randn(3, n, dtype=torch.float64), signs_of(n)
    R = signs.double()[:, None] * hadamard_matrix(n)
    dense = x @ (R.T if transpose else R)
    assert torch.allclose(hadamard(x, signs, transpose=transpose), dense, rtol=0, atol=1e-12)
    single = hadamard(x.float(), signs, transpose=transpose)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("n", "block"), [(3712, 128), (24 * 29, 24), (40, 20), (48, 4), (96, 96)])
def test_blocks(n: int, block: int) -> None:
    x, signs = torch.randn(2, n, dtype=torch.float64), signs_of(n)
    R = signs.double()[:, None] * torch.block_diag(*[hadamard_matrix(block)] * (n // block))
    y = hadamard(x, signs, block=block)
    assert torch.allclose(y, x @ R, rtol=0, atol=1e-12)
    assert torch.allclose(hadamard(y, signs, block=block, transpose=True), x, rtol=0, atol=1e-12)


def test_largest_block() -> None:
    assert largest_block(3712) == 128
    assert largest_block(768) == 768
    assert largest_block(29) == 1
    assert largest_block(44) == 4
    with pytest.raises(ValueError, match="0 channels"):
        largest_block(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [48, 768, 3712])
def test_a_row_does_not_depend_on_the_others(n: int, dtype: torch.dtype) -> None:
    x, signs = torch.randn(37, n).to(dtype), signs_of(n)
    for transpose in (False, True):
        together = hadamard(x, signs, block=largest_block(n), transpose=transpose)
        assert together.dtype == dtype
        for row in (0, 17, 36):
            alone = hadamard(x[row:row + 1], signs, block=largest_block(n), transpose=transpose)
            assert torch.equal(alone[0], together[row])
            assert torch.equal(hadamard(x[row], signs, block=largest_block(n), transpose=transpose), together[row])


def test_shapes_and_strides() -> None:
    x = torch.randn(2, 12, 5).transpose(1, 2)
    assert torch.equal(hadamard(x), hadamard(x.contiguous()))
    assert hadamard(x[:0]).shape == (0, 5, 12)
    assert hadamard(torch.empty(2, 3, 48, device="meta")).shape == (2, 3, 48)


def test_gradient() -> None:
    x, signs = torch.randn(3, 24, dtype=torch.float64, requires_grad=True), signs_of(24)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(lambda v, t=transpose: hadamard(v, signs, transpose=t), (x,))


def test_op_registration() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.mambacompress.hadamard, (x, None, 12, False))
    torch.library.opcheck(torch.ops.mambacompress.hadamard, (x, signs_of(12), 4, True))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"x": torch.randn(2, 3712)}, "block=128"),
    ({"x": torch.randn(2, 48), "block": 32}, "no whole number of blocks of 32"),
    ({"x": torch.randn(2, 48), "signs": torch.ones(12)}, "signs"), ({"x": torch.ones(2, 4, dtype=torch.int8)}, "float"),
])
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hadamard(**arguments)


def test_unknown_order_names_the_next_step() -> None:
    with pytest.raises(ValueError, match="largest block of 3712 channels is 128"):
        hadamard_matrix(3712)


@pytest.mark.skipif(native.library() is None, reason=native.why_not())
@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(("n", "block"), [(n, None) for n in SAMPLE] + [(3712, 128), (40, 4), (24 * 29, 24)])
def test_native_is_the_reference_bit_for_bit(level: str, n: int, block: int | None) -> None:
    try:
        native.force_level(level)
    except ValueError as reason:
        pytest.skip(str(reason))
    try:
        signs = signs_of(n)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(5, n).to(dtype)
            for transpose in (False, True):
                for s in (signs, None):
                    with registry.backend("native"):
                        y = hadamard(x, s, block=block, transpose=transpose)
                    assert torch.equal(y, hadamard_reference(x, s, block=block, transpose=transpose))
    finally:
        native.force_level(None)


@pytest.mark.skipif(native.library() is None, reason=native.why_not())
def test_native_threads_agree() -> None:
    x, threads = torch.randn(64, 768), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = hadamard(x)
        torch.set_num_threads(2)
        assert torch.equal(hadamard(x), one)
    finally:
        torch.set_num_threads(threads)
