"""``mambacompress train``: two processes see the losses of one, Ctrl-C loses none, mistakes are a sentence."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mambacompress as mc
from mambacompress.cli import app
from mambacompress.eval.stats import Estimate
from mambacompress.pretraining import Trained

TEXT = "".join(f"def add_{i}(a, b):\n    return a + b * {i}\n" for i in range(300))
SHORT = ["steps=6", "warmup=2", "batch=2", "length=16", "precision=fp32"]


def command(out: str, *more: str, settings: list[str] = SHORT) -> list[str]:
    return ["-m", "mambacompress", "train", "demo", "--out", out, "--text", "text.txt",
            *(part for setting in settings for part in ("--set", setting)), *more]


@pytest.fixture
def here(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text to train on; processes started in it find the package."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "held-out.txt").write_text(TEXT[:2000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def losses(out: Path) -> list[float]:
    steps = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(len(steps))), "a step is there twice, or missing"
    return [row["loss"] for row in steps]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_see_the_losses_of_one(here: Path):
    """As torchrun starts them, with no word to accelerate that the CPU is meant; held-out text is read by the first."""
    alone = run(*command("one", "--eval-text", "held-out.txt"))
    together = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   *command("two", "--eval-text", "held-out.txt"))
    one, two = losses(here / "one"), losses(here / "two")
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)
    assert two != one, "the sums were made in the same order: there was one process"
    assert "training demo 6/6 · loss" in alone.stderr
    assert together.stderr.count("training demo 6/6") == 1
    for shown, name in ((alone, "one"), (together, "two")):
        [perplexity] = re.findall(r"^held-out perplexity: ([\d.,]+) ±", shown.stdout, re.M)
        assert f"held-out perplexity | {perplexity}" in (here / name / "model" / "README.md").read_text("utf-8")
        assert shown.stdout.count(f"{name}/model\n") == 2  # where it is, what is next


def test_ctrl_c_is_130_and_a_resumed_run_has_the_same_losses(here: Path):
    settings = [*SHORT[1:], "steps=60"]
    run(*command("whole", settings=settings))
    process = subprocess.Popen([sys.executable, *command("cut", settings=settings)], stderr=subprocess.PIPE, text=True)
    log = here / "cut" / "training.jsonl"
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not (log.is_file() and log.stat().st_size):  # a step is done
            assert time.monotonic() < deadline, "it never started"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.endswith("Error: interrupted, and cut keeps what was trained so far.\n"
                           "Next step: run the same command with --resume to go on\n")
    assert len(losses(here / "cut")) < 60
    again = subprocess.run([sys.executable, *command("cut", settings=settings)], capture_output=True, text=True)
    assert again.returncode == 2
    assert "Error: cut already holds a run.\nNext step: continue it with --resume" in again.stderr
    run(*command("cut", "--resume", settings=settings))
    assert losses(here / "cut") == losses(here / "whole")


# -- parsing and failures, without training ----------------------------------------------------------------------------


def cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200"})


def test_everything_is_handed_on(here: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[Any, ...]] = []
    facts = {"steps": "9 of 2", "final training loss": "3.1 nats", "held-out perplexity": "27.9 ± 1.4"}

    def train(recipe: Any, out: Path, **options: Any) -> Trained:
        calls.append((recipe, out, options))
        for done in (1, 2):
            options["progress"]("training", done, 2, {"loss": 2.0, "tokens_per_second": 1000.0})
        options["progress"]("evaluating", 3, 3, {})
        return Trained(out / "model", True, 3.1, Estimate(27.9, 1.4), facts)

    monkeypatch.setitem(vars(mc), "train", train)
    shown = cli("english-mamba2", "--text", "text.txt", "held-out.txt", "--tokenizer", "demo", "--out", "r",
                "--eval-text", "held-out.txt", "--set", "steps=900", "--set", "schedule=wsd", "--resume")
    assert shown.exit_code == 0, shown.output
    [(recipe, out, options)] = calls
    assert (recipe.name, recipe.train.steps, recipe.train.schedule, out) == ("english-mamba2", 900, "wsd", Path("r"))
    assert options["texts"] == [TEXT, TEXT[:2000]]
    assert options["eval_texts"] == [TEXT[:2000]]
    assert (options["tokenizer"], options["resume"]) == ("demo", True)
    assert "training english-mamba2 2/2 · loss 2.000 · perplexity 7.4 · 1,000 tokens/s" in shown.stderr
    assert "evaluating 3/3" in shown.stderr
    assert shown.stdout.splitlines() == [
        "r/model", *(f"{name}: {value}" for name, value in facts.items()), "loss curve: r/training.html",
        "Next: mambacompress quantize r/model"]


def test_another_process_than_the_first_is_silent(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(mc), "train", lambda recipe, out, **options: Trained(out / "model", first=False))
    shown = cli("demo", "--out", "r")
    assert (shown.exit_code, shown.output) == (0, "")


@pytest.mark.parametrize(("arguments", "said"), [
    (["demmo"], "there is no training recipe 'demmo'; did you mean 'demo'?"),
    (["demo", "--set", "stepz=3"], "there is no setting 'stepz'; did you mean 'steps'?"),
    (["demo", "--set", "steps=many"], "the setting steps is 'many', which is no whole number"),
    (["demo", "--set", "schedule=cosin"], "unknown schedule 'cosin'; did you mean 'cosine'?"),
    (["demo", "--set", "steps=50"], "a warm-up of 100 steps does not fit into a run of 50"),
    (["demo", "--set", "steps"], "not of the form key=value"),
    (["demo", "--text", "none.txt"], "there is no file none.txt"),
    (["demo", "--eval-text", "none.txt"], "there is no file none.txt"),
    (["english-mamba1"], "english-mamba1 brings no text of its own"),
    (["english-mamba1", "--text", "text.txt"], "english-mamba1 brings no tokenizer of its own"),
    (["demo", "--text", "text.txt", "--tokenizer", "here"], "here"),
])
def test_what_cannot_work_is_said_in_a_sentence(here: Path, arguments: list[str], said: str):
    shown = cli(*arguments, "--out", "out")
    assert shown.exit_code == 2, shown.output
    assert said in shown.stderr
    assert "Next step:" in shown.stderr
    assert not (here / "out").exists()
