"""Files that are either whole or not there: atomic writes, deterministic tensors, hashes.

A file is written beside its final name, flushed to the disk, then renamed over it; a crash leaves the old file or none.
Tensor files are safetensors with names in sorted order and no timestamps: the same tensors give the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambacompress.errors import UserError

_BLOCK = 1 << 22


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush and rename it there, on failure leave nothing.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain(error, path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def explain(error: OSError, path: Path) -> UserError:
    """The user's words for what the operating system said about ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full: {path} could not be written", "free some space and run the same command with --resume"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{path.parent} cannot be written", "choose another --out")
    return UserError(
        f"{path} could not be written: {error.strerror or error}", "check the disk, then run again with --resume"
    )


def write_text(path: Path, text: str) -> None:
    """Atomically write UTF-8 text."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Atomically write canonical JSON (sorted keys, final newline; NaN is refused)."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Atomically write tensors as safetensors, names sorted, each contiguous."""
    from safetensors.torch import save_file

    with writing(path) as temporary:
        try:
            save_file(
                {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)},
                temporary,
                metadata={"format": "pt"},
            )
        except Exception as error:  # safetensors wraps OSError in its own type
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file. dtype: safetensors' name of it; start: its first byte; size: bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read_into(self, target: memoryview) -> None:
        """Read its bytes into memory of that size, without mapping the file. Raises OSError where the file ends."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.size:
                got = file.readinto(target[done:])
                if not got:
                    raise OSError(f"it ends {self.size - done} bytes early")
                done += got


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises SafetensorError or OSError where it is damaged."""
    from safetensors import safe_open

    with safe_open(file, framework="np"):  # checks the header against itself and the file's size
        pass
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0],
                               entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items()}


def copy_file(source: Path, target: Path) -> None:
    """Atomically copy one file's bytes."""
    with writing(target) as temporary, open(source, "rb") as reader, open(temporary, "wb") as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents; raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise explain(error, path / "file") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
