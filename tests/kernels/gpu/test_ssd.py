"""The scan of Mamba-2 in Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacompress.kernels import registry
from mambacompress.kernels.ssd_scan import ssd_scan
from mambacompress.kernels.ssd_state_update import ssd_state_update
from mambacompress.kernels.tolerances import TRITON_CHUNKED
from tests.kernels.gpu.parity import FLOATS, assert_gradients, assert_same, both
from tests.kernels.scans import packed_ids, ssd_problem


def problem(device: str, dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
    return {name: t.to(device, dtype) for name, t in ssd_problem(*sizes).items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(2, 1, 4, 8, 16, 2), (1, 3, 2, 5, 7, 1), (1, 63, 4, 20, 70, 2),
                                   (1, 257, 2, 16, 24, 1)])
def test_forward(device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    p = problem(device, dtype, *sizes)
    assert_same(*both(ssd_scan, **p), dtype, TRITON_CHUNKED)
    assert_same(*both(ssd_scan, **p, dt_limit=(0.05, 0.3)), dtype, TRITON_CHUNKED)
    for name in ("D_H", "dt_bias_H", "initial_state_BHPN"):
        del p[name]
    p["dt_BLH"] = p["dt_BLH"].abs()
    ids = packed_ids(sizes[0], sizes[1], 4).to(device)
    assert_same(*both(ssd_scan, **p, dt_softplus=False, seq_idx_BL=ids), dtype, TRITON_CHUNKED)


def test_packed_sequences_from_a_state(device: str) -> None:
    p = problem(device, torch.float32, 2, 150, 2, 8, 16, 1)
    ids = torch.tensor([[0] * 70 + [1] * 10 + [2] * 70, [0] * 63 + [1] + [2] * 64 + [0] * 22]).to(device)
    assert_same(*both(ssd_scan, **p, seq_idx_BL=ids), torch.float32, TRITON_CHUNKED)


def test_steps_agree_with_the_scan(device: str) -> None:
    p = problem(device, torch.float32, 1, 5, 2, 8, 16, 1)
    with registry.backend("triton"), torch.no_grad():
        whole, final = ssd_scan(**p)
        state, parts = p["initial_state_BHPN"], []
        for t in range(5):
            y, state = ssd_state_update(state, p["x_BLHP"][:, t], p["dt_BLH"][:, t], p["A_H"], p["B_BLGN"][:, t],
                                        p["C_BLGN"][:, t], p["D_H"], p["dt_bias_H"])
            parts.append(y)
    assert_same([torch.stack(parts, 1), state], [whole, final], torch.float32, TRITON_CHUNKED)


@pytest.mark.parametrize("sizes", [(2, 1, 4, 8, 16, 2), (1, 3, 2, 5, 7, 1), (1, 63, 4, 20, 70, 2),
                                   (1, 257, 2, 16, 24, 1)])
def test_gradients(device: str, sizes: tuple[int, ...]) -> None:
    leaves = problem(device, torch.float32, *sizes)
    assert_gradients(ssd_scan, leaves, least=TRITON_CHUNKED)
    assert_gradients(ssd_scan, leaves, least=TRITON_CHUNKED, dt_limit=(0.2, 0.4),
                     seq_idx_BL=packed_ids(*sizes[:2], 4).to(device))
    for name in ("D_H", "dt_bias_H", "initial_state_BHPN"):
        del leaves[name]
    leaves["dt_BLH"] = leaves["dt_BLH"].abs()
    assert_gradients(ssd_scan, leaves, least=TRITON_CHUNKED, dt_softplus=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(device: str, dtype: torch.dtype) -> None:
    assert_gradients(ssd_scan, problem(device, dtype, 1, 150, 4, 16, 24, 2), dtype)


def test_gradients_of_packed_sequences_from_a_state(device: str) -> None:
    leaves = problem(device, torch.float32, 2, 150, 2, 8, 16, 1)
    ids = torch.tensor([[0] * 70 + [1] * 10 + [2] * 70, [0] * 63 + [1] + [2] * 64 + [0] * 22]).to(device)
    assert_gradients(ssd_scan, leaves, least=TRITON_CHUNKED, seq_idx_BL=ids)


def test_gradient_of_a_final_state_alone(device: str) -> None:
    leaves = problem(device, torch.float32, 1, 70, 2, 5, 7, 1)
    del leaves["D_H"], leaves["C_BLGN"]
    C = torch.randn(1, 70, 1, 7).to(device)
    assert_gradients(lambda **p: ssd_scan(**p, C_BLGN=C.to(p["x_BLHP"].dtype))[1], leaves, least=TRITON_CHUNKED)


def test_compiles_into_a_graph(device: str) -> None:
    p = problem(device, torch.float32, 1, 20, 2, 5, 7, 1)

    def block(x: torch.Tensor) -> torch.Tensor:
        y, final = ssd_scan(**(p | {"x_BLHP": x * 2}))
        return y.relu().sum() + final.sum()

    x = torch.randn_like(p["x_BLHP"]).requires_grad_()
    with registry.backend("triton"):
        expected = torch.autograd.grad(block(x), x)[0]
        got = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(x), x)[0]
    torch.testing.assert_close(got, expected)
