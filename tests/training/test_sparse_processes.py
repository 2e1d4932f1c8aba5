"""Sparse training in two processes: the masks, the losses and the zeros of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.sparse_process import result


def two_processes(repository: Path, *arguments: str) -> list[Any]:
    """What each of two processes printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [sys.executable, str(repository / "tests" / "training" / "sparse_process.py"), *arguments]
    common = os.environ | {"PYTHONPATH": str(repository), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                           "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen(script, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    return [json.loads(answer[0].splitlines()[-1]) for answer in answers]


@pytest.mark.parametrize(("wrapper", "methods"), [("trainer", ("sr-ste", "cast")),
                                                  ("loop", ("sr-ste", "mdgf-linear", "cast"))])
def test_two_processes_have_the_masks_and_losses_of_one(tmp_path: Path, repository: Path, wrapper: str,
                                                        methods: tuple[str, ...]):
    first, second = two_processes(repository, wrapper, str(tmp_path / "two"), *methods)
    assert first == second
    for method, two in zip(methods, first, strict=True):
        one = result(wrapper, method, tmp_path / "one")
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4), method
        assert two["masks"] == one["masks"], method
        assert one["zeros"] == two["zeros"] == 0.5
        assert two["after"] == pytest.approx(one["after"], rel=1e-3), method
    assert len(set(first[0]["masks"])) > 3  # they did move


def test_fsdp1_is_refused_with_the_reason(tmp_path: Path, repository: Path):
    first, second = two_processes(repository, "fsdp1", str(tmp_path))
    assert first == second
    assert "has been flattened" in first[0]
    assert "groups of M weights lie across processes" in first[1]
