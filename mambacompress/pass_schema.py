"""The schema of each pass: what a recipe's step may say about it.

Every key is declared (``extra="forbid"``), every value is checked against its choices. ``schema`` puts the steps
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mambacompress.nm import Pattern

PERCENTILES = (99.9, 99.99, 99.999, 100.0)

Weights = Literal["int8", "int4"]
Activations = Literal["none", "int8-token", "int8-tensor", "int4-token", "int4-tensor"]
TensorName = Literal["in_proj", "x_proj", "dt_proj", "out_proj", "embedding", "head"]
TENSORS: tuple[TensorName, ...] = get_args(TensorName)
LINEARS: tuple[TensorName, ...] = ("in_proj", "x_proj", "dt_proj", "out_proj")

# YAML reads a bare on/off as a boolean.
Fold = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda v: {True: "on", False: "off"}.get(v, v) if isinstance(v, bool) else v),
]


class Strict(BaseModel):
    """Frozen, and no key beyond the declared ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FuseNormsConfig(Strict):
    """Fold every norm's weight into the linears that read it. Nothing to choose."""


class SmoothConfig(Strict):
    """Exact scale folds; auto: kept in a block only where it lowers the block's output error.

    gate S2, norm_gate S2', conv S3, states S4, norm S1, dt S5, conv_in S7 (methods: smoothing). alphas: exponents
    tried, the share of the activations' range that is moved into the weights.
    """

    gate: Fold = "off"
    norm_gate: Fold = "off"
    conv: Fold = "off"
    states: Fold = "off"
    norm: Fold = "off"
    dt: Fold = "off"
    conv_in: Fold = "off"
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((0.3, 0.5, 0.7), min_length=1)

    @property
    def folds(self) -> dict[str, str]:
        """The folds asked for, name -> auto or on."""
        return {name: value for name, value in self if name != "alphas" and value != "off"}


class RotateConfig(Strict):
    """Orthogonal changes of basis. residual R1 and dt R5 are free at run time; out R2 and x R6 are online transforms.

    untie: give a tied head its own rotated weight instead of a small matrix before it (larger file).
    """

    residual: Literal["klt-hadamard", "hadamard", "random", "none"] = "none"
    dt: Literal["klt-hadamard", "hadamard", "random", "none"] = "none"
    out: Literal["hadamard", "none"] = "none"
    x: Literal["hadamard", "none"] = "none"
    seed: int = 0
    untie: bool = False


def _group_size(weights: str | None, group_size: int | None) -> None:
    if group_size is not None and group_size % 2:
        raise ValueError(f"group_size {group_size} is odd, and two 4-bit values share a byte")
    if weights == "int8" and group_size is not None:
        raise ValueError("int8 weights have one scale a row, group_size belongs to int4: set group_size to null")


class WeightOverride(Strict):
    """The weight format of one tensor, where it differs; whatever is not named stays (int8 always drops the groups)."""

    weights: Weights | None = None
    group_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _legal(self) -> WeightOverride:
        _group_size(self.weights, self.group_size)
        return self

    def applied(self, weights: Weights, group_size: int | None) -> tuple[Weights, int | None]:
        """(weights, group size) of the tensor, given those of all."""
        weights = self.weights or weights
        if weights == "int8":
            return weights, None
        return weights, self.group_size if "group_size" in self.model_fields_set else group_size


class MapOverride(WeightOverride):
    """What differs for one tensor; whatever is not named stays as ``quantize`` says."""

    activations: Activations | None = None


class MapFormat(Strict):
    """How one tensor is stored and multiplied. group_size None: one scale a row."""

    weights: Weights
    group_size: int | None
    activations: Activations

    @property
    def bits(self) -> int:
        return 4 if self.weights == "int4" else 8


