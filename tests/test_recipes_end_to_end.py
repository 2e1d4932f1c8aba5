"""Every packaged recipe on every family: quantize, load, run, verify; how far the packed model is from the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mambacompress as mc
from mambacompress.recipe import recipe_names

SHAPES: dict[str, dict[str, Any]] = {  # every width a multiple of the recipes' groups of 64
    "mamba": {"hidden_size": 64, "intermediate_size": 128},
    "mamba2": {"hidden_size": 64, "num_heads": 16},
    "falcon_mamba": {"hidden_size": 64, "intermediate_size": 128},
}
TOLERANCE = {"w8a8-scan8": 0.12, "w4a16": 0.5, "w4a8": 0.5, "w4a4": 0.65}  # random weights: nothing is redundant
OVERRIDES = ("calibration.sequences=4", "calibration.length=32", "checks.max_perplexity_ratio=null")


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_end_to_end(kind: str, recipe: str, model_directory: Callable[..., Path], tmp_path: Path):
    model = model_directory(kind, **SHAPES[kind])
    ids_BL = torch.randint(2, 97, (2, 24))
    plan = mc.inspect(model, recipe, OVERRIDES)
    out = mc.quantize(model, recipe=recipe, overrides=OVERRIDES, out=tmp_path / "out")
    with torch.no_grad():
        expected = mc.load(model)(ids_BL).logits
        packed = mc.load(out.directory)(ids_BL).logits
    error = ((packed - expected).norm() / expected.norm()).item()
    assert 0 < error < TOLERANCE.get(recipe, 0.06), f"{kind} {recipe}: relative error {error:.4f}"
    assert out.manifest["coverage"] == 1.0
    assert mc.verify(out.directory)["coverage"] == 1.0
    refused = {(refusal.pass_name, refusal.target) for refusal in plan.refusals}
    assert {(item["pass"], item["target"]) for item in out.manifest["refused"]} == refused
    if recipe == "w8a8-scan8":
        assert (("quantize", "scan") in refused) == (kind == "mamba2")
