"""The speed benchmark on tiny random models: who takes part, who is out and why, and what the figures mean.

No test asserts a time; rates only have to be there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mambacompress as mc
from mambacompress.bench import Result, bench, line_up, race
from mambacompress.bench.process import Process, WorkerFailed
from mambacompress.bench.runner import Contestant
from mambacompress.bench.summary import Spread, taken
from mambacompress.cli import app
from mambacompress.errors import UserError

QUICK = {"prompt": 16, "steps": 3, "batch": 2, "rounds": 2}
SETTINGS = [item for key, value in QUICK.items() for item in ("--set", f"{key}={value}")]
llama_cpp = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))), reason="llama-cpp-python or gguf is not installed")
openvino = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("openvino", "nncf"))), reason="OpenVINO or nncf is not installed")
WIDE = {"mamba": {"hidden_size": 64, "intermediate_size": 128, "time_step_rank": 32},
        "mamba2": {"hidden_size": 64, "num_heads": 16, "n_groups": 1}}


def named(result: Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result.document["runs"][0]["contestants"]}


def complete(row: dict[str, Any], *measures: str) -> None:
    assert row["error"] is None, row
    assert {name: len(rates) for name, rates in row["rates"].items()} == dict.fromkeys(measures or race.MEASURES, 2)
    assert all(rate > 0 for rates in row["rates"].values() for rate in rates)


def test_the_command_from_end_to_end(model_directory: Any, tmp_path: Path) -> None:
    """An original and its artifact against transformers, to the table and the files."""
    original = model_directory("mamba")
    tokens = torch.randint(1, 97, (2, 16))
    mc.quantize(original, "rtn-w8a8", calibration=tokens, out=tmp_path / "packed",
                overrides=["checks.max_perplexity_ratio=null"])
    out = tmp_path / "speeds" / "speed.json"
    shown = CliRunner().invoke(app, [
        "bench", str(original), str(tmp_path / "packed"), "--peers", "transformers", "--threads", "1", *SETTINGS,
        "--out", str(out)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    result = Result(json.loads(out.read_text()))
    rows = named(result)
    assert list(rows) == ["tiny-mamba fp32", "tiny-mamba bf16", "packed", "transformers fp32", "transformers bf16"]
    for name, row in rows.items():
        complete(row)
        assert name in shown.output
        assert row["likeness"]["cosine"] > 0.98
        assert row["files"] > 0
        assert row["memory"]["live_tensors"] > 0
    assert rows["transformers fp32"]["likeness"]["top1"] == 1.0
    assert "mixer" in rows["packed"]["facts"]["kernels"] or "scan" in rows["packed"]["facts"]["kernels"]
    assert result.document["reference"] == "transformers fp32"
    ratio = result.ratio(1, "packed", "transformers fp32", "decode")
    pairs = zip(rows["packed"]["rates"]["decode"], rows["transformers fp32"]["rates"]["decode"], strict=True)
    assert ratio == Spread.of([ours / theirs for ours, theirs in pairs])
    page = out.with_suffix(".md").read_text()
    assert page == result.markdown()
    assert page.count("\n| 1 |") == len(rows)
    assert "decode, batch 2" in page


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@llama_cpp
def test_llama_cpp_takes_part(kind: str, model_directory: Any) -> None:
    """Both architectures, through files of our own writing; F16 has the model's logits, read at once or by steps."""
    result = bench([model_directory(kind, **WIDE[kind])], peers=["llama.cpp"], **QUICK)
    rows = named(result)
    assert [name for name in rows if name.startswith("llama")] == ["llama.cpp Q8_0", "llama.cpp Q4_0", "llama.cpp F16"]
    for row in rows.values():
        complete(row)
    assert rows["llama.cpp F16"]["likeness"]["cosine"] > 0.9999
    assert rows["llama.cpp Q8_0"]["likeness"]["cosine"] > 0.999
    assert rows["llama.cpp Q4_0"]["files"] < rows["llama.cpp Q8_0"]["files"] < rows["llama.cpp F16"]["files"]
    assert result.document["reference"] == "llama.cpp Q8_0"


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@openvino
def test_openvino_takes_part(kind: str, model_directory: Any) -> None:
    """A step graph of our own writing: it decodes, and reads no prompt in one call."""
    grouped = {"mamba": {}, "mamba2": {"n_groups": 2}}[kind]
    result = bench([model_directory(kind, **(WIDE[kind] | grouped))], peers=["openvino"], **QUICK)
    rows = named(result)
    for name, least in (("OpenVINO int8", 0.999), ("OpenVINO int4", 0.9)):
        complete(rows[name], "decode", "batch_decode")
        assert rows[name]["likeness"]["cosine"] > least
    assert rows["OpenVINO int4"]["files"] > 0
    assert result.document["reference"] == "OpenVINO int8"
    assert result.ratio(1, f"tiny-{kind} fp32", "OpenVINO int8", "prefill") is None


