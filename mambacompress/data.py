"""Calibration and training text, offline first.

Three sources: files the user names (``read_texts``), the source of Python's own standard library, which lies on every
machine (``stdlib_texts``: the demo needs no network and no data file), and lists of strings from a program. A tokenizer
turns them into fixed windows (``token_windows``), one long row (``encode``) or an endless training stream
(``training_batches``).

The held-out split of the standard library goes by a hash of the module's dotted name, so that a module stays on its
side whatever the Python version; what a version adds or drops changes only that module.

Everything here is deterministic: the same texts, tokenizer and seed give the same tokens.

Legend: B batch, L tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mambacompress.errors import UserError, did_you_mean

Split = Literal["train", "valid", "test"]

DEMO = "demo"
SUFFIXES = (".txt", ".jsonl")
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# Left out of the standard library's text: tests, what distributions package apart or versions dropped, and files that
# are tables.
NOT_TEXT = frozenset((
    "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "turtle", "distutils", "ensurepip", "pydoc_data",
    "encodings", "msilib", "lib-dynload", "site-packages", "dist-packages", "__pycache__", "__phello__", "_pyrepl",
    "_ios_support", "_android_support",
))  # fmt: skip


def read_texts(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """The documents of text files, in order.

    paths: one file or several; .txt (one document) or .jsonl (an object a line, its field ``text`` is the document),
    plain or compressed as .xz or .gz. Blank documents are dropped.

    Raises UserError for a file that is missing, of another kind, damaged, not UTF-8, or without any text.
    """
    names = [paths] if isinstance(paths, str | Path) else list(paths)
    if not names:
        raise UserError("no text file was named", "give a .txt or .jsonl file (or its .xz or .gz)")
    texts: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        found = [text for text in _read_file(path) if text.strip()]
        if not found:
            raise UserError(f"{path} holds no text", "name a file that has some")
        texts += found
    return texts


def _read_file(path: Path) -> list[str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    if path.is_dir():
        raise UserError(f"{path} is a directory, not a text file", "name the files in it")
    if not path.exists():
        near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"there is no file {path}{near}", "check the path")
    if kind not in SUFFIXES:
        raise UserError(
            f"{path} is neither .txt nor .jsonl (nor their .xz or .gz)", "convert it, or rename it to what it is"
        )
    try:
        with OPENERS.get(packed, open)(path, "rt", encoding="utf-8") as stream:
            whole = stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}", "convert it to UTF-8") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged or not a {packed} file: {error}", "copy or download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from error
    return [whole] if kind == ".txt" else _documents(path, whole)


def _documents(path: Path, whole: str) -> list[str]:
    texts = []
    for number, line in enumerate(whole.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is not JSON: {error}", "repair the line: one JSON object a line"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            has = (
                f"its fields are {', '.join(map(repr, row)) or 'none'}" if isinstance(row, dict) else "it is no object"
            )
            raise UserError(f"line {number} of {path} has no string field 'text': {has}", "rename the field to 'text'")
        texts.append(row["text"])
    return texts


def calibration_texts(source: str | Path | Sequence[str | Path]) -> list[str]:
    """What ``calibration.text`` names: ``demo`` is the standard library's training split, all else are files."""
    return stdlib_texts("train") if source == DEMO else read_texts(source)


def split_of(module: str) -> Split:
    """The side of the split a dotted module name falls on: 86 % train, 6 % valid, 8 % test."""
    share = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 100
    return "train" if share < 86 else "valid" if share < 92 else "test"


def stdlib_modules(root: Path | None = None) -> dict[str, Path]:
    """Dotted name -> file of every module of the standard library that is prose-like source, sorted by name.

    root: the library's directory; the running interpreter's where None.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for folder, below, files in os.walk(root):
        below[:] = filter(_is_text, below)  # what is left out is not even looked into
        parents = Path(folder).relative_to(root).parts
        for file in files:
            name, extension = os.path.splitext(file)
            if extension == ".py" and _is_text(name):
                modules[".".join(part for part in (*parents, name) if part != "__init__")] = Path(folder, file)
    return dict(sorted(modules.items()))


def _is_text(part: str) -> bool:
    """Whether a part of a module's dotted name leaves it prose-like source."""
    return part not in NOT_TEXT and not part.startswith(("test_", "_sysconfigdata", "config-"))


