"""``mc.distill``: what it sums over, what it divides by, whom it trains."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mambacompress as mc
from mambacompress.errors import UserError
from mambacompress.training.distill import Counts, Distiller, layer_pairs, total_counts
from mambacompress.training.lm import token_loss
from tests.training.toy import VOCABULARY, Toy, tokens

B, L = 3, 8


def ids() -> Tensor:
    return tokens(B * L).reshape(B, L)


def left_padded() -> Tensor:
    mask = torch.ones(B, L)
    mask[0, :3] = 0
    mask[2, :7] = 0  # one real token: it predicts nothing
    return mask


def pair() -> tuple[Toy, Toy]:
    return Toy(seed=1), Toy(seed=2)


class Padding(Toy):
    """Takes an attention mask, as hosts do."""

    def forward(self, input_ids: Tensor, use_cache: bool = False, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


# -- reductions --------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_over_valid_shifted_tokens():
    """Token by token, in a loop."""
    student, teacher = Padding(1), Padding(2)
    mask, batch = left_padded(), ids()
    s, t = (model(batch).logits.detach().double().log_softmax(-1) for model in (student, teacher))
    total, count, ce = 0.0, 0, 0.0
    for b in range(B):
        for i in range(L - 1):
            if mask[b, i] and mask[b, i + 1]:
                total += float((t[b, i].exp() * (t[b, i] - s[b, i])).sum())
                ce -= float(s[b, i, batch[b, i + 1]])
                count += 1
    assert count == 4 + 7
    loss = mc.distill(student, teacher, {"kl": 1.0, "ce": 0.5})
    assert loss.count(batch, mask) == Counts(11, 5 + 8 + 1)
    assert loss(batch, mask).item() == pytest.approx((total + 0.5 * ce) / count, rel=1e-5)
    assert loss.parts["kl"].item() == pytest.approx(total / count, rel=1e-5)
    assert loss.parts["ce"].item() == pytest.approx(ce / count, rel=1e-5)


def test_batchmean_is_the_trap_it_is_said_to_be():
    """torch's ``KLDivLoss(reduction="batchmean")`` on [B, L, V] divides by B: L times what it should be."""
    student, teacher = pair()
    batch = ids()
    with torch.no_grad():
        s, t = (model(batch).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    trap = F.kl_div(s, t, log_target=True, reduction="batchmean").item()
    right = mc.distill(student, teacher, "kl")(batch).item()
    assert trap == pytest.approx((L - 1) * right, rel=1e-4)
    assert F.kl_div(s.flatten(0, 1), t.flatten(0, 1), log_target=True, reduction="batchmean").item() == pytest.approx(
        right, rel=1e-4)


def test_micro_batches_of_unequal_padding_sum_to_the_batch():
    """Divided by the count of all: with each one's own count the short ones would weigh more."""
    mask, batch = left_padded(), ids()
    whole, parts = Padding(1), Padding(1)
    teacher = Padding(2)
    mc.distill(whole, teacher, "kl")(batch, mask).backward()
    loss = mc.distill(parts, teacher, "kl")
    cut = [(batch[:2], mask[:2]), (batch[2:], mask[2:])]
    counts = total_counts(loss.count(*micro) for micro in cut)
    values = [loss(*micro, counts=counts) for micro in cut]
    for value in values:
        value.backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    assert values[1].item() == 0.0  # the row of one token


def test_ignored_labels_learn_nothing():
    student, teacher = pair()
    batch, labels = ids(), ids()
    labels[:, :5] = -100
    loss = mc.distill(student, teacher, "ce")
    assert loss.count(batch, labels=labels).predicted == B * 3
    logits = student(batch).logits[:, 4:-1]
    assert loss(batch, labels=labels).item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), batch[:, 5:].flatten()).item(), rel=1e-5)


def test_a_batch_without_tokens_is_refused():
    student, teacher = Padding(1), Padding(2)
    with pytest.raises(UserError, match="no token to learn from"):
        mc.distill(student, teacher)(ids(), torch.zeros(B, L))


