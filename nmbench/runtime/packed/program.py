"""The product of a packed weight and a few vectors as a Triton program, which `launch` imports at the first launch.

A program owns ROWS rows of the weight and runs over their groups, BLOCK at a time. It reads values and codes once, in
words of up to 64 bits. The members of a group in each vector are read as words as well; the member that belongs to a
value is then selected and shifted out of registers, so that no lane loads from an address of its own. Sums are float32.
"""
# mypy: ignore-errors
# ruff: noqa: N803
# (Triton's functions are not Python's: untyped, and with constants in capitals.)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product_program(
    values,  # words of VALUES 16-bit numbers, [rows, groups * KEEP / VALUES]
    codes,  # uint8 [rows, code_bytes]
    x,  # words of MEMBERS 16-bit numbers, [BATCH, groups * GROUP / MEMBERS]
    bias,  # [rows], of the dtype of out; not read unless BIAS
    out,  # [BATCH, rows]
    rows: tl.int32,
    groups: tl.int32,
    code_bytes: tl.int32,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,  # of an index, or 0 for places
    CODE: tl.constexpr,  # bits of the code of a group
    BYTES: tl.constexpr,  # in which these bits may lie
    VALUES: tl.constexpr,
    MEMBERS: tl.constexpr,
    BATCH: tl.constexpr,
    BRAIN: tl.constexpr,  # bfloat16, else float16
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = (row < rows)[:, None]
    long_row = row.to(tl.int64)[:, None]
    value_row = values + long_row * (groups * (KEEP // VALUES))
    code_row = codes + long_row * code_bytes
    total = ()
    for _ in tl.static_range(BATCH):
        total += (tl.full([ROWS, BLOCK], 0.0, tl.float32),)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        in_row = group < groups
        inside = in_rows & in_row[None, :]
        code = _code(code_row, group[None, :], inside, code_bytes, CODE, BYTES)
        packed = _words(value_row, group[None, :], inside, KEEP // VALUES)
        members = ()
        for b in tl.static_range(BATCH):
            words = _words(x + b * groups * (GROUP // MEMBERS), group, in_row, GROUP // MEMBERS)
            members += (_pairs(words, MEMBERS),)
        for k in tl.static_range(KEEP):
            value = _value(packed, k, VALUES, BRAIN)  # [ROWS, BLOCK]
            place, code = _place(code, BITS)
            total = _added(total, value, members, place, MEMBERS, BRAIN)
    for b in tl.static_range(BATCH):
        result = tl.sum(total[b], axis=1)
        if BIAS:
            result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + b * rows + row, result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _code(codes, group, inside, code_bytes, CODE: tl.constexpr, BYTES: tl.constexpr):
    """Return the code of each group [ROWS, BLOCK] as int32; it may begin within a byte and end in another one."""
    bit = group * CODE
    result = tl.load(codes + (bit >> 3), mask=inside, other=0).to(tl.int32)
    for more in tl.static_range(1, BYTES):
        there = inside & ((bit >> 3) + more < code_bytes)
        result |= tl.load(codes + (bit >> 3) + more, mask=there, other=0).to(tl.int32) << (8 * more)
    return (result >> (bit & 7)) & ((1 << CODE) - 1)


@triton.jit
def _place(code, BITS: tl.constexpr):
    """Return the place in its group of the first weight of each code, and the code of the weights after it."""
    if BITS > 0:
        place = code & ((1 << BITS) - 1)
        rest = code >> BITS
    else:
        lowest = code & -code
        place = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # its exponent; -127 for the code 0
        rest = code ^ lowest
    return place, rest


@triton.jit
def _words(start, group, inside, WORDS: tl.constexpr):
    """Return the WORDS words of each group, one tensor for each."""
    result = ()
    for j in tl.static_range(WORDS):
        result += (tl.load(start + group * WORDS + j, mask=inside, other=0),)
    return result


@triton.jit
def _value(words, k: tl.constexpr, VALUES: tl.constexpr, BRAIN: tl.constexpr):
    """Return value number k of each group as float32 [ROWS, BLOCK]."""
    return _float(words[k // VALUES] >> (16 * (k % VALUES)), BRAIN)


@triton.jit
def _pairs(words, MEMBERS: tl.constexpr):
    """Return the same members in int32 words of two, or of one if MEMBERS is 1; shifts of 64 bits would be slow."""
    result = ()
    for j in tl.static_range(len(words)):
        result += (words[j].to(tl.int32),)
        if MEMBERS == 4:
            result += ((words[j] >> 32).to(tl.int32),)
    return result


@triton.jit
def _added(total, value, members, place, MEMBERS: tl.constexpr, BRAIN: tl.constexpr):
    """Return the sums after adding, for every vector, `value` times the member of its group at `place`."""
    PAIR: tl.constexpr = 1 if MEMBERS == 1 else 2
    shift = (place & (PAIR - 1)) * 16  # of members that are zero, for a group outside with any place
    result = ()
    for b in tl.static_range(len(total)):
        word = members[b][0][None, :]
        for j in tl.static_range(1, len(members[b])):
            word = tl.where(place >= j * PAIR, members[b][j][None, :], word)
        result += (total[b] + value * _float(word >> shift, BRAIN),)
    return result


@triton.jit
def _float(word, BRAIN: tl.constexpr):
    """Return the number in the lowest 16 bits of each word as float32."""
    if BRAIN:
        result = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return result
