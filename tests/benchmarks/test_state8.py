"""The benchmark of int8 states: its figures follow from what ran."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import state8
from mambacompress.models.families import adopt
from mambacompress.models.lm import Decoder, LanguageModel


@pytest.fixture
def lm(tiny_mamba: Any) -> LanguageModel:
    model = LanguageModel(adopt(tiny_mamba))
    model.model_map.host.requires_grad_(False)
    return model


@torch.no_grad()
def test_figures_are_those_of_the_two_decoders(lm: LanguageModel) -> None:
    ids = torch.randint(1, 97, (3, 40))
    row = state8.compare_states(lm, ids)
    logits, _ = lm.prefill(ids[:, :-1])
    loss = F.cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten())
    assert row["perplexity_fp32"] == pytest.approx(math.exp(loss), rel=1e-5)
    _, states = lm.prefill(ids[:, :1])
    decoder, losses = Decoder(lm, states, "int8"), [F.cross_entropy(logits[:, 0].double(), ids[:, 1])]
    losses += [F.cross_entropy(decoder.step(ids[:, t]).double(), ids[:, t + 1]) for t in range(1, 39)]
    assert row["perplexity_int8"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert row["ratio"] == pytest.approx(row["perplexity_int8"] / row["perplexity_fp32"], rel=1e-9)
    assert 0 < row["kl"] < 1e-3
    assert row["kl"] == pytest.approx(sum(row["kl_quarters"]) / 4, rel=0.1)
    assert 0 < row["state_error"] < 0.1
    assert row["recurrent_fp32"] == 2 * 4 * 64 * 8
    assert row["recurrent_int8"] == 2 * (64 * 8 + 4 * 64 + 8)
    assert row["bytes_fp32"] - row["recurrent_fp32"] == row["bytes_int8"] - row["recurrent_int8"] == 2 * 4 * 3 * 64


def test_the_command_writes_both_files(tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import mambacompress

    class Letters:
        eos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 97 for c in text]}

    monkeypatch.setattr(state8, "load_tokenizer", lambda path: Letters())
    monkeypatch.setattr(mambacompress, "load", lambda path: lm)
    text = tmp_path / "text.txt"
    text.write_text("a quick brown fox " * 20, encoding="utf-8")
    out = tmp_path / "state8.json"
    state8.main(["some/model", "other", "--text", str(text), "--tokens", "30", "--windows", "2", "--out", str(out)])
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [row["model"] for row in document["rows"]] == ["model", "other"]
    assert document["rows"][0]["kl"] == document["rows"][1]["kl"] > 0
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert table.count("| model |") == 2  # the head's first cell and the first row's
    assert "2 windows of 30 tokens" in table
    with pytest.raises(SystemExit):
        state8.main(["m", "--text", str(text), "--tokens", "5", "--out", str(out)])
