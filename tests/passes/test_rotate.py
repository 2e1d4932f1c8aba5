"""rotate: every placement leaves the function as it is, KLT-Hadamard equalises, what is illegal is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mambacompress import artifact, pipeline
from mambacompress.errors import UserError
from mambacompress.kernels.hadamard import largest_block
from mambacompress.models.families.checkpoint import live_checkpoint
from mambacompress.models.heads import TransformedHead
from mambacompress.models.modelmap import RESIDUAL, Stream
from mambacompress.models.packed import OnlineHadamard
from mambacompress.passes.bases import KINDS, deal, eigenvectors, equalise, klt_hadamard, orthogonal_basis
from mambacompress.passes.fuse_norms import FuseNorms
from mambacompress.passes.rotate import Rotate
from mambacompress.recipe import load_recipe
from mambacompress.schema import RotateConfig

HOSTS = ("mamba", "mamba2", "falcon_mamba")
#: powers of two, 12 * 2^k, 20 * 2^k, and two sizes without a Hadamard matrix (58 = 29 * 2, 42 = 21 * 2)
SIZES = (32, 48, 40, 58, 42)


def sized(kind: str, size: int) -> dict[str, Any]:
    """A configuration of that hidden size."""
    if kind == "mamba2":
        return {"hidden_size": size, "num_heads": size // 2, "head_dim": 4, "n_groups": 1}
    return {"hidden_size": size, "intermediate_size": 2 * size, "time_step_rank": max(3, size // 8)}


def moment(size: int, spread: float = 1.5, rows: int = 400) -> Tensor:
    """The uncentred second moment of correlated channels of very different size, with a mean."""
    mix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    x = torch.randn(rows, size, dtype=torch.float64) * torch.exp(spread * torch.randn(size, dtype=torch.float64))
    x = x @ mix + torch.randn(size, dtype=torch.float64)
    return x.T @ x / rows


# -- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 20, 28, 48, 58, 72, 87, 160])
def test_bases_are_orthogonal(kind: str, size: int) -> None:
    R = orthogonal_basis(kind, size, 3, moment(size))
    assert R.dtype == torch.float64
    assert torch.allclose(R.T @ R, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 7, 32, 40, 48, 58, 87, 116])
def test_klt_equalises_at_every_size(size: int) -> None:
    S = moment(size, spread=2.5)
    R = klt_hadamard(S)
    energy = (R.T @ S @ R).diagonal()
    assert (energy / S.diagonal().mean() - 1).abs().max() < 1e-9


@pytest.mark.parametrize("size", [32, 48])
def test_hadamard_alone_and_klt_alone_do_not(size: int) -> None:
    S = moment(size, spread=2.5)
    alone = orthogonal_basis("hadamard", size, 0)
    K = torch.from_numpy(eigenvectors(S.numpy())[1])
    for R in (alone, K):
        energy = (R.T @ S @ R).diagonal()
        assert energy.max() / energy.min() > 1.5


def test_klt_of_the_centred_moment_does_not_equalise() -> None:
    """Symmetric quantizers see the mean too."""
    x = torch.randn(500, 16, dtype=torch.float64) + 3 * torch.randn(16, dtype=torch.float64)
    centred = x - x.mean(0)
    R = klt_hadamard(centred.T @ centred / 500)
    energy = (x @ R).square().mean(0)
    assert energy.max() / energy.min() > 1.2


def test_bases_are_reproducible() -> None:
    S = moment(24)
    assert torch.equal(klt_hadamard(S), klt_hadamard(S.clone()))
    for kind in ("hadamard", "random"):
        assert torch.equal(orthogonal_basis(kind, 24, 5), orthogonal_basis(kind, 24, 5))
        assert not torch.equal(orthogonal_basis(kind, 24, 5), orthogonal_basis(kind, 24, 6))


def test_eigenvector_signs_are_fixed() -> None:
    S = moment(12).numpy()
    flip = np.diag([1.0, -1] * 6)
    _, K = eigenvectors(S)
    _, again = eigenvectors(flip @ S @ flip)
    largest = np.abs(K).argmax(0)
    assert (K[largest, np.arange(12)] > 0).all()
    assert np.allclose(np.abs(again), np.abs(K), atol=1e-9)


def test_deal_gives_each_block_the_same_number_and_nearly_the_same_energy() -> None:
    values = np.sort(np.random.default_rng(0).lognormal(0, 1, 58))[::-1]
    order = deal(values, 2)
    assert sorted(order) == list(range(58))
    energy = values[order].reshape(2, 29).sum(1)
    assert energy.max() / energy.min() < 1.01


def test_equalise_survives_one_dominant_channel() -> None:
    S = np.diag([100.0, 1, 1, 1, 0, 0, 0])
    R = equalise(S, np.eye(7))
    assert np.allclose(np.diag(R.T @ S @ R), 103 / 7, rtol=1e-12)
    assert np.allclose(R.T @ R, np.eye(7), atol=1e-12)


# -- R1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", HOSTS)
def test_residual_keeps_the_function(exact_model: Any, rms_difference: Any, kind: str, tied: bool,
                                     residual: str) -> None:
    model = exact_model(kind, tie_word_embeddings=tied, use_bias=True)
    before = model.logits()
    model.enter(FuseNorms(), Rotate(RotateConfig(residual=residual)))
    assert rms_difference(model.logits(), before) < 1e-10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_residual_of_every_size(exact_model: Any, rms_difference: Any, kind: str, size: int) -> None:
    model = exact_model(kind, **sized(kind, size))
    before, hidden = model.logits(), model.hidden()
    rotate = Rotate(RotateConfig(residual="klt-hadamard"))
    model.enter(FuseNorms(), rotate)
    assert rms_difference(model.logits(), before) < 1e-10
    assert rms_difference(torch.stack(model.hidden()), torch.stack(hidden) @ rotate.basis) < 1e-10


@pytest.mark.parametrize("size", SIZES)
def test_residual_moment_is_pooled_over_all_readers(exact_model: Any, size: int) -> None:
    """After R1 every channel of what the readers see, pooled over blocks and head, has the same mean square."""
    model = exact_model("mamba", **sized("mamba", size))
    model.enter(FuseNorms(), Rotate(RotateConfig(residual="klt-hadamard")))
    norm = model.map.blocks[0].norm
    assert torch.all(norm.weight == 1)
    seen = torch.stack([norm(h) for h in model.hidden()])
    energy = seen.square().mean((0, 1, 2))
    assert (energy / energy.mean() - 1).abs().max() < 1e-9


def test_tied_head_stays_tied(exact_model: Any) -> None:
    model = exact_model("mamba", tie_word_embeddings=True)
    gamma = model.map.final_norm.weight.clone()
    rotate = Rotate(RotateConfig(residual="klt-hadamard"))
    model.enter(FuseNorms(), rotate)
    head = model.map.head.module
    assert isinstance(head, TransformedHead)
    assert head.weight is model.map.embedding.weight
    vocabulary, size = head.weight.shape
    tensors = {tensor.data_ptr(): tensor.shape for tensor in (*model.map.embedding.module.state_dict().values(),
                                                              *head.state_dict().values())}
    assert sorted(tensors.values()) == sorted([(vocabulary, size), (size, size)])
    assert torch.allclose(head.transform, rotate.basis.T @ torch.diag(gamma) @ rotate.basis, atol=1e-12)
    assert torch.all(model.map.final_norm.weight == 1)


def test_untied_on_request(exact_model: Any, rms_difference: Any) -> None:
    model = exact_model("mamba", tie_word_embeddings=True)
    before = model.logits()
    model.enter(FuseNorms(), Rotate(RotateConfig(residual="klt-hadamard", untie=True)))
    assert rms_difference(model.logits(), before) < 1e-10
    head = model.map.head.module
    assert type(head) is nn.Linear
    assert head.weight.data_ptr() != model.map.embedding.weight.data_ptr()
    assert not model.map.tied
    assert not model.map.host.config.tie_word_embeddings


def test_a_tied_head_rotated_like_an_untied_one_is_wrong(exact_model: Any, rms_difference: Any) -> None:
    """The trap: with the weight shared, the embedding's rotation already is the head's, and g must not be forgotten."""
    model = exact_model("mamba", tie_word_embeddings=True)
    before = model.logits()
    model.enter(FuseNorms(), Rotate(RotateConfig(residual="klt-hadamard")))
    head = model.map.head.module
    head.transform = torch.eye(head.size, dtype=torch.float64)
    assert rms_difference(model.logits(), before) > 1e-2


def test_no_matrix_before_a_tied_head_whose_norm_is_ones(exact_model: Any, rms_difference: Any) -> None:
    model = exact_model("mamba", tie_word_embeddings=True)
    model.map.final_norm.weight.data.fill_(1.0)
    before = model.logits()
    model.enter(FuseNorms(), Rotate(RotateConfig(residual="hadamard")))
    assert type(model.map.head.module) is nn.Linear
    assert rms_difference(model.logits(), before) < 1e-10


def test_state_resumes_to_the_same_bits(exact_model: Any) -> None:
    config = RotateConfig(residual="klt-hadamard", dt="klt-hadamard", out="hadamard", x="hadamard")
    first, second = exact_model("mamba"), exact_model("mamba")
    rotate = Rotate(config)
    first.enter(FuseNorms(), rotate)
    resumed = Rotate(config)
    resumed.plan(second.map)
    resumed.load_state(rotate.state())
    fuse = FuseNorms()
    fuse.plan(second.map)
    for item in (fuse, resumed):
        item.enter_embedding(second.map)
        item.enter_head(second.map)
        for block in second.map.blocks:
            item.enter_block(block)
    first.apply(rotate)
    second.apply(resumed)
    one, two = first.map.host.state_dict(), second.map.host.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- R5, R2, R6 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("dt", KINDS)
@pytest.mark.parametrize("rank", [3, 4, 12])
def test_dt_keeps_the_function(exact_model: Any, rms_difference: Any, kind: str, dt: str, rank: int) -> None:
    model = exact_model(kind, time_step_rank=rank)
    before = model.logits()
    rotate = Rotate(RotateConfig(dt=dt))
    plan = rotate.plan(model.map)
    assert not plan.refusals
    assert len(plan.edits) == 2
    records = model.apply(rotate)
    assert rms_difference(model.logits(), before) < 1e-10
    assert all(record["dt"] == dt for record in records)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("rank", [3, 4, 12])
def test_dt_is_equalised(exact_model: Any, kind: str, rank: int) -> None:
    model = exact_model(kind, time_step_rank=rank)
    model.apply(Rotate(RotateConfig(dt="klt-hadamard")))
    for block in model.map.blocks:
        seen: list[tuple[str, Tensor]] = []
        model.calibration(block.index).run(block, lambda tap, value, seen=seen: seen.append((tap, value)))
        energy = torch.cat([value for tap, value in seen if tap == "dt_proj"]).square().mean((0, 1))
        assert (energy / energy.mean() - 1).abs().max() < 1e-9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", HOSTS)
def test_online_keeps_the_function(exact_model: Any, rms_difference: Any, kind: str, size: int) -> None:
    model = exact_model(kind, use_bias=True, **sized(kind, size))
    before = model.logits()
    rotate = Rotate(RotateConfig(out="hadamard", x="hadamard"))
    plan = rotate.plan(model.map)
    model.apply(rotate)
    assert rms_difference(model.logits(), before) < 1e-10
    mixer = model.map.blocks[0].mixer
    small = largest_block(2 * size) < 8
    assert (mixer.out_rotation is None) == small
    assert all(edit.online for edit in plan.edits)
    if kind == "mamba2":
        assert "no x_proj" in {r.target: r.reason for r in plan.refusals}["x_proj"]
    else:
        assert (mixer.paths[0].projection.x_rotation is None) == small
    if small:
        assert any("too small" in r.reason for r in plan.refusals)


def test_online_rotations_differ_and_come_back_from_their_spec(exact_model: Any) -> None:
    model = exact_model("mamba")
    model.apply(Rotate(RotateConfig(out="hadamard", x="hadamard", seed=7)))
    found = [rotation for block in model.map.blocks
             for rotation in (block.mixer.out_rotation, block.mixer.paths[0].projection.x_rotation)]
    assert len({rotation.seed for rotation in found}) == 4
    for rotation in found:
        spec = rotation.spec()
        assert torch.equal(OnlineHadamard(spec["size"], seed=spec["seed"], block=spec["block"]).signs, rotation.signs)


@pytest.mark.parametrize("kind", HOSTS)
def test_everything_together(exact_model: Any, rms_difference: Any, kind: str) -> None:
    model = exact_model(kind, use_bias=True)
    before = model.logits()
    rotate = Rotate(RotateConfig(residual="klt-hadamard", dt="klt-hadamard", out="hadamard", x="hadamard"))
    model.enter(FuseNorms(), rotate)
    model.apply(rotate)
    assert rms_difference(model.logits(), before) < 1e-10


def test_decode_agrees_with_prefill_in_the_rotated_model(exact_model: Any, rms_difference: Any) -> None:
    model = exact_model("mamba")
    rotate = Rotate(RotateConfig(residual="klt-hadamard", dt="klt-hadamard", out="hadamard", x="hadamard"))
    model.enter(FuseNorms(), rotate)
    model.apply(rotate)
    block = model.map.blocks[0]
    x = block.norm(model.hidden()[0])
    want, _ = block.mixer.mix(x)
    state, steps = None, []
    for t in range(x.shape[1]):
        y, state = block.mixer.mix(x[:, t:t + 1], state)
        steps.append(y)
    assert rms_difference(torch.cat(steps, 1), want) < 1e-10


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["x", "z", "u", "B"])
def test_illegal_streams_say_so_and_are_wrong(exact_model: Any, rms_difference: Any, stream: str) -> None:
    """Across the convolution, the gate, the scan, or the states of Mamba-1 a rotation changes the function."""
    model = exact_model("mamba")
    block = model.map.blocks[0]
    assert not block.streams[stream].allows("rotate")
    before = model.logits()
    size = block.streams[stream].size
    R = orthogonal_basis("random", size, 0)
    producers, consumers = {
        "x": ("x", None), "z": ("z", "y"), "u": (None, "u"), "B": ("B", "C")}[stream]
    if producers is not None:
        block.site(producers).rotate_output(R)
    if consumers == "C":
        block.site("C").rotate_output(R)
    elif consumers is not None:
        for site in block.readers(consumers):
            site.rotate_input(R)
    assert rms_difference(model.logits(), before) > 1e-2


def test_rotation_needs_folded_norms(exact_model: Any) -> None:
    model = exact_model("mamba")
    rotate = Rotate(RotateConfig(residual="hadamard"))
    assert rotate.requires == ("fuse_norms",)
    assert Rotate(RotateConfig(out="hadamard")).requires == ()
    with pytest.raises(UserError, match="put fuse_norms before rotate"):
        model.enter(rotate)


def test_layer_norm_and_shared_norms_are_refused(exact_model: Any) -> None:
    model = exact_model("mamba")
    rotate = Rotate(RotateConfig(residual="hadamard"))
    first, second = (block.module for block in model.map.blocks)
    own, second.norm = second.norm, first.norm
    with pytest.raises(UserError, match="are one norm"):
        rotate.plan(model.map)
    second.norm = nn.LayerNorm(32)
    with pytest.raises(UserError, match="LayerNorm"):
        rotate.plan(model.map)
    second.norm = own
    assert rotate.plan(model.map).edits


def test_a_residual_that_refuses_is_left_alone(exact_model: Any) -> None:
    model = exact_model("mamba")
    model.map.residual = Stream(RESIDUAL, 32, {"rotate": "the skip scales each channel"})
    rotate = Rotate(RotateConfig(residual="hadamard", out="hadamard"))
    plan = rotate.plan(model.map)
    assert [r.reason for r in plan.refusals] == ["the skip scales each channel"]
    weight = model.map.embedding.weight.clone()
    model.enter(rotate)
    assert torch.equal(model.map.embedding.weight, weight)


def test_mamba2_has_no_low_rank_dt(exact_model: Any) -> None:
    plan = Rotate(RotateConfig(dt="klt-hadamard")).plan(exact_model("mamba2").map)
    assert not plan.edits
    assert {r.target for r in plan.refusals} == {"dt_low"}


def test_plan_names_sizes_blocks_and_costs(exact_model: Any) -> None:
    model = exact_model("mamba", **sized("mamba", 58), tie_word_embeddings=True)
    edits = Rotate(RotateConfig(residual="klt-hadamard", dt="klt-hadamard")).plan(model.map).edits
    embedding, head = edits[0], next(edit for edit in edits if edit.target == "head")
    assert "58 channels in 29 Hadamard blocks of 2" in embedding.what
    assert f"{4 * 58 * 58:,} bytes" in head.what
    assert head.online
    assert not embedding.online


def test_klt_without_text_is_an_error(exact_model: Any) -> None:
    model = exact_model("mamba")
    rotate = Rotate(RotateConfig(residual="klt-hadamard"))
    rotate.plan(model.map)
    with pytest.raises(UserError, match="no calibration text"):
        rotate.prepare(model.map)


# -- through the pipeline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untie", [False, True])
def test_artifact_of_a_rotated_tied_model(make_host: Any, tmp_path: Any, untie: bool) -> None:
    """Tied: one vocabulary matrix in the file. Untied: two, and the caller's own configuration stays tied."""
    host = make_host("mamba", tie_word_embeddings=True)
    rotate = {"residual": "klt-hadamard", "dt": "klt-hadamard", "out": "hadamard", "untie": untie}
    recipe = load_recipe({"name": "rotated", "passes": [{"fuse_norms": {}}, {"smooth": {"gate": "on", "conv": "on"}},
                                                        {"rotate": rotate}]})
    ids = torch.randint(0, host.config.vocab_size, (4, 16))
    with torch.no_grad():
        before = host(ids).logits
        pipeline.run(live_checkpoint(host), recipe, ids, tmp_path / "out")
        loaded = artifact.load(tmp_path / "out")
        after = loaded(ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert host.config.tie_word_embeddings
    assert loaded.config.tie_word_embeddings == (not untie)
    shapes = [tuple(handle.get_slice(name).get_shape()) for file in (tmp_path / "out").glob("*.safetensors")
              for handle in [safe_open(file, "pt")] for name in handle.keys()]  # noqa: SIM118
    assert shapes.count((host.config.vocab_size, 32)) == (2 if untie else 1)
