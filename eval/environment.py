"""The machine and the versions a figure was measured with: part of the figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mambacompress.kernels.registry import Choice

PACKAGES = ("mambacompress", "torch", "transformers", "lm_eval", "numpy")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of ``packages``, those installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device | str = "cpu") -> str:
    """One line: processor, cores of this process, instruction set torch sees, memory; the GPU where ``device`` is
    one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    level, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    line = f"{_processor()}, {cores} cores ({level}), {threads} thread{'s' if threads != 1 else ''}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        line += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    device = torch.device(device)
    return f"{torch.cuda.get_device_name(device)}; {line}" if device.type == "cuda" else line


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for row in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def backend(choices: Iterable[Choice] | None = None) -> str:
    """The kernels that ran (in this process, where no choices are given): ``selective_scan: native, ...``; torch where
    none did.
    """
    from mambacompress.kernels.registry import chosen

    used: dict[str, list[str]] = {}
    for choice in chosen() if choices is None else choices:
        used.setdefault(choice.op, [])
        if choice.backend not in used[choice.op]:
            used[choice.op].append(choice.backend)
    return (
        ", ".join(f"{op}: {'+'.join(names)}" for op, names in sorted(used.items())) or "torch (no kernel of ours ran)"
    )
