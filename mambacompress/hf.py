"""Plug into transformers: after ``import mambacompress.hf``, AutoModelForCausalLM.from_pretrained(artifact) works.

transformers builds the stock model on the meta device; our quantizer adopts it, puts the artifact's modules in place,
and the ordinary loader fills them by name. Importing this module registers it; ``mambacompress.load`` does not need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mambacompress import artifact
from mambacompress.models.families import adopt
from mambacompress.models.packed import HeadParts, arrange


@register_quantization_config(artifact.METHOD)
class MambaCompressConfig(QuantizationConfigMixin):
    """``quantization_config`` of an artifact's config.json: the method and the schema; all else is in the manifest."""

    def __init__(self, schema_version: int = artifact.SCHEMA_VERSION, **_: Any) -> None:
        self.quant_method = artifact.METHOD  # type: ignore[assignment]
        self.schema_version = schema_version


@register_quantizer(artifact.METHOD)
class MambaCompressQuantizer(HfQuantizer):
    """Puts the artifact's modules into the model transformers has just built, before it loads the weights."""

    requires_calibration = True
    quantization_config: MambaCompressConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed beyond this package."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        directory = Path(model.config.name_or_path)
        if not artifact.is_artifact(directory):
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(model.config.name_or_path, local_files_only=True))
        artifact.dress(model, artifact.read_manifest(directory)["layout"])
        head = model.get_output_embeddings()
        if model.config.tie_word_embeddings and isinstance(head, HeadParts):
            # A packed head shares buffers, which transformers' tying (of parameters) does not know: share_head does it.
            model.all_tied_weights_keys = {}
            model._keys_to_ignore_on_load_missing = {
                *(model._keys_to_ignore_on_load_missing or ()),
                r"^lm_head\.(qweight|scale|zero|values|mask|indices)$",
            }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        artifact.share_head(adopt(model, prove=False))
        arrange(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
