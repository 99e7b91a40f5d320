"""Groups of logits of many kinds, with masks, for the laws of the policy."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from nmbench_plugins.maskpro.policy import gumbel
from reference import policy as reference

PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (5, 8), (7, 8), (8, 16)]  # keep, group
KINDS = ["normal", "ties", "prior", "flips", "far", "gaps", "17", "12"]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_logits(kind: str, prior: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 logits of one kind, [n, group]; `prior` is the mask that a learner would start from."""
    noise = torch.randn(prior.shape, generator=generator)
    match kind:
        case "normal":
            return 2 * noise
        case "ties":
            return torch.randint(0, 3, prior.shape, generator=generator).float()
        case "prior":
            return 10.0 * prior
        case "flips":
            return 10.0 * prior.roll(1, -1) + noise
        case "far":
            return 14.0 * prior + noise
        case "gaps":
            steps = torch.tensor([0.0, 17, 100, 500, 1000])
            return steps[torch.randint(0, 5, prior.shape, generator=generator)] + noise
        case _:
            return torch.tensor([float(kind)] + [0.0] * (prior.shape[-1] - 1)).expand(prior.shape).contiguous()


def make(pattern: tuple[int, int], kind: str, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Logits [n, group] and a mask of the pattern: in `prior` the likeliest one, else any."""
    keep, group = pattern
    generator = rng(seed)
    mask = gumbel.top(torch.rand(group, n, generator=generator), keep).t().contiguous()
    return make_logits(kind, mask, generator), mask


def cases(patterns: list[tuple[int, int]] = PATTERNS) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    seeds = st.integers(0, 2**32)
    return st.builds(make, st.sampled_from(patterns), st.sampled_from(KINDS), seeds, st.integers(1, 4))


def spread(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """One group of logits [group] beside every mask of the pattern, [sets, group] each."""
    masks = reference.all_masks(keep, len(values))
    return values.expand(masks.shape), masks
