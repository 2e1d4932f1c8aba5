"""The native selective scan: torch.library ops around the C functions of cpu.cpp, with fake implementations and
autograd.

Where no gradient is wanted and nothing is traced, the C function is called at once: the dispatcher costs more than a
step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.selective_scan.reference import dequantize, same_as_previous, silu_scaled, softplus

TILE = 16  # tokens between two checkpoints of the state, as in cpu.cpp
LANES = 16  # the widest vector of channels


class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "groups", "states", "softplus",
                                              "threads")),
        *((name, native.View) for name in ("u", "dt", "B", "C", "z", "y", "resets", "every")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "z_scale", "initial", "final", "checkpoints"))]


class _Gradient(ctypes.Structure):
    _fields_ = [
        *((name, native.View) for name in ("dy", "du", "ddt", "dB", "dC", "dz")),
        *((name, ctypes.c_void_p) for name in ("dfinal", "dA", "dD", "dbias", "dz_scale", "dinitial"))]


_INPUTS = ("Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? z_scale, "
           "Tensor? initial, Tensor? resets")
_SCALES = "Tensor? u_scale, Tensor? dt_scale, Tensor? B_scale, Tensor? C_scale, Tensor? z_scale8"
_FLAGS = "bool softplus, bool reverse"


def _checkpoint_floats(u: Tensor, A: Tensor, B: Tensor) -> int:
    batch, length, channels = u.shape
    groups = B.shape[2]
    padded = groups * (-(-(channels // groups) // LANES) * LANES)
    return batch * -(-length // TILE) * padded * A.shape[1]


def _problem(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
             dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None, resets: Tensor | None,
             scales: tuple[Tensor | None, ...], softplus: bool, reverse: bool, y: Tensor | None, final: Tensor | None,
             checkpoints: Tensor | None, every: Tensor | None = None) -> _Scan:
    batch, length, channels = u.shape
    u_scale, dt_scale, B_scale, C_scale, z_scale8 = scales
    return _Scan(
        batch, length, channels, B.shape[2], A.shape[1], softplus, torch.get_num_threads(),
        native.view(u, reverse, u_scale), native.view(dt, reverse, dt_scale), native.view(B, reverse, B_scale),
        native.view(C, reverse, C_scale), native.view(z, reverse, z_scale8), native.view(y, reverse),
        native.view(resets, reverse), native.view(every, reverse), A.data_ptr(), native.pointer(D),
        native.pointer(dt_bias), native.pointer(z_scale),
        native.pointer(initial), native.pointer(final), native.pointer(checkpoints))


def _dense(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> tuple[Any, ...]:
    return (*map(native.dense_rows, (u, dt, B, C)), None if z is None else native.dense_rows(z))


def run_forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None, resets: Tensor | None,
                u_scale: Tensor | None, dt_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None,
                z_scale8: Tensor | None, softplus: bool, reverse: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, checkpoints; empty unless ``save``). A, D, dt_bias, z_scale, initial and scales: fp32,
    contiguous."""
    u, dt, B, C, z = _dense(u, dt, B, C, z)
    y, final, checkpoints = _outputs(u, A, B, save)
    problem = _problem(u, dt, A, B, C, D, z, dt_bias, z_scale, initial, resets,
                       (u_scale, dt_scale, B_scale, C_scale, z_scale8), softplus, reverse, y, final,
                       checkpoints if save else None)
    native.function("mc_scan_forward", (ctypes.POINTER(_Scan),))(ctypes.byref(problem))
    return y, final, checkpoints


def _outputs(u: Tensor, A: Tensor, B: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(u.shape, dtype=u.dtype if u.is_floating_point() else torch.float32, device=u.device)
    final = torch.empty(u.shape[0], *A.shape, dtype=torch.float32, device=u.device)
    checkpoints = torch.empty(_checkpoint_floats(u, A, B) if save else 0, dtype=torch.float32, device=u.device)
    return y, final, checkpoints


scan_op = torch.library.custom_op(
    "mambacompress::selective_scan", run_forward, mutates_args=(), device_types="cpu",
    schema=f"({_INPUTS}, {_SCALES}, {_FLAGS}, bool save) -> (Tensor, Tensor, Tensor)")


@scan_op.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, B, rest[-1])


