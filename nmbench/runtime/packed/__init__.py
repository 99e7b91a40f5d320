"""Packed N:M weights: values and codes of few bits, products with them, and models that hold them.

`weight.py` defines the format, `linear.py` a layer that holds a packed weight, `model.py` folders and models. `launch`
chooses between the CUDA program `program.cu`, which `by_cuda` starts, and the Triton program `program.py`, which
`by_triton` starts; `reference.py` is the same product in plain torch.
"""

from nmbench.runtime.packed.linear import PackedLinear
from nmbench.runtime.packed.model import PACKED, description, load_packed, packed_layers, save_packed
from nmbench.runtime.packed.weight import PackedWeight, kept_of, pack, packed_share, unpack

__all__ = [
    "PACKED",
    "PackedLinear",
    "PackedWeight",
    "description",
    "kept_of",
    "load_packed",
    "pack",
    "packed_layers",
    "packed_share",
    "save_packed",
    "unpack",
]
