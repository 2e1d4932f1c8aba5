"""The worker process of one contestant: reads a JSON command a line, answers a JSON line, does nothing in between.

    python -m mambacompress.bench.worker

Its standard output is the answer pipe alone; what libraries print goes to standard error. A command that fails answers
{"error": "..."} and leaves its traceback on standard error. The end of input is the end of the process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from mambacompress.bench.memory import PeakMemory, now
from mambacompress.bench.runner import KINDS, Runner


class Worker:
    """Commands are methods; their arguments and results are JSON."""

    def __init__(self) -> None:
        self._runner: Runner | None = None

    def prepare(self, kind: str, model: str, folder: str) -> dict[str, Any]:
        """Make a peer's own files from a model directory: {variant: path}."""
        return {"files": KINDS[kind].prepare(model, folder)}

    def load(self, kind: str, path: str, variant: str, threads: int, prompt: int, batch: int) -> dict[str, Any]:
        """Load the contestant; its libraries are imported first, so that they do not count as its memory."""
        KINDS[kind].warm(path)
        start = now()
        with PeakMemory() as memory:
            self._runner = KINDS[kind].make(path, variant, threads, prompt, batch)
        return {
            "vocabulary": self._runner.vocabulary,
            "prefills": self._runner.prefills,
            "memory": {"start": start, "load": memory.record()},
        }

    def warm_up(self, **task: Any) -> dict[str, Any]:
        """One untimed run under the memory sampler."""
        with PeakMemory() as memory:
            self.run(**task)
        return {"memory": memory.record()}

    def run(self, what: str, ids: list[int], steps: int = 0) -> dict[str, Any]:
        """Seconds of one ``prefill`` of the ids, or of ``steps`` steps of ``decode`` with a row an id."""
        tokens = np.array(ids, dtype=np.int64)
        runner = self._loaded()
        return {"seconds": runner.prefill(tokens) if what == "prefill" else runner.decode(tokens, steps)}

    def logits(self, ids: list[list[int]], to: str) -> dict[str, Any]:
        """Write the logits of the prompts (rows of one length) to an .npz file: ``prompt`` of the first, ``steps``."""
        tokens_BL = np.array(ids, dtype=np.int64)
        runner = self._loaded()
        found = {"steps": runner.step_logits(tokens_BL)}
        if runner.prefills:
            found["prompt"] = runner.prompt_logits(tokens_BL[0])
        with open(to, "wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        return {}

    def facts(self) -> dict[str, Any]:
        """What the runtime says of itself, and what it holds now."""
        return {**self._loaded().facts(), "live_bytes": self._loaded().live_bytes(), "held": now()}

    def _loaded(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("no contestant is loaded")
        return self._runner


def main() -> None:
    """Serve commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(worker, command.pop("do"))
        try:
            answer = method(**command)
        except Exception as error:  # the boundary of a process: the parent gets the sentence, stderr the traceback
            traceback.print_exc()
            answer = {"error": " ".join((str(error) or type(error).__name__).split())[:400]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
