"""The report: saved, loaded, merged; comparisons only where they mean something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mambacompress.errors import UserError
from mambacompress.eval.report import Report, merged
from mambacompress.eval.schema import SCHEMA_VERSION
from tests.eval.factory import made_up_report


def test_a_saved_report_comes_back_whole(tmp_path: Path) -> None:
    report = made_up_report()
    report.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}
    back = Report.load(tmp_path)
    assert back.compared().model_dump(mode="json") == report.model_dump(mode="json")
    raw = json.loads((tmp_path / "report.json").read_text())
    assert set(raw["models"][0]["tasks"][0]["values"]) == {"0", "1"}  # answers are one string


def test_merging_pairs_models_measured_apart(tmp_path: Path) -> None:
    whole = made_up_report()
    parts = [
        Report(
            created=f"2026-01-0{day}T00:00:00+00:00",
            baseline="original" if day == 1 else None,
            models=[row.model_copy(deep=True) for row in rows],
        )
        for day, rows in ((1, whole.models[:3]), (2, whole.models[3:]))
    ]
    for part in parts[1].models:
        for text in part.texts:
            text.change = None
    for index, part in enumerate(parts):
        part.save(tmp_path / str(index))
    joined = merged([tmp_path / "0", tmp_path / "1" / "report.json"])
    assert [row.name for row in joined.models] == [row.name for row in whole.models]
    for row, expected in zip(joined.models, whole.models, strict=True):
        for text, other in zip(row.texts, expected.texts, strict=True):
            assert (text.change is None) == (other.change is None)
            if text.change and other.change:
                assert text.change.ratio == pytest.approx(other.change.ratio, rel=1e-7)


def test_a_later_row_of_the_same_name_replaces() -> None:
    first, second = made_up_report(), made_up_report()
    second.models = second.models[1:2]
    second.models[0].description = "newer"
    joined = first.merge(second)
    assert len(joined.models) == len(first.models)
    assert joined.model("rtn-w8a8").description == "newer"


def test_other_windows_do_not_pair() -> None:
    report = made_up_report()
    report.model("w8a8").texts[0].fingerprint = "else"
    report.model("w8a8").tasks[0].fingerprint = "else"
    again = report.compared()
    assert again.model("w8a8").texts[0].change is None
    assert again.model("w8a8").texts[1].change is not None
    assert again.model("w8a8").tasks[0].change is None
    assert sum(note.startswith("not comparable") for note in again.notes) == 2
    assert again.compared().notes == again.notes


def test_changes_follow_the_baseline() -> None:
    report = made_up_report().compared("w8a8")
    assert report.model("w8a8").texts[0].change is None
    change = report.model("original").texts[0].change
    assert change is not None
    assert change.ratio < 1
    task = report.model("original").tasks[0].change
    assert task is not None
    assert task.gained is not None
    assert task.lost is not None
    assert report.model("original").tasks[2].change.gained is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no report"),
        ("[]", "no report"),
        ("{}", "no report"),
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}), "newer mambacompress"),
        (json.dumps({"schema_version": 1, "created": "", "modles": []}), "modles"),
        (
            json.dumps({"schema_version": 1, "created": "", "models": [{"name": "a", "texts": 3}]}),
            r"models\.0\.texts",
        ),
    ],
)
def test_other_files_give_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        Report.load(tmp_path)
    assert caught.value.next_step


def test_a_missing_report_and_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no report"):
        Report.load(tmp_path)
    with pytest.raises(UserError, match="no report was named"):
        merged([])
    with pytest.raises(UserError, match=r"did you mean 'w8a8'"):
        made_up_report().model("w8a")
