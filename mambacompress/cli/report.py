"""``mambacompress report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(metavar="REPORT_DIR", help="What `evaluate --out` wrote.")] = Path(
        "report"
    ),
) -> None:
    """Render report.json again: report.md, and report.html with the accuracy-size plot (one file, works offline).

    **Example**

    `mambacompress report report`
    """
    from mambacompress.eval.report import render

    for path in render(directory):
        typer.echo(str(path))
