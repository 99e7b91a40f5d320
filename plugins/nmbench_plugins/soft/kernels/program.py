"""The update of one layer as two Triton programs, each one pass over memory.

`write_program` draws the noise, computes the soft mask and writes W * m. `learn_program` computes noise and mask again,
takes the gradient of the live weight back to the logits, and takes the step of Adam. Nothing of the size of the layer
is stored besides logits and moments. `launch` imports this module at the first launch; `relaxation`, `noise` and
`Logits.update` are the same in torch, from the same counters.

One thread has one group: its members are tuples of [BLOCK] tensors.
"""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["groups", "salt"])
def write_program(
    logits,  # float32 [groups, GROUP]
    dense,  # [groups, GROUP]
    out,  # like dense
    keys,  # int32 [2]
    scales,  # float32 [2]: temperature, noise scale
    groups: tl.int32,
    salt: tl.int32,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    temperature = tl.load(scales)
    values = _members(logits, group, inside, GROUP)
    drawn = _drawn(values, group, tl.load(keys), tl.load(keys + 1), salt, tl.load(scales + 1), GROUP)
    rounds = _rounds(drawn, temperature, KEEP, GROUP, BLOCK)
    weights = _members(dense, group, inside, GROUP)
    for j in tl.static_range(GROUP):
        mask = rounds[j]
        for k in tl.static_range(1, KEEP):
            mask += rounds[k * (2 * GROUP + 1) + j]
        tl.store(out + group * GROUP + j, (weights[j] * mask).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["groups", "salt"])
def learn_program(
    logits,  # as in write_program; updated in place, as the moments are
    first,  # float32 [groups, GROUP]
    second,  # float32 [groups, GROUP]
    dense,
    gradient,  # like dense: of the live weight
    keys,
    scales,
    pace,  # float32 [4], of Adam
    groups: tl.int32,
    salt: tl.int32,
    EPSILON: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    temperature = tl.load(scales)
    noise_scale = tl.load(scales + 1)
    values = _members(logits, group, inside, GROUP)
    drawn = _drawn(values, group, tl.load(keys), tl.load(keys + 1), salt, noise_scale, GROUP)
    rounds = _rounds(drawn, temperature, KEEP, GROUP, BLOCK)
    weights = _members(dense, group, inside, GROUP)
    slopes = _members(gradient, group, inside, GROUP)
    slope = ()
    back = ()
    for j in tl.static_range(GROUP):
        slope += (slopes[j] * weights[j],)
        back += (tl.full([BLOCK], 0.0, tl.float32),)
    for k in tl.static_range(KEEP):
        back = _through(rounds, KEEP - 1 - k, slope, back, temperature, GROUP, BLOCK)
    blend_first = tl.load(pace)
    blend_second = tl.load(pace + 1)
    rate = tl.load(pace + 2)
    unbias = tl.load(pace + 3)
    means = _members(first, group, inside, GROUP)
    squares = _members(second, group, inside, GROUP)
    for j in tl.static_range(GROUP):
        now = back[j] / noise_scale
        mean = means[j] + blend_first * (now - means[j])
        square = squares[j] + blend_second * (now * now - squares[j])
        place = group * GROUP + j
        tl.store(first + place, mean, mask=inside)
        tl.store(second + place, square, mask=inside)
        step = mean * rate / (tl.sqrt(square * unbias) + EPSILON)
        tl.store(logits + place, values[j] - step, mask=inside)


# Inside a group


@triton.jit
def _rounds(keys, temperature, KEEP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return, for every round, GROUP times mu, GROUP times the softmax of the others, and the index of the lead."""
    result = ()
    for _ in tl.static_range(KEEP):
        top = keys[0]
        lead = tl.full([BLOCK], 0, tl.int32)
        for j in tl.static_range(1, GROUP):
            lead = tl.where(keys[j] > top, j, lead)
            top = tl.maximum(top, keys[j])
        scaled = ()  # from the largest key on, so that a low temperature does not enlarge its rounding
        for j in tl.static_range(GROUP):
            scaled += ((keys[j] - top) / temperature,)
        runner = tl.where(lead == 0, float("-inf"), scaled[0])
        for j in tl.static_range(1, GROUP):
            runner = tl.maximum(runner, tl.where(lead == j, float("-inf"), scaled[j]))
        total = tl.full([BLOCK], 0.0, tl.float32)
        for j in tl.static_range(GROUP):
            total += tl.where(lead == j, 0.0, tl.exp(scaled[j] - runner))
        log_rest = runner + tl.log(total)
        log_total = tl.log(1.0 + tl.exp(log_rest))
        chosen = ()
        rest = ()
        for j in tl.static_range(GROUP):
            chosen += (tl.exp(scaled[j] - log_total),)
            rest += (tl.where(lead == j, 0.0, tl.exp(scaled[j] - log_rest)),)
        fallen = ()
        for j in tl.static_range(GROUP):
            others = tl.where(lead == j, 0.0, chosen[j])
            fallen += (keys[j] + tl.where(lead == j, log_rest - log_total, tl.log(1.0 - others)),)
        keys = fallen
        result += chosen
        result += rest
        result += (lead,)
    return result


@triton.jit
def _through(rounds, k: tl.constexpr, slope, back, temperature, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the gradient of the keys before round k, from that of the keys after it (`back`) and of m (`slope`)."""
    FROM: tl.constexpr = k * (2 * GROUP + 1)
    lead = rounds[FROM + 2 * GROUP]
    weighted = tl.full([BLOCK], 0.0, tl.float32)
    whole = tl.full([BLOCK], 0.0, tl.float32)
    shared = tl.full([BLOCK], 0.0, tl.float32)
    leading = tl.full([BLOCK], 0.0, tl.float32)
    shares = ()
    for j in tl.static_range(GROUP):
        chosen = rounds[FROM + j]
        weighted += chosen * slope[j]
        whole += back[j]
        leading += tl.where(lead == j, back[j], 0.0)
        shares += (tl.where(lead == j, 0.0, back[j] / (1.0 - tl.where(lead == j, 0.0, chosen))),)
        shared += shares[j]
    result = ()
    for j in tl.static_range(GROUP):
        chosen = rounds[FROM + j]
        of_chosen = chosen * (slope[j] - weighted)
        of_fall = chosen * (shared - shares[j] - whole) + leading * rounds[FROM + GROUP + j]
        result += (back[j] + (of_chosen + of_fall) / temperature,)
    return result


@triton.jit
def _drawn(values, group, key_low, key_high, salt, noise_scale, GROUP: tl.constexpr):
    """Return logits / lam + Gumbel noise."""
    result = ()
    for j in tl.static_range(GROUP):
        bits = _mixed((group * GROUP + j).to(tl.uint32) ^ key_low.to(tl.uint32, bitcast=True))
        bits = (bits + key_high.to(tl.uint32, bitcast=True)) ^ salt.to(tl.uint32, bitcast=True)
        u = ((_mixed(bits) & 0x7FFFFFFF).to(tl.float32) + 0.5) * 2.0**-31
        u = tl.minimum(u, 1.0 - 2.0**-24)
        # log1p(-u): 1 - u rounds to 1 where u is small.
        small = u * (1.0 + u * (0.5 + u * (1.0 / 3 + u * 0.25)))
        exponential = tl.where(u < 0.01, small, -tl.log(1.0 - u))
        result += (values[j] / noise_scale - tl.log(exponential),)
    return result


@triton.jit
def _mixed(x):
    """Return the hash of `noise` of uint32 words."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


# Memory


@triton.jit
def _members(source, group, inside, GROUP: tl.constexpr):
    """Return the members of every group, in float32; 0 beyond the end."""
    result = ()
    for j in tl.static_range(GROUP):
        result += (tl.load(source + group * GROUP + j, mask=inside, other=0.0).to(tl.float32),)
    return result
