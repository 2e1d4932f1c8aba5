"""A progressive recipe from data to report: teacher, chain, single student, one after the other.

``run_progressive`` trains the teacher of a progressive recipe and its chain, one model after the other. In ``out``: a
folder a model with its checkpoint and log, ``models/`` (weights and shapes), ``progressive.json``, ``.md``, ``.html``.
A run that was stopped goes on at the step it had reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mambacompress import storage
from mambacompress.distill_recipe import ProgressiveRecipe, Shape, train_config
from mambacompress.errors import UserError
from mambacompress.eval import environment
from mambacompress.eval.progressive import ProgressiveReport, rows_of
from mambacompress.images import ImageData
from mambacompress.models.flops import vision_flops
from mambacompress.models.vision import VisionMamba, VisionShape
from mambacompress.training.config import TrainConfig
from mambacompress.training.lm import Source, fit, refuse_existing, settled
from mambacompress.training.processes import processes
from mambacompress.training.progressive import Chain, Mixture, Remembered, Residual
from mambacompress.training.vision import Labels, logits_of

RUN = "run.json"
MODELS = "models"
PACKAGES = ("mambacompress", "torch", "accelerate")
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # stage, done, total, figures


def vision_shape(recipe: ProgressiveRecipe, own: Shape, data: ImageData) -> VisionShape:
    """A model's shape: what it says itself, else what the recipe says for all, else the default."""
    _, channels, side, _ = data.train.pixels.shape
    known: dict[str, Any] = {"image": side, "channels": channels, "classes": data.classes}
    merged = recipe.shape.model_dump(exclude_none=True) | own.model_dump(exclude_none=True)
    missing = [name for name in ("width", "depth") if name not in merged]
    if missing:
        raise UserError(f"a model of {recipe.name} has no {missing[0]}", f"add {missing[0]} to it, or to `shape`")
    return VisionShape(**known, **merged)


