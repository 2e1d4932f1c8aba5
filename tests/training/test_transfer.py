"""Attention layers turned into Mamba-2: what they start as, and that they learn the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mambacompress as mc
from mambacompress.errors import UserError
from mambacompress.models.matrices import ssd_matrix
from mambacompress.models.mixers import SSDMixer
from mambacompress.training.transfer import (
    DECAYS,
    SSDAttention,
    attention_layers,
    calibrate,
    seeded,
    to_state_space,
    transfer_pairs,
)

HEADS, SIZE, L = 4, 6, 9


def transformer(kv_heads: int = HEADS, bias: bool = False, layers: int = 2) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=HEADS * SIZE, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=32, attention_bias=bias,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    config._attn_implementation = "eager"
    return transformers.LlamaForCausalLM(config).eval()


def ids(batch: int = 3) -> Tensor:
    return torch.randint(1, 41, (batch, L), generator=torch.Generator().manual_seed(4))


# -- matrices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_the_matrix_is_what_the_mixer_multiplies_with(groups: int):
    """M x against the recurrence, token by token, in fp64."""
    torch.manual_seed(1)
    mixer = SSDMixer(10, heads=6, head_dim=4, d_state=5, groups=groups, dt_limit=(0.0, 0.4)).double()
    x_BLD = torch.randn(2, L, 10, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    mixer.tap = lambda name, value: seen.setdefault(name, value)
    with torch.no_grad():
        mixer.mix(x_BLD)
        M = ssd_matrix(mixer, x_BLD)
    assert M.shape == (2, 6, L, L)
    assert torch.equal(M, M.tril())
    dt = torch.nn.functional.softplus(seen["dt"] + mixer.dt_bias).clamp(0.0, 0.4)
    u = seen["u"].unflatten(-1, (6, 4))
    for b in range(2):
        for h in range(6):
            state, A = torch.zeros(4, 5, dtype=torch.float64), -torch.exp(mixer.A_log[h])
            for t in range(L):
                B, C = (seen[name][b, t, h // (6 // groups)] for name in ("B", "C"))
                state = torch.exp(dt[b, t, h] * A) * state + dt[b, t, h] * u[b, t, h][:, None] * B
                torch.testing.assert_close((M[b, h, t] @ u[b, :, h]).detach(), (state @ C).detach())


def test_a_long_sequence_has_no_matrix():
    with pytest.raises(UserError, match="at most 1,024 tokens"):
        ssd_matrix(SSDMixer(4, heads=1, head_dim=2, d_state=2), torch.zeros(1, 1025, 4))


def test_the_matrices_of_two_mixers_are_compared(make_host: Any):
    from mambacompress.models.families import adopt

    teacher = make_host("mamba2")
    adopt(teacher)
    student = copy.deepcopy(teacher)
    loss = mc.distill(student, teacher, "matrices")
    assert loss(ids()).item() < 1e-10  # with gradients the gated norm takes another kernel
    with torch.no_grad():
        student.backbone.layers[1].mixer.dt_bias.add_(0.5)
    wrong = loss(ids())
    wrong.backward()
    assert wrong.item() > 0.01
    assert student.backbone.layers[1].mixer.dt_bias.grad.abs().sum() > 0


# -- seeding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "bias"), [(HEADS, False), (HEADS, True), (2, False), (1, True)])
def test_a_seeded_mixer_is_the_attention_without_its_softmax(kv_heads: int, bias: bool):
    """Its matrix is (q . k) / sqrt(N) times the decay, what it multiplies are the values, what it ends with is o."""
    layer = next(iter(attention_layers(transformer(kv_heads, bias)).values()))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    mixer = seeded(layer, HEADS)
    x = torch.randn(2, L, HEADS * SIZE)
    seen: dict[str, Tensor] = {}
    mixer.tap = lambda name, value: seen.setdefault(name, value)
    with torch.no_grad():
        output, _ = mixer.mix(x)
        q, k, v = (getattr(layer, name)(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))
        k, v = (t.repeat_interleave(HEADS // kv_heads, 1) for t in (k, v))
        lag = torch.arange(L)[:, None] - torch.arange(L)
        decay = torch.exp(-torch.logspace(*(torch.log10(torch.tensor(d)) for d in DECAYS), HEADS))
        wanted = torch.stack([q[:, h] @ k[:, h].transpose(-1, -2) / SIZE**0.5 * torch.where(
            lag >= 0, decay[h] ** lag.clamp(min=0), 0.0) for h in range(HEADS)], 1)
        torch.testing.assert_close(ssd_matrix(mixer, x), wanted, rtol=1e-4, atol=1e-5)
        mixed = wanted @ v  # before the norm
        normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(seen["y"], normed.transpose(1, 2).flatten(2), rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(output, layer.o_proj(seen["y"]), rtol=1e-4, atol=1e-5)


def test_calibration_carries_the_size_over():
    teacher = transformer()
    student = to_state_space(teacher)
    calibrate(student, teacher, ids(8))
    inputs: list[Tensor] = []
    handle = next(iter(attention_layers(teacher).values())).o_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0]))
    teacher(ids(8), use_cache=False)
    handle.remove()
    mixer = transfer_pairs(student, teacher)[0][0].mixer
    torch.testing.assert_close(mixer.norm_weight.detach(), inputs[0].square().mean((0, 1)).sqrt().detach())


def test_hybrids_keep_the_layers_they_are_told_to():
    teacher = transformer(layers=3)
    before = copy.deepcopy(teacher.state_dict())
    student = to_state_space(teacher, keep=[1])
    kinds = [type(layer.self_attn) for layer in student.model.layers]
    assert kinds[0] is kinds[2] is SSDAttention
    assert kinds[1] is type(teacher.model.layers[1].self_attn)
    assert student(ids(), use_cache=False).logits.shape == (3, L, 41)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values(), strict=True))
    kept = student.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(kept, teacher.model.layers[1].self_attn.q_proj.weight)
    assert [t is teacher.model.layers[i].self_attn for i, (_, t) in zip((0, 2), transfer_pairs(student, teacher),
                                                                        strict=True)] == [True, True]


def test_what_cannot_be_turned_is_said(tiny_mamba: Any):
    with pytest.raises(UserError, match="has no attention layer"):
        to_state_space(tiny_mamba)
    with pytest.raises(UserError, match="cannot keep layers"):
        to_state_space(transformer(), keep=[0, 1])
    with pytest.raises(UserError, match="cannot keep layers"):
        to_state_space(transformer(), keep=[7])
    student = to_state_space(transformer())
    with pytest.raises(UserError, match="use_cache=False"):
        student(ids(), use_cache=True)


# -- learning ----------------------------------------------------------------------------------------------------------


def fitted(loss: Any, steps: int, rate: float = 3e-3) -> tuple[float, float]:
    optimizer = torch.optim.Adam(loss.parameters(), rate)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(ids(8))
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values[0], values[-1]


def test_layers_learn_their_attention_then_the_model_its_teacher():
    """MSE layer by layer on the teacher's inputs, then KL end to end; each stage leaves the student nearer."""
    teacher = transformer()
    student = to_state_space(teacher)
    calibrate(student, teacher, ids(8))
    kl = mc.distill(student, teacher, "kl")
    start = kl(ids(8)).item()
    first, last = fitted(mc.distill(student, teacher, "layers", layers=transfer_pairs(student, teacher),
                                    teacher_inputs=True), 60)
    assert last < 0.5 * first
    aligned = kl(ids(8)).item()
    assert aligned < 0.7 * start
    _, end = fitted(kl, 60)
    assert end < 0.3 * aligned


def test_matrices_can_be_aligned_with_attention_maps():
    teacher = transformer()
    student = to_state_space(teacher)
    first, last = fitted(mc.distill(student, teacher, "matrices", layers=transfer_pairs(student, teacher),
                                    teacher_inputs=True), 40, 1e-2)
    assert last < 0.6 * first


def test_a_teacher_without_attention_maps_is_told():
    teacher = transformer()
    teacher.config._attn_implementation = "sdpa"
    student = to_state_space(teacher)
    loss = mc.distill(student, teacher, "matrices", layers=transfer_pairs(student, teacher))
    with pytest.raises(UserError, match="attn_implementation='eager'"):
        loss(ids())
