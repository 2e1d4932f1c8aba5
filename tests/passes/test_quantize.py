"""What quantize packs, how it chooses static ranges, and what it refuses; the grids and observers beneath it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacompress.calibration import BlockCalibration
from mambacompress.errors import UserError
from mambacompress.models.heads import TransformedHead
from mambacompress.models.modelmap import ModelMap, set_module
from mambacompress.models.packed import PackedEmbedding, PackedHead, PackedLinear
from mambacompress.numerics import Grid, quantize_activation, searched_scales, sqnr_db, widest_scales
from mambacompress.passes.formats import packed_bytes
from mambacompress.passes.observers import Moment, RowSample, inputs_of, percentile_of, watching
from mambacompress.passes.quantize import Quantize, best_range, round_weight
from mambacompress.schema import QuantizeConfig
from tests.passes.hosts import adopted

LINEARS = ("in_proj", "x_proj", "dt_proj", "out_proj")
ALL = (*LINEARS, "embedding", "head")


def hidden(batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 32, 32, generator=generator) * torch.logspace(-1, 1, 32) for _ in range(batches)]


def calibration(model_map: ModelMap, *, trial: bool = False) -> BlockCalibration:
    return BlockCalibration(hidden(), model_map.blocks[0], trial=trial)


def quantize(**changes: Any) -> Quantize:
    return Quantize(QuantizeConfig(**changes))


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("activations", ["none", "int8-token", "int8-tensor"])
@torch.no_grad()
def test_every_named_matrix_becomes_packed(make_host: Any, kind: str, activations: str) -> None:
    model_map = adopted(make_host, kind)
    run = calibration(model_map)
    block = model_map.blocks[0]
    names = list(block.matrices())
    report = quantize(activations=activations).apply_block(block, run)
    for path in names:
        packed = block.module.get_submodule(path)
        assert isinstance(packed, PackedLinear)
        assert packed.activations.mode == (activations.split("-")[1] if "-" in activations else "none")
        assert report[f"{path.removeprefix('mixer.')}.sqnr_db"] > 35
        if activations == "int8-tensor":
            assert packed.act_scale is not None
            reported = report[f"{path.removeprefix('mixer.')}.act_scale"]
            assert reported == pytest.approx(packed.act_scale.item(), rel=1e-4)
    assert all(isinstance(value, int | float) for value in report.values())
    assert 0 < run.error(block) < (0.02 if activations == "int8-tensor" else 0.002)


@torch.no_grad()
def test_what_is_not_named_stays_the_very_same_float(make_host: Any) -> None:
    model_map = adopted(make_host)
    block = model_map.blocks[0]
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    quantize(maps=("in_proj",)).apply_block(block, calibration(model_map))
    after = block.module.state_dict()
    assert not any("in_proj.weight" in name for name in after)
    for name, value in before.items():
        if "in_proj" not in name:
            assert torch.equal(after[name], value), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_unpacked_matrices_are_halved_where_that_is_harmless(make_host: Any, kind: str) -> None:
    model_map = adopted(make_host, kind)
    run = calibration(model_map)
    block = model_map.blocks[0]
    block.mixer.conv.weight[0] = 1e6  # does not fit fp16
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    quantize(maps=("in_proj", "x_proj", "dt_proj", "out_proj"), rest="float16").apply_block(block, run)
    halved = {name for name, value in block.module.state_dict().items() if value.dtype == torch.float16}
    assert halved == ({"mixer.paths.0.A_log"} if kind == "mamba" else set())
    for name in halved:
        assert sqnr_db(before[name], block.module.state_dict()[name]) > 60
    assert block.mixer.conv.weight.dtype == torch.float32
    block.module(run.hidden[0])


@torch.no_grad()
def test_each_row_and_so_each_quantity_has_its_own_scale(make_host: Any) -> None:
    """Shrinking z's rows a thousandfold changes neither x's codes nor the relative error of z's."""
    model_map = adopted(make_host)
    weight = model_map.blocks[0].site("z").module.weight
    codes, scales = round_weight(weight.data, Grid(8), "w")
    weight.data[64:] /= 1024
    smaller, shrunk = round_weight(weight.data, Grid(8), "w")
    assert torch.equal(smaller, codes)
    assert torch.allclose(shrunk[:64], scales[:64], rtol=0)
    assert torch.allclose(shrunk[64:] * 1024, scales[64:], rtol=1e-6)


