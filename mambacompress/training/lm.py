"""A small, honest language-model trainer: packed windows, AdamW, the schedule of a ``TrainConfig``, on accelerate.

The data order is a function of the seed and the step alone, so a run resumes to the same losses, bit for bit, and two
processes (each takes its share of every batch) see the losses of one. Processes and devices are accelerate's business.

A checkpoint is one safetensors file: the parameters, both moments of AdamW and the number of steps done. It is either
whole or not there, so that a kill at any moment leaves a run that resumes. Ctrl-C, or a caller that stops reading,
writes one before it stops; a Ctrl-C in the middle of an update waits until the update is whole.

Precision ``bf16`` computes under autocast; weights, moments and the loss stay fp32.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from mambacompress import storage
from mambacompress.data import training_batches
from mambacompress.errors import UserError
from mambacompress.training.captured import Captured, can_replay
from mambacompress.training.config import TrainConfig, learning_rate
from mambacompress.training.log import TrainingLog
from mambacompress.training.processes import Alone, processes

CHECKPOINT = "checkpoint.safetensors"
RUN = "trainer.json"
BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")


def settled(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with ``auto`` precision decided for ``device``; raises UserError for a bf16 it would only emulate."""
    if config.precision == "auto":
        return replace(config, precision="bf16" if computes_bf16(device) else "fp32")
    if config.precision == "bf16" and not computes_bf16(device):
        raise UserError(f"this {device.type} has no bf16 instructions: emulated, it is slower than fp32",
                        "train with --set precision=fp32")
    return config


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def token_loss(model: Any, ids_BL: Tensor, method: Method | None = None) -> Tensor:
    """Mean next-token cross-entropy over int64 [B, L], logits in fp32, and what ``method`` makes of it; a scalar."""
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    next_NV = logits_BLV[:, :-1].float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(next_NV, ids_BL[:, 1:].flatten())
    return loss if method is None else method.loss(loss, logits_BLV, ids_BL)


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices alone: never A_log, D, biases, norms or the convolution."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and not name.endswith(("A_log", ".scales")) and ".conv." not in name
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


Batch = Tensor | tuple[Tensor, ...]  # tensors that share their first axis


class Source(Protocol):
    """What a run reads, and what it learns from it. noun: what the user calls it. capturable: whether the loss is a
    function of model and batch alone (and of the method's mode), so that a GPU may replay it.
    """

    noun: str
    capturable: bool

    def batches(self, start: int) -> Iterator[Batch]:
        """Whole batches, over all processes, from step ``start``; the same ones every time."""
        ...

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean over a (micro-)batch; a scalar."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again, as JSON."""
        ...


class Text:
    """Next tokens of one row of ids, int64 [n]."""

    noun = "text"
    capturable = True

    def __init__(self, tokens: Tensor, config: TrainConfig, method: Method | None = None) -> None:
        self.tokens, self.config, self.method = tokens, config, method

    def batches(self, start: int) -> Iterator[Batch]:
        return training_batches(self.tokens, self.config.batch, self.config.length, self.config.seed, start)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        if not isinstance(batch, Tensor):
            raise TypeError("a batch of text is one tensor of ids")
        return token_loss(model, batch, self.method)

    def identity(self) -> dict[str, Any]:
        return {"tokens": hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()}


class Method(Protocol):
    """What a training method adds to the loop; ``Session`` is one. Its tensors go into the checkpoint."""

    def optimizer(self, lr: float, *, groups: Any, betas: tuple[float, float]) -> torch.optim.Optimizer: ...

    def loss(self, loss: Tensor, logits: Tensor, input_ids: Tensor) -> Tensor: ...

    def step(self, optimizer: Any) -> None: ...

    def mode(self) -> Hashable: ...  # what the loss depends on beside tensors

    def again(self) -> None: ...  # a batch's gradient is computed from the start, for the same step

    def identity(self) -> dict[str, Any]: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


def train(model: Any, tokens: Tensor, config: TrainConfig, out: Path, *, resume: bool = False,
          method: Method | None = None, alone: bool = False) -> Generator[dict[str, float], None, None]:
    """Train ``model`` in place on one row of token ids, int64 [n]: ``fit`` on its ``Text``.

    model: called as ``model(input_ids=int64 [B, L], use_cache=False).logits`` ([B, L, V]).
    """
    yield from fit(model, Text(tokens, config, method), config, out, resume=resume, method=method, alone=alone)


