"""The race at one thread count: all contestants loaded, checked to be the same model, then round after round.

A round goes through the measures, and at each lets every contestant run once, in an order that moves on by one place a
round. What one of them cannot do it leaves out; one that fails is out from there on, with its reason.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mambacompress.bench.process import Process, WorkerFailed
from mambacompress.bench.runner import Contestant

MEASURES = ("prefill", "decode", "batch_decode")
_CHECKED = 16  # tokens of the prompts that all must agree on
_WARM_STEPS = 4
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """prompt: tokens of a prefill. steps: of a decode. batch: sequences of ``batch_decode``. rounds: counted ones."""

    prompt: int = 512
    steps: int = 64
    batch: int = 8
    rounds: int = 5
    seed: int = 0

    def tokens(self, measure: str) -> int:
        """How many tokens one run of a measure makes or reads."""
        return {"prefill": self.prompt, "decode": self.steps, "batch_decode": self.steps * self.batch}[measure]

    def work(self, contestants: int, thread_counts: int) -> int:
        """How many ticks a whole benchmark takes: loading and checking once each, then the rounds."""
        return thread_counts * contestants * (2 + len(MEASURES) * self.rounds)


@dataclass
class Lane:
    """A contestant in the race: its process and what is known of it so far."""

    contestant: Contestant
    process: Process
    vocabulary: int = 0
    prefills: bool = True
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    likeness: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {measure: [] for measure in MEASURES})

    def runs(self, measure: str) -> bool:
        return self.error is None and (measure != "prefill" or self.prefills)

    def document(self, settings: Settings) -> dict[str, Any]:
        """Everything measured, for the result's JSON; rates in tokens a second, a number a round."""
        rates = {
            measure: [settings.tokens(measure) / seconds for seconds in found]
            for measure, found in self.seconds.items()
            if found
        }
        return {
            **{key: value for key, value in self.contestant.to_dict().items() if key not in ("path", "likeness")},
            "error": self.error,
            "likeness": self.likeness,
            "memory": self.memory,
            "facts": self.facts,
            "rates": rates,
        }


def race(
    contestants: Sequence[Contestant], like: str | None, threads: int, settings: Settings, scratch: Path, tick: Tick
) -> dict[str, Any]:
    """Measure them at one thread count. like: the contestant whose logits the others must resemble.

    Returns {"threads", "contestants": [...]}; whoever could not run is there with its ``error``.
    """
    with ExitStack() as stack:
        lanes = []
        for contestant in contestants:
            tick(f"{contestant.name}: loading")
            lane = Lane(contestant, stack.enter_context(Process(threads)))
            with _at_its_own_risk(lane):
                _load(lane, threads, settings)
            lanes.append(lane)
        _compare(lanes, like, settings, scratch, tick)
        tasks = _tasks(settings, min((lane.vocabulary for lane in lanes if not lane.error), default=2))
        for number in range(settings.rounds):
            turn = number % len(lanes)
            for measure in MEASURES:
                for lane in lanes[turn:] + lanes[:turn]:
                    tick(f"{lane.contestant.name}: {measure.replace('_', ' ')}, round {number + 1}")
                    with _at_its_own_risk(lane):
                        if lane.runs(measure):
                            lane.seconds[measure].append(lane.process.ask("run", **tasks[measure])["seconds"])
        return {"threads": threads, "contestants": [lane.document(settings) for lane in lanes]}


@contextmanager
def _at_its_own_risk(lane: Lane) -> Iterator[None]:
    """Whoever fails inside is out, with the reason."""
    try:
        yield
    except WorkerFailed as failure:
        lane.error = str(failure)


