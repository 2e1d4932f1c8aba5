"""How long something takes on a GPU, and what the card does at best.

A time is the median of single runs between two events, with the L2 cache overwritten before each: what a model finds,
whose tensors are too many to stay there. The GPU sleeps before each run until its launches are queued: what is measured
is the kernels, not how fast Python asks for them. Ceilings are measured the same way: a copy, a product in fp16 and one
in int8, so that a kernel is compared with what this card gives, not with its data sheet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 0.2  # of runs for one figure
MOST_RUNS = 100
FLUSHED = 256 << 20  # bytes: more than any L2
ASLEEP = 1_000_000  # clocks, about half a millisecond


class Clock:
    """Times calls on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSHED // 4, dtype=torch.int32, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        """Seconds a call: run at least twice before (kernels are compiled and tuned), at least three times for it."""
        run()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        count = max(3, min(MOST_RUNS, int(SECONDS / max(time.perf_counter() - begun, 1e-6))))
        times = []
        for _ in range(count):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(ASLEEP)
            first.record()
            run()
            last.record()
            times.append((first, last))
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in times) / 1e3


def ceilings(clock: Callable[[Callable[[], Any]], float], device: torch.device) -> dict[str, float]:
    """bytes/s of a copy (read and written), operations/s of products in fp16 and int8."""
    source = torch.empty(512 << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device=device) for _ in range(2))
    q = torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device=device)
    operations = 2.0 * 8192**3
    return {"copy": 2.0 * source.numel() / clock(lambda: target.copy_(source)),
            "fp16": operations / clock(lambda: a @ b), "int8": operations / clock(lambda: torch._int_mm(q, q.t()))}


__all__ = ["Clock", "ceilings"]
