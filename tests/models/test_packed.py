"""Packed modules: what is stored comes back, nothing float is kept, formats survive casts, ties hold one tensor."""

from __future__ import annotations

import copy
import gc
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacompress import numerics
from mambacompress.kernels import native
from mambacompress.models.packed import (
    PACKED,
    ActivationFormat,
    OnlineHadamard,
    PackedEmbedding,
    PackedHead,
    PackedLinear,
    PackedSparseEmbedding,
    PackedSparseHead,
    WeightFormat,
    arrange,
    build,
)
from mambacompress.nm import Pattern, nm_mask

INT8, INT4, INT4_ROW = WeightFormat(8), WeightFormat(4, 16), WeightFormat(4)
INT4_ZERO = WeightFormat(4, 16, symmetric=False)
FORMATS = [INT8, INT4, INT4_ROW, INT4_ZERO]
TOKEN, TENSOR, NONE = ActivationFormat("token"), ActivationFormat("tensor"), ActivationFormat()
ids = [f"int{w.bits}-{w.group_size}-{w.symmetric}" for w in FORMATS]


def linear(weights: WeightFormat = INT8, activations: ActivationFormat = TOKEN, bias: bool = True) -> PackedLinear:
    return PackedLinear.from_float(torch.randn(24, 48), torch.randn(24) if bias else None, weights=weights,
                                   activations=activations, act_scale=0.03 if activations.mode == "tensor" else None)


def every_module() -> dict[str, nn.Module]:
    table = torch.randn(11, 48)
    embedding = PackedEmbedding.from_float(table, weights=INT8)
    T = torch.randn(48, 48).half()
    return {
        **{f"linear {i} {a.mode}": linear(w, a) for w, i in zip(FORMATS, ids, strict=True)
           for a in (TOKEN, TENSOR, NONE)},
        "linear without bias": linear(bias=False), "int4-range activations": linear(INT4, ActivationFormat("token", 4)),
        "embedding": embedding, "int4 embedding": PackedEmbedding.from_float(table, weights=INT4_ZERO),
        "head": PackedHead.from_float(table, torch.randn(11), weights=INT4, activations=TENSOR, act_scale=0.1),
        "tied head": PackedHead.sharing(embedding, activations=TOKEN, transform=T),
        "hadamard": OnlineHadamard(48, seed=3, block=12), **sparse_ends(table, T),
    }


def sparse_ends(table: Tensor, T: Tensor) -> dict[str, nn.Module]:
    pattern = Pattern(1, 4)
    mask = nm_mask(table.abs(), pattern)
    table = table.masked_fill(~mask, 0)
    codes, scale = numerics.round_to_nearest(table, numerics.Grid(8))
    embedding = PackedSparseEmbedding.from_mask(codes, mask, pattern, scale=scale[:, 0])
    halves = PackedSparseEmbedding.from_mask(table, mask, pattern)
    return {
        "sparse embedding": embedding, "sparse fp16 embedding": halves,
        "tied sparse head": PackedSparseHead.sharing(embedding, activations=TOKEN, transform=T),
        "tied sparse fp16 head": PackedSparseHead.sharing(halves, activations=NONE),
        "sparse head": PackedSparseHead.from_mask(codes, mask, pattern, torch.randn(11), scale=scale[:, 0],
                                                  activations=TENSOR, act_scale=0.1),
    }


def run(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, PackedEmbedding | PackedSparseEmbedding):
        return module(torch.randint(0, 11, (2, 5), generator=generator))
    return module(torch.randn(2, 5, 48, generator=generator))


