"""The public functions, thin over the rooms: load, quantize (and every other recipe), inspect, verify, generate.

Kept apart from ``__init__`` so that importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacompress import artifact, data, pipeline, storage
from mambacompress.errors import UserError
from mambacompress.models.families import restore
from mambacompress.models.families.checkpoint import (
    Checkpoint,
    live_checkpoint,
    materialise,
    open_checkpoint,
)
from mambacompress.models.lm import generate as generate_ids
from mambacompress.models.lm import stream
from mambacompress.passes.base import Plan
from mambacompress.recipe import Recipe, load_recipe

Texts = str | Sequence[str] | Tensor


def demo_directory() -> Path:
    """The embedded demo model, an ordinary model directory."""
    return Path(__file__).parent / "demo"


def resolve(source: str | Path) -> str | Path:
    """``demo`` names the embedded model; everything else is a directory or a hub name."""
    return demo_directory() if str(source) == "demo" and not Path(source).is_dir() else source


def load(source: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a model on our mixers: a float model (directory, hub name or ``demo``) or an artifact.

    Returns a transformers model in eval mode: call it, ``generate`` with it, fine-tune it (float ones), or hand it to
    ``quantize``. dtype: of a float model's weights; an artifact keeps what it stores. Raises UserError for a source
    that cannot be read, is not a Mamba, or holds NaN or Inf.
    """
    source = resolve(source)
    if Path(source).is_dir() and artifact.is_artifact(Path(source)):
        host = artifact.load(source, device)
    else:
        checkpoint = open_checkpoint(source)
        model_map = checkpoint.host()
        host = model_map.host
        materialise(host, "", model_map, checkpoint, dtype)
        host.tie_weights()
        host.requires_grad_(True)
        host = host.to(device)
        source = checkpoint.directory or source
    host.config._name_or_path = host.name_or_path = str(source)
    return host


def load_tokenizer(source: str | Path | Any) -> Any:
    """The tokenizer of a model directory, of ``demo``, or of a loaded model."""
    name = getattr(source, "name_or_path", source)
    if not name:
        raise UserError("this model was not loaded from a directory, so its tokenizer is not known", "pass tokenizer=")
    name = resolve(name)
    directory = Path(name) if Path(name).is_dir() else open_checkpoint(name).directory
    return data.load_tokenizer(directory or Path(name))


@dataclass
class Compressed:
    """A compressed model on disk. ``directory`` is the artifact (a temporary one where no ``out`` was given)."""

    directory: Path
    manifest: dict[str, Any]
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @cached_property
    def model(self) -> Any:
        """The compressed model, loaded from the artifact: what runs is what was saved."""
        return load(self.directory)

    def save(self, directory: str | Path) -> Path:
        """Copy the artifact to ``directory``, which must not exist or be empty; returns it."""
        target = Path(directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} already exists", "choose another directory or remove it")
        storage.make_directory(target.parent)
        staged = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            shutil.copytree(self.directory, staged)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise storage.explain(error, target) from error
        if target.exists():
            target.rmdir()
        staged.rename(target)
        return target


def quantize(
    model: Any,
    recipe: str | Path | Recipe | Mapping[str, Any] = "w8a8",
    *,
    calibration: Texts | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    device: str = "cpu",
    progress: pipeline.Progress | None = None,
) -> Compressed:
    """Compress ``model`` by ``recipe``: rotations, smoothing, GPTQ, int8 and int4, whatever the recipe names.

    model: a directory, hub name, ``demo``, or a model in memory (read, never changed; adopted or not). recipe: a name,
    a YAML file, a mapping or a Recipe. calibration: texts, or token ids [S, L]; the recipe's own text where None. out:
    the artifact directory; a temporary one where None (``.save`` copies it). overrides: ``key.sub=value`` strings.

    Raises UserError for bad input, CheckFailed where the result does not pass the recipe's checks.
    """
    chosen = load_recipe(recipe, overrides)
    if chosen.training is not None:
        raise UserError(f"recipe {chosen.name!r} trains the model first", "use sparsify")
    return apply_recipe(model, chosen, calibration=calibration, out=out, tokenizer=tokenizer, resume=resume,
                        device=device, progress=progress)


