"""A transformers Mamba-1 directory as a GGUF file of architecture ``mamba``, F16.

The rules are those of llama.cpp's own converter: two-dimensional weights in F16; norms, biases, A, D and the
convolution in F32; A stored as -exp(A_log); the convolution squeezed to [E, K]; a tied head omitted; the vocabulary
padded to the rows of the embedding. From this file ``llama_model_quantize`` makes every other type, as a user would.
The tokenizer is written too (byte-level BPE, tokens and merges), though our comparisons feed token ids.

Legend: E d_inner, K conv width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NORMAL, UNUSED, CONTROL = 1, 5, 3  # llama.cpp's token types

NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
HALF = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a GGUF file. shape: as in torch, rows first."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


def convert(model_dir: str | Path, out: str | Path) -> Path:
    """Write the model of ``model_dir`` (config.json, *.safetensors, tokenizer.json) to the GGUF file ``out``, F16.

    Raises ValueError for a model that GGUF's ``mamba`` cannot hold: not Mamba-1, biased projections, expand other than
    2, or a parameter this converter does not know.
    """
    import gguf

    directory, target = Path(model_dir), Path(out)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    _check(config, directory)
    writer = gguf.GGUFWriter(str(target), "mamba")
    writer.add_name(directory.name)
    writer.add_context_length(2**20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_inner_size(config["intermediate_size"])
    writer.add_ssm_state_size(config["state_size"])
    writer.add_ssm_time_step_rank(config["time_step_rank"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, directory, config)
    for name, value in _tensors(directory, tied=config.get("tie_word_embeddings", True)):
        writer.add_tensor(name, np.ascontiguousarray(value, np.float16 if name.endswith(HALF) else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tensor_rows(file: str | Path) -> list[TensorRow]:
    """Every tensor of a GGUF file with its type and stored bytes."""
    import gguf

    return [TensorRow(t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.n_bytes))
            for t in gguf.GGUFReader(str(file)).tensors]


def _check(config: dict[str, Any], directory: Path) -> None:
    if config.get("model_type") != "mamba":
        raise ValueError(f"{directory} holds a {config.get('model_type')!r}; only 'mamba' is converted here")
    if config.get("use_bias", False):
        raise ValueError(f"{directory}: GGUF's mamba has no bias on in_proj and out_proj")
    if config["intermediate_size"] != 2 * config["hidden_size"]:
        raise ValueError(f"{directory}: GGUF's mamba knows d_inner = 2 * d_model alone")


def _tensors(directory: Path, *, tied: bool) -> list[tuple[str, np.ndarray]]:
    from safetensors.torch import load_file

    found: list[tuple[str, np.ndarray]] = []
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            value = tensor.float().numpy()
            if name == "lm_head.weight":
                if not tied:
                    found.append(("output.weight", value))
                continue
            found.append(_place(name.removeprefix("backbone."), value))
    if not found:
        raise ValueError(f"{directory} holds no *.safetensors")
    return found


def _place(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    if name in ("embeddings.weight", "embedding.weight"):
        return "token_embd.weight", value
    if name == "norm_f.weight":
        return "output_norm.weight", value
    head, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    if head != "layers" or tail not in NAMES:
        raise ValueError(f"parameter {name!r} has no place in GGUF's mamba")
    if tail == "mixer.A_log":
        value = -np.exp(value)
    if tail == "mixer.conv1d.weight":
        value = value.squeeze(1)
    return f"blk.{index}.{NAMES[tail]}", value


def _add_vocabulary(writer: Any, directory: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{directory}: the tokenizer is a {model['type']}, a byte-level BPE is expected")
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [UNUSED] * len(tokens)
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if isinstance(config.get(key), int):
            add(config[key])
    writer.add_add_bos_token(False)
