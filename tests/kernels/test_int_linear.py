"""Integer linears: exact products, one rounding rule, and rows that do not depend on one another."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int4_linear import int4_linear, int4_linear_reference, pack_nibbles, unpack_nibbles
from mambacompress.kernels.int8_linear import int8_linear, int8_linear_reference, int_matmul
from mambacompress.kernels.int8_linear import reference as int8_reference

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
MODES = [("token", 8), ("token", 4), ("tensor", 8), ("tensor", 4), ("none", 8)]


def int8_problem(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return torch.randn(rows, inputs), q, torch.rand(outputs) * 0.01 + 1e-3, torch.randn(outputs)


def int4_problem(rows: int, inputs: int, outputs: int, group: int, asymmetric: bool = False) -> dict[str, Tensor]:
    nibbles = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    zero = torch.randint(0, 16, (outputs, inputs // group), dtype=torch.uint8) if asymmetric else None
    scale = (torch.rand(outputs, inputs // group) * 0.01 + 1e-3).half()
    return {"x": torch.randn(rows, inputs), "qweight": pack_nibbles(nibbles), "scale": scale, "zero": zero,
            "bias": torch.randn(outputs)}


def quantized_by_hand(x: Tensor, mode: str, bits: int, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    qmax = 127 if bits == 8 else 7
    scale = x.abs().amax(-1, keepdim=True) / qmax if mode == "token" else act_scale
    return torch.clamp(torch.round(x / scale), -qmax, qmax).long(), scale


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 33), st.data())
def test_product_is_exact(rows: int, inputs: int, outputs: int, data: st.DataObject) -> None:
    elements = st.sampled_from([-128, -127, -1, 0, 1, 63, 127])
    a = torch.from_numpy(data.draw(hnp.arrays(np.int8, (rows, inputs), elements=elements)))
    b = torch.from_numpy(data.draw(hnp.arrays(np.int8, (outputs, inputs), elements=elements)))
    assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().T)
    assert torch.equal(int8_reference._int_matmul_fp32(a, b).long(), a.long() @ b.long().T)


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_product_of_very_few_inputs(inputs: int) -> None:
    """torch._int_mm returns uninitialised memory for one input: now and then, so ask often."""
    for rows in range(1, 10):
        for outputs in (1, 2, 5, 14, 24):
            a, b = (torch.randint(-128, 128, (n, inputs), dtype=torch.int8) for n in (rows, outputs))
            for _ in range(20):
                assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().T)


def test_product_is_exact_where_sums_are_largest() -> None:
    a, b = torch.full((2, 8192), -127, dtype=torch.int8), torch.full((3, 8192), 127, dtype=torch.int8)
    for product in (int_matmul, int8_reference._int_matmul_fp32):
        assert product(a, b).unique().tolist() == [-127 * 127 * 8192]


@pytest.mark.parametrize(("mode", "bits"), MODES[:4])
@pytest.mark.parametrize("shape", [(5, 48, 33), (1, 768, 16), (3, 7, 5)])
def test_int8_is_the_formula(mode: str, bits: int, shape: tuple[int, int, int]) -> None:
    x, q, scale, bias = int8_problem(*shape)
    act_scale = torch.tensor(0.02) if mode == "tensor" else None
    codes, row_scale = quantized_by_hand(x, mode, bits, act_scale)
    expected = (codes @ q.long().T).float() * scale * row_scale + bias
    y = int8_linear(x, q, scale, bias, activation=mode, act_scale=act_scale, act_bits=bits)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("mode", "bits"), MODES[:4])
@pytest.mark.parametrize(("inputs", "group"), [(64, 64), (64, 32), (192, 64), (48, 16), (20, 2)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_is_the_formula(mode: str, bits: int, inputs: int, group: int, asymmetric: bool) -> None:
    problem = int4_problem(3, inputs, 18, group, asymmetric)
    act_scale = torch.tensor(0.02) if mode == "tensor" else None
    codes, row_scale = quantized_by_hand(problem["x"], mode, bits, act_scale)
    zero = 8 if problem["zero"] is None else problem["zero"].long().repeat_interleave(group, 1)
    weight = unpack_nibbles(problem["qweight"]).long() - zero
    total = torch.zeros(3, 18)
    for g in range(inputs // group):
        columns = slice(g * group, (g + 1) * group)
        total = total + (codes[:, columns] @ weight[:, columns].T).float() * problem["scale"][:, g].float()
    y = int4_linear(**problem, group_size=group, activation=mode, act_scale=act_scale, act_bits=bits)
    assert torch.equal(y, total * row_scale + problem["bias"])


@pytest.mark.parametrize("width", [8, 4])
def test_weight_only_is_the_dequantized_product(width: int) -> None:
    if width == 8:
        x, q, scale, bias = int8_problem(7, 96, 40)
        weight = q.double() * scale.double()[:, None]
        y = int8_linear(x.double(), q, scale, bias, activation="none")
    else:
        problem = int4_problem(7, 96, 40, 32, asymmetric=True)
        x, bias = problem["x"], problem["bias"]
        nibbles = unpack_nibbles(problem["qweight"]).double() - problem["zero"].double().repeat_interleave(32, 1)
        weight = nibbles * problem["scale"].double().repeat_interleave(32, 1)
        y = int4_linear(**(problem | {"x": x.double()}), group_size=32, activation="none")
    assert torch.allclose(y, x.double() @ weight.T + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("mode", "bits"), MODES[:4])
def test_a_row_does_not_depend_on_the_others(mode: str, bits: int, dtype: torch.dtype) -> None:
    x, q, scale, bias = int8_problem(512, 96, 80)
    x = x.to(dtype)
    four = int4_problem(1, 96, 80, 32)
    arguments = {"activation": mode, "act_scale": torch.tensor(0.03) if mode == "tensor" else None, "act_bits": bits}
    for run in (lambda v: int8_linear(v, q, scale, bias, **arguments),
                lambda v: int4_linear(**(four | {"x": v}), group_size=32, **arguments)):
        together = run(x)
        assert together.dtype == dtype
        for count in (1, 2, 9, 33):
            assert torch.equal(run(x[200:200 + count]), together[200:200 + count])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_special_rows_stay_apart(backend: str) -> None:
    x, q, scale, bias = int8_problem(6, 32, 8)
    with registry.backend(backend):
        clean = int8_linear(x, q, scale, bias)
        x[1], x[2], x[3] = 0.0, float("nan"), x[3] * 1e-43
        x[4, 0] = float("inf")
        y = int8_linear(x, q, scale, bias)
        static = int8_linear(x, q, scale, bias, activation="tensor", act_scale=torch.tensor(0.01))
    assert torch.isnan(static[2]).all()
    assert torch.isfinite(static[[0, 1, 3, 4, 5]]).all()  # a static scale clamps Inf
    assert torch.equal(y[[0, 5]], clean[[0, 5]])
    assert torch.equal(y[1], bias)
    assert torch.isnan(y[2]).all()
    assert torch.isnan(y[4]).all()
    assert torch.allclose(y[3], bias, atol=1e-30)


def test_shapes() -> None:
    x, q, scale, _ = int8_problem(6, 32, 8)
    assert int8_linear(x.reshape(2, 3, 32), q, scale).shape == (2, 3, 8)
    assert torch.equal(int8_linear(x[0], q, scale), int8_linear(x, q, scale)[0])
    assert int8_linear(x[:0], q, scale).shape == (0, 8)
    strided = torch.randn(6, 64)[:, ::2]
    assert torch.equal(int8_linear(strided, q, scale), int8_linear(strided.contiguous(), q, scale))
    four = int4_problem(6, 32, 8, 16)
    assert int4_linear(**(four | {"x": torch.randn(0, 2, 32)}), group_size=16).shape == (0, 2, 8)


def test_gradient_goes_straight_through() -> None:
    x, q, scale, bias = int8_problem(3, 16, 5)
    x.requires_grad_()
    int8_linear(x, q, scale, bias).sum().backward()
    assert torch.allclose(x.grad, (q.float() * scale[:, None]).sum(0).expand(3, -1), atol=1e-6)

    x = torch.tensor([[0.5] * 15 + [50.0]], requires_grad=True)  # the last input clips
    int8_linear(x, q, scale, activation="tensor", act_scale=torch.tensor(0.01)).sum().backward()
    assert x.grad[0, 15] == 0
    assert (x.grad[0, :15] != 0).any()

    four = int4_problem(3, 16, 5, 8)
    x = four["x"].requires_grad_()
    int4_linear(**four, group_size=8).sum().backward()
    weight = (unpack_nibbles(four["qweight"]).float() - 8) * four["scale"].float().repeat_interleave(8, 1)
    assert torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=1e-6)


def test_op_registration() -> None:
    x, q, scale, bias = int8_problem(2, 16, 5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.mambacompress
    torch.library.opcheck(ops.int8_linear, (x, q, scale, bias, "token", None, 8, False), test_utils=tests)
    four = int4_problem(2, 16, 5, 8)
    torch.library.opcheck(ops.int4_linear, (*four.values(), 8, "tensor", torch.tensor(0.1), 8, False), test_utils=tests)


def test_fp32_fallback_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q, scale, bias = int8_problem(5, 2048 + 96, 24)
    expected = int8_linear(x, q, scale, bias)
    monkeypatch.setattr(int8_reference, "int_mm_is_exact", lambda: False)
    assert torch.equal(int8_reference.int8_linear_reference(x, q, scale, bias), expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.ones(2, 15)}, r"weight \[5, 16\]"), ({"activation": "row"}, "unknown activation mode 'row'"),
    ({"activation": "tensor"}, "act_scale"), ({"act_bits": 5}, "not 5"), ({"bias": torch.ones(4)}, "bias"),
    ({"scale": torch.ones(4)}, "scale"), ({"qweight": torch.ones(5, 16)}, "int8 weight"),
    ({"x": torch.ones(2, 16, dtype=torch.int8)}, "floats"),
])
def test_int8_refusals(change: dict, message: str) -> None:
    x, q, scale, bias = int8_problem(2, 16, 5)
    with pytest.raises(ValueError, match=message):
        int8_linear(**({"x": x, "qweight": q, "scale": scale, "bias": bias} | change))


@pytest.mark.parametrize(("change", "message"), [
    ({"group_size": 12}, r"groups of 12 do not divide the weight \[5, 16\]"), ({"group_size": 1}, "even"),
    ({"scale": torch.ones(5, 3)}, "scale has shape"), ({"qweight": torch.ones(5, 8, dtype=torch.int8)}, "uint8"),
    ({"zero": torch.ones(5, 1, dtype=torch.uint8)}, "zero has shape"),
])
def test_int4_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int4_linear(**({**int4_problem(2, 16, 5, 8), "group_size": 8} | change))


# -- native code -----------------------------------------------------------------------------------------------------

SHAPES = [(1, 64, 16), (1, 48, 33), (3, 7, 5), (4, 1536, 80), (8, 768, 40), (9, 768, 40), (13, 100, 31), (30, 48, 100),
          (100, 160, 70)]
needs_native = pytest.mark.skipif(native.library() is None, reason=native.why_not())


def groups_of(inputs: int) -> list[int]:
    return [g for g in (2, 16, 24, 32, 48, 64, 80, 128, 256, inputs) if g <= inputs and inputs % g == 0 and g % 2 == 0]


@needs_native
@pytest.mark.parametrize(("mode", "bits"), MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_the_reference(level: str, shape: tuple[int, int, int], mode: str, bits: int) -> None:
    arguments = {"activation": mode, "act_scale": torch.tensor(0.02), "act_bits": bits}

    def same(native_y: Tensor, y: Tensor, what: str) -> None:
        if mode != "none":
            assert torch.equal(native_y, y), what
            return
        error = (native_y.double() - y.double()).norm() / y.double().norm()
        assert error < (2e-6 if y.dtype == torch.float32 else 4e-3), what

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, q, scale, bias = int8_problem(*shape)
        x = x.to(dtype)
        with registry.backend("native"):
            y = int8_linear(x, q, scale, bias, **arguments)
        same(y, int8_linear_reference(x, q, scale, bias, **arguments), f"int8 {dtype}")
        for group in groups_of(shape[1]) if shape[1] % 2 == 0 else []:
            for asymmetric in (False, True):
                four = int4_problem(*shape, group, asymmetric) | {"x": x}
                if asymmetric:
                    four["scale"] = four["scale"].float()
                with registry.backend("native"):
                    y = int4_linear(**four, group_size=group, **arguments)
                expected = int4_linear_reference(*(four[k] for k in ("x", "qweight", "scale", "zero", "bias")),
                                                 group_size=group, **arguments)
                same(y, expected, f"int4 {dtype} groups of {group} {asymmetric}")


@needs_native
@pytest.mark.parametrize(("mode", "bits"), MODES)
def test_native_prefill_is_decode_at_any_number_of_threads(level: str, mode: str, bits: int) -> None:
    """Also weight-only: unlike torch's float product, ours sums every row in the same order."""
    x, q, scale, bias = int8_problem(300, 192, 70)
    four = int4_problem(1, 192, 70, 64)
    arguments = {"activation": mode, "act_scale": torch.tensor(0.03), "act_bits": bits}
    threads = torch.get_num_threads()
    try:
        for run in (lambda v: int8_linear(v, q, scale, bias, **arguments),
                    lambda v: int4_linear(**(four | {"x": v}), group_size=64, **arguments)):
            torch.set_num_threads(1)
            together = run(x)
            assert torch.isfinite(together).all()
            for count in (1, 2, 5, 8, 9, 23):
                assert torch.equal(run(x[100:100 + count]), together[100:100 + count])
            torch.set_num_threads(2)
            assert torch.equal(run(x), together)
            assert torch.equal(run(x[100:101]), together[100:101])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_native_is_what_runs() -> None:
    x, q, scale, bias = int8_problem(2, 32, 8)
    with registry.strict():
        int8_linear(x, q, scale, bias)
        int4_linear(**int4_problem(2, 32, 8, 16), group_size=16)
        with pytest.raises(registry.KernelFallback, match="float64"):
            int8_linear(x.double(), q, scale, bias)
    assert {("int8_linear", "native"), ("int4_linear", "native")} <= {(c.op, c.backend) for c in registry.chosen()}


@needs_native
def test_native_reads_nothing_past_the_end() -> None:
    """Weights at the very end of a mapping: a read beyond them would fault."""
    import mmap

    page = mmap.PAGESIZE
    for outputs, inputs in ((17, 100), (16, 64), (5, 34)):
        memory = mmap.mmap(-1, (outputs * inputs // page + 1) * page)
        start = len(memory) - outputs * inputs
        q = torch.frombuffer(memory, dtype=torch.int8, offset=start).reshape(outputs, inputs)
        q.copy_(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        for rows in (1, 20):
            x, scale = torch.randn(rows, inputs), torch.rand(outputs)
            assert torch.equal(int8_linear(x, q, scale), int8_linear_reference(x, q, scale))
