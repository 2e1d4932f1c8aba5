"""Chains of students: each learns the residual of the sum so far; runs resume; the report counts what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacompress.distill_recipe import load_distill_recipe
from mambacompress.distilling.images import load_chain, load_models, run_progressive
from mambacompress.errors import UserError
from mambacompress.eval.progressive import load_progressive, operations
from mambacompress.eval.vision import correct, top1
from mambacompress.models.flops import vision_flops
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import fit
from mambacompress.training.log import read_log
from mambacompress.training.progressive import Chain, Mixture, Remembered, Residual
from mambacompress.training.vision import Labels, logits_of
from tests.training.chain import DATA, RECIPE, run
from tests.training.pair import two_processes


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


CONFIG = TrainConfig(steps=12, batch=10, length=9, warmup=2, learning_rate=0.01)

class Linear(nn.Module):
    """A classifier of pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def remembered(seed: int, config: TrainConfig = CONFIG) -> Remembered:
    return Remembered(Linear(seed), config.steps, config.batch, 3)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_mixture_is_its_formula():
    s, t, y = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([1])
    p, q = (torch.tensor([math.exp(v / 2) for v in row]) for row in (t[0].tolist(), s[0].tolist()))
    p, q = p / p.sum(), q / q.sum()
    soft = 4 * float((p * (p / q).log()).sum())
    hard = -math.log(math.exp(0.0) / (math.e + 1 + math.exp(2.0)))
    assert Mixture(alpha=0.3, temperature=2.0).loss(s, t, y).item() == pytest.approx(0.3 * hard + 0.7 * soft, rel=1e-5)
    squares = (1 + 0.25 + 1) / 3
    assert Mixture(alpha=0.25, soft="mse").loss(s, t, y).item() == pytest.approx(0.25 * hard + 0.75 * squares, rel=1e-5)


@pytest.mark.parametrize("soft", ["kl", "mse"])
def test_a_students_gradient_is_the_residual_error_of_the_sum(soft: str):
    """mse: sum - teacher; kl: T (softmax(sum / T) - softmax(teacher / T)); both over the batch."""
    torch.manual_seed(2)
    f, before, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.randn(4, 3)
    mixture, labels = Mixture(alpha=0.0, temperature=2.0, soft=soft), torch.zeros(4, dtype=torch.long)
    mixture.loss(before + f, teacher, labels).backward()
    total = (before + f).detach()
    wanted = 2 * (total - teacher) / 3 if soft == "mse" else 2 * ((total / 2).softmax(-1) - (teacher / 2).softmax(-1))
    torch.testing.assert_close(f.grad, wanted / 4)


def test_a_student_is_trained_on_the_sum_of_those_before():
    teacher, first = remembered(0), remembered(1)
    source = Residual(DATA, CONFIG, "shift", Mixture(), teacher, [first])
    images_BCHW, labels_B, teacher_BK, sum_BK = next(iter(source.batches(0)))
    torch.testing.assert_close(teacher_BK, teacher.model(images_BCHW))
    torch.testing.assert_close(sum_BK, first.model(images_BCHW))
    student = Linear(5)
    batch = (images_BCHW, labels_B, teacher_BK, sum_BK)
    assert source.loss(student, batch).item() == pytest.approx(
        Mixture().loss(sum_BK + student(images_BCHW), teacher_BK, labels_B).item())
    assert not any(p.requires_grad for member in (teacher, first) for p in member.model.parameters())


def test_a_second_student_improves_what_the_first_left(tmp_path: Path):
    """With the first one frozen, the sum fits the teacher better than the first alone, on the training stream."""
    config = replace(CONFIG, steps=60, learning_rate=0.02)
    teacher_model = Linear(0)
    list(fit(teacher_model, Labels(DATA, config, "none"), config, tmp_path / "teacher"))
    teacher = Remembered(teacher_model, config.steps, config.batch, 3)
    models, before = [], []
    for i in (1, 2):
        models.append(Linear(i))
        short = replace(config, steps=8 if i == 1 else 60)
        list(fit(models[-1], Residual(DATA, short, "none", Mixture(alpha=0.0), teacher, before), short,
                 tmp_path / str(i)))
        before = [Remembered(models[-1], config.steps, config.batch, 3)]
    wanted = logits_of(teacher_model, DATA, DATA.test)
    one, both = (logits_of(model, DATA, DATA.test) for model in (models[0], Chain(models)))
    wrong = [Mixture(alpha=0.0).loss(x, wanted, DATA.test.labels).item() for x in (one, both)]
    assert wrong[1] < 0.5 * wrong[0]


def test_logits_are_computed_once():
    calls = []
    member = remembered(0)
    member.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    source = Residual(DATA, CONFIG, "none", Mixture(), member)
    one, two = (list(source.batches(0)) for _ in range(2))
    assert calls == [False] * CONFIG.steps
    assert len(one) == len(two) == CONFIG.steps
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True))


