"""Losses, divergence and agreement of two rows of logits: the definitions in fp64, native and reference alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.divergence import check, divergence, token_losses

needs_native = pytest.mark.skipif(native.library() is None, reason=native.why_not())
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def kl(logits_NV: Tensor, baseline_NV: Tensor) -> Tensor:
    return divergence(logits_NV, baseline_NV, torch.zeros(len(logits_NV), dtype=torch.int64)).kl


def test_tiny_divergences_survive() -> None:
    """KL is quadratic in the change: in fp32 a change of 1e-4 would drown in rounding."""
    logits = torch.randn(5, 4000)
    shift = torch.randn(5, 4000) * 1e-4
    p = torch.softmax(logits.double(), -1)
    second_order = 0.5 * ((p * shift.double() ** 2).sum(-1) - (p * shift.double()).sum(-1) ** 2)
    assert kl(logits.double() + shift.double(), logits) == pytest.approx(second_order, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [1e-6, 1e-3, 0.1, 3.0, 1000.0])
def test_divergence_in_fp32_is_the_definition_in_fp64(level: str, backend: str, change: float) -> None:
    """Row by row, whatever the block; logits far apart or forbidden (-inf on both sides or one) change nothing."""
    base = torch.randn(150, 3000) * 4
    model = base + torch.randn(150, 3000) * change
    base[3, 7] = model[3, 7] = model[5, 11] = -math.inf
    p, q = (torch.log_softmax(x.double(), -1) for x in (base, model))
    exact = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    with registry.backend(backend):
        found = kl(model, base)
        alone = kl(model[20:21], base[20:21])
    assert found.dtype == torch.float64
    assert found[5] == math.inf
    finite = torch.arange(150) != 5
    assert torch.allclose(found[finite], exact[finite], rtol=2e-5, atol=5e-9)
    assert (alone - found[20]).abs() < 5e-9 + 2e-5 * found[20]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [1, 3, 8, 15, 16, 17, 31, 33, 1023, 1025, 4096])
def test_losses_and_first_choices_are_the_definition(level: str, backend: str, vocabulary: int) -> None:
    wide = torch.randn(2, 9, vocabulary + 5) * 6
    logits, base = wide[:, :, 2 : 2 + vocabulary]  # rows that do not lie back to back
    targets = torch.randint(vocabulary, (9,))
    logits[4] = base[4] = 1.5  # ties: the first is the first
    with registry.backend(backend):
        found, alone = divergence(logits, base, targets), token_losses(logits, targets)
    for losses, x in ((found.losses, logits), (found.baseline_losses, base)):
        exact = -torch.log_softmax(x.double(), -1)[torch.arange(9), targets]
        assert losses.dtype == torch.float64
        assert torch.allclose(losses, exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(alone, found.losses)
    assert torch.equal(found.same, logits.argmax(-1) == base.argmax(-1))
    assert found.same[4]
    assert (found.kl >= 0).all()


@needs_native
def test_any_number_of_threads_and_rows_gives_the_same_bits(level: str) -> None:
    logits, base, targets = torch.randn(40, 5000), torch.randn(40, 5000), torch.randint(5000, (40,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = divergence(logits, base, targets)
        torch.set_num_threads(3)
        many = divergence(logits, base, targets)
    finally:
        torch.set_num_threads(threads)
    last = divergence(logits[-1:], base[-1:], targets[-1:])
    for name in ("losses", "baseline_losses", "kl", "same"):
        assert torch.equal(getattr(one, name), getattr(many, name))
        assert torch.equal(getattr(one, name)[-1:], getattr(last, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_not_hidden(backend: str) -> None:
    logits = torch.randn(3, 50)
    logits[0, 7], logits[1, 2] = math.nan, math.inf
    with registry.backend(backend):
        losses = token_losses(logits, torch.tensor([3, 3, 3]))
        assert losses.isfinite().tolist() == [False, False, True]
        with pytest.raises(ValueError, match="outside the vocabulary of 50"):
            token_losses(logits, torch.tensor([3, 50, 3]))


def test_the_check() -> None:
    error, tolerance = check()
    assert error <= tolerance
