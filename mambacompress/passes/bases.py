"""Orthogonal bases in which a stream is easy to quantize.

A quantizer with one scale for all channels wants every channel equally large. For activations X with second moment
S = XᵀX/n = K Λ Kᵀ, the basis R = K H, H an orthonormal Hadamard matrix, gives every channel of X R the second moment
mean(Λ): a Hadamard alone only mixes, it does not equalise. The moment is *uncentred*, as symmetric quantizers are.
(MambaQuant, arXiv 2501.13484, section 4.1.)

Where no Hadamard matrix of the size is known, H is block-diagonal with the largest known block: eigenvectors are dealt
to the blocks so that all blocks hold nearly the same energy, and a chain of at most n - 1 plane rotations (each makes
one channel exactly average; Schur-Horn) removes what inequality is left. Nothing is padded.

All of it in fp64. Row vectors: x <- x R.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.kernels.hadamard import hadamard_matrix, largest_block

KINDS = ("klt-hadamard", "hadamard", "random")


def orthogonal_basis(kind: str, size: int, seed: int, moment: Tensor | None = None) -> Tensor:
    """R [size, size], orthogonal, fp64, on the CPU.

    kind: ``klt-hadamard`` needs ``moment`` [size, size]; ``hadamard`` is diag(random signs) H; ``random`` is drawn
    uniformly from the orthogonal group. The last two depend on ``seed`` alone.
    """
    if kind == "klt-hadamard":
        if moment is None:
            raise ValueError("klt-hadamard needs the second moment of the stream")
        return klt_hadamard(moment)
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard":
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return signs[:, None] * block_hadamard(size)
    if kind == "random":
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        Q, upper = np.linalg.qr(gaussian.numpy())
        return torch.from_numpy(Q * np.sign(np.diag(upper)))
    raise ValueError(f"unknown basis {kind!r}; known: {', '.join(KINDS)}")


def block_hadamard(size: int) -> Tensor:
    """I ⊗ H with the largest known block; [size, size] fp64."""
    block = largest_block(size)
    H = hadamard_matrix(block, dtype=torch.float64)
    return H if block == size else torch.block_diag(*[H] * (size // block))


def klt_hadamard(moment: Tensor) -> Tensor:
    """R = K H for the second moment S [n, n]: the diagonal of Rᵀ S R is constant, mean(Λ)."""
    S = moment.detach().cpu().double()
    if not torch.isfinite(S).all():
        raise UserError("the calibration activations hold NaN or Inf", "check the model's weights")
    n = S.shape[0]
    eigenvalues, K = eigenvectors(S.numpy())
    block = largest_block(n)
    if block < n:
        K = K[:, deal(eigenvalues, n // block)]
        R = K @ block_hadamard(n).numpy()
        return torch.from_numpy(equalise(S.numpy(), R))
    return torch.from_numpy(K @ block_hadamard(n).numpy())


def eigenvectors(S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Λ descending [n], K [n, n] of a symmetric S; each eigenvector's largest entry is positive: K is determined."""
    import scipy.linalg  # its import takes as long as the rest of this room's, and most commands rotate nothing

    eigenvalues, K = scipy.linalg.eigh((S + S.T) / 2)
    eigenvalues, K = eigenvalues[::-1], K[:, ::-1]
    largest = np.abs(K).argmax(axis=0)
    signs = np.where(K[largest, np.arange(K.shape[1])] < 0, -1.0, 1.0)
    return np.ascontiguousarray(eigenvalues), K * signs


def deal(eigenvalues: np.ndarray, blocks: int) -> np.ndarray:
    """An order of the eigenvalues in which consecutive runs of n / blocks have nearly equal sums.

    Largest first, each to the block with the least energy that still has room.
    """
    capacity = len(eigenvalues) // blocks
    members: list[list[int]] = [[] for _ in range(blocks)]
    energy = np.zeros(blocks)
    for i in np.argsort(-eigenvalues, kind="stable"):
        open_energy = [energy[b] if len(members[b]) < capacity else np.inf for b in range(blocks)]
        chosen = int(np.argmin(open_energy))
        members[chosen].append(int(i))
        energy[chosen] += eigenvalues[i]
    return np.concatenate([np.array(block, dtype=np.int64) for block in members])


def equalise(S: np.ndarray, R: np.ndarray) -> np.ndarray:
    """R followed by plane rotations after which the diagonal of Rᵀ S R is constant.

    Each step takes the largest and the smallest channel and turns their plane until the larger is average.
    """
    R, M = R.copy(), R.T @ S @ R
    mean = np.trace(M) / len(M)
    tolerance = 1e-13 * max(abs(mean), 1e-300)
    for _ in range(len(M) - 1):
        diagonal = np.diag(M)
        i, j = int(diagonal.argmax()), int(diagonal.argmin())
        if diagonal[i] - mean <= tolerance:
            break
        turn = _turn(M[i, i], M[j, j], M[i, j], mean)
        M[:, [i, j]] = M[:, [i, j]] @ turn
        M[[i, j], :] = turn.T @ M[[i, j], :]
        R[:, [i, j]] = R[:, [i, j]] @ turn
    return R


def _turn(a: float, b: float, c: float, target: float) -> np.ndarray:
    """The plane rotation after which the first diagonal entry of [[a, c], [c, b]] is ``target``, b < target < a."""
    root = np.sqrt(c * c - (b - target) * (a - target))
    tangents = ((-c + root) / (b - target), (-c - root) / (b - target))
    tangent = min(tangents, key=abs)
    cosine = 1.0 / np.hypot(1.0, tangent)
    sine = tangent * cosine
    return np.array([[cosine, -sine], [sine, cosine]])


__all__ = ["KINDS", "block_hadamard", "deal", "eigenvectors", "equalise", "klt_hadamard", "orthogonal_basis"]
