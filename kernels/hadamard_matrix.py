"""Hadamard matrices: square, of ±1, with orthogonal rows.

`H_B = H_m ⊗ H_2 ⊗ ... ⊗ H_2` with the smallest m for which Paley gives a matrix (R. E. A. C. Paley, On orthogonal
matrices, 1933): m - 1 a prime that leaves 3 by 4, or m/2 - 1 a prime that leaves 1. That is m = 1, 12, 20, 28, 36, 44,
60, 68, 76, 84, 104 for 1, 3, 5, 7, 9, 11, 15, 17, 19, 21, 13 times a power of two, and so on.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_MAX_CORE = 512


def core_order(order: int) -> int | None:
    """The m of the construction of a given order, or None if there is none."""
    odd = order
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    if order < 1 or odd == 1:
        return 1 if order >= 1 else None
    m = 4 * odd
    while m <= min(order, _MAX_CORE):
        if order % m == 0 and (_prime(m - 1, 3) or _prime(m // 2 - 1, 1)):
            return m
        m *= 2
    return None


@functools.cache
def core_matrix(m: int) -> Tensor:
    """Paley's matrix of order m, float32 `[m, m]`; m as `core_order` gives it."""
    if m == 1:
        return torch.ones(1, 1)
    if _prime(m - 1, 3):
        skew = _bordered(m - 1)
        skew[1:, 0] = -1
        return skew + torch.eye(m)
    half = m // 2
    h2, turned = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(_bordered(half - 1), h2) + torch.kron(torch.eye(half), turned)


@functools.cache
def hadamard_matrix(order: int) -> Tensor | None:
    """A Hadamard matrix, float32 `[order, order]`, or None if there is no construction here."""
    m = core_order(order)
    if m is None:
        return None
    h = core_matrix(m)
    while len(h) < order:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return h


def _bordered(q: int) -> Tensor:
    """Quadratic residues of differences modulo a prime q, 0 on the diagonal, bordered with ones."""
    residue = torch.full((q,), -1.0)
    residue[torch.arange(1, q).square() % q] = 1
    residue[0] = 0
    i = torch.arange(q)
    out = torch.ones(q + 1, q + 1)
    out[0, 0] = 0
    out[1:, 1:] = residue[(i[None, :] - i[:, None]) % q]
    return out


def _prime(n: int, rest: int) -> bool:
    return n % 4 == rest and n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))
