"""Rounding of rows to FP8 as a Triton program, which `quantise` imports at the first launch. One program, one row."""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl


@triton.jit
def quantise_program(
    rows,  # [count, columns]
    out,  # float8 e4m3 [count, columns]
    scales,  # float32 [count, 1]
    columns: tl.int32,
    BLOCK: tl.constexpr,  # a power of two, at least columns
):
    """Divide a row by its largest magnitude / 448, and round."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(rows + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    scaled = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(out + row * columns + column, scaled.to(tl.float8e4nv), mask=inside)