def _load(lane: Lane, threads: int, settings: Settings) -> None:
    """Load and warm up: peak bytes of each stage, the batched decode apart."""
    contestant = lane.contestant
    loaded = lane.process.ask(
        "load",
        kind=contestant.kind,
        path=contestant.path,
        variant=contestant.variant,
        threads=threads,
        prompt=settings.prompt,
        batch=settings.batch,
    )
    lane.vocabulary, lane.prefills = loaded["vocabulary"], loaded["prefills"]
    lane.memory = loaded["memory"]
    tasks = _tasks(settings, lane.vocabulary)
    for measure in MEASURES:
        if lane.runs(measure):
            task = tasks[measure]
            if "steps" in task:
                task = {**task, "steps": min(task["steps"], _WARM_STEPS)}
            lane.memory[measure] = lane.process.ask("warm_up", **task)["memory"]
    lane.facts = lane.process.ask("facts")
    lane.memory |= {"held": lane.facts.pop("held"), "live_tensors": lane.facts.pop("live_bytes")}


def _tasks(settings: Settings, vocabulary: int) -> dict[str, dict[str, Any]]:
    """The ``run`` command of every measure, on random ids."""
    ids = np.random.default_rng(settings.seed).integers(1, vocabulary, size=max(settings.prompt, settings.batch))
    return {
        "prefill": {"what": "prefill", "ids": ids[: settings.prompt].tolist()},
        "decode": {"what": "decode", "ids": ids[:1].tolist(), "steps": settings.steps},
        "batch_decode": {"what": "decode", "ids": ids[: settings.batch].tolist(), "steps": settings.steps},
    }


def _compare(lanes: Sequence[Lane], like: str | None, settings: Settings, scratch: Path, tick: Tick) -> None:
    """All read the same prompts; whoever computes something else than ``like`` is out."""
    running = [lane for lane in lanes if not lane.error]
    running.sort(key=lambda lane: lane.contestant.name != like)
    smallest = min((lane.vocabulary for lane in running), default=2)
    size = (min(2, settings.batch), min(_CHECKED, settings.prompt))
    ids_BL = np.random.default_rng(settings.seed + 1).integers(1, smallest, size=size)
    file = scratch / "logits.npz"
    model: dict[str, np.ndarray] | None = None
    for lane in running:
        tick(f"{lane.contestant.name}: checking")
        with _at_its_own_risk(lane):
            lane.process.ask("logits", ids=ids_BL.tolist(), to=str(file))
        if lane.error:
            continue
        with np.load(file) as found:
            logits = dict(found)
        if lane.contestant.name == like:
            model = logits
        if like is not None and model is None:
            lane.error = f"there is nothing to compare it with, since {like} did not run"
        if model is not None:
            lane.likeness = _likeness(logits, model)
            if lane.likeness["cosine"] < lane.contestant.likeness:
                lane.error = (
                    f"it computes something else: the cosine of its logits with {like} is "
                    f"{lane.likeness['cosine']:.4f}, at least {lane.contestant.likeness} is expected"
                )


def _likeness(logits: dict[str, np.ndarray], model: dict[str, np.ndarray]) -> dict[str, float]:
    """The worst, over prompt and steps, of cosine, top-1 agreement and differences with the model's logits."""
    worst = {"cosine": 1.0, "top1": 1.0, "max_difference": 0.0, "rms_ratio": 0.0}
    for name, found in logits.items():
        got, wanted = found.astype(np.float64), model[name].astype(np.float64)
        difference = got - wanted
        norms = float(np.linalg.norm(got) * np.linalg.norm(wanted))
        cosine = float((got * wanted).sum()) / norms if norms > 0 and np.isfinite(norms) else 0.0
        worst = {
            "cosine": min(worst["cosine"], cosine),
            "top1": min(worst["top1"], float((got.argmax(-1) == wanted.argmax(-1)).mean())),
            "max_difference": max(worst["max_difference"], float(np.abs(difference).max())),
            "rms_ratio": max(worst["rms_ratio"], float(np.linalg.norm(difference) / np.linalg.norm(wanted))),
        }
    return worst


__all__ = ["MEASURES", "Lane", "Settings", "race"]
