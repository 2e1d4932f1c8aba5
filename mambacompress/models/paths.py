"""The parts a mixer is composed of: convolution, gate, selective projection, and the path that scans in one order.

    Path = order -> (own conv) -> x_proj, dt_proj -> selective scan -> inverse order

A part is a module of its own wherever a pass may replace it, scale it or watch it. Two activations tolerate per-channel
scales that keep the function (smoothing S2, S3: x * sigmoid(s * x)), and a few places hold an optional online rotation
or quantizer; all default to None and cost nothing then. A path never branches on a family's name: a family is a
configuration.

Sources: Mamba (arXiv 2312.00752, Alg. 2); Vim (2401.09417): a convolution a path; PlainMamba (2403.17695): one
projection for all orders and a learned direction; LBMamba (2506.15976): the local backward window.

Legend: B batch, L tokens, E d_inner, N d_state, R dt_rank, K conv width, G groups, S = G * N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.kernels.causal_conv1d import causal_conv1d, same_conv1d
from mambacompress.kernels.int8_state import Int8State
from mambacompress.kernels.rms_norm import rms_norm
from mambacompress.kernels.selective_scan import ScanScales, selective_scan
from mambacompress.kernels.selective_state_update import selective_steps_int8
from mambacompress.models.orders import IDENTITY, Order

Tap = Callable[[str, Tensor], None]
Projected = tuple[Tensor, Tensor, Tensor]


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in fp32 at least: the decay is never rounded to half precision."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def apply_mask(x_BLC: Tensor, attention_mask_BL: Tensor | None) -> Tensor:
    """Zero the padded positions, so that they leave neither a trace in the convolution nor in the state."""
    if attention_mask_BL is None:
        return x_BLC
    return x_BLC * attention_mask_BL[:, :, None].to(x_BLC.dtype)


def refuse_packed(seq_idx: Tensor | None) -> None:
    """An int8 state belongs to one sequence: raise ValueError where a batch packs several."""
    if seq_idx is not None:
        raise ValueError("packed sequences restart their state from zero: they cannot continue from an int8 state")


def silu_scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x * sigmoid(scale * x): SiLU of a channel that was divided by ``scale``, itself divided by ``scale``."""
    return F.silu(x) if scale is None else x * torch.sigmoid(x * scale.to(x.dtype))


