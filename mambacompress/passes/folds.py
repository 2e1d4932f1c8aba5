"""The exact scale folds of ``smooth``: where each is legal, which factors are worth a trial, and the edit itself.

A fold's factors are ``{stream: s}``; every edit divides a producer by s and multiplies a consumer by s. ``Ranges``
holds the largest magnitude of every channel of every tap, measured once a block and then moved along with each fold.

Legend: b batch, L tokens, T = b L, E d_inner, N d_state, G groups, S = G * N.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.models.mixers import Gate, S6Mixer, SSDMixer
from mambacompress.models.modelmap import RESIDUAL, Block, Site
from mambacompress.models.paths import DepthwiseConv, Path, negative_exp
from mambacompress.passes.base import Calibration

_STATE_TOKENS = 2048
_FLOOR = 1e-4
"""A channel below this share of the largest counts as this share: dead channels ask for no infinite factor."""

Scales = dict[str, Tensor]


@dataclass
class Ranges:
    """taps: name -> largest magnitude of each channel over the calibration tokens, fp64. ``h``: of each state [S]."""

    taps: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, block: Block, calibration: Calibration, *, states: bool) -> Ranges:
        """Measure in one calibration run. states: also the scan's state, on the first tokens, of a single S6 path."""
        ranges, watched = cls(), _StateWatch(block) if states and _single_path(block) else None

        def observe(tap: str, value: Tensor) -> None:
            if tap in ("B", "C"):
                value = value.flatten(-2)
            if tap != "out_proj":
                ranges._widen(tap, value.detach().abs().flatten(0, -2).amax(0).double())
            if watched is not None:
                largest_S = watched.see(tap, value)
                if largest_S is not None:
                    ranges._widen("h", largest_S)

        calibration.run(block, observe)
        return ranges

    def _widen(self, name: str, value: Tensor) -> None:
        self.taps[name] = torch.maximum(self.taps[name], value) if name in self.taps else value

    def __getitem__(self, name: str) -> Tensor:
        return self.taps[name]

    def divide(self, name: str, s: Tensor) -> None:
        if name in self.taps:
            self.taps[name] = self.taps[name] / s


