"""The fused decode step: which mixers ``kernels.mixer_step`` takes, and plans of them that notice when they are stale.

A *plan* is a mixer (and the norm in front of it) described once for native code: addresses of its tensors, a few
numbers, and what was derived from them (the decay, fp32 copies of what is stored smaller). It costs as much as a few
steps, so it is kept with the mixer. Three things end it, and ``StepPlan`` tells each:

- a module or tensor was replaced, moved or hooked, a tap or an online rotation was set: seen at every step, by identity
  and address (``Watch``);
- a tensor from which something was derived was written to: its content is compared when a sequence begins;
- everything else that is written in place is read in place.

What the native step does not take (vision paths, taps, hooks, gradients) runs unfused, in single ops, and
the registry notes why. With weights in half precision it keeps activations in fp32, which the single ops round in
between. Legend: B batch, D d_model, E d_inner, K conv width, N d_state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.kernels import native, registry
from mambacompress.kernels.mixer_prefill import NativePrefill
from mambacompress.kernels.mixer_prefill import lacks as prefill_lacks
from mambacompress.kernels.mixer_step import (
    MAX_BATCH,
    BlockState,
    Conv,
    Matrix,
    NativeBlock,
    NativeStates,
    NativeStep,
    Rotation,
    S6Block,
    SSDBlock,
    fits,
    lacks,
    next_states,
)
from mambacompress.models.mixers import Mixer, MixerState, S6Mixer, SSDMixer
from mambacompress.models.orders import SUM
from mambacompress.models.packed import OnlineHadamard, PackedLinear, PackedSparseLinear
from mambacompress.models.paths import (
    DepthwiseConv,
    Gate,
    RMSNorm,
    ScanQuantizer,
    SelectiveProjection,
    WeightlessNorm,
    negative_exp,
)

_WATCHED = ("tap", "activations", "variance_epsilon", "tiled")  # attributes of modules that are no tensors or modules


class NotFused(Exception):
    """This mixer cannot take the fused step; the message says why."""


class Watch:
    """Whether modules are still what they were: the same modules and tensors at the same places, as many hooks.

    modules: each for itself; give ``root.modules()`` for a tree.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self.hooks: list[Any] = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        places = [(owner, name) for m in modules for owner in (m._modules, m._parameters, m._buffers) for name in owner]
        places += [(m.__dict__, name) for m in modules for name in _WATCHED if name in m.__dict__]
        self._owners: list[Any] = [owner for owner, _ in places]
        self._names = [name for _, name in places]
        self._values = [owner[name] for owner, name in places]
        self._tables = [*self.hooks, *(m.__dict__ for m in modules)]  # None that becomes a module leaves __dict__
        self._sizes = list(map(len, self._tables))
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    @classmethod
    def joined(cls, watches: Sequence[Watch]) -> Watch:
        """One that watches all."""
        joined = cls(())
        for name, value in vars(joined).items():
            value.extend(chain.from_iterable(getattr(watch, name) for watch in watches))
        return joined

    def holds(self) -> bool:
        """A few microseconds a block: called at every step."""
        if list(map(len, self._tables)) != self._sizes:
            return False
        try:
            same = all(map(is_, map(getitem, self._owners, self._names), self._values))
        except KeyError:
            return False
        return same and list(map(Tensor.data_ptr, self._tensors)) == self._addresses