def fit(model: Any, source: Source, config: TrainConfig, out: Path, *, resume: bool = False,
        method: Method | None = None, alone: bool = False) -> Generator[dict[str, float], None, None]:
    """Train ``model`` in place on ``source``; yields a row after each step: what its log holds (see ``log``) and
    tokens_per_second.

    model: any module that ``source`` knows how to call; left in training mode. Checkpoints and the log go to ``out``;
    with ``resume`` the run in ``out`` goes on where it was (from the start, where there is none yet). method: what
    trains beyond plain AdamW on the source's loss. alone: this process trains ``model`` by itself, whatever other
    processes of its launch do.

    Raises UserError where ``out`` holds a run that is not resumed, or one of another configuration, source or model;
    where the batch does not divide over the processes; where bf16 is asked for and would be emulated; and where the
    loss or its gradient is not finite (the last checkpoint is from before).
    """
    from accelerate import Accelerator

    processes()
    accelerator = Alone() if alone else Accelerator(mixed_precision="no")
    config = settled(config, accelerator.device)
    share = config.batch // (config.accumulate * accelerator.num_processes)
    if share * config.accumulate * accelerator.num_processes != config.batch:
        raise UserError(f"a batch of {config.batch} does not divide over {accelerator.num_processes} processes "
                        f"x {config.accumulate} accumulations", "use another number of processes")
    groups = parameter_groups(model, config.weight_decay)
    optimizer = (torch.optim.AdamW(groups, betas=BETAS, eps=1e-8) if method is None else
                 method.optimizer(config.learning_rate, groups=groups, betas=BETAS))
    start = _begin(model, optimizer, config, source, out, resume, accelerator.is_main_process, method)
    model.train()
    wrapped, prepared = accelerator.prepare(model, optimizer)
    backward = _backward_of(accelerator, wrapped, source, method, share, config)
    log = TrainingLog(out, start) if accelerator.is_main_process else None
    done = start
    try:
        for batch in source.batches(start):
            if done >= config.steps:
                break
            began, step = time.perf_counter(), done
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss = backward(batch)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
            for what, value in (("loss", loss), ("gradient's norm", float(norm))):
                if not math.isfinite(value):
                    raise UserError(f"the {what} became {value} at step {step}",
                                    "check the model, or start again with a lower learning rate")
            with _uninterrupted():
                prepared.step()
                if method is not None:
                    method.step(optimizer)
                done = step + 1
                row = {"step": step, "loss": loss, "rate": learning_rate(config, step), "tokens": done * config.tokens}
                if log is not None:
                    log.append(row)
            prepared.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - began
            if done % config.save_every == 0 and accelerator.is_main_process:
                _save(model, optimizer, out, done, method)
            yield row | {"tokens_per_second": config.tokens / seconds}
    except (KeyboardInterrupt, GeneratorExit):
        if accelerator.is_main_process:
            _save(model, optimizer, out, done, method)
        raise
    finally:
        if log is not None:
            log.close()
    if accelerator.is_main_process:
        _save(model, optimizer, out, done, method)


