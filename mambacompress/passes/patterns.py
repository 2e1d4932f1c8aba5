"""The order that N:M patterns ask for: what may touch a sparse weight, and what a model says of its own sparsity.

A pruned weight may be scaled by rows or columns and quantized; whatever mixes or permutes the pruned axis, or mixes
rows of different masks, fills its zeros. Such a pass is refused, with the reason, when it would come after the pruning:
after ``prune``, or anywhere on a model whose weights were trained sparse.

Such a model says so in its configuration: ``nm_sparsity: {in_proj: "2:4", ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mambacompress.errors import UserError
from mambacompress.nm import Pattern
from mambacompress.passes.base import Pass
from mambacompress.schema import PruneConfig

ATTRIBUTE = "nm_sparsity"


def declared(config: Any) -> list[PruneConfig]:
    """What keeps the zeros of a model that was trained sparse, a configuration a pattern; none for a dense model."""
    found = getattr(config, ATTRIBUTE, None) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"the model's {ATTRIBUTE} is {found!r}, not a mapping of tensors to patterns",
                        "correct its config.json")
    tensors: dict[str, list[str]] = {}
    for tensor, pattern in found.items():
        tensors.setdefault(str(pattern), []).append(tensor)
    try:
        patterns = {text: Pattern.parse(text) for text in tensors}
    except ValueError as error:
        raise UserError(f"the model's {ATTRIBUTE} is damaged: {error}", "correct its config.json") from error
    return [PruneConfig.model_validate({"method": "zeros", "keep": patterns[text].keep, "of": patterns[text].of,
                                        "maps": names}) for text, names in tensors.items()]


def check_patterns(passes: Sequence[Pass]) -> None:
    """Raise UserError where a pass would fill the zeros of another one's pattern."""
    for i, item in enumerate(passes):
        config = getattr(item, "config", None)
        if not isinstance(config, PruneConfig):
            continue
        trained = config.method == "zeros"
        for other in passes if trained else passes[i + 1 :]:
            broken = {name: why for name, why in other.mixes().items() if name in config.maps}
            if broken:
                reasons = "; ".join(f"{name}: {why}" for name, why in broken.items())
                raise UserError(
                    f"{other.name} would fill the zeros of weights that are {config.pattern} sparse ({reasons})",
                    f"take {other.name} out with --set passes.{other.name}=null" if trained else
                    f"put {other.name} before prune, which then prunes in the rotated basis, or take it out")


__all__ = ["ATTRIBUTE", "check_patterns", "declared"]
