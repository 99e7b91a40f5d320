// The product of a packed N:M weight (2:4, 4:8 or 8:16) and at most 8 vectors, which `by_cuda.py` compiles.
//
// A segment is 16 members of a row: 8 values (16 bytes), a code of 16 bits, 32 bytes of each vector. A warp owns 16 rows.
// Thread t of the quad g (lane = 4 g + t) reads segment 4 c + t of the rows g and g + 8 for every chunk c of four
// segments, and the same segment of vector g. It expands values to members in registers. Four members are what the
// thread holds of one row in the fragments of `mma.m16n8k16`, so that four such products add a chunk. The order of
// columns is the thread's own in weight and vectors alike; nothing is exchanged between threads. The chunks of a row are
// dealt to the WARPS warps of a block, CHUNKS at a time; the sums of the warps are added at the end, in order.
// Weights are read once and not kept in the first level cache, in which the vectors stay. Sums are float32.
//
// Constants given at compilation: GROUP 4, 8 or 16; BRAIN 1 for bfloat16, 0 for float16; WARPS; CHUNKS that a warp reads
// at once; AHEAD 1 to read the next chunks before the present ones are multiplied; BLOCKS at least on a multiprocessor.

typedef unsigned int word;  // two 16-bit numbers, or selectors of `permuted`
typedef unsigned short half_word;

#ifndef EMULATED  // on a CPU these are functions of the tests
#define INLINE __device__ __forceinline__

// 16 bytes that no other thread reads, or zeros; a miss brings the whole line of 128 bytes to the second level cache.
INLINE uint4 streamed(const uint4* at, int inside) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %5, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(at), "r"(inside));
    return v;
}

INLINE word code_at(const half_word* at, int inside) {
    half_word code = 0;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0;\n"
                 "@p ld.global.nc.L2::128B.u16 %0, [%1]; }" : "+h"(code) : "l"(at), "r"(inside));
    return code;
}

INLINE uint4 cached(const uint4* at, int inside) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm("{ .reg .pred p; setp.ne.s32 p, %5, 0;\n"
        "@p ld.global.nc.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(at), "r"(inside));
    return v;
}

// The bytes of b:a that the four lowest digits of `selector` number; a digit is 4 bits.
INLINE word permuted(word a, word b, word selector) {
    word result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
}

// The low word of high:low moved down by at most 32 bits.
INLINE word lowered(word low, word high, word bits) {
    word result;
    asm("shf.r.clamp.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(bits));
    return result;
}

// The high word of high:low moved up by at most 32 bits.
INLINE word raised(word low, word high, word bits) {
    word result;
    asm("shf.l.clamp.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(bits));
    return result;
}

// sums += A B of a warp. a[0], a[1]: members of row g; a[2], a[3]: of row g + 8; b: of vector g.
INLINE void multiplied(float (&sums)[4], const word (&a)[4], word b0, word b1) {
#if BRAIN
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE float widened(half_word number) {
    float result;
#if BRAIN
    result = __uint_as_float((word)number << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(number));
#endif
    return result;
}

INLINE half_word rounded(float number) {
    half_word result;
#if BRAIN
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(number));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(number));
#endif
    return result;
}
#endif

// Selectors that expand the values of a group, or of a part of four members (4 bits of places), to pairs of members.
#if GROUP == 4
typedef word Entry;  // of the pairs 0 and 1, 16 bits each
#define ENTRIES 16

// The code of a group of 2:4 holds the indices of its two values; digit 4 selects a byte of zeros.
INLINE word byte_pair(word code, word member) {
    return (code & 3) == member ? 0x10 : code >> 2 == member ? 0x32 : 0x44;
}

INLINE Entry entry_of(word code) {
    return byte_pair(code, 0) | byte_pair(code, 1) << 8 | byte_pair(code, 2) << 16 | byte_pair(code, 3) << 24;
}
#else
struct alignas(8) Entry {
    word selectors;  // of the pairs 0 and 1, 16 bits each
    word moves;      // bits by which the values move: by the pair nearer to the end; 8:16: by the part, in two steps
};
#define ENTRIES 32

// A pair whose first value is the lowest of the word that is permuted, or whose last value is the highest one.
INLINE word from_lowest(word places) {
    return places == 0 ? 0x4444 : places == 1 ? 0x4410 : places == 2 ? 0x1044 : 0x3210;
}

INLINE word from_highest(word places) {
    return places == 0 ? 0x4444 : places == 1 ? 0x4432 : places == 2 ? 0x3244 : 0x3210;
}

INLINE word bits_of(word places) { return 16 * ((places & 1) + (places >> 1 & 1)); }

// Entry 0 to 15: parts whose values begin at the lowest bit; 16 to 31: parts whose values end at the highest one.
INLINE Entry entry_of(word i) {
    const word first = i & 3, second = i >> 2 & 3, all = bits_of(first) + bits_of(second);
    const word once = all < 32 ? all : 32, again = all - once;
    Entry entry;
    entry.selectors = i < 16 ? from_lowest(first) | from_lowest(second) << 16
                             : from_highest(first) | from_highest(second) << 16;
    entry.moves = (i < 16 ? bits_of(first) : bits_of(second)) | once << 8 | again << 16;
    return entry;
}

INLINE void low_part(word* members, word low, word high, Entry entry) {
    members[0] = permuted(low, 0, entry.selectors);
    members[1] = permuted(lowered(low, high, entry.moves & 255), 0, entry.selectors >> 16);
}

INLINE void high_part(word* members, word low, word high, Entry entry) {
    members[0] = permuted(raised(low, high, entry.moves & 255), 0, entry.selectors);
    members[1] = permuted(high, 0, entry.selectors >> 16);
}
#endif

// The 16 members of a segment in pairs; those that are not kept are zero.
INLINE void expanded(word (&members)[8], uint4 values, word code, const Entry* entries) {
#if GROUP == 4
    const word v[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int group = 0; group < 4; group++) {
        const word selectors = entries[code >> 4 * group & 15];
        members[2 * group] = permuted(v[group], 0, selectors);
        members[2 * group + 1] = permuted(v[group], 0, selectors >> 16);
    }
#elif GROUP == 8
    low_part(members, values.x, values.y, entries[code & 15]);
    high_part(members + 2, values.x, values.y, entries[16 + (code >> 4 & 15)]);
    low_part(members + 4, values.z, values.w, entries[code >> 8 & 15]);
    high_part(members + 6, values.z, values.w, entries[16 + (code >> 12 & 15)]);
#else
    const Entry first = entries[code & 15], last = entries[16 + (code >> 12 & 15)];
    low_part(members, values.x, values.y, first);
    high_part(members + 6, values.z, values.w, last);
    word once = first.moves >> 8 & 255, again = first.moves >> 16;
    const word a = lowered(values.x, values.y, once), b = lowered(values.y, values.z, once),
               c = lowered(values.z, values.w, once);
    low_part(members + 2, lowered(a, b, again), lowered(b, c, again), entries[code >> 4 & 15]);
    once = last.moves >> 8 & 255, again = last.moves >> 16;
    const word d = raised(values.x, values.y, once), e = raised(values.y, values.z, once),
               f = raised(values.z, values.w, once);
    high_part(members + 4, raised(d, e, again), raised(e, f, again), entries[16 + (code >> 8 & 15)]);
#endif
}

struct Read {  // of the rows g and g + 8
    uint4 values[CHUNKS][2];
    word codes[CHUNKS][2];
};

// The next segment of a thread in the weight.
struct Place {
    const uint4* values[2];
    const half_word* codes[2];
    int left;  // segments from this one to the end of the row
};

#define STEP (4 * CHUNKS * WARPS)  // segments that a block reads at once

INLINE void read_chunks(Read& read, Place& place) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            read.values[chunk][row] = streamed(place.values[row] + 4 * chunk, 4 * chunk < place.left);
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            read.codes[chunk][row] = code_at(place.codes[row] + 4 * chunk, 4 * chunk < place.left);
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        place.values[row] += STEP;
        place.codes[row] += STEP;
    }
    place.left -= STEP;
}

