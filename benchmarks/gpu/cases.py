"""What is measured: an op on inputs of a real size, its reference, its peers, and what it has to move and compute.

A case is made when its turn comes, so that only its own tensors are in memory. ``bytes`` are those of inputs and
outputs once each; ``operations`` the products of tensor cores, by the format they are made in.

Legend: B batch, L tokens, E channels, N states, T rows, I inputs, O outputs, H heads, P head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.kernels.causal_conv1d import causal_conv1d
from mambacompress.kernels.hadamard import hadamard, hadamard_int8
from mambacompress.kernels.int4_linear import int4_linear
from mambacompress.kernels.int8_linear import int8_linear
from mambacompress.kernels.int8_state import quantize_state
from mambacompress.kernels.nm_linear import nm_linear
from mambacompress.kernels.rms_norm import gated_rms_norm, rms_norm, rms_norm_int8
from mambacompress.kernels.selective_scan import ScanScales, selective_scan
from mambacompress.kernels.selective_state_update import selective_state_update_int8
from mambacompress.kernels.ssd_scan import ssd_scan
from mambacompress.kernels.ssd_state_update import ssd_state_update
from mambacompress.kernels.tolerances import TRITON_CHUNKED, TRITON_FORWARD


@dataclass(frozen=True)
class Sizes:
    """Of the model whose ops these are; the defaults are mamba-130m and mamba2-130m."""

    channels: int = 1536
    states: int = 16
    heads: int = 24
    head_dim: int = 64
    ssd_states: int = 128
    width: int = 768
    length: int = 2048
    batches: tuple[int, ...] = (1, 8)
    rows: tuple[int, ...] = (1, 512, 4096)


TINY = Sizes(24, 8, 2, 16, 16, 96, 9, (2,), (1, 6))


@dataclass
class Case:
    """run: the op; which implementation it takes is for the registry to say. Compilable: torch.compile of the reference
    is a fair rival (a loop over tokens is none)."""

    run: Callable[[], Any]
    bytes: int
    operations: float = 0.0
    unit: str = "fp16"
    tolerance: float = TRITON_FORWARD[torch.float16]
    compilable: bool = False
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


class Inputs:
    """Random tensors on one device, from one generator: the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype or self.dtype)

    def codes(self, *shape: int, low: int = -127, dtype: torch.dtype = torch.int8) -> Tensor:
        high = 128 if dtype == torch.int8 else 256
        return torch.randint(low, high, shape, generator=self._generator, dtype=dtype).to(self.device)


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of all of them together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _scan(sizes: Sizes, batch: int, int8: bool, peers: dict[str, Any]) -> Callable[[torch.device], Case]:
    def make(device: torch.device) -> Case:
        inputs, E, N, L = Inputs(device), sizes.channels, sizes.states, sizes.length
        shape, rows = (batch, L, E), (batch, L, 1, N)
        A, D, bias = -inputs.normal(E, N, dtype=torch.float32).exp(), inputs.normal(E, dtype=torch.float32), None
        scales = None
        if int8:
            u, dt, z, B, C = (inputs.codes(*s) for s in (shape, shape, shape, rows, rows))
            scales = ScanScales(u=0.02, dt=0.02, z=0.02, B=0.02, C=0.02)
        else:
            u, dt, z, B, C = (inputs.normal(*s) for s in (shape, shape, shape, rows, rows))
        rivals = {}
        if peers.get("mamba_ssm") is not None and not int8:
            scan = peers["mamba_ssm"]
            t = [x.transpose(1, 2).contiguous() for x in (u, dt, z)]
            b, c = (x[:, :, 0].transpose(1, 2).contiguous() for x in (B, C))
            rivals["mamba_ssm"] = lambda: scan(t[0], t[1], A, b, c, D, t[2], None, True)
        y_bytes = u.numel() * (4 if int8 else 2)
        return Case(lambda: selective_scan(u, dt, A, B, C, D, z, bias, scales=scales)[0],
                    size_of(u, dt, z, B, C) + y_bytes, peers=rivals)

    return make


def _training_scan(sizes: Sizes, batch: int) -> Callable[[torch.device], Case]:
    def make(device: torch.device) -> Case:
        inputs, E, N, L = Inputs(device, torch.bfloat16), sizes.channels, sizes.states, sizes.length
        u, dt, z = (inputs.normal(batch, L, E).requires_grad_() for _ in range(3))
        B, C = (inputs.normal(batch, L, 1, N).requires_grad_() for _ in range(2))
        A = (-inputs.normal(E, N, dtype=torch.float32).exp()).requires_grad_()
        dy = inputs.normal(batch, L, E)

        def run() -> Any:
            with torch.enable_grad():
                y, _ = selective_scan(u, dt, A, B, C, None, z)
                return torch.autograd.grad(y, (u, dt, A, B, C, z), dy)

        return Case(run, 3 * size_of(u, dt, z) + 2 * size_of(dy), tolerance=1e-2)

    return make


