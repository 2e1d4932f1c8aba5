"""``mambacompress inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Overrides
from mambacompress.cli.quantize import Recipe


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model or a compressed directory, a hub name, or demo.")
    ] = "demo",
    recipe: Recipe = "w8a8",
    overrides: Overrides = None,
) -> None:
    """Print what a recipe would do to MODEL (per layer, what is folded, online, packed or refused, and why).

    Of a compressed directory, print what was done.

    **Examples**

    `mambacompress inspect demo --recipe w4a16`

    `mambacompress inspect ./demo-w8a8`
    """
    import mambacompress as mc
    from mambacompress import artifact
    from mambacompress.cli import render

    if Path(model).is_dir() and artifact.is_artifact(Path(model)):
        render.manifest(artifact.read_manifest(Path(model)), title=model)
        return
    chosen = mc.load_recipe(recipe, overrides or ())
    render.plan(mc.inspect(model, chosen), title=f"{model} · {chosen.name}")
