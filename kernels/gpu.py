"""Triton kernels: where they can run, how they are launched, and what they compiled to.

An op's ``triton.py`` is imported only where ``obstacle`` finds nothing in the way: Triton is an optional dependency.
CUDA and ROCm devices compile the kernels; with TRITON_INTERPRET=1 (set before Triton is imported) they are interpreted
in numpy, on CPU tensors too, which is how they are tested without a GPU. ``compiling_for`` does the third thing: inside
it an op called with meta tensors compiles every configuration of its kernels for a named GPU and launches none.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: its name, Triton's three words for it, and the shared memory a program may have."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


TARGETS = {target.name: target for target in (
    Target("sm_80", "cuda", 80, 32, 163 * 1024), Target("sm_90", "cuda", 90, 32, 227 * 1024),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024))}


@dataclass
class Compiled:
    """One kernel in one configuration, as the compiler left it."""

    kernel: str
    configuration: str
    result: Any = field(repr=False)  # triton's CompiledKernel


_compiled: ContextVar[list[Compiled] | None] = ContextVar("mambacompress_compiled", default=None)
_target: ContextVar[Target | None] = ContextVar("mambacompress_target", default=None)


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; what the environment said when Triton was first imported."""
    if not installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def amd() -> bool:
    """Whether kernels are for AMD's cards, whose warps have 64 threads."""
    target = _target.get()
    return torch.version.hip is not None if target is None else target.backend == "hip"


def obstacle(device: torch.device, dtype: torch.dtype, lacks: Sequence[str]) -> str | None:
    """Why a Triton kernel cannot run this call; None where it can."""
    if not installed():
        return "Triton is not installed (pip install 'mambacompress[gpu]')"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()) and not _compiles(device):
        return f"no Triton kernels for {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernels do not compute in {str(dtype).removeprefix('torch.')}"
    return "the Triton kernel lacks " + ", ".join(lacks) if lacks else None


def _compiles(device: torch.device) -> bool:
    return device.type == "meta" and _compiled.get() is not None


def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Run a Triton kernel on the device of its first tensor; inside ``compiling_for`` compile it and return."""
    record = _compiled.get()
    if record is not None:
        _compile(record, kernel, arguments, constants)
        return
    with _on(next(x.device for x in arguments if isinstance(x, Tensor))):
        kernel[grid](*arguments, **constants)


def _on(device: torch.device) -> Any:
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def tuned(configurations: Sequence[tuple[dict[str, Any], int, int]], key: Sequence[str]) -> Callable[[Any], Any]:
    """A decorator over ``triton.jit``: configurations are (block sizes, warps, stages), tried once for each value of
    the arguments in ``key``. The interpreter, which has no speed to tell them by, takes the first.
    """
    import triton

    taken = configurations[:1] if interpreted() else configurations
    return triton.autotune([triton.Config(blocks, num_warps=warps, num_stages=stages)
                            for blocks, warps, stages in taken], key=list(key))


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Compiled]]:
    """Compile, for ``target``, whatever is launched inside; yields the list that fills up.

    For a process of its own: Triton's active driver is replaced by one that knows the target and no device.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if interpreted():
        raise RuntimeError("Triton's interpreter compiles nothing: start a process without TRITON_INTERPRET")

    class Offline:
        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_current_device(self) -> int:  # what Triton keeps compiled kernels by
            return list(TARGETS).index(target.name)

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Offline())
    record: list[Compiled] = []
    tokens = _compiled.set(record), _target.set(target)
    try:
        yield record
    finally:
        _compiled.reset(tokens[0])
        _target.reset(tokens[1])


def _compile(record: list[Compiled], kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    tuner = kernel if hasattr(kernel, "configs") else None
    function = kernel.fn if tuner is not None else kernel
    for configuration in [None] if tuner is None else tuner.configs:
        chosen = {} if configuration is None else configuration.all_kwargs()
        result = function.warmup(*arguments, grid=(1,), **constants, **chosen)
        shown = {**constants, **chosen}
        record.append(Compiled(function.__name__, ", ".join(f"{k}={v}" for k, v in shown.items() if v is not None),
                               result))


__all__ = ["DTYPES", "FLOATS", "TARGETS", "Compiled", "Target", "amd", "compiling_for", "installed", "interpreted",
           "launch", "obstacle", "tuned"]
