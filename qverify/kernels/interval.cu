// Exact integer interval propagation through one quantized layer, on NVIDIA GPUs.
//
// A value is an array of byte pairs (lower, upper) = codes minus the type's low. For a layer with integer weights W and
// bias b, over a box of inputs,
//     acc_lower = W+ lower + W- upper + b        acc_upper = W+ upper + W- lower + b        (W = W+ + W-)
// are its exact ends. Among the interleaved inputs (lower_0, upper_0, lower_1, upper_1, ...) a weight meets exactly one of
// the two bytes of its pair, so a row of weights is "2:4 sparse": two of every four are not zero. Tensor cores multiply
// such a matrix from its compressed form, which is W itself, and two index bits per weight, which say lower or upper:
// the sign of W for acc_lower, and its opposite (all indices ^ 1) for acc_upper. Both products share their operands.
//
// VARIANT 0  plain: one thread per output, scalar; any device. The yardstick for the others.
//         1  mma.sp m16n8k64, sparse int8 (sm_80 and later): two products of the cost of one inference
//         2  mma m16n8k32, dense int8 (sm_80 and later): weights expanded to (W+, W-) pairs in registers
//         3  mma m8n8k16, dense int8 (sm_75 and later), without asynchronous copies
//
// All sums are int32 and wrap nowhere: the host admits a layer only if 255 sum|w| + |b| stays below 2^31.
// The file needs no header: NVRTC compiles it as it stands, and so does a C++ compiler with the tests' shim.

#ifndef VARIANT
#define VARIANT 0
#endif

#ifdef INTERVAL_SHIM
#include "shim.h"
#else
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8 name[]

#if VARIANT == 1 || VARIANT == 2
// Asynchronous copies from global to shared memory. BYTES is 16, past L1 (a tile is read once), or 4.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const uint32 to = (uint32)__cvta_generic_to_shared(shared);
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
    }
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    if (BYTES == 16) {
        *(uint4*)shared = *(const uint4*)global;
    } else {
        *(uint32*)shared = *(const uint32*)global;
    }
}
__device__ __forceinline__ void copy_commit() {}
template <int PENDING>
__device__ __forceinline__ void copy_wait() {}
#endif

