"""Where an unfinished run keeps what a resumed one needs: parts, records and the identity of the run they belong to.

A part is a safetensors file; with a record (JSON) beside it, it counts as done. Both are written atomically, so a run
killed at any moment leaves whole parts only, and takes up at the first one without a record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mambacompress import storage
from mambacompress.errors import UserError
from mambacompress.models.families.checkpoint import Checkpoint
from mambacompress.recipe import Recipe


class WorkDirectory:
    """``<out>.partial``: parts, records and the identity of the run they belong to."""

    def __init__(self, path: Path, checkpoint: Checkpoint, recipe: Recipe, tokens_SL: Tensor, resume: bool) -> None:
        self.path = path
        self.identity = {
            "source": source_hash(checkpoint),
            "recipe": json.loads(recipe.canonical_json()),
            "tokens": storage.sha256_json(tokens_SL.tolist()),
            "versions": versions(),
        }
        marker = path / "run.json"
        if marker.is_file():
            if not resume:
                raise UserError(f"an unfinished run lies in {path}", "add --resume to go on, or remove that directory")
            if json.loads(marker.read_text(encoding="utf-8")) != self.identity:
                raise UserError(
                    f"the unfinished run in {path} was started with another model, recipe, text or version",
                    "repeat its command, or remove that directory",
                )
            for leftover in path.glob(".*.tmp"):
                leftover.unlink()
        else:
            storage.make_directory(path)
            storage.write_json(marker, self.identity)

    def has(self, key: str) -> bool:
        return (self.path / f"{key}.json").is_file()

    def store(self, key: str, tensors: dict[str, Tensor], record: dict[str, Any] | None = None) -> None:
        """Write a part; one with a record counts as done once the record is there."""
        storage.write_tensors(self.path / f"{key}.safetensors", tensors)
        if record is not None:
            storage.write_json(self.path / f"{key}.json", record)

    def load(self, key: str) -> dict[str, Tensor] | None:
        file = self.path / f"{key}.safetensors"
        return load_file(file) if file.is_file() else None

    def forget(self, key: str) -> None:
        (self.path / f"{key}.safetensors").unlink(missing_ok=True)

    def records(self) -> dict[str, dict[str, Any]]:
        return {
            file.stem: json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(self.path.glob("*.json"))
            if file.stem != "run"
        }

    def parts(self) -> list[Path]:
        return [self.path / f"{key}.safetensors" for key in ("norm", *self.records())]

    def fresh(self, name: str) -> Path:
        """An empty directory of that name."""
        directory = self.path / name
        shutil.rmtree(directory, ignore_errors=True)
        storage.make_directory(directory)
        return directory


def source_hash(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 over names and bytes of every tensor and the configuration."""
    digest = hashlib.sha256(checkpoint.config.to_json_string(use_diff=False).encode())
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.get(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "safetensors")}
