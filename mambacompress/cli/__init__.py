"""The command line: parse, call the API, render. One file a command; no logic here, no torch before a command runs.

Exit codes: 0 success, 1 a check failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from mambacompress.cli import (
    bench,
    demo,
    distill,
    doctor,
    evaluate,
    generate,
    inspect,
    quantize,
    report,
    soup,
    sparsify,
    train,
    verify,
)
from mambacompress.cli.command import Command, Greedy

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown", add_completion=False
)


def _version(asked: bool) -> None:
    if asked:
        from mambacompress import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress and quantize Mamba models, and measure what it cost.

    `mambacompress quantize demo --recipe w8a8` needs no file and no network.
    """


app.command("quantize", cls=Greedy)(quantize.quantize)
app.command("sparsify", cls=Greedy)(sparsify.sparsify)
app.command("soup", cls=Greedy)(soup.soup)
app.command("inspect", cls=Command)(inspect.inspect)
app.command("evaluate", cls=Greedy)(evaluate.evaluate)
app.command("bench", cls=Command)(bench.bench)
app.command("report", cls=Command)(report.report)
app.command("distill", cls=Greedy)(distill.distill)
app.command("train", cls=Greedy)(train.train)
app.command("generate", cls=Command)(generate.generate)
app.command("verify", cls=Command)(verify.verify)
app.command("doctor", cls=Command)(doctor.doctor)
app.command("demo", cls=Command)(demo.demo)


def main() -> None:
    """The ``mambacompress`` console script."""
    gc.set_threshold(100_000)  # imports make a million objects that stay: looking for garbage is a sixth of a start
    try:
        app(prog_name="mambacompress")
    except KeyboardInterrupt:  # before a command has started
        raise SystemExit(130) from None


__all__ = ["app", "main"]
