"""The report: saved as JSON, merged with other reports, rendered as Markdown and as one HTML page.

Comparisons are derived from the raw values each time a report is made or merged: rows pair only where their
fingerprints agree (same tokens in the same windows, same questions); otherwise the change stays empty and a note says
so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mambacompress import storage
from mambacompress.errors import UserError, did_you_mean
from mambacompress.eval import stats
from mambacompress.eval.schema import (
    SCHEMA_VERSION,
    ModelResult,
    ReportData,
    TaskChange,
    TaskResult,
    TextChange,
    TextResult,
)

FILE = "report.json"


class Report(ReportData):
    """What an evaluation found. ``save`` writes report.json, report.md and report.html into a directory."""

    def model(self, name: str) -> ModelResult:
        """The row of one model; raises UserError where there is none."""
        for row in self.models:
            if row.name == name:
                return row
        names = [row.name for row in self.models]
        raise UserError(
            f"the report has no model {name!r}{did_you_mean(name, names)}", f"it has {', '.join(names) or 'none'}"
        )

    def compared(self, baseline: str | None = None) -> Report:
        """A copy with all changes computed anew against ``baseline`` (the report's own where None)."""
        name = baseline or self.baseline
        copy = self.model_copy(deep=True, update={"baseline": name})
        reference = copy.model(name) if name else None
        notes = [note for note in copy.notes if not note.startswith("not comparable")]
        for row in copy.models:
            for text in row.texts:
                text.change, note = _text_change(row, text, reference)
                notes += note
            for task in row.tasks:
                task.change, note = _task_change(row, task, reference)
                notes += note
        copy.notes = list(dict.fromkeys(notes))
        return copy

    def merge(self, *others: Report) -> Report:
        """This report with the models of ``others``: a model of the same name is replaced by the later one."""
        rows = {row.name: row for report in (self, *others) for row in report.models}
        baseline = next((report.baseline for report in (self, *others) if report.baseline), None)
        notes = [note for report in (self, *others) for note in report.notes]
        merged = Report(
            created=max(report.created for report in (self, *others)),
            title=self.title,
            baseline=baseline,
            models=list(rows.values()),
            notes=list(dict.fromkeys(notes)),
        )
        return merged.compared()

    def save(self, directory: str | Path) -> Path:
        """Write report.json, report.md and report.html; returns the HTML page."""
        directory = Path(directory)
        storage.make_directory(directory)
        storage.write_json(directory / FILE, self.model_dump(mode="json"))
        storage.write_text(directory / "report.md", self.markdown())
        storage.write_text(directory / "report.html", self.html())
        return directory / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read report.json (or the directory that holds it); raises UserError for anything else."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            version = raw["schema_version"]
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"{file} was written by a newer mambacompress (schema {version}, this one reads up to "
                    f"{SCHEMA_VERSION})",
                    "upgrade mambacompress",
                )
            return cls.model_validate(raw)
        except FileNotFoundError as error:
            raise UserError(f"there is no report at {file}", "make one with `mambacompress evaluate`") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{file} is no valid report: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                "make it again with `mambacompress evaluate`",
            ) from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{file} is no report: {error}", "name a report.json") from error

    def markdown(self) -> str:
        """The report as Markdown tables."""
        from mambacompress.eval.render import markdown

        return markdown(self)

    def html(self) -> str:
        """The report as one self-contained page."""
        from mambacompress.eval.render import html

        return html(self)


def merged(paths: Iterable[str | Path]) -> Report:
    """One report of several report files or directories; raises UserError where none is named."""
    reports = [Report.load(path) for path in paths]
    if not reports:
        raise UserError("no report was named", "name a report.json or the directory that holds it")
    return reports[0].merge(*reports[1:])


def _text_change(
    row: ModelResult, text: TextResult, reference: ModelResult | None
) -> tuple[TextChange | None, list[str]]:
    other = _counterpart(reference.texts if reference else [], text.text, lambda found: found.text)
    if reference is None or other is None or row.name == reference.name:
        return None, []
    if other.fingerprint != text.fingerprint:
        return None, [f"not comparable: {row.name} and {reference.name} read other tokens or windows of {text.text}"]
    change = stats.perplexity_change(text.window_nll, other.window_nll, text.window_tokens)
    return TextChange(
        ratio=change.ratio.value, ratio_se=change.ratio.se, delta=change.delta.value, delta_se=change.delta.se
    ), []


def _task_change(
    row: ModelResult, task: TaskResult, reference: ModelResult | None
) -> tuple[TaskChange | None, list[str]]:
    other = _counterpart(
        reference.tasks if reference else [], (task.task, task.metric), lambda found: (found.task, found.metric)
    )
    if reference is None or other is None or row.name == reference.name:
        return None, []
    if other.fingerprint != task.fingerprint:
        return None, [f"not comparable: {row.name} and {reference.name} answered other questions of {task.task}"]
    if task.metric == "perplexity":
        shift = stats.mean([b - a for a, b in zip(task.values, other.values, strict=True)])
        ratio = math.exp(shift.value)
        return TaskChange(
            delta=ratio - 1, se=None if shift.se is None else ratio * shift.se, gained=None, lost=None
        ), []
    change = stats.accuracy_change(task.values, other.values)
    return TaskChange(delta=change.delta.value, se=change.delta.se, gained=change.gained, lost=change.lost), []


def _counterpart(rows: list[Any], key: Any, key_of: Any) -> Any:
    return next((found for found in rows if key_of(found) == key), None)
