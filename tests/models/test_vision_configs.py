"""One mixer, many scans: Vim, VMamba, PlainMamba and LBMamba are configurations of S6Mixer.

Each is compared in fp64 with a naive forward written here from the published definition, token by token, on tensors in
the published layout and under the published names; none of our ops, orders or modules is used on that side.

Sources: Vim (arXiv 2401.09417, Alg. 1; released code divides the sum by two), VMamba (2401.10166, SS2D), PlainMamba
(2403.17695, Eq. 5 and the released layer), LBMamba (2506.15976). Legend: L tokens, E d_inner, N d_state, R dt_rank, K
conv width, H x W grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mambacompress.models.mixers import S6Mixer
from mambacompress.models.orders import CONTINUOUS, CROSS, Merge, Order
from mambacompress.models.paths import DepthwiseConv, Gate, Path, SelectiveProjection

D, E, N, R, BATCH = 6, 8, 3, 2, 2
Weights = dict[str, Tensor]


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.6 for name, shape in shapes.items()}


def inputs(length: int) -> Tensor:
    return torch.randn(BATCH, length, D, dtype=torch.float64)


def same(got: Tensor, want: Tensor) -> bool:
    return ((got - want).abs().max() / want.abs().max()).item() < 1e-12


# -- the naive side: plain loops ---------------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def naive_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor,
               window: int | None = None) -> Tensor:
    """u, dt [L, E] (dt positive), A [E, N], B, C [L, N], skip [E] -> [L, E]; one sequence."""
    length = len(u)
    decay = [torch.exp(dt[t][:, None] * A) for t in range(length)]
    drive = [dt[t][:, None] * B[t][None, :] * u[t][:, None] for t in range(length)]
    forward, h = [], torch.zeros_like(A)
    for t in range(length):
        h = decay[t] * h + drive[t]
        forward.append(h)
    states = list(forward)
    for start in range(0, length, window or length) if window else ():
        backward = torch.zeros_like(A)
        for t in reversed(range(start, min(start + window, length))):
            backward = decay[t] * backward + drive[t]
            states[t] = forward[t] + backward - drive[t]
    return torch.stack([states[t] @ C[t] + skip * u[t] for t in range(length)])


def naive_causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [L, E], weight [E, 1, K] -> [L, E]."""
    K = weight.shape[-1]
    rows = []
    for t in range(len(x)):
        total = bias.clone()
        for k in range(K):
            if t - (K - 1) + k >= 0:
                total = total + weight[:, 0, k] * x[t - (K - 1) + k]
        rows.append(silu(total))
    return torch.stack(rows)


