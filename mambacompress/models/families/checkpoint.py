"""Reading a model one tensor at a time: transformers directories and original ``mamba_ssm`` checkpoints.

A ``Checkpoint`` knows the configuration and hands out tensors by their stock transformers name, memory-mapped, so that
a model larger than memory can be walked block by block. Safetensors (one file or shards) and ``pytorch_model.bin``
(``weights_only``: nothing is ever unpickled) are read; original ``mamba_ssm`` names and configurations are translated.
A live model in memory is the same thing to a caller (``live_checkpoint``), its scaled activations included.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.families import adopt, family_of
from mambacompress.models.mixers import DepthwiseConv, Gate, build
from mambacompress.models.modelmap import ModelMap, set_module

_AGAIN = "copy or download the checkpoint again"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "tokenizer.model", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class Reader:
    """One tensor on disk: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Checkpoint:
    """Configuration and tensors of a model. ``get(name)`` reads one tensor under its stock transformers name.

    directory: where it lies, or None for a live model. scaled: path -> spec of a live model's modules whose activation
    carries a scale, which no stock model has. Raises UserError for whatever cannot be read.
    """

    def __init__(self, config: Any, readers: dict[str, Reader], directory: Path | None,
                 scaled: dict[str, dict[str, Any]] | None = None) -> None:
        self.config, self._readers, self.directory, self.scaled = config, readers, directory, scaled or {}

    def host(self) -> ModelMap:
        """The adopted model this checkpoint belongs to, on the meta device: every shape, no weight."""
        model_map = empty_host(self.config)
        with torch.device("meta"):
            for path, spec in self.scaled.items():
                set_module(model_map.host, path, build(spec))
        return model_map

    def names(self) -> list[str]:
        return list(self._readers)

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def get(self, name: str) -> Tensor:
        """The tensor, finite and of the stored dtype."""
        _shape(self._readers, name)
        try:
            tensor = self._readers[name].read()
        except (SafetensorError, OSError) as error:
            raise UserError(f"tensor {name!r} cannot be read: {error}", _AGAIN) from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name!r} holds NaN or Inf", "repair or retrain the model before compressing it")
        return tensor

    def check(self, model_map: ModelMap) -> None:
        """Every parameter of an adopted host must be here in its size; raises UserError. Reads no weight."""
        family = family_of(model_map.family)
        for path, parameter in model_map.host.named_parameters():
            name = family.stock_name(path)
            if prod(_shape(self._readers, name)) != parameter.numel():
                raise UserError(f"tensor {name!r} has shape {list(self._readers[name].shape)}, its configuration asks "
                                f"for {list(parameter.shape)}", "check that config.json belongs to these weights")

    def tokenizer_files(self) -> list[Path]:
        if self.directory is None:
            return []
        return [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()]

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)


def empty_host(config: Any, *, prove: bool = True) -> ModelMap:
    """An adopted host on the meta device: every shape, no weight. ``config`` is copied: passes may edit it."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    family_of(config.model_type)
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
        if not buffer.is_meta:
            continue
        full = f"{path}.{name}" if path else name
        if full not in checkpoint:
            raise UserError(f"buffer {full} has no value in a float checkpoint", "report the model")
        owner = module.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], checkpoint.get(full).to(dtype).clone())


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
        config: Any = read_config(directory)
        readers = _modern(readers)
    elif "d_model" in raw and "n_layer" in raw:
        config, readers = _from_mamba_ssm(raw, readers)
    else:
        raise UserError(f"{config_file} describes neither a transformers model nor a mamba_ssm one",
                        "name a Mamba model directory")
    return Checkpoint(config, readers, directory)


def live_checkpoint(host: Any) -> Checkpoint:
    """A model in memory, adopted or not, as a checkpoint; its tensors are read, never changed."""
    family = family_of(host.config.model_type)
    readers = {family.stock_name(name): Reader(tuple(parameter.shape), parameter.detach)
               for name, parameter in host.named_parameters(remove_duplicate=False)}
    scaled = {path: module.spec() for path, module in host.named_modules()
              if isinstance(module, DepthwiseConv | Gate) and module.spec()["scaled"]}
    for path in scaled:
        for name, buffer in host.get_submodule(path).named_buffers():
            readers[f"{path}.{name}"] = Reader(tuple(buffer.shape), buffer.detach)
    return Checkpoint(host.config, readers, None, scaled)


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.txt", "tokenizer*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{text!r} is neither a directory nor a hub model that can be fetched ({type(error).__name__})",
                        "check the spelling, or download the model and name its directory") from error


def _readers(directory: Path) -> dict[str, Reader]:
    files = _weight_files(directory, "*.safetensors", "model.safetensors.index.json")
    if files:
        return {name: reader for file in files for name, reader in _safetensors(file).items()}
    files = _weight_files(directory, "pytorch_model*.bin", "pytorch_model.bin.index.json")
    if not files:
        raise UserError(f"{directory} holds no weights (*.safetensors or pytorch_model.bin)", "name a model directory")
    return {name: reader for file in files for name, reader in _pickled(file).items()}


def _weight_files(directory: Path, pattern: str, index_name: str) -> list[Path]:
    index = directory / index_name
    if not index.is_file():
        return sorted(directory.glob(pattern))
    try:
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight files: {error}", _AGAIN) from error
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} misses the shards {', '.join(missing)}", _AGAIN)
    return [directory / name for name in wanted]


def _safetensors(file: Path) -> dict[str, Reader]:
    try:
        handle = safe_open(file, framework="pt")
        return {name: Reader(tuple(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name))
                for name in handle.keys()}  # noqa: SIM118 (a safetensors handle is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file: {error}",
                        _AGAIN) from error


def _pickled(file: Path) -> dict[str, Reader]:
    """A ``torch.save`` file, of which only plain tensors are accepted."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise UserError(f"{file} holds pickled objects, not only tensors, and is not opened",
                        "convert it to safetensors") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} is truncated or not a torch file: {str(error).splitlines()[0]}",
                        _AGAIN) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file} holds something other than named tensors", "convert it to safetensors")
    return {name: Reader(tuple(tensor.shape), tensor.detach) for name, tensor in state.items()}


