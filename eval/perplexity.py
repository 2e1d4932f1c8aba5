"""Perplexity: the loss of every window, so that two models can be compared window by window.

Losses are computed in fp32 from the model's logits, summed in fp64, one window at a time: no tensor larger than one
batch of logits is ever held. See ``windows`` for what is scored and ``stats`` for the standard errors.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.eval.windows import Windows
from mambacompress.kernels import divergence

Advance = Callable[[int], None]


def reader(model: Any) -> Callable[[Tensor], Tensor]:
    """ids int64 [B, L] -> logits [B, L, V] from a zero state: by our own loop where the model runs on our mixers (the
    same numbers as its forward, with less around them), else by a transformers-style forward.
    """
    from mambacompress.models.lm import LanguageModel

    device = next(model.parameters()).device
    try:
        lm = LanguageModel.of(model)
    except UserError:
        return lambda ids_BL: model(input_ids=ids_BL.to(device), use_cache=False).logits
    return lambda ids_BL: lm.prefill(ids_BL.to(device))[0]


def vocabulary_of(model: Any) -> int:
    """Size of the vocabulary; raises UserError where the model states none."""
    size = getattr(model.config, "vocab_size", None)
    if not size:
        raise UserError(f"{type(model).__name__} states no vocab_size", "evaluate a causal language model")
    return int(size)


def check_vocabulary(windows: Windows, vocabulary: int) -> None:
    """Raises UserError where the text's token ids do not fit the model."""
    largest = int(windows.tokens_L.max())
    if largest >= vocabulary:
        raise UserError(
            f"the text holds token id {largest}, the model's vocabulary ends at {vocabulary - 1}",
            "use the tokenizer the model was trained with",
        )


def token_losses(logits_BLV: Tensor, input_ids_BL: Tensor) -> Tensor:
    """Loss in nats of every predicted token, fp64 [B, L - 1], one sequence at a time."""
    rows = [
        divergence.token_losses(logits_LV[:-1], ids_L[1:].to(logits_LV.device))
        for logits_LV, ids_L in zip(logits_BLV, input_ids_BL, strict=True)
    ]
    return torch.stack(rows)


@torch.inference_mode()
def window_losses(
    model: Any, windows: Windows, *, batch: int | None = None, advance: Advance | None = None
) -> list[float]:
    """Sum of the losses, in nats, of the tokens every window scores.

    batch: windows a forward call; chosen from the vocabulary where None. advance is told the windows done.
    Raises UserError where a loss is not finite: such a model has no perplexity.
    """
    vocabulary = vocabulary_of(model)
    check_vocabulary(windows, vocabulary)
    losses: list[float] = []
    read = reader(model)
    size = batch or windows.batch_size(vocabulary, next(model.parameters()).device)
    for ids_BL, scored, _ in windows.batches(size):
        losses += summed(token_losses(read(ids_BL), ids_BL), scored)
        if advance is not None:
            advance(len(ids_BL))
    return losses


def summed(losses: Tensor, scored: Tensor) -> list[float]:
    """fp64 sum of the scored losses of every window; raises UserError for NaN or Inf."""
    chosen = losses.masked_fill(~scored.to(losses.device), 0.0)
    totals = chosen.sum(dim=1)
    if not torch.isfinite(totals).all():
        raise UserError(
            "the model's loss on the evaluation text is NaN or infinite",
            "check the weights with `mambacompress verify`, or use a gentler recipe",
        )
    return totals.tolist()
