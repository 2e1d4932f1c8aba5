"""What the artifact stores and the kernels multiply: packed linears, embeddings and heads, and the online rotation.

A packed module holds integer codes and scales as buffers, never a float copy, and its forward is one kernel op.
``spec()`` describes it in JSON and ``build(spec)`` makes the empty module of a spec (on meta too), to be filled from
the file. ``.half()`` or ``.to(bfloat16)`` moves it between devices but leaves codes and scales as they are; only the
dtype it answers with follows.

transformers touches ``weight`` of modules it did not write (``_init_weights``, ``lm_head.weight.dtype``): ``weight``
answers with the right shape, dtype and device from one single NaN, which is no parameter and in no state dict.
Whoever multiplies it past the packed forward gets NaN, not a wrong answer; what is written to it goes nowhere.

Legend: O outputs, I inputs, G groups, g group size, V vocabulary, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.kernels.hadamard import hadamard, hadamard_matrix, largest_block, supported
from mambacompress.kernels.int4_linear import int4_linear
from mambacompress.kernels.int8_linear import int8_linear
from mambacompress.numerics import (
    NIBBLE_OFFSET,
    Grid,
    dequantize,
    pack_int4,
    quantize_asymmetric,
    round_to_nearest,
    unpack_int4,
)


@dataclass(frozen=True)
class WeightFormat:
    """bits: 8 or 4. group_size: columns that share a scale, None for a whole row. symmetric: no zero points."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"weights have 8 or 4 bits, not {self.bits}")
        if self.bits == 8 and (self.group_size is not None or not self.symmetric):
            raise ValueError("int8 weights are symmetric with one scale a row: no groups, no zero points")

    @property
    def grid(self) -> Grid:
        """What its codes are rounded to."""
        return Grid(self.bits, self.group_size)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.grid.scale_dtype

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> WeightFormat:
        return cls(**value)


