"""An N:M sparse matrix as the artifact stores it: the kept values, and where they belong.

Values are int8 with one scale a row, or floats. Positions are a bitmask or indices, whichever is smaller
(``kernels.nm_linear``), in the buffer of that name. Zeros are nowhere stored, so what is read back is sparse by
construction; ``kept`` recounts it from the bits all the same.

``tiled``: values and positions lie in ``stream``, as the native kernels read them, and nowhere else; ``kept``,
``codes()``, lookups and state dicts show rows as before.

Legend: O outputs, I inputs, V values a row, B bytes of positions a row, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.nm_linear import (
    expand,
    fill_stream,
    kept_values,
    nm_linear,
    nm_linear_stream,
    nm_rows,
    pack_positions,
    position_bytes,
    position_form,
    stream_bytes,
    unpack_positions,
    unpack_stream,
)
from mambacompress.models.packed_head import HeadParts
from mambacompress.models.packed_weight import ActivationFormat, Stored, static_scale
from mambacompress.nm import Pattern

VALUES = ("int8", "float16", "bfloat16", "float32")


class SparseWeight(Stored):
    """Values and positions of a [rows, columns] matrix; of every ``pattern.of`` columns a row keeps ``pattern.keep``.

    weights: what values are, of VALUES. Raises ValueError where groups do not divide the columns.
    """

    values: Tensor
    stream: Tensor | None
    scale: Tensor | None

    def __init__(self, rows: int, columns: int, *, pattern: Pattern | str, weights: str) -> None:
        super().__init__(rows, columns)
        pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        if weights not in VALUES:
            raise ValueError(f"sparse values are one of {', '.join(VALUES)}, not {weights}")
        if columns % pattern.of:
            raise ValueError(f"groups of {pattern.of} do not divide {columns} inputs")
        self.pattern, self.weights, self.tiled = pattern, weights, False
        self.form = position_form(pattern.keep, pattern.of)
        kept, stored = columns // pattern.of * pattern.keep, position_bytes(columns, pattern.keep, pattern.of)
        self.register_buffer("values", torch.zeros(rows, kept, dtype=getattr(torch, weights)))
        self.register_buffer(self.form, torch.zeros(rows, stored, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(rows) if weights == "int8" else None)
        self.register_buffer("stream", None, persistent=False)

    def _fill(self, weight_OI: Tensor, mask_OI: Tensor, scale: Tensor | None) -> None:
        """From codes int8 [O, I] with their scale [O], or a float weight [O, I]; mask: bool, what is kept.

        Raises ValueError where the mask is not of the pattern, or a weight behind it is not zero.
        """
        if (scale is None) != (self.weights != "int8"):
            raise ValueError("codes come with a scale a row, floats without")
        if not (mask_OI.unflatten(1, (-1, self.pattern.of)).sum(-1) == self.pattern.keep).all():
            raise ValueError(f"the mask does not keep {self.pattern}")
        if weight_OI.masked_select(~mask_OI).any():
            raise ValueError("a weight that the mask drops is not zero")
        self._set_rows(kept_values(weight_OI.detach(), mask_OI).to(self.values.dtype),
                       pack_positions(mask_OI, self.pattern.keep, self.pattern.of))
        self.scale = None if scale is None else scale.float().clone()

    @property
    def positions(self) -> Tensor:
        """uint8 [O, B], in the form ``form``."""
        return self._as_rows()[1]

    def format(self) -> tuple[Any, ...]:
        return self.pattern, self.weights, self.rows, self.columns

    def share(self, other: SparseWeight) -> None:
        """Hold what another weight of this format holds."""
        self._set_rows(other.values, other.get_buffer(other.form))
        self.stream, self.scale, self.tiled = other.stream, other.scale, other.tiled

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
        """Whether values and positions lie where native code reads, and are no stream yet."""
        return not self.tiled and all(x.device.type == "cpu" for x in (self.values, self.get_buffer(self.form)))

    def stream_bytes(self) -> int:
        """The room that ``tile`` needs."""
        return stream_bytes(*self._pattern, self.values.element_size())

    def tile(self, room: Tensor) -> None:
        """Rearrange into ``room``, uint8 [stream_bytes]; values and positions are let go."""
        self.stream = fill_stream(room, self.values, self.kept(), self.pattern.keep, self.pattern.of)
        self.tiled = True
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
        others = sum(x.nbytes for name, x in self.named_buffers() if name not in ("values", self.form, "stream"))
        stored = position_bytes(self.columns, self.pattern.keep, self.pattern.of)
        kept = self.columns // self.pattern.of * self.pattern.keep
        return others + self.rows * (stored + kept * self.values.element_size())

    def _multiply(self, x: Tensor, bias: Tensor | None, activations: ActivationFormat,
                  act_scale: Tensor | None) -> Tensor:
        keep, of, mode, bits = self.pattern.keep, self.pattern.of, activations.mode, activations.bits
        if self.stream is not None:
            return nm_linear_stream(x, self.stream, self.scale, bias, keep=keep, of=of, outputs=self.rows,
                                    activation=mode, act_scale=act_scale, act_bits=bits)
        return nm_linear(x, self.values, self.positions, self.scale, bias, keep=keep, of=of, activation=mode,
                         act_scale=act_scale, act_bits=bits)

    def _lookup(self, ids: Tensor) -> Tensor:
        """Rows [..., columns] in ``dtype``; only these rows are expanded."""
        ids_R, keep, of = ids.reshape(-1), self.pattern.keep, self.pattern.of
        if self.stream is not None:
            found = nm_rows(ids_R, self.stream, self.scale, outputs=self.rows, inputs=self.columns, keep=keep, of=of)
        else:
            found = expand(self.values[ids_R], self.positions[ids_R], self.columns, keep, of).float()
            found = found if self.scale is None else found * self.scale[ids_R, None]
        return found.to(self.dtype).reshape(*ids.shape, self.columns)

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, {self.pattern}, {self.weights}"


class PackedSparseLinear(SparseWeight):
    """y = x Wᵀ + b; bias: fp32 [O]."""

    bias: Tensor | None
    act_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, pattern: Pattern | str, weights: str,
                 activations: ActivationFormat, bias: bool = False) -> None:
        super().__init__(out_features, in_features, pattern=pattern, weights=weights)
        check_activations(weights, activations)
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("act_scale", torch.ones(()) if activations.mode == "tensor" else None)

    @classmethod
    def from_mask(cls, weight_OI: Tensor, mask_OI: Tensor, pattern: Pattern, bias: Tensor | None = None, *,
                  scale: Tensor | None = None, activations: ActivationFormat | None = None,
                  act_scale: Tensor | float | None = None, values: str = "float16") -> PackedSparseLinear:
        """Pack codes int8 [O, I] with their scale [O], or a float weight [O, I] as ``values``; mask: bool, what is
        kept.

        Raises ValueError where the mask is not of that pattern, or a weight behind it is not zero.
        """
        rows, columns = weight_OI.shape
        activations = activations or ActivationFormat()
        packed = cls(columns, rows, pattern=pattern, weights=values if scale is None else "int8",
                     activations=activations, bias=bias is not None)
        packed._fill(weight_OI, mask_OI, scale)
        packed.bias = None if bias is None else bias.detach().float().clone()
        packed.act_scale = static_scale(activations, act_scale)
        return packed.to(weight_OI.device)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedSparseLinear", "in_features": self.in_features, "out_features": self.out_features,
                "pattern": str(self.pattern), "weights": self.weights, "activations": self.activations.to_dict(),
                "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias, self.activations, self.act_scale)


class PackedSparseEmbedding(SparseWeight):
    """Rows of a table [V, D] that is sparse along D: the weight of a head that is tied to it."""

    def __init__(self, vocabulary: int, size: int, *, pattern: Pattern | str, weights: str) -> None:
        super().__init__(vocabulary, size, pattern=pattern, weights=weights)
        self.num_embeddings, self.embedding_dim = vocabulary, size

    @classmethod
    def from_mask(cls, weight_VD: Tensor, mask_VD: Tensor, pattern: Pattern, *,
                  scale: Tensor | None = None) -> PackedSparseEmbedding:
        """See ``PackedSparseLinear.from_mask``."""
        packed = cls(*weight_VD.shape, pattern=pattern, weights="float16" if scale is None else "int8")
        packed._fill(weight_VD, mask_VD, scale)
        return packed.to(weight_VD.device)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedSparseEmbedding", "vocabulary": self.rows, "size": self.columns,
                "pattern": str(self.pattern), "weights": self.weights}

    def forward(self, ids: Tensor) -> Tensor:
        return self._lookup(ids)


class PackedSparseHead(HeadParts, SparseWeight):
    """logits = (x T) Wᵀ + b on a sparse W [V, D]; see ``PackedHead``."""

    def __init__(self, vocabulary: int, size: int, *, pattern: Pattern | str, weights: str,
                 activations: ActivationFormat, transform: str | None = None, bias: bool = False) -> None:
        super().__init__(vocabulary, size, pattern=pattern, weights=weights)
        check_activations(weights, activations)
        self._register_parts(activations, transform, bias)

    @classmethod
    def from_mask(cls, weight_VD: Tensor, mask_VD: Tensor, pattern: Pattern, bias: Tensor | None = None, *,
                  scale: Tensor | None = None, activations: ActivationFormat | None = None,
                  act_scale: Tensor | float | None = None, transform: Tensor | None = None) -> PackedSparseHead:
        """An untied head; see ``PackedSparseLinear.from_mask``."""
        head = cls(*weight_VD.shape, pattern=pattern, weights="float16" if scale is None else "int8",
                   activations=activations or ActivationFormat())
        head._fill(weight_VD, mask_VD, scale)
        return head._calibrated(act_scale, transform, bias).to(weight_VD.device)

    @classmethod
    def _like(cls, embedding: Any, activations: ActivationFormat) -> PackedSparseHead:
        return cls(embedding.rows, embedding.columns, pattern=embedding.pattern, weights=embedding.weights,
                   activations=activations)

    def spec(self) -> dict[str, Any]:
        return {"type": "PackedSparseHead", "vocabulary": self.rows, "size": self.columns,
                "pattern": str(self.pattern), "weights": self.weights, **self._spec_of_parts()}


def check_activations(weights: str, activations: ActivationFormat) -> None:
    """Raise ValueError where float values would meet integer activations."""
    if weights != "int8" and activations.mode != "none":
        raise ValueError(f"{weights} values take float activations, not {activations.mode}")


def sparse_bytes(rows: int, columns: int, pattern: Pattern, weights: str, activations: str) -> int:
    """Stored bytes of such a linear: values, positions, scales and the static scale of its activations."""
    values = rows * (columns // pattern.of * pattern.keep) * (1 if weights == "int8" else 2)
    positions = rows * position_bytes(columns, pattern.keep, pattern.of)
    scales = 4 * rows if weights == "int8" else 0
    return values + positions + scales + (4 if activations.endswith("tensor") else 0)


__all__ = ["VALUES", "PackedSparseEmbedding", "PackedSparseHead", "PackedSparseLinear", "SparseWeight", "sparse_bytes"]