def run_states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
               dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None, resets: Tensor | None,
               u_scale: Tensor | None, dt_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None,
               z_scale8: Tensor | None, softplus: bool, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, the state after every token fp32 [B, L, E, N]); arguments as in ``run_forward``."""
    u, dt, B, C, z = _dense(u, dt, B, C, z)
    y, final, every = _outputs_and_states(u, A, B)
    problem = _problem(u, dt, A, B, C, D, z, dt_bias, z_scale, initial, resets,
                       (u_scale, dt_scale, B_scale, C_scale, z_scale8), softplus, reverse, y, final, None, every)
    native.function("mc_scan_forward", (ctypes.POINTER(_Scan),))(ctypes.byref(problem))
    return y, final, every


def _outputs_and_states(u: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, final, _ = _outputs(u, A, B, False)
    return y, final, torch.empty(*u.shape, A.shape[1], dtype=torch.float32, device=u.device)


states_op = torch.library.custom_op(
    "mambacompress::selective_scan_states", run_states, mutates_args=(), device_types="cpu",
    schema=f"({_INPUTS}, {_SCALES}, {_FLAGS}) -> (Tensor, Tensor, Tensor)")


@states_op.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs_and_states(u, A, B)


def _backward(dy: Tensor, dfinal: Tensor | None, checkpoints: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor,
              C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, z_scale: Tensor | None,
              initial: Tensor | None, resets: Tensor | None, softplus: bool, reverse: bool) -> tuple[Tensor, ...]:
    u, dt, B, C, z = _dense(u, dt, B, C, z)
    dy = native.dense_rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    du, ddt, dA, dB, dC, dD, dz, dbias, dz_scale, dinitial = gradients = _gradients(
        u, dt, A, B, C, D, z, dt_bias, z_scale, initial)
    problem = _problem(u, dt, A, B, C, D, z, dt_bias, z_scale, initial, resets, (None,) * 5, softplus, reverse, None,
                       None,
                       checkpoints)
    gradient = _Gradient(
        native.view(dy, reverse), native.view(du, reverse), native.view(ddt, reverse), native.view(dB, reverse),
        native.view(dC, reverse), native.NO_VIEW if z is None else native.view(dz, reverse), native.pointer(dfinal),
        dA.data_ptr(), *(None if t is None else gradient.data_ptr() for t, gradient in (
            (D, dD), (dt_bias, dbias), (None if z is None else z_scale, dz_scale), (initial, dinitial))))
    native.function("mc_scan_backward", (ctypes.POINTER(_Scan), ctypes.POINTER(_Gradient)))(
        ctypes.byref(problem), ctypes.byref(gradient))
    return gradients


def _gradients(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
               dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None) -> tuple[Tensor, ...]:
    nothing = torch.empty(0, device=u.device)
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) if t is not None else nothing.clone()
                 for t in (u, dt, A, B, C, D, z, dt_bias, z_scale if z is not None else None, initial))


backward_op = torch.library.custom_op(
    "mambacompress::selective_scan_backward", _backward, mutates_args=(), device_types="cpu",
    schema=f"(Tensor dy, Tensor? dfinal, Tensor checkpoints, {_INPUTS}, {_FLAGS}) -> "
           f"({', '.join(['Tensor'] * 10)})")


@backward_op.register_fake
def _(dy: Tensor, dfinal: Tensor | None, checkpoints: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
      D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None,
      *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(u, dt, A, B, C, D, z, dt_bias, z_scale, initial)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(output[2], *tensors[:11])


def _propagate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    checkpoints, *tensors = ctx.saved_tensors
    u, z = tensors[0], tensors[6]
    if dy is None:
        dy = torch.zeros_like(u)
    gradients = backward_op(dy, dfinal, checkpoints, *tensors, ctx.softplus, ctx.reverse)
    inputs = [*tensors[:8], None if z is None else tensors[8], tensors[9]]  # without z its scale has no gradient
    return (*(None if t is None else gradient for t, gradient in zip(inputs, gradients, strict=True)), *(None,) * 9)


scan_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def selective_scan_cpu(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None,
    z_BLE: Tensor | None, dt_bias_E: Tensor | None, *, dt_softplus: bool, z_scale_E: Tensor | None,
    initial_state_BEN: Tensor | None, reverse: bool, resets_BL: Tensor | None, scales: Any, states: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``selective_scan`` in native code; resets_BL: bool, true where the state restarts, in the order of the scan.

    The last tensor is the state after every token [B, L, E, N] where ``states``, else of no meaning.
    """
    direct = native.runs_directly(u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, D_E, z_BLE, dt_bias_E, z_scale_E,
                                  initial_state_BEN)
    arguments: tuple[Any, ...] = (
        u_BLE, dt_BLE, _fp32(A_EN), B_BLGN, C_BLGN, _fp32(D_E), z_BLE, _fp32(dt_bias_E), _fp32(z_scale_E),
        _fp32(initial_state_BEN), resets_BL, *input_scales(scales, u_BLE.shape[2:], B_BLGN.shape[2:]), dt_softplus,
        reverse)
    if states:
        return (run_states if direct else states_op)(*arguments)
    run: Any = run_forward if direct else scan_op
    return run(*arguments, not direct)


