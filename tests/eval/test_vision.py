"""Top-1 accuracy: what is right, how sure that is, and the paired difference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mambacompress.eval.vision import correct, evaluate_images, top1, top1_change
from mambacompress.images import ImageData, Images

LOGITS = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 2.0]])
LABELS = torch.tensor([0, 1, 1, 1])


def test_top1_is_a_share_with_its_standard_error():
    assert correct(LOGITS, LABELS).tolist() == [1, 1, 0, 1]
    found = top1(LOGITS, LABELS)
    assert found.value == 0.75
    assert found.se == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # sample deviation / sqrt(4)


def test_a_difference_is_paired():
    other = LOGITS.clone()
    other[0] = torch.tensor([0.0, 1.0])
    other[2] = torch.tensor([0.0, 1.0])
    change = top1_change(other, LOGITS, LABELS)
    assert (change.delta.value, change.gained, change.lost) == (0.0, 1, 1)
    assert change.delta.se == pytest.approx(math.sqrt(2 / 3 / 4))
    same = top1_change(LOGITS, LOGITS, LABELS)
    assert (same.delta.value, same.delta.se) == (0.0, 0.0)


def test_a_model_is_measured_in_eval_mode_and_left_as_it_was():
    data = ImageData("toy", *(Images(torch.arange(16, dtype=torch.uint8).reshape(4, 1, 2, 2), LABELS)
                              for _ in range(2)))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    assert evaluate_images(model, data) == evaluate_images(model, data)
    assert model.training


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="not of the same images"):
        top1(LOGITS, LABELS[:3])