@torch.no_grad()
def test_overrides_decide_per_tensor(make_host: Any) -> None:
    model_map = adopted(make_host)
    block = model_map.blocks[0]
    quantize(weights="int4", group_size=16, activations="int8-token", maps=LINEARS,
             overrides={"dt_proj": {"weights": "int8"}, "x_proj": {"activations": "none"}}).apply_block(
                 block, calibration(model_map))
    mixer = block.mixer
    projection = mixer.paths[0].projection
    assert (mixer.in_proj.weights.bits, mixer.in_proj.weights.group_size) == (4, 16)
    assert (projection.dt_proj.weights.bits, projection.dt_proj.weights.group_size) == (8, None)
    assert (projection.x_proj.activations.mode, mixer.out_proj.activations.mode) == ("none", "token")


@torch.no_grad()
def test_codes_that_no_longer_match_the_weight_are_a_bug(make_host: Any) -> None:
    model_map = adopted(make_host)
    block = model_map.blocks[0]
    site = block.site("y")
    grid = Grid(4, 16)
    scales = widest_scales(site.weight.data, grid)
    block.rounded[site.path] = (grid.round(site.weight.data, scales), scales)
    with pytest.raises(RuntimeError, match=r"block 0 out_proj was edited after gptq"):
        quantize(weights="int4", group_size=16, maps=("out_proj",)).apply_block(block, calibration(model_map))


@torch.no_grad()
def test_searched_clipping_lowers_the_block_error(make_host: Any) -> None:
    errors = {}
    for search in (False, True):
        model_map = adopted(make_host)
        run = calibration(model_map)
        quantize(weights="int4", group_size=16, scale_search=search, maps=("in_proj", "out_proj")).apply_block(
            model_map.blocks[0], run)
        errors[search] = run.error(model_map.blocks[0])
    assert errors[True] < errors[False]


@torch.no_grad()
def test_nan_weights_are_named(make_host: Any) -> None:
    model_map = adopted(make_host)
    model_map.blocks[0].site("y").weight.data[1, 2] = float("inf")
    with pytest.raises(UserError, match="block 0 out_proj: the weight holds NaN or Inf"):
        quantize(maps=("out_proj",)).apply_block(model_map.blocks[0], calibration(model_map))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_the_bias_takes_the_mean_error_away(make_host: Any, kind: str) -> None:
    errors, means = [], []
    for correct in (False, True):
        model_map = adopted(make_host, kind)
        run = calibration(model_map)
        block = model_map.blocks[0]
        quantize(weights="int4", activations="int8-tensor", maps=("in_proj", "out_proj"),
                 bias_correction=correct).apply_block(block, run)
        errors.append(run.error(block))
        off = torch.cat([r - y for r, y in zip(run.reference(), run.outputs(block), strict=True)])
        means.append(off.mean((0, 1)).norm())
    assert means[1] < 1e-4 * means[0] + 1e-5
    assert errors[1] < errors[0]
    assert block.mixer.out_proj.spec()["bias"]


# -- static ranges -----------------------------------------------------------------------------------------------------


def test_the_range_of_least_output_error_wins() -> None:
    """A lone outlier in one channel: clipping is free where the weight ignores it, ruin where it matters."""
    x_TI = torch.randn(1000, 16)
    x_TI[5, 3] = 300.0
    sample = RowSample(1000)
    sample.add(x_TI)
    ignores, needs = torch.randn(8, 16), torch.randn(8, 16)
    ignores[:, 3], needs[:, 3] = 0.0, 50.0
    percentiles = (99.9, 100.0)
    assert best_range(sample, ignores, 8, percentiles)[0] == 99.9
    assert best_range(sample, needs, 8, percentiles)[0] == 100.0
    for weight in (ignores, needs):
        percentile, scale = best_range(sample, weight, 8, percentiles)
        errors = {}
        for p in percentiles:
            codes, used = quantize_activation(x_TI, "tensor", 8, torch.tensor(sample.range_at(p) / 127))
            errors[p] = ((codes * used - x_TI) @ weight.T).norm()
        assert percentile == min(errors, key=lambda p: errors[p])
        assert scale == pytest.approx(sample.range_at(percentile) / 127)


