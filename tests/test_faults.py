"""What goes wrong on a user's machine: one sentence, the next step, an exit code, nothing half-written.

Everything runs the real command on a tiny random model; a killed run is a forked child, hit at random moments.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mambacompress.cli import app

QUICK = ("--set", "calibration.sequences=4", "--set", "calibration.length=32")
MakeModel = Callable[..., Path]


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(result: Result, said: str, code: int = 2) -> None:
    """One sentence that says so, a next step, the exit code, no traceback."""
    assert result.exit_code == code, f"exit code {result.exit_code}: {result.output}\n{result.exception!r}"
    sentence, step = result.stderr.strip().split("\n")[-2:]
    assert said in sentence
    assert step.startswith("Next step: ")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def packed(model_directory: MakeModel, here: Path) -> Path:
    """A small compressed directory."""
    done = cli("quantize", model_directory(), "--recipe", "rtn-w8a8", "--out", "packed", *QUICK)
    assert done.exit_code == 0, done.output
    return here / "packed"


# -- the model -------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(here: Path):
    refused(cli("quantize", "./none", *QUICK), "none")
    refused(cli("inspect", "./none"), "none")
    refused(cli("generate", "./none"), "none")
    assert left(here) == []


def test_a_model_that_is_no_mamba(here: Path):
    (here / "gpt").mkdir()
    (here / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (here / "gpt" / "model.safetensors").write_bytes(b"")
    refused(cli("quantize", "gpt", *QUICK), "gpt")
    (here / "gpt" / "config.json").write_text("{")
    refused(cli("quantize", "gpt", *QUICK), "config.json")
    assert left(here) == ["gpt"]


def test_a_missing_tokenizer(model_directory: MakeModel, here: Path):
    model = model_directory()
    for file in model.glob("*token*"):
        file.unlink()
    refused(cli("quantize", model, *QUICK), "holds no tokenizer")
    assert left(here) == []


def test_a_truncated_shard(model_directory: MakeModel, here: Path):
    model = model_directory()
    shard = model / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    refused(cli("quantize", model, *QUICK), "model.safetensors")
    assert left(here) == []


def test_a_missing_tensor(model_directory: MakeModel, here: Path):
    model = model_directory()
    tensors = load_file(model / "model.safetensors")
    del tensors["backbone.layers.1.mixer.x_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(cli("quantize", model, *QUICK), "backbone.layers.1.mixer.x_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(model_directory: MakeModel, here: Path, value: float):
    model = model_directory()
    tensors = load_file(model / "model.safetensors")
    tensors["backbone.layers.1.mixer.out_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(cli("quantize", model, *QUICK), "'backbone.layers.1.mixer.out_proj.weight' holds NaN or Inf")


# -- the request -----------------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide(model_directory: MakeModel, here: Path):
    request = ("quantize", model_directory(), "--recipe", "rtn-w8a8", "--set", "passes.quantize.weights=int4", "--set",
               "passes.quantize.group_size=24", *QUICK)
    refused(cli(*request), "24")
    refused(cli(*request, "--dry-run"), "24")
    assert left(here) == []


@pytest.mark.parametrize(("text", "said"), [("", "holds no text"), ("too short", "tokens")])
def test_empty_or_tiny_text(model_directory: MakeModel, here: Path, text: str, said: str):
    (here / "t.txt").write_text(text)
    refused(cli("quantize", model_directory(), "--text", "t.txt", *QUICK), said)
    assert left(here) == ["t.txt"]


def test_an_output_that_exists(model_directory: MakeModel, here: Path):
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("precious")
    (here / "file").write_text("precious")
    for out in ("out", "file"):
        refused(cli("quantize", model_directory(), "--out", out, *QUICK), f"{out} already exists")
    assert (here / "out" / "mine.txt").read_text() == (here / "file").read_text() == "precious"
    assert left(here) == ["file", "out"]


def test_an_output_that_cannot_be_written(model_directory: MakeModel, here: Path):
    (here / "file").write_text("precious")
    result = cli("quantize", model_directory(), "--recipe", "rtn-w8a8", "--out", "file/out", *QUICK)
    refused(result, "file")
    assert left(here) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk(model_directory: MakeModel, here: Path, small_disk: Path):
    model = model_directory(hidden_size=64)
    result = cli("quantize", model, "--recipe", "rtn-w8a8", "--out", small_disk / "out", *QUICK)
    refused(result, "disk is full")
    assert not (small_disk / "out").exists()
    assert not [path for path in small_disk.rglob("*") if path.name.endswith(".tmp")]


# -- the artifact ----------------------------------------------------------------------------------------------------


def test_a_whole_artifact_passes(packed: Path):
    done = cli("verify", packed)
    assert done.exit_code == 0, done.output
    assert "is whole" in done.output
    assert cli("inspect", packed).exit_code == 0
    spoken = cli("generate", packed, "--prompt", "import ", "-n", "4")
    assert spoken.exit_code == 0, spoken.output
    assert spoken.output.startswith("import ")


@pytest.mark.parametrize("where", [0.02, 0.3, 0.7, 0.999])
def test_a_flipped_byte_is_found(packed: Path, where: float):
    [weights] = packed.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[int(where * len(data))] ^= 1
    weights.write_bytes(data)
    refused(cli("verify", packed), weights.name, code=1)


def test_a_truncated_artifact(packed: Path):
    [weights] = packed.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size - 100)
    refused(cli("verify", packed), weights.name, code=1)
    refused(cli("generate", packed), weights.name)


def test_a_missing_file(packed: Path):
    next(iter(packed.glob("*.safetensors"))).unlink()
    refused(cli("verify", packed), "missing", code=1)
    assert cli("generate", packed).exit_code == 2


def test_an_artifact_of_the_future(packed: Path):
    manifest = packed / "mambacompress.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 999}))
    for command in ("verify", "inspect", "generate"):
        refused(cli(command, packed), "999")


def test_an_artifact_is_not_compressed_twice(packed: Path):
    refused(cli("quantize", packed, "--out", "again", *QUICK), "compressed already")
