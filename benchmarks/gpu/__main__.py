"""The Triton kernels on the GPU of this machine, in one command of at most eight minutes:

    python -m benchmarks.gpu --out gpu

Parity with the reference at real sizes; then speed beside the reference, torch.compile of it where that is fair, a
copy, torch's fp16 products, and mamba_ssm and causal_conv1d where they can be imported; the share of what the card's
measured ceilings allow; decoding of an int8 model beside transformers. The full result is gpu.json in the folder given;
the table comes last. Exit status: 0, 1 where a kernel is wrong or does not run, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import Sizes, cases
from benchmarks.gpu.decode import measure_decode
from benchmarks.gpu.measure import Row, find_peers, measure
from benchmarks.gpu.timing import Clock, ceilings
from mambacompress.eval import environment
from mambacompress.kernels import gpu

SECONDS = 450  # after which nothing new is begun
FOR_DECODING = 120  # of them kept for the whole model
WITHOUT_COMPILE = 240  # after which torch.compile, the slowest to begin, is left out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--no-decode", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not gpu.installed():
        print("There is no GPU here that torch can use." if gpu.installed() else
              "Triton is not installed: pip install 'mambacompress[gpu]'.")
        return 2
    begun = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device)
    best = ceilings(clock, device)
    peers, missing = find_peers()
    rows: list[Row] = []
    skipped = []
    for name, make in cases(Sizes(), peers).items():
        spent = time.perf_counter() - begun
        if options.only not in name:
            continue
        if spent > options.seconds - (0 if options.no_decode else FOR_DECODING):
            skipped.append(name)
            continue
        rows.append(measure(name, make, device, clock, best, compile_reference=spent < WITHOUT_COMPILE))
        print(f"{time.perf_counter() - begun:5.0f} s  {name}  {'ok' if rows[-1].ok else 'WRONG'}", flush=True)
        torch.cuda.empty_cache()
    decoding: dict[str, Any] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.no_decode and not options.only:
        try:
            decoding = measure_decode("130m", options.out, device)
        except Exception as failure:  # the table of kernels is worth having without it
            decoding = {"problems": [f"{type(failure).__name__}: {failure}"[:300]]}
    result = {"hardware": environment.hardware(device), "versions": environment.versions(
        (*environment.PACKAGES, "triton", "mamba_ssm", "causal_conv1d")), "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - begun, "ceilings": best, "missing_peers": missing, "skipped": skipped,
        "rows": [dataclasses.asdict(row) for row in rows], "decoding": decoding}
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(result, rows))
    return 0 if all(row.ok for row in rows) and not decoding.get("problems") else 1


def table(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The short table: microseconds, share of the floor, times as fast as each rival."""
    best = result["ceilings"]
    lines = [f"{result['hardware']}; {result['date']}; {result['seconds']:.0f} s",
             f"ceilings measured: copy {best['copy'] / 1e9:.0f} GB/s, fp16 {best['fp16'] / 1e12:.0f} T/s, int8 "
             f"{best['int8'] / 1e12:.0f} T/s", "",
             "| case | parity | us | floor us | share | times as fast as |", "|---|---|---|---|---|---|"]
    for row in rows:
        parity = f"{row.error:.1e} of {row.tolerance:.0e}" if row.ok else f"WRONG {row.error:.1e}"
        if row.seconds is None or row.floor is None:
            lines.append(f"| {row.name} | {parity} | | | | {'; '.join(row.problems)} |")
            continue
        rivals = ", ".join(f"{name} {seconds / row.seconds:.2f}" for name, seconds in row.rivals.items())
        lines.append(f"| {row.name} | {parity} | {row.seconds * 1e6:.1f} | {row.floor * 1e6:.1f} | "
                     f"{row.floor / row.seconds:.0%} | {rivals} |")
    lines += [""] + [f"- {name}: {rate:.0f} tokens/s" for name, rate in
                     result["decoding"].get("tokens_per_second", {}).items()]
    lines += [f"- not here: {sentence}" for sentence in result["missing_peers"]]
    lines += [f"- no time left for: {name}" for name in result["skipped"]]
    lines += [f"- {sentence}" for sentence in result["decoding"].get("problems", [])]
    lines += [f"- {row.name}: {problem}" for row in rows for problem in row.problems if row.seconds is not None]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
