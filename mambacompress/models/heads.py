"""The head of a rotated model whose embedding and head share one weight.

Rotating the residual (x <- x R) moves the embedding to W R and asks of the head W diag(g) R, g the final norm's weight:
no longer the same matrix, unless all of g is equal. Untying would cost a second V x D matrix (30 % of a 130M model).
Instead the tie stays, and a small D x D matrix before the head makes up the difference:

    norm(h) diag(g) Wᵀ = norm(h R) (Rᵀ diag(g) R) (W R)ᵀ        T = Rᵀ diag(g) R

Exact for any orthogonal R; T is symmetric; the final norm's weight becomes ones.

Legend: B batch, L tokens, D d_model, V vocabulary. Row vectors: y = x T Wᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformedHead(nn.Module):
    """logits = (x T) Wᵀ with W [V, D] shared with the embedding and T [D, D] its own.

    transform: buffer [D, D], applied as ``x @ transform``. weight: parameter [V, D], the embedding's own after ``tie``.
    """

    def __init__(self, vocabulary: int, size: int, *, transform: Tensor | None = None,
                 weight: nn.Parameter | None = None) -> None:
        super().__init__()
        if transform is not None and transform.shape != (size, size):
            raise ValueError(f"the transform has shape {list(transform.shape)}, a head of {size} channels takes "
                             f"[{size}, {size}]")
        if weight is not None and weight.shape != (vocabulary, size):
            raise ValueError(f"the weight has shape {list(weight.shape)}, expected [{vocabulary}, {size}]")
        self.vocabulary, self.size = vocabulary, size
        self.weight = nn.Parameter(torch.empty(vocabulary, size), requires_grad=False) if weight is None else weight
        self.register_buffer("transform", torch.eye(size) if transform is None else transform)
        self.transform: Tensor

    def spec(self) -> dict[str, Any]:
        return {"type": "TransformedHead", "vocabulary": self.vocabulary, "size": self.size}

    def tie(self, embedding: nn.Module) -> None:
        """Share the embedding's weight; raises ValueError where its shape is another."""
        weight = embedding.weight
        if not isinstance(weight, nn.Parameter) or weight.shape != (self.vocabulary, self.size):
            raise ValueError(f"a head of [{self.vocabulary}, {self.size}] cannot share the weight of {embedding}")
        self.weight = weight

    def transformed(self, x_BLD: Tensor) -> Tensor:
        """What the shared weight multiplies: x T."""
        return x_BLD @ self.transform.to(x_BLD.dtype)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.linear(self.transformed(x_BLD), self.weight)


def build(spec: dict[str, Any]) -> nn.Module:
    """The module a ``spec()`` of this file describes, its tensors to be loaded."""
    if spec["type"] != "TransformedHead":
        raise ValueError(f"no head of type {spec['type']!r}")
    return TransformedHead(spec["vocabulary"], spec["size"])


__all__ = ["TransformedHead", "build"]
