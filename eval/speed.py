"""Tokens a second and peak memory.

Prefill: one forward of ``prompt`` tokens from a zero state, logits of the last token only. Decode: single-token steps
at batch 1 from the state a prompt left. Each is repeated and the median reported with the quartiles, after a warm-up:
the first call packs and compiles.

Peak memory is the process's anonymous memory (RssAnon: what cannot be dropped and read again), sampled from the start
of loading. It means something only in a process that did nothing else, so ``FreshProcess`` loads the model in one; it
imports its libraries while the caller does other work, then waits to be told. Where the caller has only a model in
memory the speed is measured here and the memory is said to be not measured.

Legend: B batch, L tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacompress.bench.memory import PeakMemory
from mambacompress.bench.process import child_environment
from mambacompress.bench.summary import Spread
from mambacompress.errors import UserError
from mambacompress.eval.environment import backend
from mambacompress.eval.schema import Speed
from mambacompress.kernels.registry import recording

_CHILD = """
import gc, json, sys
gc.set_threshold(100_000)  # as ``cli.main``
from mambacompress.eval import speed
wanted = json.loads(sys.argv[1])
speed.prepare(wanted)
if sys.stdin.readline():
    print("\\n" + json.dumps(speed.child(wanted)))
"""


@torch.inference_mode()
def measure(model: Any, *, prompt: int = 512, steps: int = 32, repeats: int = 5, seed: int = 0) -> Speed:
    """Speed of a transformers-style causal LM in this process, on random token ids; memory is not measured."""
    if prompt < 1 or steps < 1 or repeats < 1:
        raise UserError("a speed test needs at least one token, step and repeat", "choose positive numbers")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(model.config.vocab_size, (1, prompt), generator=generator).to(device)
    prefill, step, loop = _loop(model, ids_BL)
    note = "peak memory not measured: the model shares its process"
    slow: float | None = None
    slow_quartiles: tuple[float, float] | None = None
    with recording() as choices:
        fast, fast_quartiles = _summary(_rates(prefill, prompt, repeats, device))
        if step is None:
            note += "; decode not measured: the model keeps no state between calls"
        else:
            slow, slow_quartiles = _summary(_rates(lambda: _repeat(step, steps), steps, repeats, device))
    threads = torch.get_num_threads()
    return Speed(
        prompt=prompt,
        prefill=fast,
        prefill_quartiles=fast_quartiles,
        decode=slow,
        decode_quartiles=slow_quartiles,
        repeats=repeats,
        threads=threads,
        peak_bytes=None,
        start_bytes=None,
        note=note,
        loop=loop,
        backend=backend(choices),
    )


class FreshProcess:
    """A new process that imports what loading ``path`` needs, waits, and measures speed and peak memory when it is
    told to, with as many threads as here. ``with`` ends it, measured or not.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self._path = path
        wanted = {"path": str(path), "threads": torch.get_num_threads(), "options": options}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(torch.get_num_threads()),
        )

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def measure(self) -> Speed:
        """Raises UserError where the process fails, with its last line."""
        out, err = self._process.communicate("go\n")
        code = self._process.returncode
        lines = [line for line in (out if code == 0 else err).splitlines() if line.strip()]
        if code != 0 or not lines:
            raise UserError(
                f"the speed test of {self._path} failed: {lines[-1] if lines else f'exit code {code}'}",
                "see whether `mambacompress generate` runs this model",
            )
        return Speed.model_validate_json(lines[-1])


def in_fresh_process(path: str | Path, **options: Any) -> Speed:
    """Load ``path`` in a new process and measure there. Raises UserError where the process fails."""
    with FreshProcess(path, **options) as process:
        return process.measure()


def prepare(wanted: dict[str, Any]) -> None:
    """What the fresh process does before it waits: import what loading needs, by building the model without weights.

    What cannot be read is left for ``child`` to complain of.
    """
    from mambacompress.models.families.checkpoint import empty_host, read_config

    with contextlib.suppress(UserError):
        empty_host(read_config(Path(wanted["path"])), prove=False)


def child(wanted: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process runs: load under the memory sampler, measure, report."""
    import mambacompress

    torch.set_num_threads(wanted["threads"])
    load = mambacompress.load  # imports what loading needs, so that it counts as there before
    with PeakMemory() as memory:
        model = load(wanted["path"])
        result = measure(model, **wanted["options"])
    notes = result.note.split("; ")[1:]
    if memory.peak is None:
        notes.insert(0, "peak memory not measured: this system does not report anonymous memory")
    return {**result.model_dump(), "peak_bytes": memory.peak, "start_bytes": memory.start, "note": "; ".join(notes)}


def _loop(model: Any, ids_BL: Tensor) -> tuple[Callable[[], None], Callable[[], None] | None, str]:
    """(prefill, one decoding step or None, whose loop it is): ours for an adopted model, else transformers' forward."""
    from mambacompress.models.lm import LanguageModel

    try:
        lm = LanguageModel.of(model)
    except UserError:
        return _transformers_loop(model, ids_BL)
    state = [lm.prefill(ids_BL, last_only=True)[1]]

    def prefill() -> None:
        lm.prefill(ids_BL, last_only=True)

    def step() -> None:
        state[0] = lm.step(ids_BL[:, -1], state[0])[1]

    return prefill, step, "mambacompress"


def _transformers_loop(model: Any, ids_BL: Tensor) -> tuple[Callable[[], None], Callable[[], None] | None, str]:
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def prefill() -> None:
        model(input_ids=ids_BL, use_cache=False, **last)

    out = model(input_ids=ids_BL, use_cache=True)
    name = next((name for name in ("cache_params", "past_key_values") if getattr(out, name, None) is not None), None)
    if name is None:
        return prefill, None, "transformers"
    known: dict[str, Any] = {name: getattr(out, name)}

    def step() -> None:
        model(input_ids=ids_BL[:, -1:], use_cache=True, **known)

    return prefill, step, "transformers"


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _rates(run: Callable[[], None], tokens: int, repeats: int, device: torch.device) -> list[float]:
    run()
    rates = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        rates.append(tokens / (time.perf_counter() - start))
    return rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(rates: list[float]) -> tuple[float, tuple[float, float]]:
    spread = Spread.of(rates)
    if spread is None:
        raise ValueError("there are no rates to summarise")
    return spread.median, (spread.low, spread.high)
