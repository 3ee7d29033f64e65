// y = w ∘ x·r with r = 1/√(mean(x²) + ε). One block a row.
extern "C" __global__ void rms_norm(const scalar* x, const scalar* w, scalar* y, int columns, int vectors, float epsilon) {
    x += (size_t)blockIdx.x * columns;
    y += (size_t)blockIdx.x * columns;
    float squares = 0.f;
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V];
        read(x + c, lanes, a);
        for (int i = 0; i < lanes; i++) squares += a[i] * a[i];
    });
    float r = rsqrtf(block_sum(squares) / columns + epsilon);
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V], b[V];
        read(x + c, lanes, a);
        read(w + c, lanes, b);
        for (int i = 0; i < lanes; i++) a[i] = rounded(a[i] * r) * b[i];
        write(y + c, lanes, a);
    });
}

// dx = r·(w∘dy) − x·r³·mean(w∘dy∘x) + added, which may be missing; `inverse`, if given, gets r, and `y`, which may be dy,
// what rms_norm makes of x.
extern "C" __global__ void rms_norm_backward(const scalar* x, const scalar* w, const scalar* dy, const scalar* added,
                                             scalar* dx, scalar* y, float* inverse, int columns, int vectors,
                                             float epsilon) {
    size_t row = (size_t)blockIdx.x * columns;
    x += row, dy += row, dx += row;
    if (added) added += row;
    if (y) y += row;
    float squares = 0.f, products = 0.f;
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V], b[V], d[V];
        read(x + c, lanes, a);
        read(w + c, lanes, b);
        read(dy + c, lanes, d);
        for (int i = 0; i < lanes; i++) squares += a[i] * a[i], products += d[i] * b[i] * a[i];
    });
    float r = rsqrtf(block_sum(squares) / columns + epsilon);
    float along = block_sum(products) * r * r * r / columns;
    if (inverse && threadIdx.x == 0) inverse[blockIdx.x] = r;
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V], b[V], d[V], more[V] = {};
        read(x + c, lanes, a);
        read(w + c, lanes, b);
        read(dy + c, lanes, d);
        if (added) read(added + c, lanes, more);
        for (int i = 0; i < lanes; i++) {
            float normed = rounded(a[i] * r) * b[i];
            a[i] = d[i] * b[i] * r - a[i] * along + more[i];
            d[i] = normed;
        }
        write(dx + c, lanes, a);
        if (y) write(y + c, lanes, d);
    });
}

// out[c] = Σ over rows of dy[row, c]·(x[row, c]·factor[row] if x else 1). Blocks of 32 × 8 threads, 32 columns each; the
// order of the sum is fixed.
extern "C" __global__ void column_sums(const scalar* dy, int stride, const scalar* x, const float* factor, scalar* out,
                                       int rows, int columns) {
    __shared__ float partial[8][33];
    int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.f;
    if (c < columns)
        for (int row = threadIdx.y; row < rows; row += 8) {
            float d = to_float(dy[(size_t)row * stride + c]);
            sum += x ? d * rounded(to_float(x[(size_t)row * columns + c]) * factor[row]) : d;
        }
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < columns) {
        for (int i = 1; i < 8; i++) sum += partial[i][threadIdx.x];
        out[c] = to_scalar(sum);
    }
}

// y[row, c] += bias[c] in a matrix whose rows are `stride` apart.
extern "C" __global__ void add_bias(scalar* y, int stride, const scalar* bias, int rows, int columns) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= (long long)rows * columns) return;
    int c = (int)(i % columns);
    scalar* p = y + i / columns * stride + c;
    *p = to_scalar(to_float(*p) + to_float(bias[c]));
}

// y += x, elements one after another.
template <int LANES>
__device__ __forceinline__ void add_piece(const scalar* x, scalar* y, long long count) {
    long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * LANES;
    if (i >= count) return;
    float a[V], b[V];
    read(x + i, LANES, a);
    read(y + i, LANES, b);
#pragma unroll
    for (int j = 0; j < LANES; j++) b[j] += a[j];
    write(y + i, LANES, b);
}

extern "C" __global__ void add_onto(const scalar* x, scalar* y, long long count, int vectors) {
    if (vectors) add_piece<V>(x, y, count);
    else add_piece<1>(x, y, count);
}

