"""A tokenizer of single characters and a handful of questions: the tasks without any shared data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "piqa_validation": [
        {"goal": f"open a jar {i}", "sol1": "turn the lid", "sol2": "eat the lid slowly", "label": i % 2}
        for i in range(6)
    ],
    "blimp": [
        {"sentence_good": f"The cat {i} sleeps.", "sentence_bad": f"The cat {i} sleep.", "UID": uid}
        for uid in ("agreement", "island", "binding")
        for i in range(4)
    ]
    + [{"sentence_good": "Same.", "sentence_bad": "Same.", "UID": "twins"}],
    "lambada_openai_test": [
        {
            "text": "\u201cIt\u2019s a dog,\u201d said Ann to Bob",
            "target": "Bob",
            "context": "\u201cIt\u2019s a dog,\u201d said Ann to",
        }
    ]
    * 2,
    "arc_challenge_test": [
        {"id": "a", "question": "Which is hot?", "choices": ["ice", "the sun"], "gold": 1},
        {"id": "b", "question": "Which is wet?", "choices": ["sand", "sea", "salt", "sugar"], "gold": 1},
    ],
}


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a few made-up questions for piqa, blimp, lambada_openai and arc_challenge."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, rows in QUESTIONS.items():
        with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return directory


@pytest.fixture(scope="session")
def characters() -> Any:
    """A tokenizer of 97 ids: the printable ASCII characters, an end-of-text token and an unknown one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, "<unknown>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", unk_token="<unknown>"
    )
