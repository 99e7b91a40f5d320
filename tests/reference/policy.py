"""Slow and readable twins of the MaskPro policy: float64 enumeration with autograd, and mpmath with many digits."""

import math
from collections import Counter
from itertools import combinations, permutations

import mpmath
import torch
from torch import Tensor


def all_masks(keep: int, group: int) -> Tensor:
    """Every mask that keeps `keep` of `group`, bool [C(group, keep), group]."""
    masks = torch.zeros(0, group, dtype=torch.bool)
    sets = torch.tensor(list(combinations(range(group), keep)))
    return masks.new_zeros(len(sets), group).scatter_(1, sets, True)


def log_prob_by_orders(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the log of the sum over orders of S of prod w_i / (weight not drawn yet), one group [group], float64."""
    terms = []
    for order in permutations(mask.nonzero()[:, 0].tolist()):
        left = list(range(len(logits)))
        term = logits.new_zeros((), dtype=torch.float64)
        for i in order:
            term = term + logits[i].double() - logits[left].double().logsumexp(0)
            left.remove(i)
        terms.append(term)
    return torch.stack(terms).logsumexp(0)


def log_prob_by_subsets(logits: Tensor, mask: Tensor) -> Tensor:
    """The same for groups [n, group] -> [n]: F(A) = chance that the first |A| draws are A, over all A within S."""
    keep = int(mask[0].sum())
    kept = logits.double()[mask].view(-1, keep)
    dropped = logits.double()[~mask].view(len(mask), -1).logsumexp(-1)
    drawn = {frozenset(): torch.zeros_like(dropped)}
    for size in range(1, keep + 1):
        for subset in map(frozenset, combinations(range(keep), size)):
            drawn[subset] = torch.stack(
                [drawn[subset - {i}] + kept[:, i] - _left(kept, dropped, subset - {i}) for i in subset]
            ).logsumexp(0)
    return drawn[frozenset(range(keep))]


def _left(kept: Tensor, dropped: Tensor, drawn: frozenset[int]) -> Tensor:
    left = [i for i in range(kept.shape[1]) if i not in drawn]
    return torch.cat([kept[:, left], dropped[:, None]], 1).logsumexp(-1)


def grad_log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """Autograd of `log_prob_by_subsets`, float64 [n, group]."""
    logits = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob_by_subsets(logits, mask).sum(), logits)
    return gradient


def exact(logits: Tensor, mask: Tensor) -> tuple[float, list[float]]:
    """Return log P and its gradient for one group [group] by inclusion-exclusion, in as many digits as that cancels.

    P(S) = sum over A within S of (-1)^|A| D / (D + W_A), a formula that the policy does not use. Equal kept weights are
    counted together, so that wide groups are feasible where many are equal.
    """
    kept, dropped = logits[mask].tolist(), logits[~mask].tolist()
    with mpmath.workdps(40 + int(len(kept) * (max(kept + dropped) - min(kept + dropped) + 4) / 2)):
        rest = mpmath.fsum(map(mpmath.exp, dropped))
        sizes = Counter(kept)
        terms = _terms(rest, sizes)  # (signed number of sets A, D + W_A, how many of each kept value are in A)
        chance = rest * mpmath.fsum(count / total for count, total, _ in terms)
        slopes = [count / total**2 for count, total, _ in terms]
        gain = {}
        for k, (logit, size) in enumerate(sizes.items()):
            slope = mpmath.fsum(slope * term[2][k] for slope, term in zip(slopes, terms, strict=True) if term[2][k])
            gain[logit] = -rest * mpmath.exp(logit) * slope / size / chance
        total = mpmath.fsum(gain[logit] for logit in kept)
        pairs = zip(logits.tolist(), mask.tolist(), strict=True)
        gradient = [float(gain[x] if inside else -mpmath.exp(x) / rest * total) for x, inside in pairs]
        return float(mpmath.log(chance)), gradient


def _terms(rest: mpmath.mpf, sizes: dict[float, int]) -> list[tuple[mpmath.mpf, mpmath.mpf, tuple[int, ...]]]:
    terms = [(mpmath.mpf(1), rest, ())]
    for logit, size in sizes.items():
        weight = mpmath.exp(logit)
        choices = [((-1) ** j * math.comb(size, j), j * weight, j) for j in range(size + 1)]
        terms = [(count * c, total + w, (*js, j)) for count, total, js in terms for c, w, j in choices]
    return terms