#if VARIANT == 1
// Ordered metadata (the lower index first) is PTX 8.5, CUDA 12.5; with an older compiler variant 2 remains.
#define MMA_SPARSE "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 "
__device__ __forceinline__ void mma_sparse(int (&d)[4], const uint32 (&a)[4], const uint32 (&b)[4], uint32 indices) {
    asm volatile(MMA_SPARSE "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(indices));
}
#elif VARIANT == 2
__device__ __forceinline__ void mma_dense(int (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                          uint32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#elif VARIANT == 3
__device__ __forceinline__ void mma_small(int& d0, int& d1, uint32 a, uint32 b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d0), "+r"(d1)
                 : "r"(a), "r"(b));
}
#endif
#endif  // INTERVAL_SHIM

// ---- from accumulators to codes ------------------------------------------------------------------------------------

enum Kind { ENDS = 0, SCALE = 1, THRESHOLDS = 2 };

// What becomes of an accumulator. Arrays are indexed by neuron (output channel) and padded to whole tiles.
struct Epilogue {
    const int* bias;
    const float* multiplier;   // SCALE
    const int* thresholds;     // THRESHOLDS: rows of `count`, each sorted
    const int* threshold_row;  // THRESHOLDS: which row a neuron has
    void* first;               // ENDS: int32 lower [rows, neurons]; else byte pairs [rows, pitch / 2, 2]
    int* second;               // ENDS: int32 upper
    int kind;
    int count;
    float least, most;  // SCALE: low - zero point, high - zero point
    int offset;         // SCALE: zero point - the output type's low
    int neurons;        // of all groups
    int pitch;          // bytes from one row of pairs to the next
};

// The parameters of every kernel begin with these; the host passes them in the same order.
#define EPILOGUE_PARAMETERS                                                                                           \
    const int *bias, const float *multiplier, const int *thresholds, const int *threshold_row, void *first,           \
        int *second, int kind, int count, float least, float most, int offset, int neurons, int pitch
#define EPILOGUE                                                                                                      \
    Epilogue {                                                                                                        \
        bias, multiplier, thresholds, threshold_row, first, second, kind, count, least, most, offset, neurons, pitch \
    }

// rint(clip(float32(acc) * multiplier, least, most)) + offset: one rounding per step, half to even, nothing fused.
// CuPy compiles with -ftz=true, which changes no code: a product is flushed to zero only if it, or the multiplier, is
// below 2^-126, so it was below 2^-95 (|acc| < 2^31), and between integer ends that is rounded to the same code as zero.
__device__ __forceinline__ uint32 scaled(const Epilogue& e, int acc, float multiplier) {
    const float v = __fmul_rn(__int2float_rn(acc), multiplier);
    return (uint32)(__float2int_rn(fminf(fmaxf(v, e.least), e.most)) + e.offset);
}

// How many of the sorted thresholds are <= acc; at most 255 of them, found by halving from 128.
__device__ __forceinline__ uint32 counted(const int* sorted, int count, int acc) {
    int found = 0;
#pragma unroll 1
    for (int step = 128; step > 0; step >>= 1) {
        const int next = found + step;
        if (next <= count && sorted[next - 1] <= acc) found = next;
    }
    return (uint32)found;
}

// The pair of codes of a neuron's accumulators; `at`: its place in the parameter arrays.
__device__ __forceinline__ uint32 pair_of(const Epilogue& e, int at, int lower, int upper) {
    if (e.kind == SCALE) {
        const float multiplier = e.multiplier[at];
        return scaled(e, lower, multiplier) | scaled(e, upper, multiplier) << 8;
    }
    const int* sorted = e.thresholds + (int64)e.threshold_row[at] * e.count;
    return counted(sorted, e.count, lower) | counted(sorted, e.count, upper) << 8;
}

// ---- variant 0: one thread per output ------------------------------------------------------------------------------

// Images of a convolution, NHWC. Pads and strides of the two axes; `pixel` is the bytes from one pixel to the next.
struct Image {
    int height, width, out_height, out_width, stride_y, stride_x, top, left, pixel;
};
#define IMAGE_PARAMETERS                                                                                              \
    int height, int width, int out_height, int out_width, int stride_y, int stride_x, int top, int left, int pixel
#define IMAGE                                                                                                         \
    Image { height, width, out_height, out_width, stride_y, stride_x, top, left, pixel }

#if VARIANT == 0

__device__ __forceinline__ void widen(int& lower, int& upper, int weight, int x_lower, int x_upper) {
    lower += weight * (weight >= 0 ? x_lower : x_upper);
    upper += weight * (weight >= 0 ? x_upper : x_lower);
}

__device__ __forceinline__ void store_plain(const Epilogue& e, int64 row, int neuron, int lower, int upper) {
    if (e.kind == ENDS) {
        ((int*)e.first)[row * e.neurons + neuron] = lower;
        e.second[row * e.neurons + neuron] = upper;
        return;
    }
    uint16* to = (uint16*)((uint8*)e.first + row * e.pitch) + neuron;
    *to = neuron < e.neurons ? (uint16)pair_of(e, neuron, lower, upper) : (uint16)0;
}

// Codes in a row of the output: every spare one is written too.
__device__ __forceinline__ int columns(const Epilogue& e) { return e.kind == ENDS ? e.neurons : e.pitch / 2; }

// x: pairs, `x_pitch` bytes from row to row. weights: int8 [inputs, neurons].
extern "C" __global__ void __launch_bounds__(256)
    dense_plain(EPILOGUE_PARAMETERS, const uint8* x, const signed char* weights, int rows, int x_pitch, int inputs) {
    const Epilogue e = EPILOGUE;
    const int64 index = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int64 row = index / columns(e);
    const int neuron = (int)(index % columns(e));
    if (row >= rows) return;
    int lower = 0, upper = 0;
    if (neuron < e.neurons) {
        lower = upper = e.bias[neuron];
        const uint8* pair = x + row * x_pitch;
        for (int k = 0; k < inputs; k++) {
            widen(lower, upper, weights[(int64)k * e.neurons + neuron], pair[2 * k], pair[2 * k + 1]);
        }
    }
    store_plain(e, row, neuron, lower, upper);
}

// x: pairs [images, height, width, pixel / 2, 2]. weights: int8 [kernel_y, kernel_x, channels, neurons], where `channels`
// are those of one group. A row of the output is a pixel. Padding holds the pair (fill, fill).
extern "C" __global__ void __launch_bounds__(256)
    conv_plain(EPILOGUE_PARAMETERS, const uint8* x, const signed char* weights, int rows, IMAGE_PARAMETERS, int kernel_y,
               int kernel_x, int dilation_y, int dilation_x, int channels, int groups, int fill) {
    const Epilogue e = EPILOGUE;
    const int64 index = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int64 row = index / columns(e);
    const int neuron = (int)(index % columns(e));
    if (row >= rows) return;
    int lower = 0, upper = 0;
    if (neuron < e.neurons) {
        lower = upper = e.bias[neuron];
        const int image = (int)(row / (out_height * out_width)), place = (int)(row % (out_height * out_width));
        const int y0 = place / out_width * stride_y - top, x0 = place % out_width * stride_x - left;
        const int first_channel = neuron / (e.neurons / groups) * channels;
        const signed char* weight = weights + neuron;
        for (int ky = 0; ky < kernel_y; ky++) {
            for (int kx = 0; kx < kernel_x; kx++) {
                const int iy = y0 + ky * dilation_y, ix = x0 + kx * dilation_x;
                const bool inside = iy >= 0 && iy < height && ix >= 0 && ix < width;
                const uint8* pair = x + (((int64)image * height + iy) * width + ix) * pixel + 2 * first_channel;
                for (int c = 0; c < channels; c++, weight += e.neurons) {
                    if (inside) {
                        widen(lower, upper, *weight, pair[2 * c], pair[2 * c + 1]);
                    } else {
                        widen(lower, upper, *weight, fill, fill);
                    }
                }
            }
        }
    }
    store_plain(e, row, neuron, lower, upper);
}

#else  // ---- variants 1, 2, 3: tensor cores -------------------------------------------------------------------------

// A block computes BM neurons x BN rows (boxes, or pixels of them); a warp 16 TM neurons x 8 TN rows of these.
// A stage of the pipeline holds, for 64 inputs, BN rows of 128 bytes (64 pairs) and BM / 16 x 2 records of weights.
//
// A record is 16 neurons x 32 inputs: for each of the 32 lanes the 16 weight bytes of its four A registers, then (sparse)
// the metadata word of each lane. The host orders the inputs so that the four B registers of a lane are 16 neighbouring
// bytes of a row, one 16-byte load: register r of lane t (within its group of four) holds inputs 8 t + 2 r and the next.
#if VARIANT == 1
#define RECORD 640
#else
#define RECORD 512
#endif
#if VARIANT == 3
#define STAGES 2
#else
#define STAGES 3
#endif

// The weights of one record as a lane needs them.
struct Weights {
#if VARIANT == 1
    uint32 a[4], indices;
#else
    uint32 lower[8];  // (W+, W-) byte pairs for acc_lower: rows g in [0, 4), g + 8 in [4, 8)
#endif
};

__device__ __forceinline__ Weights load_weights(const uint8* record, int lane) {
    Weights w;
    const uint4 v = *(const uint4*)(record + lane * 16);
    const uint32 a[4] = {v.x, v.y, v.z, v.w};
#if VARIANT == 1
#pragma unroll
    for (int r = 0; r < 4; r++) w.a[r] = a[r];
    w.indices = *(const uint32*)(record + 512 + lane * 4);
#else
#pragma unroll
    for (int r = 0; r < 4; r++) {  // registers 0, 2: row g; 1, 3: row g + 8
        const uint32 mask = ((a[r] & 0x80808080u) >> 7) * 255u;
        const uint32 positive = a[r] & ~mask, negative = a[r] & mask;
        const int at = 4 * (r & 1) + (r & 2);
        w.lower[at] = __byte_perm(positive, negative, 0x5140);
        w.lower[at + 1] = __byte_perm(positive, negative, 0x7362);
    }
#endif
    return w;
}

#if VARIANT != 1
// The same pairs for acc_upper: W+ meets the upper byte.
__device__ __forceinline__ uint32 swapped(uint32 pairs) { return __byte_perm(pairs, 0, 0x2301); }
#endif

// lower, upper (16 neurons x 8 rows) += one record times the pairs `b` of 8 rows.
__device__ __forceinline__ void multiply(int (&lower)[4], int (&upper)[4], const Weights& w, const uint32 (&b)[4]) {
#if VARIANT == 1
    mma_sparse(lower, w.a, b, w.indices);
    mma_sparse(upper, w.a, b, w.indices ^ 0x55555555u);
#elif VARIANT == 2
#pragma unroll
    for (int h = 0; h < 4; h += 2) {
        mma_dense(lower, w.lower[h], w.lower[4 + h], w.lower[h + 1], w.lower[5 + h], b[h], b[h + 1]);
        mma_dense(upper, swapped(w.lower[h]), swapped(w.lower[4 + h]), swapped(w.lower[h + 1]), swapped(w.lower[5 + h]),
                  b[h], b[h + 1]);
    }
#else
#pragma unroll
    for (int r = 0; r < 4; r++) {
        mma_small(lower[0], lower[1], w.lower[r], b[r]);
        mma_small(lower[2], lower[3], w.lower[4 + r], b[r]);
        mma_small(upper[0], upper[1], swapped(w.lower[r]), b[r]);
        mma_small(upper[2], upper[3], swapped(w.lower[4 + r]), b[r]);
    }
#endif
}

// Where byte `at` of row `row` lies in a stage: rows of odd number have their halves exchanged, so that the eight lanes
// of one 16-byte access phase (two rows, 64 bytes each) touch all 32 banks once.
__device__ __forceinline__ int swizzled(int row, int at) { return row * 128 + (at ^ ((row & 1) << 6)); }

template <int WARPS_M, int WARPS_N, int TM, int TN>
struct Tile {
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int BM = 16 * TM * WARPS_M, BN = 8 * TN * WARPS_N;
    static constexpr int WEIGHT_BYTES = BM / 16 * 2 * RECORD, STAGE = WEIGHT_BYTES + BN * 128;
    static constexpr int OUT = BM + 8;  // pairs in a row of the output tile; 8 spare against bank conflicts
    static constexpr int SLICE = BM + 4;  // sums in a row of a slice
    static constexpr int PIPELINE = STAGES * STAGE;
    static_assert(BN * OUT * 2 <= PIPELINE && 8 * WARPS_N * SLICE * 8 <= PIPELINE, "results outgrow the pipeline");

    int lower[TM][TN][4], upper[TM][TN][4];
    uint8* memory;
    int lane, warp_m, warp_n;

    __device__ __forceinline__ void start(uint8* shared) {
        memory = shared;
        lane = threadIdx.x & 31;
        warp_m = (threadIdx.x >> 5) % WARPS_M;
        warp_n = (threadIdx.x >> 5) / WARPS_M;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) lower[i][j][c] = upper[i][j][c] = 0;
    }

    // `from`: the block's records [BM / 16][blocks of 32 inputs, an even number]; copies those of stage `k`.
    __device__ __forceinline__ void copy_weights(int slot, const uint8* from, int k, int k_blocks) {
        constexpr int PIECES = 2 * RECORD / 16;
        uint8* to = memory + slot * STAGE;
#pragma unroll 1  // unrolled, it costs 30 registers
        for (int q = threadIdx.x; q < BM / 16 * PIECES; q += THREADS) {
            const int tile = q / PIECES, piece = q % PIECES;
            copy_async<16>(to + q * 16, from + ((int64)tile * k_blocks + 2 * k) * RECORD + piece * 16);
        }
    }

    __device__ __forceinline__ uint8* values(int slot) { return memory + slot * STAGE + WEIGHT_BYTES; }

    // One stage: one or two blocks of 32 inputs.
    __device__ __forceinline__ void compute(int slot, int halves) {
        const uint8* weights = memory + slot * STAGE + warp_m * TM * 2 * RECORD;
        const int g = lane >> 2, t = lane & 3;
        const uint8* rows = values(slot) + (warp_n * TN * 8 + g) * 128 + t * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half < halves) {
                uint32 b[TN][4];
#pragma unroll
                for (int j = 0; j < TN; j++) {
                    const uint4 v = *(const uint4*)(rows + j * 1024 + (half * 64 ^ (g & 1) << 6));  // see `swizzled`
                    b[j][0] = v.x, b[j][1] = v.y, b[j][2] = v.z, b[j][3] = v.w;
                }
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    const Weights w = load_weights(weights + (2 * i + half) * RECORD, lane);
#pragma unroll
                    for (int j = 0; j < TN; j++) multiply(lower[i][j], upper[i][j], w, b[j]);
                }
            }
        }
    }

    // The requantized accumulators of the block, as an output tile [BN][OUT] of pairs in the pipeline's place, then in
    // 16-byte stores to memory.
    __device__ __forceinline__ void store_scaled(const Epilogue& e, int64 row0, int rows, int first, int last,
                                                 int padded) {
        uint16* out = (uint16*)memory;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int within = (warp_m * TM + i) * 16 + 8 * half + (lane >> 2);
                const int bias = e.bias[padded + within];
                const float multiplier = e.multiplier[padded + within];
                const bool real = first + within < last;  // spare codes of a padded row are zero
#pragma unroll
                for (int j = 0; j < TN; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int row = (warp_n * TN + j) * 8 + 2 * (lane & 3) + c;
                        const uint32 pair = scaled(e, lower[i][j][2 * half + c] + bias, multiplier) |
                                            scaled(e, upper[i][j][2 * half + c] + bias, multiplier) << 8;
                        out[row * OUT + within] = real ? (uint16)pair : (uint16)0;
                    }
            }
        __syncthreads();  // the tile is complete
        const int stop = (last + 7) / 8 * 8;
        for (int q = threadIdx.x; q < BN * (BM / 8); q += THREADS) {
            const int row = q / (BM / 8), eight = q % (BM / 8) * 8;
            if (row < rows && first + eight < stop) {
                *(uint4*)((uint8*)e.first + (row0 + row) * e.pitch + (int64)(first + eight) * 2) =
                    *(const uint4*)(out + row * OUT + eight);
            }
        }
    }

    // Ends and thresholds: the accumulators themselves pass through the pipeline's memory, TN slices of 8 rows per warp,
    // and are finished in a loop that is short to compile and keeps few registers.
    __device__ __forceinline__ void store_others(const Epilogue& e, int64 row0, int rows, int first, int last,
                                                 int padded) {
        int2* slice = (int2*)memory;
        const int stop = e.kind == ENDS ? last : (last + 7) / 8 * 8;
#pragma unroll 1
        for (int step = 0; step < TN; step++) {
#pragma unroll
            for (int j = 0; j < TN; j++)
                if (j == step)
#pragma unroll
                    for (int i = 0; i < TM; i++)
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            const int within = (warp_m * TM + i) * 16 + 8 * (c >> 1) + (lane >> 2);
                            slice[(warp_n * 8 + 2 * (lane & 3) + (c & 1)) * SLICE + within] =
                                make_int2(lower[i][j][c], upper[i][j][c]);
                        }
            __syncthreads();  // the slice is complete
#pragma unroll 1
            for (int q = threadIdx.x; q < 8 * WARPS_N * BM; q += THREADS) {
                const int within = q % BM, neuron = first + within;
                const int row = (q / BM / 8 * TN + step) * 8 + q / BM % 8;
                if (row < rows && neuron < stop) {
                    const int2 sums = slice[q / BM * SLICE + within];
                    const int bias = e.bias[padded + within];
                    if (e.kind == ENDS) {
                        ((int*)e.first)[(row0 + row) * e.neurons + neuron] = sums.x + bias;
                        e.second[(row0 + row) * e.neurons + neuron] = sums.y + bias;
                    } else {
                        ((uint16*)((uint8*)e.first + (row0 + row) * e.pitch))[neuron] =
                            neuron < last ? (uint16)pair_of(e, padded + within, sums.x + bias, sums.y + bias)
                                          : (uint16)0;
                    }
                }
            }
            __syncthreads();  // the slice is free
        }
    }

    // `first`, `last`: the block's neurons among all; `padded`: where its entries begin in the padded parameter arrays.
    __device__ __forceinline__ void finish(const Epilogue& e, int64 row0, int all_rows, int first, int last,
                                           int padded) {
        copy_wait<0>();
        __syncthreads();  // every warp is done with the pipeline: its memory is free
        const int rows = all_rows - row0 < BN ? (int)(all_rows - row0) : BN;
        if (e.kind == SCALE) {
            store_scaled(e, row0, rows, first, last, padded);
        } else {
            store_others(e, row0, rows, first, last, padded);
        }
    }
};

