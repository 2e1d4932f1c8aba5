"""Pack weights into integers and say how activations meet them: the pass that makes the artifact small.

Each matrix named in ``maps`` becomes a packed module. Its codes are the ones GPTQ left in ``block.rounded``, or those of
rounding to nearest (optionally with a searched clip). Activations stay float, get a scale a token at run time, or one
static scale chosen here: of the percentiles asked for, the one whose clipped and rounded inputs change the linear's output
least, on a sample of calibration rows. A pooled scale of several quantities is never used: in_proj and x_proj have a scale
a row, and the scan's u, dt, B, C and z are ranged apart, channel by channel.

What is not named stays in float: A_log, D, dt's bias, norms and the convolution always do, since an error in the decay
grows with the sequence. Mean-error correction adds the mean of what the packed block lost to out_proj's bias.

A tied embedding is packed once; the head multiplies the very same codes.

Legend: T tokens, O outputs, I inputs, V vocabulary, D d_model, E d_inner, G groups, N d_state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.heads import TransformedHead
from mambacompress.models.mixers import S6Mixer
from mambacompress.models.modelmap import Block, ModelMap, set_module
from mambacompress.models.packed import ActivationFormat, PackedEmbedding, PackedHead, PackedLinear, WeightFormat
from mambacompress.models.paths import Path, ScanQuantizer
from mambacompress.numerics import sqnr_db
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.observers import RowSample, watching
from mambacompress.passes.rounding import Grid, check_groups, checked_weight, searched_scales, widest_scales
from mambacompress.schema import MapFormat, QuantizeConfig

_SWEEP_TOKENS = 4096
"""Calibration tokens on which the scan's clipping is chosen."""


