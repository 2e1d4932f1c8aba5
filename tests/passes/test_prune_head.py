"""A head pruned to an N:M pattern: tied to the embedding it is one tensor, in the file, in memory and in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mambacompress as mc
from mambacompress import nm
from mambacompress.errors import CheckFailed, UserError
from mambacompress.kernels import native, registry
from mambacompress.models.lm import LanguageModel
from mambacompress.models.packed import PackedSparseEmbedding, PackedSparseHead, SparseWeight
from mambacompress.nm import Pattern
from mambacompress.passes.hessian import output_error
from mambacompress.recipe import load_recipe

TOKENS = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
INT8 = {"quantize": {"activations": "int8-token"}}
FUSED = [{"fuse_norms": {}}, {"rotate": {"residual": "hadamard"}}]


def made_of(model: Any, tokenizer: Any, passes: list[Any]) -> mc.Compressed:
    return mc.quantize(model, {"passes": passes}, calibration=TOKENS, tokenizer=tokenizer)


def head(method: str = "sparsegpt", **more: Any) -> dict[str, Any]:
    return {"prune": {"maps": ["in_proj", "head"], "method": method, **more}}


@torch.no_grad()
def dense_twin_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the adopted model with embedding and head as float modules of the same numbers."""
    lm = LanguageModel.of(model)
    module, packed = lm.model_map.embedding.module, lm.model_map.head.module
    h_BLD = module.dequantize()[ids]
    for block in lm.model_map.blocks:
        h_BLD = block.module(h_BLD)
    x_BLD = lm.model_map.final_norm(h_BLD)
    x_BLD = x_BLD if packed.transform is None else x_BLD @ packed.transform
    return x_BLD @ packed.dequantize().T


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("before", [[], FUSED], ids=["as it is", "rotated"])
def test_a_tied_head_is_one_sparse_tensor(tiny_mamba: Any, tiny_tokenizer: Any, method: str, before: list[Any]) -> None:
    made = made_of(tiny_mamba, tiny_tokenizer, [*before, head(method)])
    model = made.model
    embedding, packed = model.backbone.embeddings, model.lm_head
    assert isinstance(embedding, PackedSparseEmbedding)
    assert isinstance(packed, PackedSparseHead)
    assert packed.weights == "float16"
    assert packed.transform is None or before
    assert torch.equal(packed.codes(), embedding.codes())
    assert packed.stream is embedding.stream
    stored = mc.storage.stored_tensors(made.directory / "model.safetensors")
    assert {name for name in stored if name.startswith("lm_head")} <= {"lm_head.transform"}
    with torch.no_grad():
        logits = model(TOKENS).logits
        with registry.backend("reference"):
            reference = model(TOKENS).logits
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, dense_twin_logits(model, TOKENS), rtol=1e-4, atol=1e-5)
    counted = mc.verify(made.directory)
    assert counted["patterns"] == dict.fromkeys(
        ["backbone.embeddings", *(f"backbone.layers.{i}.mixer.in_proj" for i in (0, 1))], "2:4")
    assert counted["sparse_weights"] == 97 * 32 + 2 * 128 * 32


@pytest.mark.parametrize("round_", ["none", "int8"])
def test_quantized_after_pruning(tiny_mamba: Any, tiny_tokenizer: Any, round_: str) -> None:
    made = made_of(tiny_mamba, tiny_tokenizer, [*FUSED, head(keep=1, of=4, round=round_), INT8])
    model = made.model
    assert model.lm_head.weights == model.backbone.embeddings.weights == "int8"
    assert model.lm_head.activations.mode == "token"
    assert set(mc.verify(made.directory)["patterns"].values()) == {"1:4"}
    assert made.manifest["coverage"] == 1.0
    lm, ids = LanguageModel.of(model), TOKENS[:1]
    with torch.no_grad():
        logits, _ = lm.prefill(ids)
        _, states = lm.prefill(ids[:, :5])
        step, _ = lm.step(ids[:, 5], states)
        assert torch.equal(step, logits[:, 5]), "decode and prefill differ"
        with registry.backend("reference"):
            reference, _ = lm.prefill(ids)
    torch.testing.assert_close(logits, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("passes", [[head()], [*FUSED, head(round="int8"), INT8]], ids=["fp16", "int8"])
def test_a_head_of_its_own(make_host: Any, tiny_tokenizer: Any, passes: list[Any]) -> None:
    made = made_of(make_host("mamba", tie_word_embeddings=False), tiny_tokenizer, passes)
    assert isinstance(made.model.lm_head, PackedSparseHead)
    assert not isinstance(made.model.backbone.embeddings, PackedSparseEmbedding)
    assert "lm_head" in mc.verify(made.directory)["patterns"]


@pytest.mark.parametrize("before", [[], FUSED], ids=["as it is", "rotated"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_tied_head_is_pruned_for_the_inputs_it_has(make_host: Any, tiny_tokenizer: Any, kind: str,
                                                     before: list[Any]) -> None:
    """Wanda's masks follow from the inputs of the float model's head, in the basis it is stored in."""
    torch.manual_seed(0)
    host = make_host(kind, tie_word_embeddings=True)
    host.backbone.norm_f.weight.data.uniform_(0.2, 3)
    dense = made_of(host, tiny_tokenizer, [*before, {"prune": {"keep": 3, "maps": ["out_proj"]}}]).model
    made = made_of(host, tiny_tokenizer, [*before, {"prune": {"maps": ["head"], "method": "wanda"}}])
    seen: list[torch.Tensor] = []
    host.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        host(TOKENS)
    W_VD, x_TD = dense.backbone.embeddings.weight.detach().double(), seen[0].flatten(0, 1)
    # the rotation, from the embedding before and after it
    R_DD = torch.linalg.lstsq(host.backbone.embeddings.weight.detach().double(), W_VD).solution
    x_TD = x_TD @ R_DD
    mask = nm.nm_mask(W_VD.abs() * x_TD.norm(dim=0), Pattern(2, 4))
    kept = made.model.lm_head.kept()
    assert (kept == mask).float().mean() > 0.995  # but for ties within rounding
    H_DD = x_TD.T @ x_TD * 2 / len(x_TD)
    error = output_error(W_VD, nm.pruned(W_VD, mask), H_DD)
    assert made.manifest["records"]["embedding"]["prune.head.error"] == pytest.approx(error, rel=2e-2)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8)])
