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

A head of its own is done last, on what comes out of the pruned blocks. One that is tied to the embedding must be done
first, since the embedding feeds all blocks: on the inputs it has in the float model (``HeadInputs``).

Legend: T tokens, O outputs, I inputs, M places a group, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.heads import TransformedHead
from mambacompress.models.modelmap import Block, ModelMap, set_module
from mambacompress.models.packed_sparse import (
    PackedSparseEmbedding,
    PackedSparseHead,
    PackedSparseLinear,
    sparse_bytes,
)
from mambacompress.models.packed_weight import ActivationFormat, Stored
from mambacompress.nm import Pattern, excess, nm_mask, pruned
from mambacompress.numerics import Grid, searched_scales
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.hessian import factor, matrices_in_order, output_error, row_error
from mambacompress.passes.observers import Moment, inputs_of
from mambacompress.passes.rounding import checked_weight
from mambacompress.schema import PruneConfig

_ROWS = 8192
"""Rows of the head that are pruned at a time."""


@dataclass(frozen=True)
class Sparse:
    """weight fp64 [O, I] with its zeros, mask bool [O, I]; codes int8 and scales fp32 [O, 1] where it was rounded."""

    weight: Tensor
    mask: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None
    damp: float | None = None


class HeadInputs:
    """E[n nᵀ] of the float model's normed residual n, without the final norm's weight: that, a rotation of the residual
    and a matrix before the head come and go after it was seen, and a norm of all channels commutes with a rotation.

    stored: what a resumed run has kept of it.
    """

    def __init__(self) -> None:
        self._seen, self.eps = Moment(), 0.0
        self.stored: Tensor | None = None

    def add(self, hidden_BLD: Tensor) -> None:
        h_TD = hidden_BLD.flatten(0, -2).float()
        self._seen.add(h_TD * torch.rsqrt(h_TD.square().mean(-1, keepdim=True) + self.eps))

    def moment(self) -> Tensor:
        return self._seen.mean() if self.stored is None else self.stored

    def now(self, model_map: ModelMap) -> Tensor:
        """E[x xᵀ] of what the head's weight multiplies in the float model, after every ``enter``; [D, D] fp64."""
        head = model_map.head.module
        norm_D = model_map.final_norm.get_parameter("weight").data.reshape(-1).double()
        moment_DD = self.moment().to(norm_D.device)
        to_DD = torch.eye(len(norm_D), dtype=torch.float64, device=norm_D.device)
        if model_map.basis is not None:
            to_DD = model_map.basis.to(to_DD)
        to_DD = to_DD * norm_D
        if isinstance(head, TransformedHead):
            to_DD = to_DD @ head.transform.to(to_DD)
        return to_DD.T @ moment_DD @ to_DD


