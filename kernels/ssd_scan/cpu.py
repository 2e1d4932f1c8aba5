"""The native scan of Mamba-2: torch.library ops around the C functions of cpu.cpp, with fakes and autograd."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native

TILE = 16  # tokens between two checkpoints of the state, as in cpu.cpp
LANES = 16  # the widest vector of states


class _Ssd(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64)
          for name in ("batch", "length", "heads", "head_dim", "groups", "states", "softplus", "threads")),
        *((name, native.View) for name in ("x", "dt", "B", "C", "y", "resets")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial", "final", "checkpoints")),
        ("dt_low", ctypes.c_double), ("dt_high", ctypes.c_double)]


class _Gradient(ctypes.Structure):
    _fields_ = [
        *((name, native.View) for name in ("dy", "dx", "ddt", "dB", "dC")),
        *((name, ctypes.c_void_p) for name in ("dfinal", "dA", "dD", "dbias", "dinitial"))]


INPUTS = ("Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial, "
           "Tensor? resets, bool softplus, float dt_low, float dt_high")


def _problem(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
             initial: Tensor | None, resets: Tensor | None, softplus: bool, dt_low: float, dt_high: float,
             y: Tensor | None, final: Tensor | None, checkpoints: Tensor | None) -> _Ssd:
    return _Ssd(*x.shape, *B.shape[2:], softplus, torch.get_num_threads(), native.view(x), native.view(dt),
                native.view(B), native.view(C), native.view(y), native.view(resets), A.data_ptr(), native.pointer(D),
                native.pointer(dt_bias), native.pointer(initial), native.pointer(final), native.pointer(checkpoints),
                dt_low, dt_high)


def run_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
                initial: Tensor | None, resets: Tensor | None, softplus: bool, dt_low: float, dt_high: float,
                save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, checkpoints; empty unless ``save``). A, D, dt_bias and initial: fp32, contiguous."""
    x, dt, B, C = map(native.dense_rows, (x, dt, B, C))
    y, final, checkpoints = _outputs(x, B, save)
    problem = _problem(x, dt, A, B, C, D, dt_bias, initial, resets, softplus, dt_low, dt_high, y, final,
                       checkpoints if save else None)
    native.function("mc_ssd_forward", (ctypes.POINTER(_Ssd),))(ctypes.byref(problem))
    return y, final, checkpoints


def _outputs(x: Tensor, B: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    states = B.shape[3]
    floats = batch * heads * -(-length // TILE) * head_dim * (-(-states // LANES) * LANES) if save else 0
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(batch, heads, head_dim, states, dtype=torch.float32, device=x.device),
            torch.empty(floats, dtype=torch.float32, device=x.device))


scan_op = torch.library.custom_op("mambacompress::ssd_scan", run_forward, mutates_args=(), device_types="cpu",
                                  schema=f"({INPUTS}, bool save) -> (Tensor, Tensor, Tensor)")


@scan_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, B, rest[-1])


def _backward(dy: Tensor, dfinal: Tensor | None, checkpoints: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
              C: Tensor, D: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, resets: Tensor | None,
              softplus: bool, dt_low: float, dt_high: float) -> tuple[Tensor, ...]:
    x, dt, B, C, dy = map(native.dense_rows, (x, dt, B, C, dy))
    dfinal = None if dfinal is None else dfinal.contiguous()
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = gradients = gradients_like(x, dt, A, B, C, D, dt_bias, initial)
    problem = _problem(x, dt, A, B, C, D, dt_bias, initial, resets, softplus, dt_low, dt_high, None, None, checkpoints)
    gradient = _Gradient(
        native.view(dy), native.view(dx), native.view(ddt), native.view(dB), native.view(dC), native.pointer(dfinal),
        dA.data_ptr(), None if D is None else dD.data_ptr(), None if dt_bias is None else dbias.data_ptr(),
        None if initial is None else dinitial.data_ptr())
    native.function("mc_ssd_backward", (ctypes.POINTER(_Ssd), ctypes.POINTER(_Gradient)))(
        ctypes.byref(problem), ctypes.byref(gradient))
    return gradients


def gradients_like(x: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for the gradients of all inputs; empty where there is no such input."""
    nothing = torch.empty(0, device=x.device)
    return tuple(torch.empty_like(nothing) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
                 for t in (x, *inputs))


backward_op = torch.library.custom_op(
    "mambacompress::ssd_scan_backward", _backward, mutates_args=(), device_types="cpu",
    schema=f"(Tensor dy, Tensor? dfinal, Tensor checkpoints, {INPUTS}) -> ({', '.join(['Tensor'] * 8)})")


@backward_op.register_fake
def _(dy: Tensor, dfinal: Tensor | None, checkpoints: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return gradients_like(*inputs[:8])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.dt_low, ctx.dt_high, _ = inputs
    ctx.save_for_backward(output[2], *tensors)


def _propagate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    checkpoints, *tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = backward_op(dy, dfinal, checkpoints, *tensors, ctx.softplus, ctx.dt_low, ctx.dt_high)
    return (*(None if t is None else g for t, g in zip(tensors, gradients, strict=False)), *(None,) * 5)


scan_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def ssd_scan_cpu(x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_H: Tensor | None,
                 dt_bias_H: Tensor | None, *, dt_softplus: bool, dt_limit: tuple[float, float],
                 initial_state_BHPN: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` in native code; resets_BL: bool, true where the state restarts."""
    direct = native.runs_directly(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H, initial_state_BHPN)
    run: Any = run_forward if direct else scan_op
    y, final, _ = run(x_BLHP, dt_BLH, _fp32(A_H), B_BLGN, C_BLGN, _fp32(D_H), _fp32(dt_bias_H),
                      _fp32(initial_state_BHPN), resets_BL, dt_softplus, float(dt_limit[0]), float(dt_limit[1]),
                      not direct)
    return y, final
