"""``mc.sparsify`` and its command: one shot or trained, stopped and resumed, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mambacompress as mc
from mambacompress.cli import app
from mambacompress.errors import UserError
from mambacompress.training.log import read_log

TEXT = "\n".join(f"a small text, line {i} of many, for a small model" for i in range(300))
SHORT = ["calibration.sequences=2", "calibration.length=16"]
TRAIN = [*SHORT, "training.steps=6", "training.batch=2", "training.length=16", "training.warmup=1",
         "training.precision=fp32", "training.learning_rate=5e-3"]


@pytest.fixture(autouse=True)
def calm() -> Any:
    with warnings.catch_warnings():  # cast's, of runs too short to decay anything
        warnings.filterwarnings("ignore", message="cast")
        yield


@pytest.mark.parametrize("recipe", ["nm-2of4", "cast-2of4", "nm-2of4-w8a8"])
def test_training_ends_in_a_packed_artifact(model_directory: Any, tmp_path: Path, recipe: str):
    source, out = model_directory(), tmp_path / "out"
    method = [] if recipe == "cast-2of4" else ["training.method=mdgf-linear"]
    told: list[Any] = []
    made = mc.sparsify(source, recipe, texts=TEXT, out=out, progress=lambda *what: told.append(what),
                       overrides=[*method, *TRAIN, "checks={}"])
    counted = mc.verify(out)
    assert set(counted["patterns"].values()) == {"2:4"}
    assert counted["zeros"] >= counted["sparse_weights"] // 2
    rows = [figures for stage, _, _, figures in told if stage == "training"]
    assert len(rows) == 6
    assert {"loss", "sparsity", "tokens_per_second"} <= set(rows[0])
    sparse = mc.load(tmp_path / "out.training" / "model")
    weight = sparse.backbone.layers[0].mixer.in_proj.weight
    assert torch.equal(made.model.backbone.layers[0].mixer.in_proj.kept(), weight != 0)
    ids = torch.randint(1, 97, (2, 12))
    with torch.no_grad():
        packed, floats = (m(input_ids=ids, use_cache=False).logits for m in (made.model, sparse))
    assert (packed - floats).norm() < (0.05 if "w8a8" in recipe else 1e-3) * floats.norm()


def test_an_interrupted_run_goes_on_to_the_same_bytes(model_directory: Any, tmp_path: Path):
    source = model_directory()

    def run(out: Path, stop: int | None = None, resume: bool = False) -> None:
        def progress(stage: str, done: int, total: int, figures: Any) -> None:
            if stage == "training" and done == stop:
                raise KeyboardInterrupt

        mc.sparsify(source, "nm-2of4", texts=TEXT, out=out, progress=progress, resume=resume,
                    overrides=["training.method=sr-ste", *TRAIN])

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=3)
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    assert read_log(tmp_path / "cut.training") == read_log(tmp_path / "whole.training")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_one_shot_needs_no_training(tiny_mamba: Any, tiny_tokenizer: Any):
    before = tiny_mamba.state_dict()["backbone.layers.0.mixer.in_proj.weight"].clone()
    made = mc.sparsify(tiny_mamba, "nm-1of8", tokenizer=tiny_tokenizer, texts=torch.randint(0, 97, (2, 16)))
    assert set(mc.verify(made.directory)["patterns"].values()) == {"1:8"}
    assert torch.equal(tiny_mamba.state_dict()["backbone.layers.0.mixer.in_proj.weight"], before)


def test_a_model_in_memory_is_trained_as_a_copy(tiny_mamba: Any, tiny_tokenizer: Any, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in tiny_mamba.state_dict().items()}
    mc.sparsify(tiny_mamba, "nm-2of4", tokenizer=tiny_tokenizer, texts=TEXT, out=tmp_path / "out",
                overrides=["training.method=sr-ste", *TRAIN])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_mamba.state_dict().items())


def test_what_is_refused(model_directory: Any, tmp_path: Path):
    source = model_directory()
    with pytest.raises(UserError, match="has no prune step"):
        mc.sparsify(source, "w8a8")
    with pytest.raises(UserError, match="brings no text of its own"):
        mc.sparsify(source, "cast-2of4", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"trains the model first.*use sparsify"):
        mc.quantize(source, "cast-2of4")
    with pytest.raises(UserError, match="training needs a prune pass"):
        mc.load_recipe("w8a8", ["training.method=sr-ste"])
    with pytest.raises(UserError, match="reach belongs to mdgf and sdgf"):
        mc.load_recipe("cast-2of4", ["training.reach=0.5"])
    with pytest.raises(UserError, match="did you mean 'sr-ste'"):
        mc.load_recipe("cast-2of4", ["training.method=srste"])


def test_the_command(model_directory: Any, tmp_path: Path):
    source, out = model_directory(), tmp_path / "out"
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    changes = [part for each in ("training.method=sr-ste", *TRAIN) for part in ("--set", each)]
    done = CliRunner().invoke(app, ["sparsify", str(source), "--recipe", "nm-2of4", "--text", str(file), "--out",
                                    str(out), *changes])
    assert done.exit_code == 0, done.output
    verified = CliRunner().invoke(app, ["verify", str(out)])
    assert "4 layers are 2:4 sparse" in verified.output
    assert "(50.0%)" in verified.output
    planned = CliRunner().invoke(app, ["sparsify", str(source), "--recipe", "nm-1of4", "--dry-run"])
    assert "1:4 by sparsegpt" in planned.output
