"""The peer transformers: the stock model's own forward with its cache, in a greedy loop without ``generate``'s cost.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mambacompress.bench.runner import Runner, clock
from mambacompress.bench.torch_side import live_tensor_bytes, small_relative

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stock(Runner):
    """See the module."""

    def __init__(self, path: str, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=_DTYPES[variant]).eval()
        takes = inspect.signature(self._model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache = "cache_params" if "cache_params" in takes else "past_key_values"

    @property
    def vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    @torch.inference_mode()
    def prompt_logits(self, ids_L: np.ndarray) -> np.ndarray:
        return self._model(input_ids=torch.from_numpy(ids_L)[None], use_cache=True).logits[0].float().numpy()

    @torch.inference_mode()
    def step_logits(self, ids_BL: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(ids_BL)
        cache, logits = None, []
        for i in range(ids.shape[1]):
            logits_BV, cache = self._forward(ids[:, i : i + 1], cache)
            logits.append(logits_BV.float())
        return torch.stack(logits, 1).numpy()

    @torch.inference_mode()
    def prefill(self, ids_L: np.ndarray) -> float:
        ids_1L = torch.from_numpy(ids_L)[None]
        return clock(lambda: self._forward(ids_1L, None)[0].argmax(-1))

    @torch.inference_mode()
    def decode(self, ids_B: np.ndarray, steps: int) -> float:
        first_BV, cache = self._forward(torch.from_numpy(ids_B)[:, None], None)
        state = [first_BV.argmax(-1), cache]

        def loop() -> None:
            for _ in range(steps):
                logits_BV, state[1] = self._forward(state[0][:, None], state[1])
                state[0] = logits_BV.argmax(-1)

        return clock(loop)

    def _forward(self, ids_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(the last token's logits, the cache)."""
        known = {} if cache is None else {self._cache: cache}
        out = self._model(input_ids=ids_BL, use_cache=True, **known, **self._last)
        return out.logits[:, -1], getattr(out, self._cache)

    def live_bytes(self) -> int:
        return live_tensor_bytes()

    def facts(self) -> dict[str, Any]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}


def prepare(model: str, variants: list[str], folder: str) -> dict[str, str]:
    """Every variant reads the original directory."""
    return dict.fromkeys(variants, model)


def warm(path: str) -> None:
    """Import what loading and running a model of this architecture needs."""
    with torch.inference_mode():
        small_relative(path)(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=True)


def make(path: str, variant: str, threads: int, prompt: int, batch: int) -> Stock:
    """The loaded contestant."""
    return Stock(path, variant, threads)


__all__ = ["Stock", "make", "prepare", "warm"]
