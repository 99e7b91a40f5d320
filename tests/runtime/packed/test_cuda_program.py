"""The CUDA program computes what plain torch computes: its source run on a CPU, and compiled on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch

from nmbench.pattern import Pattern
from nmbench.runtime import PackedLinear, graph_of, pack
from nmbench.runtime.packed import by_cuda, launch, reference
from nmbench.runtime.packed.by_cuda import PATTERNS, Launch
from nmbench.runtime.triton import nvidia_available
from nmbench.testing import strategies
from reference.cuda_program import assembled, emulated

BRAIN, HALF = torch.bfloat16, torch.float16
FORMS = [
    (PATTERNS[0], BRAIN, Launch(2, 2, False, 1)),
    pytest.param(PATTERNS[0], HALF, Launch(3, 1, True, 1), marks=pytest.mark.slow),
    (PATTERNS[1], BRAIN, Launch(1, 2, True, 1)),
    pytest.param(PATTERNS[1], HALF, Launch(4, 4, False, 1), marks=pytest.mark.slow),
    pytest.param(PATTERNS[2], BRAIN, Launch(2, 1, False, 1), marks=pytest.mark.slow),
    (PATTERNS[2], HALF, Launch(8, 2, True, 1)),
]
on_gpu = pytest.mark.skipif(not nvidia_available("cuda"), reason="needs an NVIDIA GPU")
in_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def problem(pattern, rows, segments, tokens, dtype, seed):
    """A packed weight, vectors and a bias with numbers of many sizes."""
    weight = strategies.values("normal", (rows, 16 * segments), seed)
    kept = pattern.top(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)))
    weight = (weight * kept + 0.0).to(dtype)
    x = strategies.values("normal", (tokens, 16 * segments), seed + 1).to(dtype)
    return pack(weight, pattern), x, strategies.values("normal", (rows,), seed + 2).to(dtype)


def agree(packed, x, bias, form, program=None):
    """Program and plain torch agree to the rounding of the result and of the order of a float32 sum."""
    ours, theirs = by_cuda.product(packed, x, bias, form, program), reference.product(packed, x, bias)
    assert ours.dtype == x.dtype and ours.shape == theirs.shape
    rounding = torch.finfo(x.dtype).eps
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=rounding, atol=1e-5 * packed.inputs**0.5)


@pytest.mark.parametrize(("pattern", "dtype", "form"), FORMS)
def test_the_source_on_a_cpu_agrees_with_plain_torch(pattern, dtype, form, tmp_path):
    """Any rows, segments and tokens, in warps that are run lane by lane; nothing else is read."""
    program = emulated(pattern.group, dtype, form, tmp_path)
    for rows, segments, tokens in ((1, 1, 1), (16, 8, 8), (17, 5, 3), (35, 33, 7), (8, 67, 2)):
        packed, x, bias = problem(pattern, rows, segments, tokens, dtype, rows)
        agree(packed, x, bias if rows % 2 else None, form, program)


@in_pattern
def test_every_code_is_expanded(pattern, tmp_path):
    """Ways to keep N of M (all of 2:4 and 4:8), by products with unit vectors: all weights come back, bit for bit."""
    form = Launch(1, 1, False, 1)
    program = emulated(pattern.group, BRAIN, form, tmp_path)
    ways = list(itertools.combinations(range(pattern.group), pattern.keep))
    places = torch.tensor(ways[:: max(1, len(ways) // 1000)])
    mask = torch.zeros(len(places), pattern.group, dtype=torch.bool).scatter_(1, places, True)
    mask = mask.repeat(1, 16 // pattern.group)
    packed = pack((torch.arange(1, 17) * mask).to(BRAIN), pattern, mask)
    for first in (0, 8):
        units = torch.eye(16, dtype=BRAIN)[first : first + 8]
        ours = by_cuda.product(packed, units, None, form, program)
        assert torch.equal(ours, reference.product(packed, units))


def test_what_there_are_programs_for():
    """2:4, 4:8 and 8:16 with rows of whole segments of 16; other patterns and lengths have the Triton program."""
    for pattern, inputs, expected in (("2:4", 32, True), ("2:4", 24, False), ("4:8", 16, True), ("1:4", 32, False)):
        weight = torch.zeros(3, inputs, dtype=BRAIN)
        packed, x = pack(weight, Pattern.parse(pattern)), torch.zeros(2, inputs, dtype=BRAIN)
        assert by_cuda.fits(packed, x) is expected
        assert not by_cuda.usable(packed, x) and not by_cuda.fits(packed, x.half())


def test_a_failed_compilation_is_said_once(monkeypatch, caplog):
    """Without a compiler the log says why, once, and the program is not asked for again."""
    tried = []

    def compiled(source, name, **options):
        tried.append(options)
        raise RuntimeError("no NVRTC\nand a long log")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", compiled)
    monkeypatch.setattr(by_cuda, "kernel", by_cuda.kernel.__wrapped__)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with caplog.at_level(logging.WARNING, "nmbench"):
        assert by_cuda.kernel(4, BRAIN, torch.device("cuda:0"), Launch()) is None
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no NVRTC"]
    assert "-DGROUP=4" in tried[0]["nvcc_options"] and "-DBRAIN=1" in tried[0]["nvcc_options"]


def test_layers_use_triton_where_cuda_does_not_compile(monkeypatch):
    """The order of choice: the CUDA program, the Triton program, the unpacked weight."""
    packed, x = pack(torch.zeros(3, 32, dtype=BRAIN), PATTERNS[0]), torch.zeros(2, 32, dtype=BRAIN)
    found = []
    for cuda, triton in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(launch, "by_cuda", SimpleNamespace(usable=lambda *_, cuda=cuda: cuda))
        monkeypatch.setattr(launch, "by_triton", SimpleNamespace(usable=lambda *_, triton=triton: triton))
        found.append(launch.program_of(packed, x))
    assert found == ["cuda", "triton", None]


@pytest.mark.parametrize("capability", [80, 90])
@in_pattern
def test_the_source_compiles_without_a_gpu(pattern, capability):
    """NVRTC, without headers, makes machine code of the usual form for both dtypes."""
    for dtype in (BRAIN, HALF):
        assert by_cuda.NAME.encode() in assembled(capability, pattern.group, dtype, Launch())


@on_gpu
@in_pattern
@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_compiled_program_agrees_with_plain_torch(pattern, dtype, tokens):
    """The same law on a GPU, and the program that a layer uses there is this one."""
    for rows, segments, form in (
        (77, 401, Launch()),
        (4096, 16, Launch(4, 4, True, 2)),
        (1, 1, Launch(16, 1, False, 1)),
    ):
        packed, x, bias = problem(pattern, rows, segments, tokens, dtype, tokens)
        packed, x, bias = packed.to("cuda"), x.cuda(), bias.cuda()
        assert launch.program_of(packed, x) == "cuda"
        agree(packed, x, bias if tokens % 2 else None, form)


@on_gpu
def test_compiled_program_is_captured_by_a_graph():
    """A graph of a layer, captured after a first call, follows its input; equal inputs give equal bits."""
    pattern = PATTERNS[0]
    packed, x, bias = problem(pattern, 100, 64, 3, BRAIN, 0)
    layer, given = PackedLinear(packed, bias).cuda(), x.cuda()
    with torch.inference_mode():
        out = torch.empty(3, 100, dtype=BRAIN, device="cuda")
        graph = graph_of(lambda: out.copy_(layer(given)))
        for seed in range(3):
            given.copy_(strategies.values("normal", x.shape, seed).to(BRAIN))
            graph.replay()
            assert torch.equal(out, layer(given))
