"""Vision Mambas and what they cost: the counter against a plain forward whose every operation is counted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mambacompress.errors import UserError
from mambacompress.kernels import registry
from mambacompress.models.flops import vision_flops
from mambacompress.models.vision import VisionMamba, VisionShape

SHAPE = VisionShape(image=4, channels=2, classes=3, width=3, depth=2, patch=2, inner=4, states=2, rank=1,
                    orders=(("identity", "flip"), ("transposed",)))


class Number:
    """A float that counts what is done with it."""

    count = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def _new(self, value: float) -> Number:
        Number.count += 1
        return Number(value)

    def __add__(self, other: Any) -> Number:
        return self._new(self.value + value(other))

    def __sub__(self, other: Any) -> Number:
        return self._new(self.value - value(other))

    def __mul__(self, other: Any) -> Number:
        return self._new(self.value * value(other))

    def __truediv__(self, other: Any) -> Number:
        return self._new(self.value / value(other))

    def apply(self, function: Any) -> Number:
        return self._new(function(self.value))


def value(x: Any) -> float:
    return x.value if isinstance(x, Number) else float(x)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def silu(x: Number) -> Number:
    return x * x.apply(sigmoid)


def dot(xs: Any, ws: Any, bias: float | None = None) -> Number:
    total = Number(0.0)
    for x, w in zip(xs, ws, strict=True):
        total = total + x * float(w)
    return total if bias is None else total + float(bias)


def linear(x: list[Number], layer: Any) -> list[Number]:
    bias = layer.bias
    return [dot(x, row, None if bias is None else bias[i]) for i, row in enumerate(layer.weight.tolist())]


def norm(x: list[Number], layer: Any) -> list[Number]:
    total = Number(0.0)
    for v in x:
        total = total + v * v
    scale = (total / len(x) + layer.variance_epsilon).apply(lambda v: v**-0.5)
    return [v * scale * float(w) for v, w in zip(x, layer.weight, strict=True)]


def convolved(image: dict[tuple[int, int], list[Number]], layer: Any, stride: int, padding: int, side: int,
              depthwise: bool) -> dict[tuple[int, int], list[Number]]:
    """image: pixel -> channels."""
    weight, size = layer.weight.tolist(), layer.weight.shape[-1]
    blank = [Number(0.0)] * len(next(iter(image.values())))
    made = {}
    for row in range(side):
        for column in range(side):
            window = [image.get((row * stride + a - padding, column * stride + b - padding), blank)
                      for a in range(size) for b in range(size)]
            made[row, column] = [
                dot([w[o] for w in window], torch.tensor(kernel).flatten().tolist(), layer.bias[o]) if depthwise else
                dot([w[c] for c in range(len(blank)) for w in window], torch.tensor(kernel).flatten().tolist(),
                    layer.bias[o]) for o, kernel in enumerate(weight)]
    return made


def scan(u: list[list[Number]], path: Any) -> list[list[Number]]:
    """The path's outputs in its own order; u in raster order."""
    E, N = path.A_log.shape
    A = (-torch.exp(path.A_log)).tolist()
    states = [[Number(0.0)] * N for _ in range(E)]
    outputs, steps = [], []
    for x in u:
        low = linear(x, path.projection.x_proj)
        R = path.projection.dt_rank
        dt, B, C = linear(low[:R], path.projection.dt_proj), low[R:R + N], low[R + N:]
        kept = {}
        for e in range(E):
            step = (dt[e] + float(path.dt_bias[e])).apply(lambda v: math.log1p(math.exp(v)))
            drive = step * x[e]
            for n in range(N):
                a, b = (step * A[e][n]).apply(math.exp), drive * B[n]
                states[e][n] = a * states[e][n] + b
                kept[e, n] = (a, b, states[e][n])
        steps.append((x, C, kept))
    for start in range(0, len(u), path.window or 1) if path.window else ():
        behind = {(e, n): Number(0.0) for e in range(E) for n in range(N)}
        for _, _, kept in reversed(steps[start : start + path.window]):
            for place, (a, b, h) in kept.items():
                behind[place] = a * behind[place] + b
                kept[place] = (a, b, h + behind[place] - b)
    for x, C, kept in steps:
        y = []
        for e in range(E):
            total = Number(0.0)
            for n in range(N):
                total = total + C[n] * kept[e, n][2]
            y.append(total + x[e] * float(path.D[e]))
        outputs.append(y)
    return outputs


