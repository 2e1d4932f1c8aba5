"""transformers' ``falcon_mamba``: Mamba-1 with weightless RMS norms on dt, B and C."""

from __future__ import annotations

from typing import Any

from torch import nn

from mambacompress.models.families.base import Family, HostedS6
from mambacompress.models.families.mamba import NAMES, build_s6, shrink_s6


class FalconMambaFamily(Family):
    """FalconMamba. The norms have no parameters, so the tensors are Mamba-1's."""

    model_type = "falcon_mamba"
    names = NAMES

    def build(self, config: Any, layer_idx: int) -> HostedS6:
        return build_s6(config, norm_eps=config.mixer_rms_eps)

    def stock_mixer(self, config: Any, layer_idx: int) -> nn.Module:
        from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

        return FalconMambaMixer(config, layer_idx, initialize_mixer_weights=False)

    def stock_norm(self) -> type[nn.Module]:
        from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaRMSNorm

        return FalconMambaRMSNorm

    def shrink(self, config: Any) -> Any:
        return shrink_s6(config)
