"""Opening models: transformers and mamba_ssm directories give the same tensors; what is wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.families import adopt
from mambacompress.models.families.checkpoint import (
    Checkpoint,
    empty_host,
    live_checkpoint,
    materialise,
    open_checkpoint,
)

KINDS = ["mamba", "mamba2", "falcon_mamba"]


def load(checkpoint: Checkpoint) -> Any:
    """The whole model of a checkpoint, adopted."""
    model_map = empty_host(checkpoint.config)
    checkpoint.check(model_map)
    materialise(model_map.host, "", model_map, checkpoint)
    model_map.host.tie_weights()
    return model_map.host


def logits(host: Any, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return host(input_ids).logits


def same_function(host: Any, other: Any) -> bool:
    x = torch.randint(1, 97, (2, 9))
    expected = logits(host, x)
    return bool((logits(other, x) - expected).abs().max() < 1e-5 * expected.abs().max())


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> None:
    message = error.value.message
    assert "\n" not in message
    assert error.value.next_step


def write_mamba_ssm(directory: Path, host: Any, *, file: str = "pytorch_model.bin", **changes: Any) -> None:
    """``host`` as the original code stores it: its own config keys, ``backbone.embedding``, a padded vocabulary."""
    directory.mkdir(parents=True)
    config = host.config
    ssm: dict[str, Any] = {"d_state": config.state_size, "d_conv": config.conv_kernel}
    if config.model_type == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": config.head_dim, "ngroups": config.n_groups,
                "chunk_size": config.chunk_size}
    raw = {"d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": config.vocab_size - 3,
           "ssm_cfg": ssm, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
           "pad_vocab_size_multiple": 8, "tie_embeddings": config.tie_word_embeddings}
    ssm_changes = changes.pop("ssm_cfg", {})
    raw |= changes
    raw["ssm_cfg"] = ssm | ssm_changes
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = {name.replace("embeddings.", "embedding."): tensor.clone() for name, tensor in host.state_dict().items()}
    if file.endswith(".bin"):
        torch.save(tensors, directory / file)
    else:
        save_file(tensors, directory / file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_directory(make_host: Any, tmp_path: Path, kind: str, tied: bool) -> None:
    host = make_host(kind, tie_word_embeddings=tied)
    host.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.tied == tied
    assert same_function(host, load(checkpoint))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_original_mamba_ssm_directory(make_host: Any, tmp_path: Path, kind: str, file: str, tied: bool) -> None:
    host = make_host(kind, tie_word_embeddings=tied)
    write_mamba_ssm(tmp_path / "m", host, file=file)
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    assert checkpoint.config.model_type == kind
    assert checkpoint.config.vocab_size == host.config.vocab_size  # the padded one
    assert same_function(host, load(checkpoint))


def test_a_mamba_ssm_step_limit_is_kept(make_host: Any, tmp_path: Path) -> None:
    host = make_host("mamba2", time_step_limit=(0.02, 0.5))
    write_mamba_ssm(tmp_path / "m", host, ssm_cfg={"dt_limit": [0.02, 0.5], "dt_min": 0.001, "A_init_range": [1, 16]})
    assert same_function(host, load(open_checkpoint(tmp_path / "m")))


def test_a_legacy_torch_file(tiny_mamba: Any, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path / "m", tiny_mamba)
    file = tmp_path / "m" / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert same_function(tiny_mamba, load(open_checkpoint(tmp_path / "m")))


def test_names_without_the_backbone_prefix(tiny_mamba: Any, tmp_path: Path) -> None:
    tiny_mamba.config.save_pretrained(tmp_path)
    tensors = {name.removeprefix("backbone."): tensor.clone() for name, tensor in tiny_mamba.state_dict().items()
               if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_function(tiny_mamba, load(open_checkpoint(tmp_path)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adopted", [False, True])
def test_a_live_model_is_a_checkpoint_too(make_host: Any, kind: str, adopted: bool) -> None:
    host = make_host(kind)
    stock_names = set(host.state_dict())
    if adopted:
        adopt(host)
    checkpoint = live_checkpoint(host)
    assert set(checkpoint.names()) == stock_names
    assert checkpoint.directory is None
    assert checkpoint.tokenizer_files() == []
    other = load(checkpoint)
    assert same_function(host, other)
    assert not {p.data_ptr() for p in host.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_host_reads_no_weight(make_host: Any, kind: str) -> None:
    model_map = empty_host(make_host(kind).config)
    assert all(parameter.is_meta for parameter in model_map.host.parameters())
    assert not model_map.host.training
    assert sum(shape.numel() for _, shape in model_map.matrices().values()) > 0


def test_a_block_is_read_alone(tiny_mamba: Any, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model_map = empty_host(checkpoint.config)
    block = model_map.blocks[1]
    materialise(block.module, block.path, model_map, checkpoint, torch.float64)
    assert all(not parameter.is_meta and parameter.dtype == torch.float64 for parameter in block.module.parameters())
    assert all(parameter.is_meta for parameter in model_map.blocks[0].module.parameters())
    h = torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = tiny_mamba.double().backbone.layers[1](h)
    assert torch.allclose(block.module(h), expected, atol=1e-5)


# -- what can be wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_mamba: Any, tmp_path: Path) -> Path:
    """A saved model of several shards."""
    tiny_mamba.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    return tmp_path / "m"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(saved: Path, value: float) -> None:
    file = sorted(saved.glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[2] = value
    save_file(tensors, file)
    with pytest.raises(UserError, match="NaN or Inf") as caught:
        load(open_checkpoint(saved))
    one_sentence(caught)
    assert name.split(".")[-2] in caught.value.message


def test_a_truncated_shard(saved: Path) -> None:
    file = sorted(saved.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated") as caught:
        open_checkpoint(saved)
    one_sentence(caught)
    assert file.name in caught.value.message


def test_an_empty_shard(saved: Path) -> None:
    file = sorted(saved.glob("*.safetensors"))[0]
    file.write_bytes(b"")
    with pytest.raises(UserError, match="truncated") as caught:
        open_checkpoint(saved)
    one_sentence(caught)


def test_a_missing_shard(saved: Path) -> None:
    file = sorted(saved.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(UserError, match="misses the shards") as caught:
        open_checkpoint(saved)
    one_sentence(caught)
    assert file.name in caught.value.message


def test_a_missing_shard_without_an_index(saved: Path) -> None:
    sorted(saved.glob("*.safetensors"))[1].unlink()
    (saved / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="holds no tensor") as caught:
        load(open_checkpoint(saved))
    one_sentence(caught)


def test_a_damaged_index(saved: Path) -> None:
    (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no index") as caught:
        open_checkpoint(saved)
    one_sentence(caught)


def test_a_shape_the_configuration_does_not_ask_for(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())
    raw["state_size"] = 4
    (saved / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(saved)
    model_map = empty_host(checkpoint.config)
    for attempt in (lambda: checkpoint.check(model_map),
                    lambda: materialise(model_map.host, "", model_map, checkpoint)):
        with pytest.raises(UserError, match="its configuration asks for") as caught:
            attempt()
        one_sentence(caught)


def test_no_weights(saved: Path) -> None:
    for file in saved.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no weights") as caught:
        open_checkpoint(saved)
    one_sentence(caught)


class Opens:
    """What a hostile pickle would do: call something while being read."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return open, ("opened-by-a-pickle", "w")


