"""Text in, tokens out: files, the standard library, windows and the training stream."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambacompress.data import (
    calibration_texts,
    encode,
    load_tokenizer,
    read_texts,
    split_of,
    stdlib_modules,
    stdlib_texts,
    token_windows,
    training_batches,
)
from mambacompress.errors import UserError


class Letters:
    """A tokenizer of single characters; 0 ends a text."""

    eos_token_id: int | None = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) % 90 + 1 for letter in text] for text in texts]}


class Endless(Letters):
    eos_token_id = None


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".xz", ".gz"])
def test_every_kind_of_file_is_read(tmp_path: Path, packed: str):
    opener: Any = {"": open, ".xz": lzma.open, ".gz": gzip.open}[packed]
    for name, content in (("a.txt", "one\n\nstill one é"), ("b.jsonl", rows("two", "", "three"))):
        with opener(tmp_path / (name + packed), "wt", encoding="utf-8") as file:
            file.write(content)
    assert read_texts([tmp_path / f"a.txt{packed}", str(tmp_path / f"b.jsonl{packed}")]) == [
        "one\n\nstill one é", "two", "three"]
    assert read_texts(tmp_path / f"a.txt{packed}") == ["one\n\nstill one é"]


def test_unicode_line_separators_do_not_split_a_row(tmp_path: Path):
    row = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row + "\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == ["a\u2028b\x85c"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.txt", b"", "holds no text"),
    ("a.txt", b" \n\t\n", "holds no text"),
    ("a.jsonl", b"", "holds no text"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2 of"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', "no string field 'text': its fields are 'body', 'id'"),
    ("a.jsonl", b'{"text": 3}\n', "no string field 'text'"),
    ("a.jsonl", b'["text"]\n', "it is no object"),
    ("a.txt", b"caf\xe9", "is not UTF-8"),
    ("a.txt.xz", b"not xz at all", "is damaged or not a .xz file"),
    ("a.txt.gz", b"not gz at all", "is damaged or not a .gz file"),
    ("a.txt.xz", lzma.compress(b"text" * 999)[:-20], "is damaged or not a .xz file"),
    ("a.txt.gz", gzip.compress(bytes(range(256)) * 4, mtime=0)[:-20], "is damaged or not a .gz file"),
    ("a.csv", b"a,b", "neither .txt nor .jsonl"),
    ("a", b"a", "neither .txt nor .jsonl"),
    ("a.xz", b"a", "neither .txt nor .jsonl"),
])
def test_a_bad_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, said: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_texts(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.next_step


def test_a_missing_file_names_its_neighbour(tmp_path: Path):
    (tmp_path / "novels.jsonl").write_text(rows("x"))
    with pytest.raises(UserError, match=r"did you mean 'novels\.jsonl'"):
        read_texts(tmp_path / "novel.jsonl")
    with pytest.raises(UserError, match="there is no file"):
        read_texts(tmp_path / "no" / "such" / "folder.txt")
    with pytest.raises(UserError, match="is a directory"):
        read_texts(tmp_path)
    with pytest.raises(UserError, match="no text file was named"):
        read_texts([])


# -- the standard library --------------------------------------------------------------------------------------------


def test_the_split_is_by_module_and_covers_everything():
    modules = stdlib_modules()
    assert list(modules) == sorted(modules)
    assert {"json.decoder", "argparse", "asyncio"} <= set(modules)
    assert not any(name.split(".")[0] in ("test", "idlelib", "site-packages", "encodings") for name in modules)
    sides = [split_of(name) for name in modules]
    assert {side: sides.count(side) / len(sides) > 0.02 for side in set(sides)} == dict.fromkeys(
        ("train", "valid", "test"), True)
    assert sides.count("train") / len(sides) > 0.75


def test_the_split_never_changes():
    assert [split_of(name) for name in ("argparse", "textwrap", "timeit", "ftplib", "json.decoder", "sched")] == [
        "train", "test", "test", "test", "train", "test"]


def test_stdlib_texts_are_deterministic_and_disjoint():
    train, valid, test = (stdlib_texts(split) for split in ("train", "valid", "test"))
    assert train == stdlib_texts("train")
    assert not set(test) & set(train)
    assert not set(valid) & set(train)
    assert sum(map(len, train)) > 3_000_000
    assert sum(map(len, test)) > 100_000
    assert calibration_texts("demo") == train


def test_a_python_without_source(tmp_path: Path):
    with pytest.raises(UserError, match="without the source"):
        stdlib_texts("train", tmp_path)
    with pytest.raises(UserError, match="no split 'eval'"):
        stdlib_texts("eval")  # type: ignore[arg-type]


def test_a_folder_s_tests_and_tables_are_left_out(tmp_path: Path):
    for name in ("a.py", "p/__init__.py", "p/b.py", "p/test/c.py", "test_d.py", "encodings/e.py", "_sysconfigdata_x.py",
                 "config-3.11/f.py", "site-packages/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(stdlib_modules(tmp_path)) == ["a", "p", "p.b"]


# -- windows ---------------------------------------------------------------------------------------------------------


class Unique(Endless):
    """Every character its own token, so that an overlap shows."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_windows_are_text_and_never_overlap():
    texts = ["".join(chr(0x4E00 + 500 * i + j) for j in range(500)) for i in range(20)]
    windows = token_windows(Unique(), texts, sequences=50, length=64, seed=3)
    assert windows.shape == (50, 64)
    assert windows.dtype == torch.int64
    assert windows.unique().numel() == windows.numel()
    assert (windows.diff() == 1).float().mean() > 0.98, "windows are not running text"
    assert windows.max() - windows.min() > 7000, "windows come from one corner of the text"
    assert torch.equal(windows, token_windows(Unique(), texts, sequences=50, length=64, seed=3))
    assert not torch.equal(windows, token_windows(Unique(), texts, sequences=50, length=64, seed=4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="abc\n", max_size=200), max_size=12), st.integers(1, 6), st.integers(1, 40),
       st.integers(0, 99))