@torch.no_grad()
def test_a_static_scale_is_the_largest_calibration_value(make_host: Any) -> None:
    model_map = adopted(make_host)
    block, run = model_map.blocks[0], calibration(model_map)
    largest = max(x.abs().max() for x in inputs_of(block, "mixer.in_proj", run.batches()))
    quantize(activations="int8-tensor", maps=("in_proj",)).apply_block(block, run)
    assert block.mixer.in_proj.act_scale.item() == pytest.approx(largest.item() / 127)


@torch.no_grad()
def test_token_scales_do_not_depend_on_other_tokens_and_static_ones_not_on_the_input(make_host: Any) -> None:
    for mode in ("int8-token", "int8-tensor"):
        model_map = adopted(make_host)
        block = model_map.blocks[0]
        quantize(activations=mode, maps=LINEARS).apply_block(block, calibration(model_map))
        x_BLD = hidden(1)[0]
        changed = x_BLD.clone()
        changed[:, 16:] *= 100
        assert torch.equal(block.module(x_BLD)[:, :16], block.module(changed)[:, :16]), mode


@torch.no_grad()
def test_the_scan_gets_a_scale_a_channel_and_keeps_the_function(make_host: Any) -> None:
    model_map = adopted(make_host)
    block, run = model_map.blocks[0], calibration(model_map)
    report = quantize(scan="int8", percentile="auto", maps=LINEARS).apply_block(block, run)
    quantizer = block.mixer.paths[0].scan_quantizer
    assert quantizer is not None
    scales = quantizer.scales()
    assert scales.u.shape == scales.dt.shape == scales.z.shape == (64,)
    assert scales.B.shape == scales.C.shape == (1, 8)
    assert report["scan.percentile"] in (99.9, 99.99, 99.999, 100.0)
    assert run.error(block) < 0.01


# -- embedding and head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activations", ["none", "int8-token", "int8-tensor"])
@torch.no_grad()
def test_embedding_and_head(make_host: Any, tied: bool, activations: str) -> None:
    model_map = adopted(make_host, tie_word_embeddings=tied)
    table_VD, out_VD = model_map.embedding.weight.data.clone(), model_map.head.weight.data.clone()
    x_BLD = hidden(1)[0]
    item = quantize(activations=activations)
    item.plan(model_map)
    exact = nn.functional.linear(model_map.final_norm(x_BLD), out_VD)
    item.apply_embedding(model_map)
    item.apply_head(model_map, BlockCalibration([x_BLD], model_map.blocks[-1], reference=()))
    embedding, head = model_map.embedding.module, model_map.head.module
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedHead)
    assert (head.qweight.data_ptr() == embedding.qweight.data_ptr()) is tied
    ids = torch.arange(97)
    assert torch.allclose(embedding(ids), table_VD, atol=table_VD.abs().max().item() / 200)
    got = head(model_map.final_norm(x_BLD))
    assert (got - exact).norm() < 0.02 * exact.norm()
    assert (head.act_scale is not None) is (activations == "int8-tensor")


@pytest.mark.parametrize("size", [1.0, 1e6])
@torch.no_grad()
def test_the_head_keeps_its_transform_in_half_precision_where_it_fits(make_host: Any, size: float) -> None:
    model_map = adopted(make_host)
    transform = torch.randn(32, 32) * size
    head = TransformedHead(97, 32, transform=transform, weight=model_map.head.weight)
    set_module(model_map.host, model_map.head.path, head)
    x_BLD = hidden(1)[0]
    exact = head(model_map.final_norm(x_BLD))
    item = quantize(activations="int8-tensor")
    item.apply_embedding(model_map)
    item.apply_head(model_map, BlockCalibration([x_BLD], model_map.blocks[-1], reference=()))
    packed = model_map.head.module
    assert packed.transform.dtype == (torch.float16 if size == 1.0 else torch.float32)
    assert (packed(model_map.final_norm(x_BLD)) - exact).norm() < 0.02 * exact.norm()


