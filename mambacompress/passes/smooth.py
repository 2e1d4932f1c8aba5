"""Smoothing: move scale from one side of a stream to the other, exactly, where that makes quantization easier.

Each fold divides a channel by s on the producing side and multiplies by s on the consuming side, so the function stays:

    S1  norm       g/s                    -> in_proj columns s
    S2  gate       W_z/s, z sigmoid(s z)  -> out_proj columns s        (z/s) sigmoid(z) = SiLU(z)/s            Mamba-1
    S2' norm_gate  gated norm's weight/s  -> out_proj columns s                                                Mamba-2
    S3  conv       conv and bias/s, u sigmoid(s u) -> x_proj columns s, out_proj columns s                     Mamba-1
                   (given dt, B, C the scan is linear in each channel of u: state and y are divided by s as well)
    S4  states     W_B/s, W_C s for each state n; A untouched, the cached state stays in the scaled basis       Mamba-1
    S5  dt         x_proj's dt rows/s     -> dt_proj columns s                                                 Mamba-1
    S7  conv_in    in_proj's x rows/s     -> conv weight s

The factors are s = range(activation)^alpha / range(weight)^(1 - alpha) for a few alpha, with candidates of its own for
a fold that touches two streams, divided by their geometric mean. A fold stays in a block only where a trial says so:
the block's output error after *all later passes* of the recipe, on a few calibration sequences. ``on`` keeps the best
candidate in any case. Folds are tried one after the other, each on what the ones before it left.

A fold on a stream that an online rotation has already opened is refused: W_out (diag s) R is not (W_out R) (diag s).
S1 runs in the basis the block is in: after fuse_norms and R1 the norm's weight is ones and s scales rotated channels.

Sources: SmoothQuant (arXiv 2211.10438, eq. 4); MambaQuant (2501.13484, section 4.2): S2 and S3.

Legend: b batch, L tokens, E d_inner, N d_state, G groups, S = G * N.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.modelmap import Block, ModelMap
from mambacompress.passes.base import Calibration, Edit, Pass, Plan, Refusal
from mambacompress.passes.folds import FOLDS, Fold, Ranges
from mambacompress.schema import SmoothConfig

_MARGIN = 0.99
"""A fold must lower the error by 1 %: less is the noise of rounding."""
_HOPELESS = 1.25
"""Where the first candidate is this much worse than nothing, the others are not tried."""
_INDIFFERENT = 1e-3
"""Where the first candidate changes the error by less, the fold moves nothing that is rounded: the others neither."""
_EXACT = 1e-12
"""Below this error nothing was quantized: there is nothing to gain."""


class Smooth(Pass):
    """See the module. Everything happens in ``apply_block``; exact, so only the trial decides."""

    name = "smooth"

    def __init__(self, config: SmoothConfig) -> None:
        self.config = config
        # S1 and S5 are as legal in the rotated basis as before it, so a pass of these alone may also follow ``rotate``.
        self.rank = 30 if config.folds and set(config.folds) <= {"norm", "dt"} else 20

    def plan(self, model_map: ModelMap) -> Plan:
        plan = Plan()
        for block in model_map.blocks:
            for fold, mode in self._asked():
                reason = fold.refusal(block)
                if reason is None:
                    verb = "scaled" if mode == "on" else "scaled where a trial lowers the block's error"
                    plan.edits.append(Edit(self.name, block.index, fold.name, f"{fold.label}: {fold.what}, {verb}"))
                elif mode == "on":
                    raise UserError(f"smooth.{fold.name}: on cannot be done in block {block.index}: {reason}",
                                    f"set smooth.{fold.name} to auto or off")
                else:
                    plan.refusals.append(Refusal(self.name, block.index, fold.name, f"{fold.label}: {reason}"))
        return plan

    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        todo = [(fold, mode) for fold, mode in self._asked() if fold.refusal(block) is None]
        record: dict[str, Any] = {fold.name: "refused" for fold, _ in self._asked()}
        if not todo:
            return record
        best = before = calibration.trial_error(block)
        record["error_before"] = _short(before)
        ranges = Ranges.of(block, calibration, states=any(fold.name == "states" for fold, _ in todo))
        names = {fold.name for fold, _ in todo}
        for fold, mode in todo:
            record[fold.name] = "off"
            if mode == "auto" and best < _EXACT:
                continue
            chosen = self._choose(fold, mode, block, calibration, ranges, best, names)
            if chosen is not None:
                label, scales, best = chosen
                fold.apply(block, scales)
                fold.move(ranges, scales)
                record[fold.name] = label
                record[f"{fold.name}_error"] = _short(best)
        record["error_after"] = _short(best)
        return record

    def _choose(self, fold: Fold, mode: str, block: Block, calibration: Calibration, ranges: Ranges, best: float,
                names: set[str]) -> tuple[str, dict[str, Tensor], float] | None:
        """(label, scales, error) of the best candidate, or None where the fold is not kept."""
        chosen, limit = None, float("inf") if mode == "on" else best * _MARGIN
        for i, (label, scales) in enumerate(fold.candidates(block, ranges, self._alphas(), names)):
            error = calibration.trial_error(block, partial(fold.apply, scales=scales))
            if error < limit:
                chosen, limit = (label, scales, error), error
            hopeless = error > best * _HOPELESS or abs(error - best) < best * _INDIFFERENT
            if i == 0 and mode == "auto" and hopeless:
                break
        return chosen

    def _alphas(self) -> tuple[float, ...]:
        """The exponents, the middle one first."""
        ordered = sorted(self.config.alphas)
        return tuple(sorted(ordered, key=lambda alpha: abs(alpha - ordered[len(ordered) // 2])))

    def _asked(self) -> Iterator[tuple[Fold, str]]:
        modes = self.config.folds
        return ((fold, modes[fold.name]) for fold in FOLDS if fold.name in modes)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


__all__ = ["Smooth"]
