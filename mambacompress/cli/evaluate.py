"""``mambacompress evaluate``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambacompress.cli.command import Device, StrictKernels, Texts, kernels
from mambacompress.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mambacompress.eval import Candidate


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
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="The packaged tasks' data files.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="context=1024, windows=60, limit=200, ...")
    ] = None,
    device: Device = "cpu",
    strict_kernels: StrictKernels = False,
) -> None:
    """Measure models: perplexity, divergence from the original, tasks, bytes and speed, into one report.

    Without `--text` the text is the held-out part of Python's standard library.

    **Examples**

    `mambacompress evaluate demo-w8a8 --baseline demo --out report`

    `mambacompress evaluate m-w8a8 m-w4a16 --baseline ./m --text test.jsonl.xz wiki.txt --tasks blimp piqa`
    """
    chosen = _settings(settings or ()) | ({} if data is None else {"data": data})
    names = [task for value in tasks or () for task in value.split(",") if task]
    from mambacompress.data import read_texts, stdlib_texts

    texts = {path.name.split(".")[0]: read_texts(path) for path in text or ()}
    import mambacompress as mc

    with kernels(strict_kernels):
        report = mc.evaluate(
            [_candidate(model, device) for model in models],
            baseline=None if baseline is None else _candidate(baseline, device),
            texts=texts or {"python_stdlib_test": stdlib_texts("test")},
            tasks=names,
            progress=True,
            **chosen,
        )
    page = report.save(out)
    typer.echo(report.markdown())
    typer.echo(str(page))


def _settings(pairs: list[str] | tuple[str, ...]) -> dict[str, Any]:
    if not pairs:
        return {}
    from mambacompress.eval.runner import Settings
    from mambacompress.recipe import pair

    known = [field.name for field in fields(Settings)]
    chosen = dict(map(pair, pairs))
    for key in chosen:
        if key not in known:
            raise UserError(f"there is no setting {key!r}{did_you_mean(key, known)}", f"settings: {', '.join(known)}")
    return chosen


def _candidate(model: str, device: str) -> Candidate:
    """A row of the report: named by the last part of its path, loaded when its turn comes."""
    import mambacompress as mc
    from mambacompress import api, artifact
    from mambacompress.eval import Candidate

    path = Path(api.resolve(model))
    packed = path.is_dir() and artifact.is_artifact(path)
    return Candidate(
        name=Path(model).resolve().name if path.is_dir() else model,
        loader=lambda: (mc.load(model, device=device), mc.load_tokenizer(model)),
        path=path if path.is_dir() else None,
        description=artifact.read_manifest(path)["recipe"]["name"] if packed else "",
    )
