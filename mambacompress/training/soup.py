"""Sparse model soups (Zimmer et al., arXiv 2306.16788): average replicas that were retrained from one pruned model.

Pruned in phases (nested masks, (M-1):M down to N:M), each phase retrains ``replicas`` copies from the *identical*
pruned weights with one factor varied and the mask fixed; as all share the mask, their average is as sparse as each. The
next phase starts from the average.

    uniform   the mean of all
    greedy    replicas by their validation, best first; one stays in if the mean with it is not worse

Candidates of other masks, names or shapes are refused: the union of masks would be denser than any. Averaging A_log is
a geometric mean of A. There are no batch statistics in a Mamba to estimate again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.nm import Pattern, excess

State = Mapping[str, Tensor]


def average(states: Sequence[State], patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """The mean of every tensor, in fp64, in its own dtype; patterns: of the tensors that are sparse, by name.

    Raises UserError where candidates do not fit together.
    """
    first = states[0]
    for i, other in enumerate(states[1:], start=1):
        if set(other) != set(first) or any(other[name].shape != first[name].shape for name in first):
            raise UserError(f"candidate {i} has other tensors than candidate 0", "mix replicas of one model")
        for name, pattern in patterns.items():
            if excess(first[name].abs() + other[name].abs(), pattern):
                raise UserError(f"candidates 0 and {i} have different masks in {name}: their mean would be denser than "
                                "either", "mix replicas that were retrained from the same pruned model")
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in first}
    return {name: tensor.to(first[name].dtype) for name, tensor in mean.items()}


def greedy(states: Sequence[State], losses: Sequence[float], score: Callable[[State], float],
           patterns: Mapping[str, Pattern]) -> list[int]:
    """Which candidates a greedy soup takes; losses: of each alone; score: of a mixture, smaller is better."""
    order = sorted(range(len(states)), key=lambda i: losses[i])
    taken, best = [order[0]], losses[order[0]]
    for i in order[1:]:
        loss = score(average([states[j] for j in (*taken, i)], patterns))
        if loss <= best:
            taken, best = [*taken, i], loss
    return taken


def distances(states: Sequence[State]) -> list[float]:
    """L2 of each candidate to their mean."""
    centre = average(states, {})
    return [float(torch.stack([(state[name].double() - centre[name].double()).square().sum() for name in centre])
                  .sum().sqrt()) for state in states]


def trained_state(model: Any) -> dict[str, Tensor]:
    """A copy of a model's parameters, each once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


__all__ = ["average", "distances", "greedy", "trained_state"]
