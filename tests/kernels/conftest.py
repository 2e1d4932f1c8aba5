"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mambacompress.kernels import native
from tests.kernels.scans import at_level, available_levels


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native code forced to one instruction set; skips what this machine has not."""
    if request.param not in available_levels():
        pytest.skip(f"no native code for {request.param} here")
    with at_level(request.param):
        yield request.param
