"""The fused MaskPro step as Triton programs: redraw, update, draw and mask in one pass over logits and weights.

Imported by `kernels` when it is first needed, because most machines have no Triton. `twin` is the same in plain torch.

One row of a program's tensors is a *chunk*, 8 consecutive weights: two groups of 4 or one of 8, one call of Philox, and
accesses of 16 bytes. All members of a chunk sit in one thread, as tuples of [BLOCK] tensors, so nothing is exchanged
between threads. No mask is stored: the old one is drawn again from the old logits and the counters of the step before.

Draws are sequential, member after member, by inverse CDF. Weights are 2^exponent, exponent = (logit - level) * log2 e
with `level` the `keep`-th largest logit of the group, so that every draw finds a total weight of 1 or more. Exponents
end at 36: with words of 32 bits nothing that unlikely is seen. Small weights come first in the cumulative sum and get
the small u, where floats are fine: only events rarer than 2^-32 are lost, and a weight of 0 is never drawn. The index
of a member is kept in the low 2 or 3 bits of its exponent, which changes that by 2^-21 of itself: members can be sorted
as single numbers. Their order comes from exponents, not from weights, because those are the same on every machine; in
another order the same words would draw another mask wherever two logits nearly tie.

Source: arXiv 2506.12876; Philox: Salmon et al., SC 2011. Gradients as in `pairs` and `subsets`, but with weights and D
on one common scale, which cancels: no D is too small to divide by.
"""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # no inline assembly there
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(36.0)  # log2 of the largest weight
ROUNDING_STREAM = tl.constexpr(2)  # streams 0 and 1 draw masks


