"""Distillation losses against values worked out by hand, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambacompress.training.losses import KINDS, relative_error, row_losses

STUDENT = [[1.0, 2.0, -0.5], [0.0, 0.0, 3.0]]
TEACHER = [[0.5, -1.0, 2.0], [2.0, 1.0, 1.0]]
LABELS = [2, 0]


def softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def by_hand(kind: str, s: Sequence[float], t: Sequence[float], label: int, T: float) -> float:
    if kind == "ce":
        return -math.log(softmax(s)[label])
    if kind == "hard":
        return -math.log(softmax(s)[list(t).index(max(t))])
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
    p, q = softmax(t, T), softmax(s, T)
    if kind == "kl":
        return T * T * kl(p, q)
    if kind == "reverse-kl":
        return T * T * kl(q, p)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return T * T * (kl(p, m) + kl(q, m)) / 2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_is_its_formula(kind: str, temperature: float):
    got = row_losses(kind, torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS), temperature)
    want = [by_hand(kind, s, t, y, temperature) for s, t, y in zip(STUDENT, TEACHER, LABELS, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_golden_numbers():
    """Of one row, worked out with a calculator: logits (0, ln 3) and (0, 0)."""
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    assert row_losses("ce", student, None, torch.tensor([0])).item() == pytest.approx(1.3862944)  # -ln 1/4
    assert row_losses("kl", student, teacher, None).item() == pytest.approx(0.1438410)  # ln(4/3) / 2
    assert row_losses("reverse-kl", student, teacher, None).item() == pytest.approx(0.1308120)
    assert row_losses("jsd", student, teacher, None).item() == pytest.approx(0.0338221, rel=1e-5)
    assert row_losses("kl", student, teacher, None, 2.0).item() == pytest.approx(4 * 0.0372522, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=4, max_size=4), st.lists(st.floats(-60, 60), min_size=4, max_size=4),
       st.floats(0.3, 5))
def test_divergences_have_their_bounds(s: list[float], t: list[float], temperature: float):
    student, teacher = torch.tensor([s]).double(), torch.tensor([t]).double()
    values = {kind: row_losses(kind, student, teacher, None, temperature).item()
              for kind in ("kl", "reverse-kl", "jsd")}
    assert all(math.isfinite(value) and value >= -1e-9 for value in values.values())
    assert values["jsd"] <= temperature**2 * math.log(2) + 1e-9
    assert row_losses("kl", teacher, teacher, None, temperature).item() == pytest.approx(0, abs=1e-12)


def test_a_class_the_teacher_excludes_counts_nothing():
    teacher, student = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]], requires_grad=True)
    loss = row_losses("kl", student, teacher, None).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.isfinite(student.grad).all()


def test_the_gradient_keeps_its_size_with_temperature():
    """T² undoes the 1/T of the logits and the 1/T of the softmax: for large T the gradient no longer depends on it."""
    sizes = []
    for temperature in (50.0, 100.0):
        student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        row_losses("kl", student, torch.tensor([[0.0, 2.0, 0.0]]), None, temperature).sum().backward()
        sizes.append(student.grad)
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.02, atol=1e-3)
    student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)  # Hinton: the limit is the centred difference / V
    difference = student.detach() - torch.tensor([[0.0, 2.0, 0.0]])
    torch.testing.assert_close(sizes[1], (difference - difference.mean()) / 3, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
def test_half_precision_logits_are_read_in_fp32(kind: str):
    torch.manual_seed(1)
    student, teacher = (torch.randn(5, 300) * 4 for _ in range(2))
    labels = torch.arange(5)
    rough = row_losses(kind, student.bfloat16(), teacher.bfloat16(), labels)
    exact = row_losses(kind, student.bfloat16().double(), teacher.bfloat16().double(), labels)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_relative_error_of_hidden_states():
    torch.testing.assert_close(relative_error(torch.tensor([[3.0, 4.0], [1.0, 1.0]]),
                                              torch.tensor([[0.0, 5.0], [1.0, 1.0]])), torch.tensor([10 / 25, 0.0]))
    assert torch.isfinite(relative_error(torch.ones(1, 2), torch.zeros(1, 2))).all()


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="no loss 'kll'"):
        row_losses("kll", torch.zeros(1, 2), None, None)
    with pytest.raises(ValueError, match="needs a teacher"):
        row_losses("kl", torch.zeros(1, 2), None, None)
    with pytest.raises(ValueError, match="needs labels"):
        row_losses("ce", torch.zeros(1, 2), None, None)
