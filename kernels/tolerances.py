"""How far an implementation may be from its reference: one table, used by tests and by ``check_all``.

Floating point ops are compared by RMS ratio, rms(result - reference) / rms(reference), against the fp64 reference of
the same (rounded) inputs. Integer ops are exact and have no entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
GRADIENT = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# Triton against the fp64 reference of the same rounded inputs. fp32: exponentials and roots are a few units off in the
# last place.
TRITON_FORWARD = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
TRITON_GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}
TRITON_CHUNKED = 2e-5  # the scan of Mamba-2 in fp32: its decays are differences of sums over a chunk
TRITON_CODES = 1e-3  # share of int8 codes that may be one off their reference's
CHUNKED_VERSUS_STEPS = 1e-5  # the chunked scan of Mamba-2 against its decode steps, fp32


def rms_ratio(result: Tensor, reference: Tensor) -> float:
    """rms(result - reference) / rms(reference) in fp64; 0 for empty tensors, inf where the result is not finite."""
    if not reference.numel():
        return 0.0
    result, reference = result.detach().double(), reference.detach().double()
    if not bool(torch.isfinite(result).all()):
        return float("inf")
    scale = reference.square().mean().sqrt()
    error = (result - reference).square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def compare(op: Callable[..., tuple[Tensor, Tensor]], reference: Callable[..., tuple[Tensor, Tensor]],
            inputs: list[Tensor]) -> tuple[float, float]:
    """(worst RMS ratio, tolerance) of ``op`` in fp32 against ``reference`` in fp64, over both outputs and every
    gradient."""
    results = []
    for function, dtype in ((op, torch.float32), (reference, torch.float64)):
        leaves = [x.float().to(dtype).requires_grad_() for x in inputs]
        first, second = function(*leaves)
        gradients = torch.autograd.grad((first.sum() + second.sum(),), leaves)
        results.append([first, second, *gradients])
    tolerance = GRADIENT if inputs[0].device.type == "cpu" else TRITON_GRADIENT
    return max(rms_ratio(a, b) for a, b in zip(*results, strict=True)), tolerance[torch.float32]
