"""The models this package trains from scratch: data, tokenizer, shape and schedule of each, as one command.

    python -m mambacompress.training.recipes demo --out runs/demo
    python -m mambacompress.training.recipes english-mamba2 --text train.jsonl.xz --tokenizer DIR --out runs/mamba2

``demo`` is the embedded model: a small Mamba-1 on the source of Python's standard library, with a byte-level BPE of its
own. The English recipes take their text and tokenizer from the command line. ``--resume`` goes on after a Ctrl-C or a
kill; ``accelerate launch -m`` in place of ``python -m`` trains over several processes, with the same losses.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mambacompress.data import encode, load_tokenizer, read_texts, stdlib_texts
from mambacompress.errors import UserError, did_you_mean
from mambacompress.models.families import adopt, restore
from mambacompress.storage import make_directory
from mambacompress.training.lm import TrainConfig, refuse_existing, train

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TrainingRecipe:
    """kind: transformers model type. config: its shape. train: its schedule.

    vocabulary: of the tokenizer trained here on the standard library, or None: text and tokenizer are the user's.
    """

    kind: str
    config: dict[str, Any]
    train: TrainConfig
    vocabulary: int | None = None


_S6 = {"state_size": 16, "expand": 2, "conv_kernel": 4, "tie_word_embeddings": True}

RECIPES = {
    "demo": TrainingRecipe(
        "mamba", _S6 | {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6, "time_step_rank": 12},
        TrainConfig(steps=3000, precision="bf16"), vocabulary=4096),
    "english-mamba1": TrainingRecipe(
        "mamba", _S6 | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "time_step_rank": 16},
        TrainConfig(steps=5000)),
    "english-mamba2": TrainingRecipe(
        "mamba2", {"hidden_size": 256, "expand": 2, "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1,
                   "num_hidden_layers": 8, "conv_kernel": 4, "chunk_size": 64, "tie_word_embeddings": True},
        TrainConfig(steps=5000)),
}


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


def run(name: str, out: Path, *, texts: list[str] | None = None, tokenizer: Any = None, steps: int | None = None,
        resume: bool = False, dtype: torch.dtype = torch.float16) -> Path:
    """Train the named model; writes an ordinary model directory to ``out / "model"`` and returns it.

    texts, tokenizer: where the recipe brings none of its own they must be given. Under a launcher of several processes
    (``accelerate launch``) the first one writes. Raises UserError for an unknown name and for what ``train`` refuses.
    """
    from accelerate import PartialState

    if name not in RECIPES:
        raise UserError(f"there is no training recipe {name!r}{did_you_mean(name, RECIPES)}",
                        f"name one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    config = recipe.train if steps is None else replace(recipe.train, steps=steps)
    if texts is None and recipe.vocabulary is None:
        raise UserError(f"{name} brings no text of its own", "name text files with --text")
    if tokenizer is None and recipe.vocabulary is None:
        raise UserError(f"{name} brings no tokenizer of its own", "name a model directory with --tokenizer")
    if not resume:
        refuse_existing(out)
    texts = stdlib_texts("train") if texts is None else texts
    process = PartialState()
    with process.main_process_first():
        reuse = resume or not process.is_main_process
        tokenizer = _tokenizer(recipe, texts, tokenizer, out / "tokenizer", reuse)
    model = build_model(recipe, tokenizer)
    _train(name, model, encode(tokenizer, texts), config, out, resume=resume, show=process.is_main_process)
    if process.is_main_process:
        restore(model.eval()).to(dtype).save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    process.wait_for_everyone()
    return out / "model"


def _tokenizer(recipe: TrainingRecipe, texts: list[str], given: Any, saved: Path, reuse: bool) -> Any:
    """The tokenizer given, the one ``saved`` by this run before, or one trained now and saved."""
    if given is not None:
        return given
    if reuse and saved.is_dir():
        return load_tokenizer(saved)
    tokenizer = train_tokenizer(texts, recipe.vocabulary or 0)
    make_directory(saved)
    tokenizer.save_pretrained(saved)
    return load_tokenizer(saved)


def _train(name: str, model: Any, tokens: Tensor, config: TrainConfig, out: Path, *, resume: bool, show: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TextColumn("loss {task.fields[loss]:.3f} · ppl {task.fields[ppl]:.1f}"),
               TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=2, disable=not show) as progress:
        task = progress.add_task(f"training {name}", total=config.steps, loss=math.nan, ppl=math.nan, speed=0.0)
        smooth = None
        for row in train(model, tokens, config, out, resume=resume):
            smooth = row["loss"] if smooth is None else 0.98 * smooth + 0.02 * row["loss"]
            progress.update(task, completed=row["step"] + 1, loss=smooth, ppl=math.exp(smooth),
                            speed=row["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", nargs="*", type=Path, help="training text; the demo's is Python's standard library")
    parser.add_argument("--tokenizer", type=Path, help="a model directory whose tokenizer is used")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    chosen = parser.parse_args()
    try:
        print(run(chosen.recipe, chosen.out, texts=read_texts(chosen.text) if chosen.text else None, steps=chosen.steps,
                  tokenizer=load_tokenizer(chosen.tokenizer) if chosen.tokenizer else None, resume=chosen.resume))
    except UserError as error:
        parser.exit(error.exit_code, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"stopped. Next step: the same command with --resume goes on from {chosen.out}\n")


if __name__ == "__main__":
    main()