def apply_recipe(
    model: Any,
    chosen: Recipe,
    *,
    calibration: Texts | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    device: str = "cpu",
    progress: pipeline.Progress | None = None,
) -> Compressed:
    """The recipe's passes over ``model`` as it is, whatever has trained it before; see ``quantize``."""
    checkpoint, name = _source(model)
    planned_tokens = _tokens(chosen, checkpoint, calibration, tokenizer)
    temporary = None
    if out is None:
        temporary = tempfile.TemporaryDirectory(prefix="mambacompress-")
        out = Path(temporary.name) / f"{Path(name).name}-{chosen.name}"
    directory = Path(out)
    extra = _tokenizer_files(tokenizer, temporary) if tokenizer is not None and checkpoint.directory is None else ()
    manifest = pipeline.run(
        checkpoint,
        chosen,
        planned_tokens,
        directory,
        resume=resume,
        progress=progress,
        extra_files=extra,
        source_name=Path(name).name,
        device=device,
    )
    return Compressed(directory, manifest, temporary)


compress = quantize


def inspect(model: Any, recipe: str | Path | Recipe | Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """The dry run: what ``quantize`` would do, what it refuses and why. Reads shapes, no weights."""
    checkpoint, _ = _source(model)
    return pipeline.plan(checkpoint, load_recipe(recipe, overrides)).plan


def save(model: Any, directory: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a float model that ``load`` gave (trained since, or not) as an ordinary transformers directory; returns it.

    Weights that are sparse stay so, and the configuration says it; ``sparsify`` and ``quantize`` pack them. tokenizer:
    the one of the directory the model was loaded from, where None. Raises UserError for a compressed model, and where
    ``directory`` is not empty.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists", "choose another directory or remove it")
    storage.make_directory(target)
    restore(copy.deepcopy(model)).save_pretrained(target)
    (load_tokenizer(model) if tokenizer is None else tokenizer).save_pretrained(target)
    return target


def verify(directory: str | Path) -> dict[str, Any]:
    """Recompute an artifact's hashes and coverage from its files; raises CheckFailed naming what is wrong."""
    return artifact.verify(directory)


def generate(
    model: Any,
    prompt: str | Tensor,
    max_new_tokens: int = 64,
    *,
    tokenizer: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    state: str = "fp32",
) -> Iterator[str] | Tensor:
    """Continue ``prompt``: a string yields pieces of text as they are made, token ids [B, L] give ids [B, L + new].

    temperature 0 is greedy. state: ``int8`` rounds the recurrent states at every step and holds them in a quarter to a
    third of the memory. Runs our own loop, without transformers' overhead.
    """
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
                               "state": state}
    if isinstance(prompt, Tensor):
        return generate_ids(model, prompt, max_new_tokens, **options)
    return _stream(model, prompt, max_new_tokens, tokenizer or load_tokenizer(model), options)


def _stream(model: Any, prompt: str, max_new_tokens: int, tokenizer: Any, options: dict[str, Any]) -> Iterator[str]:
    """Pieces of text; a piece is held back while its bytes are not yet whole characters."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.numel() == 0:
        raise UserError("the prompt is empty", "give at least one character")
    made: list[int] = []
    shown = 0
    for ids_B in stream(model, ids, max_new_tokens, **options):
        made.append(int(ids_B[0]))
        text = tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > shown:
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(made, skip_special_tokens=True)[shown:]


def _source(model: Any) -> tuple[Checkpoint, str]:
    if isinstance(model, str | Path):
        source = resolve(model)
        if Path(source).is_dir() and artifact.is_artifact(Path(source)):
            raise UserError(f"{source} is compressed already", "name the original model")
        return open_checkpoint(source), str(model)
    return live_checkpoint(model), getattr(model, "name_or_path", "") or "model"


def _tokens(recipe: Recipe, checkpoint: Checkpoint, calibration: Texts | None, tokenizer: Any) -> Tensor:
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype != torch.int64 or calibration.shape[1] < 2:
            raise UserError(
                f"calibration ids are {calibration.dtype} of shape {list(calibration.shape)}",
                "give int64 token ids of shape [sequences, length], length at least 2",
            )
        return calibration
    if tokenizer is None:
        name: Any = checkpoint.directory or getattr(checkpoint.config, "_name_or_path", "")
        tokenizer = load_tokenizer(name)
    asked = recipe.calibration
    texts = (
        data.calibration_texts(asked.text)
        if calibration is None
        else ([calibration] if isinstance(calibration, str) else list(calibration))
    )
    return data.token_windows(tokenizer, texts, asked.sequences, asked.length, asked.seed)


def _tokenizer_files(tokenizer: Any, temporary: tempfile.TemporaryDirectory[str] | None) -> tuple[Path, ...]:
    folder = Path(tempfile.mkdtemp(prefix="mambacompress-tokenizer-", dir=temporary.name if temporary else None))
    tokenizer.save_pretrained(folder)
    return tuple(sorted(folder.iterdir()))