def naive_conv2d(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """x [L, E] in raster order, weight [E, 1, K, K] -> [L, E]."""
    H, W = grid
    K = weight.shape[-1]
    rows = []
    for i in range(H):
        for j in range(W):
            total = bias.clone()
            for a in range(K):
                for b in range(K):
                    y, z = i + a - K // 2, j + b - K // 2
                    if 0 <= y < H and 0 <= z < W:
                        total = total + weight[:, 0, a, b] * x[y * W + z]
            rows.append(silu(total))
    return torch.stack(rows)


def selective(u: Tensor, x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt (positive), B, C of a sequence u [L, E]."""
    projected = u @ x_proj.T
    dt = softplus(projected[:, :R] @ dt_weight.T + dt_bias)
    return dt, projected[:, R : R + N], projected[:, R + N :]


# -- Vim ---------------------------------------------------------------------------------------------------------------

BRANCH = {"conv1d{}.weight": (E, 1, 4), "conv1d{}.bias": (E,), "x_proj{}.weight": (R + 2 * N, E),
          "dt_proj{}.weight": (E, R), "dt_proj{}.bias": (E,), "A{}_log": (E, N), "D{}": (E,)}


def vim_weights(*suffixes: str) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {"in_proj.weight": (2 * E, D), "out_proj.weight": (D, E)}
    for suffix in suffixes:
        shapes |= {name.format(suffix): shape for name, shape in BRANCH.items()}
    return weights(shapes)


def naive_branch(w: Weights, suffix: str, x: Tensor, z: Tensor, window: int | None = None) -> Tensor:
    """conv, projections, scan and gate of one branch, as mamba_inner_fn_no_out_proj does them."""
    u = naive_causal_conv(x, w[f"conv1d{suffix}.weight"], w[f"conv1d{suffix}.bias"])
    dt, B, C = selective(u, w[f"x_proj{suffix}.weight"], w[f"dt_proj{suffix}.weight"], w[f"dt_proj{suffix}.bias"])
    return naive_scan(u, dt, -torch.exp(w[f"A{suffix}_log"]), B, C, w[f"D{suffix}"], window) * silu(z)


def naive_vim(w: Weights, tokens: Tensor, *, divide: bool) -> Tensor:
    rows = []
    for sequence in tokens:
        xz = sequence @ w["in_proj.weight"].T
        x, z = xz[:, :E], xz[:, E:]
        forward = naive_branch(w, "", x, z)
        backward = naive_branch(w, "_b", x.flip(0), z.flip(0)).flip(0)
        rows.append((forward + backward) / (2 if divide else 1) @ w["out_proj.weight"].T)
    return torch.stack(rows)


def branch_path(w: Weights, suffix: str, order: str, *, own_conv: bool = True, window: int | None = None) -> Path:
    projection = SelectiveProjection(E, N, R)
    set_(projection.x_proj, w[f"x_proj{suffix}.weight"])
    set_(projection.dt_proj, w[f"dt_proj{suffix}.weight"])
    return Path(E, N, projection, order=Order(order), window=window, A_log=nn.Parameter(w[f"A{suffix}_log"]),
                D=nn.Parameter(w[f"D{suffix}"]), dt_bias=nn.Parameter(w[f"dt_proj{suffix}.bias"]),
                conv=branch_conv(w, suffix) if own_conv else None)


def branch_conv(w: Weights, suffix: str) -> DepthwiseConv:
    conv = DepthwiseConv(E, 4)
    set_(conv, w[f"conv1d{suffix}.weight"], w[f"conv1d{suffix}.bias"])
    return conv


def set_(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Published weights into a module of ours: the same numbers, a singleton axis less for convolutions."""
    module.weight = nn.Parameter(weight.reshape(module.weight.shape).clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())


def finished(mixer: S6Mixer, w: Weights) -> S6Mixer:
    set_(mixer.in_proj, w["in_proj.weight"])
    set_(mixer.out_proj, w["out_proj.weight"])
    return mixer.double()


def make_vim(w: Weights, *, divide: bool = True) -> S6Mixer:
    paths = [branch_path(w, "", "identity"), branch_path(w, "_b", "flip")]
    return finished(S6Mixer(D, E, paths, conv=None, gate=Gate(E), merge=Merge("mean" if divide else "sum")), w)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_vim(divide: bool, length: int) -> None:
    w, x = vim_weights("", "_b"), inputs(length)
    assert same(make_vim(w, divide=divide).mix(x)[0], naive_vim(w, x, divide=divide))


def test_vim_ignores_padding_on_either_side() -> None:
    """The backward branch meets left padding last: it must not leave a trace there either."""
    mixer, x = make_vim(vim_weights("", "_b")), inputs(9)
    for real in (slice(4, 9), slice(0, 5)):
        mask = torch.zeros(BATCH, 9)
        mask[:, real] = 1
        assert same(mixer.mix(x, attention_mask=mask)[0][:, real], mixer.mix(x[:, real])[0])


def test_vim_packs() -> None:
    mixer, x = make_vim(vim_weights("", "_b")), inputs(9)
    packed, _ = mixer.mix(x, seq_idx=torch.tensor([[0] * 3 + [1] * 6]).expand(BATCH, -1))
    assert same(packed, torch.cat([mixer.mix(part)[0] for part in x.split([3, 6], 1)], 1))


# -- VMamba ------------------------------------------------------------------------------------------------------------


def vmamba_weights(*, gated: bool) -> Weights:
    return weights({"in_proj.weight": ((2 if gated else 1) * E, D), "out_proj.weight": (D, E),
                    "conv2d.weight": (E, 1, 3, 3), "conv2d.bias": (E,), "x_proj_weight": (4, R + 2 * N, E),
                    "dt_projs_weight": (4, E, R), "dt_projs_bias": (4, E), "A_logs": (4 * E, N), "Ds": (4 * E,),
                    "out_norm.weight": (E,), "out_norm.bias": (E,)})


def naive_vmamba(w: Weights, tokens: Tensor, grid: tuple[int, int], *, gated: bool) -> Tensor:
    H, W = grid
    by_rows = [i * W + j for i in range(H) for j in range(W)]
    by_columns = [i * W + j for j in range(W) for i in range(H)]
    reads = [by_rows, by_columns, by_rows[::-1], by_columns[::-1]]
    results = []
    for sequence in tokens:
        xz = sequence @ w["in_proj.weight"].T
        u = naive_conv2d(xz[:, :E], w["conv2d.weight"], w["conv2d.bias"], grid)
        y = torch.zeros_like(u)
        for k, read in enumerate(reads):
            dt, B, C = selective(u[read], w["x_proj_weight"][k], w["dt_projs_weight"][k], w["dt_projs_bias"][k])
            A, skip = -torch.exp(w["A_logs"][k * E : (k + 1) * E]), w["Ds"][k * E : (k + 1) * E]
            scanned = naive_scan(u[read], dt, A, B, C, skip)
            for step, place in enumerate(read):
                y[place] += scanned[step]
        mean = y.mean(1, keepdim=True)
        deviation = torch.sqrt(((y - mean) ** 2).mean(1, keepdim=True) + 1e-5)
        y = (y - mean) / deviation * w["out_norm.weight"] + w["out_norm.bias"]
        results.append((y * silu(xz[:, E:]) if gated else y) @ w["out_proj.weight"].T)
    return torch.stack(results)


def make_vmamba(w: Weights, *, gated: bool = True) -> S6Mixer:
    paths = []
    for k, order in enumerate(CROSS):
        projection = SelectiveProjection(E, N, R)
        set_(projection.x_proj, w["x_proj_weight"][k])
        set_(projection.dt_proj, w["dt_projs_weight"][k])
        rows = slice(k * E, (k + 1) * E)
        paths.append(Path(E, N, projection, order=Order(order), A_log=nn.Parameter(w["A_logs"][rows]),
                          D=nn.Parameter(w["Ds"][rows]), dt_bias=nn.Parameter(w["dt_projs_bias"][k])))
    conv, norm = DepthwiseConv(E, 3, kind="2d"), nn.LayerNorm(E)
    set_(conv, w["conv2d.weight"], w["conv2d.bias"])
    set_(norm, w["out_norm.weight"], w["out_norm.bias"])
    return finished(S6Mixer(D, E, paths, conv=conv, gate=Gate(E) if gated else None, norm=norm), w)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grid", [(3, 4), (4, 2), (1, 5), (1, 1)])
def test_vmamba(gated: bool, grid: tuple[int, int]) -> None:
    w, x = vmamba_weights(gated=gated), inputs(math.prod(grid))
    assert same(make_vmamba(w, gated=gated).mix(x, grid=grid)[0], naive_vmamba(w, x, grid, gated=gated))


def test_vmamba_needs_its_grid() -> None:
    with pytest.raises(ValueError, match="grid"):
        make_vmamba(vmamba_weights(gated=True)).mix(inputs(12))


# -- PlainMamba --------------------------------------------------------------------------------------------------------


def plain_weights() -> Weights:
    return weights({"in_proj.weight": (2 * E, D), "out_proj.weight": (D, E), "conv2d.weight": (E, 1, 7, 7),
                    "conv2d.bias": (E,), "x_proj.weight": (R + 2 * N, E), "dt_proj.weight": (E, R),
                    "dt_proj.bias": (E,), "A_log": (E, N), "D": (E,), "direction_Bs": (5, N)})


def walk(grid: tuple[int, int], *, down: bool, back: bool) -> tuple[list[int], list[int]]:
    """A continuous walk over the grid: places, and the direction that led to each (start, right, left, up, down)."""
    H, W = grid
    outer, inner = (W, H) if down else (H, W)
    cells = []
    for line in range(outer):
        along = range(inner) if line % 2 == 0 else reversed(range(inner))
        cells += [(step, line) if down else (line, step) for step in along]
    if back:
        cells = cells[::-1]
    directions = [0]
    for (i, j), (y, x) in pairwise(cells):
        directions.append({(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}[(y - i, x - j)])
    return [i * W + j for i, j in cells], directions


def naive_plain(w: Weights, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """As released: only u is permuted, dt, B and C stay in raster order, and dt's bias is added twice."""
    walks = [walk(grid, down=down, back=back) for down in (False, True) for back in (False, True)]
    results = []
    for sequence in tokens:
        xz = sequence @ w["in_proj.weight"].T
        u = naive_conv2d(xz[:, :E], w["conv2d.weight"], w["conv2d.bias"], grid)
        dt, B, C = selective(u, w["x_proj.weight"], w["dt_proj.weight"], w["dt_proj.bias"] + w["dt_proj.bias"])
        y = torch.zeros_like(u)
        for read, directions in walks:
            scanned = naive_scan(u[read], dt, -torch.exp(w["A_log"]), B + w["direction_Bs"][directions], C, w["D"])
            for step, place in enumerate(read):
                y[place] += scanned[step]
        results.append((y * silu(xz[:, E:])) @ w["out_proj.weight"].T)
    return torch.stack(results)


def make_plain(w: Weights) -> S6Mixer:
    projection = SelectiveProjection(E, N, R)
    set_(projection.x_proj, w["x_proj.weight"])
    set_(projection.dt_proj, w["dt_proj.weight"])
    A_log, skip, dt_bias = nn.Parameter(w["A_log"]), nn.Parameter(w["D"]), nn.Parameter(2 * w["dt_proj.bias"])
    direction_B = nn.Parameter(w["direction_Bs"])
    paths = [Path(E, N, projection, order=Order(order), permutes="u", A_log=A_log, D=skip, dt_bias=dt_bias,
                  direction_B=direction_B) for order in CONTINUOUS]
    conv = DepthwiseConv(E, 7, kind="2d")
    set_(conv, w["conv2d.weight"], w["conv2d.bias"])
    return finished(S6Mixer(D, E, paths, conv=conv, gate=Gate(E)), w)


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (2, 2), (1, 5), (5, 1)])
def test_plainmamba(grid: tuple[int, int]) -> None:
    w, x = plain_weights(), inputs(math.prod(grid))
    assert same(make_plain(w).mix(x, grid=grid)[0], naive_plain(w, x, grid))


def test_plainmamba_shares_its_projection_and_runs_it_once() -> None:
    mixer = make_plain(plain_weights())
    calls: list[int] = []
    mixer.paths[2].projection.x_proj.register_forward_hook(lambda *_: calls.append(1))
    mixer.mix(inputs(6), grid=(2, 3))
    assert len(calls) == 1
    names = {name for name, _ in mixer.named_parameters()}
    assert len([name for name in names if "x_proj" in name or name.endswith(("A_log", "dt_bias", "direction_B"))]) == 4
    mixer.paths[3].projection.x_proj = nn.Linear(E, R + 2 * N, bias=False).double()
    assert mixer.paths[0].projection.x_proj is mixer.paths[3].projection.x_proj  # replaced for all


# -- LBMamba -----------------------------------------------------------------------------------------------------------


def naive_lbmamba(w: Weights, tokens: Tensor, window: int) -> Tensor:
    rows = []
    for sequence in tokens:
        xz = sequence @ w["in_proj.weight"].T
        rows.append(naive_branch(w, "", xz[:, :E], xz[:, E:], window) @ w["out_proj.weight"].T)
    return torch.stack(rows)


def make_lbmamba(w: Weights, window: int | None) -> S6Mixer:
    path = branch_path(w, "", "identity", own_conv=False, window=window)
    return finished(S6Mixer(D, E, [path], conv=branch_conv(w, ""), gate=Gate(E)), w)


@pytest.mark.parametrize("window", [1, 2, 4, 16])
@pytest.mark.parametrize("length", [1, 4, 10, 16])
def test_lbmamba(window: int, length: int) -> None:
    w, x = vim_weights(""), inputs(length)
    assert same(make_lbmamba(w, window).mix(x)[0], naive_lbmamba(w, x, window))


def test_lbmamba_with_a_window_of_one_is_mamba() -> None:
    w, x = vim_weights(""), inputs(11)
    assert same(make_lbmamba(w, 1).mix(x)[0], make_lbmamba(w, None).mix(x)[0])


def test_lbvim_flips_the_sequence_between_layers() -> None:
    """A flipped layer is a path in flipped order with its own convolution."""
    w, x = vim_weights(""), inputs(10)
    flipped = finished(S6Mixer(D, E, [branch_path(w, "", "flip", window=4)], conv=None, gate=Gate(E)), w)
    assert same(flipped.mix(x)[0], naive_lbmamba(w, x.flip(1), 4).flip(1))


def test_a_local_window_works_on_vmambas_paths() -> None:
    w, x, grid = vmamba_weights(gated=True), inputs(12), (3, 4)
    mixer = make_vmamba(w)
    without, _ = mixer.mix(x, grid=grid)
    for path in mixer.paths:
        path.window = 4
    assert not same(mixer.mix(x, grid=grid)[0], without)
    assert not mixer.causal


# -- all ---------------------------------------------------------------------------------------------------------------

ALL: dict[str, tuple[Callable[[], S6Mixer], tuple[int, int] | None]] = {
    "vim": (lambda: make_vim(vim_weights("", "_b")), None),
    "vmamba": (lambda: make_vmamba(vmamba_weights(gated=True)), (3, 4)),
    "plainmamba": (lambda: make_plain(plain_weights()), (3, 4)),
    "lbmamba": (lambda: make_lbmamba(vim_weights(""), 4), None),
}


@pytest.mark.parametrize("name", list(ALL))
def test_every_parameter_gets_a_gradient(name: str) -> None:
    make, grid = ALL[name]
    mixer = make()
    mixer.mix(inputs(12), grid=grid)[0].square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", list(ALL))
def test_none_of_them_decodes_step_by_step(name: str) -> None:
    make, grid = ALL[name]
    mixer = make()
    assert not mixer.causal
    assert mixer.mix(inputs(12), grid=grid)[1] is None
    with pytest.raises(ValueError, match="cannot decode"):
        mixer.zero_state(1, dtype=torch.float64, device=torch.device("cpu"))