def windowed_scan_cpu(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None,
    z_BLE: Tensor | None, dt_bias_E: Tensor | None, *, dt_softplus: bool, z_scale_E: Tensor | None,
    initial_state_BEN: Tensor | None, reverse: bool, window: int, seq_idx_BL: Tensor | None, scales: Any,
    run: Callable[..., tuple[Tensor, ...]] = selective_scan_cpu,
) -> tuple[Tensor, Tensor]:
    """The locally bi-directional scan as two plain ones (``run``: native, or Triton's): forward, plus backward with
    every window a sequence of its own.

    H = hL + hR - b, so y is the sum of both scans less what a token adds itself, dt u (B . C), which both hold.
    """
    out_dtype = u_BLE.dtype if u_BLE.is_floating_point() else torch.float32
    u, dt, B, C = (dequantize(t, getattr(scales, name, None), torch.float32) for name, t in
                   (("u", u_BLE), ("dt", dt_BLE), ("B", B_BLGN), ("C", C_BLGN)))
    if dt_bias_E is not None:
        dt = dt + dt_bias_E.float()
    if dt_softplus:
        dt = softplus(dt)
    if reverse:  # windows start at the first token of the scan
        u, dt, B, C = (t.flip(1) for t in (u, dt, B, C))
        seq_idx_BL = None if seq_idx_BL is None else seq_idx_BL.flip(1)

    def scan(backward: bool, initial: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        return run(u, dt, A_EN, B, C, None, None, None, dt_softplus=False, z_scale_E=None, initial_state_BEN=initial,
                   reverse=backward, resets_BL=resets_BL, scales=None)[:2]  # type: ignore[return-value]

    forward, final = scan(False, initial_state_BEN, resets(seq_idx_BL, False))
    backward, _ = scan(True, None, resets(window_ids(u, window, seq_idx_BL), True))
    own_BLG = (B * C).sum(-1)
    own_BLE = own_BLG.repeat_interleave(u.shape[2] // own_BLG.shape[2], 2) * dt * u
    y = forward + backward - own_BLE
    if D_E is not None:
        y = y + u * D_E.float()
    if reverse:
        y = y.flip(1)
    if z_BLE is not None:
        y = y * silu_scaled(dequantize(z_BLE, getattr(scales, "z", None), torch.float32), z_scale_E)
    return y.to(out_dtype), final


def window_ids(u_BLE: Tensor, window: int, seq_idx_BL: Tensor | None) -> Tensor:
    """[B, L]: which window a token is in; windows are counted from the first token of each packed sequence."""
    position_L = torch.arange(u_BLE.shape[1], device=u_BLE.device)
    if seq_idx_BL is None:
        return (position_L // window).expand(u_BLE.shape[0], -1)
    starts_BL = ~same_as_previous(seq_idx_BL)
    first_BL = torch.where(starts_BL, position_L, 0).cummax(1).values
    begins_BL = starts_BL | ((position_L - first_BL) % window == 0)
    return begins_BL.long().cumsum(1)


def resets(seq_idx_BL: Tensor | None, reverse: bool) -> Tensor | None:
    """[B, L] bool: the state restarts before this token."""
    if seq_idx_BL is None:
        return None
    return ~same_as_previous(seq_idx_BL.flip(1)).flip(1) if reverse else ~same_as_previous(seq_idx_BL)


def input_scales(scales: Any, channels: tuple[int, ...], rows: tuple[int, ...]) -> list[Tensor | None]:
    """Of u, dt, B, C and z as the native code reads them; None where there are none. channels, rows: shapes of a token
    of u and of B.
    """
    if scales is None:
        return [None] * 5
    return [_scale(scales.u, channels), _scale(scales.dt, channels), _scale(scales.B, rows), _scale(scales.C, rows),
            _scale(scales.z, channels)]


def _scale(scale: Tensor | float | None, shape: tuple[int, ...]) -> Tensor | None:
    if scale is None:
        return None
    scale = torch.as_tensor(scale, dtype=torch.float32)
    return scale.reshape(1) if scale.numel() == 1 else scale.expand(shape).contiguous()