def plain_forward(model: VisionMamba, pixels_CHW: Tensor) -> list[float]:
    shape, side = model.shape, model.shape.side
    C, H, _ = pixels_CHW.shape
    image = {(r, c): [Number(float(pixels_CHW[k, r, c])) for k in range(C)] for r in range(H) for c in range(H)}
    if shape.stem == "patch":
        grid = convolved(image, model.stem, shape.patch, 0, side, False)
    else:
        layers, edge = list(model.stem.children()), H
        for layer in layers:
            if isinstance(layer, torch.nn.SiLU):
                grid = {place: [silu(v) for v in pixel] for place, pixel in grid.items()}
            else:
                edge //= 2
                grid = convolved(image if layer is layers[0] else grid, layer, 2, 1, edge, False)
    places = [(r, c) for r in range(side) for c in range(side)]
    h = [[v + float(p) for v, p in zip(grid[place], row, strict=True)]
         for place, row in zip(places, model.positions, strict=True)]
    for block in model.blocks:
        mixer, E = block.mixer, block.mixer.d_inner
        projected = [linear(norm(x, block.norm), mixer.in_proj) for x in h]
        x, z = [row[:E] for row in projected], [row[E:] for row in projected]
        u = convolved(dict(zip(places, x, strict=True)), mixer.conv, 1, mixer.conv.width // 2, side, True)
        u_L = [[silu(v) for v in u[place]] for place in places]
        outputs = []
        for path in mixer.scans():
            order = {"identity": places, "flip": places[::-1], "transposed": sorted(places, key=lambda p: p[::-1])}[
                path.order.name]
            scanned = dict(zip(order, scan([u_L[places.index(p)] for p in order], path), strict=True))
            outputs.append([scanned[place] for place in places])
        merged = outputs[0]
        for other in outputs[1:]:
            merged = [[a + b for a, b in zip(m, o, strict=True)] for m, o in zip(merged, other, strict=True)]
        if len(outputs) > 1:
            merged = [[v / len(outputs) for v in row] for row in merged]
        gated = [[v * silu(g) for v, g in zip(row, gate, strict=True)] for row, gate in zip(merged, z, strict=True)]
        h = [[a + b for a, b in zip(old, linear(row, mixer.out_proj), strict=True)]
             for old, row in zip(h, gated, strict=True)]
    h = [norm(x, model.norm) for x in h]
    mean = []
    for d in range(shape.width):
        total = Number(0.0)
        for row in h:
            total = total + row[d]
        mean.append(total / len(h))
    return [v.value for v in linear(mean, model.head)]


@pytest.mark.parametrize("shape", [
    SHAPE, replace(SHAPE, stem="conv", image=8, patch=4, depth=1, channels=1), replace(SHAPE, window=3, depth=1)])
def test_the_counter_counts_what_a_plain_forward_does(shape: VisionShape):
    """The plain forward gives the model's logits, so what it counts is this model's work."""
    torch.manual_seed(1)
    model = VisionMamba(shape, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    image = torch.randn(shape.channels, shape.image, shape.image)
    Number.count = 0
    logits = plain_forward(model, image)
    torch.testing.assert_close(model(image[None])[0].detach(), torch.tensor(logits), rtol=1e-4, atol=1e-5)
    assert vision_flops(model).total == Number.count


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_products_agree_with_torchs_own_counter(stem: str):
    """torch counts matrix products and convolutions, two operations a multiply-add and no biases."""
    shape = VisionShape(image=16, channels=3, classes=10, width=24, depth=3, stem=stem, rank=2,
                        orders=(("identity", "flip"),))
    model = VisionMamba(shape)
    with registry.backend("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    stem_biases = {"patch": 24 * 16, "conv": 12 * 64 + 24 * 16}[stem]
    between = 0 if stem == "patch" else 2 * 12 * 64  # SiLU
    ours = vision_flops(model)
    conv_biases = 3 * 16 * 48
    head = 2 * 24 * 10
    by_hand = (ours.stem - stem_biases - between) + ours.matrices + (ours.convolutions - conv_biases) + head
    assert by_hand == sum(flops for operator, flops in counter.get_flop_counts()["Global"].items()
                          if any(part in str(operator) for part in ("mm", "conv")))


def test_students_and_teachers_are_counted_alike():
    small, large = (vision_flops(VisionMamba(replace(SHAPE, width=w, inner=2 * w))).total for w in (4, 8))
    assert 2 * small < large < 4 * small
    assert vision_flops(VisionMamba(SHAPE, seed=3)) == vision_flops(VisionMamba(SHAPE))


@pytest.mark.parametrize("shape", [
    SHAPE, replace(SHAPE, window=2), replace(SHAPE, gate=False), replace(SHAPE, conv="same"),
    replace(SHAPE, conv="none"), replace(SHAPE, stem="conv", image=8, patch=4)])
def test_every_kind_learns(shape: VisionShape):
    model = VisionMamba(shape)
    images, labels = torch.randn(12, shape.channels, shape.image, shape.image), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_backward_order_sees_what_is_behind():
    """With one causal order the first token would know nothing of the last; with its flip it does."""
    for orders, reaches in (((("identity",),), False), ((("identity", "flip"),), True)):
        model = VisionMamba(replace(SHAPE, orders=orders, conv="none", depth=1))
        image = torch.randn(1, 2, 4, 4, requires_grad=True)
        model.features(image)[0, 0].sum().backward()
        assert bool(image.grad[..., 2:, 2:].abs().sum() > 0) is reaches


def test_a_seed_makes_a_model_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = VisionMamba(SHAPE, 1), VisionMamba(SHAPE, 1), VisionMamba(SHAPE, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.positions, other.positions)


@pytest.mark.parametrize(("changes", "message"), [
    ({"stem": "patches"}, "did you mean 'patch'"), ({"patch": 3}, "does not divide into patches"),
    ({"stem": "conv", "image": 6, "patch": 3}, "cannot make patches of 3"), ({"orders": ()}, "without a scan order"),
    ({"orders": (("sideways",),)}, "unknown scan order"), ({"depth": 0}, "depth = 0")])
def test_what_cannot_be_built_is_said(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(SHAPE, **changes)
