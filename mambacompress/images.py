"""Labelled images for classification: arrays in .npz files, and a training stream that a seed and a step determine.

Two layouts are read: ``x_train y_train x_test y_test`` in one file (uint8 [N, H, W] or [N, H, W, C]), and two files
``*_train.npz`` and ``*_test.npz`` with ``jpeg`` (uint8, all files end to end), ``offset`` [N + 1] and ``label``.

Legend: B batch, N images, C channels, H W image.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacompress.errors import UserError, did_you_mean

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
FILES = {"mnist": "mnist.npz", "cifar10": "cifar10_jpeg_{}.npz"}
AUGMENTS = ("none", "shift", "crop-flip")
SHIFTS = {"none": 0, "shift": 2, "crop-flip": 4}  # pixels, in both directions


@dataclass(frozen=True)
class Images:
    """One split. pixels: uint8 [N, C, H, W]; labels: int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sha256(self) -> str:
        """Of pixels and labels."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation a channel, [C, 1, 1], of pixels in 0..1."""
        x_NCHW = self.pixels.double() / 255
        mean, std = x_NCHW.mean((0, 2, 3)), x_NCHW.std((0, 2, 3), correction=0)
        return mean.float()[:, None, None], std.float()[:, None, None]


@dataclass(frozen=True)
class ImageData:
    """Both splits. classes: labels are 0 .. classes - 1."""

    name: str
    train: Images
    test: Images

    @property
    def classes(self) -> int:
        return int(self.train.labels.max()) + 1

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.train.statistics()

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> fp32, by the training split's mean and deviation."""
        mean, std = self._statistics
        return (pixels.float() / 255 - mean) / std


def load_images(name: str, folder: str | Path) -> ImageData:
    """The data set ``name`` (``mnist``, ``cifar10``) from the .npz files in ``folder``.

    Raises UserError for an unknown name, and for files that are missing, damaged or of another layout.
    """
    if name not in FILES:
        raise UserError(f"there is no image data {name!r}{did_you_mean(name, FILES)}",
                        f"name one of {', '.join(FILES)}")
    folder = Path(folder).expanduser()
    if "{}" in FILES[name]:
        return ImageData(name, *(_jpegs(folder / FILES[name].format(split)) for split in ("train", "test")))
    arrays = _arrays(folder / FILES[name], ARRAYS)
    return ImageData(name, *(_images(arrays[f"x_{split}"], arrays[f"y_{split}"], folder / FILES[name])
                             for split in ("train", "test")))


def _arrays(path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in wanted if key not in file]
            if missing:
                raise UserError(f"{path} holds no array {missing[0]!r}: it has {', '.join(file) or 'none'}",
                                "name the folder of the image data with --images")
            return {key: file[key] for key in wanted}
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}", "name the folder of the image data with --images") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}", "copy the file again") from error


def _images(pixels: Any, labels: Any, path: Path) -> Images:
    if pixels.dtype != "uint8" or pixels.ndim not in (3, 4) or len(pixels) != len(labels) or not len(labels):
        raise UserError(f"{path} holds {pixels.dtype} images of shape {list(pixels.shape)} and {len(labels)} labels",
                        "store uint8 [N, H, W] or [N, H, W, C] and a label for each")
    x = torch.from_numpy(pixels)
    x_NCHW = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return Images(x_NCHW.contiguous(), torch.from_numpy(labels.astype("int64")))


def _jpegs(path: Path) -> Images:
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("JPEG images need Pillow, which is not installed",
                        "pip install 'mambacompress[train]'") from error
    arrays = _arrays(path, ("jpeg", "offset", "label"))
    whole, offset = arrays["jpeg"].tobytes(), arrays["offset"]
    try:
        decoded = [np.asarray(Image.open(io.BytesIO(whole[a:b])).convert("RGB"))
                   for a, b in pairwise(offset)]
    except OSError as error:
        raise UserError(f"{path} holds a damaged image: {error}", "copy the file again") from error
    return _images(np.stack(decoded), arrays["label"], path)


def batches(data: ImageData, batch: int, seed: int, start: int, augment: str) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of training batches from step ``start``: (fp32 [B, C, H, W], int64 [B]).

    Every epoch is a fresh permutation; a batch and its augmentation depend on the seed and the step alone. augment:
    ``shift`` by up to two pixels; ``crop-flip`` by up to four, and mirrored half of the time. Raises UserError where
    the split is smaller than a batch.
    """
    if augment not in AUGMENTS:
        raise UserError(f"there is no augmentation {augment!r}{did_you_mean(augment, AUGMENTS)}",
                        f"choose {', '.join(AUGMENTS)}")
    per_epoch = len(data.train) // batch
    if per_epoch < 1:
        raise UserError(f"{len(data.train)} images are fewer than a batch of {batch}", "make the batch smaller")
    step = start
    while True:
        epoch = step // per_epoch
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for i in range(step % per_epoch, per_epoch):
            chosen = order[i * batch : (i + 1) * batch]
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)
            yield (data.normalised(augmented(data.train.pixels[chosen], augment, generator)),
                   data.train.labels[chosen])
            step += 1


def augmented(pixels_BCHW: Tensor, augment: str, generator: torch.Generator) -> Tensor:
    """uint8 images, each shifted (zeros come in) and perhaps mirrored."""
    reach = SHIFTS[augment]
    if not reach:
        return pixels_BCHW
    B, C, H, W = pixels_BCHW.shape
    padded = torch.nn.functional.pad(pixels_BCHW, (reach, reach, reach, reach))
    down, right = torch.randint(2 * reach + 1, (2, B), generator=generator)
    columns_BW = right[:, None] + torch.arange(W)
    if augment == "crop-flip":
        mirrored = torch.rand(B, generator=generator) < 0.5
        columns_BW = torch.where(mirrored[:, None], columns_BW.flip(1), columns_BW)
    rows_BH = down[:, None] + torch.arange(H)
    return padded[torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None], rows_BH[:, None, :, None],
                  columns_BW[:, None, None, :]]