@pytest.mark.parametrize("after", [[], [INT8]], ids=["fp16", "int8"])
def test_a_loaded_model_holds_its_values_once(tiny_mamba: Any, tiny_tokenizer: Any, after: list[Any],
                                              pattern: tuple[int, int]) -> None:
    """One memory for everything, in lines of 64 bytes: of sparse weights the streams, and nothing else."""
    made = made_of(tiny_mamba, tiny_tokenizer, [head(keep=pattern[0], of=pattern[1]), *after])
    host, stored = mc.load(made.directory), mc.storage.stored_tensors(made.directory / "model.safetensors")
    sparse = {name: m for name, m in host.named_modules() if isinstance(m, SparseWeight) and name != "lm_head"}
    rows = {f"{name}.{leaf}" for name, m in sparse.items() for leaf in ("values", m.form)}
    assert len(rows) == 2 * 3
    expected = [entry.size for name, entry in stored.items() if name not in rows]
    expected += [module.stream_bytes() for module in sparse.values()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*host.parameters(), *host.buffers()) if t.numel()}
    if native.library() is not None:
        assert list(held.values()) == [sum(-(-size // 64) * 64 for size in expected)]


def test_a_damaged_mask_names_the_embedding(tiny_mamba: Any, tiny_tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    made = made_of(tiny_mamba, tiny_tokenizer, [head()])
    file = made.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.embeddings.mask"][5, 0] = 0b0111
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"backbone.embeddings is not 2:4: 2 of its groups"):
        mc.load(made.directory)


def test_what_does_not_go_together(tiny_mamba: Any) -> None:
    with pytest.raises(UserError, match="the embedding is 2:4 sparse, and sparse values are stored as int8 or fp16"):
        mc.inspect(tiny_mamba, {"passes": [head(), {"quantize": {"weights": "int4", "maps": ["embedding", "head"]}}]})
    with pytest.raises(UserError, match=r"rotate would fill the zeros .*head: R1 mixes its input channels"):
        mc.inspect(tiny_mamba, {"passes": [{"prune": {"maps": ["head"]}}, {"rotate": {"residual": "hadamard"}}]})
    with pytest.raises(UserError, match="training leaves the head dense"):
        load_recipe({"passes": [head()], "training": {"steps": 10}})
    with pytest.raises(UserError, match="the head has 32 input channels, which groups of 5"):
        mc.inspect(tiny_mamba, {"passes": [{"prune": {"maps": ["head"], "keep": 1, "of": 5}}]})


def test_a_run_that_was_cut_off_gives_the_same_bytes(model_directory: Any, tmp_path: Path) -> None:
    recipe = {"passes": [*FUSED, head(), INT8]}
    source = model_directory()

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 1:
            raise Stop

    whole = mc.quantize(source, recipe, calibration=TOKENS, out=tmp_path / "whole")
    with pytest.raises(Stop):
        mc.quantize(source, recipe, calibration=TOKENS, out=tmp_path / "again", progress=stop)
    again = mc.quantize(source, recipe, calibration=TOKENS, out=tmp_path / "again", resume=True)
    assert (whole.directory / "model.safetensors").read_bytes() == (again.directory / "model.safetensors").read_bytes()


def test_transformers_loads_it(model_directory: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import mambacompress.hf  # noqa: F401

    made = mc.quantize(model_directory(), {"passes": [head(), INT8]}, calibration=TOKENS, out=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(made.directory).eval()
    assert loaded.lm_head.stream is loaded.backbone.embeddings.stream
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, made.model(TOKENS).logits)
