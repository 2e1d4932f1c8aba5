"""``mambacompress evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.cli.command import Device, StrictKernels, Texts, kernels


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="DIR", help="Compressed directories, or models.")],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="The original they are compared with.")
    ] = None,
    text: Texts = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="T...", help="Packaged or hub lm-eval tasks, by name.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="REPORT_DIR", help="Where the report goes.")] = Path(
        "report"
    ),
    device: Device = "cpu",
    strict_kernels: StrictKernels = False,
) -> None:
    """Measure models: perplexity, divergence from the original, tasks, bytes and speed, into one report.

    Without `--text` the text is the held-out part of Python's standard library.

    **Examples**

    `mambacompress evaluate demo-w8a8 --baseline demo --out report`

    `mambacompress evaluate m-w8a8 m-w4a16 --baseline ./m --text test.jsonl.xz wiki.txt --tasks blimp piqa`
    """
    import mambacompress as mc
    from mambacompress.cli import render

    names = [task for value in tasks or () for task in value.split(",") if task]
    with kernels(strict_kernels), render.progress("evaluate") as progress:
        result = mc.evaluate(
            models, baseline=baseline, texts=text, tasks=names, out=out, device=device, progress=progress
        )
    render.evaluation(result, out)
