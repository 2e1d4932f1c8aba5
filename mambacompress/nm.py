"""N:M patterns: which ``keep`` of every ``of`` consecutive weights along the input dimension stay.

``keep`` counts what is *kept* (others name a pattern by what is pruned). A mask is bool, True where the weight stays;
the largest scores of a group stay, and of equal ones the earlier, so that a mask is a function of its scores alone.
Zeros are written by ``masked_fill``: a product with zero would leave -0.0, and NaN where a weight is infinite.

The packed form (values, and a mask or indices) is ``kernels.nm_linear``'s. Recipes hold patterns, so importing this
loads no torch.

Legend: O outputs, I inputs, G groups a row, M places in a group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mambacompress.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 64
"""Places a group has at most."""

_COMPARED = 8
"""Up to this many places a group is ranked by comparing every pair, above by sorting; by sorting always on a GPU, where
every comparison is a launch."""


@dataclass(frozen=True)
class Pattern:
    """``keep`` of every ``of``. Raises ValueError for numbers that are no pattern."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of <= LARGEST:
            raise ValueError(f"{self.keep}:{self.of} is no N:M pattern: keep at least 1 and fewer than all of at most "
                             f"{LARGEST}")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``2:4`` or ``2of4``."""
        found = re.fullmatch(r"(\d+)(?::|of)(\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is no N:M pattern; write for example 2:4")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def density(self) -> float:
        """The share of the weights that stays."""
        return self.keep / self.of

    def check(self, columns: int, where: str) -> None:
        """Raise UserError, naming the layer, where groups do not divide its rows."""
        if columns % self.of:
            raise UserError(f"{where} has {columns} input channels, which groups of {self.of} do not divide",
                            "leave it out of `maps`, or choose a pattern that divides them")


def nm_mask(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """bool [O, I]: the ``keep`` largest scores of every group, the earlier of equal ones. Raises ValueError where
    groups do not divide the row.
    """
    if scores_OI.shape[-1] % pattern.of:
        raise ValueError(f"groups of {pattern.of} do not divide the last axis of {tuple(scores_OI.shape)}")
    scores_GM = scores_OI.detach().reshape(-1, pattern.of)
    if pattern.of <= _COMPARED and scores_GM.device.type == "cpu":
        ranks_GM = _ranks(scores_GM)
    else:  # the place of every place in the order
        ranks_GM = scores_GM.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (ranks_GM < pattern.keep).reshape(scores_OI.shape)


def _ranks(scores_GM: Tensor) -> Tensor:
    """How many of its group stand before each score, uint8 [groups, M]."""
    import torch

    columns_MG = scores_GM.T.contiguous()
    ranks_MG = torch.zeros_like(columns_MG, dtype=torch.uint8)
    for i in range(len(columns_MG)):
        for j in range(i + 1, len(columns_MG)):
            later_wins = columns_MG[j] > columns_MG[i]
            ranks_MG[i] += later_wins
            ranks_MG[j] += ~later_wins
    return ranks_MG.T


def pruned(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """A copy of the weight with +0 where the mask is False."""
    return weight_OI.masked_fill(~mask_OI, 0)


def excess(weight_OI: Tensor, pattern: Pattern) -> int:
    """Groups that hold more than ``keep`` nonzero weights."""
    return int(((weight_OI != 0).unflatten(-1, (-1, pattern.of)).sum(-1) > pattern.keep).sum())


__all__ = ["LARGEST", "Pattern", "excess", "nm_mask", "pruned"]