@pytest.mark.parametrize("name", list(every_module()))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_spec_and_strict_reload(name: str, device: str) -> None:
    module = every_module()[name]
    spec = json.loads(json.dumps(module.spec()))
    with torch.device(device):
        rebuilt = build(spec)
    assert rebuilt.spec() == module.spec()
    assert {k: (v.shape, v.dtype) for k, v in rebuilt.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
    rebuilt.load_state_dict(copy.deepcopy(module.state_dict()), strict=True, assign=True)
    assert torch.equal(run(rebuilt), run(module))
    assert module.nbytes() == sum(t.numel() * t.element_size() for t in module.state_dict().values())


@pytest.mark.parametrize("weights", FORMATS, ids=ids)
def test_close_to_the_float_linear(weights: WeightFormat) -> None:
    w, b, x = torch.randn(32, 64), torch.randn(32), torch.randn(9, 64)
    module = PackedLinear.from_float(w, b, weights=weights, activations=TOKEN)
    floor = 35 if weights.bits == 8 else 15
    assert numerics.sqnr_db(x @ w.T + b, module(x)) > floor
    assert torch.allclose(module.dequantize(), w, atol=float(module.scale.max()))
    weight_only = PackedLinear.from_float(w, b, weights=weights, activations=NONE)
    assert torch.allclose(weight_only(x), x @ weight_only.dequantize().T + b, atol=1e-4)


def test_given_codes_are_stored_as_they_are() -> None:
    codes, scale = numerics.round_to_nearest(torch.randn(6, 32), numerics.Grid(4, 16))
    module = PackedLinear.from_float(None, weights=INT4, activations=NONE, codes=codes, scale=scale.float())
    assert torch.equal(module.codes(), codes)
    assert torch.equal(module.dequantize(), numerics.dequantize(codes, scale))
    with pytest.raises(ValueError, match="do not survive"):
        PackedLinear.from_float(None, weights=INT4, activations=NONE, codes=codes, scale=scale.float() * 1.0001)


def test_weight_answers_without_existing() -> None:
    module = linear()
    assert module.weight.shape == (24, 48)
    assert module.weight.dtype == torch.float32
    assert module.weight.device == module.qweight.device
    assert module.weight.untyped_storage().nbytes() == 4
    assert "weight" not in module.state_dict()
    assert not list(module.parameters())
    assert torch.isnan(torch.randn(2, 48) @ module.weight.T).all()  # past the packed forward: loud
    with pytest.raises(RuntimeError):
        module.weight.normal_()
    with torch.device("meta"):
        assert build(module.spec()).weight.is_meta


def test_transformers_initialisation_leaves_it_alone() -> None:
    from transformers import initialization as init

    module = linear()
    before = copy.deepcopy(module.state_dict())
    init.kaiming_uniform_(module.weight, a=5**0.5)
    init.normal_(module.weight, std=0.02)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casts_change_no_stored_tensor(cast: Any) -> None:
    module = linear(INT4, TENSOR)
    before = copy.deepcopy(module.state_dict())
    wanted = cast(nn.Linear(1, 1)).weight.dtype
    cast(module)
    assert module.weight.dtype == wanted
    for key, value in module.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])
    assert module(torch.randn(3, 48, dtype=wanted)).dtype == wanted


def test_embedding_looks_up_rows() -> None:
    table = torch.randn(50, 32)
    for weights in FORMATS:
        embedding = PackedEmbedding.from_float(table, weights=weights)
        index = torch.tensor([[3, 49], [0, 3]])
        rows = embedding.dequantize()
        assert torch.equal(embedding(index), rows[index])
        assert embedding(torch.empty(0, dtype=torch.long)).shape == (0, 32)
        if embedding.tileable():
            embedding.tile()
            embedding.tiled = True
        assert torch.equal(embedding(torch.arange(50)), rows)  # 48 rows in tiles, two behind them
        for missing in (-1, 50):
            with pytest.raises(IndexError):
                embedding(torch.tensor([0, missing]))
    assert (embedding.num_embeddings, embedding.embedding_dim) == (50, 32)
    assert embedding.half()(index).dtype == torch.float16


def test_tied_head_shares_and_transforms() -> None:
    embedding = PackedEmbedding.from_float(torch.randn(50, 32), weights=INT8)
    T, bias, x = torch.randn(32, 32), torch.randn(50), torch.randn(4, 32)
    head = PackedHead.sharing(embedding, activations=NONE, transform=T, bias=bias)
    assert head.qweight is embedding.qweight
    assert head.scale is embedding.scale
    assert torch.allclose(head(x), x @ T @ embedding.dequantize().T + bias, atol=1e-3)
    with torch.device("meta"):
        rebuilt = build(head.spec())
    rebuilt.tie(embedding)
    assert rebuilt.qweight is embedding.qweight
    for other in (PackedEmbedding.from_float(torch.randn(50, 32), weights=INT4), nn.Embedding(50, 32),
                  PackedEmbedding.from_float(torch.randn(51, 32), weights=INT8)):
        with pytest.raises(ValueError, match="same format"):
            head.tie(other)
    with pytest.raises(ValueError, match="transform"):
        PackedHead.sharing(embedding, activations=NONE, transform=torch.eye(31))


def test_head_and_linear_agree() -> None:
    w, b, x = torch.randn(20, 32), torch.randn(20), torch.randn(4, 32)
    head = PackedHead.from_float(w, b, weights=INT8, activations=TENSOR, act_scale=0.05)
    flat = PackedLinear.from_float(w, b, weights=INT8, activations=TENSOR, act_scale=0.05)
    assert torch.equal(head(x), flat(x))


