"""The model as lm-eval sees it: HFLM over a model in memory, with our progress and a record of what was cut.

Imported only where tasks run: lm-eval takes seconds to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor


class Scorer(HFLM):
    """HFLM(pretrained=model) that keeps no cache, shows no bars of its own, and counts tokens.

    longest: tokens of the longest request so far; cut: requests that were longer than ``max_length``, so that the model
    read only their last tokens. advance is told the requests answered.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int, batch: int, advance: Callable[[int], None]
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch,
            softmax_dtype=torch.float32,
        )
        self._advance = advance
        self.longest = self.cut = 0

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.inference_mode():
            logits = self.model(input_ids=inps, use_cache=False).logits
        self._advance(len(inps))
        return logits

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        self.longest = max(self.longest, *lengths)
        self.cut += sum(length > self.max_length + 1 for length in lengths)  # the last token is predicted, not read
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
