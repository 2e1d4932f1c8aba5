"""The windows a text is scored on.

One row of token ids is cut into windows of ``context`` tokens, ``stride`` apart; every window starts from a zero
state and scores only what no earlier window scored. stride = context (the default) gives disjoint windows, each
scoring context - 1 tokens: quick, and the convention of most compression papers. A smaller stride gives every token
at least context - stride tokens of history: slower and closer to the model's own perplexity. No begin-of-text token
is added.

Legend: B batch, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambacompress import data
from mambacompress.errors import UserError
from mambacompress.kernels import native

LOGIT_BYTES = 192 << 20  # of one batch of fp32 logits; memory stays bounded whatever the vocabulary
CACHED_TOKENS = 1024  # of one batch where native kernels read it: what they pass on then stays in the cache


@dataclass(frozen=True)
class Windows:
    """Windows over one row of tokens.

    tokens_L: int64 [n]. spans: (start, end, first): the window is tokens[start:end] and scores tokens[first:end].
    """

    tokens_L: Tensor
    context: int
    stride: int
    spans: tuple[tuple[int, int, int], ...]

    @property
    def counts(self) -> list[int]:
        """Scored tokens of every window."""
        return [end - first for _, end, first in self.spans]

    @property
    def fingerprint(self) -> str:
        """Two results with the same fingerprint were measured on the same tokens in the same windows."""
        digest = hashlib.sha256(f"{self.context} {self.stride} {self.spans}".encode())
        digest.update(self.tokens_L[: self.spans[-1][1]].numpy().tobytes())
        return digest.hexdigest()[:16]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """(input_ids int64 [B, L], scored bool [B, L - 1], window indices) of up to ``size`` equally long windows."""
        groups: list[list[int]] = []
        for index, (start, end, _) in enumerate(self.spans):
            last = self.spans[groups[-1][0]] if groups else None
            if last is not None and last[1] - last[0] == end - start and len(groups[-1]) < size:
                groups[-1].append(index)
            else:
                groups.append([index])
        for group in groups:
            rows = [self.tokens_L[start:end] for start, end, _ in (self.spans[i] for i in group)]
            scored = torch.zeros(len(group), len(rows[0]) - 1, dtype=torch.bool)
            for row, index in enumerate(group):
                start, _, first = self.spans[index]
                scored[row, first - start - 1 :] = True
            yield torch.stack(rows), scored, group

    def batch_size(self, vocabulary: int, device: torch.device | None = None) -> int:
        """As many windows as keep one batch of fp32 logits within bounds, on the CPU where no device is named.

        Native kernels want a batch that fits the cache, torch's loops over tokens as many rows as there are.
        """
        cached = native.library() is not None and (device is None or device.type == "cpu")
        most = max(1, CACHED_TOKENS // self.context) if cached else 16
        return max(1, min(most, LOGIT_BYTES // (4 * self.context * vocabulary)))


def make_windows(
    tokens_L: Tensor, context: int = 512, stride: int | None = None, limit: int | None = None
) -> Windows:
    """Cut int64 tokens [n] into windows; ``limit`` keeps the first so many.

    Raises UserError for a text of fewer than two tokens, or a context or stride that makes no sense.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise UserError(f"a context of {context} tokens predicts nothing", "choose a context of at least 2")
    if not 1 <= stride <= context:
        raise UserError(
            f"a stride of {stride} with a context of {context} leaves tokens out",
            "choose a stride between 1 and the context",
        )
    if limit is not None and limit < 1:
        raise UserError(f"{limit} windows is no request", "ask for at least one")
    if tokens_L.dim() != 1 or tokens_L.dtype != torch.int64:
        raise UserError(
            f"token ids are {tokens_L.dtype} of shape {list(tokens_L.shape)}", "give one row of int64 ids"
        )
    total = len(tokens_L)
    if total < 2:
        raise UserError(
            "the evaluation text is empty" if total == 0 else "the evaluation text is a single token",
            "give a text of at least a few hundred words with --text",
        )
    spans: list[tuple[int, int, int]] = []
    start = scored = 0
    while limit is None or len(spans) < limit:
        end = min(start + context, total)
        first = max(scored, start + 1)
        if first >= end:  # a last window of one token, which nothing predicts
            break
        spans.append((start, end, first))
        scored = end
        if end == total:
            break
        start += stride
    return Windows(tokens_L, context, stride, tuple(spans))


def tokens_of(tokenizer: Any, text: str | Sequence[str] | Tensor, name: str = "text") -> Tensor:
    """Token ids int64 [n] of a text, of documents, or of ids already made; raises UserError where there are none."""
    if isinstance(text, Tensor):
        return text.to(torch.int64).reshape(-1)
    documents = [text] if isinstance(text, str) else list(text)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"the evaluation text {name!r} is empty", "give a text file that holds text with --text")
    return data.encode(tokenizer, documents)
