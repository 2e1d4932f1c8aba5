"""ssd_scan and ssd_state_update: the chunked form against the recurrence, from any state, packed or not."""

from __future__ import annotations

import pytest
import torch

from mambacompress.kernels import native
from mambacompress.kernels.registry import backend
from mambacompress.kernels.selective_scan import selective_scan
from mambacompress.kernels.ssd_scan import ssd_scan, ssd_scan_reference, ssd_scan_sequential
from mambacompress.kernels.ssd_state_update import ssd_state_update
from mambacompress.kernels.tolerances import CHUNKED_VERSUS_STEPS, FORWARD, GRADIENT, rms_ratio
from tests.kernels.scans import (
    assert_close,
    at_level,
    available_levels,
    cast,
    nan_filled,
    needs_native,
    packed_ids,
    randn,
    run,
    runs_of,
    ssd_problem,
    threads,
)

TOKENS = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")
SIZES = [(1, 1, 2, 3, 4, 1), (2, 3, 4, 5, 7, 2), (2, 63, 4, 8, 16, 2), (1, 257, 8, 17, 5, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_are_the_recurrence(size: tuple[int, ...], chunk: int, packed: bool) -> None:
    p = ssd_problem(*size)
    ids = packed_ids(size[0], size[1]) if packed else None
    result = ssd_scan_reference(**p, chunk_size=chunk, seq_idx_BL=ids)
    for a, b in zip(result, ssd_scan_sequential(**p, seq_idx_BL=ids), strict=True):
        assert rms_ratio(a, b) < FORWARD[torch.float64]


def test_it_is_the_selective_scan_with_one_decay_a_head() -> None:
    """Mamba-2 is Mamba-1 with A the same for every channel and state of a head, dt the same for every channel."""
    p = ssd_problem(2, 13, 4, 3, 5, 2)
    y, final = ssd_scan(**p)
    spread = lambda t: t.repeat_interleave(3, -1)  # noqa: E731 - heads to channels
    want, state = selective_scan(
        p["x_BLHP"].flatten(2), spread(p["dt_BLH"]), spread(p["A_H"])[:, None].expand(-1, 5), p["B_BLGN"], p["C_BLGN"],
        spread(p["D_H"]), None, spread(p["dt_bias_H"]), initial_state_BEN=p["initial_state_BHPN"].flatten(1, 2))
    assert rms_ratio(y.flatten(2), want) < FORWARD[torch.float64]
    assert rms_ratio(final.flatten(1, 2), state) < FORWARD[torch.float64]


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_reference(packed: bool) -> None:
    p = {k: v.requires_grad_() for k, v in ssd_problem(2, 5, 2, 2, 3, 1).items()}
    names = list(p)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]) if packed else None
    assert torch.autograd.gradcheck(
        lambda *t: ssd_scan_reference(**dict(zip(names, t, strict=True)), chunk_size=2, seq_idx_BL=ids),
        tuple(p.values()))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_decode_agrees_with_prefill(name: str) -> None:
    with backend(name):
        _decode_agrees_with_prefill(exact=name == "auto" and native.library() is not None)


def _decode_agrees_with_prefill(exact: bool) -> None:
    p = cast(ssd_problem(2, 50, 4, 8, 16, 2), torch.float32)
    y, final = ssd_scan(**p, chunk_size=16)
    state, parts = p["initial_state_BHPN"], []
    for t in range(50):
        y_t, state = ssd_state_update(state, p["x_BLHP"][:, t], p["dt_BLH"][:, t], p["A_H"], p["B_BLGN"][:, t],
                                      p["C_BLGN"][:, t], p["D_H"], p["dt_bias_H"])
        parts.append(y_t)
    if exact:
        assert torch.equal(torch.stack(parts, 1), y)
        assert torch.equal(state, final)
    assert rms_ratio(torch.stack(parts, 1), y) < CHUNKED_VERSUS_STEPS
    assert rms_ratio(state, final) < CHUNKED_VERSUS_STEPS


def test_any_cut_continues_where_it_stopped() -> None:
    p = ssd_problem(2, 23, 4, 3, 5, 2)
    y, final = ssd_scan(**p, chunk_size=8)
    for at in (1, 8, 13):
        part = {k: v[:, :at] if k in TOKENS else v for k, v in p.items()}
        rest = {k: v[:, at:] if k in TOKENS else v for k, v in p.items()}
        y_a, state = ssd_scan(**part, chunk_size=8)
        y_b, end = ssd_scan(**{**rest, "initial_state_BHPN": state}, chunk_size=8)
        assert rms_ratio(torch.cat([y_a, y_b], 1), y) < FORWARD[torch.float64]
        assert rms_ratio(end, final) < FORWARD[torch.float64]


