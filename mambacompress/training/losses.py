"""Distillation losses as plain functions of logits and hidden states: one number a row, nothing reduced.

A row is a token or an image. Softmax and everything after it run in fp32 (fp64 for fp64 logits). With temperature T
both sides are divided by T and the loss multiplied by T², so that its gradient keeps its size (Hinton et al.,
arXiv 1503.02531).

    ce          -log softmax(s)[label]                                 the data's labels, T = 1
    hard        -log softmax(s)[argmax t]                              the teacher's first choice, T = 1
    kl          T² KL(p_t || p_s)                                      forward: covers all the teacher says
    reverse-kl  T² KL(p_s || p_t)                                      keeps to what the teacher finds likely
    jsd         T² [KL(p_t || m) + KL(p_s || m)] / 2,  m = (p_t + p_s) / 2     symmetric, at most T² log 2
    mse         mean over classes of (s - t)²                          logits themselves; T is not used

``relative_error`` compares hidden states: |s - t|² / |t|² of each token.

Legend: M rows (tokens, images), V classes, D features, H heads, L tokens of a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("ce", "hard", "kl", "reverse-kl", "jsd", "mse")
FROM_LABELS = ("ce",)  # what needs no teacher
SMALL = 1e-12  # beside |t|², for a token the teacher maps to zero


def row_losses(kind: str, student_MV: Tensor, teacher_MV: Tensor | None, labels_M: Tensor | None,
               temperature: float = 1.0) -> Tensor:
    """The loss ``kind`` of every row, [M]. Raises ValueError for an unknown kind and for what it lacks."""
    if kind not in KINDS:
        raise ValueError(f"there is no loss {kind!r}; known: {', '.join(KINDS)}")
    student_MV = _wide(student_MV)
    if kind in FROM_LABELS:
        if labels_M is None:
            raise ValueError(f"the loss {kind!r} needs labels")
        return F.cross_entropy(student_MV, labels_M, reduction="none")
    if teacher_MV is None:
        raise ValueError(f"the loss {kind!r} needs a teacher")
    teacher_MV = _wide(teacher_MV)
    if kind == "hard":
        return F.cross_entropy(student_MV, teacher_MV.argmax(-1), reduction="none")
    if kind == "mse":
        return (student_MV - teacher_MV).square().mean(-1)
    log_s, log_t = (F.log_softmax(x / temperature, -1) for x in (student_MV, teacher_MV))
    if kind == "kl":
        rows = _divergence(log_t, log_s)
    elif kind == "reverse-kl":
        rows = _divergence(log_s, log_t)
    else:
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        rows = (_divergence(log_t, log_m) + _divergence(log_s, log_m)) / 2
    return temperature**2 * rows


def relative_error(student_MD: Tensor, teacher_MD: Tensor) -> Tensor:
    """|s - t|² / |t|² of every row, [M]; both [M, D]."""
    student_MD, teacher_MD = _wide(student_MD), _wide(teacher_MD)
    return (student_MD - teacher_MD).square().sum(-1) / (teacher_MD.square().sum(-1) + SMALL)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, from log-probabilities; a class p does not have counts nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