// `load(slot, k)` issues the copies of stage k. The barrier at the top of a turn says both that stage k has landed and
// that every warp has finished stage k - 1, whose slot the next load fills.
template <class T, class Load>
__device__ __forceinline__ void run_pipeline(T& tile, int k_blocks, Load load) {
    const int turns = (k_blocks + 1) / 2;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < turns) load(s, s);
        copy_commit();
    }
    int slot = 0, next = STAGES - 1;
#pragma unroll 1
    for (int k = 0; k < turns; k++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // stage k is here, slot `next` is free
        if (k + STAGES - 1 < turns) load(next, k + STAGES - 1);
        copy_commit();
        tile.compute(slot, k_blocks - 2 * k);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

// x: pairs, `x_pitch` bytes (a multiple of 16) from row to row. weights: records [padded neurons / 16][even k_blocks].
// Blocks: x counts tiles, those of the same rows next to each other so that the rows stay in L2.
template <class T>
__device__ __forceinline__ void dense(const Epilogue& e, const uint8* x, const uint8* weights, int rows, int x_pitch,
                                      int k_blocks, int m_tiles) {
    DYNAMIC_SHARED(memory);
    const int m0 = (int)(blockIdx.x % m_tiles) * T::BM;
    const int64 row0 = (int64)(blockIdx.x / m_tiles) * T::BN;
    const int stored = (k_blocks + 1) / 2 * 2;
    const uint8* records = weights + (int64)m0 / 16 * stored * RECORD;
    const int column = (threadIdx.x & 7) * 16, r0 = threadIdx.x >> 3;
    constexpr int ROW_STEP = T::THREADS / 8;
    const uint8* from = x + row0 * x_pitch;
    const int last = rows - row0 < T::BN ? (int)(rows - row0) - 1 : T::BN - 1;
    T tile;
    tile.start(memory);
    run_pipeline(tile, k_blocks, [&](int slot, int k) {
        tile.copy_weights(slot, records, k, stored);
        // Bytes past the end of a row meet zero weights, rows past the last are never stored: any valid address will do.
        const int at = k * 128 + column < x_pitch ? k * 128 + column : 0;
        uint8* to = tile.values(slot) + swizzled(r0, column);
#pragma unroll 4
        for (int q = 0; q < T::BN / ROW_STEP; q++) {
            const int r = r0 + q * ROW_STEP;  // all even or all odd
            copy_async<16>(to + q * ROW_STEP * 128, from + ((r < last ? r : last) * x_pitch + at));
        }
    });
    tile.finish(e, row0, rows, m0, e.neurons, m0);
}

// An implicit matrix product: row = output pixel, input k = (tap, channel). x: pairs NHWC. `taps` [k_blocks rounded up to
// even, 64 / PIECE per block] int2: dy << 16 | dx & 0xffff, and the byte offset from the window's first pixel; a dy of
// -2^15 is nowhere inside. `fill`: 16 bytes of padding. `group_bytes` apart lie the inputs of two groups.
template <class T, int PIECE>
__device__ __forceinline__ void conv(const Epilogue& e, const uint8* x, const uint8* weights, const int2* taps,
                                     const uint8* fill, int rows, const Image& image, int k_blocks, int m_tiles,
                                     int groups, int group_bytes) {
    DYNAMIC_SHARED(memory);
    const int group = blockIdx.y, m0 = (int)(blockIdx.x % m_tiles) * T::BM;
    const int64 row0 = (int64)(blockIdx.x / m_tiles) * T::BN;
    const int stored = (k_blocks + 1) / 2 * 2, padded = (group * m_tiles) * T::BM + m0;
    const uint8* records = weights + (int64)padded / 16 * stored * RECORD;
    constexpr int PER_ROW = 128 / PIECE, ROW_STEP = T::THREADS / PER_ROW;
    const int piece = threadIdx.x % PER_ROW, r0 = threadIdx.x / PER_ROW;
    // Where each row's window begins: 64-bit offset of its first pixel, which may lie outside, and its coordinates.
    int4* windows = (int4*)(memory + T::PIPELINE);
    for (int r = threadIdx.x; r < T::BN; r += T::THREADS) {
        const int row = row0 + r < rows ? (int)row0 + r : rows - 1;
        const int place = row % (image.out_height * image.out_width), n = row / (image.out_height * image.out_width);
        const int y0 = place / image.out_width * image.stride_y - image.top;
        const int x0 = place % image.out_width * image.stride_x - image.left;
        const int64 offset = (((int64)n * image.height + y0) * image.width + x0) * image.pixel + group * group_bytes;
        windows[r] = make_int4((int)(offset & 0xffffffff), (int)(offset >> 32), y0, x0);
    }
    __syncthreads();  // the windows are known
    T tile;
    tile.start(memory);
    run_pipeline(tile, k_blocks, [&](int slot, int k) {
        tile.copy_weights(slot, records, k, stored);
        const int2 tap = taps[k * PER_ROW + piece];
        const int dy = tap.x >> 16, dx = (int)(short)(tap.x & 0xffff);
        uint8* to = tile.values(slot) + swizzled(r0, piece * PIECE);
#pragma unroll 4
        for (int q = 0; q < T::BN / ROW_STEP; q++) {
            const int r = r0 + q * ROW_STEP;  // all even or all odd
            const int4 window = windows[r];
            const bool inside = (uint32)(window.z + dy) < (uint32)image.height &&
                                (uint32)(window.w + dx) < (uint32)image.width;
            const int64 offset = ((int64)window.y << 32 | (uint32)window.x) + tap.y;
            copy_async<PIECE>(to + q * ROW_STEP * 128, inside ? x + offset : fill);
        }
    });
    const int group_neurons = e.neurons / groups, begin = group * group_neurons;
    tile.finish(e, row0, rows, begin + m0, begin + group_neurons, padded);
}

// Blocks of a multiprocessor, which bound the registers of a thread: 168 of them, or 255.
#if VARIANT == 1
#define NARROW_BLOCKS 3
#else
#define NARROW_BLOCKS 2
#endif

typedef Tile<2, 4, 4, 4> Wide;    // 128 neurons x 128 rows
typedef Tile<1, 4, 4, 4> Narrow;  // 64 neurons x 128 rows
typedef Tile<1, 4, 1, 4> Thin;    // 16 neurons x 128 rows

#define DENSE(T)                                                                                                      \
    (EPILOGUE_PARAMETERS, const uint8* x, const uint8* weights, int rows, int x_pitch, int k_blocks, int m_tiles) {   \
        dense<T>(EPILOGUE, x, weights, rows, x_pitch, k_blocks, m_tiles);                                             \
    }
#define CONV(T, PIECE)                                                                                                \
    (EPILOGUE_PARAMETERS, const uint8* x, const uint8* weights, const int2* taps, const uint8* fill, int rows,        \
     IMAGE_PARAMETERS, int k_blocks, int m_tiles, int groups, int group_bytes) {                                      \
        conv<T, PIECE>(EPILOGUE, x, weights, taps, fill, rows, IMAGE, k_blocks, m_tiles, groups, group_bytes);        \
    }

extern "C" __global__ void __launch_bounds__(256) dense_wide DENSE(Wide)
extern "C" __global__ void __launch_bounds__(128, NARROW_BLOCKS) dense_narrow DENSE(Narrow)
extern "C" __global__ void __launch_bounds__(128) dense_thin DENSE(Thin)
extern "C" __global__ void __launch_bounds__(256) conv_wide CONV(Wide, 16)
extern "C" __global__ void __launch_bounds__(128, NARROW_BLOCKS) conv_narrow CONV(Narrow, 16)
extern "C" __global__ void __launch_bounds__(128) conv_thin CONV(Thin, 16)
// Few channels: pieces of two pairs, for inputs whose pixels are no multiple of 16 bytes.
extern "C" __global__ void __launch_bounds__(128, NARROW_BLOCKS) conv_few_narrow CONV(Narrow, 4)
extern "C" __global__ void __launch_bounds__(128) conv_few_thin CONV(Thin, 4)

// ---- a whole small network -------------------------------------------------------------------------------------------

// Every warp takes 8 TN boxes through all layers; the weights of all layers stay in shared memory, what lies between
// layers in the warp's own part of it. A layer has at most 16 TM neurons, so that a warp holds all its sums before it
// writes their codes over its inputs. Nothing but boxes and results passes through device memory.
struct Network {
    const uint8* records;     // of all layers, [padded neurons / 16][even k_blocks] each
    const int* layers;        // [count][8]: k_blocks, tiles of 16 neurons, first byte of the records, first parameter,
                              // then for a requantized layer least, most (the bits of floats), offset
    const int* bias;          // of all layers, padded to 16
    const float* multiplier;  // likewise
    const uint8* x;           // pairs [rows, x_pitch / 2, 2]
    void* first;              // as in Epilogue
    int* second;
    int kind;  // of the last layer: ENDS or SCALE
    int count, record_bytes, rows, x_pitch, neurons, pitch;
    int between;  // bytes from one row to the next of what lies between layers
};

template <int TM, int TN>
struct Sums {
    int lower[TM][TN][4], upper[TM][TN][4];

    // `pairs(j, k)`: the lane's 16 bytes of block k of 32 inputs, of rows 8 j ... 8 j + 7.
    template <class Pairs>
    __device__ __forceinline__ void product(const uint8* records, int k_blocks, int tiles, int lane, Pairs pairs) {
        const int stored = (k_blocks + 1) / 2 * 2;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) lower[i][j][c] = upper[i][j][c] = 0;
        uint4 next[TN];
#pragma unroll
        for (int j = 0; j < TN; j++) next[j] = pairs(j, 0);
#pragma unroll 1
        for (int k = 0; k < k_blocks; k++) {
            uint32 b[TN][4];
#pragma unroll
            for (int j = 0; j < TN; j++) {
                b[j][0] = next[j].x, b[j][1] = next[j].y, b[j][2] = next[j].z, b[j][3] = next[j].w;
                if (k + 1 < k_blocks) next[j] = pairs(j, k + 1);
            }
#pragma unroll
            for (int i = 0; i < TM; i++)
                if (i < tiles) {
                    const Weights w = load_weights(records + (i * stored + k) * RECORD, lane);
#pragma unroll
                    for (int j = 0; j < TN; j++) multiply(lower[i][j], upper[i][j], w, b[j]);
                }
        }
    }
};

