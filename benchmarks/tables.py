"""Rows of the quality tables: sizes counted from the files, llama.cpp's rows, Markdown.

A row is plain data: ``model`` (original, or a twin as kind:seed), ``variant``, sizes, and per text perplexity, paired
ratio and its standard error, KL divergence, top-1 agreement; or an ``error``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.windows import Ratio, perplexity_ratio

LINEARS = ("in_proj", "x_proj", "dt_proj", "out_proj")
GGUF_LINEARS = ("ssm_in", "ssm_x", "ssm_dt", "ssm_out")
ITEM_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


def sizes(directory: str | Path) -> dict[str, float]:
    """Of a model directory or an artifact: tensor_bytes (all that is stored), file_bytes (the safetensors files) and
    linear_bits (bits a weight of the linears, scales included).
    """
    from safetensors import safe_open

    directory = Path(directory)
    total = linear = 0.0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                piece = handle.get_slice(name)
                size = int(np.prod(piece.get_shape(), dtype=np.int64)) * ITEM_BITS[piece.get_dtype()] / 8
                total += size
                if any(f".{part}." in name for part in LINEARS) and not name.endswith(".bias"):
                    linear += size
    weights = linear_weights(directory)
    files = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return {"tensor_bytes": total, "file_bytes": files, "linear_bits": 8 * linear / weights}


def linear_weights(directory: Path) -> int:
    """How many weights the linears of a Mamba-1 or Mamba-2 directory have."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers, D, N = (config[key] for key in ("num_hidden_layers", "hidden_size", "state_size"))
    if config["model_type"] == "mamba2":
        E = int(config["expand"] * D)
        return int(layers * (D * (2 * E + 2 * config["n_groups"] * N + config["num_heads"]) + E * D))
    E, R = config["intermediate_size"], config["time_step_rank"]
    return int(layers * (2 * E * D + E * (R + 2 * N) + E * R + E * D))


def llama_rows(file: str | Path, base: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows from the results of ``benchmarks.peers.llamacpp``, paired with our float losses.

    Raises ValueError where it was measured on another number of windows.
    """
    measured = json.loads(Path(file).read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = {}
    for text, nll_W in base.items():
        if text not in measured["texts"]:
            continue
        found = measured["texts"][text]
        if found["windows"] != len(nll_W):
            raise ValueError(f"{file} measured {found['windows']} windows of {text}, this table {len(nll_W)}")
        for kind, figures in found["types"].items():
            ratio = perplexity_ratio(np.array(figures["nll_per_window"]), nll_W)
            linears = [t for t in figures["tensors"] if any(f".{name}.weight" in t["name"] for name in GGUF_LINEARS)]
            weights = sum(int(np.prod(t["shape"])) for t in linears)
            row = rows.setdefault(kind, {
                "model": "original", "variant": f"llama.cpp {kind}", "tensor_bytes": figures["tensor_bytes"],
                "file_bytes": figures["file_bytes"], "linear_bits": 8 * sum(t["bytes"] for t in linears) / weights,
                "texts": {}})
            row["texts"][text] = {"perplexity": figures["perplexity"], "ratio": ratio.ratio, "ratio_se": ratio.se,
                                  "kl": figures["kl"], "agreement": figures["agreement"]}
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a row; sizes relative to the float original, which must be among the rows."""
    texts = sorted({text for row in rows for text in row.get("texts", {})})
    head = ["model", "variant", "tensor MB", "share", "bits/linear"]
    for text in texts:
        head += [f"{text.split('.')[0]} ppl", "ratio", "KL", "top-1"]
    whole = next((row["tensor_bytes"] for row in rows if row["variant"] == "float"), None)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], row["variant"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/")] + [""] * (len(head) - 3)
        else:
            share = "" if whole is None else f"{row['tensor_bytes'] / whole:.3f}"
            cells += [f"{row['tensor_bytes'] / 1e6:.2f}", share, f"{row['linear_bits']:.2f}"]
            for text in texts:
                found = row["texts"].get(text)
                cells += [""] * 4 if found is None else [
                    f"{found['perplexity']:.2f}", str(Ratio(found["ratio"], found["ratio_se"])), f"{found['kl']:.5f}",
                    f"{found['agreement']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def twin_summary(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> str:
    """Per text, variant and kind of twin: the worst ratio over its seeds beside the original's."""
    lines = []
    for text in sorted({text for row in rows for text in row.get("texts", {})}):
        measured = [row for row in rows if text in row.get("texts", {})]
        ratios = {(row["variant"], row["model"]): row["texts"][text]["ratio"] for row in measured}
        for variant in dict.fromkeys(variant for variant, model in ratios if ":" in model):
            own = ratios.get((variant, "original"))
            for kind in kinds:
                found = [ratio for (v, model), ratio in ratios.items() if v == variant and model.startswith(f"{kind}:")]
                if found:
                    beside = "not measured" if own is None else f"{own:.4f}"
                    lines.append(f"{text}: {variant} on {kind}: worst of {len(found)} seeds {max(found):.4f}, best "
                                 f"{min(found):.4f}, on the original {beside}")
    return "\n".join(lines)
