"""This package's contestants: a float model on our mixers, or an artifact, through ``mc.load`` and ``generate``.

Prefill is ``mc.generate`` of one token after the prompt. Decode is the loop behind ``mc.generate`` with its greedy
choice and its checks, the clock started when the first token is there; it is told not to end at an end-of-text token.
The variant ``packed-state8`` is an artifact that keeps its recurrent states in int8 while it decodes.

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
from mambacompress.models.lm import Decoder, LanguageModel, generate


class Ours(Runner):
    """See the module."""

    def __init__(self, path: str, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = mc.load(path, dtype=torch.bfloat16 if variant == "bf16" else torch.float32)
        self._state = "int8" if variant == "packed-state8" else "fp32"
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
        logits_B1V, states = self._lm.prefill(ids[:, :1])
        decoder, logits = Decoder(self._lm, states, self._state), [logits_B1V[:, 0]]
        logits += [decoder.step(ids[:, i]) for i in range(1, ids.shape[1])]
        return torch.stack(logits, 1).float().numpy()

    def prefill(self, ids_L: np.ndarray) -> float:
        ids_1L = torch.from_numpy(ids_L)[None]
        return clock(lambda: mc.generate(self._model, ids_1L, 1, state=self._state))

    def decode(self, ids_B: np.ndarray, steps: int) -> float:
        times: list[float] = []
        ids_B1 = torch.from_numpy(ids_B)[:, None]
        generate(self._model, ids_B1, steps + 1, eos_token_id=[], state=self._state,
                 on_token=lambda _: times.append(time.perf_counter()))
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