INLINE void add_chunks(float (&sums)[2][4], const Read& read, const uint4* x, int left, const Entry* entries) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const uint4 low = cached(x + 8 * chunk, 4 * chunk < left), high = cached(x + 8 * chunk + 1, 4 * chunk < left);
        const word b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        word members[2][8];
        expanded(members[0], read.values[chunk][0], read.codes[chunk][0], entries);
        expanded(members[1], read.values[chunk][1], read.codes[chunk][1], entries);
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const word a[4] = {members[0][2 * part], members[0][2 * part + 1], members[1][2 * part],
                               members[1][2 * part + 1]};
            multiplied(sums[part & 1], a, b[2 * part], b[2 * part + 1]);
        }
    }
}

#define STRIDE 20  // numbers between the vectors of the sums, so that the writes of a warp meet all banks

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    packed_product(const uint4* values,     // [rows, segments] of 8 values
                   const half_word* codes,  // [rows, segments]
                   const uint4* x,          // [tokens, 2 * segments] of 8 members
                   const half_word* bias,   // [rows]; not read unless `biased`
                   half_word* out,          // [tokens, rows]
                   int rows, int segments, int tokens, int biased) {
    __shared__ Entry entries[ENTRIES];
    __shared__ float total[WARPS][8 * STRIDE];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane >> 2;
    const int first_row = 16 * blockIdx.x, segment = 4 * CHUNKS * warp + (lane & 3);
    Place place;
    place.left = segments - segment;
#pragma unroll
    for (int half = 0; half < 2; half++) {  // rows beyond the last one read that one, and are not written
        const int row = first_row + quad + 8 * half;
        const long long at = (long long)(row < rows ? row : rows - 1) * segments + segment;
        place.values[half] = values + at;
        place.codes[half] = codes + at;
    }
    x += 2 * ((long long)(quad < tokens ? quad : tokens - 1) * segments + segment);  // likewise

    Read read;
    read_chunks(read, place);
    if (threadIdx.x < ENTRIES) entries[threadIdx.x] = entry_of(threadIdx.x);
    __syncthreads();
    float sums[2][4] = {};
    int left = segments - segment;
    for (int whole = segments - 4 * CHUNKS * warp; whole > 0; whole -= STEP) {  // the same for all threads of a warp
#if AHEAD
        Read later;
        read_chunks(later, place);
        add_chunks(sums, read, x, left, entries);
        read = later;
#else
        add_chunks(sums, read, x, left, entries);
        read_chunks(read, place);
#endif
        x += 2 * STEP;
        left -= STEP;
    }

    float* own = total[warp] + 2 * (lane & 3) * STRIDE + quad;
    own[0] = sums[0][0] + sums[1][0];
    own[STRIDE] = sums[0][1] + sums[1][1];
    own[8] = sums[0][2] + sums[1][2];
    own[STRIDE + 8] = sums[0][3] + sums[1][3];
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < 16 * tokens; i += 32 * WARPS) {
        const int row = first_row + (i & 15), token = i >> 4;
        if (row < rows) {
            float sum = 0;
#pragma unroll
            for (int other = 0; other < WARPS; other++) sum += total[other][token * STRIDE + (i & 15)];
            if (biased) sum += widened(bias[row]);
            out[(long long)token * rows + row] = rounded(sum);
        }
    }
}
