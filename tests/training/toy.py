"""A toy language model on our Mamba-2 mixer, a toy recipe, and one process of a distributed run: ``python toy.py OUT``.

The process reads its rank from the environment (as ``accelerate launch`` and torchrun set it) and prints its losses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.models.mixers import SSDMixer
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import train
from mambacompress.training.recipes import RECIPES, TrainingRecipe

VOCABULARY = 23


class Toy(nn.Module):
    """Embedding, one mixer, head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.mixer = SSDMixer(16, heads=2, head_dim=8, d_state=4, chunk_size=8)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        h_BLD = self.embedding(input_ids)
        return SimpleNamespace(logits=self.head(h_BLD + self.mixer.mix(h_BLD)[0]))


class Output(dict):  # type: ignore[type-arg]
    """What DistributedDataParallel can look into for tensors."""

    logits = property(lambda self: self["logits"])


class Wrapped(Toy):
    """Toy with an output that a data-parallel wrapper understands."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return Output(logits=super().forward(input_ids, use_cache).logits)


def config(**changes: Any) -> TrainConfig:
    """Eight short steps."""
    return TrainConfig(**({"steps": 8, "batch": 4, "length": 12, "warmup": 2, "learning_rate": 0.01} | changes))


def tokens(count: int = 400, seed: int = 0) -> Tensor:
    """Ids that can be learnt: mostly the next number."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 3, (count,), generator=generator).cumsum(0) % VOCABULARY


def tiny_recipe(**changes: Any) -> TrainingRecipe:
    """The demo recipe, two small blocks and six steps of it."""
    demo = RECIPES["demo"]
    shape = demo.config | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "time_step_rank": 2,
                           "state_size": 4}
    schedule = {"steps": 6, "batch": 2, "length": 16, "warmup": 2} | changes
    return replace(demo, config=shape, vocabulary=280, train=replace(demo.train, **schedule))


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    rows = list(train(Wrapped(), tokens(), config(accumulate=2), out))
    print(json.dumps([row["loss"] for row in rows]))
