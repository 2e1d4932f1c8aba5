"""Bytes, counted from the files themselves.

A safetensors header names every tensor with its dtype, shape and byte range, so nothing is estimated and no weight is
read. The files' bytes are what is compared; the categories say where they go and sum to the tensor bytes exactly:

    embeddings   tensors of the embedding and of the head, their scales included (a tied one is stored and counted once)
    weights      integer codes of quantized matrices, and the matrices that stayed in float
    scales       scales and zero points       masks   N:M masks and indices
    other        norms, biases, A, D, convolutions, transforms of the head

Bits a weight = bits of embeddings + weights + scales + masks over the number of weights they stand for; linear bits
leave out the embeddings. How many a packed tensor stands for is not in its shape: the artifact's manifest says (int4
holds two a byte).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambacompress.errors import UserError
from mambacompress.eval.schema import Size

ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
CATEGORIES = ("weights", "scales", "masks", "embeddings", "other")
MANIFEST = "mambacompress.json"
_EMBEDDINGS = ("embed", "lm_head", "wte")
_SCALES = ("scale", "scales", "zero", "zeros", "zero_point")
_MASKS = ("mask", "indices", "index", "meta")
_OTHER = ("A_log", "D", "dt_bias", "bias", "transform", "signs")
_HEADER_LIMIT = 100 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> tuple[list[TensorEntry], int]:
    """The tensors of a safetensors file and the bytes of its header; raises UserError where it is damaged."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        entries = []
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                entries.append(TensorEntry(name, entry["dtype"], tuple(entry["shape"]), end - start))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{file} is no safetensors file, or damaged: {error}", "copy the model again") from error
    if 8 + length + sum(entry.nbytes for entry in entries) != size:
        raise UserError(
            f"{file} has {size:,} bytes, its header speaks of {8 + length + sum(e.nbytes for e in entries):,}",
            "the file is truncated: copy the model again",
        )
    return entries, 8 + length


def measure(directory: str | Path) -> Size:
    """Count a model directory; raises UserError where it holds no safetensors file.

    Where an index or manifest names the shards, only those count: leftovers beside them are listed as other files.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory", "name a model directory")
    shards = _shards(directory)
    layout = _json(directory / MANIFEST).get("layout", {})
    totals = dict.fromkeys(CATEGORIES, 0)
    dtypes: dict[str, int] = {}
    header_bytes = weights = weight_bytes = linear = 0
    for shard in shards:
        entries, header = read_header(shard)
        header_bytes += header
        for entry in entries:
            category = category_of(entry)
            totals[category] += entry.nbytes
            dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.nbytes
            if category != "other":
                weight_bytes += entry.nbytes
                count = _weights_in(entry, layout)
                weights += count
                linear += count if category != "embeddings" else 0
    named = {shard.name for shard in shards}
    others = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in named
    }
    state_bytes, state_note = state_of(_json(directory / "config.json"))
    tensor_bytes = sum(totals.values())
    linear_bytes = totals["weights"] + totals["scales"] + totals["masks"]
    return Size(
        file_bytes=tensor_bytes + header_bytes,
        tensor_bytes=tensor_bytes,
        header_bytes=header_bytes,
        categories=totals,
        dtypes=dtypes,
        weights=weights,
        bits_per_weight=8 * weight_bytes / weights if weights else math.nan,
        linear_bits=8 * linear_bytes / linear if linear else None,
        other_files=others,
        state_bytes=state_bytes,
        state_note=state_note,
    )


def category_of(entry: TensorEntry) -> str:
    """One of CATEGORIES, from the tensor's name, dtype and shape."""
    path, _, leaf = entry.name.rpartition(".")
    module = path.rpartition(".")[2]
    if any(mark in path for mark in _EMBEDDINGS) and leaf not in _OTHER:
        return "embeddings"
    if _is_scale(leaf):
        return "scales"
    if _is_mask(leaf):
        return "masks"
    if leaf in _OTHER or leaf.endswith("_bias") or module.startswith("conv") or len(entry.shape) != 2:
        return "other"
    return "weights"


def _weights_in(entry: TensorEntry, layout: dict[str, Any]) -> int:
    """How many weights a tensor stands for; 0 for scales and masks."""
    path, _, leaf = entry.name.rpartition(".")
    if _is_scale(leaf) or _is_mask(leaf):
        return 0
    items = math.prod(entry.shape)
    pattern = layout.get(path, {}).get("pattern")
    if pattern is not None and leaf == "values":  # of N:M sparse weights only N are stored
        keep, _, of = pattern.partition(":")
        return items // int(keep) * int(of)
    bits = _bits(layout.get(path, {}))
    return items * ITEM_BITS[entry.dtype] // bits if bits and entry.dtype in ("U8", "I8", "I32") else items


def _is_scale(leaf: str) -> bool:
    return leaf in _SCALES or leaf.startswith("scale_") or leaf.endswith(("_scale", "_scales", "_zero", "_zeros"))


def _is_mask(leaf: str) -> bool:
    return leaf in _MASKS or leaf.endswith(("_mask", "_indices"))


def _bits(spec: dict[str, Any]) -> int | None:
    """The bits a code of a packed module's spec, wherever it states them."""
    for key in ("format", "weight", "weights", "weight_format"):
        if isinstance(spec.get(key), dict) and "bits" in spec[key]:
            return int(spec[key]["bits"])
    return int(spec["bits"]) if "bits" in spec else None


def _shards(directory: Path) -> list[Path]:
    index = _json(directory / "model.safetensors.index.json")
    names = (
        sorted(set(index["weight_map"].values()))
        if "weight_map" in index
        else (
            ["model.safetensors"]
            if (directory / "model.safetensors").is_file()
            else sorted(path.name for path in directory.glob("*.safetensors"))
        )
    )
    if not names:
        raise UserError(
            f"{directory} holds no safetensors file", "save the model with safetensors to count its bytes"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} misses {', '.join(missing)}", "copy the model again")
    return [directory / name for name in names]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", "copy the model again") from error
    return value if isinstance(value, dict) else {}


def state_of(config: dict[str, Any]) -> tuple[int | None, str]:
    """Bytes of state one sequence holds between tokens, and how they are counted.

    The convolution's last K - 1 inputs and the scan's state, both fp32, of every layer. None for a family whose state
    is not known here, or grows with the text.
    """
    layers, kernel, states = (config.get(key) for key in ("num_hidden_layers", "conv_kernel", "state_size"))
    kind = config.get("model_type")
    if kind not in ("mamba", "falcon_mamba", "mamba2") or not (layers and kernel and states):
        return None, f"not known for model type {kind!r}"
    if kind == "mamba2":
        inner = config["num_heads"] * config["head_dim"]
        channels = inner + 2 * config.get("n_groups", 1) * states
    else:
        inner = channels = config.get("intermediate_size") or config["expand"] * config["hidden_size"]
    conv, scan = 4 * layers * channels * (kernel - 1), 4 * layers * inner * states
    return conv + scan, f"convolution {conv:,} B + scan {scan:,} B, fp32, constant in the length of the text"
