"""A sparse linear rearranged for native code shows the same rows, and gives the same answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mambacompress.kernels import native
from mambacompress.models.packed import ActivationFormat, PackedLinear, PackedSparseLinear, WeightFormat, arrange
from mambacompress.nm import Pattern, nm_mask

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not())


def linear(pattern: str, mode: str = "token") -> PackedSparseLinear:
    torch.manual_seed(0)
    activations = ActivationFormat(mode)
    dense = PackedLinear.from_float(torch.randn(45, 64), torch.randn(45), weights=WeightFormat(8),
                                    activations=activations, act_scale=0.03 if mode == "tensor" else None)
    codes, parsed = dense.codes(), Pattern.parse(pattern)
    mask = nm_mask(codes.abs(), parsed)
    return PackedSparseLinear.from_mask(codes.masked_fill(~mask, 0), mask, parsed, dense.bias, scale=dense.scale,
                                        activations=activations, act_scale=dense.act_scale)


@pytest.mark.parametrize("mode", ["token", "tensor"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "2:8", "4:8"])
def test_arranged_shows_the_same_rows(pattern: str, mode: str) -> None:
    rows = linear(pattern, mode)
    tiled = copy.deepcopy(rows)
    arrange(nn.Sequential(tiled))
    assert tiled.tiled
    assert tiled.stream is not None
    assert tiled.get_buffer("values").numel() == 0, "the values are there twice"
    x = torch.randn(5, 64)
    assert torch.equal(tiled(x), rows(x))
    assert torch.equal(tiled.kept(), rows.kept())
    assert torch.equal(tiled.codes(), rows.codes())
    assert tiled.nbytes() == rows.nbytes()
    assert tiled.excess() == 0
    assert rows.state_dict().keys() == tiled.state_dict().keys()
    for name, tensor in rows.state_dict().items():
        assert torch.equal(tiled.state_dict()[name], tensor), name


def test_loads_copies_and_leaves() -> None:
    rows, other = linear("1:8"), linear("1:8")
    other.values.neg_()
    expected = other(torch.ones(1, 64))
    arrange(nn.Sequential(rows))
    assert torch.equal(copy.deepcopy(rows).half().codes(), rows.codes())
    rows.load_state_dict(other.state_dict())
    assert not rows.tiled
    assert torch.equal(rows(torch.ones(1, 64)), expected)
    arrange(nn.Sequential(rows))
    assert torch.equal(rows(torch.ones(1, 64)), expected)
    assert not rows.to("meta").tiled
