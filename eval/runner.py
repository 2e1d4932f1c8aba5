"""Measure models: the one function behind ``mambacompress evaluate``.

The baseline stays in memory, the others come one after another. On every text a model is read once, beside the
baseline, which gives perplexity, KL divergence and agreement together. What cannot be measured is skipped with the
reason in the report; what the user got wrong (an unknown task, an empty text) stops before any model is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.eval import agreement as agree
from mambacompress.eval import environment, perplexity, schema, stats
from mambacompress.eval import size as sizes
from mambacompress.eval import speed as speeds
from mambacompress.eval import tasks as questions
from mambacompress.eval.report import Report
from mambacompress.eval.windows import Windows, make_windows, tokens_of

Texts = Mapping[str, str | Sequence[str] | Tensor]


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    name: its row in the report. loader: called when it is this model's turn, returns (model, tokenizer), a
    transformers-style causal LM in eval mode. path: its directory, for the bytes and for a fresh process; without one
    these are reported as not measured. description: a line for the report, such as the recipe.
    """

    name: str
    loader: Callable[[], tuple[Any, Any]]
    path: Path | None = None
    description: str = ""


@dataclass(frozen=True)
class Settings:
    """How to measure. See ``evaluate``."""

    context: int = 512
    stride: int | None = None
    windows: int | None = None
    batch: int | None = None
    limit: int | None = None
    seed: int = 0
    data: str | Path | None = None
    agreement: bool = True
    speed: bool = True
    prompt: int = 512
    steps: int = 32
    repeats: int = 5


class _Bar:
    """Called with the steps done; ``expect`` states how many there will be. Draws nothing without rich bars."""

    def __init__(self, bars: Any, task: Any) -> None:
        self.bars, self.task = bars, task

    def __call__(self, count: int) -> None:
        if self.bars is not None:
            self.bars.advance(self.task, count)

    def expect(self, total: int) -> None:
        if self.bars is not None:
            self.bars.update(self.task, total=total)


@dataclass(frozen=True)
class _Progress:
    """Rich bars, or nothing."""

    bars: Any = None

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[_Bar]:
        if self.bars is None:
            yield _Bar(None, None)
            return
        task = self.bars.add_task(title, total=total)
        try:
            yield _Bar(self.bars, task)
        finally:
            self.bars.remove_task(task)


def evaluate(
    models: Sequence[Candidate],
    baseline: Candidate | None = None,
    texts: Texts | None = None,
    tasks: Sequence[str] = (),
    *,
    title: str = "Accuracy and size",
    progress: bool = False,
    **settings: Any,
) -> Report:
    """Measure ``models`` (and ``baseline``, which the changes refer to) and return the report.

    texts: name -> a text, documents, or int64 token ids [n]. tasks: local tasks or any task of lm-eval.
    settings: context, stride (context where None), windows (the first so many), batch (windows a call), limit
    (questions a task), seed, data (directory of the local tasks), agreement (KL and top-1 against the baseline),
    speed, prompt, steps, repeats (of the speed test). progress: draw rich bars on stderr.

    Raises UserError for no model, two of one name, an unknown task, an empty or too short text.
    """
    chosen = Settings(**settings)
    everyone = [
        *([baseline] if baseline else []),
        *(m for m in models if baseline is None or m.name != baseline.name),
    ]
    _check(everyone, texts or {}, tasks, chosen)
    with _bars(progress) as bars:
        rows = list(_rows(everyone, baseline, texts or {}, tasks, chosen, _Progress(bars)))
    notes = [
        "Standard errors of perplexity take windows as independent; those of changes are paired, window by window and "
        "question by question."
    ]
    report = Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        title=title,
        baseline=baseline.name if baseline else None,
        models=rows,
        notes=notes,
    )
    return report.compared() if baseline else report


