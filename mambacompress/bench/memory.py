"""Peak anonymous memory of this process (RssAnon: what cannot be dropped and read again), without torch."""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager that samples this process's RssAnon every 5 ms; ``peak`` is None where the system does not
    tell.
    """

    def __init__(self) -> None:
        self.start = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self.peak = max(self.peak or 0, anonymous_bytes() or 0)

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak or 0, anonymous_bytes() or 0)


def anonymous_bytes() -> int | None:
    """RssAnon of this process, None where /proc does not tell."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


__all__ = ["PeakMemory", "anonymous_bytes"]
