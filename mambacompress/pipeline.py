"""The one loop: sweep the float model once, then edit, pack and store it block by block.

    open -> plan -> sweep (model-wide statistics, the float loss) -> embedding -> block 0 .. n-1 -> head -> assemble ->
    check

Each block is loaded, edited by every pass on its own calibration run, run *packed* to make the next block's inputs,
written as a part file, and freed: memory holds one block. Everything a resumed run needs lies in ``<out>.partial``:
the sweep's results, the parts, and the inputs of the next block. Nothing there depends on time or process, so a run
that was killed and resumed gives the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress import artifact, storage
from mambacompress.calibration import BlockCalibration, batch_size
from mambacompress.errors import CheckFailed, UserError
from mambacompress.models.families.checkpoint import Checkpoint, empty_host, materialise
from mambacompress.models.modelmap import Block, ModelMap
from mambacompress.models.packed import PACKED
from mambacompress.passes.base import Pass, Plan
from mambacompress.passes.fuse_norms import FuseNorms
from mambacompress.passes.gptq import Gptq
from mambacompress.passes.patterns import check_patterns, declared
from mambacompress.passes.prune import Prune
from mambacompress.passes.quantize import Quantize
from mambacompress.passes.rotate import Rotate
from mambacompress.passes.smooth import Smooth
from mambacompress.recipe import Recipe
from mambacompress.workdir import WorkDirectory

PASSES: dict[str, Callable[[Any], Pass]] = {
    "fuse_norms": FuseNorms,
    "smooth": Smooth,
    "rotate": Rotate,
    "prune": Prune,
    "gptq": Gptq,
    "quantize": Quantize,
}
"""The recipe's name of each pass -> its class, in the one legal order."""

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): called before each stage of each block; total counts blocks of the current sweep."""


@dataclass(frozen=True)
class PlannedRun:
    """A validated run: what a dry run shows."""

    model_map: ModelMap
    passes: list[Pass]
    plan: Plan


def plan(checkpoint: Checkpoint, recipe: Recipe) -> PlannedRun:
    """Validate the recipe against the model's shapes, reading no weight.

    Raises UserError for an illegal order or a request that cannot work.
    """
    model_map = checkpoint.host()
    checkpoint.check(model_map)
    passes = [PASSES[name](config) for name, config in recipe.steps()]
    check_patterns(passes)
    for earlier, later in pairwise(passes):
        if earlier.rank > later.rank:
            raise UserError(
                f"pass {later.name!r} comes after {earlier.name!r} in recipe {recipe.name!r}, which would undo or "
                "falsify it",
                "order: " + ", ".join(PASSES),
            )
    if not any(isinstance(item, Prune) for item in passes):  # a model that was trained sparse stays so
        passes = sorted([*passes, *(Prune(config) for config in declared(checkpoint.config))], key=lambda p: p.rank)
        check_patterns(passes)
    total, names = Plan(), [item.name for item in passes]
    for i, item in enumerate(passes):
        missing = [name for name in getattr(item, "requires", ()) if name not in names[:i]]
        if missing:
            raise UserError(f"pass {item.name!r} needs {', '.join(missing)} before it", "add it to the recipe")
        total.extend(item.plan(model_map))
    if not total.edits:
        raise UserError(f"recipe {recipe.name!r} changes nothing in this model", "name a recipe with at least one pass")
    return PlannedRun(model_map, passes, total)


def run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens_SL: Tensor,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    extra_files: Sequence[Path] = (),
    source_name: str = "model",
    device: str = "cpu",
) -> dict[str, Any]:
    """Compress ``checkpoint`` into the artifact directory ``out``; returns the manifest.

    tokens_SL: calibration token ids [S, L], int64. Raises UserError for bad input, CheckFailed where the result does
    not pass the recipe's checks (the artifact is then not written).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists", "choose another --out or remove it")
    planned = plan(checkpoint, recipe)
    work = WorkDirectory(out.with_name(out.name + ".partial"), checkpoint, recipe, tokens_SL, resume)
    with torch.no_grad():
        manifest = _Run(checkpoint, recipe, planned, tokens_SL, work, progress or (lambda *_: None), device).execute()
    manifest["source"] = source_name
    _check(manifest, recipe)
    files = artifact.assemble(work.parts(), storage_directory := work.fresh("artifact"))
    files += _write_documents(storage_directory, checkpoint, planned.model_map, recipe, manifest, extra_files)
    artifact.finish(storage_directory, manifest, files)
    if out.exists():
        out.rmdir()
    storage_directory.rename(out)
    shutil.rmtree(work.path)
    return artifact.read_manifest(out)


