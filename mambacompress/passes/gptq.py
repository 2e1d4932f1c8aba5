"""GPTQ: round a weight so that the error of one column is made good by the columns not rounded yet.

For y = x Wᵀ on calibration inputs with moment H = 2 XᵀX / n, the columns of W are rounded one after another; with
U = cholesky(H⁻¹, upper), rounding column j moves the later ones by -(w_j - q_j) / U_jj · U_j (Frantar et al., arXiv
2210.17323, algorithm 1; the closed form of Optimal Brain Surgeon). In blocks of columns, so that the rest of the matrix
is touched once a block. fp64 throughout: H is ill-conditioned, the cost is small beside the calibration runs.

Three things go beyond the paper:

- *scales by search*: every group's clipping is chosen for the least error weighted by diag H.
- *refine*: alternate two exact descents on the same objective tr((Ŵ-W) H (Ŵ-W)ᵀ): one code at a time given all others
  (coordinate descent), and all scales of a row at once (least squares). GPTQ is greedy and never looks back; this does.
- *compensate*: what a linear should reproduce is its *float* output, though its input already carries the rounding
  errors of the linears before it. The least-squares answer to that (``compensated``) is rounded instead of W.

Matrices of a block are done in data-flow order, each on inputs that come out of the already rounded ones. Damping adds
1 % of the mean diagonal; where the Cholesky still fails it is raised tenfold, and the result says so. A channel that is
always zero has nothing to compensate and its column becomes 0. At 8 bits rounding to nearest loses nothing to win back:
skipped.

Legend: T tokens, O output channels, I input channels, G groups a row, g channels a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambacompress.models.modelmap import Block, ModelMap
from mambacompress.numerics import Grid, searched_scales
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.hessian import damped, factor, matrices_in_order, output_error, row_error
from mambacompress.passes.observers import Moment, inputs_of
from mambacompress.passes.rounding import check_groups, checked_weight
from mambacompress.schema import GptqConfig


@dataclass(frozen=True)
class Rounded:
    """codes [O, I] int8, scales [O, G] fp32 (as stored), damp that was needed, dead input channels."""

    codes: Tensor
    scales: Tensor
    damp: float
    dead: int


class Gptq(Pass):
    """See the module. ``apply_block`` writes the dequantized weights back and leaves codes in ``block.rounded``."""

    name = "gptq"
    rank = 40

    def __init__(self, config: GptqConfig) -> None:
        self.config = config

    def grid(self, tensor: str) -> Grid:
        """The grid of a tensor by its recipe name."""
        weights, group_size = self.config.of(tensor)
        return Grid(4 if weights == "int4" else 8, group_size)

    def plan(self, model_map: ModelMap) -> Plan:
        plan = Plan()
        config = self.config
        for tensor in config.maps:
            if self.grid(tensor).bits == 8:
                plan.refusals.append(Refusal(self.name, None, tensor, "at 8 bits rounding to nearest loses nothing "
                                             "that GPTQ could win back: skipped"))
        if "head" in config.maps:
            plan.refusals.append(Refusal(self.name, None, "head", "the head is packed by rounding to nearest"))
        extras = [text for text, on in (("act-order", config.act_order), ("compensated", config.compensate),
                                        (f"{config.refine} refining sweeps", config.refine)) if on]
        for block in model_map.blocks:
            for path, name in matrices_in_order(block, config.maps):
                grid = self.grid(name)
                if grid.bits == 8:
                    continue
                check_groups(f"block {block.index} {name}", block.matrices(name)[path][0].weight.shape[1], grid)
                what = ["GPTQ int4", grid.described, f"damp {config.damp:g}", *extras]
                plan.edits.append(Edit(self.name, block.index, name, ", ".join(what)))
        return plan

    @torch.no_grad()
    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        if calibration.trial:  # slow, and all candidates would gain alike
            return {}
        config = self.config
        original = block.copy() if config.compensate else None
        report: dict[str, Any] = {}
        for path, tensor in matrices_in_order(block, config.maps):
            name, grid = path.removeprefix("mixer."), self.grid(tensor)
            if grid.bits == 8:
                report[f"{name}.skipped"] = "8 bits"
                continue
            weight = block.matrices(tensor)[path][0].weight
            where = f"block {block.index} {name}"
            W_OI = checked_weight(weight.data, where)
            H_II, drift_II = _moments(block, original, path, calibration)
            target_OI = W_OI if drift_II is None else compensated(W_OI, H_II, drift_II, config.damp)
            rounded = gptq(target_OI, H_II, grid, damp=config.damp, block=config.block, act_order=config.act_order,
                           refine=config.refine, where=where)
            Q_OI = grid.dequantize(rounded.codes, rounded.scales)
            weight.data = Q_OI.to(weight.dtype)
            block.rounded[path] = (rounded.codes, rounded.scales)
            report[f"{name}.error"] = float(f"{output_error(W_OI, Q_OI.double(), H_II):.6g}")
            if rounded.damp != config.damp:
                report[f"{name}.damp"] = rounded.damp
            if rounded.dead:
                report[f"{name}.dead_channels"] = rounded.dead
        return report


def _moments(block: Block, original: Block | None, path: str, calibration: Calibration) -> tuple[Tensor, Tensor | None]:
    """H = 2 XᵀX/n of the module's inputs X; with ``original`` also 2 (X̃ - X)ᵀX/n, X̃ its inputs in the float block."""
    own, drift = Moment(), Moment()
    if original is None:
        for x_TI in inputs_of(block, path, calibration.batches()):
            own.add(x_TI)
        return own.mean() * 2, None
    floats = inputs_of(original, path, calibration.batches())
    for x_TI, float_TI in zip(inputs_of(block, path, calibration.batches()), floats, strict=True):
        own.add(x_TI)
        drift.add(float_TI - x_TI, x_TI)
    return own.mean() * 2, drift.mean() * 2


