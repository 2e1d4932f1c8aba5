"""What an int8 recurrent state changes: perplexity and divergence over long teacher-forced texts, and what states take.

    python -m benchmarks.state8 MODEL [MODEL ...] --text FILE [--tokens 2000] [--windows 8] --out state8.json

A batch of windows (``windows``) is read token by token by two decoders of the same model, one with fp32 and one with
int8 states, which both get the text's own next token: after the first token every step of the int8 decoder starts from
a rounded state. The perplexity ratio is paired over windows; KL is that of the int8 decoder's distribution from the
fp32 decoder's, in nats a token, also by quarter of the windows: an error that accumulates shows as a rise. The two
final states are compared as well. A result that is not finite is written as it is.

Legend: W windows (the rows of the batch), T predictions of a window, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.windows import Ratio, load_tokenizer, perplexity, perplexity_ratio, windows
from mambacompress.eval import environment
from mambacompress.kernels import registry
from mambacompress.kernels.int8_state import Int8State
from mambacompress.models.lm import Decoder, LanguageModel, States

QUARTERS = 4


@torch.no_grad()
def compare_states(lm: LanguageModel, ids_WL: Tensor) -> dict[str, Any]:
    """One row of the table: figures of ``lm`` on windows int64 [W, L], read from their first token on by steps."""
    logits_WV, states = lm.prefill(ids_WL[:, :1], last_only=True)
    decoders = {form: Decoder(lm, states, form) for form in ("fp32", "int8")}
    rows: list[list[Tensor]] = [_figures(logits_WV[:, -1], logits_WV[:, -1], ids_WL[:, 1])]
    for t in range(1, ids_WL.shape[1] - 1):
        exact_WV, rounded_WV = (decoder.step(ids_WL[:, t]) for decoder in decoders.values())
        rows.append(_figures(exact_WV, rounded_WV, ids_WL[:, t + 1]))
    nll_WT, nll8_WT, kl_WT, same_WT = (torch.stack(column, 1).numpy() for column in zip(*rows, strict=True))
    exact, rounded = decoders["fp32"].states, decoders["int8"].states
    ratio = perplexity_ratio(nll8_WT.mean(1), nll_WT.mean(1))
    return {
        "windows": len(ids_WL), "tokens": ids_WL.shape[1],
        "perplexity_fp32": perplexity(nll_WT.mean(1)), "perplexity_int8": perplexity(nll8_WT.mean(1)),
        "ratio": ratio.ratio, "ratio_se": ratio.se, "kl": float(kl_WT.mean()),
        "kl_quarters": [float(part.mean()) for part in np.array_split(kl_WT, QUARTERS, axis=1)],
        "kl_p99": float(np.quantile(kl_WT, 0.99)), "agreement": float(same_WT.mean()),
        "state_error": state_error(exact, rounded),
        "bytes_fp32": sum(state.bytes for state in exact) // len(ids_WL),
        "bytes_int8": sum(state.bytes for state in rounded) // len(ids_WL),
        "recurrent_fp32": _recurrent_bytes(exact) // len(ids_WL),
        "recurrent_int8": _recurrent_bytes(rounded) // len(ids_WL)}


def _figures(exact_WV: Tensor, rounded_WV: Tensor, next_W: Tensor) -> list[Tensor]:
    """Loss of both, KL and whether both put the same first, fp64 [W] each."""
    p_WV, q_WV = (torch.log_softmax(logits.double(), -1) for logits in (exact_WV, rounded_WV))
    losses = [-x_WV.gather(1, next_W[:, None])[:, 0] for x_WV in (p_WV, q_WV)]
    same_W = (exact_WV.argmax(-1) == rounded_WV.argmax(-1)).double()
    return [*losses, (p_WV.exp() * (p_WV - q_WV)).sum(-1), same_W]


def state_error(exact: States, rounded: States) -> float:
    """RMS of the difference of the recurrent states over the RMS of the exact ones, the mean over blocks."""
    errors = []
    for a, b in zip(exact, rounded, strict=True):
        if isinstance(a.ssm, Int8State) or not isinstance(b.ssm, Int8State):
            raise TypeError("the first states must be fp32, the second int8")
        difference = (b.ssm.dequantized() - a.ssm).double()
        errors.append(float(difference.square().mean().sqrt() / a.ssm.double().square().mean().sqrt()))
    return sum(errors) / len(errors)


def _recurrent_bytes(states: States) -> int:
    return sum(state.bytes - state.conv.numel() * state.conv.element_size() for state in states)


def markdown(document: dict[str, Any]) -> str:
    """The table, with how to read it."""
    lines = ["| model | ppl, fp32 state | ppl, int8 state | ratio | KL | KL by quarter | top-1 | state error | "
             "recurrent state | with conv |", "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|"]
    for row in document["rows"]:
        quarters = ", ".join(f"{kl:.2e}" for kl in row["kl_quarters"])
        lines.append(
            f"| {row['model']} | {row['perplexity_fp32']:.3f} | {row['perplexity_int8']:.3f} | "
            f"{Ratio(row['ratio'], row['ratio_se'])} | {row['kl']:.2e} | {quarters} | {row['agreement']:.4f} | "
            f"{row['state_error']:.2e} | {row['recurrent_int8']:,} of {row['recurrent_fp32']:,} | "
            f"{row['bytes_int8']:,} of {row['bytes_fp32']:,} |")
    reading = (f"{document['text']}: {document['windows']} windows of {document['tokens']:,} tokens, teacher-forced, "
               "one token a step. KL in nats a token, against the same model with an fp32 state. State error: RMS "
               "relative to the fp32 state, at the end. States: bytes a sequence.")
    return "\n".join([*lines, "", reading, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.state8", description="int8 against fp32 states")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="a model directory or an artifact")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2000, help="of a window")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; a .md table is written beside")
    options = parser.parse_args(arguments)
    if options.tokens < 2 + QUARTERS:
        parser.error(f"--tokens must be at least {2 + QUARTERS}")

    import mambacompress as mc

    document: dict[str, Any] = {
        "environment": {"hardware": environment.hardware(), **environment.versions()}, "text": options.text.name,
        "tokens": options.tokens, "windows": options.windows, "rows": []}
    for path in options.models:
        ids_WL = windows(load_tokenizer(path), options.text, options.tokens, options.windows)
        with registry.recording() as choices:
            row = compare_states(LanguageModel.of(mc.load(str(path))), torch.from_numpy(ids_WL))
        document["rows"].append({"model": path.name, **row, "backend": environment.backend(choices)})
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
        options.out.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
