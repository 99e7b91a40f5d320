// A CUDA program of one kernel on a CPU: every thread of a block is a coroutine, and warps meet in `multiplied`.
//
// Compiled together with the source of the program, whose path is PROGRAM. The functions that are PTX on a GPU are plain
// C++ here, after the definitions in NVIDIA's PTX manual. Reads outside the arrays that `run` is given are counted.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define INLINE static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

struct Dim { int x; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
[[maybe_unused]] static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static Dim threadIdx, blockIdx;

namespace machine {
const int THREADS = 32 * WARPS, STACK = 1 << 17;
enum State { RUNS, IN_WARP, IN_BLOCK, DONE };
struct Fragment { unsigned a[4], b[2]; };

State states[THREADS];
ucontext_t contexts[THREADS], scheduler;
Fragment given[2][THREADS];  // of two products in turn: a thread is at most one ahead of its warp
int products[THREADS];
struct Range { const char *first, *last; };
Range ranges[3];
long wrong;

void wait(State state) {
    const int own = threadIdx.x;
    states[own] = state;
    swapcontext(&contexts[own], &scheduler);
    threadIdx.x = own;
}

void check(const void* at, int bytes) {
    const char* first = static_cast<const char*>(at);
    bool inside = reinterpret_cast<uintptr_t>(at) % bytes == 0, found = false;
    for (const Range& range : ranges) found = found || (first >= range.first && first + bytes <= range.last);
    wrong += !(inside && found);
}

float number(unsigned bits) {
    float result;
    if (BRAIN) {
        bits <<= 16;
        std::memcpy(&result, &bits, 4);
        return result;
    }
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    result = exponent == 31 ? (mantissa ? NAN : INFINITY)
             : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                            : std::ldexp(float(mantissa), -24);
    return bits >> 15 & 1 ? -result : result;
}

// Rows and columns of the fragments of mma.m16n8k16: lane = 4 quad + t; a register holds two neighbouring k.
float a_at(const Fragment* warp, int row, int k) {
    const int lane = 4 * (row % 8) + k % 8 / 2, which = (row >= 8) + 2 * (k >= 8);
    return number(warp[lane].a[which] >> 16 * (k % 2) & 0xffff);
}

float b_at(const Fragment* warp, int k, int column) {
    const int lane = 4 * column + k % 8 / 2;
    return number(warp[lane].b[k >= 8] >> 16 * (k % 2) & 0xffff);
}
}  // namespace machine

static void __syncthreads() { machine::wait(machine::IN_BLOCK); }

static uint4 streamed(const uint4* at, int inside) {
    if (!inside) return {0, 0, 0, 0};
    machine::check(at, 16);
    return *at;
}

static unsigned code_at(const unsigned short* at, int inside) {
    if (!inside) return 0;
    machine::check(at, 2);
    return *at;
}

static uint4 cached(const uint4* at, int inside) { return streamed(at, inside); }

static unsigned permuted(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

static unsigned lowered(unsigned low, unsigned high, unsigned bits) {
    return (uint64_t(high) << 32 | low) >> (bits < 32 ? bits : 32);
}

static unsigned raised(unsigned low, unsigned high, unsigned bits) {
    return (uint64_t(high) << 32 | low) << (bits < 32 ? bits : 32) >> 32;
}

static void multiplied(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    using namespace machine;
    const int own = threadIdx.x, lane = own % 32, quad = lane / 4, t = lane % 4;
    Fragment* all = given[products[own]++ % 2];
    all[own] = {{a[0], a[2], a[1], a[3]}, {b0, b1}};  // in the order of the manual: row g, row g + 8, k + 8 likewise
    wait(IN_WARP);
    const Fragment* warp = all + own - lane;
    for (int i = 0; i < 4; i++) {
        const int row = quad + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) sums[i] += a_at(warp, row, k) * b_at(warp, k, column);
    }
}

static float widened(unsigned short bits) { return machine::number(bits); }

// To the nearest number, halves to the even one.
static unsigned short rounded(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    if (BRAIN) return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const unsigned sign = bits >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | unsigned(std::nearbyint(size * 0x1p24f));
    bits &= 0x7fffffff;
    return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

#include PROGRAM

namespace machine {
struct Arguments {
    const void *values, *codes, *x, *bias;
    void* out;
    int rows, segments, tokens, biased;
} given_arguments;

void thread() {
    const Arguments& a = given_arguments;
    packed_product(static_cast<const uint4*>(a.values), static_cast<const half_word*>(a.codes),
                   static_cast<const uint4*>(a.x), static_cast<const half_word*>(a.bias),
                   static_cast<half_word*>(a.out), a.rows, a.segments, a.tokens, a.biased);
    states[threadIdx.x] = DONE;
}

// Runs the threads of a warp until all are done or wait for the block.
void run_warp(int warp) {
    for (bool again = true; again;) {
        again = false;
        for (int i = 32 * warp; i < 32 * warp + 32; i++) {
            if (states[i] == IN_BLOCK || states[i] == DONE) continue;
            states[i] = RUNS, threadIdx.x = i;
            swapcontext(&scheduler, &contexts[i]);
            again = again || states[i] == IN_WARP;
        }
    }
}

void run_block(std::vector<char>& stacks) {
    for (int i = 0; i < THREADS; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack = {&stacks[size_t(i) * STACK], 0, STACK};
        contexts[i].uc_link = &scheduler;
        makecontext(&contexts[i], thread, 0);
        states[i] = RUNS, products[i] = 0;
    }
    for (bool again = true; again;) {
        for (int warp = 0; warp < WARPS; warp++) run_warp(warp);
        again = false;
        for (State& state : states)
            if (state == IN_BLOCK) state = RUNS, again = true;
    }
}
}  // namespace machine

// Runs all blocks, one after the other; returns the number of reads outside values, codes and vectors.
extern "C" long run(const void* values, const void* codes, const void* x, const void* bias, void* out, int rows,
                    int segments, int tokens, int biased, int blocks) {
    using namespace machine;
    auto range = [](const void* first, size_t bytes) {
        return Range{static_cast<const char*>(first), static_cast<const char*>(first) + bytes};
    };
    ranges[0] = range(values, size_t(rows) * segments * 16);
    ranges[1] = range(codes, size_t(rows) * segments * 2);
    ranges[2] = range(x, size_t(tokens) * segments * 32);
    given_arguments = {values, codes, x, bias, out, rows, segments, tokens, biased};
    wrong = 0;
    std::vector<char> stacks(size_t(THREADS) * STACK);
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) run_block(stacks);
    return wrong;
}