class _Run:
    """The state of one run: which block, the hidden states that enter it, the records so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        planned: PlannedRun,
        tokens_SL: Tensor,
        work: WorkDirectory,
        progress: Progress,
        device: str,
    ) -> None:
        self.checkpoint, self.recipe, self.work, self.progress = checkpoint, recipe, work, progress
        self.device = torch.device(device)
        self.map, self.passes, self.plan = planned.model_map, planned.passes, planned.plan
        self.stock = empty_host(checkpoint.config, prove=False)
        self.tokens_SL = tokens_SL
        inner = getattr(self.map.blocks[0].mixer, "d_inner", checkpoint.config.hidden_size)
        self.batch = batch_size(tokens_SL.shape[1], inner)
        self.float_bytes = {path: 4 * math.prod(shape) for path, (_, shape) in self.map.matrices().items()}

    def execute(self) -> dict[str, Any]:
        float_loss = self._sweep()
        hidden = self._embedding()
        for block in self.map.blocks:
            hidden = self._block(block, hidden)
        packed_loss = self._head(hidden)
        records = self.work.records()
        ratio = math.exp(packed_loss - float_loss)
        layout: dict[str, Any] = {}
        for record in records.values():
            layout.update(record.pop("layout"))
        packed_paths = [
            path for path in self.float_bytes if path in layout and layout[path]["type"].startswith("Packed")
        ]
        return {
            "recipe": json.loads(self.recipe.canonical_json()),
            "layout": layout,
            "records": records,
            "float_bytes": self.float_bytes,
            "coverage": sum(self.float_bytes[p] for p in packed_paths) / max(1, sum(self.float_bytes.values())),
            "refused": [
                {"pass": r.pass_name, "block": r.block, "target": r.target, "reason": r.reason}
                for r in self.plan.refusals
            ],
            "left_alone": self.map.left_alone,
            "calibration": {
                "tokens": self.tokens_SL.numel(),
                "float_loss": round(float_loss, 6),
                "packed_loss": round(packed_loss, 6),
                "perplexity_ratio": round(ratio, 6),
            },
            "architecture": type(self.map.host).__name__,
            "source_sha256": self.work.identity["source"],
            "versions": self.work.identity["versions"],
        }

    # -- stages ----------------------------------------------------------------------------------------------------

    def _sweep(self) -> float:
        """One pass over the float model: statistics of the passes that need them, and the float loss."""
        stored = self.work.load("sweep")
        if stored is None:
            sweeping = [item for item in self.passes if item.needs_sweep]
            self._load_ends()
            hidden = self._embed()
            for i, block in enumerate(self.map.blocks):
                self.progress("sweep", i, len(self.map.blocks))
                self._observe(sweeping, hidden)
                self._materialise(block.module, block.path)
                hidden = [block.module(h_BLD) for h_BLD in hidden]
                _free(block.module)
            self._observe(sweeping, hidden)
            for item in sweeping:
                for h_BLD in hidden:
                    item.observe_head(h_BLD)
            stored = {"loss": torch.tensor(self._loss(hidden), dtype=torch.float64)}
            for item in self.passes:
                item.prepare(self.map)
                stored.update({f"{item.name}.{key}": value for key, value in item.state().items()})
            self.work.store("sweep", stored)
            for end in (self.map.embedding.module, self.map.final_norm, self.map.head.module):
                _free(end)
        else:
            for item in self.passes:
                prefix = f"{item.name}."
                item.load_state({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
        return float(stored["loss"])

    def _embedding(self) -> list[Tensor]:
        """Edit and pack the embedding; with a tied head it stays in memory to the end."""
        self._load_ends()
        self.progress("embedding", 0, len(self.map.blocks))
        for item in self.passes:
            item.enter_embedding(self.map)
            item.enter_head(self.map)
        record: dict[str, Any] = {}
        for item in self.passes:
            record.update({f"{item.name}.{k}": v for k, v in item.apply_embedding(self.map).items()})
        for item in self.passes:
            item.finish_embedding(self.map)
        path, embedding = self.map.embedding.path, self.map.embedding.module
        head: Any = self.map.head.module
        if self.map.tied and isinstance(embedding, PACKED):  # the head will share the packed weight: drop the float one
            head.weight = nn.Parameter(head.weight.to("meta"), requires_grad=False)
        self._store("embedding", embedding, path, record)
        return self._embed()

    def _block(self, block: Block, hidden: list[Tensor]) -> list[Tensor]:
        """Edit, pack and store one block, or take up its stored result."""
        key = f"block-{block.index:05d}"
        if self.work.has(key):
            kept = self.work.load(f"hidden-{block.index + 1:05d}")
            return hidden if kept is None else [kept[name].to(self.device) for name in sorted(kept)]
        total = len(self.map.blocks)
        self.progress("load", block.index, total)
        self._materialise(block.module, block.path)
        for item in self.passes:
            item.enter_block(block)
        calibration = BlockCalibration(hidden, block)
        record: dict[str, Any] = {}
        for i, item in enumerate(self.passes):
            self.progress(item.name, block.index, total)
            result = item.apply_block(block, calibration.before(self.passes[i + 1 :]))
            record.update({f"{item.name}.{k}": v for k, v in result.items()})
        for item in self.passes:
            item.finish_block(block)
        outputs = calibration.outputs(block)
        record["error"] = _finite(calibration.error_of(outputs), block)
        self.work.store(f"hidden-{block.index + 1:05d}", {f"{i:06d}": h for i, h in enumerate(outputs)})
        self._store(key, block.module, block.path, record)
        self.work.forget(f"hidden-{block.index:05d}")
        _free(block.module)
        return outputs

    def _head(self, hidden: list[Tensor]) -> float:
        """Edit, pack and store the final norm and the head; returns the packed model's loss on the calibration
        tokens."""
        total = len(self.map.blocks)
        self.progress("head", total, total)
        record: dict[str, Any] = {}
        calibration = BlockCalibration(hidden, self.map.blocks[-1], reference=())
        for i, item in enumerate(self.passes):
            result = item.apply_head(self.map, calibration.before(self.passes[i + 1 :]))
            record.update({f"{item.name}.{k}": v for k, v in result.items()})
        for item in self.passes:
            item.finish_head(self.map)
        loss = self._loss(hidden)
        norm: Any = self.map.final_norm
        self.work.store("norm", {f"{self.map.final_norm_path}.weight": norm.weight[None]})
        self._store("head", self.map.head.module, self.map.head.path, record)
        return loss

    # -- parts -----------------------------------------------------------------------------------------------------

    def _load_ends(self) -> None:
        """Load embedding, final norm and head."""
        self._materialise(self.map.embedding.module, self.map.embedding.path)
        self._materialise(self.map.final_norm, self.map.final_norm_path)
        if self.map.tied:
            self._tie()
        else:
            self._materialise(self.map.head.module, self.map.head.path)

    def _materialise(self, module: nn.Module, path: str) -> None:
        materialise(module, path, self.map, self.checkpoint)
        module.to(self.device)

    def _tie(self) -> None:
        if self.map.tied:
            self.map.head.module.weight = self.map.embedding.module.weight

    def _embed(self) -> list[Tensor]:
        embedding = self.map.embedding.module
        return [embedding(ids_BL).float() for ids_BL in self.tokens_SL.to(self.device).split(self.batch)]

    def _observe(self, passes: Sequence[Pass], hidden: Sequence[Tensor]) -> None:
        for item in passes:
            for h_BLD in hidden:
                item.observe(h_BLD)

    def _loss(self, hidden: Sequence[Tensor]) -> float:
        """Mean next-token loss over the calibration tokens, one sequence at a time."""
        total, count = 0.0, 0
        rows = (row for batch in hidden for row in batch)
        for ids_L, h_LD in zip(self.tokens_SL.to(self.device), rows, strict=True):
            logits_LV = self.map.head.module(self.map.final_norm(h_LD[None]))[0, :-1].float()
            total += nn.functional.cross_entropy(logits_LV, ids_L[1:], reduction="sum").item()
            count += len(ids_L) - 1
        return total / count

    def _store(self, key: str, module: nn.Module, path: str, record: dict[str, Any]) -> None:
        stock = self.stock.host.get_submodule(path)
        record["layout"] = artifact.layout_of(module, path, stock)
        state = {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        if key == "head" and self.map.tied:  # what the embedding already stores is not stored twice
            held = {tensor.data_ptr() for tensor in self.map.embedding.module.state_dict().values()}
            state = {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in held}
        self.work.store(key, state, record)


def _check(manifest: dict[str, Any], recipe: Recipe) -> None:
    checks = recipe.checks
    if checks.coverage is not None and manifest["coverage"] < checks.coverage:
        raise CheckFailed(
            f"only {manifest['coverage']:.1%} of the matrix bytes are packed, the recipe asks for "
            f"{checks.coverage:.0%}",
            "widen `maps`, or lower checks.coverage with --set",
        )
    ratio = manifest["calibration"]["perplexity_ratio"]
    if checks.max_perplexity_ratio is not None and not ratio <= checks.max_perplexity_ratio:
        raise CheckFailed(
            f"perplexity on the calibration text rose by a factor of {ratio:.4f}, the recipe allows "
            f"{checks.max_perplexity_ratio}",
            "use a gentler recipe, or raise checks.max_perplexity_ratio",
        )


def _write_documents(
    directory: Path,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    recipe: Recipe,
    manifest: dict[str, Any],
    extra_files: Sequence[Path],
) -> list[str]:
    from mambacompress.card import model_card

    host: Any = model_map.host
    config = json.loads(host.config.to_json_string(use_diff=True))  # a pass may have untied the head
    config["quantization_config"] = {"quant_method": artifact.METHOD, "schema_version": artifact.SCHEMA_VERSION}
    config["architectures"] = [manifest["architecture"]]
    storage.write_json(directory / "config.json", config)
    storage.write_text(directory / "recipe.yaml", recipe.to_yaml())
    storage.write_text(directory / "README.md", model_card(manifest))
    written = ["config.json", "recipe.yaml", "README.md"]
    generation = [] if checkpoint.directory is None else [checkpoint.directory / "generation_config.json"]
    for file in [*checkpoint.tokenizer_files(), *generation, *extra_files]:
        if file.is_file() and file.name not in written:
            storage.copy_file(file, directory / file.name)
            written.append(file.name)
    return written


def _finite(value: float, block: Block) -> float:
    if not math.isfinite(value):
        raise UserError(f"block {block.index} gives NaN or Inf on the calibration text", "check the model's weights")
    return float(f"{value:.6g}")


def _free(module: nn.Module) -> None:
    """Give the module's memory back: every parameter and buffer becomes meta."""
    module.to("meta")


__all__ = ["PASSES", "PlannedRun", "Progress", "plan", "run"]
