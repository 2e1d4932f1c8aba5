"""The whole of it on tiny models: what is measured, what is said to be not measured, what stops early."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacompress.bench.memory import PeakMemory, anonymous_bytes
from mambacompress.errors import UserError
from mambacompress.eval import Candidate, Report, evaluate, speed
from mambacompress.models.families import adopt

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8
QUICK: dict[str, Any] = {"context": 64, "windows": 4, "prompt": 8, "steps": 2, "repeats": 2}


@pytest.fixture
def pair(tiny_mamba: Any, characters: Any, tmp_path: Path) -> tuple[Candidate, Candidate]:
    """(baseline, a slightly changed copy); the baseline lies in a directory."""
    tiny_mamba.save_pretrained(tmp_path / "model")
    changed = copy.deepcopy(tiny_mamba)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape))
    return (
        Candidate("original", lambda: (tiny_mamba, characters), tmp_path / "model"),
        Candidate("changed", lambda: (changed, characters), description="noise"),
    )


def test_everything_at_once(pair: tuple[Candidate, Candidate], questions: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    baseline = Candidate("original", pair[0].loader)
    report = evaluate(
        [pair[1]],
        baseline,
        {"text": TEXT, "ids": torch.arange(2, 90)},
        ["piqa", "lambada_openai"],
        data=questions,
        **QUICK,
    )
    assert [row.name for row in report.models] == ["original", "changed"]
    original, changed = report.models
    assert [text.text for text in changed.texts] == ["text", "ids"]
    assert original.texts[0].change is None
    assert original.agreement == []
    assert changed.texts[0].change is not None
    assert changed.texts[0].change.ratio == pytest.approx(
        changed.texts[0].perplexity / original.texts[0].perplexity, rel=1e-6
    )
    assert changed.texts[0].windows == 4
    assert changed.texts[0].tokens == 4 * 63
    assert 0 < changed.agreement[0].kl < 0.1
    assert 0.5 < changed.agreement[0].top1 <= 1
    assert [(task.task, task.metric) for task in changed.tasks] == [
        ("piqa", "acc"),
        ("lambada_openai", "perplexity"),
        ("lambada_openai", "acc"),
    ]
    assert all(task.change is not None for task in changed.tasks)
    assert changed.speed is not None
    assert changed.speed.prefill > 0
    assert changed.speed.decode is not None
    assert changed.speed.peak_bytes is None
    assert changed.description == "noise"
    assert changed.seeds == {"tasks": 0, "speed": 0}
    assert changed.versions["torch"] == torch.__version__
    assert changed.hardware
    assert changed.backend
    assert "float32 100%" in changed.dtype
    assert any(line.startswith("size:") for line in changed.not_measured)
    assert any(line.startswith("peak memory not measured") for line in changed.not_measured)
    report.save(tmp_path / "out")
    assert Report.load(tmp_path / "out").compared() == report


def test_size_comes_from_the_directory(pair: tuple[Candidate, Candidate]) -> None:
    report = evaluate([pair[0]], texts={"text": TEXT}, speed=False, **QUICK)
    size = report.models[0].size
    assert size is not None
    assert pair[0].path is not None
    assert size.file_bytes == (pair[0].path / "model.safetensors").stat().st_size
    assert "speed and peak memory: not asked for" in report.models[0].not_measured
    assert "task accuracy: no task was named" in report.models[0].not_measured


def test_the_same_call_gives_the_same_figures(pair: tuple[Candidate, Candidate]) -> None:
    first, second = (evaluate([pair[1]], pair[0], {"text": TEXT}, speed=False, **QUICK) for _ in range(2))
    assert first.models == second.models


def test_a_baseline_among_the_models_is_measured_once(pair: tuple[Candidate, Candidate]) -> None:
    report = evaluate(pair, pair[0], {"text": TEXT}, speed=False, agreement=False, **QUICK)
    assert [row.name for row in report.models] == ["original", "changed"]
    assert report.models[1].agreement == []


def test_another_tokenizer_is_not_compared(pair: tuple[Candidate, Candidate], characters: Any) -> None:
    class Backwards:
        eos_token_id = 0

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [ids[::-1] for ids in characters(texts, **options)["input_ids"]]}

    other = Candidate("other", lambda: (pair[1].loader()[0], Backwards()))
    report = evaluate([other], pair[0], {"text": TEXT}, speed=False, **QUICK)
    row = report.model("other")
    assert row.texts[0].change is None
    assert row.agreement == []
    assert any("other tokens" in line for line in row.not_measured)
    assert any(note.startswith("not comparable") for note in report.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": []}, "no model"),
        ({"texts": {"novels": " \n"}}, "'novels' is empty"),
        ({"texts": {"novels": []}}, "'novels' is empty"),
        ({"stride": 65}, "leaves tokens out"),
        ({"context": 1}, "predicts nothing"),
        ({"limit": 0}, "asks no question"),
        ({"tasks": ["piqa"], "data": "nowhere"}, "does not exist"),
    ],
)
def test_bad_requests_stop_before_a_model_is_loaded(change: dict[str, Any], words: str) -> None:
    def loader() -> tuple[Any, Any]:
        raise AssertionError("loaded")

    request: dict[str, Any] = {"models": [Candidate("a", loader)], "texts": {"text": TEXT}, "context": 64, **change}
    with pytest.raises(UserError, match=words):
        evaluate(request.pop("models"), **request)


def test_two_models_of_one_name() -> None:
    one = Candidate("a", lambda: (None, None))
    with pytest.raises(UserError, match="both called 'a'"):
        evaluate([one, one])


def test_a_text_of_one_token_stops(pair: tuple[Candidate, Candidate]) -> None:
    with pytest.raises(UserError, match="single token"):
        evaluate([pair[0]], texts={"text": "a"}, speed=False)


def test_memory_is_sampled_where_the_system_tells() -> None:
    if anonymous_bytes() is None:
        pytest.skip("no /proc/self/status")
    with PeakMemory() as memory:
        block = torch.ones(40 << 20, dtype=torch.uint8)
        block += 1
        start = memory.peak or 0
        time.sleep(0.05)
        del block
    assert memory.peak is not None
    assert memory.peak >= start
    assert memory.peak > 40 << 20


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("ours", [False, True])
def test_speed_of_every_family(kind: str, ours: bool, make_host: Any) -> None:
    host = make_host(kind)
    if ours:
        adopt(host)
    found = speed.measure(host, prompt=8, steps=2, repeats=3)
    assert found.loop == ("mambacompress" if ours else "transformers")
    assert found.prefill > 0
    assert found.decode is not None
    assert found.prefill_quartiles[0] <= found.prefill <= found.prefill_quartiles[1]


def test_a_model_without_a_state_has_no_decode(tiny_mamba: Any) -> None:
    class Stateless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = tiny_mamba, tiny_mamba.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids, use_cache=False)

    found = speed.measure(Stateless(), prompt=4, steps=1, repeats=1)
    assert found.decode is None
    assert "keeps no state" in found.note


def test_a_fresh_process_tells_why_it_failed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="speed test"):
        speed.in_fresh_process(tmp_path, prompt=4, steps=1, repeats=1)


def test_a_fresh_process_that_is_not_asked_ends_unasked(tiny_mamba: Any, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    with speed.FreshProcess(tmp_path, prompt=8, steps=2, repeats=2) as process:
        child = process._process
        assert child.poll() is None
    assert child.returncode is not None


def test_a_fresh_process_measures_memory_too(tiny_mamba: Any, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    found = speed.in_fresh_process(tmp_path, prompt=8, steps=2, repeats=2)
    assert found.prefill > 0
    if anonymous_bytes() is not None:
        assert found.peak_bytes is not None
        assert found.peak_bytes > 20 << 20