def _ssd(sizes: Sizes, batch: int, peers: dict[str, Any]) -> Callable[[torch.device], Case]:
    def make(device: torch.device) -> Case:
        inputs, H, P, N, L = Inputs(device, torch.bfloat16), sizes.heads, sizes.head_dim, sizes.ssd_states, sizes.length
        x, dt = inputs.normal(batch, L, H, P), inputs.normal(batch, L, H)
        B, C = inputs.normal(batch, L, 1, N), inputs.normal(batch, L, 1, N)
        A, D = -inputs.normal(H, dtype=torch.float32).exp(), inputs.normal(H, dtype=torch.float32)
        rivals = {}
        if peers.get("mamba_ssm_ssd") is not None:
            scan = peers["mamba_ssm_ssd"]
            rivals["mamba_ssm"] = lambda: scan(x, dt, A, B, C, 256, D=D, dt_softplus=True)
        return Case(lambda: ssd_scan(x, dt, A, B, C, D)[0], 2 * size_of(x) + size_of(dt, B, C),
                    batch * L * H * (4.0 * P * N + 128.0 * (N + P)), tolerance=1e-2, peers=rivals)

    return make


def _training_ssd(sizes: Sizes, batch: int) -> Callable[[torch.device], Case]:
    def make(device: torch.device) -> Case:
        inputs, H, P, N, L = Inputs(device, torch.bfloat16), sizes.heads, sizes.head_dim, sizes.ssd_states, sizes.length
        x, dt = inputs.normal(batch, L, H, P).requires_grad_(), inputs.normal(batch, L, H).requires_grad_()
        B, C = (inputs.normal(batch, L, 1, N).requires_grad_() for _ in range(2))
        A = (-inputs.normal(H, dtype=torch.float32).exp()).requires_grad_()
        dy = inputs.normal(batch, L, H, P)

        def run() -> Any:
            with torch.enable_grad():
                y, _ = ssd_scan(x, dt, A, B, C)
                return torch.autograd.grad(y, (x, dt, A, B, C), dy)

        return Case(run, 3 * size_of(x, dt, B, C) + 2 * size_of(dy),
                    batch * L * H * (14.0 * P * N + 128.0 * (2 * N + 4 * P)), tolerance=1e-2)

    return make


def _conv(sizes: Sizes, batch: int, peers: dict[str, Any]) -> Callable[[torch.device], Case]:
    def make(device: torch.device) -> Case:
        inputs = Inputs(device)
        x, weight = inputs.normal(batch, sizes.length, sizes.channels), inputs.normal(sizes.channels, 4)
        bias = inputs.normal(sizes.channels)
        rivals = {}
        if peers.get("causal_conv1d") is not None:
            conv, x_BEL = peers["causal_conv1d"], x.transpose(1, 2)  # channels last, as it likes best
            rivals["causal_conv1d"] = lambda: conv(x_BEL, weight, bias, activation="silu")
        return Case(lambda: causal_conv1d(x, weight, bias)[0], 2 * size_of(x), compilable=True, peers=rivals)

    return make


def _rows(kind: str, sizes: Sizes, rows: int) -> Callable[[torch.device], Case]:
    """Norms and rotations, which read and write a row."""

    def make(device: torch.device) -> Case:
        inputs, D = Inputs(device), sizes.channels
        x, z, weight = inputs.normal(rows, D), inputs.normal(rows, D), inputs.normal(D)
        signs, target = torch.where(inputs.codes(D) > 0, 1, -1).to(torch.int8), torch.empty_like(x)
        copy = {"a copy": lambda: target.copy_(x)}
        if kind == "norm":
            return Case(lambda: rms_norm(x, weight), 2 * size_of(x), compilable=True, peers=copy)
        if kind == "norm int8":
            return Case(lambda: rms_norm_int8(x, weight, residual=z), 3 * size_of(x) + x.numel(), compilable=True,
                        peers=copy)
        if kind == "gated norm":
            return Case(lambda: gated_rms_norm(x, z, weight, 1e-5, D), 3 * size_of(x), compilable=True, peers=copy)
        if kind == "rotation":
            return Case(lambda: hadamard(x, signs), 2 * size_of(x), peers=copy)
        return Case(lambda: hadamard_int8(x, signs), size_of(x) + x.numel(), peers=copy)

    return make


