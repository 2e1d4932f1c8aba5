"""Every shipped Triton kernel compiles for cards that are not here, spills nothing and fits their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambacompress.kernels import gpu
from mambacompress.kernels.offline import Resources, ops

pytestmark = pytest.mark.skipif(not gpu.installed(), reason="Triton is not installed")

PRODUCTS = ("_linear_kernel", "_rotate_kernel", "_chunk_kernel", "_output_kernel", "_input_kernel", "_group_kernel")


@pytest.mark.parametrize("target", list(gpu.TARGETS))
def test_shipped_kernels_compile_and_spill_nothing(target: str, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    done = subprocess.run(
        [sys.executable, "-m", "mambacompress.kernels.offline", "--targets", target, "--json", str(file)],
        capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [Resources(**row) for row in json.loads(file.read_text())]
    assert {r.op for r in found} == set(ops())
    assert [r for r in found if r.wrong()] == []
    assert all(0 < r.registers <= 512 for r in found)
    check_what_docstrings_say(found, target)


def check_what_docstrings_say(found: list[Resources], target: str) -> None:
    """Products run on matrix units; the scan has no words between threads; rows are read 16 bytes at a time."""
    for r in found:
        what = f"{r.kernel} ({r.configuration})"
        if r.kernel in PRODUCTS:
            exact_fp32 = "enable_fp_fusion=True" in r.configuration and r.tensor_cores == 0  # fp32 weight-only products
            assert r.tensor_cores > 0 or exact_fp32, what
        if r.kernel == "_scan_kernel" and target.startswith("sm"):
            assert r.shared == 0, what
        if r.kernel == "_norm_kernel":
            assert r.wide_loads > 0, what


def test_a_spill_is_seen() -> None:
    row = Resources("an_op", "kernel", "", "sm_90", 4, 255, 0, 16, 0, 0, 0)
    assert "spills" in row.wrong()
    assert "shared memory" in Resources("an_op", "kernel", "", "gfx942", 4, 99, 70_000, 0, 0, 0, 0).wrong()


def test_the_interpreter_compiles_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "mambacompress.kernels.offline"], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stdout
