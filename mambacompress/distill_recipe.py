"""Distillation recipes: which student learns what from whom. YAML in ``recipes/distill``; every key is declared.

Two kinds. ``language``: a student made of a teacher's own layers learns on text. ``progressive``: a teacher for images
and a chain of students that add up (``training.progressive``). Schedules are those of ``training.config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from mambacompress.errors import UserError, did_you_mean
from mambacompress.schema import QuantizeConfig
from mambacompress.training.config import SETTINGS, TrainConfig

FOLDER = Path(__file__).parent / "recipes" / "distill"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(_Strict):
    """A vision Mamba, all that ``models.vision.VisionShape`` does not take from the data; None: the recipe's ``shape``,
    or the default there.
    """

    width: PositiveInt | None = None
    depth: PositiveInt | None = None
    patch: PositiveInt | None = None
    stem: str | None = None
    inner: PositiveInt | None = None
    states: PositiveInt | None = None
    rank: PositiveInt | None = None
    orders: tuple[tuple[str, ...], ...] | None = None
    window: PositiveInt | None = None
    conv: str | None = None
    conv_width: PositiveInt | None = None
    gate: bool | None = None


class LossWeights(_Strict):
    """What the loss is made of: a weight each (0: left out). temperature: of the logits' losses.

    ce: the data's labels. hard: the teacher's first choice. kl, reverse_kl, jsd: its distribution. layers: relative
    error of ``match`` (``mixer`` outputs or ``hidden`` states), on the teacher's own inputs where ``teacher_inputs``.
    """

    ce: float = Field(default=0.0, ge=0)
    hard: float = Field(default=0.0, ge=0)
    kl: float = Field(default=0.0, ge=0)
    reverse_kl: float = Field(default=0.0, ge=0)
    jsd: float = Field(default=0.0, ge=0)
    layers: float = Field(default=0.0, ge=0)
    temperature: PositiveFloat = 1.0
    match: Literal["mixer", "hidden"] = "hidden"
    teacher_inputs: bool = False


class MixtureConfig(_Strict):
    """alpha * hard + (1 - alpha) * soft, on the sum of the students."""

    alpha: float = Field(default=0.3, ge=0, le=1)
    temperature: PositiveFloat = 2.0
    soft: Literal["kl", "mse"] = "kl"


class TeacherConfig(_Strict):
    """The teacher of a chain and its own schedule."""

    shape: Shape
    train: dict[str, Any]


class ProgressiveRecipe(_Strict):
    """A teacher for images, its chain of students, and one student of their size (``single``) for comparison.

    students: from the largest to the smallest. chain: the order in which they add up: ``growing`` starts with the
    smallest, so that a sum cut short is already an answer; ``shrinking`` with the largest.
    """

    kind: Literal["progressive"]
    name: str
    description: str = ""
    data: Literal["mnist", "cifar10"]
    augment: Literal["none", "shift", "crop-flip"] = "none"
    shape: Shape = Shape()
    teacher: TeacherConfig
    students: tuple[Shape, ...] = Field(min_length=1)
    single: Shape | None = None
    chain: Literal["growing", "shrinking"] = "growing"
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    train: dict[str, Any]


class StudentConfig(_Strict):
    """depth: how many of the teacher's layers, or their share; they are taken evenly, first and last among them."""

    depth: PositiveInt | Annotated[float, Field(gt=0, le=1)] = 0.5


class LanguageRecipe(_Strict):
    """A student of the teacher's own layers, trained on text beside it. quantize: the format it is trained in and
    packed to, bit for bit; None: it stays float.
    """

    kind: Literal["language"]
    name: str
    description: str = ""
    student: StudentConfig = StudentConfig()
    loss: LossWeights
    quantize: QuantizeConfig | None = None
    train: dict[str, Any]


DistillRecipe = ProgressiveRecipe | LanguageRecipe
_ADAPTER: TypeAdapter[DistillRecipe] = TypeAdapter(Annotated[DistillRecipe, Field(discriminator="kind")])


def distill_recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_distill_recipe(source: str | Path | Mapping[str, Any] | DistillRecipe, overrides: Iterable[str] = ()
                        ) -> DistillRecipe:
    """A recipe by packaged name, from a YAML file, from plain data, or as it is; overrides: ``["train.steps=500"]``.

    Raises UserError for an unknown recipe, key or value, with the nearest known one.
    """
    if isinstance(source, ProgressiveRecipe | LanguageRecipe):
        document, origin = source.model_dump(mode="json", exclude_none=True), source.name
    elif isinstance(source, Mapping):
        document, origin = dict(source), str(source.get("name", "custom"))
    else:
        document, origin = _read(source), str(source)
    for text in overrides:
        _override(document, text)
    try:
        recipe = _ADAPTER.validate_python(document)
    except ValidationError as error:
        raise _friendly(error, origin) from error
    for name, section in (("train", recipe.train), *((("teacher.train", recipe.teacher.train),)
                                                      if isinstance(recipe, ProgressiveRecipe) else ())):
        train_config(section, origin=f"{origin}: {name}")
    return recipe


def train_config(section: Mapping[str, Any], *, origin: str = "recipe", **more: Any) -> TrainConfig:
    """The schedule a recipe's section describes."""
    unknown = [key for key in section if key not in SETTINGS]
    if unknown:
        raise UserError(f"recipe {origin} has no setting {unknown[0]!r}{did_you_mean(str(unknown[0]), SETTINGS)}",
                        f"settings: {', '.join(SETTINGS)}")
    try:
        return TrainConfig(**({"steps": 1, "warmup": 0} | dict(section) | more))
    except TypeError as error:
        raise UserError(f"recipe {origin}: {error}", "write numbers and words as in the packaged recipes") from error


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if str(source) not in distill_recipe_names():
            raise UserError(f"there is no distillation recipe {str(source)!r}"
                            f"{did_you_mean(str(source), distill_recipe_names())}",
                            f"name one of {', '.join(distill_recipe_names())}, or a .yaml file")
        path = FOLDER / f"{source}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe file {path}", "check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}", "repair the file") from error
    if not isinstance(document, dict):
        raise UserError(f"recipe {path} is not a mapping", "start it with `kind:` and `name:`")
    return document


def _override(document: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r} is not of the form key=value", "write for example --set train.steps=500")
    target: Any = document
    *parents, last = key.strip().split(".")
    for part in parents:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {key}: {part} has no keys", "see the recipe file")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of --set {text!r} is not valid YAML", "quote it") from error


def _friendly(error: ValidationError, origin: str) -> UserError:
    problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"] if part not in ("progressive", "language")]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = sorted({name for model in (Shape, LossWeights, MixtureConfig, TeacherConfig, ProgressiveRecipe,
                                           StudentConfig, LanguageRecipe) for name in model.model_fields})
        return UserError(f"recipe {origin}: unknown key {where!r}{did_you_mean(path[-1], known)}", "correct the key")
    message = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    return UserError(f"recipe {origin}: {where or 'kind'}: {message}", f"correct {where or 'kind'}")
