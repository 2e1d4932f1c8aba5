"""Random-weight checkpoints of published shapes, and artifacts made from them cheaply: for speed, which does not care
what the weights are. fp32, tied heads, no tokenizer.

transformers' initialisation makes a model so chaotic that bf16 and fp32 have little in common after 24 layers, and
nothing could be checked. Here projections have rows of norm one and the embedding is small: the blocks make the logits,
and rounding stays rounding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 50280
SHAPES: dict[str, dict[str, Any]] = {
    "130m": {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24},
    "370m": {"model_type": "mamba", "hidden_size": 1024, "num_hidden_layers": 48},
    "mamba2-130m": {"model_type": "mamba2", "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24,
                    "head_dim": 64, "state_size": 128, "n_groups": 1},
    # for trying the benchmarks themselves
    "tiny": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512},
    "mamba2-tiny": {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 64,
                    "n_groups": 1, "vocab_size": 512},
}
# Searches and GPTQ look for quality, of which random weights have none: they are left out or see a few tokens. What
# runs afterwards (folds, online rotations, formats) is what the recipe gives any model.
CHEAP = ("checks.max_perplexity_ratio=null", "passes.gptq=null", "passes.quantize.scale_search=false")
TOKENS = (2, 64)  # sequences, length


def name_of(size: str) -> str:
    """The directory name of a size: what its rows are called."""
    return size if size.startswith("mamba2") else f"mamba-{size}"


def write_model(size: str, folder: Path) -> Path:
    """The checkpoint of a size below ``folder``, made where it is not there yet."""
    import transformers

    target = folder / name_of(size)
    if (target / "config.json").is_file():
        return target
    shape = dict(SHAPES[size])
    kind = shape.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **({"vocab_size": VOCABULARY} | shape), tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                depth = config.num_hidden_layers if "out_proj" in name else 1
                parameter.normal_(0, (parameter.shape[1] * depth) ** -0.5)
            elif "embeddings" in name:
                parameter.normal_(0, 0.02)
    staged = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    staged.rename(target)
    return target


def write_artifact(model: Path, recipe: str, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The artifact of a model and recipe beside the model, made where it is not there yet."""
    import mambacompress as mc
    from mambacompress.models.families.checkpoint import read_config

    target = model.with_name(f"{model.name}-{recipe}")
    if (target / "mambacompress.json").is_file():
        return target
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, read_config(model).vocab_size, TOKENS, generator=generator)
    mc.quantize(model, recipe, calibration=tokens, out=target, overrides=CHEAP, progress=progress)
    return target
