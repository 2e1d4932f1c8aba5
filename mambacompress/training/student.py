"""A student made of its teacher's own layers, and what it learns from: text, beside the teacher.

``shortened`` keeps some of the blocks, evenly spread, the first and the last among them, with the embedding, the last
norm and the head; it starts as a crippled teacher and not as noise. ``Beside`` is text with a ``Distiller`` in place of
the plain next-token loss, for the trainer of ``training.lm``.

Legend: B batch, L tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mambacompress.data import training_batches
from mambacompress.errors import UserError
from mambacompress.models.families import adopt
from mambacompress.models.lm import LanguageModel
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import Batch
from mambacompress.training.progressive import fingerprint


def kept_layers(depth: int | float, layers: int) -> list[int]:
    """Which of ``layers`` blocks a student of ``depth`` (a number, or a share) keeps; raises UserError for none or too
    many.
    """
    count = depth if isinstance(depth, int) else max(1, round(depth * layers))
    if not 1 <= count <= layers:
        raise UserError(f"a student of {count} layers cannot be made of a teacher of {layers}",
                        "choose a depth from 1 to the teacher's, or a share of it")
    if count == 1:
        return [layers - 1]
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def shortened(teacher: Any, depth: int | float) -> Any:
    """A copy of an adopted model that keeps ``depth`` of its blocks; the teacher is left as it is."""
    kept = kept_layers(depth, len(LanguageModel.of(teacher).model_map.blocks))
    blocks = teacher.backbone.layers
    shared: dict[int, Any] = {id(block): None for i, block in enumerate(blocks) if i not in kept}
    student = copy.deepcopy(teacher, shared)  # blocks left out are not copied
    student.backbone.layers = nn.ModuleList([student.backbone.layers[i] for i in kept])
    for i, block in enumerate(student.backbone.layers):
        for module in (block, block.mixer):
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    student.config.num_hidden_layers = len(kept)
    adopt(student, prove=False)
    return student


class Beside:
    """Next tokens of one row of ids, int64 [n], learnt from a ``Distiller`` (the model that is trained)."""

    noun = "text or teacher"
    capturable = False  # a loss may look at more than its batch

    def __init__(self, tokens: Tensor, config: TrainConfig, teacher: nn.Module, settings: dict[str, Any]) -> None:
        self.tokens, self.config = tokens, config
        self.teacher, self.settings = fingerprint(teacher), settings

    def batches(self, start: int) -> Iterator[Batch]:
        return training_batches(self.tokens, self.config.batch, self.config.length, self.config.seed, start)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return model(batch)

    def identity(self) -> dict[str, Any]:
        return {"tokens": hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest(), "teacher": self.teacher,
                "settings": json.loads(json.dumps(self.settings))}
