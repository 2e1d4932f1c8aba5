"""The embedded demo model: small, whole, and as good as its card says."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import mambacompress as mc
from mambacompress.data import encode, stdlib_texts
from mambacompress.eval.perplexity import window_losses
from mambacompress.eval.windows import make_windows

WINDOWS = 12


@pytest.fixture(scope="module")
def directory(repository: Path) -> Path:
    return repository / "mambacompress" / "demo"


@pytest.fixture(scope="module")
def model() -> Any:
    return mc.load("demo")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return mc.load_tokenizer("demo")


def card_perplexity(directory: Path, split: str) -> float:
    row = re.search(rf"^\| {split}\b[^|]*\|[^|]*\| ([\d.]+) \|$", (directory / "README.md").read_text("utf-8"), re.M)
    assert row, f"the card has no perplexity of {split}"
    return float(row[1])


def test_it_is_small_fp16_and_of_one_file(directory: Path):
    assert {path.name for path in directory.glob("*.safetensors")} == {"model.safetensors"}
    assert (directory / "model.safetensors").stat().st_size <= 6_000_000
    assert not [path for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    parameters = 0
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor).all(), name
            parameters += tensor.numel()
    assert 1_000_000 <= parameters <= 3_000_000
    assert f"{parameters / 1e6:.2f} M parameters" in (directory / "README.md").read_text("utf-8")


def test_it_is_the_model_of_its_training_recipe(model: Any, tokenizer: Any):
    from mambacompress.training.recipes import RECIPES

    recipe = RECIPES["demo"]
    assert model.config.model_type == recipe.kind
    assert {key: getattr(model.config, key) for key in recipe.config} == recipe.config
    assert len(tokenizer) == model.config.vocab_size == recipe.vocabulary
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_its_card_holds_the_command_the_seed_and_the_figures(directory: Path):
    card = (directory / "README.md").read_text("utf-8")
    for needed in ("mambacompress train demo", "seed 0", "3,000 steps", "license: apache-2.0"):
        assert needed in card
    train, valid, test = (card_perplexity(directory, split) for split in ("train", "valid", "test"))
    assert 1 < train < valid
    assert 1 < train < test


@pytest.mark.parametrize("split", ["valid", "test"])
def test_its_tokenizer_round_trips_source_code(tokenizer: Any, split: Any):
    for text in stdlib_texts(split)[:8]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert len(text) / len(ids) > 2  # characters a token: it knows source code


def test_its_tokenizer_round_trips_any_text(tokenizer: Any):
    text = "naïve → 中文 😀\r\n\tif x!=y :  z\x00 'don't'"
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_held_out_perplexity_is_what_the_card_says(directory: Path, model: Any, tokenizer: Any):
    """On every so many windows of the test split; other Python versions have other modules, hence the wide margin."""
    tokens_L = encode(tokenizer, stdlib_texts("test"))
    whole = make_windows(tokens_L, context=512)
    starts = [whole.spans[i * len(whole.spans) // WINDOWS][0] for i in range(WINDOWS)]
    sample = make_windows(torch.cat([tokens_L[start : start + 512] for start in starts]), context=512)
    perplexity = math.exp(sum(window_losses(model, sample)) / sum(sample.counts))
    assert card_perplexity(directory, "test") == pytest.approx(perplexity, rel=0.3)


def test_it_writes_something_like_source_code(model: Any, tokenizer: Any):
    written = "".join(mc.generate(model, "import os\n\ndef ", 24, tokenizer=tokenizer))
    assert len(written.strip()) > 8
    assert re.search(r"[(:_.]", written)
    assert written == "".join(mc.generate(model, "import os\n\ndef ", 24, tokenizer=tokenizer))
