"""Decoding on a GPU as one replayed CUDA graph: a token costs one launch instead of some ten a block.

A step is captured once, from buffers that stay where they are: the token ids go in, the logits come out, and the states
are overwritten by the step itself. It computes what the step computes; modules that look at what passes through them
(hooks, taps) would be silent in a replay, so a model with any is not captured, and neither is a step that cannot be
(one that waits for the GPU, say): the single ops run then, and ``registry.note`` says why.

Legend: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mambacompress.kernels import registry
from mambacompress.kernels.int8_state import Int8State
from mambacompress.models.mixers import Mixer, MixerState

Step = Callable[[Tensor, list[MixerState]], tuple[Tensor, list[MixerState]]]
Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]
WARM_UP = 3  # steps before the capture: kernels are compiled and tuned in them
OP = "decode"


class GraphedStep:
    """One step, captured. ``states`` are its own copies, and those behind the last token."""

    def __init__(self, step: Step, ids_B: Tensor, states: Sequence[MixerState], capture: Capture) -> None:
        self.states = [MixerState(state.conv.clone(), _copy(state.ssm)) for state in states]
        self._ids_B = ids_B.clone()
        self._logits_BV = torch.empty(0)

        def run() -> None:
            self._logits_BV, new = step(self._ids_B, self.states)
            for old, state in zip(self.states, new, strict=True):
                for buffer, tensor in zip(_tensors(old), _tensors(state), strict=True):
                    buffer.copy_(tensor)

        begin = [tensor.clone() for state in self.states for tensor in _tensors(state)]
        self._replay = capture(run)
        for buffer, tensor in zip((t for state in self.states for t in _tensors(state)), begin, strict=True):
            buffer.copy_(tensor)  # the steps of warming up moved on

    def __call__(self, ids_B: Tensor) -> Tensor:
        """One token a row: ids int64 [B] -> logits [B, V], a copy."""
        self._ids_B.copy_(ids_B)
        self._replay()
        return self._logits_BV.clone()


def graphed(step: Step, model: nn.Module, ids_B: Tensor, states: Sequence[MixerState]) -> GraphedStep | None:
    """``step`` as a CUDA graph, or None (noted, with why) where it stays single ops."""
    if ids_B.device.type != "cuda":
        return None
    why = watched(model)
    if not why:
        try:
            made = GraphedStep(step, ids_B, states, cuda_capture)
        except RuntimeError as failure:  # what torch raises for an operation that no graph can hold
            why = str(failure).splitlines()[0]
        else:
            registry.note(OP, "CUDA graph", "one replay a token")
            return made
    registry.note(OP, "single ops", why)
    return None


def watched(model: nn.Module) -> str:
    """What in a model would be silent in a replay; '' where nothing is."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "hooks on its modules"
        if isinstance(module, Mixer) and module.tap is not None:
            return "a tap"
    return ""


def cuda_capture(run: Callable[[], None]) -> Replay:
    """Run it a few times beside the current stream, then capture it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _tensors(state: MixerState) -> list[Tensor]:
    return [state.conv, *(state.ssm if isinstance(state.ssm, Int8State) else [state.ssm])]


def _copy(part: Tensor | Int8State) -> Tensor | Int8State:
    return Int8State(*(t.clone() for t in part)) if isinstance(part, Int8State) else part.clone()


__all__ = ["GraphedStep", "cuda_capture", "graphed", "watched"]
