"""A small, honest language-model trainer: packed windows, AdamW, a cosine or WSD schedule, on accelerate.

The data order is a function of the seed and the step alone, so a run resumes to the same losses, and two processes (each
takes its share of every batch) see the losses of one. Processes, devices and precision are accelerate's business.

Checkpoints: the model as an ordinary Hugging Face directory and the optimizer's state beside it (tensors and numbers only,
read back with weights_only). Ctrl-C writes one before it stops.

Schedules: cosine to ``final`` x peak; WSD (warm-up, stable, decay): constant, then linear to ``final`` over the last fifth.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacompress import storage
from mambacompress.data import training_batches
from mambacompress.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """steps: optimizer steps. batch: sequences a step, over all processes and accumulations. length: tokens a sequence."""

    steps: int
    batch: int = 8
    length: int = 256
    learning_rate: float = 3e-3
    final: float = 0.05
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    precision: str = "no"
    save_every: int = 500

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise UserError(f"unknown schedule {self.schedule!r}", "choose cosine or wsd")
        if self.batch % self.accumulate:
            raise UserError(f"batch {self.batch} does not divide into {self.accumulate} accumulations", "change one of them")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step ``step`` (from 0)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "cosine":
        factor = config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = 1.0 if done < 0.8 else 1 - (1 - config.final) * (done - 0.8) / 0.2
    return config.learning_rate * factor


def token_loss(model: Any, ids_BL: Tensor) -> Tensor:
    """Mean next-token cross-entropy over [B, L], logits in fp32."""
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices alone: never A_log, D, biases, norms or the convolution."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and not name.endswith("A_log") and ".conv." not in name
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def train(model: Any, tokens: Tensor, config: TrainConfig, out: Path, *, resume: bool = False,
          quiet: bool = False) -> Iterator[dict[str, float]]:
    """Train ``model`` on one row of token ids; yields {step, loss, rate, tokens_per_second} after each step.

    Checkpoints go to ``out``. With ``resume`` the run in ``out`` goes on where it was. Raises UserError where ``out`` holds
    a run of another configuration.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=config.precision)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), eps=1e-8)
    start = _restore(model, optimizer, config, out) if resume and (out / "trainer.json").is_file() else 0
    model.train()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    share = config.batch // (config.accumulate * accelerator.num_processes)
    if share * config.accumulate * accelerator.num_processes != config.batch:
        raise UserError(f"batch {config.batch} does not divide over {accelerator.num_processes} processes", "change --batch")
    step = start
    try:
        for step, batch_BL in enumerate(training_batches(tokens, config.batch, config.length, config.seed, start), start):
            if step >= config.steps:
                break
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            total = torch.zeros(())
            for micro_BL in batch_BL.split(share * accelerator.num_processes):
                mine_BL = micro_BL[accelerator.process_index * share :][:share].to(accelerator.device)
                with accelerator.autocast():
                    loss = token_loss(wrapped, mine_BL) / config.accumulate
                accelerator.backward(loss)
                total += loss.detach().cpu()
            accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean = accelerator.gather(total.to(accelerator.device)).mean().item()
            if not math.isfinite(mean):
                raise UserError(f"the loss became {mean} at step {step}", "lower --learning-rate, then --resume")
            seconds = time.perf_counter() - began
            yield {"step": step, "loss": mean, "rate": learning_rate(config, step),
                   "tokens_per_second": config.batch * config.length / seconds}
            if (step + 1) % config.save_every == 0 and accelerator.is_main_process:
                _save(accelerator.unwrap_model(wrapped), optimizer, config, out, step + 1)
    except (KeyboardInterrupt, GeneratorExit):
        if accelerator.is_main_process:
            _save(accelerator.unwrap_model(wrapped), optimizer, config, out, step)
        raise
    if accelerator.is_main_process:
        _save(accelerator.unwrap_model(wrapped), optimizer, config, out, config.steps)


def _save(model: Any, optimizer: Any, config: TrainConfig, out: Path, step: int) -> None:
    storage.make_directory(out)
    storage.write_tensors(out / "trainer.safetensors", dict(model.named_parameters()))
    with storage.writing(out / "optimizer.pt") as temporary:
        torch.save(optimizer.state_dict(), temporary)
    storage.write_json(out / "trainer.json", {"step": step, "config": asdict(config)})


def _restore(model: Any, optimizer: Any, config: TrainConfig, out: Path) -> int:
    from safetensors.torch import load_file

    stored = json.loads((out / "trainer.json").read_text(encoding="utf-8"))
    if stored["config"] != asdict(config):
        raise UserError(f"the run in {out} has another configuration", "repeat its options, or choose another --out")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(out / "trainer.safetensors").items():
            parameters[name].copy_(tensor)
    optimizer.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    return int(stored["step"])
