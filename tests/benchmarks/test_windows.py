"""The windows every figure is measured on, and the paired statistics."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.windows import Ratio, documents, perplexity, perplexity_ratio, windows


class Letters:
    """A tokenizer of one token a character; the end of text is 0."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(["abc", "de", "fghij"])]
    path.write_text("\n".join([*lines, "", ""]))
    return path


def test_documents_are_joined_by_the_end_of_text_and_cut(jsonl: Path) -> None:
    got = windows(Letters(), jsonl, length=4, count=None)
    flat = [ord(c) for c in "abc"] + [0] + [ord(c) for c in "de"] + [0] + [ord(c) for c in "fghij"]
    assert got.dtype == np.int64
    assert got.tolist() == [flat[0:4], flat[4:8], flat[8:12]]


def test_the_first_windows_do_not_depend_on_how_many_are_taken(jsonl: Path) -> None:
    everything = windows(Letters(), jsonl, length=3, count=None)
    for count in range(1, len(everything) + 1):
        assert np.array_equal(windows(Letters(), jsonl, length=3, count=count), everything[:count])


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_text_files_are_one_document_and_keep_their_line_ends(tmp_path: Path, suffix: str) -> None:
    text = "a\r\nb é\n\n c"
    path = tmp_path / f"file.name.txt{suffix}"
    path.write_bytes({"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix](text.encode()))
    assert list(documents(path)) == [text]


def test_what_cannot_be_read_says_why(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="line 1: no field 'text'"):
        list(documents(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match=r"neither \.txt nor \.jsonl"):
        list(documents(tmp_path / "x.parquet.gz"))
    with pytest.raises(ValueError, match="holds 3 windows of 4 tokens, 9 asked for"):
        windows(Letters(), jsonl, length=4, count=9)
    with pytest.raises(ValueError, match="count must be 1 or more"):
        windows(Letters(), jsonl, length=4, count=0)
    with pytest.raises(ValueError, match="predicts nothing"):
        windows(Letters(), jsonl, length=1)


def test_the_ratio_of_equal_losses_is_one() -> None:
    nll_W = np.array([1.0, 2.0, 3.0])
    assert perplexity(nll_W) == pytest.approx(math.exp(2.0))
    assert perplexity_ratio(nll_W, nll_W) == Ratio(1.0, 0.0)


def test_pairing_cancels_what_windows_have_in_common() -> None:
    generator = np.random.default_rng(0)
    hard_W = generator.normal(4.0, 1.0, 400)
    noise_W = generator.normal(0.001, 0.002, 400)
    ratio = perplexity_ratio(hard_W + noise_W, hard_W)
    assert ratio.ratio == pytest.approx(math.exp(noise_W.mean()), rel=1e-12)
    assert ratio.se == pytest.approx(ratio.ratio * noise_W.std(ddof=1) / 20, rel=1e-9)
    assert abs(ratio.ratio - math.exp(0.001)) < 4 * ratio.se


def test_a_single_window_has_no_standard_error_and_others_cannot_be_paired() -> None:
    assert math.isnan(perplexity_ratio(np.ones(1), np.ones(1)).se)
    with pytest.raises(ValueError, match="cannot be paired"):
        perplexity_ratio(np.ones(3), np.ones(4))
