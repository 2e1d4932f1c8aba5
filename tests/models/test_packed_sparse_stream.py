"""A sparse linear rearranged for native code shows the same rows, and gives the same answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mambacompress.kernels import native
from mambacompress.models.packed import (
    ActivationFormat,
    PackedLinear,
    PackedSparseEmbedding,
    PackedSparseHead,
    PackedSparseLinear,
    WeightFormat,
    arrange,
)
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


@pytest.mark.parametrize("values", ["float16", "bfloat16", "float32"])
def test_floats_arranged_show_the_same_rows(values: str) -> None:
    torch.manual_seed(0)
    weight, pattern = torch.randn(45, 64), Pattern(1, 8)
    mask = nm_mask(weight.abs(), pattern)
    rows = PackedSparseLinear.from_mask(weight.masked_fill(~mask, 0), mask, pattern, torch.randn(45), values=values)
    tiled, x = copy.deepcopy(rows), torch.randn(5, 64)
    arrange(nn.Sequential(tiled))
    assert tiled.tiled
    assert torch.equal(tiled(x), rows(x))
    torch.testing.assert_close(tiled(x), x @ rows.dequantize().T + rows.bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiled.codes(), rows.codes())
    assert tiled.nbytes() == rows.nbytes()
    for name, tensor in rows.state_dict().items():
        assert torch.equal(tiled.state_dict()[name], tensor), name


@pytest.mark.parametrize("scaled", [False, True], ids=["fp16", "int8"])
def test_a_tied_head_is_arranged_once(scaled: bool) -> None:
    source = linear("2:4")
    weight, scale = (source.codes(), source.scale) if scaled else (source.dequantize(), None)
    embedding = PackedSparseEmbedding.from_mask(weight, source.kept(), source.pattern, scale=scale)
    head = PackedSparseHead.sharing(embedding, activations=ActivationFormat("token" if scaled else "none"))
    model, h, ids = nn.ModuleDict({"head": head, "embedding": embedding}), torch.randn(3, 64), torch.arange(45)[None]
    logits, table = head(h), embedding(ids)
    assert torch.equal(table[0], embedding.dequantize())
    arrange(model)
    assert head.stream is embedding.stream
    assert head.tiled
    assert embedding.tiled
    assert torch.equal(head(h), logits)
    assert torch.equal(embedding(ids), table)
    assert torch.equal(embedding.half()(ids), table.half())
    twin = copy.deepcopy(model)
    assert twin["head"].stream is twin["embedding"].stream
    later = PackedSparseHead.sharing(embedding, activations=head.activations)
    assert torch.equal(later(h), logits)
    with pytest.raises(ValueError, match="same format and shape"):
        later.tie(PackedSparseEmbedding(45, 64, pattern="1:4", weights=embedding.weights))


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
