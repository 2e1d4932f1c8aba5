"""``mambacompress verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed directory.")],
) -> None:
    """Recompute a compressed directory's hashes, coverage and zeros from its own files; exit code 1 where they differ.

    **Example**

    `mambacompress verify demo-w8a8`
    """
    import mambacompress as mc

    counted = mc.verify(directory)
    typer.echo(f"{directory} is whole: {counted['files']} files, {counted['bytes']:,} bytes")
    typer.echo(f"{counted['packed']} packed layers, {counted['coverage']:.1%} of the matrix bytes")
    if counted["patterns"]:
        kinds = ", ".join(sorted(set(counted["patterns"].values())))
        share = counted["zeros"] / counted["sparse_weights"]
        typer.echo(f"{len(counted['patterns'])} layers are {kinds} sparse: {counted['zeros']:,} of "
                   f"{counted['sparse_weights']:,} weights are zero ({share:.1%})")
