"""A device for `nmbench speed` that multiplies dense, on a CPU."""

import torch

from nmbench.pattern import Pattern
from nmbench.speed.hardware import Packed
from nmbench.speed.measure import measure
from nmbench.speed.prefill_report import Kernel
from nmbench.speed.whole_model import Sizes

TWO_FOUR = Pattern(2, 4)


class Fake:
    """Hardware that multiplies dense; sparse products take `ratio` of a second, dense ones a second."""

    def __init__(self, ratio=0.5, refused=(), spoil=0.0, graphs=True, forms=()):
        self.forms = dict(forms)
        self.environment = {"device_name": "a fake", "library": "none"}
        self.ratio, self.refused, self.spoil, self.graphs = ratio, refused, spoil, graphs
        self.converted, self.calls = {}, []

    def problem(self, shape):
        return "that shape is refused" if shape in self.refused else None

    def convert(self, weight):
        assert weight.is_contiguous()
        assert (TWO_FOUR.kept(weight != 0) <= 2).all()
        sparse = weight + self.spoil
        self.converted[sparse.data_ptr()] = sparse
        return sparse

    def backend(self, sparse):
        return "fake"

    def packed(self, inputs, weight, pattern):
        if len(inputs) > 8:
            return None
        return Packed(torch.inference_mode()(lambda: inputs @ weight.t() + self.spoil), weight.nbytes * 9 // 16)

    def bytes(self, weight):
        size = weight.numel() * weight.element_size()
        return size // 2 if weight.data_ptr() in self.converted else size

    def is_sparse(self, call):
        cells = [cell.cell_contents for cell in call.__wrapped__.__closure__ or ()]
        return any(isinstance(c, torch.Tensor) and c.data_ptr() in self.converted for c in cells)

    def times(self, call, warm_up, repeat):
        call()
        self.calls.append(call)
        return [self.ratio if self.is_sparse(call) else 1.0] * repeat

    def launch(self, call, count=5):
        return 0.25 if self.is_sparse(call) else 0.125

    def graphed(self, call):
        return call if self.graphs else None

    def kernels(self, call):
        return ["sparse_kernel" if self.is_sparse(call) else "dense_kernel"]

    def kernel_times(self, call):
        call()
        return [Kernel("product", 0.75, 14), Kernel("norm", 0.25, 5)]

    def form(self, name):
        if name in self.forms:
            return self.forms[name]
        return lambda weight, bias: lambda inputs: torch.nn.functional.linear(inputs, weight, bias)

    def synchronize(self):
        pass

    def allocated(self):
        return 1000 - len(self.converted)


def measured(bundle, tokens, hardware, seconds=100, **options):
    """The report of a small model at 2:4, with few steps."""
    sizes = Sizes(24, prefill_seconds=seconds, prompt_tokens=8, decode_steps=4, decode_batches=(1, 3))
    return measure(bundle, TWO_FOUR, tokens, hardware, sizes=sizes, **options)
