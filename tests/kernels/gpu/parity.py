"""What the tests of the Triton kernels share: both backends on the same inputs, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import registry
from mambacompress.kernels.tolerances import TRITON_CODES, TRITON_FORWARD, TRITON_GRADIENT, rms_ratio

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def both(op: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(what Triton gives, what the reference gives) without gradients; every tensor of the result, in order."""
    results = []
    for backend in ("triton", "reference"):
        with registry.backend(backend), torch.no_grad():
            results.append(_flat(op(*arguments, **options)))
    return results[0], results[1]


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _flat(part)]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, least: float = 0.0) -> None:
    """Shapes and dtypes alike; floats within the tolerance of ``dtype`` (or ``least``, where that is more), codes at
    most one off, and few of them."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, i
        assert a.dtype == b.dtype, i
        if a.dtype == torch.int8:
            off = (a.int() - b.int()).abs()
            assert int(off.max() if off.numel() else 0) <= 1, f"output {i}: codes off by {int(off.max())}"
            share = float((off > 0).double().mean()) if off.numel() else 0.0
            assert share <= max(TRITON_CODES, 2 / max(1, off.numel())), f"output {i}: {share:.1%} of the codes are off"
        elif not a.is_floating_point():
            assert torch.equal(a, b), i
        else:
            error, most = rms_ratio(a, b), max(least, TRITON_FORWARD[dtype])
            assert error <= most, f"output {i}: RMS ratio {error:.2e} > {most:.0e}"


def gradients(op: Callable[..., Any], backend: str, leaves: dict[str, Tensor], dtype: torch.dtype,
              **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random functional of them, by name; leaves cast to ``dtype``."""
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    with registry.backend(backend):
        outputs = _flat(op(**inputs, **options))
        generator = torch.Generator().manual_seed(7)
        loss = sum((y.double() * torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.device)).sum()
                   for y in outputs if y.is_floating_point())
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
    found = {f"d{name}": t.grad for name, t in inputs.items() if t.grad is not None}
    return {**{f"output {i}": y.detach() for i, y in enumerate(outputs)}, **found}


def assert_gradients(op: Callable[..., Any], leaves: dict[str, Tensor], dtype: torch.dtype = torch.float32,
                     least: float = 0.0, **options: Any) -> None:
    """Triton in ``dtype`` against the reference in fp64, on the same rounded inputs; least: as in ``assert_same``."""
    leaves = {name: t.to(dtype) for name, t in leaves.items()}
    got = gradients(op, "triton", leaves, dtype, **options)
    want = gradients(op, "reference", leaves, torch.float64, **options)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        most = max(least, (TRITON_GRADIENT if name.startswith("d") else TRITON_FORWARD)[dtype])
        error = rms_ratio(got[name], tensor)
        assert error <= most, f"{name}: RMS ratio {error:.2e} > {most:.0e}"
