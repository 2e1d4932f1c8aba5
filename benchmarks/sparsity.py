"""N:M sparsity on a trained model: one-shot methods, and training at one budget of tokens, beside the dense control.

    python -m benchmarks.sparsity MODEL --train FILE ... --valid FILE --out sparsity.json
        [--pattern 2:4] [--methods dense,sr-ste,...] [--rates 3e-4,1e-3,3e-3] [--seeds 0] [--tokens 4000000]
        [--one-shot] [--windows 200]

Every run (pattern, method, learning rate, seed, tokens) is one entry of the file, written when it is through; runs that
stand there are left out, and one that was interrupted goes on from its checkpoint in ``OUT.runs``. So the same command,
given again, finishes what is left; a longer list of rates or seeds adds to it. Runs are sequential, on one thread;
several processes, each with methods or rates of its own, may share the file.

``dense`` is trained for the same tokens with the same schedule and nothing pruned: what a sparse model is compared
with. Perplexities are of the sparse weights in fp32 on the first windows of the held-out text, each from a zero state;
ratios to the dense control (of the same rate's best) are paired over windows. ``--one-shot`` adds magnitude, Wanda and
SparseGPT, unrotated and in the rotated basis, of the *original* model as packed (fp16 values), calibrated on the
training text.

Every run's sparse model stays in ``OUT.runs/KEY/model``, an ordinary model directory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mambacompress as mc
from mambacompress import storage
from mambacompress.data import encode, load_tokenizer, read_texts, token_windows
from mambacompress.eval import environment, stats
from mambacompress.eval.perplexity import window_losses
from mambacompress.eval.windows import Windows, make_windows
from mambacompress.models.families import restore
from mambacompress.nm import Pattern
from mambacompress.training import lm
from mambacompress.training.sparse_config import METHODS

ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
ROTATIONS = {"unrotated": None, "rotated": {"residual": "klt-hadamard", "out": "hadamard"}}
CALIBRATION = (64, 512)
MAPS = ["in_proj", "out_proj"]


@dataclass(frozen=True)
class Run:
    """One training run. precision: fp32 or bf16 (see training.config)."""

    pattern: str
    method: str
    rate: float
    seed: int
    tokens: int
    precision: str = "auto"

    @property
    def key(self) -> str:
        return f"{self.pattern.replace(':', 'of')}-{self.method}-{self.rate:g}-seed{self.seed}-{self.tokens}"

    def recipe(self, batch: int, length: int) -> dict[str, Any]:
        """The recipe of the run."""
        pattern, steps = Pattern.parse(self.pattern), max(2, self.tokens // (batch * length))
        training = {"method": self.method, "steps": steps, "batch": batch, "length": length, "seed": self.seed,
                    "learning_rate": self.rate, "warmup": min(50, steps // 4), "precision": self.precision,
                    "save_every": 100}
        return {"name": self.key, "training": training,
                "passes": [{"prune": {"keep": pattern.keep, "of": pattern.of, "maps": MAPS}}]}


class Results:
    """The file: what was measured on, and an entry a run."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"facts": facts, "runs": {}}
        if path.is_file():
            self.document = json.loads(path.read_text(encoding="utf-8"))
            differs = [name for name, value in facts.items() if self.document["facts"].get(name) != value]
            if differs:
                raise SystemExit(f"{path} was measured with another {', '.join(differs)}: choose another --out")

    def __contains__(self, key: str) -> bool:
        return key in self.document["runs"]

    def add(self, key: str, entry: dict[str, Any]) -> None:
        if self.path.is_file():  # another process, with other methods or rates, may have added to it since
            self.document["runs"] |= json.loads(self.path.read_text(encoding="utf-8"))["runs"]
        self.document["runs"][key] = entry
        storage.write_json(self.path, self.document)


