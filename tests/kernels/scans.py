"""Random problems for the scans and the convolution, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.tolerances import rms_ratio

needs_native = pytest.mark.skipif(native.library() is None, reason=native.why_not())


def available_levels() -> list[str]:
    """The instruction sets this machine has, best last; none without the library."""
    if native.library() is None:
        return []
    return list(native.LEVELS[: native.LEVELS.index(native.level()) + 1])


@contextmanager
def at_level(name: str) -> Iterator[None]:
    native.force_level(name)
    try:
        yield
    finally:
        native.force_level(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fresh memory holds NaN: an output that is not written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_problem(batch: int, length: int, channels: int, states: int, groups: int = 1) -> dict[str, Tensor]:
    return {
        "u_BLE": randn(batch, length, channels), "dt_BLE": randn(batch, length, channels) * 0.5 - 1,
        "A_EN": -torch.rand(channels, states, dtype=torch.float64) * 4 - 0.1, "B_BLGN": randn(batch, length, groups,
                                                                                              states),
        "C_BLGN": randn(batch, length, groups, states), "D_E": randn(channels), "z_BLE": randn(batch, length, channels),
        "dt_bias_E": randn(channels) * 0.1, "initial_state_BEN": randn(batch, channels, states)}


def ssd_problem(batch: int, length: int, heads: int, head_dim: int, states: int, groups: int) -> dict[str, Tensor]:
    return {
        "x_BLHP": randn(batch, length, heads, head_dim), "dt_BLH": randn(batch, length, heads) * 0.5 - 1,
        "A_H": -torch.rand(heads, dtype=torch.float64) * 4 - 0.1, "B_BLGN": randn(batch, length, groups, states),
        "C_BLGN": randn(batch, length, groups, states), "D_H": randn(heads), "dt_bias_H": randn(heads) * 0.1,
        "initial_state_BHPN": randn(batch, heads, head_dim, states)}


def conv_problem(batch: int, length: int, channels: int, width: int) -> dict[str, Tensor]:
    return {"x_BLE": randn(batch, length, channels), "weight_EK": randn(channels, width), "bias_E": randn(channels),
            "initial_state": randn(batch, width - 1, channels)}


def cast(problem: dict[str, Tensor], dtype: torch.dtype, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The problem in ``dtype``; the tensors named in ``keep`` in fp32."""
    return {name: t.to(torch.float32 if name in keep else dtype) for name, t in problem.items()}


def run(op: Callable[..., tuple[Tensor, Tensor]], problem: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs of ``op`` and the gradients of a fixed random functional of them, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.items()}
    y, final = op(**leaves, **options)
    generator = torch.Generator().manual_seed(7)
    loss = sum((out.double() * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum() for out in (y,
                                                                                                                   final))
    assert isinstance(loss, Tensor)
    loss.backward()
    return {"y": y.detach(), "final": final.detach(),
            **{f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def assert_close(result: dict[str, Tensor], reference: dict[str, Tensor], forward: float, gradient: float) -> None:
    """Same tensors, each within its tolerance by RMS ratio; the message names the tensor."""
    assert result.keys() == reference.keys()
    for name, want in reference.items():
        assert result[name].shape == want.shape, name
        error = rms_ratio(result[name], want)
        limit = forward if name in ("y", "final") else gradient
        assert error <= limit, f"{name}: RMS ratio {error:.2e} > {limit:.0e}"


def packed_ids(batch: int, length: int, sequences: int = 3) -> Tensor:
    """Ids of packed sequences, ascending in every row, with different boundaries in each."""
    return torch.randint(0, sequences, (batch, length)).sort(1).values


def runs_of(ids_L: Tensor) -> list[slice]:
    """The packed sequences of one row."""
    edges = [0, *(int(i) + 1 for i in torch.nonzero(ids_L[1:] != ids_L[:-1])), len(ids_L)]
    return [slice(a, b) for a, b in pairwise(edges)]