// A block of Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ uint4 philox(unsigned c0, unsigned c1, unsigned c2, unsigned k0, unsigned k1) {
    unsigned c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// y = x∘mask, or y += x∘mask: an element is dropped where its random word is below `threshold`. Blocks (row, ·).
template <int LANES>
__device__ __forceinline__ void dropout_piece(const scalar* x, scalar* y, int columns, unsigned k0, unsigned k1,
                                              unsigned threshold, float kept, int accumulate) {
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * LANES;
    if (c >= columns) return;
    size_t row = blockIdx.x;
    x += row * columns + c, y += row * columns + c;
    float a[V], b[V] = {};
    read(x, LANES, a);
    if (accumulate) read(y, LANES, b);
#pragma unroll
    for (int i = 0; i < LANES; i += 4) {
        uint4 random = philox((unsigned)(c + i) / 4, (unsigned)row, 0, k0, k1);
        unsigned words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (int j = 0; j < 4 && i + j < LANES; j++) {
            unsigned word = LANES == 1 ? words[c & 3] : words[j];
            a[i + j] = b[i + j] + (word < threshold ? 0.f : a[i + j] * kept);
        }
    }
    write(y, LANES, a);
}

extern "C" __global__ void dropout(const scalar* x, scalar* y, int columns, int vectors, unsigned k0, unsigned k1,
                                   unsigned threshold, float kept, int accumulate) {
    if (vectors) dropout_piece<V>(x, y, columns, k0, k1, threshold, kept, accumulate);
    else dropout_piece<1>(x, y, columns, k0, k1, threshold, kept, accumulate);
}

// σ(g) = 1/(1 + e⁻ᵍ) to 2 units in the last place; 0 where e⁻ᵍ overflows.
__device__ __forceinline__ float sigmoid(float g) { return __fdividef(1.f, 1.f + __expf(-g)); }

// silu(g) ∘ u of rows [g u] of 2·columns, LANES at a time. Blocks (row, ·).
template <int LANES>
__device__ __forceinline__ void gate_piece(const scalar* gate_up, scalar* y, int columns) {
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * LANES;
    if (c >= columns) return;
    size_t row = blockIdx.x;
    const scalar* p = gate_up + row * 2 * columns + c;
    float g[V], u[V];
    read(p, LANES, g);
    read(p + columns, LANES, u);
#pragma unroll
    for (int i = 0; i < LANES; i++) g[i] = rounded(g[i] * sigmoid(g[i])) * u[i];
    write(y + row * columns + c, LANES, g);
}

extern "C" __global__ void silu_gate(const scalar* gate_up, scalar* y, int columns, int vectors) {
    if (vectors) gate_piece<V>(gate_up, y, columns);
    else gate_piece<1>(gate_up, y, columns);
}

// dg = dy∘u∘σ∘(1 + g∘(1 − σ)), du = dy∘g∘σ. With `again`, dy becomes silu(g) ∘ u.
template <int LANES>
__device__ __forceinline__ void gate_piece_backward(const scalar* gate_up, scalar* dy, scalar* d, int columns, int again) {
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * LANES;
    if (c >= columns) return;
    size_t row = blockIdx.x, at = row * 2 * columns + c;
    float g[V], u[V], y[V];
    read(gate_up + at, LANES, g);
    read(gate_up + at + columns, LANES, u);
    read(dy + row * columns + c, LANES, y);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        float sigma = sigmoid(g[i]), silu = g[i] * sigma;
        float gated = rounded(silu) * u[i];
        g[i] = y[i] * u[i] * sigma * (1.f + g[i] * (1.f - sigma));
        u[i] = y[i] * silu;
        y[i] = gated;
    }
    write(d + at, LANES, g);
    write(d + at + columns, LANES, u);
    if (again) write(dy + row * columns + c, LANES, y);
}

extern "C" __global__ void silu_gate_backward(const scalar* gate_up, scalar* dy, scalar* d, int columns, int vectors,
                                              int again) {
    if (vectors) gate_piece_backward<V>(gate_up, dy, d, columns, again);
    else gate_piece_backward<1>(gate_up, dy, d, columns, again);
}

