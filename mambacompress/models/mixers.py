"""The two mixers every Mamba is made of: S6Mixer (Mamba-1 and its vision relatives) and SSDMixer (Mamba-2).

Stock mixers read their weights raw inside fused kernels, so a hook or a swapped Linear silently misses them. Here the
forward is *unfused*: every projection is a module call and every recurrence a kernel op, so whatever a pass puts in
place of a module is what runs. A mixer is composed of the parts in ``paths``, not branched:

    S6Mixer  = in_proj -> (conv) -> for each Path: order -> x_proj, dt_proj -> scan -> inverse order
               -> Merge -> (norm) -> (Gate) -> out_proj
    SSDMixer = in_proj -> conv over [x, B, C] -> SSD scan -> gated group norm -> out_proj

and a family differs only in configuration. Prefill from any state and a single decode step are the same code. ``tap``
lets calibration see the named quantities as they pass (in_proj z conv u x_proj dt_proj dt B C y out_proj).

Sources: Mamba (arXiv 2312.00752, Alg. 2), Mamba-2 (arXiv 2405.21060, Fig. 6).

Legend: B batch, L tokens, D d_model, E d_inner, N d_state, K conv width, G groups, H heads, P head_dim, S = G * N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.kernels.int8_state import Int8State, quantize_state
from mambacompress.kernels.rms_norm import gated_rms_norm
from mambacompress.kernels.ssd_scan import ssd_scan
from mambacompress.kernels.ssd_state_update import ssd_steps_int8
from mambacompress.models.orders import SUM, Merge
from mambacompress.models.paths import (
    DepthwiseConv,
    Gate,
    Path,
    Projected,
    ScanQuantizer,
    SelectiveProjection,
    Tap,
    WeightlessNorm,
    apply_mask,
    negative_exp,
    refuse_packed,
)


@dataclass
class MixerState:
    """What a causal mixer carries from token to token.

    conv: [B, K-1, channels], the last inputs of the convolution. ssm: [B, E, N] (S6) or [B, H, P, N] (SSD); an int8 one
    stays int8 in every state behind it.
    """

    conv: Tensor
    ssm: Tensor | Int8State

    def int8(self) -> MixerState:
        """The same state with its ssm part in int8; itself where it is already."""
        return self if isinstance(self.ssm, Int8State) else MixerState(self.conv, quantize_state(self.ssm))

    @property
    def bytes(self) -> int:
        """What the state of all rows takes."""
        ssm = self.ssm.bytes if isinstance(self.ssm, Int8State) else self.ssm.numel() * self.ssm.element_size()
        return ssm + self.conv.numel() * self.conv.element_size()


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
                 merge: Merge = SUM, gate: Gate | None = None, norm: nn.Module | None = None,
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

    def scans(self) -> list[Path]:
        """The paths, typed."""
        return [path for path in self.paths if isinstance(path, Path)]

    @property
    def causal(self) -> bool:
        path = self.scans()[0]
        return (len(self.paths) == 1 and path.order.is_identity and path.window is None and path.conv is None
                and self.conv is not None and self.conv.kind == "causal")

    def zero_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> MixerState:
        """The state before the first token: zeros, the ssm part in fp32 at least."""
        if not self.causal or self.conv is None:
            raise ValueError("this mixer reads tokens on both sides: it has no state and cannot decode step by step")
        ssm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        d_state = self.scans()[0].A_log.shape[1]
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

        paths = self.scans()
        fused = self.gate is not None and self.norm is None and len(paths) == 1 and paths[0].order.is_identity
        z_in_scan, z_scale = (z_BLE, self.gate.scale) if fused and self.gate is not None else (None, None)
        outputs: list[Tensor] = []
        shared: dict[int, Projected] = {}
        final: Tensor | Int8State | None = None
        for path in paths:
            y_BLE, final = path(u_BLE, z_in_scan, z_scale, tap=self._tap, state=None if state is None else state.ssm,
                                attention_mask=attention_mask, seq_idx=seq_idx, grid=grid, shared=shared)
            outputs.append(y_BLE)
        y_BLE = self.merge(outputs)
        if self.norm is not None:
            y_BLE = self.norm(y_BLE)
        if self.gate is not None and not fused:
            y_BLE = self.gate(y_BLE, z_BLE)
        if not self.causal or conv_state is None or final is None:
            return self._project_out(y_BLE), None
        return self._project_out(y_BLE), MixerState(conv_state, final)


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
        x_BLHP, A_H = u_BLE.unflatten(-1, (self.heads, self.head_dim)), negative_exp(self.A_log)
        ssm = None if state is None else state.ssm
        final: Tensor | Int8State
        if isinstance(ssm, Int8State):
            refuse_packed(seq_idx)
            y_BLHP, final = ssd_steps_int8(ssm, x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, self.D, self.dt_bias,
                                           dt_limit=self.dt_limit)
        else:
            y_BLHP, final = ssd_scan(
                x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, self.D, self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit,
                chunk_size=self.chunk_size, initial_state_BHPN=ssm, seq_idx_BL=seq_idx)
        y_BLE = gated_rms_norm(y_BLHP.flatten(2), z_BLE, self.norm_weight, self.norm_eps, self.d_inner // self.groups)
        return self._project_out(y_BLE), MixerState(conv_state, final)


def build(spec: dict[str, Any]) -> nn.Module:
    """The module a ``spec()`` of this file describes, its tensors to be loaded."""
    kinds: dict[str, type[nn.Module]] = {"DepthwiseConv": DepthwiseConv, "Gate": Gate, "ScanQuantizer": ScanQuantizer}
    arguments = {key: value for key, value in spec.items() if key != "type"}
    return kinds[spec["type"]](**arguments)


__all__ = [
    "DepthwiseConv", "Gate", "Mixer", "MixerState", "Path", "S6Mixer", "SSDMixer", "ScanQuantizer",
    "SelectiveProjection", "Tap", "WeightlessNorm", "apply_mask", "build", "negative_exp",
]
