"""What a packed head has beside its weight, dense or sparse: how activations meet it, a transform before it, a bias,
and a weight that is the embedding's own where the two are tied.

Legend: V vocabulary, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambacompress.models.packed_weight import ActivationFormat, Stored, static_scale

if TYPE_CHECKING:
    from typing_extensions import Self


class HeadParts(Stored):
    """logits = (x T) Wᵀ + b; T [D, D]: an optional float matrix. To be mixed into a class that holds W [V, D]."""

    activations: ActivationFormat
    act_scale: Tensor | None
    transform: Tensor | None
    bias: Tensor | None

    def _register_parts(self, activations: ActivationFormat, transform: str | None, bias: bool) -> None:
        self.activations = activations
        self.register_buffer("act_scale", torch.ones(()) if activations.mode == "tensor" else None)
        dtype = None if transform is None else getattr(torch, transform)
        self.register_buffer("transform", None if dtype is None else torch.eye(self.columns, dtype=dtype))
        self.register_buffer("bias", torch.zeros(self.rows) if bias else None)

    @classmethod
    def sharing(cls, embedding: nn.Module, *, activations: ActivationFormat, act_scale: Tensor | float | None = None,
                transform: Tensor | None = None, bias: Tensor | None = None) -> Self:
        """A tied head on the embedding's tensors."""
        with torch.device("meta"):
            head = cls._like(embedding, activations)
        head.tie(embedding)
        return head._calibrated(act_scale, transform, bias)

    @classmethod
    def _like(cls, embedding: Any, activations: ActivationFormat) -> Self:
        """An empty head of the embedding's format."""
        raise NotImplementedError

    def _calibrated(self, act_scale: Tensor | float | None, transform: Tensor | None, bias: Tensor | None) -> Self:
        if transform is not None and transform.shape != (self.columns, self.columns):
            raise ValueError(f"the transform has shape {list(transform.shape)}, a head of {self.columns} channels "
                             f"takes [{self.columns}, {self.columns}]")
        self.act_scale, self.transform = static_scale(self.activations, act_scale), transform
        self.bias = None if bias is None else bias.detach().float().clone()
        if self.act_scale is not None:
            self.act_scale = self.act_scale.to(self.device)
        return self

    def tie(self, embedding: nn.Module) -> None:
        """Share the embedding's codes and scales; raises ValueError where they have another format."""
        if not isinstance(embedding, Stored) or embedding.format() != self.format():
            raise ValueError("a tied packed head needs a packed embedding of the same format and shape")
        self.share(embedding)

    def _spec_of_parts(self) -> dict[str, Any]:
        return {"activations": self.activations.to_dict(), "bias": self.bias is not None,
                "transform": None if self.transform is None else str(self.transform.dtype).removeprefix("torch.")}

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = x @ self.transform.to(x.dtype)
        return self._multiply(x, self.bias, self.activations, self.act_scale)


__all__ = ["HeadParts"]
