"""The search of ALPS in products whose factors are rounded to TF32, as on a GPU, and where that rounding is allowed."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nmbench import pruning
from nmbench.calibration import tf32
from nmbench.errors import NumericalFailure
from nmbench.methods import LayerStats
from nmbench.pattern import Pattern
from nmbench_plugins.alps import ALPS, problem
from nmbench_plugins.alps.inverse import inverse_of
from nmbench_plugins.alps.problem import Problem
from reference import alps as plain

aten = torch.ops.aten
PATTERN = Pattern(2, 4)


def rounded(x: Tensor) -> Tensor:
    """The nearest numbers with 10 bits after the point."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Rounding(TorchDispatchMode):
    """A GPU with TF32: factors of products are rounded while torch allows it. Counts calls by name and permission."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, bool], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = str(func.overloadpacket).split(".")[-1], torch.backends.cuda.matmul.allow_tf32
        self.calls[call] = self.calls.get(call, 0) + 1
        if call in (("mm", True), ("addmm", True), ("addmm_", True)):
            args = (*args[:-2], *map(rounded, args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Small blocks, so that the inverse of a small layer is made of products too."""
    monkeypatch.setattr(problem, "inverse_of", partial(inverse_of, block=32))


def layer(seed: int, rows: int = 64, columns: int = 128) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of inputs of which a few common directions have most of the energy."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    common = torch.logspace(0.5, -1.5, 32)[:, None] * draw(32, columns)
    x = (draw(4 * columns, 32) @ common + 0.3 * draw(4 * columns, columns) + 2 * draw(columns)) * draw(columns).exp()
    return draw(rows, columns), x.T @ x


def solved(weight: Tensor, gram: Tensor) -> tuple[Tensor, float]:
    """The mask of ALPS, and its error."""
    pruned = ALPS().solve(weight, LayerStats(1, 1, gram=gram), PATTERN)
    return pruned.mask, error(pruned.weight - weight, gram)


def error(change: Tensor, gram: Tensor) -> float:
    """The squared change of the layer's outputs, in float64."""
    return float((change.double() * (change.double() @ gram.double())).sum())


def papers_form(weight: Tensor, gram: Tensor) -> tuple[Tensor, float]:
    """The mask and the error if the products of the paper's loop are rounded, and its repair is not."""
    posed = Problem.of(weight, gram, 0.01)
    with tf32(), Rounding():
        mask, found, _ = plain.search(posed.dense.T, posed.gram, plain.largest(2, 4), 0.5)
    repaired = plain.repair(found, mask, posed.dense.T, posed.gram).T / posed.scale
    return mask.T, error(repaired - weight, gram)


def test_rounding_spares_the_residual_form():
    """Rounded products change few entries of our mask, and not its error; in the paper's form they change many."""
    differences, ratios = [], []
    for seed in range(3):
        weight, gram = layer(seed)
        (mask, exact), form = solved(weight, gram), papers_form(weight, gram)
        with Rounding():
            ours = solved(weight, gram)
        differences.append([float((other != mask).float().mean()) for other, _ in (ours, form)])
        ratios.append([found / exact for _, found in (ours, form)])
    (few, many), (same, higher) = torch.tensor(differences).mean(0).tolist(), torch.tensor(ratios).mean(0).tolist()
    assert few < 0.01
    assert many > 5 * few
    assert same < 1.005
    assert higher > 1.01


def test_only_products_of_the_search_are_rounded(monkeypatch):
    """Factors, the blocks on the diagonal, the goal and the repair are in full float32."""
    weight, gram = layer(0)
    stats = LayerStats(1, 1, gram=gram, drift=0.1 * gram)
    with Rounding() as mode:
        ALPS(dense_weight=0.5).solve(weight, stats, PATTERN)
    assert mode.calls["mm", True] > 0
    assert mode.calls["addmm", True] > 0
    for name in ("linalg_cholesky_ex", "linalg_solve_triangular"):
        assert mode.calls[name, False] > 0
        assert (name, True) not in mode.calls
    repairs = []
    monkeypatch.setattr(
        pruning,
        "conjugate_gradients",
        lambda start, *_: repairs.append(torch.backends.cuda.matmul.allow_tf32) or start,
    )
    ALPS().solve(weight, stats, PATTERN)
    assert repairs == [False]


def test_the_setting_is_restored_after_a_failure():
    """A search that raises leaves products in full float32."""
    weight, gram = layer(0)
    weight[0, 0] = torch.nan
    with pytest.raises(NumericalFailure):
        solved(weight, gram)
    assert not torch.backends.cuda.matmul.allow_tf32
