"""The proximal operator of a penalty that is 0 exactly where a group keeps at most N weights.

The penalty of a group w of M weights is R(w) = e_(N+1)(|w|), the elementary symmetric polynomial: the sum of all
products of N + 1 of the |w|. For N = 2, M = 4 it is the one of ProxSparse (arXiv 2502.00258). The operator returns

    prox(z) = argmin over w of  1/2 |w - z|^2 + lam R(w).

R is linear in each weight, with slope e_N of all others, so the best w_i for given others is

    w_i = max(0, |z_i| - lam e_N(others)),   with the sign of z_i.

A sweep sets every weight so in turn, and the objective never rises. Groups are of three kinds:

1. convex: lam (M - N) e_(N-1)(|z|) < 1 bounds the off-diagonal row sums of the Hessian on the box [0, |z|], which holds
   the minimum. The objective is strictly convex there, and sweeps from z converge to the minimum.
2. settled: with z sorted and d the norm of z_(N+1) ... z_M, the product of max(0, z_i - d) over i <= N is at least
   z_(N+1) / lam. Then the top N, unchanged, are the minimum: a better w moves each of the top N by less than d, so
   their product exceeds z_(N+1) / lam, and lowering all other weights to 0 never raises the objective.
3. open: the minimum has its k largest |z| above 0 for a k from N to M, since R is symmetric. For every k, sweeps from 0
   find candidates, and the lowest objective wins. Full sweeps, smallest weight first, are those of the paper; they may
   push a large weight to 0 and stay there. Half sweeps follow the path of the gradient and do not.

A sweep costs O(M N) a group, by polynomials of the weights on the left and on the right; all terms are positive, so
nothing cancels. An open group costs 2 (M - N) times as many sweeps, at most `SWEEPS` each.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 100
ACCURACY = 0.75  # of the digits of a dtype, to which groups are swept
HALF_SWEEPS = 8  # before full ones, where sweeps shall follow the path of the gradient


def prox_(groups: Tensor, lam: float, keep: int, at_once: int) -> Tensor:
    """Put the prox of every group in its place, and return `groups`, `[groups, group]` of a float dtype.

    `lam` >= 0. `at_once`: groups to work on at once. Zeros are +0.0.
    """
    still_open = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
    for part, mark in zip(groups.split(at_once), still_open.split(at_once), strict=True):
        found, left = without_search(part.abs().t().contiguous(), lam, keep)
        mark.copy_(left)
        part.copy_(torch.where(left, part.t(), signed(found, part.t())).t())
    for index in still_open.nonzero().flatten().split(at_once):
        z, order = groups[index].abs().t().sort(dim=0, descending=True, stable=True)
        found = torch.empty_like(z).scatter_(0, order, best_of_supports(z, lam, keep))
        groups[index] = signed(found, groups[index].t()).t()
    return groups


def without_search(columns: Tensor, lam: float, keep: int) -> tuple[Tensor, Tensor]:
    """Return the prox of convex and of settled groups, `[group, groups]`, and True for all other groups."""
    convex = lam * (len(columns) - keep) * polynomial(columns, keep - 1)[-1] < 1
    if convex.all():
        return swept(columns.clone(), columns, lam, keep), ~convex
    z, order = columns.sort(dim=0, descending=True, stable=True)
    found = torch.empty_like(z).scatter_(0, order, top(z, keep))
    part = columns[:, convex]
    found[:, convex] = swept(part.clone(), part, lam, keep)
    return found, ~(convex | settled(z, lam, keep))


def signed(found: Tensor, weights: Tensor) -> Tensor:
    """Return `found` with the signs of `weights`, and zeros positive."""
    return found.copysign(weights).masked_fill_(found == 0, 0.0)


def top(z: Tensor, keep: int) -> Tensor:
    """Return the first `keep` entries of every group, the others 0."""
    found = z.clone()
    found[keep:] = 0.0
    return found


def settled(z: Tensor, lam: float, keep: int) -> Tensor:
    """Return True where the top N are proven to be the minimum; `z` falls along the group."""
    reach = z[keep:].norm(dim=0)
    return (z[:keep] - reach).clamp_min(0.0).prod(dim=0) * lam >= z[keep]


def best_of_supports(z: Tensor, lam: float, keep: int) -> Tensor:
    """Return the best candidate over all supports; `z` falls along the group. Of equal ones, to rounding, the top N
    are taken.
    """
    best = top(z, keep)
    value = objective(best, z, lam, keep)
    for support in range(keep + 1, len(z) + 1):
        for half_sweeps in (0, HALF_SWEEPS):
            found = torch.zeros_like(z)
            swept(found[:support], z[:support], lam, keep, half_sweeps)
            other = objective(found, z, lam, keep)
            better = other < value * (1 - len(z) * torch.finfo(z.dtype).eps)
            best, value = torch.where(better, found, best), torch.where(better, other, value)
    return best


def objective(w: Tensor, z: Tensor, lam: float, keep: int) -> Tensor:
    """Return 1/2 |w - z|^2 + lam R(w) of every group; entries at least 0."""
    return 0.5 * (w - z).square().sum(dim=0) + lam * polynomial(w, keep + 1)[-1]


def swept(w: Tensor, z: Tensor, lam: float, keep: int, half_sweeps: int = 0) -> Tensor:
    """Sweep `w` in place until no group changes any more, and return it: `[k, groups]`, entries at least 0."""
    bound = torch.finfo(z.dtype).eps ** ACCURACY * z.amax(dim=0)
    left, right = w.new_zeros(len(w), keep + 1, w.shape[1]), w.new_zeros(2, keep + 1, w.shape[1])
    for number in range(SWEEPS if w.numel() else 0):
        before = w.clone()
        sweep(w, z, lam, 0.5 if number < half_sweeps else 1.0, left, right)
        if number >= half_sweeps and ((w - before).abs_().amax(dim=0) <= bound).all():
            break
    return w


def sweep(w: Tensor, z: Tensor, lam: float, pace: float, left: Tensor, right: Tensor) -> None:
    """Move every weight, the last one first, by `pace` of the way to its best value.

    `left` `[k, N + 1, groups]` and `right` `[2, N + 1, groups]` are written: at i, left[i] holds e_0 ... e_N of
    w[:i], and one half of `right` holds e_N ... e_0 of w[i + 1:], which were moved.
    """
    left[:, 0] = 1.0
    for i, entry in enumerate(w[:-1]):
        torch.addcmul(left[i, 1:], left[i, :-1], entry, out=left[i + 1, 1:])
    now, after = right.zero_()
    right[:, -1] = 1.0
    for i in reversed(range(len(w))):
        slope = (left[i] * now).sum(dim=0)  # e_N of all others
        w[i].lerp_(torch.sub(z[i], slope, alpha=lam).clamp_min_(0.0), pace)
        torch.addcmul(now[:-1], now[1:], w[i], out=after[:-1])
        now, after = after, now


def polynomial(w: Tensor, degree: int) -> Tensor:
    """Return e_0 ... e_degree of every group: `[k, groups]` -> `[degree + 1, groups]`."""
    found = w.new_zeros(degree + 1, w.shape[1])
    found[0] = 1.0
    for entry in w:
        found = torch.cat([found[:1], torch.addcmul(found[1:], found[:-1], entry)])
    return found
