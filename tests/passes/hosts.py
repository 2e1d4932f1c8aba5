"""Adopted hosts whose blocks do something, for the passes that round."""

from __future__ import annotations

from typing import Any

import torch

from mambacompress.models.families import adopt
from mambacompress.models.modelmap import ModelMap


def adopted(make_host: Any, kind: str = "mamba", **config: Any) -> ModelMap:
    """Random weights that are large enough for the block to do something."""
    model_map = adopt(make_host(kind, **config))
    generator = torch.Generator().manual_seed(1)
    for block in model_map.blocks:
        for path, sites in block.matrices().items():
            shape = sites[0].weight.shape
            weight_OI = torch.randn(shape, generator=generator) * 1.5 / shape[1] ** 0.5
            block.module.get_submodule(path).weight.data = weight_OI
    return model_map
