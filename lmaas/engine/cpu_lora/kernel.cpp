// LoRA for a batch whose rows belong to different adapters: y[row] += scale * B[slot] (A[slot] x[row]), at each slot's own rank.
//
// Rows come grouped by slot, so each adapter's weights are read once per call, however many rows use them, and an absent or padded
// rank costs nothing. Two phases with one barrier: "shrink" makes h = A x for every (slice, slot, row), "expand" adds h B to y.
//
// A row's sums are always taken in the same order, whatever else is in the batch and however many threads run: what is added to a row
// does not depend on its neighbours. No row reads another row's values, so one adapter's overflow stays its own.
//
// No dependency on torch or Python: it needs GCC's vector extensions and OpenMP, and is called through ctypes (native.py, which
// mirrors the structs below). GCC's build is loaded after torch, whose libgomp it then shares: a second pool would fight the first.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

typedef uint16_t bf16;  // the upper half of a float32

struct Slice {                 // one of the projections that a merged layer computes in one GEMM
    const void* a;             // [slots, ranks, in], `a_slot` elements from slot to slot; rows of `in` are contiguous
    const void* b;             // [slots, ranks, out], `b_slot` elements from slot to slot, `b_rank` from rank to rank
    int64_t a_slot, b_slot, b_rank;
    int64_t out, offset;       // columns offset … offset + out of y
    const int64_t* rank;       // by slot; 0: this slice is not adapted
};

struct Layer {
    int64_t n_slices, in, bfloat16;  // bfloat16: 1 where x, y, A and B are; else all are float32
    const Slice* slices;
};

struct Groups {                // rows of the batch by slot
    int64_t n;
    const int64_t* slot;       // [n]
    const int64_t* start;      // [n + 1] into `rows`
    const int64_t* rows;       // indices of x and y
};

struct Call {
    const Layer* layer;
    const Groups* groups;
    const void* x;
    void* y;
    int64_t x_row, y_row;      // elements from row to row
    float* h;                  // scratch [n_slices, start[n], h_row]
    int64_t h_row;             // the largest rank in `layer`
    float scale;
};

constexpr int ROWS = 4, RANKS = 4, VECTORS = 4;  // a tile: 16 vector accumulators
constexpr int64_t ROW_BLOCK = 64;                // rows that share one look at a tile of B
constexpr int64_t WORTH_THREADS = 16384;         // multiply-adds below which waking threads costs more than it saves

inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

#define INLINE static inline __attribute__((always_inline))

// Vectors of W floats, which become whatever registers the target of the function that all of this is inlined into has.
template <int W> struct Vec {
    typedef float Floats __attribute__((vector_size(W * 4), aligned(4), may_alias));
    typedef uint32_t Words __attribute__((vector_size(W * 4), aligned(4), may_alias));
    typedef uint16_t Halves __attribute__((vector_size(W * 2), aligned(2), may_alias));
};
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
template <int W> using Floats = typename Vec<W>::Floats;
template <int W> using Words = typename Vec<W>::Words;
template <int W> using Halves = typename Vec<W>::Halves;

