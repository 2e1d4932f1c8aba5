"""Adoption: the same function as stock transformers, undone bit for bit, and right where stock is not."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.exact import KeepDouble
from mambacompress.models.families import FAMILIES, adopt, restore
from mambacompress.models.families.base import Hosted

KINDS = ["mamba", "mamba2", "falcon_mamba"]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mamba": [{}, {"use_bias": True}, {"use_conv_bias": False, "conv_kernel": 3}, {"tie_word_embeddings": False}],
    "mamba2": [{}, {"n_groups": 1}, {"use_bias": True}, {"time_step_limit": (0.02, 0.5)},
               {"tie_word_embeddings": False}],
    "falcon_mamba": [{}, {"use_bias": True, "use_conv_bias": False}],
}
CASES = [pytest.param(kind, overrides, id=f"{kind}-{'-'.join(overrides) or 'plain'}")
         for kind, variants in VARIANTS.items() for overrides in variants]


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 97, (batch, length))


def logits(host: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return host(input_ids, **kwargs).logits


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return ((got - want).abs().max() / want.abs().max()).item() < tolerance


@pytest.mark.parametrize(("kind", "overrides"), CASES)
def test_adopted_host_equals_stock_in_fp64(make_host: Any, kind: str, overrides: dict[str, Any]) -> None:
    host = make_host(kind, **overrides).double()
    x = ids(2, 37)
    with KeepDouble():
        expected = logits(host, x)
        adopt(host)
        assert close(logits(host, x), expected, 1e-12)


@pytest.mark.parametrize(("kind", "overrides"), CASES)
def test_restore_is_bit_identical(make_host: Any, kind: str, overrides: dict[str, Any]) -> None:
    host = make_host(kind, **overrides)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    classes = [type(module) for module in host.modules()]
    x = ids(2, 9)
    expected = logits(host, x)
    adopt(host)
    assert restore(host) is host
    after = host.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].shape == before[name].shape for name in before)
    assert [type(module) for module in host.modules()] == classes
    assert torch.equal(logits(host, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adoption_shares_storage_and_leaves_the_class_alone(make_host: Any, kind: str) -> None:
    host, other = make_host(kind), make_host(kind)
    pointers = {parameter.data_ptr() for parameter in host.parameters()}
    adopt(host)
    assert {parameter.data_ptr() for parameter in host.parameters()} == pointers
    assert all(isinstance(layer.mixer, Hosted) for layer in host.backbone.layers)
    assert not any(isinstance(layer.mixer, Hosted) for layer in other.backbone.layers)
    mixers = [layer.mixer for layer in host.backbone.layers]
    adopt(host)  # again: only mapped
    assert [layer.mixer for layer in host.backbone.layers] == mixers


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_through_the_map_is_written_back(make_host: Any, kind: str) -> None:
    host = make_host(kind)
    site = adopt(host).blocks[1].site("y")
    changed = site.get() * 1.5
    site.set(changed)
    restore(host)
    assert torch.equal(host.backbone.layers[1].mixer.out_proj.weight, changed.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_left_padded_batch_equals_single_runs(make_host: Any, kind: str, use_bias: bool) -> None:
    host = make_host(kind, use_bias=use_bias).double()
    adopt(host)
    long, short = ids(1, 11), ids(1, 4)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 7, dtype=torch.int64), short], 1)])
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :7] = 0
    with KeepDouble():
        together = logits(host, batch, attention_mask=mask)
        assert close(together[0], logits(host, long)[0], 1e-12)
        assert close(together[1, 7:], logits(host, short)[0], 1e-12)


def test_stock_lets_padding_in_where_the_projection_has_a_bias(make_host: Any) -> None:
    host = make_host("mamba", use_bias=True)
    x = ids(1, 4)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), x], 1)
    mask = torch.ones(1, 11, dtype=torch.int64)
    mask[0, :7] = 0
    assert not close(logits(host, padded, attention_mask=mask)[0, 7:], logits(host, x)[0], 1e-4)
    adopt(host)
    assert close(logits(host, padded, attention_mask=mask)[0, 7:], logits(host, x)[0], 1e-5)


def continued(host: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """The logits of ``x`` read in chunks through the host's own cache."""
    cache, outputs = None, []
    with torch.no_grad():
        for chunk in x.split(sizes, 1):
            result = host(chunk, cache_params=cache, use_cache=True)
            cache = result.cache_params
            outputs.append(result.logits)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[7, 12, 1, 4], [1, 23], [2, 1, 1, 20], [1] * 24], ids=str)
