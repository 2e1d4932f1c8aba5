"""Both mixers: prefill from any state and single steps agree, padding and packing leave no trace, hooks see all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacompress.models.mixers import Mixer, MixerState, S6Mixer, SSDMixer, build
from mambacompress.models.orders import Order
from mambacompress.models.paths import DepthwiseConv, Gate, Path, ScanQuantizer, SelectiveProjection

D, E, N, R = 12, 24, 4, 3


def s6(**options: Any) -> S6Mixer:
    projection = SelectiveProjection(E, N, R, groups=options.pop("groups", 1))
    conv = DepthwiseConv(E, options.pop("width", 4))
    return S6Mixer(D, E, [Path(E, N, projection, **options)], conv=conv, gate=Gate(E), bias=True)


def ssd(**options: Any) -> SSDMixer:
    usual = {"heads": 6, "head_dim": 4, "d_state": N, "groups": 2, "bias": True, "chunk_size": 8}
    return SSDMixer(D, **(usual | options))


def randomised(mixer: Mixer, dtype: torch.dtype = torch.float64) -> Mixer:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + (name == "norm_weight"))
    return mixer.to(dtype).eval()


MIXERS = {"s6": s6, "ssd": ssd}
each_kind = pytest.mark.parametrize("kind", list(MIXERS))


def run(mixer: Mixer, x_BLD: Tensor, sizes: list[int],
        state: MixerState | None = None) -> tuple[Tensor, MixerState | None]:
    outputs = []
    with torch.no_grad():
        for chunk in x_BLD.split(sizes, 1):
            y, state = mixer.mix(chunk, state)
            outputs.append(y)
    return torch.cat(outputs, 1), state


def same(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> bool:
    return ((got - want).abs().max() / want.abs().max()).item() < tolerance


@each_kind
@pytest.mark.parametrize("sizes", [[1] * 19, [5, 14], [17, 1, 1], [2, 1, 16], [3, 3, 13]], ids=str)
def test_chunks_from_a_state_equal_one_shot(kind: str, sizes: list[int]) -> None:
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(2, 19, D, dtype=torch.float64)
    want, want_state = run(mixer, x, [19])
    got, state = run(mixer, x, sizes)
    assert same(got, want)
    assert state is not None
    assert want_state is not None
    assert same(state.conv, want_state.conv)
    assert same(state.ssm, want_state.ssm)


@each_kind
def test_a_zero_state_is_no_state(kind: str) -> None:
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(3, 6, D, dtype=torch.float64)
    zero = mixer.zero_state(3, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(run(mixer, x, [6], zero)[0], run(mixer, x, [6])[0])


@each_kind
def test_a_state_can_be_continued_twice(kind: str) -> None:
    mixer = randomised(MIXERS[kind]())
    x, first, second = (torch.randn(1, 7, D, dtype=torch.float64) for _ in range(3))
    _, state = run(mixer, x, [7])
    alone, _ = run(mixer, first, [7], state)
    run(mixer, second, [1] * 7, state)
    again, _ = run(mixer, first, [7], state)
    assert torch.equal(alone, again)


@pytest.mark.parametrize("length", [1, 2, 3, 64])
def test_s6_prefill_and_decode_are_bit_identical_in_fp32(length: int) -> None:
    """The convolution and the scan; the linears around them depend on the matrix library's blocking."""
    mixer = randomised(s6(), torch.float32)
    seen: dict[str, list[Tensor]] = {}
    projections = {}

    def tap(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value)

    class Replayed(nn.Module):
        """A projection whose prefill outputs are replayed step by step, so that only conv and scan are compared."""

        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.name, self.inner = name, inner

        def forward(self, x: Tensor) -> Tensor:
            if self.name not in projections:
                projections[self.name] = self.inner(x)
                return projections[self.name]
            step = len(seen["in_proj"]) - 2
            return projections[self.name][:, step : step + 1]

    mixer.in_proj = Replayed("in_proj", mixer.in_proj)
    projection = mixer.paths[0].projection
    projection.x_proj = Replayed("x_proj", projection.x_proj)
    projection.dt_proj = Replayed("dt_proj", projection.dt_proj)
    mixer.tap = tap
    x = torch.randn(2, length, D)
    _, final = run(mixer, x, [length])
    _, state = run(mixer, x, [1] * length)
    for name in ("u", "y"):
        prefill, *steps = seen[name]
        assert torch.equal(torch.cat(steps, 1), prefill), name
    assert final is not None
    assert state is not None
    assert torch.equal(state.ssm, final.ssm)
    assert torch.equal(state.conv, final.conv)


