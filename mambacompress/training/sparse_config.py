"""What a recipe says about training a model sparse: the method, and the run that ``training.lm`` makes of it. No torch.

The pattern and the tensors are the recipe's ``prune`` step's. Where in a run a method stands is a function of the step
alone (``phase``), so that a run resumes where it was.

    sr-ste             N:M from the first step to the last (Zhou et al., arXiv 2102.04010)
    mdgf-linear        pruned weights are multiplied by β, 1 -> 0 linearly      (Bambhaniya et al., arXiv 2402.04744)
    mdgf-exponential   the same, β = ε^(progress), then 0
    sdgf-stepwise      (M-1):M, M/2:M, M/4:M, ..., N:M, a frame each
    sdgf-geometric     kN:kM with k = 8, 4, 2, 1, a frame each
    cast               dense forward, pruned weights decay to zero              (Huang et al., arXiv 2509.25996)
    dense              nothing is pruned: the control

Of the second and third pair ``reach`` says at which share of the run the last phase begins: β is 0, the pattern N:M,
and the mask is fixed from there on (``freeze`` says otherwise). Asked for in this form, a schedule fits any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mambacompress.errors import UserError
from mambacompress.nm import LARGEST, Pattern
from mambacompress.pass_schema import Strict
from mambacompress.training.config import TrainConfig

Method = Literal["sr-ste", "mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric", "cast", "dense"]
METHODS: tuple[str, ...] = get_args(Method)
Share = Annotated[float, Field(gt=0, le=1)]

MDGF_REACH = 0.75
GEOMETRIC = (8, 4, 2, 1)


class SparseTraining(Strict):
    """decay: λ of sr-ste and cast. reach, epsilon, freeze: see the module; None: the method's own. interval: steps
    between cast's masks. eta: the share of cast's loss that is the divergence from its dense self. The rest is the
    run's, as in ``TrainConfig``; steps 0: it must be said where the session begins.
    """

    method: Method = "sr-ste"
    decay: PositiveFloat = 2e-4
    reach: Share | None = None
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    freeze: Share | None = None
    interval: PositiveInt = 10
    eta: Annotated[float, Field(ge=0, le=1)] = 1 / 3

    steps: Annotated[int, Field(ge=0)] = 2000
    batch: PositiveInt = 8
    length: Annotated[int, Field(ge=2)] = 256
    learning_rate: PositiveFloat = 1e-3
    final: Annotated[float, Field(ge=0, le=1)] = 0.05
    warmup: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: PositiveFloat = 1.0
    accumulate: PositiveInt = 1
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    save_every: PositiveInt = 500
    tail_of: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _legal(self) -> SparseTraining:
        if self.method in ("sr-ste", "cast", "dense") and self.reach is not None:
            raise ValueError(f"reach belongs to mdgf and sdgf, {self.method} has no phases")
        return self

    def run(self) -> TrainConfig:
        """What ``training.lm.train`` does; raises UserError where that cannot work."""
        names = TrainConfig.__dataclass_fields__
        return TrainConfig(**{name: getattr(self, name) for name in names})

    def changed(self, **changes: Any) -> SparseTraining:
        """The same with some values replaced, checked again."""
        return SparseTraining.model_validate(self.model_dump() | changes)


@dataclass(frozen=True)
class Phase:
    """What the weights look like at one step. pattern: of the masks. beta: what pruned weights are multiplied by.
    frozen: the masks do not move any more, and nothing flows to what they drop.
    """

    pattern: Pattern
    beta: float = 0.0
    frozen: bool = False


def stages(training: SparseTraining, pattern: Pattern, columns: int = 0) -> tuple[Pattern, ...]:
    """The patterns a run goes through; columns: a number that all of them must divide, for sdgf-geometric."""
    if training.method == "sdgf-stepwise":
        keeps = [pattern.of - 1]
        keep = pattern.of // 2
        while keep > pattern.keep:
            keeps.append(keep)
            keep //= 2
        return tuple(dict.fromkeys(Pattern(k, pattern.of) for k in (*keeps, pattern.keep)))
    if training.method == "sdgf-geometric":
        fitting = [k for k in GEOMETRIC if k * pattern.of <= LARGEST and columns % (k * pattern.of) == 0]
        return tuple(Pattern(k * pattern.keep, k * pattern.of) for k in fitting)
    return (pattern,)


def phase(training: SparseTraining, patterns: tuple[Pattern, ...], step: int) -> Phase:
    """The phase in which optimizer step ``step`` (from 0) is taken; patterns: those of ``stages``."""
    total = max(1, training.steps)
    method, last = training.method, patterns[-1]
    if method.startswith("mdgf"):
        reach = (training.reach or MDGF_REACH) * total
        done = step / reach
        beta = 0.0 if done >= 1 else 1 - done if method == "mdgf-linear" else training.epsilon**done
        return Phase(last, beta, step >= (reach if training.freeze is None else training.freeze * total))
    if method.startswith("sdgf"):
        count = len(patterns)
        reach = (training.reach or (count - 1) / count) * total
        index = count - 1 if step >= reach or count == 1 else int(step / reach * (count - 1))
        begin = reach if training.freeze is None else training.freeze * total
        return Phase(patterns[index], 0.0, index == count - 1 and step >= begin)
    return Phase(last, 0.0, training.freeze is not None and step >= training.freeze * total)


def required_steps(training: SparseTraining) -> None:
    """Raise UserError where a method needs to know how long the run is, and does not."""
    if not training.steps and (training.method not in ("sr-ste", "dense") or training.freeze is not None):
        raise UserError(f"{training.method} must know how many steps the run has",
                        "say steps= where the session begins")


__all__ = ["METHODS", "Method", "Phase", "SparseTraining", "phase", "required_steps", "stages"]
