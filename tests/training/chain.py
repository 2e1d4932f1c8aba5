"""A toy chain on toy images, and one process of a distributed run of it: ``python chain.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mambacompress.distill_recipe import load_distill_recipe
from mambacompress.distilling.images import run_progressive
from mambacompress.images import ImageData, Images

RECIPE: dict[str, Any] = {
    "kind": "progressive", "name": "toy", "data": "mnist", "augment": "shift", "shape": {"patch": 2, "depth": 1},
    "teacher": {"shape": {"width": 8}, "train": {"steps": 30, "batch": 20, "warmup": 3, "learning_rate": 0.01}},
    "students": [{"width": 6}, {"width": 3, "rank": 1, "states": 2}], "single": {"width": 7},
    "train": {"steps": 12, "batch": 20, "warmup": 2, "learning_rate": 0.01},
}


def images(count: int, seed: int) -> Images:
    """Three classes: where the bright bar lies."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    pixels = torch.randint(0, 60, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels):
        pixels[i, 0, 2 * int(label) : 2 * int(label) + 2] += 120
    return Images(pixels, labels)


DATA = ImageData("toy", images(120, 0), images(50, 1))


def run(out: Path, *, resume: bool = False, **changes: Any) -> Any:
    """The toy recipe, changed, on the toy images."""
    return run_progressive(load_distill_recipe(RECIPE | changes), DATA, out, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
