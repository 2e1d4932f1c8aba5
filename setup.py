"""Build the native kernels at install: one shared object without Python or torch in it, optional.

Where no C++ compiler works, the install goes on without it: every op then runs its torch implementation, and
``mambacompress doctor`` says so.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

KERNELS = Path(__file__).parent / "mambacompress" / "kernels"  # in a source distribution the room lies only here
SPEC = importlib.util.spec_from_file_location("compile_native", KERNELS / "compile.py")
compile_native = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compile_native)


class BuildNative(build_ext):
    """Compiles the library with the project's own flags."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # loaded with ctypes: no Python ABI in the name

    def build_extension(self, ext: Extension) -> None:
        try:
            compile_native.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except compile_native.CompileError as failure:
            sys.stderr.write(f"mambacompress: without native kernels (torch runs instead): {failure}\n")


class AnyPythonWheel(bdist_wheel):
    """py3-none-<platform>: the library depends on the platform and on nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("mambacompress._native", [], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
