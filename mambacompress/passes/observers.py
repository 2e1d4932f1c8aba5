"""What a pass watches while calibration text runs through a block: the inputs of its linears.

Our mixers call every projection as a module, so a forward hook on the module that is *there now* sees exactly what it
multiplies, whatever rotation or smoothing came before it. A module that was asked for and never ran is a bug, not
silence.

    Moment      Σ xᵀx over all tokens, in fp64: GPTQ's Hessian
    RowSample   evenly spaced rows of a stream of unknown length, and the largest magnitude of all of it: what static
                ranges are chosen on. No random numbers; the same tokens give the same sample however they are batched.

Legend: b batch, L tokens, T tokens of all sequences, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.modelmap import Block


class _Reached(Exception):
    """The module whose input was wanted has it; the rest of the forward is not needed."""


@contextmanager
def watching(block: Block, paths: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """``see(path, x_TI)`` for every input of the modules at ``paths`` (below the block), while the context lasts.

    Raises RuntimeError at its end where one of them never ran.
    """
    fired: set[str] = set()

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            fired.add(path)
            see(path, inputs[0].flatten(0, -2))
        return before

    wanted = list(paths)
    handles = [block.module.get_submodule(path).register_forward_pre_hook(hook(path)) for path in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = [path for path in wanted if path not in fired]
    if missed:
        raise RuntimeError(f"block {block.index}: {', '.join(missed)} never ran during calibration")


@torch.no_grad()
def inputs_of(block: Block, path: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The inputs [T, I] of the module at ``path``, one a batch; what comes after the module is not computed.

    A module that several scan paths share runs more than once a batch: its inputs are then joined, [several · T, I].
    """
    once = len(getattr(block.mixer, "paths", ())) <= 1
    for h_BLD in batches:
        seen: list[Tensor] = []

        def see(_: str, x_TI: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(x_TI)
            if once:
                raise _Reached

        with watching(block, [path], see), suppress(_Reached):
            block.module(h_BLD)
        yield seen[0] if len(seen) == 1 else torch.cat(seen)


class Moment:
    """Σ xᵀy over rows, accumulated in fp64; products of one batch in fp32 (fp64 for fp64 inputs)."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, x_TI: Tensor, y_TJ: Tensor | None = None) -> None:
        x_TI = x_TI if x_TI.dtype == torch.float64 else x_TI.float()
        y_TJ = x_TI if y_TJ is None else y_TJ.to(x_TI.dtype)
        product_IJ = (x_TI.T @ y_TJ).double()
        self.total = product_IJ if self.total is None else self.total.add_(product_IJ)
        self.rows += x_TI.shape[0]

    def mean(self) -> Tensor:
        """Σ xᵀy / rows, [I, J] fp64. Raises UserError where nothing was seen or it is not finite."""
        if self.total is None or not self.rows:
            raise UserError("the calibration text is empty", "give longer text")
        if not torch.isfinite(self.total).all():
            raise UserError("the calibration activations hold NaN or Inf", "check the model's weights")
        return self.total / self.rows


class RowSample:
    """At most ``capacity`` evenly spaced rows; ``absmax`` and ``mean_square_I`` are of all rows.

    Every ``stride``-th row is kept; when the sample is full, every other row is dropped and the stride doubles.
    """

    def __init__(self, capacity: int = 2048) -> None:
        self.capacity = capacity
        self.absmax = 0.0
        self.seen = 0
        self._stride = 1
        self._kept: list[Tensor] = []
        self._count = 0
        self._squares_I: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.detach()
        peak = x_TI.abs().max().item()
        if not peak < float("inf"):
            raise UserError("the calibration activations hold NaN or Inf", "check the model's weights")
        self.absmax = max(self.absmax, peak)
        squares_I = x_TI.square().sum(0).double()
        self._squares_I = squares_I if self._squares_I is None else self._squares_I + squares_I
        first = -self.seen % self._stride
        kept_TI = x_TI[first :: self._stride].clone()
        self.seen += x_TI.shape[0]
        self._kept.append(kept_TI)
        self._count += kept_TI.shape[0]
        while self._count > self.capacity:
            self._stride *= 2
            self._kept = [torch.cat(self._kept)[::2]]
            self._count = self._kept[0].shape[0]

    @property
    def mean_square_I(self) -> Tensor:
        """Mean square of each channel, [I] fp64."""
        if self._squares_I is None:
            raise UserError("the calibration text is empty", "give longer text")
        return self._squares_I / self.seen

    def rows(self) -> Tensor:
        """[up to capacity, I]."""
        if not self._kept:
            raise UserError("the calibration text is empty", "give longer text")
        return torch.cat(self._kept)

    def range_at(self, percentile: float) -> float:
        """The magnitude that ``percentile`` % of the values do not exceed: of all for 100, else of the sample."""
        if percentile >= 100:
            return self.absmax
        return percentile_of(self.rows(), percentile)


def percentile_of(values: Tensor, percentile: float) -> float:
    """The ``percentile`` of the magnitudes of a tensor of any size (torch.quantile stops at 16 million values)."""
    magnitudes = values.abs().flatten()
    rank = max(1, min(magnitudes.numel(), round(percentile / 100 * magnitudes.numel())))
    return magnitudes.kthvalue(rank).values.item()


__all__ = ["Moment", "RowSample", "inputs_of", "percentile_of", "watching"]
