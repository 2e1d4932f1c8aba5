"""How a pass sees a model: blocks, sites and streams, without a single name or regex.

A *stream* is a channel space: the residual, the gated scan output, dt's low-rank space. A *site* is one quantity (x, z,
dt_low, B, C, ...) in the parameter it lives in: which rows, which stream it reads along its input channels and which it
writes along its output channels. "Rotate stream S" is then "for every site that reads or writes S", and "smooth S" is
"its producers and its consumers". One tensor that holds several quantities (in_proj, x_proj) has one site each; a
recipe names the tensor, a pass the quantity.

Everything here works on meta tensors: shapes are known before any weight is read, which makes a dry run possible.

Legend: weights W [out, in], y = x Wᵀ. Rotating the stream by R (x ← x R): readers W ← W R, writers W ← Rᵀ W.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mambacompress.models.mixers import Mixer, S6Mixer, SSDMixer
from mambacompress.nm import Pattern

RESIDUAL = "residual"


@dataclass(frozen=True)
class Stream:
    """A channel space of one block (or, for the residual, of the model) and what it tolerates.

    refuses: operation ("rotate", "scale", "online-rotate") -> the reason it would change the function.
    """

    name: str
    size: int
    refuses: dict[str, str] = field(default_factory=dict)

    def allows(self, operation: str) -> bool:
        return operation not in self.refuses


@dataclass(frozen=True)
class Site:
    """One quantity in the parameter it lives in.

    quantity: x z dt_low dt B C y conv embed head. tensor: the recipe's name of the parameter (in_proj, x_proj, dt_proj,
    out_proj, conv, embedding, head). path: dotted path of the weight's owner below ``root``, looked up at each use, so
    that a site stays right when a pass replaces the module. rows: the rows of the weight that hold the quantity. reads
    / writes: stream names, or None. layout: ``linear`` [out, in]; ``embedding`` [V, D] (writes along columns);
    ``depthwise`` [E, K] (reads and writes E).
    """

    quantity: str
    tensor: str
    root: nn.Module
    path: str
    rows: slice = field(default_factory=lambda: slice(None), hash=False)
    reads: str | None = None
    writes: str | None = None
    layout: str = "linear"

    @property
    def module(self) -> nn.Module:
        return self.root.get_submodule(self.path)

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> torch.Size:
        """Shape of the quantity's part of the weight."""
        rows, *rest = self.weight.shape
        return torch.Size([len(range(*self.rows.indices(rows))), *rest])

    def get(self) -> Tensor:
        """The quantity's weight, an fp64 copy."""
        return self.weight.data[self.rows].double()

    def set(self, value: Tensor) -> None:
        self.weight.data[self.rows] = value.to(self.weight.dtype)

    def _bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None or self.layout == "embedding" else bias.data

    def scale_input(self, s: Tensor) -> None:
        """W ← W · diag(s): the columns that read the stream (a depthwise convolution reads channel i in its row i)."""
        s = s.double()
        self.set(self.get() * (s.reshape(-1, *[1] * (self.weight.dim() - 1)) if self.layout == "depthwise" else s))

    def scale_output(self, s: Tensor) -> None:
        """W ← diag(s) · W, and the bias with it: the rows that write the stream."""
        if self.layout == "embedding":
            self.set(self.get() * s.double())
            return
        self.set(self.get() * s.double().reshape(-1, *[1] * (self.weight.dim() - 1)))
        bias = self._bias()
        if bias is not None:
            bias[self.rows] = (bias[self.rows].double() * s.double()).to(bias.dtype)

    def rotate_input(self, R: Tensor) -> None:
        """W ← W R."""
        self.set(self.get() @ R)

    def rotate_output(self, R: Tensor) -> None:
        """W ← Rᵀ W and b ← b R (an embedding's rows e ← e R)."""
        if self.layout == "embedding":
            self.set(self.get() @ R)
            return
        self.set(R.T @ self.get())
        bias = self._bias()
        if bias is not None:
            bias[self.rows] = (bias[self.rows].double() @ R).to(bias.dtype)


