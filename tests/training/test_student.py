"""Students made of their teacher's layers, and language runs from recipe to directory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mambacompress as mc
from mambacompress.distill_recipe import load_distill_recipe
from mambacompress.distilling.language import run_language
from mambacompress.errors import UserError
from mambacompress.models.lm import generate
from mambacompress.training.distill import distill
from mambacompress.training.student import kept_layers, shortened

TEXT = ["".join(f"line {i} of a text that is long enough to learn from.\n" for i in range(120))]
SHORT = ["train.steps=8", "train.warmup=2", "train.batch=2", "train.length=16", "train.precision=fp32"]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def ids() -> Tensor:
    return torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(5))


def test_layers_are_kept_evenly_with_both_ends():
    assert kept_layers(4, 8) == [0, 2, 5, 7]
    assert kept_layers(0.5, 8) == [0, 2, 5, 7]
    assert kept_layers(1.0, 3) == [0, 1, 2]
    assert kept_layers(1, 8) == [7], "a whole number counts layers, a share is written with a point"
    assert kept_layers(2, 24) == [0, 23]
    with pytest.raises(UserError, match="of 9 layers cannot be made of a teacher of 8"):
        kept_layers(9, 8)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_student_is_its_teachers_own_layers(kind: str, model_directory: Any):
    teacher = mc.load(model_directory(kind, num_hidden_layers=4))
    before = copy.deepcopy(teacher.state_dict())
    student = shortened(teacher, 2)
    assert student.config.num_hidden_layers == len(student.backbone.layers) == 2
    assert teacher.config.num_hidden_layers == len(teacher.backbone.layers) == 4
    h = teacher.backbone.embeddings(ids())
    with torch.no_grad():
        for i in (0, 3):
            layer = teacher.backbone.layers[i]
            h = h + layer.mixer(layer.norm(h))
        wanted = teacher.lm_head(teacher.backbone.norm_f(h))
        torch.testing.assert_close(student(ids(), use_cache=False).logits, wanted)
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values(), strict=True))


def test_a_student_generates_with_its_own_cache(model_directory: Any):
    """Its layers are renumbered: a cache of two layers, not of four."""
    student = shortened(mc.load(model_directory("mamba", num_hidden_layers=4)), 2)
    made = student.generate(ids(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(made, generate(student, ids(), 4, eos_token_id=[]))


def test_a_student_can_be_saved_and_loaded(model_directory: Any, tmp_path: Path):
    directory = model_directory("mamba", num_hidden_layers=4)
    recipe = load_distill_recipe("distill-half", SHORT)
    made = run_language(recipe, directory, tmp_path / "out", texts=TEXT, eval_texts=["held out text. " * 40])
    student = mc.load(made.directory)
    assert student.config.num_hidden_layers == 2
    assert set(made.perplexities) == {"teacher", "start", "student"}
    assert made.facts["student"].endswith("the teacher's layers 0, 3")
    card = (made.directory / "README.md").read_text("utf-8")
    assert "held-out perplexity of the teacher" in card
    assert (tmp_path / "out" / "training.html").is_file()
    with pytest.raises(UserError, match="already holds a run"):
        run_language(recipe, directory, tmp_path / "out", texts=TEXT)
    with pytest.raises(UserError, match="another text or teacher"):
        run_language(load_distill_recipe("distill-half", [*SHORT, "loss.ce=0.7"]), directory, tmp_path / "out",
                     texts=TEXT, resume=True)
    again = run_language(recipe, directory, tmp_path / "out", texts=TEXT, resume=True)
    assert torch.equal(mc.load(again.directory)(ids(), use_cache=False).logits,
                       student(ids(), use_cache=False).logits)


def test_distillation_brings_the_short_student_nearer(model_directory: Any, tmp_path: Path):
    teacher = mc.load(model_directory("mamba", num_hidden_layers=4))
    recipe = load_distill_recipe("distill-half", [*SHORT, "train.steps=80", "train.learning_rate=0.003", "loss.ce=0"])
    made = run_language(recipe, teacher, tmp_path, texts=TEXT)
    batch = mc.load_tokenizer(teacher)(TEXT[0][:200], return_tensors="pt").input_ids[:, :64]
    start, end = (distill(student, teacher, "kl")(batch).item()
                  for student in (shortened(teacher, 2), mc.load(made.directory)))
    assert end < 0.7 * start


def test_self_distillation_of_a_quantized_student_packs_what_it_trained(model_directory: Any, tmp_path: Path):
    teacher = mc.load(model_directory("mamba"))
    recipe = load_distill_recipe("self-w4a8", [*SHORT, "quantize.group_size=8"])
    made = run_language(recipe, teacher, tmp_path, texts=TEXT, eval_texts=["held out text. " * 40])
    packed = mc.load(made.directory)
    kinds = {type(module).__name__ for module in packed.modules()}
    assert {"PackedLinear", "PackedEmbedding", "PackedHead"} <= kinds
    assert packed.backbone.layers[0].mixer.in_proj.weights.bits == 4
    assert made.change is not None
    assert "the student before training" in " ".join(made.facts)
    mc.verify(made.directory)
