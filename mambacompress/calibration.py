"""The calibration run of one block: its inputs, what the float block makes of them, and trials.

Memory holds the inputs and the reference outputs of *one* block (tokens x D floats each). The batch size is chosen so
that a mixer's inner tensors, several of E floats a token, stay within a fixed budget whatever the model's width.

Legend: b batch, L tokens, D d_model, E d_inner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mambacompress.models.modelmap import Block
from mambacompress.passes.base import Pass

_INNER_BYTES = 4 << 20
_TRIAL_VALUES = 1 << 21
"""Tokens x d_inner of a trial: 4,096 tokens at d_inner 512, and the same time at any width."""


def batch_size(length: int, d_inner: int) -> int:
    """Sequences a batch, so that one fp32 tensor [b, L, E] stays within 4 MiB, which caches hold."""
    return max(1, _INNER_BYTES // (4 * length * d_inner))


class BlockCalibration:
    """See passes.base.Calibration. ``hidden``: batches [b, L, D] entering the block, already in its basis."""

    def __init__(
        self, hidden: Sequence[Tensor], block: Block, *, reference: Sequence[Tensor] | None = None, trial: bool = False
    ) -> None:
        self.hidden, self.trial = hidden, trial
        self._reference = list(self._forward(block)) if reference is None else reference
        self._later: Sequence[Pass] = ()

    def before(self, later: Sequence[Pass]) -> BlockCalibration:
        """Say which passes follow the one about to run: trials apply them."""
        self._later = later
        return self

    def batches(self) -> Iterator[Tensor]:
        return iter(self.hidden)

    def reference(self) -> Iterator[Tensor]:
        return iter(self._reference)

    @torch.no_grad()
    def run(self, block: Block, observe: Callable[[str, Tensor], None]) -> None:
        block.mixer.tap = observe
        try:
            for h_BLD in self.hidden:
                block.module(h_BLD)
        finally:
            block.mixer.tap = None

    @torch.no_grad()
    def _forward(self, block: Block) -> Iterator[Tensor]:
        for h_BLD in self.hidden:
            yield block.module(h_BLD)

    def outputs(self, block: Block) -> list[Tensor]:
        """The block's outputs as it is now: the next block's inputs."""
        return list(self._forward(block))

    def error(self, block: Block) -> float:
        return relative_error(self._forward(block), self._reference, self.hidden)

    def error_of(self, outputs: Sequence[Tensor]) -> float:
        """``error`` of outputs already computed."""
        return relative_error(iter(outputs), self._reference, self.hidden)

    def trial_error(self, block: Block, edit: Callable[[Block], None] | None = None) -> float:
        sequences = max(1, _TRIAL_VALUES // (self.hidden[0].shape[1] * getattr(block.mixer, "d_inner", 1)))
        hidden, reference = _first(self.hidden, sequences), _first(self._reference, sequences)
        trial = BlockCalibration(hidden, block, reference=reference, trial=True)
        candidate = block.copy()
        if edit is not None:
            edit(candidate)
        for i, later in enumerate(self._later):
            later.apply_block(candidate, trial.before(self._later[i + 1 :]))
        return trial.error(candidate)


def relative_error(outputs: Iterator[Tensor], references: Sequence[Tensor], inputs: Sequence[Tensor]) -> float:
    """Σ‖output - reference‖² / Σ‖reference - input‖²: 0 is exact, 1 is as bad as leaving the block out."""
    wrong = energy = 0.0
    for y_BLD, r_BLD, h_BLD in zip(outputs, references, inputs, strict=True):
        wrong += (y_BLD.double() - r_BLD.double()).square().sum().item()
        energy += (r_BLD.double() - h_BLD.double()).square().sum().item()
    return wrong / max(energy, 1e-300)


def _first(batches: Sequence[Tensor], sequences: int) -> list[Tensor]:
    taken: list[Tensor] = []
    for batch in batches:
        if sequences <= 0:
            break
        taken.append(batch[:sequences])
        sequences -= len(taken[-1])
    return taken