def test_continuation_through_the_hosts_cache_equals_one_shot(make_host: Any, kind: str, sizes: list[int]) -> None:
    host = make_host(kind).double()
    adopt(host)
    x = ids(2, 24)
    with KeepDouble():
        assert close(continued(host, x, sizes), logits(host, x), 1e-11)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_stock_continuation_by_several_tokens_is_wrong(make_host: Any, kind: str) -> None:
    """Stock scans a multi-token continuation from a zero state. If this fails, transformers was repaired."""
    host = make_host(kind)
    x = ids(2, 24)
    expected = logits(host, x)
    assert not close(continued(host, x, [12, 12]), expected, 1e-3)
    adopt(host)
    assert close(continued(host, x, [12, 12]), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generate_equals_stock(make_host: Any, kind: str) -> None:
    host = make_host(kind)
    x = ids(3, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = host.generate(x, attention_mask=torch.ones_like(x), **options)
    adopt(host)
    assert torch.equal(host.generate(x, attention_mask=torch.ones_like(x), **options), expected)
    assert torch.equal(host.generate(x, attention_mask=torch.ones_like(x), use_cache=False, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_generate_equals_single_runs(make_host: Any, kind: str) -> None:
    host = make_host(kind)
    adopt(host)
    prompts = [ids(1, 9), ids(1, 5), ids(1, 1)]
    batch = torch.cat([torch.cat([torch.zeros(1, 9 - p.shape[1], dtype=torch.int64), p], 1) for p in prompts])
    mask = (batch != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = host.generate(batch, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = host.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[9:], alone[0, prompt.shape[1]:])


def test_beam_search_and_sampling_run_on_an_adopted_host(tiny_mamba: Any) -> None:
    x = ids(2, 5)
    options = {"max_new_tokens": 6, "attention_mask": torch.ones_like(x), "eos_token_id": None, "pad_token_id": 0}
    expected = tiny_mamba.generate(x, num_beams=3, do_sample=False, **options)
    adopt(tiny_mamba)
    assert torch.equal(tiny_mamba.generate(x, num_beams=3, do_sample=False, **options), expected)
    assert tiny_mamba.generate(x, do_sample=True, top_k=5, **options).shape == (2, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_stock(make_host: Any, kind: str) -> None:
    host = make_host(kind)
    x = ids(2, 10)
    host(x, labels=x).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in host.named_parameters()}
    host.zero_grad(set_to_none=True)
    adopt(host)
    host.train()
    host(x, labels=x).loss.backward()
    restore(host)
    for name, parameter in host.named_parameters():
        if parameter.grad is not None:  # conv weights change their shape: their gradient stayed with ours
            assert close(parameter.grad, expected[name], 1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_the_decay_and_state_in_fp32(make_host: Any, kind: str) -> None:
    host = make_host(kind)
    x = ids(2, 12)
    expected = logits(host, x)
    host = host.to(torch.bfloat16)
    adopt(host)
    with torch.no_grad():
        result = host(x, use_cache=True)
    assert close(result.logits, expected, 5e-2)
    assert result.cache_params.layers[0].recurrent_states[0].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_fails_where_the_formula_differs(make_host: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(kind)
    family = copy.copy(FAMILIES[kind])
    build = family.build

    def other(config: Any, layer_idx: int) -> Hosted:
        mixer = build(config, layer_idx)
        mixer.conv.activation = False
        return mixer

    monkeypatch.setattr(family, "build", other)
    with pytest.raises(UserError, match=r"differ by .* in one shot"):
        family.prove(host.config)


def test_the_proof_leaves_the_random_state_and_the_configuration_alone(tiny_mamba: Any) -> None:
    before, config = torch.get_rng_state(), tiny_mamba.config.to_dict()
    adopt(tiny_mamba)
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny_mamba.config.to_dict() == config


def test_real_weights_with_nan_are_refused(tiny_mamba: Any) -> None:
    with torch.no_grad():
        tiny_mamba.backbone.layers[0].mixer.in_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"layer 0.*on the real"):
        adopt(tiny_mamba)
    assert not isinstance(tiny_mamba.backbone.layers[0].mixer, Hosted)


def test_an_unknown_activation_is_named(make_host: Any) -> None:
    with pytest.raises(UserError, match="'gelu'"):
        adopt(make_host("mamba", hidden_act="gelu"))


def test_a_parameter_nobody_knows_is_named(tiny_mamba: Any) -> None:
    tiny_mamba.backbone.layers[1].mixer.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"layer 1.*extra"):
        adopt(tiny_mamba)
    assert not any(isinstance(layer.mixer, Hosted) for layer in tiny_mamba.backbone.layers)


def test_a_model_that_is_no_mamba_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    host = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(UserError, match="'gpt2' is not a Mamba") as caught:
        adopt(host)
    assert "falcon_mamba" in str(caught.value)


def test_packed_layers_cannot_be_written_back(tiny_mamba: Any) -> None:
    model_map = adopt(tiny_mamba)
    mixer = model_map.blocks[0].mixer
    mixer.out_proj = torch.nn.Identity()
    with pytest.raises(UserError, match=r"no float weights for out_proj\.weight"):
        restore(tiny_mamba)


def test_recording_the_past_is_refused(tiny_mamba: Any) -> None:
    adopt(tiny_mamba)
    with torch.no_grad():
        cache = tiny_mamba(ids(1, 3), use_cache=True).cache_params
        cache.layers[0].activate_past_recording()
        with pytest.raises(UserError, match="cannot roll back"):
            tiny_mamba(ids(1, 1), cache_params=cache, use_cache=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_does_not_call_installed_extensions(make_host: Any, kind: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls mamba_ssm and causal_conv1d where they are installed; they have kernels for CUDA alone."""
    host = make_host(kind)
    stock = sys.modules[type(host.backbone.layers[0].mixer).__module__]

    def extension(name: str) -> Any:
        @functools.wraps(getattr(stock, name).__wrapped__)
        def refuses(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{name}: expected a CUDA tensor")
        return refuses

    names = [name for name, value in vars(stock).items() if inspect.isfunction(value)
             and hasattr(value, "__wrapped__") and ("conv1d" in name or "scan" in name)]
    assert len(names) >= 3
    for name in names:
        monkeypatch.setattr(stock, name, extension(name))
    adopt(host)
    with pytest.raises(RuntimeError, match="expected a CUDA tensor"):
        getattr(stock, names[0])()
