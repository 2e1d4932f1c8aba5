"""``mambacompress demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where demo-w8a8/ and demo-report/ go.")] = Path(),
) -> None:
    """The whole way once: quantize the embedded model, evaluate it, write the report. No network, no data file.

    **Example**

    `mambacompress demo --out /tmp`
    """
    from mambacompress.cli.evaluate import evaluate
    from mambacompress.cli.quantize import quantize
    from mambacompress.cli.report import report

    quantize("demo", recipe="w8a8", out=out / "demo-w8a8")
    evaluate([str(out / "demo-w8a8")], baseline="demo", out=out / "demo-report")
    report([out / "demo-report"])
