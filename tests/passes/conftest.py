"""Adopted fp64 hosts for the exact folds: what is compared is the formula, not fp32's rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.calibration import BlockCalibration
from mambacompress.models.exact import KeepDouble
from mambacompress.models.families import adopt
from mambacompress.models.modelmap import ModelMap
from mambacompress.passes.base import Pass

TOKENS = 24


@dataclass
class ExactModel:
    """An adopted fp64 host with token ids to run it on."""

    map: ModelMap
    ids_BL: Tensor

    def logits(self) -> Tensor:
        return self.map.host(self.ids_BL).logits

    def hidden(self) -> list[Tensor]:
        """What enters each block, and last the final norm; [B, L, D] each."""
        h_BLD = self.map.embedding.module(self.ids_BL)
        states = [h_BLD]
        for block in self.map.blocks:
            states.append(block.module(states[-1]))
        return states

    def calibration(self, index: int, later: Sequence[Pass] = ()) -> BlockCalibration:
        """The calibration of one block as it stands, in two batches."""
        h_BLD = self.hidden()[index]
        return BlockCalibration(list(h_BLD.split(2)), self.map.blocks[index]).before(later)

    def enter(self, *passes: Pass) -> None:
        """Sweep, prepare and enter, as the pipeline does."""
        for item in passes:
            item.plan(self.map)
        for item in passes:
            if item.needs_sweep:
                for h_BLD in self.hidden():
                    item.observe(h_BLD)
            item.prepare(self.map)
        for item in passes:
            item.enter_embedding(self.map)
            item.enter_head(self.map)
        for block in self.map.blocks:
            for item in passes:
                item.enter_block(block)

    def apply(self, *passes: Pass) -> list[dict[str, Any]]:
        """Apply the passes block by block; the records of each block."""
        records = []
        for block in self.map.blocks:
            calibration = self.calibration(block.index)
            record: dict[str, Any] = {}
            for i, item in enumerate(passes):
                record |= item.apply_block(block, calibration.before(passes[i + 1:]))
            records.append(record)
        return records


@pytest.fixture
def exact_model(make_host: Any) -> Iterator[Callable[..., ExactModel]]:
    """exact_model(kind, **config) -> ExactModel; casts to fp32 are left out for the length of the test."""

    def make(kind: str = "mamba", **config: Any) -> ExactModel:
        host = make_host(kind, **config).double()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in host.named_parameters():
            if parameter.dim() == 2 and not name.endswith("A_log"):  # random init is too tame to notice a wrong fold
                spread = 0.5 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
        if host.config.tie_word_embeddings:
            host.tie_weights()
        ids_BL = torch.randint(0, host.config.vocab_size, (3, TOKENS), generator=generator)
        return ExactModel(adopt(host), ids_BL)

    with KeepDouble(), torch.no_grad():
        yield make


@pytest.fixture
def rms_difference() -> Callable[[Tensor, Tensor], float]:
    """Largest difference relative to the largest value."""
    return lambda got, want: ((got - want).abs().max() / want.abs().max()).item()
