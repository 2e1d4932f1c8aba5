"""Pack weights into integers and say how activations meet them: the pass that makes the artifact small.

Each matrix named in ``maps`` becomes a packed module. Its codes are the ones GPTQ left in ``block.rounded``, or those
of rounding to nearest (optionally with a searched clip). Activations stay float, get a scale a token at run time, or
one static scale chosen here: of the percentiles asked for, the one whose clipped and rounded inputs change the linear's
output least, on a sample of calibration rows. A pooled scale of several quantities is never used: in_proj and x_proj
have a scale a row, and the scan's u, dt, B, C and z are ranged apart, channel by channel.

What is not named stays in float: A_log, D, dt's bias, norms and the convolution always do, since an error in the decay
grows with the sequence. Mean-error correction adds the mean of what the packed block lost to out_proj's bias.

A tied embedding is packed once; the head multiplies the very same codes.

Legend: T tokens, O outputs, I inputs, V vocabulary, D d_model, E d_inner, G groups, N d_state.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.heads import TransformedHead
from mambacompress.models.mixers import S6Mixer
from mambacompress.models.modelmap import Block, ModelMap, set_module
from mambacompress.models.packed import PackedEmbedding, PackedHead, PackedLinear
from mambacompress.models.packed_sparse import (
    PackedSparseEmbedding,
    PackedSparseHead,
    PackedSparseLinear,
)
from mambacompress.models.paths import Path, ScanQuantizer
from mambacompress.nm import Pattern
from mambacompress.numerics import Grid
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.formats import (
    activations_of,
    check_sparse,
    grid_of,
    packed_bytes,
    stored_scale,
    weights_of,
)
from mambacompress.passes.observers import RowSample, watching
from mambacompress.passes.rounding import (
    HARMLESS_DB,
    check_groups,
    half_if_harmless,
    halve_rest,
    round_weight,
    weight_sqnr_db,
)
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
                shape = block.module.get_parameter(f"{path}.weight").shape
                check_groups(f"block {block.index} {tensor}", shape[1], grid_of(format_))
                pattern = block.patterns.get(path)
                check_sparse(f"block {block.index} {tensor}", tensor, format_, pattern)
                plan.edits.append(self._edit(block.index, tensor, format_, shape, pattern=pattern))
            self._plan_scan(plan, block)
            if self.config.rest == "float16":
                plan.edits.append(Edit(self.name, block.index, "rest", "unpacked matrices in float16 where that keeps "
                                       f"{HARMLESS_DB} dB of one"))
        self._plan_ends(plan, model_map)
        self._plan_coverage(plan, model_map)
        return plan

    def _edit(self, block: int | None, tensor: str, format_: MapFormat, shape: torch.Size, note: str = "",
              pattern: Pattern | None = None) -> Edit:
        size = packed_bytes(shape, format_, pattern)
        sparse = "" if pattern is None else f"{pattern} sparse "
        return Edit(self.name, block, tensor, f"{sparse}{format_.weights} {grid_of(format_).described}, activations "
                    f"{format_.activations}, {size:,} bytes{note}", bits=8 * size / shape.numel())

    def _plan_coverage(self, plan: Plan, model_map: ModelMap) -> None:
        """What is packed of what there is, tensor by tensor and in all; nothing at all is an error."""
        count, packed, values = Counter[str](), Counter[str](), Counter[bool]()
        for tensor, shape in model_map.matrices().values():
            covered = self.config.of(tensor) is not None
            count[tensor] += 1
            packed[tensor] += covered
            values[covered] += shape.numel()
        if not values[True]:
            raise UserError(f"quantize matches nothing: this model has no {', '.join(self.config.maps)}",
                            f"name some of {', '.join(count)} in `maps`")
        for tensor in self.config.maps:
            if not count[tensor] and not (tensor == "head" and model_map.tied):
                plan.refusals.append(Refusal(self.name, None, tensor, f"this model has no {tensor}"))
        what = ", ".join(f"{tensor} {packed[tensor]}/{total}" for tensor, total in count.items())
        share = values[True] / values.total()
        plan.edits.append(Edit(self.name, None, "coverage", f"{what}; {share:.1%} of the matrix bytes"))

    def _plan_scan(self, plan: Plan, block: Block) -> None:
        if self.config.scan == "none":
            return
        if not isinstance(block.mixer, S6Mixer):
            plan.refusals.append(Refusal(self.name, block.index, "scan", "int8 inputs are built for the Mamba-1 scan"))
        elif len(block.mixer.paths) > 1:
            plan.refusals.append(Refusal(self.name, block.index, "scan", "int8 inputs are built for one scan path"))
        else:
            plan.edits.append(Edit(self.name, block.index, "scan", "int8 u, dt, B, C and z, static, a scale a channel"))

    def _plan_ends(self, plan: Plan, model_map: ModelMap) -> None:
        embedding, head = self.config.of("embedding"), self.config.of("head")
        shape = model_map.embedding.weight.shape
        if model_map.tied and (embedding is None) != (head is None):
            named, missing = ("head", "embedding") if embedding is None else ("embedding", "head")
            raise UserError(f"embedding and head of this model share one matrix, and quantize names only the {named}",
                            f"add {missing} to `maps`, or take {named} out")
        if embedding is not None:
            check_groups("the embedding", shape[1], grid_of(embedding))
            pattern = model_map.pattern if model_map.tied else None
            check_sparse("the embedding", "embedding and head", embedding, pattern)
            note = ""
            if embedding.bits == 4 and sum(shape.numel() for _, shape in model_map.matrices().values()) < 10**9:
                note = "; 4 bits cost several points below a billion parameters"
                warnings.warn("a 4-bit embedding costs several points of accuracy below a billion parameters; int8 is "
                              "safe", stacklevel=3)
            plan.edits.append(self._edit(None, "embedding", embedding, shape, note, pattern))
        if head is None:
            return
        check_groups("the head", shape[1], grid_of(head))
        if not model_map.tied:
            check_sparse("the head", "head", head, model_map.pattern)
            plan.edits.append(self._edit(None, "head", head, model_map.head.weight.shape, pattern=model_map.pattern))
            return
        if embedding is not None and grid_of(head) != grid_of(embedding):
            raise UserError("the head shares the embedding's weight, so both are stored in one format",
                            "give embedding and head the same weights and group_size")
        plan.edits.append(Edit(self.name, None, "head", f"{head.weights}, activations {head.activations}, the "
                               "embedding's own codes", bits=0.0))

    # -- blocks ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        formats = {path: format_ for path, sites in block.matrices().items()
                   if (format_ := self.config.of(sites[0].tensor)) is not None}
        samples = self._observe(block, calibration, formats)
        report: dict[str, Any] = {}
        for path, format_ in formats.items():
            packed, made = self._pack(block, path, format_, samples.get(path), calibration.trial)
            report |= {f"{path.removeprefix('mixer.')}.{key}": value for key, value in made.items()}
            block.replace(path, packed)
        if self.config.scan == "int8" and isinstance(block.mixer, S6Mixer) and len(block.mixer.paths) == 1:
            report["scan.percentile"] = self._quantize_scan(block, block.mixer, calibration)
        if self.config.rest == "float16":
            halve_rest(block)
        if self.config.bias_correction and not calibration.trial:
            report |= self._correct_bias(block, calibration)
        return report

    def _observe(self, block: Block, calibration: Calibration, formats: dict[str, MapFormat]) -> dict[str, RowSample]:
        """One run for everything a static range or a searched scale needs."""
        wanted = {path: RowSample() for path, format_ in formats.items()
                  if format_.activations.endswith("tensor") or self._searches(block, path, calibration.trial)}
        if wanted:
            with watching(block, wanted, lambda path, x_TI: wanted[path].add(x_TI)):
                for h_BLD in calibration.batches():
                    block.module(h_BLD)
        return wanted

    def _searches(self, block: Block, path: str, trial: bool) -> bool:
        return self.config.scale_search and not trial and path not in block.rounded

    def _pack(self, block: Block, path: str, format_: MapFormat, sample: RowSample | None,
              trial: bool) -> tuple[PackedLinear | PackedSparseLinear, dict[str, Any]]:
        grid, where = grid_of(format_), f"block {block.index} {path.removeprefix('mixer.')}"
        linear = block.module.get_submodule(path)
        weight_OI = block.module.get_parameter(f"{path}.weight").data
        mask_OI, pattern = block.masks.get(path), block.patterns.get(path)
        stored = packed_bytes(weight_OI.shape, format_, None if mask_OI is None else pattern)
        report: dict[str, Any] = {"bits": _rounded(8 * stored / weight_OI.numel())}
        if path in block.rounded:
            codes_OI, scales_OG = block.rounded[path]
            if not torch.equal(grid.dequantize(codes_OI, scales_OG).to(weight_OI.dtype), weight_OI):
                raise RuntimeError(f"{where} was edited after gptq had chosen its codes")
        else:
            search = self._searches(block, path, trial)
            importance_I = sample.mean_square_I if sample is not None and search else None
            codes_OI, scales_OG = round_weight(weight_OI, grid, where, search=search, importance_I=importance_I)
            if not trial:
                report["sqnr_db"] = _rounded(weight_sqnr_db(weight_OI, codes_OI, scales_OG, grid))
        activations = activations_of(format_)
        act_scale = None
        if activations.mode == "tensor" and sample is not None:
            weight = grid.dequantize(codes_OI, scales_OG)
            percentile, act_scale = best_range(sample, weight, activations.bits, self.config.percentile)
            report |= {"act_scale": _rounded(act_scale, 6), "percentile": percentile}
        bias = getattr(linear, "bias", None)
        scale = stored_scale(scales_OG, format_)
        if mask_OI is not None and pattern is not None:
            return PackedSparseLinear.from_mask(codes_OI, mask_OI, pattern, bias, scale=scale, activations=activations,
                                                act_scale=act_scale), report
        return PackedLinear.from_float(None, bias, weights=weights_of(format_), activations=activations,
                                       act_scale=act_scale, codes=codes_OI, scale=scale), report

    def _quantize_scan(self, block: Block, mixer: S6Mixer, calibration: Calibration) -> float:
        """Range the scan's inputs channel by channel; of the percentiles, take the one of least block error."""
        path = mixer.paths[0]
        assert isinstance(path, Path)
        samples: dict[str, RowSample] = {name: RowSample(8192) for name in ScanQuantizer.NAMES}

        def observe(name: str, value: Tensor) -> None:
            if name in samples:
                samples[name].add(value.flatten(0, 1).flatten(1))

        path.scan_quantizer = None
        calibration.run(block, observe)
        groups, states = path.projection.groups, path.projection.d_state
        channels = path.A_log.shape[0]
        candidates = self.config.percentile if not calibration.trial else self.config.percentile[:1]
        best, least = None, float("inf")
        for percentile in candidates:
            quantizer = ScanQuantizer(channels, groups, states)
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
        if not isinstance(packed, PackedLinear | PackedSparseLinear):
            return {}
        before = calibration.error(block)
        missing_D, tokens = torch.zeros(packed.out_features, dtype=torch.float64, device=packed.device), 0
        for h_BLD, reference_BLD in _pairs(calibration):
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
        weight_VD, grid = model_map.embedding.weight.data, grid_of(format_)
        codes, scales = self._round_end(model_map, weight_VD, grid, "the embedding", shared=model_map.tied)
        scale = stored_scale(scales, format_)
        packed: PackedEmbedding | PackedSparseEmbedding
        if model_map.tied and model_map.mask is not None and model_map.pattern is not None:
            packed = PackedSparseEmbedding.from_mask(codes, model_map.mask, model_map.pattern, scale=scale)
        else:
            packed = PackedEmbedding.from_float(weight_VD, weights=weights_of(format_), codes=codes, scale=scale)
        set_module(model_map.host, model_map.embedding.path, packed)
        return {"embedding.sqnr_db": _rounded(weight_sqnr_db(weight_VD, codes, scales, grid))}

    def _round_end(self, model_map: ModelMap, weight_VD: Tensor, grid: Grid, where: str, *,
                   shared: bool) -> tuple[Tensor, Tensor]:
        """Codes and scales of the embedding or the head; shared: it is the weight that pruning may have rounded."""
        if shared and model_map.rounded is not None:
            return model_map.rounded
        return round_weight(weight_VD, grid, where, search=self.config.scale_search and grid.bits == 4)

    @torch.no_grad()
    def apply_head(self, model_map: ModelMap, calibration: Calibration) -> dict[str, Any]:
        format_, head, embedding = self.config.of("head"), model_map.head.module, model_map.embedding.module
        packs = model_map.tied and isinstance(embedding, PackedEmbedding | PackedSparseEmbedding)
        shared: Any = embedding if packs else None
        if format_ is None or (model_map.tied and shared is None):
            return {}
        transform = head.transform if isinstance(head, TransformedHead) else None
        inputs = (model_map.final_norm(h_BLD).flatten(0, 1) for h_BLD in calibration.batches())
        activations = activations_of(format_)
        report: dict[str, Any] = {}
        # A tied head multiplies the embedding's codes; its own float weight is gone by now.
        weight_VD = model_map.head.weight.data if shared is None else shared.dequantize()
        act_scale = None
        if activations.mode == "tensor":
            sample = RowSample(512)
            for x_TD in inputs:
                sample.add(x_TD if transform is None else x_TD @ transform.to(x_TD.dtype))
            percentile, act_scale = best_range(sample, weight_VD, activations.bits, self.config.percentile)
            report = {"head.act_scale": _rounded(act_scale, 6), "head.percentile": percentile}
        stored = None if transform is None else half_if_harmless(transform)
        packed: PackedHead | PackedSparseHead
        if shared is not None:
            kind = PackedSparseHead if isinstance(shared, PackedSparseEmbedding) else PackedHead
            packed = kind.sharing(shared, activations=activations, act_scale=act_scale, transform=stored)
        else:
            grid, bias = grid_of(format_), getattr(head, "bias", None)
            codes, scales = self._round_end(model_map, weight_VD, grid, "the head", shared=True)
            scale = stored_scale(scales, format_)
            if model_map.mask is not None and model_map.pattern is not None:
                packed = PackedSparseHead.from_mask(codes, model_map.mask, model_map.pattern, bias, scale=scale,
                                                    activations=activations, act_scale=act_scale, transform=stored)
            else:
                packed = PackedHead.from_float(weight_VD, bias, weights=weights_of(format_), activations=activations,
                                               act_scale=act_scale, transform=stored, codes=codes, scale=scale)
            report["head.sqnr_db"] = _rounded(weight_sqnr_db(weight_VD, codes, scales, grid))
        set_module(model_map.host, model_map.head.path, packed)
        return report


def best_range(sample: RowSample, weight_OI: Tensor, bits: int, percentiles: tuple[float, ...]) -> tuple[float, float]:
    """(percentile, scale) whose rounded inputs change the linear's output least: min over p of ‖(x̂ - x) Wᵀ‖²."""
    top = Grid(bits).highest
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


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{min(value, 999.0):.{digits}g}")


__all__ = ["Quantize", "best_range"]
