"""Loss and gradients of a training step as one replayed CUDA graph: a small model's step is launches and little else.

Forward and backward of a batch are captured once, from buffers that stay where they are: the batch goes in, the loss
and every parameter's gradient come out. Clipping, the optimizer and the method's own step follow outside, as ever.
What the step depends on beside tensors is the method's ``mode``; where that changes, or a batch's shapes do, it is
captured anew. A step that no graph can hold (one that waits for the GPU, say) stays single ops, and ``registry.note``
says why. For one process and one micro-batch: what is sent between processes is not captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import registry
from mambacompress.models.graph import Capture, Replay, cuda_capture, watched

Tensors = tuple[Tensor, ...]
OP = "training step"


def can_replay(device: torch.device) -> bool:
    """Whether ``device`` has graphs."""
    return device.type == "cuda"


class CapturedStep:
    """``step``, captured for batches of one shape. step: tensors of a batch -> loss, a scalar; leaves gradients."""

    def __init__(self, step: Callable[[Tensors], Tensor], model: torch.nn.Module, batch: Tensors,
                 capture: Capture) -> None:
        self._batch = tuple(tensor.clone() for tensor in batch)
        self._loss = torch.empty(0)

        def run() -> None:
            for parameter in model.parameters():
                parameter.grad = None  # so that its gradient is written, not added to
            self._loss = step(self._batch).detach()
            self._grads = [(p, p.grad) for p in model.parameters() if p.grad is not None]

        self._replay: Replay = capture(run)

    def __call__(self, batch: Tensors) -> Tensor:
        """The loss; gradients are where the optimizer looks for them, until the next call."""
        for buffer, tensor in zip(self._batch, batch, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._replay()
        for parameter, grad in self._grads:
            parameter.grad = grad
        return self._loss


class Captured:
    """Steps as replays wherever that can be.

    mode: what a step depends on beside tensors.
    """

    def __init__(self, step: Callable[[Tensors], Tensor], model: torch.nn.Module, mode: Callable[[], Any],
                 capture: Capture = cuda_capture) -> None:
        self._step, self._model, self._mode, self._capture = step, model, mode, capture
        self._key: Any = None
        self._captured: CapturedStep | None = None
        self._refused = False

    def __call__(self, batch: Tensors) -> Tensor | None:
        """The loss, or None where the step must be taken in single ops."""
        if self._refused:
            return None
        key = (self._mode(), *((tensor.shape, tensor.dtype) for tensor in batch))
        if self._captured is None or key != self._key:
            why = watched(self._model)
            try:
                self._captured = None if why else CapturedStep(self._step, self._model, batch, self._capture)
            except RuntimeError as failure:  # what torch raises for an operation that no graph can hold
                why = str(failure).splitlines()[0]
            if why:
                self._refused = True
                registry.note(OP, "single ops", why)
                return None
            self._key = key
            registry.note(OP, "CUDA graph", "one replay a step")
        assert self._captured is not None
        return self._captured(batch)


__all__ = ["Captured", "CapturedStep", "can_replay"]
