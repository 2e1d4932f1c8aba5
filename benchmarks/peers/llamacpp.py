"""llama.cpp beside us: the same Mamba-1, the same token ids, the same windows.

    python -m benchmarks.peers.llamacpp MODEL_DIR --text FILE --windows 60 --types f16,q8_0,q4_0 --out results.json

The model is written as GGUF F16 (``gguf_mamba``) and quantized by ``llama_model_quantize`` with its defaults, as a user
would. Quality: the loss of each 512-token window from an empty memory, all types in step on the same window, so that KL
divergence and top-1 agreement with F16 come from the same pass. Size: the stored type and bytes of every tensor.
Speed: a prefill, decode of one sequence and of eight, best and median of several short bursts.

Needs llama-cpp-python (built from source it uses this CPU's instructions: CMAKE_ARGS=-DGGML_NATIVE=ON) and gguf.

Legend: W windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.peers.gguf_mamba import TensorRow, convert, tensor_rows
from benchmarks.windows import Ratio, load_tokenizer, perplexity, perplexity_ratio, windows

# llama_ftype of each type name that we compare with.
FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
EVERY_TENSOR = "f16"


def quantize(f16: str | Path, kind: str, out: str | Path, threads: int = 1) -> Path:
    """Quantize a GGUF file with llama.cpp's defaults to ``kind`` (a name of FILE_TYPES); RuntimeError on failure."""
    llama = _library()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    parameters.nthread = threads
    status = llama.llama_model_quantize(str(f16).encode(), str(out).encode(), ctypes.byref(parameters))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {kind}")
    return Path(out)


def make_types(model_dir: str | Path, kinds: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """GGUF files of every kind, F16 first (it is the source of the others and always made)."""
    unknown = [kind for kind in kinds if kind not in FILE_TYPES]
    if unknown:
        raise ValueError(f"unknown type {', '.join(unknown)}; known: {', '.join(FILE_TYPES)}")
    files = {EVERY_TENSOR: convert(model_dir, Path(folder) / "f16.gguf")}
    for kind in kinds:
        if kind != EVERY_TENSOR:
            files[kind] = quantize(files[EVERY_TENSOR], kind, Path(folder) / f"{kind}.gguf")
    return files


class Session:
    """A loaded GGUF model with one context; ``with Session(file) as session``. CPU only.

    threads: for prefill and decode alike. sequences: how many independent states decode side by side.
    """

    def __init__(self, file: str | Path, *, threads: int = 1, length: int = 512, sequences: int = 1) -> None:
        self._llama = _library()
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
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._llama.llama_vocab_n_tokens(vocabulary)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def clear(self) -> None:
        """Back to the zero state, for every sequence."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int],
               wanted: Sequence[bool]) -> None:
        """Feed tokens; ``wanted`` marks those whose logits are computed."""
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            rows = zip(tokens, positions, sequences, wanted, strict=True)
            for i, (token, position, sequence, want) in enumerate(rows):
                batch.token[i], batch.pos[i] = int(token), int(position)
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, int(sequence)
                batch.logits[i] = int(want)
            status = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def logits(self, tokens_L: np.ndarray) -> np.ndarray:
        """float32 [L, V], from the zero state."""
        count = len(tokens_L)
        self.clear()
        self.decode(tokens_L.tolist(), range(count), [0] * count, [True] * count)
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count, self.vocab_size)).copy()


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


@dataclass(frozen=True)
class Rates:
    """Tokens a second over several bursts."""

    best: float
    median: float


def measure_speed(file: Path, *, threads: int, prefill: int = 512, decode: int = 64, batch: int = 8,
                  bursts: int = 5) -> dict[str, Rates]:
    """Tokens a second: ``prefill`` (so many tokens at once), ``decode_1`` and ``decode_<batch>`` (so many steps).

    Each burst starts from a zero state (a recurrent model decodes at one speed wherever it is); tokens are random. The
    prefill computes the logits of its last token alone.
    """
    generator = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"prefill": [], "decode_1": [], f"decode_{batch}": []}
    with Session(file, threads=threads, length=prefill, sequences=batch) as session:
        tokens = generator.integers(1, session.vocab_size, size=(max(prefill, decode), batch))
        for burst in range(bursts + 1):
            timed = {
                "prefill": _timed(session, tokens[:prefill, :1].T, prefill),
                "decode_1": _timed(session, tokens[:decode, :1], decode),
                f"decode_{batch}": _timed(session, tokens[:decode], decode * batch),
            }
            if burst:  # the first warms up
                for name, seconds_a_token in timed.items():
                    rates[name].append(1 / seconds_a_token)
    return {name: Rates(max(values), statistics.median(values)) for name, values in rates.items()}


def _timed(session: Session, steps: np.ndarray, tokens: int) -> float:
    """Seconds a token. steps [1, n] is one prefill; [n, b] is n decode steps of b sequences."""
    session.clear()
    started = time.perf_counter()
    if steps.shape[0] == 1:
        count = steps.shape[1]
        session.decode(steps[0].tolist(), range(count), [0] * count, [False] * (count - 1) + [True])
    else:
        lanes = steps.shape[1]
        for position, row in enumerate(steps.tolist()):
            session.decode(row, [position] * lanes, range(lanes), [True] * lanes)
    return (time.perf_counter() - started) / tokens


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


def _library() -> Any:
    """llama_cpp's C interface, initialised and quiet."""
    return _initialised()[0]


@functools.cache
def _initialised() -> tuple[Any, Any]:
    """The library and its log callback, which must live as long as the library may call it."""
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeError("llama-cpp-python is not installed: CMAKE_ARGS=-DGGML_NATIVE=ON pip install "
                           "llama-cpp-python --no-binary llama-cpp-python") from error
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, silent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.llamacpp",
                                     description="llama.cpp on a Mamba-1: perplexity, bytes and speed of each type")
    parser.add_argument("model", help="a transformers Mamba-1 directory")
    parser.add_argument("--text", action="append", default=[], help="evaluation text (.txt, .jsonl, plain, .xz or .gz)")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--types", default="f16,q8_0,q4_0,q4_k_m", help=f"of {', '.join(FILE_TYPES)}")
    parser.add_argument("--threads", type=int, default=1, help="threads of the quality runs")
    parser.add_argument("--speed", default="", help="thread counts to time, for example 1,2")
    parser.add_argument("--gguf", help="folder to keep the GGUF files in (default: removed at the end)")
    parser.add_argument("--out", help="results as JSON")
    options = parser.parse_args(arguments)
    kinds = options.types.split(",")
    measured: dict[str, Any] = {"model": Path(options.model).name, "texts": {}, "speed": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.gguf or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = make_types(options.model, kinds, folder)
        for text in options.text:
            windows_WL = windows(load_tokenizer(options.model), text, options.length, options.windows)
            quality = measure_quality(files, windows_WL, threads=options.threads)
            measured["texts"][Path(text).name] = results(files, quality, windows_WL)
            print(f"{Path(text).name}\n{table(measured['texts'][Path(text).name])}\n", flush=True)
        for threads in [int(n) for n in options.speed.split(",") if n]:
            for kind, file in files.items():
                rates = measure_speed(file, threads=threads)
                measured["speed"].setdefault(str(threads), {})[kind] = {name: asdict(r) for name, r in rates.items()}
                shown = "  ".join(f"{name} {r.best:.0f} (median {r.median:.0f})" for name, r in rates.items())
                print(f"{threads} threads, {kind}: {shown} tokens/s", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