class StepPlan:
    """One mixer, and the RMS norm in front of it (``norm`` None: its input is normed, and no residual is added).

    why: the reason why there is no native block; '' where there is one. prefill_why: why there is none for sequences.
    """

    def __init__(self, mixer: Mixer, norm: nn.Module | None = None) -> None:
        self.mixer, self.norm = mixer, norm
        self.watch = Watch(chain(mixer.modules(), () if norm is None else norm.modules()))
        self._derived: list[tuple[Tensor, Tensor]] = []
        self.block: NativeBlock | None = None
        self.step: NativeStep | None = None  # this block alone
        self.why = self.prefill_why = ""
        try:
            if any(self.watch.hooks):
                raise NotFused("hooks on its modules")
            if norm is not None and type(norm) is not RMSNorm:
                raise NotFused(f"a {type(norm).__name__} before the mixer")
            block = self._describe(mixer, norm)
            missing = lacks(block)
            if missing:
                raise NotFused(", ".join(missing))
            self.block = NativeBlock(block)
            self.step = NativeStep([self.block])
            self.prefill_why = ", ".join(prefill_lacks(block))
        except NotFused as reason:
            self.why = self.prefill_why = str(reason)

    def unchanged(self) -> bool:
        """Whether nothing was written to what the plan holds copies of."""
        return all(torch.equal(tensor, copy) for tensor, copy in self._derived)

    # -- description -------------------------------------------------------------------------------------------------

    def _describe(self, mixer: Mixer, norm: RMSNorm | None) -> S6Block | SSDBlock:
        norm_D, eps = (None, 0.0) if norm is None else (self._fp32(norm.weight), norm.variance_epsilon)
        if mixer.tap is not None:
            raise NotFused("a tap")
        if any("forward" in module.__dict__ for module in mixer.modules()):
            raise NotFused("a module with a forward of its own")
        if isinstance(mixer, S6Mixer) and type(mixer).mix is S6Mixer.mix:
            return self._s6(mixer, norm_D, eps)
        if isinstance(mixer, SSDMixer) and type(mixer).mix is SSDMixer.mix:
            return SSDBlock(
                norm_D, eps, self._matrix(mixer.in_proj), self._conv(mixer.conv), self._decay(mixer.A_log),
                self._fp32(mixer.D), self._fp32(mixer.dt_bias), mixer.dt_limit, self._fp32(mixer.norm_weight),
                mixer.norm_eps, self._matrix(mixer.out_proj), states=mixer.d_state, groups=mixer.groups,
                out_rotation=_rotation(mixer.out_rotation))
        raise NotFused(f"a {type(mixer).__name__}")

    def _s6(self, mixer: S6Mixer, norm_D: Tensor | None, eps: float) -> S6Block:
        path, gate = mixer.scans()[0], mixer.gate
        if not mixer.causal or path.direction_B is not None or mixer.merge != SUM:
            raise NotFused("paths that are not one causal scan")
        if not isinstance(gate, Gate) or mixer.norm is not None:
            raise NotFused("no gate, or a norm before it")
        projection = path.projection
        if type(projection) is not SelectiveProjection:
            raise NotFused(f"a {type(projection).__name__}")
        if projection.norm is not None and type(projection.norm) is not WeightlessNorm:
            raise NotFused("norms with a weight on dt, B and C")
        return S6Block(
            norm_D, eps, self._matrix(mixer.in_proj), self._conv(mixer.conv), self._matrix(projection.x_proj),
            self._matrix(projection.dt_proj), self._decay(path.A_log), self._fp32(path.D), self._fp32(path.dt_bias),
            None if gate.scale is None else self._fp32(gate.scale), self._matrix(mixer.out_proj),
            groups=projection.groups, inner_eps=None if projection.norm is None else projection.norm.eps,
            x_rotation=_rotation(projection.x_rotation), out_rotation=_rotation(mixer.out_rotation),
            scan_scales=_scan_scales(path.scan_quantizer))

    def _matrix(self, module: nn.Module) -> Matrix:
        if type(module) is nn.Linear:
            return Matrix(_data(module.weight), None if module.bias is None else self._fp32(module.bias))
        if type(module) is PackedLinear:
            optional = (module.bias, module.act_scale, module.zero)
            bias, act_scale, zero = (None if t is None else _data(t) for t in optional)
            activations = module.activations
            return Matrix(_data(module.qweight), bias, _data(module.scale), zero, module.weights.group_size,
                          activations.mode, act_scale, activations.bits, module.tiled)
        if type(module) is PackedSparseLinear and module.stream is not None:
            bias, scale, act_scale = (None if t is None else _data(t)
                                      for t in (module.bias, module.scale, module.act_scale))
            return Matrix(_data(module.stream), bias, scale, activation=module.activations.mode, act_scale=act_scale,
                          act_bits=module.activations.bits, pattern=(module.pattern.keep, module.pattern.of),
                          shape=(module.rows, module.columns))
        raise NotFused(f"a {type(module).__name__} as a projection")

    def _conv(self, conv: DepthwiseConv | None) -> Conv:
        if type(conv) is not DepthwiseConv or conv.kind != "causal":
            raise NotFused("no causal convolution")
        bias, act_scale = conv.bias, conv.act_scale
        return Conv(self._fp32(conv.weight), None if bias is None else self._fp32(bias),
                    None if act_scale is None else self._fp32(act_scale), conv.activation)

    def _decay(self, A_log: Tensor) -> Tensor:
        self._derived.append((_data(A_log), _data(A_log).clone()))
        return negative_exp(_data(A_log))

    def _fp32(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it is fp32, else a copy, as the single ops take it."""
        tensor = _data(tensor)
        if tensor.dtype in (torch.float32, torch.float64):
            return tensor
        self._derived.append((tensor, tensor.clone()))
        return tensor.float()


def _data(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise NotFused(f"tensors on {tensor.device.type}")
    return tensor.detach()


def _scan_scales(quantizer: ScanQuantizer | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    if quantizer is None:
        return None
    if type(quantizer) is not ScanQuantizer:
        raise NotFused(f"a {type(quantizer).__name__} on the scan")
    u, dt, B, C, z = (_data(quantizer.get_buffer(f"scale_{name}")) for name in ("u", "dt", "B", "C", "z"))
    return u, dt, B, C, z


def _rotation(module: nn.Module | None) -> Rotation | None:
    if module is None:
        return None
    if type(module) is not OnlineHadamard:
        raise NotFused(f"a {type(module).__name__} as an online rotation")
    return Rotation(_data(module.signs), module.block)


class Plans:
    """The plans of one mixer, kept with it: at most one with the norm in front and one without.

    A copy of a mixer starts without any: addresses do not travel.
    """

    def __init__(self) -> None:
        self._plans: dict[bool, StepPlan] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()

    def get(self, mixer: Mixer, norm: nn.Module | None = None, *, look: bool = False) -> StepPlan:
        """A plan that holds now. look: compare the contents of what was derived, too (a sequence begins)."""
        kept = self._plans.get(norm is None)
        if (kept is None or kept.mixer is not mixer or kept.norm is not norm or not kept.watch.holds()
                or (look and not kept.unchanged())):
            kept = self._plans[norm is None] = StepPlan(mixer, norm)
        return kept


def obstacle(x: Tensor, batch: int) -> str:
    """Why no step with this input is fused; '' where none stands in the way."""
    if torch.is_grad_enabled():
        return "gradients"
    if x.dtype != torch.float32 or type(x) not in (Tensor, nn.Parameter):
        return f"activations in {str(x.dtype).removeprefix('torch.')}"
    if batch > MAX_BATCH:
        return f"batches above {MAX_BATCH}"
    if torch.compiler.is_compiling():
        return "tracing"
    return ""


def chosen(x: Tensor, why: str, op: str = "mixer_step") -> bool:
    """Whether the native step (or prefill) is taken; notes the choice. why: the obstacle, or ''."""
    if why:
        registry.note(op, "single ops", why)
        return False
    if native.library() is None:
        return False  # the single ops say so
    return registry.choose(op, x.device, x.dtype) == "native"


class FusedBlocks:
    """The blocks of a language model as one native call.

    plans: of each block, norm included. modules: the host's blocks, which hold norm and mixer.
    """

    def __init__(self, plans: Sequence[StepPlan], modules: Sequence[nn.Module]) -> None:
        self.plans = list(plans)
        self.why = next((plan.why for plan in plans if plan.block is None), "")
        self.prefill_why = next((plan.prefill_why for plan in plans if plan.prefill_why), "")
        if len(plans) != len(modules):
            self.why = self.prefill_why = "a mixer of another kind"
        self._watch = Watch.joined([*(plan.watch for plan in plans), Watch(modules)])
        blocks = [plan.block for plan in plans if plan.block is not None]
        self._step = NativeStep(blocks) if not self.why else None
        self._prefill = NativePrefill(blocks) if not self.prefill_why else None

    def holds(self) -> bool:
        """Whether all modules and tensors are where they were."""
        return self._watch.holds()

    def unchanged(self) -> bool:
        """Whether nothing was written to what the plans hold copies of."""
        return all(plan.unchanged() for plan in self.plans)

    def run(self, h_BD: Tensor, states: NativeStates) -> None:
        """h is replaced, ``states.new`` written."""
        if self._step is None:
            raise RuntimeError(f"these blocks do not take the fused step: {self.why}")
        self._step.run(h_BD, states)

    def prefill(self, h_BLD: Tensor, states: Sequence[BlockState] | None) -> list[BlockState]:
        """h is replaced; returns the states behind it. states: fp32, or None for zeros."""
        if self._prefill is None:
            raise RuntimeError(f"these blocks do not take the fused prefill: {self.prefill_why}")
        return self._prefill.run(h_BLD, states)


def native_states(states: Sequence[MixerState]) -> list[BlockState] | None:
    """The states as the native step reads them, None where it cannot."""
    read = [BlockState(state.conv if state.conv.dtype == torch.float64 else state.conv.float(), state.ssm)
            for state in states]
    return read if all(map(fits, read)) else None


__all__ = ["FusedBlocks", "NativeStates", "Plans", "StepPlan", "Watch", "chosen", "native_states", "next_states",
           "obstacle"]
