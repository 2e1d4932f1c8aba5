"""The native causal convolution: torch.library ops around the C functions of cpu.cpp, with fakes and autograd."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native

MAX_WIDTH = 16


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width", "activation", "threads")),
        *((name, native.View) for name in ("x", "initial", "y", "resets")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "act_scale"))]


class _Gradient(ctypes.Structure):
    _fields_ = [*((name, native.View) for name in ("dy", "dx", "dinitial")),
                ("dweight", ctypes.c_void_p), ("dbias", ctypes.c_void_p)]


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? act_scale, Tensor? initial, Tensor? resets, bool activation"


def _problem(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
             resets: Tensor | None, activation: bool, y: Tensor | None) -> _Conv:
    batch, length, channels = x.shape
    initial_view = native.NO_VIEW if initial is None or not initial.numel() else native.view(initial)
    return _Conv(batch, length, channels, weight.shape[1], activation, torch.get_num_threads(), native.view(x),
                 initial_view,
                 native.view(y), native.view(resets), weight.data_ptr(), native.pointer(bias),
                 native.pointer(act_scale))


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
                resets: Tensor | None, activation: bool) -> Tensor:
    """y in x's dtype. weight, bias, act_scale: fp32, contiguous; initial: x's dtype."""
    x = native.dense_rows(x)
    initial = None if initial is None else native.dense_rows(initial)
    y = torch.empty(x.shape, dtype=x.dtype)
    problem = _problem(x, weight, bias, act_scale, initial, resets, activation, y)
    native.function("mc_conv_forward", (ctypes.POINTER(_Conv),))(ctypes.byref(problem))
    return y


conv_op = torch.library.custom_op("mambacompress::causal_conv1d", run_forward, mutates_args=(), device_types="cpu",
                                  schema=f"({_INPUTS}) -> Tensor")


@conv_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None,
              initial: Tensor | None,
              resets: Tensor | None, activation: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, dy = native.dense_rows(x), native.dense_rows(dy)
    initial = None if initial is None else native.dense_rows(initial)
    dx, dweight, dbias, dinitial = _gradients(x, weight, initial)
    problem = _problem(x, weight, bias, act_scale, initial, resets, activation, None)
    gradient = _Gradient(native.view(dy), native.view(dx),
                         native.view(dinitial) if dinitial.numel() else native.NO_VIEW, dweight.data_ptr(),
                         dbias.data_ptr())
    native.function("mc_conv_backward", (ctypes.POINTER(_Conv), ctypes.POINTER(_Gradient)))(
        ctypes.byref(problem), ctypes.byref(gradient))
    return dx, dweight, dbias, dinitial


def _gradients(x: Tensor, weight: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight),
            torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device),
            torch.empty(0 if initial is None else initial.shape, dtype=x.dtype, device=x.device))


backward_op = torch.library.custom_op(
    "mambacompress::causal_conv1d_backward", _backward, mutates_args=(), device_types="cpu",
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")


@backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
      *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, initial)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _propagate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, act_scale, initial, resets = ctx.saved_tensors
    dx, dweight, dbias, dinitial = backward_op(dy, x, weight, bias, act_scale, initial, resets, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None, None if initial is None else dinitial, None, None


conv_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def causal_conv1d_cpu(x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, *, activation: bool,
                      act_scale_E: Tensor | None, initial_state: Tensor | None, resets_BL: Tensor | None) -> Tensor:
    """The activated output [B, L, E] in native code; resets_BL: bool, true where a sequence starts."""
    initial_state = None if initial_state is None else initial_state.to(x_BLE.dtype)
    arguments: tuple[Any, ...] = (x_BLE, _fp32(weight_EK), _fp32(bias_E), _fp32(act_scale_E), initial_state, resets_BL,
                                  activation)
    if native.runs_directly(x_BLE, weight_EK, bias_E, initial_state):
        return run_forward(*arguments)
    return conv_op(*arguments)
