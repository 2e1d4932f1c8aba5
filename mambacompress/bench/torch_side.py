"""What both torch contestants share: a model to import everything with, and the bytes of live tensors."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers


def small_relative(path: str) -> Any:
    """A random stock model of the architecture at ``path``, two layers of width 64: running it imports what running
    the real one imports, which then does not count as the model's memory.
    """
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    shape: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 64}
    kind = config.get("model_type", "mamba")  # original checkpoints do not say
    if kind == "mamba2":
        shape |= {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1}
    else:
        shape |= {"intermediate_size": 128, "time_step_rank": 4}
    relative = transformers.AutoConfig.for_model(kind, **shape)
    return transformers.AutoModelForCausalLM.from_config(relative).eval()


def live_tensor_bytes() -> int:
    """Bytes of the distinct storages of all live CPU tensors, parameters, buffers and states alike."""
    gc.collect()
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some lazily imported modules for their type warns
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


__all__ = ["live_tensor_bytes", "small_relative"]