def _check(everyone: list[Candidate], texts: Texts, tasks: Sequence[str], chosen: Settings) -> None:
    if not everyone:
        raise UserError("no model was named", "name a model directory, an artifact or `demo`")
    names = [candidate.name for candidate in everyone]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two models are both called {twice[0]!r}", "give each its own name")
    if chosen.limit is not None and chosen.limit < 1:
        raise UserError(f"a limit of {chosen.limit} asks no question", "choose at least 1, or leave it out for all")
    for name, text in texts.items():
        if not isinstance(text, Tensor) and not any(
            part.strip() for part in ([text] if isinstance(text, str) else text)
        ):
            raise UserError(f"the evaluation text {name!r} is empty", "give a text file that holds text with --text")
    make_windows(torch.zeros(2, dtype=torch.int64), chosen.context, chosen.stride, chosen.windows)
    if tasks:
        questions.check(tasks, chosen.data)


def _rows(
    everyone: list[Candidate],
    baseline: Candidate | None,
    texts: Texts,
    tasks: Sequence[str],
    chosen: Settings,
    progress: _Progress,
) -> Iterator[schema.ModelResult]:
    reference: _Reference | None = None
    for candidate in everyone:
        # A fresh process imports its libraries while this one reads: by the time it measures, it only measures.
        with _speed_process(candidate, chosen) as process:
            with progress.task(f"{candidate.name}: load"):
                model, tokenizer = candidate.loader()
            windows = {}
            for name, text in texts.items():
                windows[name] = make_windows(
                    tokens_of(tokenizer, text, name), chosen.context, chosen.stride, chosen.windows
                )
            row = schema.ModelResult(
                name=candidate.name,
                description=candidate.description,
                hardware=environment.hardware(next(model.parameters()).device),
                versions=environment.versions(),
                seeds={"tasks": chosen.seed, "speed": chosen.seed},
                dtype=_dtypes(model),
            )
            _size(row, candidate)
            if baseline is not None and candidate.name == baseline.name:
                reference = _Reference(model, windows, row)
                if not chosen.agreement or len(everyone) == 1:
                    reference.finish(chosen, progress)
            else:
                for name, cut in windows.items():
                    _text(row, name, cut, model, reference if chosen.agreement else None, chosen, progress)
            if not texts:
                row.not_measured.append("perplexity, KL divergence and agreement: no text was given")
            for task in tasks:
                _task(row, task, model, tokenizer, chosen, progress)
            if not tasks:
                row.not_measured.append("task accuracy: no task was named")
            if chosen.speed:
                with progress.task(f"{candidate.name}: speed"):
                    _speed(row, process, model, chosen)
            else:
                row.not_measured.append("speed and peak memory: not asked for")
        row.backend = row.speed.backend if row.speed and candidate.path else environment.backend()
        del model, tokenizer
        if candidate is not baseline and candidate is not everyone[-1]:  # its memory is for the next one
            gc.collect()
        yield row
    if reference is not None:
        reference.finish(chosen, progress)


@dataclass
class _Reference:
    """The baseline: what it loses on a text comes with the first comparison on the same tokens, or at the end."""

    model: Any
    windows: dict[str, Windows]
    row: schema.ModelResult
    losses: dict[str, list[float]] = field(default_factory=dict)

    def finish(self, chosen: Settings, progress: _Progress) -> None:
        """Fill in its own row."""
        for name, cut in self.windows.items():
            if name not in self.losses:
                with progress.task(f"{self.row.name}: {name}", len(cut.spans)) as advance:
                    self.losses[name] = perplexity.window_losses(self.model, cut, batch=chosen.batch, advance=advance)
        self.row.texts = [_text_result(name, cut, self.losses[name]) for name, cut in self.windows.items()]


def _size(row: schema.ModelResult, candidate: Candidate) -> None:
    if candidate.path is None:
        row.not_measured.append("size: the model is not in a directory")
        return
    try:
        row.size = sizes.measure(candidate.path)
    except UserError as error:
        row.not_measured.append(f"size: {error.message}")


def _text(
    row: schema.ModelResult,
    name: str,
    windows: Windows,
    model: Any,
    against: _Reference | None,
    chosen: Settings,
    progress: _Progress,
) -> None:
    pair = against is not None and against.windows[name].fingerprint == windows.fingerprint
    if against is not None and not pair:
        row.not_measured.append(f"KL divergence on {name}: the baseline's tokenizer gives other tokens")
    with progress.task(f"{row.name}: {name}", len(windows.spans)) as advance:
        if pair and against is not None:
            found = agree.compare(model, against.model, windows, batch=chosen.batch, advance=advance)
            losses = found.losses
            against.losses.setdefault(name, found.baseline_losses)
            row.agreement.append(_agreement_result(name, windows, found))
        else:
            losses = perplexity.window_losses(model, windows, batch=chosen.batch, advance=advance)
    row.texts.append(_text_result(name, windows, losses))


