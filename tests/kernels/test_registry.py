"""Which backend runs, why, and how that is told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambacompress.kernels import native, registry
from mambacompress.kernels.compile import CompileError, compile_library, sources
from mambacompress.kernels.registry import KernelFallback, backend, check_all, choose, chosen, recording, strict

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native.library() is None, reason=native.why_not())


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cuda'; known: auto, native, triton, reference"), backend("cuda"):
        pass


def test_reference_can_be_forced_and_nests() -> None:
    with backend("reference"):
        assert choose("an_op", CPU, torch.float32) == "reference"
        with backend("auto"):
            assert choose("an_op", CPU, torch.float64) == "reference"
    assert any(c.op == "an_op" and c.reason == "asked for" for c in chosen())


@needs_native
def test_auto_takes_native_code_where_it_can() -> None:
    assert choose("an_op", CPU, torch.float32) == "native"
    assert choose("an_op", CPU, torch.bfloat16) == "native"
    assert choose("an_op", CPU, torch.float64) == "reference"
    assert choose("an_op", torch.device("meta"), torch.float32) == "reference"
    assert choose("an_op", CPU, torch.float32, ["this thing"]) == "reference"
    assert any("this thing" in c.reason for c in chosen())


def test_a_fallback_is_an_error_when_strict_or_asked_for_native() -> None:
    with strict(), pytest.raises(KernelFallback, match="float64"):
        choose("an_op", CPU, torch.float64)
    with backend("native"), pytest.raises(KernelFallback, match="float64"):
        choose("an_op", CPU, torch.float64)
    with strict(), backend("reference"):  # what was asked for is no fallback
        assert choose("an_op", CPU, torch.float64) == "reference"


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=registry.logger.name):
        for _ in range(3):
            choose("an_op_to_log", CPU, torch.float32, ["a thing"])
    assert sum("an_op_to_log" in record.message for record in caplog.records) == 1


def test_every_op_agrees_with_its_reference_here() -> None:
    results = check_all()
    assert {"selective_scan", "causal_conv1d", "ssd_scan"} <= {r.op for r in results}
    assert [r for r in results if not r.ok] == []


def test_without_the_library_the_reference_runs_and_says_why() -> None:
    code = ("import torch; from mambacompress.kernels.causal_conv1d import causal_conv1d; "
            "from mambacompress.kernels.registry import chosen; "
            "causal_conv1d(torch.randn(1, 3, 4), torch.randn(4, 4)); print(chosen()[0].backend, chosen()[0].reason)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "MAMBACOMPRESS_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.startswith("reference native code switched off")


@needs_native
def test_levels_are_forced_and_restored() -> None:
    best = native.level()
    try:
        native.force_level("portable")
        assert native.level() == "portable"
    finally:
        native.force_level(None)
    assert native.level() == best
    with pytest.raises(ValueError, match="unknown level 'sse'"):
        native.force_level("sse")


@pytest.mark.parametrize("compiler", ["/nonexistent/compiler", "false"])
def test_a_compiler_that_fails_leaves_nothing_behind(compiler: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CompileError, match=compiler):
        compile_library(tmp_path / "_native.so")
    assert list(tmp_path.iterdir()) == []


def test_every_source_is_packaged() -> None:
    """setup.py compiles what the wheel's package data holds: sources and headers under kernels/."""
    names = {f"{path.parent.name}/{path.name}" for path in sources()}
    assert {"kernels/dispatch.cpp", "selective_scan/cpu.cpp", "causal_conv1d/cpu.cpp", "ssd_scan/cpu.cpp"} <= names


def test_a_record_holds_what_was_decided_inside_though_it_was_decided_before() -> None:
    with backend("reference"):
        choose("rms_norm", CPU, torch.float32)
        with recording() as outer:
            choose("hadamard", CPU, torch.float32)
            with recording() as inner:
                choose("rms_norm", CPU, torch.float32)
        choose("selective_scan", CPU, torch.float32)
    assert [choice.op for choice in outer] == ["hadamard", "rms_norm"]
    assert [choice.op for choice in inner] == ["rms_norm"]
