"""The two mixers every Mamba is made of: S6Mixer (Mamba-1 and its vision relatives) and SSDMixer (Mamba-2).

Stock mixers read their weights raw inside fused kernels, so a hook or a swapped Linear silently misses them. Here the
forward is *unfused*: every projection is a module call and every recurrence a kernel op, so whatever a pass puts in place
of a module is what runs. A mixer is composed, not branched:

    S6Mixer  = in_proj -> conv -> for each Path: order -> x_proj, dt_proj -> scan -> inverse order
               -> Merge -> (norm) -> Gate -> out_proj
    SSDMixer = in_proj -> conv over [x, B, C] -> SSD scan -> gated group norm -> out_proj

and a family differs only in configuration. Prefill from any state and a single decode step are the same code.

Three places tolerate per-channel scales that keep the function (smoothing S2, S3: x * sigmoid(s * x)), three hold an
optional online rotation or quantizer; all default to None and cost nothing then. ``tap`` lets calibration see the named
quantities as they pass.

Sources: Mamba (arXiv 2312.00752, Alg. 2), Mamba-2 (arXiv 2405.21060, Fig. 6).

Legend: B batch, L tokens, D d_model, E d_inner, N d_state, R dt_rank, K conv width, G groups, H heads, P head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.kernels.causal_conv1d import causal_conv1d
from mambacompress.kernels.rms_norm import gated_rms_norm, rms_norm
from mambacompress.kernels.selective_scan import ScanScales, selective_scan
from mambacompress.kernels.ssd_scan import ssd_scan
from mambacompress.models.orders import Merge, Order

Tap = Callable[[str, Tensor], None]


@dataclass
class MixerState:
    """What a causal mixer carries from token to token.

    conv: [B, K-1, channels], the last inputs of the convolution. ssm: [B, E, N] (S6) or [B, H, P, N] (SSD).
    """

    conv: Tensor
    ssm: Tensor


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in fp32 at least: the decay is never rounded to half precision."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def apply_mask(x_BLC: Tensor, attention_mask_BL: Tensor | None) -> Tensor:
    """Zero the padded positions, so that they leave neither a trace in the convolution nor in the state."""
    if attention_mask_BL is None:
        return x_BLC
    return x_BLC * attention_mask_BL[:, :, None].to(x_BLC.dtype)


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
            raise ValueError(f"a {self.kind} convolution sees the future: it has no state and takes no packed sequences")
        x_BEL = x_BLE.transpose(1, 2)
        if self.kind == "same":
            y_BEL = F.conv1d(x_BEL, self.weight[:, None], self.bias, padding="same", groups=self.channels)
        else:
            if grid is None:
                raise ValueError("a 2-D convolution needs the grid (H, W) of its tokens")
            image = x_BEL.unflatten(2, grid)
            y_BEL = F.conv2d(image, self.weight[:, None], self.bias, padding="same", groups=self.channels).flatten(2)
        y_BLE = y_BEL.transpose(1, 2)
        return (silu_scaled(y_BLE, self.act_scale) if self.activation else y_BLE), None


def silu_scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x * sigmoid(scale * x): SiLU of a channel that was divided by ``scale``, itself divided by ``scale``."""
    return F.silu(x) if scale is None else x * torch.sigmoid(x * scale.to(x.dtype))


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


