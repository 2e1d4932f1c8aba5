"""The recurrent state as int8 codes with one fp32 scale a channel, requantized at every step.

    scale_e = max_n |h_en| / 127        code_en = floor(h_en / scale_e + dither)        h_en ~ code_en * scale_e

A step dequantizes, computes in fp32, reads the output from the fp32 state, and quantizes that for the next step. The
scale follows the state, so nothing is ever clipped, and a channel needs to know of no other.

Rounding. A slow state moves by less than half a code a token; rounded to nearest it would never move, neither decay nor
take anything up, and the divergence from the fp32 state grows with the length of the text. So the threshold changes
from step to step: *dither* in [0, 1) makes the expected code the state itself. It is no noise but a Weyl sequence,
the fractional part of  step a + channel b + state c  with the three irrational numbers whose multiples fill the cube
most evenly (powers of the root of x^4 = x + 1). Over the steps of a slow state its errors therefore cancel as they do
with error feedback, and nothing is stored but the number of steps; over the states of a channel they cancel in C . h.
It depends on the sequence's own count of steps and on nothing else, so a row gives the same bits alone, in any batch
and on any number of threads. Tried on a trained Mamba-1 over teacher-forced novels, state requantized every token:

- to nearest: the divergence is the largest and still growing at the end;
- pseudo-random dither: levels off once the slow states are filled, like the Weyl sequence, about half as much above;
- error feedback: the residual must be stored too. In four bits it is better than any dither, at half as many bytes
  again; in two bits it is itself rounded to nearest, and drifts;
- a second scale, of the state index (rank one: exact at every step, or fixed when a sequence begins), changed nothing:
  it is not stored. Where states differ more, smoothing folds that factor into the rows of B and C (Mamba-1, exact);
- scales rounded up to powers of two save three bytes a channel and cost several times the divergence.

The related trials: vllm-project/vllm pulls 35753 and 40012 (stochastic rounding of a Mamba-2 state), issue 55196 (error
feedback). A NaN or an infinity makes the scale NaN, and with it the whole channel: codes cannot hold either.

Legend: B batch, E channels, N d_state, H heads, P head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
TINY = 1e-30  # below this a channel counts as zero: its scale stays a normal number, its codes are zeros
STEP, CHANNEL, STATE = 0xD1B54A33, 0x8CB92BA7, 0xABC98389  # 2^32 times the three irrational numbers, made odd


class Int8State(NamedTuple):
    """codes: int8 [B, E, N] (Mamba-1; in memory [B, N, E], so that a vector of channels is one load) or [B, H, P, N].

    scale: fp32 [B, E] or [B, H, P]. step: int64 [B], how often a row was requantized; what it starts from is a seed.
    """

    codes: Tensor
    scale: Tensor
    step: Tensor

    @property
    def bytes(self) -> int:
        """Of all rows together."""
        return sum(t.numel() * t.element_size() for t in self)

    def dequantized(self) -> Tensor:
        """The state, fp32, in the shape of the codes."""
        return self.codes.float() * self.scale[..., None]


def dither(step_B: Tensor, channels: int, states: int) -> Tensor:
    """fp32 [B, channels, states], in [0, 1): what is added before rounding down. Exact multiples of 2^-24."""
    channel_E1 = torch.arange(channels, device=step_B.device)[:, None] * CHANNEL
    state_N = torch.arange(states, device=step_B.device) * STATE
    place_BEN = (step_B[:, None, None] * STEP + channel_E1 + state_N) & 0xFFFFFFFF
    return (place_BEN >> 8).float() * 2.0**-24


def quantize_state(h: Tensor, step_B: Tensor | None = None) -> Int8State:
    """h [B, E, N] or [B, H, P, N] as an Int8State whose rows were requantized ``step_B`` times (0 where None)."""
    h = h.detach().float()
    if step_B is None:
        step_B = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    largest = h.abs().amax(-1)
    scale = largest.clamp(min=TINY) / torch.full_like(largest, LARGEST) + (largest - largest)
    x = h * scale.reciprocal()[..., None]
    x = x + dither(step_B, scale[0].numel(), h.shape[-1]).view(h.shape) if h.numel() else x
    codes = torch.floor(x).clamp(-LARGEST, LARGEST).nan_to_num(nan=-LARGEST).to(torch.int8)
    return Int8State(states_first(codes), scale, step_B)


def states_first(codes: Tensor) -> Tensor:
    """Codes as they lie in memory: those of Mamba-1 with neighbouring channels beside one another."""
    return codes.transpose(1, 2).contiguous().transpose(1, 2) if codes.dim() == 3 else codes.contiguous()


def check_state(op: str, state: Int8State, shape: tuple[int, ...]) -> None:
    """Raise ValueError or TypeError where ``state`` is none of codes of this shape."""
    wanted = {"codes": (state.codes, shape, torch.int8), "scale": (state.scale, shape[:-1], torch.float32),
              "step": (state.step, shape[:1], torch.int64)}
    for name, (tensor, expected, dtype) in wanted.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {dtype}")


__all__ = ["Int8State", "check_state", "dither", "quantize_state", "states_first"]
