"""The fused decode step: the single ops' bits for every format, level and thread count; plans that notice changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacompress.kernels import native, registry
from mambacompress.kernels.mixer_step import (
    BlockState,
    Conv,
    Matrix,
    Rotation,
    S6Block,
    SSDBlock,
    check,
    mixer_step,
    mixer_step_reference,
)
from mambacompress.kernels.nm_linear import kept_values, pack_stream
from mambacompress.kernels.tolerances import rms_ratio
from mambacompress.models.families import adopt
from mambacompress.models.lm import Decoder, LanguageModel, generate
from mambacompress.models.mixers import MixerState
from mambacompress.models.packed import (
    ActivationFormat,
    OnlineHadamard,
    PackedEmbedding,
    PackedHead,
    PackedLinear,
    WeightFormat,
)
from mambacompress.nm import Pattern, nm_mask

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not())

KINDS = ["mamba", "mamba2", "falcon_mamba"]
FORMATS = {
    "int8": (WeightFormat(8), ActivationFormat("token")),
    "int8-static": (WeightFormat(8), ActivationFormat("tensor")),
    "int8-act4": (WeightFormat(8), ActivationFormat("token", 4)),
    "w8a16": (WeightFormat(8), ActivationFormat("none")),
    "int4-g32": (WeightFormat(4, 32), ActivationFormat("token")),
    "int4-g64": (WeightFormat(4, 64), ActivationFormat("token")),
    "int4-row": (WeightFormat(4), ActivationFormat("token")),
    "int4-zero": (WeightFormat(4, 16, symmetric=False), ActivationFormat("tensor")),
    "int4-g6": (WeightFormat(4, 6), ActivationFormat("token")),  # no whole number of bytes a quad: the plain loop
    "w4a16": (WeightFormat(4, 32), ActivationFormat("none")),
}


SPARSE = {
    "2of4": (Pattern(2, 4), ActivationFormat("token"), torch.int8),
    "1of8-static": (Pattern(1, 8), ActivationFormat("tensor"), torch.int8),
    "4of8": (Pattern(4, 8), ActivationFormat("token"), torch.int8),
    "1of4-w8a16": (Pattern(1, 4), ActivationFormat("none"), torch.int8),
    "2of4-fp16": (Pattern(2, 4), ActivationFormat("none"), torch.float16),
    "1of8-bf16": (Pattern(1, 8), ActivationFormat("none"), torch.bfloat16),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n) sets the number of threads; the old one returns."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- blocks of tensors -----------------------------------------------------------------------------------------------


def packed(outputs: int, inputs: int, form: str, bias: bool = False) -> Matrix:
    """A random matrix in that format; int8 rows where groups do not divide the inputs."""
    weight = torch.randn(outputs, inputs) / inputs**0.5
    bias_O = torch.randn(outputs) if bias else None
    if form == "fp32":
        return Matrix(weight, bias_O)
    if form in SPARSE:
        return sparse(weight, bias_O, form)
    weights, activations = FORMATS[form]
    if weights.bits == 4 and (inputs % 2 or inputs % (weights.group_size or 1)):
        weights = WeightFormat(8)
    linear = PackedLinear.from_float(weight, bias_O, weights=weights, activations=activations,
                                     act_scale=0.05 if activations.mode == "tensor" else None)
    return Matrix(linear.qweight, linear.bias, linear.scale, linear.zero, weights.group_size, activations.mode,
                  linear.act_scale, activations.bits)


def sparse(weight: Tensor, bias_O: Tensor | None, form: str) -> Matrix:
    """A random matrix of that pattern; dense int8 where groups do not divide the inputs."""
    pattern, activations, values = SPARSE[form]
    linear = PackedLinear.from_float(weight, bias_O, weights=WeightFormat(8), activations=activations,
                                     act_scale=0.05 if activations.mode == "tensor" else None)
    if weight.shape[1] % pattern.of:
        return Matrix(linear.qweight, linear.bias, linear.scale, None, None, activations.mode, linear.act_scale)
    mask = nm_mask(weight.abs(), pattern)
    kept = kept_values(linear.codes() if values == torch.int8 else weight.to(values), mask)
    return Matrix(pack_stream(kept, mask, pattern.keep, pattern.of), linear.bias,
                  linear.scale if values == torch.int8 else None, activation=activations.mode,
                  act_scale=linear.act_scale, pattern=(pattern.keep, pattern.of), shape=tuple(weight.shape))


def rotation(size: int, block: int) -> Rotation:
    return Rotation(torch.randint(0, 2, (size,), dtype=torch.int8) * 2 - 1, block)


def s6_block(form: str, *, D: int = 40, E: int = 72, N: int = 9, R: int = 5, K: int = 4, groups: int = 1,
             rotated: bool = False, scaled: bool = False, normed: bool = False, bias: bool = False,
             scan8: bool = False) -> S6Block:
    """A random Mamba-1 block of odd sizes."""
    scale = torch.rand(E) + 0.5 if scaled else None
    shapes = ((E,), (E,), (groups, N), (groups, N), (E,))
    u, dt, B, C, z = (torch.rand(shape) * 0.04 + 0.01 for shape in shapes)
    return S6Block(
        torch.rand(D) + 0.5, 1e-5, packed(2 * E, D, form, bias), Conv(torch.randn(E, K), torch.randn(E), scale),
        packed(R + 2 * groups * N, E, form), packed(E, R, form), -torch.rand(E, N) * 3, torch.randn(E),
        torch.randn(E) - 2, scale, packed(D, E, form, bias), groups=groups, inner_eps=1e-6 if normed else None,
        x_rotation=rotation(E, 8) if rotated else None, out_rotation=rotation(E, 24) if rotated else None,
        scan_scales=(u, dt, B, C, z) if scan8 else None)


def ssd_block(form: str, *, D: int = 40, H: int = 6, P: int = 12, N: int = 9, K: int = 4, groups: int = 2,
              rotated: bool = False, bias: bool = False, limit: tuple[float, float] = (0.0, float("inf"))) -> SSDBlock:
    """A random Mamba-2 block of odd sizes."""
    E, span = H * P, groups * N
    return SSDBlock(
        torch.rand(D) + 0.5, 1e-5, packed(2 * E + 2 * span + H, D, form, bias),
        Conv(torch.randn(E + 2 * span, K), torch.randn(E + 2 * span), None), -torch.rand(H) * 3, torch.randn(H),
        torch.randn(H) - 2, limit, torch.rand(E) + 0.5, 1e-5, packed(D, E, form, bias), states=N, groups=groups,
        out_rotation=rotation(E, 24) if rotated else None)


def states_of(blocks: list[S6Block | SSDBlock], batch: int) -> list[BlockState]:
    found = []
    for block in blocks:
        channels, width = block.conv.weight.shape
        if isinstance(block, S6Block):
            shape: tuple[int, ...] = tuple(block.A.shape)
        else:
            shape = (len(block.A), len(block.gated_norm) // len(block.A), block.states)
        found.append(BlockState(torch.randn(batch, width - 1, channels), torch.randn(batch, *shape)))
    return found


def same_bits(blocks: list[S6Block | SSDBlock], batch: int, steps: int = 3) -> None:
    """Several steps, fused and by the single ops run natively: the same residual and the same states."""
    h, states = torch.randn(batch, len(blocks[0].norm)), states_of(blocks, batch)  # type: ignore[arg-type]
    h_ref, states_ref = h.clone(), states
    for _ in range(steps):
        before = [BlockState(state.conv.clone(), state.ssm.clone()) for state in states]
        given = h.clone()
        new_h, new = mixer_step(h, blocks, states)
        assert torch.equal(h, given), "the input was changed"
        assert all(torch.equal(a, b) for s, t in zip(states, before, strict=True) for a, b in zip(s, t, strict=True))
        h_ref, states_ref = mixer_step_reference(h_ref, blocks, states_ref)
        h, states = new_h, new
        assert torch.isfinite(h).all()
        assert torch.equal(h, h_ref)
        for got, want in zip(states, states_ref, strict=True):
            assert torch.equal(got.conv, want.conv)
            assert torch.equal(got.ssm, want.ssm)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("form", [*FORMATS, *SPARSE])
@torch.no_grad()
def test_packed_blocks_bit_for_bit(level: str, form: str, batch: int) -> None:
    same_bits([s6_block(form), ssd_block(form), s6_block(form, bias=True, normed=True, scaled=True)], batch)


@pytest.mark.parametrize("form", ["int8", "int4-g32"])
@torch.no_grad()
def test_rotations_groups_limits_and_widths(level: str, form: str) -> None:
    s6 = [s6_block(form, rotated=True), s6_block(form, groups=3, N=4), s6_block(form, K=2, N=16, scaled=True),
          s6_block(form, groups=2, scan8=True), s6_block(form, normed=True, scan8=True)]
    ssd = [ssd_block(form, rotated=True, bias=True), ssd_block(form, groups=1, N=16, P=13, limit=(0.05, 0.4)),
           ssd_block(form, groups=3, N=32, K=3)]
    for batch in (1, 5):
        same_bits([*s6, *ssd], batch)


@pytest.mark.parametrize("sizes", [{"D": 128, "E": 256, "N": 16, "R": 8}, {"D": 130, "E": 266, "N": 17, "R": 130}])
@torch.no_grad()
def test_wide_blocks(level: str, sizes: dict[str, int]) -> None:
    """Wide enough for the row-at-a-time products of AVX-512, evenly and not."""
    for batch in (1, 2, 13):
        same_bits([s6_block("int8", **sizes), ssd_block("int8", D=sizes["D"], H=4, P=64, N=128)], batch, steps=2)


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_float_blocks(level: str, batch: int) -> None:
    """fp32 matrices: torch multiplies them in another order."""
    blocks: list[S6Block | SSDBlock] = [s6_block("fp32", normed=True, rotated=True), ssd_block("fp32", bias=True)]
    h, states = torch.randn(batch, 40), states_of(blocks, batch)
    (y, new), (y_ref, new_ref) = (op(h, blocks, states) for op in (mixer_step, mixer_step_reference))
    assert rms_ratio(y, y_ref) < 1e-5
    assert all(rms_ratio(a, b) < 1e-5 for n, r in zip(new, new_ref, strict=True) for a, b in zip(n, r, strict=True))


@pytest.mark.parametrize("form", ["fp32", "int8", "int4-g64", "w4a16"])
@torch.no_grad()
def test_two_threads_give_the_same_bits(threads: Callable[[int], None], form: str) -> None:
    blocks = [s6_block(form, D=384, E=768, N=16, R=16), ssd_block(form, D=384, H=12, P=64, N=32)]
    for batch in (1, 3, 8):
        h, states = torch.randn(batch, 384), states_of(blocks, batch)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(mixer_step(h, blocks, states))
        for (y, new), (y2, new2) in pairwise(results):
            assert torch.equal(y, y2)
            assert all(torch.equal(a, b) for n, r in zip(new, new2, strict=True) for a, b in zip(n, r, strict=True))


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others() -> None:
    blocks = [s6_block("int8"), ssd_block("int8")]
    h, states = torch.randn(6, 40), states_of(blocks, 6)
    together, _ = mixer_step(h, blocks, states)
    for row in range(6):
        alone, _ = mixer_step(h[row:row + 1], blocks, [BlockState(*(t[row:row + 1] for t in s)) for s in states])
        assert torch.equal(alone[0], together[row])


@torch.no_grad()
def test_a_nan_stays_in_its_row() -> None:
    blocks = [s6_block("int8"), ssd_block("int4-g32")]
    h, states = torch.randn(3, 40), states_of(blocks, 3)
    want, _ = mixer_step(h, blocks, states)
    h[1, 7] = float("nan")
    got, _ = mixer_step(h, blocks, states)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@torch.no_grad()
def test_what_the_native_step_lacks_runs_by_single_ops() -> None:
    block = s6_block("fp32")
    half = dataclasses.replace(block, D=block.D.double())
    states = states_of([block], 1)
    y, _ = mixer_step(torch.randn(1, 40), [half], states)
    assert y.shape == (1, 40)
    with registry.strict(), pytest.raises(registry.KernelFallback, match="not fp32"):
        mixer_step(torch.randn(1, 40), [half], states)


def test_doctor(level: str) -> None:
    error, tolerance = check()
    assert error <= tolerance
    assert "mixer_step" in {result.op for result in registry.check_all()}


# -- models ----------------------------------------------------------------------------------------------------------


def pack(lm: LanguageModel, form: str) -> None:
    """Every matrix of every block, the embedding and the head."""
    weights, activations = FORMATS[form]
    for block in lm.model_map.blocks:
        for path in block.matrices():
            linear = block.module.get_submodule(path)
            columns = linear.get_parameter("weight").shape[1]
            fits = weights.bits == 8 or columns % (weights.group_size or columns) == 0
            bias = linear.bias if isinstance(linear.bias, Tensor) else None
            block.replace(path, PackedLinear.from_float(
                linear.get_parameter("weight"), bias, weights=weights if fits else WeightFormat(8),
                activations=activations, act_scale=0.05 if activations.mode == "tensor" else None))
    embedding = PackedEmbedding.from_float(lm.model_map.embedding.weight, weights=WeightFormat(8))
    lm.model_map.host.backbone.embeddings = embedding
    lm.model_map.host.lm_head = PackedHead.sharing(embedding, activations=ActivationFormat("token"))


@pytest.fixture
def make_lm(make_host: Callable[..., Any]) -> Callable[..., LanguageModel]:
    """make_lm(kind, form) -> a random model, packed unless the format is None."""

    def make(kind: str, form: str | None = "int8", **overrides: Any) -> LanguageModel:
        lm = LanguageModel(adopt(make_host(kind, use_bias=True, **overrides)))
        lm.model_map.host.requires_grad_(False)
        if form is not None:
            pack(lm, form)
        return lm

    return make


def unfused(lm: LanguageModel, ids_BL: Tensor, states: list[MixerState] | None = None) -> tuple[Tensor, Any]:
    """Token by token, in single ops run natively: seq_idx of zeros keeps the fused step away."""
    outputs = []
    for ids_B1 in ids_BL.split(1, 1):
        logits, states = lm.prefill(ids_B1, states=states, seq_idx=torch.zeros_like(ids_B1))
        outputs.append(logits)
    return torch.cat(outputs, 1), states


def fused_ran(lm: LanguageModel, states: list[MixerState]) -> bool:
    """Whether a step of this model is fused now."""
    h = lm.model_map.embedding.module(torch.ones(len(states[0].conv), dtype=torch.int64))
    return lm.fused(h) is not None


@pytest.mark.parametrize("form", ["int8", "int8-static", "int4-g32", "w4a16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_after_a_prefill_bit_for_bit(make_lm: Callable[..., LanguageModel], kind: str, form: str) -> None:
    lm = make_lm(kind, form)
    for batch in (1, 3, 8):
        ids = torch.randint(1, 97, (batch, 20))
        want, _ = unfused(lm, ids)
        first, states = lm.prefill(ids[:, :5])
        outputs, decoder, loop = [first], Decoder(lm, states), [first]
        assert fused_ran(lm, states)
        kept = copy.deepcopy(states)
        for t in range(5, 20):
            loop.append(decoder.step(ids[:, t])[:, None])
            logits, states = lm.step(ids[:, t], states)
            outputs.append(logits[:, None])
        assert torch.equal(torch.cat(outputs, 1)[:, 5:], torch.cat(loop, 1)[:, 5:])
        assert torch.equal(torch.cat(outputs, 1), want)
        after, _ = lm.prefill(ids[:, 5:], states=kept)  # the states of the prefill are still what they were
        assert torch.equal(after, torch.cat(outputs, 1)[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_and_their_states_against_single_ops(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm, ids = make_lm(kind), torch.randint(1, 97, (2, 12))
    _, states = lm.prefill(ids[:, :4])
    want, want_states = unfused(lm, ids[:, 4:], states)
    outputs = []
    for t in range(4, 12):
        logits, states = lm.step(ids[:, t], states)
        outputs.append(logits)
    assert torch.equal(torch.stack(outputs, 1), want)
    for got, expected in zip(states, want_states, strict=True):
        assert torch.equal(got.conv, expected.conv)
        assert torch.equal(got.ssm, expected.ssm)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prefill_continues_from_fused_states(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm, ids = make_lm(kind), torch.randint(1, 97, (2, 12))
    _, states = lm.prefill(ids[:, :3])
    want_states = states
    for t in range(3, 6):
        _, states = lm.step(ids[:, t], states)
        _, want_states = unfused(lm, ids[:, t:t + 1], want_states)
    assert torch.equal(lm.prefill(ids[:, 6:], states=states)[0], lm.prefill(ids[:, 6:], states=want_states)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_float_models(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm, ids = make_lm(kind, None), torch.randint(1, 97, (2, 40))
    want, _ = lm.prefill(ids)
    first, states = lm.prefill(ids[:, :3])
    assert fused_ran(lm, states)
    outputs = [first]
    for t in range(3, 40):
        logits, states = lm.step(ids[:, t], states)
        outputs.append(logits[:, None])
    got = torch.cat(outputs, 1)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_generate_takes_the_fused_step(make_lm: Callable[..., LanguageModel], kind: str) -> None:
    lm, ids = make_lm(kind), torch.randint(1, 97, (2, 6))
    host = lm.model_map.host
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = host.generate(ids, **options)
    assert all(block.mixer.plans.get(block.mixer).block is not None for block in lm.model_map.blocks)
    assert torch.equal(theirs, generate(lm, ids, 8, eos_token_id=[]))
    first = host(ids, use_cache=True)
    cache, kept = first.cache_params, copy.deepcopy(first.cache_params)
    token = first.logits[:, -1:].argmax(-1)
    fused = host(token, use_cache=True, cache_params=cache)
    single = host(token, use_cache=True, attention_mask=torch.ones(2, 1), cache_params=kept)
    assert torch.equal(fused.logits, single.logits)
    for got, want in zip(cache.layers, kept.layers, strict=True):
        assert torch.equal(got.conv_states[0], want.conv_states[0])
        assert torch.equal(got.recurrent_states[0], want.recurrent_states[0])


# -- what keeps the fused step away, and what makes a plan stale -----------------------------------------------------


def first_mixer(lm: LanguageModel) -> Any:
    return lm.model_map.blocks[0].mixer


def set_tap(lm: LanguageModel) -> None:
    first_mixer(lm).tap = lambda name, value: None


def set_hook(lm: LanguageModel) -> None:
    first_mixer(lm).in_proj.register_forward_hook(lambda module, args, output: output * 2)


def set_norm_hook(lm: LanguageModel) -> None:
    lm.model_map.blocks[1].norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def set_forward(lm: LanguageModel) -> None:
    linear = first_mixer(lm).out_proj
    linear.forward = lambda x: type(linear).forward(linear, x) * 2


def set_module(lm: LanguageModel) -> None:
    first_mixer(lm).out_proj = nn.Sequential(first_mixer(lm).out_proj, nn.Tanh())


@pytest.mark.parametrize("change", [set_tap, set_hook, set_norm_hook, set_forward, set_module])
@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_what_is_not_covered_runs_unfused(make_lm: Callable[..., LanguageModel], change: Callable[..., None],
                                          before: bool) -> None:
    """Whether it was so when the plan was made, or came between two steps."""
    lm, ids = make_lm("mamba"), torch.randint(1, 97, (2, 4))
    if before:
        change(lm)
    _, states = lm.prefill(ids)
    if not before:
        assert fused_ran(lm, states)
        lm.step(ids[:, 0], states)
        change(lm)
    got, _ = lm.step(ids[:, 0], states)
    assert not fused_ran(lm, states)
    assert torch.equal(got, unfused(lm, ids[:, :1], states)[0][:, 0])
    decoder = Decoder(lm, states)
    assert torch.equal(decoder.step(ids[:, 0]), got)
    assert torch.isfinite(decoder.step(ids[:, 1])).all()


@torch.no_grad()
def test_a_decoder_goes_on_when_the_fused_step_ends(make_lm: Callable[..., LanguageModel]) -> None:
    lm, ids = make_lm("mamba"), torch.randint(1, 97, (1, 9))
    _, states = lm.prefill(ids[:, :3])
    want, _ = unfused(lm, ids[:, 3:], states)
    decoder = Decoder(lm, states)
    outputs = []
    for t in range(3, 9):
        if t == 5:
            set_tap(lm)
        if t == 7:
            first_mixer(lm).tap = None
        outputs.append(decoder.step(ids[:, t]))
    assert torch.equal(torch.stack(outputs, 1), want)


@pytest.mark.parametrize("way", ["gradients", "reference", "bf16", "mask", "batch"])
def test_calls_that_run_unfused(make_lm: Callable[..., LanguageModel], way: str) -> None:
    lm = make_lm("mamba", None if way in ("gradients", "bf16") else "int8")
    if way == "bf16":
        lm.model_map.host.to(torch.bfloat16)
    ids = torch.randint(1, 97, (70 if way == "batch" else 2, 4))
    with torch.no_grad():
        _, states = lm.prefill(ids)
        assert fused_ran(lm, states) == (way not in ("bf16", "batch"))
    if way == "gradients":
        lm.model_map.host.requires_grad_(True)
        logits, _ = lm.step(ids[:, 0], states)
        assert logits.requires_grad
    elif way == "reference":
        with registry.backend("reference"), torch.no_grad():
            assert not fused_ran(lm, states)
            lm.step(ids[:, 0], states)
    elif way == "mask":
        with torch.no_grad():
            masked, _ = lm.prefill(ids[:, :1], torch.ones(2, 1), states)
            assert torch.equal(masked[:, 0], lm.step(ids[:, 0], states)[0])


def replace_linear(lm: LanguageModel) -> None:
    linear = first_mixer(lm).in_proj
    first_mixer(lm).in_proj = PackedLinear.from_float(linear.dequantize() * 1.1, linear.bias, weights=linear.weights,
                                                      activations=linear.activations)


def replace_buffer(lm: LanguageModel) -> None:
    first_mixer(lm).out_proj.scale = first_mixer(lm).out_proj.scale * 1.1


def replace_data(lm: LanguageModel) -> None:
    first_mixer(lm).scans()[0].D.data = first_mixer(lm).scans()[0].D.data + 1


def replace_norm(lm: LanguageModel) -> None:
    norm = lm.model_map.blocks[1].norm
    norm.weight = nn.Parameter(norm.weight.data * 1.1)


def replace_mixer(lm: LanguageModel) -> None:
    lm.model_map.blocks[1].module.mixer = copy.deepcopy(first_mixer(lm))


def write_in_place(lm: LanguageModel) -> None:
    first_mixer(lm).conv.weight.data.mul_(1.1)
    first_mixer(lm).in_proj.scale.mul_(1.1)


def rotate_online(lm: LanguageModel) -> None:
    first_mixer(lm).out_rotation = OnlineHadamard(64, block=32)


def scale_gate(lm: LanguageModel) -> None:
    first_mixer(lm).gate.scale = torch.rand(64) + 0.5


def other_activations(lm: LanguageModel) -> None:
    first_mixer(lm).in_proj.activations = ActivationFormat("token", 4)


@pytest.mark.parametrize("change", [replace_linear, replace_buffer, replace_data, replace_norm, replace_mixer,
                                    write_in_place, rotate_online, scale_gate, other_activations])
@torch.no_grad()
def test_a_step_sees_what_was_replaced(make_lm: Callable[..., LanguageModel], change: Callable[..., None]) -> None:
    lm, ids = make_lm("mamba"), torch.randint(1, 97, (2, 4))
    _, states = lm.prefill(ids)
    old, _ = lm.step(ids[:, 0], states)
    decoder = Decoder(lm, states)
    assert torch.equal(decoder.step(ids[:, 0]), old)
    change(lm)
    new, _ = lm.step(ids[:, 0], states)
    assert fused_ran(lm, states)
    assert not torch.equal(new, old)
    assert torch.equal(new, unfused(lm, ids[:, :1], states)[0][:, 0])


@torch.no_grad()
def test_a_new_sequence_sees_what_was_written(make_lm: Callable[..., LanguageModel]) -> None:
    """The decay is derived from A_log: a plan compares its contents when a sequence begins."""
    lm, ids = make_lm("mamba"), torch.randint(1, 97, (2, 4))
    first = generate(lm, ids, 2, eos_token_id=[])
    assert torch.equal(first, generate(lm, ids, 2, eos_token_id=[]))
    for block in lm.model_map.blocks:
        block.mixer.scans()[0].A_log.data.add_(0.7)
    _, states = lm.prefill(ids)
    got, _ = lm.step(ids[:, 0], states)
    assert torch.equal(got, unfused(lm, ids[:, :1], states)[0][:, 0])
    host = lm.model_map.host
    cache = host(ids, use_cache=True).cache_params
    want = host(ids[:, :1], use_cache=True, cache_params=copy.deepcopy(cache), attention_mask=torch.ones(2, 1)).logits
    assert torch.equal(host(ids[:, :1], use_cache=True, cache_params=cache).logits, want)


@torch.no_grad()
def test_half_precision_beside_packed_matrices(make_lm: Callable[..., LanguageModel]) -> None:
    """Convolution and A_log stored in fp16, as some recipes do: copies in fp32, as the single ops make them."""
    lm, ids = make_lm("mamba"), torch.randint(1, 97, (2, 4))
    for block in lm.model_map.blocks:
        for parameter in (block.mixer.conv.weight, block.mixer.scans()[0].A_log):
            parameter.data = parameter.data.half()
    _, states = lm.prefill(ids)
    assert fused_ran(lm, states)
    got, _ = lm.step(ids[:, 0], states)
    assert torch.equal(got, unfused(lm, ids[:, :1], states)[0][:, 0])


@torch.no_grad()
def test_a_copy_of_a_model_has_plans_of_its_own(make_lm: Callable[..., LanguageModel]) -> None:
    lm, ids = make_lm("mamba2"), torch.randint(1, 97, (1, 4))
    first = generate(lm, ids, 4, eos_token_id=[])
    twin = LanguageModel.of(copy.deepcopy(lm.model_map.host))
    for buffer in lm.model_map.host.buffers():
        buffer.zero_()
    assert torch.equal(generate(twin, ids, 4, eos_token_id=[]), first)
