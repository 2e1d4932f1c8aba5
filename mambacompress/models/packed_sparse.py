"""An N:M sparse linear as the artifact stores it: the kept values, and where they belong.

Values are int8 with one scale a row, or fp16. Positions are a bitmask or indices, whichever is smaller
(``kernels.nm_linear``), in the buffer of that name. Zeros are nowhere stored, so what is read back is sparse by
construction; ``kept`` recounts it from the bits all the same.

``tiled``: int8 values and their positions lie in ``stream``, as the native kernels read them, and nowhere else;
``kept``, ``codes()`` and state dicts show rows as before.

Legend: O outputs, I inputs, V values a row, B bytes of positions a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.nm_linear import (
    expand,
    kept_values,
    nm_linear,
    nm_linear_stream,
    pack_positions,
    position_bytes,
    position_form,
    stream_bytes,
    unpack_positions,
    unpack_stream,
)
from mambacompress.kernels.nm_linear.tiles import fill_stream
from mambacompress.models.packed_weight import ActivationFormat, Stored, static_scale
from mambacompress.nm import Pattern

VALUES = ("int8", "float16")


class PackedSparseLinear(Stored):
    """y = x Wᵀ + b; of every ``pattern.of`` inputs an output reads ``pattern.keep``. bias: fp32 [O]."""

    values: Tensor
    stream: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    act_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, pattern: Pattern | str, weights: str,
                 activations: ActivationFormat, bias: bool = False) -> None:
        super().__init__(out_features, in_features)
        pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        if weights not in VALUES or (weights == "float16" and activations.mode != "none"):
            raise ValueError(f"sparse values are {' or '.join(VALUES)}, the latter with float activations, not "
                             f"{weights} with {activations.mode}")
        if in_features % pattern.of:
            raise ValueError(f"groups of {pattern.of} do not divide {in_features} inputs")
        self.in_features, self.out_features, self.pattern = in_features, out_features, pattern
        self.weights, self.activations, self.tiled = weights, activations, False
        self.form = position_form(pattern.keep, pattern.of)
        dtype = torch.int8 if weights == "int8" else torch.float16
        self.register_buffer("values", torch.zeros(out_features, in_features // pattern.of * pattern.keep, dtype=dtype))
        stored = position_bytes(in_features, pattern.keep, pattern.of)
        self.register_buffer(self.form, torch.zeros(out_features, stored, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features) if weights == "int8" else None)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("act_scale", torch.ones(()) if activations.mode == "tensor" else None)
        self.register_buffer("stream", None, persistent=False)

    @classmethod
    def from_mask(cls, weight_OI: Tensor, mask_OI: Tensor, pattern: Pattern, bias: Tensor | None = None, *,
                  scale: Tensor | None = None, activations: ActivationFormat | None = None,
                  act_scale: Tensor | float | None = None) -> PackedSparseLinear:
        """Pack codes int8 [O, I] with their scale [O], or a float weight [O, I] (as fp16); mask: bool, what is kept.

        Raises ValueError where the mask is not of that pattern, or a weight behind it is not zero.
        """
        rows, columns = weight_OI.shape
        activations = activations or ActivationFormat()
        if not (mask_OI.unflatten(1, (-1, pattern.of)).sum(-1) == pattern.keep).all():
            raise ValueError(f"the mask does not keep {pattern}")
        if weight_OI.masked_select(~mask_OI).any():
            raise ValueError("a weight that the mask drops is not zero")
        packed = cls(columns, rows, pattern=pattern, weights="float16" if scale is None else "int8",
                     activations=activations, bias=bias is not None)
        packed.values = kept_values(weight_OI.detach(), mask_OI).to(packed.values.dtype)
        setattr(packed, packed.form, pack_positions(mask_OI, pattern.keep, pattern.of))
        packed.scale = None if scale is None else scale.float().clone()
        packed.bias = None if bias is None else bias.detach().float().clone()
        packed.act_scale = static_scale(activations, act_scale)
        return packed.to(weight_OI.device)  # type: ignore[return-value]

    @property
    def positions(self) -> Tensor:
        """uint8 [O, B], in the form ``form``."""
        return self._as_rows()[1]

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedSparseLinear", "in_features": self.in_features, "out_features": self.out_features,
                "pattern": str(self.pattern), "weights": self.weights, "activations": self.activations.to_dict(),
                "bias": self.bias is not None}

    def kept(self) -> Tensor:
        """The mask, bool [O, I], from the stored positions."""
        if self.stream is not None:
            return unpack_stream(self.stream, *self._pattern)[1]
        return unpack_positions(self.positions, self.columns, self.pattern.keep, self.pattern.of)

    def excess(self) -> int:
        """Groups whose stored positions do not name ``keep`` different places: 0 unless the file was damaged."""
        return int((self.kept().unflatten(1, (-1, self.pattern.of)).sum(-1) != self.pattern.keep).sum())

    def codes(self) -> Tensor:
        """The values in their places, [O, I] in their own dtype."""
        values, positions = self._as_rows()
        return expand(values, positions, self.columns, self.pattern.keep, self.pattern.of)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight, [O, I]."""
        weight_OI = self.codes().to(dtype)
        return weight_OI if self.scale is None else weight_OI * self.scale.to(dtype)[:, None]

    # -- tiles -------------------------------------------------------------------------------------------------------

    @property
    def _pattern(self) -> tuple[int, int, int, int]:
        return self.rows, self.columns, self.pattern.keep, self.pattern.of

    def tileable(self) -> bool:
        """Whether the native kernels take this weight as a stream, and it is none yet."""
        return not self.tiled and self.values.dtype == torch.int8 and self.values.device.type == "cpu"

    def stream_bytes(self) -> int:
        """The room that ``tile`` needs."""
        return stream_bytes(*self._pattern)

    def tile(self, room: Tensor) -> None:
        """Rearrange into ``room``, uint8 [stream_bytes]; values and positions are let go."""
        fill_stream(room, self.values, self.kept(), self.pattern.keep, self.pattern.of)
        self.stream, self.tiled = room, True
        self._set_rows(*(x.new_empty(self.rows, 0) for x in (self.values, self.get_buffer(self.form))))

    def _untile(self) -> None:
        self._set_rows(*self._as_rows())
        self.stream, self.tiled = None, False

    def _set_rows(self, values: Tensor, positions: Tensor) -> None:
        self.values = values
        setattr(self, self.form, positions)

    def _as_rows(self) -> tuple[Tensor, Tensor]:
        """Values and positions: the buffers themselves, or made of the stream."""
        if self.stream is None:
            return self.values, self.get_buffer(self.form)
        values, mask = unpack_stream(self.stream, *self._pattern)
        return values, pack_positions(mask, self.pattern.keep, self.pattern.of)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled:
            destination[f"{prefix}values"], destination[prefix + self.form] = self._as_rows()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.tiled:
            self._untile()
        super()._load_from_state_dict(*args, **kwargs)

    def nbytes(self) -> int:
        """Bytes of what is stored, however it lies in memory."""
        factors = sum(x.nbytes for x in (self.scale, self.bias, self.act_scale) if x is not None)
        stored = position_bytes(self.columns, self.pattern.keep, self.pattern.of)
        kept = self.columns // self.pattern.of * self.pattern.keep
        return factors + self.rows * (stored + kept * self.values.element_size())

    def forward(self, x: Tensor) -> Tensor:
        if self.stream is not None and self.scale is not None:
            return nm_linear_stream(x, self.stream, self.scale, self.bias, keep=self.pattern.keep, of=self.pattern.of,
                                    activation=self.activations.mode, act_scale=self.act_scale,
                                    act_bits=self.activations.bits)
        return nm_linear(x, self.values, self.positions, self.scale, self.bias, keep=self.pattern.keep,
                         of=self.pattern.of, activation=self.activations.mode, act_scale=self.act_scale,
                         act_bits=self.activations.bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.pattern}, {self.weights}"


def sparse_bytes(rows: int, columns: int, pattern: Pattern, weights: str, activations: str) -> int:
    """Stored bytes of such a linear: values, positions, scales and the static scale of its activations."""
    values = rows * (columns // pattern.of * pattern.keep) * (1 if weights == "int8" else 2)
    positions = rows * position_bytes(columns, pattern.keep, pattern.of)
    scales = 4 * rows if weights == "int8" else 0
    return values + positions + scales + (4 if activations.endswith("tensor") else 0)


__all__ = ["VALUES", "PackedSparseLinear", "sparse_bytes"]
