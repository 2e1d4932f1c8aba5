"""CAST: train towards N:M without ever cutting (Huang et al., arXiv 2509.25996).

The forward is dense throughout. Every ``interval`` steps a mask takes the largest weights; what it drops *decays*, more
and more surely, until at the end it is as good as zero and cutting changes nothing:

    a_t = t / T        μ_t = β1 μ_(t-1) + (1 - β1) g          (raw gradients only)
    μ̃ = μ_t where kept, else (1 - a) μ_t + a λ sign(θ)         never written back into μ
    v_t = β2 v_(t-1) + (1 - β2) μ̃²                             of all weights
    θ ← θ - lr · (μ̃ / (1 - β1^t)) / (√(v_t / (1 - β2^t)) + ε)

As v follows μ̃, a weight whose direction has settled moves by about lr a step: at the end a dropped weight walks
straight to zero, whatever λ is, and stays within about the last learning rate of it. So the rate must decay, and
Σ lr·a must exceed the weights to be decayed by far; both are checked, with a warning. Weights must be fp32: a bf16
weight of 0.05 would not notice a step of 1e-4.

*Weight scaling* makes good what decay takes from a row: A [O, 2], one factor for each half of a row, 1 at first,
trained by plain Adam and folded into the weight at the end. Both halves hold whole groups, so it does not change which
weights are largest. *Self-distillation*: the loss is η KL(teacher ‖ student) + (1 - η) CE, the teacher the dense model
as it was, at temperature 1.

The paper's text was not at hand: these are the equations as they are reported second-hand. Parameters outside the
pattern take AdamW.

Legend: O outputs, I inputs, B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacompress.training.nm import Flow, SparseLinear, local

HALVES = 2


class ScaledLinear(SparseLinear):
    """A linear with a dense forward and a factor for each half of every row."""

    def __init__(self, linear: nn.Linear, flow: Flow, pattern: Any) -> None:
        super().__init__(linear, flow, pattern)
        halves = HALVES if self.in_features % (HALVES * pattern.of) == 0 else 1
        self.scales = nn.Parameter(torch.ones(self.out_features, halves, device=linear.weight.device))

    def effective(self) -> Tensor:
        return (self.weight.unflatten(1, (self.scales.shape[1], -1)) * self.scales[..., None]).flatten(1)

    def drop(self, mask: Tensor | None = None) -> None:
        """Write the zeros and the factors into the weight; the factors are 1 again."""
        super().drop(mask)
        with torch.no_grad():
            rows_OI, factors_Oh = local(self.weight), local(self.scales)
            rows_OI.unflatten(1, (factors_Oh.shape[1], -1)).mul_(factors_Oh[..., None])
            factors_Oh.fill_(1)


class AdamS(torch.optim.Optimizer):
    """See the module. A group with ``sparse=True`` holds weights that ``mask_of`` knows; other groups take AdamW.

    total: T, the steps of the run. decay: λ. budget: Σ lr·a so far.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, mask_of: Callable[[Tensor], Tensor], total: int,
                 decay: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "sparse": False})
        self.mask_of, self.total, self.decay = mask_of, total, decay
        self.budget, self.rates = 0.0, (0.0, 0.0)  # the largest and the last learning rate of sparse weights

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step; closure: as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
            if group["sparse"]:
                self._account(group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        t = int(state["step"])
        first, second = group["betas"]
        weight, grad = local(parameter), local(parameter.grad)  # type: ignore[arg-type]
        mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        mean.lerp_(grad, 1 - first)
        if group["sparse"]:
            alpha = min(1.0, t / self.total)
            pulled = mean * (1 - alpha) + weight.sign() * (alpha * self.decay)
            move = measured = torch.where(local(self.mask_of(parameter)), mean, pulled)
        else:
            move, measured = mean, grad
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        square.mul_(second).addcmul_(measured, measured, value=1 - second)
        size = (square / (1 - second**t)).sqrt_().add_(group["eps"])
        weight.addcdiv_(move / (1 - first**t), size, value=-group["lr"])

    def _account(self, group: dict[str, Any]) -> None:
        steps = [int(self.state[p]["step"]) for p in group["params"] if p in self.state]
        if steps:
            self.budget += group["lr"] * min(1.0, max(steps) / self.total)
            self.rates = (max(self.rates[0], group["lr"]), group["lr"])


def decay_budget(rates: Iterable[float], total: int) -> float:
    """Σ lr·a of a run whose learning rates are known."""
    return sum(rate * min(1.0, (t + 1) / total) for t, rate in enumerate(rates))


def budget_warning(budget: float, mean_weight: float) -> str | None:
    """Why a decay of ``budget`` in all cannot bring weights of that mean size to zero; None where it can."""
    if budget >= 3 * mean_weight:
        return None
    return (f"cast can move a dropped weight by {budget:.3g} in all, and the mean weight is {mean_weight:.3g}: much of "
            "what is cut at the end will not be near zero; train longer, or with a higher learning rate")


def rate_warning(largest: float, last: float) -> str | None:
    """Why the learning rate has not decayed enough; None where it has."""
    if last <= 0.25 * largest:
        return None
    return (f"cast's learning rate ended at {last:.3g} of {largest:.3g} at most: dropped weights stay about that far "
            "from zero; let the rate decay")


def divergence(teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
    """KL(teacher ‖ student) a predicted token (all but the last), in nats, softmax in fp32; a scalar."""
    teacher_NV, student_NV = (F.log_softmax(x[:, :-1].float(), -1).flatten(0, 1) for x in (teacher_BLV, student_BLV))
    return F.kl_div(student_NV, teacher_NV, log_target=True, reduction="sum") / len(student_NV)


__all__ = ["AdamS", "ScaledLinear", "budget_warning", "decay_budget", "divergence", "rate_warning"]
