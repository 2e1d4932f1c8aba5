"""Adoption: a host's stock mixers and norms replaced, on the instance, by ours holding the same parameters.

A family says how its mixer is configured (``build``) and where each parameter sits in the stock layout (``names``;
shapes that differ hold the same numbers in the same order, e.g. conv [E, 1, K] and [E, K]). From these follow adoption
(the very same storage, no copy), bit-identical write-back, and the stock name of every tensor of an adopted host, by
which a checkpoint is read block by block.

Adoption proves itself: a small random instance of the same configuration must agree with the stock module in fp64, in
one shot, in chunks, step by step and left-padded; and the first real mixer must agree on its real weights. Nothing is
guessed from key names: a configuration that is not known raises and names the mixer.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.errors import UserError
from mambacompress.kernels.int8_state import Int8State
from mambacompress.models.exact import KeepDouble
from mambacompress.models.mixers import Mixer, MixerState, S6Mixer, SSDMixer
from mambacompress.models.modelmap import RESIDUAL, Block, ModelMap, Site, Stream, parameters_left_alone
from mambacompress.models.paths import RMSNorm
from mambacompress.models.step import NativeStates, Plans, chosen, native_states, obstacle


class Hosted(Mixer):
    """Speaks transformers' calling convention: mixer(hidden, cache_params=None, attention_mask=None) -> hidden.

    The cache keeps K conv inputs as [B, channels, K], ours K-1 as [B, K-1, channels].
    """

    layer_idx: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans = Plans()
        self._begins = True  # the next fused step is the first of a sequence

    def forward(self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None,
                seq_idx: Tensor | None = None, **_: Any) -> Tensor:
        if cache_params is not None and hidden_states.shape[1] == 1 and attention_mask is None and seq_idx is None:
            y_BLD = self._step_in_place(hidden_states, cache_params)
            if y_BLD is not None:
                return y_BLD
        self._begins = True
        state = None if cache_params is None else self._read(cache_params)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -hidden_states.shape[1]:]
        y_BLD, state = self.mix(hidden_states, state, attention_mask, seq_idx)
        if cache_params is not None and state is not None:
            self._write(cache_params, state)
        return y_BLD

    def _step_in_place(self, x_B1D: Tensor, cache: Any) -> Tensor | None:
        """One token by the fused step, the cache's own tensors moved on; None where it does not take this call."""
        layer = cache.layers[self.layer_idx]
        if layer.record_past or not layer.has_previous_state[0]:
            return None
        why = obstacle(x_B1D, len(x_B1D))
        if not why:
            plan = self.plans.get(self, look=self._begins)
            self._begins = False
            why = plan.why
        if not chosen(x_B1D, why) or plan.step is None:
            return None
        states = native_states([MixerState(layer.conv_states[0][..., 1:].transpose(1, 2), layer.recurrent_states[0])])
        if states is None:
            return None
        y_BD = x_B1D[:, 0].clone(memory_format=torch.contiguous_format)
        plan.step.run(y_BD, NativeStates(states, states))
        return y_BD[:, None]

    def _read(self, cache: Any) -> MixerState | None:
        layer = cache.layers[self.layer_idx]
        if layer.record_past:
            raise UserError("this model cannot roll back its state, which assisted generation asks for",
                            "generate without an assistant model")
        if not layer.has_previous_state[0]:
            return None
        return MixerState(layer.conv_states[0][..., 1:].transpose(1, 2), layer.recurrent_states[0])

    def _write(self, cache: Any, state: MixerState) -> None:
        if isinstance(state.ssm, Int8State):
            raise TypeError("transformers' cache holds no int8 state")
        window_BEK = F.pad(state.conv.transpose(1, 2), (1, 0))
        cache.update_conv_state(window_BEK, self.layer_idx, conv_kernel_size=window_BEK.shape[-1])
        cache.update_recurrent_state(state.ssm, self.layer_idx)


class HostedS6(Hosted, S6Mixer):
    """S6Mixer inside a transformers model."""


class HostedSSD(Hosted, SSDMixer):
    """SSDMixer inside a transformers model."""


