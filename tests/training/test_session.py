"""Sessions: what each method's forward, backward and masks are, the optimizer's traps, and where a run can stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mambacompress as mc
from mambacompress import nm
from mambacompress.errors import UserError
from mambacompress.nm import Pattern
from mambacompress.training import lm
from mambacompress.training.cast import AdamS, ScaledLinear, budget_warning, decay_budget, divergence, rate_warning
from mambacompress.training.nm import Flow, SparseLinear
from mambacompress.training.session import Session
from mambacompress.training.sparse_config import METHODS, SparseTraining, phase, stages

SPARSE = [name for name in METHODS if name != "dense"]
TWO_OF_FOUR = Pattern(2, 4)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 97, (4, 12), generator=torch.Generator().manual_seed(3))


def attached(model: Any, method: str, steps: int = 8, **changes: Any) -> Session:
    return mc.attach(model, "nm-2of4", steps=steps,
                     overrides={"training.method": method} | {f"training.{k}": v for k, v in changes.items()})


def one_step(session: Session, optimizer: Any, ids_BL: Tensor, accumulate: int = 1) -> float:
    total = 0.0
    for micro_BL in ids_BL.chunk(accumulate):
        loss = lm.token_loss(session.model, micro_BL, session) / accumulate
        loss.backward()
        total += float(loss)
    optimizer.step()
    session.step(optimizer)
    optimizer.zero_grad()
    return total


def targets(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for i, layer in enumerate(model.backbone.layers):
        yield f"{i}.in_proj", layer.mixer.in_proj
        yield f"{i}.out_proj", layer.mixer.out_proj


# -- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "decay", "frozen"), [(0.0, 0.0, False), (0.3, 0.0, False), (0.0, 0.1, False),
                                                       (0.0, 0.0, True)])
def test_forward_and_backward_are_the_papers(beta: float, decay: float, frozen: bool):
    linear = nn.Linear(8, 3).double()
    weight = linear.weight
    layer = SparseLinear(linear, Flow(beta, decay, frozen), TWO_OF_FOUR)
    assert layer.weight is weight
    mask = nm.nm_mask(weight.abs(), TWO_OF_FOUR)
    assert torch.equal(layer.mask, mask)
    assert mask.dtype == torch.bool
    x = torch.randn(5, 8, dtype=torch.float64)
    y = layer(x)
    expected = weight.detach() * (mask + ~mask * beta)
    torch.testing.assert_close(y, x @ expected.T + linear.bias)
    assert not torch.signbit(layer.effective()[~mask]).any() or beta
    upstream = torch.randn_like(y)
    y.backward(upstream)
    dense = upstream.T @ x
    want = dense * mask if frozen else dense + decay * weight.detach() * ~mask
    torch.testing.assert_close(weight.grad, want)


def test_the_decay_of_sr_ste_counts_once_a_step_however_a_batch_is_cut(tiny_mamba: Any, ids: Tensor, make_host: Any):
    gradients = []
    for accumulate in (1, 4):
        model = make_host("mamba")
        with attached(model, "sr-ste", decay=0.5) as session:
            for micro in ids.chunk(accumulate):
                (lm.token_loss(model, micro) / accumulate).backward()
            gradients.append({name: layer.weight.grad.clone() for name, layer in session.layers.items()})
            masks = {name: layer.mask for name, layer in session.layers.items()}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)
        assert gradient[~masks[name]].abs().max() > 0.01  # the decay, not only the data


@pytest.mark.parametrize("method", SPARSE)
def test_every_method_ends_sparse_in_plain_linears(tiny_mamba: Any, ids: Tensor, method: str):
    before = dict(tiny_mamba.named_parameters())
    with attached(tiny_mamba, method) as session:
        assert set(dict(tiny_mamba.named_parameters())) - {f"{p}.scales" for p in session.layers} == {
            mixer_name(name) for name in before}
        optimizer = session.optimizer(3e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = [one_step(session, optimizer, ids) for _ in range(8)]
            assert losses[-1] < losses[0]
            session.finish()
    for name, linear in targets(tiny_mamba):
        assert type(linear) is nn.Linear, name
        assert nm.excess(linear.weight, TWO_OF_FOUR) == 0
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2
        assert not torch.signbit(linear.weight[linear.weight == 0]).any()
    assert tiny_mamba.config.nm_sparsity == {"in_proj": "2:4", "out_proj": "2:4"}


def mixer_name(name: str) -> str:
    """The adopted name of a stock parameter."""
    from mambacompress.models.families.mamba import MambaFamily

    ours = {stock: our for our, stock in MambaFamily.names.items()}
    head, found, tail = name.partition(".mixer.")
    return f"{head}.mixer.{ours.get(tail, tail)}" if found else name


def test_the_dense_control_prunes_nothing(tiny_mamba: Any, ids: Tensor):
    with attached(tiny_mamba, "dense") as session:
        optimizer = session.optimizer(1e-3)
        one_step(session, optimizer, ids)
        assert session.sparsity() == 0
    assert not hasattr(tiny_mamba.config, "nm_sparsity")
    assert all((linear.weight != 0).all() for _, linear in targets(tiny_mamba))


def test_an_exception_leaves_a_dense_model_in_plain_linears(tiny_mamba: Any, ids: Tensor):
    def interrupted() -> None:
        with attached(tiny_mamba, "sr-ste") as session:
            one_step(session, session.optimizer(1e-3), ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for _, linear in targets(tiny_mamba):
        assert type(linear) is nn.Linear
        assert (linear.weight != 0).all()


# -- schedules -------------------------------------------------------------------------------------------------------


def betas(method: str, **changes: Any) -> list[float]:
    training = SparseTraining(method=method, steps=100, **changes)
    return [phase(training, stages(training, TWO_OF_FOUR), t).beta for t in range(101)]


def test_mask_decay_reaches_its_end_where_asked():
    linear, exponential = betas("mdgf-linear", reach=0.5), betas("mdgf-exponential", reach=0.5, epsilon=0.01)
    assert linear[0] == exponential[0] == 1
    assert linear[25] == pytest.approx(0.5)
    assert exponential[25] == pytest.approx(0.1)
    assert linear[50:] == exponential[50:] == [0.0] * 51
    assert exponential[49] > 0.01 > 0.0
    frozen = [phase(SparseTraining(method="mdgf-linear", steps=100), (TWO_OF_FOUR,), t).frozen for t in (74, 75)]
    assert frozen == [False, True]


@pytest.mark.parametrize(("method", "pattern", "columns", "expected"), [
    ("sdgf-stepwise", "1:8", 0, ["7:8", "4:8", "2:8", "1:8"]), ("sdgf-stepwise", "2:4", 0, ["3:4", "2:4"]),
    ("sdgf-stepwise", "1:16", 0, ["15:16", "8:16", "4:16", "2:16", "1:16"]),
    ("sdgf-geometric", "2:4", 64, ["16:32", "8:16", "4:8", "2:4"]), ("sdgf-geometric", "2:4", 24, ["4:8", "2:4"]),
    ("sr-ste", "2:4", 0, ["2:4"]),
])
def test_structure_decay_goes_through_equal_frames(method: str, pattern: str, columns: int, expected: list[str]):
    training = SparseTraining(method=method, steps=240)
    found = stages(training, Pattern.parse(pattern), columns)
    assert [str(each) for each in found] == expected
    taken = [str(phase(training, found, t).pattern) for t in range(240)]
    assert [taken.count(name) for name in expected] == [240 // len(expected)] * len(expected)
    assert taken == sorted(taken, key=expected.index)


def test_masks_move_once_a_step_and_not_between_micro_batches(tiny_mamba: Any, ids: Tensor):
    with attached(tiny_mamba, "sr-ste") as session:
        optimizer = torch.optim.SGD(tiny_mamba.parameters(), lr=1.0)
        layer = session.layers["backbone.layers.0.mixer.in_proj"]
        before = layer.mask.clone()
        lm.token_loss(tiny_mamba, ids).backward()
        optimizer.step()
        lm.token_loss(tiny_mamba, ids)
        assert torch.equal(layer.mask, before)
        session.step(optimizer)
        assert torch.equal(layer.mask, nm.nm_mask(layer.weight.abs(), TWO_OF_FOUR))
        assert not torch.equal(layer.mask, before)


def test_frozen_masks_undo_what_the_optimizer_does_to_dropped_weights(tiny_mamba: Any, ids: Tensor):
    with attached(tiny_mamba, "mdgf-linear", steps=4, reach=0.5) as session:
        optimizer = torch.optim.AdamW(tiny_mamba.parameters(), lr=1e-2)
        for _ in range(2):
            one_step(session, optimizer, ids)
        assert session.flow.frozen
        layer = session.layers["backbone.layers.1.mixer.out_proj"]
        assert optimizer.state[layer.weight]["exp_avg"][~layer.mask].any()  # the trap: momentum of what is now dropped
        assert not layer.weight[~layer.mask].any()
        mask = layer.mask.clone()
        lm.token_loss(tiny_mamba, ids).backward()
        assert not layer.weight.grad[~mask].any()
        optimizer.step()
        assert layer.weight[~mask].any()
        session.step(optimizer)
        assert not layer.weight[~mask].any()
        assert not optimizer.state[layer.weight]["exp_avg"][~mask].any()
        assert optimizer.state[layer.weight]["exp_avg"][mask].any()
        assert torch.equal(layer.mask, mask)


# -- CAST ------------------------------------------------------------------------------------------------------------


def naive_adams(theta: Tensor, grads: list[Tensor], mask: Tensor, lr: float, total: int, decay: float) -> Tensor:
    """The equations, element by element, in Python floats."""
    out = theta.clone()
    for i in range(theta.numel()):
        p, mu, v = float(theta.flatten()[i]), 0.0, 0.0
        for t, grad in enumerate(grads, start=1):
            alpha = t / total
            mu = 0.9 * mu + 0.1 * float(grad.flatten()[i])
            pulled = mu if mask.flatten()[i] else (1 - alpha) * mu + alpha * decay * math.copysign(1, p)
            v = 0.95 * v + 0.05 * pulled**2
            p -= lr * (pulled / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        out.view(-1)[i] = p
    return out


def test_adams_is_its_equations():
    theta = nn.Parameter(torch.randn(3, 8, dtype=torch.float64))
    mask = nm.nm_mask(theta.abs(), TWO_OF_FOUR)
    grads = [torch.randn(3, 8, dtype=torch.float64) for _ in range(5)]
    want = naive_adams(theta.detach(), grads, mask, 0.01, 10, 0.2)
    optimizer = AdamS([{"params": [theta], "sparse": True}], lr=0.01, mask_of=lambda p: mask, total=10, decay=0.2)
    for grad in grads:
        theta.grad = grad
        optimizer.step()
    torch.testing.assert_close(theta.detach(), want)
    assert optimizer.budget == pytest.approx(decay_budget([0.01] * 5, 10))


def test_adams_treats_all_other_parameters_as_adamw():
    a, b = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    ours = AdamS([a], lr=0.01, mask_of=lambda p: p > 0, total=10, decay=0.2, weight_decay=0.1)
    stock = torch.optim.AdamW([b], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        grad = torch.randn(6)
        a.grad, b.grad = grad.clone(), grad.clone()
        ours.step()
        stock.step()
    torch.testing.assert_close(a, b)


def test_dropped_weights_walk_to_zero():
    """Without a gradient the decay alone moves them, by about the learning rate a step."""
    theta = nn.Parameter(torch.tensor([[1.0, 0.5, 0.05, -0.04]]))
    mask = torch.tensor([[True, True, False, False]])
    optimizer = AdamS([{"params": [theta], "sparse": True}], lr=1e-3, mask_of=lambda p: mask, total=200, decay=2e-4)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 200)
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    assert torch.equal(theta[mask], torch.tensor([1.0, 0.5]))
    assert theta[~mask].abs().max() < 2e-4


def test_cast_is_dense_until_the_end_and_folds_its_scales(tiny_mamba: Any, ids: Tensor):
    with attached(tiny_mamba, "cast", steps=4, interval=2) as session:
        optimizer = session.optimizer(1e-3)
        layer = session.layers["backbone.layers.0.mixer.in_proj"]
        assert isinstance(layer, ScaledLinear)
        assert layer.scales.shape == (layer.out_features, 2)
        assert torch.equal(layer.effective(), layer.weight)
        masks = [layer.mask.clone()]
        for _ in range(4):
            one_step(session, optimizer, ids)
            masks.append(layer.mask.clone())
        assert (layer.scales != 1).any()
        expected = layer.effective().masked_fill(~nm.nm_mask(layer.weight.abs(), TWO_OF_FOUR), 0)
        expected = expected.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.finish()
    torch.testing.assert_close(tiny_mamba.backbone.layers[0].mixer.in_proj.weight.data, expected)
    assert torch.equal(masks[1], masks[0])


def test_casts_loss_is_the_mixture(tiny_mamba: Any, ids: Tensor):
    with attached(tiny_mamba, "cast", eta=0.25) as session:
        session.optimizer(1e-3)
        with torch.no_grad():
            session.layers["backbone.layers.0.mixer.in_proj"].weight.mul_(1.3)
        logits = tiny_mamba(input_ids=ids, use_cache=False).logits
        loss = session.loss(torch.tensor(2.0), logits, ids)
        target = session.teacher(input_ids=ids, use_cache=False).logits  # type: ignore[misc]
        p, q = target[:, :-1].double().softmax(-1), logits[:, :-1].double().log_softmax(-1)
        kl = (p * (p.log() - q)).sum(-1).mean()
        assert float(kl) > 0
        assert float(loss) == pytest.approx(float(0.25 * kl + 0.75 * 2.0), rel=1e-5)
        assert float(divergence(logits, logits)) == pytest.approx(0, abs=1e-6)
        assert not any(p.requires_grad for p in session.teacher.parameters())  # type: ignore[union-attr]
        session.detach()


def test_cast_warns_where_its_decay_cannot_arrive(tiny_mamba: Any, ids: Tensor):
    assert budget_warning(0.1, 0.05) is not None
    assert budget_warning(0.3, 0.05) is None
    assert rate_warning(1e-3, 1e-3) is not None
    assert rate_warning(1e-3, 1e-4) is None
    with attached(tiny_mamba, "cast", steps=2) as session:
        one_step(session, session.optimizer(1e-6), ids)
        with pytest.warns(UserWarning, match="much of what is cut") as said:
            session.finish()
        assert any("let the rate decay" in str(each.message) for each in said)


def test_cast_refuses_another_optimizer(tiny_mamba: Any):
    with attached(tiny_mamba, "cast") as session:
        with pytest.raises(UserError, match=r"take it from session\.optimizer"):
            session.step(torch.optim.AdamW(tiny_mamba.parameters()))
        session.detach()


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_train_sparse(tiny_mamba: Any, make_host: Any, tmp_path: Path):
    with pytest.raises(UserError, match="has no prune step"):
        mc.attach(tiny_mamba, "w8a8")
    with pytest.raises(UserError, match="must know how many steps"):
        mc.attach(tiny_mamba, "nm-2of4", overrides={"training.method": "mdgf-linear", "training.steps": 0,
                                                    "training.warmup": 0})
    with pytest.raises(UserError, match="groups of 5 do not divide"):
        mc.attach(tiny_mamba, "nm-2of4", overrides={"passes.prune.of": 5})
    with pytest.raises(UserError, match="load the model in fp32"):
        mc.attach(make_host("mamba").bfloat16(), "nm-2of4")
    with attached(tiny_mamba, "sr-ste") as session:
        with pytest.raises(UserError, match="in a session already"):
            mc.attach(tiny_mamba, "nm-2of4")
        session.detach()
    packed = mc.quantize(tiny_mamba, {"passes": [{"quantize": {}}]}, tokenizer=object.__new__(_NoTokenizer),
                         calibration=torch.randint(0, 97, (2, 8)))
    with pytest.raises(UserError, match="is packed: integer codes have no gradient"):
        mc.attach(packed.model, "nm-2of4")


class _NoTokenizer:
    def save_pretrained(self, folder: Any) -> None:
        """Nothing to save."""


# -- stopping and going on -------------------------------------------------------------------------------------------


def tokens(count: int = 600) -> Tensor:
    return torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(5))


RUN = {"batch": 2, "length": 12, "warmup": 1, "learning_rate": 5e-3, "save_every": 100, "precision": "fp32"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_to_the_same_losses_and_weights(make_host: Any, tmp_path: Path, method: str):
    def trained(out: Path, stop: int | None = None, resume: bool = False) -> tuple[list[float], Any]:
        model, losses = make_host("mamba"), []
        session = attached(model, method, steps=8, interval=3, **RUN)
        rows = lm.train(model, tokens(), session.training.run(), out, resume=resume, method=session)
        for row in rows:
            losses.append(row["loss"])
            if stop is not None and len(losses) == stop:
                rows.close()
                session.detach()
                return losses, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.finish()
        return losses, model.state_dict()

    losses, weights = trained(tmp_path / "whole")
    first, _ = trained(tmp_path / "cut", stop=5)
    rest, again = trained(tmp_path / "cut", resume=True)
    assert first + rest == losses
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_a_checkpoint_of_another_method_is_refused(make_host: Any, tmp_path: Path):
    def run(method: str) -> None:
        model = make_host("mamba")
        with attached(model, method, steps=3, **RUN) as session:
            list(lm.train(model, tokens(), session.training.run(), tmp_path, resume=True, method=session))

    run("sr-ste")
    with pytest.raises(UserError, match="trains by another method"):
        run("mdgf-linear")


def test_bf16_autocast_keeps_fp32_weights_and_masks(tiny_mamba: Any, ids: Tensor):
    with attached(tiny_mamba, "sr-ste") as session:
        optimizer = session.optimizer(1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm.token_loss(tiny_mamba, ids, session)
        loss.backward()
        optimizer.step()
        session.step(optimizer)
        for layer in session.layers.values():
            assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
            assert layer.mask.dtype == torch.bool


def test_masks_stay_out_of_the_models_state_dict(tiny_mamba: Any):
    names = set(mc.models.families.adopt(tiny_mamba).host.state_dict())
    with attached(tiny_mamba, "sr-ste") as session:
        assert set(tiny_mamba.state_dict()) == names
        kept = session.tensors()
        assert {name for name in kept if name.startswith("mask.")} == {f"mask.{path}" for path in session.layers}
        kept.pop("mask.backbone.layers.0.mixer.in_proj")
        with pytest.raises(UserError, match=r"no mask for backbone\.layers\.0"):
            session.load(kept)
        session.detach()
