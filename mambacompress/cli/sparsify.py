"""``mambacompress sparsify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Device, Interrupted, Overrides, StrictKernels, Texts, default_out, kernels


def sparsify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or demo.")] = "demo",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="R", help="A recipe's name, or a YAML file.")
    ] = "nm-2of4",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="./MODEL-RECIPE")
    ] = None,
    text: Texts = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weight, write nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command, to the same losses.")
    ] = False,
    device: Device = "cpu",
    strict_kernels: StrictKernels = False,
) -> None:
    """Make MODEL N:M sparse by a recipe, in one shot or by training, into a directory that loads like any model.

    A recipe with a `training` section trains on `--text`; its checkpoints, its log and the sparse model in float stay
    in OUT.training. Ctrl-C keeps a checkpoint.

    **Examples**

    `mambacompress sparsify demo --recipe nm-2of4`

    `mambacompress sparsify ./mamba-130m --recipe nm-1of8 --set passes.prune.method=wanda --text novels.jsonl.xz`

    `mambacompress sparsify ./mamba-130m --recipe cast-2of4 --text novels.jsonl.xz --out ./mamba-130m-2of4`

    `mambacompress sparsify ./mamba-130m --recipe nm-2of4-w8a8 --set training.method=sr-ste --text novels.jsonl.xz`
    """
    from mambacompress.cli import render
    from mambacompress.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or ())
    target = out or default_out(model, chosen.name)
    import mambacompress as mc

    if dry_run:
        render.plan(mc.inspect(model, chosen), title=f"{model} · {chosen.name}")
        return
    texts = None
    if text:
        from mambacompress.data import read_texts

        texts = read_texts(text)
    try:
        with kernels(strict_kernels), render.training(f"{model} · {chosen.name}") as progress:
            made = mc.sparsify(model, chosen, texts=texts, out=target, resume=resume, device=device, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted, and {target} was not written", "run the same command with --resume to go on"
        ) from None
    render.compressed(made, model)
