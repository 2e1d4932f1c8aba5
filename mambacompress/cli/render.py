"""Results as text: plans, manifests, checks, and the progress bar. Tables go to stdout, progress to stderr."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mambacompress.api import Compressed
    from mambacompress.bench import Result
    from mambacompress.kernels.registry import CheckResult
    from mambacompress.passes.base import Plan
    from mambacompress.pretraining import Trained

LINE_SECONDS = 30  # between two lines of a training run that no one watches


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width: never cut a table there
        console.width = 200
    return console


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar fed by (stage, done, total): the current stage, how many blocks are done, the time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, stage="")
        seen = {"done": 0, "total": 0}

        def update(stage: str, done: int, total: int) -> None:
            if done < seen["done"] or total != seen["total"]:  # another sweep over the blocks
                bar.reset(task)
            seen.update(done=done, total=total)
            bar.update(task, completed=done, total=total, stage=stage)

        yield update


@contextmanager
def training(title: str) -> Iterator[Callable[[str, int, int, Mapping[str, float]], None]]:
    """Training as it goes, fed by (stage, done, total, figures): a bar, or a line now and then where stderr is a file.

    Nothing appears before the first step, so that of several processes only the one that is told shows it. Loss and
    speed are moving averages.
    """
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}
    means: dict[str, float] = {}
    spoken = time.monotonic()

    def update(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        nonlocal spoken
        if stage not in tasks:
            first = not tasks
            for other in tasks.values():
                bar.remove_task(other)
            tasks.clear()
            tasks[stage] = bar.add_task(title if first else stage, total=total, figures="")
            if console.is_terminal:
                bar.start()
        for name, share in (("loss", 0.02), ("tokens_per_second", 0.1)):
            if name in figures:
                before = means.get(name, figures[name])
                means[name] = before + share * (figures[name] - before)
        shown = _training_figures(means) if figures else ""
        if "sparsity" in figures:
            shown += f" · {figures['sparsity']:.0%} sparse"
        bar.update(tasks[stage], completed=done, figures=shown)
        if not console.is_terminal and (done == total or time.monotonic() - spoken >= LINE_SECONDS):
            spoken = time.monotonic()
            task = next(task for task in bar.tasks if task.id == tasks[stage])
            left = f"{task.time_remaining:.0f} s left" if task.time_remaining else ""
            console.print(Text(" · ".join(filter(None, (f"{task.description} {done:,}/{total:,}", shown, left)))))

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def _training_figures(means: Mapping[str, float]) -> str:
    loss, speed = means["loss"], means["tokens_per_second"]
    return f"loss {loss:.3f} · perplexity {math.exp(min(loss, 700)):,.1f} · {speed:,.0f} tokens/s"


def _ranges(blocks: Iterable[int]) -> str:
    """0-3, 7 of [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _grouped(entries: Iterable[Any], key: Callable[[Any], tuple[Any, ...]]) -> list[tuple[str, tuple[Any, ...]]]:
    """Entries equal but for their block, with the blocks they stand for."""
    groups: dict[tuple[Any, ...], list[int | None]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry.block)
    named = []
    for row, blocks in groups.items():
        numbers = [block for block in blocks if block is not None]
        named.append((_ranges(numbers) if numbers else "model", row))
    return named


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plan(planned: Plan, title: str) -> None:
    """What a recipe would do and what it refuses, blocks of a kind on one line."""
    console = _console()
    table = _table(title, "pass", "blocks", "target", "what", "bits", "at run time")
    for blocks, (name, target, what, online, bits) in _grouped(
        planned.edits, lambda edit: (edit.pass_name, edit.target, edit.what, edit.online, edit.bits)
    ):
        table.add_row(
            *map(Text, (name, blocks, target, what, "" if bits is None else f"{bits:g}", "online" if online else ""))
        )
    console.print(table)
    if planned.refusals:
        refused = _table("\nRefused", "pass", "blocks", "target", "reason")
        for blocks, (name, target, reason) in _grouped(
            planned.refusals, lambda refusal: (refusal.pass_name, refusal.target, refusal.reason)
        ):
            refused.add_row(*map(Text, (name, blocks, target, reason)))
        console.print(refused)


def manifest(made: dict[str, Any], title: str) -> None:
    """What was done to an artifact: per layer type, bits and error, then the figures of the whole."""
    console = _console()
    table = _table(f"{title} · {made['recipe']['name']}", "block", "relative error", "kept")
    for name, record in sorted(made["records"].items()):
        kept = {key: value for key, value in record.items() if key != "error"}
        table.add_row(
            *map(
                Text,
                (
                    name,
                    "" if "error" not in record else f"{record['error']:.3g}",
                    ", ".join(f"{key} {value}" for key, value in kept.items()),
                ),
            )
        )
    console.print(table)
    kinds: dict[str, int] = {}
    for spec in made["layout"].values():
        kinds[spec["type"]] = kinds.get(spec["type"], 0) + 1
    console.print(Text(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))))
    for line in _figures(made):
        console.print(Text(line))
    for reason in sorted({f"refused: {item['target']}: {item['reason']}" for item in made["refused"]}):
        console.print(Text(reason))


def _figures(made: dict[str, Any]) -> list[str]:
    stored = sum(file["bytes"] for name, file in made["files"].items() if name.endswith(".safetensors"))
    whole = sum(made["float_bytes"].values())
    calibration = made["calibration"]
    return [
        f"{made['coverage']:.1%} of the matrix bytes packed",
        f"{stored:,} bytes of tensors, {stored / whole:.3f} of the matrices in fp32",
        f"perplexity on the {calibration['tokens']:,} calibration tokens x {calibration['perplexity_ratio']:.5f}",
    ]


def compressed(made: Compressed, model: str) -> None:
    """The end of a run: where it is, what it cost, what to do next."""
    console = _console()
    console.print(Text(f"{made.directory}"))
    for line in _figures(made.manifest):
        console.print(Text(line))
    console.print(Text(f"Next: mambacompress evaluate {made.directory} --baseline {model}"))


def trained(made: Trained, out: Path) -> None:
    """The end of a training run: where it is, how well it came out, what to do next."""
    console = _console()
    console.print(Text(f"{made.directory}"))
    for fact in ("steps", "final training loss", "held-out perplexity"):
        if fact in made.facts:
            console.print(Text(f"{fact}: {made.facts[fact]}"))
    console.print(Text(f"loss curve: {out / 'training.html'}"))
    console.print(Text(f"Next: mambacompress quantize {made.directory}"))


def checks(results: Iterable[CheckResult]) -> None:
    """Every op: what runs here, how far it is from its reference, why."""
    table = _table("", "op", "backend", "", "error", "tolerance", "reason")
    for result in results:
        table.add_row(
            *map(
                Text,
                (
                    result.op,
                    result.backend,
                    "ok" if result.ok else "WRONG",
                    f"{result.error:.2g}",
                    f"{result.tolerance:.2g}",
                    result.reason,
                ),
            )
        )
    _console().print(table)


def speeds(result: Result) -> None:
    """A benchmark: a line a contestant and thread count, then who is missing and how to read it."""
    console = _console()
    head = result.columns()
    table = _table("", *head)
    for column in table.columns[2:]:
        column.justify = "right"
        column.no_wrap = True
    for cells in result.rows():
        table.add_row(*map(Text, cells))
    console.print(table)
    for remark in result.remarks():
        console.print(Text(remark))
