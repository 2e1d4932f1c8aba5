"""What a contestant is: data that names it, and the object in the worker process that runs it.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[[str, str, int, int, int], "Runner"]


@dataclass(frozen=True)
class Contestant:
    """name: its row. kind: who runs it (a key of KINDS). path: what it loads. variant: its precision or file type.
    files: the bytes of its weight files. likeness: the least cosine of its logits with the float model's at which it
    still counts as the same model.
    """

    name: str
    kind: str
    path: str
    variant: str
    files: int
    likeness: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Kind:
    """A runtime: its module (``make(path, variant, threads, prompt, batch) -> Runner``, ``warm(path)`` and, of a peer,
    ``prepare(model, variants, folder) -> {variant: path}``), the packages it imports, and its variants with the
    ``likeness`` of each, the first one being what others are compared with.
    """

    module: str
    needs: tuple[str, ...]
    variants: dict[str, float]

    def prepare(self, model: str, folder: str) -> dict[str, str]:
        """Files of every variant made from a model directory; runs in a worker."""
        return {name: str(path) for name, path in self._load().prepare(model, list(self.variants), folder).items()}

    def make(self, path: str, variant: str, threads: int, prompt: int, batch: int) -> Runner:
        """The loaded contestant; runs in its worker."""
        make: Make = self._load().make
        return make(path, variant, threads, prompt, batch)

    def warm(self, path: str) -> None:
        """Import whatever running ``path`` needs."""
        self._load().warm(path)

    def _load(self) -> Any:
        return importlib.import_module(f"mambacompress.bench.{self.module}")


FP32, HALF, INT8, INT4 = 0.9999, 0.98, 0.9, 0.1  # random weights are hard to round: a trained model keeps far more
KINDS = {
    "ours": Kind("ours", ("torch",), {"fp32": FP32, "bf16": HALF, "packed": INT4, "packed-state8": INT4}),
    "llama.cpp": Kind("llamacpp", ("llama_cpp", "gguf"), {"Q8_0": INT8, "Q4_0": INT4, "F16": HALF}),
    "openvino": Kind("openvino_graph", ("openvino", "nncf"), {"int8": INT8, "int4": INT4}),
    "transformers": Kind("stock", ("transformers",), {"fp32": FP32, "bf16": HALF}),
}


class Runner(ABC):
    """A loaded model. Every timed call starts from a zero state and ends when its last logits are there."""

    prefills = True  # whether it can read a prompt in one call: ``prompt_logits`` and ``prefill`` are asked only then

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Token ids are below this."""

    def prompt_logits(self, ids_L: np.ndarray) -> np.ndarray:
        """fp32 [L, V], the prompt read in one call."""
        raise TypeError(f"{type(self).__name__} reads one token at a time")

    @abstractmethod
    def step_logits(self, ids_BL: np.ndarray) -> np.ndarray:
        """fp32 [B, L, V], all rows a token at a time."""

    def prefill(self, ids_L: np.ndarray) -> float:
        """Seconds to read a prompt and have its last token's logits."""
        raise TypeError(f"{type(self).__name__} reads one token at a time")

    @abstractmethod
    def decode(self, ids_B: np.ndarray, steps: int) -> float:
        """Seconds of ``steps`` single-token steps of B sequences, after a first token that is not timed."""

    def live_bytes(self) -> int | None:
        """Bytes of tensors that are alive, None where the runtime does not tell."""
        return None

    def facts(self) -> dict[str, Any]:
        """Versions and settings worth a line in the result."""
        return {}


def weight_bytes(path: str | Path) -> int:
    """Bytes of a directory's safetensors files, or of a file and what lies beside it under the same stem."""
    place = Path(path)
    files = place.glob("*.safetensors") if place.is_dir() else place.parent.glob(f"{place.stem}.*")
    return sum(file.stat().st_size for file in files)


def clock(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


__all__ = ["KINDS", "Contestant", "Kind", "Runner", "clock", "weight_bytes"]
