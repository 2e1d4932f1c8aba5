"""Every op against fp64: how far off it is typically and at worst.

The fp64 result is the reference's own, on the inputs as rounded to the op's dtype. An error is |op - fp64| over the RMS
of the fp64 result; *typical* is the median over all elements and problems, *worst* the largest. For gradients the loss
is a random weighting of both outputs. Integer linears are compared with the exact product of the very codes they round
their input to: rounding the input is the recipe's choice, not the kernel's error. What is exact has no row, only tests:
norms and rotation with an int8 output, whose codes are those of the float op, and the lookup in a sparse embedding.

Legend: B batch, L tokens, E channels, N d_state, G groups, H heads, P head_dim, T rows, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_reference,
    same_conv1d,
    same_conv1d_reference,
)
from mambacompress.kernels.divergence import divergence, token_losses
from mambacompress.kernels.hadamard import hadamard, hadamard_reference
from mambacompress.kernels.int4_linear import dequantize_int4, int4_linear
from mambacompress.kernels.int8_linear import int8_linear, quantize_rows
from mambacompress.kernels.mixer_prefill import mixer_prefill
from mambacompress.kernels.mixer_prefill.reference import mixer_prefill_reference
from mambacompress.kernels.mixer_step import (
    BlockState,
    Conv,
    Matrix,
    S6Block,
    SSDBlock,
    mixer_step,
    mixer_step_reference,
)
from mambacompress.kernels.nm_linear import nm_linear
from mambacompress.kernels.nm_linear.reference import expand, kept_values, pack_positions
from mambacompress.kernels.rms_norm import gated_rms_norm, gated_rms_norm_reference, rms_norm, rms_norm_reference
from mambacompress.kernels.selective_scan import selective_scan, selective_scan_reference
from mambacompress.kernels.selective_state_update import selective_state_update, selective_state_update_reference
from mambacompress.kernels.ssd_scan import ssd_scan, ssd_scan_sequential
from mambacompress.kernels.ssd_state_update import ssd_state_update, ssd_state_update_reference
from mambacompress.nm import Pattern, nm_mask

READING = ("Errors are relative to the RMS of the fp64 result on the same rounded inputs: the median and the largest "
           "of all elements. bf16 results carry their own rounding, 2^-9 of an element that may be many times the RMS.")
Op = Callable[..., Any]
FLOATS = (torch.float32, torch.bfloat16)


@dataclass
class Errors:
    """One line: op, what of it, dtype; the median and the largest relative error."""

    op: str
    what: str
    dtype: str
    typical: float
    worst: float


class Random:
    """Reproducible inputs."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def decay(self, *shape: int) -> Tensor:
        """A: negative, between -16 and -1, as Mamba's initialisation spreads it."""
        return -(1 + 15 * torch.rand(*shape, generator=self._generator))

    def codes(self, low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def steps(self, *shape: int) -> Tensor:
        """dt before softplus: softplus of it lies mostly between 0.001 and 0.1."""
        return self.normal(*shape) - 4


def measure(problems: int = 3) -> Iterator[Errors]:
    """Every op on ``problems`` random problems."""
    for op, what, dtype, runs in _cases():
        relative: list[Tensor] = []
        for seed in range(problems):
            for got, exact in runs(Random(seed)):
                scale = exact.double().square().mean().sqrt().clamp(min=1e-300)
                relative.append(((got.double() - exact.double()).abs() / scale).flatten())
        errors = torch.cat(relative)
        yield Errors(op, what, str(dtype).removeprefix("torch."), float(errors.median()), float(errors.max()))


def table(rows: list[Errors]) -> str:
    """Markdown, with how to read it."""
    lines = ["| op | what | dtype | typical | worst |", "|---|---|---|---:|---:|"]
    lines += [f"| {row.op} | {row.what} | {row.dtype} | {row.typical:.1e} | {row.worst:.1e} |"
              for row in rows]
    ran = "Native code ran." if native.library() is not None else f"No native code ran: {native.why_not()}."
    return "\n".join([*lines, "", f"{READING} {ran}"])


Runs = Callable[[Random], Iterator[tuple[Tensor, Tensor]]]


def _cases() -> Iterator[tuple[str, str, torch.dtype, Runs]]:
    for name, op, reference, inputs in (
        ("selective_scan", selective_scan, selective_scan_reference, _scan_inputs),
        ("ssd_scan", ssd_scan, ssd_scan_sequential, _ssd_inputs),
        ("causal_conv1d", causal_conv1d, causal_conv1d_reference, _conv_inputs),
        ("same_conv1d", same_conv1d, same_conv1d_reference, _conv_inputs),
    ):
        for dtype in FLOATS:
            yield name, "outputs", dtype, _forward(op, reference, inputs, dtype)
            yield name, "gradients", dtype, _gradients(op, reference, inputs, dtype)
    for name, op, reference, inputs in (
        ("selective_state_update", selective_state_update, selective_state_update_reference, _step_inputs),
        ("ssd_state_update", ssd_state_update, ssd_state_update_reference, _ssd_step_inputs),
        ("rms_norm", rms_norm, rms_norm_reference, lambda r: [r.normal(64, 768), r.normal(768)]),
        ("gated_rms_norm", _grouped(gated_rms_norm), _grouped(gated_rms_norm_reference),
         lambda r: [r.normal(64, 1536), r.normal(64, 1536), r.normal(1536)]),
        ("hadamard", hadamard, hadamard_reference, lambda r: [r.normal(64, 1536)]),
    ):
        for dtype in FLOATS:
            yield name, "outputs", dtype, _forward(op, reference, inputs, dtype)
    yield "causal_conv1d", "int8 inputs and weights", torch.float32, _int8_conv
    for rows in (1, 64):
        for mode in ("token", "none"):
            what = f"{'per-token' if mode == 'token' else 'float'} activations, {rows} row{'s' * (rows > 1)}"
            yield "int8_linear", what, torch.float32, _int8(rows, mode)
            yield "int4_linear", f"groups of 64, {what}", torch.float32, _int4(rows, mode)
            yield "nm_linear", f"int8 2:4, {what}", torch.float32, _sparse(rows, mode)
    for batch in (1, 8):
        yield "mixer_step", f"Mamba-1 and Mamba-2 block, batch {batch}", torch.float32, _mixer(batch)
    yield "mixer_prefill", "Mamba-1 and Mamba-2 block, 2 x 64 tokens", torch.float32, _mixer(2, 64)
    yield "divergence", "losses", torch.float32, _losses
    yield "divergence", "KL divergences of 1e-4", torch.float32, _divergences


def _results(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    found = op(*inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def _forward(op: Op, reference: Op, make: Callable[[Random], list[Tensor]], dtype: torch.dtype) -> Runs:
    def run(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
        inputs = [x.to(dtype) for x in make(random)]
        with torch.no_grad():
            yield from zip(_results(op, inputs), _results(reference, [x.double() for x in inputs]), strict=True)

    return run


def _gradients(op: Op, reference: Op, make: Callable[[Random], list[Tensor]], dtype: torch.dtype) -> Runs:
    def run(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
        inputs = [x.to(dtype) for x in make(random)]
        weights: list[Tensor] = []
        both = []
        for function, leaves in ((op, inputs), (reference, [x.double() for x in inputs])):
            leaves = [x.requires_grad_() for x in leaves]
            found = _results(function, leaves)
            weights = weights or [random.normal(*y.shape).to(y.dtype) for y in found]
            loss = sum((y * w.to(y.dtype)).sum() for y, w in zip(found, weights, strict=True))
            both.append(torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]
        yield from zip(*both, strict=True)

    return run


def _scan_inputs(random: Random) -> list[Tensor]:
    B, L, E, N = 2, 200, 96, 16
    return [random.normal(B, L, E), random.steps(B, L, E), random.decay(E, N), random.normal(B, L, 1, N),
            random.normal(B, L, 1, N), random.normal(E), random.normal(B, L, E)]


def _step_inputs(random: Random) -> list[Tensor]:
    B, E, N = 8, 768, 16
    return [random.normal(B, E, N), random.normal(B, E), random.steps(B, E), random.decay(E, N),
            random.normal(B, 1, N), random.normal(B, 1, N), random.normal(E), random.normal(B, E)]


def _ssd_inputs(random: Random) -> list[Tensor]:
    B, L, H, P, G, N = 2, 200, 4, 32, 1, 64
    return [random.normal(B, L, H, P), random.steps(B, L, H), random.decay(H), random.normal(B, L, G, N),
            random.normal(B, L, G, N), random.normal(H)]


def _ssd_step_inputs(random: Random) -> list[Tensor]:
    B, H, P, G, N = 8, 24, 64, 1, 64
    return [random.normal(B, H, P, N), random.normal(B, H, P), random.steps(B, H), random.decay(H),
            random.normal(B, G, N), random.normal(B, G, N), random.normal(H)]


def _conv_inputs(random: Random) -> list[Tensor]:
    return [random.normal(2, 200, 96), random.normal(96, 4), random.normal(96)]


def _int8_conv(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
    x, weight = random.codes(-127, 128, torch.int8, 2, 200, 96), random.codes(-127, 128, torch.int8, 96, 4)
    scales = random.normal(96).abs() / 64, random.normal(96).abs() / 64
    bias = random.normal(96)
    y, _ = causal_conv1d(x, weight, bias, x_scale=scales[0], weight_scale_E=scales[1])
    exact, _ = causal_conv1d_reference(x.double() * scales[0].double(), weight.double() * scales[1].double()[:, None],
                                       bias.double())
    yield y, exact


def _grouped(op: Op) -> Op:
    return lambda x, z, weight: op(x, z, weight, 1e-5, 768)


def _exact_product(x_TI: Tensor, weight_OI: Tensor, mode: str) -> Tensor:
    """fp64 x Wᵀ, x as the op rounds it."""
    if mode == "none":
        return x_TI.double() @ weight_OI.T
    q_TI, scale_T1 = quantize_rows(x_TI, mode)
    return q_TI.double() @ weight_OI.T * scale_T1.double()


def _int8(rows: int, mode: str) -> Runs:
    def run(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
        x_TI, q_OI = random.normal(rows, 768), random.codes(-127, 128, torch.int8, 512, 768)
        scale_O = random.normal(512).abs()
        with torch.no_grad():
            yield (int8_linear(x_TI, q_OI, scale_O, activation=mode),
                   _exact_product(x_TI, q_OI.double() * scale_O.double()[:, None], mode))

    return run


def _int4(rows: int, mode: str) -> Runs:
    def run(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
        x_TI, q_OI = random.normal(rows, 768), random.codes(0, 256, torch.uint8, 512, 384)
        scale_OG = random.normal(512, 12).abs().half()
        with torch.no_grad():
            yield (int4_linear(x_TI, q_OI, scale_OG, group_size=64, activation=mode),
                   _exact_product(x_TI, dequantize_int4(q_OI, scale_OG, None, torch.float64), mode))

    return run


def _sparse(rows: int, mode: str) -> Runs:
    def run(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
        x_TI, q_OI = random.normal(rows, 768), random.codes(-127, 128, torch.int8, 512, 768)
        mask_OI, scale_O = nm_mask(q_OI.abs().int(), Pattern(2, 4)), random.normal(512).abs()
        values_OV, positions_OB = kept_values(q_OI, mask_OI), pack_positions(mask_OI, 2, 4)
        exact_OI = expand(values_OV.double(), positions_OB, 768, 2, 4) * scale_O.double()[:, None]
        with torch.no_grad():
            yield (nm_linear(x_TI, values_OV, positions_OB, scale_O, keep=2, of=4, activation=mode),
                   _exact_product(x_TI, exact_OI, mode))

    return run


def _losses(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
    logits_NV, targets_N = 4 * random.normal(64, 4096), random.codes(0, 4096, torch.int64, 64)
    yield (token_losses(logits_NV, targets_N),
           torch.nn.functional.cross_entropy(logits_NV.double(), targets_N, reduction="none"))


def _divergences(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
    baseline_NV, targets_N = 4 * random.normal(64, 4096), random.codes(0, 4096, torch.int64, 64)
    logits_NV = baseline_NV + 0.014 * random.normal(64, 4096)
    p_NV, q_NV = (x.double().log_softmax(-1) for x in (baseline_NV, logits_NV))
    yield divergence(logits_NV, baseline_NV, targets_N).kl, (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def _mixer(batch: int, tokens: int = 0) -> Runs:
    """A decode step, or ``tokens`` of a prefill."""

    def run(random: Random) -> Iterator[tuple[Tensor, Tensor]]:
        D, E, N, R, H = 192, 384, 16, 12, 6

        def matrix(outputs: int, inputs: int) -> Matrix:
            return Matrix(random.normal(outputs, inputs) / inputs**0.5)

        s6 = S6Block(random.normal(D), 1e-5, matrix(2 * E, D), Conv(random.normal(E, 4), random.normal(E), None),
                     matrix(R + 2 * N, E), matrix(E, R), random.decay(E, N), random.normal(E), random.normal(E) - 4,
                     None, matrix(D, E))
        mixed = E + 2 * N
        ssd = SSDBlock(random.normal(D), 1e-5, matrix(E + mixed + H, D),
                       Conv(random.normal(mixed, 4), random.normal(mixed), None), random.decay(H), random.normal(H),
                       random.normal(H) - 4, (0.0, float("inf")), random.normal(E), 1e-5, matrix(D, E), states=N)
        states = [BlockState(random.normal(batch, 3, E), random.normal(batch, E, N)),
                  BlockState(random.normal(batch, 3, mixed), random.normal(batch, H, E // H, N))]
        h = random.normal(batch, *([tokens] if tokens else []), D)
        op, reference = ((mixer_prefill, mixer_prefill_reference) if tokens else (mixer_step, mixer_step_reference))
        with torch.no_grad():
            y, new = op(h, [s6, ssd], states)
            exact_y, exact = reference(h.double(), [_doubled(s6), _doubled(ssd)],
                                       [BlockState(*(x.double() for x in state)) for state in states])
        yield y, exact_y
        for got, wanted in zip(new, exact, strict=True):
            yield from zip(got, wanted, strict=True)

    return run


def _doubled(record: Any) -> Any:
    """A record with every float tensor in fp64, nested records too."""
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(record):
        value = getattr(record, entry.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            changes[entry.name] = value.double()
        elif dataclasses.is_dataclass(value):
            changes[entry.name] = _doubled(value)
    return dataclasses.replace(record, **changes)


__all__ = ["Errors", "measure", "table"]
