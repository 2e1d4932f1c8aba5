"""A transformers Mamba-1 or Mamba-2 directory as a GGUF file of architecture ``mamba`` or ``mamba2``, F16.

The rules are those of llama.cpp's own converter: two-dimensional weights in F16; norms, biases, A, D and the
convolution in F32; A stored as -exp(A_log); the convolution squeezed to [E, K]; a tied head omitted; Mamba-2's A and D
as [H, 1] and its gated norm as [G, E / G]. From this file ``llama_model_quantize`` makes every other type, as a user
would. A byte-level BPE tokenizer is written with it (tokens and merges), the vocabulary padded to the rows of the
embedding, though our comparisons feed token ids, for which ``no_vocab`` is enough.

Legend: E d_inner, K conv width, H heads, G groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NORMAL, UNUSED, CONTROL = 1, 5, 3  # llama.cpp's token types

COMMON = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
NAMES = {
    "mamba": COMMON
    | {
        "mixer.x_proj.weight": "ssm_x.weight",
        "mixer.dt_proj.weight": "ssm_dt.weight",
        "mixer.dt_proj.bias": "ssm_dt.bias",
    },
    "mamba2": COMMON | {"mixer.dt_bias": "ssm_dt.bias", "mixer.norm.weight": "ssm_norm.weight"},
}
HALF = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
TIED = {"mamba": True, "mamba2": False}  # what transformers takes where the configuration does not say


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a GGUF file. shape: as in torch, rows first."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


def convert(model_dir: str | Path, out: str | Path, *, vocabulary: bool = True) -> Path:
    """Write the model of ``model_dir`` (config.json, *.safetensors, tokenizer.json) to the GGUF file ``out``, F16.

    vocabulary: with the tokenizer; False where token ids are fed, and the file says ``no_vocab``. Raises ValueError for
    a model that GGUF's ``mamba`` and ``mamba2`` cannot hold: another architecture, biased projections, d_inner other
    than 2 d_model, a limited dt, or a parameter this converter does not know.
    """
    import gguf

    directory, target = Path(model_dir), Path(out)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind, inner = _check(config, directory)
    tensors = _tensors(directory, kind, config)
    writer = gguf.GGUFWriter(str(target), kind)
    writer.add_name(directory.name)
    writer.add_context_length(2**20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config["state_size"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    if kind == "mamba":
        writer.add_ssm_time_step_rank(config["time_step_rank"])
        writer.add_ssm_dt_b_c_rms(False)
    else:
        writer.add_ssm_time_step_rank(config["num_heads"])
        writer.add_ssm_group_count(config["n_groups"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if vocabulary:
        _add_vocabulary(writer, directory, config)
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, value in tensors:
        writer.add_tensor(name, np.ascontiguousarray(value, np.float16 if name.endswith(HALF) else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tensor_rows(file: str | Path) -> list[TensorRow]:
    """Every tensor of a GGUF file with its type and stored bytes."""
    import gguf

    return [
        TensorRow(t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.n_bytes))
        for t in gguf.GGUFReader(str(file)).tensors
    ]


def _check(config: dict[str, Any], directory: Path) -> tuple[str, int]:
    """(architecture, d_inner) of a model that can be written."""
    kind = config.get("model_type")
    if kind not in NAMES:
        raise ValueError(f"{directory} holds a {kind!r}; only 'mamba' and 'mamba2' are converted here")
    if config.get("use_bias", False):
        raise ValueError(f"{directory}: GGUF's {kind} has no bias on in_proj and out_proj")
    inner = config["num_heads"] * config["head_dim"] if kind == "mamba2" else config["intermediate_size"]
    if inner != 2 * config["hidden_size"]:
        raise ValueError(f"{directory}: GGUF's {kind} knows d_inner = 2 * d_model alone")
    low, high = (_number(value) for value in config.get("time_step_limit", (0.0, float("inf"))))
    if kind == "mamba2" and (low > 0 or high < float("inf")):
        raise ValueError(f"{directory}: GGUF's mamba2 does not limit dt, this model does ({low}, {high})")
    return kind, inner


def _number(value: Any) -> float:
    """A float of a configuration; transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _tensors(directory: Path, kind: str, config: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    from safetensors.torch import load_file

    found: list[tuple[str, np.ndarray]] = []
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            value = tensor.float().numpy()
            if name == "lm_head.weight":
                if not config.get("tie_word_embeddings", TIED[kind]):
                    found.append(("output.weight", value))
                continue
            found.append(_place(name.removeprefix("backbone."), value, kind, config))
    if not found:
        raise ValueError(f"{directory} holds no *.safetensors")
    return found


def _place(name: str, value: np.ndarray, kind: str, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    if name in ("embeddings.weight", "embedding.weight"):
        return "token_embd.weight", value
    if name == "norm_f.weight":
        return "output_norm.weight", value
    head, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    if head != "layers" or tail not in NAMES[kind]:
        raise ValueError(f"parameter {name!r} has no place in GGUF's {kind}")
    if tail == "mixer.A_log":
        value = -np.exp(value)
    if tail == "mixer.conv1d.weight":
        value = value.squeeze(1)
    if kind == "mamba2" and tail in ("mixer.A_log", "mixer.D"):
        value = value[:, None]
    if tail == "mixer.norm.weight":
        value = value.reshape(config["n_groups"], -1)
    return f"blk.{index}.{NAMES[kind][tail]}", value


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


__all__ = ["TensorRow", "convert", "tensor_rows"]
