"""``mambacompress quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Device, Interrupted, Overrides, StrictKernels, Texts, default_out, kernels

Recipe = Annotated[str, typer.Option("--recipe", "-r", metavar="R", help="A recipe's name, or a YAML file.")]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or demo.")] = "demo",
    recipe: Recipe = "w8a8",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="./MODEL-RECIPE")
    ] = None,
    text: Texts = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weight, write nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    device: Device = "cpu",
    strict_kernels: StrictKernels = False,
) -> None:
    """Compress MODEL by a recipe, block by block, into a directory that loads like any model.

    **Examples**

    `mambacompress quantize demo --recipe w8a8`

    `mambacompress quantize ./mamba-130m --recipe w4a16 --text novels.jsonl.xz --out ./mamba-130m-w4`

    `mambacompress quantize ./mamba-130m --recipe w4a8 --set passes.quantize.group_size=32 --dry-run`
    """
    from mambacompress.cli import render
    from mambacompress.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or ())
    target = out or default_out(model, chosen.name)
    import mambacompress as mc

    if dry_run:
        render.plan(mc.inspect(model, chosen), title=f"{model} · {chosen.name}")
        return
    calibration = None
    if text:
        from mambacompress.data import read_texts

        calibration = read_texts(text)
    try:
        with kernels(strict_kernels), render.progress(f"{model} · {chosen.name}") as progress:
            made = mc.quantize(
                model,
                recipe=chosen,
                calibration=calibration,
                out=target,
                resume=resume,
                device=device,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted, and {target} was not written",
            "run the same command with --resume to go on at the block it was in",
        ) from None
    render.compressed(made, model)
