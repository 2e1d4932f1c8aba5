"""The report's tables, once, for Markdown and HTML alike: cells with a text, a second line and a value to sort by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mambacompress.eval.figures import (
    Tone,
    human_bytes,
    percent,
    plus_minus,
    quantity,
    signed,
    signed_percent,
    significant,
    tone,
)
from mambacompress.eval.schema import ModelResult, ReportData, TaskResult

MISSING = "\u2014"


@dataclass(frozen=True)
class Cell:
    """text and its second line ``sub``; ``sort`` is what a click on the header sorts by (the text where None)."""

    text: str
    sub: str = ""
    sort: float | None = None
    tone: Tone = ""

    @property
    def key(self) -> str:
        """The sort value as an attribute; missing figures sort last."""
        return self.text if self.sort is None else "" if math.isnan(self.sort) else f"{self.sort:.12g}"


@dataclass(frozen=True)
class Table:
    """columns: (title, explanation); rows start with the model or task. numeric: sorted as numbers from this column
    on.
    """

    anchor: str
    title: str
    caption: str
    columns: list[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    numeric: int = 1


def missing(why: str = "not measured") -> Cell:
    """A cell without a figure."""
    return Cell(MISSING, sort=math.nan, tone="muted") if why == "" else Cell(MISSING, why, math.nan, "muted")


def tables(report: ReportData) -> list[Table]:
    """All tables that have something to show, in reading order."""
    made = [
        overview(report),
        quality(report),
        task_table(report),
        size_table(report),
        speed_table(report),
        setup(report),
    ]
    return [table for table in made if table.rows]


def overview(report: ReportData) -> Table:
    """One row a model: how small, how good, how fast."""
    texts = _texts(report)
    base = _baseline(report)
    columns = [
        ("Model", "Name; the recipe or a description below it"),
        ("File", "Bytes of the safetensors files, headers included"),
        ("Smaller", "The baseline's file divided by this one"),
        (
            "Bits",
            "Codes, scales and masks of all matrices over their number of weights; linear: without embeddings",
        ),
    ]
    columns += [
        (f"Perplexity, {text}", "Value, and the paired change from the baseline ± its standard error")
        for text in texts
    ]
    columns += [
        (
            "KL",
            "Mean KL divergence from the baseline in nats a token, and how often the top token is the same; first text",
        ),
        ("Decode", "Tokens a second at batch 1"),
        ("Peak memory", "Anonymous memory of a process that loads and runs it"),
    ]
    rows = []
    for row in report.models:
        cells = [_name(row, report)]
        size = row.size
        cells.append(Cell(human_bytes(size.file_bytes), "", size.file_bytes) if size else missing(""))
        cells.append(_smaller(row, base))
        cells.append(_bits(row))
        for text in texts:
            cells.append(_perplexity(row, text))
        found = row.agreement[0] if row.agreement else None
        cells.append(Cell(significant(found.kl), f"top-1 {percent(found.top1)}", found.kl) if found else missing(""))
        speed = row.speed
        cells.append(
            Cell(f"{speed.decode:,.0f}", "tokens/s", speed.decode) if speed and speed.decode else missing("")
        )
        cells.append(_memory(row))
        rows.append(cells)
    return Table(
        "overview", "At a glance", "Click a column to sort. Differences are paired with the baseline.", columns, rows
    )


def quality(report: ReportData) -> Table:
    """One row a model and text."""
    columns = [
        ("Model", ""),
        ("Text", ""),
        ("Perplexity", "± standard error over windows"),
        ("Change", "Perplexity divided by the baseline's, minus one; ± paired standard error"),
        ("Δ perplexity", "Difference of the perplexities; ± paired standard error"),
        ("KL, mean", "KL(baseline ‖ model) in nats a token; ± standard error over windows"),
        ("KL, median", ""),
        ("KL, 99 %", "99th percentile over tokens, and the largest"),
        ("Same top token", "± standard error over windows"),
        ("Context", "Tokens a window; the stride where it is shorter"),
        ("Tokens", "Scored tokens, and windows"),
    ]
    rows = []
    for row in report.models:
        for text in row.texts:
            change = text.change
            found = next((item for item in row.agreement if item.text == text.text), None)
            rows.append(
                [
                    _name(row, report, plain=True),
                    Cell(text.text),
                    Cell(quantity(text.perplexity), plus_minus(text.se), text.perplexity),
                    Cell(
                        signed_percent(change.ratio - 1),
                        plus_minus(change.ratio_se, percent=True),
                        change.ratio,
                        tone(change.ratio - 1, change.ratio_se, higher_is_better=False),
                    )
                    if change
                    else missing(""),
                    Cell(signed(change.delta, 4), plus_minus(change.delta_se), change.delta)
                    if change
                    else missing(""),
                    Cell(significant(found.kl), plus_minus(found.kl_se), found.kl) if found else missing(""),
                    Cell(significant(found.kl_median), "", found.kl_median) if found else missing(""),
                    Cell(significant(found.kl_99), f"max {significant(found.kl_max)}", found.kl_99)
                    if found
                    else missing(""),
                    Cell(percent(found.top1), plus_minus(found.top1_se, percent=True), found.top1)
                    if found
                    else missing(""),
                    Cell(
                        str(text.context),
                        "" if text.stride == text.context else f"stride {text.stride}",
                        text.context,
                    ),
                    Cell(f"{text.tokens:,}", f"{text.windows:,} windows", text.tokens),
                ]
            )
    return Table(
        "text",
        "On text",
        "Every window starts from a zero state and scores what no earlier one scored.",
        columns,
        rows,
        numeric=2,
    )


def task_table(report: ReportData) -> Table:
    """One row a task and metric, a column a model."""
    keys = list(dict.fromkeys((task.task, task.metric) for row in report.models for task in row.tasks))
    columns = [
        ("Task", ""),
        ("Metric", ""),
        ("n", "Questions; below 300 a difference says little"),
        ("Context", "Longest request in tokens, and shots"),
        ("Chance", "Accuracy of guessing"),
    ]
    columns += [
        (row.name, "Value ± standard error; paired difference ± standard error; answers that became right / wrong")
        for row in report.models
        if row.tasks
    ]
    rows = []
    for key in keys:
        found = {row.name: task for row in report.models for task in row.tasks if (task.task, task.metric) == key}
        first = next(iter(found.values()))
        cut = f", {first.cut} cut" if first.cut else ""
        cells = [
            Cell(first.task),
            Cell(first.metric),
            Cell(f"{first.n:,}", "few" if first.n < 300 else "", first.n),
            Cell(f"≤ {first.ctx}", f"{first.shots}-shot{cut}", first.ctx),
            missing("") if first.chance is None else Cell(percent(first.chance, 1), "", first.chance),
        ]
        cells += [_task(found.get(row.name)) for row in report.models if row.tasks]
        rows.append(cells)
    return Table(
        "tasks",
        "Tasks",
        "lm-eval, zero-shot unless stated. Second line: paired difference from the baseline ± its standard error, "
        "and how many answers turned right ↑ and wrong ↓.",
        columns,
        rows,
        numeric=2,
    )


def size_table(report: ReportData) -> Table:
    """Where the bytes are."""
    columns = [
        ("Model", ""),
        ("File", "All safetensors bytes"),
        ("Weights", "Codes and float matrices"),
        ("Scales", ""),
        ("Masks", ""),
        ("Embeddings", "Embedding and head, their scales included; tied ones once"),
        ("Other", "Norms, biases, A, D, convolutions"),
        ("Header", "Safetensors headers"),
        ("State / sequence", "Convolution and scan state, fp32"),
        ("Other files", "Tokenizer, configuration, card"),
    ]
    rows = []
    for row in report.models:
        if row.size:
            size = row.size
            parts = [size.categories[name] for name in ("weights", "scales", "masks", "embeddings", "other")]
            other = sum(size.other_files.values())
            rows.append(
                [
                    _name(row, report, plain=True),
                    Cell(f"{size.file_bytes:,}", human_bytes(size.file_bytes), size.file_bytes),
                    *(Cell(f"{part:,}", f"{part / size.file_bytes:.1%}", part) for part in parts),
                    Cell(f"{size.header_bytes:,}", "", size.header_bytes),
                    Cell(f"{size.state_bytes:,}", "", size.state_bytes)
                    if size.state_bytes
                    else missing(size.state_note),
                    Cell(f"{other:,}", f"{len(size.other_files)} files", other),
                ]
            )
    return Table("bytes", "Bytes", "Counted from the files' headers; the parts sum to the file.", columns, rows)


def speed_table(report: ReportData) -> Table:
    """Tokens a second and memory."""
    columns = [
        ("Model", ""),
        ("Prefill", "Tokens a second, median; quartiles below"),
        ("Decode", "Tokens a second at batch 1"),
        ("Peak memory", "RssAnon, sampled from the start of loading"),
        ("Prompt", "Tokens of the prefill"),
        ("Repeats", ""),
        ("Threads", ""),
        ("Loop", "Whose decoding loop ran"),
    ]
    rows = []
    for row in report.models:
        if row.speed:
            speed = row.speed
            rows.append(
                [
                    _name(row, report, plain=True),
                    _rate(speed.prefill, speed.prefill_quartiles),
                    _rate(speed.decode, speed.decode_quartiles)
                    if speed.decode and speed.decode_quartiles
                    else missing(),
                    _memory(row),
                    Cell(str(speed.prompt), "", speed.prompt),
                    Cell(str(speed.repeats), "", speed.repeats),
                    Cell(str(speed.threads), "", speed.threads),
                    Cell(speed.loop),
                ]
            )
    return Table("speed", "Speed and memory", "Median of the repeats with their quartiles.", columns, rows)


def setup(report: ReportData) -> Table:
    """What each row was measured with, and what was not measured."""
    columns = [
        ("Model", ""),
        ("Backend", ""),
        ("Tensors", "Dtypes by bytes in memory"),
        ("Hardware", ""),
        ("Versions", ""),
        ("Seeds", ""),
        ("Not measured", ""),
    ]
    rows = [
        [
            _name(row, report, plain=True),
            Cell(row.backend or MISSING),
            Cell(row.dtype or MISSING),
            Cell(row.hardware or MISSING),
            Cell(", ".join(f"{key} {value}" for key, value in row.versions.items()) or MISSING),
            Cell(", ".join(f"{key} {value}" for key, value in row.seeds.items()) or MISSING),
            Cell("; ".join(row.not_measured) or "nothing left out"),
        ]
        for row in report.models
    ]
    return Table("setup", "How it was measured", "", columns, rows, numeric=len(columns))


def _texts(report: ReportData) -> list[str]:
    return list(dict.fromkeys(text.text for row in report.models for text in row.texts))


def _baseline(report: ReportData) -> ModelResult | None:
    return next((row for row in report.models if row.name == report.baseline), None)


def _name(row: ModelResult, report: ReportData, *, plain: bool = False) -> Cell:
    role = "baseline" if row.name == report.baseline else ""
    return Cell(row.name, role if plain else ", ".join(part for part in (role, row.description) if part))


def _smaller(row: ModelResult, base: ModelResult | None) -> Cell:
    if base is None or base.size is None or row.size is None:
        return missing("")
    factor = base.size.file_bytes / row.size.file_bytes
    return Cell(f"{factor:.2f}\u00d7", f"{percent(row.size.file_bytes / base.size.file_bytes, 1)}", factor)


def _bits(row: ModelResult) -> Cell:
    if row.size is None:
        return missing("")
    linear = row.size.linear_bits
    return Cell(
        f"{row.size.bits_per_weight:.2f}",
        f"linear {linear:.2f}" if linear is not None else "",
        row.size.bits_per_weight,
    )


def _memory(row: ModelResult) -> Cell:
    if row.speed is None or not row.speed.peak_bytes:
        return missing("")
    start = row.speed.start_bytes
    return Cell(
        human_bytes(row.speed.peak_bytes),
        f"{human_bytes(start)} before loading" if start else "",
        row.speed.peak_bytes,
    )


def _perplexity(row: ModelResult, name: str) -> Cell:
    text = next((text for text in row.texts if text.text == name), None)
    if text is None:
        return missing("")
    change = text.change
    if change is None:
        return Cell(quantity(text.perplexity), plus_minus(text.se), text.perplexity)
    below = f"{signed_percent(change.ratio - 1)} {plus_minus(change.ratio_se, percent=True)}"
    return Cell(
        quantity(text.perplexity),
        below,
        text.perplexity,
        tone(change.ratio - 1, change.ratio_se, higher_is_better=False),
    )


def _task(task: TaskResult | None) -> Cell:
    if task is None:
        return missing()
    shown: Callable[[float], str] = quantity if task.metric == "perplexity" else percent
    share = task.metric != "perplexity"
    text = f"{shown(task.value)} {plus_minus(task.se, percent=share)}"
    change = task.change
    if change is None:
        return Cell(text, "", task.value)
    if share:
        below = f"{signed(100 * change.delta, 2)} {plus_minus(None if change.se is None else 100 * change.se)}"
    else:
        below = f"{signed_percent(change.delta)} {plus_minus(change.se, percent=True)}"
    if change.gained is not None:
        below += f" · {change.gained}↑ {change.lost}↓"
    return Cell(text, below.strip(), task.value, tone(change.delta, change.se, higher_is_better=share))


def _rate(value: float, quartiles: tuple[float, float]) -> Cell:
    return Cell(f"{value:,.0f}", f"{quartiles[0]:,.0f} to {quartiles[1]:,.0f}", value)
