"""Train a model from scratch by a recipe, measure it on text it has not seen, and write down how it went.

In ``out``: ``model/`` (an ordinary model directory with its card), ``training.html`` (the loss curve) and
``training.jsonl`` (every step), and what a resumed run needs: ``checkpoint.safetensors``, ``trainer.json`` and, where
one was trained, ``tokenizer/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mambacompress import api, storage
from mambacompress.card import trained_card
from mambacompress.errors import UserError
from mambacompress.eval import curve, environment, stats
from mambacompress.eval.figures import plus_minus, quantity
from mambacompress.eval.perplexity import window_losses
from mambacompress.eval.windows import Windows, make_windows, tokens_of
from mambacompress.training import scratch
from mambacompress.training.lm import BETAS
from mambacompress.training.log import read_log
from mambacompress.training.recipes import TrainingRecipe, load_training_recipe

CURVE = "training.html"
LAST = 100  # steps, at most, whose mean loss is the final one, and at most a tenth of the run: one batch says little
PACKAGES = ("mambacompress", "torch", "transformers", "tokenizers", "accelerate")
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # stage, done, total, figures


@dataclass(frozen=True)
class Trained:
    """A trained model. directory: where it is. loss: in nats a token, mean of the last steps. perplexity: on the
    held-out text, with its standard error; None where there was none. facts: what the card says.

    first: of several processes only the first one measures and writes; the others know the directory alone.
    """

    directory: Path
    first: bool = True
    loss: float | None = None
    perplexity: stats.Estimate | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        """The model, loaded from its directory: what runs is what was saved."""
        return api.load(self.directory)


def train(
    recipe: str | TrainingRecipe,
    out: str | Path,
    *,
    texts: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    eval_texts: str | Sequence[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train a language model from scratch into ``out / "model"``.

    recipe: ``demo``, ``english-mamba1``, ``english-mamba2``, or a TrainingRecipe. texts, tokenizer (a directory, a hub
    name or an object): required but for ``demo``, whose own are the standard library and a BPE trained on it.
    overrides: of the recipe's settings, ``["steps=500"]`` or ``{"steps": 500}``. eval_texts: held-out text whose
    perplexity is measured on the saved model. resume: go on where the run in ``out`` stopped, to the same losses.
    progress: told (stage, done, total, figures) after every step; figures of training are loss, rate, tokens and
    tokens_per_second.

    Under torchrun or ``accelerate launch`` all processes call this, and see the losses of one. Raises UserError for
    what is unknown, missing or cannot work, for an ``out`` that holds another run, and for a loss that is not finite.
    """
    chosen = load_training_recipe(recipe, overrides)
    held_out = None if eval_texts is None else _documents(eval_texts, "evaluation")
    target, told = Path(out), progress or (lambda stage, done, total, figures: None)
    begun = False

    def report(row: Mapping[str, float]) -> None:  # in the first process alone
        nonlocal begun
        begun = True
        told("training", int(row["step"]) + 1, chosen.train.steps, row)

    try:
        run = scratch.run(
            chosen,
            target,
            texts=None if texts is None else _documents(texts, "training"),
            tokenizer=api.load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer,
            resume=resume,
            report=report,
        )
    except KeyboardInterrupt:
        if begun:
            _draw(target, f"{chosen.name}, interrupted", {})
        raise
    if not run.first:
        return Trained(run.directory, first=False)
    windows, perplexity = None, None
    if held_out is not None:
        windows = make_windows(tokens_of(api.load_tokenizer(run.directory), held_out, "held out"))
        perplexity = _perplexity(run, windows, told)
    losses = [row["loss"] for row in read_log(target)]
    losses = losses[-max(1, min(LAST, len(losses) // 10)) :]
    loss = sum(losses) / len(losses) if losses else None
    facts = _facts(run, loss, len(losses), windows, perplexity)
    storage.write_text(run.directory / "README.md", trained_card(chosen.name, chosen.kind, facts))
    _draw(target, chosen.name, facts)
    return Trained(run.directory, True, loss, perplexity, facts)


def _documents(texts: str | Sequence[str], what: str) -> list[str]:
    documents = [text for text in ([texts] if isinstance(texts, str) else texts) if text.strip()]
    if not documents:
        raise UserError(f"the {what} text is empty", "give a text that is not")
    return documents


def _perplexity(run: scratch.Run, windows: Windows, told: Progress) -> stats.Estimate:
    """Of the saved model, which is not quite the one in memory: its weights were rounded."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        told("evaluating", done, len(windows.spans), {})

    model = api.load(run.directory, device=run.device)
    return stats.perplexity(window_losses(model, windows, advance=advance), windows.counts)


def _draw(out: Path, title: str, facts: Mapping[str, str]) -> None:
    rows = read_log(out)
    if rows:
        storage.write_text(out / CURVE, curve.page(title, rows, facts))


def _facts(
    run: scratch.Run, loss: float | None, steps: int, windows: Windows | None, perplexity: stats.Estimate | None
) -> dict[str, str]:
    """What was done and what came out, for people."""
    recipe, config, text = run.recipe, run.recipe.train, run.text
    seen = config.steps * config.tokens
    shape = ", ".join(f"{name} {value}" for name, value in recipe.config.items())
    parts = f" in {config.accumulate} accumulations" if config.accumulate > 1 else ""
    facts = {
        "training recipe": recipe.name,
        "architecture": f"{recipe.kind}, {run.parameters:,} parameters; {shape}",
        "vocabulary": f"{run.vocabulary:,}",
        "text": f"{text.documents:,} document{'s' if text.documents > 1 else ''}, {text.characters:,} characters, "
        f"{text.tokens:,} tokens",
        "text (SHA-256)": text.sha256,
        "steps": f"{config.steps:,} of {config.batch} x {config.length} tokens{parts}",
        "tokens seen": f"{seen:,} ({seen / text.tokens:.2f} epochs)",
        "schedule": f"{config.schedule}: {config.warmup:,} steps of warm-up to {config.learning_rate:g}, "
        f"at the end {config.final:g} of it",
        "optimizer": f"AdamW, betas {BETAS[0]:g} and {BETAS[1]:g}, weight decay {config.weight_decay:g} on matrices, "
        f"gradient norm clipped at {config.clip:g}",
        "precision": config.precision,
        "seed": str(config.seed),
    }
    if loss is not None:
        last = f"mean of the last {steps} steps" if steps > 1 else "the last step"
        facts["final training loss"] = f"{loss:.4f} nats a token, {last}"
    if windows is not None and perplexity is not None:
        facts["held-out perplexity"] = (
            f"{quantity(perplexity.value)} {plus_minus(perplexity.se)}".rstrip()
            + f" on {sum(windows.counts):,} tokens, in windows of {windows.context}"
        )
    versions = environment.versions(PACKAGES)
    return facts | {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}
