"""MobileVD's temporal block pruning: training learns the importance of each block with the weights.

importance q  ->  inclusion probabilities p, sum(p) = n  ->  gates z in {0, 1}, exactly n of them 1
Source: MobileVD, temporal block pruning. These are plain functions; model/unet.py has the gated blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(importance: Tensor, n: int) -> Tensor:
    """Return p_i = sigmoid(q_i + c), float64 (K,), with the shift c for which the p_i sum to n.

    Differentiable, including c: a larger q_i lowers all other p. For n = K all p are 1.
    Raises ValueError unless n is in 1..K.
    """
    count = importance.numel()
    if not 1 <= n <= count:
        raise ValueError(f"cannot keep {n} of {count} blocks")
    q = importance.double()
    if n == count:
        return torch.ones_like(q) + 0 * q
    with torch.no_grad():
        low, high = -q.max() - 40, -q.min() + 40
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (low, middle) if torch.sigmoid(q + middle).sum() > n else (middle, high)
    # One Newton step at the solution changes no value, but makes the gradient of c part of the graph.
    p = torch.sigmoid(q + high)
    slope = (p * (1 - p)).detach()
    shift = high - (p.sum() - n) / slope.sum()
    return torch.sigmoid(q + shift)


def sample_gates(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw gates in {0, 1} with these inclusion probabilities, exactly sum(p) ones: systematic sampling.

    Intervals of lengths p_i lie end to end on a line, in random order. Gate i is 1 if one of the points
    u, u + 1, u + 2, ... lies in interval i. The gradient of the gates passes straight through to p.
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
    """Return the indices of the n most important blocks, ascending; of equal ones, the earlier blocks."""
    return torch.argsort(importance, descending=True, stable=True)[:n].sort().values
