"""Sites and streams: every parameter is accounted for once, and their edits are what they say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambacompress.models.exact import KeepDouble
from mambacompress.models.families import adopt
from mambacompress.models.families.checkpoint import empty_host
from mambacompress.models.mixers import S6Mixer
from mambacompress.models.modelmap import RESIDUAL, Block, ModelMap, Site, mixer_sites
from mambacompress.models.orders import CONTINUOUS, Order
from mambacompress.models.paths import DepthwiseConv, Gate, Path, SelectiveProjection

KINDS = ["mamba", "mamba2", "falcon_mamba"]


@pytest.fixture(params=KINDS)
def on_meta(request: pytest.FixtureRequest, make_host: Callable[..., Any]) -> ModelMap:
    """The map of a host without a single weight."""
    return empty_host(make_host(request.param).config)


def rows(site: Site) -> set[int]:
    return set(range(site.weight.shape[0])[site.rows])


def vim(d_inner: int = 8) -> S6Mixer:
    def path(name: str) -> Path:
        return Path(d_inner, 4, SelectiveProjection(d_inner, 4, 2), order=Order(name), conv=DepthwiseConv(d_inner, 4))

    return S6Mixer(6, d_inner, [path("identity"), path("flip")], conv=None, gate=Gate(d_inner))


def plain() -> S6Mixer:
    projection = SelectiveProjection(8, 4, 2, groups=2)
    paths = [Path(8, 4, projection, order=Order(name), permutes="u") for name in CONTINUOUS]
    return S6Mixer(6, 8, paths, conv=DepthwiseConv(8, 3, kind="2d"), gate=None)


def test_sites_tile_every_weight(on_meta: ModelMap) -> None:
    for block in on_meta.blocks:
        by_path: dict[str, list[Site]] = defaultdict(list)
        for site in block.sites:
            by_path[site.path].append(site)
        for path, sites in by_path.items():
            assert sum(len(rows(site)) for site in sites) == sites[0].weight.shape[0], f"{path} overlaps or leaks"
            assert set().union(*map(rows, sites)) == set(range(sites[0].weight.shape[0]))
            assert [site.rows.start for site in sites] == sorted(site.rows.start for site in sites)
            assert all(site.shape[0] == len(rows(site)) and site.shape[1:] == site.weight.shape[1:] for site in sites)


@pytest.mark.parametrize("make", [vim, plain])
def test_sites_tile_the_weights_of_several_paths(make: Callable[[], S6Mixer]) -> None:
    root = nn.Module()
    root.mixer = make()
    sites, streams = mixer_sites(root.mixer, root, "mixer")
    covered: dict[str, int] = defaultdict(int)
    for site in sites:
        covered[f"{site.path}.weight"] += len(rows(site))
        assert site.reads in {*streams, RESIDUAL, None}
        assert site.writes in {*streams, RESIDUAL, None}
    matrices = {name: parameter for name, parameter in root.named_parameters() if name.endswith("weight")}
    assert covered == {name: parameter.shape[0] for name, parameter in matrices.items()}


def test_every_parameter_is_held_or_left_alone_for_a_reason(on_meta: ModelMap) -> None:
    held, left = on_meta.held(), on_meta.left_alone
    names = {name for name, _ in on_meta.host.named_parameters(remove_duplicate=False)}
    assert held | set(left) == names
    assert not held & set(left)
    assert all(len(reason) > 20 and "no pass knows" not in reason for reason in left.values())
    leaves = {name.rpartition(".")[2] for name in left}
    assert {"A_log", "D", "dt_bias"} <= leaves
    assert not any("proj" in name or "conv" in name for name in left)


def test_an_unknown_parameter_is_listed_and_said_so(tiny_mamba: Any) -> None:
    tiny_mamba.backbone.extra = nn.Parameter(torch.zeros(2))
    assert "no pass knows" in adopt(tiny_mamba).left_alone["backbone.extra"]


def test_biases_are_held_by_their_sites(make_host: Callable[..., Any]) -> None:
    model_map = adopt(make_host("mamba", use_bias=True))
    assert "backbone.layers.0.mixer.in_proj.bias" in model_map.held()
    assert "backbone.layers.0.mixer.conv.bias" in model_map.held()


def test_streams_fit_their_readers_and_writers(on_meta: ModelMap) -> None:
    for block in on_meta.blocks:
        sizes = {name: stream.size for name, stream in block.streams.items()} | {RESIDUAL: on_meta.residual.size}
        for name in sizes:
            written = sum(site.shape[0] for site in block.writers(name) if site.layout == "linear")
            assert written in (0, sizes[name]), f"{name}: {written} rows written"
        for site in block.sites:
            if site.reads is not None:
                assert site.shape[0 if site.layout == "depthwise" else 1] == sizes[site.reads], site
            if site.writes is not None and site.layout == "depthwise":
                assert site.shape[0] == sizes[site.writes]
        assert all(reason for stream in block.streams.values() for reason in stream.refuses.values())


def test_the_residual_has_its_readers_and_writers(on_meta: ModelMap) -> None:
    for block in on_meta.blocks:
        assert {site.tensor for site in block.readers(RESIDUAL)} == {"in_proj"}
        assert [site.tensor for site in block.writers(RESIDUAL)] == ["out_proj"]
    assert on_meta.embedding.writes == on_meta.head.reads == RESIDUAL
    assert on_meta.residual.size == on_meta.host.config.hidden_size


def test_matrices_count_a_tied_head_once(make_host: Callable[..., Any]) -> None:
    tied, untied = (empty_host(make_host("mamba", tie_word_embeddings=tie).config) for tie in (True, False))
    assert set(untied.matrices()) - set(tied.matrices()) == {"lm_head"}
    per_block = {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert {tensor for tensor, _ in tied.matrices().values()} == per_block | {"embedding"}
    linear = sum(p.numel() for n, p in untied.host.named_parameters()
                 if n.endswith("weight") and "norm" not in n and "conv" not in n)
    assert sum(shape.numel() for _, shape in untied.matrices().values()) == linear


def test_quantities_are_found_by_name(on_meta: ModelMap) -> None:
    block = on_meta.blocks[0]
    assert block.site("y").tensor == "out_proj"
    assert {site.quantity for site in block.sites} >= {"x", "z", "dt", "B", "C", "conv", "y"}
    with pytest.raises(KeyError, match="0 sites of 'q'"):
        block.site("q")
    assert set(block.matrices("in_proj")) == {"mixer.in_proj"}
    assert set(block.matrices()) == {site.path for site in block.sites if site.layout == "linear"}
    assert len({*block.sites}) == len(block.sites)  # hashable


def test_weightless_norms_refuse_scales(make_host: Callable[..., Any]) -> None:
    falcon, mamba = (empty_host(make_host(kind).config).blocks[0].streams for kind in ("falcon_mamba", "mamba"))
    assert all(not falcon[name].allows("scale") and mamba[name].allows("scale") for name in ("dt_low", "B", "C"))
    assert falcon["dt_low"].allows("rotate")
    assert not mamba["B"].allows("rotate")


def test_a_copy_is_independent(tiny_mamba: Any) -> None:
    block = adopt(tiny_mamba).blocks[1]
    before = block.site("y").get()
    other = block.copy()
    assert isinstance(other, Block)
    other.site("y").set(before * 2)
    assert torch.equal(block.site("y").get(), before)
    assert torch.equal(other.site("y").get(), before * 2)


def test_a_site_follows_a_replaced_module(tiny_mamba: Any) -> None:
    block = adopt(tiny_mamba).blocks[0]
    new = nn.Linear(64, 32, bias=False)
    block.replace("mixer.out_proj", new)
    assert block.site("y").module is new
    assert block.mixer.out_proj is new


# -- edits keep the function -------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def double(request: pytest.FixtureRequest, make_host: Callable[..., Any]) -> ModelMap:
    """An adopted host in fp64, with biases and with unit norms (so that the residual may be rotated)."""
    host = make_host(request.param, use_bias=True, tie_word_embeddings=False).double()
    for name, parameter in host.named_parameters():
        if "norm" in name and ".mixer." not in name:
            parameter.data.fill_(1)
    return adopt(host)


def logits(model_map: ModelMap) -> Tensor:
    x = torch.arange(1, 25).view(2, 12)
    with torch.no_grad(), KeepDouble():
        return model_map.host(x).logits


def unchanged(model_map: ModelMap, expected: Tensor) -> bool:
    return bool((logits(model_map) - expected).abs().max() < 1e-10 * expected.abs().max())


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def test_rotating_the_residual_keeps_the_function(double: ModelMap) -> None:
    expected, R = logits(double), orthogonal(double.residual.size)
    double.embedding.rotate_output(R)
    double.head.rotate_input(R)
    for block in double.blocks:
        for site in block.readers(RESIDUAL):
            site.rotate_input(R)
        for site in block.writers(RESIDUAL):
            site.rotate_output(R)
    assert unchanged(double, expected)


def test_scaling_every_stream_that_allows_it_keeps_the_function(make_host: Callable[..., Any]) -> None:
    """S7 on both kinds (in_proj x rows / s, convolution * s), S5 and S4 on Mamba-1: those that touch no activation."""
    for kind in ("mamba", "mamba2"):
        model_map = adopt(make_host(kind, use_bias=True).double())
        expected = logits(model_map)
        for block in model_map.blocks:
            names = ["x"] if kind == "mamba2" else ["x", "dt_low"]
            for name in names:
                s = torch.rand(block.streams[name].size, dtype=torch.float64) + 0.5
                start = 0
                for site in block.writers(name):
                    site.scale_output(1 / s[start : start + site.shape[0]])
                    start += site.shape[0]
                for site in block.readers(name):
                    if site.layout == "depthwise":  # the taps alone: the bias does not pass them
                        site.set(site.get() * s[:, None])
                    else:
                        site.scale_input(s)
            if kind == "mamba":
                s = torch.rand(block.streams["B"].size, dtype=torch.float64) + 0.5
                block.site("B").scale_output(1 / s)
                block.site("C").scale_output(s)
        assert unchanged(model_map, expected)


def test_rotating_dt_keeps_the_function(make_host: Callable[..., Any]) -> None:
    for kind in ("mamba", "falcon_mamba"):
        model_map = adopt(make_host(kind).double())
        expected = logits(model_map)
        for block in model_map.blocks:
            R = orthogonal(block.streams["dt_low"].size)
            block.site("dt_low").rotate_output(R)
            block.site("dt").rotate_input(R)
        assert unchanged(model_map, expected)


def test_what_a_stream_refuses_would_change_the_function(make_host: Callable[..., Any]) -> None:
    model_map = adopt(make_host("mamba").double())
    expected, block = logits(model_map), model_map.blocks[0]
    assert not block.streams["B"].allows("rotate")
    R = orthogonal(block.streams["B"].size)
    block.site("B").rotate_output(R)
    block.site("C").rotate_output(R)
    assert not unchanged(model_map, expected)
