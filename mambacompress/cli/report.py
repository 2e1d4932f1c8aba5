"""``mambacompress report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    reports: Annotated[
        list[Path] | None, typer.Argument(metavar="REPORT_DIR", help="What `evaluate --out` wrote. [default: report]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="the first REPORT_DIR")
    ] = None,
) -> None:
    """Render reports again, several as one: report.json, report.md, and report.html with the accuracy-size plot.

    **Examples**

    `mambacompress report demo-report`

    `mambacompress report report-w8a8 report-w4a16 --out both`
    """
    from mambacompress.eval import merged

    named = reports or [Path("report")]
    page = merged(named).save(out or (named[0].parent if named[0].is_file() else named[0]))
    for name in ("report.json", "report.md", page.name):
        typer.echo(str(page.with_name(name)))
