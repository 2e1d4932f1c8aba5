"""The fused prefill: the bits of single steps for every format, level, chunk and thread count; what it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int8_state import quantize_state
from mambacompress.kernels.mixer_prefill import check, mixer_prefill, mixer_prefill_reference
from mambacompress.kernels.mixer_step import BlockState, S6Block, SSDBlock
from mambacompress.kernels.tolerances import rms_ratio
from mambacompress.models.families import adopt
from mambacompress.models.lm import LanguageModel
from mambacompress.models.mixers import ScanQuantizer
from tests.kernels.scans import threads
from tests.kernels.test_mixer_step import FORMATS, KINDS, SPARSE, pack, s6_block, ssd_block, states_of

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not())

CHUNK = 192  # rows, in cpu.cpp


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = [(x, y) for s, t in zip(a, b, strict=True) for x, y in ((s.conv, t.conv), (s.ssm, t.ssm))]
    return all(torch.equal(x, y) for x, y in pairs)


def same_bits(blocks: list[S6Block | SSDBlock], batch: int, length: int,
              states: list[BlockState] | None = None) -> None:
    h = torch.randn(batch, length, len(blocks[0].norm))  # type: ignore[arg-type]
    given = h.clone()
    y, new = mixer_prefill(h, blocks, states)
    assert torch.equal(h, given), "the input was changed"
    y_ref, new_ref = mixer_prefill_reference(h, blocks, states)
    assert torch.isfinite(y).all()
    assert torch.equal(y, y_ref)
    assert same(new, new_ref)


@pytest.mark.parametrize("form", [*FORMATS, *SPARSE])
@torch.no_grad()
def test_packed_blocks_bit_for_bit(level: str, form: str) -> None:
    blocks = [s6_block(form), ssd_block(form), s6_block(form, bias=True, normed=True, scaled=True)]
    for batch, length in ((1, 1), (3, 2), (2, 37)):
        same_bits(blocks, batch, length)
        same_bits(blocks, batch, length, states_of(blocks, batch))


@pytest.mark.parametrize("form", ["int8", "int4-g32"])
@torch.no_grad()
def test_rotations_groups_limits_and_widths(level: str, form: str) -> None:
    same_bits([s6_block(form, rotated=True), s6_block(form, groups=3, N=4), s6_block(form, K=2, N=16, scaled=True),
               s6_block(form, groups=2, scan8=True), s6_block(form, normed=True, scan8=True),
               ssd_block(form, rotated=True, bias=True), ssd_block(form, groups=1, N=16, P=13, limit=(0.05, 0.4)),
               ssd_block(form, groups=3, N=32, K=3)], 2, 21)


@pytest.mark.parametrize("sizes", [{"D": 128, "E": 256, "N": 16, "R": 8}, {"D": 130, "E": 266, "N": 17, "R": 130}])
@torch.no_grad()
def test_wide_blocks(level: str, sizes: dict[str, int]) -> None:
    blocks = [s6_block("int8", **sizes), ssd_block("int8", D=sizes["D"], H=4, P=64, N=128)]
    same_bits(blocks, 1, 50)


@pytest.mark.parametrize(("batch", "length"), [(1, 2 * CHUNK + 5), (3, CHUNK - 50), (50, 9)])
@torch.no_grad()
def test_chunks_that_end_inside_a_sequence_and_hold_several(batch: int, length: int) -> None:
    blocks = [s6_block("int8"), ssd_block("int8")]
    same_bits(blocks, batch, length)
    same_bits(blocks, batch, length, states_of(blocks, batch))


@pytest.mark.parametrize("form", ["int8", "int4-g64", "w4a16"])
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits(form: str) -> None:
    blocks = [s6_block(form, D=384, E=768, N=16, R=16), ssd_block(form, D=384, H=12, P=64, N=32)]
    h = torch.randn(2, 130, 384)
    with threads(1):
        y, new = mixer_prefill(h, blocks)
    for count in (2, 3):
        with threads(count):
            y2, new2 = mixer_prefill(h, blocks)
        assert torch.equal(y, y2)
        assert same(new, new2)


@torch.no_grad()
def test_float_blocks(level: str) -> None:
    """fp32 matrices: sums in another order than of a single row."""
    blocks: list[S6Block | SSDBlock] = [s6_block("fp32", normed=True, rotated=True), ssd_block("fp32", bias=True)]
    h = torch.randn(2, 130, 40)
    (y, new), (y_ref, new_ref) = (op(h, blocks) for op in (mixer_prefill, mixer_prefill_reference))
    assert rms_ratio(y, y_ref) < 1e-5
    assert all(rms_ratio(a, b) < 1e-5 for n, r in zip(new, new_ref, strict=True) for a, b in zip(n, r, strict=True))


@torch.no_grad()
def test_a_state_lies_either_way() -> None:
    """Mamba-1's as [B, E, N] or as [B, N, E]."""
    blocks: list[S6Block | SSDBlock] = [s6_block("int8")]
    h, states = torch.randn(2, 7, 40), states_of(blocks, 2)
    turned = [BlockState(s.conv.transpose(1, 2).contiguous().transpose(1, 2),
                         s.ssm.transpose(1, 2).contiguous().transpose(1, 2)) for s in states]  # type: ignore[union-attr]
    (y, new), (y2, new2) = (mixer_prefill(h, blocks, given) for given in (states, turned))
    assert torch.equal(y, y2)
    assert same(new, new2)


