"""Which implementation of an op runs, and why.

Every op has a readable torch reference, and may have a native CPU implementation and Triton kernels. ``auto`` (the
default) takes native code for tensors on the CPU and Triton for those on a GPU, wherever it can compute what was asked;
every other outcome carries a reason, is logged once, and is listed by ``chosen()`` so that a report can print it. On
CPU tensors Triton runs only where it is asked for by name, and only in its interpreter: that is for tests.
``backend("reference")`` forces one implementation, ``strict(True)`` turns a fallback into an error. Both are context
managers on context variables: threads and tasks do not disturb one another.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from mambacompress.kernels import gpu

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "triton", "reference")
_REASONS = {"native": "native code for this processor", "triton": "Triton kernel for this GPU"}
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class KernelFallback(RuntimeError):
    """An op would not run in native code or Triton although it was told to."""


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
    """Run the ops inside with one implementation: ``reference``, ``native``, ``triton`` or ``auto``."""
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


@torch.compiler.assume_constant_result  # traced once: the choice becomes part of the graph
def choose(op: str, device: torch.device, dtype: torch.dtype, lacks: Sequence[str] = (),
           triton: Sequence[str] | None = None) -> str:
    """``native``, ``triton`` or ``reference`` for this call.

    lacks: what was asked and the native code has not got; triton: the same of the op's Triton kernel, None: it has
    none.
    """
    asked = _backend.get()
    if asked == "reference":
        _note(Choice(op, "reference", "asked for"))
        return "reference"
    wanted = asked if asked != "auto" else "triton" if device.type == "cuda" else "native"
    if wanted == "triton":
        obstacle = "no Triton kernel" if triton is None else gpu.obstacle(device, dtype, triton)
    else:
        obstacle = _obstacle(device, dtype, lacks)
    if obstacle is None:
        _note(Choice(op, wanted, "asked for" if asked == wanted else _REASONS[wanted]))
        return wanted
    if asked == wanted or _strict.get():
        raise KernelFallback(f"{op} has no {wanted} implementation for this call: {obstacle}")
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
    """Check every op against its reference: each op's package may offer ``check() -> (error, tolerance)``.

    On the CPU; and where there is a GPU, ``check(device)`` of the ops with Triton kernels on that.
    """
    results = []
    for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/__init__.py")):
        module = importlib.import_module(f"{__package__}.{folder.name}")
        if not hasattr(module, "check"):
            continue
        results.append(_checked(folder.name, module.check, torch.device("cpu")))
        if torch.cuda.is_available() and (folder / "triton.py").exists():
            results.append(_checked(folder.name, module.check, torch.device("cuda", torch.cuda.current_device())))
    return results


def _checked(op: str, check: Callable[..., tuple[float, float]], device: torch.device) -> CheckResult:
    if device.type == "cpu":
        best, obstacle, name = "native", _obstacle(device, torch.float32, ()), op
    else:
        best, obstacle, name = "triton", gpu.obstacle(device, torch.float32, ()), f"{op} on {device.type}"
    used = best if obstacle is None else "reference"
    try:
        error, tolerance = check() if device.type == "cpu" else check(device)
    except (RuntimeError, ValueError, OSError) as failure:
        return CheckResult(name, used, False, float("inf"), 0.0, str(failure))
    return CheckResult(name, used, error <= tolerance, error, tolerance, obstacle or _REASONS[best])


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
