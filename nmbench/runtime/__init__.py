"""Process, device and hub: isolation between jobs, cost, CUDA graphs, where Triton runs, whether the hub answers."""

from nmbench.runtime.cost import Cost
from nmbench.runtime.cuda_graphs import graph_of
from nmbench.runtime.hub import hub_or_cache, offline
from nmbench.runtime.triton import triton_available

__all__ = ["Cost", "graph_of", "hub_or_cache", "offline", "triton_available"]