def test_half_of_a_tie_is_refused(make_host: Any) -> None:
    model_map = adopted(make_host)
    for named, missing in (("embedding", "head"), ("head", "embedding")):
        with pytest.raises(UserError, match=f"share one matrix.*add {missing}"):
            quantize(maps=("in_proj", named)).plan(model_map)
    with pytest.raises(UserError, match="one format"):
        quantize(weights="int4", overrides={"head": {"weights": "int8"}}).plan(model_map)
    quantize(maps=("in_proj", "embedding")).plan(adopted(make_host, tie_word_embeddings=False))


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@torch.no_grad()
def test_planned_bytes_are_the_stored_bytes(make_host: Any, kind: str) -> None:
    model_map = adopted(make_host, kind)
    item = quantize(weights="int4", group_size=4, activations="int8-tensor",
                    overrides={"embedding": {"weights": "int8"}, "head": {"weights": "int8"}})
    planned = {}
    for edit in item.plan(model_map).edits:
        if edit.bits:
            planned[(edit.block, edit.target)] = edit.bits
    block = model_map.blocks[0]
    item.apply_block(block, calibration(model_map))
    for path, sites in block.matrices().items():
        packed = block.module.get_submodule(path)
        bias = 0 if packed.bias is None else 4 * packed.rows
        assert planned[(0, sites[0].tensor)] == 8 * (packed.nbytes() - bias) / (packed.rows * packed.columns)
    item.apply_embedding(model_map)
    embedding = model_map.embedding.module
    assert planned[(None, "embedding")] == 8 * embedding.nbytes() / (97 * 32)


def test_coverage_counts_tensors_and_bytes(make_host: Any) -> None:
    model_map = adopted(make_host)
    plan = quantize(maps=("in_proj", "embedding", "head")).plan(model_map)
    line = next(edit.what for edit in plan.edits if edit.target == "coverage")
    sizes = dict.fromkeys((*LINEARS, "embedding"), 0)
    for tensor, shape in model_map.matrices().values():
        sizes[tensor] += shape.numel()
    share = (sizes["in_proj"] + sizes["embedding"]) / sum(sizes.values())
    assert "in_proj 2/2, x_proj 0/2" in line
    assert f"{share:.1%}" in line


def test_groups_that_do_not_divide_name_the_layer_and_a_size_that_does(make_host: Any) -> None:
    with pytest.raises(UserError, match=r"block 0 dt_proj has 4 input channels.*use group size 4") as caught:
        quantize(weights="int4", group_size=16).plan(adopted(make_host))
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"block 0 in_proj has 32 input channels.*use group size 32"):
        quantize(weights="int4", group_size=24, maps=("in_proj",)).plan(adopted(make_host))


def test_nothing_matched_is_an_error_and_a_missing_tensor_a_refusal(make_host: Any) -> None:
    model_map = adopted(make_host, "mamba2")
    with pytest.raises(UserError, match=r"matches nothing.*name some of in_proj"):
        quantize(maps=("x_proj", "dt_proj")).plan(model_map)
    refusals = quantize(maps=("in_proj", "x_proj"), scan="int8").plan(model_map).refusals
    assert {refusal.target for refusal in refusals} == {"x_proj", "scan"}


def test_a_four_bit_embedding_of_a_small_model_warns(make_host: Any) -> None:
    with pytest.warns(UserWarning, match="4-bit embedding costs"):
        plan = quantize(weights="int4", group_size=4).plan(adopted(make_host))
    assert any("below a billion" in edit.what for edit in plan.edits if edit.target == "embedding")


def test_packed_bytes_of_both_formats() -> None:
    eight, four = QuantizeConfig(), QuantizeConfig(weights="int4", group_size=32, activations="int8-tensor")
    shape = torch.Size((10, 64))
    assert packed_bytes(shape, eight.of("in_proj")) == 640 + 40  # type: ignore[arg-type]
    assert packed_bytes(shape, four.of("in_proj")) == 320 + 10 * 2 * 2 + 4  # type: ignore[arg-type]


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(4, 8)])
@pytest.mark.parametrize("scales_of", [widest_scales, searched_scales])
def test_rounding_twice_changes_nothing(grid: Grid, scales_of: Any) -> None:
    w_OI = torch.randn(6, 32) * torch.logspace(-2, 2, 6)[:, None]
    scales = scales_of(w_OI, grid)
    codes = grid.round(w_OI, scales)
    assert codes.min() >= grid.lowest
    assert codes.max() <= grid.highest
    assert torch.equal(scales.to(grid.scale_dtype).float(), scales), "the scale is not what is stored"
    again = widest_scales(grid.dequantize(codes, scales), grid)
    assert torch.equal(again, scales)
    assert torch.equal(grid.round(grid.dequantize(codes, scales), again), codes)


