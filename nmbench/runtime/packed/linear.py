"""Linear layers that hold a packed N:M weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmbench.pattern import Pattern
from nmbench.runtime.packed import launch
from nmbench.runtime.packed.weight import PackedWeight, code_bytes, groups_of, pack, unpack


class PackedLinear(nn.Module):
    """A linear layer in place of `nn.Linear`, or of `Conv1D`, that keeps its N:M weight packed.

    Few tokens on an NVIDIA GPU are multiplied by the packed weight; anything else by the unpacked weight, which exists
    during the call only. Buffers: `values` and `codes` of `PackedWeight`, and `bias` `[out]` or None. `transposed`: the
    layer stands for a `Conv1D`, and multiplies as that does.
    """

    values: Tensor
    codes: Tensor
    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.pattern, self.transposed = packed.pattern, transposed
        self.out_features, self.in_features = packed.shape
        self.register_buffer("values", packed.values)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def of(cls, module: nn.Module, pattern: Pattern, mask: Tensor | None = None) -> PackedLinear:
        """Return the packed form of an `nn.Linear` or a `Conv1D` whose weight is strictly N:M.

        mask: bool `[out, in]`, the kept weights. Raises `NotStrict` for other weights.
        """
        transposed = not isinstance(module, nn.Linear)
        weight = module.get_parameter("weight").detach()
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        return cls(pack(weight.t() if transposed else weight, pattern, mask), bias, transposed)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype, bias: bool, transposed: bool = False
    ) -> PackedLinear:
        """Return a layer of `shape` `[out, in]` on the meta device, whose numbers are still to be loaded."""
        rows, inputs = shape
        values = torch.empty(rows, groups_of(inputs, pattern) * pattern.keep, dtype=dtype, device="meta")
        codes = torch.empty(rows, code_bytes(inputs, pattern), dtype=torch.uint8, device="meta")
        own = torch.empty(rows, dtype=dtype, device="meta") if bias else None
        return cls(PackedWeight(values, codes, pattern, inputs), own, transposed)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight `[out, in]`."""
        return PackedWeight(self.values, self.codes, self.pattern, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight as the layer that this one replaces stores it; a new tensor at every access."""
        return unpack(self.packed).t() if self.transposed else unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` `[..., in]` times the weight, plus the bias: `[..., out]`."""
        rows = x.reshape(-1, self.in_features)
        packed = self.packed
        if program := launch.program_of(packed, rows):
            return launch.product(packed, rows, self.bias, program).view(*x.shape[:-1], self.out_features)
        if not self.transposed:
            return F.linear(x, unpack(packed), self.bias)
        weight = unpack(packed).t().contiguous()  # [in, out], as the kernel of Conv1D reads it
        result = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return shape and pattern for the printed model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, pattern={self.pattern}"
