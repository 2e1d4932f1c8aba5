"""Decoding from fixed buffers: the same tokens as single steps. (A real graph needs a GPU: see the test marked so.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambacompress.kernels import registry
from mambacompress.models.families import adopt
from mambacompress.models.graph import GraphedStep, graphed, watched
from mambacompress.models.lm import LanguageModel, generate


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What capturing does to the buffers: some steps of warming up; a replay is the step again, on the same buffers."""
    run()
    run()
    return run


@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_replays_are_steps(make_host: Any, kind: str, state: str) -> None:
    lm = LanguageModel(adopt(make_host(kind)))
    ids_BL = torch.randint(1, 97, (2, 9))
    with torch.no_grad(), registry.backend("reference"):
        _, states = lm.prefill(ids_BL[:, :4])
        states = [s.int8() for s in states] if state == "int8" else states
        step = GraphedStep(lm.step, ids_BL[:, 4], states, recorded)
        for t in range(4, 9):
            want, states = lm.step(ids_BL[:, t], states)
            assert torch.equal(step(ids_BL[:, t]), want)
    for mine, theirs in zip(step.states, states, strict=True):
        for a, b in zip((mine.conv, *mine.ssm), (theirs.conv, *theirs.ssm), strict=True):
            assert torch.equal(a, b)


def test_results_are_not_overwritten_and_given_states_not_changed(tiny_mamba: Any) -> None:
    lm = LanguageModel(adopt(tiny_mamba))
    ids_B = torch.tensor([3, 5])
    with torch.no_grad():
        _, states = lm.prefill(ids_B[:, None])
        before = [state.ssm.clone() for state in states]
        step = GraphedStep(lm.step, ids_B, states, recorded)
        first = step(ids_B)
        kept = first.clone()
        step(ids_B + 1)
    assert torch.equal(first, kept)
    assert all(torch.equal(state.ssm, old) for state, old in zip(states, before, strict=True))


def test_what_a_replay_would_silence_is_named(tiny_mamba: Any) -> None:
    model = adopt(tiny_mamba)
    assert watched(model.host) == ""
    handle = model.host.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None)
    assert "hooks" in watched(model.host)
    handle.remove()
    model.host.backbone.layers[1].mixer.tap = lambda *_: None
    assert "tap" in watched(model.host)


def test_there_is_no_graph_on_a_processor(tiny_mamba: Any) -> None:
    assert graphed(lambda *_: (torch.empty(0), []), tiny_mamba, torch.tensor([1]), []) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_generate_replays_a_graph_on_a_gpu(make_host: Any, kind: str) -> None:
    host = make_host(kind).cuda()
    lm = LanguageModel(adopt(host))
    ids_BL = torch.randint(1, 97, (2, 9), device="cuda")
    with registry.recording() as record:
        made = generate(lm, ids_BL, 12, eos_token_id=[])
    assert any(choice.backend == "CUDA graph" for choice in record)
    with torch.no_grad():
        logits, states = lm.prefill(ids_BL)
        last = logits[:, -1].argmax(-1)
        for t in range(9, 21):
            assert torch.equal(made[:, t], last)
            logits, states = lm.step(last, states)
            last = logits.argmax(-1)
