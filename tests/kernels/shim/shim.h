// Enough of CUDA to run interval.cu on a CPU, unchanged: every thread of a block is a context of its own that runs until
// it meets the others, at a barrier or in a warp-wide instruction.
//
// What it is strict about: a barrier that some thread never reaches, lanes that meet in different instructions, reads and
// writes past the shared memory asked for, asynchronous copies from outside the kernel's arrays, misaligned, or never
// waited for. Shared memory begins poisoned; an asynchronous copy poisons its target at once and lands when its thread
// waits for it. Two schedules: "lockstep" (all threads in a shuffled order, each to its next meeting point) and "ahead"
// (one warp runs as far as the barriers let it, then the next), which shows a barrier that is missing.
//
// What it cannot show: whether the hardware's layouts are those of the PTX ISA as read here, speed, weak memory.
#pragma once
#ifdef __APPLE__
#define _XOPEN_SOURCE 700  // contexts
#define _DARWIN_C_SOURCE
#endif
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { uint32 x, y, z, w; };
struct dim3 { uint32 x, y, z; };
static inline int2 make_int2(int x, int y) { return int2{x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return int4{x, y, z, w}; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint8* name = shim::shared_memory()

namespace shim {

struct Copy { void* to; const void* from; int bytes; };

struct Thread {
    int index = 0;
    bool started = false, done = false;
    jmp_buf here;
    ucontext_t first;
    std::vector<Copy> open;                 // issued, not committed
    std::vector<std::vector<Copy>> groups;  // committed, not waited for
    std::unique_ptr<char[]> stack;
};

// The 32 lanes' operands of the instruction in which they meet.
struct Warp {
    int arrived = 0;
    const char* instruction = nullptr;
    unsigned long turn = 0;
    int* sums[32];
    const uint32 *a[32], *b[32];
    uint32 indices[32];
};

struct Range { const char* begin; size_t bytes; };

static constexpr size_t STACK = 96 * 1024, GUARD = 4096;
static constexpr uint8 POISON = 0xA5;

static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Range> arrays;  // what the kernel may read
static std::vector<uint8> memory;
static std::function<void()> kernel;
static Thread* current;
static jmp_buf scheduler;
static dim3 block_index, block_size, grid_size;
static size_t shared_bytes;
static int waiting;  // threads at the barrier
static unsigned long barrier_turn, events;
static uint32 state;  // of the random numbers
static char message[256];

static uint32 random_below(uint32 bound) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state % bound;
}

// Leaves every thread where it stands; the launch returns the message.
[[noreturn]] static void fail(const char* what) {
    if (!message[0])
        snprintf(message, sizeof message, "%s (block %u %u, thread %d)", what, block_index.x, block_index.y,
                 current ? current->index : -1);
    _longjmp(scheduler, 2);
}

__attribute__((noinline)) static void pause() {
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

static void body() {
    kernel();
    for (const auto& group : current->groups)
        if (!group.empty()) fail("an asynchronous copy is never waited for");
    if (!current->open.empty()) fail("an asynchronous copy is never committed");
    current->done = true;
    events++;
    _longjmp(scheduler, 1);
}

// Runs a thread to its next meeting point.
__attribute__((noinline)) static void resume(Thread& thread) {
    current = &thread;
    const int how = _setjmp(scheduler);
    if (how == 0) {
        if (thread.started) _longjmp(thread.here, 1);
        thread.started = true;
        setcontext(&thread.first);
    }
}

static void barrier() {
    const unsigned long turn = barrier_turn;
    events++;
    if (++waiting == (int)threads.size()) {
        waiting = 0;
        barrier_turn++;
        return;
    }
    while (barrier_turn == turn) pause();
}

// All lanes of a warp meet in one instruction; the last to come executes it for all.
template <class Execute>
static void meet(const char* instruction, Execute execute) {
    Warp& warp = warps[current->index / 32];
    if (warp.arrived == 0) warp.instruction = instruction;
    if (warp.instruction != instruction) fail("lanes of a warp meet in different instructions");
    const unsigned long turn = warp.turn;
    events++;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        execute(warp);
        warp.turn++;
        return;
    }
    while (warp.turn == turn) pause();
}

static uint8* shared_memory() { return (uint8*)(((uintptr_t)memory.data() + GUARD + 127) & ~(uintptr_t)127); }

static void check_guards() {
    const uint8* base = shared_memory();
    for (const uint8* at = memory.data(); at < base; at++)
        if (*at != POISON) fail("a write before the shared memory");
    for (const uint8* at = base + shared_bytes; at < memory.data() + memory.size(); at++)
        if (*at != POISON) fail("a write past the shared memory");
}

static void start_block(int count) {
    memory.assign(shared_bytes + 2 * GUARD + 256, POISON);
    threads.resize(count);
    warps.assign((count + 31) / 32, Warp());
    waiting = 0;
    for (int i = 0; i < count; i++) {
        Thread& thread = threads[i];
        thread.index = i;
        thread.started = thread.done = false;
        thread.open.clear();
        thread.groups.clear();
        if (!thread.stack) thread.stack.reset(new char[STACK]);
        getcontext(&thread.first);
        thread.first.uc_stack.ss_sp = thread.stack.get();
        thread.first.uc_stack.ss_size = STACK;
        thread.first.uc_link = nullptr;
        makecontext(&thread.first, body, 0);
    }
}

static void run_block(bool ahead, const std::vector<int>& shuffled) {
    const int count = (int)threads.size(), warp_count = (int)warps.size();
    for (;;) {
        const unsigned long before = events;
        bool left = false;
        if (ahead) {
            const int first = (int)random_below(warp_count);
            for (int w = 0; w < warp_count; w++) {
                const int base = (first + w) % warp_count * 32;
                for (unsigned long seen = events + 1; seen != events;) {
                    seen = events;
                    for (int i = base; i < std::min(count, base + 32) && !message[0]; i++)
                        if (!threads[i].done) resume(threads[i]);
                }
            }
        } else {
            for (int i : shuffled)
                if (!threads[i].done && !message[0]) resume(threads[i]);
        }
        if (message[0]) return;
        for (const Thread& thread : threads) left |= !thread.done;
        if (!left) return;
        if (events == before) {
            current = nullptr;
            snprintf(message, sizeof message, "some threads wait for others that never come (block %u %u)",
                     block_index.x, block_index.y);
            return;
        }
    }
}

// 0, or 1 with a message.
static int launch(dim3 grid, dim3 block, size_t shared, uint32 seed, std::function<void()> body_of_kernel) {
    kernel = std::move(body_of_kernel);
    grid_size = grid, block_size = block, shared_bytes = shared;
    state = seed * 2654435761u | 1;
    message[0] = 0;
    std::vector<int> order(block.x);
    for (int i = 0; i < (int)block.x; i++) order[i] = i;
    for (uint32 y = 0; y < grid.y; y++)
        for (uint32 x = 0; x < grid.x; x++) {
            block_index = dim3{x, y, 0};
            for (int i = (int)block.x - 1; i > 0; i--) std::swap(order[i], order[random_below(i + 1)]);
            start_block((int)block.x);
            run_block(seed & 1, order);
            if (!message[0] && _setjmp(scheduler) == 0) check_guards();
            if (message[0]) return 1;
        }
    return 0;
}

// Which row and column of a 16 x 8 (or, by halves, 8 x 8) result an accumulator register of a lane holds.
static int row_of(int lane, int c) { return (lane >> 2) + 8 * (c >> 1); }
static int column_of(int lane, int c) { return 2 * (lane & 3) + (c & 1); }
static int8_t signed_byte(uint32 word, int i) { return (int8_t)(word >> (8 * i)); }
static uint8 byte(uint32 word, int i) { return (uint8)(word >> (8 * i)); }

static void add(int& sum, int product) { sum = (int)((uint32)sum + (uint32)product); }

}  // namespace shim

#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)
#define threadIdx (shim::dim3_of_thread())

namespace shim {
static inline dim3 dim3_of_thread() { return dim3{(uint32)current->index, 0, 0}; }
}  // namespace shim

static inline void __syncthreads() { shim::barrier(); }
static inline void __syncwarp() {
    shim::meet("syncwarp", [](shim::Warp&) {});
}
static inline float __int2float_rn(int v) { return (float)v; }
static inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}
static inline int __float2int_rn(float v) { return (int)nearbyintf(v); }
static inline float __int_as_float(int bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static inline uint32 __byte_perm(uint32 x, uint32 y, uint32 selector) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    uint32 result = 0;
    for (int i = 0; i < 4; i++) result |= (uint32)(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}

template <int BYTES>
static inline void copy_async(void* to, const void* from) {
    const uint8* base = shim::shared_memory();
    if ((uintptr_t)to % BYTES || (uintptr_t)from % BYTES) shim::fail("an asynchronous copy is not aligned");
    if ((uint8*)to < base || (uint8*)to + BYTES > base + shim::shared_bytes) shim::fail("a copy past the shared memory");
    bool known = false;
    for (const shim::Range& range : shim::arrays)
        known |= (const char*)from >= range.begin && (const char*)from + BYTES <= range.begin + range.bytes;
    if (!known) shim::fail("a copy from outside the kernel's arrays");
    memset(to, shim::POISON, BYTES);
    shim::current->open.push_back({to, from, BYTES});
}
static inline void copy_commit() {
    shim::current->groups.push_back(std::move(shim::current->open));
    shim::current->open.clear();
}
template <int PENDING>
static inline void copy_wait() {
    auto& groups = shim::current->groups;
    while ((int)groups.size() > PENDING) {
        for (const shim::Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

// mma.sp.m16n8k64 .s8 x .u8 (PTX ISA, sparse fragments): the compressed operand lies as the dense one of m16n8k32; the
// index pairs of rows 0-7 are in lanes 4 g and 4 g + 2 (columns up to 31, from 32), of rows 8-15 in the next lanes.
static inline void mma_sparse(int (&d)[4], const uint32 (&a)[4], const uint32 (&b)[4], uint32 indices) {
    const int lane = shim::current->index % 32;
    shim::Warp& own = shim::warps[shim::current->index / 32];
    own.sums[lane] = d, own.a[lane] = a, own.b[lane] = b, own.indices[lane] = indices;
    shim::meet("mma.sp", [](shim::Warp& warp) {
        int weight[16][32], value[8][64], at[16][32];
        for (int l = 0; l < 32; l++)
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 4; i++) {
                    weight[(l >> 2) + 8 * (r & 1)][16 * (r >> 1) + 4 * (l & 3) + i] = shim::signed_byte(warp.a[l][r], i);
                    value[l >> 2][16 * r + 4 * (l & 3) + i] = shim::byte(warp.b[l][r], i);
                }
        for (int row = 0; row < 16; row++)
            for (int couple = 0; couple < 16; couple++) {
                const uint32 word = warp.indices[4 * (row & 7) + (row >> 3) + 2 * (couple >> 3)] >> (4 * (couple & 7));
                if ((word & 3) >= (word >> 2 & 3)) shim::fail("indices of a sparse pair are not in order");
                at[row][2 * couple] = 4 * couple + (word & 3);
                at[row][2 * couple + 1] = 4 * couple + (word >> 2 & 3);
            }
        for (int l = 0; l < 32; l++)
            for (int c = 0; c < 4; c++) {
                const int row = shim::row_of(l, c), column = shim::column_of(l, c);
                int sum = 0;
                for (int k = 0; k < 32; k++) sum += weight[row][k] * value[column][at[row][k]];
                shim::add(warp.sums[l][c], sum);
            }
    });
}

static inline void mma_dense(int (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    const uint32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    const int lane = shim::current->index % 32;
    shim::Warp& own = shim::warps[shim::current->index / 32];
    own.sums[lane] = d, own.a[lane] = a, own.b[lane] = b;
    shim::meet("mma.k32", [](shim::Warp& warp) {
        int weight[16][32], value[8][32];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                for (int r = 0; r < 4; r++)
                    weight[(l >> 2) + 8 * (r & 1)][16 * (r >> 1) + 4 * (l & 3) + i] = shim::signed_byte(warp.a[l][r], i);
                for (int r = 0; r < 2; r++) value[l >> 2][16 * r + 4 * (l & 3) + i] = shim::byte(warp.b[l][r], i);
            }
        for (int l = 0; l < 32; l++)
            for (int c = 0; c < 4; c++) {
                int sum = 0;
                for (int k = 0; k < 32; k++) sum += weight[shim::row_of(l, c)][k] * value[shim::column_of(l, c)][k];
                shim::add(warp.sums[l][c], sum);
            }
    });
}

static inline void mma_small(int& d0, int& d1, uint32 a, uint32 b) {
    int sums[2] = {d0, d1};
    const int lane = shim::current->index % 32;
    shim::Warp& own = shim::warps[shim::current->index / 32];
    own.sums[lane] = sums, own.a[lane] = &a, own.b[lane] = &b;
    shim::meet("mma.k16", [](shim::Warp& warp) {
        int weight[8][16], value[8][16];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                weight[l >> 2][4 * (l & 3) + i] = shim::signed_byte(warp.a[l][0], i);
                value[l >> 2][4 * (l & 3) + i] = shim::byte(warp.b[l][0], i);
            }
        for (int l = 0; l < 32; l++)
            for (int c = 0; c < 2; c++) {
                int sum = 0;
                for (int k = 0; k < 16; k++) sum += weight[l >> 2][k] * value[shim::column_of(l, c)][k];
                shim::add(warp.sums[l][c], sum);
            }
    });
    d0 = sums[0], d1 = sums[1];
}
