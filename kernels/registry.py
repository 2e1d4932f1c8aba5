"""Which implementation of an op runs, and why.

Every op has a readable torch reference, and may have a native CPU implementation. ``auto`` (the default) takes the
native one wherever it can compute what was asked; every other outcome carries a reason, is logged once, and is listed
by ``chosen()`` so that a report can print it. ``backend("reference")`` forces one implementation, ``strict(True)``
turns a fallback into an error. Both are context managers on context variables: threads and tasks do not disturb one
another.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class KernelFallback(RuntimeError):
    """An op would not run natively although it was told to."""


@dataclass(frozen=True)
class Choice:
    """One decision: the op, the backend that runs it, and the reason."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class CheckResult:
    """One op checked against its reference on this machine.

    error and tolerance are RMS ratios (0 for integer ops, which are exact); backend is what ``auto`` takes here.
    """

    op: str
    backend: str
    ok: bool
    error: float
    tolerance: float
    reason: str


_backend: ContextVar[str] = ContextVar("mambacompress_backend", default="auto")
_strict: ContextVar[bool] = ContextVar("mambacompress_strict", default=False)
_seen: dict[Choice, None] = {}  # insertion-ordered; what chosen() lists
_records: list[dict[Choice, None]] = []  # those of the open ``recording`` blocks


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside with one implementation: ``reference``, ``native`` or ``auto``."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Inside, an op that would fall back to its reference raises KernelFallback instead."""
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)


def choose(op: str, device: torch.device, dtype: torch.dtype, lacks: Sequence[str] = ()) -> str:
    """``native`` or ``reference`` for this call; ``lacks`` names what was asked and the native code has not got."""
    asked = _backend.get()
    if asked == "reference":
        _note(Choice(op, "reference", "asked for"))
        return "reference"
    obstacle = _obstacle(device, dtype, lacks)
    if obstacle is None:
        _note(Choice(op, "native", "asked for" if asked == "native" else "native code for this processor"))
        return "native"
    if asked == "native" or _strict.get():
        raise KernelFallback(f"{op} has no native implementation for this call: {obstacle}")
    _note(Choice(op, "reference", obstacle))
    return "reference"


def note(op: str, backend: str, reason: str) -> None:
    """Record (and log once) a decision that was taken elsewhere: which backend runs an op, and why."""
    _note(Choice(op, backend, reason))


def chosen() -> list[Choice]:
    """Every distinct decision taken so far in this process, in order."""
    return list(_seen)


@contextmanager
def recording() -> Iterator[dict[Choice, None]]:
    """The distinct decisions taken inside, in order, whatever this process has decided before."""
    record: dict[Choice, None] = {}
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def check_all() -> list[CheckResult]:
    """Check every op against its reference: each op's package may offer ``check() -> (error, tolerance)``."""
    results = []
    for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/__init__.py")):
        module = importlib.import_module(f"{__package__}.{folder.name}")
        if not hasattr(module, "check"):
            continue
        op = folder.name
        obstacle = _obstacle(torch.device("cpu"), torch.float32, ())
        used = "native" if obstacle is None else "reference"
        try:
            error, tolerance = module.check()
        except (RuntimeError, ValueError, OSError) as failure:
            results.append(CheckResult(op, used, False, float("inf"), 0.0, str(failure)))
            continue
        results.append(CheckResult(op, used, error <= tolerance, error, tolerance,
                                   obstacle or "native code for this processor"))
    return results


def _obstacle(device: torch.device, dtype: torch.dtype, lacks: Sequence[str]) -> str | None:
    from mambacompress.kernels import native

    if device.type != "cpu":
        return f"no native code for {device.type}"
    if dtype not in NATIVE_DTYPES:
        return f"native code does not compute in {str(dtype).removeprefix('torch.')}"
    if lacks:
        return "the native code lacks " + ", ".join(lacks)
    if native.library() is None:
        return native.why_not()
    return None


def _note(choice: Choice) -> None:
    for record in _records:
        record[choice] = None
    if choice not in _seen:
        _seen[choice] = None
        logger.info("%s: %s (%s)", choice.op, choice.backend, choice.reason)
