"""The questions of the local tasks: what the YAML files in ``tasks/`` call.

lm-eval hands ``rows`` the task's ``dataset_kwargs`` and the metadata of the TaskManager, which holds the data
directory: no YAML names a place on a machine. A limit takes the first rows of a fixed shuffle (the head of a sorted
file is no sample); ``stratify`` spreads it evenly over the values of one field, as BLiMP needs with its 67 paradigms
one after another.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from mambacompress.errors import UserError

SPLIT = "validation"
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def read_rows(directory: str | Path, file: str) -> list[dict[str, Any]]:
    """The JSON objects of ``directory/file`` (.jsonl, .jsonl.gz); raises UserError where it is missing or damaged."""
    path = Path(directory) / file
    if not path.is_file():
        raise UserError(f"the task data {file} is not in {directory}", "name the directory that holds it with --data")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"the task data {path} cannot be read: {error}", "copy the file again") from error
    if not rows:
        raise UserError(f"the task data {path} holds no question", "copy the file again")
    return rows


def sample(
    rows: list[dict[str, Any]], limit: int | None, seed: int, stratify: str | None = None
) -> list[dict[str, Any]]:
    """All rows in file order, or ``limit`` of them: a larger limit holds every row of a smaller one."""
    if limit is None or limit >= len(rows):
        return rows
    shuffled = random.Random(seed).sample(rows, len(rows))
    if stratify is not None:
        seen: Counter[str] = Counter()
        ranks = []
        for row in shuffled:
            ranks.append(seen[row[stratify]])
            seen[row[stratify]] += 1
        shuffled = [row for _, row in sorted(zip(ranks, shuffled, strict=True), key=lambda pair: pair[0])]
    return shuffled[:limit]


def rows(
    *, data: str, file: str, limit: int | None = None, seed: int = 0, stratify: str | None = None, **_: Any
) -> dict[str, Any]:
    """lm-eval's ``custom_dataset``: the questions of one task, {split: dataset}."""
    from datasets import Dataset

    return {SPLIT: Dataset.from_list(sample(read_rows(data, file), limit, seed, stratify))}


# -- lambada, book_cloze ---------------------------------------------------------------------------------------------


def ascii_quotes(text: str) -> str:
    """Curly quotes as the ASCII ones the training texts use."""
    return text.translate(_QUOTES)


def cloze_context(doc: dict[str, Any]) -> str:
    """All but the last word."""
    return ascii_quotes(doc["context"]).rstrip()


def cloze_target(doc: dict[str, Any]) -> str:
    """The last word, with the space before it."""
    return " " + ascii_quotes(doc["target"]).strip()


# -- blimp -----------------------------------------------------------------------------------------------------------


def minimal_pair(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Right where the good sentence is strictly likelier: the 7 pairs that are identical upstream count as wrong."""
    (good, _), (bad, _) = results
    return {"acc": float(good > bad)}


# -- multiple choice -------------------------------------------------------------------------------------------------


def winogrande_choices(doc: dict[str, Any]) -> list[str]:
    """The sentence up to the gap, with each option in it: lm-eval scores the same ending after either."""
    start = doc["sentence"].index("_")
    return [doc["sentence"][:start] + option for option in (doc["option1"], doc["option2"])]


def winogrande_gold(doc: dict[str, Any]) -> int:
    """Index of the right option (lm-eval reads it through doc_to_text where the contexts differ)."""
    return int(doc["answer"]) - 1


def winogrande_ending(doc: dict[str, Any]) -> str:
    """What follows the gap."""
    return doc["sentence"].split("_", 1)[1].strip()


def hellaswag_query(doc: dict[str, Any]) -> str:
    """Activity and context, without WikiHow's brackets."""
    return _unbracket(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")


def hellaswag_choices(doc: dict[str, Any]) -> list[str]:
    """The four endings, cleaned the same way."""
    return [_unbracket(ending) for ending in doc["endings"]]


def _unbracket(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def copa_question(doc: dict[str, Any]) -> str:
    """The premise without its full stop, and the connective the question asks for."""
    return doc["premise"].strip()[:-1] + {"cause": " because", "effect": " therefore"}[doc["question"]]


def copa_choices(doc: dict[str, Any]) -> list[str]:
    """Both alternatives in lower case, so that they continue the sentence."""
    return [doc[name][0].lower() + doc[name][1:] for name in ("choice1", "choice2")]
