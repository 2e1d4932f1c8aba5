"""LoRA over a sparse base: what trains is what merges, and the pattern survives both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mambacompress as mc
from mambacompress import nm
from mambacompress.errors import UserError
from mambacompress.models.families import adopt
from mambacompress.nm import Pattern
from mambacompress.training import lm
from mambacompress.training.lora import AdaptedLinear

peft = pytest.importorskip("peft")


def adapted_model(model: Any, **changes: Any) -> Any:
    adopt(model)
    return peft.get_peft_model(model, peft.LoraConfig(**({"r": 4, "target_modules": ["in_proj"]} | changes)))


def test_an_adapter_trains_inside_the_pattern_and_merges_into_it(tiny_mamba: Any):
    ids: Tensor = torch.randint(1, 97, (4, 12))
    model = adapted_model(tiny_mamba)
    with mc.attach(model, "nm-2of4") as session:
        kinds = [type(layer) for layer in session.layers.values()]
        assert kinds.count(AdaptedLinear) == 2
        assert len(kinds) == 4
        masks = {path: layer.mask.clone() for path, layer in session.layers.items()}
        base = {path: layer.weight.detach().clone() for path, layer in session.layers.items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = lm.token_loss(model, ids)
            loss.backward()
            optimizer.step()
            session.step(optimizer)
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.01
        for path, layer in session.layers.items():
            assert torch.equal(layer.mask, masks[path])
            assert torch.equal(layer.weight, base[path]), "the base moved"
        with torch.no_grad():
            trained = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, trained)
    merged = model.merge_and_unload()
    for path, mask in masks.items():
        linear = merged.get_submodule(path)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight != 0, mask & (linear.weight != 0))
        assert nm.excess(linear.weight, Pattern(2, 4)) == 0
    assert any(not torch.equal(merged.get_submodule(path).weight, weight) for path, weight in base.items())
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, trained)
    assert merged.config.nm_sparsity == {"in_proj": "2:4", "out_proj": "2:4"}


def test_adapters_that_are_no_sum_of_weights_are_refused(tiny_mamba: Any, make_host: Any):
    with pytest.raises(UserError, match="adapter with dropout"):
        mc.attach(adapted_model(tiny_mamba, lora_dropout=0.1), "nm-2of4")
    with pytest.raises(UserError, match="with LoRA they do not move"):
        mc.attach(adapted_model(make_host("mamba")), "cast-2of4")
