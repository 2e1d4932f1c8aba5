"""Kernels alone: the training scan and a training step beside their rivals, and every op against fp64.

    python -m benchmarks.kernels --threads 1,2 --out kernels.json

Scan: forward and backward of selective_scan (batch 8, 256 tokens, 512 channels, 16 states) and of the same recurrence
in torch, a loop over unbound tokens. Training: loss, backward, clipping and AdamW step of a 4.5 M-parameter Mamba-1
(batch 8 x 256 tokens), on our mixers and on transformers' own, from the same weights. Both are checked to compute the
same numbers first and then take turns; ratios are of one round. transformers takes a minute or more a step, so its
rounds are few (``--train-rounds``). The op table is ``benchmarks.op_errors``.

Legend: B batch, L tokens, E channels, N d_state.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import op_errors
from mambacompress.bench.summary import Spread
from mambacompress.eval import environment
from mambacompress.kernels.selective_scan import selective_scan
from mambacompress.kernels.tolerances import rms_ratio
from mambacompress.models.families import adopt
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import parameter_groups, token_loss
from mambacompress.training.recipes import RECIPES

VOCABULARY = 4096
ALIKE = 1e-4  # RMS ratio or relative difference up to which two contestants compute the same


def sequential_scan(u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor,
                    z_BLE: Tensor) -> Tensor:
    """The recurrence in torch, a Python loop over tokens: y [B, L, E]."""
    dt_BLE = F.softplus(dt_BLE)
    decay_BLEN = torch.exp(dt_BLE[..., None] * A_EN)
    inflow_BLEN = (dt_BLE * u_BLE)[..., None] * B_BLN[:, :, None]
    h_BEN = torch.zeros_like(inflow_BLEN[:, 0])
    y = []
    for decay_BEN, inflow_BEN, C_BN in zip(decay_BLEN.unbind(1), inflow_BLEN.unbind(1), C_BLN.unbind(1), strict=True):
        h_BEN = decay_BEN * h_BEN + inflow_BEN
        y.append((h_BEN @ C_BN[..., None])[..., 0])
    return (torch.stack(y, 1) + D_E * u_BLE) * F.silu(z_BLE)


def scan_contestants(batch: int, length: int, channels: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of both, checked to agree. Raises RuntimeError where they do not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, L, E, N = batch, length, channels, 16
    leaves = [normal(B, L, E), normal(B, L, E) - 4, -torch.arange(1.0, N + 1).expand(E, N).contiguous(),
              normal(B, L, N), normal(B, L, N), normal(E), normal(B, L, E)]
    for leaf in leaves:
        leaf.requires_grad_()
    weight_BLE = normal(B, L, E)

    def ours(u: Tensor, dt: Tensor, A: Tensor, B_: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        return selective_scan(u, dt, A, B_[:, :, None], C[:, :, None], D, z)[0]

    def gradients(scan: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y_BLE = scan(*leaves)
        return (y_BLE.detach(), *torch.autograd.grad((y_BLE * weight_BLE).sum(), leaves))

    contestants = {"selective_scan": ours, "torch, sequential": sequential_scan}
    pairs = zip(*(gradients(scan) for scan in contestants.values()), strict=True)
    worst = max(rms_ratio(a, b) for a, b in pairs)
    if worst > ALIKE:
        raise RuntimeError(f"the two scans differ by {worst:.1e} in RMS: nothing to time")
    return {name: lambda scan=scan: gradients(scan) and None for name, scan in contestants.items()}  # type: ignore[misc]


def training_contestants(batch: int, length: int) -> tuple[dict[str, Callable[[], None]], int]:
    """(a training step of ours and of transformers', parameters). RuntimeError where losses or gradients differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = RECIPES["english-mamba1"]
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.kind, vocab_size=VOCABULARY, **recipe.config))
    models: dict[str, Any] = {"our mixers": copy.deepcopy(stock).train(), "transformers": stock.train()}
    adopt(models["our mixers"])
    ids_BL = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    config = TrainConfig(steps=1, warmup=0)
    short_BL = ids_BL[:2, :32]
    seen = {}
    for name, model in models.items():
        loss = token_loss(model, short_BL)
        loss.backward()
        seen[name] = (float(loss.detach()), float(torch.nn.utils.get_total_norm(_gradients(model))))
        model.zero_grad()
    for ours, theirs in zip(seen["our mixers"], seen["transformers"], strict=True):
        if abs(ours - theirs) > ALIKE * abs(theirs):
            raise RuntimeError(f"the two models train differently (loss, gradient norm: {seen}): nothing to time")
    return ({name: _trainer(model, ids_BL, config) for name, model in models.items()},
            sum(parameter.numel() for parameter in stock.parameters()))


