"""Recipes: what is done to a model, in which order, and what the result must pass.

A recipe is YAML: a name, the calibration text, an ordered list of passes and the checks. Every key is known here
(``extra="forbid"``): a typo is an error that names the nearest key, never an empty recipe. ``load_recipe`` takes a
packaged name, a file, a mapping or a ``Recipe``, with overrides in dotted form (``passes.quantize.group_size=32``).

Anything a recipe does not name stays as it is: no fold, no rotation, no packing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from mambacompress.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent / "recipes"
PERCENTILES = (99.9, 99.99, 99.999, 100.0)

Weights = Literal["int8", "int4"]
Activations = Literal["none", "int8-token", "int8-tensor", "int4-token", "int4-tensor"]
TensorName = Literal["in_proj", "x_proj", "dt_proj", "out_proj", "embedding", "head"]
TENSORS: tuple[TensorName, ...] = get_args(TensorName)
LINEARS: tuple[TensorName, ...] = ("in_proj", "x_proj", "dt_proj", "out_proj")

# YAML reads a bare on/off as a boolean.
Fold = Annotated[Literal["auto", "on", "off"], BeforeValidator(lambda v: {True: "on", False: "off"}.get(v, v)
                                                              if isinstance(v, bool) else v)]


class Strict(BaseModel):
    """Frozen, and no key beyond the declared ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationConfig(Strict):
    """text: ``demo`` (Python's standard library) or text files. sequences x length tokens are drawn with ``seed``."""

    text: str | list[str] = "demo"
    sequences: PositiveInt = 128
    length: PositiveInt = 512
    seed: int = 0


class FuseNormsConfig(Strict):
    """Fold every norm's weight into the linears that read it. Nothing to choose."""


