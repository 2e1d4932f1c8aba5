"""Bytes: the parts sum to the files, and the files to what the disk says."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mambacompress.errors import UserError
from mambacompress.eval import size


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A directory as an artifact lays it out: int8 embedding, int8 and int4 matrices, everything else float."""
    save_file(
        {
            "backbone.embeddings.qweight": torch.zeros(50, 32, dtype=torch.int8),
            "backbone.embeddings.scale": torch.zeros(50),
            "backbone.layers.0.mixer.in_proj.qweight": torch.zeros(128, 32, dtype=torch.int8),
            "backbone.layers.0.mixer.in_proj.scale": torch.zeros(128),
            "backbone.layers.0.mixer.in_proj.act_scale": torch.zeros(()),
            "backbone.layers.0.mixer.out_proj.qweight": torch.zeros(32, 32, dtype=torch.uint8),
            "backbone.layers.0.mixer.out_proj.scale": torch.zeros(32, 2),
            "backbone.layers.0.mixer.out_proj.zero": torch.zeros(32, 2, dtype=torch.uint8),
            "backbone.layers.0.mixer.conv.weight": torch.zeros(64, 4),
            "backbone.layers.0.mixer.conv.bias": torch.zeros(64),
            "backbone.layers.0.mixer.paths.0.A_log": torch.zeros(64, 16),
            "backbone.layers.0.norm.weight": torch.zeros(32),
            "lm_head.transform": torch.zeros(32, 32),
        },
        tmp_path / "model.safetensors",
    )
    layout = {
        "backbone.layers.0.mixer.out_proj": {"weights": {"bits": 4}},
        "backbone.embeddings": {"weights": {"bits": 8}},
    }
    (tmp_path / "mambacompress.json").write_text(json.dumps({"layout": layout}))
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mamba",
                "num_hidden_layers": 1,
                "conv_kernel": 4,
                "state_size": 16,
                "intermediate_size": 64,
            }
        )
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_every_byte_is_in_one_category(packed: Path) -> None:
    found = size.measure(packed)
    assert found.file_bytes == (packed / "model.safetensors").stat().st_size
    assert sum(found.categories.values()) == found.tensor_bytes == sum(found.dtypes.values())
    assert found.tensor_bytes + found.header_bytes == found.file_bytes
    assert found.categories == {
        "embeddings": 50 * 32 + 50 * 4,
        "weights": 128 * 32 + 32 * 32,
        "scales": 128 * 4 + 4 + 64 * 4 + 64,
        "masks": 0,
        "other": 4 * (64 * 4 + 64 + 64 * 16 + 32 + 32 * 32),
    }
    assert set(found.other_files) == {"mambacompress.json", "config.json", "tokenizer.json"}


def test_bits_a_weight_count_scales_and_know_that_int4_holds_two(packed: Path) -> None:
    found = size.measure(packed)
    assert found.weights == 50 * 32 + 128 * 32 + 32 * 64
    paid = found.categories["embeddings"] + found.categories["weights"] + found.categories["scales"]
    assert found.bits_per_weight == pytest.approx(8 * paid / found.weights)
    linear = found.categories["weights"] + found.categories["scales"]
    assert found.linear_bits == pytest.approx(8 * linear / (128 * 32 + 32 * 64))


def test_a_float_model_costs_what_its_dtype_says(tmp_path: Path, tiny_mamba: Any) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    found = size.measure(tmp_path)
    assert found.bits_per_weight == 32
    assert found.categories["embeddings"] == 97 * 32 * 4  # tied: once
    stored = {p.data_ptr(): p.nbytes for p in tiny_mamba.parameters()}
    assert found.tensor_bytes == sum(stored.values())
    assert found.state_bytes == 2 * 4 * (64 * 3 + 64 * 8)


def test_mamba2_state(tmp_path: Path, tiny_mamba2: Any) -> None:
    tiny_mamba2.save_pretrained(tmp_path)
    assert size.measure(tmp_path).state_bytes == 2 * 4 * ((64 + 2 * 2 * 8) * 3 + 8 * 8 * 8)


def test_shards_count_and_leftovers_do_not(tmp_path: Path) -> None:
    for index in (1, 2):
        save_file({f"layers.{index}.weight": torch.zeros(4, 8)}, tmp_path / f"model-{index}.safetensors")
    save_file({"old": torch.zeros(4, 8)}, tmp_path / "leftover.safetensors")
    names = {f"layers.{index}.weight": f"model-{index}.safetensors" for index in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = size.measure(tmp_path)
    assert found.tensor_bytes == 2 * 4 * 8 * 4
    assert "leftover.safetensors" in found.other_files
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"misses model-2\.safetensors"):
        size.measure(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-5],
        lambda raw: b"",
        lambda raw: raw + b"more",
        lambda raw: struct.pack("<Q", 10**12) + raw[8:],
        lambda raw: raw[:8] + b"\xff" * (len(raw) - 8),
        lambda raw: struct.pack("<Q", 4) + b"[1]\n",
    ],
)
def test_damaged_files_give_one_sentence(packed: Path, damage: Any) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        size.measure(packed)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors"):
        size.measure(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        size.measure(tmp_path / "nowhere")


def test_families_whose_state_is_not_known_say_so() -> None:
    state, note = size.state_of({"model_type": "jamba", "num_hidden_layers": 4, "conv_kernel": 4, "state_size": 16})
    assert state is None
    assert "jamba" in note
