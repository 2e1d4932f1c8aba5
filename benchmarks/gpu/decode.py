"""Decoding with a whole model: an int8 artifact through ``generate`` (a CUDA graph) beside transformers in fp16.

Random weights of mamba-130m, written and quantized below the output folder where they are not there yet.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_artifact, write_model
from mambacompress.kernels import registry

RECIPE = "rtn-w8a8"
REPEATS = 3


def measure_decode(size: str, folder: Path, device: torch.device, batches: tuple[int, ...] = (1, 8),
                   tokens: int = 128) -> dict[str, Any]:
    """Tokens/s by contestant and batch, what ran, and what went wrong."""
    import mambacompress as mc
    from mambacompress.models.lm import LanguageModel, generate

    source = write_model(size, folder)
    model = mc.load(write_artifact(source, RECIPE), device=str(device))
    rates: dict[str, float] = {}
    problems: list[str] = []
    with registry.recording() as record:
        for batch in batches:
            prompt = torch.randint(1, LanguageModel.of(model).vocabulary, (batch, 16), device=device)
            rates[f"ours {RECIPE}, batch {batch}"] = _rate(
                partial(_ours, generate, model, prompt), batch, tokens)
    try:
        rates |= _transformers(source, device, batches, tokens)
    except Exception as failure:  # a peer
        problems.append(f"transformers: {type(failure).__name__}: {failure}"[:300])
    return {"tokens_per_second": rates, "ran": sorted({f"{c.op}: {c.backend}" for c in record}), "problems": problems}


def _ours(generate: Any, model: Any, prompt: torch.Tensor, count: int) -> None:
    generate(model, prompt, count, eos_token_id=[])


def _transformers(source: Path, device: torch.device, batches: tuple[int, ...], tokens: int) -> dict[str, float]:
    import transformers

    stock = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).to(device).eval()
    rates = {}
    for batch in batches:
        prompt = torch.randint(1, stock.config.vocab_size, (batch, 16), device=device)
        rates[f"transformers fp16, batch {batch}"] = _rate(
            lambda count, prompt=prompt: stock.generate(prompt, max_new_tokens=count, min_new_tokens=count,
                                                        do_sample=False), batch, tokens)
    return rates


def _rate(run: Any, batch: int, tokens: int) -> float:
    """Tokens/s of the steps behind the first few, which pay for the prompt and for capturing: the shortest of REPEATS
    runs of each length.
    """
    few = 8

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run(count)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(few)
    short, long = (min(seconds(count) for _ in range(REPEATS)) for count in (few, tokens))
    if long <= short:
        raise RuntimeError(f"{tokens} tokens took no longer than {few}: too noisy to give a rate")
    return batch * (tokens - few) / (long - short)


__all__ = ["measure_decode"]
