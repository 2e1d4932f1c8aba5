"""LoRA over a sparse base: the adapter trains inside the pattern.

Merged as it is, W + BA is dense: the pattern is gone. Masked only afterwards, the merged weight is not what was
trained. So while a session is open a linear that peft has wrapped multiplies by

    (W + Δ) ⊙ m        Δ = the active adapters' B A, scaled

with W and m fixed; at the end Δ is folded into W under the mask and B is set to zero, so that the adapter adds nothing
and ``merge_and_unload`` changes nothing. peft itself is not imported: a wrapped linear is one that has a ``base_layer``
and says its ``get_delta_weight``.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.errors import UserError
from mambacompress.nm import Pattern, nm_mask


def adapted(module: nn.Module) -> bool:
    """Whether peft has wrapped a linear into this module."""
    return isinstance(getattr(module, "base_layer", None), nn.Linear) and hasattr(module, "get_delta_weight")


class AdaptedLinear(nn.Module):
    """See the module. wrapped: peft's layer. weight: of its base, frozen."""

    def __init__(self, wrapped: Any, pattern: Pattern, where: str) -> None:
        super().__init__()
        base = wrapped.base_layer
        dropout = [each for each in wrapped.lora_dropout.values() if not isinstance(each, nn.Identity)]
        if dropout or any(getattr(wrapped, "use_dora", {}).values()) or getattr(wrapped, "lora_variant", None):
            raise UserError(f"{where} has an adapter with dropout, or of a kind that is no sum of weights",
                            "use LoraConfig(lora_dropout=0) without use_dora")
        self.wrapped, self.decayed = wrapped, False
        self.in_features, self.out_features = base.in_features, base.out_features
        self.mask = self.best_mask(pattern)

    @property
    def weight(self) -> Tensor:
        return self.wrapped.base_layer.weight

    def best_mask(self, pattern: Pattern) -> Tensor:
        """The mask of the base's largest weights."""
        return nm_mask(self.weight.detach().abs(), pattern)

    def placed_mask(self) -> Tensor:
        """The mask."""
        return self.mask

    def delta(self) -> Tensor:
        """Δ [O, I] of the active adapters."""
        found = [self.wrapped.get_delta_weight(name) for name in self.wrapped.active_adapters
                 if name in self.wrapped.lora_A]
        return torch.stack(found).sum(0) if found else torch.zeros_like(self.weight)

    def effective(self) -> Tensor:
        """(W + Δ) ⊙ m, [O, I]."""
        return (self.weight + self.delta()).masked_fill(~self.mask, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.wrapped.base_layer.bias)

    def drop(self, mask: Tensor | None = None) -> None:
        """Write the base's zeros."""
        with torch.no_grad():
            self.weight.masked_fill_(~(self.mask if mask is None else mask), 0)

    def fold(self) -> None:
        """Δ into W, under the mask; the adapters are zero from now on."""
        with torch.no_grad():
            self.weight.copy_(self.effective())
            for matrix in self.wrapped.lora_B.values():
                matrix.weight.zero_()

    def plain(self) -> nn.Module:
        """peft's layer."""
        return self.wrapped


__all__ = ["AdaptedLinear", "adapted"]
