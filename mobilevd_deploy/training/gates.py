"""MobileVD's temporal block pruning: which blocks run is learnt with the weights.

importance q  ->  inclusion probabilities p, sum(p) = n  ->  gates z in {0, 1}, exactly n of them 1
Source: MobileVD, temporal block pruning. Plain functions; the gates live in unet.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(importance: Tensor, n: int) -> Tensor:
    """p_i = sigmoid(q_i + c) with the one shift c for which the p_i sum to n; float64 (K,).

    Differentiable: raising one q_i lowers the others' p. n must lie in 1..K; for n = K all are 1.
    """
    count = importance.numel()
    if not 1 <= n <= count:
        raise ValueError(f"{n} blocks out of {count} can not be kept")
    q = importance.double()
    if n == count:
        return torch.ones_like(q) + 0 * q
    with torch.no_grad():
        low, high = -q.max() - 40, -q.min() + 40
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (low, middle) if torch.sigmoid(q + middle).sum() > n else (middle, high)
    # One Newton step from the solution changes no value, and carries the gradient of c.
    p = torch.sigmoid(q + high)
    slope = (p * (1 - p)).detach()
    shift = high - (p.sum() - n) / slope.sum()
    return torch.sigmoid(q + shift)


def sample_gates(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw gates of exactly sum(p) ones with these inclusion probabilities: systematic sampling.

    The p_i are laid end to end in random order on a line; i is in where one of the points
    u, u + 1, u + 2, ... falls on its piece. The gradient of p passes straight through to p.
    """
    p = probabilities.detach()
    order = torch.randperm(len(p), generator=generator)
    ends = p[order].cumsum(0)
    ends[-1] = ends[-1].round()
    u = torch.rand((), dtype=p.dtype, generator=generator)
    points_before = torch.floor(ends - u) + 1
    hits = points_before.diff(prepend=points_before.new_zeros(1))
    gates = torch.zeros_like(p)
    gates[order] = hits
    return gates + (probabilities - p)


def most_important(importance: Tensor, n: int) -> Tensor:
    """Indices of the n blocks that stay, ascending; equal importance: the earlier block."""
    return torch.argsort(importance, descending=True, stable=True)[:n].sort().values
