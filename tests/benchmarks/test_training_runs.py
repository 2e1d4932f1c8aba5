"""The benchmarks of trained compression: they finish what was begun, and their tables follow from what ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soups, sparsity


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    lines = [f"a small text, line {i} of many, for a small model" for i in range(300)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "valid.txt").write_text("\n".join(lines[:40]))
    return ["--train", str(tmp_path / "train.txt"), "--valid", str(tmp_path / "valid.txt"), "--batch", "2",
            "--length", "16", "--windows", "4"]


def test_sparsity(model_directory: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparsity, "CALIBRATION", (4, 16))
    out = tmp_path / "sparsity.json"
    common = [str(model_directory()), *texts, "--out", str(out), "--tokens", "128", "--rates", "1e-3",
              "--precision", "fp32"]
    sparsity.main([*common, "--methods", "dense", "--one-shot"])
    beside = sparsity.Results(out, {})
    sparsity.main([*common, "--methods", "dense,sr-ste,cast"])
    said = capsys.readouterr().out
    assert said.count("dense-0.001-seed0-128 (") == 1  # it stood there
    beside.add("another", beside.document["runs"]["original"])
    runs = json.loads(out.read_text())["runs"]
    assert {"original", "another", "2of4-cast-0.001-seed0-128", "2of4-oneshot-sparsegpt-rotated"} <= set(runs)
    assert runs["2of4-sr-ste-0.001-seed0-128"]["zeros"] == 0.5
    assert runs["2of4-dense-0.001-seed0-128"]["zeros"] < 0.01
    ratio = runs["2of4-cast-0.001-seed0-128"]["perplexity"] / runs["2of4-dense-0.001-seed0-128"]["perplexity"]
    assert f"| 2:4 | cast | 128 | 0.001 | 1 | {runs['2of4-cast-0.001-seed0-128']['perplexity']:.3f}" in said
    assert f"| {ratio:.4f} ± " in said
    with pytest.raises(SystemExit, match="another windows"):
        sparsity.main([*common, "--windows", "3"])


def test_soups(model_directory: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = [str(model_directory()), *texts, "--out", str(tmp_path / "soups"), "--steps", "2", "--replicas", "2",
              "--vary", "seed"]
    soups.main([*common, "--retrain", "SLR"])
    capsys.readouterr()
    soups.main([*common, "--retrain", "SLR,FT"])
    said = capsys.readouterr().out
    assert said.count("phase0-replica0: step 2/2") == 1  # SLR stood there
    cooked = json.loads((tmp_path / "soups" / "soups.json").read_text())
    assert [(soup["vary"], soup["retrain"]) for soup in cooked] == [("seed", "SLR"), ("seed", "FT")]
    last = cooked[1]["phases"][-1]
    assert f"| {last['soup'] / last['compute_matched']:.4f} |" in said
