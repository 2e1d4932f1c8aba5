"""training.jsonl: what a run did, a line a step: {"step", "loss", "rate", "tokens"}, numbers that repeat exactly.

step counts from 0, tokens are those read so far, loss is that of the batch before its update. The file is ahead of the
checkpoint, never behind: a line is written with its update, and a run that goes on from a checkpoint first drops the
lines after it. So a run that was stopped anywhere ends with the same file as one that was not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mambacompress import storage

LOG = "training.jsonl"
FIELDS = ("step", "loss", "rate", "tokens")


class TrainingLog:
    """The file ``out / LOG``, opened for a run that has done ``done`` steps."""

    def __init__(self, out: Path, done: int) -> None:
        self.path = out / LOG
        kept = [row for row in read_log(out) if row["step"] < done]
        storage.write_text(self.path, "".join(map(_line, kept)))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, row: dict[str, Any]) -> None:
        """Write one step; other keys than FIELDS are left out. Raises UserError where the disk is full."""
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise storage.explain(error, self.path) from error

    def close(self) -> None:
        """Nothing is appended after this."""
        self._file.close()


def read_log(out: Path) -> list[dict[str, Any]]:
    """The steps logged in ``out`` so far, in order; a line that a kill cut short is left out."""
    try:
        lines = (out / LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(name in row for name in FIELDS):
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps({name: row[name] for name in FIELDS}) + "\n"
