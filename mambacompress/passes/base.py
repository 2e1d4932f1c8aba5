"""What a pass is, and what the pipeline gives it.

A pass lives twice: ``plan`` is pure (it is the dry run: it validates shapes, sizes and order on meta tensors and names
what it refuses), then the pipeline walks the model and calls the hooks, in recipe order:

    sweep     observe(hidden)      once per block on the float model, only where ``needs_sweep``; ``prepare()`` closes
    it enter     enter_embedding, enter_block, enter_head     model-wide edits (norm folding, the residual's rotation);
    the
              calibration inputs of a block are already in the basis these edits create
    apply     apply_embedding, apply_block, apply_head     edits of one block, from its calibration run; finish_block
              when all have been applied

Model-wide and block-local edits touch different streams, so they commute exactly; that is what lets ``enter`` of every
pass run before ``apply`` of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from mambacompress.models.modelmap import Block, ModelMap


@dataclass(frozen=True)
class Edit:
    """One line of the plan. block: None for the whole model. online: costs something at run time. bits: stored, if
    packed."""

    pass_name: str
    block: int | None
    target: str
    what: str
    online: bool = False
    bits: float | None = None


@dataclass(frozen=True)
class Refusal:
    """What a pass was asked for and will not do, and why."""

    pass_name: str
    block: int | None
    target: str
    reason: str


@dataclass
class Plan:
    edits: list[Edit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        self.edits.extend(other.edits)
        self.refusals.extend(other.refusals)


class Calibration(Protocol):
    """The calibration run of one block, on inputs that come out of the already compressed blocks before it.

    trial: this run only tries something out; skip what is slow and does not change which trial wins.
    """

    trial: bool

    def batches(self) -> Iterator[Tensor]:
        """The block's inputs, [b, L, D] each."""

    def run(self, block: Block, observe: Callable[[str, Tensor], None]) -> None:
        """Every batch through ``block``; ``observe(tap, value)`` sees the mixer's taps (see models/mixers.py)."""

    def reference(self) -> Iterator[Tensor]:
        """What the float block (after every ``enter``) makes of ``batches``, in the same order."""

    def error(self, block: Block) -> float:
        """Squared error of the block's output against ``reference``, relative to the reference's own update energy."""

    def trial_error(self, block: Block, edit: Callable[[Block], None] | None = None) -> float:
        """``error`` of a copy of ``block`` after ``edit`` and all *later* passes of the recipe, on a few batches."""


class Pass:
    """Defaults for every hook; a pass overrides what it needs.

    rank: its place in the one legal order of methods (a recipe that breaks it is refused by the pipeline's plan).
    """

    name: str
    rank: int
    needs_sweep = False

    def plan(self, model_map: ModelMap) -> Plan:
        """What would be done and what is refused; raises UserError where the request cannot work. Reads no weight."""
        return Plan()

    def observe(self, hidden_BLD: Tensor) -> None:
        """The float residual entering a block, or the final norm; in model order, batch by batch."""

    def observe_head(self, hidden_BLD: Tensor) -> None:
        """The float residual entering the final norm, batch by batch, once more."""

    def prepare(self, model_map: ModelMap) -> None:
        """Close the sweep (or, without one, get ready) before the first edit."""

    def state(self) -> dict[str, Tensor]:
        """What ``prepare`` computed, to be stored for a resumed run."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave, instead of ``prepare``."""

    def enter_embedding(self, model_map: ModelMap) -> None:
        """Model-wide edits of the embedding."""

    def enter_block(self, block: Block) -> None:
        """Model-wide edits of one block, before its calibration."""

    def enter_head(self, model_map: ModelMap) -> None:
        """Model-wide edits of the final norm and the head."""

    def apply_embedding(self, model_map: ModelMap) -> dict[str, Any]:
        """Edit the embedding; returns what the manifest should say."""
        return {}

    def apply_block(self, block: Block, calibration: Calibration) -> dict[str, Any]:
        """Edit one block; returns what the manifest should say (numbers and short strings only)."""
        return {}

    def finish_block(self, block: Block) -> None:
        """After every pass has been applied to a block: pack what none of them has."""

    def finish_embedding(self, model_map: ModelMap) -> None:
        """The same of the embedding."""

    def finish_head(self, model_map: ModelMap) -> None:
        """The same of the head."""

    def mixes(self) -> dict[str, str]:
        """Recipe names of the matrices whose zeros this pass would fill, and why; an N:M pattern does not survive it.
        """
        return {}

    def apply_head(self, model_map: ModelMap, calibration: Calibration) -> dict[str, Any]:
        """Edit the head. ``calibration.batches`` are the final norm's inputs; ``run`` is not available here."""
        return {}