def run_progressive(recipe: ProgressiveRecipe, data: ImageData, out: Path, *, resume: bool = False,
                    progress: Progress | None = None) -> ProgressiveReport:
    """Train the teacher, the chain and the single student of ``recipe`` and measure them on the test images.

    Raises UserError where ``out`` holds another run, or one that is not resumed, and for what the trainer refuses.
    """
    process = processes()
    told = progress or (lambda stage, done, total, figures: None)
    shapes = {"teacher": vision_shape(recipe, recipe.teacher.shape, data)}
    students = sorted((vision_shape(recipe, own, data) for own in recipe.students), key=_flops,
                      reverse=recipe.chain == "shrinking")
    shapes |= {f"student-{i}": shape for i, shape in enumerate(students, 1)}
    if recipe.single is not None:
        shapes["single"] = vision_shape(recipe, recipe.single, data)
    if process.is_main_process:
        _claim(out, recipe, data, resume)
    process.wait_for_everyone()
    models = {name: VisionMamba(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}

    def train(name: str, source: Source, config: TrainConfig) -> None:
        with closing(fit(models[name], source, config, out / name, resume=True)) as rows:
            for row in rows:
                if process.is_main_process:
                    told(name, int(row["step"]) + 1, config.steps, row)
        models[name].eval()

    teaching = _schedule(recipe.teacher.train, shapes["teacher"], process)
    train("teacher", Labels(data, teaching, recipe.augment), teaching)
    config = _schedule(recipe.train, shapes["teacher"], process)
    mixture = Mixture(**recipe.mixture.model_dump())

    def remember(name: str) -> Remembered:
        return Remembered(models[name].to(process.device), config.steps, config.batch, data.classes)

    teacher = remember("teacher")
    before: list[Remembered] = []
    chain = [name for name in shapes if name.startswith("student")]
    for name in chain:
        own = _schedule(recipe.train, shapes[name], process)
        train(name, Residual(data, own, recipe.augment, mixture, teacher, before), own)
        before.append(remember(name))
    if recipe.single is not None:
        own = _schedule(recipe.train, shapes["single"], process)
        train("single", Residual(data, own, recipe.augment, mixture, teacher), own)
    report = _measure(recipe, data, models, len(chain), config, str(process.device))
    if process.is_main_process:
        save_models(models, out / MODELS)
        report.save(out)
    process.wait_for_everyone()
    return report


def _flops(shape: VisionShape) -> int:
    return vision_flops(VisionMamba(shape)).total


def _schedule(section: Mapping[str, Any], shape: VisionShape, process: Any) -> TrainConfig:
    return settled(train_config(section, length=shape.tokens), process.device)


def _claim(out: Path, recipe: ProgressiveRecipe, data: ImageData, resume: bool) -> None:
    """``out`` is this run's, or becomes it."""
    wanted = {"recipe": recipe.model_dump(mode="json", exclude={"description"}), "images": data.train.sha256}
    if not resume:
        refuse_existing(out / "teacher")
    elif (out / RUN).is_file() and json.loads((out / RUN).read_text(encoding="utf-8")) != wanted:
        raise UserError(f"the run in {out} has another recipe or other images",
                        "repeat its options, or choose another --out")
    storage.make_directory(out)
    storage.write_json(out / RUN, wanted)


def _measure(recipe: ProgressiveRecipe, data: ImageData, models: Mapping[str, VisionMamba], chained: int,
             config: TrainConfig, device: str) -> ProgressiveReport:
    logits = [logits_of(model, data, data.test) for model in models.values()]
    rows = rows_of(list(models), [vision_flops(model).total for model in models.values()],
                   [sum(p.numel() for p in model.parameters()) for model in models.values()], logits,
                   data.test.labels, chained)
    facts = {
        "chain": f"{recipe.chain}; loss {recipe.mixture.alpha:g} hard + {1 - recipe.mixture.alpha:g} "
                 f"{recipe.mixture.soft} at temperature {recipe.mixture.temperature:g}, on the sum",
        "training images": f"{len(data.train):,}, augmented by {recipe.augment}",
        "steps a student": f"{config.steps:,} of {config.batch} images, "
                           f"{config.steps * config.batch / len(data.train):.1f} epochs",
        "precision": config.precision,
        "operations": "multiplications, additions, exponentials, sigmoids, softplus, divisions and roots, one each",
        "machine": environment.hardware(device),
        "versions": ", ".join(f"{name} {version}" for name, version in environment.versions(PACKAGES).items()),
    }
    return ProgressiveReport(recipe=recipe.model_dump(mode="json"), data=data.name, test_images=len(data.test),
                             rows=rows, facts=facts)


# -- models on disk ----------------------------------------------------------------------------------------------------


def save_models(models: Mapping[str, VisionMamba], folder: Path) -> None:
    """Weights of every model and the shapes of all."""
    storage.make_directory(folder)
    for name, model in models.items():
        storage.write_tensors(folder / f"{name}.safetensors", dict(model.state_dict()))
    storage.write_json(folder / "shapes.json", {name: asdict(model.shape) for name, model in models.items()})


def load_models(folder: str | Path) -> dict[str, VisionMamba]:
    """What ``save_models`` wrote, in eval mode; raises UserError where it did not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        shapes = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
        models = {name: VisionMamba(VisionShape(**shape)) for name, shape in shapes.items()}
        for name, model in models.items():
            model.load_state_dict(load_file(folder / f"{name}.safetensors"))
            model.eval()
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no models of a progressive distillation: {error}",
                        "name the `models` folder of one") from error
    order = ["teacher", *sorted((name for name in models if name.startswith("student")), key=_number), "single"]
    return {name: models[name] for name in order if name in models}


def load_chain(folder: str | Path) -> Chain:
    """The students of a run as one model: its answer is the sum, ``anytime`` gives the partial ones."""
    return Chain([model for name, model in load_models(folder).items() if name.startswith("student")])


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


