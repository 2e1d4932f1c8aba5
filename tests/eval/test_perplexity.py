"""Losses and divergences against the plain formulas, whatever the batch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mambacompress.errors import UserError
from mambacompress.eval import agreement, perplexity
from mambacompress.eval.windows import make_windows
from mambacompress.models.families import adopt


class Table(nn.Module):
    """A causal LM that is a table: the logits of the next token given this one."""

    def __init__(self, vocabulary: int = 11, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
        )
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.rows: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        assert not use_cache
        self.rows.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


def tokens(total: int = 100, vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(vocabulary, (total,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_losses_are_the_plain_formula_in_any_batch(stride: int, batch: int) -> None:
    model, row = Table(), tokens()
    windows = make_windows(row, 16, stride)
    found = perplexity.window_losses(model, windows, batch=batch)
    losses = -torch.log_softmax(model.table.double(), -1)[row[:-1], row[1:]]
    expected = [float(losses[first - 1 : end - 1].sum().detach()) for _, end, first in windows.spans]
    assert found == pytest.approx(expected, rel=1e-6)
    assert max(model.rows) <= batch


def test_a_real_model_agrees_with_its_own_loss(tiny_mamba: Any) -> None:
    row = tokens(48, 97)
    windows = make_windows(row, 16)
    found = perplexity.window_losses(tiny_mamba, windows)
    for (start, end, _), loss in zip(windows.spans, found, strict=True):
        ids = row[start:end][None]
        assert loss == pytest.approx(tiny_mamba(ids, labels=ids).loss.item() * (end - start - 1), rel=1e-5)


def test_agreement_is_the_plain_formula() -> None:
    model, base, row = Table(seed=0), Table(seed=1), tokens()
    windows = make_windows(row, 16, 8)
    found = agreement.compare(model, base, windows, batch=3)
    p, q = (torch.log_softmax(table.table.detach().double(), -1)[row[:-1]] for table in (base, model))
    kl = (p.exp() * (p - q)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    spans = [(first - 1, end - 1) for _, end, first in windows.spans]
    assert found.kl == pytest.approx([float(kl[a:b].sum()) for a, b in spans], rel=1e-5)
    assert found.same == [int(same[a:b].sum()) for a, b in spans]
    assert found.losses == pytest.approx(perplexity.window_losses(model, windows), rel=1e-12)
    assert found.baseline_losses == pytest.approx(perplexity.window_losses(base, windows), rel=1e-12)
    assert found.quantiles == pytest.approx(
        [*(float(kl.quantile(q)) for q in (0.5, 0.9, 0.99)), float(kl.max())], rel=1e-4
    )


def test_a_model_agrees_with_itself() -> None:
    found = agreement.compare(Table(), Table(), make_windows(tokens(), 16))
    assert sum(found.kl) == 0
    assert sum(found.same) == sum(make_windows(tokens(), 16).counts)


def test_our_loop_reads_what_the_models_forward_gives(tiny_mamba: Any) -> None:
    """``reader`` takes our loop for an adopted model and the model's own forward for any other: the same logits."""
    ids = torch.randint(1, tiny_mamba.config.vocab_size, (2, 9))
    with torch.inference_mode():
        want = tiny_mamba(input_ids=ids, use_cache=False).logits
        assert torch.equal(perplexity.reader(tiny_mamba)(ids), want)
        adopt(tiny_mamba, prove=False)
        assert torch.equal(perplexity.reader(tiny_mamba)(ids), tiny_mamba(input_ids=ids, use_cache=False).logits)
        assert torch.allclose(perplexity.reader(tiny_mamba)(ids), want, atol=1e-5)


def test_another_vocabulary_is_an_error() -> None:
    with pytest.raises(UserError, match="vocabularies differ"):
        agreement.compare(Table(11), Table(12), make_windows(tokens(), 16))
    with pytest.raises(UserError, match="token id 10"):
        perplexity.window_losses(Table(5), make_windows(torch.tensor([0, 10, 1]), 16))


def test_a_broken_model_has_no_perplexity() -> None:
    model = Table()
    with torch.no_grad():
        model.table[3] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        perplexity.window_losses(model, make_windows(tokens(), 16))
