"""Quantization-aware training: what is trained is what is packed, bit for bit; gradients are those of the rounded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mambacompress as mc
from mambacompress.errors import UserError
from mambacompress.models.packed import ActivationFormat, PackedHead, PackedLinear, WeightFormat
from mambacompress.numerics import fake_quantize_activation, fake_quantize_weight
from mambacompress.schema import QuantizeConfig
from mambacompress.training.fakequant import FakeQuantLinear, aware, pack, plain

FORMATS = {
    "w8a8": {"weights": "int8", "activations": "int8-token"},
    "w8a16": {"weights": "int8"},
    "w4a8": {"weights": "int4", "group_size": 8, "activations": "int8-token",
             "maps": ["in_proj", "out_proj", "embedding", "head"]},
    "linears": {"weights": "int8", "activations": "int8-token", "maps": ["in_proj", "x_proj", "out_proj"]},
}


def ids() -> Tensor:
    return torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    return model(input_ids=ids(), use_cache=False).logits


def trained(model: Any, steps: int = 3) -> None:
    """A few steps of self-distillation from the float model."""
    teacher = copy.deepcopy(model)
    plain(teacher)
    loss = mc.distill(model, teacher, "kl")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(ids()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("name", FORMATS)
def test_packing_is_bit_exact_with_trainings_forward(name: str, kind: str, model_directory: Any, tmp_path: Path):
    """In training mode and with gradients, after training, packed in place, and through ``mc.quantize``."""
    format_ = QuantizeConfig(**FORMATS[name])
    model = mc.load(model_directory(kind))
    before = logits(model).detach()
    aware(model, format_)
    model.train()
    trained(model)
    seen = logits(model)
    assert seen.requires_grad
    assert not torch.equal(seen, before)
    with torch.no_grad():  # Mamba-2's gated norm takes another kernel without gradients
        measured = logits(model)
    assert kind == "mamba2" or torch.equal(seen, measured)
    packed = copy.deepcopy(model).eval()
    pack(packed)
    assert not any(isinstance(module, FakeQuantLinear) for module in packed.modules())
    assert sum(isinstance(module, PackedLinear | PackedHead) for module in packed.modules()) >= 4
    assert torch.equal(logits(packed), seen)
    with torch.no_grad():
        assert torch.equal(logits(packed), measured)
    plain(model)
    recipe = {"name": "as-trained", "passes": [{"quantize": FORMATS[name]}]}
    made = mc.quantize(model.eval(), recipe, calibration=torch.randint(1, 97, (2, 16)), out=tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(logits(mc.load(made.directory)), measured)


def test_gradients_are_those_of_the_rounded_weight_and_input():
    torch.manual_seed(2)
    weights, activations = WeightFormat(8), ActivationFormat("token", 8)
    weight, bias = torch.nn.Parameter(torch.randn(6, 8)), torch.nn.Parameter(torch.randn(6))
    x, dy = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 6)
    FakeQuantLinear(weight, bias, weights, activations)(x).backward(dy)
    got = [t.grad.clone() for t in (x, weight, bias)]
    plain_x = x.detach().clone().requires_grad_()
    plain_w, plain_b = (p.detach().clone().requires_grad_() for p in (weight, bias))
    torch.nn.functional.linear(fake_quantize_activation(plain_x), fake_quantize_weight(plain_w, weights.grid),
                               plain_b).backward(dy)
    for mine, theirs in zip(got, (plain_x, plain_w, plain_b), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_tied_head_stays_tied_and_gets_both_gradients(model_directory: Any):
    model = mc.load(model_directory("mamba", tie_word_embeddings=True))
    model_map = aware(model, QuantizeConfig(**FORMATS["w8a8"]))
    assert model_map.tied
    assert model.lm_head.weight is model.backbone.embeddings.weight
    logits(model).square().mean().backward()
    used, unused = ids().unique(), 96
    grad = model.backbone.embeddings.weight.grad
    assert grad[used].abs().sum() > 0
    assert grad[unused].abs().sum() > 0, "a row that is not looked up learns from the head"


def test_self_distillation_brings_a_quantized_model_nearer(model_directory: Any):
    model = mc.load(model_directory("mamba"))
    teacher = copy.deepcopy(model)
    aware(model, QuantizeConfig(weights="int4", activations="int4-token", maps=("in_proj", "x_proj", "out_proj")))
    loss = mc.distill(model, teacher, "kl")
    start = loss(ids()).item()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        value = loss(ids())
        value.backward()
        optimizer.step()
    assert value.item() < 0.7 * start


def test_a_sparse_student_stays_sparse(model_directory: Any, tmp_path: Path):
    """2:4 by self-distillation, then int8 by self-distillation: the zeros outlive Adam, decay and packing."""
    model = mc.load(model_directory("mamba"))
    teacher = copy.deepcopy(model)
    with mc.attach(model, "nm-2of4", steps=3) as session:
        loss = mc.distill(model, teacher, "kl")
        optimizer = torch.optim.AdamW(loss.parameters(), 1e-3)
        for _ in range(3):
            loss(ids()).backward()
            optimizer.step()
            session.step(optimizer)
            optimizer.zero_grad()
    linear = model.backbone.layers[0].mixer.in_proj
    zeros = linear.weight == 0
    assert zeros.reshape(-1, 4).sum(1).min() >= 2
    aware(model, QuantizeConfig(**FORMATS["w8a8"]))
    loss, before = mc.distill(model, teacher, "kl"), linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(loss.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        loss(ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(linear.weight == 0, zeros)
    assert not torch.equal(linear.weight, before)
    with torch.no_grad():
        seen = logits(model)
    plain(model)
    recipe = {"name": "sparse", "passes": [{"quantize": FORMATS["w8a8"]}]}
    made = mc.quantize(model.eval(), recipe, calibration=torch.randint(1, 97, (2, 16)), out=tmp_path / "out")
    mc.verify(made.directory)
    packed = mc.load(made.directory)
    assert "Sparse" in type(packed.backbone.layers[0].mixer.in_proj).__name__
    with torch.no_grad():
        torch.testing.assert_close(logits(packed), seen, rtol=0, atol=0)


def test_the_float_model_comes_back_on_the_same_parameters(model_directory: Any):
    model = mc.load(model_directory("mamba"))
    before, kept = logits(model).detach(), dict(model.named_parameters())
    aware(model, QuantizeConfig(**FORMATS["w8a8"]))
    assert {id(p) for p in model.parameters()} == {id(p) for p in kept.values()}
    plain(model)
    assert torch.equal(logits(model), before)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in kept.items()}


@pytest.mark.parametrize(("more", "message"), [
    ({"activations": "int8-tensor"}, "static activations"), ({"scan": "int8"}, "scan: int8 cannot be trained"),
    ({"scale_search": True}, "scale_search cannot"), ({"bias_correction": True}, "bias_correction cannot")])
def test_what_needs_calibration_is_refused(more: dict[str, Any], message: str, model_directory: Any):
    model = mc.load(model_directory("mamba"))
    with pytest.raises(UserError, match=message):
        aware(model, QuantizeConfig(weights="int8", **more))


def test_other_mistakes_are_named(model_directory: Any):
    model = mc.load(model_directory("mamba"))
    with pytest.raises(UserError, match="was not trained quantization-aware"):
        pack(model)
    with pytest.raises(UserError, match="groups of 48 do not divide"):
        aware(model, QuantizeConfig(weights="int4", group_size=48, maps=("in_proj",)))
    aware(model, QuantizeConfig(**FORMATS["w8a8"]))
    with pytest.raises(UserError, match="quantized already"):
        aware(model, QuantizeConfig(**FORMATS["w8a8"]))
