"""Medians, quartiles and ratios of a benchmark, as a table and as a file.

A ratio is of two rates of the same round; its median and quartiles are over the rounds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambacompress import storage
from mambacompress.bench.race import MEASURES

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        if not values:
            return None
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Result:
    """What ``bench`` measured. document: plain data, the content of the JSON file."""

    document: dict[str, Any]

    @property
    def ran(self) -> bool:
        """Whether any contestant has a figure."""
        return any(row["rates"] for run in self.document["runs"] for row in run["contestants"])

    def rate(self, threads: int, name: str, measure: str) -> Spread | None:
        """Tokens a second, None where it was not measured."""
        return Spread.of(self._rates(threads, name, measure))

    def ratio(self, threads: int, name: str, other: str, measure: str) -> Spread | None:
        """How many times as fast as ``other``, None where one of them was not measured."""
        pairs = zip(self._rates(threads, name, measure), self._rates(threads, other, measure), strict=False)
        return Spread.of([ours / theirs for ours, theirs in pairs])

    def columns(self) -> list[str]:
        """The table's head."""
        chosen, reference = self.document["settings"], self.document["reference"]
        times = [f"x {reference}"] if reference else []
        head = ["threads", "", "file MB", "memory MB", "top-1"]
        for title in (f"prefill {chosen['prompt']}", "decode", f"decode, batch {chosen['batch']}"):
            head += [title, *times]
        return head

    def rows(self) -> Iterable[list[str]]:
        """The table's lines: tokens a second, medians; ratios with their quartiles."""
        reference = self.document["reference"]
        for run in self.document["runs"]:
            for row in run["contestants"]:
                top1 = row["likeness"].get("top1")
                cells = [str(run["threads"]), row["name"], _megabytes(row["files"]), _megabytes(taken(row))]
                cells.append("" if top1 is None else f"{top1:.2f}")
                for measure in MEASURES:
                    rate = self.rate(run["threads"], row["name"], measure)
                    cells.append("-" if rate is None else f"{rate.median:,.0f}")
                    if reference:
                        cells.append(_times(self.ratio(run["threads"], row["name"], reference, measure)))
                yield cells

    def remarks(self) -> list[str]:
        """Who did not take part, and how to read the table."""
        chosen = self.document["settings"]
        failed = {row["name"]: row["error"] for run in self.document["runs"] for row in run["contestants"]}
        out = [*((item["name"], item["reason"]) for item in self.document["left_out"])]
        out += [(name, error) for name, error in failed.items() if error]
        return [f"{name} is left out: {reason.rstrip('.')}." for name, reason in out] + [
            f"Tokens a second, medians of {chosen['rounds']} rounds in which all took turns; ratios are of one round, "
            "median (quartiles). Memory: the peak above the imported libraries, mapped weights included, "
            "of loading, prefill and single decode. top-1: how often the most likely token is the float model's on two "
            "random prompts."
        ]

    def markdown(self) -> str:
        """The table and its remarks as Markdown."""
        head = self.columns()
        lines = ["| " + " | ".join(head) + " |", "|---:|---|" + "---:|" * (len(head) - 2)]
        lines += ["| " + " | ".join(cells) + " |" for cells in self.rows()]
        return "\n".join([*lines, "", *self.remarks()]) + "\n"

    def save(self, file: str | Path) -> tuple[Path, Path]:
        """Write FILE (JSON) and the Markdown table beside it, under the same stem; returns both."""
        target = Path(file)
        page = target.with_suffix(".md")
        storage.make_directory(target.parent)
        storage.write_text(target, json.dumps(self.document, indent=1) + "\n")
        storage.write_text(page, self.markdown())
        return target, page

    def _rates(self, threads: int, name: str, measure: str) -> list[float]:
        for run in self.document["runs"]:
            for row in run["contestants"]:
                if run["threads"] == threads and row["name"] == name:
                    found: list[float] = row["rates"].get(measure, [])
                    return found
        return []


def taken(row: dict[str, Any], kind: str = "resident") -> int | None:
    """Peak bytes that loading, a prefill and a single decode added to the imported libraries; ``kind`` anonymous leaves
    out what is mapped from files.
    """
    start, *peaks = (row["memory"].get(stage, {}).get(kind) for stage in ("start", "load", "prefill", "decode"))
    known = [peak for peak in peaks if peak is not None]
    return max(known) - start if known and start is not None else None


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f}"


def _times(ratio: Spread | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


__all__ = ["SCHEMA_VERSION", "Result", "Spread", "taken"]
