"""Compile the native library: every ``kernels/*.cpp`` and ``kernels/*/cpu.cpp`` into one shared object.

Imports nothing but the standard library: setup.py uses it where torch is not installed yet. Without -ffast-math and
with contraction off, so that the arithmetic is the same in prefill and in decode.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden",
         "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized")


class CompileError(RuntimeError):
    """There is no compiler, or it refused; the message says which and why."""


def sources() -> list[Path]:
    """Every native source, in a fixed order."""
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cpp"), *folder.glob("*/cpu.cpp")])


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of g++, clang++, c++ on the path."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def compile_library(target: Path) -> None:
    """Write the shared object to ``target``, at once or not at all. Raises CompileError."""
    command = compiler()
    if command is None:
        raise CompileError("no C++ compiler found: install g++ or clang, or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            built = _build([command, *FLAGS, "-fopenmp"], Path(folder))
        except CompileError:
            built = _build([command, *FLAGS], Path(folder))  # a compiler without OpenMP: one thread
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(built, beside)
        beside.chmod(0o755)
        beside.replace(target)


def _build(command: list[str], folder: Path) -> Path:
    include = f"-I{Path(__file__).parent}"
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda pair: _run([*command, include, "-c", str(pair[0]), "-o", str(pair[1])]),
                      zip(sources(), objects, strict=True)))
    library = folder / "library.so"
    _run([*command, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as failure:
        raise CompileError(f"{command[0]} does not run: {failure}") from failure
    if done.returncode != 0:
        lines = done.stderr.splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CompileError(f"{command[0]} does not compile the native library: {first}")
