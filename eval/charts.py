"""Which drawings a report gets: one for every text, agreement figure and task that at least two sized models share.

No chart averages over tasks: accuracies of different metrics, contexts and numbers of questions have no common mean.
"""

from __future__ import annotations

from collections.abc import Callable

from mambacompress.eval.figures import human_bytes, percent, plus_minus, signed_percent, significant
from mambacompress.eval.plot import Chart, Point, scale_for
from mambacompress.eval.schema import ModelResult, ReportData

Value = tuple[float, float | None, str]


def charts(report: ReportData) -> list[Chart]:
    """All charts, the paired changes of perplexity first."""
    made: list[Chart | None] = []
    texts = list(dict.fromkeys(text.text for row in report.models for text in row.texts))
    for text in texts:
        made.append(_change_chart(report, text) if report.baseline else None)
    for text in texts:
        made.append(_agreement_chart(report, text))
    for text in texts:
        made.append(None if report.baseline else _perplexity_chart(report, text))
    for task, metric in dict.fromkeys((task.task, task.metric) for row in report.models for task in row.tasks):
        made.append(_task_chart(report, task, metric))
    return [chart for chart in made if chart is not None and len(chart.points) >= 2]


def _points(report: ReportData, value_of: Callable[[ModelResult], Value | None]) -> tuple[Point, ...]:
    points = []
    for row in report.models:
        value = value_of(row)
        if value is None or row.size is None:
            continue
        size = f"{human_bytes(row.size.file_bytes)}, {row.size.bits_per_weight:.2f} bits a weight"
        points.append(
            Point(row.name, row.size.file_bytes, value[0], value[1], (value[2], size), row.name == report.baseline)
        )
    return tuple(points)


def _change_chart(report: ReportData, name: str) -> Chart:
    def value_of(row: ModelResult) -> Value | None:
        text = next((text for text in row.texts if text.text == name), None)
        if text is None:
            return None
        if row.name == report.baseline:
            return 0.0, None, f"perplexity {text.perplexity:.2f}"
        if text.change is None:
            return None
        change, error = text.change.ratio - 1, text.change.ratio_se
        shown = f"{signed_percent(change)} {plus_minus(error, percent=True)} (perplexity {text.perplexity:.2f})"
        return 100 * change, None if error is None else 100 * error, shown

    points = _points(report, value_of)
    scale = scale_for([point.value for point in points])
    return Chart(
        f"change-{name}",
        f"Perplexity change · {name}",
        "perplexity change, %" + (" (symmetric log)" if scale == "symlog" else ""),
        points,
        _plain_percent,
        False,
        scale,
        0.0,
    )


def _agreement_chart(report: ReportData, name: str) -> Chart | None:
    def value_of(row: ModelResult) -> Value | None:
        found = next((item for item in row.agreement if item.text == name), None)
        if found is None or found.kl <= 0:
            return None
        return (
            found.kl,
            found.kl_se,
            f"KL {significant(found.kl)} {plus_minus(found.kl_se)}, same top token {percent(found.top1)}",
        )

    return Chart(
        f"kl-{name}",
        f"KL divergence · {name}",
        "KL divergence, nats a token (log scale)",
        _points(report, value_of),
        lambda v: f"{v:g}",
        False,
        "log",
    )


def _perplexity_chart(report: ReportData, name: str) -> Chart:
    def value_of(row: ModelResult) -> Value | None:
        text = next((text for text in row.texts if text.text == name), None)
        return (
            None
            if text is None
            else (text.perplexity, text.se, f"perplexity {text.perplexity:.2f} {plus_minus(text.se)}")
        )

    return Chart(
        f"perplexity-{name}",
        f"Perplexity · {name}",
        "perplexity",
        _points(report, value_of),
        lambda v: f"{v:g}",
        False,
    )


def _task_chart(report: ReportData, name: str, metric: str) -> Chart:
    share = metric != "perplexity"

    def value_of(row: ModelResult) -> Value | None:
        task = next((task for task in row.tasks if (task.task, task.metric) == (name, metric)), None)
        if task is None:
            return None
        factor = 100 if share else 1
        value = percent(task.value) if share else f"{task.value:.4g}"
        shown = f"{value} {plus_minus(task.se, percent=share)}, n = {task.n:,}"
        if task.change is not None and task.change.gained is not None:
            shown += f"\n{task.change.gained} answers turned right, {task.change.lost} wrong"
        return factor * task.value, None if task.se is None else factor * task.se, shown

    points = _points(report, value_of)
    return Chart(
        f"task-{name}-{metric}",
        f"{name} · {metric}",
        f"{metric}, %" if share else metric,
        points,
        lambda v: f"{v:g}",
        share,
        "linear",
        None,
    )


def _plain_percent(value: float) -> str:
    return "0" if value == 0 else f"{value:+g}"
