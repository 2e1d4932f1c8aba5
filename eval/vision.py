"""Top-1 accuracy of image classifiers, with its standard error, and paired with another model's on the same images.

Legend: N images, K classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambacompress.eval import stats
from mambacompress.images import ImageData
from mambacompress.training.vision import logits_of


def top1(logits_NK: Tensor, labels_N: Tensor) -> stats.Estimate:
    """Share of images whose largest logit is their label's."""
    return stats.mean(correct(logits_NK, labels_N).numpy())


def correct(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """1.0 where the largest logit is the label's, else 0.0; fp64 [N]."""
    if logits_NK.dim() != 2 or labels_N.shape != logits_NK.shape[:1]:
        raise ValueError(f"logits {tuple(logits_NK.shape)} and labels {tuple(labels_N.shape)} are not of the same "
                         "images")
    return (logits_NK.argmax(-1) == labels_N).double()


def evaluate_images(model: Any, data: ImageData) -> stats.Estimate:
    """Top-1 of ``model`` on the test images."""
    return top1(logits_of(model, data, data.test), data.test.labels)


def top1_change(logits_NK: Tensor, baseline_NK: Tensor, labels_N: Tensor) -> stats.AccuracyChange:
    """Paired difference of two models' top-1 on the same images."""
    return stats.accuracy_change(correct(logits_NK, labels_N).numpy(), correct(baseline_NK, labels_N).numpy())
