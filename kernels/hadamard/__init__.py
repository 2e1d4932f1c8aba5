"""hadamard: the fast orthonormal Hadamard transform with random signs, block-diagonal where the size asks for it.

Sizes m * 2^k with m in {1, 12, 20, 28, 36}: the base matrices come from Paley's constructions, computed here, so that there
is one table and every matrix is reproducible. H_n = H_m (x) H_{2^k} / sqrt(n). Some bases are not symmetric: transposes are
explicit. A size that is not of this form is transformed in blocks of the largest supported divisor, never zero-padded.

Rows are transformed element by element in a fixed order: a token's result does not depend on how many tokens come with it.

Source: R. Paley, On orthogonal matrices (1933). Legend: n channels, m base size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASES = (1, 12, 20, 28, 36)


def supported(n: int) -> bool:
    """Whether a single Hadamard matrix of size ``n`` is in the table."""
    return _split(n) is not None


def largest_block(n: int) -> int:
    """The largest supported size that divides ``n``: the block of a block-diagonal transform (1 for odd n)."""
    if n < 1:
        raise ValueError(f"no Hadamard transform has size {n}")
    return max(size for size in range(1, n + 1) if n % size == 0 and supported(size))


@lru_cache(maxsize=32)
def _matrix(n: int) -> Tensor:
    split = _split(n)
    if split is None:
        raise ValueError(f"there is no Hadamard matrix of size {n} in the table; sizes are m * 2^k, m in {BASES}")
    base, doubled = _base(split[0]), torch.ones(1, 1, dtype=torch.float64)
    for _ in range(split[1].bit_length() - 1):
        doubled = torch.cat([torch.cat([doubled, doubled], 1), torch.cat([doubled, -doubled], 1)])
    return torch.kron(base, doubled) / n**0.5


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal H [n, n]: H @ H.T is the identity. Raises ValueError for a size that is not in the table."""
    return _matrix(n).to(dtype, copy=True)


def hadamard(x: Tensor, signs_n: Tensor | None = None, *, block: int | None = None, transpose: bool = False) -> Tensor:
    """x @ R with R = diag(signs) @ H (block-diagonal in blocks of ``block``); ``transpose`` gives x @ R.T.

    x: [..., n], any float dtype, computed in fp32 (fp64 for fp64). signs: [n] of ±1, or None. block: n where None.
    Raises ValueError where the block does not divide n or is not in the table.
    """
    n = x.shape[-1]
    block = n if block is None else block
    split = _split(block)
    if n % block or split is None:
        raise ValueError(f"a Hadamard transform of {n} channels in blocks of {block} is not in the table")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype)
    if signs_n is not None and not transpose:
        y = y * signs_n.to(dtype)
    m, width = split
    y = y.reshape(*x.shape[:-1], n // block, m, width)
    y = _butterfly(y)
    if m > 1:
        y = _dense(y, _base(m).to(dtype).to(y.device), transpose)
    y = y.reshape(x.shape) * (1.0 / block**0.5)
    if signs_n is not None and transpose:
        y = y * signs_n.to(dtype)
    return y.to(x.dtype)


def _butterfly(y: Tensor) -> Tensor:
    """y @ H over the last dimension (a power of two), unnormalised; symmetric, so its own transpose."""
    width, shape = 1, y.shape
    while width < shape[-1]:
        pairs = y.reshape(*shape[:-1], shape[-1] // (2 * width), 2, width)
        first, second = pairs.unbind(-2)
        y = torch.stack([first + second, first - second], -2).reshape(shape)
        width *= 2
    return y


def _dense(y: Tensor, base: Tensor, transpose: bool) -> Tensor:
    """The base part of y @ (H_m (x) .): sum_i y[..., i, :] H[i, j], added in order of i."""
    matrix = base.T if transpose else base
    total = y[..., :1, :] * matrix[0][:, None]
    for i in range(1, matrix.shape[0]):
        total = total + y[..., i : i + 1, :] * matrix[i][:, None]
    return total


def _split(n: int) -> tuple[int, int] | None:
    """(m, 2^k) with n = m * 2^k, the largest m of the table that fits, or None."""
    for m in reversed(BASES):
        width, rest = divmod(n, m)
        if rest == 0 and width >= 1 and width & (width - 1) == 0:
            return m, width
    return None


@lru_cache(maxsize=8)
def _base(m: int) -> Tensor:
    """Unnormalised ±1 matrix of size m. Paley I (q = 11, 19) for 12 and 20, Paley II (q = 13, 17) for 28 and 36."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m in (12, 20):
        q = m - 1
        core = torch.zeros(m, m, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1, -1
        core[1:, 1:] = _jacobsthal(q)
        return torch.eye(m, dtype=torch.float64) + core
    q = m // 2 - 1
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = _jacobsthal(q)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = the quadratic character of i - j modulo the prime q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return character[(index[:, None] - index[None]) % q]


__all__ = ["BASES", "hadamard", "hadamard_matrix", "largest_block", "supported"]
