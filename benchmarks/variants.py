"""What the quality tables measure: recipes as they are, and ablations that take parts out of one or put others in.

An ablation is a recipe and a mapping of dotted overrides (see ``mambacompress.recipe.load_recipe``); null takes a pass
out. The rows go from plain rounding to the whole recipe, so that each difference is one part's worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RECIPES = ("rtn-w8a8", "quarot-w8a8", "w8a8", "w8a8-static", "w8a8-scan8", "w8a16", "w4a16", "w4a8", "w4a4")
KLT = "klt-hadamard"
NONE = {"residual": "none", "dt": "none"}
FOLDS = {"gate": "auto", "norm_gate": "auto", "conv": "auto", "states": "auto"}


@dataclass(frozen=True)
class Variant:
    """A row: a packaged recipe (or a file) and what is different in it."""

    name: str
    recipe: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


def recipes(names: tuple[str, ...] = RECIPES) -> list[Variant]:
    return [Variant(name, name) for name in names]


def ablation(recipe: str, *, gptq: bool, online_x: bool = False) -> list[Variant]:
    """The rows of one recipe's ablation: rounding alone, smoothing alone, one rotation after another, KLT against plain
    Hadamard, with and without smoothing and (where the recipe has it) GPTQ, and the recipe itself.

    online_x: the recipe rotates x_proj's input as well (R6).
    """
    bare: dict[str, Any] = {"passes.smooth": None, "passes.rotate": None}
    if gptq:
        bare["passes.gptq"] = None
    full = {"residual": KLT, "dt": KLT, "out": "hadamard"} | ({"x": "hadamard"} if online_x else {})

    def rotated(**rotate: str) -> dict[str, Any]:
        return bare | {"passes.fuse_norms": {}, "passes.rotate": dict(rotate)}

    every_fold = FOLDS | {"norm": "auto", "dt": "auto", "conv_in": "auto"}
    rows = [
        ("RTN", bare | {"passes.fuse_norms": None, "passes.quantize.scale_search": False}),
        ("RTN, clipping searched", bare | {"passes.fuse_norms": None, "passes.quantize.scale_search": True}),
        ("smoothing only", bare | {"passes.fuse_norms": None, "passes.smooth": every_fold}),
        ("R1", rotated(residual=KLT)),
        ("R1+R5", rotated(residual=KLT, dt=KLT)),
        ("R1+R5+R2", rotated(residual=KLT, dt=KLT, out="hadamard")),
        ("R1+R5+R2+R6", rotated(residual=KLT, dt=KLT, out="hadamard", x="hadamard")),
        ("R1+R5+R2, plain Hadamard", rotated(residual="hadamard", dt="hadamard", out="hadamard")),
        ("rotations + smoothing", rotated(**full) | {"passes.smooth": FOLDS}),
    ]
    if gptq:
        gptq_alone = {"passes.fuse_norms": None, "passes.smooth": None, "passes.rotate": None}
        rotations = {"passes.fuse_norms": {}, "passes.smooth": None, "passes.rotate": full}
        rows += [("GPTQ alone", gptq_alone), ("GPTQ, R2", gptq_alone | {"passes.rotate": NONE | {"out": "hadamard"}}),
                 ("rotations + GPTQ", rotations),
                 ("rotations + smoothing + GPTQ", rotations | {"passes.smooth": FOLDS})]
    return [Variant(f"{recipe}: {name}", recipe, overrides) for name, overrides in rows] + [
        Variant(f"{recipe}: the recipe", recipe)]


ABLATIONS = {
    "w8a8": lambda: ablation("w8a8", gptq=False),
    "w4a8": lambda: ablation("w4a8", gptq=True),
    "w4a16": lambda: ablation("w4a16", gptq=True),
    "w4a4": lambda: ablation("w4a4", gptq=True, online_x=True),
}
