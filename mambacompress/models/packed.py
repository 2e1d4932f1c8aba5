"""What the artifact stores and the kernels multiply: packed linears, embeddings and heads, and the online rotation.

A packed module holds integer codes and scales as buffers, never a float copy, and its forward is one kernel op. ``spec()``
describes it in JSON and ``build(spec)`` makes the empty module of a spec (on meta too), to be filled from the file.

transformers touches ``weight`` of modules it did not write (``_init_weights``, ``lm_head.weight.dtype``): ``weight`` answers
with a meta tensor of the right shape and dtype, which is no parameter and in no state dict.

Legend: O outputs, I inputs, g group size, V vocabulary, D d_model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.kernels.hadamard import hadamard, hadamard_matrix, supported
from mambacompress.kernels.int4_linear import int4_linear
from mambacompress.kernels.int8_linear import int8_linear
from mambacompress.numerics import dequantize, pack_int4, quantize_symmetric, unpack_int4


@dataclass(frozen=True)
class WeightFormat:
    """bits: 8 or 4. group_size: columns that share a scale, None for a whole row."""

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"weights have 8 or 4 bits, not {self.bits}")
        if self.bits == 8 and self.group_size is not None:
            raise ValueError("int8 weights have one scale a row, no groups")

    @property
    def scale_dtype(self) -> torch.dtype:
        """fp16 for groups, fp32 for whole rows."""
        return torch.float32 if self.group_size is None else torch.float16


@dataclass(frozen=True)
class ActivationFormat:
    """mode: token (dynamic, a scale a token), tensor (static) or none (float). bits: 8 or 4 (int4-range codes)."""

    mode: str = "none"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.mode not in ("token", "tensor", "none") or self.bits not in (8, 4):
            raise ValueError(f"activations are token, tensor or none at 8 or 4 bits, not {self.mode} at {self.bits}")


class _Packed(nn.Module):
    """Codes and scales of a [rows, columns] matrix."""

    qweight: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int, weights: WeightFormat) -> None:
        super().__init__()
        group = columns if weights.group_size is None else weights.group_size
        if columns % group:
            raise ValueError(f"groups of {group} do not divide the {columns} columns of a [{rows}, {columns}] weight")
        if weights.bits == 4 and columns % 2:
            raise ValueError(f"a [{rows}, {columns}] weight has an odd number of columns: 4-bit codes are packed two a byte")
        self.rows, self.columns, self.weights = rows, columns, weights
        shape = (rows, columns) if weights.bits == 8 else (rows, columns // 2)
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.int8 if weights.bits == 8 else torch.uint8))
        scales = (rows,) if weights.group_size is None else (rows, columns // group)
        self.register_buffer("scale", torch.ones(scales, dtype=weights.scale_dtype))

    def _fill(self, weight: Tensor | None, codes: Tensor | None, scale: Tensor | None) -> None:
        """From a float weight by rounding to nearest, or from codes chosen elsewhere."""
        if codes is None or scale is None:
            if weight is None:
                raise ValueError("a packed module is made from a float weight, or from codes and scales")
            codes, scale = quantize_symmetric(weight.detach(), self.weights.bits, self.weights.group_size,
                                              scale_dtype=self.weights.scale_dtype)
        if scale.shape != self.scale.shape or codes.shape != (self.rows, self.columns):
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} do not fit "
                             f"[{self.rows}, {self.columns}] with scales {tuple(self.scale.shape)}")
        if (scale.to(self.scale.dtype).to(scale.dtype) != scale).any():
            raise ValueError(f"the scales do not survive being stored as {self.scale.dtype}")
        self.qweight = pack_int4(codes) if self.weights.bits == 4 else codes.to(torch.int8)
        self.scale = scale.to(self.scale.dtype)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the float weight this stands for; a meta tensor without data."""
        return torch.empty(self.rows, self.columns, dtype=torch.float32, device="meta")

    def codes(self) -> Tensor:
        """int8 [rows, columns]."""
        return unpack_int4(self.qweight) if self.weights.bits == 4 else self.qweight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight the codes stand for, [rows, columns]."""
        return dequantize(self.codes(), self.scale, dtype)

    def nbytes(self) -> int:
        """Bytes of every tensor of this module."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def _multiply(self, x: Tensor, bias: Tensor | None, activations: ActivationFormat, act_scale: Tensor | None) -> Tensor:
        if self.weights.bits == 4:
            return int4_linear(x, self.qweight, self.scale.reshape(self.rows, -1), bias, group_size=self.weights.group_size,
                               activation=activations.mode, act_scale=act_scale, act_bits=activations.bits)
        return int8_linear(x, self.qweight, self.scale, bias, activation=activations.mode, act_scale=act_scale,
                           act_bits=activations.bits)


class PackedLinear(_Packed):
    """y = x Wᵀ + b with packed W [O, I]."""

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
                   scale: Tensor | None = None) -> PackedLinear:
        """Pack a float weight [O, I] (round to nearest), or codes and scales chosen elsewhere."""
        rows, columns = (weight if codes is None else codes).shape  # type: ignore[union-attr]
        packed = cls(columns, rows, weights=weights, activations=activations, bias=bias is not None)
        packed._fill(weight, codes, scale)
        if bias is not None:
            packed.bias = bias.detach().float().clone()
        if activations.mode == "tensor":
            if act_scale is None:
                raise ValueError("static activations need a scale from calibration")
            packed.act_scale = torch.as_tensor(act_scale, dtype=torch.float32).reshape(())
        return packed

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedLinear", "in_features": self.in_features, "out_features": self.out_features,
                "weights": asdict(self.weights), "activations": asdict(self.activations), "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias, self.activations, self.act_scale)