@dataclass(frozen=True)
class ActivationFormat:
    """mode: token (dynamic, a scale a token), tensor (static) or none (float). bits: 8 or 4 (int4-range codes)."""

    mode: str = "none"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.mode not in ("token", "tensor", "none") or self.bits not in (8, 4):
            raise ValueError(f"activations are token, tensor or none at 8 or 4 bits, not {self.mode} at {self.bits}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ActivationFormat:
        return cls(**value)


class _Packed(nn.Module):
    """Codes and scales of a [rows, columns] matrix.

    qweight: int8 [rows, columns], or uint8 [rows, columns / 2]. scale: [rows], or [rows, G] with groups. zero: uint8
    [rows, G] where the format has zero points. dtype: the float dtype this module stands for.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, rows: int, columns: int, weights: WeightFormat) -> None:
        super().__init__()
        group = columns if weights.group_size is None else weights.group_size
        if weights.bits == 4 and columns % 2:
            raise ValueError(f"a [{rows}, {columns}] weight has an odd number of columns: two 4-bit codes "
                             "share a byte")
        if group < 1 or columns % group or (weights.bits == 4 and group % 2):
            raise ValueError(f"groups of {group} do not divide the {columns} columns of a [{rows}, {columns}] weight "
                             "evenly")
        self.rows, self.columns, self.weights, self.dtype = rows, columns, weights, torch.float32
        shape = (rows, columns) if weights.bits == 8 else (rows, columns // 2)
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.int8 if weights.bits == 8 else torch.uint8))
        scales = (rows,) if weights.group_size is None else (rows, columns // group)
        self.register_buffer("scale", torch.ones(scales, dtype=weights.scale_dtype))
        zeros = None if weights.symmetric else torch.full((rows, columns // group), NIBBLE_OFFSET, dtype=torch.uint8)
        self.register_buffer("zero", zeros)

    def _fill(self, weight: Tensor | None, codes: Tensor | None, scale: Tensor | None,
              zero: Tensor | None = None) -> None:
        """From a float weight by rounding to nearest, or from codes chosen elsewhere (zero: int8 -8..7, as the
        codes).
        """
        weights = self.weights
        if codes is None or scale is None:
            if weight is None:
                raise ValueError("a packed module is made from a float weight, or from codes and scales")
            if weights.symmetric:
                codes, scale = round_to_nearest(weight.detach(), weights.grid)
            else:
                codes, scale, zero = quantize_asymmetric(weight.detach(), weights.grid)
            scale = scale.reshape(self.scale.shape)
        if scale.shape != self.scale.shape or codes.shape != (self.rows, self.columns):
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} do not fit "
                             f"[{self.rows}, {self.columns}] with scales {tuple(self.scale.shape)}")
        if (scale.to(self.scale.dtype).to(scale.dtype) != scale).any():
            raise ValueError(f"the scales do not survive being stored as {self.scale.dtype}")
        if (zero is None) != weights.symmetric:
            raise ValueError("zero points go with an asymmetric format, and only with one")
        self.qweight = pack_int4(codes) if weights.bits == 4 else codes.to(torch.int8).contiguous()
        self.scale = scale.to(self.scale.dtype).contiguous()
        if zero is not None:
            self.zero = (zero.to(torch.int8) + NIBBLE_OFFSET).to(torch.uint8).reshape(self.rows, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move buffers, never convert them: codes and scales keep their dtypes."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the float weight this stands for: one NaN, expanded."""
        shape = (self.rows, self.columns)
        answer = torch.full((1, 1), float("nan"), dtype=self.dtype, device=self.qweight.device).expand(shape)
        answer._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves such tensors alone
        return answer

    def codes(self) -> Tensor:
        """int8 [rows, columns]; with zero points, codes - zero."""
        return self._codes(self.qweight, self.zero)

    def _codes(self, qweight: Tensor, zero: Tensor | None) -> Tensor:
        if self.weights.bits == 8:
            return qweight
        codes = unpack_int4(qweight)
        if zero is None:
            return codes
        shift = zero.to(torch.int8) - NIBBLE_OFFSET
        return (codes.unflatten(-1, (zero.shape[-1], -1)) - shift[..., None]).flatten(-2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight the codes stand for, [rows, columns]."""
        return dequantize(self.codes(), self.scale, dtype)

    def nbytes(self) -> int:
        """Bytes of every tensor of this module."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def _multiply(self, x: Tensor, bias: Tensor | None, activations: ActivationFormat,
                  act_scale: Tensor | None) -> Tensor:
        if self.weights.bits == 4:
            return int4_linear(x, self.qweight, self.scale.reshape(self.rows, -1), self.zero, bias,
                               group_size=self.weights.group_size or self.columns, activation=activations.mode,
                               act_scale=act_scale, act_bits=activations.bits)
        return int8_linear(x, self.qweight, self.scale, bias, activation=activations.mode, act_scale=act_scale,
                           act_bits=activations.bits)

    def _lookup(self, ids: Tensor) -> Tensor:
        """Rows [..., columns] in ``dtype``; only these rows are dequantized."""
        flat = ids.reshape(-1)
        if self.weights.bits == 8:
            rows = self.qweight.index_select(0, flat).float() * self.scale.index_select(0, flat)[:, None]
            return rows.to(self.dtype).reshape(*ids.shape, self.columns)
        codes = self._codes(self.qweight[flat], None if self.zero is None else self.zero[flat])
        rows = dequantize(codes, self.scale[flat])
        return rows.to(self.dtype).reshape(*ids.shape, self.columns)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.weights}"


def _static(activations: ActivationFormat, act_scale: Tensor | float | None) -> Tensor | None:
    """The scale of static activations as a fp32 scalar, None for the other modes."""
    if activations.mode != "tensor":
        return None
    if act_scale is None:
        raise ValueError("static activations need a scale from calibration")
    value = torch.as_tensor(act_scale, dtype=torch.float32).reshape(())
    if not torch.isfinite(value) or value <= 0:
        raise ValueError(f"a static activation scale of {float(value)} is not a positive number")
    return value.clone()


class PackedLinear(_Packed):
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
        packed.act_scale = _static(activations, act_scale)
        return packed.to(given.device)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedLinear", "in_features": self.in_features, "out_features": self.out_features,
                "weights": self.weights.to_dict(), "activations": self.activations.to_dict(),
                "bias": self.bias is not None}

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
        return packed.to(weight.device)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedEmbedding", "vocabulary": self.rows, "size": self.columns,
                "weights": self.weights.to_dict()}

    def forward(self, ids: Tensor) -> Tensor:
        return self._lookup(ids)