class SmoothConfig(Strict):
    """Exact scale folds; auto: kept in a block only where it lowers the block's output error.

    gate S2, norm_gate S2', conv S3, states S4, norm S1, dt S5, conv_in S7 (methods: smoothing). alphas: exponents tried, the
    share of the activations' range that is moved into the weights.
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


class MapOverride(Strict):
    """What differs for one tensor; whatever is not named stays as ``quantize`` says (int8 always drops the group size)."""

    weights: Weights | None = None
    group_size: PositiveInt | None = None
    activations: Activations | None = None

    @model_validator(mode="after")
    def _legal(self) -> MapOverride:
        _group_size(self.weights, self.group_size)
        return self


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

    maps: which tensors; the rest stays float. overrides: per tensor. percentile: clipping points of static ranges that are
    tried, ``auto`` for all of methods, a number for one. scan int8: static int8 u, B, C, z and dt into the scan as well.
    scale_search: search each row's or group's clipping for the least error. bias_correction: add the mean error to the bias.
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
        weights = override.weights or self.weights
        named = "group_size" in override.model_fields_set
        group_size = None if weights == "int8" else override.group_size if named else self.group_size
        activations = "none" if tensor == "embedding" else override.activations or self.activations
        return MapFormat(weights=weights, group_size=group_size, activations=activations)


class GptqConfig(Strict):
    """Error-compensating rounding of the linears' weights, in the format ``quantize`` packs afterwards.

    weights and group_size: taken from ``quantize`` where not named. damp: share of the mean diagonal added to the Hessian.
    act_order: round the most excited columns first.
    """

    weights: Weights = "int4"
    group_size: PositiveInt | None = None
    damp: PositiveFloat = 0.01
    act_order: bool = False
    maps: tuple[TensorName, ...] = Field(LINEARS, min_length=1)
    block: PositiveInt = 128

    @model_validator(mode="after")
    def _legal(self) -> GptqConfig:
        _group_size(self.weights, self.group_size)
        if "embedding" in self.maps:
            raise ValueError("an embedding is looked up, not multiplied: gptq has nothing to compensate there")
        return self


class Step(Strict):
    """One entry of ``passes``: exactly one pass and its configuration."""

    fuse_norms: FuseNormsConfig | None = None
    smooth: SmoothConfig | None = None
    rotate: RotateConfig | None = None
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
    """A validated recipe. ``steps()`` gives the passes in order."""

    name: str = Field("custom", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    calibration: CalibrationConfig = CalibrationConfig()
    passes: tuple[Step, ...] = Field(min_length=1)
    checks: ChecksConfig = ChecksConfig()

    @model_validator(mode="before")
    @classmethod
    def _gptq_follows_quantize(cls, value: Any) -> Any:
        """Give gptq the format of quantize, where it names none."""
        if not isinstance(value, Mapping) or not isinstance(value.get("passes"), list | tuple):
            return value
        plain = [step for step in value["passes"] if isinstance(step, Mapping)]
        packed = next((step["quantize"] for step in plain if isinstance(step.get("quantize"), Mapping)), {})
        shared = {key: packed[key] for key in ("weights", "group_size") if key in packed} | (
            {} if "weights" in packed else {"weights": QuantizeConfig.model_fields["weights"].default})
        filled = []
        for step in value["passes"]:
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
        return self

    def _gptq_matches(self) -> None:
        gptq = next(step.gptq for step in self.passes if step.gptq)
        quantize = next((step.quantize for step in self.passes if step.quantize), None)
        if quantize is None:
            raise ValueError("gptq rounds weights that no quantize pass packs")
        for tensor in gptq.maps:
            packed = quantize.of(tensor)
            if packed is None or (packed.weights, packed.group_size) != (gptq.weights, gptq.group_size):
                what = "leaves it float" if packed is None else f"packs it as {packed.weights}, group size {packed.group_size}"
                raise ValueError(f"gptq rounds {tensor} to {gptq.weights}, group size {gptq.group_size}, but quantize {what}: "
                                 "give both the same format, or take it out of gptq's maps")

    def steps(self) -> list[tuple[str, Any]]:
        """(pass name, its configuration) in order."""
        return [(step.name, step.config) for step in self.passes]

    def document(self) -> dict[str, Any]:
        """The whole recipe as plain data, every default spelled out; ``Recipe.model_validate`` takes it back."""
        plain = self.model_dump(mode="json")
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
    if isinstance(config, QuantizeConfig):  # an unnamed key of an override means "as above", null means "none"
        plain["overrides"] = {name: override.model_dump(mode="json", exclude_unset=True)
                              for name, override in config.overrides.items()}
    return plain


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe,
                overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """A recipe by packaged name, from a YAML file, from plain data, or as it is.

    overrides: ``["a.b=c", ...]`` (c is YAML) or {"a.b": c}. Below ``passes`` the pass is addressed by name; the value null
    takes a pass out, a mapping for a pass that is not there puts it at its place.

    Raises UserError for an unknown recipe, key or value (with the nearest known one), and for what cannot work together.
    """
    if isinstance(source, Recipe):
        document, origin = source.document(), source.name
    elif isinstance(source, Mapping):
        document, origin = json.loads(json.dumps(dict(source))), str(source.get("name", "custom"))
    else:
        path = _find(source)
        document, origin = _read_yaml(path), str(source)
        document.setdefault("name", path.stem)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_pair, overrides)
    for key, value in pairs:
        _override(document, key, value)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _friendly(error, origin) from error


def _find(source: str | Path) -> Path:
    name = str(source)
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or "/" in name or "\\" in name:
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}", "check the path")
        return path
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    raise UserError(f"there is no recipe {name!r}{did_you_mean(name, recipe_names())}",
                    f"name one of {', '.join(recipe_names())}, or a .yaml file")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}", "check the file") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}", "repair that line") from error
    if not isinstance(document, dict):
        raise UserError(f"recipe {path} is not a mapping", "start it with `name:` and `passes:`")
    return document


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r} is not of the form key=value", "write for example --set calibration.sequences=64")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"the value of --set {text!r} is not valid YAML", "quote it") from error


def _override(document: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    target: Any = document
    if parts[0] == "passes":
        if len(parts) == 1:
            document["passes"] = value
            return
        target, parts = _pass_entry(document, parts, key, value)
        if not parts:
            return
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"--set {key}: {part} is a value, it has no keys", "see the recipe with `mambacompress inspect`")
    target[parts[-1]] = value


def _pass_entry(document: dict[str, Any], parts: list[str], key: str, value: Any) -> tuple[dict[str, Any], list[str]]:
    """The step's one-key mapping and the key path below it; an empty path where the override was of the whole pass."""
    name = parts[1]
    steps = document.get("passes") or []
    steps = [step if isinstance(step, dict) else {step: {}} for step in steps] if isinstance(steps, list) else []
    document["passes"] = steps
    if name.isdigit():
        if int(name) >= len(steps):
            raise UserError(f"--set {key}: the recipe has {len(steps)} passes, counted from 0", "name the pass instead")
        return steps[int(name)], [next(iter(steps[int(name)])), *parts[2:]]
    if name not in PASS_NAMES:
        raise UserError(f"--set {key}: there is no pass {name!r}{did_you_mean(name, PASS_NAMES)}",
                        f"passes: {', '.join(PASS_NAMES)}")
    found = [step for step in steps if name in step]
    if len(parts) == 2 and value is None:
        document["passes"] = [step for step in steps if name not in step]
        return {}, []
    if not found and len(parts) == 2:
        place = sum(PASS_NAMES.index(other) < PASS_NAMES.index(name) for step in steps for other in step if other in PASS_NAMES)
        steps.insert(place, {name: value})
        return {}, []
    if not found:
        raise UserError(f"--set {key}: the recipe has no pass {name!r}", f"add it first with --set 'passes.{name}={{}}'")
    if len(found) > 1:
        places = " or ".join(f"passes.{steps.index(step)}" for step in found)
        raise UserError(f"--set {key}: the recipe has {len(found)} {name} passes", f"say which: {places}")
    return found[0], parts[1:]


