"""The schema of a recipe: calibration, an ordered list of passes with their configurations, checks.

Every key is declared (``extra="forbid"``), every value is checked against its choices, and what cannot work together is
refused here, before any model is looked at. Anything a recipe does not name stays as it is: no fold, no rotation, no
packing. What a pass takes is in ``pass_schema``; loading, overrides and readable errors are in ``recipe``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator

from mambacompress.pass_schema import (
    LINEARS,
    PERCENTILES,
    TENSORS,
    FuseNormsConfig,
    GptqConfig,
    MapFormat,
    MapOverride,
    PruneConfig,
    QuantizeConfig,
    RotateConfig,
    SmoothConfig,
    Strict,
    TensorName,
    WeightOverride,
    Weights,
)
from mambacompress.training.soup_config import SoupConfig
from mambacompress.training.sparse_config import SparseTraining


class CalibrationConfig(Strict):
    """text: ``demo`` (Python's standard library) or text files. sequences x length tokens are drawn with ``seed``."""

    text: str | list[str] = "demo"
    sequences: PositiveInt = 128
    length: PositiveInt = 512
    seed: int = 0


class Step(Strict):
    """One entry of ``passes``: exactly one pass and its configuration."""

    fuse_norms: FuseNormsConfig | None = None
    smooth: SmoothConfig | None = None
    rotate: RotateConfig | None = None
    prune: PruneConfig | None = None
    gptq: GptqConfig | None = None
    quantize: QuantizeConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if isinstance(value, Mapping):
            if len(value) != 1:
                raise ValueError(f"a step names one pass, this one names {', '.join(map(str, value)) or 'none'}")
            return {key: {} if config is None else config for key, config in value.items()}
        return value

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def config(self) -> Any:
        return getattr(self, self.name)


PASS_NAMES = tuple(Step.model_fields)


class ChecksConfig(Strict):
    """What the result must pass, or the run fails. None: not checked.

    coverage: share of the bytes of all matrices (embedding and head included) that is packed. max_perplexity_ratio:
    perplexity on the calibration text, compressed over original.
    """

    coverage: Annotated[float, Field(ge=0, le=1)] | None = None
    max_perplexity_ratio: PositiveFloat | None = None


class Recipe(Strict):
    """A validated recipe. ``steps()`` gives the passes in order. training: how its prune step is reached by training
    first, None: in one shot.
    """

    name: str = Field("custom", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    calibration: CalibrationConfig = CalibrationConfig()
    passes: tuple[Step, ...] = Field(min_length=1)
    training: SparseTraining | None = None
    soup: SoupConfig | None = None
    checks: ChecksConfig = ChecksConfig()

    @model_validator(mode="before")
    @classmethod
    def _gptq_follows_quantize(cls, value: Any) -> Any:
        """Give gptq the format of quantize, where it names none."""
        if not isinstance(value, Mapping) or not isinstance(value.get("passes"), list | tuple):
            return value
        steps = [{step: {}} if isinstance(step, str) else step for step in value["passes"]]
        plain = [step for step in steps if isinstance(step, Mapping)]
        packed: Mapping[str, Any] = next(
            (step["quantize"] for step in plain if isinstance(step.get("quantize"), Mapping)), {}
        )
        shared: dict[str, Any] = {"weights": QuantizeConfig.model_fields["weights"].default}
        shared |= {key: packed[key] for key in ("weights", "group_size") if key in packed}
        overrides = packed.get("overrides")
        if isinstance(overrides, Mapping) and all(isinstance(override, Mapping) for override in overrides.values()):
            shared["overrides"] = {
                name: {key: override[key] for key in ("weights", "group_size") if key in override}
                for name, override in overrides.items()
                if name in LINEARS
            }
        filled = []
        for step in steps:
            if isinstance(step, Mapping) and list(step) == ["gptq"] and isinstance(step["gptq"] or {}, Mapping):
                step = {"gptq": shared | dict(step["gptq"] or {})}
            filled.append(step)
        return dict(value) | {"passes": filled}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [step.name for step in self.passes]
        for name in set(names) - {"smooth"}:
            if names.count(name) > 1:
                raise ValueError(f"pass {name} stands there {names.count(name)} times")
        if "gptq" in names:
            self._gptq_matches()
        if "prune" in names:
            self._prune_matches()
        elif self.training is not None:
            raise ValueError("training needs a prune pass: it says the pattern and the tensors to train to")
        if self.training is not None and any("head" in step.prune.maps for step in self.passes if step.prune):
            raise ValueError("training leaves the head dense: take it out of prune's maps, or prune in one shot")
        if self.soup is not None and self.training is None:
            raise ValueError("soup needs a training section: it says how a replica is retrained")
        return self

    def _prune_matches(self) -> None:
        """What prune and the passes that round must agree on."""
        prune = next(step.prune for step in self.passes if step.prune)
        quantize = next((step.quantize for step in self.passes if step.quantize), None)
        gptq = next((step.gptq for step in self.passes if step.gptq), None)
        both = [name for name in prune.maps if gptq is not None and name in gptq.maps]
        if both:
            raise ValueError(f"gptq would fill the zeros of {', '.join(both)}: take it out of gptq's maps, and let "
                             "sparsegpt round it with prune.round: int8")
        for name in prune.maps if prune.round != "none" else ():
            packed = None if quantize is None else quantize.of(name)
            if packed is None or packed.weights != prune.round:
                raise ValueError(f"prune rounds {name} to {prune.round}, and no quantize pass packs it as that")

    def _gptq_matches(self) -> None:
        gptq = next(step.gptq for step in self.passes if step.gptq)
        quantize = next((step.quantize for step in self.passes if step.quantize), None)
        if quantize is None:
            raise ValueError("gptq rounds weights that no quantize pass packs")
        for tensor in gptq.maps:
            packed, (weights, group_size) = quantize.of(tensor), gptq.of(tensor)
            if packed is None or (packed.weights, packed.group_size) != (weights, group_size):
                what = (
                    "leaves it float"
                    if packed is None
                    else f"packs it as {packed.weights}, group size {packed.group_size}"
                )
                raise ValueError(
                    f"gptq rounds {tensor} to {weights}, group size {group_size}, but quantize {what}: "
                    "give both the same format, or take it out of gptq's maps"
                )

    def steps(self) -> list[tuple[str, Any]]:
        """(pass name, its configuration) in order."""
        return [(step.name, step.config) for step in self.passes]

    def document(self) -> dict[str, Any]:
        """The whole recipe as plain data, every default spelled out; ``Recipe.model_validate`` takes it back."""
        plain = self.model_dump(mode="json")
        for section in ("training", "soup"):
            if getattr(self, section) is None:
                del plain[section]
        plain["passes"] = [{name: _plain(config)} for name, config in self.steps()]
        return plain

    def to_yaml(self) -> str:
        """The canonical YAML; loading it gives an equal recipe."""
        return yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)

    def canonical_json(self) -> str:
        """One line that is equal exactly when the recipes are."""
        return json.dumps(self.document(), sort_keys=True, separators=(",", ":"))


def _plain(config: BaseModel) -> dict[str, Any]:
    plain = config.model_dump(mode="json")
    # an unnamed key of an override means "as above", null means "none"
    if isinstance(config, QuantizeConfig | GptqConfig):
        plain["overrides"] = {
            name: override.model_dump(mode="json", exclude_unset=True) for name, override in config.overrides.items()
        }
    return plain


__all__ = ["LINEARS", "PASS_NAMES", "PERCENTILES", "TENSORS", "CalibrationConfig", "ChecksConfig", "FuseNormsConfig",
           "GptqConfig", "MapFormat", "MapOverride", "PruneConfig", "QuantizeConfig", "Recipe", "RotateConfig",
           "SmoothConfig", "Step", "TensorName", "WeightOverride", "Weights"]
