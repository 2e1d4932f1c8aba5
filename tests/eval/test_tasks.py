"""Tasks: prompts as lm-eval words them, likelihoods as the plain formula gives them, every answer kept."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacompress.errors import UserError
from mambacompress.eval import taskdata, tasks
from tests.eval.conftest import QUESTIONS

pytest.importorskip("lm_eval")


def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """log P(continuation | context) by the plain formula, one sequence at a time."""
    head = tokenizer(context, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    tail = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([head + tail])
    with torch.no_grad():
        scores = torch.log_softmax(model(ids).logits[0].float(), -1)
    return sum(scores[len(head) + i - 1, token].item() for i, token in enumerate(tail))


def test_multiple_choice_is_the_plain_formula(tiny_mamba: Any, characters: Any, questions: Path) -> None:
    (found,) = tasks.run_task(tiny_mamba, characters, "piqa", data=questions, batch=4)
    expected = []
    for row in QUESTIONS["piqa_validation"]:
        scores = [
            likelihood(tiny_mamba, characters, f"Question: {row['goal']}\nAnswer:", f" {row[name]}")
            for name in ("sol1", "sol2")
        ]
        expected.append(float(scores[row["label"]] > scores[1 - row["label"]]))
    assert found.values == expected
    assert (found.task, found.metric, found.chance, found.shots, found.cut) == ("piqa", "acc", 0.5, 0, 0)
    assert found.ctx == len("Question: open a jar 0\nAnswer: eat the lid slowly")


def test_last_word_perplexity_reads_ascii_quotes(tiny_mamba: Any, characters: Any, questions: Path) -> None:
    found = {
        result.metric: result for result in tasks.run_task(tiny_mamba, characters, "lambada_openai", data=questions)
    }
    expected = likelihood(tiny_mamba, characters, '"It\'s a dog," said Ann to', " Bob")
    assert found["perplexity"].values == pytest.approx([expected] * 2, rel=1e-4)
    assert found["perplexity"].chance is None
    assert found["acc"].chance == 0


def test_identical_pairs_count_as_wrong(tiny_mamba: Any, characters: Any, questions: Path) -> None:
    (found,) = tasks.run_task(tiny_mamba, characters, "blimp", data=questions)
    assert len(found.values) == 13
    assert found.values[-1] == 0
    good = [likelihood(tiny_mamba, characters, "", f" {row['sentence_good']}") for row in QUESTIONS["blimp"][:12]]
    bad = [likelihood(tiny_mamba, characters, "", f" {row['sentence_bad']}") for row in QUESTIONS["blimp"][:12]]
    assert found.values[:-1] == [float(a > b) for a, b in zip(good, bad, strict=True)]


def test_chance_averages_over_questions_of_different_sizes(tiny_mamba: Any, characters: Any, questions: Path) -> None:
    (found,) = tasks.run_task(tiny_mamba, characters, "arc_challenge", data=questions)
    assert found.metric == "acc_norm"
    assert found.chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_a_limit_is_reproducible_and_says_what_it_asked(tiny_mamba: Any, characters: Any, questions: Path) -> None:
    seen: list[int] = []
    runs = [
        tasks.run_task(tiny_mamba, characters, "piqa", data=questions, limit=3, seed=seed, advance=seen.append)[0]
        for seed in (0, 0, 1)
    ]
    assert [len(run.values) for run in runs] == [3, 3, 3]
    assert runs[0] == runs[1]
    assert runs[0].fingerprint != runs[2].fingerprint
    assert sum(seen) == 3 * 3 * 2
    assert tasks.questions("piqa", questions, 3) == 3
    assert tasks.questions("piqa", questions, None) == 6


def test_requests_longer_than_the_model_is_given_are_counted(
    tiny_mamba: Any, characters: Any, questions: Path
) -> None:
    (found,) = tasks.run_task(tiny_mamba, characters, "piqa", data=questions, max_length=45)
    assert found.cut == 6  # "eat the lid slowly" makes 49 tokens, "turn the lid" 43
    assert found.ctx == 49


def test_a_sample_is_nested_and_spread_over_strata() -> None:
    rows = [{"UID": uid, "i": i} for uid in "abcdefg" for i in range(100)]
    small, large = (taskdata.sample(rows, limit, 0, "UID") for limit in (70, 350))
    assert large[:70] == small
    assert set(Counter(row["UID"] for row in small).values()) == {10}
    assert taskdata.sample(rows, None, 0) == taskdata.sample(rows, 10**6, 0) == rows
    assert taskdata.sample(rows, 5, 0) != taskdata.sample(rows, 5, 1)


@pytest.mark.slow
def test_unknown_tasks(questions: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'piqa'"):
        tasks.check(["piqaa"], questions)
    with pytest.raises(UserError, match="there is no task"):
        tasks.check(["no_such_thing_at_all"], questions)
    tasks.check(["piqa", "mmlu"], questions)  # a task of the hub is known by name


def test_missing_data_names_the_file(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tasks.DATA_VARIABLE, raising=False)
    with pytest.raises(UserError, match="not known"):
        tasks.check(["piqa"])
    with pytest.raises(UserError, match="does not exist"):
        tasks.check(["piqa"], tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"boolq_validation\.jsonl\.gz"):
        tasks.check(["piqa", "boolq"], questions)
    monkeypatch.setenv(tasks.DATA_VARIABLE, str(questions))
    tasks.check(["piqa"])


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"{]\n"), gzip.compress(b"\n")], ids=["plain", "json", "empty"]
)
def test_damaged_data_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jsonl\.gz"):
        taskdata.read_rows(tmp_path, "x.jsonl.gz")


PROMPTS = {  # the first question of the real files, (context, continuation) of its first choice
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        " Sunlight is the source of energy for nearly all ecosystems.",
    ),
    "copa": ("The man turned on the faucet therefore", " the toilet filled with water."),
    "hellaswag": (
        "Pole vault: Pole vault is a sport where you run with a pole and stop and swing your body. A few women",
        " go down a rock and stop.",
    ),
    "openbookqa": (
        "A person wants to start saving money so that they can afford a nice vacation at the end of the year. After "
        "looking over their budget and expenses, they decide the best way to save money is to",
        " make more phone calls",
    ),
    "winogrande": ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
}
COUNTS = {
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "blimp": 67_000,
    "book_cloze": 1378,
    "boolq": 3270,
    "copa": 100,
    "hellaswag": 1000,
    "lambada_openai": 5153,
    "openbookqa": 500,
    "piqa": 1838,
    "winogrande": 1267,
}


@pytest.mark.parametrize("name", tasks.local_tasks())
def test_real_questions_read_as_lm_eval_words_them(name: str, shared: Path) -> None:
    from lm_eval.tasks import TaskManager

    data = shared / "data" / "tasks"
    if name == "blimp":  # 67,000 rows as a dataset take too long here
        assert len(taskdata.read_rows(data, "blimp.jsonl.gz")) == COUNTS[name]
        return
    assert tasks.questions(name, data, None) == COUNTS[name]
    manager = TaskManager(
        include_path=str(tasks.TASKS), include_defaults=False, metadata={"data": str(data), "limit": None, "seed": 0}
    )
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    for instance in task.instances:
        context, continuation = instance.args
        assert continuation.startswith(" ")
        assert not continuation.startswith("  ")
        assert not context.endswith(" ")
    assert task.instances[0].doc_id == 0
    assert len({instance.doc_id for instance in task.instances}) == 2
    if name in PROMPTS:
        assert task.instances[0].args == PROMPTS[name]


def test_every_local_task_has_yaml_that_names_no_place() -> None:
    assert sorted(COUNTS) == tasks.local_tasks()
    for name in tasks.local_tasks():
        text = (tasks.TASKS / f"{name}.yaml").read_text()
        assert "/" not in text


def test_a_model_is_read_and_not_touched(
    tiny_mamba: Any, characters: Any, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HFLM ties the weights of a module it is given, and hands an artifact's quantization_config to transformers."""

    def forbidden() -> None:
        raise AssertionError("tied")

    monkeypatch.setattr(tiny_mamba, "tie_weights", forbidden, raising=False)
    tiny_mamba.config.quantization_config = {"quant_method": "mambacompress"}
    (found,) = tasks.run_task(tiny_mamba, characters, "piqa", data=questions, limit=1)
    assert len(found.values) == 1
    assert tiny_mamba.config.quantization_config == {"quant_method": "mambacompress"}


def test_progress_is_told_what_to_expect(tiny_mamba: Any, characters: Any, questions: Path) -> None:
    totals: list[int] = []
    tasks.run_task(tiny_mamba, characters, "piqa", data=questions, limit=2, expect=totals.append)
    assert totals == [4]