class WeightlessNorm(nn.Module):
    """RMS norm without a weight (FalconMamba's norms on dt, B and C)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


class ScanQuantizer(nn.Module):
    """Static int8 inputs for the scan: u, dt (before the bias and softplus), B, C and z, one scale each.

    ``quantize(name, x)`` gives the int8 tensor, ``scales()`` what the kernel multiplies back in registers.
    """

    NAMES = ("u", "dt", "B", "C", "z")

    def __init__(self, scales: dict[str, float] | None = None) -> None:
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(f"scale_{name}", torch.tensor(float((scales or {}).get(name, 1.0))))

    def spec(self) -> dict[str, Any]:
        return {"type": "ScanQuantizer"}

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

    def __init__(self, d_inner: int, d_state: int, dt_rank: int, *, groups: int = 1, norm_eps: float | None = None) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.groups = d_state, dt_rank, groups
        self.x_proj: nn.Module = nn.Linear(d_inner, dt_rank + 2 * groups * d_state, bias=False)
        self.dt_proj: nn.Module = nn.Linear(dt_rank, d_inner, bias=False)
        self.norm = WeightlessNorm(norm_eps) if norm_eps is not None else None
        self.x_rotation: nn.Module | None = None

    def forward(self, u_BLE: Tensor, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
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

    conv: the path's own convolution (Vim), or None where the mixer has one for all. projection: own, or shared between
    paths (PlainMamba). permutes: ``all`` reads u in the path's order and derives dt, B, C from it; ``u`` permutes u alone
    and leaves dt, B, C in raster order (PlainMamba), with a learned ``direction_B`` [N] added to B. window: K of the
    locally bi-directional scan (LBMamba), or None.
    """

    def __init__(self, d_inner: int, d_state: int, projection: SelectiveProjection, *, order: Order = Order(),  # noqa: B008
                 conv: DepthwiseConv | None = None, permutes: str = "all", direction_B: bool = False,
                 window: int | None = None, A_log: nn.Parameter | None = None, D: nn.Parameter | None = None,
                 dt_bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if permutes not in ("all", "u"):
            raise ValueError(f"a path permutes 'all' or 'u', not {permutes!r}")
        self.order, self.permutes, self.window = order, permutes, window
        self.projection = projection
        self.conv = conv
        self.A_log = A_log if A_log is not None else nn.Parameter(
            torch.log(torch.arange(1, d_state + 1).float()).expand(d_inner, d_state).clone())
        self.D = D if D is not None else nn.Parameter(torch.ones(d_inner))
        self.dt_bias = dt_bias if dt_bias is not None else nn.Parameter(torch.full((d_inner,), -4.6))
        self.direction_B = nn.Parameter(torch.zeros(d_state)) if direction_B else None
        self.scan_quantizer: ScanQuantizer | None = None

    def forward(self, u_BLE: Tensor, z_BLE: Tensor | None, z_scale: Tensor | None, *, tap: Tap, state: Tensor | None = None,
                seq_idx: Tensor | None = None, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """The scan of u, gated where ``z_BLE`` is given; back in raster order, with the final state."""
        if self.permutes == "all":
            u_BLE = self.order.apply(u_BLE, grid)
            if self.conv is not None:
                u_BLE, _ = self.conv(u_BLE)
            dt_BLE, B_BLGN, C_BLGN = self.projection(u_BLE, tap)
        else:
            dt_BLE, B_BLGN, C_BLGN = self.projection(u_BLE, tap)
            u_BLE = self.order.apply(u_BLE, grid)
        if self.direction_B is not None:
            B_BLGN = B_BLGN + self.direction_B
        tap("u", u_BLE)
        scales = None
        if self.scan_quantizer is not None:
            quantize = self.scan_quantizer.quantize
            u_BLE, dt_BLE, B_BLGN, C_BLGN = (
                quantize("u", u_BLE), quantize("dt", dt_BLE), quantize("B", B_BLGN), quantize("C", C_BLGN))
            z_BLE = None if z_BLE is None else quantize("z", z_BLE)
            scales = self.scan_quantizer.scales()
        y_BLE, final_BEN = selective_scan(
            u_BLE, dt_BLE, negative_exp(self.A_log), B_BLGN, C_BLGN, self.D, z_BLE, self.dt_bias, dt_softplus=True,
            z_scale_E=z_scale, initial_state_BEN=state, window=self.window, seq_idx_BL=seq_idx, scales=scales)
        return self.order.invert(y_BLE, grid), final_BEN


class Mixer(nn.Module):
    """What both kinds share: the taps."""

    kind: str
    in_proj: nn.Module
    out_proj: nn.Module
    out_rotation: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.tap: Tap | None = None
        self.out_rotation = None

    def mix(self, x_BLD: Tensor, state: MixerState | None = None, attention_mask: Tensor | None = None,
            seq_idx: Tensor | None = None, grid: tuple[int, int] | None = None) -> tuple[Tensor, MixerState | None]:
        """Mix a sequence from a state: see S6Mixer.mix."""
        raise TypeError(f"{type(self).__name__} does not say how it mixes")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``mix``; a family overrides it to speak its host's calling convention."""
        return self.mix(*args, **kwargs)

    def _tap(self, name: str, value: Tensor) -> None:
        if self.tap is not None:
            self.tap(name, value)

    def _project_out(self, y_BLE: Tensor) -> Tensor:
        self._tap("y", y_BLE)
        if self.out_rotation is not None:
            y_BLE = self.out_rotation(y_BLE)
        self._tap("out_proj", y_BLE)
        return self.out_proj(y_BLE)


class S6Mixer(Mixer):
    """The selective-scan mixer (Mamba-1, FalconMamba, Vim, VMamba, PlainMamba, LBMamba, ...).

    in_proj: D -> 2E, rows [x, z] (E rows where ``gate`` is None). One causal path in raster order makes a causal mixer,
    the only kind with a state. Shapes: input and output [B, L, D].
    """

    kind = "s6"

    def __init__(self, d_model: int, d_inner: int, paths: Sequence[Path], *, conv: DepthwiseConv | None,
                 merge: Merge = Merge(), gate: Gate | None = None, norm: nn.Module | None = None,  # noqa: B008
                 bias: bool = False, out_bias: bool | None = None) -> None:
        super().__init__()
        self.d_model, self.d_inner = d_model, d_inner
        self.in_proj = nn.Linear(d_model, d_inner * (1 if gate is None else 2), bias=bias)
        self.conv = conv
        self.paths = nn.ModuleList(paths)
        self.merge = merge
        self.norm = norm
        self.gate = gate
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias if out_bias is None else out_bias)

    @property
    def causal(self) -> bool:
        path = self.paths[0]
        return (len(self.paths) == 1 and path.order.is_identity and path.window is None and path.conv is None
                and self.conv is not None and self.conv.kind == "causal")

    def zero_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> MixerState:
        """The state before the first token: zeros, the ssm part in fp32 at least."""
        if not self.causal or self.conv is None:
            raise ValueError("this mixer reads tokens on both sides: it has no state and cannot decode step by step")
        ssm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        d_state = self.paths[0].A_log.shape[1]
        return MixerState(torch.zeros(batch, self.conv.width - 1, self.d_inner, dtype=dtype, device=device),
                          torch.zeros(batch, self.d_inner, d_state, dtype=ssm_dtype, device=device))

    def mix(self, x_BLD: Tensor, state: MixerState | None = None, attention_mask: Tensor | None = None,
            seq_idx: Tensor | None = None, grid: tuple[int, int] | None = None) -> tuple[Tensor, MixerState | None]:
        """Mix ``x_BLD`` from ``state`` (zeros where None).

        attention_mask: [B, L], 0 at padding (left padding leaves the state untouched). seq_idx: [B, L] integers; state
        and convolution restart where they change. grid: (H, W) of the tokens, for 2-D orders and convolutions.
        Returns the output [B, L, D] and the state after the last token (None for a mixer that is not causal).
        """
        if state is not None and not self.causal:
            raise ValueError("this mixer reads tokens on both sides: it cannot continue from a state")
        x_BLD = apply_mask(x_BLD, attention_mask)
        self._tap("in_proj", x_BLD)
        if self.gate is None:
            x_BLE, z_BLE = self.in_proj(x_BLD), None
        else:
            x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
            self._tap("z", z_BLE)
        x_BLE = apply_mask(x_BLE, attention_mask)
        self._tap("conv", x_BLE)
        conv_state = None
        u_BLE = x_BLE
        if self.conv is not None:
            u_BLE, conv_state = self.conv(x_BLE, None if state is None else state.conv, seq_idx=seq_idx, grid=grid)
            u_BLE = apply_mask(u_BLE, attention_mask)

        fused = self.gate is not None and len(self.paths) == 1 and self.norm is None and self.paths[0].order.is_identity
        z_in_scan, z_scale = (z_BLE, self.gate.scale) if fused and self.gate is not None else (None, None)
        outputs: list[Tensor] = []
        final = None
        for path in self.paths:
            y_BLE, final = path(u_BLE, z_in_scan, z_scale, tap=self._tap, state=None if state is None else state.ssm,
                                seq_idx=seq_idx, grid=grid)
            outputs.append(y_BLE)
        y_BLE = self.merge(outputs)
        if self.norm is not None:
            y_BLE = self.norm(y_BLE)
        if self.gate is not None and not fused:
            y_BLE = self.gate(y_BLE, z_BLE)
        new_state = MixerState(conv_state, final) if self.causal and conv_state is not None and final is not None else None
        return self._project_out(y_BLE), new_state


class SSDMixer(Mixer):
    """The state-space-dual mixer (Mamba-2). in_proj rows [z, x, B, C, dt]; the convolution runs over [x, B, C].

    One scalar decay a head; heads of ``head_dim`` channels share B and C in ``groups``. The output is normed after the
    gate, in ``groups`` groups (norm(y * SiLU(z)) * weight). Shapes: input and output [B, L, D].
    """

    kind = "ssd"
    causal = True

    def __init__(self, d_model: int, *, heads: int, head_dim: int, d_state: int, groups: int = 1, conv_width: int = 4,
                 bias: bool = False, conv_bias: bool = True, norm_eps: float = 1e-5, chunk_size: int = 256,
                 dt_limit: tuple[float, float] = (0.0, float("inf"))) -> None:
        super().__init__()
        self.d_model, self.heads, self.head_dim, self.d_state, self.groups = d_model, heads, head_dim, d_state, groups
        self.d_inner = heads * head_dim
        self.norm_eps, self.chunk_size, self.dt_limit = norm_eps, chunk_size, dt_limit
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * groups * d_state + heads, bias=bias)
        self.conv = DepthwiseConv(self.d_inner + 2 * groups * d_state, conv_width, bias=conv_bias)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, heads + 1).float()))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.full((heads,), -4.6))
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def zero_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> MixerState:
        """The state before the first token: zeros, the ssm part in fp32 at least."""
        ssm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return MixerState(torch.zeros(batch, self.conv.width - 1, self.conv.channels, dtype=dtype, device=device),
                          torch.zeros(batch, self.heads, self.head_dim, self.d_state, dtype=ssm_dtype, device=device))

    def mix(self, x_BLD: Tensor, state: MixerState | None = None, attention_mask: Tensor | None = None,
            seq_idx: Tensor | None = None, grid: tuple[int, int] | None = None) -> tuple[Tensor, MixerState | None]:
        """As S6Mixer.mix."""
        x_BLD = apply_mask(x_BLD, attention_mask)
        self._tap("in_proj", x_BLD)
        span = self.groups * self.d_state
        z_BLE, xBC_BLC, dt_BLH = self.in_proj(x_BLD).split([self.d_inner, self.d_inner + 2 * span, self.heads], dim=-1)
        xBC_BLC = apply_mask(xBC_BLC, attention_mask)
        self._tap("z", z_BLE)
        self._tap("conv", xBC_BLC)
        self._tap("dt", dt_BLH)
        xBC_BLC, conv_state = self.conv(xBC_BLC, None if state is None else state.conv, seq_idx=seq_idx)
        xBC_BLC = apply_mask(xBC_BLC, attention_mask)
        u_BLE, B_BLS, C_BLS = xBC_BLC.split([self.d_inner, span, span], dim=-1)
        B_BLGN, C_BLGN = (t.unflatten(-1, (self.groups, self.d_state)) for t in (B_BLS, C_BLS))
        self._tap("u", u_BLE)
        self._tap("B", B_BLGN)
        self._tap("C", C_BLGN)
        y_BLHP, final = ssd_scan(
            u_BLE.unflatten(-1, (self.heads, self.head_dim)), dt_BLH, negative_exp(self.A_log), B_BLGN, C_BLGN, self.D,
            self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit, chunk_size=self.chunk_size,
            initial_state_BHPN=None if state is None else state.ssm, seq_idx_BL=seq_idx)
        y_BLE = gated_rms_norm(y_BLHP.flatten(2), z_BLE, self.norm_weight, self.norm_eps, self.d_inner // self.groups)
        return self._project_out(y_BLE), MixerState(conv_state, final)


def build(spec: dict[str, Any]) -> nn.Module:
    """The module a ``spec()`` of this file describes, its tensors to be loaded."""
    kinds: dict[str, type[nn.Module]] = {"DepthwiseConv": DepthwiseConv, "Gate": Gate, "ScanQuantizer": ScanQuantizer}
    arguments = {key: value for key, value in spec.items() if key != "type"}
    return kinds[spec["type"]](**arguments)