class Family:
    """One host family. Subclasses set ``model_type`` and ``names`` (ours -> stock, within a mixer) and ``build``."""

    model_type: str
    names: dict[str, str]

    def build(self, config: Any, layer_idx: int) -> Hosted:
        """Our mixer for this layer, on the current default device. Raises UserError for a configuration not known."""
        raise TypeError(f"{type(self).__name__} does not say how its mixer is built")

    def stock_mixer(self, config: Any, layer_idx: int) -> nn.Module:
        """An empty stock mixer."""
        raise TypeError(f"{type(self).__name__} does not say what its stock mixer is")

    def stock_norm(self) -> type[nn.Module]:
        """The class of the host's norms, made from a size and eps, with ``weight`` and ``variance_epsilon``."""
        raise TypeError(f"{type(self).__name__} does not say what its stock norm is")

    def shrink(self, config: Any) -> Any:
        """A small configuration with the same switches, for the proof."""
        raise TypeError(f"{type(self).__name__} does not say how its configuration shrinks")

    # -- adoption and write-back -------------------------------------------------------------------------------------

    def adopt_mixer(self, stock: nn.Module, config: Any, layer_idx: int) -> Hosted:
        with torch.device("meta"):
            ours = self.build(config, layer_idx)
        ours.layer_idx = layer_idx
        ours.train(stock.training)
        remaining = dict(stock.named_parameters())
        for our_name, parameter in list(ours.named_parameters()):
            source = remaining.pop(self.names[our_name])
            _assign(ours, our_name, source, parameter.shape)
        if remaining:
            raise UserError(f"layer {layer_idx}: the mixer {type(stock).__name__} has parameters this version does not "
                            f"know: {', '.join(sorted(remaining))}", "report the model; nothing was changed")
        return ours

    def adopt_norm(self, stock: nn.Module) -> nn.Module:
        """Our norm on the same weight; a module that is no stock norm stays."""
        if type(stock) is not self.stock_norm():
            return stock
        return RMSNorm(stock.weight, stock.variance_epsilon).train(stock.training)  # type: ignore[arg-type]

    def restore_norm(self, ours: nn.Module) -> nn.Module:
        """The stock norm on the same weight."""
        if not isinstance(ours, RMSNorm):
            return ours
        with torch.device("meta"):
            stock = self.stock_norm()(ours.weight.numel(), eps=ours.variance_epsilon)
        stock.weight = ours.weight
        return stock.train(ours.training)

    def restore_mixer(self, ours: Hosted, config: Any) -> nn.Module:
        with torch.device("meta"):
            stock = self.stock_mixer(config, ours.layer_idx)
        shapes = {name: parameter.shape for name, parameter in stock.named_parameters()}
        for our_name, parameter in ours.named_parameters():
            if our_name not in self.names:
                raise UserError(f"layer {ours.layer_idx}: {our_name} has no place in the stock mixer",
                                "save the compressed model as an artifact instead")
            stock_name = self.names[our_name]
            _assign(stock, stock_name, parameter, shapes.pop(stock_name))
        if shapes:
            raise UserError(f"layer {ours.layer_idx}: no float weights for {', '.join(sorted(shapes))}; packed layers "
                            "cannot be written back", "save the compressed model as an artifact instead")
        for name, buffer in list(stock.named_buffers()):
            if buffer.is_meta:  # weightless norms: constant ones
                parent, _, leaf = name.rpartition(".")
                setattr(stock.get_submodule(parent), leaf, nn.Buffer(torch.ones(buffer.shape), persistent=False))
        return stock.train(ours.training)

    def stock_name(self, our_name: str) -> str:
        """The stock name of a tensor of an adopted host; a stock name is its own."""
        head, found, tail = our_name.partition(".mixer.")
        return f"{head}.mixer.{self.names.get(tail, tail)}" if found else our_name

    # -- the map -----------------------------------------------------------------------------------------------------

    def model_map(self, host: Any) -> ModelMap:
        """The map of an adopted transformers language model."""
        blocks = [Block.of(i, f"backbone.layers.{i}", module) for i, module in enumerate(host.backbone.layers)]
        config = host.config
        model_map = ModelMap(
            host=host, family=self.model_type, blocks=blocks,
            embedding=Site("embed", "embedding", host, "backbone.embeddings", writes=RESIDUAL,
                           layout="embedding"),
            final_norm=host.backbone.norm_f, final_norm_path="backbone.norm_f",
            head=Site("head", "head", host, "lm_head", reads=RESIDUAL),
            tied=bool(config.tie_word_embeddings), residual=Stream(RESIDUAL, config.hidden_size))
        model_map.left_alone = parameters_left_alone(model_map)
        return model_map

    # -- proof -------------------------------------------------------------------------------------------------------

    def prove(self, config: Any) -> float:
        """Compare with the stock mixer in fp64 on a small random instance; returns the worst relative difference.

        Raises UserError naming the mixer where they differ by more than 1e-9 in one shot, step by step, in chunks or
        left-padded.
        """
        small = self.shrink(copy.deepcopy(config))
        worst = 0.0
        with torch.random.fork_rng(devices=[]), torch.no_grad(), KeepDouble(), _quiet():
            torch.manual_seed(0)
            self._prove_norm(small.hidden_size)
            for layer_idx in range(2):
                stock = self.stock_mixer(small, layer_idx)
                _randomise(stock)
                stock = stock.double().eval()
                ours = self.adopt_mixer(stock, small, layer_idx)
                x_BLD = torch.randn(2, 7, small.hidden_size, dtype=torch.float64)
                with _without_extensions(stock):
                    expected = stock(x_BLD)
                one_shot = ours(x_BLD)
                mask = torch.ones(2, 7)
                mask[0, :3] = 0
                pairs = {"in one shot": (one_shot, expected), "step by step": (_continued(ours, x_BLD, 1), expected),
                         "in chunks": (_continued(ours, x_BLD, 3), expected)}
                if getattr(ours.in_proj, "bias", None) is None:
                    # With an input bias the stock mixer lets padding into its state; ours does not.
                    with _without_extensions(stock):
                        padded = stock(x_BLD, attention_mask=mask)
                    pairs["left-padded"] = (ours(x_BLD, attention_mask=mask)[0, 3:], padded[0, 3:])
                for how, (got, want) in pairs.items():
                    difference = ((got - want).abs().max() / want.abs().max()).item()
                    if not difference < 1e-9:
                        raise UserError(f"our mixer and {type(stock).__name__} differ by {difference:.1e} {how}: this "
                                        "version of transformers computes something else",
                                        "report the model and the version")
                    worst = max(worst, difference)
        return worst

    def _prove_norm(self, size: int) -> None:
        stock = self.stock_norm()(size, eps=1e-2).double()
        _randomise(stock)
        x_LD = torch.randn(5, size, dtype=torch.float64)
        difference = (self.adopt_norm(stock)(x_LD) - stock(x_LD)).abs().max().item()
        if not difference < 1e-9:
            raise UserError(f"our RMS norm and {type(stock).__name__} differ by {difference:.1e}: this version of "
                            "transformers computes something else", "report the model and the version")

    def check_real(self, stock: nn.Module, ours: Hosted) -> None:
        """The first real mixer must agree with ours on its real weights."""
        weight = ours.get_parameter("in_proj.weight")
        if weight.is_meta:
            return
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet(), _without_extensions(stock):
            torch.manual_seed(0)
            x_BLD = torch.randn(1, 5, weight.shape[1]).to(weight)
            got, want = ours(x_BLD).float(), stock(x_BLD).float()
        tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        difference = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        if not difference < tolerance:
            raise UserError(f"layer {ours.layer_idx}: our mixer and {type(stock).__name__} differ by {difference:.1e} "
                            "on the real weights", "check the checkpoint for NaN or Inf weights")