class PackedHead(_Packed):
    """logits = (x T) Wᵀ + b; W [V, D] is the embedding's own tensors where tied, T [D, D] an optional float matrix
    before it.
    """

    act_scale: Tensor | None
    transform: Tensor | None
    bias: Tensor | None

    def __init__(self, vocabulary: int, size: int, *, weights: WeightFormat, activations: ActivationFormat,
                 transform: str | None = None, bias: bool = False) -> None:
        super().__init__(vocabulary, size, weights)
        self.activations = activations
        self.register_buffer("act_scale", torch.ones(()) if activations.mode == "tensor" else None)
        dtype = None if transform is None else getattr(torch, transform)
        self.register_buffer("transform", None if dtype is None else torch.eye(size, dtype=dtype))
        self.register_buffer("bias", torch.zeros(vocabulary) if bias else None)

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None, *, weights: WeightFormat,
                   activations: ActivationFormat, act_scale: Tensor | float | None = None, codes: Tensor | None = None,
                   scale: Tensor | None = None, transform: Tensor | None = None) -> PackedHead:
        """An untied head from its own float weight [V, D]."""
        head = cls(*weight.shape, weights=weights, activations=activations, bias=bias is not None)
        head._fill(weight, codes, scale)
        return head._calibrated(act_scale, transform, bias).to(weight.device)  # type: ignore[return-value]

    @classmethod
    def sharing(cls, embedding: PackedEmbedding, *, activations: ActivationFormat,
                act_scale: Tensor | float | None = None, transform: Tensor | None = None,
                bias: Tensor | None = None) -> PackedHead:
        """A tied head on the embedding's tensors."""
        with torch.device("meta"):
            head = cls(embedding.rows, embedding.columns, weights=embedding.weights, activations=activations)
        head.tie(embedding)
        return head._calibrated(act_scale, transform, bias)

    def _calibrated(self, act_scale: Tensor | float | None, transform: Tensor | None,
                    bias: Tensor | None) -> PackedHead:
        if transform is not None and transform.shape != (self.columns, self.columns):
            raise ValueError(f"the transform has shape {list(transform.shape)}, a head of {self.columns} channels "
                             f"takes [{self.columns}, {self.columns}]")
        self.act_scale, self.transform = _static(self.activations, act_scale), transform
        self.bias = None if bias is None else bias.detach().float().clone()
        if self.act_scale is not None:
            self.act_scale = self.act_scale.to(self.qweight.device)
        return self

    def tie(self, embedding: nn.Module) -> None:
        """Share the embedding's codes and scales; raises ValueError where they have another format."""
        if (not isinstance(embedding, PackedEmbedding) or embedding.weights != self.weights
                or (embedding.rows, embedding.columns) != (self.rows, self.columns)):
            raise ValueError("a tied packed head needs a packed embedding of the same format and shape")
        self.qweight, self.scale, self.zero = embedding.qweight, embedding.scale, embedding.zero

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedHead", "vocabulary": self.rows, "size": self.columns, "weights": self.weights.to_dict(),
                "activations": self.activations.to_dict(), "bias": self.bias is not None,
                "transform": None if self.transform is None else str(self.transform.dtype).removeprefix("torch.")}

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = x @ self.transform.to(x.dtype)
        return self._multiply(x, self.bias, self.activations, self.act_scale)


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


PACKED = (PackedLinear, PackedEmbedding, PackedHead)


def build(spec: dict[str, Any]) -> nn.Module:
    """The empty module a ``spec()`` of this file describes. Raises ValueError for an unknown type."""
    kinds: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (*PACKED, OnlineHadamard)}
    if spec["type"] not in kinds:
        raise ValueError(f"unknown module type {spec['type']!r}; known: {', '.join(kinds)}")
    arguments = {key: value for key, value in spec.items() if key != "type"}
    if "weights" in arguments:
        arguments["weights"] = WeightFormat.from_dict(arguments["weights"])
    if "activations" in arguments:
        arguments["activations"] = ActivationFormat.from_dict(arguments["activations"])
    return kinds[spec["type"]](**arguments)
