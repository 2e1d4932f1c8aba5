"""Image classification on the trainer of ``training.lm``: its schedules, log, checkpoints, resume and processes.

A run learns from labels, or from labels and a teacher: ``Labels`` and, for a student that adds to what others say
already, ``progressive.Residual``.

Legend: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.images import ImageData, Images, batches
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import Batch


class Labels:
    """The cross-entropy of the labels, over augmented training images."""

    noun = "images"
    capturable = True

    def __init__(self, data: ImageData, config: TrainConfig, augment: str) -> None:
        self.data, self.config, self.augment = data, config, augment

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.data, self.config.batch, self.config.seed, start, self.augment)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        images_BCHW, labels_B = batch
        return F.cross_entropy(model(images_BCHW).float(), labels_B)

    def identity(self) -> dict[str, Any]:
        return {"images": self.data.train.sha256, "augment": self.augment}


@torch.no_grad()
def logits_of(model: Any, data: ImageData, images: Images, batch: int = 250) -> Tensor:
    """What ``model`` says of every image, fp32 [N, K], in eval mode (its own is put back)."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        return torch.cat([model(data.normalised(pixels).to(device)).float().cpu()
                          for pixels in images.pixels.split(batch)])
    finally:
        model.train(training)
