"""``mambacompress distill``: students come out, mistakes are a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mambacompress.cli import app

SHORT = ["train.steps=4", "train.warmup=1", "train.batch=4"]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def distill(*arguments: str | Path, settings: list[str] = SHORT) -> Any:
    return CliRunner().invoke(app, ["distill", *map(str, arguments), *(p for s in settings for p in ("--set", s))])


def test_a_language_student(model_directory: Any, tmp_path: Path):
    (tmp_path / "text.txt").write_text("a text to learn from, line by line.\n" * 60)
    out = tmp_path / "half"
    done = distill(model_directory("mamba"), "--recipe", "distill-half", "--text", tmp_path / "text.txt", "--eval-text",
                   tmp_path / "text.txt", "--out", out, settings=[*SHORT, "train.length=16"])
    assert done.exit_code == 0, done.output
    assert "held-out perplexity of the student" in done.output
    assert (out / "model" / "config.json").is_file()
    again = distill(model_directory("mamba"), "--recipe", "distill-half", "--text", tmp_path / "text.txt", "--out", out)
    assert again.exit_code == 2
    assert "--resume" in again.output


def test_a_chain_of_image_students(tmp_path: Path):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "mnist.npz", **{f"{kind}_{split}": generator.integers(0, high, shape).astype(np.uint8)
                                        for split, count in (("train", 40), ("test", 12))
                                        for kind, high, shape in (("x", 256, (count, 28, 28)), ("y", 10, (count,)))})
    out = tmp_path / "run"
    done = distill("--recipe", "pkd-mnist", "--images", tmp_path, "--out", out, settings=[
        *SHORT, "teacher.train.steps=3", "teacher.train.warmup=1", "teacher.train.batch=4", "single=null",
        "students=[{width: 4, depth: 1, patch: 7}, {width: 3, depth: 1, patch: 14, rank: 1}]"])
    assert done.exit_code == 0, done.output
    assert "student-2" in done.output
    assert {"progressive.json", "progressive.md", "progressive.html", "models"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--recipe", "pkd-mnist"], "name their folder with --images"), (["--recipe", "distill-half"], "needs a teacher"),
    (["--recipe", "distil-half"], "did you mean 'distill-half'"),
    (["--recipe", "pkd-mnist", "--images", "nowhere"], "there is no file")])
def test_mistakes_are_a_sentence(arguments: list[str], message: str, tmp_path: Path):
    done = distill(*arguments, "--out", tmp_path / "out", settings=[])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
