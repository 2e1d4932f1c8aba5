"""The examples run as they stand, and leave what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mambacompress as mc


def run(repository: Path, folder: Path, name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(repository / "examples" / name), *arguments], cwd=folder, text=True,
                          capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"a small text, line {i} of many, for a small model" for i in range(400)))
    return file


def test_finetune_is_short_and_ends_in_a_packed_model(repository: Path, tmp_path: Path, model_directory: object,
                                                      text: Path):
    assert len((repository / "examples" / "finetune.py").read_text().splitlines()) <= 40
    source = model_directory(hidden_size=32)  # type: ignore[operator]
    said = run(repository, tmp_path, "finetune.py", str(source), "6", str(text), str(text))
    assert "step 0: loss" in said
    assert "50% sparse" in said
    counted = mc.verify(tmp_path / "finetuned-2of4")
    assert set(counted["patterns"].values()) == {"2:4"}
    assert json.loads((tmp_path / "finetuned" / "config.json").read_text())["nm_sparsity"] == {
        "in_proj": "2:4", "out_proj": "2:4"}
    assert said.splitlines()[-1].startswith("2:4 ")


def test_trainer_ends_in_a_sparse_model_that_stock_transformers_loads(repository: Path, tmp_path: Path,
                                                                      model_directory: object):
    from transformers import AutoModelForCausalLM

    source = model_directory()  # type: ignore[operator]
    run(repository, tmp_path, "trainer.py", str(source), "4")
    assert (tmp_path / "trainer" / "checkpoint-4" / "session.safetensors").is_file()
    stock, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned"), mc.load(tmp_path / "finetuned")
    for name, parameter in stock.named_parameters():
        if name.endswith(("in_proj.weight", "out_proj.weight")):
            assert int((parameter == 0).sum()) == parameter.numel() // 2
            assert parameter.equal(ours.get_parameter(name))
