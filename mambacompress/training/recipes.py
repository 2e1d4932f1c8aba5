"""The models this package trains from scratch: the shape and the schedule of each, by name. No torch.

``demo`` is the embedded model: a small Mamba-1 on the source of Python's standard library, with a byte-level BPE of its
own. The English recipes, one a generation of Mamba, take the user's text and tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mambacompress.errors import UserError, did_you_mean
from mambacompress.training.config import TrainConfig, overridden


@dataclass(frozen=True)
class TrainingRecipe:
    """kind: transformers model type. config: its shape. train: its schedule.

    vocabulary: of the tokenizer trained here on the standard library, or None: text and tokenizer are the user's.
    """

    name: str
    kind: str
    config: dict[str, Any]
    train: TrainConfig
    vocabulary: int | None = None


_S6 = {"state_size": 16, "expand": 2, "conv_kernel": 4, "tie_word_embeddings": True}

RECIPES = {recipe.name: recipe for recipe in (
    TrainingRecipe(
        "demo", "mamba",
        _S6 | {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6, "time_step_rank": 12},
        TrainConfig(steps=3000, precision="auto"), vocabulary=4096),
    TrainingRecipe(
        "english-mamba1", "mamba",
        _S6 | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "time_step_rank": 16},
        TrainConfig(steps=5000)),
    TrainingRecipe(
        "english-mamba2", "mamba2",
        {"hidden_size": 256, "expand": 2, "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1,
         "num_hidden_layers": 8, "conv_kernel": 4, "chunk_size": 64, "tie_word_embeddings": True},
        TrainConfig(steps=5000)),
)}


def load_training_recipe(source: str | TrainingRecipe, overrides: Iterable[str] | Mapping[str, Any] = ()
                         ) -> TrainingRecipe:
    """A recipe by name, or as it is, with settings of its schedule overridden: ``["steps=500"]``, ``{"steps": 500}``.

    Raises UserError for an unknown name or setting (with the nearest known one) and for values that cannot work.
    """
    if isinstance(source, TrainingRecipe):
        recipe = source
    elif source in RECIPES:
        recipe = RECIPES[source]
    else:
        raise UserError(f"there is no training recipe {source!r}{did_you_mean(source, RECIPES)}",
                        f"name one of {', '.join(RECIPES)}")
    return replace(recipe, train=overridden(recipe.train, overrides))