def _modern(readers: dict[str, Reader]) -> dict[str, Reader]:
    """Today's transformers names: ``backbone.`` in front, ``embeddings`` in the plural."""
    prefix = "" if any(name.startswith("backbone.") for name in readers) else "backbone."
    found = {}
    for name, reader in readers.items():
        name = name if name.startswith("lm_head.") else prefix + name
        found[name.replace("backbone.embedding.", "backbone.embeddings.")] = reader
    return found


#: Keys of mamba_ssm's ``ssm_cfg`` that only shape the initial weights or choose a kernel.
_NO_FUNCTION = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init",
                "use_fast_path", "use_mem_eff_path", "layer_idx", "device", "dtype", "dt_rank"}


def _from_mamba_ssm(raw: dict[str, Any], readers: dict[str, Reader]) -> tuple[Any, dict[str, Reader]]:
    """The transformers configuration of an original checkpoint (mamba_ssm's d_model, n_layer, ssm_cfg, ...)."""
    from transformers import Mamba2Config, MambaConfig

    ssm = {key: value for key, value in (raw.get("ssm_cfg") or {}).items() if key not in _NO_FUNCTION}
    layer = ssm.pop("layer", "Mamba1")
    if raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise UserError("this mamba_ssm checkpoint mixes in attention or MLP layers", "pure Mamba models are supported")
    if not raw.get("rms_norm", True):
        raise UserError("this mamba_ssm checkpoint uses LayerNorm", "RMSNorm models are supported")
    readers = _modern(readers)
    vocab, d_model = _shape(readers, "backbone.embeddings.weight")
    tied = bool(raw.get("tie_embeddings", True))
    common = {
        "vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": raw["n_layer"], "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": raw.get("residual_in_fp32", True), "tie_word_embeddings": tied,
        "conv_kernel": ssm.pop("d_conv", 4), "expand": ssm.pop("expand", 2), "use_bias": ssm.pop("bias", False),
        "use_conv_bias": ssm.pop("conv_bias", True), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }
    inner = common["expand"] * d_model
    if layer == "Mamba1":
        rank = _shape(readers, "backbone.layers.0.mixer.dt_proj.weight")[1]
        config: Any = MambaConfig(**common, state_size=ssm.pop("d_state", 16), time_step_rank=rank)
    elif layer == "Mamba2":
        head_dim = ssm.pop("headdim", 64)
        if (ssm.pop("D_has_hdim", False) or ssm.pop("norm_before_gate", False) or not ssm.pop("rmsnorm", True)
                or ssm.pop("d_ssm", None) not in (None, inner)):
            raise UserError("this mamba_ssm Mamba2 uses D_has_hdim, norm_before_gate, d_ssm or no norm",
                            "report the model")
        config = Mamba2Config(**common, state_size=ssm.pop("d_state", 128), head_dim=head_dim,
                              num_heads=inner // head_dim, n_groups=ssm.pop("ngroups", 1),
                              chunk_size=ssm.pop("chunk_size", 256),
                              time_step_limit=tuple(ssm.pop("dt_limit", (0.0, float("inf")))))
    else:
        raise UserError(f"mamba_ssm layer {layer!r} is not known", "known: Mamba1, Mamba2")
    if ssm:
        raise UserError(f"ssm_cfg holds keys this version does not know: {', '.join(sorted(ssm))}", "report the model")
    if tied:
        readers["lm_head.weight"] = readers["backbone.embeddings.weight"]
    return config, readers


def _shape(readers: dict[str, Reader], name: str) -> tuple[int, ...]:
    if name not in readers:
        raise UserError(f"the checkpoint holds no tensor {name!r}", "check that all its shards were copied")
    return readers[name].shape




def read_config(directory: Path) -> Any:
    """The transformers configuration of a directory; raises UserError where it cannot be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{directory / 'config.json'} is no valid configuration: {str(error).splitlines()[0]}",
                        "compare it with the original") from error


def generation_config(directory: Path, host: Any) -> Any:
    """The directory's own generation configuration, or the one the model's configuration implies."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(host.config)


__all__ = [
    "Checkpoint",
    "Reader",
    "empty_host",
    "generation_config",
    "live_checkpoint",
    "materialise",
    "open_checkpoint",
    "read_config",
]