// Factors of up to three low-rank terms in the activations' type, times their scales. A factor is the matrix `from`; with a
// `core` [F B]·R − O, where F has `split` columns and B is `from`; with `inner` diag(outer)·B·diag(inner). Each is written to
// `columns` columns of `stride`, from `first` on, and to `rows` rows of `written`; the others of them get zeros.
struct Factor {
    const float* from; scalar* to; const float *core, *frozen, *offset, *outer, *inner;
    int rows, written, columns, first, stride, split;
    float scale;
};
__device__ __forceinline__ float factor_element(const Factor& f, int row, int c) {
    size_t at = (size_t)row * f.columns + c;
    if (f.inner) return f.from[at] * f.outer[row] * f.inner[c];
    if (!f.core) return f.from[at];
    const float* core = f.core + c;
    const float* left = f.frozen + (size_t)row * f.split;
    float sum = 0.f;
    for (int k = 0; k < f.split; k++) sum += left[k] * core[(size_t)k * f.columns];
    left = f.from + (size_t)row * (f.columns - f.split) - f.split;
    for (int k = f.split; k < f.columns; k++) sum += left[k] * core[(size_t)k * f.columns];
    return f.offset ? sum - f.offset[at] : sum;
}
struct Factors { Factor of[6]; };
// With `vectors`, rows of `to` begin at multiples of 16 bytes, and so do `from` and, where four divide `columns`, its rows.
template <int LANES>
__device__ __forceinline__ void cast_factor(const Factor& f) {
    int pieces = f.stride / LANES;
    bool plain = LANES > 1 && !f.core && !f.inner && f.columns % 4 == 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < f.written * pieces; i += gridDim.x * blockDim.x) {
        int row = i / pieces, column = (i - row * pieces) * LANES, c = column - f.first;
        float x[V] = {};
        if (f.from && row < f.rows) {
            if (plain && c >= 0 && c + LANES <= f.columns) {
                const float4* from = (const float4*)(f.from + (size_t)row * f.columns + c);
#pragma unroll
                for (int k = 0; k < LANES / 4; k++) {
                    float4 u = from[k];
                    x[4 * k] = u.x * f.scale, x[4 * k + 1] = u.y * f.scale;
                    x[4 * k + 2] = u.z * f.scale, x[4 * k + 3] = u.w * f.scale;
                }
            } else {
                for (int k = 0; k < LANES; k++)
                    if (c + k >= 0 && c + k < f.columns) x[k] = factor_element(f, row, c + k) * f.scale;
            }
        }
        write(f.to + (size_t)row * f.stride + column, LANES, x);
    }
}
extern "C" __global__ void cast_factors(const __grid_constant__ Factors factors, int vectors) {
    const Factor& f = factors.of[blockIdx.y];
    if (vectors) cast_factor<V>(f);
    else cast_factor<1>(f);
}

// Blocks of a matrix whose rows are `stride` apart, from an element on, each times its scale. Blocks (·, block).
struct Blocks { struct { float* to; int from, rows, columns; float scale; } of[3]; };
extern "C" __global__ void take_blocks(const float* matrix, int stride, const __grid_constant__ Blocks blocks) {
    const auto& block = blocks.of[blockIdx.y];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= block.rows * block.columns) return;
    block.to[i] = matrix[block.from + (size_t)(i / block.columns) * stride + i % block.columns] * block.scale;
}

// Of G = ∂(diag(outer)·B·diag(inner)): outer'[o] = Σᵢ G[o, i]·B[o, i]·inner[i] where blockIdx.y = 0, and inner'[i] =
// Σₒ G[o, i]·B[o, i]·outer[o] where it is 1; 32 of them a block of 32 × 32 threads, in a fixed order. Either may be missing.
extern "C" __global__ void scaled_gradients(const float* whole, int stride, const float* b, const float* outer,
                                            const float* inner, float* d_outer, float* d_inner, int rows, int columns) {
    __shared__ float partial[32][33];
    float sum = 0.f;
    if (blockIdx.y == 0) {
        int row = blockIdx.x * 32 + threadIdx.y;
        if (!d_outer || blockIdx.x * 32 >= rows) return;
        if (row < rows)
            for (int c = threadIdx.x; c < columns; c += 32)
                sum += whole[(size_t)row * stride + c] * b[(size_t)row * columns + c] * inner[c];
        sum = warp_sum(sum);
        if (threadIdx.x == 0 && row < rows) d_outer[row] = sum;
        return;
    }
    int c = blockIdx.x * 32 + threadIdx.x;
    if (!d_inner || blockIdx.x * 32 >= columns) return;
    if (c < columns)
        for (int row = threadIdx.y; row < rows; row += 32)
            sum += whole[(size_t)row * stride + c] * b[(size_t)row * columns + c] * outer[row];
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < columns) {
        for (int i = 1; i < 32; i++) sum += partial[i][threadIdx.x];
        d_inner[c] = sum;
    }
}

