"""A report as Markdown, and as one HTML page that needs nothing but itself: style, script and drawings are inside
it.
"""

from __future__ import annotations

from pathlib import Path

from mambacompress.eval.charts import charts
from mambacompress.eval.figures import human_bytes, percent, plus_minus, signed_percent
from mambacompress.eval.plot import pareto, svg
from mambacompress.eval.schema import ReportData
from mambacompress.eval.tables import Cell, Table, tables

TEMPLATES = Path(__file__).parent / "templates"


def markdown(report: ReportData) -> str:
    """The report's tables in Markdown."""
    parts = [f"# {_escape(report.title)}", f"{_escape(_subtitle(report))}"]
    for table in tables(report):
        parts.append(f"## {table.title}")
        if table.caption and table.anchor != "overview":
            parts.append(table.caption)
        parts.append(_markdown_table(table))
    if report.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {_escape(note)}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def html(report: ReportData) -> str:
    """The page. Opens from disk, works offline, follows light and dark."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    drawings = [(chart, svg(chart, _tick)) for chart in charts(report)]
    return environment.get_template("report.html").render(
        report=report,
        subtitle=_subtitle(report),
        drawings=drawings,
        tables=tables(report),
        headlines=headlines(report),
        bars=_bars(report),
        human_bytes=human_bytes,
    )


def headlines(report: ReportData) -> list[dict[str, str]]:
    """Up to four models, those on the Pareto front first: how much smaller, and at what cost."""
    base = next((row for row in report.models if row.name == report.baseline), None)
    drawn = charts(report)
    front = {point.name for point in pareto(drawn[0].points, drawn[0].higher)} if drawn else set()
    found = []
    for row in sorted(report.models, key=lambda row: row.name not in front):
        if base is None or row is base or row.size is None or base.size is None:
            continue
        change = row.texts[0].change if row.texts else None
        cost = "quality not compared"
        if change:
            error = plus_minus(change.ratio_se, percent=True)
            cost = f"perplexity {signed_percent(change.ratio - 1)} {error} on {row.texts[0].text}"
        same = f"same top token {percent(row.agreement[0].top1, 1)}" if row.agreement else ""
        found.append(
            {
                "name": row.name,
                "factor": f"{base.size.file_bytes / row.size.file_bytes:.2f}\u00d7",
                "size": f"{human_bytes(base.size.file_bytes)} → {human_bytes(row.size.file_bytes)}",
                "cost": cost,
                "same": same,
            }
        )
    return found[:4]


def _bars(report: ReportData) -> list[dict[str, object]]:
    """Stacked bars of the bytes, relative to the largest file."""
    sized = [row for row in report.models if row.size]
    largest = max((row.size.file_bytes for row in sized if row.size), default=1)
    made: list[dict[str, object]] = []
    for row in sized:
        assert row.size is not None
        parts = [(name, row.size.categories[name]) for name in ("weights", "scales", "masks", "embeddings", "other")]
        made.append(
            {
                "name": row.name,
                "total": human_bytes(row.size.file_bytes),
                "parts": [
                    {
                        "kind": name,
                        "width": f"{100 * count / largest:.3f}%",
                        "tip": f"{row.name}\n{name}: {human_bytes(count)}",
                    }
                    for name, count in parts
                    if count
                ],
            }
        )
    return made


def _tick(count: float) -> str:
    """5.00 MB -> 5 MB."""
    number, _, unit = human_bytes(count).partition(" ")
    return f"{float(number.replace(',', '')):g} {unit}"


def _subtitle(report: ReportData) -> str:
    models = f"{len(report.models)} model{'s' if len(report.models) != 1 else ''}"
    against = f", compared with {report.baseline}" if report.baseline else ""
    return f"{models}{against} · {report.created.replace('T', ' ').replace('+00:00', ' UTC')}"


def _markdown_table(table: Table) -> str:
    lines = [
        "| " + " | ".join(_escape(title) for title, _ in table.columns) + " |",
        "|" + "|".join("---" if index < table.numeric else "---:" for index in range(len(table.columns))) + "|",
    ]
    lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)


def _markdown_cell(cell: Cell) -> str:
    if not cell.sub:
        return _escape(cell.text)
    return _escape(f"{cell.text} {cell.sub}" if cell.sub.startswith("±") else f"{cell.text} ({cell.sub})")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