def train(model: str, tokens: Tensor, run: Run, work: Path, batch: int, length: int) -> tuple[Any, dict[str, Any]]:
    """The trained, sparse model and what its run was like."""
    host, began = mc.load(model), time.perf_counter()
    speeds, losses, sparsity = [], [], 0.0
    with mc.attach(host, run.recipe(batch, length)) as session:
        config = session.training.run()
        resume = (work / lm.CHECKPOINT).is_file()
        with closing(lm.train(host, tokens, config, work, resume=resume, method=session)) as rows:
            for row in rows:
                speeds.append(row["tokens_per_second"])
                losses.append(row["loss"])
                sparsity = session.sparsity()
                if (int(row["step"]) + 1) % 50 == 0:
                    left = (config.steps - row["step"] - 1) * config.tokens / speeds[-1]
                    print(f"  {run.key}: step {int(row['step']) + 1}/{config.steps}, loss {row['loss']:.3f}, "
                          f"{speeds[-1]:,.0f} tokens/s, {left / 60:.0f} min left", flush=True)
    facts = {"steps": config.steps, "precision": lm.settled(config, torch.device("cpu")).precision,
             "sparsity_before_the_end": sparsity, "seconds": round(time.perf_counter() - began, 1)}
    if speeds:
        facts |= {"tokens_per_second": sorted(speeds)[len(speeds) // 2],
                  "last_losses": sum(losses[-100:]) / len(losses[-100:])}
    return host.eval(), facts


def measured(model: Any, windows: Windows) -> dict[str, Any]:
    """Perplexity, its standard error, and the loss of every window."""
    losses = window_losses(model, windows)
    found = stats.perplexity(losses, windows.counts)
    return {"perplexity": found.value, "se": found.se, "losses": losses}


def zeros(model: Any) -> float:
    """Share of zeros in the matrices that are pruned, counted."""
    weights = [module.weight for name, module in model.named_modules() if name.endswith(tuple(MAPS))]
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def one_shot(model: str, pattern: str, calibration: Tensor, windows: Windows, results: Results) -> None:
    """Every method in both bases, packed."""
    parsed = Pattern.parse(pattern)
    for basis, rotation in ROTATIONS.items():
        for method in ONE_SHOT:
            key = f"{pattern.replace(':', 'of')}-oneshot-{method}-{basis}"
            if key in results:
                continue
            steps: list[Any] = [] if rotation is None else [{"fuse_norms": {}}, {"rotate": rotation}]
            prune = {"method": method, "keep": parsed.keep, "of": parsed.of, "maps": MAPS}
            made = mc.quantize(model, {"name": key, "passes": [*steps, {"prune": prune}]}, calibration=calibration)
            entry = {"pattern": pattern, "method": f"{method} ({basis})", "rate": None, "seed": None, "tokens": 0}
            results.add(key, entry | measured(made.model, windows))
            print(f"{key}: {results.document['runs'][key]['perplexity']:.3f}", flush=True)


def rows(document: dict[str, Any]) -> Iterator[list[str]]:
    """A line a pattern and method: the best learning rate by mean perplexity over seeds, beside its dense control."""
    counts, runs = document["facts"]["counts"], list(document["runs"].values())
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["pattern"], run["method"], run["tokens"], run["rate"]), []).append(run)

    def mean(entries: list[dict[str, Any]]) -> float:
        return sum(entry["perplexity"] for entry in entries) / len(entries)

    best: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for (pattern, method, tokens, _), entries in groups.items():
        name = (pattern, method, tokens)
        if name not in best or mean(entries) < mean(best[name]):
            best[name] = entries
    for (pattern, method, tokens), entries in sorted(best.items(), key=lambda item: (item[0][0], mean(item[1]))):
        controls = [other for name, other in best.items() if name[1] == "dense" and name[2] == tokens]
        control = min(controls, key=mean) if controls else None
        shown = ""
        if control is not None and method != "dense":
            change = stats.perplexity_change(entries[0]["losses"], control[0]["losses"], counts)
            spread = stats.mean([entry["perplexity"] for entry in entries]).se
            shown = f"{mean(entries) / mean(control):.4f} ± {change.ratio.se or 0:.4f}"
            shown += "" if spread is None else f" (seeds ± {spread:.3f})"
        rate = "" if entries[0]["rate"] is None else f"{entries[0]['rate']:g}"
        yield [pattern, method, f"{tokens:,}", rate, str(len(entries)),
               f"{mean(entries):.3f} ± {entries[0]['se']:.3f}", shown]


def markdown(document: dict[str, Any]) -> str:
    """The table."""
    head = ["pattern", "method", "tokens", "rate", "seeds", "perplexity", "over the dense control"]
    lines = [head, ["---"] * len(head), *rows(document)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def arguments_of_training(module: str, description: str | None) -> argparse.ArgumentParser:
    """What every benchmark that trains sparse models is told."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=200)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of_training("benchmarks.sparsity", __doc__)
    parser.add_argument("--methods", default="dense,sr-ste,mdgf-linear,mdgf-exponential,sdgf-stepwise,sdgf-geometric,"
                                             "cast")
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--one-shot", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    methods = [name for name in options.methods.split(",") if name]
    unknown = set(methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    tokenizer = load_tokenizer(options.model)
    texts = read_texts(options.train)
    windows = make_windows(encode(tokenizer, read_texts(options.valid)), limit=options.windows)
    facts = {"model": Path(options.model).name, "valid": Path(options.valid).name, "windows": windows.fingerprint,
             "train": [Path(name).name for name in options.train], "counts": windows.counts,
             "batch": options.batch, "length": options.length}
    results = Results(options.out, facts)
    if "original" not in results:
        entry = {"pattern": "", "method": "original", "rate": None, "seed": None, "tokens": 0}
        results.add("original", entry | measured(mc.load(options.model), windows))
    if options.one_shot:
        one_shot(options.model, options.pattern, token_windows(tokenizer, texts, *CALIBRATION), windows, results)
    runs = [Run(options.pattern, method, float(rate), int(seed), options.tokens, options.precision)
            for seed in options.seeds.split(",") for rate in options.rates.split(",") for method in methods]
    runs = [run for run in runs if run.key not in results]
    tokens = encode(tokenizer, texts) if runs else torch.empty(0)
    for i, run in enumerate(runs):
        print(f"{run.key} ({i + 1} of {len(runs)})", flush=True)
        work = options.out.with_name(options.out.stem + ".runs") / run.key
        model, facts = train(options.model, tokens, run, work, options.batch, options.length)
        entry = {"pattern": run.pattern if run.method != "dense" else "", "method": run.method, "rate": run.rate,
                 "seed": run.seed, "tokens": run.tokens, "zeros": zeros(model), "run": facts,
                 "environment": environment.versions(("mambacompress", "torch"))} | measured(model, windows)
        restore(model).save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        results.add(run.key, entry)
        (work / lm.CHECKPOINT).unlink(missing_ok=True)
        print(f"{run.key}: perplexity {entry['perplexity']:.3f} ± {entry['se']:.3f}", flush=True)
    print(markdown(results.document))


if __name__ == "__main__":
    main()
