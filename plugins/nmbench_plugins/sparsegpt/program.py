"""The sweep of one block of columns as a Triton program, which `launch` imports at the first launch.

A program keeps a few rows of the block in registers, as tiles of TILE columns. For one group after the other, the
program extracts the columns of the group from their tile as vectors, one entry a row. The N columns of the highest
|w| R_cc are kept, as TILE bits for each row and tile. For at most CHUNK columns at a time, the program computes errors
column by column, each after the updates by the columns before, and then updates all columns at once, including the
CHUNK. An update is 0 left of the diagonal; on the diagonal, an update takes a dropped weight to 0 up to rounding, and
`_store` writes 0.

Source: arXiv 2301.00774, algorithm 1; `sweep` defines the arguments.
"""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def sweep_program(
    weight,  # float32 [rows, WIDTH], the weight at the beginning of the block; repaired in place
    mask,  # uint8 [rows, WIDTH]
    spread,  # float32 [WIDTH, WIDTH], upper triangular
    pivots,  # float32 [WIDTH]
    rows: tl.int32,
    weight_stride: tl.int64,
    mask_stride: tl.int64,
    spread_stride: tl.int64,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    in_rows = row < rows
    start = row.to(tl.int64) * weight_stride
    tiles = ()
    for t in tl.static_range(TILES):
        inside = in_rows[:, None] & (t * TILE + column < WIDTH)[None, :]
        tiles += (tl.load(weight + start[:, None] + (t * TILE + column)[None, :], mask=inside, other=0.0),)
    for t in tl.static_range(TILES):
        kept = tl.full([ROWS], 0, tl.int32)  # bit c: column c of this tile
        for g in range(min(WIDTH - t * TILE, TILE) // GROUP):
            first = g * GROUP  # within the tile
            values = _columns(tiles[t], column, first, GROUP)
            kept |= _highest(values, pivots + t * TILE + first, KEEP) << first
            if GROUP <= CHUNK:
                tiles = _pruned(tiles, t, values, kept, pivots, spread, spread_stride, column, first, WIDTH)
            else:
                for c in range(0, GROUP, CHUNK):
                    part = _columns(tiles[t], column, first + c, CHUNK)
                    tiles = _pruned(tiles, t, part, kept, pivots, spread, spread_stride, column, first + c, WIDTH)
        _store(weight, mask, tiles[t], kept, row, t * TILE + column, in_rows, WIDTH, weight_stride, mask_stride)


@triton.jit
def _columns(tile, column, first, GROUP: tl.constexpr):
    """Return columns first, first + 1, ... of a tile [ROWS, TILE], each as [ROWS]."""
    result = ()
    for i in tl.static_range(GROUP):
        result += (tl.sum(tl.where((column == first + i)[None, :], tile, 0.0), axis=1),)
    return result


@triton.jit
def _highest(values, pivots, KEEP: tl.constexpr):
    """Return the KEEP highest |value| * pivot as bits [ROWS]; among equals the lower index wins."""
    scores = ()
    for i in tl.static_range(len(values)):
        scores += (tl.abs(values[i]) * tl.load(pivots + i),)
    bits = tl.full(values[0].shape, 0, tl.int32)
    for i in tl.static_range(len(values)):
        rank = tl.full(bits.shape, 0, tl.int32)
        for j in tl.static_range(len(values)):
            if j < i:
                rank += (scores[j] >= scores[i]).to(tl.int32)
            elif j > i:
                rank += (scores[j] > scores[i]).to(tl.int32)
        bits |= (rank < KEEP).to(tl.int32) << i
    return bits


@triton.jit
def _pruned(tiles, t: tl.constexpr, values, kept, pivots, spread, stride, column, first, WIDTH: tl.constexpr):
    """Return the tiles after pruning the columns `values` of tile t, which begin at column `first` of that tile."""
    TILE: tl.constexpr = tiles[t].shape[1]
    row = t * TILE + first
    spread += row.to(tl.int64) * stride
    errors = ()
    for i in tl.static_range(len(values)):
        value = values[i]
        for j in tl.static_range(i):  # updates by the columns before it in the group
            value -= errors[j] * tl.load(spread + j * stride + row + i)
        dropped = (kept >> (first + i)) & 1 == 0
        errors += (tl.where(dropped, value * tl.load(pivots + row + i), 0.0),)
    result = ()
    for j in tl.static_range(len(tiles)):
        tile = tiles[j]
        if j >= t:
            place = j * TILE + column
            for i in tl.static_range(len(values)):
                line = tl.load(spread + i * stride + place, mask=place < WIDTH, other=0.0)
                tile -= errors[i][:, None] * line[None, :]
        result += (tile,)
    return result


@triton.jit
def _store(weight, mask, tile, kept, row, place, in_rows, WIDTH: tl.constexpr, weight_stride, mask_stride):
    """Write one tile: +0.0 where dropped, but a value that is not finite stays, so that the sweep fails."""
    bits = (kept[:, None] >> (place % tile.shape[1])[None, :]) & 1
    inside = in_rows[:, None] & (place < WIDTH)[None, :]
    lost = (bits == 0) & (tl.abs(tile) < float("inf"))
    row = row.to(tl.int64)[:, None]
    tl.store(weight + row * weight_stride + place[None, :], tl.where(lost, 0.0, tile), mask=inside)
    tl.store(mask + row * mask_stride + place[None, :], bits.to(tl.uint8), mask=inside)
