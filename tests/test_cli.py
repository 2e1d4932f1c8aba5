"""The command line: what it parses, what it prints, how it fails. The work behind it has tests of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

import mambacompress as mc
from mambacompress.cli import app
from mambacompress.cli.command import Greedy, default_out
from mambacompress.errors import CheckFailed, UserError

COMMANDS = ("quantize", "inspect", "evaluate", "bench", "report", "train", "generate", "verify", "doctor", "demo")


def cli(*arguments: str | float) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """Stands for the API: notes the calls, gives back what was agreed."""

    def stand_for(self, name: str, answer: Any) -> Callable[..., Any]:
        def called(*positional: Any, **named: Any) -> Any:
            self.append((name, positional, named))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return called


def edit(pass_name: str, block: int | None, target: str, what: str, bits: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(pass_name=pass_name, block=block, target=target, what=what, online=False, bits=bits)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    noted = Calls()
    manifest = {"coverage": 0.97, "files": {"model.safetensors": {"bytes": 250}}, "float_bytes": {"a": 1000},
                "calibration": {"tokens": 2048, "perplexity_ratio": 1.0004}}
    plan = SimpleNamespace(
        edits=[*(edit("quantize", i, "in_proj", "int8 [rows]", bits=8.0) for i in (0, 1, 2, 5)),
               edit("rotate", None, "residual", "klt")],
        refusals=[SimpleNamespace(pass_name="smooth", block=1, target="states", reason="B passes a norm")])
    report = SimpleNamespace(save=noted.stand_for("save", tmp_path / "report.html"), markdown=lambda: "the table")
    for name, answer in {
        "quantize": SimpleNamespace(directory=tmp_path / "out", manifest=manifest), "inspect": plan, "load": "model",
        "generate": iter(["Once", " upon"]), "evaluate": report, "verify": {"files": 7, "bytes": 1234, "coverage": 0.97, "patterns": {},
                                                                        "packed": 33},
    }.items():
        monkeypatch.setitem(vars(mc), name, noted.stand_for(name, answer))
    monkeypatch.chdir(tmp_path)
    return noted


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_worked_example(command: str):
    shown = cli(command, "--help")
    assert shown.exit_code == 0
    assert f"mambacompress {command}" in shown.output
    assert "Example" in shown.output


def test_help_names_every_command():
    shown = cli("--help")
    assert all(command in shown.output for command in COMMANDS)


def test_help_and_errors_load_no_torch():
    code = ("import sys; from typer.testing import CliRunner; from mambacompress.cli import app\n"
            f"for command in {COMMANDS!r}:\n"
            "    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0, command\n"
            "assert CliRunner().invoke(app, ['quantize', 'x', '--recipe', 'w8a9']).exit_code == 2\n"
            "assert CliRunner().invoke(app, ['train', 'demo', '--out', 'x', '--set', 'steps=0']).exit_code == 2\n"
            "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version():
    assert cli("--version").output.strip() == mc.__version__


# -- parsing ---------------------------------------------------------------------------------------------------------


def test_quantize_hands_everything_on(calls: Calls, tmp_path: Path):
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.txt").write_text("beta")
    shown = cli("quantize", "some/model", "-r", "w4a16", "--text", "a.txt", "b.txt", "--set", "calibration.sequences=4",
                "--set", "calibration.length=32", "--out", "there", "--resume", "--device", "cuda:1")
    assert shown.exit_code == 0, shown.output
    [(name, positional, named)] = calls
    assert (name, positional) == ("quantize", ("some/model",))
    assert named["recipe"].name == "w4a16"
    assert (named["recipe"].calibration.sequences, named["recipe"].calibration.length) == (4, 32)
    assert named["calibration"] == ["alpha", "beta"]
    assert (named["out"], named["resume"], named["device"]) == (Path("there"), True, "cuda:1")
    named["progress"]("rotate", 1, 8)
    assert "97.0% of the matrix bytes packed" in shown.output
    assert "1.00040" in shown.output


def test_quantize_alone_is_the_demo(calls: Calls):
    assert cli("quantize").exit_code == 0
    [(_, positional, named)] = calls
    assert positional == ("demo",)
    assert (named["recipe"].name, named["out"], named["calibration"]) == ("w8a8", Path("demo-w8a8"), None)


@pytest.mark.parametrize(("model", "out"), [
    ("demo", "demo-w8a8"), ("state-spaces/mamba-130m-hf", "mamba-130m-hf-w8a8"), ("models/m/", "m-w8a8"),
])
def test_the_default_output(model: str, out: str):
    assert default_out(model, "w8a8") == Path(out)


def test_the_default_output_of_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert default_out(".", "w8a8") == Path("mine-w8a8")


def test_a_dry_run_prints_the_plan_and_writes_nothing(calls: Calls, tmp_path: Path):
    shown = cli("quantize", "demo", "--dry-run")
    assert shown.exit_code == 0
    assert [name for name, *_ in calls] == ["inspect"]
    assert not any(tmp_path.iterdir())
    assert "0-2, 5" in shown.output
    assert "int8 [rows]" in shown.output
    assert "B passes a norm" in shown.output


def test_options_that_take_several_values(calls: Calls, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    shown = cli("evaluate", "one", "two", "--baseline", "m", "--text", "a.txt", "b.txt", "--tasks", "blimp,piqa",
                "copa", "--set", "windows=60", "--out", "r")
    assert shown.exit_code == 0, shown.output
    [(_, (candidates,), named), (_, saved, _)] = calls
    assert [candidate.name for candidate in candidates] == ["one", "two"]
    assert named["texts"] == {"a": ["text a"], "b": ["text b"]}
    assert named["tasks"] == ["blimp", "piqa", "copa"]
    assert (named["baseline"].name, named["windows"], saved) == ("m", 60, (Path("r"),))
    assert "the table" in shown.output


def test_without_a_text_the_held_out_library_is_read(calls: Calls):
    assert cli("evaluate", "demo").exit_code == 0
    assert list(calls[0][2]["texts"]) == ["python_stdlib_test"]


@pytest.mark.parametrize("arguments", [
    ["--text", "a.txt", "--text=b.txt", "--out", "r", "one"],
    ["--text", "a.txt", "b.txt", "--", "one"],
    ["one", "--text", "a.txt", "b.txt"],
])
def test_several_values_stop_at_the_next_option(arguments: list[str]):
    texts: list[Any] = []
    names: list[str] = []

    def take(models: list[str], text: Annotated[list[Path] | None, typer.Option("--text")] = None,
             out: Annotated[str, typer.Option("--out")] = "") -> None:
        names.extend(models)
        texts.extend(text or ())

    alone = typer.Typer()
    alone.command(cls=Greedy)(take)
    assert CliRunner().invoke(alone, arguments).exit_code == 0
    assert (names, texts) == (["one"], [Path("a.txt"), Path("b.txt")])


def test_an_unknown_setting(calls: Calls):
    shown = cli("evaluate", "one", "--set", "window=3")
    assert shown.exit_code == 2
    assert "there is no setting 'window'; did you mean 'windows'?" in shown.stderr


def test_generate_prints_as_it_goes(calls: Calls):
    shown = cli("generate", "m", "--prompt", "[bold]", "-n", 5, "--temperature", 0.7, "--top-p", 0.9, "--seed", 3,
                "--state", "int8")
    assert shown.stdout == "[bold]Once upon\n"
    (_, load, _), (_, positional, named) = calls
    assert load == ("m",)
    assert positional == ("model", "[bold]", 5)
    assert named == {"temperature": 0.7, "top_k": None, "top_p": 0.9, "seed": 3, "state": "int8"}


def test_verify_says_what_it_counted(calls: Calls):
    shown = cli("verify", "out")
    assert shown.exit_code == 0
    assert "out is whole: 7 files, 1,234 bytes" in shown.output


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [
    (UserError("the shard is gone", "copy it again"), 2), (CheckFailed("the hash differs", "copy it again"), 1),
])
def test_errors_are_a_sentence_a_step_and_a_code(calls: Calls, monkeypatch: pytest.MonkeyPatch, error: UserError,
                                                 code: int):
    monkeypatch.setitem(vars(mc), "verify", calls.stand_for("verify", error))
    shown = cli("verify", "out")
    assert shown.exit_code == code
    assert shown.stdout == ""
    assert shown.stderr == f"Error: {error.message}.\nNext step: copy it again\n"


def test_a_bug_keeps_its_traceback(calls: Calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(mc), "verify", calls.stand_for("verify", ZeroDivisionError("ours")))
    assert isinstance(cli("verify", "out").exception, ZeroDivisionError)


@pytest.mark.parametrize("arguments", [
    ["quantize", "--recipe"], ["quantize", "--no-such"], ["evaluate"], ["verify"], ["nonsense"],
    ["generate", "--max-new-tokens", "0"], ["generate", "--top-p", "2"],
])
def test_bad_usage_is_2(arguments: list[str]):
    assert cli(*arguments).exit_code == 2


@pytest.mark.parametrize(("arguments", "said"), [
    (["--recipe", "w8a9"], "there is no recipe 'w8a9'; did you mean 'w8a8'?"),
    (["--set", "passes.quantize.wieghts=int4"], "did you mean 'weights'?"),
    (["--set", "nonsense"], "not of the form key=value"),
    (["--text", "none.txt"], "there is no file none.txt"),
    (["--text", "empty.txt"], "empty.txt holds no text"),
    (["--text", "empty.txt", "model/"], "empty.txt holds no text"),
])
def test_bad_input_is_2_before_any_work(calls: Calls, tmp_path: Path, arguments: list[str], said: str):
    (tmp_path / "empty.txt").write_text("\n")
    shown = cli("quantize", "demo", *arguments)
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert "Next step:" in shown.stderr
    assert not calls


def test_an_interrupt_is_130_and_says_how_to_go_on(calls: Calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(mc), "quantize", calls.stand_for("quantize", KeyboardInterrupt()))
    shown = cli("quantize", "demo")
    assert shown.exit_code == 130
    assert "interrupted, and demo-w8a8 was not written." in shown.stderr
    assert "--resume" in shown.stderr
    monkeypatch.setitem(vars(mc), "verify", calls.stand_for("verify", KeyboardInterrupt()))
    assert cli("verify", "x").exit_code == 130


def test_a_real_ctrl_c(tmp_path: Path):
    code = ("import time, sys, mambacompress as mc; from mambacompress.cli import main\n"
            "def slow(*a, **k): print('started', flush=True); time.sleep(30)\n"
            "mc.quantize = slow; sys.argv = ['mambacompress', 'quantize', 'demo']; main()")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(mc.__file__).parent.parent)})
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted, and demo-w8a8 was not written." in errors
    assert not any(tmp_path.iterdir())


def test_a_reader_that_leaves(tmp_path: Path):
    command = f"{sys.executable} -m mambacompress --help | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(mc.__file__).parent.parent)})
    assert "Traceback" not in done.stderr
