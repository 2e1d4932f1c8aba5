"""Triton against the reference: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mambacompress.kernels import gpu
from tests.kernels.scans import nan_filled


@pytest.fixture
def device() -> str:
    """Where Triton runs in this process; skips where it cannot."""
    if not gpu.installed():
        pytest.skip("Triton is not installed")
    if gpu.interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("Triton was imported without its interpreter, and there is no GPU")
    return "cuda"


@pytest.fixture(autouse=True)
def unwritten_shows() -> Iterator[None]:
    """Fresh memory holds NaN in all these tests."""
    with nan_filled():
        yield
