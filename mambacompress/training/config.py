"""What a training run is: its numbers, the learning rate of every step, and how a user changes them. No torch.

Schedules, after the warm-up: cosine to ``final`` x peak; WSD (warm-up, stable, decay; Hu et al. 2024, MiniCPM):
constant, then linear to ``final`` over the last fifth; linear to ``final``; constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from mambacompress.errors import UserError, did_you_mean

SCHEDULES = ("cosine", "wsd", "linear", "constant")
PRECISIONS = ("fp32", "bf16", "auto")
KINDS = {int: "whole number", float: "number", str: "word"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run is. Raises UserError for values that cannot work.

    steps: optimizer steps. batch: sequences a step, over all processes and accumulations. length: tokens a sequence.
    learning_rate: the peak, reached after ``warmup`` steps; ``final``: what is left of it at the end. clip: the largest
    gradient norm. accumulate: micro-batches a step. precision: ``fp32``, ``bf16`` (refused where the hardware would
    only emulate it) or ``auto``: bf16 where the hardware computes it, else fp32. save_every: steps a checkpoint.
    tail_of: the schedule is that of a run of so many steps, and this run its end; 0: its own.
    """

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
    precision: str = "fp32"
    save_every: int = 500
    tail_of: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}{did_you_mean(value, known)}", f"choose {' or '.join(known)}")
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("warmup", 0), ("accumulate", 1),
                            ("save_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)} is no training run", f"make it at least {least}")
        for name, fits, allowed in (("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
                                    ("clip", 0 < self.clip < math.inf, "above 0"),
                                    ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
                                    ("final", 0 <= self.final <= 1, "a share between 0 and 1"),
                                    ("seed", 0 <= self.seed < 2**32, "a number from 0 to 2^32 - 1")):
            if not fits:
                raise UserError(f"{name} = {getattr(self, name)} is no training run", f"make it {allowed}")
        if self.tail_of and self.tail_of < self.steps:
            raise UserError(f"a run of {self.steps} steps is no end of one of {self.tail_of}", "shorten it")
        if self.warmup >= (self.tail_of or self.steps):
            raise UserError(f"a warm-up of {self.warmup} steps does not fit into a run of {self.steps}",
                            f"shorten it: --set warmup={self.steps // 10}")
        if self.batch % self.accumulate:
            raise UserError(f"a batch of {self.batch} does not divide into {self.accumulate} accumulations",
                            "change one of them")

    @property
    def tokens(self) -> int:
        """Tokens a step reads."""
        return self.batch * self.length


SETTINGS = get_type_hints(TrainConfig)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step ``step`` (from 0)."""
    total = config.tail_of or config.steps
    step += total - config.steps
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "wsd": min(1.0, (1 - done) / 0.2), "linear": 1 - done,
             "constant": 1.0}[config.schedule]
    return config.learning_rate * (config.final + (1 - config.final) * shape)


def overridden(config: TrainConfig, changes: Iterable[str] | Mapping[str, Any]) -> TrainConfig:
    """``config`` with ``changes``: ``["steps=500", ...]`` or ``{"steps": 500}``.

    Raises UserError for an unknown setting (with the nearest known one) and for a value of the wrong kind or size.
    """
    pairs = changes.items() if isinstance(changes, Mapping) else map(_pair, changes)
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key not in SETTINGS:
            raise UserError(f"there is no setting {key!r}{did_you_mean(key, SETTINGS)}",
                            f"settings: {', '.join(SETTINGS)}")
        found[key] = _value(key, value, f"--set {key}={getattr(config, key)}")
    return replace(config, **found)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r} is not of the form key=value", "write for example --set steps=500")
    return key.strip(), value.strip()


def _value(key: str, value: Any, example: str) -> Any:
    """``value`` as the setting's type; a string is read as one."""
    kind = SETTINGS[key]
    try:
        if isinstance(value, bool) or not isinstance(value, str | kind | (int if kind is float else kind)):
            raise ValueError
        return kind(value)
    except ValueError:
        raise UserError(f"the setting {key} is {value!r}, which is no {KINDS[kind]}",
                        f"write for example {example}") from None
