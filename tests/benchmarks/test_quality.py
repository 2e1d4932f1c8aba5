"""The quality tables: what a row counts and compares, the variants, and one row from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality
from benchmarks.tables import linear_weights, llama_rows, sizes, table, twin_summary
from benchmarks.twins import KINDS
from benchmarks.variants import ABLATIONS, RECIPES, Variant
from benchmarks.windows import perplexity_ratio
from mambacompress.recipe import load_recipe, recipe_names

WINDOWS = np.random.default_rng(0).integers(1, 97, size=(3, 20))


def row(model: str, variant: str, ratio: float, size: float = 50.0) -> dict[str, Any]:
    text = {"perplexity": 10 * ratio, "ratio": ratio, "ratio_se": 0.001, "kl": 0.1, "agreement": 0.9}
    return {"model": model, "variant": variant, "tensor_bytes": size, "file_bytes": size, "linear_bits": 8.0,
            "texts": {"a.txt": text}}


def test_the_packaged_recipes_are_all_in_the_table() -> None:
    assert set(RECIPES) <= set(recipe_names())


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_every_ablation_is_a_valid_recipe_and_no_two_are_equal(name: str) -> None:
    rows = ABLATIONS[name]()
    loaded = [load_recipe(variant.recipe, dict(variant.overrides)) for variant in rows]
    assert len({variant.name for variant in rows}) == len(rows)
    distinct = {recipe.canonical_json() for recipe in loaded}
    assert len(distinct) >= len(rows) - 1  # the whole recipe may equal its last part
    assert loaded[-1] == load_recipe(name)
    assert [step for step, _ in loaded[0].steps()] == ["quantize"]
    whole = dict(loaded[-1].steps())["quantize"]
    assert all(dict(recipe.steps())["quantize"] == whole for recipe in loaded[2:])
    plain, searched = (dict(recipe.steps())["quantize"] for recipe in loaded[:2])
    assert (plain.scale_search, searched.scale_search) == (False, True)
    assert plain.model_copy(update={"scale_search": whole.scale_search}) == whole


def test_sizes_are_counted_from_the_tensors(tiny_mamba: Any, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    found = sizes(tmp_path)
    assert found["tensor_bytes"] == 4 * sum(p.numel() for p in tiny_mamba.parameters())
    assert found["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert found["linear_bits"] == 32.0
    mixer = tiny_mamba.backbone.layers[0].mixer
    assert linear_weights(tmp_path) == 2 * sum(
        getattr(mixer, name).weight.numel() for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))


def test_a_model_agrees_with_itself_and_not_with_another(tiny_mamba: Any, make_host: Any) -> None:
    same = quality.compare(tiny_mamba, tiny_mamba, WINDOWS)
    assert np.allclose(same["kl"], 0, atol=1e-12)
    assert same["agreement"].tolist() == [1.0] * 3
    np.testing.assert_array_equal(same["nll"], quality.float_losses(tiny_mamba, WINDOWS))
    with torch.no_grad():
        logits_WLV = tiny_mamba(torch.from_numpy(WINDOWS)).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits_WLV.transpose(1, 2), torch.from_numpy(WINDOWS)[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(same["nll"], expected.numpy(), rtol=1e-5)
    other = make_host("mamba")
    with torch.no_grad():
        other.backbone.layers[0].mixer.in_proj.weight.mul_(-3)
    found = quality.compare(other, tiny_mamba, WINDOWS)
    assert np.all(found["kl"] > 0)
    assert np.all(found["nll"] != same["nll"])


def test_llama_rows_are_paired_with_our_losses(tmp_path: Path) -> None:
    base = np.array([1.0, 2.0, 3.0])
    nll = base + np.array([0.01, 0.02, 0.0])
    tensors = [{"name": "blk.0.ssm_in.weight", "type": "Q4_0", "shape": [4, 32], "bytes": 72},
               {"name": "token_embd.weight", "type": "Q6_K", "shape": [4, 32], "bytes": 105}]
    figures = {"perplexity": 7.4, "kl": 0.01, "agreement": 0.9, "nll_per_window": nll.tolist(), "tensor_bytes": 177,
               "file_bytes": 300, "tensors": tensors}
    file = tmp_path / "llama.json"
    file.write_text(json.dumps({"texts": {"a.txt": {"windows": 3, "types": {"q4_0": figures}}}}))
    (found,) = llama_rows(file, {"a.txt": base, "b.txt": base})
    expected = perplexity_ratio(nll, base)
    assert found["texts"]["a.txt"]["ratio"] == expected.ratio
    assert found["texts"]["a.txt"]["ratio_se"] == expected.se
    assert found["linear_bits"] == 4.5
    with pytest.raises(ValueError, match=r"measured 3 windows of a\.txt, this table 2"):
        llama_rows(file, {"a.txt": base[:2]})


def test_the_table_shows_ratios_and_what_failed() -> None:
    rows = [row("original", "float", 1.0, 100.0), row("original", "w8a8", 1.0012), row("norm-dt:0", "w8a8", 1.002),
            row("norm-dt:1", "w8a8", 1.004), {"model": "original", "variant": "w4a4", "error": "no | way"}]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "1.0012 ± 0.0010" in lines[3]
    assert "0.500" in lines[3]
    assert "no / way" in lines[-1]
    summary = twin_summary(rows, KINDS)
    assert summary == "a.txt: w8a8 on norm-dt: worst of 2 seeds 1.0040, best 1.0020, on the original 1.0012"


def test_twins_are_asked_for_by_kind_and_seed(tmp_path: Path) -> None:
    assert quality.source_of("original", tmp_path, None, tmp_path) == tmp_path
    with pytest.raises(ValueError, match="unknown twin 'norm-dt': write kind:seed"):
        quality.source_of("norm-dt", tmp_path, None, tmp_path)
    with pytest.raises(ValueError, match="takes its moments from --calibration"):
        quality.source_of("eigenbasis:0", tmp_path, None, tmp_path)


@pytest.mark.parametrize("model_name", ["original", "norm-dt:0", "gate-conv:0"])
def test_a_row_from_end_to_end(tiny_mamba: Any, tmp_path: Path, model_name: str) -> None:
    pytest.importorskip("mambacompress.passes.quantize", reason="the quantize pass is not there yet")
    tiny_mamba.save_pretrained(tmp_path / "model")
    bench = quality.Bench(tmp_path / "model", {"a.txt": WINDOWS}, torch.from_numpy(WINDOWS))
    original = bench.original_row()
    assert original["texts"]["a.txt"]["ratio"] == 1.0
    source = quality.source_of(model_name, tmp_path / "model", None, tmp_path)
    variant = Variant("rtn", "rtn-w8a8")
    found = bench.row(source, model_name, variant, tmp_path / "out")
    assert "error" not in found
    assert found["tensor_bytes"] < 0.5 * original["tensor_bytes"]
    assert 8 < found["linear_bits"] < 11  # scales are large on so small a model
    assert 0.9 < found["texts"]["a.txt"]["ratio"] < 1.1
    assert found["texts"]["a.txt"]["kl"] > 0
    assert bench.key("original", variant) == bench.key("original", variant) != bench.key("norm-dt:0", variant)
    again = bench.row(source, model_name, variant, tmp_path / "out")  # replaces what an earlier run left
    assert again["texts"] == found["texts"]