INLINE float value(float v) { return v; }
INLINE float value(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

INLINE void put(float* at, float v) { *at = v; }
INLINE void put(bf16* at, float v) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    *at = v != v ? bf16((bits >> 16) | 64) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <int W> INLINE void load(Floats<W>& v, const float* at) { v = *(const Floats<W>*)at; }
template <int W> INLINE void load(Floats<W>& v, const bf16* at) { v = (Floats<W>)(__builtin_convertvector(*(const Halves<W>*)at, Words<W>) << 16); }

template <int W> INLINE void add_to(float* at, const Floats<W>& v) { *(Floats<W>*)at += v; }
template <int W> INLINE void add_to(bf16* at, const Floats<W>& v) {  // as `put`
    Floats<W> sum;
    load<W>(sum, at);
    sum += v;
    Words<W> bits = (Words<W>)sum, nan = (Words<W>)(sum != sum);
    Words<W> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(Halves<W>*)at = __builtin_convertvector((nan & ((bits >> 16) | 64)) | (~nan & rounded), Halves<W>);
}

template <int W> INLINE float total(const Floats<W>& v) {
    Four sum = *(const Four*)&v;
    for (int i = 4; i < W; i += 4) sum += *((const Four*)&v + i / 4);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// h[M, R] = scale * x[M, in] A[R, in]ᵀ
template <int W, int M, int R, typename T>
INLINE void shrink_tile(const T* const* x, const T* a, int64_t in, float scale, float* h, int64_t h_row) {
    Floats<W> sum[M][R] = {};
    int64_t k = 0;
    for (; k + W <= in; k += W) {
        Floats<W> xs[M];
        for (int m = 0; m < M; ++m) load<W>(xs[m], x[m] + k);
        for (int r = 0; r < R; ++r) {
            Floats<W> weights;
            load<W>(weights, a + r * in + k);
            for (int m = 0; m < M; ++m) sum[m][r] += xs[m] * weights;
        }
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) {
            float dot = total<W>(sum[m][r]);
            for (int64_t i = k; i < in; ++i) dot += value(x[m][i]) * value(a[r * in + i]);
            h[m * h_row + r] = scale * dot;
        }
}

template <int W, int M, typename T>
INLINE void shrink_rows(const T* const* x, const T* a, int64_t in, int64_t ranks, float scale, float* h, int64_t h_row) {
    int64_t r = 0;
    for (; r + RANKS <= ranks; r += RANKS) shrink_tile<W, M, RANKS>(x, a + r * in, in, scale, h + r, h_row);
    for (; r < ranks; ++r) shrink_tile<W, M, 1>(x, a + r * in, in, scale, h + r, h_row);
}

// y[M, columns] += h[M, ranks] B[ranks, columns]
template <int W, int M, typename T>
INLINE void expand_rows(T* const* y, const float* h, int64_t h_row, const T* b, int64_t b_rank, int64_t ranks, int64_t columns) {
    int64_t c = 0;
    for (; c + W * VECTORS <= columns; c += W * VECTORS) {
        Floats<W> sum[M][VECTORS] = {};
        for (int64_t r = 0; r < ranks; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                Floats<W> weights;
                load<W>(weights, b + r * b_rank + c + v * W);
                for (int m = 0; m < M; ++m) sum[m][v] += weights * h[m * h_row + r];
            }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < VECTORS; ++v) add_to<W>(y[m] + c + v * W, sum[m][v]);
    }
    for (; c + W <= columns; c += W) {
        Floats<W> sum[M] = {};
        for (int64_t r = 0; r < ranks; ++r) {
            Floats<W> weights;
            load<W>(weights, b + r * b_rank + c);
            for (int m = 0; m < M; ++m) sum[m] += weights * h[m * h_row + r];
        }
        for (int m = 0; m < M; ++m) add_to<W>(y[m] + c, sum[m]);
    }
    for (; c < columns; ++c)
        for (int m = 0; m < M; ++m) {
            float sum = 0;
            for (int64_t r = 0; r < ranks; ++r) sum += value(b[r * b_rank + c]) * h[m * h_row + r];
            put(y[m] + c, value(y[m][c]) + sum);
        }
}

// The part of [first, last) that a range of `count` units starting at `seen` covers, as offsets within that range.
struct Part {
    int64_t from, to;
    Part(int64_t first, int64_t last, int64_t seen, int64_t count)
        : from(first > seen ? first - seen : 0), to(last - seen < count ? last - seen : count) {}
};

// Units of work, numbered in the order of the loops: a thread takes one contiguous range of them, so it meets few weights.
// Shrink: a tile of rows. Expand: a strip of columns for a block of rows.
template <int W, typename T> INLINE void shrink(const Call& call, int64_t first, int64_t last) {
    const Layer& layer = *call.layer;
    const Groups& groups = *call.groups;
    int64_t seen = 0, all_rows = groups.start[groups.n];
    for (int64_t s = 0; s < layer.n_slices && seen < last; ++s)
        for (int64_t g = 0; g < groups.n && seen < last; ++g) {
            const Slice& slice = layer.slices[s];
            int64_t slot = groups.slot[g], ranks = slice.rank[slot], end = groups.start[g + 1];
            if (!ranks) continue;
            const T* a = (const T*)slice.a + slot * slice.a_slot;
            int64_t n = tiles(end - groups.start[g], ROWS);
            Part part(first, last, seen, n);
            seen += n;
            for (int64_t unit = part.from; unit < part.to; ++unit) {
                int64_t p = groups.start[g] + unit * ROWS;
                const T* x[ROWS];
                for (int m = 0; m < ROWS && p + m < end; ++m) x[m] = (const T*)call.x + groups.rows[p + m] * call.x_row;
                float* h = call.h + (s * all_rows + p) * call.h_row;
                switch (end - p) {
                    case 1: shrink_rows<W, 1>(x, a, layer.in, ranks, call.scale, h, call.h_row); break;
                    case 2: shrink_rows<W, 2>(x, a, layer.in, ranks, call.scale, h, call.h_row); break;
                    case 3: shrink_rows<W, 3>(x, a, layer.in, ranks, call.scale, h, call.h_row); break;
                    default: shrink_rows<W, 4>(x, a, layer.in, ranks, call.scale, h, call.h_row);
                }
            }
        }
}

template <int W, typename T> INLINE void expand(const Call& call, int64_t first, int64_t last) {
    const Layer& layer = *call.layer;
    const Groups& groups = *call.groups;
    constexpr int64_t STRIP = W * VECTORS;
    int64_t seen = 0, all_rows = groups.start[groups.n];
    for (int64_t s = 0; s < layer.n_slices && seen < last; ++s)
        for (int64_t g = 0; g < groups.n && seen < last; ++g) {
            const Slice& slice = layer.slices[s];
            int64_t slot = groups.slot[g], ranks = slice.rank[slot];
            if (!ranks) continue;
            int64_t blocks = tiles(groups.start[g + 1] - groups.start[g], ROW_BLOCK);
            int64_t n = tiles(slice.out, STRIP) * blocks;
            Part part(first, last, seen, n);
            seen += n;
            for (int64_t unit = part.from; unit < part.to; ++unit) {
                int64_t column = unit / blocks * STRIP;
                int64_t columns = slice.out - column < STRIP ? slice.out - column : STRIP;
                const T* b = (const T*)slice.b + slot * slice.b_slot + column;
                int64_t p = groups.start[g] + unit % blocks * ROW_BLOCK;
                int64_t end = p + ROW_BLOCK < groups.start[g + 1] ? p + ROW_BLOCK : groups.start[g + 1];
                for (; p < end; p += ROWS) {
                    T* y[ROWS];
                    for (int m = 0; m < ROWS && p + m < end; ++m)
                        y[m] = (T*)call.y + groups.rows[p + m] * call.y_row + slice.offset + column;
                    const float* h = call.h + (s * all_rows + p) * call.h_row;
                    switch (end - p) {
                        case 1: expand_rows<W, 1>(y, h, call.h_row, b, slice.b_rank, ranks, columns); break;
                        case 2: expand_rows<W, 2>(y, h, call.h_row, b, slice.b_rank, ranks, columns); break;
                        case 3: expand_rows<W, 3>(y, h, call.h_row, b, slice.b_rank, ranks, columns); break;
                        default: expand_rows<W, 4>(y, h, call.h_row, b, slice.b_rank, ranks, columns);
                    }
                }
            }
        }
}

typedef void (*Phase)(const Call&, int64_t, int64_t);
struct Kernels {
    const char* name;
    int width;
    Phase shrink[2], expand[2];  // float32, bfloat16
};

#define KERNELS(NAME, W, TARGET)                                                                       \
    TARGET void shrink_f32_##NAME(const Call& c, int64_t i, int64_t j) { shrink<W, float>(c, i, j); }  \
    TARGET void shrink_bf16_##NAME(const Call& c, int64_t i, int64_t j) { shrink<W, bf16>(c, i, j); }  \
    TARGET void expand_f32_##NAME(const Call& c, int64_t i, int64_t j) { expand<W, float>(c, i, j); }  \
    TARGET void expand_bf16_##NAME(const Call& c, int64_t i, int64_t j) { expand<W, bf16>(c, i, j); }  \
    const Kernels NAME = {#NAME, W, {shrink_f32_##NAME, shrink_bf16_##NAME}, {expand_f32_##NAME, expand_bf16_##NAME}};

KERNELS(generic, 4, )
#if defined(__x86_64__)
KERNELS(avx2, 8, __attribute__((target("avx2,fma"))))
#if defined(__clang__)
KERNELS(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#else
KERNELS(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))))
#endif
#endif

