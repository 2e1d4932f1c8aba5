"""A mixer as the matrix it multiplies a short sequence with: what an attention map is to attention.

For Mamba-2 (arXiv 2405.21060, eq. 6) token i receives from token j <= i

    M[i, j] = (C_i . B_j) exp(A (dt_{j+1} + ... + dt_i)) dt_j          y = M x + D x

a head; the skip D is left out. L x L numbers a head: only for short sequences.

Legend: B batch, L tokens, D d_model, H heads, G groups, N d_state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.errors import UserError
from mambacompress.models.mixers import SSDMixer
from mambacompress.models.paths import negative_exp

LONGEST = 1024  # tokens


def ssd_matrix(mixer: SSDMixer, x_BLD: Tensor) -> Tensor:
    """M [B, H, L, L], zero above the diagonal, fp32 at least. Raises UserError for a sequence longer than LONGEST."""
    L = x_BLD.shape[1]
    if L > LONGEST:
        raise UserError(f"a sequence of {L:,} tokens has a matrix of {L * L:,} numbers a head",
                        f"match matrices on sequences of at most {LONGEST:,} tokens")
    span = mixer.groups * mixer.d_state
    _, xBC_BLC, dt_BLH = mixer.in_proj(x_BLD).split([mixer.d_inner, mixer.d_inner + 2 * span, mixer.heads], dim=-1)
    xBC_BLC, _ = mixer.conv(xBC_BLC)
    _, B_BLS, C_BLS = xBC_BLC.split([mixer.d_inner, span, span], dim=-1)
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    heads_a_group = mixer.heads // mixer.groups
    B_BHLN, C_BHLN = (t.to(wide).unflatten(-1, (mixer.groups, mixer.d_state)).repeat_interleave(heads_a_group, 2)
                      .transpose(1, 2) for t in (B_BLS, C_BLS))
    dt_BHL = F.softplus(dt_BLH.to(wide) + mixer.dt_bias.to(wide)).clamp(*mixer.dt_limit).transpose(1, 2)
    passed_BHL = (dt_BHL * negative_exp(mixer.A_log)[:, None]).cumsum(-1)
    later = torch.ones(L, L, dtype=torch.bool, device=x_BLD.device).triu(1)
    decay_BHLL = (passed_BHL[..., :, None] - passed_BHL[..., None, :]).masked_fill(later, -torch.inf).exp()
    return C_BHLN @ B_BHLN.transpose(-1, -2) * decay_BHLL * dt_BHL[..., None, :]
