"""Compile the Triton kernels for GPUs that are not here, and read from the binaries what they take.

    python -m mambacompress.kernels.offline [--targets sm_80,sm_90,gfx942] [--ops rms_norm,...] [--json FILE]

Every op's ``triton.py`` has ``offline_calls()``: calls of its public functions on meta tensors of real sizes, one a
shipped variant. Each launch compiles all of its autotuning configurations, by Triton's own path, so the specializations
are those of a real call. NVIDIA's registers and spills come from the bundled cuobjdump (``LOCAL`` and ``STACK`` bytes a
thread), AMD's from the metadata in the assembly. A spill into memory, or shared memory above the card's, makes the exit
status 1. (AMD's scalar registers, which hold the arguments, spill into lanes of vector registers: that is no memory,
and is listed apart.)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mambacompress.kernels import gpu


@dataclass(frozen=True)
class Resources:
    """What one kernel in one configuration takes on one card: registers a thread, bytes of shared memory a program,
    bytes spilled a thread (registers spilled on AMD)."""

    op: str
    kernel: str
    configuration: str
    target: str
    warps: int
    registers: int
    shared: int
    spills: int
    scalar_spills: int  # AMD's scalar registers kept in vector registers
    wide_loads: int  # 128-bit ones, in the code
    tensor_cores: int  # matrix instructions, in the code

    def wrong(self) -> str:
        """'' or what must not be shipped."""
        if self.spills:
            return f"spills {self.spills}"
        limit = gpu.TARGETS[self.target].shared_memory
        return f"takes {self.shared} bytes of shared memory, {limit} there are" if self.shared > limit else ""


def ops() -> list[str]:
    """The ops that have Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def compiled(op: str, target: str) -> Iterator[Resources]:
    """Every shipped variant of one op."""
    module = importlib.import_module(f"{__package__}.{op}.triton")
    with gpu.compiling_for(gpu.TARGETS[target]) as record:
        module.offline_calls()
    seen = set()
    for one in record:
        if id(one.result) not in seen:
            seen.add(id(one.result))
            yield _read(op, one, target)


def _read(op: str, one: gpu.Compiled, target: str) -> Resources:
    result, assembly = one.result, one.result.asm
    if gpu.TARGETS[target].backend == "cuda":
        registers, spills = _nvidia(assembly["cubin"])
        scalars = 0
        text = assembly["ptx"]
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", text))
        matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", text))
    else:
        text = assembly["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)")
        spills = _number(text, r"\.vgpr_spill_count:\s+(\d+)")
        spills += _number(text, r"\.private_segment_fixed_size:\s+(\d+)")
        scalars = _number(text, r"\.sgpr_spill_count:\s+(\d+)")
        wide, matrix = len(re.findall(r"_load_dwordx4", text)), len(re.findall(r"\bv_mfma_", text))
    return Resources(op, one.kernel, one.configuration, target, result.metadata.num_warps, registers,
                     result.metadata.shared, spills, scalars, wide, matrix)


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembly says nothing of {pattern}")
    return int(found.group(1))


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes in local memory) a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True,
                              text=True, check=True).stdout
    return _number(said, r"\bREG:(\d+)"), _number(said, r"\bSTACK:(\d+)") + _number(said, r"\bLOCAL:(\d+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(gpu.TARGETS))
    parser.add_argument("--ops", default=",".join(ops()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not gpu.installed():
        print("Triton is not installed (pip install 'mambacompress[gpu]')")
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
        return 2
    found: list[Resources] = []
    for op in options.ops.split(","):
        for target in options.targets.split(","):
            begun = time.perf_counter()
            new = list(compiled(op, target))
            found += new
            worst = max(new, key=lambda r: r.registers)
            print(f"{op:24} {target:7} {len(new):3} kernels, {time.perf_counter() - begun:5.1f} s, registers up to "
                  f"{worst.registers} ({worst.kernel}), shared up to {max(r.shared for r in new)}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(r) for r in found], indent=1), encoding="utf-8")
    wrong = [r for r in found if r.wrong()]
    for r in wrong:
        print(f"WRONG {r.target} {r.kernel} ({r.configuration}): {r.wrong()}")
    print(f"{len(found)} kernels compiled; {len(wrong)} that must not be shipped")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
