"""This package's contestants: a float model on our mixers, or an artifact, through ``mc.load`` and ``generate``.

Prefill is ``mc.generate`` of one token after the prompt. Decode is the loop behind ``mc.generate`` with its greedy
choice and its checks, the clock started when the first token is there; it is told not to end at an end-of-text token.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch

import mambacompress as mc
from mambacompress.bench.runner import Runner, clock
from mambacompress.bench.torch_side import live_tensor_bytes, small_relative
from mambacompress.eval import environment
from mambacompress.models.lm import LanguageModel, generate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "packed": torch.float32}


class Ours(Runner):
    """See the module."""

    def __init__(self, path: str, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = mc.load(path, dtype=_DTYPES[variant])
        self._lm = LanguageModel.of(self._model)

    @property
    def vocabulary(self) -> int:
        return self._lm.vocabulary

    @torch.inference_mode()
    def prompt_logits(self, ids_L: np.ndarray) -> np.ndarray:
        logits_1LV, _ = self._lm.prefill(torch.from_numpy(ids_L)[None])
        return logits_1LV[0].float().numpy()

    @torch.inference_mode()
    def step_logits(self, ids_BL: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(ids_BL)
        states, logits = None, []
        for i in range(ids.shape[1]):
            logits_B1V, states = self._lm.prefill(ids[:, i : i + 1], None, states)
            logits.append(logits_B1V[:, 0].float())
        return torch.stack(logits, 1).numpy()

    def prefill(self, ids_L: np.ndarray) -> float:
        ids_1L = torch.from_numpy(ids_L)[None]
        return clock(lambda: mc.generate(self._model, ids_1L, 1))

    def decode(self, ids_B: np.ndarray, steps: int) -> float:
        times: list[float] = []
        ids_B1 = torch.from_numpy(ids_B)[:, None]
        generate(self._model, ids_B1, steps + 1, eos_token_id=[], on_token=lambda _: times.append(time.perf_counter()))
        return times[-1] - times[0]

    def live_bytes(self) -> int:
        return live_tensor_bytes()

    def facts(self) -> dict[str, Any]:
        return {"hardware": environment.hardware(), "kernels": environment.backend(), **environment.versions()}


def warm(path: str) -> None:
    """Import what loading and running a model of this architecture needs."""
    with tempfile.TemporaryDirectory() as folder:
        small_relative(path).save_pretrained(folder)
        mc.generate(mc.load(folder), torch.ones(1, 4, dtype=torch.int64), 2)


def make(path: str, variant: str, threads: int, prompt: int, batch: int) -> Ours:
    """The loaded contestant."""
    return Ours(path, variant, threads)


__all__ = ["Ours", "make", "warm"]