def test_int8_states_are_a_contestant_of_their_own(model_directory: Any, tmp_path: Path) -> None:
    original = model_directory("mamba")
    mc.quantize(original, "rtn-w8a8", calibration=torch.randint(1, 97, (2, 16)), out=tmp_path / "packed",
                overrides=["checks.max_perplexity_ratio=null"])
    result = bench([original, tmp_path / "packed"], peers=[], states=["fp32", "int8"], **QUICK)
    rows = named(result)
    assert list(rows) == ["tiny-mamba fp32", "tiny-mamba bf16", "packed", "packed state8"]
    complete(rows["packed state8"])
    assert rows["packed state8"]["variant"] == "packed-state8"
    assert rows["packed state8"]["likeness"]["cosine"] > 0.98
    for states, words in (((), "the states are"), (["int8", "int8"], "each once"), (["int7"], "did you mean")):
        with pytest.raises(UserError) as refused:
            bench([original], peers=[], states=states, **QUICK)
        assert words in str(refused.value) + refused.value.next_step


def test_without_an_original_there_are_no_peers(model_directory: Any, tmp_path: Path) -> None:
    original = model_directory("mamba")
    mc.quantize(original, "rtn-w8a8", calibration=torch.randint(1, 97, (2, 16)), out=tmp_path / "packed",
                overrides=["checks.max_perplexity_ratio=null"])
    alone = bench([tmp_path / "packed"], peers=["transformers"], **QUICK)
    [item] = alone.document["left_out"]
    assert "--baseline" in item["reason"]
    complete(named(alone)["packed"])
    assert named(alone)["packed"]["likeness"] == {}
    assert "transformers is left out" in alone.markdown()


def test_a_peer_that_is_not_installed_is_left_out(model_directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(line_up.importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    result = bench([model_directory("mamba")], peers=["openvino"], **QUICK)
    [item] = result.document["left_out"]
    assert item["name"] == "OpenVINO"
    assert "pip install 'mambacompress[bench]'" in item["reason"]
    complete(named(result)["tiny-mamba fp32"])


@llama_cpp
def test_a_peer_that_cannot_hold_the_model_is_left_out(model_directory: Any) -> None:
    result = bench([model_directory("falcon_mamba")], peers=["llama.cpp"], **QUICK)
    [item] = result.document["left_out"]
    assert "falcon_mamba" in item["reason"]
    complete(named(result)["tiny-falcon_mamba bf16"])


def test_whoever_computes_something_else_is_out(model_directory: Any, make_host: Any, tmp_path: Path) -> None:
    original, other = model_directory("mamba"), make_host("mamba")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "other")
    entrants = [Contestant("model", "ours", str(original), "fp32", 1, 0.9999),
                Contestant("stranger", "transformers", str(tmp_path / "other"), "fp32", 1, 0.9999)]
    run = race.race(entrants, "model", 1, race.Settings(**QUICK), tmp_path, lambda stage: None)
    model, stranger = run["contestants"]
    complete(model)
    assert "computes something else" in stranger["error"]
    assert stranger["rates"] == {}


def test_a_contestant_that_fails_does_not_stop_the_others(model_directory: Any, tmp_path: Path) -> None:
    original = model_directory("mamba")
    entrants = [Contestant("there", "ours", str(original), "fp32", 1, 0.9999),
                Contestant("gone", "transformers", str(tmp_path / "nothing"), "fp32", 1, 0.9999)]
    run = race.race(entrants, "there", 1, race.Settings(**QUICK), tmp_path, lambda stage: None)
    there, gone = run["contestants"]
    complete(there)
    assert gone["error"]
    result = Result({"runs": [run], "settings": QUICK, "reference": "there", "left_out": []})
    assert "gone is left out" in result.markdown()
    assert "| - |" in result.markdown()


def test_a_worker_that_dies_says_so() -> None:
    with Process(threads=1) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="ended with code -9"):
            process.ask("facts")
    with Process(threads=1) as process:
        with pytest.raises(WorkerFailed, match="no contestant is loaded"):
            process.ask("facts")
        with pytest.raises(WorkerFailed, match="no contestant is loaded"):  # and it still listens
            process.ask("facts")