def _gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _trainer(model: Any, ids_BL: Tensor, config: TrainConfig) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=1e-5)

    def step() -> None:
        token_loss(model, ids_BL).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_turns(contestants: dict[str, Callable[[], None]], rounds: int, repeats: dict[str, int]) -> dict[str, Any]:
    """Seconds of every contestant, a number a round (the mean of so many repeats in a row), and the ratios of the last
    one's to the first one's: how many times as fast the first is."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            count = repeats.get(name, 1)
            started = time.perf_counter()
            for _ in range(count):
                run()
            seconds[name].append((time.perf_counter() - started) / count)
    first, last = (seconds[name] for name in (next(iter(seconds)), list(seconds)[-1]))
    ratio = Spread.of([theirs / ours for ours, theirs in zip(first, last, strict=True)])
    return {"seconds": seconds, "ratio": None if ratio is None else asdict(ratio)}


def markdown(document: dict[str, Any]) -> str:
    """The timings, then the op table."""
    lines = ["| what | threads | contestant | median ms | tokens/s | must | ratio (quartiles) |",
             "|---|---:|---|---:|---:|---:|---:|"]
    for run in document["timings"]:
        for name, seconds in run["seconds"].items():
            spread = Spread.of(seconds)
            if spread is None:
                continue
            first, ratio = name == next(iter(run["seconds"])), run["ratio"]
            shown = f"{ratio['median']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})" if first and ratio else ""
            lines.append(f"| {run['what']} | {run['threads']} | {name} | {1e3 * spread.median:,.1f} | "
                         f"{run['tokens'] / spread.median:,.0f} | {run['must'] if first else ''} | {shown} |")
    errors = [op_errors.Errors(**row) for row in document["errors"]]
    return "\n".join([*lines, "", op_errors.table(errors)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train-rounds", type=int, default=2, help="of the training step; 0: leave it out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--channels", type=int, default=512, help="of the scan")
    parser.add_argument("--problems", type=int, default=3, help="random problems an op is compared with fp64 on")
    parser.add_argument("--out", type=Path, default=Path("kernels.json"), help="JSON; the tables go beside it as .md")
    options = parser.parse_args(arguments)
    tokens = options.batch * options.length
    timings: list[dict[str, Any]] = []
    scans = scan_contestants(options.batch, options.length, options.channels)
    trainers, parameters = training_contestants(options.batch, options.length) if options.train_rounds else ({}, 0)
    for count in [int(part) for part in options.threads.split(",")]:
        torch.set_num_threads(count)
        take_turns(scans, 1, {})  # warms up
        timings.append({"what": "scan, forward and backward", "threads": count, "tokens": tokens, "must": 25,
                        **take_turns(scans, options.rounds, {"selective_scan": 10})})
        if trainers:
            trainers["our mixers"]()
            timings.append({"what": f"training step, {parameters / 1e6:.1f} M parameters", "threads": count,
                            "tokens": tokens, "must": 50,
                            **take_turns(trainers, options.train_rounds, {"our mixers": 5})})
    document = {"environment": {"hardware": environment.hardware(), **environment.versions()}, "timings": timings,
                "batch": options.batch, "length": options.length, "channels": options.channels,
                "errors": [asdict(row) for row in op_errors.measure(options.problems)]}
    options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
