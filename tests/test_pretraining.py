"""``mc.train``: what is written, that the card's figures are the run's own, and that a stopped run loses nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mambacompress as mc
from mambacompress.errors import UserError
from mambacompress.eval.perplexity import window_losses
from mambacompress.eval.windows import make_windows
from mambacompress.pretraining import Trained
from tests.training.toy import tiny_recipe

TEXTS = ["def add(a, b):\n    return a + b\n" * 30, "class Point:\n    x: int = 0  # naïve → é\n" * 30]
HELD_OUT = "def sub(a, b):\n    return a - b\n" * 40


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def trained(out: Path, **options: Any) -> Trained:
    return mc.train(tiny_recipe(), out, **({"texts": TEXTS} | options))


def card(made: Trained) -> dict[str, str]:
    """The rows of the card's table."""
    text = (made.directory / "README.md").read_text("utf-8")
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", text, re.M))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def test_everything_is_written_and_the_card_is_computed(tmp_path: Path):
    events: list[tuple[str, int, int]] = []
    out = tmp_path / "run"
    changes = {"steps": 24, "learning_rate": 0.01, "accumulate": 2, "precision": "fp32"}
    made = trained(out, eval_texts=HELD_OUT, overrides=changes,
                   progress=lambda stage, done, total, figures: events.append((stage, done, total)))
    assert made.directory == out / "model"
    assert {path.name for path in out.iterdir()} == {
        "model", "tokenizer", "checkpoint.safetensors", "trainer.json", "training.jsonl", "training.html"}
    logged = rows(out)
    assert [row["step"] for row in logged] == list(range(24))
    assert [row["tokens"] for row in logged] == [32 * (i + 1) for i in range(24)]
    assert events[:24] == [("training", i + 1, 24) for i in range(24)]
    assert {stage for stage, *_ in events[24:]} == {"evaluating"}
    assert made.loss == pytest.approx((logged[-2]["loss"] + logged[-1]["loss"]) / 2)  # of a tenth of the run

    tokenizer = mc.load_tokenizer(made.directory)
    ids = tokenizer(HELD_OUT, add_special_tokens=False)["input_ids"]
    windows = make_windows(torch.tensor(ids))
    by_hand = math.exp(sum(window_losses(made.model, windows)) / sum(windows.counts))
    assert made.perplexity is not None
    assert made.perplexity.value == pytest.approx(by_hand, rel=1e-6)

    facts = card(made)
    assert facts == dict(made.facts)
    count = sum(parameter.numel() for parameter in made.model.parameters())
    assert facts["architecture"].startswith(f"mamba, {count:,} parameters; ")
    assert "num_hidden_layers 2" in facts["architecture"]
    assert facts["text (SHA-256)"] == hashlib.sha256(b"".join(text.encode() + b"\0" for text in TEXTS)).hexdigest()
    assert facts["text"].startswith(f"2 documents, {sum(map(len, TEXTS)):,} characters, ")
    assert facts["steps"] == "24 of 2 x 16 tokens in 2 accumulations"
    assert facts["tokens seen"].startswith("768 (")
    assert facts["schedule"] == "cosine: 2 steps of warm-up to 0.01, at the end 0.05 of it"
    assert (facts["precision"], facts["seed"], facts["vocabulary"]) == ("fp32", "0", "280")
    assert facts["final training loss"].startswith(f"{made.loss:.4f} nats")
    assert facts["held-out perplexity"].startswith(f"{made.perplexity.value:.2f} ")
    assert f"{sum(windows.counts):,} tokens" in facts["held-out perplexity"]
    assert f"accelerate {importlib.metadata.version('accelerate')}" in facts["versions"]
    page = (out / "training.html").read_text("utf-8")
    assert facts["text (SHA-256)"] in page
    assert 'class="raw"' in page


def test_a_stopped_run_shows_its_curve_and_goes_on_to_the_same_files(tmp_path: Path):
    whole = trained(tmp_path / "whole")

    def stop(stage: str, done: int, total: int, figures: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", progress=stop)
    assert len(rows(tmp_path / "cut")) == 3
    assert "interrupted" in (tmp_path / "cut" / "training.html").read_text("utf-8")
    assert not (tmp_path / "cut" / "model").exists()
    again = trained(tmp_path / "cut", resume=True)
    for name in ("training.jsonl", "training.html", "model/model.safetensors", "model/README.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert again.loss == whole.loss
    assert again.perplexity is None
    assert "held-out perplexity" not in card(again)
    measured = trained(tmp_path / "cut", resume=True, eval_texts=[HELD_OUT])  # a finished run can still be measured
    assert measured.loss == whole.loss
    assert "held-out perplexity" in card(measured)


@pytest.mark.parametrize(("recipe", "options", "message"), [
    ("demmo", {}, "did you mean 'demo'"),
    ("demo", {"overrides": ["stepz=5"]}, "did you mean 'steps'"),
    ("demo", {"texts": [" \n"]}, "the training text is empty"),
    ("demo", {"texts": TEXTS, "eval_texts": ""}, "the evaluation text is empty"),
    ("english-mamba1", {"texts": TEXTS, "tokenizer": "no/such"}, "no/such"),
    ("english-mamba1", {"tokenizer": "demo"}, "no text of its own"),
])
def test_what_cannot_work_is_said_before_anything_is_written(tmp_path: Path, recipe: str, options: dict[str, Any],
                                                             message: str):
    with pytest.raises(UserError, match=message):
        mc.train(recipe, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_may_come_from_another_model(tmp_path: Path):
    made = trained(tmp_path, tokenizer="demo", overrides=["steps=3", "warmup=0"])
    assert made.facts["vocabulary"] == "4,096"
    assert len(mc.load_tokenizer(made.directory)) == 4096
    assert not (tmp_path / "tokenizer").exists()