def test_workers_without_torch_stay_without() -> None:
    """A peer's memory is its own: the worker's commands import no torch."""
    code = "import sys, mambacompress.bench.worker; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_ctrl_c_ends_the_workers(model_directory: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mambacompress", "bench", str(model_directory("mamba")), "--peers", "",
               "--threads", "1", "--set", "rounds=300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers: list[str] = []
    try:
        if not children.is_file():
            pytest.skip("this system does not list a process's children")
        deadline = time.monotonic() + 120
        while process.poll() is None and len(workers := children.read_text().split()) < 2:
            assert time.monotonic() < deadline, "the workers never started"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30  # one that was just being started ends by itself, at the end of its input
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--peers", "lama.cpp"], "did you mean 'llama.cpp'"),
    (["--threads", "0"], "thread counts"),
    (["--threads", "1,1"], "thread counts"),
    (["--threads", "two"], "no number"),
    (["--set", "runds=3"], "did you mean 'rounds'"),
    (["--set", "rounds=0"], "at least 1"),
    (["--out", "speed.txt"], "speed.json"),
    (["--baseline", "no/such/model"], "no/such/model"),
])
def test_what_cannot_work_is_said_in_a_sentence(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["bench", "demo", *arguments], env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1"})
    assert shown.exit_code == 2, shown.output
    assert message in shown.output
    assert "Traceback" not in shown.output


def test_figures_of_known_numbers() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    stages = {"start": 100, "load": 150, "prefill": 180, "decode": 170, "batch_decode": 900}
    memory = {stage: {"anonymous": size, "resident": 2 * size} for stage, size in stages.items()}
    assert (taken({"memory": memory}), taken({"memory": memory}, "anonymous")) == (160, 80)
    assert taken({"memory": {"start": {"resident": None}, "load": {"resident": None}}}) is None
    assert taken({"memory": {}}) is None
    settings = race.Settings(prompt=512, steps=64, batch=8)
    assert [settings.tokens(measure) for measure in race.MEASURES] == [512, 64, 512]


def test_likeness_is_the_worst_of_prompt_and_steps() -> None:
    model = {"prompt": np.eye(3, dtype=np.float32), "steps": np.eye(3, dtype=np.float32)[None]}
    found = {"prompt": model["prompt"], "steps": model["steps"][:, ::-1]}
    worst = race._likeness(found, model)
    assert worst["top1"] == pytest.approx(1 / 3)
    assert worst["cosine"] == pytest.approx(1 / 3)
    assert worst["max_difference"] == 1.0
    nothing = {"prompt": np.full((3, 3), np.nan, np.float32), "steps": model["steps"]}
    assert race._likeness(nothing, model)["cosine"] == 0.0
