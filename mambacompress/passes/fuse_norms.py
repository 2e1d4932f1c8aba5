"""Fold the weight of every block norm into the linears that read it.

    RMSNorm(h) = (h / rms(h)) diag(g)        W <- W diag(g), g <- 1

Exact: the norm's weight and the columns of its readers meet nowhere else. What it buys: the normalised residual is then
the same space for every reader, so one rotation of it fits all of them, and outliers that only the norm's weight
creates are gone from the activations.

The final norm's weight goes into an untied head. A tied head shares its matrix with the embedding, which must not
change: there the weight stays, until ``rotate`` takes it into the head's small matrix (models/heads.py).

A norm used at two places is left alone: its weight would be folded once for each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.modelmap import RESIDUAL, Block, ModelMap, Site
from mambacompress.passes.base import Edit, Pass, Plan, Refusal
from mambacompress.schema import FuseNormsConfig


class FuseNorms(Pass):
    """See the module. Model-wide: everything happens on entering a block or the head; exact, nothing to calibrate."""

    name = "fuse_norms"
    rank = 10

    def __init__(self, config: FuseNormsConfig | None = None) -> None:
        self.config = config or FuseNormsConfig()
        self._refused: set[str] = set()

    def plan(self, model_map: ModelMap) -> Plan:
        plan = Plan()
        shared = shared_norms(model_map)
        places = [(block.index, f"{block.path}.norm", block.norm) for block in model_map.blocks]
        places.append((None, model_map.final_norm_path, model_map.final_norm))  # type: ignore[arg-type]
        self._refused = set()
        for index, path, norm in places:
            reason = shared.get(path) or unfoldable(norm)
            if reason is not None:
                self._refused.add(path)
                plan.refusals.append(Refusal(self.name, index, path, reason))
            elif index is not None:
                targets = sorted({site.tensor for site in model_map.blocks[index].readers(RESIDUAL)})
                plan.edits.append(Edit(self.name, index, "norm", f"weight folded into {', '.join(targets)}"))
            elif model_map.tied:
                plan.refusals.append(Refusal(self.name, None, path, "the head shares its matrix with the embedding: "
                                             "the final norm keeps its weight, unless rotate moves it into the head"))
            else:
                plan.edits.append(Edit(self.name, None, "final norm", "weight folded into head"))
        return plan

    def enter_block(self, block: Block) -> None:
        if f"{block.path}.norm" not in self._refused:
            _fold(block.norm, block.readers(RESIDUAL), f"block {block.index}")

    def enter_head(self, model_map: ModelMap) -> None:
        if not model_map.tied and model_map.final_norm_path not in self._refused:
            _fold(model_map.final_norm, [model_map.head], "the final norm")


def _fold(norm: nn.Module, readers: list[Site], where: str) -> None:
    reason = unfoldable(norm)
    if reason is not None:
        raise UserError(f"{where}: {reason}", "leave fuse_norms out of the recipe")
    weight: Tensor = norm.weight.data  # type: ignore[union-attr, assignment]
    for site in readers:
        site.scale_input(weight.reshape(-1).double())
    norm.weight.data = torch.ones_like(weight)  # type: ignore[union-attr]


def unfoldable(norm: nn.Module) -> str | None:
    """Why the weight of ``norm`` cannot be folded into its readers, or None."""
    if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
        return f"{type(norm).__name__} subtracts the mean or adds a bias; only an RMS norm folds into its readers"
    if not isinstance(getattr(norm, "weight", None), nn.Parameter):
        return f"{type(norm).__name__} has no weight"
    return None


def shared_norms(model_map: ModelMap) -> dict[str, str]:
    """Path -> reason, for every norm (or norm weight) that is used at more than one place."""
    norms = {f"{block.path}.norm": block.norm for block in model_map.blocks}
    norms[model_map.final_norm_path] = model_map.final_norm
    users: dict[int, list[str]] = {}
    for path, norm in norms.items():
        users.setdefault(id(getattr(norm, "weight", norm)), []).append(path)
    return {path: f"the norm is used at {' and '.join(paths)}: untie it first"
            for paths in users.values() if len(paths) > 1 for path in paths}


__all__ = ["FuseNorms"]