@each_kind
def test_prefill_and_decode_agree_in_fp32(kind: str) -> None:
    mixer = randomised(MIXERS[kind](), torch.float32)
    x = torch.randn(2, 200, D)
    assert same(run(mixer, x, [1] * 200)[0], run(mixer, x, [200])[0], 1e-5)


@each_kind
def test_left_padding_leaves_no_trace(kind: str) -> None:
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(2, 9, D, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        y, state = mixer.mix(x, None, mask)
    alone, alone_state = run(mixer, x[1:, 5:], [4])
    assert same(y[1:, 5:], alone)
    assert state is not None
    assert alone_state is not None
    assert same(state.ssm[1:], alone_state.ssm)
    assert same(state.conv[1:], alone_state.conv)


@each_kind
@pytest.mark.parametrize("lengths", [[5, 9, 4], [1, 1, 16], [2, 3, 1, 12], [18]], ids=str)
def test_packed_equals_separate(kind: str, lengths: list[int]) -> None:
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(2, 18, D, dtype=torch.float64)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    with torch.no_grad():
        packed, state = mixer.mix(x, seq_idx=seq_idx)
    separate = [run(mixer, part, [part.shape[1]]) for part in x.split(lengths, 1)]
    assert same(packed, torch.cat([y for y, _ in separate], 1))
    last = separate[-1][1]
    assert state is not None
    assert last is not None
    assert same(state.ssm, last.ssm)


@each_kind
def test_packed_gradients_equal_separate(kind: str) -> None:
    mixer = randomised(MIXERS[kind]())
    x = torch.randn(1, 12, D, dtype=torch.float64)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    weight = torch.randn(1, 12, D, dtype=torch.float64)
    (mixer.mix(x, seq_idx=seq_idx)[0] * weight).sum().backward()
    packed = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    mixer.zero_grad(set_to_none=True)
    for part, w in zip(x.split([5, 7], 1), weight.split([5, 7], 1), strict=True):
        (mixer.mix(part)[0] * w).sum().backward()
    assert len(packed) == len(list(mixer.parameters()))
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None
        assert same(packed[name], parameter.grad, 1e-9), name


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_every_projection_is_called_and_tapped_once(kind: str, training: bool) -> None:
    mixer = randomised(MIXERS[kind]()).train(training)
    calls: list[str] = []
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear | DepthwiseConv):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    seen: list[str] = []
    mixer.tap = lambda name, value: seen.append(name)
    mixer.mix(torch.randn(1, 5, D, dtype=torch.float64))
    linear = ["in_proj", "conv", "out_proj"]
    linear += ["paths.0.projection.x_proj", "paths.0.projection.dt_proj"] if kind == "s6" else []
    assert sorted(calls) == sorted(linear)
    taps = ["in_proj", "z", "conv", "dt", "u", "B", "C", "y", "out_proj"]
    taps += ["x_proj", "dt_proj"] if kind == "s6" else []
    assert sorted(seen) == sorted(taps)


@each_kind
def test_a_tapped_input_is_what_the_module_gets(kind: str) -> None:
    mixer = randomised(MIXERS[kind]())
    got: dict[str, Tensor] = {}
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear):
            leaf = name.rpartition(".")[2]
            module.register_forward_pre_hook(lambda _, args, leaf=leaf: got.__setitem__(leaf, args[0]))
    seen: dict[str, Tensor] = {}
    mixer.tap = seen.__setitem__
    mixer.mix(torch.randn(2, 5, D, dtype=torch.float64))
    assert all(torch.equal(seen[name], value) for name, value in got.items())


