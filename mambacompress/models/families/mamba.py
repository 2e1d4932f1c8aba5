"""transformers' ``mamba`` (MambaForCausalLM): Mamba-1 as published."""

from __future__ import annotations

from typing import Any

from torch import nn

from mambacompress.errors import UserError
from mambacompress.models.families.base import Family, HostedS6
from mambacompress.models.mixers import DepthwiseConv, Gate, Path, SelectiveProjection

NAMES = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
    "paths.0.projection.x_proj.weight": "x_proj.weight",
    "paths.0.projection.dt_proj.weight": "dt_proj.weight",
    "paths.0.dt_bias": "dt_proj.bias",
    "paths.0.A_log": "A_log",
    "paths.0.D": "D",
    "out_proj.weight": "out_proj.weight",
    "out_proj.bias": "out_proj.bias",
}


class MambaFamily(Family):
    """Mamba-1: one causal path, SiLU gate, no norm inside."""

    model_type = "mamba"
    names = NAMES

    def build(self, config: Any, layer_idx: int) -> HostedS6:
        return build_s6(config, norm_eps=None)

    def stock_mixer(self, config: Any, layer_idx: int) -> nn.Module:
        from transformers.models.mamba.modeling_mamba import MambaMixer

        return MambaMixer(config, layer_idx, initialize_mixer_weights=False)

    def stock_norm(self) -> type[nn.Module]:
        from transformers.models.mamba.modeling_mamba import MambaRMSNorm

        return MambaRMSNorm

    def shrink(self, config: Any) -> Any:
        return shrink_s6(config)


def build_s6(config: Any, *, norm_eps: float | None) -> HostedS6:
    """The mixer of a transformers Mamba-1 configuration; ``norm_eps`` adds FalconMamba's norms on dt, B and C."""
    if config.hidden_act != "silu":
        raise UserError(f"the mixer's activation is {config.hidden_act!r}; only 'silu' is known", "report the model")
    E, N = config.intermediate_size, config.state_size
    projection = SelectiveProjection(E, N, int(config.time_step_rank), norm_eps=norm_eps)
    conv = DepthwiseConv(E, config.conv_kernel, bias=config.use_conv_bias)
    return HostedS6(config.hidden_size, E, [Path(E, N, projection)], conv=conv, gate=Gate(E), bias=config.use_bias)


def shrink_s6(config: Any) -> Any:
    """The same switches at hidden size 16, d_inner 24."""
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 16, 24, 2
    config.time_step_rank, config.state_size = 3, min(config.state_size, 4)
    config.use_mambapy = config.use_associative_scan = False
    return config
