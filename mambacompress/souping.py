"""``mc.soup``: prune in phases, retrain replicas of each, average them (``training.soup``), pack what comes out.

Beside ``out`` lies ``out.soup``: a folder a replica with its checkpoint and, when it is through, its weights, and
``soup.json`` with the figures. A crash loses at most the replicas in flight; ``resume`` goes on with them. Replicas run
one after the other; under torchrun or ``accelerate launch`` each process trains some of them, by itself, and all read
what the others made from ``out.soup``, which all must see.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mambacompress import api, data, storage
from mambacompress.api import Compressed
from mambacompress.artifact import read_manifest
from mambacompress.errors import UserError
from mambacompress.eval import stats
from mambacompress.eval.perplexity import token_losses, window_losses
from mambacompress.eval.windows import Windows, make_windows
from mambacompress.nm import Pattern, nm_mask, pruned
from mambacompress.recipe import Recipe, load_recipe
from mambacompress.sparsifying import packing, tokenizer_of
from mambacompress.training import lm
from mambacompress.training.processes import processes
from mambacompress.training.session import Session
from mambacompress.training.soup import average, distances, greedy, trained_state
from mambacompress.training.soup_config import SoupConfig
from mambacompress.training.sparse_config import SparseTraining, stages

WEIGHTS, REPORT, RUN = "weights.safetensors", "soup.json", "run.json"
Progress = Callable[[str, int, int, Mapping[str, float]], None]


def soup(
    model: Any,
    recipe: str | Path | Recipe | Mapping[str, Any] = "soup-2of4",
    *,
    texts: str | Sequence[str],
    eval_texts: str | Sequence[str],
    out: str | Path | None = None,
    tokenizer: Any = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    windows: int = 64,
    resume: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """A sparse soup of ``model`` by a recipe with ``soup``, ``training`` and a ``prune`` step, as an artifact.

    texts: to train on. eval_texts: held out; its first ``windows`` windows judge the candidates. progress: told (stage,
    done, total, figures). ``out.soup/soup.json`` has, for each phase, the perplexity of every candidate, their mean,
    the soup, the ensemble, the distances to the barycentre, and the compute-matched baseline.

    Raises UserError for bad input and for an ``out`` that holds another run.
    """
    chosen = load_recipe(recipe, overrides)
    prune = next((step.prune for step in chosen.passes if step.prune), None)
    if prune is None or chosen.training is None or chosen.soup is None:
        raise UserError(f"recipe {chosen.name!r} has no soup, training and prune sections", "name one that has, as "
                        "soup-2of4")
    temporary = tempfile.TemporaryDirectory(prefix="mambacompress-") if out is None else None
    target = Path(out) if temporary is None else Path(temporary.name) / f"model-{chosen.name}"  # type: ignore[arg-type]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists", "choose another --out or remove it")
    work = target.with_name(target.name + ".soup")
    if work.exists() and not resume:
        raise UserError(f"{work} already holds a run", "continue it with --resume, or choose another --out")
    process = processes()
    process.wait_for_everyone()  # before the first one writes there
    tokenizer = tokenizer_of(model, tokenizer)
    host = api.load(model) if isinstance(model, str | Path) else copy.deepcopy(model)
    rows = [data.encode(tokenizer, [text] if isinstance(text, str) else text) for text in (texts, eval_texts)]
    judged = make_windows(rows[1], limit=windows)
    _same_run(work, {"recipe": json.loads(chosen.canonical_json()), "windows": judged.fingerprint,
                     **lm.Text(rows[0], chosen.training.run()).identity()}, process)
    pot = _Pot(host, chosen.training, chosen.soup, prune.maps, rows[0], judged, work,
               progress or (lambda stage, done, total, figures: None))
    patterns = stages(chosen.training.changed(method="sdgf-stepwise", reach=None), prune.pattern)
    report = [pot.phase(i, pattern) for i, pattern in enumerate(patterns)]
    if process.is_main_process:
        storage.write_json(work / REPORT, {"recipe": chosen.name, "phases": report})
        api.apply_recipe(pot.host, packing(chosen), tokenizer=tokenizer, out=target, resume=resume)
    process.wait_for_everyone()
    return Compressed(target, read_manifest(target), temporary)


def _same_run(work: Path, run: dict[str, Any], process: Any) -> None:
    """Note in ``work`` which run it holds; raises UserError where it is another one."""
    noted = work / RUN
    if noted.is_file() and json.loads(noted.read_text(encoding="utf-8")) != run:
        raise UserError(f"the unfinished run in {work} was started with another recipe or text",
                        "repeat its command, or choose another --out")
    process.wait_for_everyone()
    if process.is_main_process:
        storage.make_directory(work)
        storage.write_json(noted, run)


class _Pot:
    """What is being cooked: ``host`` holds the start of the next phase."""

    def __init__(self, host: Any, training: SparseTraining, config: SoupConfig, maps: Sequence[str], tokens: Tensor,
                 windows: Windows, work: Path, told: Progress) -> None:
        self.host, self.training, self.config, self.maps = host, training, config, maps
        self.tokens, self.windows, self.work, self.told = tokens, windows, work, told

    def phase(self, index: int, pattern: Pattern) -> dict[str, Any]:
        """Prune, retrain the replicas, average; the figures of the phase."""
        took = self._taken(pattern)
        variants = self.config.variants(self.training, took)
        names = [f"phase{index}-replica{i}" for i in range(len(variants))]
        baseline = f"phase{index}-baseline"
        runs = dict(zip(names, variants, strict=True))
        if self.config.baseline:
            longer = self.training.changed(steps=self.training.steps * len(variants))
            runs[baseline] = self.config.retraining(longer, took)
        self._train(runs, pattern)
        states = [load_file(self.work / name / WEIGHTS) for name in names]
        alone = [self._loss(state) for state in states]
        sparse = {name: pattern for name in states[0] if name.removesuffix(".weight").endswith(tuple(self.maps))}
        taken = list(range(len(states)))
        if self.config.average == "greedy":
            taken = greedy(states, [loss.value for loss in alone], lambda state: self._loss(state).value,
                           sparse)
        mixed = average([states[i] for i in taken], sparse)
        report: dict[str, Any] = {
            "pattern": str(pattern), "vary": self.config.vary,
            "values": [getattr(variant, self.config.vary) for variant in variants],
            "retrain": self.config.retrain, "pruning_took": took,
            "candidates": [loss.value for loss in alone], "se": [loss.se for loss in alone],
            "mean": sum(loss.value for loss in alone) / len(alone), "best": min(loss.value for loss in alone),
            "taken": taken, "soup": self._loss(mixed).value, "ensemble": self._ensemble(states),
            "distance_to_barycentre": distances(states)}
        if self.config.baseline:
            report["compute_matched"] = self._loss(load_file(self.work / baseline / WEIGHTS)).value
        self._fill(mixed)
        self.host.config.nm_sparsity = dict.fromkeys(self.maps, str(pattern))
        return report

    @torch.no_grad()
    def _taken(self, pattern: Pattern) -> float:
        """What pruning to ``pattern`` takes of the weights: see ``soup_config``."""
        whole, gone, left, went = 0.0, 0.0, 0, 0
        for name, weight in self.host.named_parameters():
            if name.removesuffix(".weight").endswith(tuple(self.maps)):
                rest = pruned(weight, nm_mask(weight.abs(), pattern))
                whole += float(weight.double().square().sum())
                gone += float((weight - rest).double().square().sum())
                left += int((weight != 0).sum())
                went += int((weight != 0).sum() - (rest != 0).sum())
        return float((gone / whole / (went / left)) ** 0.5) if went else 0.0

    def _train(self, runs: Mapping[str, SparseTraining], pattern: Pattern) -> None:
        """Train every run whose weights are not there; each process takes some, the longest first to whoever has least.
        """
        process = processes()
        loads = [0] * process.num_processes
        for name, training in sorted(runs.items(), key=lambda run: -run[1].steps):
            who = loads.index(min(loads))
            loads[who] += training.steps
            if who == process.process_index and not (self.work / name / WEIGHTS).is_file():
                self._replica(name, training, pattern)
        process.wait_for_everyone()

    def _replica(self, name: str, training: SparseTraining, pattern: Pattern) -> None:
        """Train one run by this process alone, and write its weights."""
        model, config, folder = copy.deepcopy(self.host), training.run(), self.work / name
        with Session(model, training, pattern, self.maps, fixed=True) as session, closing(
                lm.train(model, self.tokens, config, folder, resume=True, method=session, alone=True)) as rows:
            for row in rows:
                self.told(name, int(row["step"]) + 1, config.steps, row | {"sparsity": session.sparsity()})
        storage.write_tensors(folder / WEIGHTS, trained_state(model))
        (folder / lm.CHECKPOINT).unlink(missing_ok=True)

    def _fill(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.host.named_parameters():
                parameter.copy_(state[name])

    def _loss(self, state: Mapping[str, Tensor]) -> stats.Estimate:
        kept = trained_state(self.host)
        self._fill(state)
        found = stats.perplexity(window_losses(self.host.eval(), self.windows), self.windows.counts)
        self._fill(kept)
        return found

    @torch.no_grad()
    def _ensemble(self, states: Sequence[Mapping[str, Tensor]]) -> float:
        """Perplexity of the mean of the candidates' distributions."""
        kept, total = trained_state(self.host), 0.0
        for ids_BL, scored_BL, _ in self.windows.batches(4):
            mixture: list[Tensor] = []
            for state in states:
                self._fill(state)
                mixture.append(self.host(input_ids=ids_BL, use_cache=False).logits.float().log_softmax(-1))
            logits_BLV = torch.stack(mixture).logsumexp(0) - torch.tensor(float(len(states))).log()
            total += float(token_losses(logits_BLV, ids_BL).masked_fill(~scored_BL, 0).sum())
        self._fill(kept)
        return float(torch.tensor(total / sum(self.windows.counts), dtype=torch.float64).exp())


__all__ = ["soup"]
