"""training.jsonl: exact numbers, no step twice, nothing lost to a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mambacompress.errors import UserError
from mambacompress.training.log import LOG, TrainingLog, read_log


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / (step + 3), "rate": 0.1, "tokens": 8 * (step + 1)}


def written(out: Path, done: int, steps: range) -> None:
    log = TrainingLog(out, done)
    for step in steps:
        log.append(row(step) | {"tokens_per_second": 3.0})
    log.close()


def test_rows_come_back_as_they_were(tmp_path: Path):
    assert read_log(tmp_path) == []
    written(tmp_path, 0, range(3))
    assert read_log(tmp_path) == [row(0), row(1), row(2)]
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(0), row(1), row(2)]


def test_steps_after_the_checkpoint_are_written_once(tmp_path: Path):
    written(tmp_path, 0, range(5))
    written(tmp_path, 3, range(3, 6))
    assert read_log(tmp_path) == [row(step) for step in range(6)]


def test_a_new_run_starts_empty(tmp_path: Path):
    written(tmp_path, 0, range(5))
    written(tmp_path, 0, range(1))
    assert read_log(tmp_path) == [row(0)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "[]\n", '{"step": 3}\n', "\n"])
def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path, rest: str):
    written(tmp_path, 0, range(3))
    with open(tmp_path / LOG, "a") as file:
        file.write(rest)
    assert read_log(tmp_path) == [row(0), row(1), row(2)]
    written(tmp_path, 3, range(3, 4))
    assert read_log(tmp_path) == [row(step) for step in range(4)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_sentence(tmp_path: Path):
    log = TrainingLog(tmp_path, 0)
    log.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="the disk is full"):
        log.append(row(0))
