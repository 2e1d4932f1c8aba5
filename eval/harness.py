"""The model as lm-eval sees it: HFLM over a model in memory, with our progress and a record of what was cut.

Imported only where tasks run: lm-eval takes seconds to load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor


class Reader:
    """A model as something to read with, not to touch: HFLM ties the weights of any nn.Module it is given, which for
    a packed
    model means nothing and for a measurement is wrong. Everything else is the model's own."""

    def __init__(self, model: Any) -> None:
        self._read = model
        self.config = copy.deepcopy(model.config)
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config  # the model is loaded: how is no business of lm-eval
        self.device = next(model.parameters()).device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._read(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_read":
            raise AttributeError(name)
        return getattr(self._read, name)


class Scorer(HFLM):
    """HFLM(pretrained=Reader(model)) that keeps no cache, shows no bars of its own, and counts tokens.

    longest: tokens of the longest request so far; cut: requests that were longer than ``max_length``, so that the model
    read only their last tokens. advance is told
    the sequences read, expect their number.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        batch: int,
        advance: Callable[[int], None] | None = None,
        expect: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(
            pretrained=Reader(model),
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch,
            softmax_dtype=torch.float32,
        )
        self._advance, self._expect = advance, expect
        self.longest = self.cut = 0

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.inference_mode():
            logits = self.model(input_ids=inps, use_cache=False).logits
        if self._advance is not None:
            self._advance(len(inps))
        return logits

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        if self._expect is not None:
            self._expect(len(requests))
        self.longest = max(self.longest, *lengths)
        self.cut += sum(length > self.max_length + 1 for length in lengths)  # the last token is predicted, not read
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
