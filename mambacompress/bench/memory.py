"""Memory of this process, from /proc and without torch.

Anonymous (RssAnon): what cannot be dropped and read again. Resident: that and the file pages it has mapped and touched,
libraries and weights alike; of a runtime that maps its weight file, only this counts the weights.
"""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager that samples this process every 5 ms: ``peak`` (anonymous) and ``peak_resident``, None where the
    system does not tell.
    """

    def __init__(self) -> None:
        self.start = self.peak = anonymous_bytes()
        self.peak_resident = resident_bytes()
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
            self._look()

    def record(self) -> dict[str, int | None]:
        """Both peaks, as a stage of a contestant's memory record."""
        return {"anonymous": self.peak, "resident": self.peak_resident}

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak or 0, anonymous_bytes() or 0)
        self.peak_resident = max(self.peak_resident or 0, resident_bytes() or 0)


def anonymous_bytes() -> int | None:
    """RssAnon of this process, None where /proc does not tell."""
    return _read("RssAnon:")


def resident_bytes() -> int | None:
    """VmRSS of this process, None where /proc does not tell."""
    return _read("VmRSS:")


def now() -> dict[str, int | None]:
    """Both, as a stage of a contestant's memory record."""
    return {"anonymous": anonymous_bytes(), "resident": resident_bytes()}


def _read(name: str) -> int | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


__all__ = ["PeakMemory", "anonymous_bytes", "now", "resident_bytes"]
