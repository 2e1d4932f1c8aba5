"""Memory of a process, from /proc and without torch.

Anonymous (RssAnon): what cannot be dropped and read again. Resident: that and the file pages it has mapped and touched,
libraries and weights alike; of a runtime that maps its weight file, only this counts the weights.
"""

from __future__ import annotations

import threading
from pathlib import Path


class PeakMemory:
    """Context manager that samples this process every 5 ms: ``peak`` (anonymous) and ``peak_resident``, None where the
    system does not tell.
    """

    def __init__(self) -> None:
        held = now()
        self.start = self.peak = held["anonymous"]
        self.peak_resident = held["resident"]
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
        held = now()
        self.peak = max(self.peak or 0, held["anonymous"] or 0)
        self.peak_resident = max(self.peak_resident or 0, held["resident"] or 0)


def now(pid: int | None = None) -> dict[str, int | None]:
    """Bytes of a process (this one where None): ``anonymous`` (RssAnon) and ``resident`` (VmRSS), as a stage of a
    contestant's memory record; None where /proc does not tell, or no longer.
    """
    try:
        text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key: int(rows[name].split()[0]) * 1024 if name in rows else None
            for key, name in (("anonymous", "RssAnon"), ("resident", "VmRSS"))}


def anonymous_bytes(pid: int | None = None) -> int | None:
    """RssAnon of a process (this one where None), None where /proc does not tell."""
    return now(pid)["anonymous"]


__all__ = ["PeakMemory", "anonymous_bytes", "now"]
