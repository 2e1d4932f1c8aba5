"""fuse_norms: the function stays, the weights become ones, a tied head's norm keeps its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mambacompress.errors import UserError
from mambacompress.models.heads import TransformedHead, build
from mambacompress.passes.fuse_norms import FuseNorms


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_function_is_unchanged(exact_model: Any, rms_difference: Any, kind: str, tied: bool) -> None:
    model = exact_model(kind, tie_word_embeddings=tied)
    before = model.logits()
    model.enter(FuseNorms())
    assert rms_difference(model.logits(), before) < 1e-10
    assert all(torch.all(block.norm.weight == 1) for block in model.map.blocks)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_in_proj_bias_is_not_scaled(exact_model: Any, rms_difference: Any, kind: str) -> None:
    model = exact_model(kind, use_bias=True)
    before = model.logits()
    model.enter(FuseNorms())
    assert rms_difference(model.logits(), before) < 1e-10


def test_final_norm_follows_the_tie(exact_model: Any) -> None:
    tied, untied = exact_model(tie_word_embeddings=True), exact_model(tie_word_embeddings=False)
    for model in (tied, untied):
        model.enter(FuseNorms())
    assert not torch.all(tied.map.final_norm.weight == 1)
    assert tied.map.head.weight is tied.map.embedding.weight
    assert torch.all(untied.map.final_norm.weight == 1)


def test_plan_names_every_norm(exact_model: Any) -> None:
    model = exact_model(tie_word_embeddings=True)
    plan = FuseNorms().plan(model.map)
    assert [edit.block for edit in plan.edits] == [0, 1]
    assert [refusal.target for refusal in plan.refusals] == ["backbone.norm_f"]
    assert not FuseNorms().plan(exact_model(tie_word_embeddings=False).map).refusals


def test_a_norm_used_twice_is_left_alone(exact_model: Any, rms_difference: Any) -> None:
    model = exact_model()
    first, second = (block.module for block in model.map.blocks)
    second.norm = first.norm
    before = model.logits()
    item = FuseNorms()
    reasons = [refusal.reason for refusal in item.plan(model.map).refusals if refusal.block is not None]
    assert len(reasons) == 2
    assert all("untie it first" in reason for reason in reasons)
    model.enter(item)
    assert rms_difference(model.logits(), before) < 1e-10
    assert not torch.all(first.norm.weight == 1)


def test_layer_norm_is_refused(exact_model: Any) -> None:
    model = exact_model()
    model.map.blocks[0].module.norm = nn.LayerNorm(32)
    item = FuseNorms()
    assert "LayerNorm" in item.plan(model.map).refusals[0].reason
    with pytest.raises(UserError, match="LayerNorm"):
        FuseNorms().enter_block(model.map.blocks[0])


def test_transformed_head_round_trip() -> None:
    embedding = nn.Embedding(7, 4)
    head = TransformedHead(7, 4, transform=torch.randn(4, 4))
    head.tie(embedding)
    again = build(head.spec())
    again.load_state_dict(head.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(again(x), head(x))
    assert torch.allclose(head(x), x @ head.transform @ embedding.weight.T, atol=1e-6)
    assert head.weight is embedding.weight
    with pytest.raises(ValueError, match="cannot share"):
        head.tie(nn.Embedding(8, 4))