class QuantizeConfig(Strict):
    """Packs weights and quantizes activations.

    maps: which tensors; the rest stays float. overrides: per tensor. percentile: clipping points of static ranges that
    are tried, ``auto`` for all of methods, a number for one. scan int8: static int8 u, B, C, z and dt into the scan as
    well. scale_search: search each row's or group's clipping for the least error. bias_correction: add the mean error
    to the bias. rest: what the block's unpacked matrices (A_log, convolutions) are stored in; float16 where that keeps
    60 dB of one, computed with in fp32 as ever.
    """

    weights: Weights = "int8"
    group_size: PositiveInt | None = None
    activations: Activations = "none"
    maps: tuple[TensorName, ...] = Field(TENSORS, min_length=1)
    overrides: dict[TensorName, MapOverride] = Field(default_factory=dict)
    percentile: tuple[Annotated[float, Field(gt=50, le=100)], ...] = Field((100.0,), min_length=1)
    scan: Literal["none", "int8"] = "none"
    scale_search: bool = False
    bias_correction: bool = False
    rest: Literal["float32", "float16"] = "float32"

    @field_validator("percentile", mode="before")
    @classmethod
    def _candidates(cls, value: Any) -> Any:
        if value == "auto":
            return PERCENTILES
        if isinstance(value, str):
            raise ValueError(f"percentile {value!r} is neither auto, a number nor a list of numbers")
        return value if isinstance(value, Sequence) else (value,)

    @model_validator(mode="after")
    def _legal(self) -> QuantizeConfig:
        _group_size(self.weights, self.group_size)
        unused = set(self.overrides) - set(self.maps)
        if unused:
            raise ValueError(f"overrides name {', '.join(sorted(unused))}, which maps leaves in float")
        return self

    def of(self, tensor: str) -> MapFormat | None:
        """The format of a tensor by its recipe name; None where it stays float. An embedding has no activations."""
        if tensor not in self.maps:
            return None
        override = self.overrides.get(tensor, MapOverride())  # type: ignore[call-overload]
        weights, group_size = override.applied(self.weights, self.group_size)
        activations = "none" if tensor == "embedding" else override.activations or self.activations
        return MapFormat(weights=weights, group_size=group_size, activations=activations)


class GptqConfig(Strict):
    """Error-compensating rounding of the linears' weights, in the format ``quantize`` packs afterwards.

    weights, group_size and overrides (per tensor): taken from ``quantize`` where not named; a tensor at 8 bits is left
    to it. damp: share of the mean diagonal added to the Hessian. act_order: round the most excited columns first.
    refine: sweeps of coordinate descent and scale fitting afterwards. compensate: aim at the float output, making good
    what the linears before have lost.
    """

    weights: Weights = "int4"
    group_size: PositiveInt | None = None
    damp: PositiveFloat = 0.01
    act_order: bool = False
    maps: tuple[TensorName, ...] = Field(LINEARS, min_length=1)
    block: PositiveInt = 128
    refine: NonNegativeInt = 3
    compensate: bool = False
    overrides: dict[TensorName, WeightOverride] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _legal(self) -> GptqConfig:
        _group_size(self.weights, self.group_size)
        if "embedding" in self.maps:
            raise ValueError("an embedding is looked up, not multiplied: gptq has nothing to compensate there")
        return self

    def of(self, tensor: str) -> tuple[Weights, int | None]:
        """(weights, group size) of a tensor by its recipe name."""
        override = self.overrides.get(tensor, WeightOverride())  # type: ignore[call-overload]
        return override.applied(self.weights, self.group_size)


class PruneConfig(Strict):
    """One-shot N:M sparsity: ``keep`` of every ``of`` weights along the input stay.

    method: magnitude; wanda, magnitude times the input's norm; sparsegpt, with compensation; zeros: the weights are
    sparse already (trained so), the mask is where they are not zero. maps: which tensors; a tied head is the embedding
    as well. round: int8 has sparsegpt
    round what it keeps in the same loop (jointly with GPTQ), for quantize to pack. damp, block: as for gptq.
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "zeros"] = "sparsegpt"
    keep: PositiveInt = 2
    of: PositiveInt = 4
    maps: tuple[TensorName, ...] = Field(("in_proj", "out_proj"), min_length=1)
    round: Literal["none", "int8"] = "none"
    damp: PositiveFloat = 0.01
    block: PositiveInt = 128

    @model_validator(mode="after")
    def _legal(self) -> PruneConfig:
        self.pattern  # noqa: B018
        if "embedding" in self.maps:
            raise ValueError("an embedding is looked up, not multiplied, so prune leaves it dense: where it is the "
                             "head's weight as well, name head")
        if self.round != "none" and self.method != "sparsegpt":
            raise ValueError(f"round: {self.round} belongs to sparsegpt; {self.method} leaves rounding to quantize")
        return self

    @property
    def pattern(self) -> Pattern:
        """keep:of; raises ValueError for numbers that are none."""
        return Pattern(self.keep, self.of)
