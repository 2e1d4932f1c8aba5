"""smooth: every fold is exact on the blocks it is legal in, refused by name elsewhere, and kept only where it helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.mixers import build
from mambacompress.models.modelmap import Block
from mambacompress.passes.base import Calibration, Pass
from mambacompress.passes.folds import FOLDS, Fold, Ranges, balance, largest_state
from mambacompress.passes.smooth import Smooth
from mambacompress.schema import SmoothConfig

LEGAL = {
    "mamba": {"norm", "gate", "conv", "states", "dt", "conv_in"},
    "mamba2": {"norm", "norm_gate", "conv_in"},
    "falcon_mamba": {"norm", "gate", "conv", "conv_in"},
}
NAMES = {fold.name for fold in FOLDS}


def fold_named(name: str) -> Fold:
    return next(fold for fold in FOLDS if fold.name == name)


class Coarse(Pass):
    """A stand-in for what comes after: inputs of the linears rounded to a grid of 1/15 of their largest value."""

    name, rank = "coarse", 50

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        for path in self.paths:
            block.module.get_submodule(path).register_forward_pre_hook(_rounded)
        return {}


def _rounded(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    step = arguments[0].abs().amax() / 7
    return (torch.round(arguments[0] / step) * step,)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in LEGAL.items() for name in sorted(names)])
def test_fold_is_exact(exact_model: Any, rms_difference: Any, kind: str, name: str, bias: bool) -> None:
    model = exact_model(kind, use_bias=bias)
    before = model.logits()
    fold = fold_named(name)
    for block in model.map.blocks:
        ranges = Ranges.of(block, model.calibration(block.index), states=name == "states")
        for _, scales in fold.candidates(block, ranges, (0.2, 0.8), NAMES):
            assert all(s.max() / s.min() > 1.01 for s in scales.values())
            fold.apply(block, scales)
            assert rms_difference(model.logits(), before) < 1e-10


@pytest.mark.parametrize("kind", LEGAL)
def test_all_folds_together_are_exact(exact_model: Any, rms_difference: Any, kind: str) -> None:
    model = exact_model(kind)
    before = model.logits()
    item = Smooth(SmoothConfig(**dict.fromkeys(LEGAL[kind], "on")))
    item.plan(model.map)
    records = model.apply(item)
    assert rms_difference(model.logits(), before) < 1e-10
    assert all(record[name] not in ("off", "refused") for record in records for name in LEGAL[kind])


@pytest.mark.parametrize("kind", LEGAL)
def test_factors_of_any_size_are_exact(exact_model: Any, rms_difference: Any, kind: str) -> None:
    """Not only the factors the pass would choose: log-normal ones over four orders of magnitude."""
    model = exact_model(kind)
    before = model.logits()
    for name in sorted(LEGAL[kind]):
        fold = fold_named(name)
        for block in model.map.blocks:
            ranges = Ranges.of(block, model.calibration(block.index), states=False)
            _, scales = next(iter(fold.candidates(block, ranges, (0.5,), set())))
            fold.apply(block, {key: torch.exp(1.5 * torch.randn_like(s)) for key, s in scales.items()})
    assert rms_difference(model.logits(), before) < 1e-10


@pytest.mark.parametrize("kind", LEGAL)
def test_refusals_are_named(exact_model: Any, kind: str) -> None:
    model = exact_model(kind)
    plan = Smooth(SmoothConfig(**dict.fromkeys(NAMES, "auto"))).plan(model.map)
    assert {edit.target for edit in plan.edits} == LEGAL[kind]
    assert {refusal.target for refusal in plan.refusals} == NAMES - LEGAL[kind]
    assert all(len(refusal.reason) > 10 for refusal in plan.refusals)


def test_falcon_says_why(exact_model: Any) -> None:
    model = exact_model("falcon_mamba")
    plan = Smooth(SmoothConfig(states="auto", dt="auto")).plan(model.map)
    assert not plan.edits
    assert all("weightless norm" in refusal.reason for refusal in plan.refusals)
    with pytest.raises(UserError, match=r"smooth\.dt: on cannot be done"):
        Smooth(SmoothConfig(dt="on")).plan(model.map)


@pytest.mark.parametrize(("name", "stream"), [("gate", "y"), ("conv", "y"), ("conv", "u")])
def test_refused_after_an_online_rotation(exact_model: Any, name: str, stream: str) -> None:
    block = exact_model("mamba").map.blocks[0]
    if stream == "y":
        block.mixer.out_rotation = torch.nn.Identity()
    else:
        block.mixer.paths[0].projection.x_rotation = torch.nn.Identity()
    assert "online rotation" in (fold_named(name).refusal(block) or "")


def test_gate_scale_outside_the_sigmoid_is_wrong(exact_model: Any, rms_difference: Any) -> None:
    """The trap of S2: the rows divided by s without s inside the sigmoid changes the function."""
    model = exact_model("mamba")
    before = model.logits()
    block = model.map.blocks[0]
    s = torch.exp(torch.randn(block.mixer.d_inner, dtype=torch.float64))
    fold_named("gate").apply(block, {"y": s})
    assert rms_difference(model.logits(), before) < 1e-10
    block.mixer.gate.scale = None
    assert rms_difference(model.logits(), before) > 1e-2


def test_folding_after_an_online_rotation_is_wrong(exact_model: Any, rms_difference: Any) -> None:
    """W_out <- (W_out diag s) R is exact, (W_out R) diag s is not: the order is smooth, then rotate."""
    model = exact_model("mamba")
    before = model.logits()
    block = model.map.blocks[0]
    E = block.mixer.d_inner
    s = torch.exp(1.5 * torch.randn(E, dtype=torch.float64))
    R = torch.linalg.qr(torch.randn(E, E, dtype=torch.float64))[0]

    class Online(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ R

    wrong = copy.deepcopy(block.module)
    fold_named("gate").apply(block, {"y": s})
    block.site("y").rotate_input(R)
    block.mixer.out_rotation = Online()
    assert rms_difference(model.logits(), before) < 1e-10

    bad = Block.of(0, block.path, wrong)
    bad.site("y").rotate_input(R)
    bad.mixer.out_rotation = Online()
    fold_named("gate").apply(bad, {"y": s})
    x = model.hidden()[0]
    assert rms_difference(wrong(x), block.module(x)) > 0.5


def test_cached_state_stays_in_the_scaled_basis(exact_model: Any, rms_difference: Any) -> None:
    """S4: prefill and decode agree, and the state that is carried is the plain one divided by s."""
    model = exact_model("mamba")
    block = model.map.blocks[0]
    x = model.hidden()[0]
    want, plain = block.mixer.mix(block.norm(x))
    s = torch.exp(torch.randn(block.mixer.paths[0].projection.d_state, dtype=torch.float64))
    fold_named("states").apply(block, {"B": s})
    half = x.shape[1] // 2
    first, state = block.mixer.mix(block.norm(x[:, :half]))
    steps = [first]
    for t in range(half, x.shape[1]):
        y, state = block.mixer.mix(block.norm(x[:, t:t + 1]), state)
        steps.append(y)
    assert rms_difference(torch.cat(steps, 1), want) < 1e-10
    assert rms_difference(state.ssm, plain.ssm / s) < 1e-10


def test_conv_fold_divides_the_cached_state(exact_model: Any, rms_difference: Any) -> None:
    """S3: state and scan output are the plain ones divided by s; the gate taking it back leaves out_proj as it was."""
    model = exact_model("mamba")
    block = model.map.blocks[0]
    x = block.norm(model.hidden()[0])
    want, plain = block.mixer.mix(x)
    out = block.mixer.out_proj.weight.clone()
    s = torch.exp(torch.randn(block.mixer.d_inner, dtype=torch.float64))
    fold_named("conv").apply(block, {"u": s, "z": 1 / s})
    got, state = block.mixer.mix(x)
    assert rms_difference(got, want) < 1e-10
    assert rms_difference(state.ssm, plain.ssm / s[:, None]) < 1e-10
    assert rms_difference(block.mixer.out_proj.weight, out) < 1e-14


def test_folds_survive_the_artifact(exact_model: Any) -> None:
    """A folded Gate and convolution are rebuilt from their spec and state."""
    model = exact_model("mamba")
    model.apply(Smooth(SmoothConfig(gate="on", conv="on")))
    mixer = model.map.blocks[0].mixer
    for module in (mixer.gate, mixer.conv):
        again = build(module.spec()).double()
        again.load_state_dict(module.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values(),
                                                      strict=True))


def test_fold_twice_accumulates(exact_model: Any, rms_difference: Any) -> None:
    model = exact_model("mamba")
    before = model.logits()
    for _ in range(2):
        model.apply(Smooth(SmoothConfig(gate="on", conv="on", states="on")))
    assert rms_difference(model.logits(), before) < 1e-10


@pytest.mark.parametrize(("name", "stream", "tap"), [("dt", "dt_low", "mixer.paths.0.projection.dt_proj"),
                                                     ("gate", "y", "mixer.out_proj"),
                                                     ("conv", "u", "mixer.paths.0.projection.x_proj")])
def test_kept_where_it_helps(exact_model: Any, name: str, stream: str, tap: str) -> None:
    """A stream made uneven by the inverse fold is evened out again, and the error falls."""
    model = exact_model("mamba")
    block = model.map.blocks[0]
    size = block.streams[stream].size
    fold = fold_named(name)
    fold.apply(block, {stream: torch.exp(-1.5 * torch.randn(size, dtype=torch.float64))})
    record = model.apply(Smooth(SmoothConfig(**{name: "auto"})), Coarse(tap))[0]
    assert record[name] not in ("off", "refused")
    assert record["error_after"] < 0.6 * record["error_before"]


def test_dropped_where_it_does_not(exact_model: Any) -> None:
    """S4 changes nothing that this later pass rounds, so it is not kept; with nothing rounded, nothing is."""
    model = exact_model("mamba")
    weight = model.map.blocks[0].mixer.paths[0].projection.x_proj.weight.clone()
    record = model.apply(Smooth(SmoothConfig(states="auto", conv_in="auto")), Coarse("mixer.out_proj"))[0]
    assert (record["states"], record["conv_in"]) == ("off", "off")
    assert model.apply(Smooth(SmoothConfig(gate="auto", dt="auto")))[0]["gate"] == "off"
    assert torch.equal(model.map.blocks[0].mixer.paths[0].projection.x_proj.weight, weight)


def test_ranges_move_with_the_folds(exact_model: Any) -> None:
    """After each fold the moved ranges are those a fresh calibration run would measure.

    The state's range alone is not moved by S3, whose factors it holds only the largest channel of: S4 comes first.
    """
    model = exact_model("mamba")
    block = model.map.blocks[0]
    ranges = Ranges.of(block, model.calibration(0), states=True)
    for fold in FOLDS:
        if fold.name not in LEGAL["mamba"]:
            continue
        _, scales = next(iter(fold.candidates(block, ranges, (0.5,), NAMES)))
        fold.apply(block, scales)
        fold.move(ranges, scales)
        fresh = Ranges.of(block, model.calibration(0), states=True)
        for tap in ("in_proj", "conv", "u", "z", "y", "B", "C", "dt_proj"):
            assert torch.allclose(ranges[tap], fresh[tap], rtol=1e-9), (fold.name, tap)
        if fold.name == "states":
            assert torch.allclose(ranges["h"], fresh["h"], rtol=1e-9)


def test_largest_state_is_the_scan_s_own(exact_model: Any) -> None:
    """Against final states of the mixer itself over all prefixes."""
    model = exact_model("mamba")
    block = model.map.blocks[0]
    x = block.norm(model.hidden()[0])
    state, largest = None, torch.zeros(8, dtype=torch.float64)
    for t in range(x.shape[1]):
        _, state = block.mixer.mix(x[:, t:t + 1], state)
        largest = torch.maximum(largest, state.ssm.abs().amax((0, 1)))
    assert torch.allclose(Ranges.of(block, model.calibration(0), states=True)["h"], largest, rtol=1e-9)


def test_largest_state_in_groups() -> None:
    u, dt = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    A, B, bias = -torch.rand(6, 3), torch.randn(2, 5, 2, 3), torch.randn(6)
    got = largest_state(u, dt, A, B.flatten(2), bias, groups=2)
    halves = [largest_state(u[..., part], dt[..., part], A[part], B[:, :, g], bias[part], groups=1)
              for g, part in enumerate((slice(0, 3), slice(3, 6)))]
    assert torch.allclose(got, torch.cat(halves))


def test_balance_survives_dead_channels() -> None:
    s = balance(torch.tensor([0.0, 1.0, 100.0]), torch.zeros(3), 0.5)
    assert torch.isfinite(s).all()
    assert s.log().mean().abs() < 1e-12


def test_s1_and_s5_alone_may_follow_rotate() -> None:
    assert Smooth(SmoothConfig(norm="auto", dt="auto")).rank == 30
    assert Smooth(SmoothConfig(norm="auto", gate="auto")).rank == 20
