"""Process, device and hub: isolation between jobs, cost, CUDA graphs, where Triton runs, whether the hub answers.

`packed` and `sparse24` hold pruned models in service: packed N:M weights for few tokens, 2:4 products for many.
"""

from nmbench.runtime.cost import Cost
from nmbench.runtime.cuda_graphs import graph_of
from nmbench.runtime.dtypes import dtype_name
from nmbench.runtime.hub import hub_or_cache, offline
from nmbench.runtime.isolation import keeping_random_states
from nmbench.runtime.packed import PackedLinear, PackedWeight, load_packed, pack, packed_share, save_packed, unpack
from nmbench.runtime.sparse24 import to_sparse24
from nmbench.runtime.triton import triton_available

__all__ = [
    "Cost",
    "PackedLinear",
    "PackedWeight",
    "dtype_name",
    "graph_of",
    "hub_or_cache",
    "keeping_random_states",
    "load_packed",
    "offline",
    "pack",
    "packed_share",
    "save_packed",
    "to_sparse24",
    "triton_available",
    "unpack",
]