def test_packed_sequences_equal_separate_ones() -> None:
    p = ssd_problem(2, 31, 2, 3, 4, 1)
    ids = packed_ids(2, 31)
    y, final = ssd_scan(**p, seq_idx_BL=ids, chunk_size=7)
    for b in range(2):
        for i, part in enumerate(runs_of(ids[b])):
            row = {k: v[b:b + 1, part] if k in TOKENS else v for k, v in p.items()}
            row["initial_state_BHPN"] = p["initial_state_BHPN"][b:b + 1] if i == 0 else None
            y_part, end = ssd_scan(**row, chunk_size=7)
            assert rms_ratio(y[b:b + 1, part], y_part) < FORWARD[torch.float64]
        assert rms_ratio(final[b:b + 1], end) < FORWARD[torch.float64]


def test_dt_limits_clamp_after_softplus() -> None:
    p = ssd_problem(1, 9, 2, 3, 4, 1)
    y, _ = ssd_scan(**p, dt_limit=(0.2, 0.4))
    dt = torch.nn.functional.softplus(p["dt_BLH"] + p["dt_bias_H"]).clamp(0.2, 0.4)
    want, _ = ssd_scan(**{**p, "dt_BLH": dt, "dt_bias_H": None}, dt_softplus=False)
    assert rms_ratio(y, want) < FORWARD[torch.float64]


def test_strong_decay_over_long_chunks_stays_finite() -> None:
    p = cast(ssd_problem(1, 300, 2, 4, 8, 1), torch.float32)
    p["A_H"] = torch.tensor([-50.0, -1e-4])
    for t in ssd_scan(**p, chunk_size=300):
        assert torch.isfinite(t).all()


def against_fp64(problem: dict[str, torch.Tensor], dtype: torch.dtype, name: str, **options: object) -> None:
    """The backend of that name in ``dtype`` against the recurrence in fp64, outputs and gradients."""
    p = cast(problem, dtype, ("A_H", "D_H", "dt_bias_H", "initial_state_BHPN"))
    with backend("reference"):
        reference = run(ssd_scan_sequential, {k: v.double() for k, v in p.items()}, **options)
    with backend(name), nan_filled():
        result = run(ssd_scan, p, chunk_size=32, **options)
    assert_close(result, reference, FORWARD[dtype], GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_in_low_precision(size: tuple[int, ...], dtype: torch.dtype) -> None:
    against_fp64(ssd_problem(*size), dtype, "reference")


@needs_native
@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (1, 20, 6, 64, 128, 1)], ids=str)
def test_native_parity_and_gradients(level: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    with at_level(level):
        against_fp64(ssd_problem(*size), dtype, "native")


@needs_native
@pytest.mark.parametrize("absent", [("D_H",), ("dt_bias_H",), ("initial_state_BHPN",)], ids=str)
def test_native_optional_inputs(absent: tuple[str, ...]) -> None:
    problem = {k: v for k, v in ssd_problem(2, 20, 4, 5, 16, 2).items() if k not in absent}
    against_fp64(problem, torch.float32, "native")


@needs_native
@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("options", [{"packed": True}, {"dt_limit": (0.1, 0.4)}, {"dt_softplus": False}], ids=str)
def test_native_options(level: str, options: dict[str, object]) -> None:
    problem = ssd_problem(2, 40, 4, 5, 18, 2)
    passed = {k: v for k, v in options.items() if k != "packed"}
    if "packed" in options:
        passed["seq_idx_BL"] = packed_ids(2, 40)
    if "dt_softplus" in options:
        problem["dt_BLH"] = problem["dt_BLH"].abs() + 0.5
    with at_level(level):
        against_fp64(problem, torch.float32, "native", **passed)


@needs_native
def test_one_and_two_threads_give_the_same_bits() -> None:
    problem = cast(ssd_problem(3, 65, 6, 16, 32, 1), torch.float32)
    results = []
    for count in (1, 2):
        with threads(count), backend("native"):
            results.append(run(ssd_scan, problem))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@needs_native
def test_the_custom_op_is_well_formed() -> None:
    from mambacompress.kernels.ssd_scan.cpu import scan_op

    p = cast(ssd_problem(2, 5, 4, 3, 4, 2), torch.float32)
    arguments = (p["x_BLHP"], p["dt_BLH"], p["A_H"], p["B_BLGN"], p["C_BLGN"], p["D_H"], p["dt_bias_H"],
                 p["initial_state_BHPN"], None, True, 0.0, 1.0, True)
    torch.library.opcheck(scan_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_errors_name_the_tensor() -> None:
    p = ssd_problem(2, 5, 4, 3, 4, 2)
    with pytest.raises(ValueError, match=r"A has shape \(3,\), expected \(4,\)"):
        ssd_scan(**{**p, "A_H": randn(3)})
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        ssd_scan(**{**p, "B_BLGN": randn(2, 5, 3, 4)})
    with pytest.raises(ValueError, match="chunk_size must be at least 1"), backend("reference"):
        ssd_scan(**p, chunk_size=0)