def _agreement_result(name: str, windows: Windows, found: agree.Agreement) -> schema.AgreementResult:
    kl, same = stats.ratio_mean(found.kl, windows.counts), stats.ratio_mean(found.same, windows.counts)
    middle, ninety, tail, largest = found.quantiles
    return schema.AgreementResult(
        text=name,
        context=windows.context,
        tokens=sum(windows.counts),
        kl=kl.value,
        kl_se=kl.se,
        kl_median=middle,
        kl_90=ninety,
        kl_99=tail,
        kl_max=largest,
        top1=same.value,
        top1_se=same.se,
        fingerprint=windows.fingerprint,
    )


def _text_result(name: str, windows: Windows, losses: list[float]) -> schema.TextResult:
    value = stats.perplexity(losses, windows.counts)
    return schema.TextResult(
        text=name,
        context=windows.context,
        stride=windows.stride,
        windows=len(windows.spans),
        tokens=sum(windows.counts),
        perplexity=value.value,
        se=value.se,
        window_nll=losses,
        window_tokens=windows.counts,
        fingerprint=windows.fingerprint,
    )


def _task(
    row: schema.ModelResult, name: str, model: Any, tokenizer: Any, chosen: Settings, progress: _Progress
) -> None:
    with progress.task(f"{row.name}: {name}") as bar:
        found = questions.run_task(
            model,
            tokenizer,
            name,
            data=chosen.data,
            limit=chosen.limit,
            seed=chosen.seed,
            advance=bar,
            expect=bar.expect,
        )
    for result in found:
        value = (
            stats.perplexity([-x for x in result.values], [1] * len(result.values))
            if result.metric == "perplexity"
            else stats.mean(result.values)
        )
        row.tasks.append(
            schema.TaskResult(
                task=result.task,
                metric=result.metric,
                n=len(result.values),
                shots=result.shots,
                ctx=result.ctx,
                cut=result.cut,
                value=value.value,
                se=value.se,
                chance=result.chance,
                values=result.values,
                fingerprint=result.fingerprint,
            )
        )


def _speed_options(chosen: Settings) -> dict[str, Any]:
    return {"prompt": chosen.prompt, "steps": chosen.steps, "repeats": chosen.repeats, "seed": chosen.seed}


@contextmanager
def _speed_process(candidate: Candidate, chosen: Settings) -> Iterator[speeds.FreshProcess | None]:
    """A process that waits to measure this model; None where it is in no directory, or speed was not asked for."""
    if not chosen.speed or candidate.path is None:
        yield None
        return
    with speeds.FreshProcess(candidate.path, **_speed_options(chosen)) as process:
        yield process


def _speed(row: schema.ModelResult, process: speeds.FreshProcess | None, model: Any, chosen: Settings) -> None:
    row.speed = found = process.measure() if process else speeds.measure(model, **_speed_options(chosen))
    if found.note:
        row.not_measured.append(found.note)


def _dtypes(model: Any) -> str:
    """The parameters' and buffers' dtypes by bytes, largest first."""
    seen: dict[int, Tensor] = {tensor.data_ptr(): tensor for tensor in model.state_dict(keep_vars=True).values()}
    totals: dict[str, int] = {}
    for tensor in seen.values():
        name = str(tensor.dtype).removeprefix("torch.")
        totals[name] = totals.get(name, 0) + tensor.nbytes
    whole = sum(totals.values()) or 1
    return ", ".join(f"{name} {size / whole:.0%}" for name, size in sorted(totals.items(), key=lambda pair: -pair[1]))


@contextmanager
def _bars(wanted: bool) -> Iterator[Any]:
    if not wanted:
        yield None
        return
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    ) as bars:
        yield bars
