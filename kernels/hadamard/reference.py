"""Hadamard matrices and their fast transform, in readable torch.

One table of base matrices, all built here: the order 12 and 20 ones by Paley's first construction (primes 11 and 19),
28 and 36 by his second (primes 13 and 17). Every other order is a base times a power of two:

    H_n = B_m ⊗ S_(2^k)        S: Sylvester's, S[i, j] = (-1)^popcount(i & j)        n = m 2^k, m in 1 12 20 28 36

normalised by 1/sqrt(n), so H Hᵀ = I. The bases 12 and 20 are *not* symmetric: x @ H and x @ Hᵀ differ, and libraries
differ in their tables. Nothing here relies on symmetry or on another library.

The fast transform costs n (m + k) additions instead of n²: the base mixes m runs of 2^k channels, then k butterfly
stages. Everything is elementwise over rows, in a fixed order, so a row's result does not depend on how many rows come
with it; the only multiplication is the final one by 1/sqrt(n). (R. E. A. C. Paley, On orthogonal matrices, 1933.)
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

BASES = {12: ("first", 11), 20: ("first", 19), 28: ("second", 13), 36: ("second", 17)}


def split(n: int) -> tuple[int, int] | None:
    """(m, 2^k) with n = m 2^k and m the order of a base (or 1), or None where no matrix of order n is known here."""
    if n < 1:
        return None
    power = n & -n
    odd = n // power
    if odd == 1:
        return 1, n
    base = 4 * odd
    return (base, power // 4) if base in BASES and power >= 4 else None


def supported(n: int) -> bool:
    """Whether a Hadamard matrix of order ``n`` is in the table: 2^k, 12 2^k, 20 2^k, 28 2^k, 36 2^k."""
    return split(n) is not None


def largest_block(n: int) -> int:
    """The largest supported divisor of ``n`` (``n`` itself where it is supported); at least 1."""
    if n < 1:
        raise ValueError(f"no Hadamard transform of {n} channels")
    return max(d for d in range(1, n + 1) if n % d == 0 and supported(d))


@functools.cache
def base_matrix(m: int) -> Tensor:
    """The ±1 base of order ``m`` (1, 12, 20, 28 or 36), int8 [m, m]; not normalised. Do not write to it."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if m not in BASES:
        raise ValueError(f"no base of order {m}; known: 1, {', '.join(map(str, BASES))}")
    construction, prime = BASES[m]
    squares = {i * i % prime for i in range(1, prime)}
    character = [0] + [1 if i in squares else -1 for i in range(1, prime)]
    jacobsthal = torch.tensor([[character[(i - j) % prime] for j in range(prime)] for i in range(prime)])
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.int64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if construction == "first" else 1
    conference[1:, 1:] = jacobsthal
    eye = torch.eye(prime + 1, dtype=torch.int64)
    if construction == "first":  # prime = 3 mod 4: the conference matrix is skew
        return (conference + eye).to(torch.int8)
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return (torch.kron(conference, plus) + torch.kron(eye, minus)).to(torch.int8)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal Hadamard matrix H [n, n]. Raises ValueError where order ``n`` is not in the table."""
    parts = split(n)
    if parts is None:
        raise ValueError(f"no Hadamard matrix of order {n}: known are 2^k, 12 2^k, 20 2^k, 28 2^k and 36 2^k; the "
                         f"largest block of {n} channels is {largest_block(n)}")
    sylvester = torch.ones(1, 1, dtype=torch.int8)
    while sylvester.shape[0] < parts[1]:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    return (torch.kron(base_matrix(parts[0]), sylvester).double() / math.sqrt(n)).to(dtype)


def hadamard_reference(x: Tensor, signs: Tensor | None = None, *, block: int | None = None,
                       transpose: bool = False) -> Tensor:
    """See ``hadamard``. Computed in fp32 (fp64 where x is fp64), returned in x's dtype."""
    n = x.shape[-1]
    size = block or n
    base, power = split(size)  # type: ignore[misc]
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if signs is not None and not transpose:
        y = y * signs.to(wide)
    y = y.reshape(-1, base, power)  # blocks of every row become rows
    if base > 1:
        matrix = base_matrix(base).to(device=x.device, dtype=wide)
        matrix = matrix if transpose else matrix.T  # row c: how each input run enters output run c
        # fp32 sums in the native kernel's order, to the bit; fp64 is for weights, where speed counts and order does not
        y = matrix @ y if wide == torch.float64 else _mix(y, matrix)
    half = 1
    while half < power:
        pairs = y.reshape(-1, base, power // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), -2).reshape(-1, base, power)
        half *= 2
    y = (y * (1.0 / math.sqrt(size))).reshape(x.shape)
    if signs is not None and transpose:
        y = y * signs.to(wide)
    return y.to(x.dtype)


def _mix(x_Tmp: Tensor, matrix_mm: Tensor) -> Tensor:
    """out[t, c] = sum_a matrix[c, a] x[t, a], summed in the order of a."""
    y = x_Tmp[:, :1] * matrix_mm[:, :1]
    for a in range(1, x_Tmp.shape[1]):
        y = y + x_Tmp[:, a:a + 1] * matrix_mm[:, a:a + 1]
    return y