def compensated(W_OI: Tensor, H_II: Tensor, drift_II: Tensor, damp: float) -> Tensor:
    """The weight whose output on the actual inputs X is nearest to the float output X̃ Wᵀ, pulled towards W by ``damp``.

    argmin_V ‖X Vᵀ - X̃ Wᵀ‖² + λ‖V - W‖²  =  W + W · (X̃ - X)ᵀX · (XᵀX + λ)⁻¹. (Li et al., GPTAQ, arXiv 2504.02692,
    has the same aim inside GPTQ's loop.)
    """
    if not drift_II.any():
        return W_OI
    damped_II, _ = damped(H_II, damp)
    return W_OI + torch.linalg.solve(damped_II, (W_OI @ drift_II).T).T


def gptq(W_OI: Tensor, H_II: Tensor, grid: Grid, *, damp: float = 0.01, block: int = 128, act_order: bool = False,
         refine: int = 0, where: str = "weight") -> Rounded:
    """Round W [O, I] (any float dtype) on ``grid`` for inputs of moment H [I, I] fp64.

    act_order: columns of large diag H first, while the rest can still compensate; scales are then fixed beforehand, so
    that groups stay runs of neighbouring channels. Without it a group's scales are chosen when its first column is
    reached, on the weights as compensated so far. refine: sweeps of coordinate descent and scale fitting afterwards.

    Raises UserError where H has no Cholesky factor after raising the damping four times tenfold.
    """
    W_OI = W_OI.double().clone()
    H_II = H_II.double()
    dead_I = H_II.diagonal() == 0
    W_OI[:, dead_I] = 0
    diagonal_I = H_II.diagonal()
    order_I = torch.argsort(diagonal_I, descending=True, stable=True) if act_order else torch.arange(len(diagonal_I))
    order_I = order_I.to(W_OI.device)
    U_II, used = factor(H_II[order_I][:, order_I], damp, where)

    width = grid.group_size or W_OI.shape[1]
    static = act_order or grid.group_size is None or width > block
    scales_OG = searched_scales(W_OI, grid, diagonal_I)
    step = block if static else block - block % width
    left_OI = W_OI[:, order_I]
    codes_OI = torch.empty_like(left_OI, dtype=torch.int8)
    for start in range(0, left_OI.shape[1], step):
        stop = min(start + step, left_OI.shape[1])
        errors_OJ = torch.empty_like(left_OI[:, start:stop])
        for j in range(start, stop):
            group = int(order_I[j]) // width
            if not static and j % width == 0:
                scales_OG[:, group] = searched_scales(left_OI[:, j : j + width], Grid(grid.bits, width),
                                                      diagonal_I[j : j + width])[:, 0]
            scale_O = scales_OG[:, group].double()
            codes_OI[:, j] = torch.round(left_OI[:, j] / scale_O).clamp_(grid.lowest, grid.highest).to(torch.int8)
            error_O = (left_OI[:, j] - codes_OI[:, j] * scale_O) / U_II[j, j]
            left_OI[:, j + 1 : stop] -= error_O[:, None] * U_II[j, j + 1 : stop]
            errors_OJ[:, j - start] = error_O
        left_OI[:, stop:] -= errors_OJ @ U_II[start:stop, stop:]
    natural_OI = torch.empty_like(codes_OI)
    natural_OI[:, order_I] = codes_OI
    if refine:
        damped_II, _ = damped(H_II, used)
        natural_OI, scales_OG = refined(W_OI, damped_II, natural_OI, scales_OG, grid, sweeps=refine, block=block)
    return Rounded(natural_OI, scales_OG, used, int(dead_I.sum()))