class DepthwiseConv(nn.Module):
    """Depthwise convolution over tokens with its activation x * sigmoid(s * x) (SiLU where ``act_scale`` is None).

    kind: ``causal`` (1-D, has a state), ``same`` (1-D, centred) or ``2d`` (over the H x W grid, K x K).
    weight: [E, K] or, for 2d, [E, K, K]; bias: [E] or None; act_scale: [E] or None (smoothing S3).
    """

    def __init__(self, channels: int, width: int, *, bias: bool = True, kind: str = "causal", scaled: bool = False,
                 activation: bool = True) -> None:
        super().__init__()
        if kind not in ("causal", "same", "2d"):
            raise ValueError(f"unknown convolution {kind!r}; known: causal, same, 2d")
        self.kind, self.channels, self.width, self.activation = kind, channels, width, activation
        shape = (channels, width, width) if kind == "2d" else (channels, width)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.register_buffer("act_scale", torch.ones(channels) if scaled else None)
        self.act_scale: Tensor | None
        if self.weight.device.type != "meta":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def spec(self) -> dict[str, Any]:
        return {"type": "DepthwiseConv", "channels": self.channels, "width": self.width, "bias": self.bias is not None,
                "kind": self.kind, "scaled": self.act_scale is not None, "activation": self.activation}

    def forward(self, x_BLE: Tensor, state: Tensor | None = None, *, seq_idx: Tensor | None = None,
                grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (activated output [B, L, E], new state [B, K-1, E] or None where the convolution is not causal)."""
        if self.kind == "causal":
            return causal_conv1d(x_BLE, self.weight, self.bias, activation=self.activation, act_scale_E=self.act_scale,
                                 initial_state=state, seq_idx_BL=seq_idx)
        if state is not None or seq_idx is not None:
            raise ValueError(f"a {self.kind} convolution sees the future: it has no state and packs no sequences")
        if self.kind == "same":
            return same_conv1d(x_BLE, self.weight, self.bias, activation=self.activation,
                               act_scale_E=self.act_scale), None
        if grid is None:
            raise ValueError("a 2-D convolution needs the grid (H, W) of its tokens")
        image_BEHW = x_BLE.transpose(1, 2).unflatten(2, grid)
        y_BEHW = F.conv2d(image_BEHW, self.weight.to(x_BLE.dtype)[:, None], self.bias, padding="same",
                          groups=self.channels)
        y_BLE = y_BEHW.flatten(2).transpose(1, 2)
        return (silu_scaled(y_BLE, self.act_scale) if self.activation else y_BLE), None


class Gate(nn.Module):
    """y * z * sigmoid(s * z); ``scale`` [E] is smoothing S2, None means SiLU."""

    def __init__(self, channels: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("scale", torch.ones(channels) if scaled else None)
        self.scale: Tensor | None

    def spec(self) -> dict[str, Any]:
        return {"type": "Gate", "channels": self.channels, "scaled": self.scale is not None}

    def forward(self, y_BLE: Tensor, z_BLE: Tensor) -> Tensor:
        return y_BLE * silu_scaled(z_BLE, self.scale)


class RMSNorm(nn.Module):
    """The norm in front of a mixer, on the kernel: x / sqrt(mean(x²) + variance_epsilon) * weight.

    weight: [D], or [1, D] as an artifact stores that of the last norm.
    """

    def __init__(self, weight: nn.Parameter, variance_epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.view(-1), self.variance_epsilon)


class WeightlessNorm(nn.Module):
    """RMS norm without a weight (FalconMamba's norms on dt, B and C)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


class ScanQuantizer(nn.Module):
    """Static int8 inputs for the scan: u, dt (before bias, softplus) and z have a scale a channel, B and C one a state.

    ``quantize(name, x)`` gives the int8 tensor, ``scales()`` what the kernel multiplies back in registers.
    """

    NAMES = ("u", "dt", "B", "C", "z")

    def __init__(self, channels: int, groups: int, states: int) -> None:
        super().__init__()
        self.channels, self.groups, self.states = channels, groups, states
        for name in self.NAMES:
            shape = (groups, states) if name in ("B", "C") else (channels,)
            self.register_buffer(f"scale_{name}", torch.ones(shape))

    def spec(self) -> dict[str, Any]:
        return {"type": "ScanQuantizer", "channels": self.channels, "groups": self.groups, "states": self.states}

    def quantize(self, name: str, x: Tensor) -> Tensor:
        scale = self.get_buffer(f"scale_{name}")
        return torch.clamp(torch.round(x.float() / scale), -127, 127).to(torch.int8)

    def scales(self) -> ScanScales:
        return ScanScales(**{name: self.get_buffer(f"scale_{name}") for name in self.NAMES})


class SelectiveProjection(nn.Module):
    """From the convolved input u to what makes the scan selective: dt, B and C.

    x_proj: E -> R + 2·G·N, rows [dt, B, C]; dt_proj: R -> E. The bias of dt stays with the path (it enters in fp32,
    inside the scan). Optional weightless norms on each (FalconMamba); ``x_rotation`` is the online rotation R6.
    """

    def __init__(self, d_inner: int, d_state: int, dt_rank: int, *, groups: int = 1,
                 norm_eps: float | None = None) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.groups = d_state, dt_rank, groups
        self.x_proj: nn.Module = nn.Linear(d_inner, dt_rank + 2 * groups * d_state, bias=False)
        self.dt_proj: nn.Module = nn.Linear(dt_rank, d_inner, bias=False)
        self.norm = WeightlessNorm(norm_eps) if norm_eps is not None else None
        self.x_rotation: nn.Module | None = None

    def forward(self, u_BLE: Tensor, tap: Tap) -> Projected:
        """(dt [B, L, E] before bias and softplus, B [B, L, G, N], C [B, L, G, N])."""
        rotated_BLE = u_BLE if self.x_rotation is None else self.x_rotation(u_BLE)
        tap("x_proj", rotated_BLE)
        span = self.groups * self.d_state
        dt_BLR, B_BLS, C_BLS = self.x_proj(rotated_BLE).split([self.dt_rank, span, span], dim=-1)
        B_BLGN, C_BLGN = (t.unflatten(-1, (self.groups, self.d_state)) for t in (B_BLS, C_BLS))
        if self.norm is not None:
            dt_BLR, B_BLGN, C_BLGN = self.norm(dt_BLR), self.norm(B_BLGN), self.norm(C_BLGN)
        tap("dt_proj", dt_BLR)
        dt_BLE = self.dt_proj(dt_BLR)
        tap("dt", dt_BLE)
        tap("B", B_BLGN)
        tap("C", C_BLGN)
        return dt_BLE, B_BLGN, C_BLGN


class Path(nn.Module):
    """One scan over the tokens in one order.

    conv: the path's own causal convolution (Vim), or None where the mixer has one for all. projection, A_log [E, N], D
    [E], dt_bias [E]: the path's own, or shared between paths (PlainMamba). permutes: ``all`` reads u in the path's
    order and derives dt, B, C from it; ``u`` permutes u alone, so that step t of the scan pairs the t-th token *of the
    order* with dt, B and C of the t-th token *of the raster* (as PlainMamba's published code does). direction_B: [5,
    N], added to B by the direction of the step that leads to the token (``Order.directions``). window: K of the locally
    bi-directional scan, or None.
    """

    def __init__(self, d_inner: int, d_state: int, projection: SelectiveProjection, *, order: Order = IDENTITY,
                 conv: DepthwiseConv | None = None, permutes: str = "all", direction_B: nn.Parameter | None = None,
                 window: int | None = None, A_log: nn.Parameter | None = None, D: nn.Parameter | None = None,
                 dt_bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if permutes not in ("all", "u"):
            raise ValueError(f"a path permutes 'all' or 'u', not {permutes!r}")
        if permutes == "u" and conv is not None:
            raise ValueError("a path that permutes u alone has no convolution of its own: dt, B, C precede its order")
        self.order, self.permutes, self.window = order, permutes, window
        self.projection = projection
        self.conv = conv
        self.A_log = A_log if A_log is not None else nn.Parameter(
            torch.log(torch.arange(1, d_state + 1).float()).expand(d_inner, d_state).clone())
        self.D = D if D is not None else nn.Parameter(torch.ones(d_inner))
        self.dt_bias = dt_bias if dt_bias is not None else nn.Parameter(torch.full((d_inner,), -4.6))
        self.direction_B = direction_B
        self.scan_quantizer: ScanQuantizer | None = None

    def forward(self, u_BLE: Tensor, z_BLE: Tensor | None, z_scale: Tensor | None, *, tap: Tap,
                state: Tensor | Int8State | None = None, attention_mask: Tensor | None = None,
                seq_idx: Tensor | None = None, grid: tuple[int, int] | None = None,
                shared: dict[int, Projected] | None = None) -> tuple[Tensor, Tensor | Int8State]:
        """The scan of u [B, L, E] (raster order), gated where ``z_BLE`` is given.

        shared: what paths in front of this one projected, so that a projection of raster tokens runs once for all.
        Returns the output, back in raster order, and the final state [B, E, N], int8 where ``state`` is.
        """
        if seq_idx is not None:
            seq_idx = self.order.apply(seq_idx, grid)
        if self.permutes == "all":
            u_BLE = self.order.apply(u_BLE, grid)
            if self.conv is not None:
                u_BLE, _ = self.conv(u_BLE, seq_idx=seq_idx)
                if attention_mask is not None:
                    u_BLE = apply_mask(u_BLE, self.order.apply(attention_mask, grid))
            dt_BLE, B_BLGN, C_BLGN = self.projection(u_BLE, tap)
        else:
            dt_BLE, B_BLGN, C_BLGN = self._project_once(u_BLE, tap, {} if shared is None else shared)
            u_BLE = self.order.apply(u_BLE, grid)
        if self.direction_B is not None:
            steps_L = self.order.directions(u_BLE.shape[1], grid).to(u_BLE.device)
            B_BLGN = B_BLGN + self.direction_B[steps_L][:, None].to(B_BLGN.dtype)
        tap("u", u_BLE)
        scales = None
        if self.scan_quantizer is not None:
            quantize = self.scan_quantizer.quantize
            u_BLE, dt_BLE, B_BLGN, C_BLGN = (
                quantize("u", u_BLE), quantize("dt", dt_BLE), quantize("B", B_BLGN), quantize("C", C_BLGN))
            z_BLE = None if z_BLE is None else quantize("z", z_BLE)
            scales = self.scan_quantizer.scales()
        A_EN = negative_exp(self.A_log)
        if isinstance(state, Int8State):
            refuse_packed(seq_idx)
            return selective_steps_int8(state, u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, self.D, z_BLE, self.dt_bias,
                                        z_scale_E=z_scale, scales=scales)
        y_BLE, final_BEN = selective_scan(
            u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, self.D, z_BLE, self.dt_bias, dt_softplus=True,
            z_scale_E=z_scale, initial_state_BEN=state, window=self.window, seq_idx_BL=seq_idx, scales=scales)
        return self.order.invert(y_BLE, grid), final_BEN

    def _project_once(self, u_BLE: Tensor, tap: Tap, shared: dict[int, Projected]) -> Projected:
        key = id(self.projection)
        if key not in shared:
            shared[key] = self.projection(u_BLE, tap)
        return shared[key]
