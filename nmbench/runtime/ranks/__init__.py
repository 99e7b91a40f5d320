"""Ranks: the processes that torchrun started for one run, what they share, and how they end together."""

from nmbench.runtime.ranks.group import ALONE, Ranks, joined, joined_ranks, sharing, sharing_by
from nmbench.runtime.ranks.launch import Launch

__all__ = ["ALONE", "Launch", "Ranks", "joined", "joined_ranks", "sharing", "sharing_by"]
