"""One-shot N:M pruning: what each method minimises, and that the zeros reach the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mambacompress as mc
from mambacompress import nm
from mambacompress.calibration import BlockCalibration
from mambacompress.errors import CheckFailed, UserError
from mambacompress.models.packed import PackedLinear, PackedSparseLinear
from mambacompress.nm import Pattern
from mambacompress.numerics import Grid
from mambacompress.passes.hessian import output_error
from mambacompress.passes.prune import Prune, sparsegpt
from mambacompress.recipe import load_recipe
from mambacompress.schema import PruneConfig
from tests.passes.hosts import adopted

SHORT = {"sequences": 4, "length": 16}


def correlated(outputs: int = 24, inputs: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the moment of inputs with unequal, correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    mixing *= torch.randn(inputs, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), 2 * x.T @ x / len(x)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8), Pattern(3, 4), Pattern(5, 16)])
def test_sparsegpt_beats_wanda_beats_magnitude(pattern: Pattern):
    W, H = correlated()
    sparse = sparsegpt(W, H, pattern, block=8)
    assert torch.equal(sparse.weight, nm.pruned(sparse.weight, sparse.mask))
    assert (sparse.mask.unflatten(1, (-1, pattern.of)).sum(-1) == pattern.keep).all()
    wanda = nm.pruned(W, nm.nm_mask(W.abs() * H.diagonal().sqrt(), pattern))
    plain = nm.pruned(W, nm.nm_mask(W.abs(), pattern))
    errors = [output_error(W, Q, H) for Q in (sparse.weight, wanda, plain)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < errors[2]


def test_the_block_size_changes_nothing_but_the_order_of_sums():
    W, H = correlated()
    a, b = sparsegpt(W, H, Pattern(2, 4), block=8), sparsegpt(W, H, Pattern(2, 4), block=1000)
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.weight, b.weight)


def test_without_correlations_nothing_can_be_made_good():
    """H diagonal: SparseGPT's score is Wanda's squared, and the weights that stay do not change."""
    W, H = correlated()
    H = torch.diag(H.diagonal())
    sparse = sparsegpt(W, H, Pattern(2, 4), damp=1e-9)
    mask = nm.nm_mask(W.abs() * H.diagonal().sqrt(), Pattern(2, 4))
    assert torch.equal(sparse.mask, mask)
    torch.testing.assert_close(sparse.weight, nm.pruned(W, mask))


def test_jointly_rounded_weights_are_codes_and_lose_less_than_in_turn():
    W, H = correlated(seed=3)
    joint, alone = sparsegpt(W, H, Pattern(2, 4), Grid(8)), sparsegpt(W, H, Pattern(2, 4))
    assert joint.codes is not None
    assert joint.scales is not None
    torch.testing.assert_close(joint.codes.double() * joint.scales.double(), joint.weight)
    assert not joint.codes[~joint.mask].any()
    assert abs(output_error(W, joint.weight, H) / output_error(W, alone.weight, H) - 1) < 0.05


def test_a_dead_channel_is_pruned_without_harm():
    W, H = correlated()
    H[3], H[:, 3] = 0, 0
    assert not sparsegpt(W, H, Pattern(2, 4)).weight[:, 3].any()


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_block_is_sparse_where_asked_and_nowhere_else(make_host: Any, kind: str, method: str):
    block = adopted(make_host, kind).blocks[0]
    config = PruneConfig(method=method, keep=1, of=4)
    item = Prune(config)
    before = {path: block.module.get_parameter(f"{path}.weight").data.clone() for path in block.matrices()}
    block.patterns = dict.fromkeys((p for p, s in block.matrices().items() if s[0].tensor in config.maps), item.pattern)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 12, 32, generator=generator)]
    with torch.no_grad():
        item.apply_block(block, BlockCalibration(hidden, block))
        for path, sites in block.matrices().items():
            weight = block.module.get_parameter(f"{path}.weight").data
            if sites[0].tensor in config.maps:
                assert nm.excess(weight, Pattern(1, 4)) == 0
                assert int((weight != 0).sum()) == weight.numel() // 4
            else:
                assert torch.equal(weight, before[path])
        outputs = block.module(hidden[0])
        item.finish_block(block)
        assert isinstance(block.mixer.in_proj, PackedSparseLinear)
        assert torch.allclose(block.module(hidden[0]), outputs, atol=2e-2)


def quantized(model: Any, tokenizer: Any, recipe: str, *overrides: str) -> mc.Compressed:
    tokens = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    return mc.quantize(model, recipe, calibration=tokens, tokenizer=tokenizer,
                       overrides=["checks={}", *overrides])


@pytest.mark.parametrize("recipe", ["nm-2of4", "nm-1of4", "nm-1of8", "nm-2of4-w8a8"])
def test_the_file_holds_the_zeros(tiny_mamba: Any, tiny_tokenizer: Any, recipe: str):
    made = quantized(tiny_mamba, tiny_tokenizer, recipe)
    counted = mc.verify(made.directory)
    pattern = Pattern.parse(recipe.split("-")[1])
    assert set(counted["patterns"].values()) == {str(pattern)}
    assert len(counted["patterns"]) == 4
    assert counted["zeros"] >= counted["sparse_weights"] * (1 - pattern.density)
    in_proj = made.model.backbone.layers[0].mixer.in_proj
    assert isinstance(in_proj, PackedSparseLinear)
    assert in_proj.values.dtype == (torch.int8 if "w8" in recipe else torch.float16)
    dense = type(made.model.backbone.layers[0].mixer.paths[0].projection.x_proj)
    assert dense is (PackedLinear if "w8" in recipe else torch.nn.Linear)


def test_int8_runs_bit_for_bit_as_the_dense_code_would(tiny_mamba: Any, tiny_tokenizer: Any):
    made = quantized(tiny_mamba, tiny_tokenizer, "nm-2of4-w8a8", "passes.prune.round=int8")
    sparse = made.model.backbone.layers[1].mixer.out_proj
    dense = PackedLinear.from_float(None, sparse.bias, codes=sparse.codes(), scale=sparse.scale,
                                    weights=mc.models.packed.WeightFormat(8), activations=sparse.activations)
    x = torch.randn(3, 5, sparse.in_features)
    assert torch.equal(sparse(x), dense(x))
    assert torch.equal(sparse(x)[1:2, 4:], sparse(x[1:2, 4:]))


def test_a_group_of_too_many_does_not_verify(tiny_mamba: Any, tiny_tokenizer: Any):
    made = quantized(tiny_mamba, tiny_tokenizer, "nm-2of4")
    module = made.model.backbone.layers[0].mixer.in_proj
    assert module.excess() == 0
    state = module.state_dict()
    state["mask"][0, 0] = 0b0111
    module.load_state_dict(state)
    assert module.excess() == 2  # three of the first four, none of the next
    from safetensors.torch import load_file, save_file

    from mambacompress import artifact, storage

    file = made.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.layers.0.mixer.in_proj.mask"][0, 0] = 0b0111
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = artifact.read_manifest(made.directory)
    manifest["files"][file.name] = {"sha256": storage.sha256_file(file), "bytes": file.stat().st_size}
    storage.write_json(made.directory / artifact.MANIFEST, manifest)
    with pytest.raises(CheckFailed, match="in_proj is not 2:4"):
        mc.verify(made.directory)


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_rotation_after_pruning_is_refused_with_its_reason(tiny_mamba: Any):
    passes = [{"prune": {}}, {"rotate": {"residual": "hadamard"}}]
    with pytest.raises(UserError, match=r"rotate would fill the zeros .*in_proj: R1 mixes its input channels"):
        mc.inspect(tiny_mamba, {"passes": passes})
    assert mc.inspect(tiny_mamba, {"passes": [{"fuse_norms": {}}, *passes[::-1]]}).edits


def test_a_model_trained_sparse_stays_sparse(tiny_mamba: Any, tiny_tokenizer: Any):
    for layer in tiny_mamba.backbone.layers:
        for linear in (layer.mixer.in_proj, layer.mixer.out_proj):
            linear.weight.data = nm.pruned(linear.weight.data, nm.nm_mask(linear.weight.abs(), Pattern(2, 4)))
    tiny_mamba.config.nm_sparsity = {"in_proj": "2:4", "out_proj": "2:4"}
    with pytest.raises(UserError, match="rotate would fill the zeros"):
        mc.inspect(tiny_mamba, "w8a8")
    made = quantized(tiny_mamba, tiny_tokenizer, "w8a8", "passes.rotate=null")
    assert set(mc.verify(made.directory)["patterns"].values()) == {"2:4"}
    tiny_mamba.backbone.layers[1].mixer.out_proj.weight.data[0, :3] = 1.0
    with pytest.raises(UserError, match=r"block 1 out_proj is not 2:4 sparse: 1 of its groups"):
        quantized(tiny_mamba, tiny_tokenizer, "w8a8", "passes.rotate=null")


@pytest.mark.parametrize(("passes", "message"), [
    ([{"prune": {"maps": ["embedding"]}}], "an embedding is looked up, not multiplied"),
    ([{"prune": {"keep": 4, "of": 4}}], "4:4 is no N:M pattern"),
    ([{"prune": {"method": "wanda", "round": "int8"}}], "belongs to sparsegpt"),
    ([{"prune": {"round": "int8"}}], "no quantize pass packs it"),
    ([{"prune": {}}, "gptq", {"quantize": {"weights": "int4"}}], "gptq would fill the zeros of in_proj, out_proj"),
])
def test_what_a_recipe_cannot_ask(passes: list[Any], message: str):
    with pytest.raises(UserError, match=message):
        load_recipe({"passes": passes})


def test_groups_that_do_not_divide_name_the_layer(tiny_mamba: Any):
    with pytest.raises(UserError, match=r"block 0 in_proj has 32 input channels, which groups of 5"):
        mc.inspect(tiny_mamba, {"passes": [{"prune": {"keep": 1, "of": 5}}]})


def test_int4_of_a_sparse_weight_is_refused(tiny_mamba: Any):
    recipe = {"passes": [{"prune": {}}, {"quantize": {"weights": "int4", "group_size": 16}}]}
    with pytest.raises(UserError, match="in_proj is 2:4 sparse, and sparse values are stored as int8 or fp16"):
        mc.inspect(tiny_mamba, recipe)


def test_pruning_in_the_rotated_basis(tiny_mamba: Any, tiny_tokenizer: Any, tmp_path: Path):
    made = quantized(tiny_mamba, tiny_tokenizer, "nm-2of4-w8a8", "passes.rotate={residual: hadamard, out: hadamard}")
    assert [next(iter(step)) for step in made.manifest["recipe"]["passes"]] == [
        "fuse_norms", "smooth", "rotate", "prune", "quantize"]
    assert set(mc.verify(made.directory)["patterns"].values()) == {"2:4"}
