"""Image files, their faults, and a training stream that a seed and a step determine."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambacompress.errors import UserError
from mambacompress.images import ImageData, Images, augmented, batches, load_images


def images(count: int, classes: int = 3, side: int = 6) -> Images:
    generator = torch.Generator().manual_seed(count)
    return Images(torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8),
                  torch.arange(count) % classes)


def data(count: int = 20) -> ImageData:
    return ImageData("toy", images(count), images(7))


def mnist(folder: Path, **changes: Any) -> None:
    generator = np.random.default_rng(0)
    arrays = {"x_train": generator.integers(0, 256, (5, 4, 4), dtype=np.uint8), "y_train": np.arange(5) % 3,
              "x_test": generator.integers(0, 256, (2, 4, 4), dtype=np.uint8), "y_test": np.arange(2)}
    np.savez(folder / "mnist.npz", **(arrays | changes))


def test_arrays_are_read(tmp_path: Path):
    mnist(tmp_path)
    found = load_images("mnist", tmp_path)
    assert found.train.pixels.shape == (5, 1, 4, 4)
    assert found.test.labels.tolist() == [0, 1]
    assert found.classes == 3
    x = found.normalised(found.train.pixels)
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_jpegs_are_read(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), ("test", 2)):
        files = []
        for i in range(count):
            buffer = io.BytesIO()
            image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        np.savez(tmp_path / f"cifar10_jpeg_{split}.npz", jpeg=np.frombuffer(b"".join(files), np.uint8),
                 offset=np.cumsum([0, *map(len, files)]), label=np.arange(count))
    found = load_images("cifar10", tmp_path)
    assert found.train.pixels.shape == (3, 3, 8, 8)
    assert [int(p.float().mean().round()) for p in found.train.pixels] == [0, 40, 80]


def test_faults_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        load_images("mnits", tmp_path)
    with pytest.raises(UserError, match=r"no file .*mnist\.npz.*--images"):
        load_images("mnist", tmp_path)
    mnist(tmp_path, x_train=np.zeros((5, 4, 4), np.float32))
    with pytest.raises(UserError, match="float32 images"):
        load_images("mnist", tmp_path)
    np.savez(tmp_path / "mnist.npz", x=np.zeros(2))
    with pytest.raises(UserError, match="holds no array 'x_train'"):
        load_images("mnist", tmp_path)
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="cannot be read"):
        load_images("mnist", tmp_path)


@pytest.mark.parametrize("augment", ["none", "shift", "crop-flip"])
def test_a_stream_starts_anywhere(augment: str):
    whole = list(islice(batches(data(), 6, 3, 0, augment), 8))
    for start in (1, 3, 5):  # three batches an epoch
        later = list(islice(batches(data(), 6, 3, start, augment), 8 - start))
        assert all(torch.equal(a, b) and torch.equal(c, d)
                   for (a, c), (b, d) in zip(whole[start:], later, strict=True))
    assert not torch.equal(whole[0][0], next(iter(batches(data(), 6, 4, 0, augment)))[0])


def test_an_epoch_reads_every_image_once():
    seen = torch.cat([labels for _, labels in islice(batches(data(18), 6, 0, 0, "none"), 3)])
    assert torch.equal(seen.sort().values, data(18).train.labels.sort().values)


def test_shifts_move_whole_images_and_mirrors_turn_them():
    pixels = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    pixels[:, 0, 4, 3], pixels[:, 0, 4, 5] = 1, 2
    moved = augmented(pixels, "crop-flip", torch.Generator().manual_seed(0))
    turned = set()
    for image in moved[:, 0]:
        ones, twos = (image == 1).nonzero(), (image == 2).nonzero()
        if len(ones) and len(twos):
            assert int(ones[0, 0]) == int(twos[0, 0])
            assert abs(int(twos[0, 1] - ones[0, 1])) == 2
            turned.add(int(twos[0, 1] - ones[0, 1]))
            assert abs(int(ones[0, 0]) - 4) <= 4
    assert turned == {2, -2}
    shifted = augmented(pixels, "shift", torch.Generator().manual_seed(0))
    offsets = (shifted[:, 0] == 1).nonzero()[:, 1:] - torch.tensor([4, 3])
    assert len(offsets) == 200
    assert offsets.abs().max() == 2
    assert set(map(tuple, offsets.tolist())) == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}


def test_what_cannot_be_streamed_is_said():
    with pytest.raises(UserError, match="fewer than a batch"):
        next(batches(data(), 21, 0, 0, "none"))
    with pytest.raises(UserError, match="did you mean 'shift'"):
        next(batches(data(), 2, 0, 0, "shft"))