class Wide(nn.Module):
    """A vocabulary padded to 32 logits, the padding large."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Toy(seed=2)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        logits = self.inner(input_ids).logits
        return SimpleNamespace(logits=torch.cat([logits, torch.full((*logits.shape[:2], 32 - VOCABULARY), 9.0)], -1))


def test_padding_of_the_vocabulary_is_cut_before_the_softmax():
    student, narrow = pair()
    assert mc.distill(student, Wide())(ids()).item() == pytest.approx(mc.distill(student, narrow)(ids()).item())
    both = mc.distill(Wide(), Wide(), vocabulary=VOCABULARY)
    assert both(ids()).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="wider than logits"):
        mc.distill(student, narrow, vocabulary=99)(ids())


def test_two_vocabularies_are_refused():
    student, teacher = pair()
    student.head = nn.Linear(16, 600)
    with pytest.raises(UserError, match="two vocabularies"):
        mc.distill(student, teacher)(ids())


def test_classifiers_are_averaged_over_images():
    torch.manual_seed(3)
    student, teacher, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(5, 6)
    labels = torch.tensor([0, 1, 2, 3, 0])
    got = mc.distill(student, teacher, {"kl": 0.7, "ce": 0.3}, temperature=2.0)(x, labels=labels)
    p, log_q = (teacher(x) / 2).softmax(-1), (student(x) / 2).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum() / 5 * 4
    assert got.item() == pytest.approx((0.7 * kl + 0.3 * F.cross_entropy(student(x), labels)).item(), rel=1e-5)
    with pytest.raises(UserError, match="needs labels"):
        mc.distill(student, teacher, "ce")(x)


# -- whom it trains ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_in_eval_mode_and_gets_no_gradient():
    student, teacher = pair()
    student.train()
    teacher.train()
    modes = []
    teacher.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    loss = mc.distill(student, teacher)
    loss.train()
    teacher.train()  # a careless loop
    loss(ids()).backward()
    assert modes == [(False, False)]
    assert student.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())
    assert set(map(id, loss.parameters())) == set(map(id, student.parameters()))
    assert not any("teacher" in name for name in loss.state_dict())


def test_a_teacher_that_no_loss_needs_is_not_run():
    student, teacher = pair()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    loss = mc.distill(student, teacher, "ce")
    assert loss(ids()).item() == pytest.approx(token_loss(student, ids()).item(), rel=1e-5)


def test_a_student_learns_its_teacher():
    student, teacher = pair()
    loss = mc.distill(student, teacher, "kl")
    optimizer = torch.optim.Adam(loss.parameters(), 0.02)
    first = None
    for _ in range(60):
        value = loss(ids())
        first = first or value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.1 * first


@pytest.mark.parametrize(("arguments", "message"), [
    ({"loss": "kll"}, "no loss 'kll'; did you mean 'kl'"), ({"loss": {"kl": -1.0}}, "weight of kl is -1"),
    ({"loss": {"kl": 0.0}}, "no loss has a weight"), ({"temperature": 0.0}, "temperature of 0"),
    ({"match": "mixers"}, "did you mean 'mixer'")])
def test_mistakes_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        mc.distill(*pair(), **arguments)


def test_a_student_is_not_its_own_teacher():
    model = Toy()
    with pytest.raises(UserError, match="its own teacher"):
        mc.distill(model, model)


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts() -> tuple[Any, Any]:
    """Two adopted Mamba models of 4 and 2 layers."""
    import transformers

    from mambacompress.models.families import adopt

    made = []
    for depth in (4, 2):
        torch.manual_seed(depth)
        config = transformers.MambaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=depth,
                                          state_size=4, time_step_rank=2, pad_token_id=0, bos_token_id=0,
                                          eos_token_id=0)
        model = transformers.MambaForCausalLM(config).eval()
        adopt(model)
        made.append(model)
    return made[0], made[1]


def hidden_of(model: Any, batch: Tensor) -> list[Tensor]:
    """The residual behind every layer, block by block."""
    found, h = [], model.backbone.embeddings(batch)
    with torch.no_grad():
        for layer in model.backbone.layers:
            h = h + layer.mixer(layer.norm(h))
            found.append(h)
    return found


def test_hidden_states_are_matched_layer_by_layer(hosts: tuple[Any, Any]):
    teacher, student = hosts
    batch = torch.randint(1, 40, (2, 6))
    loss = mc.distill(student, teacher, "layers", layers=[(0, 1)])
    own, wanted = hidden_of(student, batch)[0], hidden_of(teacher, batch)[1]
    expected = ((own - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    masked = loss(batch, mask)
    assert math.isfinite(masked.item())
    assert masked.item() != loss(batch).item()


def test_the_default_pairs_end_at_the_last_layer(hosts: tuple[Any, Any]):
    assert layer_pairs(2, 4) == [(0, 1), (1, 3)]
    assert layer_pairs(4, 4) == [(i, i) for i in range(4)]
    assert [j for _, j in layer_pairs(3, 8)] == [2, 4, 7]
    teacher, student = hosts
    copied = copy.deepcopy(teacher)
    assert mc.distill(copied, teacher, "layers", match="mixer")(torch.randint(1, 40, (2, 6))).item() == 0.0
    with pytest.raises(UserError, match="more than its teacher"):
        mc.distill(teacher, student, "layers")
    with pytest.raises(UserError, match="are not all there"):
        mc.distill(student, teacher, "layers", layers=[(0, 9)])


def test_with_the_teachers_inputs_errors_do_not_add_up(hosts: tuple[Any, Any]):
    """A student whose first layer is wrong and whose second is the teacher's own: its second layer is then exact."""
    teacher = hosts[0]
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.backbone.layers[0].mixer.out_proj.weight.normal_()
    batch = torch.randint(1, 40, (2, 6))
    for match in ("mixer", "hidden"):
        pairs = [(1, 1)]
        forced = mc.distill(student, teacher, "layers", match=match, layers=pairs, teacher_inputs=True)
        free = mc.distill(student, teacher, "layers", match=match, layers=pairs)
        assert forced(batch).item() == 0.0
        assert free(batch).item() > 1e-3
    forced = mc.distill(student, teacher, "layers", teacher_inputs=True)
    forced(batch).backward()
    grad = student.backbone.layers[0].mixer.out_proj.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0
    assert student.backbone.embeddings.weight.grad is None, "the teacher's inputs bring no gradient to what is below"