class _StateWatch:
    """Recomputes the state of a single S6 path from its taps: max of |h| over tokens and channels, for each n."""

    def __init__(self, block: Block) -> None:
        self.path = scan_paths(block)[0]
        self.kept: dict[str, Tensor] = {}
        self.tokens = 0

    def see(self, tap: str, value: Tensor) -> Tensor | None:
        if self.tokens >= _STATE_TOKENS:
            return None
        if tap in ("dt", "B"):
            self.kept[tap] = value
        if tap != "u":
            return None
        u_BLE = value
        rows = max(1, (_STATE_TOKENS - self.tokens) // u_BLE.shape[1])
        self.tokens += min(rows, len(u_BLE)) * u_BLE.shape[1]
        return largest_state(u_BLE[:rows], self.kept["dt"][:rows], negative_exp(self.path.A_log), self.kept["B"][:rows],
                             self.path.dt_bias, groups=self.path.projection.groups)


def largest_state(u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLS: Tensor, dt_bias_E: Tensor, *,
                  groups: int) -> Tensor:
    """max over b, t and the channels of a group of |h_t| of ``h_t = exp(dt A) h_{t-1} + dt B u``: [S], fp64."""
    dt_BLE = F.softplus(dt_BLE + dt_bias_E.to(dt_BLE.dtype))
    b, L, E = u_BLE.shape
    N = A_EN.shape[1]
    B_BLGN = B_BLS.unflatten(-1, (groups, N))
    h_BGPN = u_BLE.new_zeros(b, groups, E // groups, N)
    largest_GN = u_BLE.new_zeros(groups, N)
    A_GPN = A_EN.to(u_BLE.dtype).unflatten(0, (groups, -1))
    for t in range(L):
        dt_BGP = dt_BLE[:, t].unflatten(-1, (groups, -1))
        drive_BGP = dt_BGP * u_BLE[:, t].unflatten(-1, (groups, -1))
        h_BGPN = torch.exp(dt_BGP[..., None] * A_GPN) * h_BGPN + drive_BGP[..., None] * B_BLGN[:, t, :, None]
        largest_GN = torch.maximum(largest_GN, h_BGPN.abs().amax((0, 2)))
    return largest_GN.flatten().double()


def balance(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s = activation^alpha / weight^(1 - alpha), geometric mean 1; fp64."""
    s = _lifted(activation) ** alpha / _lifted(weight) ** (1 - alpha)
    return normalised(s)


def normalised(s: Tensor) -> Tensor:
    return s / s.log().mean().exp()


def _lifted(values: Tensor) -> Tensor:
    values = values.double()
    top = values.max()
    return torch.ones_like(values) if top <= 0 else values.clamp_min(top * _FLOOR)


class Fold:
    """One exact fold. name: the recipe's; label: the methods page's; what: one line for the plan."""

    name: str
    label: str
    what: str

    def refusal(self, block: Block) -> str | None:
        """Why it would change the function here, or None."""
        raise TypeError(f"{type(self).__name__} does not say where it is legal")

    def candidates(self, block: Block, ranges: Ranges, alphas: Sequence[float],
                   names: set[str]) -> Iterator[tuple[str, Scales]]:
        """(label, factors), the most promising first. names: the folds this run may use."""
        raise TypeError(f"{type(self).__name__} names no candidates")

    def apply(self, block: Block, scales: Scales) -> None:
        """Edit the weights of ``block``."""
        raise TypeError(f"{type(self).__name__} does not say what it edits")

    def move(self, ranges: Ranges, scales: Scales) -> None:
        """What the edit does to the ranges."""
        raise TypeError(f"{type(self).__name__} does not say what it moves")


class OneStream(Fold):
    """A fold of one factor a channel: the range of one tap against the columns (or rows) that read it."""

    tap: str
    stream: str

    def readers(self, block: Block) -> list[Site]:
        return block.readers(self.stream)

    def candidates(self, block: Block, ranges: Ranges, alphas: Sequence[float],
                   names: set[str]) -> Iterator[tuple[str, Scales]]:
        weight = column_range(self.readers(block))
        for alpha in alphas:
            yield f"alpha {alpha:g}", {self.stream: balance(ranges[self.tap], weight, alpha)}

    def move(self, ranges: Ranges, scales: Scales) -> None:
        ranges.divide(self.tap, scales[self.stream])


class NormFold(OneStream):
    name, label, what = "norm", "S1", "the norm's weight against in_proj's columns"
    tap, stream = "in_proj", RESIDUAL

    def refusal(self, block: Block) -> str | None:
        norm = block.norm
        if isinstance(norm, nn.LayerNorm) or not isinstance(getattr(norm, "weight", None), nn.Parameter):
            return f"{type(norm).__name__} has no weight of its own to divide"
        return None

    def apply(self, block: Block, scales: Scales) -> None:
        s = scales[RESIDUAL]
        divide_weight(block.norm.get_parameter("weight"), s)
        scale_inputs(block.readers(RESIDUAL), s)


class GateFold(OneStream):
    name, label, what = "gate", "S2", "the gate's rows against out_proj's columns, activation z*sigmoid(s*z)"
    tap, stream = "y", "y"

    def refusal(self, block: Block) -> str | None:
        if not isinstance(block.mixer, S6Mixer):
            return block.streams["z"].refuses.get("scale", "this mixer's gate cannot be scaled")
        if block.mixer.gate is None:
            return "this mixer has no gate"
        return block.streams["z"].refuses.get("scale") or _opened_y(block)

    def candidates(self, block: Block, ranges: Ranges, alphas: Sequence[float],
                   names: set[str]) -> Iterator[tuple[str, Scales]]:
        yield from super().candidates(block, ranges, alphas, names)
        yield "range of z", {"y": normalised(_lifted(ranges["z"]))}

    def apply(self, block: Block, scales: Scales) -> None:
        scale_gate(block, scales["y"])
        scale_inputs(block.readers("y"), scales["y"])

    def move(self, ranges: Ranges, scales: Scales) -> None:
        ranges.divide("y", scales["y"])
        ranges.divide("z", scales["y"])


class NormGateFold(OneStream):
    name, label, what = "norm_gate", "S2'", "the gated norm's weight against out_proj's columns"
    tap, stream = "y", "y"

    def refusal(self, block: Block) -> str | None:
        return _opened_y(block) if isinstance(block.mixer, SSDMixer) else "no norm follows this mixer's gate"

    def apply(self, block: Block, scales: Scales) -> None:
        divide_weight(block.mixer.get_parameter("norm_weight"), scales["y"])
        scale_inputs(block.readers("y"), scales["y"])


class ConvFold(OneStream):
    """S3, alone or together with S2: y = scan * gate changes with both, so that u and y are balanced in one candidate.

    Factors: ``u``, and ``z`` where the gate moves too; out_proj's columns take their product.
    """

    name, label = "conv", "S3"
    what = "the convolution against x_proj's and out_proj's columns, activation u*sigmoid(s*u)"
    tap, stream = "u", "u"

    def refusal(self, block: Block) -> str | None:
        mixer = block.mixer
        if not isinstance(mixer, S6Mixer):
            return block.streams["u"].refuses.get("scale", "this mixer's scan cannot be scaled")
        if not block.writers("u"):
            return "this mixer has no convolution"
        if len(block.writers("u")) > 1 and mixer.conv is not None:
            return "two convolutions in a row"
        if any(path.projection.x_rotation is not None for path in scan_paths(block)):
            return "an online rotation before x_proj has opened a new stream"
        return block.streams["u"].refuses.get("scale") or _opened_y(block)

    def candidates(self, block: Block, ranges: Ranges, alphas: Sequence[float],
                   names: set[str]) -> Iterator[tuple[str, Scales]]:
        weight, out = column_range(block.readers("u")), column_range(block.readers("y"))
        factors = [(f"alpha {alpha:g}", balance(ranges["u"], weight, alpha), balance(ranges["y"], out, alpha))
                   for alpha in alphas]
        factors.append(("range of u", normalised(_lifted(ranges["u"])), factors[0][2]))
        if "gate" in names:
            for label, s, t in factors:
                yield f"{label}, y by the gate", {"u": s, "z": t / s}
            label, s, _ = factors[0]
            yield f"{label}, y kept", {"u": s, "z": 1 / s}
            factors = factors[:1]
        for label, s, _ in factors:
            yield label, {"u": s}

    def apply(self, block: Block, scales: Scales) -> None:
        s = scales["u"]
        for site in block.writers("u"):
            site.scale_output(1 / s.to(site.weight.device))
            conv = site.module
            if isinstance(conv, DepthwiseConv) and conv.activation:
                conv.act_scale = scaled_buffer(conv.act_scale, s, site.weight)
        scale_inputs(block.readers("u"), s)
        if "z" in scales:
            scale_gate(block, scales["z"])
        scale_inputs(block.readers("y"), s * scales.get("z", torch.ones_like(s)))

    def move(self, ranges: Ranges, scales: Scales) -> None:
        for tap in ("u", "x_proj"):
            ranges.divide(tap, scales["u"])
        ranges.divide("y", scales["u"])
        if "z" in scales:
            ranges.divide("z", scales["z"])
            ranges.divide("y", scales["z"])


class StatesFold(Fold):
    name, label, what = "states", "S4", "B's rows against C's rows, a factor a state"

    def refusal(self, block: Block) -> str | None:
        if not isinstance(block.mixer, S6Mixer):
            return "B and C pass the convolution and its SiLU"
        if any(path.direction_B is not None for path in scan_paths(block)):
            return "a learned direction is added to B"
        if len({id(path.projection) for path in scan_paths(block)}) > 1:
            return "the scans of this mixer have projections of their own, the calibration sees them together"
        return block.streams["B"].refuses.get("scale")

    def candidates(self, block: Block, ranges: Ranges, alphas: Sequence[float],
                   names: set[str]) -> Iterator[tuple[str, Scales]]:
        for alpha in alphas:
            yield f"alpha {alpha:g}", {"B": balance(ranges["B"], ranges["C"], alpha)}
        if "h" in ranges.taps:
            yield "range of h", {"B": balance(ranges["h"], ranges["C"], 0.5)}

    def apply(self, block: Block, scales: Scales) -> None:
        for site in block.writers("B"):
            site.scale_output(1 / scales["B"].to(site.weight.device))
        for site in block.writers("C"):
            site.scale_output(scales["B"].to(site.weight.device))

    def move(self, ranges: Ranges, scales: Scales) -> None:
        ranges.divide("B", scales["B"])
        ranges.divide("h", scales["B"])
        ranges.divide("C", 1 / scales["B"])


class DtFold(OneStream):
    name, label, what = "dt", "S5", "x_proj's dt rows against dt_proj's columns"
    tap, stream = "dt_proj", "dt_low"

    def refusal(self, block: Block) -> str | None:
        if "dt_low" not in block.streams:
            return "this mixer has no low-rank dt"
        return block.streams["dt_low"].refuses.get("scale")

    def apply(self, block: Block, scales: Scales) -> None:
        for site in block.writers("dt_low"):
            site.scale_output(1 / scales["dt_low"].to(site.weight.device))
        scale_inputs(block.readers("dt_low"), scales["dt_low"])


class ConvInFold(OneStream):
    name, label, what = "conv_in", "S7", "in_proj's x rows against the convolution's weight"
    tap, stream = "conv", "x"

    def refusal(self, block: Block) -> str | None:
        if not block.readers("x"):
            return "this mixer has no convolution"
        return block.streams["x"].refuses.get("scale")

    def apply(self, block: Block, scales: Scales) -> None:
        s, start = scales["x"], 0
        for site in block.writers("x"):  # Mamba-2 writes the stream from three sites, in row order
            stop = start + site.shape[0]
            site.scale_output(1 / s[start:stop].to(site.weight.device))
            start = stop
        scale_inputs(block.readers("x"), s)


def scan_paths(block: Block) -> list[Path]:
    return [path for path in getattr(block.mixer, "paths", ()) if isinstance(path, Path)]


def divide_weight(weight: nn.Parameter, s: Tensor) -> None:
    """A norm's weight divided by s, in place."""
    weight.data.copy_((weight.data.double() / s.to(weight.device)).to(weight.dtype))


def scale_inputs(sites: Iterable[Site], s: Tensor) -> None:
    for site in sites:
        site.scale_input(s.to(site.weight.device))


def scale_gate(block: Block, s: Tensor) -> None:
    """W_z and its bias divided by s, the activation made z sigmoid(s z): the gate's output is divided by s."""
    site, gate = block.site("z"), block.mixer.gate
    assert isinstance(gate, Gate)
    site.scale_output(1 / s.to(site.weight.device))
    gate.scale = scaled_buffer(gate.scale, s, site.weight)


def scaled_buffer(old: Tensor | None, s: Tensor, like: Tensor) -> Tensor:
    """The activation's scale after one more fold, in the weight's dtype."""
    s = s.to(like.device)
    return (s if old is None else old.double() * s).to(like.dtype)


def column_range(sites: Iterable[Site]) -> Tensor:
    """Largest magnitude over all readers of each channel they read, fp64."""
    found = []
    for site in sites:
        weight = site.get().abs()
        found.append(weight.flatten(1).amax(1) if site.layout == "depthwise" else weight.amax(0))
    return torch.stack(found).amax(0)


def _single_path(block: Block) -> bool:
    return isinstance(block.mixer, S6Mixer) and len(block.mixer.paths) == 1


def _opened_y(block: Block) -> str | None:
    rotated = block.mixer.out_rotation is not None
    return "an online rotation before out_proj has opened a new stream" if rotated else None


#: In the order they are tried: S4 while the measured state is the scan's; S5 early, as an uneven dt drowns all else;
#: S3 changes y, which S2 then balances.
FOLDS: tuple[Fold, ...] = (
    NormFold(), StatesFold(), DtFold(), ConvFold(), GateFold(), NormGateFold(), ConvInFold())

__all__ = ["FOLDS", "Fold", "Ranges", "balance", "largest_state"]