def _backward_of(accelerator: Any, wrapped: Any, source: Source, method: Method | None, share: int,
                 config: TrainConfig) -> Callable[[Batch], float]:
    """What computes the gradients of one batch, accumulated over this process's micro-batches, and gives the loss,
    averaged over all processes. On a GPU of its own it is a CUDA graph wherever it can be.
    """
    device = accelerator.device

    def micro(mine: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = source.loss(wrapped, mine) / config.accumulate
        accelerator.backward(loss)
        return loss.detach()

    def whole(mine: tuple[Tensor, ...]) -> Tensor:
        if method is not None:
            method.again()
        return micro(mine[0] if len(mine) == 1 else mine)

    captured = None
    if source.capturable and accelerator.num_processes == config.accumulate == 1 and can_replay(device):
        captured = Captured(whole, wrapped, (lambda: None) if method is None else method.mode)

    def backward(batch: Batch) -> float:
        if captured is not None:
            mine = _part(batch, 0, config.batch, device)
            replayed = captured((mine,) if isinstance(mine, Tensor) else mine)
            if replayed is not None:
                return float(replayed)
        total = torch.zeros((), device=device)
        for i in range(config.accumulate):
            first = (i * accelerator.num_processes + accelerator.process_index) * share
            last = i == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(wrapped):
                total += micro(_part(batch, first, first + share, device))
        return float(accelerator.gather(total).mean())

    return backward


def _part(batch: Batch, first: int, last: int, device: torch.device) -> Batch:
    """Rows ``first`` to ``last`` of every tensor."""
    if isinstance(batch, Tensor):
        return batch[first:last].to(device)
    return tuple(tensor[first:last].to(device) for tensor in batch)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is through."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if held and callable(before):
        before(*held[0])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    """Raise UserError where ``out`` holds the checkpoint of a run."""
    if (out / CHECKPOINT).is_file():
        raise UserError(f"{out} already holds a run", "continue it with --resume, or choose another --out")


def _begin(model: Any, optimizer: Any, config: TrainConfig, source: Source, out: Path, resume: bool, main: bool,
           method: Method | None) -> int:
    """Check what ``out`` holds against this run, restore it where asked; the number of steps already done."""
    config_now = asdict(config)
    read = source.identity()
    run = {"config": config_now, **read}
    if method is not None:
        run["method"] = method.identity()
    checkpoint = out / CHECKPOINT
    if not checkpoint.is_file():
        if main:
            storage.make_directory(out)
            storage.write_json(out / RUN, run)
        return 0
    if not resume:
        refuse_existing(out)
    try:
        stored = json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out / RUN} cannot be read: {error}", "choose another --out") from error
    if not isinstance(stored, dict) or stored.get("config") != config_now:
        raise _another_configuration(out, stored, config_now)
    if any(stored.get(name) != value for name, value in read.items()):
        raise UserError(f"the run in {out} reads another {source.noun}", "repeat its options, or choose another --out")
    if stored.get("method") != run.get("method"):
        raise UserError(f"the run in {out} trains by another method", "repeat its options, or choose another --out")
    return _restore(model, optimizer, checkpoint, method)


def _another_configuration(out: Path, stored: Any, wanted: dict[str, Any]) -> UserError:
    found = stored.get("config") if isinstance(stored, dict) else None
    there = found if isinstance(found, dict) else {}
    differ = [name for name in wanted if name in there and there[name] != wanted[name]]
    detail = ", ".join(f"its {name} is {there[name]}, not {wanted[name]}" for name in differ)
    again = " ".join(f"--set {name}={there[name]}" for name in differ)
    return UserError(f"the run in {out} has another configuration{': ' if detail else ''}{detail}",
                     f"go on with {again}, or choose another --out" if again else "choose another --out")


def _save(model: Any, optimizer: Any, out: Path, done: int, method: Method | None) -> None:
    tensors = {"steps": torch.tensor(done)}
    for name, parameter in model.named_parameters():
        tensors[f"parameter.{name}"] = parameter
        for moment in MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    if method is not None:
        tensors |= {f"method.{name}": tensor for name, tensor in method.tensors().items()}
    with _uninterrupted():  # by a second Ctrl-C, or a launcher that passes the first one on
        storage.write_tensors(out / CHECKPOINT, tensors)


def _restore(model: Any, optimizer: Any, path: Path, method: Method | None) -> int:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
        done = stored.pop("steps")
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}", "delete it and start again") from error
    parameters = dict(model.named_parameters())
    shapes = {name.split(".", 1)[1]: tensor.shape for name, tensor in stored.items() if name.startswith("parameter.")}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise UserError(f"the checkpoint {path} is of another model", "repeat its options, or choose another --out")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[f"parameter.{name}"])
            moments = {m: stored[f"{m}.{name}"].to(parameter.device) for m in MOMENTS if f"{m}.{name}" in stored}
            if moments:
                optimizer.state[parameter] = {"step": done.to(torch.float32), **moments}
    if method is not None:
        method.load({name.removeprefix("method."): t for name, t in stored.items() if name.startswith("method.")})
    return int(done)
