"""Prefill is decode: a trained model over 2,000 tokens of prose, and random models with every matrix packed."""

from __future__ import annotations

import copy
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.tolerances import rms_ratio
from mambacompress.models.families import adopt
from mambacompress.models.families.checkpoint import empty_host, materialise, open_checkpoint
from mambacompress.models.lm import Decoder, LanguageModel
from mambacompress.models.mixers import MixerState
from mambacompress.models.packed import ActivationFormat, PackedEmbedding, PackedHead, PackedLinear, WeightFormat

TOKENS = 2000


@pytest.fixture(scope="module")
def trained(shared: Path) -> LanguageModel:
    """The shared trained Mamba-1, fp32."""
    checkpoint = open_checkpoint(shared / "models" / "mamba1-en")
    model_map = empty_host(checkpoint.config)
    materialise(model_map.host, "", model_map, checkpoint)
    model_map.host.tie_weights()
    return LanguageModel(model_map)


@pytest.fixture(scope="module")
def prose(shared: Path) -> Tensor:
    """2,000 tokens of a held-out novel, [1, 2000]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "mamba1-en")
    with lzma.open(shared / "data" / "lm" / "test_novels.jsonl.xz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    return tokenizer(text[:20000], return_tensors="pt").input_ids[:, :TOKENS]


@torch.no_grad()
def chunked(lm: LanguageModel, ids_BL: Tensor, sizes: list[int]) -> Tensor:
    states: list[MixerState] | None = None
    outputs = []
    for chunk in ids_BL.split(sizes, 1):
        logits, states = lm.prefill(chunk, states=states)
        outputs.append(logits)
    return torch.cat(outputs, 1)


def agree(lm: LanguageModel, ids_BL: Tensor, sizes: list[int]) -> None:
    with torch.no_grad():
        want, _ = lm.prefill(ids_BL)
    got = chunked(lm, ids_BL, sizes)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert (got.argmax(-1) == want.argmax(-1)).double().mean().item() >= 0.999


def test_a_trained_model_in_uneven_chunks(trained: LanguageModel, prose: Tensor) -> None:
    assert prose.shape == (1, TOKENS)
    agree(trained, prose, [3, 500, *[1] * 60, 2, 700, *[1] * 30, TOKENS - 1295])


@pytest.mark.slow
def test_a_trained_model_token_by_token(trained: LanguageModel, prose: Tensor) -> None:
    agree(trained, prose, [1] * TOKENS)


def pack(lm: LanguageModel, bits: int) -> None:
    """Every matrix of every block, the embedding and the head: packed weights, per-token int8 activations."""
    weights = WeightFormat(bits=bits, group_size=None if bits == 8 else 32)
    activations = ActivationFormat(mode="token", bits=8)
    model_map = lm.model_map
    for block in model_map.blocks:
        for path in block.matrices():
            linear = block.module.get_submodule(path)
            bias = linear.bias if isinstance(linear.bias, Tensor) else None
            columns = linear.get_parameter("weight").shape[1]
            fitting = weights if bits == 8 or columns % 32 == 0 else WeightFormat(bits=8, group_size=None)
            block.replace(path, PackedLinear.from_float(linear.get_parameter("weight"), bias, weights=fitting,
                                                        activations=activations))
    embedding = PackedEmbedding.from_float(model_map.embedding.weight, weights=weights)
    model_map.host.backbone.embeddings = embedding
    model_map.host.lm_head = PackedHead.sharing(embedding, activations=activations)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_models(make_host: Callable[..., Any], kind: str, bits: int) -> None:
    """With integer linears Mamba-1 is bit-identical all the way; the chunked SSD scan is not, and stays within 1e-5."""
    lm = LanguageModel(adopt(make_host(kind, use_bias=True)))
    pack(lm, bits)
    x = torch.randint(1, 97, (2, 150))
    with torch.no_grad():
        want, _ = lm.prefill(x)
    for sizes in ([1] * 150, [7, 100, 1, 42]):
        got = chunked(lm, x, sizes)
        if kind == "mamba2":
            assert ((got - want).abs().max() / want.abs().max()).item() < 2e-2  # a step of the 8-bit grid may flip
            assert (got - want).abs().median() < 1e-5 * want.abs().max()
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_packed_models_left_padded_batch_equals_single_runs(make_host: Callable[..., Any], kind: str) -> None:
    lm = LanguageModel(adopt(make_host(kind, use_bias=True)))
    pack(lm, 8)
    long, short = torch.randint(1, 97, (1, 9)), torch.randint(1, 97, (1, 5))
    batch = torch.cat([long, torch.nn.functional.pad(short, (4, 0))])
    with torch.no_grad():
        together, _ = lm.prefill(batch, (batch != 0).long())
        alone, _ = lm.prefill(short)
    assert ((together[1, 4:] - alone[0]).abs().max() / alone.abs().max()).item() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_half_precision_takes_the_fused_step(kind: str, dtype: torch.dtype, make_host: Callable[..., Any]) -> None:
    """In one native call, with activations in fp32: at least as close to fp64 on the same weights as single ops."""
    host = make_host(kind).to(dtype)
    exact = copy.deepcopy(host).double()
    ids_BL = torch.randint(1, 97, (2, 12))

    def decode(model: Any) -> tuple[Tensor, set[tuple[str, str]]]:
        lm = LanguageModel(adopt(model, prove=False))
        with torch.no_grad(), registry.recording() as seen:
            _, states = lm.prefill(ids_BL[:, :4])
            decoder = Decoder(lm, states)
            logits = torch.stack([decoder.step(ids_B) for ids_B in ids_BL[:, 4:].unbind(1)], 1)
        return logits, {(choice.op, choice.backend) for choice in seen}

    fused, ran = decode(host)
    want, _ = decode(exact)
    with registry.backend("reference"):
        single, _ = decode(host)
    if native.library() is not None:
        assert ("mixer_step", "native") in ran, ran
    error, others = (rms_ratio(logits, want) for logits in (fused, single))
    assert error <= max(1.1 * others, 1e-3), f"{error:.1e}, single ops {others:.1e}"