@dataclass
class Block:
    """One residual block of the host: h + mixer(norm(h)).

    path: dotted path in the host. module: the host's block, called as module(hidden_BLD) in calibration; site paths
    count from it. rounded: weights a rounding pass (GPTQ) has already chosen, path -> (codes, scales), for the packer.
    patterns: N:M patterns that pruning is planned to leave, path -> pattern; masks: those it has left, path -> bool
    [O, I], also for the packer.
    """

    index: int
    path: str
    module: nn.Module
    sites: list[Site]
    streams: dict[str, Stream]
    rounded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    patterns: dict[str, Pattern] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, path: str, module: nn.Module) -> Block:
        """The block of a host module that holds ``norm`` and ``mixer``."""
        mixer = module.get_submodule("mixer")
        if not isinstance(mixer, Mixer):
            raise TypeError(f"{path} holds a stock {type(mixer).__name__}: adopt the host first")
        sites, streams = mixer_sites(mixer, module, "mixer")
        return cls(index, path, module, sites, streams)

    @property
    def mixer(self) -> Mixer:
        return self.module.mixer  # type: ignore[return-value]

    @property
    def norm(self) -> nn.Module:
        return self.module.norm  # type: ignore[return-value]

    def copy(self) -> Block:
        """An independent copy, to try something on."""
        return Block.of(self.index, self.path, copy.deepcopy(self.module))

    def readers(self, stream: str) -> list[Site]:
        return [site for site in self.sites if site.reads == stream]

    def writers(self, stream: str) -> list[Site]:
        return [site for site in self.sites if site.writes == stream]

    def matrices(self, tensor: str | None = None) -> dict[str, list[Site]]:
        """Path of each matrix (of that recipe name, or all) -> its sites in row order."""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.layout == "linear" and tensor in (None, site.tensor):
                grouped.setdefault(site.path, []).append(site)
        return grouped

    def site(self, quantity: str) -> Site:
        """The only site of ``quantity``; raises KeyError where there is none or several."""
        found = [site for site in self.sites if site.quantity == quantity]
        if len(found) != 1:
            raise KeyError(f"block {self.index} has {len(found)} sites of {quantity!r}")
        return found[0]

    def replace(self, path: str, module: nn.Module) -> None:
        """Put ``module`` at ``path`` below this block."""
        set_module(self.module, path, module)


@dataclass
class ModelMap:
    """The host as passes see it.

    embedding, head: sites of the residual; tied: they share one weight. left_alone: full path of every parameter that
    no site holds -> why no pass edits it as a matrix. basis: R [D, D] where the residual has been rotated by it.
    pattern, mask, rounded: of the head's weight, as ``Block`` has them of its matrices.
    """

    host: Any
    family: str
    blocks: list[Block]
    embedding: Site
    final_norm: nn.Module
    final_norm_path: str
    head: Site
    tied: bool
    residual: Stream
    left_alone: dict[str, str] = field(default_factory=dict)
    basis: Tensor | None = None
    pattern: Pattern | None = None
    mask: Tensor | None = None
    rounded: tuple[Tensor, Tensor] | None = None

    def matrices(self) -> dict[str, tuple[str, torch.Size]]:
        """path -> (recipe name, shape) of every matrix, a tied head once: what coverage is a share of."""
        found = {f"{block.path}.{site.path}": (site.tensor, site.weight.shape) for block in self.blocks
                 for site in block.sites if site.layout == "linear"}
        found[self.embedding.path] = (self.embedding.tensor, self.embedding.weight.shape)
        if not self.tied:
            found[self.head.path] = (self.head.tensor, self.head.weight.shape)
        return found


    def held(self) -> set[str]:
        """Full paths of the parameters that sites hold: their weights, and the biases that move with them."""
        sites = [(f"{block.path}.{site.path}", site) for block in self.blocks for site in block.sites]
        sites += [(site.path, site) for site in (self.embedding, self.head)]
        return {f"{path}.{name}" for path, site in sites for name, _ in site.module.named_parameters(recurse=False)}


def parameters_left_alone(model_map: ModelMap) -> dict[str, str]:
    """Full path -> reason, for every parameter of the host that no site holds."""
    held = model_map.held()
    found = {}
    for name, _ in model_map.host.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if name not in held:
            norm = owner == model_map.final_norm_path or owner.endswith(".norm")
            found[name] = _NORM if norm else _LEFT_ALONE.get(leaf, _UNKNOWN)
    return found


_NORM = "a norm's weight is one number a channel: it can be folded into its readers, else it stays in fp32"
_UNKNOWN = "no pass knows this parameter: it is kept as it is"
_LEFT_ALONE = {
    "A_log": "the decay is exponentiated at every step: an error in it grows with the sequence",
    "D": "one number a channel or head, applied in fp32 inside the scan",
    "dt_bias": "added to the step size in fp32, before its softplus",
    "norm_weight": "the gated norm's weight is one number a channel: it can be scaled, never rotated",
    "direction_B": "a few numbers a state, added to B",
}


