"""A worker process seen from the parent: started with its runtime's thread settings, asked over pipes, ended with it.

It stands in a session of its own, so that Ctrl-C reaches the parent alone, which then ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

# What the runtimes' thread pools read at start.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE = 5  # seconds that a worker gets to end by itself


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a Python process that finds what this one finds, with so many threads."""
    search = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": search, **dict.fromkeys(_THREADS, str(threads))}


class WorkerFailed(Exception):
    """A command failed in the worker, or the worker is gone; the message is one sentence."""


class Process:
    """``with Process(threads) as process: process.ask("load", ...)``."""

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mambacompress.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=child_environment(threads),
            start_new_session=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(hurry=error is not None)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer. Raises WorkerFailed where it has none."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the worker was started without pipes")
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(str(answer["error"]))
        return answer

    def close(self, hurry: bool = False) -> None:
        """End the process: by the end of its input, or at once."""
        if hurry:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"its process ended with code {code}" + (f": {lines[-1][:300]}" if lines else "")


__all__ = ["Process", "WorkerFailed", "child_environment"]