def _friendly(error: ValidationError, origin: str) -> UserError:
    """The first problem of ``error`` in one sentence."""
    problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a typo explains what else is missing
    where, model = _locate(problem["loc"])
    kind, place = problem["type"], f"recipe {origin}: "
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        what = "pass" if model is Step else "key"
        known = list(model.model_fields)
        return UserError(f"{place}unknown {what} {where!r}{did_you_mean(key, known)}",
                         f"known there: {', '.join(known) or 'nothing'}")
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        value = problem["input"]
        return UserError(f"{place}{where} cannot be {value!r}{did_you_mean(str(value), options)}",
                         f"write one of {', '.join(options)}")
    if kind == "missing" or (where == "passes" and kind == "too_short"):
        return UserError(f"{place}{where} is missing or empty", "add at least one pass" if where == "passes" else f"add {where}")
    message = str(problem["ctx"]["error"]) if kind == "value_error" else (
        f"{where} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return UserError(f"{place}{message}", f"correct {where}" if where else "correct the recipe")


def _locate(location: Sequence[int | str]) -> tuple[str, type[BaseModel]]:
    """The dotted path of a problem as --set writes it, and the model whose keys stand there."""
    model: type[BaseModel] = Recipe
    parts: list[str] = []
    owner: Any = model
    for step in location:
        if isinstance(step, int):
            if parts != ["passes"]:
                parts.append(str(step))
            continue
        if owner is None and step in ("str", "int", "float") or step == "[key]" or step.startswith(("list[", "function-")):
            continue
        parts.append(step)
        if owner is not None and step in owner.model_fields:
            inner = _inner_model(owner.model_fields[step].annotation)
            owner, model = inner, inner or model
        elif owner is None and model is not Recipe and step in TENSORS:
            owner = model
    return ".".join(parts), model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside Model, Model | None, tuple[Model, ...] or dict[str, Model]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found: Iterable[Any] = (_inner_model(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)