@torch.no_grad()
def test_a_nan_stays_in_its_sequence() -> None:
    blocks = [s6_block("int8"), ssd_block("int4-g32")]
    h = torch.randn(3, 10, 40)
    want, _ = mixer_prefill(h, blocks)
    h[1, 4, 7] = float("nan")
    got, _ = mixer_prefill(h, blocks)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert torch.equal(got[1, :4], want[1, :4])
    assert got[1, 4:].isnan().all()


@torch.no_grad()
def test_what_it_lacks_runs_step_by_step() -> None:
    h = torch.randn(1, 4, 40)
    int8 = [BlockState(torch.zeros(1, 3, 72), quantize_state(torch.zeros(1, 72, 9)))]
    block = s6_block("fp32")
    in_proj = dataclasses.replace(block.in_proj, weight=block.in_proj.weight.bfloat16())
    half = dataclasses.replace(block, in_proj=in_proj)
    for block, states in ((half, None), (s6_block("int8"), int8)):
        y, _ = mixer_prefill(h, [block], states)
        assert y.shape == (1, 4, 40)
        with registry.strict(), pytest.raises(registry.KernelFallback):
            mixer_prefill(h, [block], states)


def test_doctor(level: str) -> None:
    error, tolerance = check()
    assert error <= tolerance
    assert "mixer_prefill" in {result.op for result in registry.check_all()}


# -- models ----------------------------------------------------------------------------------------------------------


def packed_lm(make_host: Callable[..., Any], kind: str, form: str = "int8") -> LanguageModel:
    lm = LanguageModel(adopt(make_host(kind, use_bias=True)))
    lm.model_map.host.requires_grad_(False)
    pack(lm, form)
    return lm


def unfused(lm: LanguageModel, ids_BL: Tensor, states: Any = None) -> tuple[Tensor, Any]:
    """In single ops: seq_idx of zeros keeps the fused prefill away."""
    return lm.prefill(ids_BL, states=states, seq_idx=torch.zeros_like(ids_BL))


@pytest.mark.parametrize("form", ["int8", "int8-static", "int4-g32", "w4a16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_models_bit_for_bit(make_host: Callable[..., Any], kind: str, form: str) -> None:
    lm = packed_lm(make_host, kind, form)
    ids = torch.randint(1, 97, (3, 40))
    (logits, states), (want, want_states) = lm.prefill(ids), unfused(lm, ids)
    assert torch.equal(logits, want)
    assert same(states, want_states)
    assert torch.equal(lm.prefill(ids, last_only=True)[0], want[:, -1:])
    first, between = lm.prefill(ids[:, :13])
    rest, last = lm.prefill(ids[:, 13:], states=between)
    assert torch.equal(torch.cat([first, rest], 1), want)
    assert same(last, want_states)


@torch.no_grad()
def test_int8_scans_bit_for_bit(make_host: Callable[..., Any]) -> None:
    """The fused paths round where the single ops make int8 tensors."""
    lm = packed_lm(make_host, "mamba")
    for block in lm.model_map.blocks:
        path = block.mixer.scans()[0]  # type: ignore[operator]
        path.scan_quantizer = ScanQuantizer(64, 1, 8)
        for name in ScanQuantizer.NAMES:
            path.scan_quantizer.get_buffer(f"scale_{name}").uniform_(0.01, 0.05)
    ids = torch.randint(1, 97, (2, 30))
    (logits, states), (want, want_states) = lm.prefill(ids), unfused(lm, ids)
    assert torch.equal(logits, want)
    assert same(states, want_states)


@torch.no_grad()
def test_an_edit_is_seen_and_a_hook_is_called(make_host: Callable[..., Any]) -> None:
    lm = packed_lm(make_host, "mamba")
    ids = torch.randint(1, 97, (1, 12))
    before, _ = lm.prefill(ids)
    mixer = lm.model_map.blocks[0].mixer
    mixer.scans()[0].A_log.add_(0.5)
    after, _ = lm.prefill(ids)
    assert torch.equal(after, unfused(lm, ids)[0])
    assert not torch.equal(after, before)
    called: list[int] = []
    handle = mixer.out_proj.register_forward_hook(lambda *_: called.append(1))
    hooked, _ = lm.prefill(ids)
    handle.remove()
    assert called
    assert torch.equal(hooked, after)


def test_gradients_and_masks_go_by_single_ops(make_host: Callable[..., Any]) -> None:
    lm = packed_lm(make_host, "mamba")
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        alone, _ = lm.prefill(ids[:1, 4:])
        masked, _ = lm.prefill(ids, mask)
    torch.testing.assert_close(masked[0, 4:], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lm.prefill(ids)[0].detach()[1], masked[1], rtol=1e-4, atol=1e-4)
