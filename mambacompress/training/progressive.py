"""Progressive distillation: a chain of students, each of which learns what the sum of those before it still gets wrong.

Student k adds its logits f_k to the frozen sum S_{k-1} of the others and is trained on the sum,

    loss = alpha * CE(S_{k-1} + f_k, label) + (1 - alpha) * soft(S_{k-1} + f_k, teacher)

whose gradient in f_k is the residual error of the sum so far. ``soft`` is ``kl`` (T² KL(teacher || sum)) or ``mse``,
which is, word for word, f_k fitted to teacher - S_{k-1}. The prefix sums S_1, S_2, ... are answers that can be read at
any time: a device stops where its time ends. Source: Medina et al., Mamba base PKD (arXiv 2503.01727).

All students read the same augmented batches (a function of seed and step), so the teacher's logits, and those of every
finished student, are computed once and kept (``Remembered``).

Legend: B batch, C image channels, H W image, K classes, S steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.images import ImageData, batches
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import Batch
from mambacompress.training.losses import row_losses

SOFT = ("kl", "mse")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """alpha: the share of the labels. temperature: of the soft loss. soft: ``kl`` or ``mse``."""

    alpha: float = 0.3
    temperature: float = 2.0
    soft: str = "kl"

    def loss(self, sum_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor) -> Tensor:
        """alpha * hard + (1 - alpha) * soft, the mean over the batch."""
        hard = row_losses("ce", sum_BK, None, labels_B).mean()
        soft = row_losses(self.soft, sum_BK, teacher_BK, None, self.temperature).mean()
        return self.alpha * hard + (1 - self.alpha) * soft


class Remembered:
    """A frozen model's logits on the batches of a run, computed when first asked for: fp32 [S, B, K]."""

    def __init__(self, model: nn.Module, steps: int, batch: int, classes: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self._logits_SBK = torch.empty(steps, batch, classes)
        self._known = [False] * steps

    @torch.no_grad()
    def logits(self, step: int, images_BCHW: Tensor) -> Tensor:
        """[B, K] of the batch of ``step``."""
        if not self._known[step]:
            device = next(self.model.parameters()).device
            self._logits_SBK[step] = self.model(images_BCHW.to(device)).float().cpu()
            self._known[step] = True
        return self._logits_SBK[step]


class Residual:
    """What one student learns from: labels, the teacher's logits, and the sum of the students in front of it."""

    noun = "images, teacher or students before"
    capturable = True

    def __init__(self, data: ImageData, config: TrainConfig, augment: str, mixture: Mixture, teacher: Remembered,
                 before: Sequence[Remembered] = ()) -> None:
        self.data, self.config, self.augment, self.mixture = data, config, augment, mixture
        self.teacher, self.before = teacher, tuple(before)

    def batches(self, start: int) -> Iterator[Batch]:
        stream = batches(self.data, self.config.batch, self.config.seed, start, self.augment)
        for step, (images_BCHW, labels_B) in enumerate(stream, start):
            if step >= self.config.steps:
                return
            teacher_BK = self.teacher.logits(step, images_BCHW)
            sum_BK = torch.zeros_like(teacher_BK)
            for member in self.before:
                sum_BK = sum_BK + member.logits(step, images_BCHW)
            yield images_BCHW, labels_B, teacher_BK, sum_BK

    def loss(self, model: Any, batch: Batch) -> Tensor:
        images_BCHW, labels_B, teacher_BK, sum_BK = batch
        return self.mixture.loss(sum_BK + model(images_BCHW).float(), teacher_BK, labels_B)

    def identity(self) -> dict[str, Any]:
        mixture = self.mixture
        return {"images": self.data.train.sha256, "augment": self.augment,
                "loss": [mixture.alpha, mixture.temperature, mixture.soft],
                "teacher": fingerprint(self.teacher.model), "before": [fingerprint(m.model) for m in self.before]}


class Chain(nn.Module):
    """Students whose logits add up. Call: images -> the sum of all of them, [B, K]."""

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        *_, last = self.anytime(images_BCHW)
        return last

    def anytime(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """The answer after one student, after two, ...: stop reading whenever time is up."""
        sum_BK: Tensor | None = None
        for student in self.students:
            logits_BK = student(images_BCHW)
            sum_BK = logits_BK if sum_BK is None else sum_BK + logits_BK
            yield sum_BK


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and bytes of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