def refined(W_OI: Tensor, H_II: Tensor, codes_OI: Tensor, scales_OG: Tensor, grid: Grid, *, sweeps: int,
            block: int = 128) -> tuple[Tensor, Tensor]:
    """Lower tr((Ŵ-W) H (Ŵ-W)ᵀ) from a starting point: per sweep every code once, then the scales of each row.

    H must have a positive diagonal. Never worse than the start, row by row.
    """
    for _ in range(sweeps):
        better_OI = _descend(W_OI, H_II, codes_OI, scales_OG.double(), grid, block)
        fitted_OG = _fit_scales(W_OI, H_II, better_OI, scales_OG.double(), grid)
        unchanged = torch.equal(better_OI, codes_OI) and torch.equal(fitted_OG, scales_OG)
        codes_OI, scales_OG = better_OI, fitted_OG
        if unchanged:
            break
    return codes_OI, scales_OG


def _descend(W_OI: Tensor, H_II: Tensor, codes_OI: Tensor, scales_OG: Tensor, grid: Grid, block: int) -> Tensor:
    """Every column once: the best code given all others. ``gradient`` is (Ŵ - W) H."""
    width = grid.group_size or W_OI.shape[1]
    codes_OI = codes_OI.clone()
    gradient_OI = (grid.dequantize(codes_OI, scales_OG) - W_OI) @ H_II
    for start in range(0, W_OI.shape[1], block):
        stop = min(start + block, W_OI.shape[1])
        moved_OJ = torch.empty_like(W_OI[:, start:stop])
        for j in range(start, stop):
            scale_O = scales_OG[:, j // width]
            now_O = codes_OI[:, j].double()
            best_O = torch.round(now_O - gradient_OI[:, j] / (H_II[j, j] * scale_O)).clamp_(grid.lowest, grid.highest)
            move_O = (best_O - now_O) * scale_O
            codes_OI[:, j] = best_O.to(torch.int8)
            gradient_OI[:, j + 1 : stop] += move_O[:, None] * H_II[j, j + 1 : stop]
            moved_OJ[:, j - start] = move_O
        gradient_OI[:, stop:] += moved_OJ @ H_II[start:stop, stop:]
    return codes_OI


def _fit_scales(W_OI: Tensor, H_II: Tensor, codes_OI: Tensor, scales_OG: Tensor, grid: Grid) -> Tensor:
    """Least squares for all scales of each row, kept where storing them rounded is still an improvement.

    With Ŵ_o = Σ_G s_G q_G the objective is a quadratic in s: A_GK = q_G H_GK q_Kᵀ, b_G = q_G (H w)_G.
    """
    Q_OGg = grid.grouped(codes_OI.double())
    G, g = Q_OGg.shape[1:]
    A_OGK = torch.empty(len(W_OI), G, G, dtype=W_OI.dtype, device=W_OI.device)
    for k in range(G):
        HQ_OGg = (Q_OGg[:, k] @ H_II[k * g : (k + 1) * g]).unflatten(1, (G, g))
        A_OGK[:, :, k] = (Q_OGg * HQ_OGg).sum(-1)
    b_OG = (Q_OGg * grid.grouped(W_OI @ H_II)).sum(-1)
    diagonal_OG = A_OGK.diagonal(dim1=1, dim2=2)
    empty_OG = diagonal_OG == 0  # all codes zero: any scale does
    ridge_OG = 1e-9 * diagonal_OG.mean(1, keepdim=True) + empty_OG
    A_OGK = A_OGK + torch.diag_embed(ridge_OG)
    s_OG = torch.linalg.solve(A_OGK, b_OG + ridge_OG * scales_OG)
    s_OG = torch.where((s_OG * scales_OG > 0) & ~empty_OG, s_OG, scales_OG)
    s_OG = grid.storable(s_OG)
    better_O = row_error(W_OI, grid.dequantize(codes_OI, s_OG.double()), H_II) < row_error(
        W_OI, grid.dequantize(codes_OI, scales_OG), H_II)
    return torch.where(better_O[:, None], s_OG, scales_OG.float())


__all__ = ["Gptq", "Rounded", "compensated", "gptq", "refined"]
