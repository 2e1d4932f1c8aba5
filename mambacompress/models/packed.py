"""What the artifact stores and the kernels multiply: packed linears, embeddings and heads, and the online rotation.

A packed module holds integer codes and scales as buffers, never a float copy, and its forward is one kernel op.
``spec()`` describes it in JSON and ``build(spec)`` makes the empty module of a spec (on meta too), to be filled from
the file. ``.half()`` or ``.to(bfloat16)`` moves it between devices but leaves codes and scales as they are; only the
dtype it answers with follows.

transformers touches ``weight`` of modules it did not write (``_init_weights``, ``lm_head.weight.dtype``): ``weight``
answers with the right shape, dtype and device from one single NaN, which is no parameter and in no state dict.
Whoever multiplies it past the packed forward gets NaN, not a wrong answer; what is written to it goes nowhere.

``arrange`` reorders the codes of a loaded model for the native kernels of this processor (``tiled``); state dicts,
lookups and ``codes()`` show rows as before.

Legend: O outputs, I inputs, V vocabulary, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.kernels import native
from mambacompress.kernels.hadamard import hadamard, hadamard_matrix, largest_block, supported
from mambacompress.models.packed_head import HeadParts
from mambacompress.models.packed_sparse import (
    PackedSparseEmbedding,
    PackedSparseHead,
    PackedSparseLinear,
    SparseWeight,
)
from mambacompress.models.packed_weight import ActivationFormat, PackedWeight, WeightFormat, static_scale


class PackedLinear(PackedWeight):
    """y = x Wᵀ + b with packed W [O, I]; bias: fp32 [O]."""

    bias: Tensor | None
    act_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, weights: WeightFormat, activations: ActivationFormat,
                 bias: bool = False) -> None:
        super().__init__(out_features, in_features, weights)
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("act_scale", torch.ones(()) if activations.mode == "tensor" else None)

    @classmethod
    def from_float(cls, weight: Tensor | None, bias: Tensor | None = None, *, weights: WeightFormat,
                   activations: ActivationFormat, act_scale: Tensor | float | None = None, codes: Tensor | None = None,
                   scale: Tensor | None = None, zero: Tensor | None = None) -> PackedLinear:
        """Pack a float weight [O, I] (round to nearest), or codes and scales chosen elsewhere."""
        given = weight if codes is None else codes
        if given is None:
            raise ValueError("a packed linear is made from a float weight, or from codes and scales")
        rows, columns = given.shape
        packed = cls(columns, rows, weights=weights, activations=activations, bias=bias is not None)
        packed._fill(weight, codes, scale, zero)
        if bias is not None:
            packed.bias = bias.detach().float().clone()
        packed.act_scale = static_scale(activations, act_scale)
        return packed.to(given.device)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedLinear", "in_features": self.in_features, "out_features": self.out_features,
                "weights": self.weights.to_dict(), "activations": self.activations.to_dict(),
                "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias, self.activations, self.act_scale)


class PackedEmbedding(PackedWeight):
    """Rows of a packed [V, D] table; only the rows looked up are dequantized."""

    def __init__(self, vocabulary: int, size: int, *, weights: WeightFormat) -> None:
        super().__init__(vocabulary, size, weights)
        self.num_embeddings, self.embedding_dim = vocabulary, size

    @classmethod
    def from_float(cls, weight: Tensor, *, weights: WeightFormat, codes: Tensor | None = None,
                   scale: Tensor | None = None) -> PackedEmbedding:
        """Pack a float table [V, D]."""
        packed = cls(*weight.shape, weights=weights)
        packed._fill(weight, codes, scale)
        return packed.to(weight.device)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedEmbedding", "vocabulary": self.rows, "size": self.columns,
                "weights": self.weights.to_dict()}

    def forward(self, ids: Tensor) -> Tensor:
        return self._lookup(ids)


class PackedHead(HeadParts, PackedWeight):
    """logits = (x T) Wᵀ + b; W [V, D] is the embedding's own tensors where tied, T [D, D] an optional float matrix
    before it.
    """

    def __init__(self, vocabulary: int, size: int, *, weights: WeightFormat, activations: ActivationFormat,
                 transform: str | None = None, bias: bool = False) -> None:
        super().__init__(vocabulary, size, weights)
        self._register_parts(activations, transform, bias)

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None, *, weights: WeightFormat,
                   activations: ActivationFormat, act_scale: Tensor | float | None = None, codes: Tensor | None = None,
                   scale: Tensor | None = None, transform: Tensor | None = None) -> PackedHead:
        """An untied head from its own float weight [V, D]."""
        head = cls(*weight.shape, weights=weights, activations=activations, bias=bias is not None)
        head._fill(weight, codes, scale)
        return head._calibrated(act_scale, transform, bias).to(weight.device)

    @classmethod
    def _like(cls, embedding: Any, activations: ActivationFormat) -> PackedHead:
        return cls(embedding.rows, embedding.columns, weights=embedding.weights, activations=activations)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedHead", "vocabulary": self.rows, "size": self.columns, "weights": self.weights.to_dict(),
                **self._spec_of_parts()}


class OnlineHadamard(nn.Module):
    """x -> x R, R = diag(signs) H in blocks: a rotation at run time. signs: int8 [size], drawn from ``seed`` or
    given.
    """

    signs: Tensor

    def __init__(self, size: int, *, seed: int = 0, block: int | None = None, signs: Tensor | None = None) -> None:
        super().__init__()
        self.size, self.seed, self.block = size, seed, size if block is None else block
        if self.block < 1 or size % self.block or not supported(self.block):
            raise ValueError(f"an online Hadamard of {size} channels in blocks of {self.block} is not in the table; "
                             f"the largest block is {largest_block(size)}")
        if signs is not None and (signs.shape != (size,) or not bool((signs.abs() == 1).all())):
            raise ValueError(f"signs are ±1, one of each of the {size} channels")
        if torch.empty(0).is_meta:
            signs = torch.empty(size, dtype=torch.int8)
        elif signs is None:
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1
        self.register_buffer("signs", signs.to(torch.int8))

    def spec(self) -> dict[str, Any]:
        return {"type": "OnlineHadamard", "size": self.size, "seed": self.seed, "block": self.block}

    def matrix(self) -> Tensor:
        """R [size, size] in fp64."""
        blocks = torch.block_diag(*[hadamard_matrix(self.block)] * (self.size // self.block)).to(self.signs.device)
        return self.signs.double()[:, None] * blocks

    def nbytes(self) -> int:
        """Bytes of the signs."""
        return self.signs.numel()

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, self.signs, block=self.block)


PACKED = (PackedLinear, PackedSparseLinear, PackedEmbedding, PackedSparseEmbedding, PackedHead, PackedSparseHead)


def arrange(model: nn.Module) -> None:
    """Move all tensors of a model into one memory, in their order, and rearrange its packed weights; what held them
    before, a mapped file say, is let go.

    Tensors that modules share stay shared; nothing happens where kernels take rows, or other devices hold the model.
    """
    _stream(model)
    if not _takes_tiles(model):
        return
    owners: list[Any] = [owner for m in model.modules() for owner in (m._parameters, m._buffers)]
    held = [(owner, name) for owner in owners for name, tensor in owner.items()
            if tensor is not None and tensor.numel()]
    tensors: dict[int, Tensor] = {owner[name].data_ptr(): owner[name] for owner, name in held}
    moved: dict[int, Tensor] = {}
    for place, (address, tensor) in zip(native.places([t.nbytes for t in tensors.values()]), tensors.items(),
                                        strict=True):
        moved[address] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    for owner, name in held:
        if isinstance(owner[name], nn.Parameter):  # one that modules share is met again, moved
            owner[name].data = moved.get(owner[name].data_ptr(), owner[name].data)
        else:
            owner[name] = moved[owner[name].data_ptr()]
    rearrange(model)


def rearrange(model: nn.Module) -> None:
    """Rearrange every packed weight of a model, where it lies, for the native kernels of this processor: in tiles."""
    _stream(model)
    if not _takes_tiles(model):
        return
    packed = [module for module in model.modules() if isinstance(module, PackedWeight) and module.tileable()]
    for module in {module.qweight.data_ptr(): module for module in packed}.values():
        module.tile()
    for module in packed:
        module.tiled = True


def _stream(model: nn.Module) -> None:
    """The same of sparse weights, into one memory of their own: every native level takes them so."""
    if native.library() is None or not _on_cpu(model):
        return
    sharing: dict[int, list[SparseWeight]] = {}
    for module in model.modules():
        if isinstance(module, SparseWeight) and module.tileable():
            sharing.setdefault(module.values.data_ptr(), []).append(module)
    rooms = native.places([owner.stream_bytes() for owner, *_ in sharing.values()])
    for (owner, *others), room in zip(sharing.values(), rooms, strict=True):
        owner.tile(room)
        for other in others:
            other.share(owner)


def _on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def _takes_tiles(model: nn.Module) -> bool:
    return _on_cpu(model) and native.library() is not None and native.level() == "avx512"


def build(spec: dict[str, Any]) -> nn.Module:
    """The empty module a ``spec()`` of this file describes. Raises ValueError for an unknown type."""
    kinds: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (*PACKED, OnlineHadamard)}
    if spec["type"] not in kinds:
        raise ValueError(f"unknown module type {spec['type']!r}; known: {', '.join(kinds)}")
    arguments = {key: value for key, value in spec.items() if key != "type"}
    if isinstance(arguments.get("weights"), dict):
        arguments["weights"] = WeightFormat.from_dict(arguments["weights"])
    if "activations" in arguments:
        arguments["activations"] = ActivationFormat.from_dict(arguments["activations"])
    return kinds[spec["type"]](**arguments)


__all__ = ["PACKED", "ActivationFormat", "HeadParts", "OnlineHadamard", "PackedEmbedding", "PackedHead",
           "PackedLinear", "PackedSparseEmbedding", "PackedSparseHead", "PackedSparseLinear", "SparseWeight",
           "WeightFormat", "arrange", "build", "rearrange"]
