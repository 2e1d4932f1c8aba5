"""A prefill in readable torch: one step after the other.

Legend: B batch, L tokens, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.mixer_step.reference import BlockState, S6Block, SSDBlock, mixer_step_reference


def zero_state(block: S6Block | SSDBlock, batch: int) -> BlockState:
    """The state before the first token."""
    channels, width = block.conv.weight.shape
    if isinstance(block, S6Block):
        ssm = torch.zeros(batch, *block.A.shape)
    else:
        heads = len(block.A)
        ssm = torch.zeros(batch, heads, len(block.gated_norm) // heads, block.states)
    return BlockState(torch.zeros(batch, width - 1, channels), ssm)


def mixer_prefill_reference(h_BLD: Tensor, blocks: list[S6Block | SSDBlock],
                            states: list[BlockState] | None = None) -> tuple[Tensor, list[BlockState]]:
    """See ``mixer_prefill``."""
    if states is None:
        states = [zero_state(block, len(h_BLD)) for block in blocks]
    tokens = []
    for h_BD in h_BLD.unbind(1):
        h_BD, states = mixer_step_reference(h_BD, blocks, states)
        tokens.append(h_BD)
    return (torch.stack(tokens, 1) if tokens else h_BLD), states
