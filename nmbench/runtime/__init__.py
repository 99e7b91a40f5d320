"""Process and device: isolation between jobs, cost meters, CUDA graphs, where Triton runs."""

from nmbench.runtime.cost import Cost
from nmbench.runtime.cuda_graphs import graph_of
from nmbench.runtime.triton import triton_available

__all__ = ["Cost", "graph_of", "triton_available"]
