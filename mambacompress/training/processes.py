"""Which processes train together: those that torchrun or ``accelerate launch`` started, as accelerate sees them.

accelerate takes the processes of a launcher for independent runs where there is no GPU, unless told that the CPU is
meant; here it is told.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mambacompress.errors import UserError


def processes() -> Any:
    """accelerate's PartialState, the process group set up; raises UserError without accelerate, and where a launcher
    started more processes than would train together.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UserError("training needs accelerate, which is not installed",
                        "pip install 'mambacompress[train]'") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=launched > 1 and not torch.accelerator.is_available())
    if launched > 1 and state.num_processes != launched:
        raise UserError(f"{launched} processes were launched, and they would train {launched} models",
                        "set ACCELERATE_USE_CPU=true to train on CPUs, or launch a single one")
    return state