@triton.jit(do_not_specialize=["key_low", "key_high", "first", "quads", "quads_per_row"])
def step_program(
    logits,  # float32 [n], or int32 [n / 2]: two float16 each
    weight,  # int32 [n], or [n / 2]: two of 16 bits each
    out_a,  # like weight
    out_b,  # like weight; only used if PAIR
    scale,  # float32 [1], or [rows] if PER_ROW
    step,  # int64 [1]
    key_low: tl.int32,
    key_high: tl.int32,
    first: tl.int64,  # counter of the first chunk
    quads: tl.int32,  # n / 4
    quads_per_row: tl.int32,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    UPDATE: tl.constexpr,
    DRAW: tl.constexpr,
    PAIR: tl.constexpr,
    PER_ROW: tl.constexpr,
    WIDE: tl.constexpr,  # 32-bit weights
    WHOLE: tl.constexpr,  # no chunk is cut in half by the end
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK  # chunks
    chunk = start + tl.arange(0, BLOCK)
    half = logits.dtype.element_ty == tl.int32
    old = _load_logits(logits, chunk, quads, WHOLE)
    now = tl.load(step)
    if DRAW:
        dense = _load_words(weight, chunk, quads, WIDE, WHOLE)
    if UPDATE:
        factors = ()
        for j in tl.static_range(8 // GROUP):
            factors += (_factor(scale, chunk * 2 + j, quads, quads_per_row, PER_ROW),)
    new = old
    if UPDATE:
        words_a = _philox(chunk, first, now - 1, 0, key_low, key_high, ROUNDS)
        words_b = words_a
        if PAIR:
            words_b = _philox(chunk, first, now - 1, 1, key_low, key_high, ROUNDS)
        new = ()
        for j in tl.static_range(8 // GROUP):
            group = _part(old, j, GROUP)
            new += _updated(group, _part(words_a, j, KEEP), _part(words_b, j, KEEP), factors[j], KEEP, PAIR)
        if half:
            new = _store_halves(
                logits, new, _philox(chunk, first, now, ROUNDING_STREAM, key_low, key_high, ROUNDS), chunk, quads, WHOLE
            )
        else:
            _store_words(logits, new, chunk, quads, True, WHOLE)
    if DRAW:
        words_a = _philox(chunk, first, now, 0, key_low, key_high, ROUNDS)
        words_b = words_a
        if PAIR:
            words_b = _philox(chunk, first, now, 1, key_low, key_high, ROUNDS)
        inside_a = ()
        inside_b = ()
        for j in tl.static_range(8 // GROUP):
            exponents = _exponents(_part(new, j, GROUP), KEEP)
            kept, _ = _draw(exponents, _part(words_a, j, KEEP))
            inside_a += _inside(exponents, kept)
            if PAIR:
                kept, _ = _draw(exponents, _part(words_b, j, KEEP))
                inside_b += _inside(exponents, kept)
        _store_words(out_a, _masked(dense, inside_a, WIDE), chunk, quads, WIDE, WHOLE)
        if PAIR:
            _store_words(out_b, _masked(dense, inside_b, WIDE), chunk, quads, WIDE, WHOLE)


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
        inside += _largest(_part(values, j, GROUP), KEEP)
    _store_words(out, _masked(dense, inside, WIDE), chunk, quads, WIDE, WHOLE)


# Update and draw of one group


@triton.jit
def _updated(group, words_a, words_b, factor, KEEP: tl.constexpr, PAIR: tl.constexpr):
    """Logits + factor * grad log P of the mask drawn by words_a, with PAIR less that of the one drawn by words_b."""
    exponents = _exponents(group, KEEP)
    kept, dropped = _draw(exponents, words_a)
    gradient = _gradient(exponents, kept, dropped)
    if PAIR:
        kept_b, dropped_b = _draw(exponents, words_b)
        gradient_b = _gradient(exponents, kept_b, dropped_b)
        # Where both masks are the same the factor is 0: the order of the draws would leave a difference of rounding.
        same = _same(_inside(exponents, kept), _inside(exponents, kept_b))
        factor = tl.where(same, 0.0, factor)
    result = ()
    for i in tl.static_range(len(group)):
        slope = gradient[i]
        if PAIR:
            slope = slope - gradient_b[i]
        result += (group[i] + factor * slope,)
    return result


@triton.jit
def _exponents(group, KEEP: tl.constexpr):
    """log2 of the weight of every member, its index in the low bits: no two of a group are equal."""
    level = _sorted(group)[len(group) - KEEP]
    result = ()
    for i in tl.static_range(len(group)):
        exponent = tl.minimum((group[i] - level) * LOG2_E, LARGEST)
        bits = (exponent.to(tl.int32, bitcast=True) & -len(group)) | i
        result += (bits.to(tl.float32, bitcast=True),)
    return result


@triton.jit
def _draw(exponents, words):
    """Draw len(words) members, one by one; returns the exponents of the kept and the weights of the dropped."""
    left = _sorted(exponents)
    weights = _exp2_each(left)
    kept = ()
    for k in tl.static_range(len(words)):
        chosen, left, weights = _pick(left, weights, words[k])
        kept += (chosen,)
    return kept, weights


@triton.jit
def _pick(members, weights, word):
    """One draw from ascending weights: returns the member drawn, the others, and their weights."""
    last: tl.constexpr = len(members) - 1
    reach = (weights[0],)
    for i in tl.static_range(last):
        reach += (reach[i] + weights[i + 1],)
    u = word.to(tl.float32) * 2.0**-32 + 2.0**-33  # in the middle of one of 2^32 cells
    x = u * reach[last]
    chosen = members[last]
    others = ()
    their_weights = ()
    for i in tl.static_range(last):
        others += (tl.where(x < reach[i], members[i + 1], members[i]),)
        their_weights += (tl.where(x < reach[i], weights[i + 1], weights[i]),)
        chosen = tl.where(x < reach[last - 1 - i], members[last - 1 - i], chosen)
    return chosen, others, their_weights


@triton.jit
def _gradient(exponents, kept, dropped):
    """Grad log P of the drawn set, member by member: gains of the kept, -(w_k / D) * (sum of gains) of the dropped."""
    total = dropped[0]  # D
    for i in tl.static_range(1, len(dropped)):
        total = total + dropped[i]
    gain = _gain(_exp2_each(kept), total)  # divided by D
    sum_of_gains = gain[0]
    for i in tl.static_range(1, len(gain)):
        sum_of_gains = sum_of_gains + gain[i]
    result = ()
    for i in tl.static_range(len(exponents)):
        slope = -_exp2(exponents[i]) * sum_of_gains
        for k in tl.static_range(len(kept)):
            slope = tl.where(exponents[i] == kept[k], total * gain[k], slope)
        result += (slope,)
    return result


@triton.jit
def _gain(kept, total):
    """Gradient of the kept divided by D, which may be 0: each is at most 2 / w."""
    if len(kept) == 1:
        result = (_reciprocal(total + kept[0]),)
    elif len(kept) == 2:
        result = _gain_of_two(kept[0], kept[1], total)
    else:
        result = _gain_of_many(kept, total)
    return result


@triton.jit
def _gain_of_two(a, b, total):
    """`pairs`: e_a (e_a + p_D) / (e_a + e_b) with e = D / (D + w), p_D = D / (D + a + b), all divided by D."""
    to_a = total + a
    to_b = total + b
    both = _reciprocal(to_a * to_b)
    e_a = to_b * both
    e_b = to_a * both
    share = _reciprocal(total + (a + b))
    norm = _reciprocal(e_a + e_b)
    return (e_a * norm * (e_a + share), e_b * norm * (e_b + share))


@triton.jit
def _gain_of_many(kept, total):
    """`subsets`, with subsets as bit masks and (1 + y_k) / (1 + Y_B) as (D + w_k) / (D + W_B)."""
    one = total * 0.0 + 1.0
    zero = total * 0.0
    inverse = (one,)  # 1 / (D + W_B)
    lift = (one,)
    for subset in tl.static_range(1, 1 << len(kept)):
        weight = total
        for k in tl.static_range(len(kept)):
            if (subset >> k) & 1:
                weight = weight + kept[k]
        inverse += (_reciprocal(weight),)
        sum_of_lifts = zero
        for k in tl.static_range(len(kept)):
            if (subset >> k) & 1:
                sum_of_lifts += (total + kept[k]) * lift[subset - (1 << k)]
        lift += (sum_of_lifts * inverse[subset],)
    result = ()
    for i in tl.static_range(len(kept)):
        gain = _gain_of_one(kept, i, total, inverse)
        result += (gain * _reciprocal(lift[len(lift) - 1] * (total + kept[i])),)
    return result


@triton.jit
def _gain_of_one(kept, i: tl.constexpr, total, inverse):
    """G_i of the whole set: misses and gains of all subsets with i, small ones first."""
    zero = total * 0.0
    misses = (zero,)
    gains = (zero,)
    for subset in tl.static_range(1, 1 << len(kept)):
        miss = zero
        gain = zero
        if (subset >> i) & 1:
            if subset == 1 << i:
                miss = zero + 1.0
            for k in tl.static_range(len(kept)):
                if ((subset >> k) & 1) and k != i:
                    chance = (total + kept[k]) * inverse[subset]
                    miss += chance * misses[subset - (1 << k)]
                    gain += chance * gains[subset - (1 << k)]
            gain += (total + kept[i]) * inverse[subset] * miss
        misses += (miss,)
        gains += (gain,)
    return gains[len(gains) - 1]


@triton.jit
def _inside(exponents, kept):
    """Whether each member is among the kept."""
    result = ()
    for i in tl.static_range(len(exponents)):
        inside = exponents[i] == kept[0]
        for k in tl.static_range(1, len(kept)):
            inside = inside | (exponents[i] == kept[k])
        result += (inside,)
    return result


@triton.jit
def _same(a, b):
    same = a[0] == b[0]
    for i in tl.static_range(1, len(a)):
        same = same & (a[i] == b[i])
    return same


@triton.jit
def _largest(values, KEEP: tl.constexpr):
    """Mask of the KEEP largest; equal ones: lower index wins. Counts for every member how many beat it."""
    result = ()
    for i in tl.static_range(len(values)):
        beaten = tl.full(values[0].shape, 0, tl.int32)
        for k in tl.static_range(len(values)):
            if k < i:
                beaten += (values[k] >= values[i]).to(tl.int32)
            if k > i:
                beaten += (values[k] > values[i]).to(tl.int32)
        result += (beaten < KEEP,)
    return result


@triton.jit
def _sorted(values):
    """Ascending tuple of 4 or 8, by Batcher's networks; what is not used is not computed."""
    if len(values) == 4:
        result = _sorted_four(values[0], values[1], values[2], values[3])
    else:
        a, b, c, d = _sorted_four(values[0], values[1], values[2], values[3])
        e, f, g, h = _sorted_four(values[4], values[5], values[6], values[7])
        a, e = tl.minimum(a, e), tl.maximum(a, e)
        b, f = tl.minimum(b, f), tl.maximum(b, f)
        c, g = tl.minimum(c, g), tl.maximum(c, g)
        d, h = tl.minimum(d, h), tl.maximum(d, h)
        c, e = tl.minimum(c, e), tl.maximum(c, e)
        d, f = tl.minimum(d, f), tl.maximum(d, f)
        b, c = tl.minimum(b, c), tl.maximum(b, c)
        d, e = tl.minimum(d, e), tl.maximum(d, e)
        f, g = tl.minimum(f, g), tl.maximum(f, g)
        result = (a, b, c, d, e, f, g, h)
    return result


@triton.jit
def _sorted_four(a, b, c, d):
    a, b = tl.minimum(a, b), tl.maximum(a, b)
    c, d = tl.minimum(c, d), tl.maximum(c, d)
    a, c = tl.minimum(a, c), tl.maximum(a, c)
    b, d = tl.minimum(b, d), tl.maximum(b, d)
    b, c = tl.minimum(b, c), tl.maximum(b, c)
    return (a, b, c, d)


# Random words and approximate functions


@triton.jit
def _philox(chunk, first, step, stream, key_low, key_high, ROUNDS: tl.constexpr):
    """Four uint32 words of every chunk: counter (first + chunk as 64 bits, step, stream), key the seed."""
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


@triton.jit
def _exp2(x):
    """One instruction, relative error 2^-22; results below 2^-126 are 0."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _exp2_each(values):
    result = ()
    for i in tl.static_range(len(values)):
        result += (_exp2(values[i]),)
    return result


@triton.jit
def _reciprocal(x):
    """One instruction, error of one unit in the last place."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


# Memory


@triton.jit
def _factor(scale, quad, quads, quads_per_row, PER_ROW: tl.constexpr):
    """The factor of every group: one for all, or that of its row."""
    if PER_ROW:
        row = (quad.to(tl.uint32) // quads_per_row.to(tl.uint32)).to(tl.int32)
        factor = tl.load(scale + row, mask=quad < quads, other=0.0)
    else:
        factor = tl.load(scale)
    return factor


@triton.jit
def _load_logits(logits, chunk, quads, WHOLE: tl.constexpr):
    """The 8 float32 logits of every chunk."""
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
    """Round to float16 at random without bias, store, and return what was stored as float32.

    Times 2^-112 the exponent of a float32 is that of the float16, also below its normal range; the 13 bits too many are
    dropped after adding 13 random ones. Beyond the range of float16 the largest number is kept.
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
    """Words of weights with the bits of the dropped set to 0, which is +0.0."""
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
    """8 (WIDE) or 4 tensors of the 32-bit words of every chunk, by accesses of 16 bytes; 0 beyond the end."""
    if WIDE:
        low = tl.load(_address(source, chunk, 8, 0), mask=_live(chunk, quads, 0, WIDE, WHOLE), other=0)
        high = tl.load(_address(source, chunk, 8, 4), mask=_live(chunk, quads, 1, WIDE, WHOLE), other=0)
        result = _split(low) + _split(high)
    else:
        result = _split(tl.load(_address(source, chunk, 4, 0), mask=_live(chunk, quads, 0, WIDE, WHOLE), other=0))
    return result


@triton.jit
def _store_words(target, words, chunk, quads, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """The inverse of `_load_words`."""
    tl.store(
        _address(target, chunk, len(words), 0), _join(_part(words, 0, 4)), mask=_live(chunk, quads, 0, WIDE, WHOLE)
    )
    if WIDE:
        tl.store(_address(target, chunk, 8, 4), _join(_part(words, 1, 4)), mask=_live(chunk, quads, 1, WIDE, WHOLE))


@triton.jit
def _address(base, chunk, WORDS: tl.constexpr, OFFSET: tl.constexpr):
    """Pointers to 4 words from OFFSET on of chunks of WORDS words, [BLOCK, 4]."""
    return base + chunk.to(tl.int64)[:, None] * WORDS + (OFFSET + tl.arange(0, 4))[None, :]


@triton.jit
def _live(chunk, quads, j: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Which of the four words are not beyond the end, [BLOCK, 4] or [BLOCK, 1]; j: first or second half, if WIDE."""
    quad = chunk[:, None] * 2
    if not WHOLE:
        if WIDE:
            quad = quad + j
        else:
            quad = quad + tl.arange(0, 4)[None, :] // 2
    return quad < quads


@triton.jit
def _split(tile):
    """The four columns of [BLOCK, 4]."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return (a, b, c, d)


@triton.jit
def _join(columns):
    """The inverse of `_split`."""
    even = tl.join(columns[0], columns[2])
    odd = tl.join(columns[1], columns[3])
    return tl.reshape(tl.join(even, odd), [columns[0].shape[0], 4])


@triton.jit
def _part(values, index: tl.constexpr, SIZE: tl.constexpr):
    """Entries index * SIZE to (index + 1) * SIZE of a tuple."""
    result = ()
    for i in tl.static_range(SIZE):
        result += (values[index * SIZE + i],)
    return result
