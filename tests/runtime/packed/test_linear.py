"""A packed layer computes what the dense one computes: bit for bit by unpacking, to rounding by the Triton program."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmbench.pattern import Pattern
from nmbench.runtime import PackedLinear, pack, triton_available, unpack
from nmbench.runtime.packed import by_triton, launch, reference
from nmbench.runtime.packed.by_triton import Launch, bytes_of_code
from nmbench.testing import strategies
from reference import triton_language
from reference.processes import WITHOUT_TRITON

PATTERNS = [Pattern.parse(p) for p in ("2:4", "1:4", "1:2", "4:8", "8:16", "6:8", "4:6", "2:8", "3:5", "1:16", "8:10")]
MODULE = "nmbench.runtime.packed.program"
few = settings(max_examples=4, deadline=None)
on_gpu = pytest.mark.skipif(not triton_available("cuda"), reason="needs an NVIDIA GPU and Triton")
in_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@pytest.fixture(scope="module")
def interpreted():
    with triton_language.interpreted(MODULE, own=["sum"]) as module:
        yield module


@pytest.fixture
def compiled():
    with triton_language.compiled():
        yield


def weight_of(pattern: Pattern, rows: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = strategies.values("normal", (rows, inputs), seed)
    return (weight * pattern.top(weight.abs()) + 0.0).to(dtype)


def agree(
    pattern: Pattern,
    rows: int,
    groups: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
    launched: Launch | None,
    where: Any,
) -> None:
    """Program and plain torch agree to the rounding of the result and of the order of a float32 sum."""
    device = "cpu" if where else "cuda"
    packed = pack(weight_of(pattern, rows, groups * pattern.group, dtype, seed), pattern).to(device)
    x = strategies.values("normal", (tokens, packed.inputs), seed + 1).to(dtype).to(device)
    bias = strategies.values("normal", (rows,), seed + 2).to(dtype).to(device) if seed % 2 else None
    ours = by_triton.product(packed, x, bias, launched, where)
    theirs = reference.product(packed, x, bias)
    assert ours.dtype == dtype and ours.shape == (tokens, rows)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=rounding, atol=1e-5 * packed.inputs**0.5)


@in_pattern
@few
@given(
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 8),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
    st.sampled_from([None, Launch(2, 16), Launch(8, 32)]),
)
def test_program_agrees_with_plain_torch(interpreted, pattern, rows, groups, tokens, dtype, seed, launched):
    """Any pattern, odd rows, any number of groups and 1 to 8 vectors: products are those of plain torch."""
    agree(pattern, rows, groups, tokens, dtype, seed, launched, interpreted)


def test_nothing_beyond_the_rows_is_read(interpreted):
    """NaN in the memory behind values and inputs does not reach a product, and no other memory is written."""
    pattern = Pattern(2, 4)
    packed = pack(weight_of(pattern, 3, 20, torch.float16), pattern)
    beyond = torch.full((64,), torch.nan, dtype=torch.float16)
    values = torch.cat([packed.values.flatten(), beyond])[: packed.values.numel()].view_as(packed.values)
    x = torch.cat([torch.ones(20, dtype=torch.float16), beyond])[:20].view(1, 20)
    ours = by_triton.product(type(packed)(values, packed.codes, pattern, 20), x, programs=interpreted)
    torch.testing.assert_close(ours, reference.product(packed, x), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(4, 6)], ids=str)
def test_program_compiles_without_a_gpu(pattern, monkeypatch):
    """The program compiles for compute capability 9.0, and reads values in words of 16 bytes a lane where N allows."""
    triton = importlib.import_module("triton")
    program, target = importlib.import_module(MODULE), importlib.import_module("triton.backends.compiler").GPUTarget
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the usual choice, which newer versions want to be told
    launched = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.update(arguments=arguments, constants=constants)

    packed = pack(weight_of(pattern, 8, 32 * pattern.group, torch.bfloat16), pattern)
    by_triton.product(
        packed, torch.ones(2, packed.inputs).bfloat16(), programs=type("P", (), {"product_program": Recorder()})
    )
    constants = {name: value for name, value in launched["constants"].items() if name.isupper()}
    names = program.product_program.arg_names
    words = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bfloat16: "*bf16"}
    given = zip(names, launched["arguments"], strict=False)
    signature = {name: words[value.dtype] if isinstance(value, Tensor) else "i32" for name, value in given}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*names[:5], "groups", "code_bytes")}
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = triton.compiler.ASTSource(program.product_program, signature, constants, aligned)
    options = {"num_warps": launched["constants"]["num_warps"]}
    assembly = triton.compile(source, target=target("cuda", 90, 32), options=options).asm["ptx"]
    assert ("ld.global.v4.b32" in assembly or "ld.global.v2.b64" in assembly) or pattern.group == 6
    assert "bar.sync" not in assembly


@on_gpu
@pytest.mark.usefixtures("compiled")
@in_pattern
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_compiled_program_agrees_with_plain_torch(pattern, tokens):
    """The same law on a GPU."""
    agree(pattern, 77, 400, tokens, torch.bfloat16, tokens, None, None)


@on_gpu
@pytest.mark.usefixtures("compiled")
def test_layer_uses_the_program_on_a_gpu():
    """A packed layer on a GPU multiplies one token by the program and many tokens by the unpacked weight."""
    pattern = Pattern(2, 4)
    dense = nn.Linear(64, 33, dtype=torch.bfloat16)
    dense.weight.data = weight_of(pattern, 33, 64, torch.bfloat16)
    packed = PackedLinear.of(dense, pattern).cuda()
    for tokens in (1, 8, 9):
        x = torch.randn(tokens, 1, 64).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(packed(x.cuda()).cpu(), dense(x), rtol=2e-2, atol=2e-2)


@in_pattern
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layer_is_the_dense_layer(pattern, bias, dtype):
    """On a CPU the output of a packed layer, and its unpacked weight, are those of the dense layer, bit for bit."""
    dense = nn.Linear(3 * pattern.group, 7, bias=bias, dtype=dtype)
    dense.weight.data = weight_of(pattern, 7, 3 * pattern.group, dtype)
    packed = PackedLinear.of(dense, pattern)
    x = strategies.values("normal", (2, 5, dense.in_features), 3).to(dtype)
    assert torch.equal(packed(x), dense(x))
    assert torch.equal(packed.weight, dense.weight)


def test_packed_layer_is_the_transposed_layer():
    """A Conv1D of GPT-2, which stores its weight `[in, out]`, gives the same outputs bit for bit."""
    pattern, dense = Pattern(4, 8), Conv1D(6, 16)
    dense.weight.data = weight_of(pattern, 6, 16, torch.float32).t().contiguous()
    nn.init.normal_(dense.bias)
    packed = PackedLinear.of(dense, pattern)
    x = strategies.values("normal", (2, 5, 16), 3)
    assert torch.equal(packed(x), dense(x))
    assert torch.equal(packed.weight, dense.weight)


def test_gradients_reach_the_inputs():
    """A packed layer passes gradients on to its inputs; inputs that need them are not given to the program."""
    dense = nn.Linear(8, 3)
    dense.weight.data = weight_of(Pattern(2, 4), 3, 8, torch.float32)
    packed = PackedLinear.of(dense, Pattern(2, 4))
    x = torch.ones(2, 8, requires_grad=True)
    packed(x).sum().backward()
    assert torch.equal(x.grad, dense.weight.sum(dim=0).expand(2, 8).detach())
    half = pack(dense.weight.detach().half(), Pattern(2, 4))
    assert by_triton.fits(half, x.detach().half()) and not by_triton.fits(half, x.half())


def test_what_there_are_programs_for():
    """16-bit weights and inputs of one dtype, whole groups of at most 16, 1 to 8 tokens, on NVIDIA GPUs."""
    pattern = Pattern(2, 4)
    packed = pack(weight_of(pattern, 3, 8, torch.bfloat16), pattern)
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    assert by_triton.fits(packed, x) and launch.program_of(packed, x) is None
    assert not by_triton.fits(packed, x.half()) and not by_triton.fits(packed, torch.ones(9, 8, dtype=torch.bfloat16))
    assert not by_triton.fits(pack(unpack(packed).float(), pattern), x.float())
    assert not by_triton.fits(pack(unpack(packed)[:, :6], pattern), x[:, :6])
    wide = Pattern(16, 32)
    assert not by_triton.fits(pack(weight_of(wide, 1, 32, torch.bfloat16), wide), torch.ones(1, 32).bfloat16())


@pytest.mark.parametrize(
    ("bits", "expected"), [(1, 1), (2, 1), (3, 2), (4, 1), (6, 2), (8, 1), (10, 2), (13, 3), (16, 2)]
)
def test_the_bytes_of_a_code(bits, expected):
    """Codes of a power of two lie within a byte or fill bytes; others may begin within one byte and end in another."""
    assert bytes_of_code(bits) == expected


def test_the_launcher_needs_no_triton(python):
    """Where Triton is missing, packed layers work by unpacking."""
    program = (
        "import torch\nfrom nmbench.pattern import Pattern\nfrom nmbench.runtime import PackedLinear, pack\n"
        "layer = PackedLinear(pack(torch.tensor([[1.0, 0, 2, 0]]), Pattern(2, 4)))\n"
        "print(layer(torch.ones(1, 4)).item())\n"
    )
    done = python.run("-c", WITHOUT_TRITON + program)
    assert done.stdout.split() == ["3.0"], done.stderr