def test_layers_of_image_models_are_averaged_over_an_images_tokens():
    from mambacompress.models.vision import VisionMamba, VisionShape

    shape = VisionShape(image=4, channels=1, classes=3, width=6, depth=2, patch=2)
    student, teacher, x = VisionMamba(shape, 1), VisionMamba(shape, 2), torch.randn(3, 1, 4, 4)
    seen = {}
    for name, model in (("student", student), ("teacher", teacher)):
        h = model.stem(x).flatten(2).transpose(1, 2) + model.positions
        seen[name] = model.blocks[0](h, (2, 2))
    wanted = ((seen["student"] - seen["teacher"]).square().sum(-1) / seen["teacher"].square().sum(-1)).mean()
    loss = mc.distill(student, teacher, "layers", layers=[(student.blocks[0], teacher.blocks[0])])
    assert loss(x).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_layer_that_is_bypassed_is_an_error():
    student, teacher = pair()
    loss = mc.distill(student, teacher, "layers", layers=[(student.mixer, teacher.mixer)])
    with pytest.raises(UserError, match="layer 0 of the teacher ran 0 times"):
        loss(ids())  # the toy calls mixer.mix, not the module


def test_the_module_is_the_public_one():
    assert isinstance(mc.distill(*pair()), Distiller)
