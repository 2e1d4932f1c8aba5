"""Which processes train together: those that torchrun or ``accelerate launch`` started, as accelerate sees them.

accelerate takes the processes of a launcher for independent runs where there is no GPU, unless told that the CPU is
meant; here it is told. Without a GPU ``accelerate launch --num_processes 2`` starts a single process and does not say
so; here it is said.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mambacompress.errors import UserError


def processes() -> Any:
    """accelerate's PartialState, the process group set up; raises UserError without accelerate, and where a launcher
    started more processes than would train together, or fewer than it was asked for.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UserError("training needs accelerate, which is not installed",
                        "pip install 'mambacompress[train]'") from error
    if _lone_of_several():
        raise UserError("accelerate launch was asked for several processes and started a single one, as it does "
                        "without a GPU",
                        "start them with torchrun --standalone --nproc-per-node 2 -m mambacompress train ..., or leave "
                        "--num_processes out")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=launched > 1 and not torch.accelerator.is_available())
    if launched > 1 and state.num_processes != launched:
        raise UserError(f"{launched} processes were launched, and they would train {launched} models",
                        "set ACCELERATE_USE_CPU=true to train on CPUs, or launch a single one")
    return state


class Alone:
    """What accelerate's Accelerator is to a training loop, for a process that trains by itself while others of its
    launch train something else.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self) -> None:
        self.device = processes().device

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        return model.to(self.device), optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], largest: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)

    def gather(self, value: Tensor) -> Tensor:
        return value

    def no_sync(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()


def _lone_of_several() -> bool:
    """accelerate's launcher names a meeting point exactly where it was asked for several processes; one that has a rank
    is among several.
    """
    ranks = ("RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return ("ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
            and not any(name in os.environ for name in ranks))
