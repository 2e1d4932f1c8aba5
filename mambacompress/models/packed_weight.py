"""A packed matrix: its formats, its codes and scales, and how they lie in memory.

Codes and scales are buffers, never a float copy. ``tiled``: they are rearranged for the native kernels of this
processor (``kernels.int8_linear.tiles``); lookups, ``codes()`` and state dicts show rows as before. What tensors stand
in for ``weight``, and what the modules made of this are: ``packed.py``.

Legend: O outputs, I inputs, G groups, R some rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.kernels import native
from mambacompress.kernels.int4_linear import int4_linear
from mambacompress.kernels.int8_linear import BYTES, can_be_tiled, int8_linear, packed_rows, rows_of, tile, untiled
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


def static_scale(activations: ActivationFormat, act_scale: Tensor | float | None) -> Tensor | None:
    """The scale of static activations as a fp32 scalar, None for the other modes."""
    if activations.mode != "tensor":
        return None
    if act_scale is None:
        raise ValueError("static activations need a scale from calibration")
    value = torch.as_tensor(act_scale, dtype=torch.float32).reshape(())
    if not torch.isfinite(value) or value <= 0:
        raise ValueError(f"a static activation scale of {float(value)} is not a positive number")
    return value.clone()


class Stored(nn.Module):
    """A [rows, columns] matrix whose buffers hold codes: they move between devices and are never converted.

    dtype: the float dtype this module stands for.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype = rows, columns, torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move buffers, never convert them: codes and scales keep their dtypes."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = probe.dtype
        if probe.device != self.device:
            self._untile()

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _untile(self) -> None:
        """Undo what suits one device alone."""

    def format(self) -> tuple[Any, ...]:
        """What two weights must have in common to ``share``, their shape included."""
        raise NotImplementedError

    def share(self, other: Any) -> None:
        """Hold the codes and scales of another module of this format."""
        raise NotImplementedError

    def _multiply(self, x: Tensor, bias: Tensor | None, activations: ActivationFormat,
                  act_scale: Tensor | None) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the float weight this stands for: one NaN, expanded."""
        answer = torch.full((1, 1), float("nan"), dtype=self.dtype, device=self.device).expand(self.rows, self.columns)
        answer._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves such tensors alone
        return answer

    def nbytes(self) -> int:
        """Bytes of every tensor of this module."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())


class PackedWeight(Stored):
    """Codes and scales of a [rows, columns] matrix.

    qweight: int8 [rows, columns], or uint8 [rows, columns / 2]. scale: [rows], or [rows, G] with groups. zero: uint8
    [rows, G] where the format has zero points. tiled: these buffers are rearranged, see ``arrange``.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, rows: int, columns: int, weights: WeightFormat) -> None:
        super().__init__(rows, columns)
        group = columns if weights.group_size is None else weights.group_size
        if weights.bits == 4 and columns % 2:
            raise ValueError(f"a [{rows}, {columns}] weight has an odd number of columns: two 4-bit codes "
                             "share a byte")
        if group < 1 or columns % group or (weights.bits == 4 and group % 2):
            raise ValueError(f"groups of {group} do not divide the {columns} columns of a [{rows}, {columns}] weight "
                             "evenly")
        self.weights, self.tiled = weights, False
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

    def codes(self) -> Tensor:
        """int8 [rows, columns]; with zero points, codes - zero."""
        qweight, _, zero = self._as_rows()
        return self._codes(qweight, zero)

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
        qweight, scale, zero = self._as_rows()
        return dequantize(self._codes(qweight, zero), scale, dtype)

    # -- tiles -------------------------------------------------------------------------------------------------------

    def tileable(self) -> bool:
        """Whether the native kernels take this weight in tiles, and it is not in tiles yet."""
        groups = self.scale.shape[1] if self.scale.dim() == 2 else 1
        return not self.tiled and self.qweight.device.type == "cpu" and can_be_tiled(self.qweight, groups)

    def tile(self) -> None:
        """Rearrange in place. Who shares these tensors must be told (``tiled``): see ``packed.arrange``."""
        tile(self.qweight, BYTES)
        for factor in (self.scale, self.zero):
            if factor is not None and factor.dim() == 2:
                tile(factor, 1)

    def format(self) -> tuple[Any, ...]:
        return self.weights, self.rows, self.columns

    def share(self, other: PackedWeight) -> None:
        self.qweight, self.scale, self.zero, self.tiled = other.qweight, other.scale, other.zero, other.tiled

    def _untile(self) -> None:
        self.qweight, self.scale, self.zero = self._as_rows()
        self.tiled = False

    def _as_rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points as rows: the buffers themselves, or copies where these are tiled."""
        if not self.tiled:
            return self.qweight, self.scale, self.zero
        scale = untiled(self.scale, 1) if self.scale.dim() == 2 else self.scale
        return untiled(self.qweight, BYTES), scale, None if self.zero is None else untiled(self.zero, 1)

    def _picked(self, rows_R: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same of some rows only."""
        def pick(x: Tensor, unit: int) -> Tensor:
            return rows_of(x, rows_R, unit) if self.tiled and x.dim() == 2 else x.index_select(0, rows_R)

        return pick(self.qweight, BYTES), pick(self.scale, 1), None if self.zero is None else pick(self.zero, 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled:
            for name, tensor in zip(("qweight", "scale", "zero"), self._as_rows(), strict=True):
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.tiled:
            self._untile()
        super()._load_from_state_dict(*args, **kwargs)

    def _multiply(self, x: Tensor, bias: Tensor | None, activations: ActivationFormat,
                  act_scale: Tensor | None) -> Tensor:
        if self.weights.bits == 4:
            return int4_linear(x, self.qweight, self.scale.reshape(self.rows, -1), self.zero, bias,
                               group_size=self.weights.group_size or self.columns, activation=activations.mode,
                               act_scale=act_scale, act_bits=activations.bits, tiled=self.tiled)
        return int8_linear(x, self.qweight, self.scale, bias, activation=activations.mode, act_scale=act_scale,
                           act_bits=activations.bits, tiled=self.tiled)

    def _lookup(self, ids: Tensor) -> Tensor:
        """Rows [..., columns] in ``dtype``; only these rows are dequantized."""
        if self._looks_up_natively(ids):
            groups = self.scale.shape[1] if self.scale.dim() == 2 else 1
            found = packed_rows(ids.reshape(-1).contiguous(), self.qweight, self.scale, self.zero, groups=groups,
                                tiled=self.tiled)
            return found.to(self.dtype).reshape(*ids.shape, self.columns)
        qweight, scale, zero = self._picked(ids.reshape(-1))
        codes = self._codes(qweight, zero)
        rows = codes.float() * scale[:, None] if self.weights.bits == 8 else dequantize(codes, scale)
        return rows.to(self.dtype).reshape(*ids.shape, self.columns)

    def _looks_up_natively(self, ids: Tensor) -> bool:
        tensors = [t for t in (self.qweight, self.scale, self.zero) if t is not None]
        return (ids.dtype == torch.int64 and ids.device.type == "cpu" and native.library() is not None
                and native.runs_directly(ids, *tensors) and self.scale.dtype in (torch.float32, torch.float16)
                and all(t.is_contiguous() and t.device.type == "cpu" for t in tensors))

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.weights}"