def stdlib_texts(split: Split, root: Path | None = None) -> list[str]:
    """The source of Python's standard library, a document a module, sorted by module name.

    split: ``train``, ``valid`` or ``test`` (see ``split_of``). Raises UserError where this Python came without its
    source.
    """
    if split not in ("train", "valid", "test"):
        raise UserError(f"there is no split {split!r}", "name one of train, valid, test")
    texts = []
    for module, path in stdlib_modules(root).items():
        if split_of(module) != split:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a broken link, or one of the few files in another encoding
            continue
        if text.strip():
            texts.append(text)
    if sum(map(len, texts)) < 20_000:
        raise UserError(
            "this Python came without the source of its standard library", "name your own text with --text FILE"
        )
    return texts


def load_tokenizer(directory: str | Path) -> Any:
    """The transformers tokenizer of a model directory; raises UserError where there is none or it cannot be read."""
    directory = Path(directory)
    if not any((directory / mark).is_file() for mark in TOKENIZER_MARKS):
        raise UserError(f"{directory} holds no tokenizer", "copy the model's tokenizer.json into it")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the tokenizer in {directory} cannot be read: {reason[0] if reason else type(error).__name__}",
            "copy the tokenizer files again",
        ) from error


def encode(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """All texts as one row of token ids, int64 [n], with the end-of-text token between them where there is one."""
    row: list[int] = []
    for ids in _ids(tokenizer, list(texts)):
        row += _joined(tokenizer, row, ids)
    return torch.tensor(row, dtype=torch.long)


def token_windows(tokenizer: Any, texts: Iterable[str], sequences: int, length: int, seed: int = 0) -> Tensor:
    """Windows of tokens drawn from all over the texts, int64 [sequences, length], none overlapping another.

    Documents are cut into pieces of a few windows at line starts, the pieces shuffled by ``seed`` and tokenized until
    there are enough. Raises UserError where the texts hold fewer than sequences x length tokens, saying how many they
    hold.
    """
    if sequences < 1 or length < 1:
        raise UserError(f"{sequences} sequences of {length} tokens is no request", "ask for at least one of each")
    pieces = [piece for text in texts for piece in _pieces(text, size=16 * length)]
    random.Random(seed).shuffle(pieces)
    needed = sequences * length
    row: list[int] = []
    for start in range(0, len(pieces), 32):
        for ids in _ids(tokenizer, pieces[start : start + 32]):
            row += _joined(tokenizer, row, ids)
        if len(row) >= needed:
            return torch.tensor(row[:needed], dtype=torch.long).reshape(sequences, length)
    raise UserError(
        f"the text holds {len(row):,} tokens, {sequences} sequences of {length} need {needed:,}",
        f"give more text with --text, or ask for less: --set calibration.sequences={max(1, len(row) // length)}"
        if len(row) >= length
        else f"give more text with --text: one sequence alone needs {length} tokens",
    )


def training_batches(tokens: Tensor, batch: int, length: int, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
    """An endless stream of training batches, int64 [batch, length], from one row of tokens, int64 [n].

    Every epoch shifts the windows by a fresh offset and shuffles them; both depend only on ``seed`` and the epoch, so
    ``start`` (batches already seen) resumes exactly. Raises UserError where the row is shorter than a batch.
    """
    per_epoch = (len(tokens) - length) // (batch * length)
    if per_epoch < 1:
        raise UserError(
            f"the text holds {len(tokens):,} tokens, one batch of {batch} x {length} needs {(batch + 1) * length:,}",
            "give more text, or smaller batches",
        )
    epoch, skip = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(length, (), generator=generator))
        windows_NL = tokens[offset : offset + (len(tokens) - offset) // length * length].reshape(-1, length)
        order = torch.randperm(len(windows_NL), generator=generator)
        for i in range(skip, per_epoch):
            yield windows_NL[order[i * batch : (i + 1) * batch]]
        epoch, skip = epoch + 1, 0


def _pieces(text: str, size: int) -> list[str]:
    """``text`` cut at line starts into pieces of about ``size`` characters (a longer line is cut where it must be)."""
    pieces, start = [], 0
    while len(text) - start > size + size // 2:
        newline = text.find("\n", start + size, start + size + size // 2)
        end = start + size if newline < 0 else newline + 1
        pieces.append(text[start:end])
        start = end
    if text[start:].strip():
        pieces.append(text[start:])
    return pieces


def _ids(tokenizer: Any, texts: list[str]) -> Iterable[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _joined(tokenizer: Any, row: list[int], ids: list[int]) -> list[int]:
    """What to append to ``row`` for the next document."""
    separator = tokenizer.eos_token_id
    return [separator, *ids] if row and separator is not None else list(ids)
