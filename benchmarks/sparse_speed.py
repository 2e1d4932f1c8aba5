"""Speed of N:M sparse int8 linears beside dense ones: decode, prefill and bytes of a model, in rounds that take turns.

    python -m benchmarks.sparse_speed --sizes 130m,370m --threads 1,2 --out sparse_speed.json

A random-weight checkpoint of a published size is quantized to w8a8 (``benchmarks.checkpoints``). Of every group of its
int8 codes the largest magnitudes stay, in in_proj and out_proj, or in the head as well, with which goes the embedding
that is tied to it; everything else is the dense model's. Speed does not care which weights stay.

Before anything is timed, the sparse model's logits are compared with those of its weights expanded: same bits, or the
benchmark stops. A ratio is of two rates of the same round; medians and quartiles over the rounds. Bytes are those
stored; ``read`` are those of the streams that native code reads (for 1:4, 1:8 and 2:8 a mask takes more than indices).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mambacompress as mc
from benchmarks.checkpoints import SHAPES, name_of, write_artifact, write_model
from mambacompress.bench.summary import Spread
from mambacompress.eval import environment
from mambacompress.models.lm import LanguageModel, generate
from mambacompress.models.modelmap import set_module
from mambacompress.models.packed import (
    PackedEmbedding,
    PackedHead,
    PackedLinear,
    PackedSparseEmbedding,
    PackedSparseHead,
    PackedSparseLinear,
    SparseWeight,
    rearrange,
)
from mambacompress.nm import Pattern, nm_mask

DENSE = "dense"
MAPS = (".in_proj", ".out_proj")


@dataclass(frozen=True)
class Variant:
    """A pattern of in_proj and out_proj, and of the head where ``head``."""

    pattern: str
    head: bool = False

    def __str__(self) -> str:
        return f"{self.pattern} with the head" if self.head else self.pattern


VARIANTS = tuple(Variant(pattern, head) for pattern in ("2:4", "1:4", "1:8") for head in (False, True))
GOALS = (  # variant, measure, at least
    (Variant("2:4"), "decode", 1.15), (Variant("2:4", True), "decode", 1.3), (Variant("1:4"), "decode", 1.4),
    (Variant("1:8"), "decode", 1.6), *((variant, "prefill", 0.9) for variant in VARIANTS))


def pruned(artifact: Path, variant: Variant) -> tuple[Any, dict[str, float]]:
    """The model with sparse linears, checked against itself with dense ones, and its bytes over the dense model's."""
    model = mc.load(artifact)
    pattern = Pattern.parse(variant.pattern)
    chosen: dict[str, PackedLinear | PackedEmbedding] = {
        name: module for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and name.endswith(MAPS)}
    if variant.head:
        table = LanguageModel.of(model).model_map.embedding
        if not isinstance(table.module, PackedEmbedding):
            raise ValueError("only a packed embedding with a head that is tied to it can be pruned here")
        chosen[table.path] = table.module
    sparse: dict[str, SparseWeight] = {}
    stored, read, dense = 0, 0, 0
    for name, module in chosen.items():
        codes_OI = module.codes()
        mask_OI = nm_mask(codes_OI.abs(), pattern)
        sparse[name], twin = _pair(module, codes_OI.masked_fill(~mask_OI, 0), mask_OI, pattern)
        set_module(model, name, twin)
        stored, dense = stored + sparse[name].nbytes(), dense + twin.nbytes()
        read += sparse[name].stream_bytes() + 4 * sparse[name].rows
    _tie(model)
    ids = torch.arange(1, 41)[None] % LanguageModel.of(model).vocabulary
    expected = _logits(model, ids)
    for name, weight in sparse.items():
        set_module(model, name, weight)
    _tie(model)
    rearrange(model)
    if not torch.equal(_logits(model, ids), expected):
        raise RuntimeError(f"{variant}: the sparse linears do not answer as their dense weights do")
    return model, {"stored": stored / dense, "read": read / dense}


def _pair(module: PackedLinear | PackedEmbedding, codes_OI: Tensor, mask_OI: Tensor,
          pattern: Pattern) -> tuple[SparseWeight, PackedLinear | PackedEmbedding]:
    """A module with these codes, stored sparse and stored dense."""
    if isinstance(module, PackedEmbedding):
        return (PackedSparseEmbedding.from_mask(codes_OI, mask_OI, pattern, scale=module.scale),
                PackedEmbedding.from_float(codes_OI, weights=module.weights, codes=codes_OI, scale=module.scale))
    meets: dict[str, Any] = {"activations": module.activations, "act_scale": module.act_scale, "scale": module.scale}
    return (PackedSparseLinear.from_mask(codes_OI, mask_OI, pattern, module.bias, **meets),
            PackedLinear.from_float(None, module.bias, weights=module.weights, codes=codes_OI, **meets))


