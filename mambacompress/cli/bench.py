"""``mambacompress bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambacompress.errors import CheckFailed, UserError


def bench(
    models: Annotated[list[str], typer.Argument(metavar="DIR", help="Models, compressed directories, or demo.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="The original, which the peers run. [default: the float DIR]"),
    ] = None,
    peers: Annotated[
        str, typer.Option("--peers", metavar="P,...", help="Ratios are to the first one that is there; '' for none.")
    ] = "llama.cpp,openvino,transformers",
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N,...", help="Thread counts.", show_default="1 and all cores")
    ] = None,
    states: Annotated[
        str, typer.Option("--states", metavar="S,...", help="Recurrent states of compressed models: fp32, int8, both.")
    ] = "fp32",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write all figures, and the table as .md.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="prompt=512, steps=64, batch=8, rounds=5, ..."),
    ] = None,
) -> None:
    """Measure speed side by side: prefill, decode and decode in batches, against llama.cpp, OpenVINO, transformers.

    Everyone runs in a process of its own, loaded once, and they take turns: a round lets each of them work once, and
    the ratios are taken within rounds, so that a busy machine slows all alike. A DIR that is not compressed is measured
    in fp32 and bf16. Peers come with `CMAKE_ARGS=-DGGML_NATIVE=ON pip install 'mambacompress[bench]'`; one that is not
    there is left out.

    **Examples**

    `mambacompress bench ./mamba-130m ./mamba-130m-w8a8 --threads 1,2 --out speed.json`

    `mambacompress bench demo-w8a8 --baseline demo --peers transformers --set rounds=3`
    """
    from mambacompress.bench import bench as measure
    from mambacompress.bench.line_up import cores
    from mambacompress.cli import render
    from mambacompress.recipe import pair

    if out is not None and out.suffix != ".json":
        raise UserError(f"--out {out} is no .json file", f"write --out {out.with_suffix('.json')}")
    counts = sorted({1, cores()}) if threads is None else [_count(part) for part in _parts(threads)]
    with render.progress("bench") as progress:
        result = measure(
            models,
            baseline=baseline,
            peers=_parts(peers),
            threads=counts,
            states=_parts(states),
            progress=progress,
            **dict(map(pair, settings or ())),
        )
    render.speeds(result)
    if out is not None:
        for file in result.save(out):
            typer.echo(str(file))
    if not result.ran:
        raise CheckFailed("nothing could be measured", "see the reasons above")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--threads has {text!r}, which is no number", "write for example --threads 1,2") from None


__all__ = ["bench"]
