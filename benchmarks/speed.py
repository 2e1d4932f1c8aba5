"""Speed at published sizes, side by side with every peer, and what the goals ask of it.

    python -m benchmarks.speed --sizes 130m,370m,mamba2-130m --threads 1,2 --out speed.json

Makes random-weight checkpoints and artifacts in a folder that is kept (``benchmarks.checkpoints``), runs
``mambacompress bench`` on each size, and reads the goals off the result: ratios of rates of the same round, medians and
quartiles. Beside them the share of the memory bandwidth that decode uses: bytes of the weight files read a second (a
tied head reads the embedding, so a token reads every tensor once) over what this processor reads from memory at the
same thread count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, name_of, write_artifact, write_model
from mambacompress.bench import PEERS, Result, bench
from mambacompress.bench.summary import Spread, taken

RECIPES = ("w8a8", "w8a8-scan8", "w4a16", "w4a8")
STATES = ("fp32", "int8")
INT4 = ("w4a16", "w4a8")
_BANDWIDTH = """
import time, torch
x = torch.ones(1 << 27)  # 512 MiB: no cache holds it
best = 0.0
for run in [lambda: torch.dot(x, x), lambda: x.sum(), lambda: x.amax()] * 6:
    started = time.perf_counter()
    run()
    best = max(best, x.nbytes / (time.perf_counter() - started))
print(best)
"""


@dataclass(frozen=True)
class Goal:
    """``ours`` is to be at least ``must`` (hoped: ``aim``) times as fast as ``rival`` at a measure.

    ours: a recipe, or fp32 or bf16 for the original on our mixers. family: mamba or mamba2.
    """

    title: str
    family: str
    ours: str
    rival: str
    measure: str
    must: float
    aim: float | None = None


def _goals() -> list[Goal]:
    goals = [
        Goal("int8 decode", "mamba", "w8a8", "llama.cpp Q8_0", "decode", 2.0, 2.5),
        Goal("int8 prefill", "mamba", "w8a8", "llama.cpp Q8_0", "prefill", 8.0, 12.0),
        Goal("int8 decode, batch", "mamba", "w8a8", "llama.cpp Q8_0", "batch_decode", 4.5, 8.0),
        Goal("int8 decode, batch", "mamba", "w8a8", "OpenVINO int8", "batch_decode", 1.2, 2.0),
        Goal("Mamba-2 int8 decode", "mamba2", "w8a8", "llama.cpp Q8_0", "decode", 1.8, 2.5),
        Goal("Mamba-2 int8 prefill", "mamba2", "w8a8", "llama.cpp Q8_0", "prefill", 4.0, 8.0),
        Goal("original fp32 prefill", "mamba", "fp32", "transformers fp32", "prefill", 3.0),
        Goal("original fp32 decode", "mamba", "fp32", "transformers fp32", "decode", 2.5),
        Goal("original bf16 prefill", "mamba", "bf16", "transformers bf16", "prefill", 5.0, 10.0),
        Goal("original bf16 decode", "mamba", "bf16", "transformers bf16", "decode", 3.0),
    ]
    for recipe in INT4:
        goals += [Goal(f"int4 decode, {recipe}", "mamba", recipe, "llama.cpp Q4_0", "decode", 2.0, 3.0),
                  Goal(f"int4 prefill, {recipe}", "mamba", recipe, "llama.cpp Q4_0", "prefill", 6.0, 10.0)]
    return goals


GOALS = _goals()


def row_name(size: str, ours: str) -> str:
    """What a goal's own contestant is called in the result."""
    return f"{name_of(size)} {ours}" if ours in ("fp32", "bf16") else f"{name_of(size)}-{ours}"