struct Running { float max, sum; int at; };

// The running maximum (the first of equals), and the sum of exponentials relative to it.
__device__ __forceinline__ Running merge(Running a, Running b) {
    if (b.sum == 0.f) return a;
    if (a.sum == 0.f) return b;
    bool second = b.max > a.max || (b.max == a.max && b.at < a.at);
    float max = fmaxf(a.max, b.max);
    return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max), second ? b.at : a.at};
}

// One block a row: losses[row] = logsumexp(z) − z[target], hits[row] = whether the target is the maximum, and with a scale
// z ← scale·(softmax(z) − e_target).
// Targets are int, or long long where `wide`.
extern "C" __global__ void cross_entropy(scalar* z, const int* targets, int wide, float* losses, int* hits, int columns,
                                         int vectors, int wants_gradient, float scale) {
    __shared__ Running of_warps[33];
    scalar* row = z + (size_t)blockIdx.x * columns;
    int target = wide ? (int)((const long long*)targets)[blockIdx.x] : targets[blockIdx.x];
    Running running = {0.f, 0.f, 0x7fffffff};
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V];
        read(row + c, lanes, a);
        Running piece = {a[0], 0.f, c};
        for (int i = 1; i < lanes; i++) if (a[i] > piece.max) piece.max = a[i], piece.at = c + i;
        for (int i = 0; i < lanes; i++) piece.sum += __expf(a[i] - piece.max);
        running = merge(running, piece);
    });
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        Running other = {__shfl_xor_sync(0xffffffffu, running.max, offset), __shfl_xor_sync(0xffffffffu, running.sum, offset),
                         __shfl_xor_sync(0xffffffffu, running.at, offset)};
        running = merge(running, other);
    }
    if ((threadIdx.x & 31) == 0) of_warps[threadIdx.x >> 5] = running;
    __syncthreads();
    if (threadIdx.x == 0) {
        Running total = of_warps[0];
        for (int i = 1; i < blockDim.x >> 5; i++) total = merge(total, of_warps[i]);
        of_warps[32] = total;
        losses[blockIdx.x] = total.max + __logf(total.sum) - to_float(row[target]);
        hits[blockIdx.x] = total.at == target;
    }
    __syncthreads();
    if (!wants_gradient) return;
    Running total = of_warps[32];
    float inverse = scale / total.sum;
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V];
        read(row + c, lanes, a);
        for (int i = 0; i < lanes; i++) a[i] = __expf(a[i] - total.max) * inverse - (c + i == target ? scale : 0.f);
        write(row + c, lanes, a);
    });
}

// The first place of each row's largest value. One block a row.
extern "C" __global__ void largest(const scalar* x, int* places, int columns, int vectors) {
    __shared__ float values[32];
    __shared__ int at[32];
    x += (size_t)blockIdx.x * columns;
    float top = __int_as_float(0xff800000);
    int place = 0x7fffffff;
    auto consider = [&](float value, int where) {
        if (value > top || (value == top && where < place)) top = value, place = where;
    };
    over_row(columns, vectors, [&](int c, int lanes) {
        float a[V];
        read(x + c, lanes, a);
        for (int i = 0; i < lanes; i++) consider(a[i], c + i);
    });
    auto across_warp = [&] {
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            float value = __shfl_xor_sync(0xffffffffu, top, offset);
            int where = __shfl_xor_sync(0xffffffffu, place, offset);
            consider(value, where);
        }
    };
    across_warp();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) values[warp] = top, at[warp] = place;
    __syncthreads();
    if (warp > 0) return;
    bool held = lane < blockDim.x >> 5;
    top = held ? values[lane] : __int_as_float(0xff800000), place = held ? at[lane] : 0x7fffffff;
    across_warp();
    if (lane == 0) places[blockIdx.x] = place < columns ? place : 0;
}

