"""Training recipes as data: found by name, changed by settings, of the sizes they are meant to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mambacompress.errors import UserError
from mambacompress.training.recipes import RECIPES, load_training_recipe
from mambacompress.training.scratch import build_model


def test_a_recipe_is_found_and_changed():
    demo = RECIPES["demo"]
    assert load_training_recipe("demo") == load_training_recipe(demo) == demo
    changed = load_training_recipe("demo", ["steps=500", "schedule=wsd"])
    assert changed == replace(demo, train=replace(demo.train, steps=500, schedule="wsd"))
    assert RECIPES["demo"] == demo


def test_an_unknown_recipe():
    with pytest.raises(UserError, match=r"no training recipe 'demmo'; did you mean 'demo'\?.*english-mamba2"):
        load_training_recipe("demmo")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_the_size_it_is_meant_to_be(name: str, tiny_tokenizer: Any):
    recipe = RECIPES[name]
    assert recipe.name == name
    one = replace(recipe, config=recipe.config | {"num_hidden_layers": 1})
    model = build_model(one, tiny_tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    width = recipe.config["hidden_size"]
    block = sum(parameter.numel() for parameter in model.backbone.layers.parameters())
    assert 0.9 < block / (6.5 * width**2) < 1.4  # expansion 2: three times two widths squared, and the small ones
