"""Fine-tune to N:M sparsity in any training loop.

    with mc.attach(model, "nm-2of4", steps=2000) as session:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)        # cast: session.optimizer(...)
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss               # cast: session.loss(loss, logits, batch)
            loss.backward()
            optimizer.step()
            session.step(optimizer)
            optimizer.zero_grad()
    model.save_pretrained(...)                                             # the zeros are in the weights

The linears that the recipe's ``prune`` step names are replaced, on the instance, by ones that see their weight through
a mask (``nm``, ``cast``); their parameters stay the very same objects under the same names. Attach first, then build
the optimizer and wrap the model (DistributedDataParallel, ``fully_shard``). Masks move once an optimizer step, never
between micro-batches. On leaving the block the zeros are written into the weights, plain linears come back and the
model's configuration says what it is, so that a later quantization keeps it; after an exception nothing is cut.

Optimizer traps: once masks are frozen, what the optimizer did to a dropped weight is undone and its first moment is
cleared (not for cast, whose moments are how it decays). Zeros are written by ``masked_fill``.

``tensors`` and ``load`` are what a checkpoint needs beside parameters and optimizer.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from mambacompress.errors import UserError
from mambacompress.models.families import adopt
from mambacompress.models.modelmap import ModelMap, set_module
from mambacompress.models.packed import PACKED
from mambacompress.nm import Pattern, excess
from mambacompress.passes.patterns import ATTRIBUTE
from mambacompress.recipe import Recipe, load_recipe
from mambacompress.training.cast import AdamS, ScaledLinear, budget_warning, divergence, rate_warning
from mambacompress.training.lora import AdaptedLinear, adapted
from mambacompress.training.nm import Flow, SparseLinear, local
from mambacompress.training.sparse_config import Phase, SparseTraining, phase, required_steps, stages


def attach(model: Any, recipe: str | Path | Mapping[str, Any] | Recipe = "nm-2of4", *, steps: int | None = None,
           overrides: Sequence[str] | Mapping[str, Any] = ()) -> Session:
    """A session that trains ``model`` (a transformers Mamba, adopted or not) to the recipe's N:M pattern.

    recipe: its ``prune`` step says pattern and tensors, its ``training`` section the method (sr-ste where there is
    none). steps: optimizer steps of the run, which all methods but sr-ste must know. overrides: as ``--set``.

    Raises UserError where nothing can be made sparse, or the model is wrapped or packed already.
    """
    chosen = load_recipe(recipe, overrides)
    prune = next((step.prune for step in chosen.passes if step.prune), None)
    if prune is None:
        raise UserError(f"recipe {chosen.name!r} has no prune step, so it says no pattern to train to",
                        "name one that has, as nm-2of4")
    training = chosen.training or SparseTraining()
    if steps is not None:
        training = training.changed(steps=steps, warmup=min(training.warmup, max(0, steps - 1)))
    return Session(model, training, prune.pattern, prune.maps)


class Session:
    """See the module. step_count: optimizer steps done. layers: path -> the linear that trains sparse. fixed: the masks
    are those of the first step, and frozen, whatever the method.
    """

    def __init__(self, model: Any, training: SparseTraining, pattern: Pattern, maps: Sequence[str], *,
                 fixed: bool = False) -> None:
        required_steps(training)
        _refuse_wrapped(model)
        self.model, self.training, self.pattern, self.maps = model, training, pattern, tuple(maps)
        self.step_count, self.open = 0, False
        host = model.get_base_model() if hasattr(model, "get_base_model") else model
        found = _linears(adopt(host), self.maps, pattern)
        self.host, self.layers = host, dict[str, SparseLinear | AdaptedLinear]()
        frozen = not any(module.weight.requires_grad for module in found.values())
        self.fixed = fixed or frozen or any(map(adapted, found.values()))
        if self.fixed and self._is("cast"):
            raise UserError("cast decays weights, and those of this model are frozen: with LoRA they do not move",
                            "use another method")
        self.patterns = stages(training, pattern, math.gcd(*(module.in_features for module in found.values())))
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False) if self._is("cast") else None
        self.flow = Flow(decay=training.decay if self._is("sr-ste") else 0.0, dense=self._is("cast", "dense"))
        self.optimizer_of_cast: AdamS | None = None
        kind = ScaledLinear if self._is("cast") else SparseLinear
        self.phase = Phase(pattern)
        for path, linear in found.items():
            layer = (AdaptedLinear(linear, pattern, path) if adapted(linear) else
                     kind(linear, self.flow, self.patterns[0]))
            set_module(host, path, layer)
            self.layers[path] = layer
        self._enter(self._phase(0))

    def __enter__(self) -> Session:
        self.open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self.open:
            self.finish() if kind is None else self.detach()

    # -- training ----------------------------------------------------------------------------------------------------

    def optimizer(self, lr: float, *, groups: Iterable[dict[str, Any]] | None = None, weight_decay: float = 0.0,
                  betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> torch.optim.Optimizer:
        """AdamW; for cast AdamS, which it must train with. groups: parameter groups, the model's own where None."""
        groups = [{"params": list(self.model.parameters())}] if groups is None else list(groups)
        if not self._is("cast"):
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        masks = {layer.weight: layer for layer in self.layers.values()}
        split: list[dict[str, Any]] = []
        for group in groups:
            parameters = [p for p in group["params"] if p.requires_grad]
            sparse = [p for p in parameters if p in masks]
            split += [group | {"params": [p for p in parameters if p not in masks]},
                      group | {"params": sparse, "sparse": True, "weight_decay": 0.0}]
        self.optimizer_of_cast = AdamS([g for g in split if g["params"]], lr=lr, betas=betas, eps=eps,
                                       weight_decay=weight_decay, mask_of=lambda p: masks[p].placed_mask(),
                                       total=self.training.steps, decay=self.training.decay)
        return self.optimizer_of_cast

    def loss(self, loss: Tensor, logits: Tensor, input_ids: Tensor) -> Tensor:
        """The loss to train on: for cast mixed with the divergence from the dense model as it was, else ``loss``.

        loss: of the student on these tokens. logits: [B, L, V] of the student. input_ids: int64 [B, L].
        """
        if self.teacher is None or self.training.eta == 0:
            return loss
        with torch.no_grad():
            target_BLV = self.teacher.to(logits.device)(input_ids=input_ids, use_cache=False).logits
        eta = self.training.eta
        return eta * divergence(target_BLV, logits) + (1 - eta) * loss

    @torch.no_grad()
    def step(self, optimizer: Any = None) -> None:
        """After each ``optimizer.step()``, once however many micro-batches it had. optimizer: whose moments of dropped
        weights are cleared once masks are frozen.
        """
        self._check()
        was = self.phase
        self.step_count += 1
        if was.frozen:
            self._undo(optimizer)
        self._enter(self._phase(self.step_count))

    def mode(self) -> tuple[bool, ...]:
        """What a step's forward and backward depend on beside tensors: see ``training.captured``."""
        return self.flow.dense, self.flow.frozen, self.flow.beta > 0

    def again(self) -> None:
        """The step's gradient is computed from the start."""
        for layer in self.layers.values():
            layer.decayed = False

    def _phase(self, step: int) -> Phase:
        return Phase(self.pattern, frozen=True) if self.fixed else phase(self.training, self.patterns, step)

    def _enter(self, now: Phase) -> None:
        """Refresh the masks for the phase of the next step."""
        moves = not self._is("dense") and not self.phase.frozen and (
            not self._is("cast") or self.step_count % self.training.interval == 0)
        self.again()
        for layer in self.layers.values():
            if moves:
                local(layer.placed_mask()).copy_(local(layer.best_mask(now.pattern)))
            if now.frozen and not self.phase.frozen and not self.flow.dense:
                layer.drop()
        self.flow.change(now.beta, now.frozen)
        self.phase = now

    def _undo(self, optimizer: Any) -> None:
        """What a step did to the weights a frozen mask drops."""
        for layer in () if self.flow.dense else self.layers.values():
            layer.drop()
            state = getattr(optimizer, "state", {}).get(layer.weight, {})
            if "exp_avg" in state and isinstance(layer, SparseLinear):
                local(state["exp_avg"]).masked_fill_(~local(layer.placed_mask()), 0)

    def _check(self) -> None:
        for path, layer in self.layers.items():
            if layer.weight.dim() != 2 or tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
                raise UserError(f"{path} has been flattened, as FullyShardedDataParallel does: its groups of "
                                f"{self.pattern.of} lie across processes", "shard with fully_shard, after attach")
        if self._is("cast") and self.optimizer_of_cast is None:
            raise UserError("cast decays weights in its own optimizer, and another one is training",
                            "take it from session.optimizer(...)")

    # -- the end -----------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Plain linears come back; the weights stay as they are, dense."""
        if self.open or self.layers:
            self._restore()

    def finish(self) -> None:
        """Write the zeros into the weights, put plain linears back, and let the configuration say so."""
        if not self._is("dense"):
            self._warn()
            for layer in self.layers.values():
                frozen = self.phase.frozen and not self.flow.dense
                layer.drop(None if frozen else layer.best_mask(self.pattern))
                if isinstance(layer, AdaptedLinear):
                    layer.fold()
            setattr(self.host.config, ATTRIBUTE, dict.fromkeys(self.maps, str(self.pattern)))
            wrong = [path for path, layer in self.layers.items() if excess(local(layer.weight), self.pattern)]
            if wrong:
                raise RuntimeError(f"{wrong[0]} is not {self.pattern} after its session")
        self._restore()

    def _restore(self) -> None:
        self.flow.dense, self.open, self.teacher = True, False, None
        for path, layer in self.layers.items():
            if not isinstance(layer.weight, DTensor):  # a sharded model holds on to its modules
                set_module(self.host, path, layer.plain())
        self.layers = {}

    def _warn(self) -> None:
        optimizer = self.optimizer_of_cast
        if optimizer is None:
            return
        sizes = [local(layer.weight).abs().mean() for layer in self.layers.values()]
        for said in (budget_warning(optimizer.budget, float(torch.stack(sizes).mean())),
                     rate_warning(*optimizer.rates)):
            if said is not None:
                warnings.warn(said, stacklevel=4)

    # -- what there is -----------------------------------------------------------------------------------------------

    def sparsity(self) -> float:
        """Share of the weights of its layers that the forward multiplies by zero now."""
        if self.flow.dense or self.flow.beta > 0:
            return 0.0
        kept, total = 0, 0
        for layer in self.layers.values():
            mask = local(layer.placed_mask())
            kept, total = kept + int(mask.sum()), total + mask.numel()
        return 1 - kept / max(1, total)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one."""
        return {"training": self.training.model_dump(mode="json"), "pattern": str(self.pattern),
                "maps": list(self.maps), "fixed": self.fixed}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: the masks and the number of steps; beside them cast's account of its decay."""
        found = {f"mask.{path}": local(layer.placed_mask()) for path, layer in self.layers.items()}
        found["steps"] = torch.tensor(self.step_count)
        if self.optimizer_of_cast is not None:
            found["cast"] = torch.tensor([self.optimizer_of_cast.budget, *self.optimizer_of_cast.rates],
                                         dtype=torch.float64)
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what ``tensors`` gave, after the parameters. Raises UserError where it is of another session."""
        for path, layer in self.layers.items():
            mask = tensors.get(f"mask.{path}")
            if mask is None or mask.shape != local(layer.placed_mask()).shape:
                raise UserError(f"the checkpoint has no mask for {path}", "resume the run it belongs to")
            local(layer.placed_mask()).copy_(mask)
            layer.decayed = False
        self.step_count = int(tensors["steps"])
        self.phase = self._phase(self.step_count)
        self.flow.change(self.phase.beta, self.phase.frozen)
        if self.optimizer_of_cast is not None and "cast" in tensors:
            self.optimizer_of_cast.budget, largest, last = tensors["cast"].tolist()
            self.optimizer_of_cast.rates = (largest, last)

    def _is(self, *methods: str) -> bool:
        return self.training.method in methods


def _linears(model_map: ModelMap, maps: Sequence[str], pattern: Pattern) -> dict[str, Any]:
    """Path in the model -> linear (or what peft made of it), of every matrix named in ``maps``; raises UserError for
    what cannot train sparse.
    """
    found: dict[str, Any] = {}
    for block in model_map.blocks:
        for path, sites in block.matrices().items():
            if sites[0].tensor not in maps:
                continue
            module = block.module.get_submodule(path)
            where = f"block {block.index} {sites[0].tensor}"
            if isinstance(module, PACKED):
                raise UserError(f"{where} is packed: integer codes have no gradient", "train the float model")
            if isinstance(module, SparseLinear | AdaptedLinear):
                raise UserError(f"{where} is in a session already", "leave that one first")
            if adapted(module):
                pattern.check(module.in_features, where)  # type: ignore[arg-type]
                found[f"{block.path}.{path}"] = module
                continue
            if not isinstance(module, nn.Linear):
                raise UserError(f"{where} is a {type(module).__name__}, not a linear", "merge or remove what wraps it")
            if isinstance(module.weight, DTensor):
                raise UserError("the model is sharded already", "attach first, then call fully_shard")
            pattern.check(module.in_features, where)
            if module.weight.dtype != torch.float32:
                raise UserError(f"{where} holds {str(module.weight.dtype).removeprefix('torch.')} weights, too coarse "
                                "to be trained", "load the model in fp32 and compute under autocast")
            found[f"{block.path}.{path}"] = module
    if not found:
        raise UserError(f"this model has no {', '.join(maps)} to train sparse", "name others in the prune step's maps")
    return found


def _refuse_wrapped(model: Any) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UserError("FullyShardedDataParallel flattens parameters and cuts them anywhere, so that groups of M "
                        "weights lie across processes",
                        "attach first, then shard with torch's fully_shard, which cuts rows")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError("the model is wrapped already, and the wrapper knows its parameters",
                        "attach to the model itself, then wrap it")


__all__ = ["Session", "attach"]
