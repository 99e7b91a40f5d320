"""The fused MaskPro step as Triton programs: redraw, update, draw and mask in one pass over logits and weights.

`launch` imports this module at the first launch, because most machines have no Triton. `reference` computes the same in
plain torch; `group_program` has the arithmetic inside a group.

One row of a program's tensors is a *chunk*, 8 consecutive weights: two groups of 4 or one of 8, one call of Philox, and
accesses of 16 bytes. One thread holds all members of a chunk, as tuples of [BLOCK] tensors. No mask is stored: the old
mask is drawn again from the old logits and the counters of the step before.

Source: arXiv 2506.12876; Philox: Salmon et al., SC 2011.
"""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl

from nmbench_plugins.maskpro.kernels.group_program import draw, exponents_of, is_kept, largest, updated

MASK_STREAM = tl.constexpr(0)
ROUNDING_STREAM = tl.constexpr(1)


@triton.jit(do_not_specialize=["key_low", "key_high", "first", "quads"])
def step_program(
    logits,  # float32 [n], or int32 [n / 2]: two float16 each
    weight,  # int32 [n], or [n / 2]: two of 16 bits each
    out,  # like weight
    scale,  # float32 [1]
    step,  # int64 [1]
    key_low: tl.int32,
    key_high: tl.int32,
    first: tl.int64,  # counter of the first chunk
    quads: tl.int32,  # n / 4
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    UPDATE: tl.constexpr,
    DRAW: tl.constexpr,
    WIDE: tl.constexpr,  # 32-bit weights
    WHOLE: tl.constexpr,  # no chunk is cut in half by the end
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    half = logits.dtype.element_ty == tl.int32
    old = _load_logits(logits, chunk, quads, WHOLE)
    now = tl.load(step)
    if DRAW:
        dense = _load_words(weight, chunk, quads, WIDE, WHOLE)
    new = old
    if UPDATE:
        factor = tl.load(scale)
        words = _philox(chunk, first, now - 1, MASK_STREAM, key_low, key_high, ROUNDS)
        new = ()
        for j in tl.static_range(8 // GROUP):
            new += updated(_part(old, j, GROUP), _part(words, j, KEEP), factor, KEEP)
        if half:
            new = _store_halves(
                logits, new, _philox(chunk, first, now, ROUNDING_STREAM, key_low, key_high, ROUNDS), chunk, quads, WHOLE
            )
        else:
            _store_words(logits, new, chunk, quads, True, WHOLE)
    if DRAW:
        words = _philox(chunk, first, now, MASK_STREAM, key_low, key_high, ROUNDS)
        inside = ()
        for j in tl.static_range(8 // GROUP):
            exponents = exponents_of(_part(new, j, GROUP), KEEP)
            kept, _ = draw(exponents, _part(words, j, KEEP))
            inside += is_kept(exponents, kept)
        _store_words(out, _masked(dense, inside, WIDE), chunk, quads, WIDE, WHOLE)


@triton.jit(do_not_specialize=["quads"])
def greedy_program(
    logits,  # as in step_program
    weight,
    out,
    quads: tl.int32,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = _load_logits(logits, chunk, quads, WHOLE)
    dense = _load_words(weight, chunk, quads, WIDE, WHOLE)
    inside = ()
    for j in tl.static_range(8 // GROUP):
        inside += largest(_part(values, j, GROUP), KEEP)
    _store_words(out, _masked(dense, inside, WIDE), chunk, quads, WIDE, WHOLE)


# Random words


@triton.jit
def _philox(chunk, first, step, stream, key_low, key_high, ROUNDS: tl.constexpr):
    """Return four uint32 words for every chunk: counter (first + chunk as 64 bits, step, stream), key the seed."""
    counter = first + chunk
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = step.to(tl.uint32)
    c3 = tl.full([], stream, tl.uint32)
    k0 = key_low.to(tl.uint32, bitcast=True)
    k1 = key_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(ROUNDS):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = odd.to(tl.uint32)
        c3 = even.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return (c0, c1, c2, c3)


# Memory


@triton.jit
def _load_logits(logits, chunk, quads, WHOLE: tl.constexpr):
    """Return the 8 float32 logits of every chunk."""
    if logits.dtype.element_ty == tl.float32:
        result = _load_words(logits, chunk, quads, True, WHOLE)
    else:
        words = _load_words(logits, chunk, quads, False, WHOLE)
        result = ()
        for i in tl.static_range(4):
            for shift in tl.static_range(0, 32, 16):
                bits = (words[i] >> shift).to(tl.uint16)
                result += (bits.to(tl.float16, bitcast=True).to(tl.float32),)
    return result


@triton.jit
def _store_halves(logits, values, words, chunk, quads, WHOLE: tl.constexpr):
    """Round values to float16 at random without bias, store them, and return the stored values as float32.

    After multiplication by 2^-112 the exponent of a float32 is that of the float16, also below the normal range of
    float16. 13 random bits are added, then the 13 bits too many are dropped. Values beyond the range of float16 become
    the largest float16.
    """
    packed = ()
    rounded = ()
    for i in tl.static_range(8):
        draw = ((words[i // 2] >> (16 * (i % 2))) & 0x1FFF).to(tl.int32)
        size = tl.minimum(tl.abs(values[i]), 65504.0) * 2.0**-112
        bits = (size.to(tl.int32, bitcast=True) + draw) >> 13
        sign = (values[i].to(tl.int32, bitcast=True) >> 16) & 0x8000
        packed += (bits | sign,)
        rounded += (packed[i].to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),)
    pairs = ()
    for i in tl.static_range(4):
        pairs += (packed[2 * i] | (packed[2 * i + 1] << 16),)
    _store_words(logits, pairs, chunk, quads, False, WHOLE)
    return rounded


@triton.jit
def _masked(words, inside, WIDE: tl.constexpr):
    """Return words of weights in which the bits of dropped weights are 0, which is +0.0."""
    result = ()
    for i in tl.static_range(len(words)):
        if WIDE:
            bits = tl.where(inside[i], -1, 0)
        else:
            bits = tl.where(inside[2 * i], 0xFFFF, 0) | tl.where(inside[2 * i + 1], -0x10000, 0)
        result += (words[i] & bits,)
    return result


@triton.jit
def _load_words(source, chunk, quads, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Load the 32-bit words of every chunk as 8 (WIDE) or 4 tensors, 16 bytes at a time; 0 beyond the end."""
    if WIDE:
        low = tl.load(_address(source, chunk, 8, 0), mask=_in_range(chunk, quads, 0, WIDE, WHOLE), other=0)
        high = tl.load(_address(source, chunk, 8, 4), mask=_in_range(chunk, quads, 1, WIDE, WHOLE), other=0)
        result = _split(low) + _split(high)
    else:
        result = _split(tl.load(_address(source, chunk, 4, 0), mask=_in_range(chunk, quads, 0, WIDE, WHOLE), other=0))
    return result


@triton.jit
def _store_words(target, words, chunk, quads, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Store words as `_load_words` loads them."""
    tl.store(
        _address(target, chunk, len(words), 0), _join(_part(words, 0, 4)), mask=_in_range(chunk, quads, 0, WIDE, WHOLE)
    )
    if WIDE:
        tl.store(_address(target, chunk, 8, 4), _join(_part(words, 1, 4)), mask=_in_range(chunk, quads, 1, WIDE, WHOLE))


@triton.jit
def _address(base, chunk, WORDS: tl.constexpr, OFFSET: tl.constexpr):
    """Return pointers to 4 words from OFFSET on in chunks of WORDS words, [BLOCK, 4]."""
    return base + chunk.to(tl.int64)[:, None] * WORDS + (OFFSET + tl.arange(0, 4))[None, :]


@triton.jit
def _in_range(chunk, quads, j: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Return which of the four words lie before the end, [BLOCK, 4] or [BLOCK, 1]; j: the half of a chunk, if WIDE."""
    quad = chunk[:, None] * 2
    if not WHOLE:
        if WIDE:
            quad = quad + j
        else:
            quad = quad + tl.arange(0, 4)[None, :] // 2
    return quad < quads


@triton.jit
def _split(tile):
    """Return the four columns of [BLOCK, 4]."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return (a, b, c, d)


@triton.jit
def _join(columns):
    """Return [BLOCK, 4] with these four columns."""
    even = tl.join(columns[0], columns[2])
    odd = tl.join(columns[1], columns[3])
    return tl.reshape(tl.join(even, odd), [columns[0].shape[0], 4])


@triton.jit
def _part(values, index: tl.constexpr, SIZE: tl.constexpr):
    """Return entries index * SIZE to (index + 1) * SIZE of a tuple."""
    result = ()
    for i in tl.static_range(SIZE):
        result += (values[index * SIZE + i],)
    return result
