"""The GGUF conversion and the llama.cpp runner, against transformers' own forward on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra: bench)")

from benchmarks.peers import llamacpp  # noqa: E402
from mambacompress.bench.gguf_mamba import convert, tensor_rows  # noqa: E402
from mambacompress.bench.llamacpp import Session, make_types  # noqa: E402

VOCABULARY = 104


@pytest.fixture
def model_dir(tmp_path: Path, make_host: Any) -> Path:
    """A tiny Mamba-1 whose rows fit 32-wide blocks; its tokenizer has fewer tokens than the embedding has rows."""
    host = make_host("mamba", vocab_size=VOCABULARY)
    host.save_pretrained(tmp_path / "model")
    vocabulary = {"<|endoftext|>": 0} | {chr(33 + i): i + 1 for i in range(90)} | {"ab": 91}
    tokenizer = {"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True}],
                 "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]}}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path / "model"


def test_conversion_follows_llama_cpps_rules(model_dir: Path, tmp_path: Path, make_host: Any) -> None:
    host = make_host("mamba", vocab_size=VOCABULARY)
    file = convert(model_dir, tmp_path / "f16.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(str(file)).tensors}
    assert "output.weight" not in tensors
    mixer = host.backbone.layers[1].mixer
    pairs = {"blk.1.ssm_a": -torch.exp(mixer.A_log), "blk.1.ssm_conv1d.weight": mixer.conv1d.weight[:, 0],
             "blk.1.ssm_d": mixer.D, "blk.1.ssm_dt.bias": mixer.dt_proj.bias,
             "output_norm.weight": host.backbone.norm_f.weight}
    for name, value in pairs.items():
        assert tensors[name].tensor_type.name == "F32"
        np.testing.assert_allclose(np.array(tensors[name].data).reshape(value.shape), value.detach().numpy(), rtol=1e-6)
    for name, value in {"blk.0.ssm_x.weight": host.backbone.layers[0].mixer.x_proj.weight,
                        "token_embd.weight": host.backbone.embeddings.weight}.items():
        assert tensors[name].tensor_type.name == "F16"
        assert np.array_equal(np.array(tensors[name].data), value.detach().numpy().astype(np.float16))
    rows = {row.name: row for row in tensor_rows(file)}
    assert rows["token_embd.weight"].shape == (VOCABULARY, 32)
    assert rows["token_embd.weight"].bytes == VOCABULARY * 32 * 2
    assert len(rows) == 2 + 2 * 10


def test_an_untied_head_is_written(tmp_path: Path, make_host: Any, model_dir: Path) -> None:
    host = make_host("mamba", vocab_size=VOCABULARY, tie_word_embeddings=False)
    host.save_pretrained(model_dir)
    assert "output.weight" in {row.name for row in tensor_rows(convert(model_dir, tmp_path / "untied.gguf"))}


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "falcon_mamba"}, "only 'mamba'"), ({"use_bias": True}, "no bias"),
    ({"intermediate_size": 96}, "2 \\* d_model")])
def test_what_gguf_cannot_hold_is_refused(model_dir: Path, tmp_path: Path, change: dict[str, Any],
                                          message: str) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        convert(model_dir, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_unknown_types_are_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown type q9_9; known: f16"):
        make_types(model_dir, ["f16", "q9_9"], tmp_path)


def test_llama_cpp_computes_the_function_of_transformers(model_dir: Path, tmp_path: Path, make_host: Any) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    host = make_host("mamba", vocab_size=VOCABULARY)
    files = make_types(model_dir, ["f16", "q8_0"], tmp_path)
    windows_WL = np.random.default_rng(0).integers(1, VOCABULARY, size=(2, 24))
    with torch.no_grad():
        logits_WLV = host(torch.from_numpy(windows_WL)).logits
    with Session(files["f16"], length=24) as session:
        for _ in range(2):  # the second time from a memory that held the first
            got_LV = session.logits(windows_WL[1])
        np.testing.assert_allclose(got_LV, logits_WLV[1].numpy(), atol=5e-3 * logits_WLV.abs().max().item())
    quality = llamacpp.measure_quality(files, windows_WL)
    expected = torch.nn.functional.cross_entropy(
        logits_WLV[:, :-1].transpose(1, 2), torch.from_numpy(windows_WL)[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(quality["f16"].nll_W, expected.numpy(), rtol=2e-3)
    assert quality["f16"].kl_W.tolist() == [0.0, 0.0]
    assert np.all(quality["q8_0"].kl_W > 0)
    assert np.all(quality["q8_0"].kl_W < 1e-2)
    measured = llamacpp.results(files, quality, windows_WL)
    assert measured["types"]["q8_0"]["tensor_bytes"] < 0.8 * measured["types"]["f16"]["tensor_bytes"]
    shown = llamacpp.table(measured)
    assert "ssm_in.weight Q8_0 x2" in shown
    assert "token_embd.weight Q8_0" in shown


def test_kl_and_agreement_of_known_distributions() -> None:
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    q = np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    nll, kl, agreement = llamacpp.compare(q, p, np.array([0, 1]))
    assert nll == pytest.approx(-(np.log(0.25) + np.log(0.1)) / 2)
    assert kl == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2)
    assert agreement == 0.5
    assert llamacpp.compare(p, p, np.array([0, 0]))[1:] == (0.0, 1.0)
    np.testing.assert_allclose(np.exp(llamacpp.log_softmax(np.array([[1000.0, 1000.0]], dtype=np.float32))), 0.5)
