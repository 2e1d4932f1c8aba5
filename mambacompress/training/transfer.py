"""From attention to state space: a transformer's attention layers become Mamba-2 mixers that start as linear attention.

The dual form of SSD *is* masked linear attention with a decay, so its projections can start as the attention's own:

    q -> C / sqrt(head size)      k -> B      v -> x      o -> out_proj

a head, N = the size of a q or k, P = the size of a v. The convolution starts as the identity and has no activation, dt
starts at 1, the decay of a head as slow as ``DECAYS``, gate and skip constant; with them the mixer's matrix is
(q_i . k_j) / sqrt(N) times the decay, exactly (a test). Keys and values that heads share are repeated: SSD's groups
share C as well. Positional rotations are not carried over: the decay takes their place. What the softmax did to the
output's size is put into the norm's weight (``calibrate``).

Then the student learns what the softmax did: layer by layer on the teacher's inputs (outputs, or the matrices
themselves), and end to end on the logits: ``distill`` with ``layers``, ``matrices`` and ``kl``. Layers named in
``keep`` stay attention (hybrids). Sources: MambaInLlama (arXiv 2408.15237), MOHAWK (2408.10189), mmMamba (2502.13145).

Legend: B batch, L tokens, D d_model, H heads, P head size of v, N head size of q and k, E = H P.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError
from mambacompress.models.mixers import SSDMixer
from mambacompress.models.modelmap import set_module
from mambacompress.models.paths import DepthwiseConv

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
DECAYS = (1e-3, 3e-2)  # of a head, a token: from the slowest head to the fastest
GATE = 1.2784645  # SiLU of it is 1


class SSDAttention(nn.Module):
    """An SSDMixer in an attention layer's place: takes its arguments, answers (output [B, L, D], None).

    It has no key-value cache: a model that holds one must be run on whole sequences (``use_cache=False``).
    """

    def __init__(self, mixer: SSDMixer, layer_idx: int | None = None) -> None:
        super().__init__()
        self.mixer, self.layer_idx = mixer, layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:
            raise UserError("a layer turned into a state space keeps no keys and values",
                            "call the model with use_cache=False")
        return self.mixer.mix(hidden_states)[0], None


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every attention layer with separate q, k, v and o projections."""
    return {path: module for path, module in model.named_modules()
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS)}


def to_state_space(model: nn.Module, *, keep: Collection[int] = (), conv_width: int = 4) -> nn.Module:
    """A copy of ``model`` with its attention layers seeded into Mamba-2 mixers, but for those whose number is in
    ``keep``; the model itself is left as it is.

    Raises UserError where no layer has projections of its own, where all are kept, and for a layer that does not exist.
    """
    student = copy.deepcopy(model)
    layers = list(attention_layers(student).items())
    if not layers:
        raise UserError(f"this {type(model).__name__} has no attention layer with {', '.join(PROJECTIONS)}",
                        "name a transformer whose projections are separate")
    wrong = [i for i in keep if not 0 <= i < len(layers)]
    if wrong or len(set(keep)) == len(layers):
        raise UserError(f"cannot keep layers {sorted(keep)} of {len(layers)}",
                        "keep some layers, counted from 0, and leave at least one to change")
    config = getattr(model, "config", None)
    for i, (path, layer) in enumerate(layers):
        if i not in keep:
            heads = int(getattr(layer, "num_heads", 0) or getattr(config, "num_attention_heads", 0))
            mixer = seeded(layer, heads, conv_width=conv_width)
            set_module(student, path, SSDAttention(mixer, getattr(layer, "layer_idx", i)).train(model.training))
    return student


@torch.no_grad()
def seeded(layer: nn.Module, heads: int, *, conv_width: int = 4) -> SSDMixer:
    """A mixer that starts as ``layer`` without its softmax. heads: of the queries; raises UserError where they do not
    divide its projections.
    """
    q, k, v, o = (layer.get_submodule(name) for name in PROJECTIONS)
    q_W, k_W, v_W, o_W = (module.get_parameter("weight") for module in (q, k, v, o))
    D, E = q_W.shape[1], o_W.shape[1]
    if heads < 1 or q_W.shape[0] % heads or E % heads:
        raise UserError(f"{heads} heads do not divide projections of {q_W.shape[0]} and {E}",
                        "check num_attention_heads in the configuration")
    N, P = q_W.shape[0] // heads, E // heads
    if k_W.shape[0] % N or heads % (k_W.shape[0] // N) or v_W.shape[0] * N != k_W.shape[0] * P:
        raise UserError(f"keys of {k_W.shape[0]} and values of {v_W.shape[0]} do not fit {heads} heads of {N}",
                        "only multi-head and grouped-query attention can be seeded")
    shared = heads // (k_W.shape[0] // N)
    mixer = SSDMixer(D, heads=heads, head_dim=P, d_state=N, groups=heads, conv_width=conv_width, bias=True)
    mixer.conv = DepthwiseConv(E + 2 * heads * N, conv_width, activation=False)
    mixer.conv.weight.zero_()[:, -1] = 1
    weight, bias = mixer.in_proj.get_parameter("weight").zero_(), mixer.in_proj.get_parameter("bias").zero_()
    bias[:E] = GATE
    start = E
    for module, size, repeats, scale in ((v, P, shared, 1.0), (k, N, shared, 1.0), (q, N, 1, N**-0.5)):
        rows = heads * size
        for target, source in ((weight, module.get_parameter("weight")), (bias, getattr(module, "bias", None))):
            if source is not None:
                repeated = source.unflatten(0, (-1, size)).repeat_interleave(repeats, 0).flatten(0, 1)
                target[start : start + rows] = repeated * scale
        start += rows
    mixer.dt_bias.fill_(math.log(math.expm1(1)))  # softplus of it is 1
    mixer.A_log.copy_(torch.linspace(math.log(DECAYS[0]), math.log(DECAYS[1]), heads))
    mixer.D.zero_()
    out, o_bias = mixer.out_proj, getattr(o, "bias", None)
    out.get_parameter("weight").copy_(o_W)
    if o_bias is None:
        out.get_parameter("bias").zero_()
    else:
        out.get_parameter("bias").copy_(o_bias)
    return mixer.to(q_W)


@torch.no_grad()
def calibrate(student: nn.Module, teacher: nn.Module, inputs: Tensor) -> None:
    """Give every seeded mixer's norm the size of what its attention put into o_proj: rms a channel over ``inputs``,
    token ids [B, L].
    """
    sizes: dict[str, Tensor] = {}
    handles = []
    for path, layer in attention_layers(teacher).items():
        def size(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            sizes[path] = args[0].float().square().flatten(0, -2).mean(0).sqrt()

        handles.append(layer.get_submodule("o_proj").register_forward_pre_hook(size))
    try:
        teacher(input_ids=inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for path, module in student.named_modules():
        if isinstance(module, SSDAttention):
            module.mixer.norm_weight.copy_(sizes[path])


def transfer_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(mixer's layer, attention layer) of every layer that was turned: for ``distill(layers=...)``."""
    return [(module, teacher.get_submodule(path)) for path, module in student.named_modules()
            if isinstance(module, SSDAttention)]
