"""``mambacompress train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Interrupted, Texts
from mambacompress.training.config import SETTINGS
from mambacompress.training.recipes import RECIPES, load_training_recipe


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of {', '.join(RECIPES)}.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the model, its loss curve and checkpoints go.")
    ],
    text: Texts = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="DIR", help="A model whose tokenizer is used. [default: the recipe's own]"),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option("--eval-text", metavar="FILE...", help="Held-out text: its perplexity is measured at the end."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help=f"Change the recipe: {', '.join(SETTINGS)}."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command, to the same losses.")
    ] = False,
) -> None:
    """Train a small language model from scratch: AdamW, a cosine or WSD schedule, one process or several.

    `demo` reads Python's standard library and trains its own tokenizer; the English recipes need `--text` and
    `--tokenizer`. Ctrl-C keeps a checkpoint. Writes `DIR/model` with its card, `DIR/training.html` and
    `DIR/training.jsonl`.

    **Examples**

    `mambacompress train demo --out runs/demo`

    `mambacompress train demo --out runs/short --set steps=300 --set warmup=30 --set schedule=wsd`

    `mambacompress train english-mamba2 --text train.jsonl.xz --tokenizer demo --eval-text test.txt --out runs/mamba2`

    `mambacompress train demo --out runs/demo --resume` goes on with the first one.

    Two processes, which share every batch and see the losses of one:

    `torchrun --standalone --nproc-per-node 2 -m mambacompress train demo --out runs/demo`

    `accelerate launch -m mambacompress train ...` starts a process a GPU; without a GPU it can start a single one only.
    """
    chosen = load_training_recipe(recipe, settings or ())
    import mambacompress as mc
    from mambacompress.cli import render
    from mambacompress.data import read_texts

    try:
        with render.training(f"training {chosen.name}") as progress:
            made = mc.train(
                chosen,
                out,
                texts=read_texts(text) if text else None,
                tokenizer=tokenizer,
                eval_texts=read_texts(eval_text) if eval_text else None,
                resume=resume,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted, and {out} keeps what was trained so far", "run the same command with --resume to go on"
        ) from None
    if made.first:
        render.trained(made, out)
