"""The policy of one group inside the programs of `program`: draws, gradients and the largest logits.

A group is a tuple of tensors, one for every member. One thread holds all members of a group, so that threads exchange
nothing.

Draws are sequential, member after member, by inverse CDF. Weights are 2^exponent, exponent = (logit - level) * log2 e
with `level` the `keep`-th largest logit of the group, so that every draw finds a total weight of 1 or more. Exponents
are at most 36: words of 32 bits show no event as unlikely as a draw against such a weight. Small weights come first in
the cumulative sum and get the small u, where floats are finest: only events rarer than 2^-32 are lost, and a weight of
0 is never drawn. The low 2 or 3 bits of an exponent hold the index of the member, which changes the exponent by at most
2^-21 of its value, so that members are sorted as single numbers. Members are sorted by exponents, not by weights,
because exponents are the same on every machine; in another order the same words would draw another mask wherever two
logits nearly tie.

Gradients (arXiv 2506.12876) are as in `policy.closed_form` and `policy.subset_recursion`, but with weights and D on one
common scale, which cancels: no D is too small to divide by.
"""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # no inline assembly there
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(36.0)  # log2 of the largest weight


@triton.jit
def updated(group, words, factor, KEEP: tl.constexpr):
    """Return logits + factor * grad log P of the mask that `words` draw."""
    exponents = exponents_of(group, KEEP)
    kept, dropped = draw(exponents, words)
    gradient = _gradient(exponents, kept, dropped)
    result = ()
    for i in tl.static_range(len(group)):
        result += (group[i] + factor * gradient[i],)
    return result


@triton.jit
def exponents_of(group, KEEP: tl.constexpr):
    """Return log2 of the weight of every member, with the index in the low bits: no two in a group are equal."""
    level = _sorted(group)[len(group) - KEEP]
    result = ()
    for i in tl.static_range(len(group)):
        exponent = tl.minimum((group[i] - level) * LOG2_E, LARGEST)
        bits = (exponent.to(tl.int32, bitcast=True) & -len(group)) | i
        result += (bits.to(tl.float32, bitcast=True),)
    return result


@triton.jit
def draw(exponents, words):
    """Draw len(words) members one by one; return the exponents of the kept and the weights of the dropped."""
    left = _sorted(exponents)
    weights = _exp2_each(left)
    kept = ()
    for k in tl.static_range(len(words)):
        chosen, left, weights = _pick(left, weights, words[k])
        kept += (chosen,)
    return kept, weights


@triton.jit
def _pick(members, weights, word):
    """Draw once from ascending weights; return the drawn member, the other members, and the weights of the others."""
    last: tl.constexpr = len(members) - 1
    reach = (weights[0],)
    for i in tl.static_range(last):
        reach += (reach[i] + weights[i + 1],)
    u = word.to(tl.float32) * 2.0**-32 + 2.0**-33  # in the middle of one of 2^32 cells
    x = u * reach[last]
    chosen = members[last]
    others = ()
    other_weights = ()
    for i in tl.static_range(last):
        others += (tl.where(x < reach[i], members[i + 1], members[i]),)
        other_weights += (tl.where(x < reach[i], weights[i + 1], weights[i]),)
        chosen = tl.where(x < reach[last - 1 - i], members[last - 1 - i], chosen)
    return chosen, others, other_weights


@triton.jit
def _gradient(exponents, kept, dropped):
    """Return grad log P of the drawn set: gains of the kept members, -(w_k / D) * (sum of gains) of the dropped."""
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
    """Return the gradient of the kept divided by D, at most 2 / w for each, also where D is 0."""
    if len(kept) == 1:
        result = (_reciprocal(total + kept[0]),)
    elif len(kept) == 2:
        result = _gain_of_two(kept[0], kept[1], total)
    else:
        result = _gain_of_many(kept, total)
    return result


@triton.jit
def _gain_of_two(a, b, total):
    """As `closed_form`: e_a (e_a + p_D) / (e_a + e_b) with e = D / (D + w), p_D = D / (D + a + b), all divided by D."""
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
    """As `subset_recursion`, with subsets as bit masks and (1 + y_k) / (1 + Y_B) as (D + w_k) / (D + W_B)."""
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
    """Return G_i of the whole set, from M_i and G_i of all subsets with i, small subsets first."""
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
def is_kept(exponents, kept):
    """Return for each member whether that member is among the kept."""
    result = ()
    for i in tl.static_range(len(exponents)):
        inside = exponents[i] == kept[0]
        for k in tl.static_range(1, len(kept)):
            inside = inside | (exponents[i] == kept[k])
        result += (inside,)
    return result


@triton.jit
def largest(values, KEEP: tl.constexpr):
    """Return the mask of the KEEP largest members, the lower index among equals, by counting larger members."""
    result = ()
    for i in tl.static_range(len(values)):
        larger = tl.full(values[0].shape, 0, tl.int32)
        for k in tl.static_range(len(values)):
            if k < i:
                larger += (values[k] >= values[i]).to(tl.int32)
            if k > i:
                larger += (values[k] > values[i]).to(tl.int32)
        result += (larger < KEEP,)
    return result


@triton.jit
def _sorted(values):
    """Sort a tuple of 4 or 8 in ascending order by Batcher's networks; unused entries are not computed."""
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


# Approximate functions


@triton.jit
def _exp2(x):
    """Return 2^x by one instruction, with a relative error of 2^-22; results below 2^-126 are 0."""
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
    """Return 1 / x by one instruction, with an error of one unit in the last place."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y
