"""The GPU benchmark without a GPU: its cases are right (in the interpreter), what fails is told, and it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.cases import TINY, Case, cases
from benchmarks.gpu.measure import difference, find_peers, measure
from mambacompress.kernels import gpu

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e12, "fp16": 1e14, "int8": 1e14}
NAMES = list(cases(TINY, {}))


def clock(run: Callable[[], Any]) -> float:
    run()
    return 1e-3


@pytest.mark.skipif(not gpu.interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_every_case_has_parity(name: str) -> None:
    row = measure(name, cases(TINY, {})[name], CPU, clock, CEILINGS, backend="triton", compile_reference=False)
    assert row.problems == []
    assert row.ok, f"{row.error} > {row.tolerance}"
    assert row.seconds == 1e-3
    assert row.floor is not None
    assert row.floor > 0
    assert "reference" in row.rivals


def test_a_wrong_kernel_and_one_that_fails_are_told_and_not_timed() -> None:
    answers = iter([torch.ones(3), torch.zeros(3)])
    wrong = measure("wrong", lambda _: Case(lambda: next(answers), 1), CPU, clock, CEILINGS)
    assert not wrong.ok
    assert wrong.seconds is None

    def fail() -> Any:
        raise RuntimeError("out of something")

    failed = measure("failed", lambda _: Case(fail, 1), CPU, clock, CEILINGS)
    assert failed.problems == ["Triton: RuntimeError: out of something"]
    broken = measure("peer", lambda _: Case(lambda: torch.ones(2), 1, peers={"peer": fail}), CPU, clock, CEILINGS)
    assert broken.ok
    assert broken.problems == ["peer: RuntimeError: out of something"]
    text = command.table({"hardware": "a card", "date": "today", "seconds": 1.0, "ceilings": CEILINGS, "decoding": {},
                          "missing_peers": ["mamba_ssm: none"], "skipped": ["a case"]}, [wrong, failed, broken])
    assert "WRONG" in text
    assert "out of something" in text
    assert "not here: mamba_ssm" in text


def test_differences() -> None:
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    assert difference(codes, codes) == 0
    one_off = codes + torch.tensor([0, 1, 0, 0], dtype=torch.int8)
    assert difference((codes, torch.ones(2)), (one_off, torch.ones(2))) == 0.25
    assert difference(codes, codes + 2) == float("inf")


def test_missing_peers_are_named() -> None:
    peers, missing = find_peers()
    assert {name for name, peer in peers.items() if peer is None} == {line.split(":")[0] for line in missing}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert capsys.readouterr().out == "There is no GPU here that torch can use.\n"
