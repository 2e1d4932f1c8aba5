"""Sparse training in two processes: the masks, the losses and the zeros of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.pair import two_processes
from tests.training.sparse_process import result


def answers(*arguments: str) -> list[Any]:
    """What each of two processes found."""
    return [json.loads(out.splitlines()[-1]) for out in two_processes("sparse_process.py", *arguments)]


@pytest.mark.parametrize(("wrapper", "methods"), [("trainer", ("sr-ste", "cast")),
                                                  ("loop", ("sr-ste", "mdgf-linear", "cast"))])
def test_two_processes_have_the_masks_and_losses_of_one(tmp_path: Path, wrapper: str, methods: tuple[str, ...]):
    first, second = answers(wrapper, str(tmp_path / "two"), *methods)
    assert first == second
    for method, two in zip(methods, first, strict=True):
        one = result(wrapper, method, tmp_path / "one")
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4), method
        assert two["masks"] == one["masks"], method
        assert one["zeros"] == two["zeros"] == 0.5
        assert two["after"] == pytest.approx(one["after"], rel=1e-3), method
    assert len(set(first[0]["masks"])) > 3  # they did move


def test_fsdp1_is_refused_with_the_reason(tmp_path: Path):
    first, second = answers("fsdp1", str(tmp_path))
    assert first == second
    assert "has been flattened" in first[0]
    assert "groups of M weights lie across processes" in first[1]