template <int TM, int TN>
__device__ __forceinline__ void network(const Network& n) {
    DYNAMIC_SHARED(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    for (int q = threadIdx.x * 16; q < n.record_bytes; q += blockDim.x * 16) copy_async<16>(memory + q, n.records + q);
    copy_commit();
    copy_wait<0>();
    __syncthreads();  // the weights are here; from now on every warp is on its own
    uint8* own = memory + n.record_bytes + warp * 8 * TN * n.between;
    for (int64 row0 = ((int64)blockIdx.x * warps + warp) * (8 * TN); row0 < n.rows;
         row0 += (int64)gridDim.x * warps * (8 * TN)) {
        const int rows = n.rows - row0 < 8 * TN ? (int)(n.rows - row0) : 8 * TN;
        for (int l = 0; l < n.count; l++) {
            const int* layer = n.layers + 8 * l;
            const int k_blocks = layer[0], tiles = layer[1];
            const uint8* records = memory + layer[2];
            Sums<TM, TN> sums;
            if (l == 0) {
                const uint8* from = n.x + row0 * n.x_pitch;
                sums.product(records, k_blocks, tiles, lane, [&](int j, int k) {
                    const int row = 8 * j + g < rows ? 8 * j + g : rows - 1;
                    const int at = k * 64 + t * 16 < n.x_pitch ? k * 64 + t * 16 : 0;  // past the end weights are zero
                    return *(const uint4*)(from + (row * n.x_pitch + at));
                });
            } else {
                const uint8* from = own + g * n.between + t * 16;
                sums.product(records, k_blocks, tiles, lane, [&](int j, int k) {
                    return *(const uint4*)(from + (8 * j * n.between + k * 64));
                });
            }
            __syncwarp();  // every lane has read its inputs: codes may take their place
            const bool ends = l == n.count - 1 && n.kind == ENDS;
            Epilogue e;
            e.least = __int_as_float(layer[4]), e.most = __int_as_float(layer[5]), e.offset = layer[6];
#pragma unroll
            for (int i = 0; i < TM; i++)
                if (i < tiles)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int neuron = 16 * i + 8 * half + g;
                        const int bias = n.bias[layer[3] + neuron];
                        const float multiplier = n.multiplier[layer[3] + neuron];
#pragma unroll
                        for (int j = 0; j < TN; j++)
#pragma unroll
                            for (int c = 0; c < 2; c++) {
                                const int row = 8 * j + 2 * t + c;
                                const int low = sums.lower[i][j][2 * half + c] + bias;
                                const int high = sums.upper[i][j][2 * half + c] + bias;
                                if (!ends) {
                                    *(uint16*)(own + row * n.between + 2 * neuron) =
                                        (uint16)(scaled(e, low, multiplier) | scaled(e, high, multiplier) << 8);
                                } else if (row < rows && neuron < n.neurons) {
                                    ((int*)n.first)[(row0 + row) * n.neurons + neuron] = low;
                                    n.second[(row0 + row) * n.neurons + neuron] = high;
                                }
                            }
                    }
            __syncwarp();  // the codes are here
        }
        if (n.kind != ENDS) {
            for (int q = lane; q < rows * (n.pitch / 2); q += 32) {
                const int row = q / (n.pitch / 2), neuron = q % (n.pitch / 2);
                *(uint16*)((uint8*)n.first + (row0 + row) * n.pitch + 2 * neuron) =
                    neuron < n.neurons ? *(const uint16*)(own + row * n.between + 2 * neuron) : (uint16)0;
            }
            __syncwarp();  // the codes are stored
        }
    }
}

#define NETWORK(TM, TN)                                                                                               \
    (const uint8* records, const int* layers, const int* bias, const float* multiplier, const uint8* x, void* first,  \
     int* second, int kind, int count, int record_bytes, int rows, int x_pitch, int neurons, int pitch,               \
     int between) {                                                                                                   \
        network<TM, TN>(Network{records, layers, bias, multiplier, x, first, second, kind, count, record_bytes, rows, \
                                x_pitch, neurons, pitch, between});                                                   \
    }

extern "C" __global__ void __launch_bounds__(384) network_64 NETWORK(4, 2)      // at most 64 neurons in a layer
extern "C" __global__ void __launch_bounds__(256, 2) network_128 NETWORK(8, 1)  // at most 128

#endif  // VARIANT
