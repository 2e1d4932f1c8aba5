"""The fused decode step on int8 states: the single ops' bits, and generation with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.kernels import native
from mambacompress.kernels.int8_state import Int8State, quantize_state
from mambacompress.kernels.mixer_step import BlockState, S6Block, SSDBlock, mixer_step, mixer_step_reference
from mambacompress.models.families import adopt
from mambacompress.models.lm import Decoder, LanguageModel, generate
from mambacompress.models.mixers import ScanQuantizer
from tests.kernels.scans import threads
from tests.kernels.test_mixer_step import KINDS, fused_ran, pack, s6_block, ssd_block, states_of

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not())


def int8_states(blocks: list[S6Block | SSDBlock], batch: int) -> list[BlockState]:
    return [BlockState(state.conv, quantize_state(state.ssm, torch.arange(batch) * 7))  # type: ignore[arg-type]
            for state in states_of(blocks, batch)]


def flat(states: list[Any]) -> list[Tensor]:
    return [t for state in states for t in (state.conv, *state.ssm)]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("batch", [1, 2, 8])
@torch.no_grad()
def test_blocks_bit_for_bit(level: str, batch: int) -> None:
    blocks: list[S6Block | SSDBlock] = [
        s6_block("int8"), ssd_block("int8"), s6_block("int4-g32", bias=True, normed=True, scaled=True),
        s6_block("int8", groups=3, N=4), s6_block("int8", E=96, N=16, rotated=True), ssd_block("int8", groups=3, N=32),
        ssd_block("int8", groups=1, N=16, P=13, limit=(0.05, 0.4))]
    h, states = torch.randn(batch, 40), int8_states(blocks, batch)
    h_ref, states_ref = h.clone(), states
    for _ in range(3):
        before = [t.clone() for t in flat(states)]
        new_h, new = mixer_step(h, blocks, states)
        assert all(torch.equal(a, b) for a, b in zip(flat(states), before, strict=True))
        h_ref, states_ref = mixer_step_reference(h_ref, blocks, states_ref)
        h, states = new_h, new
        assert torch.isfinite(h).all()
        assert torch.equal(h, h_ref)
        assert same(states, states_ref)


@torch.no_grad()
def test_two_threads_give_the_same_bits() -> None:
    blocks: list[S6Block | SSDBlock] = [s6_block("int8", D=384, E=768, N=16, R=16),
                                        ssd_block("int8", D=384, H=12, P=64, N=32)]
    for batch in (1, 3):
        h, states = torch.randn(batch, 384), int8_states(blocks, batch)
        y, new = mixer_step(h, blocks, states)
        for count in (2, 3):
            with threads(count):
                other, new_other = mixer_step(h, blocks, states)
            assert torch.equal(y, other)
            assert same(new, new_other)


@torch.no_grad()
def test_a_nan_stays_in_its_row() -> None:
    blocks: list[S6Block | SSDBlock] = [s6_block("int8"), ssd_block("int8")]
    h, states = torch.randn(3, 40), int8_states(blocks, 3)
    want, want_states = mixer_step(h, blocks, states)
    h[1, 7] = float("nan")
    got, got_states = mixer_step(h, blocks, states)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(flat(got_states), flat(want_states), strict=True))
    assert got_states[0].ssm[1][1].isnan().all()


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_lm(make_host: Callable[..., Any]) -> Callable[..., LanguageModel]:
    """make_lm(kind, form) -> a random packed model."""

    def make(kind: str, form: str = "int8") -> LanguageModel:
        lm = LanguageModel(adopt(make_host(kind, use_bias=True)))
        lm.model_map.host.requires_grad_(False)
        pack(lm, form)
        return lm

    return make


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_decoder_gives_the_bits_of_single_ops(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    """Several tokens at once from an int8 state run in single ops, rounded at each."""
    lm = make_lm(kind)
    for batch in (1, 3):
        ids = torch.randint(1, 97, (batch, 16))
        _, states = lm.prefill(ids[:, :6])
        kept = [state.ssm.clone() for state in states if isinstance(state.ssm, Tensor)]
        begun = [state.int8() for state in states]
        want, want_states = lm.prefill(ids[:, 6:], states=begun)
        decoder, stepped, outputs = Decoder(lm, states, "int8"), begun, []
        for t in range(6, 16):
            outputs.append(decoder.step(ids[:, t]))
            logits, stepped = lm.step(ids[:, t], stepped)
            assert torch.equal(logits, outputs[-1])
        assert fused_ran(lm, states)
        assert torch.equal(torch.stack(outputs, 1), want)
        assert same(decoder.states, want_states)
        assert same(stepped, want_states)
        assert all(torch.equal(state.ssm, copy) for state, copy in zip(states, kept, strict=True))  # type: ignore[arg-type]


@torch.no_grad()
def test_an_int8_scan_from_int8_states(make_lm: Callable[..., LanguageModel]) -> None:
    lm, ids = make_lm("mamba"), torch.randint(1, 97, (2, 10))
    for block in lm.model_map.blocks:
        path = block.mixer.scans()[0]  # type: ignore[operator]
        path.scan_quantizer = ScanQuantizer(64, 1, 8)
        for name in ScanQuantizer.NAMES:
            path.scan_quantizer.get_buffer(f"scale_{name}").fill_(0.03)
    _, states = lm.prefill(ids[:, :4])
    begun = [state.int8() for state in states]
    want, _ = lm.prefill(ids[:, 4:], states=begun)  # in single ops
    decoder = Decoder(lm, states, "int8")
    assert torch.equal(torch.stack([decoder.step(ids[:, t]) for t in range(4, 10)], 1), want)
    assert fused_ran(lm, states)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_generation_and_what_its_states_take(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm, ids = make_lm(kind), torch.randint(1, 97, (3, 5))
    together = generate(lm, ids, 12, state="int8", eos_token_id=[])
    assert torch.equal(together, generate(lm, ids, 12, state="int8", eos_token_id=[]))
    assert torch.equal(together[1:2], generate(lm, ids[1:2], 12, state="int8", eos_token_id=[]))
    _, states = lm.prefill(ids)
    for state in states:
        rounded, elements = state.int8(), state.ssm.numel()  # type: ignore[union-attr]
        assert isinstance(rounded.ssm, Int8State)
        assert rounded.int8() is rounded
        assert state.bytes - rounded.bytes == 4 * elements - (elements + 4 * elements // 8 + 8 * 3)
    with pytest.raises(UserError, match="state format is 'int4'"):
        generate(lm, ids, 1, state="int4")


@torch.no_grad()
def test_packed_sequences_are_refused(make_lm: Callable[..., LanguageModel]) -> None:
    for kind in ("mamba", "mamba2"):
        lm, ids = make_lm(kind), torch.randint(1, 97, (1, 5))
        _, states = lm.prefill(ids)
        with pytest.raises(ValueError, match="packed sequences"):
            lm.prefill(ids, states=[state.int8() for state in states], seq_idx=torch.zeros_like(ids))
