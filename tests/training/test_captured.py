"""Training from fixed buffers: the same losses and weights as single ops. (A real graph needs a GPU.)"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mambacompress as mc
from mambacompress.kernels import registry
from mambacompress.training import lm
from mambacompress.training.captured import Captured

STEPS, LENGTH = 8, 16


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What capturing does: some runs of warming up; a replay is the run again, on the same buffers."""
    run()
    run()
    return run


def refused(run: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def recipe(method: str) -> dict[str, Any]:
    training = {"method": method, "steps": STEPS, "warmup": 1, "batch": 2, "length": LENGTH, "learning_rate": 1e-2}
    return {"name": method, "training": training, "passes": [{"prune": {"keep": 2, "of": 4, "maps": ["in_proj"]}}]}


def trained(host: Any, method: str, out: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    tokens = torch.randint(1, 97, (600,), generator=torch.Generator().manual_seed(0))
    with mc.attach(host, recipe(method)) as session:
        rows = list(lm.train(host, tokens, session.training.run(), out, method=session))
    return [row["loss"] for row in rows], dict(host.state_dict())


def capturing(monkeypatch: pytest.MonkeyPatch, capture: Callable[..., Any]) -> None:
    """Let the trainer capture here too."""
    monkeypatch.setattr(lm, "can_replay", lambda device: True)
    monkeypatch.setattr(lm, "Captured", partial(Captured, capture=capture))


@pytest.mark.parametrize("method", ["dense", "sr-ste", "mdgf-linear", "sdgf-stepwise", "cast"])
def test_replays_are_steps(tiny_mamba: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy.deepcopy(tiny_mamba)
    losses, weights = trained(tiny_mamba, method, tmp_path / "single")
    capturing(monkeypatch, recorded)
    with registry.recording() as record:
        replayed, theirs = trained(copied, method, tmp_path / "replayed")
    assert any(choice.op == "training step" and choice.backend == "CUDA graph" for choice in record)
    assert replayed == losses
    assert all(torch.equal(theirs[name], weight) for name, weight in weights.items())


def test_a_step_that_cannot_be_captured_is_taken_all_the_same(tiny_mamba: Any, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy.deepcopy(tiny_mamba)
    losses, _ = trained(tiny_mamba, "sr-ste", tmp_path / "single")
    capturing(monkeypatch, refused)
    with registry.recording() as record:
        assert trained(copied, "sr-ste", tmp_path / "refused")[0] == losses
    assert [c.reason for c in record if c.op == "training step"] == ["operation not permitted when stream is capturing"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["dense", "sr-ste", "mdgf-linear", "sdgf-stepwise", "cast"])
def test_graphs_are_steps_on_a_gpu(tiny_mamba: Any, method: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy.deepcopy(tiny_mamba)
    with registry.recording() as record:
        replayed, theirs = trained(tiny_mamba, method, tmp_path / "replayed")
    assert any(choice.op == "training step" and choice.backend == "CUDA graph" for choice in record)
    monkeypatch.setattr(lm, "can_replay", lambda device: False)
    losses, weights = trained(copied, method, tmp_path / "single")
    assert replayed == pytest.approx(losses, rel=1e-3)
    assert all(torch.allclose(theirs[name], weight, atol=1e-2) for name, weight in weights.items())
