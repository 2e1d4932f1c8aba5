"""A language recipe from teacher to student: fewer of its layers, or its own quantized self, trained on text beside it.

In ``out``: ``model/`` (an ordinary model directory with its card, or a packed artifact where the recipe quantizes),
``training.html`` and ``training.jsonl``, and what a resumed run needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambacompress import api, storage
from mambacompress.card import trained_card
from mambacompress.data import encode
from mambacompress.distill_recipe import LanguageRecipe, train_config
from mambacompress.errors import UserError
from mambacompress.eval import curve, environment, stats
from mambacompress.eval.figures import plus_minus, quantity
from mambacompress.eval.perplexity import window_losses
from mambacompress.eval.windows import make_windows, tokens_of
from mambacompress.models.families import restore
from mambacompress.training.config import TrainConfig
from mambacompress.training.distill import distill
from mambacompress.training.fakequant import aware, plain
from mambacompress.training.lm import fit, refuse_existing, settled
from mambacompress.training.log import read_log
from mambacompress.training.processes import processes
from mambacompress.training.student import Beside, kept_layers, shortened

CURVE = "training.html"
PACKAGES = ("mambacompress", "torch", "transformers", "accelerate")
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # stage, done, total, figures


@dataclass(frozen=True)
class Distilled:
    """A trained student. directory: where it is. perplexities: of ``teacher``, ``start`` (the student before training)
    and ``student`` on the held-out text; empty where there was none. change: the student against its teacher.
    """

    directory: Path
    first: bool = True
    perplexities: Mapping[str, stats.Estimate] = field(default_factory=dict)
    change: stats.PerplexityChange | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def run_language(recipe: LanguageRecipe, model: Any, out: Path, *, texts: Sequence[str], tokenizer: Any = None,
                 eval_texts: Sequence[str] | None = None, resume: bool = False, dtype: torch.dtype = torch.float32,
                 progress: Progress | None = None) -> Distilled:
    """Train ``recipe``'s student of ``model`` (a directory, ``demo``, or a loaded model) on ``texts``.

    tokenizer: the model's own where None. eval_texts: held-out text. dtype: of saved weights that stay
    float.
    Raises UserError where ``out`` holds another run, or one that is not resumed.
    """
    process = processes()
    told = progress or (lambda stage, done, total, figures: None)
    if not resume:
        refuse_existing(out)
    teacher = (api.load(model) if isinstance(model, str | Path) else model).eval().requires_grad_(False)
    tokenizer = tokenizer or api.load_tokenizer(teacher)
    config = settled(train_config(recipe.train), process.device)
    student = shortened(teacher, recipe.student.depth).requires_grad_(True)
    if recipe.quantize is not None:
        aware(student, recipe.quantize)
    losses = recipe.loss.model_dump()
    settings = {name: losses.pop(name) for name in ("temperature", "match", "teacher_inputs")}
    loss = distill(student, teacher.to(process.device), {name.replace("_", "-"): weight for name, weight in
                                                         losses.items()}, **settings)
    tokens = encode(tokenizer, texts)
    kept = kept_layers(recipe.student.depth, len(teacher.backbone.layers))
    measure = _Measure(tokenizer, eval_texts, str(process.device)) if eval_texts and process.is_main_process else None
    start = copy.deepcopy(student).eval() if measure else None
    source = Beside(tokens, config, teacher, {"loss": recipe.loss.model_dump(), "kept": kept, "quantize":
                                              recipe.quantize and recipe.quantize.model_dump(mode="json")})
    with closing(fit(loss, source, config, out, resume=resume)) as rows:
        for row in rows:
            if process.is_main_process:
                told("training", int(row["step"]) + 1, config.steps, row)
    directory = out / "model"
    if not process.is_main_process:
        process.wait_for_everyone()
        return Distilled(directory, first=False)
    student.eval()
    plain(student)
    _save(recipe, student, tokenizer, tokens, config, directory, dtype)
    perplexities: dict[str, stats.Estimate] = {}
    change = None
    if measure and start is not None:
        found = {"teacher": measure(teacher), "start": measure(start), "student": measure(api.load(directory))}
        counts = measure.windows.counts
        perplexities = {name: stats.perplexity(nll, counts) for name, nll in found.items()}
        change = stats.perplexity_change(found["student"], found["teacher"], counts)
    facts = _facts(recipe, config, teacher, student, kept, len(tokens), perplexities, change)
    if recipe.quantize is None:
        storage.write_text(directory / "README.md", trained_card(recipe.name, student.config.model_type, facts))
    drawn = read_log(out)
    if drawn:
        storage.write_text(out / CURVE, curve.page(recipe.name, drawn, facts))
    process.wait_for_everyone()
    return Distilled(directory, True, perplexities, change, facts)


class _Measure:
    """Losses of the held-out text's windows."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], device: str) -> None:
        documents = [text for text in texts if text.strip()]
        if not documents:
            raise UserError("the evaluation text is empty", "give a text that is not")
        self.windows, self.device = make_windows(tokens_of(tokenizer, documents, "held out")), device

    def __call__(self, model: Any) -> list[float]:
        return window_losses(model.to(self.device), self.windows)


def _save(recipe: LanguageRecipe, student: Any, tokenizer: Any, tokens: torch.Tensor, config: TrainConfig,
          directory: Path, dtype: torch.dtype) -> None:
    """An ordinary directory, or the artifact that computes what was trained."""
    if recipe.quantize is None:
        saved = restore(copy.deepcopy(student).cpu()).to(dtype)
        saved.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return
    step = {"quantize": recipe.quantize.model_dump(mode="json", exclude_defaults=True)}
    length = min(config.length, len(tokens) // 4)
    windows_NL = tokens[: 4 * length].reshape(4, length)
    made = api.quantize(student, {"name": recipe.name, "passes": [step]}, calibration=windows_NL, tokenizer=tokenizer)
    if not directory.exists():
        made.save(directory)


def _facts(recipe: LanguageRecipe, config: TrainConfig, teacher: Any, student: Any, kept: Sequence[int], tokens: int,
           perplexities: Mapping[str, stats.Estimate], change: stats.PerplexityChange | None) -> dict[str, str]:
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    weights = ", ".join(f"{name} {value:g}" for name, value in recipe.loss.model_dump().items()
                        if isinstance(value, float) and value and name != "temperature")
    facts = {
        "distillation recipe": recipe.name,
        "teacher": f"{getattr(teacher, 'name_or_path', '') or 'a model'}, {sizes[0]:,} parameters",
        "student": f"{sizes[1]:,} parameters; the teacher's layers {', '.join(map(str, kept))}",
        "loss": f"{weights}; temperature {recipe.loss.temperature:g}",
        "steps": f"{config.steps:,} of {config.batch} x {config.length} tokens",
        "tokens seen": f"{config.steps * config.tokens:,} of {tokens:,} ({config.steps * config.tokens / tokens:.2f} "
                       "epochs)",
        "schedule": f"{config.schedule}, {config.warmup:,} steps of warm-up to {config.learning_rate:g}",
        "precision": config.precision,
    }
    for name, estimate in perplexities.items():
        what = {"start": "the student before training"}.get(name, f"the {name}")
        facts[f"held-out perplexity of {what}"] = f"{quantity(estimate.value)} {plus_minus(estimate.se)}".rstrip()
    if change is not None:
        facts["student / teacher, paired"] = f"{change.ratio.value:.4f} {plus_minus(change.ratio.se)}".rstrip()
    versions = environment.versions(PACKAGES)
    return facts | {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}
