"""The native library: one shared object behind a plain C ABI (see ``compile``), loaded with ctypes.

No torch or Python headers, so it is independent of both versions. Built at install when there is a compiler, or by

    python -m mambacompress.kernels.native build

Without it every op runs its torch reference, and ``why_not()`` says so in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambacompress.kernels.compile import CompileError, compile_library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.bool: 3, torch.uint8: 3}
LEVELS = ("portable", "avx2", "avx512")
BUILD_COMMAND = "python -m mambacompress.kernels.native build"


def package_folder() -> Path:
    """The folder of the installed package, where the shared object lies."""
    spec = importlib.util.find_spec("mambacompress")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package mambacompress is not importable")
    return Path(spec.origin).parent


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (then ``why_not`` says why)."""
    return _load()[0]


def why_not() -> str:
    """Why there is no native library, in one line; '' where there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("MAMBACOMPRESS_NATIVE") == "0":
        return None, "native code switched off by MAMBACOMPRESS_NATIVE=0"
    found = sorted(package_folder().glob("_native*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        return None, f"no native library was built (no C++ compiler at install?); build it with: {BUILD_COMMAND}"
    try:
        return ctypes.CDLL(str(found[-1])), ""
    except OSError as failure:
        return None, f"the native library does not load ({failure}); rebuild it with: {BUILD_COMMAND}"


@functools.cache
def function(name: str, argument_types: tuple[Any, ...], result: Any = None) -> Callable[..., Any]:
    """A C function of the library with its types declared."""
    lib = library()
    if lib is None:
        raise RuntimeError(why_not())
    if not hasattr(lib, name):
        raise RuntimeError(f"the native library is older than the package (no {name}); rebuild it: {BUILD_COMMAND}")
    entry = getattr(lib, name)
    entry.argtypes = list(argument_types)
    entry.restype = result
    return entry


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's first element; None stays None (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


class View(ctypes.Structure):
    """A tensor [batch, tokens, ...] as native code reads it (``View`` of native.h)."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("token", ctypes.c_int64),
                ("dtype", ctypes.c_int64), ("scale", ctypes.c_void_p), ("scale_step", ctypes.c_int64)]


NO_VIEW = (None, 0, 0, 0, None, 0)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [batch, tokens, ...] itself where the axes behind the tokens are contiguous, else a contiguous copy."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def view(x: torch.Tensor | None, reverse: bool = False, scale: torch.Tensor | None = None) -> tuple[Any, ...]:
    """The fields of a View of ``x``, which ``dense_rows`` returned; reversed: from the last token to the first.

    scale: fp32, one element or as many as the axes behind the tokens hold. Both must outlive the call.
    """
    if x is None:
        return NO_VIEW
    data, token = x.data_ptr(), x.stride(1)
    if reverse:
        data, token = data + (x.shape[1] - 1) * token * x.element_size(), -token
    return (data, x.stride(0), token, DTYPE_CODES[x.dtype], pointer(scale),
            0 if scale is None or scale.numel() == 1 else 1)


def memory(size: int) -> torch.Tensor:
    """uint8 [size] of its own, zeros, in huge pages where the system gives them: for what is read once a token, where
    looking up small pages costs more than reading.
    """
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, max(1, size), flags=kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:size]


def places(sizes: Sequence[int]) -> list[torch.Tensor]:
    """uint8 tensors of these sizes in one ``memory``, one behind the other, each at the start of a cache line."""
    lines = [-(-size // 64) * 64 for size in sizes]
    whole = memory(sum(lines))
    starts = [0, *itertools.accumulate(lines)]
    return [whole[start:start + size] for start, size in zip(starts, sizes, strict=False)]


def runs_directly(*tensors: torch.Tensor | None) -> bool:
    """True where an op may call native code at once: no gradient is wanted, nothing is being traced."""
    if torch.compiler.is_compiling():
        return False
    wants_gradient = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if (wants_gradient and x.requires_grad) or type(x) not in (torch.Tensor, torch.nn.Parameter):
            return False
    return True


def level() -> str:
    """The instruction set the library dispatches to: portable, avx2 or avx512."""
    return LEVELS[function("mc_level", (), ctypes.c_int)()]


def force_level(name: str | None) -> None:
    """Dispatch to a lower level (tests and doctor); None returns to the best one of this machine."""
    if name is not None and name not in LEVELS:
        raise ValueError(f"unknown level {name!r}; known: {', '.join(LEVELS)}")
    got = function("mc_force_level", (ctypes.c_int,), ctypes.c_int)(-1 if name is None else LEVELS.index(name))
    if name is not None and got != LEVELS.index(name):
        raise ValueError(f"this processor has no {name}")


def build(target: Path | None = None) -> Path:
    """Compile the library in place and return its path. Raises CompileError with the compiler's message."""
    target = target or package_folder() / "_native.so"
    compile_library(target)
    return target


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        sys.exit(f"usage: {BUILD_COMMAND}")
    try:
        print(build())
    except CompileError as failure:
        sys.exit(str(failure))