def judged(results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    """Every goal at every size and thread count where both sides ran."""
    for size, result in results.items():
        for goal in GOALS:
            if goal.family != SHAPES[size]["model_type"]:
                continue
            for run in result.document["runs"]:
                ratio = result.ratio(run["threads"], row_name(size, goal.ours), goal.rival, goal.measure)
                if ratio is not None:
                    yield {**asdict(goal), "size": size, "threads": run["threads"], "ratio": asdict(ratio),
                           "met": ratio.median >= goal.must}


def variant_rows(results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    """Every form of an artifact beside its plain one: int8 scan inputs beside ``w8a8``, int8 states beside fp32."""
    for size, result in results.items():
        for run in result.document["runs"]:
            names = [row["name"] for row in run["contestants"]]
            for name in names:
                plain = name.removesuffix(" state8" if name.endswith(" state8") else "-scan8")
                if plain == name or plain not in names:
                    continue
                for measure in ("prefill", "decode", "batch_decode"):
                    ratio = result.ratio(run["threads"], name, plain, measure)
                    if ratio is not None:
                        yield {"size": size, "threads": run["threads"], "name": name, "plain": plain,
                               "measure": measure, "ratio": asdict(ratio)}


def memory_rows(results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    """Peak bytes of running every packed contestant, mapped weights included, over the bytes of its files."""
    for size, result in results.items():
        for run in result.document["runs"]:
            for row in run["contestants"]:
                peak = taken(row)
                if row["variant"].startswith("packed") and peak is not None:
                    yield {"size": size, "threads": run["threads"], "name": row["name"], "files": row["files"],
                           "peak": peak, "share": peak / row["files"],
                           "anonymous": taken(row, "anonymous"), "live_tensors": row["memory"]["live_tensors"]}


def bandwidth_rows(results: dict[str, Result], bandwidth: dict[int, float]) -> Iterator[dict[str, Any]]:
    """The share of the read bandwidth that decode at batch 1 uses, of our packed contestants and the peers that keep
    the files' format in memory."""
    for size, result in results.items():
        for run in result.document["runs"]:
            for row in run["contestants"]:
                rate = Spread.of(row["rates"].get("decode", []))
                if rate is not None and row["kind"] in ("ours", "llama.cpp") and row["variant"] not in ("fp32", "bf16"):
                    yield {"size": size, "threads": run["threads"], "name": row["name"],
                           "share": rate.median * row["files"] / bandwidth[run["threads"]]}


def read_bandwidth(threads: int) -> float:
    """Bytes a second that torch reads from memory with so many threads: the best of several reductions."""
    done = subprocess.run([sys.executable, "-c", _BANDWIDTH], check=True, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    return float(done.stdout)


def markdown(results: dict[str, Result], bandwidth: dict[int, float]) -> str:
    """The goals, memory, bandwidth, then every size's own table."""
    lines = ["| goal | size | threads | against | must | aim | median ratio (quartiles) | |",
             "|---|---|---:|---|---:|---:|---:|---|"]
    for row in judged(results):
        ratio, aim = row["ratio"], "" if row["aim"] is None else f"{row['aim']:g}"
        lines.append(f"| {row['title']} | {row['size']} | {row['threads']} | {row['rival']} | {row['must']:g} | "
                     f"{aim} | {ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) | "
                     f"{'met' if row['met'] else 'missed'} |")
    lines += ["", "| variant | threads | against | measure | median ratio (quartiles) |", "|---|---:|---|---|---:|"]
    for row in variant_rows(results):
        ratio = row["ratio"]
        lines.append(f"| {row['name']} | {row['threads']} | {row['plain']} | {row['measure']} | "
                     f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) |")
    lines += ["", "| packed model | threads | file MB | peak MB | peak / file | live tensors MB |",
              "|---|---:|---:|---:|---:|---:|"]
    for row in memory_rows(results):
        lines.append(f"| {row['name']} | {row['threads']} | {row['files'] / 1e6:.1f} | {row['peak'] / 1e6:.1f} | "
                     f"{row['share']:.2f} | {row['live_tensors'] / 1e6:.1f} |")
    read = ", ".join(f"{rate / 1e9:.1f} GB/s with {count} thread{'s' * (count != 1)}"
                     for count, rate in bandwidth.items())
    lines += ["", f"Read bandwidth: {read}.", "", "| decode, batch 1 | threads | share of the read bandwidth |",
              "|---|---:|---:|"]
    for row in bandwidth_rows(results, bandwidth):
        lines.append(f"| {row['name']} | {row['threads']} | {row['share']:.0%} |")
    for size, result in results.items():
        lines += ["", f"## {name_of(size)}", "", result.markdown().rstrip()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="130m,370m,mamba2-130m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--states", default=",".join(STATES), help="recurrent states of the packed models")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, default=Path("speed.json"), help="JSON; the tables go beside it as .md")
    options = parser.parse_args(arguments)
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in SHAPES]:
        parser.error(f"unknown size {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    threads = [int(count) for count in options.threads.split(",")]
    results: dict[str, Result] = {}
    bandwidth: dict[int, float] = {}
    for size in sizes:
        _say(f"{size}: the checkpoint")
        model = write_model(size, options.folder)
        packed = []
        for recipe in options.recipes.split(","):
            _say(f"{size}: {recipe}")
            packed.append(write_artifact(model, recipe))
        bandwidth = {count: max(bandwidth.get(count, 0.0), read_bandwidth(count)) for count in threads}
        results[size] = bench([model, *packed], peers=[peer for peer in options.peers.split(",") if peer],
                              threads=threads, states=options.states.split(","),
                              progress=lambda stage, done, total: _say(f"{done}/{total} {stage}"),
                              rounds=options.rounds, steps=options.steps, prompt=options.prompt)
        document = {"sizes": {name: result.document for name, result in results.items()},
                    "goals": list(judged(results)), "variants": list(variant_rows(results)),
                    "memory": list(memory_rows(results)),
                    "bandwidth": {"read": bandwidth, "decode": list(bandwidth_rows(results, bandwidth))}}
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")  # a size at a time: runs are long
        options.out.with_suffix(".md").write_text(markdown(results, bandwidth), encoding="utf-8")
    print(markdown(results, bandwidth))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
