"""llama.cpp beside us: the same Mamba-1, the same token ids, the same windows.

    python -m benchmarks.peers.llamacpp MODEL_DIR --text FILE --windows 60 --types f16,q8_0,q4_0 --out results.json

The model is written as GGUF F16 and quantized by ``llama_model_quantize`` with its defaults, as a user would
(``mambacompress.bench.llamacpp``). Quality: the loss of each 512-token window from an empty memory, all types in step
on the same window, so that KL divergence and top-1 agreement with F16 come from the same pass. Size: the stored type
and bytes of every tensor. Speed is the business of ``mambacompress bench``.

Needs llama-cpp-python (built from source it uses this CPU's instructions: CMAKE_ARGS=-DGGML_NATIVE=ON) and gguf.

Legend: W windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.windows import Ratio, load_tokenizer, perplexity, perplexity_ratio, windows
from mambacompress.bench.gguf_mamba import TensorRow, tensor_rows
from mambacompress.bench.llamacpp import EVERY_TENSOR, FILE_TYPES, Session, make_types


@dataclass
class Quality:
    """A type's figures, means over each window's predictions: loss, KL and the share of equal most likely tokens."""

    nll_W: np.ndarray
    kl_W: np.ndarray
    agreement_W: np.ndarray


def measure_quality(files: dict[str, Path], windows_WL: np.ndarray, *, threads: int = 1,
                    progress: Callable[[int], None] = lambda done: None) -> dict[str, Quality]:
    """Loss, KL(F16 || type) and top-1 agreement of every type, window by window.

    ``files`` must hold "f16". Raises KeyError otherwise.
    """
    sessions = {kind: Session(file, threads=threads, length=windows_WL.shape[1]) for kind, file in files.items()}
    try:
        rows: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in files}
        for done, tokens_L in enumerate(windows_WL):
            reference_LV = log_softmax(sessions[EVERY_TENSOR].logits(tokens_L)[:-1])
            for kind, session in sessions.items():
                log_p_LV = reference_LV if kind == EVERY_TENSOR else log_softmax(session.logits(tokens_L)[:-1])
                rows[kind].append(compare(log_p_LV, reference_LV, tokens_L[1:]))
            progress(done + 1)
    finally:
        for session in sessions.values():
            session.close()
    return {kind: Quality(*(np.array(column) for column in zip(*values, strict=True))) for kind, values in rows.items()}


def log_softmax(logits_LV: np.ndarray) -> np.ndarray:
    """log-probabilities in fp64, [L, V]."""
    shifted = logits_LV.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(log_p_LV: np.ndarray, reference_LV: np.ndarray, targets_L: np.ndarray) -> tuple[float, float, float]:
    """(mean loss, mean KL(reference || p), share of positions with the same most likely token)."""
    nll = -float(log_p_LV[np.arange(len(targets_L)), targets_L].mean())
    if log_p_LV is reference_LV:
        return nll, 0.0, 1.0
    kl = float((np.exp(reference_LV) * (reference_LV - log_p_LV)).sum(axis=-1).mean())
    return nll, kl, float((log_p_LV.argmax(-1) == reference_LV.argmax(-1)).mean())


def results(files: dict[str, Path], quality: dict[str, Quality], windows_WL: np.ndarray) -> dict[str, Any]:
    """Everything measured, ready for JSON: per type perplexity, paired ratio to F16, KL, agreement, types and bytes."""
    base = quality[EVERY_TENSOR].nll_W
    rows: dict[str, Any] = {}
    for kind, q in quality.items():
        tensors = tensor_rows(files[kind])
        ratio = perplexity_ratio(q.nll_W, base) if kind != EVERY_TENSOR else Ratio(1.0, 0.0)
        rows[kind] = {
            "perplexity": perplexity(q.nll_W), "ratio": ratio.ratio, "ratio_se": ratio.se,
            "kl": float(q.kl_W.mean()), "agreement": float(q.agreement_W.mean()), "nll_per_window": q.nll_W.tolist(),
            "file_bytes": files[kind].stat().st_size, "tensor_bytes": sum(t.bytes for t in tensors),
            "tensors": [asdict(t) for t in tensors],
        }
    return {"windows": len(windows_WL), "length": windows_WL.shape[1], "types": rows}


def table(measured: dict[str, Any]) -> str:
    """The results as text: one line a type, then the tensor types of each."""
    lines = [f"{measured['windows']} windows of {measured['length']} tokens",
             f"{'type':8} {'ppl':>9} {'ratio to f16':>17} {'KL':>9} {'top-1':>7} "
             f"{'tensor bytes':>13} {'file bytes':>11}"]
    for kind, row in measured["types"].items():
        ratio = Ratio(row["ratio"], row["ratio_se"])
        lines.append(f"{kind:8} {row['perplexity']:9.3f} {ratio!s:>17} {row['kl']:9.6f} {row['agreement']:7.4f} "
                     f"{row['tensor_bytes']:13,} {row['file_bytes']:11,}")
    for kind, row in measured["types"].items():
        lines.append(f"{kind:8} {type_summary([TensorRow(**t) for t in row['tensors']])}")
    return "\n".join(lines)


def type_summary(tensors: Sequence[TensorRow]) -> str:
    """``ssm_in Q4_K x8, token_embd Q6_K, ...``: the types, layers of one kind together."""
    counts = Counter((t.name.split(".", 2)[-1] if t.name.startswith("blk.") else t.name, t.type) for t in tensors)
    return ", ".join(f"{name} {kind}" + (f" x{count}" if count > 1 else "") for (name, kind), count in counts.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.llamacpp",
                                     description="llama.cpp on a Mamba: perplexity and bytes of each type")
    parser.add_argument("model", help="a transformers Mamba-1 or Mamba-2 directory")
    parser.add_argument("--text", action="append", default=[], help="evaluation text (.txt, .jsonl, plain, .xz or .gz)")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--types", default="f16,q8_0,q4_0,q4_k_m", help=f"of {', '.join(FILE_TYPES)}")
    parser.add_argument("--threads", type=int, default=1, help="threads of the quality runs")
    parser.add_argument("--gguf", help="folder to keep the GGUF files in (default: removed at the end)")
    parser.add_argument("--out", help="results as JSON")
    options = parser.parse_args(arguments)
    kinds = options.types.split(",")
    measured: dict[str, Any] = {"model": Path(options.model).name, "texts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.gguf or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = make_types(options.model, kinds, folder)
        for text in options.text:
            windows_WL = windows(load_tokenizer(options.model), text, options.length, options.windows)
            quality = measure_quality(files, windows_WL, threads=options.threads)
            measured["texts"][Path(text).name] = results(files, quality, windows_WL)
            print(f"{Path(text).name}\n{table(measured['texts'][Path(text).name])}\n", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