def test_smoothing_scales_keep_the_function() -> None:
    """S2 and S3: u and z divided by s per channel, activation x * sigmoid(s x), out_proj and x_proj columns times s."""
    mixer = randomised(s6())
    x = torch.randn(2, 9, D, dtype=torch.float64)
    want, _ = run(mixer, x, [9])
    s_z, s_u = (torch.rand(E, dtype=torch.float64) + 0.5 for _ in range(2))
    with torch.no_grad():
        mixer.in_proj.weight[E:] /= s_z[:, None]
        mixer.in_proj.bias[E:] /= s_z
        mixer.gate = Gate(E, scaled=True).double()
        mixer.gate.scale.copy_(s_z)
        old = mixer.conv
        mixer.conv = DepthwiseConv(E, 4, scaled=True).double()
        mixer.conv.weight.copy_(old.weight / s_u[:, None])
        mixer.conv.bias.copy_(old.bias / s_u)
        mixer.conv.act_scale.copy_(s_u)
        mixer.paths[0].projection.x_proj.weight *= s_u
        mixer.out_proj.weight *= s_z * s_u
    got, _ = run(mixer, x, [9])
    assert same(got, want)
    assert same(run(mixer, x, [1] * 9)[0], want)


def test_the_scan_quantizer_changes_little_and_agrees_between_prefill_and_decode() -> None:
    mixer = randomised(s6(), torch.float32)
    x = torch.randn(2, 12, D)
    want, _ = run(mixer, x, [12])
    largest: dict[str, float] = {}
    mixer.tap = lambda name, value: largest.__setitem__(name, float(value.abs().max()))
    run(mixer, x, [12])
    mixer.tap = None
    quantizer = mixer.paths[0].scan_quantizer = ScanQuantizer(E, 1, N)
    for name in ScanQuantizer.NAMES:
        quantizer.get_buffer(f"scale_{name}").fill_(largest[name] / 127)
    got, _ = run(mixer, x, [12])
    assert same(got, want, 0.1)
    assert not torch.equal(got, want)
    assert same(run(mixer, x, [1] * 12)[0], got, 1e-4)


@pytest.mark.parametrize("part", [DepthwiseConv(6, 4, bias=False, scaled=True), DepthwiseConv(6, 3, kind="2d"),
                                  Gate(5, scaled=True), Gate(5), ScanQuantizer(6, 2, 4)], ids=lambda p: str(p.spec()))
def test_a_spec_builds_its_module(part: Any) -> None:
    other = build(part.spec())
    assert other.spec() == part.spec()
    other.load_state_dict(part.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), other.state_dict().values(), strict=True))


def test_groups_share_B_and_C() -> None:
    """Channels of group g must not see the B and C of another group."""
    mixer = randomised(s6(groups=2))
    x = torch.randn(1, 6, D, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    mixer.tap = seen.__setitem__
    run(mixer, x, [6])
    before = seen["y"]
    weight = mixer.paths[0].projection.x_proj.weight
    with torch.no_grad():
        weight[R + N : R + 2 * N] = 0  # B of group 1
    run(mixer, x, [6])
    assert torch.equal(seen["y"][..., : E // 2], before[..., : E // 2])
    assert not torch.equal(seen["y"][..., E // 2 :], before[..., E // 2 :])


@pytest.mark.parametrize("options", [{"window": 4}, {"order": Order("flip")}])
def test_a_mixer_that_is_not_causal_refuses_a_state(options: dict[str, Any]) -> None:
    mixer = randomised(s6(**options))
    assert not mixer.causal
    y, state = mixer.mix(torch.randn(1, 4, D, dtype=torch.float64))
    assert state is None
    assert y.shape == (1, 4, D)
    with pytest.raises(ValueError, match="cannot decode step by step"):
        mixer.zero_state(1, dtype=torch.float64, device=torch.device("cpu"))
    zero = randomised(s6()).zero_state(1, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot continue from a state"):
        mixer.mix(torch.randn(1, 1, D, dtype=torch.float64), zero)


def test_wrong_arguments_are_named() -> None:
    projection = SelectiveProjection(E, N, R)
    with pytest.raises(ValueError, match="'z'"):
        Path(E, N, projection, permutes="z")
    with pytest.raises(ValueError, match="no convolution of its own"):
        Path(E, N, projection, permutes="u", conv=DepthwiseConv(E, 4))
    with pytest.raises(ValueError, match="'3d'"):
        DepthwiseConv(E, 4, kind="3d")
    with pytest.raises(ValueError, match=r"needs the grid"):
        DepthwiseConv(E, 3, kind="2d")(torch.zeros(1, 4, E))
    with pytest.raises(ValueError, match="sees the future"):
        DepthwiseConv(E, 3, kind="same")(torch.zeros(1, 4, E), seq_idx=torch.zeros(1, 4))
