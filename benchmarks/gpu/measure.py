"""One case: is what Triton gives what the reference gives, and how fast are both, and the peers.

A case that fails its parity is not timed: a wrong kernel has no speed. What goes wrong (a kernel that does not compile,
too little memory, a peer that refuses the shape) is a line of the result, not the end of the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case
from mambacompress.kernels import registry
from mambacompress.kernels.tolerances import TRITON_CODES, rms_ratio

Clock = Callable[[Callable[[], Any]], float]
PEERS = {"mamba_ssm": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
         "mamba_ssm_ssd": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
         "causal_conv1d": ("causal_conv1d", "causal_conv1d_fn")}


@dataclass
class Row:
    """A case measured. seconds: of Triton; rivals: seconds of the others by name; floor: seconds by the ceilings."""

    name: str
    error: float = float("nan")
    tolerance: float = float("nan")
    seconds: float | None = None
    floor: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether parity holds."""
        return self.error <= self.tolerance


def find_peers() -> tuple[dict[str, Any], list[str]]:
    """(their functions, or None; a sentence for each that is not here)."""
    found: dict[str, Any] = {}
    missing = []
    for name, (module, function) in PEERS.items():
        try:
            found[name] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, OSError, RuntimeError) as failure:  # extensions fail to load in many ways
            found[name] = None
            missing.append(f"{name}: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}")
    return found, missing


def difference(got: Any, want: Any) -> float:
    """The worst RMS ratio of two results; codes count by the share that is off (more than one off: infinite)."""
    if isinstance(got, Tensor):
        if got.dtype == torch.int8:
            off = (got.int() - want.int()).abs()
            return float("inf") if int(off.max()) > 1 else float((off > 0).double().mean())
        return rms_ratio(got, want) if got.is_floating_point() else float(not torch.equal(got, want))
    return max((difference(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


def measure(name: str, make: Callable[[torch.device], Case], device: torch.device, clock: Clock,
            ceilings: dict[str, float], backend: str = "auto", *, compile_reference: bool = True) -> Row:
    """``make``'s case on ``device``."""
    row = Row(name)
    try:
        case = make(device)
        with torch.no_grad():
            with registry.strict(), registry.backend(backend):
                got = case.run()
            with registry.backend("reference"):
                want = case.run()
            row.error, row.tolerance = difference(got, want), max(case.tolerance, TRITON_CODES)
            del got, want
            if not row.ok:
                return row
            with registry.strict(), registry.backend(backend):
                row.seconds = clock(case.run)
    except Exception as failure:  # whatever a compiler or a driver raises
        row.problems.append(_line("Triton", failure))
        return row
    row.floor = max(case.bytes / ceilings["copy"], case.operations / ceilings[case.unit])
    _time_rivals(row, case, clock, compile_reference)
    return row


def _time_rivals(row: Row, case: Case, clock: Clock, compile_reference: bool) -> None:
    def reference() -> Any:
        with registry.backend("reference"):
            return case.run()

    rivals: dict[str, Callable[[], Any]] = {"reference": reference, **case.peers}
    if case.compilable and compile_reference:
        compiled = torch.compile(case.run, dynamic=False)

        def in_inductor() -> Any:
            with registry.backend("reference"):
                return compiled()

        rivals["torch.compile"] = in_inductor
    for name, run in rivals.items():
        try:
            with torch.no_grad():
                row.rivals[name] = clock(run)
        except Exception as failure:
            row.problems.append(_line(name, failure))


def _line(who: str, failure: Exception) -> str:
    said = str(failure).strip().splitlines()
    return f"{who}: {type(failure).__name__}: {said[0] if said else ''}"[:300]


__all__ = ["Row", "difference", "find_peers", "measure"]
