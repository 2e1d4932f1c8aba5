"""Who takes part: the named models on our kernels, and the original on every peer that is there and can hold it."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mambacompress.bench.process import Process, WorkerFailed
from mambacompress.bench.race import Settings, race
from mambacompress.bench.runner import KINDS, Contestant, weight_bytes
from mambacompress.bench.summary import SCHEMA_VERSION, Result
from mambacompress.errors import UserError, did_you_mean

PEERS = tuple(kind for kind in KINDS if kind != "ours")
TITLES = {"openvino": "OpenVINO"}
_VARIANTS = {"fp32": ("packed", ""), "int8": ("packed-state8", " state8")}  # of an artifact, by its states
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class LineUp:
    """contestants in the table's order; reference: whom the ratios refer to; like: whose logits are the model's;
    left_out: {"name", "reason"} of peers that do not take part.
    """

    contestants: list[Contestant] = field(default_factory=list)
    reference: str | None = None
    like: str | None = None
    left_out: list[dict[str, str]] = field(default_factory=list)


def bench(
    models: Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    peers: Sequence[str] = PEERS,
    threads: Sequence[int] = (1,),
    states: Sequence[str] = ("fp32",),
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Measure prefill, decode and batched decode of ``models``, the original and its peers, taking turns.

    models: artifacts and float models. baseline: the original that the peers run; the one float model among ``models``
    where None. peers: of PEERS; ratios refer to the first one that takes part. threads: each count is a run of its
    own. states: fp32, int8 or both, the recurrent states that artifacts decode with: a contestant each. settings: see
    ``Settings``.

    A peer that is not installed, or cannot hold the model, is left out with its reason. Raises UserError for unknown
    peers and settings, for models that are not there, and for numbers below 1.
    """
    chosen = _settings(settings)
    _check(peers, threads, states)
    report = progress or (lambda stage, done, total: None)
    with tempfile.TemporaryDirectory(prefix="mambacompress-bench-") as folder:
        line_up = _line_up(models, baseline, peers, states, Path(folder), lambda stage: report(stage, 0, 1))
        total, done = chosen.work(len(line_up.contestants), len(threads)), 0

        def tick(stage: str) -> None:
            nonlocal done
            report(stage, done, total)
            done += 1

        runs = [race(line_up.contestants, line_up.like, count, chosen, Path(folder), tick) for count in threads]
    return Result(
        {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": asdict(chosen),
            "reference": _reference(line_up, runs),
            "like": line_up.like,
            "left_out": line_up.left_out,
            "runs": runs,
        }
    )


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(given: dict[str, Any]) -> Settings:
    known = [entry.name for entry in fields(Settings)]
    for key, value in given.items():
        if key not in known:
            raise UserError(f"there is no setting {key!r}{did_you_mean(key, known)}", f"settings: {', '.join(known)}")
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and key != "seed"):
            raise UserError(f"the setting {key} is {value!r}", "give a whole number, at least 1")
    return Settings(**given)


def _check(peers: Sequence[str], threads: Sequence[int], states: Sequence[str]) -> None:
    for peer in peers:
        if peer not in PEERS:
            raise UserError(f"there is no peer {peer!r}{did_you_mean(peer, PEERS)}", f"peers: {', '.join(PEERS)}")
    if not threads or min(threads) < 1 or len({*threads}) < len(threads):
        raise UserError(f"the thread counts are {list(threads)}", "give different whole numbers, each at least 1")
    if not states or len({*states}) < len(states):
        raise UserError(f"the states are {list(states)}", f"name some of {', '.join(_VARIANTS)}, each once")
    for state in states:
        if state not in _VARIANTS:
            raise UserError(f"there are no {state!r} states{did_you_mean(state, _VARIANTS)}",
                            f"states: {', '.join(_VARIANTS)}")


def _line_up(
    models: Sequence[str | Path],
    baseline: str | Path | None,
    peers: Sequence[str],
    states: Sequence[str],
    scratch: Path,
    tick: Callable[[str], None],
) -> LineUp:
    if not models and baseline is None:
        raise UserError("no model was named", "name a model directory or an artifact")
    named = [_place(model) for model in dict.fromkeys(map(str, (*models, *([] if baseline is None else [baseline]))))]
    packed = [path for path, is_packed in named if is_packed]
    originals = [path for path, is_packed in named if not is_packed]
    if baseline is not None and named[-1][1]:
        raise UserError(f"{baseline} is compressed", "name the original model with --baseline")
    original = _place(baseline)[0] if baseline is not None else (originals[0] if len(originals) == 1 else None)
    line_up = LineUp()
    for path in originals:
        for variant in ("fp32", "bf16"):
            line_up.contestants.append(_ours(f"{path.name} {variant}", path, variant))
    for path in packed:
        for state in states:
            variant, suffix = _VARIANTS[state]
            line_up.contestants.append(_ours(path.name + suffix, path, variant))
    if original is None:
        reason = "the original is not among the models" if not originals else "several float models are named"
        line_up.left_out += [{"name": peer, "reason": f"{reason}; say --baseline MODEL"} for peer in peers]
    else:
        line_up.like = f"{original.name} fp32"
        for peer in peers:
            _add_peer(line_up, peer, original, scratch, tick)
    names = [contestant.name for contestant in line_up.contestants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two models are called {twice!r}", "rename one of the directories")
    return line_up


def _place(model: str | Path) -> tuple[Path, bool]:
    """(directory, whether it is an artifact) of a model; raises UserError where there is none."""
    from mambacompress import api, artifact
    from mambacompress.models.families.checkpoint import open_checkpoint

    path = Path(api.resolve(model))
    if path.is_dir() and artifact.is_artifact(path):
        return path.resolve(), True
    directory = open_checkpoint(api.resolve(model)).directory
    if directory is None:
        raise UserError(f"{model} is not a directory", "save the model first")
    return directory if directory != path else path.resolve(), False


def _ours(name: str, path: Path, variant: str) -> Contestant:
    return Contestant(name, "ours", str(path), variant, weight_bytes(path), KINDS["ours"].variants[variant])


def _add_peer(line_up: LineUp, peer: str, original: Path, scratch: Path, tick: Callable[[str], None]) -> None:
    kind, title = KINDS[peer], TITLES.get(peer, peer)
    missing = [name for name in kind.needs if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install 'mambacompress[bench]'"
        line_up.left_out.append({"name": title, "reason": reason})
        return
    tick(f"{title}: preparing")
    folder = scratch / peer
    folder.mkdir()
    try:
        with Process(threads=cores()) as process:
            files = process.ask("prepare", kind=peer, model=str(original), folder=str(folder))["files"]
    except WorkerFailed as failure:
        line_up.left_out.append({"name": title, "reason": str(failure)})
        return
    line_up.contestants += [
        Contestant(f"{title} {variant}", peer, path, variant, weight_bytes(path), kind.variants[variant])
        for variant, path in files.items()
    ]


def _reference(line_up: LineUp, runs: Sequence[dict[str, Any]]) -> str | None:
    """The first peer's first contestant that was measured; without peers the first contestant."""
    measured = {row["name"] for run in runs for row in run["contestants"] if row["rates"]}
    ours = [contestant.name for contestant in line_up.contestants if contestant.kind == "ours"]
    rivals = [contestant.name for contestant in line_up.contestants if contestant.kind != "ours"]
    return next((name for name in (*rivals, *ours) if name in measured), None)


__all__ = ["PEERS", "LineUp", "bench", "cores"]
