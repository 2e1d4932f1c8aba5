"""The artifact: saved whole or not at all, loaded strictly, and loud where it cannot be trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mambacompress as mc
from mambacompress import artifact, storage
from mambacompress.cli import app

RECIPE = {
    "name": "fast",
    "passes": [
        {"fuse_norms": {}},
        {"rotate": {"residual": "klt-hadamard", "out": "hadamard"}},
        {"quantize": {"weights": "int8", "activations": "int8-token"}},
    ],
}


@pytest.fixture
def made(model_directory: Any, tmp_path: Path) -> Path:
    """A small artifact."""
    ids = torch.randint(1, 97, (4, 24), generator=torch.Generator().manual_seed(1))
    mc.quantize(model_directory(), RECIPE, calibration=ids, out=tmp_path / "made")
    return tmp_path / "made"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_sentence(result: Any, code: int, says: str) -> None:
    """The command ended with ``code`` and said it in one line, with a next step and no traceback."""
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_loaded_model_holds_its_tensors_in_one_memory_and_no_file(made: Path) -> None:
    """What lay in the file lies in one memory of that size, in lines of 64 bytes; the file is not mapped any more."""
    stored = storage.stored_tensors(made / "model.safetensors")
    host = mc.load(made)
    held = {name: tensor for name, tensor in (*host.named_parameters(), *host.named_buffers()) if name in stored}
    assert held.keys() == stored.keys()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values()}
    assert list(sizes.values()) == [sum(-(-entry.size // 64) * 64 for entry in stored.values())]
    maps = Path("/proc/self/maps")
    assert not maps.is_file() or str(made) not in maps.read_text()


def test_transformers_loads_it_after_the_import_and_runs_the_same(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    import mambacompress.hf  # noqa: F401

    ids_BL = torch.randint(1, 97, (2, 9))
    ours, theirs = mc.load(made), AutoModelForCausalLM.from_pretrained(made)
    assert torch.equal(ours(ids_BL, use_cache=False).logits, theirs(ids_BL, use_cache=False).logits)
    assert theirs.lm_head.qweight.data_ptr() == theirs.backbone.embeddings.qweight.data_ptr(), "the tie is lost"
    assert torch.equal(
        ours.generate(ids_BL, max_new_tokens=6, do_sample=False),
        theirs.generate(ids_BL, max_new_tokens=6, do_sample=False),
    )


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "MambaForCausalLM"])
def test_transformers_refuses_it_without_the_import(loader: str, made: Path) -> None:
    result = python(f"import sys; from transformers import {loader}; {loader}.from_pretrained(sys.argv[1])", made)
    assert result.returncode != 0, "it loaded, with random weights"
    assert "ignore_mismatched_sizes" in result.stderr


def test_loading_twice_gives_the_same_model(made: Path) -> None:
    one, two = mc.load(made).state_dict(), mc.load(made).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_is_pickled(made: Path) -> None:
    assert {file.suffix for file in made.iterdir()} <= {".json", ".safetensors", ".yaml", ".md"}


def test_shards_hold_the_same_tensors(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(made / "model.safetensors")
    names = sorted(whole)
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({name: whole[name] for name in names[::2]}, parts[0])
    save_file({name: whole[name] for name in names[1::2]}, parts[1])
    monkeypatch.setattr(artifact, "_SHARD_BYTES", 4096)
    (tmp_path / "sharded").mkdir()
    files = artifact.assemble(parts, tmp_path / "sharded")
    assert "model.safetensors.index.json" in files
    assert len(files) > 3
    merged = {
        name: tensor
        for file in files
        if file.endswith("tensors")
        for name, tensor in load_file(tmp_path / "sharded" / file).items()
    }
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in names)


def test_an_edited_manifest(made: Path) -> None:
    file = made / artifact.MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"coverage": 0.5}))
    one_sentence(run("verify", made), 1, "coverage counted from the tensors")


def test_a_manifest_that_is_not_json(made: Path) -> None:
    (made / artifact.MANIFEST).write_text("{")
    one_sentence(run("generate", made, "-p", "a"), 2, "is damaged")


def test_a_missing_tensor_and_a_foreign_one(made: Path) -> None:
    shard = made / "model.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    with pytest.raises(mc.UserError, match=r"lacks \d tensors"):
        mc.load(made)
    save_file(tensors | {"stranger": torch.ones(1)}, shard)
    with pytest.raises(mc.UserError, match="no place for"):
        mc.load(made)


# -- bad input to quantize -------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return file


SMALL = ("--set", "calibration.sequences=4", "--set", "calibration.length=24", "--recipe", "rtn-w8a8")


def quantize(source: Path, text: Path, *more: Any) -> Any:
    return run("quantize", source, "--text", text, *SMALL, *more)


def test_the_command_works_and_says_what_it_made(model_directory: Any, text: Path, tmp_path: Path) -> None:
    result = quantize(model_directory(), text, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert run("verify", tmp_path / "out").exit_code == 0


def test_an_unknown_recipe_and_key(model_directory: Any, text: Path) -> None:
    source = model_directory()
    one_sentence(run("quantize", source, "--text", text, "--recipe", "w8a9"), 2, "did you mean 'w8a8'")
    one_sentence(quantize(source, text, "--set", "passes.quantize.wieghts=int8"), 2, "did you mean 'weights'")


def test_interrupted_it_says_how_to_go_on(model_directory: Any, text: Path, tmp_path: Path) -> None:
    source, out = model_directory(num_hidden_layers=6), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "mambacompress",
        "quantize",
        str(source),
        "--text",
        str(text),
        "--recipe",
        "w8a8",
        "--set",
        "calibration.sequences=16",
        "--set",
        "calibration.length=64",
        "--set",
        "checks.max_perplexity_ratio=null",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (out.with_name("out.partial") / "block-00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert not out.exists()
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert mc.verify(out)["coverage"] == 1.0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    storage.write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]
