"""The peer llama.cpp, through the C interface of llama-cpp-python: ``llama_decode`` and nothing around it.

The model is written as GGUF F16 (``gguf_mamba``) and quantized by ``llama_model_quantize`` with its defaults, as a user
would. Weights are repacked for this processor where llama.cpp does so by itself. Decode asks for every sequence's
logits and samples nothing: the tokens fed are fixed, so the peer is spared the argmax that ours does.

Built from source it uses this processor's instructions: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python.

Legend: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mambacompress.bench.gguf_mamba import convert
from mambacompress.bench.runner import Runner, clock

# llama_ftype of each type name that we compare with.
FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
EVERY_TENSOR = "f16"


def quantize(f16: str | Path, kind: str, out: str | Path, threads: int = 1) -> Path:
    """Quantize a GGUF file with llama.cpp's defaults to ``kind`` (a name of FILE_TYPES); RuntimeError on failure."""
    llama = library()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    parameters.nthread = threads
    status = llama.llama_model_quantize(str(f16).encode(), str(out).encode(), ctypes.byref(parameters))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {kind}")
    return Path(out)


def make_types(
    model_dir: str | Path, kinds: Sequence[str], folder: str | Path, *, vocabulary: bool = True
) -> dict[str, Path]:
    """GGUF files of every kind, F16 first (it is the source of the others and always made)."""
    unknown = [kind for kind in kinds if kind not in FILE_TYPES]
    if unknown:
        raise ValueError(f"unknown type {', '.join(unknown)}; known: {', '.join(FILE_TYPES)}")
    files = {EVERY_TENSOR: convert(model_dir, Path(folder) / "f16.gguf", vocabulary=vocabulary)}
    for kind in kinds:
        if kind != EVERY_TENSOR:
            files[kind] = quantize(files[EVERY_TENSOR], kind, Path(folder) / f"{kind}.gguf")
    return files


class Session:
    """A loaded GGUF model with one context; ``with Session(file) as session``. CPU only.

    threads: for prefill and decode alike. sequences: how many independent states decode side by side.
    """

    def __init__(self, file: str | Path, *, threads: int = 1, length: int = 512, sequences: int = 1) -> None:
        self._llama = library()
        model_parameters = self._llama.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), model_parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = max(length, 512) * sequences
        parameters.n_batch = parameters.n_ubatch = max(length, sequences)
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = self._llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            self._llama.llama_model_free(self._model)
            raise RuntimeError(f"llama.cpp cannot make a context for {file}")
        self._batch = self._llama.llama_batch_init(parameters.n_batch, 0, 1)
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._llama.llama_vocab_n_tokens(vocabulary)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the model."""
        return int(self._llama.llama_model_size(self._model))

    def clear(self) -> None:
        """Back to the zero state, for every sequence."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> None:
        """Feed tokens; ``wanted`` marks those whose logits are computed. Returns when they are."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        rows = zip(tokens, positions, sequences, wanted, strict=True)
        for i, (token, position, sequence, want) in enumerate(rows):
            batch.token[i], batch.pos[i] = int(token), int(position)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, int(sequence)
            batch.logits[i] = int(want)
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._llama.llama_synchronize(self._context)

    def logits(self, tokens_L: np.ndarray) -> np.ndarray:
        """float32 [L, V], from the zero state."""
        count = len(tokens_L)
        self.clear()
        self.decode(tokens_L.tolist(), range(count), [0] * count, [True] * count)
        return self.last_logits(count)

    def last_logits(self, count: int) -> np.ndarray:
        """float32 [count, V]: what the last call computed, in the order its tokens were fed."""
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count, self.vocab_size)).copy()


class LlamaCpp(Runner):
    """The contestant: a session for as many sequences as are decoded side by side."""

    def __init__(self, path: str, threads: int, prompt: int, batch: int) -> None:
        self._session = Session(path, threads=threads, length=prompt, sequences=batch)

    @property
    def vocabulary(self) -> int:
        return self._session.vocab_size

    def prompt_logits(self, ids_L: np.ndarray) -> np.ndarray:
        return self._session.logits(ids_L)

    def step_logits(self, ids_BL: np.ndarray) -> np.ndarray:
        self._session.clear()
        lanes = len(ids_BL)
        logits = []
        for position, ids_B in enumerate(ids_BL.T):
            self._session.decode(ids_B.tolist(), [position] * lanes, range(lanes), [True] * lanes)
            logits.append(self._session.last_logits(lanes))
        return np.stack(logits, 1)

    def prefill(self, ids_L: np.ndarray) -> float:
        tokens, count = ids_L.tolist(), len(ids_L)
        self._session.clear()
        return clock(lambda: self._session.decode(tokens, range(count), [0] * count, [False] * (count - 1) + [True]))

    def decode(self, ids_B: np.ndarray, steps: int) -> float:
        tokens, lanes = ids_B.tolist(), len(ids_B)
        wanted = [True] * lanes
        self._session.clear()
        self._session.decode(tokens, [0] * lanes, range(lanes), wanted)

        def loop() -> None:
            for position in range(1, steps + 1):
                self._session.decode(tokens, [position] * lanes, range(lanes), wanted)

        return clock(loop)

    def live_bytes(self) -> int:
        return self._session.weight_bytes

    def facts(self) -> dict[str, Any]:
        llama = library()
        return {"llama_cpp": llama.__version__, "system": llama.llama_print_system_info().decode().strip(" |")}


def prepare(model: str, variants: list[str], folder: str) -> dict[str, Path]:
    """GGUF files of the variants."""
    files = make_types(model, [variant.lower() for variant in variants], folder, vocabulary=False)
    return {variant: files[variant.lower()] for variant in variants}


def warm(path: str) -> None:
    """Load the library."""
    library()


def make(path: str, variant: str, threads: int, prompt: int, batch: int) -> LlamaCpp:
    """The loaded contestant."""
    return LlamaCpp(path, threads, prompt, batch)


def library() -> Any:
    """llama_cpp's C interface, initialised and quiet."""
    return _initialised()[0]


@functools.cache
def _initialised() -> tuple[Any, Any]:
    """The library and its log callback, which must live as long as the library may call it."""
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeError(
            "llama-cpp-python is not installed: CMAKE_ARGS=-DGGML_NATIVE=ON pip install 'mambacompress[bench]'"
        ) from error
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, silent


__all__ = [
    "EVERY_TENSOR",
    "FILE_TYPES",
    "LlamaCpp",
    "Session",
    "library",
    "make",
    "make_types",
    "prepare",
    "quantize",
    "warm",
]
