"""What a recipe says about a sparse soup: the replicas of a phase, how they differ and are retrained. No torch.

The learning rate of retraining, all from the recipe's ``training``, taken for the original model's: peak, shape,
warm-up, and ``final``, what is left of the peak at its end. T: ``trained`` steps of the original, t: those of a phase.

    FT      fine-tuning: the original's last rate, constant                            (Han et al., arXiv 1506.02626)
    LRW     learning rate rewinding: the last t steps of the original's schedule       (Renda et al., arXiv 2003.02389)
    SLR     scaled: the whole of its schedule in t steps                               (Le and Hua, arXiv 2105.03193)
    CLR     cyclical: warm-up, then a cosine from the peak to 0                        (Le and Hua)
    LLR     linear from the peak to 0                                                  (Zimmer et al., arXiv 2111.00843)
    ALLR    linear from d x peak to 0, d = max(what pruning took, t / T)               (Zimmer et al.)

What pruning took is |W - Wp| / (|W| sqrt(s)), from 0 to 1, with s the share of the remaining weights that went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mambacompress.errors import UserError
from mambacompress.pass_schema import Strict
from mambacompress.training.sparse_config import SparseTraining


class SoupConfig(Strict):
    """replicas: of each phase. vary: the one factor that differs; values: what it takes, one a replica (None: seeds
    count up, the others are scaled around the recipe's). retrain, trained: see the module. average: how they are mixed.
    baseline: also train one replica as many times as long, to compare with.
    """

    replicas: PositiveInt = 3
    vary: Literal["seed", "weight_decay", "steps", "learning_rate"] = "seed"
    values: tuple[float, ...] | None = Field(None, min_length=1)
    retrain: Literal["FT", "LRW", "SLR", "CLR", "LLR", "ALLR"] = "SLR"
    trained: PositiveInt | None = None
    average: Literal["uniform", "greedy"] = "uniform"
    baseline: bool = True

    @model_validator(mode="after")
    def _legal(self) -> SoupConfig:
        if self.values is not None and len(self.values) != self.replicas:
            raise ValueError(f"{len(self.values)} values do not make {self.replicas} replicas")
        if self.retrain in ("LRW", "ALLR") and self.trained is None:
            raise ValueError(f"{self.retrain} must know how many steps the original was trained for: say trained")
        return self

    def variants(self, training: SparseTraining, took: float = 1.0) -> list[SparseTraining]:
        """The training of each replica. took: what pruning took of the weights (see the module)."""
        own = getattr(training, self.vary)
        if self.values is not None:
            values: Sequence[float] = self.values
        elif self.vary == "seed":
            values = [own + i for i in range(self.replicas)]
        else:  # a factor of two between the least and the most
            count = max(1, self.replicas - 1)
            values = [own * 2 ** (i / count - 0.5) for i in range(self.replicas)]
        whole = self.vary in ("seed", "steps")
        return [self.retraining(training.changed(**{self.vary: round(value) if whole else value}), took)
                for value in values]

    def retraining(self, training: SparseTraining, took: float = 1.0) -> SparseTraining:
        """``training`` with the learning rates of ``retrain``."""
        peak, trained = training.learning_rate, self.trained or training.steps
        match self.retrain:
            case "FT":
                if not training.final:
                    raise UserError("FT trains on with the original's last learning rate, which is 0",
                                    "say training.final, or another schedule")
                return training.changed(schedule="constant", warmup=0, learning_rate=peak * training.final)
            case "LRW":
                return training.changed(tail_of=max(trained, training.steps))
            case "CLR":
                return training.changed(schedule="cosine", final=0.0)
            case "LLR":
                return training.changed(schedule="linear", final=0.0)
            case "ALLR":
                discount = min(1.0, max(took, training.steps / trained))
                return training.changed(schedule="linear", final=0.0, learning_rate=peak * discount)
        return training


__all__ = ["SoupConfig"]