def set_module(root: nn.Module, path: str, module: nn.Module | None) -> None:
    """Put ``module`` at the dotted ``path`` below ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def s6_sites(mixer: S6Mixer, root: nn.Module, path: str) -> tuple[list[Site], dict[str, Stream]]:
    """The sites and streams of an S6Mixer. Streams: residual (the model's), x, z, u, dt_low, B, C, y."""
    E = mixer.d_inner
    sites = [Site("x", "in_proj", root, f"{path}.in_proj", slice(0, E), RESIDUAL, "x")]
    if mixer.gate is not None:
        sites.append(Site("z", "in_proj", root, f"{path}.in_proj", slice(E, 2 * E), RESIDUAL, "z"))
    if mixer.conv is not None:
        sites.append(Site("conv", "conv", root, f"{path}.conv", reads="x", writes="u", layout="depthwise"))
    seen: set[int] = set()
    normed = norm_after_scan = None
    for i, scan_path in enumerate(mixer.scans()):
        if scan_path.conv is not None:
            sites.append(Site("conv", "conv", root, f"{path}.paths.{i}.conv", reads="x", writes="u",
                              layout="depthwise"))
        projection = scan_path.projection
        if id(projection) in seen:
            continue
        seen.add(id(projection))
        here, R, S = f"{path}.paths.{i}.projection", projection.dt_rank, projection.groups * projection.d_state
        for quantity, rows, writes in (("dt_low", slice(0, R), "dt_low"), ("B", slice(R, R + S), "B"),
                                       ("C", slice(R + S, R + 2 * S), "C")):
            sites.append(Site(quantity, "x_proj", root, f"{here}.x_proj", rows, "u", writes))
        sites.append(Site("dt", "dt_proj", root, f"{here}.dt_proj", reads="dt_low"))
        normed = projection.norm
    sites.append(Site("y", "out_proj", root, f"{path}.out_proj", reads="y", writes=RESIDUAL))
    if mixer.norm is not None:
        norm_after_scan = "a norm follows the scan, so its input cannot be scaled"
    dt_refuses = {} if normed is None else {"scale": "dt, B and C pass a weightless norm that would undo the scale"}
    state_refuses = dt_refuses | {
        "rotate": "A differs over the states of a channel: only a scale per state keeps the function"}
    projection = mixer.scans()[0].projection
    span = projection.groups * projection.d_state
    nonlinear = "it passes an elementwise nonlinearity"
    streams = {
        "x": Stream("x", E, {"rotate": f"{nonlinear} after the convolution"}),
        "z": Stream("z", E, {"rotate": f"{nonlinear}: the gate"}),
        "u": Stream("u", E, {"rotate": "the scan is elementwise in its channels"}
                    | ({"scale": norm_after_scan} if norm_after_scan else {})),
        "y": Stream("y", E, {"rotate": "the gate is elementwise, nothing before it can absorb a rotation"}),
        "dt_low": Stream("dt_low", projection.dt_rank, dt_refuses),
        "B": Stream("B", span, state_refuses),
        "C": Stream("C", span, state_refuses),
    }
    return sites, streams


def ssd_sites(mixer: SSDMixer, root: nn.Module, path: str) -> tuple[list[Site], dict[str, Stream]]:
    """The sites and streams of an SSDMixer: in_proj rows [z, x, B, C, dt]."""
    E, S, H = mixer.d_inner, mixer.groups * mixer.d_state, mixer.heads
    sites, start = [], 0
    for quantity, size in (("z", E), ("x", E), ("B", S), ("C", S), ("dt", H)):
        sites.append(Site(quantity, "in_proj", root, f"{path}.in_proj", slice(start, start + size), RESIDUAL,
                          "x" if quantity in ("x", "B", "C") else quantity))
        start += size
    sites.append(Site("conv", "conv", root, f"{path}.conv", reads="x", writes="u", layout="depthwise"))
    sites.append(Site("y", "out_proj", root, f"{path}.out_proj", reads="y", writes=RESIDUAL))
    nonlinear = "it passes an elementwise nonlinearity"
    streams = {
        "x": Stream("x", E + 2 * S, {"rotate": f"{nonlinear} after the convolution"}),
        "z": Stream("z", E, {"rotate": f"{nonlinear}: the gate", "scale": "a norm follows the gate"}),
        "u": Stream("u", E + 2 * S, {"rotate": "the convolution is elementwise in its channels",
                                     "scale": "a norm follows the scan, and B and C leave the same convolution"}),
        "y": Stream("y", E, {
            "rotate": "the gate and the norm before it are elementwise: only an online rotation is exact"}),
        "dt": Stream("dt", H, {"rotate": f"{nonlinear}: the softplus", "scale": f"{nonlinear}: the softplus"}),
    }
    return sites, streams


def mixer_sites(mixer: Mixer, root: nn.Module, path: str) -> tuple[list[Site], dict[str, Stream]]:
    """Sites and streams of either mixer; ``path`` is the mixer's place below ``root``."""
    if isinstance(mixer, S6Mixer):
        return s6_sites(mixer, root, path)
    if isinstance(mixer, SSDMixer):
        return ssd_sites(mixer, root, path)
    raise TypeError(f"no sites are known for a {type(mixer).__name__}")
