"""What passes that make good the error of one column by the next ones share: the inputs' moment H and its factor.

H = 2 XᵀX / n of a linear's inputs; U = cholesky(H⁻¹, upper) gives what optimal brain surgery needs of every column in
turn (Frantar et al., arXiv 2210.17323). fp64 throughout. Damping adds a share of the mean diagonal; where the Cholesky
still fails it is raised tenfold, up to four times, and the caller is told what was used.

Legend: O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.modelmap import Block

DATA_FLOW = ("in_proj", "x_proj", "dt_proj", "out_proj")
MAX_RAISES = 4


def matrices_in_order(block: Block, maps: tuple[str, ...]) -> list[tuple[str, str]]:
    """(path, recipe name) of the block's matrices named in ``maps``, in the order data flows through them."""
    found = [(path, sites[0].tensor) for path, sites in block.matrices().items() if sites[0].tensor in maps]
    return sorted(found, key=lambda pair: DATA_FLOW.index(pair[1]))


def row_error(W_OI: Tensor, Q_OI: Tensor, H_II: Tensor) -> Tensor:
    difference_OI = Q_OI - W_OI
    return ((difference_OI @ H_II) * difference_OI).sum(1)


def output_error(W_OI: Tensor, Q_OI: Tensor, H_II: Tensor) -> float:
    """‖X (Q - W)ᵀ‖² / ‖X Wᵀ‖² for inputs of moment H."""
    energy = ((W_OI @ H_II) * W_OI).sum().item()
    return row_error(W_OI, Q_OI, H_II).sum().item() / max(energy, 1e-300)


def damped(H_II: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """H with ``damp`` x its mean diagonal added, and 1 on the diagonal of dead channels; and which are dead."""
    diagonal_I = H_II.diagonal()
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean() if not dead_I.all() else diagonal_I.new_tensor(1.0)
    return H_II + torch.diag(damp * mean + dead_I.to(H_II.dtype)), dead_I


def factor(H_II: Tensor, damp: float, where: str) -> tuple[Tensor, float]:
    """cholesky(H⁻¹, upper) of the damped H, and the damping that made it possible."""
    for used in _raises(damp):
        damped_II, _ = damped(H_II, used)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if failed.item():
            continue
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed.item():
            return upper_II, used
    raise UserError(f"{where}: the calibration inputs' second moment has no Cholesky factor, even at damping {used:g}",
                    "calibrate on more or more varied text, or leave the pass out that compensates errors")


def _raises(damp: float) -> Iterator[float]:
    return (damp * 10**power for power in range(MAX_RAISES + 1))


__all__ = ["DATA_FLOW", "MAX_RAISES", "damped", "factor", "matrices_in_order", "output_error", "row_error"]