def _tie(model: nn.Module) -> None:
    """Put a head on the embedding as it is now, with what the old head had beside its weight."""
    ends = LanguageModel.of(model).model_map
    embedding, head = ends.embedding.module, ends.head.module
    if not isinstance(head, PackedHead | PackedSparseHead):
        raise ValueError("only a packed head can be tied here")
    kind = PackedSparseHead if isinstance(embedding, PackedSparseEmbedding) else PackedHead
    set_module(model, ends.head.path, kind.sharing(embedding, activations=head.activations, act_scale=head.act_scale,
                                                   transform=head.transform, bias=head.bias))


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits, _ = LanguageModel.of(model).prefill(ids)
    return logits


def decode_rate(model: Any, steps: int) -> float:
    """Tokens a second of greedy decoding at batch 1, the clock started at the first token."""
    times: list[float] = []
    generate(model, torch.ones(1, 4, dtype=torch.int64), steps + 1, eos_token_id=[],
             on_token=lambda _: times.append(time.perf_counter()))
    return steps / (times[-1] - times[0])


def prefill_rate(model: Any, length: int) -> float:
    """Tokens a second of a prompt."""
    ids = torch.arange(1, length + 1)[None] % int(model.config.vocab_size)
    started = time.perf_counter()
    mc.generate(model, ids, 1)
    return length / (time.perf_counter() - started)


def race(models: dict[str, Any], measure: Callable[[Any], float], rounds: int) -> dict[str, list[float]]:
    """Rates by name; in a round everyone runs once, the order turning from round to round."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for model in models.values():
        measure(model)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            rates[name].append(measure(models[name]))
    return rates


def ratios(rates: dict[str, list[float]]) -> dict[str, Spread]:
    """Of everyone to the dense model."""
    found = {}
    for name, values in rates.items():
        spread = Spread.of([ours / theirs for ours, theirs in zip(values, rates[DENSE], strict=True)])
        if spread is not None and name != DENSE:
            found[name] = spread
    return found


def run(size: str, folder: Path, threads: Sequence[int], variants: Sequence[Variant], *, rounds: int, steps: int,
        length: int) -> dict[str, Any]:
    """Everything of one size, as plain data."""
    artifact = write_artifact(write_model(size, folder), "w8a8")
    models, weights = {DENSE: mc.load(artifact)}, {}
    for variant in variants:
        models[str(variant)], weights[str(variant)] = pruned(artifact, variant)
    document: dict[str, Any] = {"size": name_of(size), "bytes": weights, "runs": []}
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for measure, timed in (("decode", lambda m: decode_rate(m, steps)),
                                   ("prefill", lambda m: prefill_rate(m, length))):
                rates = race(models, timed, rounds)
                entry = {"threads": count, "measure": measure, "rates": rates,
                         "ratios": {name: asdict(spread) for name, spread in ratios(rates).items()}}
                document["runs"].append(entry)
                print(table(size, entry, weights), flush=True)
    finally:
        torch.set_num_threads(before)
    return document


def table(size: str, entry: dict[str, Any], weights: dict[str, dict[str, float]]) -> str:
    """A run as text: rates, ratios with quartiles, and whether a goal is met."""
    wanted = {str(variant): least for variant, measure, least in GOALS if measure == entry["measure"]}
    dense = Spread.of(entry["rates"][DENSE])
    lines = [f"{name_of(size)}, {entry['measure']}, {entry['threads']} thread(s): dense "
             f"{dense.median if dense else float('nan'):.1f} tokens/s"]
    for name, ratio in entry["ratios"].items():
        least = wanted.get(name)
        verdict = "" if least is None else f", goal {least}: {'met' if ratio['median'] >= least else 'missed'}"
        lines.append(f"  {name:20} {ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f}), pruned linears "
                     f"{weights[name]['stored']:.3f} of the bytes, {weights[name]['read']:.3f} read{verdict}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="130m,370m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help="where checkpoints are kept")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=48, help="decoded tokens a round")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    documents = [run(size, options.folder, [int(count) for count in options.threads.split(",")], VARIANTS,
                     rounds=options.rounds, steps=options.steps, length=options.length)
                 for size in options.sizes.split(",")]
    if options.out is not None:
        options.out.write_text(json.dumps({"hardware": environment.hardware(), "sizes": documents}, indent=1),
                               encoding="utf-8")


if __name__ == "__main__":
    main()
