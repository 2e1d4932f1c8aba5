"""How many floating-point operations one image costs a vision Mamba, counted from the shapes of its modules.

A multiplication and an addition are one operation each (a multiply-add is two), and so is every exponential, sigmoid,
softplus, division and root. The same counter serves teachers and students. For L tokens:

    linear       2 in out (+ out for a bias), a token
    convolution  2 taps (+ 1 for a bias), an output
    scan         E (7 N + 1): dt u; and a state dt A, exp, (dt u) B, a h, + drive, C h, their sum
                 + 2 E for softplus(dt + bias), 2 E for D u; with a window 4 E N for the backward states a h + drive
                 and their sum with the forward ones, less the drive counted twice
    SiLU         2 (sigmoid, product);  gate 3;  RMS norm 4 D + 3
    merge        E a further path, E for the mean's division;  mean of the tokens L D + D

What depends on no image (A = -exp(A_log)) is not counted, what a border adds as zeros is.

Legend: L tokens, D width, E inner width, N states.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mambacompress.models.mixers import S6Mixer
from mambacompress.models.paths import DepthwiseConv, Path
from mambacompress.models.vision import VisionMamba


@dataclass(frozen=True)
class Flops:
    """Operations an image, by part. total: their sum."""

    stem: int
    matrices: int
    convolutions: int
    scans: int
    rest: int

    @property
    def total(self) -> int:
        return self.stem + self.matrices + self.convolutions + self.scans + self.rest


def vision_flops(model: VisionMamba) -> Flops:
    """What one image costs ``model``. Raises TypeError for a module it cannot count."""
    shape, L = model.shape, model.shape.tokens
    matrices = convolutions = scans = 0
    rest = L * shape.width  # positions
    for block in model.blocks:
        mixer = block.get_submodule("mixer")
        if not isinstance(mixer, S6Mixer):
            raise TypeError(f"cannot count a {type(mixer).__name__}")
        E = mixer.d_inner
        paths = mixer.scans()
        matrices += L * (_linear(mixer.in_proj) + _linear(mixer.out_proj))
        if isinstance(mixer.conv, DepthwiseConv):
            convolutions += L * E * (2 * mixer.conv.weight[0].numel() + (mixer.conv.bias is not None))
            rest += 2 * L * E
        for path in paths:
            matrices += L * (_linear(path.projection.x_proj) + _linear(path.projection.dt_proj))
            scans += L * _scan(path)
        rest += L * E * (len(paths) - 1 + (len(paths) > 1))  # merge
        rest += 3 * L * E if mixer.gate is not None else 0
        rest += L * (_norm(shape.width) + shape.width)  # norm and residual
    rest += L * _norm(shape.width) + (L + 1) * shape.width + _linear(model.head)  # last norm, mean, head
    return Flops(_stem(model), matrices, convolutions, scans, rest)


def _linear(module: nn.Module) -> int:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    return 2 * weight.numel() + (0 if bias is None else bias.numel())


def _norm(width: int) -> int:
    """Squares, their sum, its mean, + eps, the reciprocal root, times it, times the weight."""
    return 4 * width + 3


def _scan(path: Path) -> int:
    """A token's."""
    E, N = path.A_log.shape
    return E * (7 * N + 1) + 4 * E + (0 if path.window is None else 4 * E * N)


def _stem(model: VisionMamba) -> int:
    """Convolutions on shrinking images, SiLU between them."""
    total, side = 0, model.shape.image
    layers = [model.stem] if isinstance(model.stem, nn.Conv2d) else list(model.stem.children())
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            side //= layer.stride[0]
            total += side * side * (2 * layer.weight.numel() + (0 if layer.bias is None else len(layer.bias)))
            width = layer.out_channels
        elif isinstance(layer, nn.SiLU):
            total += 2 * width * side * side
        else:
            raise TypeError(f"cannot count a {type(layer).__name__}")
    return total
