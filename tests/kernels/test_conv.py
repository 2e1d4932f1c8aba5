"""causal_conv1d: against torch's own convolution, its state, packing, and native code against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambacompress.kernels import native
from mambacompress.kernels.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_reference,
    same_conv1d,
    same_conv1d_reference,
)
from mambacompress.kernels.registry import KernelFallback, backend, strict
from mambacompress.kernels.tolerances import FORWARD, GRADIENT, rms_ratio
from tests.kernels.scans import (
    assert_close,
    at_level,
    available_levels,
    cast,
    conv_problem,
    nan_filled,
    needs_native,
    packed_ids,
    run,
    runs_of,
    threads,
)

SIZES = [(1, 1, 5, 4), (2, 2, 17, 4), (2, 63, 48, 4), (1, 257, 19, 3), (2, 9, 5, 1), (1, 20, 7, 16)]


def assert_same(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    """The same bits in native code; torch computes SiLU of a vector and of its tail differently."""
    if name == "auto" and native.library() is not None:
        assert torch.equal(a, b)
    else:
        assert rms_ratio(a, b) < (2e-7 if a.dtype == torch.float32 else 1e-3)


def test_it_is_torchs_convolution() -> None:
    p = conv_problem(2, 11, 6, 4)
    y, final = causal_conv1d_reference(**p)
    padded = torch.cat([p["initial_state"], p["x_BLE"]], 1)
    want = F.silu(F.conv1d(padded.transpose(1, 2), p["weight_EK"][:, None], p["bias_E"], groups=6)).transpose(1, 2)
    assert rms_ratio(y, want) < FORWARD[torch.float64]
    assert torch.equal(final, padded[:, -3:])


def test_gradcheck_of_the_reference() -> None:
    p = {k: v.requires_grad_() for k, v in conv_problem(2, 5, 3, 4).items()}
    names = list(p)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda *t: causal_conv1d_reference(**dict(zip(names, t, strict=True)), seq_idx_BL=ids), tuple(p.values()))


def test_act_scale_is_silu_of_a_scaled_channel() -> None:
    p = conv_problem(1, 5, 4, 4)
    s = torch.rand(4, dtype=torch.float64) + 0.5
    scaled = {**p, "weight_EK": p["weight_EK"] / s[:, None], "bias_E": p["bias_E"] / s}
    assert rms_ratio(causal_conv1d(**scaled, act_scale_E=s)[0] * s, causal_conv1d(**p)[0]) < FORWARD[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_steps_and_chunks_equal_prefill_bit_for_bit(dtype: torch.dtype, name: str) -> None:
    p = cast(conv_problem(2, 70, 21, 4), dtype)
    with backend(name):
        y, final = causal_conv1d(**p)
        for size in (1, 2, 33):
            state, parts = p["initial_state"], []
            for start in range(0, 70, size):
                part, state = causal_conv1d(p["x_BLE"][:, start:start + size], p["weight_EK"], p["bias_E"],
                                            initial_state=state)
                parts.append(part)
            assert_same(torch.cat(parts, 1), y, name)
            assert torch.equal(state, final)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    p = cast(conv_problem(3, 17, 6, 4), torch.float32)
    ids = packed_ids(3, 17, 6)
    with backend(name):
        y, final = causal_conv1d(**p, seq_idx_BL=ids)
        for b in range(3):
            for i, part in enumerate(runs_of(ids[b])):
                state = p["initial_state"][b:b + 1] if i == 0 else None
                y_part, end = causal_conv1d(p["x_BLE"][b:b + 1, part], p["weight_EK"], p["bias_E"], initial_state=state)
                assert_same(y[b:b + 1, part], y_part, name)
            assert torch.equal(final[b:b + 1], end)


def test_an_id_that_comes_back_is_another_sequence() -> None:
    p = cast(conv_problem(1, 6, 3, 4), torch.float32)
    same = causal_conv1d(**p, seq_idx_BL=torch.tensor([[0, 0, 1, 0, 0, 0]]))[0]
    new = causal_conv1d(**p, seq_idx_BL=torch.tensor([[0, 0, 1, 2, 2, 2]]))[0]
    assert torch.equal(same, new)


def test_empty_sequence_keeps_the_state() -> None:
    p = cast(conv_problem(2, 5, 3, 4), torch.float32)
    y, final = causal_conv1d(**{**p, "x_BLE": p["x_BLE"][:, :0]})
    assert y.shape == (2, 0, 3)
    assert torch.equal(final, p["initial_state"])


def test_errors_name_the_tensor() -> None:
    p = conv_problem(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 2, 3\), expected \(2, 3, 3\)"):
        causal_conv1d(**{**p, "initial_state": p["initial_state"][:, 1:]})


@needs_native
@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_parity_and_gradients(level: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    problem = cast(conv_problem(*size), dtype, ("weight_EK", "bias_E"))
    scale = torch.rand(size[2]) + 0.5
    for options, more in (({}, {}), ({"activation": False}, {}), ({}, {"act_scale_E": scale}),
                          ({"seq_idx_BL": packed_ids(size[0], size[1])}, {"act_scale_E": scale})):
        with nan_filled(), strict(), backend("native"), at_level(level):
            result = run(causal_conv1d, {**problem, **more}, **options)
        with backend("reference"):
            reference = run(causal_conv1d, {k: v.double() for k, v in {**problem, **more}.items()}, **options)
        assert_close(result, reference, FORWARD[dtype], GRADIENT[dtype])


def same(x_BLE: torch.Tensor, *rest: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """``same_conv1d`` with two outputs, as ``run`` wants them."""
    return same_conv1d(x_BLE, *rest, **options), x_BLE


@needs_native
@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_same_convolution_and_its_gradients(level: str, dtype: torch.dtype,
                                                   size: tuple[int, int, int, int]) -> None:
    problem = cast(conv_problem(*size), dtype, ("weight_EK", "bias_E"))
    problem["act_scale_E"] = torch.rand(size[2]) + 0.5
    del problem["initial_state"]
    with nan_filled(), strict(), backend("native"), at_level(level):
        result = run(same, problem)
    with backend("reference"):
        reference = run(same, {k: v.double() for k, v in problem.items()})
    assert_close(result, reference, FORWARD[dtype], GRADIENT[dtype])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
def test_same_is_torchs_padding(width: int) -> None:
    for length in (1, 2, 9):
        p = conv_problem(2, length, 6, width)
        y = same_conv1d_reference(p["x_BLE"], p["weight_EK"], p["bias_E"], activation=False)
        want = F.conv1d(p["x_BLE"].transpose(1, 2), p["weight_EK"][:, None], p["bias_E"], padding="same", groups=6)
        assert rms_ratio(y, want.transpose(1, 2)) < FORWARD[torch.float64]


def int8_problem(size: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
    batch, length, channels, width = size
    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    return {"x_BLE": codes(batch, length, channels), "weight_EK": codes(channels, width),
            "bias_E": torch.randn(channels), "initial_state": codes(batch, width - 1, channels),
            "x_scale": torch.rand(channels) * 0.02, "weight_scale_E": torch.rand(channels) * 0.02}


@needs_native
@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_is_exact(level: str, size: tuple[int, int, int, int]) -> None:
    """Without the activation the same bits as the reference at every level; with it, close; the state is codes."""
    p, ids = int8_problem(size), packed_ids(size[0], size[1])
    for more in ({}, {"seq_idx_BL": ids}, {"x_scale": 0.01}):
        with nan_filled(), strict(), backend("native"), at_level(level), torch.no_grad():
            (y, final), (z, _) = causal_conv1d(**{**p, **more}, activation=False), causal_conv1d(**{**p, **more})
        want, last = causal_conv1d_reference(**{**p, **more}, activation=False)
        assert y.dtype == torch.float32
        assert torch.equal(y, want)
        assert final.dtype == torch.int8
        assert torch.equal(final, last)
        assert rms_ratio(z, F.silu(want.double())) < FORWARD[torch.float32]
    del p["initial_state"]
    with nan_filled(), strict(), backend("native"), at_level(level):
        assert torch.equal(same_conv1d(**p, activation=False), same_conv1d_reference(**p, activation=False))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_int8_is_the_convolution_of_what_the_codes_stand_for(name: str) -> None:
    p = int8_problem((2, 11, 6, 4))
    x_scale, w_scale = p.pop("x_scale"), p.pop("weight_scale_E")
    floats = {"x_BLE": p["x_BLE"].double() * x_scale, "weight_EK": p["weight_EK"].double() * w_scale[:, None],
              "bias_E": p["bias_E"].double(), "initial_state": p["initial_state"].double() * x_scale}
    want = causal_conv1d_reference(**floats)[0]
    with backend(name):
        both = causal_conv1d(**p, x_scale=x_scale, weight_scale_E=w_scale)[0]
        of_x = causal_conv1d(**{**p, "weight_EK": floats["weight_EK"].float()}, x_scale=x_scale)[0]
        wide = {name: floats[name].float() for name in ("x_BLE", "initial_state")}
        of_w = causal_conv1d(**{**p, **wide}, weight_scale_E=w_scale)[0]
    for y in (both, of_x, of_w):
        assert rms_ratio(y, want) < FORWARD[torch.float32]


@needs_native
def test_int8_steps_equal_prefill_and_learn_in_the_reference() -> None:
    p = int8_problem((2, 9, 21, 4))
    y, final = causal_conv1d(**p)
    state, parts = p["initial_state"], []
    for t in range(9):
        part, state = causal_conv1d(**{**p, "x_BLE": p["x_BLE"][:, t:t + 1], "initial_state": state})
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, final)
    bias = p["bias_E"].requires_grad_()
    with strict(), pytest.raises(KernelFallback, match="gradients of int8"):
        causal_conv1d(**p)
    causal_conv1d(**p)[0].sum().backward()
    assert bias.grad is not None


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x_scale": None}, TypeError, "x is torch.int8; it takes x_scale"),
    ({"weight_scale_E": None}, TypeError, "weight is torch.int8"),
    ({"initial_state": torch.zeros(2, 3, 6)}, TypeError, "both hold codes"),
    ({"x_scale": torch.ones(5)}, ValueError, r"x_scale has shape \(5,\), expected \(6,\)")], ids=str)
def test_scales_must_fit(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d(**{**int8_problem((2, 9, 6, 4)), **change})


@needs_native
def test_one_and_two_threads_give_the_same_bits() -> None:
    problem = cast(conv_problem(3, 130, 530, 4), torch.float32)
    results = []
    for count in (1, 2):
        with threads(count), backend("native"):
            results.append(run(causal_conv1d, problem))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@needs_native
def test_the_custom_op_is_well_formed() -> None:
    from mambacompress.kernels.causal_conv1d.cpu import conv_op

    p = cast(conv_problem(2, 5, 6, 4), torch.float32)
    scale = torch.rand(6)
    for rest in ((p["initial_state"], None, None, True, 0), (None, None, scale, False, 2)):
        torch.library.opcheck(conv_op, (p["x_BLE"], p["weight_EK"], p["bias_E"], scale, *rest),
                              test_utils=("test_schema", "test_faketensor"))