// The `index`th of the sets of kernels that this processor can run, best first; null behind the last.
const Kernels* runnable(int64_t index) {
    const Kernels* found[3];
    int64_t n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        found[n++] = &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = &avx2;
#endif
    found[n++] = &generic;
    return index < n ? found[index] : nullptr;
}

const Kernels* chosen = runnable(0);

}  // namespace

extern "C" {

// Use the `index`th set of kernels from now on, best first. Answers its name, null if there is none.
const char* lmaas_lora_use(int64_t index) {
    const Kernels* wanted = runnable(index);
    if (!wanted) return nullptr;
    chosen = wanted;
    return chosen->name;
}

void lmaas_lora_add(const Call* call) {
    const Kernels& kernels = *chosen;
    const Layer& layer = *call->layer;
    const Groups& groups = *call->groups;
    int64_t shrink_units = 0, expand_units = 0, work = 0;
    for (int64_t s = 0; s < layer.n_slices; ++s)
        for (int64_t g = 0; g < groups.n; ++g) {
            const Slice& slice = layer.slices[s];
            int64_t n = groups.start[g + 1] - groups.start[g], ranks = slice.rank[groups.slot[g]];
            if (!ranks) continue;
            shrink_units += tiles(n, ROWS);
            expand_units += tiles(slice.out, kernels.width * VECTORS) * tiles(n, ROW_BLOCK);
            work += n * ranks * (layer.in + slice.out);
        }
    Phase shrink = kernels.shrink[layer.bfloat16], expand = kernels.expand[layer.bfloat16];
#pragma omp parallel if (work >= WORTH_THREADS)
    {
        int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
        shrink(*call, shrink_units * t / threads, shrink_units * (t + 1) / threads);
#pragma omp barrier
        expand(*call, expand_units * t / threads, expand_units * (t + 1) / threads);
    }
}
}
