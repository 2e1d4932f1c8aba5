"""Hard twins: the function stays, the channels do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.twins import FAMILIES, eigenbasis, make_twin, moments, save_twin
from mambacompress.models.exact import KeepDouble

TWINS = [(family, kind) for family, kinds in FAMILIES.items() for kind in kinds]
TOKENS = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def host(make_host: Any) -> Any:
    return make_host("mamba", num_hidden_layers=3).double()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), KeepDouble():
        out = model(TOKENS).logits
    assert out.dtype == torch.float64
    return out


@pytest.mark.parametrize(("family", "kind"), TWINS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_function_is_unchanged(make_host: Any, family: str, kind: str, seed: int) -> None:
    host = make_host(family, num_hidden_layers=3).double()
    before = copy.deepcopy(host.state_dict())
    expected = logits(host)
    twin = make_twin(host, kind, seed=seed, tokens_SL=TOKENS)
    got = logits(twin)
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()
    assert all(torch.equal(before[name], tensor) for name, tensor in host.state_dict().items())
    assert not torch.equal(dict(twin.named_parameters())["backbone.layers.0.mixer.in_proj.weight"],
                           before["backbone.layers.0.mixer.in_proj.weight"])


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("family", "kind"), TWINS)
def test_biases_and_untied_heads_are_carried_along(make_host: Any, family: str, kind: str, use_bias: bool) -> None:
    host = make_host(family, use_bias=use_bias, use_conv_bias=not use_bias, tie_word_embeddings=False).double()
    expected = logits(host)
    assert (logits(make_twin(host, kind, tokens_SL=TOKENS)) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_seeds_differ_and_repeat(host: Any) -> None:
    def weight(kind: str, seed: int) -> torch.Tensor:
        return make_twin(host, kind, seed=seed, tokens_SL=TOKENS).backbone.layers[1].mixer.in_proj.weight

    for kind in FAMILIES["mamba"]:
        assert torch.equal(weight(kind, 0), weight(kind, 0))
        assert not torch.equal(weight(kind, 0), weight(kind, 1))


def test_the_scaled_twins_have_outlying_channels(host: Any) -> None:
    spread = {}
    models = {"stock": host} | {kind: make_twin(host, kind) for kind in ("norm-dt", "gate-conv")}
    for name, model in models.items():
        mixer = model.backbone.layers[0].mixer
        spread[name] = [w.norm(dim=0).log().std().item() for w in (mixer.in_proj.weight, mixer.out_proj.weight)]
    assert spread["norm-dt"][0] > 5 * spread["stock"][0]
    assert spread["gate-conv"][1] > 5 * spread["stock"][1]


def test_the_scaled_twin_of_a_mamba2_has_outlying_inputs(make_host: Any) -> None:
    """What both linears read has channels far above the others: that is what a scale a token cannot hold."""
    host = make_host("mamba2").double()
    peaks: dict[str, list[float]] = {}
    for name, model in {"stock": host, "norm-gate": make_twin(host, "norm-gate")}.items():
        mixer = model.backbone.layers[0].mixer
        seen: list[torch.Tensor] = []
        for linear in (mixer.in_proj, mixer.out_proj):
            linear.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2)))
        logits(model)
        rms = [x.square().mean(0).sqrt() for x in seen]
        peaks[name] = [float(channel.max() / channel.median()) for channel in rms]
    assert all(hard > 4 * soft for hard, soft in zip(peaks["norm-gate"], peaks["stock"], strict=True)), peaks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eigenbasis_twin_has_diagonal_moments(make_host: Any, family: str) -> None:
    host = make_host(family, num_hidden_layers=3).double()
    twin = make_twin(host, "eigenbasis", tokens_SL=TOKENS)
    assert not twin.config.tie_word_embeddings
    assert torch.equal(twin.backbone.norm_f.weight, torch.ones_like(twin.backbone.norm_f.weight))
    with torch.no_grad():
        residual, dts = moments(twin, TOKENS)
    assert len(dts) == (3 if family == "mamba" else 0)
    for moment in (residual, *dts):
        off = moment - torch.diag(moment.diagonal())
        assert off.abs().max() < 1e-6 * moment.diagonal().max()
    assert residual.diagonal().mean() == pytest.approx(1.0, abs=5e-3)


def test_an_eigenbasis_is_orthogonal() -> None:
    x = torch.randn(50, 12, dtype=torch.float64)
    Q = eigenbasis(x.T @ x, torch.Generator().manual_seed(0))
    assert (Q @ Q.T - torch.eye(12)).abs().max() < 1e-13


@pytest.mark.parametrize(("family", "kind"), [twin for twin in TWINS if twin[1] != "gate-conv"])
def test_stock_twins_survive_being_saved(make_host: Any, tmp_path: Path, family: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    host = make_host(family).double()
    expected = logits(host)
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer.json").write_text("{}")
    directory = save_twin(make_twin(host, kind, tokens_SL=TOKENS), tmp_path / "twin", tmp_path / "from")
    assert (directory / "tokenizer.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        got = loaded(TOKENS).logits
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_cannot_be_twinned_says_why(host: Any, tiny_mamba2: Any) -> None:
    with pytest.raises(ValueError, match="unknown twin 'evil'; known: norm-dt"):
        make_twin(host, "evil")
    with pytest.raises(ValueError, match="needs tokens"):
        make_twin(host, "eigenbasis")
    with pytest.raises(ValueError, match="a mamba2 has no norm-dt twin; it has norm-gate, eigenbasis"):
        make_twin(tiny_mamba2.double(), "norm-dt")
    with pytest.raises(ValueError, match="a mamba has no norm-gate twin"):
        make_twin(host, "norm-gate")
    with pytest.raises(ValueError, match="stock Mamba-1 or Mamba-2 in fp64"):
        make_twin(host.float(), "norm-dt")


def test_a_live_twin_in_our_form_is_read_with_its_scales(host: Any) -> None:
    from mambacompress.models.families.checkpoint import live_checkpoint, materialise

    twin = make_twin(host, "gate-conv")
    checkpoint = live_checkpoint(twin)
    model_map = checkpoint.host()
    materialise(model_map.host, "", model_map, checkpoint, torch.float64)
    model_map.host.tie_weights()
    assert torch.equal(logits(model_map.host), logits(twin))
