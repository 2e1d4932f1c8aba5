"""One-shot N:M sparsity: of every ``of`` weights along the input, ``keep`` stay; the rest becomes zero.

    magnitude   score |W|
    wanda       score |W| · ‖X‖₂ (Sun et al., arXiv 2306.11695): a weight matters as much as its input is large
    sparsegpt   (Frantar and Alistarh, arXiv 2301.00774) score W² / U_jj², U = cholesky(H⁻¹, upper) of the inputs'
                moment; pruning column j moves the later ones by -(w_j - q_j) / U_jj · U_j, so that a group is chosen
                among weights that already make good what was pruned before it. ``round: int8`` rounds what is kept in
                the same loop: SparseGPT and GPTQ jointly, one error to compensate.
    zeros       the weights are sparse already: the mask is where they are not zero, and more than ``keep`` is an error

Matrices of a block are done in data-flow order, each on inputs that come out of the already pruned ones. The masks go
to the packer: ``quantize`` stores int8 values, and what it leaves is packed here as fp16 when the block is done.

Legend: T tokens, O outputs, I inputs, M places a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.modelmap import Block, ModelMap
from mambacompress.models.packed_sparse import PackedSparseLinear, sparse_bytes
from mambacompress.nm import Pattern, excess, nm_mask, pruned
from mambacompress.numerics import Grid, searched_scales
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.hessian import factor, matrices_in_order, output_error
from mambacompress.passes.observers import Moment, inputs_of
from mambacompress.passes.rounding import checked_weight
from mambacompress.schema import PruneConfig


@dataclass(frozen=True)
class Sparse:
    """weight fp64 [O, I] with its zeros, mask bool [O, I]; codes int8 and scales fp32 [O, 1] where it was rounded."""

    weight: Tensor
    mask: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None
    damp: float | None = None


class Prune(Pass):
    """See the module. Leaves ``block.masks``, and codes in ``block.rounded`` where it rounded."""

    name = "prune"
    rank = 35

    def __init__(self, config: PruneConfig) -> None:
        self.config, self.pattern = config, config.pattern

    def plan(self, model_map: ModelMap) -> Plan:
        plan, config, found = Plan(), self.config, set[str]()
        for block in model_map.blocks:
            for path, tensor in matrices_in_order(block, config.maps):
                found.add(tensor)
                rows, columns = block.module.get_parameter(f"{path}.weight").shape
                self.pattern.check(columns, f"block {block.index} {tensor}")
                block.patterns[path] = self.pattern
                size = sparse_bytes(rows, columns, self.pattern, "float16", "none")
                joint = f", rounded to {config.round} in the same loop" if config.round != "none" else ""
                plan.edits.append(Edit(self.name, block.index, tensor, f"{self.pattern} by {config.method}{joint}; "
                                       f"{size:,} bytes as fp16, unless quantize packs it",
                                       bits=8 * size / (rows * columns)))
        if not found:
            raise UserError(f"prune matches nothing: this model has no {', '.join(config.maps)}", "name others in maps")
        plan.refusals += [Refusal(self.name, None, tensor, f"this model has no {tensor}")
                          for tensor in config.maps if tensor not in found]
        return plan

    @torch.no_grad()
    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        if calibration.trial:  # slow, and all candidates would lose alike
            return {}
        report: dict[str, Any] = {}
        for path, tensor in matrices_in_order(block, self.config.maps):
            name = path.removeprefix("mixer.")
            weight = block.matrices(tensor)[path][0].weight
            W_OI = checked_weight(weight.data, f"block {block.index} {name}")
            moment = Moment()
            for x_TI in inputs_of(block, path, calibration.batches()):
                moment.add(x_TI)
            H_II = moment.mean() * 2
            sparse = self._sparse(W_OI, H_II, f"block {block.index} {name}")
            weight.data = sparse.weight.to(weight.dtype)
            block.masks[path] = sparse.mask
            if sparse.codes is not None and sparse.scales is not None:
                weight.data = Grid(8).dequantize(sparse.codes, sparse.scales).to(weight.dtype)
                block.rounded[path] = (sparse.codes, sparse.scales)
            report |= {f"{name}.pattern": str(self.pattern),
                       f"{name}.error": float(f"{output_error(W_OI, weight.data.double(), H_II):.6g}")}
            if sparse.damp not in (None, self.config.damp):
                report[f"{name}.damp"] = sparse.damp
        return report

    def finish_block(self, block: Block) -> None:
        for path, mask_OI in block.masks.items():
            module = block.module.get_submodule(path)
            if isinstance(module, nn.Linear):
                block.replace(path, PackedSparseLinear.from_mask(module.weight.data, mask_OI, block.patterns[path],
                                                                 module.bias))

    def _sparse(self, W_OI: Tensor, H_II: Tensor, where: str) -> Sparse:
        config = self.config
        if config.method == "sparsegpt":
            return sparsegpt(W_OI, H_II, self.pattern, Grid(8) if config.round == "int8" else None, damp=config.damp,
                             block=config.block, where=where)
        if config.method == "zeros":
            wrong = excess(W_OI, self.pattern)
            if wrong:
                raise UserError(f"{where} is not {self.pattern} sparse: {wrong:,} of its groups hold more than "
                                f"{self.pattern.keep} weights", "prune it with another method")
        scores_OI = W_OI.abs() * H_II.diagonal().sqrt() if config.method == "wanda" else W_OI.abs()
        mask_OI = nm_mask(scores_OI, self.pattern)
        return Sparse(pruned(W_OI, mask_OI), mask_OI)


def sparsegpt(W_OI: Tensor, H_II: Tensor, pattern: Pattern, grid: Grid | None = None, *, damp: float = 0.01,
              block: int = 128, where: str = "weight") -> Sparse:
    """Prune W [O, I] to ``pattern`` for inputs of moment H [I, I]; with ``grid`` (one scale a row) round what is kept.

    Raises UserError where H has no Cholesky factor after raising the damping four times tenfold.
    """
    left_OI, H_II = W_OI.double().clone(), H_II.double()
    left_OI[:, H_II.diagonal() == 0] = 0
    scales_OG = None if grid is None else searched_scales(left_OI, grid, H_II.diagonal())
    U_II, used = factor(H_II, damp, where)
    out_OI, mask_OI = torch.zeros_like(left_OI), torch.zeros_like(left_OI, dtype=torch.bool)
    step = max(1, block // pattern.of) * pattern.of
    for start in range(0, left_OI.shape[1], step):
        stop = min(start + step, left_OI.shape[1])
        errors_OJ = torch.empty_like(left_OI[:, start:stop])
        for j in range(start, stop):
            if (j - start) % pattern.of == 0:
                group = slice(j, j + pattern.of)
                scores_OM = left_OI[:, group].square() / U_II.diagonal()[group].square()
                mask_OI[:, group] = nm_mask(scores_OM, pattern)
            kept_O = pruned(left_OI[:, j], mask_OI[:, j])
            if grid is not None and scales_OG is not None:
                scale_O = scales_OG[:, 0].double()
                kept_O = torch.round(kept_O / scale_O).clamp_(grid.lowest, grid.highest) * scale_O
            out_OI[:, j] = kept_O
            error_O = (left_OI[:, j] - kept_O) / U_II[j, j]
            left_OI[:, j + 1 : stop] -= error_O[:, None] * U_II[j, j + 1 : stop]
            errors_OJ[:, j - start] = error_O
        left_OI[:, stop:] -= errors_OJ @ U_II[start:stop, stop:]
    if grid is None or scales_OG is None:
        return Sparse(pruned(out_OI, mask_OI), mask_OI, damp=used)
    codes_OI = pruned(torch.round(out_OI / scales_OG.double()).to(torch.int8), mask_OI)
    return Sparse(pruned(out_OI, mask_OI), mask_OI, codes_OI, scales_OG, used)


__all__ = ["Prune", "Sparse", "sparsegpt"]
