"""Distillation recipes: the packaged ones can be built, a typo is never an empty recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mambacompress.distill_recipe import (
    LanguageRecipe,
    ProgressiveRecipe,
    distill_recipe_names,
    load_distill_recipe,
    train_config,
)
from mambacompress.distilling.images import vision_shape
from mambacompress.errors import UserError
from mambacompress.images import ImageData, Images
from mambacompress.models.flops import vision_flops
from mambacompress.models.vision import VisionMamba

LANGUAGE: dict[str, Any] = {"kind": "language", "name": "toy", "loss": {"kl": 1.0}, "train": {"steps": 5}}


def blank(side: int, channels: int) -> ImageData:
    split = Images(torch.zeros(10, channels, side, side, dtype=torch.uint8), torch.arange(10))
    return ImageData("blank", split, split)


@pytest.mark.parametrize("name", distill_recipe_names())
def test_every_packaged_recipe_loads(name: str):
    recipe = load_distill_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert train_config(recipe.train).steps >= 100
    assert load_distill_recipe(recipe) == recipe


@pytest.mark.parametrize(("name", "side", "channels", "smallest"), [("pkd-mnist", 28, 1, 0.01),
                                                                    ("pkd-cifar10", 32, 3, 0.05)])
def test_the_chains_cost_what_their_descriptions_say(name: str, side: int, channels: int, smallest: float):
    """At most 63 % of the teacher's operations together; the single student as much, to a hundredth."""
    recipe, data = load_distill_recipe(name), blank(side, channels)
    assert isinstance(recipe, ProgressiveRecipe)

    def cost(own: Any) -> int:
        return vision_flops(VisionMamba(vision_shape(recipe, own, data))).total

    teacher, students = cost(recipe.teacher.shape), [cost(own) for own in recipe.students]
    assert students == sorted(students, reverse=True), "a chain of shrinking students"
    assert sum(students) <= 0.63 * teacher
    assert min(students) <= smallest * teacher
    assert recipe.single is not None
    assert cost(recipe.single) == pytest.approx(sum(students), rel=0.015)


def test_overrides_reach_every_level():
    recipe = load_distill_recipe("pkd-mnist", [
        "train.steps=7", "train.warmup=1", "mixture.alpha=0.5", "chain=shrinking", "teacher.train.steps=9",
        "teacher.train.warmup=2"])
    assert isinstance(recipe, ProgressiveRecipe)
    assert (recipe.train["steps"], recipe.teacher.train["steps"]) == (7, 9)
    assert (recipe.mixture.alpha, recipe.chain) == (0.5, "shrinking")
    half = load_distill_recipe("distill-half", ["student.depth=3"])
    assert isinstance(half, LanguageRecipe)
    assert half.student.depth == 3


@pytest.mark.parametrize(("change", "message"), [
    ({"lossy": 1}, "unknown key 'lossy'"), ({"loss": {"kll": 1}}, r"unknown key 'loss\.kll'; did you mean 'kl'"),
    ({"train": {"stepz": 1}}, "no setting 'stepz'; did you mean 'steps'"), ({"kind": "langage"}, "kind"),
    ({"train": {"steps": "many"}}, "recipe toy: train"), ({"student": {"depth": 1.5}}, r"student\.depth"),
    ({"loss": {"kl": -1}}, r"loss\.kl")])
def test_mistakes_are_named(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load_distill_recipe(LANGUAGE | change)


def test_files_are_read_and_faults_named(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'pkd-mnist'"):
        load_distill_recipe("pkd-mnits")
    with pytest.raises(UserError, match="no recipe file"):
        load_distill_recipe(tmp_path / "none.yaml")
    file = tmp_path / "mine.yaml"
    file.write_text("kind: language\nname: mine\nloss: {kl: 1}\ntrain: {steps: 3}\n")
    assert load_distill_recipe(file).name == "mine"
    file.write_text("- a\n- list\n")
    with pytest.raises(UserError, match="is not a mapping"):
        load_distill_recipe(file)
    file.write_text("kind: [")
    with pytest.raises(UserError, match="cannot be read"):
        load_distill_recipe(file)
    with pytest.raises(UserError, match="key=value"):
        load_distill_recipe("distill-half", ["train.steps"])
