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
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width", "activation", "threads",
                                              "ahead")),
        *((name, native.View) for name in ("x", "initial", "y", "resets")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "act_scale", "scale"))]


class _Gradient(ctypes.Structure):
    _fields_ = [*((name, native.View) for name in ("dy", "dx", "dinitial")),
                *((name, ctypes.c_void_p) for name in ("dweight", "dbias", "dact_scale"))]


_INPUTS = ("Tensor x, Tensor weight, Tensor? bias, Tensor? act_scale, Tensor? initial, Tensor? resets, Tensor? scale, "
           "bool activation, int ahead")


def _problem(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
             resets: Tensor | None, scale: Tensor | None, activation: bool, ahead: int, y: Tensor | None) -> _Conv:
    batch, length, channels = x.shape
    initial_view = native.NO_VIEW if initial is None or not initial.numel() else native.view(initial)
    return _Conv(batch, length, channels, weight.shape[1], activation, torch.get_num_threads(), ahead, native.view(x),
                 initial_view, native.view(y), native.view(resets), weight.data_ptr(), native.pointer(bias),
                 native.pointer(act_scale), native.pointer(scale))


def _output(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype if x.is_floating_point() else torch.float32, device=x.device)


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
                resets: Tensor | None, scale: Tensor | None, activation: bool, ahead: int) -> Tensor:
    """y in x's dtype, fp32 for int8. weight, bias, act_scale, scale: fp32, contiguous; initial: x's dtype.

    scale [E]: what a sum of products is multiplied by where x or the weight are codes. ahead: how many tokens behind
    its own the newest tap of an output reads, 0 for a causal convolution.
    """
    x = native.dense_rows(x)
    initial = None if initial is None else native.dense_rows(initial)
    y = _output(x)
    problem = _problem(x, weight, bias, act_scale, initial, resets, scale, activation, ahead, y)
    native.function("mc_conv_forward", (ctypes.POINTER(_Conv),))(ctypes.byref(problem))
    return y


conv_op = torch.library.custom_op("mambacompress::causal_conv1d", run_forward, mutates_args=(), device_types="cpu",
                                  schema=f"({_INPUTS}) -> Tensor")


@conv_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return _output(x)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None,
              initial: Tensor | None, resets: Tensor | None, activation: bool, ahead: int) -> tuple[Tensor, ...]:
    x, dy = native.dense_rows(x), native.dense_rows(dy)
    initial = None if initial is None else native.dense_rows(initial)
    dx, dweight, dbias, dact_scale, dinitial = gradients = _gradients(x, weight, initial)
    problem = _problem(x, weight, bias, act_scale, initial, resets, None, activation, ahead, None)
    gradient = _Gradient(native.view(dy), native.view(dx),
                         native.view(dinitial) if dinitial.numel() else native.NO_VIEW, dweight.data_ptr(),
                         dbias.data_ptr(), dact_scale.data_ptr())
    native.function("mc_conv_backward", (ctypes.POINTER(_Conv), ctypes.POINTER(_Gradient)))(
        ctypes.byref(problem), ctypes.byref(gradient))
    return gradients


def _gradients(x: Tensor, weight: Tensor, initial: Tensor | None) -> tuple[Tensor, ...]:
    channels = weight.shape[0]
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight),
            weight.new_empty(channels), weight.new_empty(channels),
            torch.empty(0 if initial is None else initial.shape, dtype=x.dtype, device=x.device))


backward_op = torch.library.custom_op(
    "mambacompress::causal_conv1d_backward", _backward, mutates_args=(), device_types="cpu",
    schema=f"(Tensor dy, {_INPUTS.replace('Tensor? scale, ', '')}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


@backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
      *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(x, weight, initial)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale, ctx.activation, ctx.ahead = inputs
    if scale is not None:
        raise RuntimeError("the native convolution has no gradients for int8 inputs or weights")
    ctx.save_for_backward(*tensors)


def _propagate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, act_scale, initial, resets = ctx.saved_tensors
    dx, dweight, dbias, dact_scale, dinitial = backward_op(dy, x, weight, bias, act_scale, initial, resets,
                                                           ctx.activation, ctx.ahead)
    return (dx, dweight, None if bias is None else dbias, None if act_scale is None else dact_scale,
            None if initial is None else dinitial, *(None,) * 4)


conv_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def causal_conv1d_cpu(x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, *, activation: bool,
                      act_scale_E: Tensor | None, initial_state: Tensor | None, resets_BL: Tensor | None,
                      scale_E: Tensor | None = None, ahead: int = 0) -> Tensor:
    """The activated output [B, L, E] in native code; resets_BL: bool, true where a sequence starts."""
    initial_state = None if initial_state is None else initial_state.to(x_BLE.dtype)
    arguments: tuple[Any, ...] = (x_BLE, _fp32(weight_EK), _fp32(bias_E), _fp32(act_scale_E), initial_state, resets_BL,
                                  _fp32(scale_E), activation, ahead)
    if native.runs_directly(x_BLE, weight_EK, bias_E, act_scale_E, initial_state):
        return run_forward(*arguments)
    return conv_op(*arguments)
