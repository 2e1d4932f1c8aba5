"""Reading a model one tensor at a time: transformers directories and original ``mamba_ssm`` checkpoints.

A ``Checkpoint`` knows the configuration and hands out tensors by their stock transformers name, memory-mapped, so that a
model larger than memory can be walked block by block. Safetensors (one file or shards) and ``pytorch_model.bin``
(``weights_only``: nothing is ever unpickled) are read; original ``mamba_ssm`` names and configurations are translated.
A live model in memory is the same thing to a caller (``LiveCheckpoint``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.families import adopt, family_of
from mambacompress.models.modelmap import ModelMap

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "tokenizer.model", "added_tokens.json", "chat_template.jinja")


class Checkpoint:
    """Configuration and tensors of a model. ``get(name)`` reads one tensor under its stock transformers name.

    directory: where it lies, or None for a live model. Raises UserError for whatever cannot be read.
    """

    def __init__(self, config: Any, readers: dict[str, Callable[[], Tensor]], directory: Path | None) -> None:
        self.config, self._readers, self.directory = config, readers, directory

    def names(self) -> list[str]:
        return list(self._readers)

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def get(self, name: str) -> Tensor:
        """The tensor, finite and of the stored dtype."""
        if name not in self._readers:
            raise UserError(f"the checkpoint holds no tensor {name!r}", "check that all its shards were copied")
        try:
            tensor = self._readers[name]()
        except (SafetensorError, OSError) as error:
            raise UserError(f"tensor {name!r} cannot be read: {error}", "copy or download the checkpoint again") from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name!r} holds NaN or Inf", "repair or retrain the model before compressing it")
        return tensor

    def tokenizer_files(self) -> list[Path]:
        if self.directory is None:
            return []
        return [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()]

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)


def empty_host(config: Any, *, prove: bool = True) -> ModelMap:
    """An adopted host on the meta device: every shape, no weight."""
    from transformers import AutoModelForCausalLM

    family_of(config.model_type)
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    host.eval()
    return adopt(host, prove=prove)


def materialise(module: nn.Module, path: str, model_map: ModelMap, checkpoint: Checkpoint,
                dtype: torch.dtype = torch.float32) -> None:
    """Load every parameter below ``module`` (at ``path`` in the host) that is still on meta, as ``dtype``."""
    family = family_of(model_map.family)
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        full = f"{path}.{name}" if path else name
        tensor = checkpoint.get(family.stock_name(full))
        if tensor.numel() != parameter.numel():
            raise UserError(f"tensor {full!r} has shape {list(tensor.shape)}, its configuration asks for "
                            f"{list(parameter.shape)}", "check that config.json belongs to these weights")
        owner = module.get_submodule(name.rpartition(".")[0])
        loaded = nn.Parameter(tensor.to(dtype).reshape(parameter.shape).clone(), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], loaded)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            raise UserError(f"buffer {path}.{name} has no value in a float checkpoint", "report the model")


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a directory (transformers or mamba_ssm) or a hub name already in the local cache."""
    directory = _resolve(source)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UserError(f"{directory} holds no config.json", "name a model directory, a hub name or 'demo'")
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file} is not JSON: {error}", "copy the file again") from error
    readers = _readers(directory)
    if "model_type" in raw:
        family_of(raw["model_type"])
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory)
        readers = {_modern(name): reader for name, reader in readers.items()}
    elif "d_model" in raw and "n_layer" in raw:
        config, readers = _from_mamba_ssm(raw, readers)
    else:
        raise UserError(f"{config_file} describes neither a transformers model nor a mamba_ssm one",
                        "name a Mamba model directory")
    return Checkpoint(config, readers, directory)


def live_checkpoint(host: Any) -> Checkpoint:
    """A model in memory, adopted or not, as a checkpoint; its tensors are read, never changed."""
    family = family_of(host.config.model_type)
    readers: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        readers[family.stock_name(name)] = (lambda p=parameter: p.detach())
    return Checkpoint(host.config, readers, None)


def _resolve(source: str | Path) -> Path:
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{source} is a file, not a model directory", "name the directory that holds config.json")
    text = str(source)
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise UserError(f"there is no directory {source}", "check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
    from httpx import HTTPError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.txt", "tokenizer*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise UserError(f"{text!r} is neither a directory nor a hub model that can be fetched ({type(error).__name__})",
                        "check the spelling, or download the model and name its directory") from error


def _readers(directory: Path) -> dict[str, Callable[[], Tensor]]:
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in wanted if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory} misses the shards {', '.join(missing)}", "copy or download the checkpoint again")
        files = [directory / name for name in wanted]
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or not a safetensors file: {error}",
                            "copy or download the checkpoint again") from error
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            readers[name] = (lambda h=handle, n=name: h.get_tensor(n))
    if readers:
        return readers
    for file in sorted(directory.glob("pytorch_model*.bin")):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds for a damaged or pickled file
            raise UserError(f"{file} cannot be read as plain tensors: {error}".splitlines()[0],
                            "convert it to safetensors") from error
        readers.update({name: (lambda t=tensor: t) for name, tensor in state.items()})
    if not readers:
        raise UserError(f"{directory} holds no weights (*.safetensors or pytorch_model.bin)", "name a model directory")
    return readers


def _modern(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def _from_mamba_ssm(raw: dict[str, Any], readers: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The transformers configuration of an original checkpoint (MambaConfig of mamba_ssm: d_model, n_layer, ssm_cfg, ...)."""
    from transformers import Mamba2Config, MambaConfig

    ssm = dict(raw.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise UserError("this mamba_ssm checkpoint mixes in attention or MLP layers", "pure Mamba models are supported")
    if not raw.get("rms_norm", True):
        raise UserError("this mamba_ssm checkpoint uses LayerNorm", "RMSNorm models are supported")
    readers = {_modern(name): reader for name, reader in readers.items()}
    vocab, d_model = readers["backbone.embeddings.weight"]().shape
    common = dict(vocab_size=vocab, hidden_size=d_model, num_hidden_layers=raw["n_layer"], layer_norm_epsilon=1e-5,
                  residual_in_fp32=raw.get("residual_in_fp32", True), tie_word_embeddings=raw.get("tie_embeddings", True),
                  conv_kernel=ssm.get("d_conv", 4), expand=ssm.get("expand", 2), use_bias=ssm.get("bias", False),
                  use_conv_bias=ssm.get("conv_bias", True), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    inner = common["expand"] * d_model
    if layer == "Mamba1":
        rank = readers["backbone.layers.0.mixer.dt_proj.weight"]().shape[1]
        config: Any = MambaConfig(**common, state_size=ssm.get("d_state", 16), intermediate_size=inner, time_step_rank=rank)
    elif layer == "Mamba2":
        if ssm.get("D_has_hdim") or ssm.get("norm_before_gate") or not ssm.get("rmsnorm", True):
            raise UserError("this mamba_ssm Mamba2 uses D_has_hdim, norm_before_gate or no norm", "report the model")
        head_dim = ssm.get("headdim", 64)
        config = Mamba2Config(**common, state_size=ssm.get("d_state", 128), head_dim=head_dim, num_heads=inner // head_dim,
                              n_groups=ssm.get("ngroups", 1), chunk_size=ssm.get("chunk_size", 256))
    else:
        raise UserError(f"mamba_ssm layer {layer!r} is not known", "known: Mamba1, Mamba2")
    if "lm_head.weight" not in readers and common["tie_word_embeddings"]:
        readers["lm_head.weight"] = readers["backbone.embeddings.weight"]
    return config, readers