class Prune(Pass):
    """See the module. Leaves ``block.masks``, and codes in ``block.rounded`` where it rounded."""

    name = "prune"
    rank = 35

    def __init__(self, config: PruneConfig) -> None:
        self.config, self.pattern = config, config.pattern
        self._inputs = HeadInputs()
        self.needs_sweep = "head" in config.maps and config.method in ("wanda", "sparsegpt")

    def plan(self, model_map: ModelMap) -> Plan:
        plan, config, found = Plan(), self.config, set[str]()
        for block in model_map.blocks:
            for path, tensor in matrices_in_order(block, config.maps):
                found.add(tensor)
                rows, columns = block.module.get_parameter(f"{path}.weight").shape
                self.pattern.check(columns, f"block {block.index} {tensor}")
                block.patterns[path] = self.pattern
                plan.edits.append(self._edit(block.index, tensor, rows, columns))
        if "head" in config.maps:
            found.add("head")
            self.pattern.check(model_map.head.weight.shape[1], "the head")
            model_map.pattern = self.pattern
            self._inputs.eps = float(getattr(model_map.final_norm, "variance_epsilon", 1e-5))
            plan.edits.append(self._edit(None, "head", *model_map.head.weight.shape))
        if not found:
            raise UserError(f"prune matches nothing: this model has no {', '.join(config.maps)}", "name others in maps")
        plan.refusals += [Refusal(self.name, None, tensor, f"this model has no {tensor}")
                          for tensor in config.maps if tensor not in found]
        return plan

    def _edit(self, block: int | None, tensor: str, rows: int, columns: int) -> Edit:
        size = sparse_bytes(rows, columns, self.pattern, "float16", "none")
        joint = f", rounded to {self.config.round} in the same loop" if self.config.round != "none" else ""
        return Edit(self.name, block, tensor, f"{self.pattern} by {self.config.method}{joint}; {size:,} bytes as fp16, "
                    "unless quantize packs it", bits=8 * size / (rows * columns))

    # -- blocks ------------------------------------------------------------------------------------------------------

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

    # -- head --------------------------------------------------------------------------------------------------------

    def observe_head(self, hidden_BLD: Tensor) -> None:
        if self.needs_sweep:
            self._inputs.add(hidden_BLD)

    def state(self) -> dict[str, Tensor]:
        return {"head": self._inputs.moment()} if self.needs_sweep else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._inputs.stored = state.get("head")

    @torch.no_grad()
    def apply_embedding(self, model_map: ModelMap) -> dict[str, Any]:
        if "head" not in self.config.maps or not model_map.tied:
            return {}
        size = model_map.head.weight.shape[1]
        moment_DD = self._inputs.now(model_map) if self.needs_sweep else torch.eye(size, dtype=torch.float64)
        return self._prune_head(model_map, moment_DD.to(model_map.head.weight.device) * 2)

    @torch.no_grad()
    def apply_head(self, model_map: ModelMap, calibration: Calibration) -> dict[str, Any]:
        if "head" not in self.config.maps or model_map.tied:
            return {}
        moment = Moment()
        for h_BLD in calibration.batches():
            moment.add(model_map.final_norm(h_BLD).flatten(0, 1))
        return self._prune_head(model_map, moment.mean() * 2)

    def _prune_head(self, model_map: ModelMap, H_DD: Tensor) -> dict[str, Any]:
        """Some rows at a time: each is pruned for itself, and there are tens of thousands."""
        weight, done, wrong, energy, damp = model_map.head.weight, [], 0.0, 0.0, None
        for rows_RD in weight.data.split(_ROWS):
            W_RD = checked_weight(rows_RD, "the head")
            sparse = self._sparse(W_RD, H_DD, "the head")
            kept_RD = sparse.weight
            if sparse.codes is not None and sparse.scales is not None:
                kept_RD = Grid(8).dequantize(sparse.codes, sparse.scales)
            rows_RD.copy_(kept_RD)
            wrong += row_error(W_RD, rows_RD.double(), H_DD).sum().item()
            energy += ((W_RD @ H_DD) * W_RD).sum().item()
            done.append((sparse.mask, sparse.codes, sparse.scales))
            damp = sparse.damp
        masks, codes, scales = zip(*done, strict=True)
        model_map.mask = torch.cat(masks)
        if self.config.round == "int8":
            model_map.rounded = torch.cat(codes), torch.cat(scales)
        report = {"head.pattern": str(self.pattern), "head.error": float(f"{wrong / max(energy, 1e-300):.6g}")}
        return report if damp in (None, self.config.damp) else report | {"head.damp": damp}

    def finish_embedding(self, model_map: ModelMap) -> None:
        weight, mask_VD, pattern = model_map.embedding.weight, model_map.mask, model_map.pattern
        if (model_map.tied and mask_VD is not None and pattern is not None
                and not isinstance(model_map.embedding.module, Stored)):
            set_module(model_map.host, model_map.embedding.path,
                       PackedSparseEmbedding.from_mask(weight.data, mask_VD, pattern))

    def finish_head(self, model_map: ModelMap) -> None:
        head, mask_VD, pattern = model_map.head.module, model_map.mask, model_map.pattern
        if mask_VD is None or pattern is None or isinstance(head, Stored):
            return
        transform = head.transform if isinstance(head, TransformedHead) else None
        packed = (PackedSparseHead.sharing(model_map.embedding.module, activations=ActivationFormat(),
                                           transform=transform) if model_map.tied else
                  PackedSparseHead.from_mask(model_map.head.weight.data, mask_VD, pattern, getattr(head, "bias", None)))
        set_module(model_map.host, model_map.head.path, packed)

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
