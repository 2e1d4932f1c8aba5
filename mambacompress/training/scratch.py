"""From a recipe and a text to a model directory: tokenizer, fresh model, training, saving.

Under a launcher of several processes (torchrun, ``accelerate launch``) every one of them runs this; the first writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mambacompress.data import encode, load_tokenizer, stdlib_texts
from mambacompress.errors import UserError
from mambacompress.models.families import adopt, restore
from mambacompress.storage import make_directory
from mambacompress.training.lm import refuse_existing, settled, train
from mambacompress.training.processes import processes
from mambacompress.training.recipes import TrainingRecipe

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Text:
    """What a model was trained on. sha256: of its documents in UTF-8, a zero byte after each."""

    documents: int
    characters: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Run:
    """A finished run. directory: the model's. recipe: with the precision it came to. first: whether this process is
    the one that wrote it. device: where it was trained.
    """

    directory: Path
    recipe: TrainingRecipe
    text: Text
    parameters: int
    vocabulary: int
    first: bool
    device: str


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of ``vocabulary`` entries, as a transformers fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                                   unk_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def build_model(recipe: TrainingRecipe, tokenizer: Any) -> Any:
    """A freshly initialised, adopted model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(recipe.kind, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end,
                                  pad_token_id=end, **recipe.config)
    torch.manual_seed(recipe.train.seed)
    model = AutoModelForCausalLM.from_config(config)
    adopt(model)
    return model


def run(recipe: TrainingRecipe, out: Path, *, texts: list[str] | None = None, tokenizer: Any = None,
        resume: bool = False, report: Callable[[dict[str, Any]], None] | None = None,
        dtype: torch.dtype = torch.float16) -> Run:
    """Train ``recipe``'s model; writes an ordinary model directory to ``out / "model"``.

    texts, tokenizer: where the recipe brings none of its own they must be given. report: called in the first process
    with every row of ``lm.train``. dtype: of the saved weights. Raises UserError where something is missing, and for
    what ``lm.train`` refuses.
    """
    if texts is None and recipe.vocabulary is None:
        raise UserError(f"{recipe.name} brings no text of its own", "name text files with --text")
    if tokenizer is None and recipe.vocabulary is None:
        raise UserError(f"{recipe.name} brings no tokenizer of its own", "name a model directory with --tokenizer")
    if not resume:
        refuse_existing(out)
    process = processes()
    recipe = replace(recipe, train=settled(recipe.train, process.device))
    texts = stdlib_texts("train") if texts is None else texts
    with process.main_process_first():
        reuse = resume or not process.is_main_process
        tokenizer = _tokenizer(recipe, texts, tokenizer, out / "tokenizer", reuse)
    model = build_model(recipe, tokenizer)
    tokens = encode(tokenizer, texts)
    with closing(train(model, tokens, recipe.train, out, resume=resume)) as rows:  # its checkpoint before our exit
        for row in rows:
            if report is not None and process.is_main_process:
                report(row)
    directory = out / "model"
    if process.is_main_process:
        restore(model.eval()).to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    process.wait_for_everyone()
    return Run(directory, recipe, Text(len(texts), sum(map(len, texts)), len(tokens), _sha256(texts)),
               sum(parameter.numel() for parameter in model.parameters()), len(tokenizer), process.is_main_process,
               str(process.device))


def _tokenizer(recipe: TrainingRecipe, texts: list[str], given: Any, saved: Path, reuse: bool) -> Any:
    """The tokenizer given, the one ``saved`` by this run before, or one trained now and saved."""
    if given is not None:
        return given
    if reuse and (saved / "tokenizer.json").is_file():
        return load_tokenizer(saved)
    tokenizer = train_tokenizer(texts, recipe.vocabulary or 0)
    make_directory(saved)
    tokenizer.save_pretrained(saved)
    return load_tokenizer(saved)


def _sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