def test_all_sixteen_codes_lose_less_than_fifteen() -> None:
    w_OI, grid = torch.randn(500, 64), Grid(4, 64)
    scales = widest_scales(w_OI, grid)
    ours = (grid.dequantize(grid.round(w_OI, scales), scales) - w_OI).square().mean()
    usual = w_OI.abs().amax(1, keepdim=True) / 7
    theirs = ((w_OI / usual).round() * usual - w_OI).square().mean()
    assert ours < 0.82 * theirs


def test_the_search_minimises_the_weighted_error() -> None:
    w_OI, importance_I, grid = torch.randn(20, 32), torch.logspace(-2, 2, 32), Grid(4, 16)

    def error(scales: Tensor) -> Tensor:
        off = grid.dequantize(grid.round(w_OI, scales), scales) - w_OI
        return grid.grouped(off.square() * importance_I).sum(-1)

    best = searched_scales(w_OI, grid, importance_I)
    for shrink in torch.linspace(0.5, 1.0, 26):
        assert (error(best) <= error(grid.storable(widest_scales(w_OI, grid) * shrink)) * (1 + 1e-5)).all()


def test_zero_and_tiny_rows_have_a_usable_scale() -> None:
    for grid in (Grid(8), Grid(4, 8)):
        w_OI = torch.zeros(2, 16)
        w_OI[1] = 1e-9
        scales = searched_scales(w_OI, grid)
        assert (scales != 0).all()
        assert scales.isfinite().all()
        assert not grid.round(w_OI, scales)[0].any()


# -- observers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_a_sample_does_not_depend_on_the_batches(capacity: int) -> None:
    x_TI = torch.randn(300, 4)
    whole, parts = RowSample(capacity), RowSample(capacity)
    whole.add(x_TI)
    for part in x_TI.split([1, 50, 3, 146, 100]):
        parts.add(part)
    assert torch.equal(whole.rows(), parts.rows())
    assert len(whole.rows()) <= capacity
    assert len(whole.rows()) > min(capacity, 300) / 2 - 1
    assert whole.absmax == parts.absmax == x_TI.abs().max()
    assert torch.allclose(parts.mean_square_I, x_TI.double().square().mean(0))
    assert whole.range_at(100.0) == x_TI.abs().max()


def test_percentiles_are_values_that_occur() -> None:
    values = torch.arange(1, 1001).float()
    assert percentile_of(-values, 99.9) == 999
    assert percentile_of(values, 50) == 500
    assert percentile_of(values, 100) == 1000


def test_moments_are_sums_in_double() -> None:
    moment, x_TI = Moment(), torch.randn(100, 5)
    for part in x_TI.split(7):
        moment.add(part)
    assert torch.allclose(moment.mean(), x_TI.double().T @ x_TI.double() / 100, rtol=1e-5)
    with pytest.raises(UserError, match="empty"):
        Moment().mean()


@torch.no_grad()
def test_inputs_are_what_the_module_multiplies(make_host: Any) -> None:
    model_map = adopted(make_host)
    block = model_map.blocks[0]
    h_BLD = hidden(1)[0]
    taps: dict[str, Tensor] = {}
    block.mixer.tap = taps.__setitem__
    block.module(h_BLD)
    block.mixer.tap = None
    for path, sites in block.matrices().items():
        (x_TI,) = inputs_of(block, path, [h_BLD])
        assert torch.equal(x_TI, taps[sites[0].tensor].flatten(0, -2))
    assert not block.module.mixer.in_proj._forward_pre_hooks


def test_a_module_that_never_runs_is_reported(make_host: Any) -> None:
    block = adopted(make_host).blocks[0]
    with pytest.raises(RuntimeError, match=r"in_proj never ran"), watching(block, ["mixer.in_proj"], lambda *_: None):
        pass
