"""Host families: which modules are mixers, how they are adopted and written back, how a checkpoint is opened.

``adopt(host)`` replaces a transformers model's mixers by ours and returns its ModelMap; ``restore(host)`` undoes it.
"""

from __future__ import annotations

from typing import Any

from mambacompress.errors import UserError, did_you_mean
from mambacompress.models.families.base import Family, Hosted, adopt_host, restore_host
from mambacompress.models.families.falcon_mamba import FalconMambaFamily
from mambacompress.models.families.mamba import MambaFamily
from mambacompress.models.families.mamba2 import Mamba2Family
from mambacompress.models.modelmap import ModelMap

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (MambaFamily(), Mamba2Family(), FalconMambaFamily())
}


def family_of(model_type: str) -> Family:
    """The family of a transformers ``model_type``; raises UserError for a model that is not a Mamba we know."""
    if model_type not in FAMILIES:
        hint = did_you_mean(model_type, FAMILIES)
        raise UserError(f"model type {model_type!r} is not a Mamba this version knows{hint}",
                        f"supported model types: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def adopt(host: Any, *, prove: bool = True) -> ModelMap:
    """Replace every stock mixer of a transformers model by ours, in place and on this instance only.

    The parameters are the same storage, not copies. Raises UserError where the model is not a known Mamba or where our
    mixer does not compute what the stock one does. A model already adopted is only mapped.
    """
    return adopt_host(family_of(host.config.model_type), host, prove=prove)


def restore(host: Any) -> Any:
    """Undo ``adopt``: stock mixers holding the same parameters, bit for bit. Returns the host."""
    return restore_host(family_of(host.config.model_type), host)


__all__ = ["FAMILIES", "Family", "Hosted", "adopt", "family_of", "restore"]