def test_the_answer_can_be_read_at_any_time():
    chain, x = Chain([Linear(i) for i in range(3)]), torch.randn(2, 1, 6, 6)
    parts = list(chain.anytime(x))
    assert len(parts) == 3
    torch.testing.assert_close(parts[1], chain.students[0](x) + chain.students[1](x))
    assert torch.equal(parts[-1], chain(x))
    calls = []
    chain.students[1].register_forward_hook(lambda *_: calls.append(1))
    next(chain.anytime(x))
    assert not calls, "who stops after one student pays for one"


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return out, run(out)


def test_a_report_counts_what_it_says(finished: tuple[Path, Any]):
    out, report = finished
    models = load_models(out / "models")
    assert list(models) == ["teacher", "student-1", "student-2", "single"]
    assert [row.name for row in report.rows] == list(models)
    flops = {name: vision_flops(model).total for name, model in models.items()}
    assert flops["student-1"] < flops["student-2"], "growing: the smallest answers first"
    total = torch.zeros(len(DATA.test), 3)
    spent = 0
    for row in report.rows:
        logits = logits_of(models[row.name], DATA, DATA.test)
        assert row.flops == flops[row.name]
        assert row.alone.top1 == top1(logits, DATA.test.labels).value
        if row.name.startswith("student"):
            total, spent = total + logits, spent + flops[row.name]
            assert row.together.top1 == correct(total, DATA.test.labels).mean().item()
            assert row.flops_together == spent
            assert row.share_together == pytest.approx(spent / flops["teacher"])
        else:
            assert row.together is None
    chain = load_chain(out / "models")
    assert torch.equal(logits_of(chain, DATA, DATA.test), total)


def test_a_report_is_read_back_and_shown(finished: tuple[Path, Any]):
    out, report = finished
    assert load_progressive(out) == report
    text = (out / "progressive.md").read_text("utf-8")
    assert text.count("\n| ") == 5
    assert "cumulative MFLOPs" in text
    page = (out / "progressive.html").read_text("utf-8")
    assert all(name in page for name in ("<svg", "student-2", "operations an image", "Top-1"))
    assert "http" not in page.replace("http-equiv", "")
    with pytest.raises(UserError, match="no report of a progressive"):
        load_progressive(out / "models")
    assert [operations(n) for n in (1.5e6, 2e9, 300, 4000)] == ["1.5 M", "2 G", "300", "4 k"]


def test_a_shrinking_chain_starts_with_the_largest(tmp_path: Path):
    report = run(tmp_path, chain="shrinking", single=None)
    assert [row.name for row in report.rows] == ["teacher", "student-1", "student-2"]
    assert report.rows[1].flops > report.rows[2].flops


class Stop(Exception):
    """A caller that stops."""


def test_a_stopped_run_goes_on_to_the_same_losses(finished: tuple[Path, Any], tmp_path: Path):
    def stop(stage: str, done: int, total: int, figures: Any) -> None:
        if (stage, done) == ("student-2", 5):
            raise Stop

    with pytest.raises(Stop):
        run_progressive(load_distill_recipe(RECIPE), DATA, tmp_path, progress=stop)
    assert not (tmp_path / "progressive.json").exists()
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path)
    report = run(tmp_path, resume=True)
    assert report.rows == finished[1].rows
    for name in ("teacher", "student-1", "student-2", "single"):
        assert read_log(tmp_path / name) == read_log(finished[0] / name)


def test_two_processes_see_the_losses_of_one(finished: tuple[Path, Any], tmp_path: Path):
    two_processes("chain.py", str(tmp_path))
    for name in ("teacher", "student-1", "student-2", "single"):
        one, two = ([row["loss"] for row in read_log(out / name)] for out in (finished[0], tmp_path))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert [row.flops for row in load_progressive(tmp_path).rows] == [row.flops for row in finished[1].rows]


def test_another_recipe_does_not_go_on(finished: tuple[Path, Any]):
    with pytest.raises(UserError, match="another recipe or other images"):
        run(finished[0], resume=True, chain="shrinking")


def test_a_student_does_not_go_on_beside_another_teacher(tmp_path: Path):
    rows = fit(Linear(1), Residual(DATA, CONFIG, "none", Mixture(), remembered(0)), CONFIG, tmp_path)
    next(rows)
    rows.close()
    with pytest.raises(UserError, match="reads another images, teacher or students before"):
        list(fit(Linear(1), Residual(DATA, CONFIG, "none", Mixture(), remembered(9)), CONFIG, tmp_path, resume=True))


def test_models_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no models"):
        load_models(tmp_path)
    (tmp_path / "shapes.json").write_text(json.dumps({"teacher": {"width": 3}}))
    with pytest.raises(UserError, match="holds no models"):
        load_chain(tmp_path)
