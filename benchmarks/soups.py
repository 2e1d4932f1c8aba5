"""Sparse model soups on a trained model: each beside its candidates, their ensemble and one trained as long as all.

    python -m benchmarks.soups MODEL --train FILE ... --valid FILE --out DIR
        [--pattern 2:4] [--vary seed,learning_rate] [--retrain SLR,LLR] [--steps 500] [--replicas 3] [--windows 200]

Every soup (factor varied, schedule) is a run of ``mc.soup`` into ``DIR/NAME``, with its artifact and ``NAME.soup``; the
same command, given again, goes on where it stopped, and adds what is new. Under torchrun the replicas are spread over
the processes.

Perplexities are of the sparse float weights on the first windows of the held-out text, each from a zero state. A soup
is uniform: no candidate is chosen by the text it is measured on, only "best candidate" is. ``DIR/soups.json`` has the
figures of every phase; the table is of all phases, the last of a soup being what it ends with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import mambacompress as mc
from benchmarks.sparsity import MAPS, arguments_of_training
from mambacompress import storage
from mambacompress.data import read_texts
from mambacompress.nm import Pattern
from mambacompress.souping import REPORT
from mambacompress.training.processes import processes

HEAD = ["varied", "schedule", "pattern", "mean candidate", "best candidate", "soup", "ensemble", "compute-matched",
        "soup over mean", "soup over compute-matched"]


def cook(options: argparse.Namespace, vary: str, retrain: str) -> dict[str, Any]:
    """The figures of one soup, cooked now or before."""
    pattern = Pattern.parse(options.pattern)
    name = f"{pattern.keep}of{pattern.of}-{vary}-{retrain}"
    out = options.out / name
    work = out.with_name(out.name + ".soup")
    if not (work / REPORT).is_file():
        recipe = {
            "name": name,
            "training": {"steps": options.steps, "batch": options.batch, "length": options.length, "precision": "auto",
                         "learning_rate": options.rate, "warmup": min(50, options.steps // 10), "save_every": 100},
            "soup": {"replicas": options.replicas, "vary": vary, "retrain": retrain, "trained": options.trained},
            "passes": [{"prune": {"keep": pattern.keep, "of": pattern.of, "maps": MAPS}}]}
        mc.soup(options.model, recipe, texts=read_texts(options.train), eval_texts=read_texts([options.valid]),
                out=out, windows=options.windows, resume=work.exists(), progress=said)
    return json.loads((work / REPORT).read_text(encoding="utf-8")) | {"vary": vary, "retrain": retrain}


def said(stage: str, done: int, total: int, figures: Any) -> None:
    """A line now and then."""
    if done % 50 == 0 or done == total:
        print(f"  {stage}: step {done}/{total}, loss {figures['loss']:.3f}, "
              f"{figures['tokens_per_second']:,.0f} tokens/s", flush=True)


def rows(soups: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A line a soup and phase."""
    for soup in soups:
        for phase in soup["phases"]:
            figures = [phase[name] for name in ("mean", "best", "soup", "ensemble", "compute_matched")]
            yield [soup["vary"], soup["retrain"], phase["pattern"], *(f"{value:.3f}" for value in figures),
                   f"{phase['soup'] / phase['mean']:.4f}", f"{phase['soup'] / phase['compute_matched']:.4f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of_training("benchmarks.soups", __doc__)
    parser.add_argument("--vary", default="seed,learning_rate")
    parser.add_argument("--retrain", default="SLR,LLR")
    parser.add_argument("--trained", type=int, help="steps the original was trained for: what LRW and ALLR must know")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    soups = [cook(options, vary, retrain) for vary in options.vary.split(",") for retrain in options.retrain.split(",")]
    if processes().is_main_process:
        storage.write_json(options.out / "soups.json", soups)
        for cells in (HEAD, ["---"] * len(HEAD), *rows(soups)):
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
