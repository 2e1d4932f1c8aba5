"""Tasks through lm-eval, in this process, on the model as it is in memory.

Eleven tasks come as YAML in ``tasks/`` and read local files, no network; their questions keep lm-eval's wording. Any
other name is looked up among lm-eval's own, which fetches its data from the hub. Every answer is kept, so that two
models are compared question by question: the difference with its paired standard error, and the flips in each
direction.

Zero-shot, loglikelihood. ``perplexity`` (lambada, book_cloze) is of the last word given its context.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambacompress.errors import UserError, did_you_mean

TASKS = Path(__file__).parent / "tasks"
DATA_VARIABLE = "MAMBACOMPRESS_TASKS"
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1")


@dataclass(frozen=True)
class TaskResult:
    """One task and metric.

    values: per question (0 or 1 for accuracies, log-likelihood for perplexity), in question order. chance: of
    guessing, None where that has no meaning. ctx: tokens of the longest request; cut: requests that exceeded
    max_length.
    """

    task: str
    metric: str
    values: list[float]
    chance: float | None
    ctx: int
    cut: int
    shots: int
    fingerprint: str


def local_tasks() -> list[str]:
    """Names of the tasks that need no network."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def data_directory(data: str | Path | None) -> Path:
    """Where the local tasks' files lie: ``data``, or $MAMBACOMPRESS_TASKS; raises UserError where neither is a
    directory.
    """
    chosen = data or os.environ.get(DATA_VARIABLE)
    if not chosen:
        raise UserError("the tasks' data directory is not known", f"name it with --data DIR, or set {DATA_VARIABLE}")
    directory = Path(chosen).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"the tasks' data directory {directory} does not exist",
            "name the one that holds piqa_validation.jsonl.gz",
        )
    return directory


def check(names: Sequence[str], data: str | Path | None = None) -> None:
    """Raises UserError where a task cannot run, before any model is loaded."""
    with _lm_eval():
        local = [name for name in names if name in local_tasks()]
        if local:
            directory = data_directory(data)
            for name in local:
                file = _file_of(name)
                if not (directory / file).is_file():
                    raise UserError(
                        f"task {name!r} needs {file}, which is not in {directory}",
                        "name the directory that holds it with --data",
                    )
        others = [name for name in names if name not in local]
        if others:
            known = _manager(others[0], None, None, 0).all_tasks
            for name in others:
                if name not in known:
                    raise UserError(
                        f"there is no task {name!r}{did_you_mean(name, [*local_tasks(), *known])}",
                        f"choose from {', '.join(local_tasks())}, or any task of lm-eval",
                    )


def run_task(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 16,
    max_length: int = 2048,
    advance: Callable[[int], None] | None = None,
    expect: Callable[[int], None] | None = None,
) -> list[TaskResult]:
    """Ask one task (or lm-eval group); a result for every task and metric in it.

    advance is told the sequences read, expect how many there will be at most. limit: so many questions, drawn by
    ``seed`` (tasks of the hub: the first so many). Raises UserError where the task is not known or its data cannot be
    had.
    """
    local = name in local_tasks()
    with _lm_eval():
        from lm_eval import simple_evaluate

        from mambacompress.eval.harness import Scorer

        manager = _manager(name, data_directory(data) if local else None, limit, seed)
        scorer = Scorer(model, tokenizer, max_length=max_length, batch=batch, advance=advance, expect=expect)
        try:
            found = simple_evaluate(
                scorer,
                tasks=[name],
                task_manager=manager,
                limit=None if local else limit,
                num_fewshot=0 if local else None,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (ConnectionError, OSError) as error:
            raise UserError(
                f"the data of task {name!r} cannot be fetched: {error}",
                f"work online, or choose from the local tasks: {', '.join(local_tasks())}",
            ) from error
    results = []
    for task, samples in found["samples"].items():
        for metric in _metrics(samples, local):
            kept = [sample for sample in samples if metric in sample["metrics"]]
            results.append(
                TaskResult(
                    task,
                    metric,
                    [float(sample[metric]) for sample in kept],
                    _chance(metric, kept),
                    scorer.longest,
                    scorer.cut,
                    int(found["n-shot"].get(task) or 0),
                    _fingerprint(kept),
                )
            )
    return results


def questions(name: str, data: str | Path | None, limit: int | None) -> int | None:
    """How many questions a local task will ask, None for others: what a progress bar needs."""
    if name not in local_tasks():
        return None
    from mambacompress.eval.taskdata import read_rows

    total = len(read_rows(data_directory(data), _file_of(name)))
    return total if limit is None else min(limit, total)


def _file_of(name: str) -> str:
    for line in (TASKS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "file":
            return value
    raise ValueError(f"{name}.yaml names no file")


def _manager(name: str, data: Path | None, limit: int | None, seed: int) -> Any:
    if name in local_tasks():
        from lm_eval.tasks import TaskManager

        return TaskManager(
            include_path=str(TASKS),
            include_defaults=False,
            metadata={"data": str(data), "limit": limit, "seed": seed},
        )
    return _hub_manager()


@functools.cache
def _hub_manager() -> Any:
    """lm-eval's own tasks; reading their index takes seconds, so once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=True)


def _metrics(samples: list[dict[str, Any]], local: bool) -> list[str]:
    """A local task's own metrics (chosen in its YAML); of a hub task the one usually reported."""
    offered = [metric for metric in samples[0]["metrics"] if isinstance(samples[0][metric], int | float)]
    if local:
        return offered
    return next(([metric] for metric in _PREFERRED if metric in offered), offered[:1])


def _chance(metric: str, samples: list[dict[str, Any]]) -> float | None:
    """Accuracy of guessing among the choices, averaged over the questions; 0 for a free last word."""
    if not metric.startswith(("acc", "exact_match")):
        return None
    counts = [len(sample["arguments"]) for sample in samples]
    return sum(1 / count if count > 1 else 0.0 for count in counts) / len(counts)


def _fingerprint(samples: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update((sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"]).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lm_eval() -> Iterator[None]:
    """Quiet: lm-eval warns about models in memory and about the metadata both of which are meant, and draws its own
    bars.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("tasks need lm-eval, which is not installed", "pip install 'mambacompress[eval]'") from error
    names = ("lm_eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
