"""A linear that trains sparse: its parameter stays dense, its forward sees it through an N:M mask.

    forward     W̃ = W ⊙ (m + (1 - m) β)
    backward    straight through: dL/dW = dL/dW̃, for pruned weights too, so that they can come back
    sr-ste      dL/dW + λ (1 - m) ⊙ W, once an optimizer step however many micro-batches it has
    frozen      dL/dW = m ⊙ dL/dW̃: what the mask drops is zero, and stays zero

β, λ and whether the mask is frozen are the session's, one object for all layers. The weight keeps its name and its
Parameter, so optimizers, wrappers and checkpoints see the model they know. Masks are bool; they belong to the session's
checkpoint, not to the model's.

Sharded by FSDP2 (``fully_shard``, dimension 0) a row is whole on one rank, and so is every group of M: the mask is
sharded like its weight, and gathered for the forward as the weight is.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from mambacompress.errors import UserError
from mambacompress.nm import Pattern, nm_mask


@dataclass
class Flow:
    """How weights and gradients pass the masks now: β, λ, whether the masks are frozen. dense: they are not applied."""

    beta: float = 0.0
    decay: float = 0.0
    frozen: bool = False
    dense: bool = False
    _betas: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def change(self, beta: float, frozen: bool) -> None:
        """From the next step on."""
        self.beta, self.frozen = beta, frozen
        for tensor in self._betas.values():
            tensor.fill_(beta)

    def beta_on(self, device: torch.device) -> Tensor | None:
        """β where the weights are, fp32, in the same memory every time (a captured step reads it); None for 0."""
        if self.beta == 0.0:
            return None
        return self._betas.setdefault(device, torch.tensor(self.beta, device=device))


class _Masked(torch.autograd.Function):
    """W̃ from W; see the module. decay: λ in this backward, 0 where it has been added already."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, mask_OI: Tensor, beta: Tensor | None, frozen: bool,
                take_decay: Callable[[], float]) -> Tensor:
        ctx.save_for_backward(weight_OI, mask_OI)
        ctx.frozen, ctx.take_decay = frozen, take_decay
        if beta is None:
            return weight_OI.masked_fill(~mask_OI, 0)
        return torch.where(mask_OI, weight_OI, weight_OI * beta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        weight_OI, mask_OI = ctx.saved_tensors
        grad_OI = grads[0]
        if ctx.frozen:
            return grad_OI.masked_fill(~mask_OI, 0), None, None, None, None
        decay = ctx.take_decay()
        if decay:
            grad_OI = grad_OI + decay * weight_OI.masked_fill(mask_OI, 0)
        return grad_OI, None, None, None, None


class SparseLinear(nn.Linear):
    """See the module. Made on an ``nn.Linear``'s own parameters."""

    def __init__(self, linear: nn.Linear, flow: Flow, pattern: Pattern) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.flow, self.decayed = flow, False
        self.mask = self.best_mask(pattern)
        self.train(linear.training)

    def best_mask(self, pattern: Pattern) -> Tensor:
        """The mask of the largest weights as they are now, placed like the weight."""
        return like(self.weight, nm_mask(local(self.weight).abs(), pattern))

    def placed_mask(self) -> Tensor:
        """The mask, placed like the weight, which may have been sharded since."""
        if isinstance(self.weight, DTensor) and not isinstance(self.mask, DTensor):
            self.mask = distribute_tensor(self.mask, self.weight.device_mesh, self.weight.placements,
                                          src_data_rank=None)  # all processes hold it: nothing is sent
        return self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)

    def effective(self) -> Tensor:
        """W̃ [O, I]."""
        flow = self.flow
        if flow.dense:
            return self.weight
        mask_OI = self.mask.full_tensor() if isinstance(self.mask, DTensor) else self.mask
        return _Masked.apply(self.weight, mask_OI, flow.beta_on(self.weight.device), flow.frozen, self._take_decay)

    def _take_decay(self) -> float:
        """λ, the first time in an optimizer step."""
        if self.decayed or not self.flow.decay:
            return 0.0
        self.decayed = True
        return self.flow.decay

    def drop(self, mask: Tensor | None = None) -> None:
        """Write the zeros into the weight itself."""
        with torch.no_grad():
            local(self.weight).masked_fill_(~local(self.placed_mask() if mask is None else mask), 0)

    def plain(self) -> nn.Linear:
        """An ``nn.Linear`` on the same parameters."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        result = super()._apply(fn, recurse)
        self.mask = self.mask.to(self.weight.device)
        return result


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: rows; the tensor itself where it is whole.

    Raises UserError where it is not cut along rows.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if any(isinstance(place, Shard) and place.dim != 0 for place in tensor.placements):
        raise UserError("a sparse weight is sharded across its columns, which cuts through groups of M",
                        "shard it along dimension 0, as fully_shard does by itself")
    return tensor.to_local().detach()


def like(weight: Tensor, part: Tensor) -> Tensor:
    """``part``, this process's rows, placed like ``weight``."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())


__all__ = ["Flow", "SparseLinear", "like", "local"]
