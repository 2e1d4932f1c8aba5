"""mambacompress: compression and quantization of Mamba models.

    import mambacompress as mc

    model = mc.load("path/or/hub-name")                      # a float model on our mixers; "demo" is embedded
    out = mc.quantize(model, recipe="w8a8", calibration=texts)
    out.save("model-w8a8")
    model = mc.load("model-w8a8")                            # runs the packed weights

``load``, ``load_tokenizer``   a model, float or compressed, and its tokenizer
``quantize`` (``compress``)    a recipe's passes over a model, into an artifact
``save``                       a float model, trained since it was loaded, as an ordinary directory
``inspect``                    the plan of a recipe: what it would do, what it refuses and why
``train``                      a model from scratch, by a training recipe
``sparsify``                   to N:M sparsity by a recipe, in one shot or by training
``soup``                       the same in phases, each the average of retrained replicas
``attach``, ``Session``        fine-tune to an N:M pattern in your own loop
``generate``                   text or token ids, in a lean loop
``evaluate``                   perplexity, divergence from the original, tasks, size and speed
``verify``                     an artifact against its own manifest
``load_recipe``, ``Recipe``    recipes as data
``UserError``, ``CheckFailed`` what is raised when a request cannot work, or a result does not pass

Names load on first use: importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambacompress.api import (
        Compressed,
        compress,
        generate,
        inspect,
        load,
        load_tokenizer,
        quantize,
        save,
        verify,
    )
    from mambacompress.errors import CheckFailed, UserError
    from mambacompress.eval import Candidate, evaluate
    from mambacompress.pretraining import train
    from mambacompress.recipe import Recipe, load_recipe
    from mambacompress.souping import soup
    from mambacompress.sparsifying import sparsify
    from mambacompress.training.session import Session, attach

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        ("Compressed", "compress", "generate", "inspect", "load", "load_tokenizer", "quantize", "save", "verify"),
        "api",
    ),
    **dict.fromkeys(("CheckFailed", "UserError"), "errors"),
    **dict.fromkeys(("Recipe", "load_recipe"), "recipe"),
    **dict.fromkeys(("Candidate", "evaluate"), "eval"),
    "train": "pretraining",
    "soup": "souping",
    "sparsify": "sparsifying",
    **dict.fromkeys(("Session", "attach"), "training.session"),
}

__all__ = [
    "Candidate",
    "CheckFailed",
    "Compressed",
    "Recipe",
    "Session",
    "UserError",
    "attach",
    "compress",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "load_recipe",
    "load_tokenizer",
    "quantize",
    "save",
    "soup",
    "sparsify",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
