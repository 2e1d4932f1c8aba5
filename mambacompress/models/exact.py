"""fp64 all the way: a mode in which the casts to fp32 inside stock modules are left out.

Stock mixers, norms and residuals round to fp32 in a dozen places even when their weights are fp64, so that two formulas
can only be compared to 1e-7. Inside ``KeepDouble`` a cast of an fp64 tensor to fp32 returns the tensor itself; what is
compared is then the formula. It acts on the calling thread, for the length of a ``with``, and patches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeepDouble(TorchFunctionMode):
    """Within it, ``x.float()`` and ``x.to(torch.float32)`` leave an fp64 ``x`` as it is."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in (Tensor.float, Tensor.to) and args[0].dtype == torch.float64
                and (func == Tensor.float or torch.float32 in (*args[1:], kwargs.get("dtype")))):
            return args[0]
        return func(*args, **kwargs)


__all__ = ["KeepDouble"]