// Sums of both, by one block in a fixed order.
extern "C" __global__ void loss_totals(const float* losses, const int* hits, int rows, float* loss, int* correct) {
    float sum = 0.f, count = 0.f;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) sum += losses[i], count += (float)hits[i];
    sum = block_sum(sum);
    count = block_sum(count);
    if (threadIdx.x == 0) *loss = sum, *correct = (int)count;
}

// f32 tensors of a launch: blocks (·, i) take pieces of PIECE elements of tensor i in turn.
#define AT_ONCE 64
#define PIECE 4096

template <class Body>
__device__ __forceinline__ void over_pieces(int length, Body body) {
    for (long long begin = (long long)blockIdx.x * PIECE; begin < length; begin += (long long)gridDim.x * PIECE)
        for (int i = begin + threadIdx.x; i < min((long long)length, begin + PIECE); i += blockDim.x) body(i);
}

struct Updates {
    float* parameters[AT_ONCE];
    const float* gradients[AT_ONCE];
    float* firsts[AT_ONCE];
    float* seconds[AT_ONCE];
    int lengths[AT_ONCE];
    float rates[AT_ONCE], steps[AT_ONCE], roots[AT_ONCE];
};

// The factor of gradients clipped by their norm together, 1 without `norm_squared`; NaN where that is not finite.
__device__ __forceinline__ float clip_factor(const float* norm_squared, float max_norm, float clip_epsilon) {
    if (!norm_squared) return 1.f;
    float norm = sqrtf(*norm_squared);
    return norm <= 3.4e38f ? fminf(1.f, max_norm / (norm + clip_epsilon)) : __int_as_float(0x7fffffff);
}

// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← (1 − ηλ)θ − step·m/(√v/root + ε), with clipped gradients. Nothing changes
// where their norm is not finite.
extern "C" __global__ void adamw(const __grid_constant__ Updates t, float beta_1, float beta_2, float epsilon, float decay,
                                 const float* norm_squared, float max_norm, float clip_epsilon) {
    float clip = clip_factor(norm_squared, max_norm, clip_epsilon);
    if (isnan(clip)) return;
    int which = blockIdx.y;
    float* p = t.parameters[which];
    const float* g = t.gradients[which];
    float *m = t.firsts[which], *v = t.seconds[which];
    float kept = 1.f - t.rates[which] * decay, step = t.steps[which], root = t.roots[which];
    over_pieces(t.lengths[which], [&](int i) {
        float gradient = clip * g[i];
        float first = beta_1 * m[i] + (1.f - beta_1) * gradient;
        float second = beta_2 * v[i] + (1.f - beta_2) * gradient * gradient;
        m[i] = first;
        v[i] = second;
        p[i] = p[i] * kept - step * first / (sqrtf(second) / root + epsilon);
    });
}

struct AgedUpdates {
    float* parameters[AT_ONCE];
    const float* gradients[AT_ONCE];
    float* firsts[AT_ONCE];
    float* seconds[AT_ONCE];
    float* ages[AT_ONCE];
    int lengths[AT_ONCE];
    float rates[AT_ONCE];
};

// The same with bias corrections 1 − βᵃ by the age a of each element, which grows by one, ε before them and the decay last:
// θ ← (1 − ηλ)(θ − η·m/(1−β₁ᵃ)·√(1−β₂ᵃ)/(√v + ε)).
extern "C" __global__ void aged_adamw(const __grid_constant__ AgedUpdates t, float beta_1, float beta_2, float log_1,
                                      float log_2, float epsilon, float decay, const float* norm_squared, float max_norm,
                                      float clip_epsilon) {
    float clip = clip_factor(norm_squared, max_norm, clip_epsilon);
    if (isnan(clip)) return;
    int which = blockIdx.y;
    float* p = t.parameters[which];
    const float* g = t.gradients[which];
    float *m = t.firsts[which], *v = t.seconds[which], *ages = t.ages[which];
    float rate = t.rates[which];
    over_pieces(t.lengths[which], [&](int i) {
        float gradient = clip * g[i], age = ages[i];
        float first = beta_1 * m[i] + (1.f - beta_1) * gradient;
        float second = beta_2 * v[i] + (1.f - beta_2) * gradient * gradient;
        m[i] = first;
        v[i] = second;
        ages[i] = age + 1.f;
        float scale = sqrtf(-expm1f(age * log_2)) / -expm1f(age * log_1);
        p[i] = (p[i] - rate * first * scale / (sqrtf(second) + epsilon)) * (1.f - rate * decay);
    });
}