@pytest.mark.parametrize(("size", "block"), [(48, None), (464, 16), (40, 4)])
def test_online_hadamard(size: int, block: int | None) -> None:
    module = OnlineHadamard(size, seed=7, block=block)
    x, R = torch.randn(3, size, dtype=torch.float64), module.matrix()
    assert torch.allclose(module(x), x @ R, rtol=0, atol=1e-12)
    assert torch.allclose(R @ R.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(OnlineHadamard(size, seed=7, block=block).signs, module.signs)
    assert not torch.equal(OnlineHadamard(size, seed=8, block=block).signs, module.signs)
    assert module.half().signs.dtype == torch.int8
    given = OnlineHadamard(size, block=block, signs=module.signs)
    assert torch.equal(given.matrix(), R)


def test_no_float_copy_survives_a_forward() -> None:
    modules = [linear(w, a) for w in FORMATS for a in (TOKEN, TENSOR, NONE)]
    embedding = PackedEmbedding.from_float(torch.randn(64, 48), weights=INT8)
    modules += [embedding, PackedHead.sharing(embedding, activations=TOKEN)]

    def live() -> int:
        gc.collect()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
                    if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu"}
        return sum(storages.values())

    before = live()
    for module in modules:
        run(module)
    assert live() <= before + 4096  # a cached base matrix or scalar, no weight


@pytest.mark.parametrize("weights", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("activations", [TOKEN, TENSOR], ids=["token", "tensor"])
def test_prefill_is_decode(weights: WeightFormat, activations: ActivationFormat) -> None:
    module, x = linear(weights, activations), torch.randn(1, 300, 48)
    together = module(x)
    assert all(torch.equal(module(x[:, t:t + 1])[:, 0], together[:, t]) for t in range(0, 300, 37))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\[24, 48\]"):
        PackedLinear(48, 24, weights=WeightFormat(4, 64), activations=NONE)
    with pytest.raises(ValueError, match=r"\[24, 49\] weight has an odd number"):
        PackedLinear(49, 24, weights=WeightFormat(4), activations=NONE)
    with pytest.raises(ValueError, match="not 3"):
        WeightFormat(3)
    with pytest.raises(ValueError, match="no groups"):
        WeightFormat(8, 64)
    with pytest.raises(ValueError, match="row at 8"):
        ActivationFormat("row")
    with pytest.raises(ValueError, match="calibration"):
        PackedLinear.from_float(torch.randn(4, 4), weights=INT8, activations=TENSOR)
    with pytest.raises(ValueError, match="positive"):
        PackedLinear.from_float(torch.randn(4, 4), weights=INT8, activations=TENSOR, act_scale=0.0)
    with pytest.raises(ValueError, match="NaN"):
        PackedLinear.from_float(torch.full((4, 4), float("nan")), weights=INT8, activations=NONE)
    with pytest.raises(ValueError, match="largest block is 128"):
        OnlineHadamard(3712)
    with pytest.raises(ValueError, match="unknown module type"):
        build({"type": "PackedThing"})


def test_formats_are_values() -> None:
    for value in (*FORMATS, TOKEN, TENSOR):
        assert type(value).from_dict(json.loads(json.dumps(value.to_dict()))) == value
    assert len({INT8, WeightFormat(8)}) == 1
    assert [kind.__name__ for kind in PACKED] == [
        "PackedLinear", "PackedSparseLinear", "PackedEmbedding", "PackedSparseEmbedding", "PackedHead",
        "PackedSparseHead"]


# -- arranged for the native kernels ---------------------------------------------------------------------------------


@pytest.fixture
def tiles() -> None:
    if native.library() is None or native.level() != "avx512":
        pytest.skip("the kernels of this machine take weights as rows")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", list(every_module()))
def test_arranging_changes_no_result(name: str) -> None:
    module = every_module()[name]
    # sums of floats in another order
    tolerance = 1e-5 if getattr(module, "activations", TOKEN).mode == "none" or name == "hadamard" else 0.0
    before, stored = run(module), {key: value.clone() for key, value in module.state_dict().items()}
    codes = module.codes().clone() if isinstance(module, PACKED) else None
    arrange(module)
    arrange(module)
    torch.testing.assert_close(run(module), before, rtol=tolerance, atol=tolerance)
    for key, value in module.state_dict().items():
        assert torch.equal(value, stored[key]), key
    if codes is not None:
        assert torch.equal(module.codes(), codes)
        twin = build(module.spec())
        arrange(twin)
        twin.load_state_dict(stored)
        torch.testing.assert_close(run(twin), before, rtol=tolerance, atol=tolerance)
        assert copy.deepcopy(module).tiled is module.tiled


@pytest.mark.usefixtures("tiles")
def test_a_tied_head_is_arranged_once() -> None:
    table = torch.randn(37, 48)
    embedding = PackedEmbedding.from_float(table, weights=INT8)
    model = nn.ModuleDict({"head": PackedHead.sharing(embedding, activations=TOKEN), "embedding": embedding})
    h, ids_L = torch.randn(3, 48), torch.arange(37)
    logits, rows = model["head"](h), embedding(ids_L)
    arrange(model)
    assert model["head"].tiled
    assert embedding.tiled
    assert model["head"].qweight is embedding.qweight
    assert torch.equal(model["head"](h), logits)
    assert torch.equal(embedding(ids_L), rows)
    later = PackedHead.sharing(embedding, activations=TOKEN)
    assert torch.equal(later(h), logits)