class PackedEmbedding(_Packed):
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
        return packed

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedEmbedding", "vocabulary": self.rows, "size": self.columns, "weights": asdict(self.weights)}

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.qweight[ids.reshape(-1)]
        codes = unpack_int4(rows) if self.weights.bits == 4 else rows
        return dequantize(codes, self.scale[ids.reshape(-1)]).reshape(*ids.shape, self.columns)


class PackedHead(_Packed):
    """logits = (x T) Wᵀ; W [V, D] is the embedding's own tensors where tied, T [D, D] an optional float matrix before it."""

    act_scale: Tensor | None
    transform: Tensor | None

    def __init__(self, vocabulary: int, size: int, *, weights: WeightFormat, activations: ActivationFormat,
                 transform: str | None = None) -> None:
        super().__init__(vocabulary, size, weights)
        self.activations = activations
        self.register_buffer("act_scale", torch.ones(()) if activations.mode == "tensor" else None)
        dtype = None if transform is None else getattr(torch, transform)
        self.register_buffer("transform", None if dtype is None else torch.eye(size, dtype=dtype))

    @classmethod
    def from_float(cls, weight: Tensor, *, weights: WeightFormat, activations: ActivationFormat,
                   act_scale: Tensor | float | None = None, codes: Tensor | None = None,
                   scale: Tensor | None = None) -> PackedHead:
        """An untied head from its own float weight [V, D]."""
        head = cls(*weight.shape, weights=weights, activations=activations)
        head._fill(weight, codes, scale)
        return head.calibrated(act_scale)

    @classmethod
    def sharing(cls, embedding: PackedEmbedding, *, activations: ActivationFormat, act_scale: Tensor | float | None = None,
                transform: Tensor | None = None) -> PackedHead:
        """A tied head on the embedding's tensors."""
        dtype = None if transform is None else str(transform.dtype).removeprefix("torch.")
        head = cls(embedding.rows, embedding.columns, weights=embedding.weights, activations=activations, transform=dtype)
        head.transform = transform
        head.tie(embedding)
        return head.calibrated(act_scale)

    def calibrated(self, act_scale: Tensor | float | None) -> PackedHead:
        if self.activations.mode == "tensor":
            if act_scale is None:
                raise ValueError("static activations need a scale from calibration")
            self.act_scale = torch.as_tensor(act_scale, dtype=torch.float32).reshape(())
        return self

    def tie(self, embedding: nn.Module) -> None:
        """Share the embedding's codes and scales; raises ValueError where they have another format."""
        if not isinstance(embedding, PackedEmbedding) or embedding.weights != self.weights:
            raise ValueError("a tied packed head needs a packed embedding of the same format")
        self.qweight, self.scale = embedding.qweight, embedding.scale

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedHead", "vocabulary": self.rows, "size": self.columns, "weights": asdict(self.weights),
                "activations": asdict(self.activations),
                "transform": None if self.transform is None else str(self.transform.dtype).removeprefix("torch.")}

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = x @ self.transform.to(x.dtype)
        return self._multiply(x, None, self.activations, self.act_scale)


class OnlineHadamard(nn.Module):
    """x -> x R, R = diag(signs) H in blocks: a rotation at run time. signs: int8 [size], drawn from ``seed``."""

    signs: Tensor

    def __init__(self, size: int, *, seed: int = 0, block: int | None = None) -> None:
        super().__init__()
        self.size, self.seed, self.block = size, seed, size if block is None else block
        if size % self.block or not supported(self.block):
            raise ValueError(f"an online Hadamard of {size} channels in blocks of {self.block} is not in the table")
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1
        meta = torch.empty(0).is_meta
        self.register_buffer("signs", torch.empty(size, dtype=torch.int8) if meta else signs.to(torch.int8))

    def spec(self) -> dict[str, Any]:
        return {"type": "OnlineHadamard", "size": self.size, "seed": self.seed, "block": self.block}

    def matrix(self) -> Tensor:
        """R [size, size] in fp64."""
        blocks = torch.block_diag(*[hadamard_matrix(self.block)] * (self.size // self.block))
        return self.signs.double()[:, None] * blocks

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, self.signs, block=self.block)


PACKED = (PackedLinear, PackedEmbedding, PackedHead)


def build(spec: dict[str, Any]) -> nn.Module:
    """The empty module a ``spec()`` of this file describes. Raises ValueError for an unknown type."""
    kinds: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (*PACKED, OnlineHadamard)}
    if spec["type"] not in kinds:
        raise ValueError(f"unknown module type {spec['type']!r}; known: {', '.join(kinds)}")
    arguments = {key: value for key, value in spec.items() if key != "type"}
    if "weights" in arguments:
        arguments["weights"] = WeightFormat(**arguments["weights"])
    if "activations" in arguments:
        arguments["activations"] = ActivationFormat(**arguments["activations"])
    return kinds[spec["type"]](**arguments)
