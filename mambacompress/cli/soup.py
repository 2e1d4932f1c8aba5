"""``mambacompress soup``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Interrupted, Overrides, Texts, default_out


def soup(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or demo.")] = "demo",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="R", help="A recipe's name, or a YAML file.")
    ] = "soup-2of4",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="./MODEL-RECIPE")
    ] = None,
    text: Texts = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option("--eval-text", metavar="FILE...", help="Held-out text that judges the candidates."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
) -> None:
    """Prune MODEL in phases, retrain replicas of each phase with one factor varied, and average them.

    Replicas run one after the other, or, under torchrun, spread over its processes; a crash loses at most those in
    flight. Their weights and `soup.json` (every candidate, mean, soup, ensemble, a compute-matched baseline) stay in
    OUT.soup. `soup.retrain` names the schedule: FT, LRW, SLR, CLR, LLR or ALLR.

    **Examples**

    `mambacompress soup ./mamba-130m --text train.jsonl.xz --eval-text valid.jsonl.xz --set soup.vary=learning_rate`

    `torchrun --standalone --nproc-per-node 4 -m mambacompress soup ./mamba-130m --text train.jsonl.xz --eval-text
    valid.jsonl.xz --set soup.retrain=LLR`
    """
    from mambacompress.cli import render
    from mambacompress.errors import UserError
    from mambacompress.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or ())
    target = out or default_out(model, chosen.name)
    if not text or not eval_text:
        raise UserError("a soup trains on one text and is judged on another", "name both: --text and --eval-text")
    import mambacompress as mc
    from mambacompress.data import read_texts

    try:
        with render.training(f"{model} · {chosen.name}") as progress:
            made = mc.soup(model, chosen, texts=read_texts(text), eval_texts=read_texts(eval_text), out=target,
                           resume=resume, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted, and {target} was not written", "run the same command with --resume to go on"
        ) from None
    render.compressed(made, model)
