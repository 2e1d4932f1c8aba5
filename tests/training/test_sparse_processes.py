"""Sparse training in two processes: the masks, the losses and the zeros of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.pair import two_processes
from tests.training.sparse_process import result

pytestmark = pytest.mark.xdist_group("sparse processes")

RUNS = ("trainer:sr-ste", "trainer:cast", "loop:sr-ste", "loop:mdgf-linear", "loop:cast")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both of two processes found."""
    answers = two_processes("sparse_process.py", str(tmp_path_factory.mktemp("two")), *RUNS, "fsdp1")
    first, second = (json.loads(out.splitlines()[-1]) for out in answers)
    assert first == second
    return first


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_have_the_masks_and_losses_of_one(found: dict[str, Any], tmp_path: Path, run: str):
    one, two = result(*run.split(":"), tmp_path), found[run]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["masks"] == one["masks"]
    assert one["zeros"] == two["zeros"] == 0.5
    assert two["after"] == pytest.approx(one["after"], rel=1e-3)
    if run.endswith("sr-ste"):
        assert len(set(two["masks"])) > 3  # they did move


def test_fsdp1_is_refused_with_the_reason(found: dict[str, Any]):
    flattened, wrapped = found["fsdp1"]
    assert "has been flattened" in flattened
    assert "groups of M weights lie across processes" in wrapped
