"""Recipes: what is done to a model, in which order, and what the result must pass.

A recipe is YAML: a name, the calibration text, an ordered list of passes and the checks (``schema`` declares every
key). A typo is an error that names the nearest key, never an empty recipe. ``load_recipe`` takes a packaged name, a
file, a mapping or a ``Recipe``, with overrides in dotted form (``passes.quantize.group_size=32``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mambacompress.errors import UserError, did_you_mean
from mambacompress.schema import (
    LINEARS,
    PASS_NAMES,
    TENSORS,
    CalibrationConfig,
    ChecksConfig,
    FuseNormsConfig,
    GptqConfig,
    MapFormat,
    MapOverride,
    QuantizeConfig,
    Recipe,
    RotateConfig,
    SmoothConfig,
    Step,
)

FOLDER = Path(__file__).parent / "recipes"

__all__ = [
    "LINEARS",
    "PASS_NAMES",
    "TENSORS",
    "CalibrationConfig",
    "ChecksConfig",
    "FuseNormsConfig",
    "GptqConfig",
    "MapFormat",
    "MapOverride",
    "QuantizeConfig",
    "Recipe",
    "RotateConfig",
    "SmoothConfig",
    "load_recipe",
    "recipe_names",
]


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """A recipe by packaged name, from a YAML file, from plain data, or as it is.

    overrides: ``["a.b=c", ...]`` (c is YAML) or {"a.b": c}. Below ``passes`` the pass is addressed by name; the value
    null takes a pass out, a mapping for a pass that is not there puts it at its place.

    Raises UserError for an unknown recipe, key or value (with the nearest known one), and for what cannot work
    together.
    """
    if isinstance(source, Recipe):
        document, origin = source.document(), source.name
    elif isinstance(source, Mapping):
        document, origin = json.loads(json.dumps(dict(source))), str(source.get("name", "custom"))
    else:
        path = _find(source)
        document, origin = _read_yaml(path), str(source)
        document.setdefault("name", path.stem)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(pair, overrides)
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
    raise UserError(
        f"there is no recipe {name!r}{did_you_mean(name, recipe_names())}",
        f"name one of {', '.join(recipe_names())}, or a .yaml file",
    )


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
        raise UserError(
            f"recipe {path} is not valid YAML: {' '.join(str(error).split())}", "repair that line"
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"recipe {path} is not a mapping", "start it with `name:` and `passes:`")
    return document


def pair(text: str) -> tuple[str, Any]:
    """The key and the value (YAML) of a ``--set`` argument; raises UserError where it is no such pair."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"--set {text!r} is not of the form key=value", "write for example --set calibration.sequences=64"
        )
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
            raise UserError(
                f"--set {key}: {part} is a value, it has no keys", "see the recipe with `mambacompress inspect`"
            )
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
        raise UserError(
            f"--set {key}: there is no pass {name!r}{did_you_mean(name, PASS_NAMES)}",
            f"passes: {', '.join(PASS_NAMES)}",
        )
    found = [step for step in steps if name in step]
    if len(parts) == 2 and value is None:
        document["passes"] = [step for step in steps if name not in step]
        return {}, []
    if not found and len(parts) == 2:
        place = sum(
            PASS_NAMES.index(other) < PASS_NAMES.index(name) for step in steps for other in step if other in PASS_NAMES
        )
        steps.insert(place, {name: value})
        return {}, []
    if not found:
        raise UserError(
            f"--set {key}: the recipe has no pass {name!r}", f"add it first with --set 'passes.{name}={{}}'"
        )
    if len(found) > 1:
        places = " or ".join(f"passes.{steps.index(step)}" for step in found)
        raise UserError(f"--set {key}: the recipe has {len(found)} {name} passes", f"say which: {places}")
    return found[0], parts[1:]


def _friendly(error: ValidationError, origin: str) -> UserError:
    """The first problem of ``error`` in one sentence."""
    problem = min(
        error.errors(), key=lambda each: each["type"] != "extra_forbidden"
    )  # a typo explains what else is missing
    where, model = _locate(problem["loc"])
    kind, place = problem["type"], f"recipe {origin}: "
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        what = "pass" if model is Step else "key"
        known = list(model.model_fields)
        return UserError(
            f"{place}unknown {what} {where!r}{did_you_mean(key, known)}",
            f"known there: {', '.join(known) or 'nothing'}",
        )
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        value = problem["input"]
        return UserError(
            f"{place}{where} cannot be {value!r}{did_you_mean(str(value), options)}",
            f"write one of {', '.join(options)}",
        )
    if kind == "missing" or (where == "passes" and kind == "too_short"):
        return UserError(
            f"{place}{where} is missing or empty", "add at least one pass" if where == "passes" else f"add {where}"
        )
    message = (
        str(problem["ctx"]["error"])
        if kind == "value_error"
        else (f"{where} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    )
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
        if (
            (owner is None and step in ("str", "int", "float"))
            or step == "[key]"
            or step.startswith(("list[", "function-"))
        ):
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
