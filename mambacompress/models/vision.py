"""Small vision Mambas on our own mixers: patches -> blocks of S6Mixer over a grid -> mean of the tokens -> classes.

    stem (patch embedding, or strided convolutions) + positions -> depth x [x + mixer(norm(x))] -> norm -> mean
    -> head

A block scans its grid in one or several orders (``models.orders``), and ``orders`` is repeated over the blocks: one
tuple of two is Vim's bi-directional block (arXiv 2401.09417), four tuples of one turn the scan from block to block at
half the price, ``window`` adds LBMamba's local backward scan (2506.15976). Mean pooling in place of a class token keeps
the grid a rectangle.

Legend: B batch, C image channels, H W image, L tokens, D width, E inner width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambacompress.errors import UserError, did_you_mean
from mambacompress.models.mixers import S6Mixer
from mambacompress.models.orders import Merge, Order
from mambacompress.models.paths import DepthwiseConv, Gate, Path, RMSNorm, SelectiveProjection

STEMS = ("patch", "conv")
CONVS = ("2d", "same", "causal", "none")
DT = (1e-3, 1e-1)  # range of the time step at the start, log-uniform
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """What a vision Mamba is. Raises UserError for what cannot be built.

    image, channels, classes: of the data. patch: side of a token; with ``stem: conv`` a power of two, one strided
    convolution a factor of two. width: D; inner: E. states: N; rank: of the time step. depth: blocks. orders: a tuple
    of scan orders a block, repeated over the blocks. window: of the locally bi-directional scan. conv: of the mixer,
    ``conv_width`` wide. gate: whether the mixer has one.
    """

    image: int
    channels: int
    classes: int
    width: int
    depth: int
    patch: int = 4
    stem: str = "patch"
    inner: int = 0
    states: int = 4
    rank: int = 4
    orders: tuple[tuple[str, ...], ...] = (("identity", "flip"),)
    window: int | None = None
    conv: str = "2d"
    conv_width: int = 3
    gate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", self.inner or 2 * self.width)
        object.__setattr__(self, "orders", tuple(tuple(names) for names in self.orders))
        for name, value, known in (("stem", self.stem, STEMS), ("conv", self.conv, CONVS)):
            if value not in known:
                raise UserError(f"there is no {name} {value!r}{did_you_mean(value, known)}",
                                f"choose {', '.join(known)}")
        for name in ("image", "channels", "classes", "width", "depth", "patch", "inner", "states", "rank",
                     "conv_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is no vision Mamba", "make it at least 1")
        if self.image % self.patch:
            raise UserError(f"an image of {self.image} does not divide into patches of {self.patch}",
                            "choose another patch")
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise UserError(f"a stem of strided convolutions halves: it cannot make patches of {self.patch}",
                            "choose a power of two, or stem: patch")
        if not self.orders or not all(self.orders):
            raise UserError("a block without a scan order reads nothing", "name at least one order a block")
        try:
            for names in self.orders:
                for name in names:
                    Order(name)
        except ValueError as error:
            raise UserError(str(error), "name a known order") from error

    @property
    def side(self) -> int:
        """Tokens along an edge."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        return self.side**2


class VisionBlock(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, shape: VisionShape, orders: tuple[str, ...]) -> None:
        super().__init__()
        E = shape.inner
        conv = None if shape.conv == "none" else DepthwiseConv(E, shape.conv_width, kind=shape.conv)
        paths = [Path(E, shape.states, SelectiveProjection(E, shape.states, shape.rank), order=Order(name),
                      window=shape.window) for name in orders]
        self.norm = RMSNorm(nn.Parameter(torch.ones(shape.width)), EPS)
        self.mixer = S6Mixer(shape.width, E, paths, conv=conv, merge=Merge("mean"),
                             gate=Gate(E) if shape.gate else None)

    def forward(self, h_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
        return h_BLD + self.mixer.mix(self.norm(h_BLD), grid=grid)[0]


class VisionMamba(nn.Module):
    """An image classifier. Call: images [B, C, H, W], normalised -> logits [B, K], fp32 at least."""

    def __init__(self, shape: VisionShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = _stem(shape)
            self.positions = nn.Parameter(0.02 * torch.randn(shape.tokens, shape.width))
            self.blocks = nn.ModuleList(VisionBlock(shape, shape.orders[i % len(shape.orders)])
                                        for i in range(shape.depth))
            self.norm = RMSNorm(nn.Parameter(torch.ones(shape.width)), EPS)
            self.head = nn.Linear(shape.width, shape.classes)
            self._initialise()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.features(images_BCHW).mean(1)).float()

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The tokens behind the last norm, [B, L, D]."""
        grid = (self.shape.side, self.shape.side)
        h_BLD = self.stem(images_BCHW).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h_BLD = block(h_BLD, grid)
        return self.norm(h_BLD)

    def _initialise(self) -> None:
        """Time steps log-uniform in DT, dt_proj uniform, out_proj smaller with depth: as Mamba starts."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Path):
                    low, high = torch.log(torch.tensor(DT))
                    dt_E = torch.exp(low + (high - low) * torch.rand(len(module.dt_bias)))
                    module.dt_bias.copy_(dt_E + torch.log(-torch.expm1(-dt_E)))  # softplus' inverse
                    bound = module.projection.dt_rank**-0.5
                    nn.init.uniform_(module.projection.dt_proj.get_parameter("weight"), -bound, bound)
                elif isinstance(module, S6Mixer):
                    module.out_proj.weight /= self.shape.depth**0.5
            nn.init.zeros_(self.head.bias)
            nn.init.normal_(self.head.weight, std=0.02)


def _stem(shape: VisionShape) -> nn.Module:
    if shape.stem == "patch":
        return nn.Conv2d(shape.channels, shape.width, shape.patch, shape.patch)
    widths, size = [shape.width], shape.patch
    while size > 2:
        widths, size = [max(8, widths[0] // 2), *widths], size // 2
    layers: list[nn.Module] = []
    for before, after in zip([shape.channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
