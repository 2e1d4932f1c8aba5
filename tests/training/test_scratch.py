"""From a recipe and a text to a model directory that loads, resumes and names what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambacompress.errors import UserError
from mambacompress.training import scratch
from mambacompress.training.recipes import RECIPES, TrainingRecipe
from mambacompress.training.scratch import run, train_tokenizer
from tests.training.toy import tiny_recipe

TEXTS = ["def add(a, b):\n    return a + b\n" * 30, "class Point:\n    x: int = 0  # naïve → é\n" * 30]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TrainingRecipe:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tiny_recipe()


def test_a_run_writes_a_model_that_loads_and_an_interrupted_one_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: TrainingRecipe):
    import mambacompress as mc

    rows: list[dict[str, Any]] = []
    made = run(tiny, tmp_path / "whole", texts=TEXTS, report=rows.append)
    directory = made.directory
    assert [row["step"] for row in rows] == list(range(6))
    assert (made.first, made.vocabulary, made.text.documents) == (True, 280, 2)
    assert made.text.characters == sum(map(len, TEXTS))
    assert made.recipe.train.precision in ("bf16", "fp32")
    model, tokenizer = mc.load(directory), mc.load_tokenizer(directory)
    assert len(tokenizer) == model.config.vocab_size == 280
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.float16}
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == TEXTS[1]

    real = scratch.train

    def cut(*args: Any, **kwargs: Any) -> Any:
        for row in real(*args, **kwargs):
            yield row
            if row["step"] == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scratch, "train", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "cut", texts=TEXTS)
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny, tmp_path / "cut", texts=TEXTS)
    again = run(tiny, tmp_path / "cut", texts=TEXTS, resume=True).directory
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name


def test_the_tokenizer_is_deterministic_and_covers_every_byte():
    first, second = (train_tokenizer(TEXTS, 320).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    tokenizer = train_tokenizer(TEXTS, 320)
    strange = "".join(map(chr, [*range(1, 0x250), 0x4E2D, 0x1F600])) + "\r\n\t  x"
    ids = tokenizer(strange, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == strange
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize(("name", "given", "message"), [
    ("english-mamba1", {}, "no text of its own.*--text"),
    ("english-mamba2", {"texts": TEXTS}, "no tokenizer of its own.*--tokenizer"),
])
def test_what_is_missing_is_named(tmp_path: Path, name: str, given: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        run(RECIPES[name], tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
