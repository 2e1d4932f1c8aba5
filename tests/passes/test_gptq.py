"""GPTQ against a naive Optimal Brain Surgeon, the descents against their optimality, and the pass on hosts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.calibration import BlockCalibration
from mambacompress.errors import UserError
from mambacompress.models.modelmap import ModelMap
from mambacompress.models.packed import PackedLinear
from mambacompress.numerics import Grid, searched_scales, widest_scales
from mambacompress.passes.gptq import Gptq, compensated, gptq, refined
from mambacompress.passes.hessian import output_error
from mambacompress.passes.quantize import Quantize
from mambacompress.schema import GptqConfig, QuantizeConfig, Recipe
from tests.passes.hosts import adopted

GRIDS = [Grid(4, 8), Grid(4, 16), Grid(4), Grid(8)]


def correlated(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs [rows, channels] with a few strong directions and unequal channels, fp64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    spread = torch.logspace(-1.5, 0.5, channels, dtype=torch.float64)
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64) * spread @ mix


def weight(rows: int, channels: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(x_TI: Tensor) -> Tensor:
    return 2 * x_TI.T @ x_TI / len(x_TI)


def dequantized(codes: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    return grid.dequantize(codes, scales.double())


def brain_surgeon(W_OI: Tensor, H_II: Tensor, grid: Grid, damp: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """Column by column from the definition: round one, move all free ones by the exact OBS formula, invert again."""
    W_OI = W_OI.clone()
    damped_II = H_II + damp * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=torch.float64)
    order = H_II.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(len(H_II)))
    width = grid.group_size or W_OI.shape[1]
    scales_OG = searched_scales(W_OI, grid, H_II.diagonal())
    codes_OI = torch.zeros_like(W_OI)
    free = list(order)
    for j in order:
        if not act_order and grid.group_size is not None and j % width == 0:
            group = slice(j, j + width)
            scales_OG[:, j // width] = searched_scales(W_OI[:, group], grid, H_II.diagonal()[group])[:, 0]
        inverse = torch.linalg.inv(damped_II[free][:, free])
        scale_O = scales_OG[:, j // width].double()
        code_O = (W_OI[:, j] / scale_O).round().clamp(grid.lowest, grid.highest)
        here = free.index(j)
        W_OI[:, free] -= ((W_OI[:, j] - code_O * scale_O) / inverse[here, here])[:, None] * inverse[here]
        codes_OI[:, j] = code_O
        free.remove(j)
    return codes_OI.to(torch.int8), scales_OG


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", [8, 20, 128])
def test_equals_the_naive_surgeon(grid: Grid, act_order: bool, block: int) -> None:
    if grid.group_size is not None and grid.group_size > block:
        block = grid.group_size  # wider groups have scales fixed beforehand
    W_OI, H_II = weight(6, 32), moment(correlated(200, 32))
    got = gptq(W_OI, H_II, grid, damp=0.01, block=block, act_order=act_order)
    codes, scales = brain_surgeon(W_OI, H_II, grid, 0.01, act_order)
    assert torch.equal(got.codes, codes)
    assert torch.equal(got.scales, scales)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, 32), Grid(4)])
def test_beats_rounding_to_nearest(grid: Grid, act_order: bool) -> None:
    x_TI, W_OI = correlated(2000, 64), weight(48, 64)
    H_II = moment(x_TI)
    errors = {}
    scales = searched_scales(W_OI, grid, H_II.diagonal())
    nearest = dequantized(grid.round(W_OI, scales), scales, grid)
    errors["nearest"] = (x_TI @ (nearest - W_OI).T).norm()
    for refine in (0, 3):
        rounded = gptq(W_OI, H_II, grid, act_order=act_order, refine=refine)
        errors[refine] = (x_TI @ (dequantized(rounded.codes, rounded.scales, grid) - W_OI).T).norm()
    assert errors[0] < 0.8 * errors["nearest"]
    assert errors[3] < errors[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_refining_ends_where_no_single_step_helps(grid: Grid) -> None:
    W_OI, H_II = weight(5, 32), moment(correlated(300, 32)) + 0.1 * torch.eye(32, dtype=torch.float64)
    scales = widest_scales(W_OI, grid)
    start = grid.round(W_OI, scales)
    codes, fitted = refined(W_OI, H_II, start, scales, grid, sweeps=200)

    def objective(codes: Tensor, scales: Tensor) -> Tensor:
        off_OI = dequantized(codes, scales, grid) - W_OI
        return (off_OI @ H_II * off_OI).sum(1)

    assert (objective(codes, fitted) <= objective(start, scales)).all()
    for step in (-1, 1):
        for j in range(32):
            moved = codes.clone()
            moved[:, j] = (moved[:, j] + step).clamp(grid.lowest, grid.highest)
            assert (objective(moved, fitted) >= objective(codes, fitted) * (1 - 1e-12)).all()


def test_fitted_scales_are_the_least_squares_ones() -> None:
    grid, W_OI, x_TI = Grid(4, 8), weight(4, 16), correlated(100, 16)
    scales = widest_scales(W_OI, grid)
    codes, fitted = refined(W_OI, moment(x_TI), grid.round(W_OI, scales), scales, grid, sweeps=1)
    for row in range(4):
        parts = torch.stack([x_TI[:, group] @ codes[row, group].double() for group in (slice(0, 8), slice(8, 16))], 1)
        exact = torch.linalg.lstsq(parts, (x_TI @ W_OI[row])[:, None]).solution[:, 0]
        assert torch.allclose(fitted[row].double(), exact, rtol=2e-3), "more than fp16's rounding apart"


def test_a_dead_channel_costs_nothing_and_stores_zero() -> None:
    x_TI = correlated(300, 32)
    x_TI[:, [3, 17]] = 0
    rounded = gptq(weight(6, 32), moment(x_TI), Grid(4, 16), refine=2)
    assert rounded.dead == 2
    assert not rounded.codes[:, [3, 17]].any()
    assert rounded.damp == 0.01


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_representable_weights_stay(grid: Grid, act_order: bool, refine: int) -> None:
    H_II = moment(correlated(300, 32))
    scales = widest_scales(weight(6, 32), grid)
    codes = grid.round(weight(6, 32), scales)
    W_OI = dequantized(codes, scales, grid)
    again = gptq(W_OI, H_II, grid, act_order=act_order, refine=refine)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, scales)


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_fill_the_grid_and_never_leave_it(grid: Grid) -> None:
    W_OI = weight(16, 32) * torch.logspace(-3, 3, 16, dtype=torch.float64)[:, None]
    rounded = gptq(W_OI, moment(correlated(300, 32)), grid, refine=3)
    assert rounded.codes.dtype == torch.int8
    assert rounded.codes.min() >= grid.lowest
    assert rounded.codes.max() <= grid.highest
    assert rounded.scales.isfinite().all()
    assert torch.equal(rounded.scales.to(grid.scale_dtype).float(), rounded.scales)


def test_a_singular_moment_raises_the_damping_and_says_so() -> None:
    x_TI = correlated(4, 32)  # rank 4
    rounded = gptq(weight(6, 32), moment(x_TI), Grid(4, 16), damp=1e-18)
    assert rounded.damp > 1e-18
    with pytest.raises(UserError, match=r"layer 7: .* no Cholesky factor"):
        gptq(weight(6, 32), -moment(correlated(100, 32)), Grid(4, 16), where="layer 7")


def test_compensation_is_the_ridge_solution_and_aims_at_the_float_output() -> None:
    float_TI = correlated(500, 16)
    x_TI = float_TI + 0.3 * torch.randn(500, 16, dtype=torch.float64) @ weight(16, 16)
    W_OI, H_II = weight(8, 16), moment(x_TI)
    drift_II = 2 * (float_TI - x_TI).T @ x_TI / len(x_TI)
    better_OI = compensated(W_OI, H_II, drift_II, damp=0.01)
    ridge = (0.01 * H_II.diagonal().mean() * len(x_TI) / 2).sqrt() * torch.eye(16, dtype=torch.float64)
    stacked = torch.linalg.lstsq(torch.cat([x_TI, ridge]), torch.cat([float_TI @ W_OI.T, ridge @ W_OI.T])).solution.T
    assert torch.allclose(better_OI, stacked, rtol=1e-8)
    target_TO = float_TI @ W_OI.T
    assert (x_TI @ better_OI.T - target_TO).norm() < 0.9 * (x_TI @ W_OI.T - target_TO).norm()
    assert torch.equal(compensated(W_OI, H_II, torch.zeros(16, 16, dtype=torch.float64), 0.01), W_OI)


def test_output_error_is_relative() -> None:
    x_TI, W_OI = correlated(100, 8), weight(4, 8)
    Q_OI = W_OI + 0.01 * weight(4, 8, seed=5)
    direct = (x_TI @ (Q_OI - W_OI).T).square().sum() / (x_TI @ W_OI.T).square().sum()
    assert output_error(W_OI, Q_OI, moment(x_TI)) == pytest.approx(direct.item(), rel=1e-9)


# -- the pass ----------------------------------------------------------------------------------------------------------


def calibration(model_map: ModelMap, index: int = 0, trial: bool = False) -> BlockCalibration:
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(4, 32, 32, generator=generator) * torch.logspace(-1, 1, 32) for _ in range(2)]
    return BlockCalibration(hidden, model_map.blocks[index], trial=trial)


def config(**changes: Any) -> GptqConfig:
    maps = ("in_proj", "x_proj", "dt_proj", "out_proj")
    return GptqConfig(**({"weights": "int4", "group_size": 4, "maps": maps} | changes))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("compensate", [False, True])
@torch.no_grad()
def test_a_block_loses_less_than_by_rounding(make_host: Any, kind: str, compensate: bool) -> None:
    nearest, ours = adopted(make_host, kind), adopted(make_host, kind)
    run = calibration(nearest)
    quantize = Quantize(QuantizeConfig(weights="int4", group_size=4, maps=("in_proj", "x_proj", "dt_proj", "out_proj")))
    quantize.apply_block(nearest.blocks[0], run)
    report = Gptq(config(compensate=compensate)).apply_block(ours.blocks[0], run)
    assert run.error(ours.blocks[0]) < 0.85 * run.error(nearest.blocks[0])
    assert all(isinstance(value, float) for value in report.values())
    assert len(report) == len(ours.blocks[0].matrices()) == len(ours.blocks[0].rounded)


@torch.no_grad()
def test_quantize_packs_exactly_the_chosen_codes(make_host: Any) -> None:
    model_map = adopted(make_host)
    block, run = model_map.blocks[0], calibration(model_map)
    Gptq(config(act_order=True)).apply_block(block, run)
    written = {path: sites[0].weight.data.clone() for path, sites in block.matrices().items()}
    chosen = dict(block.rounded)
    before = run.outputs(block)
    Quantize(QuantizeConfig(weights="int4", group_size=4)).apply_block(block, run)
    for path, (codes, scales) in chosen.items():
        packed = block.module.get_submodule(path)
        assert isinstance(packed, PackedLinear)
        assert torch.equal(packed.codes(), codes)
        assert torch.equal(packed.dequantize(), written[path])
        assert torch.equal(Grid(4, 4).dequantize(codes, scales), written[path])
    for packed_out, float_out in zip(run.outputs(block), before, strict=True):
        assert torch.allclose(packed_out, float_out, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_later_matrices_are_fitted_to_what_comes_out_of_earlier_ones(make_host: Any) -> None:
    """Round everything, put float back behind in_proj, and round that again: the same codes come out."""
    model_map = adopted(make_host)
    block, run = model_map.blocks[0], calibration(model_map)
    original = {path: sites[0].weight.data.clone() for path, sites in block.matrices().items()}
    Gptq(config(compensate=False)).apply_block(block, run)
    first = {path: codes for path, (codes, _) in block.rounded.items()}
    block.rounded.clear()
    for path, value in original.items():
        if "in_proj" not in path:
            block.module.get_submodule(path).weight.data = value
    Gptq(config(compensate=False, maps=("x_proj", "dt_proj", "out_proj"))).apply_block(block, run)
    for path, (codes, _) in block.rounded.items():
        assert torch.equal(codes, first[path])


@torch.no_grad()
def test_trials_and_eight_bits_are_left_alone(make_host: Any) -> None:
    model_map = adopted(make_host)
    block = model_map.blocks[0]
    before = {path: sites[0].weight.data.clone() for path, sites in block.matrices().items()}
    assert Gptq(config()).apply_block(block, calibration(model_map, trial=True)) == {}
    eight = Gptq(config(weights="int8", group_size=None))
    assert set(eight.apply_block(block, calibration(model_map)).values()) == {"8 bits"}
    assert not block.rounded
    assert all(torch.equal(block.module.get_submodule(path).weight, value) for path, value in before.items())
    plan = eight.plan(model_map)
    assert not plan.edits
    assert "8 bits" in plan.refusals[0].reason


def test_the_plan_names_the_layer_and_a_size_that_fits(make_host: Any) -> None:
    model_map = adopted(make_host)
    with pytest.raises(UserError, match=r"block 0 dt_proj has 4 input channels.*group size 4"):
        Gptq(config(group_size=16)).plan(model_map)
    plan = Gptq(config(group_size=16, maps=("in_proj", "out_proj"))).plan(model_map)
    assert [(edit.block, edit.target) for edit in plan.edits] == [
        (0, "in_proj"), (0, "out_proj"), (1, "in_proj"), (1, "out_proj")]


@torch.no_grad()
def test_nan_weights_and_nan_activations_are_named(make_host: Any) -> None:
    model_map = adopted(make_host)
    run = calibration(model_map)
    model_map.blocks[0].module.mixer.out_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(UserError, match="block 0 out_proj: the weight holds NaN"):
        Gptq(config()).apply_block(model_map.blocks[0], run)
    model_map = adopted(make_host)
    broken = BlockCalibration([torch.full((1, 8, 32), float("nan"))], model_map.blocks[0])
    with pytest.raises(UserError, match="activations hold NaN"):
        Gptq(config()).apply_block(model_map.blocks[0], broken)


@torch.no_grad()
def test_each_tensor_has_the_format_quantize_packs_it_in(make_host: Any) -> None:
    recipe = Recipe.model_validate({"passes": [{"gptq": {}}, {"quantize": {
        "weights": "int4", "group_size": 16, "overrides": {
            "out_proj": {"group_size": 32}, "x_proj": {"group_size": None}, "dt_proj": {"weights": "int8"},
            "embedding": {"weights": "int8"}, "head": {"weights": "int8"}}}}]})
    assert Recipe.model_validate(recipe.document()) == recipe
    passes = {name: made(settings) for (name, settings), made in zip(recipe.steps(), (Gptq, Quantize), strict=True)}
    model_map = adopted(make_host)
    block, run = model_map.blocks[0], calibration(model_map)
    for item in passes.values():
        item.plan(model_map)
    report = passes["gptq"].apply_block(block, run)
    assert report["paths.0.projection.dt_proj.skipped"] == "8 bits"
    chosen = dict(block.rounded)
    passes["quantize"].apply_block(block, run)
    groups = {sites[0].tensor: block.module.get_submodule(path).weights.group_size
              for path, sites in block.matrices().items()}
    assert groups == {"in_proj": 16, "x_proj": None, "dt_proj": None, "out_proj": 32}
    assert len(chosen) == 3
    for path, (codes, _) in chosen.items():
        assert torch.equal(block.module.get_submodule(path).codes(), codes)
