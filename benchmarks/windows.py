"""The evaluation windows every quality figure of this folder is measured on.

One convention, so that figures compare: the documents of a text file are tokenised whole and without special tokens,
concatenated in file order with the end-of-text token between two documents, and cut into consecutive windows of
``length`` tokens; the first ``count`` are used. A model reads each window from a zero state; a window of L tokens has
L - 1 predictions. Perplexity is exp of the mean loss of all predictions.

Because all windows hold the same number of predictions, the loss of two models is compared window by window: the paired
difference cancels how hard a window is, and its standard error is far below that of either perplexity.

Legend: W windows, L tokens.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def documents(file: str | Path) -> Iterator[str]:
    """The texts of a .txt (one document) or .jsonl (field ``text`` of every line) file, plain or .xz or .gz.

    Raises ValueError for another kind of file and for a line without a text.
    """
    path = Path(file)
    suffixes = path.suffixes[-2:]
    opener: Any = open
    if suffixes and suffixes[-1] in OPENERS:
        opener = OPENERS[suffixes.pop()]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt nor .jsonl (nor one of these as .xz or .gz)")
    with opener(path, "rt", encoding="utf-8", newline="") as handle:
        if kind == ".txt":
            yield handle.read()
            return
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}, line {number}: no field 'text' that holds a string")
            yield row["text"]


def windows(tokenizer: Any, file: str | Path, length: int = 512, count: int | None = 60) -> np.ndarray:
    """The first ``count`` windows of a file, or all whole windows where None: int64 [W, L].

    tokenizer: a Hugging Face tokenizer. Raises ValueError where the file holds fewer windows than asked for.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens predicts nothing: length must be 2 or more")
    if count is not None and count < 1:
        raise ValueError(f"count must be 1 or more, not {count}")
    ids: list[int] = []
    for number, text in enumerate(documents(file)):
        if number:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
        if count is not None and len(ids) >= count * length:
            break
    available = len(ids) // length
    if available < (count or 1):
        raise ValueError(f"{file} holds {available} windows of {length} tokens, {count or 'at least 1'} asked for")
    taken = count or available
    return np.asarray(ids[: taken * length], dtype=np.int64).reshape(taken, length)


def load_tokenizer(model_dir: str | Path) -> Any:
    """The tokenizer of a model directory, from its local files alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)


@dataclass(frozen=True)
class Ratio:
    """A perplexity ratio and its standard error, paired over windows."""

    ratio: float
    se: float

    def __str__(self) -> str:
        return f"{self.ratio:.4f} ± {self.se:.4f}"


def perplexity(nll_W: np.ndarray) -> float:
    """exp of the mean of the windows' mean losses."""
    return math.exp(float(np.mean(nll_W)))


def perplexity_ratio(nll_W: np.ndarray, baseline_W: np.ndarray) -> Ratio:
    """ppl(nll) / ppl(baseline) of two models on the same windows, with the standard error of the paired difference.

    Arguments: mean loss of each window, [W]. Raises ValueError where the windows are not the same in number.
    """
    if nll_W.shape != baseline_W.shape or nll_W.ndim != 1:
        raise ValueError(f"losses of other windows cannot be paired: shapes {nll_W.shape} and {baseline_W.shape}")
    difference_W = np.asarray(nll_W, dtype=np.float64) - baseline_W
    ratio = math.exp(difference_W.mean())
    if len(difference_W) < 2:
        return Ratio(ratio, math.nan)
    return Ratio(ratio, ratio * float(difference_W.std(ddof=1)) / math.sqrt(len(difference_W)))
