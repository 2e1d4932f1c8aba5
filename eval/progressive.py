"""The report of a progressive distillation: operations against accuracy, after one student, after two, ...

``progressive.json`` is the product; Markdown and one page that needs nothing but itself are rendered from it. Every
accuracy is top-1 on the same test images with its standard error; differences to the teacher are paired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from mambacompress import storage
from mambacompress.errors import UserError
from mambacompress.eval.figures import percent, plus_minus, significant
from mambacompress.eval.plot import Chart, Point, svg
from mambacompress.eval.vision import top1, top1_change

FILE = "progressive.json"
TEMPLATES = Path(__file__).parent / "templates"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Accuracy(_Strict):
    """Top-1 and its standard error; delta: to the teacher, paired, with its own."""

    top1: float
    se: float | None
    delta: float
    delta_se: float | None


class ModelRow(_Strict):
    """One model. flops: of one image; share: of the teacher's; alone: its own answers.

    together: of the sum up to and with this one; flops_together, share_together: what that sum costs.
    """

    name: str
    flops: int
    share: float
    parameters: int
    alone: Accuracy
    together: Accuracy | None = None
    flops_together: int | None = None
    share_together: float | None = None


class ProgressiveReport(_Strict):
    """What a run found. rows: the teacher, the students in the order they add up, then the single student."""

    version: int = 1
    recipe: dict[str, Any]
    data: str
    test_images: int
    rows: list[ModelRow]
    facts: dict[str, str]

    def save(self, out: Path) -> None:
        """Write progressive.json, progressive.md and progressive.html into ``out``."""
        storage.write_json(out / FILE, self.model_dump(mode="json"))
        storage.write_text(out / "progressive.md", self.markdown())
        storage.write_text(out / "progressive.html", self.html())

    def markdown(self) -> str:
        """Title, table, facts."""
        head = ["model", "MFLOPs an image", "of the teacher", "parameters", "alone, %", "cumulative MFLOPs",
                "of the teacher", "together, %", "together - teacher, points"]
        lines = [f"# {self.recipe['name']}", "", f"Top-1 on {self.test_images:,} test images of {self.data}.", "",
                 "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in self.table()]
        lines += ["", *(f"- {name}: {value}" for name, value in self.facts.items())]
        return "\n".join(lines) + "\n"

    def table(self) -> list[list[str]]:
        """The rows as text."""
        made = []
        for row in self.rows:
            cells = [row.name, significant(row.flops / 1e6), percent(row.share, 1), f"{row.parameters:,}",
                     _value(row.alone)]
            both = row.together or (row.alone if row.name != "teacher" else None)
            cells += [significant((row.flops_together or row.flops) / 1e6), percent(row.share_together or row.share, 1),
                      _value(row.together) if row.together else "", _delta(both) if both else ""]
            made.append(cells)
        return made

    def chart(self) -> Chart:
        """Cumulative operations against the accuracy of the sum."""
        points = [Point(row.name, row.flops_together or row.flops, 100 * shown.top1,
                        None if shown.se is None else 100 * shown.se,
                        (f"top-1 {_value(shown)} %", f"{(row.flops_together or row.flops) / 1e6:,.3g} MFLOPs, "
                         f"{percent(row.share_together or row.share, 1)} of the teacher"), row.name == "teacher")
                  for row in self.rows for shown in [row.together or row.alone]]
        return Chart("flops", "Top-1", "top-1, %", tuple(points), lambda v: f"{v:g}", True,
                     against="operations an image, cumulative")

    def html(self) -> str:
        """One page, without script or outside file."""
        from jinja2 import Environment, FileSystemLoader

        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                  lstrip_blocks=True)
        return environment.get_template("progressive.html").render(report=self, chart=svg(self.chart(), operations),
                                                                   rows=self.table())


def load_progressive(path: Path) -> ProgressiveReport:
    """The report in ``path`` (a directory, or the JSON file); raises UserError where there is none."""
    file = path / FILE if path.is_dir() else path
    try:
        return ProgressiveReport.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{file} is no report of a progressive distillation", "name the --out of one") from error


def rows_of(names: Sequence[str], flops: Sequence[int], parameters: Sequence[int], logits: Sequence[Tensor],
            labels_N: Tensor, chained: int) -> list[ModelRow]:
    """Rows of the teacher, of ``chained`` students in their order, and of whatever is beside them.

    names, flops, parameters, logits ([N, K] on the test images): one each, the teacher first.
    """
    teacher_NK, rows = logits[0], []
    for i, (name, cost, size, own_NK) in enumerate(zip(names, flops, parameters, logits, strict=True)):
        row = ModelRow(name=name, flops=cost, share=cost / flops[0], parameters=size,
                       alone=_accuracy(own_NK, teacher_NK, labels_N))
        if 1 <= i <= chained:
            spent = sum(flops[1:i + 1])
            total_NK = sum(logits[2:i + 1], start=logits[1])
            row.flops_together, row.share_together = spent, spent / flops[0]
            row.together = _accuracy(total_NK, teacher_NK, labels_N)
        rows.append(row)
    return rows


def _accuracy(logits_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor) -> Accuracy:
    own, change = top1(logits_NK, labels_N), top1_change(logits_NK, teacher_NK, labels_N)
    return Accuracy(top1=own.value, se=own.se, delta=change.delta.value, delta_se=change.delta.se)


def _value(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.top1:.2f} {plus_minus(None if accuracy.se is None else 100 * accuracy.se)}".rstrip()


def _delta(accuracy: Accuracy) -> str:
    return (f"{100 * accuracy.delta:+.2f} "
            f"{plus_minus(None if accuracy.delta_se is None else 100 * accuracy.delta_se)}").rstrip()


def operations(count: float) -> str:
    """1,500,000 -> 1.5 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g}"