def test_a_pickle_is_refused_and_nothing_in_it_runs(tiny_mamba: Any, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_mamba_ssm(tmp_path / "m", tiny_mamba)
    torch.save({"backbone.norm_f.weight": Opens()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled objects") as caught:
        open_checkpoint(tmp_path / "m")
    one_sentence(caught)
    assert not (tmp_path / "opened-by-a-pickle").exists()


def test_a_whole_pickled_module_is_refused(tiny_mamba: Any, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path / "m", tiny_mamba)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled objects") as caught:
        open_checkpoint(tmp_path / "m")
    one_sentence(caught)


def test_a_truncated_torch_file(tiny_mamba: Any, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path / "m", tiny_mamba)
    file = tmp_path / "m" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"pytorch_model\.bin") as caught:
        open_checkpoint(tmp_path / "m")
    one_sentence(caught)


def test_a_torch_file_of_something_else(tiny_mamba: Any, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path / "m", tiny_mamba)
    torch.save([torch.zeros(2)], tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="other than named tensors") as caught:
        open_checkpoint(tmp_path / "m")
    one_sentence(caught)


@pytest.mark.parametrize(("text", "message"), [
    ('{"model_type": "llama"}', "'llama' is not a Mamba"),
    ('{"model_type": "mamba3"}', "did you mean"),
    ("{", "is not JSON"),
    ("[]", "describes neither"),
    ('{"hidden_size": 8}', "describes neither"),
    ('{"model_type": "mamba", "hidden_size": "wide"}', "no valid configuration"),
])
def test_a_wrong_configuration(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(saved)
    one_sentence(caught)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attn_layer_idx": [1]}, "attention or MLP"),
    ({"d_intermediate": 128}, "attention or MLP"),
    ({"rms_norm": False}, "LayerNorm"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3' is not known"),
    ({"ssm_cfg": {"surprise": 1}}, "surprise"),
    ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
])
def test_a_mamba_ssm_configuration_we_do_not_know(tiny_mamba: Any, tmp_path: Path, changes: dict[str, Any],
                                                  message: str) -> None:
    write_mamba_ssm(tmp_path / "m", tiny_mamba, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / "m")
    one_sentence(caught)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "no-such-model-of-ours", "no/such/deep/model"])
def test_a_source_that_is_not_there(source: str) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(source)
    one_sentence(caught)


def test_a_file_is_not_a_directory(saved: Path) -> None:
    with pytest.raises(UserError, match="is a file") as caught:
        open_checkpoint(saved / "config.json")
    one_sentence(caught)


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        open_checkpoint(tmp_path)
    one_sentence(caught)