class Quantize(Pass):
    """See the module."""

    name = "quantize"
    rank = 50

    def __init__(self, config: QuantizeConfig) -> None:
        self.config = config

    # -- plan --------------------------------------------------------------------------------------------------------

    def plan(self, model_map: ModelMap) -> Plan:
        plan = Plan()
        for block in model_map.blocks:
            for path, sites in block.matrices().items():
                tensor, format_ = sites[0].tensor, self.config.of(sites[0].tensor)
                if format_ is None:
                    continue
                rows, columns = block.module.get_submodule(path).weight.shape
                grid = _grid(format_)
                check_groups(f"block {block.index} {tensor}", columns, grid)
                plan.edits.append(Edit(self.name, block.index, tensor, f"{format_.weights} {grid.described}, activations "
                                       f"{format_.activations}", bits=_bits(grid, columns)))
            self._plan_scan(plan, block)
        self._plan_ends(plan, model_map)
        return plan

    def _plan_scan(self, plan: Plan, block: Block) -> None:
        if self.config.scan == "none":
            return
        if not isinstance(block.mixer, S6Mixer):
            plan.refusals.append(Refusal(self.name, block.index, "scan", "int8 inputs are built for the Mamba-1 scan"))
        elif len(block.mixer.paths) > 1:
            plan.refusals.append(Refusal(self.name, block.index, "scan", "int8 inputs are built for mixers of one path"))
        else:
            plan.edits.append(Edit(self.name, block.index, "scan", "int8 u, dt, B, C and z, static, a scale a channel"))

    def _plan_ends(self, plan: Plan, model_map: ModelMap) -> None:
        embedding, head = self.config.of("embedding"), self.config.of("head")
        columns = model_map.embedding.weight.shape[1]
        if embedding is not None:
            check_groups("the embedding", columns, _grid(embedding))
            note = ""
            if embedding.bits == 4 and sum(shape.numel() for _, shape in model_map.matrices().values()) < 10**9:
                note = "; 4 bits cost several points below a billion parameters"
            plan.edits.append(Edit(self.name, None, "embedding", f"{embedding.weights} {_grid(embedding).described}{note}",
                                   bits=_bits(_grid(embedding), columns)))
        if head is None:
            return
        check_groups("the head", columns, _grid(head))
        if model_map.tied and embedding is None:
            plan.refusals.append(Refusal(self.name, None, "head", "it shares the embedding's weight, which stays in float"))
            return
        if model_map.tied and embedding is not None and _grid(head) != _grid(embedding):
            raise UserError("the head shares the embedding's weight, so both are stored in one format",
                            "give embedding and head the same weights and group_size")
        plan.edits.append(Edit(self.name, None, "head", f"{head.weights}, activations {head.activations}"
                               + (", the embedding's own codes" if model_map.tied else ""),
                               bits=0.0 if model_map.tied else _bits(_grid(head), columns)))

    # -- blocks ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        formats = {path: format_ for path, sites in block.matrices().items()
                   if (format_ := self.config.of(sites[0].tensor)) is not None}
        samples = self._observe(block, calibration, formats)
        report: dict[str, Any] = {}
        for path, format_ in formats.items():
            linear, name = block.module.get_submodule(path), path.removeprefix("mixer.")
            packed, act = self._pack(block, path, linear, format_, samples.get(path))
            report[f"{name}.sqnr_db"] = _rounded(sqnr_db(linear.weight, packed.dequantize(linear.weight.dtype)))
            report |= {f"{name}.{key}": value for key, value in act.items()}
            block.replace(path, packed)
        if self.config.scan == "int8" and isinstance(block.mixer, S6Mixer) and len(block.mixer.paths) == 1:
            report["scan.percentile"] = self._quantize_scan(block, calibration)
        if self.config.bias_correction and not calibration.trial:
            report |= self._correct_bias(block, calibration)
        return report

    def _observe(self, block: Block, calibration: Calibration, formats: dict[str, MapFormat]) -> dict[str, RowSample]:
        """One run for everything a static range or a searched scale needs."""
        wanted = {path: RowSample() for path, format_ in formats.items()
                  if format_.activations.endswith("tensor") or self._searches(block, path)}
        if wanted:
            with watching(block, wanted, lambda path, x_TI: wanted[path].add(x_TI)):
                for h_BLD in calibration.batches():
                    block.module(h_BLD)
        return wanted

    def _searches(self, block: Block, path: str) -> bool:
        return self.config.scale_search and path not in block.rounded

    def _pack(self, block: Block, path: str, linear: nn.Module, format_: MapFormat,
              sample: RowSample | None) -> tuple[PackedLinear, dict[str, Any]]:
        grid, where = _grid(format_), f"block {block.index} {path}"
        weight_OI = checked_weight(linear.weight.data, where)
        if path in block.rounded:
            codes_OI, scales_OG = block.rounded[path]
        else:
            importance_I = sample.mean_square_I if sample is not None and self._searches(block, path) else None
            scales_OG = (searched_scales(weight_OI, grid, importance_I) if self._searches(block, path)
                         else widest_scales(weight_OI, grid))
            codes_OI = grid.round(weight_OI, scales_OG)
        activations = _activations(format_)
        act_scale, report = None, {}
        if activations.mode == "tensor" and sample is not None:
            weight = grid.dequantize(codes_OI, scales_OG)
            percentile, act_scale = best_range(sample, weight, activations.bits, self.config.percentile)
            report = {"act_scale": _rounded(act_scale, 6), "percentile": percentile}
        bias = getattr(linear, "bias", None)
        packed = PackedLinear.from_float(None, bias, weights=_weights(format_), activations=activations, act_scale=act_scale,
                                         codes=codes_OI, scale=_stored_scale(scales_OG, format_))
        return packed, report

    def _quantize_scan(self, block: Block, calibration: Calibration) -> float:
        """Range the scan's inputs channel by channel; of the percentiles, take the one of least block error."""
        path = block.mixer.paths[0]
        assert isinstance(path, Path)
        samples: dict[str, RowSample] = {name: RowSample(8192) for name in ScanQuantizer.NAMES}

        def observe(name: str, value: Tensor) -> None:
            if name in samples:
                samples[name].add(value.flatten(0, 1).flatten(1))

        path.scan_quantizer = None
        calibration.run(block, observe)
        groups, states = path.projection.groups, path.projection.d_state
        candidates = self.config.percentile if not calibration.trial else self.config.percentile[:1]
        best, least = None, float("inf")
        for percentile in candidates:
            quantizer = ScanQuantizer(block.mixer.d_inner, groups, states)
            for name, sample in samples.items():
                _set_scale(quantizer.get_buffer(f"scale_{name}"), sample.rows(), percentile)
            path.scan_quantizer = quantizer.to(path.A_log.device)
            error = _short_error(block, calibration) if len(candidates) > 1 else 0.0
            if error < least:
                best, least = (percentile, quantizer), error
        if best is None:
            raise UserError(f"block {block.index}: the int8 scan gives NaN or Inf", "check the model's weights")
        path.scan_quantizer = best[1]
        return best[0]

    def _correct_bias(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        """Add the block's mean error to out_proj's bias; kept where the block's error falls."""
        packed = block.mixer.out_proj
        if not isinstance(packed, PackedLinear):
            return {}
        before = calibration.error(block)
        missing_D, tokens = torch.zeros(packed.out_features, dtype=torch.float64, device=packed.qweight.device), 0
        for h_BLD, reference_BLD in zip(calibration.batches(), calibration.reference(), strict=True):
            missing_D += (reference_BLD.double() - block.module(h_BLD).double()).sum((0, 1))
            tokens += h_BLD.shape[0] * h_BLD.shape[1]
        old = packed.bias
        packed.bias = (missing_D / tokens + (0 if old is None else old.double())).float()
        after = calibration.error(block)
        if after >= before:
            packed.bias = old
        return {"bias_correction.before": _rounded(before, 6), "bias_correction.after": _rounded(min(before, after), 6)}

    # -- ends --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_embedding(self, model_map: ModelMap) -> dict[str, Any]:
        format_ = self.config.of("embedding")
        if format_ is None:
            return {}
        weight_VD = checked_weight(model_map.embedding.weight.data, "the embedding").float()
        grid = _grid(format_)
        scales = searched_scales(weight_VD, grid) if self.config.scale_search else widest_scales(weight_VD, grid)
        packed = PackedEmbedding.from_float(weight_VD, weights=_weights(format_), codes=grid.round(weight_VD, scales),
                                            scale=_stored_scale(scales, format_))
        set_module(model_map.host, model_map.embedding.path, packed)
        return {"embedding.sqnr_db": _rounded(sqnr_db(weight_VD, packed.dequantize()))}

    @torch.no_grad()
    def apply_head(self, model_map: ModelMap, calibration: Calibration) -> dict[str, Any]:
        format_, head, embedding = self.config.of("head"), model_map.head.module, model_map.embedding.module
        if format_ is None or (model_map.tied and not isinstance(embedding, PackedEmbedding)):
            return {}
        transform = head.transform if isinstance(head, TransformedHead) else None
        inputs = (model_map.final_norm(h_BLD).flatten(0, 1) for h_BLD in calibration.batches())
        activations = _activations(format_)
        report: dict[str, Any] = {}
        weight_VD = (embedding.dequantize() if isinstance(embedding, PackedEmbedding) and model_map.tied
                     else checked_weight(head.weight.data, "the head").float())
        act_scale = None
        if activations.mode == "tensor":
            sample = RowSample(512)
            for x_TD in inputs:
                sample.add(x_TD if transform is None else x_TD @ transform.to(x_TD.dtype))
            percentile, act_scale = best_range(sample, weight_VD, activations.bits, self.config.percentile)
            report = {"head.act_scale": _rounded(act_scale, 6), "head.percentile": percentile}
        stored = None if transform is None else _half_if_harmless(transform)
        if model_map.tied and isinstance(embedding, PackedEmbedding):
            packed = PackedHead.sharing(embedding, activations=activations, act_scale=act_scale, transform=stored)
        else:
            grid = _grid(format_)
            scales = searched_scales(weight_VD, grid) if self.config.scale_search else widest_scales(weight_VD, grid)
            packed = PackedHead.from_float(weight_VD, getattr(head, "bias", None), weights=_weights(format_),
                                           activations=activations, act_scale=act_scale, transform=stored,
                                           codes=grid.round(weight_VD, scales), scale=_stored_scale(scales, format_))
            report["head.sqnr_db"] = _rounded(sqnr_db(weight_VD, packed.dequantize()))
        set_module(model_map.host, model_map.head.path, packed)
        return report


def best_range(sample: RowSample, weight_OI: Tensor, bits: int, percentiles: tuple[float, ...]) -> tuple[float, float]:
    """(percentile, scale) whose rounded inputs change the linear's output least: min over p of ‖(x̂ − x) Wᵀ‖²."""
    top = 127 if bits == 8 else 7
    rows_TI = sample.rows().float()
    weight_OI = weight_OI.to(rows_TI.dtype)
    best = (percentiles[0], max(sample.range_at(percentiles[0]), 1e-12) / top)
    least = float("inf")
    for percentile in percentiles if len(percentiles) > 1 else ():
        scale = max(sample.range_at(percentile), 1e-12) / top
        rounded_TI = torch.clamp(torch.round(rows_TI / scale), -top, top) * scale
        error = ((rounded_TI - rows_TI) @ weight_OI.T).square().sum().item()
        if error < least:
            best, least = (percentile, scale), error
    return best


def _set_scale(buffer: Tensor, rows_TC: Tensor, percentile: float) -> None:
    """A scale a channel from the percentile of its magnitudes; a channel that is always zero gets 1."""
    magnitudes_TC = rows_TC.abs()
    if percentile >= 100:
        peak_C = magnitudes_TC.amax(0)
    else:
        rank = max(1, min(len(magnitudes_TC), round(percentile / 100 * len(magnitudes_TC))))
        peak_C = magnitudes_TC.kthvalue(rank, dim=0).values
    scale_C = torch.where(peak_C > 0, peak_C / 127, torch.ones_like(peak_C))
    buffer.copy_(scale_C.reshape(buffer.shape))


def _short_error(block: Block, calibration: Calibration) -> float:
    """Squared error of the block's output on the first few thousand calibration tokens."""
    wrong, tokens = 0.0, 0
    for h_BLD, reference_BLD in _pairs(calibration):
        wrong += (block.module(h_BLD).double() - reference_BLD.double()).square().sum().item()
        tokens += h_BLD.shape[0] * h_BLD.shape[1]
        if tokens >= _SWEEP_TOKENS:
            break
    return wrong


def _pairs(calibration: Calibration) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(calibration.batches(), calibration.reference(), strict=True)


def _grid(format_: MapFormat) -> Grid:
    return Grid(format_.bits, format_.group_size)


def _weights(format_: MapFormat) -> WeightFormat:
    return WeightFormat(format_.bits, format_.group_size)


def _activations(format_: MapFormat) -> ActivationFormat:
    if format_.activations == "none":
        return ActivationFormat()
    kind, _, mode = format_.activations.partition("-")
    return ActivationFormat(mode, 8 if kind == "int8" else 4)


def _stored_scale(scales_OG: Tensor, format_: MapFormat) -> Tensor:
    return scales_OG[:, 0] if format_.group_size is None else scales_OG


def _bits(grid: Grid, columns: int) -> float:
    """Bits a weight, scales included: fp32 a row, fp16 a group."""
    return grid.bits + (32 / columns if grid.group_size is None else 16 / grid.group_size)


def _half_if_harmless(transform: Tensor) -> Tensor:
    """fp16 where it keeps 60 dB of the matrix, else fp32."""
    half = transform.half()
    return half if torch.isfinite(half).all() and sqnr_db(transform, half) > 60 else transform.float()


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{min(value, 999.0):.{digits}g}")


__all__ = ["Quantize", "best_range"]