struct Squared {
    const float* tensors[AT_ONCE];
    int lengths[AT_ONCE];
};

// The sum of squares of each block's pieces; `total_of` adds them up.
extern "C" __global__ void squares(const __grid_constant__ Squared t, float* partial) {
    const float* x = t.tensors[blockIdx.y];
    float sum = 0.f;
    over_pieces(t.lengths[blockIdx.y], [&](int i) { sum += x[i] * x[i]; });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

extern "C" __global__ void total_of(const float* partial, int count, float* total) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

// Matrices of a random basis. A block b of the generator has eight values of an element, 16 apart; the documentation of
// RandomBasis says where.
__device__ __forceinline__ void draw(unsigned k0, unsigned k1, int element, int b, float* values) {
    uint4 random = philox(b, 0, element, k0, k1);
    unsigned words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = (((int)(words[i] << 16) >> 16) + 0.5f) * (1.f / 32768.f);
        values[2 * i + 1] = (((int)words[i] >> 16) + 0.5f) * (1.f / 32768.f);
    }
}
__device__ __forceinline__ int first_value(int b) { return b / 16 * 128 + b % 16; }

struct Combinations {
    struct {
        const float* coefficients;
        float* to;
        unsigned k0, k1, offset_k0, offset_k1;
        int length, count;
        float scale, offset;
    } each[AT_ONCE];
};

// M = M0 + Σ (scale·coefficients[i])·E_i with M0 = offset·(the first element of a basis of its own). Blocks (·, matrix), a
// thread a block of the generator. Every product and sum is rounded, in the order of the elements: M is that of the host.
extern "C" __global__ void combine(const __grid_constant__ Combinations t) {
    const auto& m = t.each[blockIdx.y];
    int b = blockIdx.x * blockDim.x + threadIdx.x, first = first_value(b);
    if (first >= m.length) return;
    float sums[8] = {}, values[8];
    for (int i = 0; i < m.count; i++) {
        float a = m.coefficients[i] * m.scale;
        draw(m.k0, m.k1, i, b, values);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] = __fadd_rn(sums[j], __fmul_rn(a, values[j]));
    }
    if (m.offset != 0.f) {
        draw(m.offset_k0, m.offset_k1, 0, b, values);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] = __fadd_rn(sums[j], __fmul_rn(m.offset, values[j]));
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (first + 16 * j < m.length) m.to[first + 16 * j] = sums[j];
}

struct Spans {
    struct {
        const float* gradient;
        float* to;
        unsigned k0, k1;
        int length, count;
        float scale;
    } each[AT_ONCE];
};

// Elements that a block of `combine_backward` takes: it reads the gradient once for all of them.
#define ELEMENTS 4

// to[i] = scale·⟨gradient, E_i⟩. Blocks (elements, matrix). The order of the sums is fixed, and they are in double precision
// but for eight values at a time and across threads.
extern "C" __global__ void combine_backward(const __grid_constant__ Spans t) {
    const auto& m = t.each[blockIdx.y];
    int element = blockIdx.x * ELEMENTS;
    if (element >= m.count) return;
    double sums[ELEMENTS] = {};
    for (int b = threadIdx.x; b / 16 * 128 < m.length; b += blockDim.x) {
        int first = first_value(b);
        float g[8], values[8];
#pragma unroll
        for (int j = 0; j < 8; j++) g[j] = first + 16 * j < m.length ? m.gradient[first + 16 * j] : 0.f;
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
            float sum = 0.f;
            draw(m.k0, m.k1, element + i, b, values);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += g[j] * values[j];
            sums[i] += sum;
        }
    }
    for (int i = 0; i < ELEMENTS; i++) {
        float sum = block_sum((float)sums[i]);
        if (threadIdx.x == 0 && element + i < m.count) m.to[element + i] = m.scale * sum;
    }
}
