"""``mambacompress distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Interrupted, Texts
from mambacompress.distill_recipe import ProgressiveRecipe, distill_recipe_names, load_distill_recipe
from mambacompress.errors import UserError


def distill(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help=f"{', '.join(distill_recipe_names())}.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where models, report and checkpoints go.")],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The teacher; a recipe for images trains its own.")
    ] = None,
    text: Texts = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option("--eval-text", metavar="FILE...", help="Held-out text: teacher and student are measured on it."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Folder of mnist.npz or cifar10_jpeg_*.npz.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: train.steps=500.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command, to the same losses.")
    ] = False,
) -> None:
    """Train smaller students from a teacher: a language model of fewer layers, or a chain of vision Mambas.

    Ctrl-C keeps a checkpoint; `--resume` goes on with it.

    **Examples**

    `mambacompress distill demo --recipe distill-half --out runs/half`

    `mambacompress distill DIR --recipe distill-half --text train.jsonl.xz --eval-text test.txt --out runs/half`

    `mambacompress distill DIR --recipe self-w4a8 --text train.jsonl.xz --out runs/w4a8` trains a model in its 4-bit
    format beside its float self, and packs it.

    `mambacompress distill --recipe pkd-mnist --images data/images --out runs/pkd-mnist` trains a teacher and seven
    students that add up, and reports operations against accuracy.
    """
    chosen = load_distill_recipe(recipe, settings or ())
    from mambacompress.cli import render

    try:
        with render.training(f"distilling {chosen.name}", perplexity=False) as progress:
            if isinstance(chosen, ProgressiveRecipe):
                if images is None:
                    raise UserError(f"{chosen.name} learns from images", "name their folder with --images")
                from mambacompress.distilling.images import run_progressive
                from mambacompress.images import load_images

                report = run_progressive(chosen, load_images(chosen.data, images), out, resume=resume,
                                         progress=progress)
            else:
                if model is None:
                    raise UserError(f"{chosen.name} needs a teacher", "name a model, for example demo")
                from mambacompress.data import calibration_texts, read_texts
                from mambacompress.distilling.language import run_language

                made = run_language(chosen, model, out, texts=read_texts(text) if text else calibration_texts("demo"),
                                    eval_texts=read_texts(eval_text) if eval_text else None, resume=resume,
                                    progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted, and {out} keeps what was trained so far",
                          "run the same command with --resume to go on") from None
    if isinstance(chosen, ProgressiveRecipe):
        render.chain(report, out)
    elif made.first:
        render.distilled(made, out)