def adopt_host(family: Family, host: Any, *, prove: bool = True) -> ModelMap:
    """Replace every stock mixer and norm of ``host`` in place; a host already adopted is only mapped."""
    layers = host.backbone.layers
    if not isinstance(layers[0].mixer, Hosted):
        if prove:
            family.prove(host.config)
        adopted = [family.adopt_mixer(layer.mixer, host.config, i) for i, layer in enumerate(layers)]
        family.check_real(layers[0].mixer, adopted[0])
        for layer, ours in zip(layers, adopted, strict=True):
            layer.mixer, layer.norm = ours, family.adopt_norm(layer.norm)
        host.backbone.norm_f = family.adopt_norm(host.backbone.norm_f)
    return family.model_map(host)


def restore_host(family: Family, host: Any) -> Any:
    """Put stock mixers and norms back, bit for bit; returns the host."""
    for layer in host.backbone.layers:
        if isinstance(layer.mixer, Hosted):
            layer.mixer = family.restore_mixer(layer.mixer, host.config)
        layer.norm = family.restore_norm(layer.norm)
    host.backbone.norm_f = family.restore_norm(host.backbone.norm_f)
    return host


def _continued(mixer: Mixer, x_BLD: Tensor, size: int) -> Tensor:
    state, outputs = None, []
    for chunk_BlD in x_BLD.split(size, dim=1):
        y_BlD, state = mixer.mix(chunk_BlD, state)
        outputs.append(y_BlD)
    return torch.cat(outputs, 1)


@contextmanager
def _without_extensions(stock: nn.Module) -> Iterator[None]:
    """The stock mixer by the formulas in its own file: where mamba_ssm or causal_conv1d is installed, transformers
    calls their CUDA kernels whatever the device and dtype, and they refuse a processor's tensors and fp64.
    """
    file = vars(sys.modules[type(stock).__module__])
    wrapped = {name: getattr(value, "__wrapped__", None) for name, value in file.items() if inspect.isfunction(value)}
    plain = {name: value for name, value in wrapped.items() if inspect.isfunction(value)}
    called = {name: file[name] for name in plain}
    file.update(plain)
    try:
        yield
    finally:
        file.update(called)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' hints to install the stock mixers' kernels: only the proof runs them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _assign(root: nn.Module, name: str, source: Tensor, shape: torch.Size) -> None:
    parent_path, _, leaf = name.rpartition(".")
    parent = root.get_submodule(parent_path)
    if source.shape != shape:
        source = nn.Parameter(source.data.view(shape), requires_grad=source.requires_grad)
    setattr(parent, leaf, source)


def _randomise(mixer: nn.Module) -> None:
    for name, parameter in mixer.named_parameters():
        spread = 0.5 if parameter.dim() > 1 else 0.3
        parameter.data.normal_(0.0, spread)
        if name.endswith("norm.weight"):
            parameter.data.add_(1.0)


__all__ = ["Family", "Hosted", "HostedS6", "HostedSSD", "adopt_host", "restore_host"]
