"""2:4 weights on NVIDIA's sparse tensor cores, for long inputs: one product for all layers that read one input.

`linear` puts products into a model; `forms` holds the products: cuSPARSELt, and FP8 through torch and torchao;
`quantise` rounds rows to FP8.
"""

from nmbench.runtime.sparse24.linear import (
    Form,
    Product,
    ProductLinear,
    SharedProduct,
    install,
    multiplying,
    shared_inputs,
)
from nmbench.runtime.sparse24.model import to_sparse24

__all__ = [
    "Form",
    "Product",
    "ProductLinear",
    "SharedProduct",
    "install",
    "multiplying",
    "shared_inputs",
    "to_sparse24",
]
