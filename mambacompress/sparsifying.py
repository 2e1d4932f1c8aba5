"""Make a model N:M sparse by a recipe: in one shot, or by training first.

A recipe without a ``training`` section goes through the pipeline as any other. With one, the model is trained by
``training.lm`` in a session (``training.session``), and what comes out goes through the same pipeline, whose ``prune``
step then only checks and packs the zeros that are there: whatever else the recipe names (int8, smoothing) follows.

Beside ``out`` lies ``out.training`` while training goes on and after: the checkpoint, ``training.jsonl``, and
``model/``, the sparse model in float, for another recipe.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from mambacompress import api, data
from mambacompress.api import Compressed, Texts
from mambacompress.artifact import read_manifest
from mambacompress.errors import UserError
from mambacompress.models.families import restore
from mambacompress.recipe import Recipe, load_recipe
from mambacompress.schema import Step
from mambacompress.training import lm
from mambacompress.training.processes import processes
from mambacompress.training.session import attach

Progress = Callable[[str, int, int, Mapping[str, float]], None]


def sparsify(
    model: Any,
    recipe: str | Path | Recipe | Mapping[str, Any] = "nm-2of4",
    *,
    texts: Texts | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Compressed:
    """Compress ``model`` by a recipe with a ``prune`` step.

    model: a directory, hub name, ``demo``, or a model in memory (read, never changed). texts: calibration text, or
    token ids [S, L]; of a recipe that trains, its training text, or one row of token ids [n], which must be given. out:
    the artifact directory; a temporary one where None. resume: go on where the run into ``out`` stopped. progress: told
    (stage, done, total, figures), stages being training, sweep and blocks; figures of training are loss,
    sparsity and tokens_per_second.

    Under torchrun or ``accelerate launch`` all processes call this; the first one writes. Raises UserError for bad
    input, CheckFailed where the result does not pass the recipe's checks.
    """
    chosen = load_recipe(recipe, overrides)
    if not any(step.prune for step in chosen.passes):
        raise UserError(f"recipe {chosen.name!r} has no prune step: it leaves the model dense",
                        "name one that has, as nm-2of4, or use quantize")
    if chosen.soup is not None:
        raise UserError(f"recipe {chosen.name!r} averages replicas", "use soup")
    told = progress or (lambda stage, done, total, figures: None)

    def stages(stage: str, done: int, total: int) -> None:
        told("sweep" if stage == "sweep" else "blocks", done, total, {})

    if chosen.training is None:
        return api.quantize(model, chosen, calibration=texts, out=out, tokenizer=tokenizer, resume=resume,
                            device=device, progress=stages)
    temporary = None
    if out is None:
        temporary = tempfile.TemporaryDirectory(prefix="mambacompress-")
        out = Path(temporary.name) / f"model-{chosen.name}"
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists", "choose another --out or remove it")
    work = target.with_name(target.name + ".training")
    if not resume:
        lm.refuse_existing(work)
    process = processes()
    tokenizer = tokenizer_of(model, tokenizer)
    host = api.load(model) if isinstance(model, str | Path) else copy.deepcopy(model)
    _train(host, _row(texts, tokenizer), chosen, work, resume, told)
    if process.is_main_process:
        api.apply_recipe(host, packing(chosen), tokenizer=tokenizer, out=target, device=device, progress=stages,
                         resume=resume)
        restore(copy.deepcopy(host)).save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
    process.wait_for_everyone()
    return Compressed(target, read_manifest(target), temporary)


def _train(host: Any, tokens: Tensor, recipe: Recipe, work: Path, resume: bool, told: Progress) -> None:
    """Train ``host`` in place to the recipe's pattern; a Ctrl-C leaves a checkpoint."""
    if recipe.training is None:
        raise ValueError("this recipe trains nothing")
    config = recipe.training.run()
    with attach(host, recipe) as session, closing(
            lm.train(host, tokens, config, work, resume=resume, method=session)) as rows:
        for row in rows:
            told("training", int(row["step"]) + 1, config.steps, row | {"sparsity": session.sparsity()})
    host.eval()


def packing(recipe: Recipe) -> Recipe:
    """The recipe as the pipeline takes it: the masks are where the weights are zero."""
    steps = [step if step.prune is None else
             Step.model_validate({"prune": step.prune.model_dump() | {"method": "zeros", "round": "none"}})
             for step in recipe.passes]
    return recipe.model_copy(update={"passes": tuple(steps)})


def _row(texts: Texts | None, tokenizer: Any) -> Tensor:
    if texts is None:
        raise UserError("this recipe trains, and brings no text of its own", "name text files with --text")
    return texts.reshape(-1) if isinstance(texts, Tensor) else data.encode(
        tokenizer, [texts] if isinstance(texts, str) else texts)


def tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """The tokenizer that was given, of the directory that was, or of the model."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return api.load_tokenizer(model if tokenizer is None else tokenizer)
    return tokenizer


__all__ = ["packing", "sparsify", "tokenizer_of"]
