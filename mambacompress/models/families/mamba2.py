"""transformers' ``mamba2`` (Mamba2ForCausalLM): the state-space dual mixer."""

from __future__ import annotations

from typing import Any

from torch import nn

from mambacompress.errors import UserError
from mambacompress.models.families.base import Family, HostedSSD


class Mamba2Family(Family):
    """Mamba-2: scalar decay a head, grouped B and C, norm after the gate in ``n_groups`` groups."""

    model_type = "mamba2"
    names = {  # noqa: RUF012
        "in_proj.weight": "in_proj.weight",
        "in_proj.bias": "in_proj.bias",
        "conv.weight": "conv1d.weight",
        "conv.bias": "conv1d.bias",
        "A_log": "A_log",
        "D": "D",
        "dt_bias": "dt_bias",
        "norm_weight": "norm.weight",
        "out_proj.weight": "out_proj.weight",
        "out_proj.bias": "out_proj.bias",
    }

    def build(self, config: Any, layer_idx: int) -> HostedSSD:
        if config.hidden_act != "silu":
            raise UserError(f"the mixer's activation is {config.hidden_act!r}; only 'silu' is known",
                            "report the model")
        return HostedSSD(
            config.hidden_size, heads=config.num_heads, head_dim=config.head_dim, d_state=config.state_size,
            groups=config.n_groups, conv_width=config.conv_kernel, bias=config.use_bias, conv_bias=config.use_conv_bias,
            norm_eps=config.layer_norm_epsilon, chunk_size=config.chunk_size, dt_limit=tuple(config.time_step_limit))

    def stock_mixer(self, config: Any, layer_idx: int) -> nn.Module:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        return Mamba2Mixer(config, layer_idx, initialize_mixer_weights=False)

    def stock_norm(self) -> type[nn.Module]:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm

        return Mamba2RMSNorm

    def shrink(self, config: Any) -> Any:
        groups = min(config.n_groups, 2)
        config.n_groups, config.num_heads, config.head_dim = groups, 2 * groups, 4
        config.hidden_size, config.expand, config.num_hidden_layers = 8 * groups, 1, 2
        config.state_size, config.chunk_size = min(config.state_size, 4), 4
        return config