def _linear(kind: str, sizes: Sizes, rows: int) -> Callable[[torch.device], Case]:
    """in_proj of a block, packed, beside torch's own on fp16 weights."""

    def make(device: torch.device) -> Case:
        inputs, width, outputs = Inputs(device), sizes.width, 2 * sizes.channels
        x, dense = inputs.normal(rows, width), inputs.normal(outputs, width)
        work = 2.0 * rows * width * outputs
        fp16 = {"torch fp16": lambda: F.linear(x, dense)}
        moved = size_of(x) + rows * outputs * 2
        if kind.startswith("w8"):
            weight, scale = inputs.codes(outputs, width), inputs.normal(outputs, dtype=torch.float32).abs() * 0.01
            mode = "token" if kind == "w8a8" else "none"
            return Case(lambda: int8_linear(x, weight, scale, activation=mode), moved + size_of(weight, scale), work,
                        "int8" if mode == "token" else "fp16", peers=fp16)
        if kind.startswith("2:4"):
            int8 = kind == "2:4 w8a8"
            values = inputs.codes(outputs, width // 2) if int8 else inputs.normal(outputs, width // 2)
            mask = torch.full((outputs, width // 8), 0b1010_0101, dtype=torch.uint8, device=device)
            scale = inputs.normal(outputs, dtype=torch.float32).abs() * 0.01 if int8 else None
            mode = "token" if int8 else "none"
            return Case(lambda: nm_linear(x, values, mask, scale, keep=2, of=4, activation=mode),
                        moved + size_of(values, mask, scale), work, "int8" if int8 else "fp16", peers=fp16)
        packed = inputs.codes(outputs, width // 2, low=0, dtype=torch.uint8)
        scale = inputs.normal(outputs, width // 32).abs() * 0.05
        mode = "token" if kind == "w4a8" else "none"
        return Case(lambda: int4_linear(x, packed, scale, group_size=32, activation=mode),
                    moved + size_of(packed, scale), work, "int8" if mode == "token" else "fp16", peers=fp16)

    return make


def _updates(kind: str, sizes: Sizes, batch: int) -> Callable[[torch.device], Case]:
    """One decode step of the recurrence."""

    def make(device: torch.device) -> Case:
        inputs = Inputs(device)
        if kind == "ssd":
            H, P, N = sizes.heads, sizes.head_dim, sizes.ssd_states
            h, A = inputs.normal(batch, H, P, N, dtype=torch.float32), -inputs.normal(H, dtype=torch.float32).exp()
            x, dt = inputs.normal(batch, H, P), inputs.normal(batch, H)
            B, C = inputs.normal(batch, 1, N), inputs.normal(batch, 1, N)
            return Case(lambda: ssd_state_update(h, x, dt, A, B, C), 2 * size_of(h) + 2 * size_of(x),
                        tolerance=max(TRITON_CHUNKED, TRITON_FORWARD[torch.float16]))
        E, N = sizes.channels, sizes.states
        state = quantize_state(inputs.normal(batch, E, N, dtype=torch.float32))
        u, dt, z = (inputs.normal(batch, E) for _ in range(3))
        B, C = inputs.normal(batch, 1, N), inputs.normal(batch, 1, N)
        A = -inputs.normal(E, N, dtype=torch.float32).exp()
        return Case(lambda: selective_state_update_int8(state, u, dt, A, B, C, None, z),
                    2 * size_of(state.codes, state.scale) + size_of(u, dt, z, A, u))

    return make


def cases(sizes: Sizes, peers: dict[str, Any]) -> dict[str, Callable[[torch.device], Case]]:
    """Every case by name, in the order they are measured."""
    found: dict[str, Callable[[torch.device], Case]] = {}
    for batch in sizes.batches:
        at = f"[{batch}, {sizes.length}, {sizes.channels}]"
        found[f"selective_scan fp16 {at}"] = _scan(sizes, batch, False, peers)
        found[f"selective_scan int8 {at}"] = _scan(sizes, batch, True, peers)
        found[f"causal_conv1d {at}"] = _conv(sizes, batch, peers)
        found[f"ssd_scan bf16 [{batch}, {sizes.length}, {sizes.heads}, {sizes.head_dim}]"] = _ssd(sizes, batch, peers)
        for kind in ("ssd", "selective int8"):
            found[f"{kind} state update, batch {batch}"] = _updates(kind, sizes, batch)
    last = sizes.batches[-1]
    found[f"selective_scan bf16, forward and backward [{last}, {sizes.length}, {sizes.channels}]"] = _training_scan(
        sizes, last)
    found[f"ssd_scan bf16, forward and backward [{last}, {sizes.length}, {sizes.heads}, {sizes.head_dim}]"] = (
        _training_ssd(sizes, last))
    for kind in ("w8a8", "w8a16", "w4a8", "w4a16", "2:4 w8a8", "2:4 fp16"):
        for rows in sizes.rows:
            found[f"{kind} [{rows}, {sizes.width}] -> {2 * sizes.channels}"] = _linear(kind, sizes, rows)
    for kind in ("norm", "norm int8", "gated norm", "rotation", "rotation int8"):
        found[f"{kind} [{sizes.rows[-1]}, {sizes.channels}]"] = _rows(kind, sizes, sizes.rows[-1])
    return found


__all__ = ["TINY", "Case", "Inputs", "Sizes", "cases", "size_of"]
