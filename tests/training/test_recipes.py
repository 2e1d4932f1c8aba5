"""Training recipes: from text to a model directory that loads, resumes and names what is missing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambacompress.errors import UserError
from mambacompress.training import recipes
from mambacompress.training.recipes import RECIPES, run, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n" * 30, "class Point:\n    x: int = 0  # naïve → é\n" * 30]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo recipe, two small blocks and six steps of it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    demo = RECIPES["demo"]
    shape = demo.config | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "time_step_rank": 2,
                           "state_size": 4}
    schedule = replace(demo.train, steps=6, batch=2, length=16, warmup=2)
    small = replace(demo, config=shape, vocabulary=280, train=schedule)
    monkeypatch.setitem(RECIPES, "demo", small)


@pytest.mark.usefixtures("tiny")
def test_a_run_writes_a_model_that_loads_and_an_interrupted_one_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mambacompress as mc

    directory = run("demo", tmp_path / "whole", texts=TEXTS)
    model, tokenizer = mc.load(directory), mc.load_tokenizer(directory)
    assert len(tokenizer) == model.config.vocab_size == 280
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.float16}
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == TEXTS[1]

    real = recipes.train

    def cut(*args: Any, **kwargs: Any) -> Any:
        for row in real(*args, **kwargs):
            yield row
            if row["step"] == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "train", cut)
        with pytest.raises(KeyboardInterrupt):
            run("demo", tmp_path / "cut", texts=TEXTS)
    with pytest.raises(UserError, match="already holds a run"):
        run("demo", tmp_path / "cut", texts=TEXTS)
    again = run("demo", tmp_path / "cut", texts=TEXTS, resume=True)
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
    ("demmo", {}, "did you mean 'demo'"),
    ("english-mamba1", {}, "no text of its own.*--text"),
    ("english-mamba2", {"texts": TEXTS}, "no tokenizer of its own.*--tokenizer"),
])
def test_what_is_missing_is_named(tmp_path: Path, name: str, given: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        run(name, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_the_size_it_is_meant_to_be(name: str, tiny_tokenizer: Any):
    recipe = RECIPES[name]
    one = replace(recipe, config=recipe.config | {"num_hidden_layers": 1})
    model = recipes.build_model(one, tiny_tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    width = recipe.config["hidden_size"]
    block = sum(parameter.numel() for parameter in model.backbone.layers.parameters())
    assert 0.9 < block / (6.5 * width**2) < 1.4  # expansion 2: three times two widths squared, and the small ones


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                             tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["recipes", "english-mamba1", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        recipes.main()
    assert stop.value.code == 2
    assert "Next step: name text files with --text" in capsys.readouterr().err