def test_windows_use_every_token_or_say_how_many_there_are(texts: list[str], sequences: int, length: int, seed: int):
    available = sum(len(text) for text in texts if text.strip())
    needed = sequences * length
    cut = sum(text.count("\n") for text in texts)  # a blank piece is dropped, at most a few line ends
    if available >= needed + cut:
        windows = token_windows(Endless(), texts, sequences, length, seed)
        assert windows.shape == (sequences, length)
    elif available < needed:
        with pytest.raises(UserError, match="tokens"):
            token_windows(Endless(), texts, sequences, length, seed)


def test_too_little_text_says_how_much_there_is_and_what_to_ask_for():
    with pytest.raises(UserError) as caught:
        token_windows(Letters(), ["x" * 100], sequences=8, length=32)
    assert caught.value.message == "the text holds 100 tokens, 8 sequences of 32 need 256"
    assert "--set calibration.sequences=3" in (caught.value.next_step or "")
    with pytest.raises(UserError, match="holds 5 tokens") as caught:
        token_windows(Letters(), ["abcde"], sequences=8, length=32)
    assert "one sequence alone needs 32" in (caught.value.next_step or "")
    with pytest.raises(UserError, match="holds 0 tokens"):
        token_windows(Letters(), [], sequences=8, length=32)
    with pytest.raises(UserError, match="is no request"):
        token_windows(Letters(), ["abc"], sequences=0, length=32)


def test_documents_are_separated_where_the_tokenizer_can():
    assert encode(Letters(), ["ab", "c"]).tolist() == [8, 9, 0, 10]
    assert encode(Endless(), ["ab", "c"]).tolist() == [8, 9, 10]
    assert encode(Letters(), []).shape == (0,)


# -- the training stream ---------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_window_once_and_the_next_another_cut():
    tokens = torch.arange(1000)
    stream = training_batches(tokens, batch=4, length=10, seed=1)
    epoch = [next(stream) for _ in range(24)]
    starts = torch.cat(epoch)[:, 0]
    assert len(set(starts.tolist())) == 96
    assert all((row.diff() == 1).all() for batch in epoch for row in batch)
    assert set(starts.tolist()) != set(torch.cat([next(stream) for _ in range(24)])[:, 0].tolist())


@pytest.mark.parametrize("start", [0, 1, 23, 24, 60])
def test_a_stream_resumes_where_it_was(start: int):
    tokens = torch.arange(1000)
    whole = training_batches(tokens, batch=4, length=10, seed=5)
    for _ in range(start):
        next(whole)
    resumed = training_batches(tokens, batch=4, length=10, seed=5, start=start)
    for _ in range(30):
        assert torch.equal(next(whole), next(resumed))


def test_a_stream_of_too_little_text():
    with pytest.raises(UserError, match="holds 40 tokens, one batch of 4 x 10 needs 50"):
        next(training_batches(torch.arange(40), batch=4, length=10))
    assert next(training_batches(torch.arange(50), batch=4, length=10)).shape == (4, 10)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in caught.value.message


def test_a_real_tokenizer_on_real_text(shared: Path):
    tokenizer = load_tokenizer(shared / "models" / "mamba1-en")
    texts = read_texts(shared / "data" / "lm" / "valid_novels.jsonl.xz")
    windows = token_windows(tokenizer, texts, sequences=6, length=128, seed=0)
    together = "\n".join(texts)
    assert sum(tokenizer.decode(row) in together for row in windows) >= 3
