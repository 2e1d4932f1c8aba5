"""Quantization-aware training: the forward is the packed model's, bit for bit; gradients pass straight through.

``aware(model, format)`` puts, in place of every matrix the format names, a module that keeps the float weight and, at
each call, rounds it with the packer's own rounding and multiplies with the packed kernel:

    forward    y = packed(W)(x)                       codes, scales and integer kernel of the artifact
    backward   dx = dy Ŵ,  dW = dyᵀ x̂,  db = sum dy    with the rounded weight and the rounded input

so that what is trained *is* what is packed afterwards (``pack``, or ``mc.quantize`` with a recipe of that ``quantize``
step alone), not a simulation of it. Rounding to nearest never clips weights and, a scale a token, never clips inputs:
the straight-through gradient has no dead zone. Source: Jacob et al. (arXiv 1712.05877), distilled as in LLM-QAT
(2305.17888).

The zeros of a model that says it is N:M sparse stay zeros: their gradient is masked, so that neither a step nor weight
decay moves them.

Formats that need calibration (static activations, int8 scans, searched scales) or move weights (folds, rotations) are
refused: round in the basis the model is trained in.

Legend: O outputs, I inputs, V vocabulary, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.errors import UserError
from mambacompress.models.lm import LanguageModel
from mambacompress.models.modelmap import ModelMap, set_module
from mambacompress.models.packed import (
    ActivationFormat,
    PackedEmbedding,
    PackedHead,
    PackedLinear,
    WeightFormat,
    rearrange,
)
from mambacompress.numerics import fake_quantize_activation, fake_quantize_weight
from mambacompress.passes.patterns import declared
from mambacompress.passes.rounding import check_groups
from mambacompress.schema import MapFormat, QuantizeConfig


class _Packed(torch.autograd.Function):
    """y = packed(W)(x) + b; see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, weights: WeightFormat,
                activations: ActivationFormat, kept_OI: Tensor | None) -> Tensor:
        packed = PackedLinear.from_float(weight_OI, bias, weights=weights, activations=activations)
        if activations.mode == "none":  # a float sum depends on the order: that of a loaded artifact
            rearrange(packed)
        ctx.save_for_backward(x, packed.dequantize(), kept_OI)
        ctx.activations, ctx.biased = activations, bias is not None
        return packed(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, rounded_OI, kept_OI = ctx.saved_tensors
        (dy,) = grads
        seen = x if ctx.activations.mode == "none" else fake_quantize_activation(x, ctx.activations.mode,
                                                                                 ctx.activations.bits)
        flat_dy, flat_x = dy.flatten(0, -2), seen.flatten(0, -2)
        dx = (dy @ rounded_OI.to(dy.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dW = flat_dy.float().T @ flat_x.float() if ctx.needs_input_grad[1] else None
        if dW is not None and kept_OI is not None:
            dW = dW.masked_fill(~kept_OI, 0)
        db = flat_dy.float().sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return dx, dW, db, None, None, None


class FakeQuantLinear(nn.Module):
    """A linear that computes as it will be packed. weight: [O, I], bias: [O] or None, the very parameters given.
    sparse: its zeros stay.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    kept: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, weights: WeightFormat, activations: ActivationFormat, *,
                 sparse: bool = False) -> None:
        super().__init__()
        self.register_parameter("weight", weight)  # type: ignore[arg-type]
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.weights, self.activations = weights, activations
        self.out_features, self.in_features = weight.shape
        self.register_buffer("kept", weight.detach() != 0 if sparse else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the kernel rounds what it is given
            return _Packed.apply(x, self.weight, self.bias, self.weights, self.activations, self.kept)

    def plain(self) -> nn.Module:
        """The float linear on the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment]
        return linear

    def packed(self) -> nn.Module:
        return PackedLinear.from_float(self.weight.data, None if self.bias is None else self.bias.data,
                                       weights=self.weights, activations=self.activations)


class FakeQuantEmbedding(nn.Module):
    """An embedding that looks up the rows as they will be packed. weight: [V, D]."""

    def __init__(self, weight: nn.Parameter, weights: WeightFormat) -> None:
        super().__init__()
        self.weight, self.weights = weight, weights
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, fake_quantize_weight(self.weight, self.weights.grid))

    def plain(self) -> nn.Module:
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = self.weight
        return embedding

    def packed(self) -> nn.Module:
        return PackedEmbedding.from_float(self.weight.data, weights=self.weights)


FAKE = (FakeQuantLinear, FakeQuantEmbedding)


def aware(model: Any, format_: QuantizeConfig) -> ModelMap:
    """Make an adopted language model compute as ``format_`` will pack it; in place. A tied head stays tied.

    Raises UserError for a format that needs calibration or does not fit a matrix, a model that was made aware or packed
    before, and where nothing matches.
    """
    _check(format_)
    model_map = LanguageModel.of(model).model_map
    if any(isinstance(module, (*FAKE, PackedLinear, PackedEmbedding)) for module in model.modules()):
        raise UserError("this model is quantized already, or trained as if it were", "start from a float model")
    sparse = {tensor for pattern in declared(model_map.host.config) for tensor in pattern.maps}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for block in model_map.blocks:
        for path, sites in block.matrices().items():
            wanted = format_.of(sites[0].tensor)
            if wanted is not None:
                where = f"block {block.index} {sites[0].tensor}"
                linear = block.module.get_submodule(path)
                places.append((block.module, path, _linear(linear, wanted, where, sites[0].tensor in sparse)))
    places += _ends(model_map, format_)
    if not places:
        raise UserError(f"nothing to quantize: this model has no {', '.join(format_.maps)}", "name other `maps`")
    for root, path, module in places:
        set_module(root, path, module)
    return model_map


def plain(model: nn.Module) -> None:
    """Put float modules back in place of the aware ones, on the same parameters."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FAKE):
            set_module(model, path, module.plain())


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Put packed modules in place of the aware ones: the same function, bit for bit."""
    fakes = [(path, module) for path, module in model.named_modules() if isinstance(module, FAKE)]
    if not fakes:
        raise UserError("this model was not trained quantization-aware", "make it so with `aware` first")
    embeddings = {id(module.weight): module.packed() for _, module in fakes if isinstance(module, FakeQuantEmbedding)}
    for path, module in fakes:
        shared = embeddings.get(id(module.weight))
        if isinstance(module, FakeQuantLinear) and isinstance(shared, PackedEmbedding):
            made: nn.Module = PackedHead.sharing(shared, activations=module.activations)
        else:
            made = module.packed() if shared is None else shared
        set_module(model, path, made)
    rearrange(model)


def _ends(model_map: ModelMap, format_: QuantizeConfig) -> list[tuple[nn.Module, str, nn.Module]]:
    made: list[tuple[nn.Module, str, nn.Module]] = []
    embedding, head = format_.of("embedding"), format_.of("head")
    if model_map.tied and (embedding is None) != (head is None):
        raise UserError("embedding and head of this model share one matrix, and only one of them is named",
                        "name both in `maps`, or neither")
    if embedding is not None:
        weight = model_map.embedding.weight
        check_groups("the embedding", weight.shape[1], _weights(embedding).grid)
        made.append((model_map.host, model_map.embedding.path, FakeQuantEmbedding(weight, _weights(embedding))))
    if head is not None:
        if model_map.tied and embedding is not None and _weights(head) != _weights(embedding):
            raise UserError("the head shares the embedding's weight, so both are stored in one format",
                            "give embedding and head the same weights and group_size")
        made.append((model_map.host, model_map.head.path, _linear(model_map.head.module, head, "the head")))
    return made


def _linear(module: nn.Module, format_: MapFormat, where: str, sparse: bool = False) -> FakeQuantLinear:
    if not isinstance(module, nn.Linear):
        raise UserError(f"{where} is a {type(module).__name__}, which cannot be trained quantization-aware",
                        "start from a float model as it was published")
    check_groups(where, module.in_features, _weights(format_).grid)
    return FakeQuantLinear(module.weight, module.bias, _weights(format_), _activations(format_), sparse=sparse)


def _check(format_: QuantizeConfig) -> None:
    static = [name for name in format_.maps if (one := format_.of(name)) and one.activations.endswith("tensor")]
    for what, why in (
            (f"static activations ({', '.join(static)})" if static else "", "their scale comes from calibration"),
            ("scan: int8" if format_.scan != "none" else "", "its scales come from calibration"),
            ("scale_search" if format_.scale_search else "", "training already moves weights to where they round well"),
            ("bias_correction" if format_.bias_correction else "", "it changes the model after training")):
        if what:
            raise UserError(f"{what} cannot be trained: {why}", "leave it out of the format")


def _weights(format_: MapFormat) -> WeightFormat:
    return WeightFormat(format_.bits, format_.group_size)


def _activations(format_: MapFormat) -> ActivationFormat:
    if format_.activations == "none":
        return ActivationFormat()
    kind, _, mode = format_.activations.partition("-")
    return ActivationFormat(mode, 8 if kind == "int8" else 4)


__all__ = ["FakeQuantEmbedding", "FakeQuantLinear", "aware", "pack", "plain"]
