// Products with a matrix that has values at few places, entry by entry. Activations come as [tokens, features], where the
// tokens of a feature, which one entry multiplies, lie far apart: they are turned once, so that a warp reads them side by
// side. All sums are in f32 and in a fixed order.

// turned[feature, token] = x[token, feature]; the rows of `turned`, `stride` long, end in zeros. Blocks of 32 × 8 threads,
// tiles (tokens, features) of 32 × 32.
extern "C" __global__ void turn(const scalar* x, scalar* turned, int tokens, int features, int stride) {
    __shared__ scalar tile[32][33];
    int token = blockIdx.x * 32, feature = blockIdx.y * 32, lane = threadIdx.x;
    for (int i = threadIdx.y; i < 32; i += 8) {
        bool inside = token + i < tokens && feature + lane < features;
        tile[i][lane] = inside ? x[(size_t)(token + i) * features + feature + lane] : to_scalar(0.f);
    }
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8)
        if (feature + i < features && token + lane < stride)
            turned[(size_t)(feature + i) * stride + token + lane] = tile[lane][i];
}

// Rows and tokens of a block's tile of a product: a lane has V tokens.
#define ROWS 32
#define TOKENS (32 * V)

// out[token, r] = y[token, r] + Σ values[place]·x[column, token] over the entries of row r, with `x` turned; without `y`
// the sum alone. Entry e is in the column at[e] − r·width (`width` is 0 where `at` has columns) and its value in the place
// places[e], or e where there are none. `out` may be `y`. Blocks of 8 warps, which take the tile's rows in turn.
extern "C" __global__ void multiply(const scalar* y, const scalar* x, const float* values, const int* starts, const int* at,
                                    int width, const int* places, scalar* out, int rows, int tokens, int stride) {
    __shared__ float tile[ROWS][TOKENS + 1];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int row = blockIdx.x * ROWS, token = blockIdx.y * TOKENS, first = token + lane * V;
    for (int i = warp; i < ROWS; i += 8) {
        float sums[V] = {};
        int r = row + i;
        if (r < rows && first < stride) {
            int end = starts[r + 1];
#pragma unroll 4
            for (int e = starts[r]; e < end; e++) {
                float value = values[places ? places[e] : e], a[V];
                load(x + (size_t)(at[e] - r * width) * stride + first, a);
#pragma unroll
                for (int v = 0; v < V; v++) sums[v] += value * a[v];
            }
        }
        // Lanes side by side, not their tokens: no two write to one bank.
#pragma unroll
        for (int v = 0; v < V; v++) tile[i][v * 32 + lane] = sums[v];
    }
    __syncthreads();
    for (int i = warp; i < TOKENS && token + i < tokens; i += 8) {
        if (row + lane >= rows) continue;
        size_t place = (size_t)(token + i) * rows + row + lane;
        float sum = tile[lane][i % V * 32 + i / V];
        out[place] = to_scalar(y ? to_float(y[place]) + sum : sum);
    }
}

// products[e] = Σ over tokens of dy[row, token]·x[column, token], both turned, at positions[e] = row·width + column. A
// warp an entry: the entries of a row are neighbours and find its gradient in the first cache.
extern "C" __global__ void sampled_products(const scalar* dy, const scalar* x, const int* positions, int width,
                                            float* products, int count, int stride) {
    int e = (int)(blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)), lane = threadIdx.x & 31;
    if (e >= count) return;
    int row = positions[e] / width, column = positions[e] % width;
    dy += (size_t)row * stride, x += (size_t)column * stride;
    float sums[V] = {}, sum = 0.f;
#pragma unroll 2
    for (int t = lane * V; t < stride; t += 32 * V) {
        float a[V], b[V];
        load(dy + t, a);
        load(x + t, b);
#pragma unroll
        for (int v = 0; v < V; v++) sums[v] += a[v] * b[v];
    }
#pragma unroll
    for (int v = 0; v < V; v++) sum += sums[v];
    sum = warp_sum(sum);
    if (lane == 0) products[e] = sum;
}

// Rows first … of a matrix whose entries are as above, dense, in the type of the activations. A block a row.
extern "C" __global__ void dense_rows(const float* values, const int* starts, const int* at, int width, const int* places,
                                      scalar* out, int first, int columns) {
    int r = first + blockIdx.x;
    out += (size_t)blockIdx.x * columns;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) out[c] = to_scalar(0.f);
    __syncthreads();
    int end = starts[r + 1];
    for (int e = starts[r] + threadIdx.x; e < end; e += blockDim.x)
        out[at[e] - r * width] = to_scalar(values[places ? places[e] : e]);
}

// The entries of rows first … of a dense matrix that begins with them. A block a row.
extern "C" __global__ void gather_rows(const float* dense, const int* starts, const int* positions, float* values, int first,
                                       int columns) {
    int r = first + blockIdx.x, end = starts[r + 1];
    for (int e = starts[r] + threadIdx.x; e < end; e += blockDim.x)
        values[e] = dense[positions[e] - (long long)first * columns];
}

// The `remaining` largest magnitudes, digit by digit of their bits: `prefix` is what is known of the smallest of them, and
// `remaining` how many of those that begin with it are among them. At the end `prefix` is that magnitude, whole, and of the
// equal ones the first `remaining` are taken.
struct Selection { unsigned prefix; int remaining, unordered, unused; };
#define DIGIT_BITS 11
#define SELECTION 4096

__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

extern "C" __global__ void select_begin(Selection* state, int* histogram, int count) {
    for (int i = threadIdx.x; i < 1 << DIGIT_BITS; i += blockDim.x) histogram[i] = 0;
    if (threadIdx.x == 0) *state = {0u, count, 0x7fffffff, 0};
}

// How often each value of the digit, `bits` from `shift` on, is among magnitudes that begin with the prefix.
extern "C" __global__ void select_count(const float* x, int length, Selection* state, int* histogram, int shift, int bits) {
    __shared__ int counts[1 << DIGIT_BITS];
    for (int i = threadIdx.x; i < 1 << bits; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    unsigned prefix = state->prefix;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < length; i += (long long)gridDim.x * blockDim.x) {
        unsigned m = magnitude(x[i]);
        if (m >= 0x7f800000u) atomicMin(&state->unordered, (int)i);
        if (m >> (shift + bits) == prefix) atomicAdd(&counts[m >> shift & ((1u << bits) - 1)], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 1 << bits; i += blockDim.x)
        if (counts[i]) atomicAdd(&histogram[i], counts[i]);
}

// The digit of the smallest that is taken goes to the prefix; the histogram is emptied. One block.
extern "C" __global__ void select_digit(Selection* state, int* histogram, int bits) {
    __shared__ int counts[1 << DIGIT_BITS];
    for (int i = threadIdx.x; i < 1 << bits; i += blockDim.x) counts[i] = histogram[i], histogram[i] = 0;
    __syncthreads();
    if (threadIdx.x > 0) return;
    int digit = (1 << bits) - 1, remaining = state->remaining;
    while (digit > 0 && counts[digit] < remaining) remaining -= counts[digit--];
    state->prefix = state->prefix << bits | digit;
    state->remaining = remaining;
}

// The sum over a block of 256 threads or more of what the threads before this one have.
__device__ int sum_before(int x, int* total) {
    __shared__ int sums[33];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, sum = x;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int before = 0;
        for (int i = 0; i < warps; i++) { int of_warp = sums[i]; sums[i] = before; before += of_warp; }
        sums[32] = before;
    }
    __syncthreads();
    *total = sums[32];
    return sums[warp] + sum - x;
}

// How many elements a thread has that are above the smallest that is taken, and how many are equal to it.
__device__ __forceinline__ int2 of_thread(const float* x, int length, unsigned smallest) {
    int2 found = {0, 0};
    long long first = blockIdx.x * (long long)SELECTION + threadIdx.x * (SELECTION / 256);
    for (long long i = first; i < min(first + SELECTION / 256, (long long)length); i++) {
        unsigned m = magnitude(x[i]);
        found.x += m > smallest, found.y += m == smallest;
    }
    return found;
}

// counts[block] = {those above, those equal}. Blocks of 256 threads.
extern "C" __global__ void select_in_blocks(const float* x, int length, const Selection* state, int2* counts) {
    int2 found = of_thread(x, length, state->prefix), total;
    sum_before(found.x, &total.x);
    sum_before(found.y, &total.y);
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// Each block's counts become the sums of those before it. One block.
extern "C" __global__ void select_starts(int2* counts, int blocks) {
    int share = (blocks + blockDim.x - 1) / blockDim.x, first = min(threadIdx.x * share, blocks);
    int last = min(first + share, blocks), total;
    int2 sums = {0, 0};
    for (int i = first; i < last; i++) sums.x += counts[i].x, sums.y += counts[i].y;
    sums = {sum_before(sums.x, &total), sum_before(sums.y, &total)};
    for (int i = first; i < last; i++) {
        int2 of_block = counts[i];
        counts[i] = sums;
        sums.x += of_block.x, sums.y += of_block.y;
    }
}

// What is taken, in the order of the places: found[0] is the first place that has no order, or −1.
extern "C" __global__ void select_write(const float* x, int length, const Selection* state, const int2* counts, int* found,
                                        float* values) {
    Selection selection = *state;
    bool ordered = selection.unordered == 0x7fffffff;
    if (blockIdx.x == 0 && threadIdx.x == 0) found[0] = ordered ? -1 : selection.unordered;
    if (!ordered) return;
    int2 mine = of_thread(x, length, selection.prefix), before = counts[blockIdx.x];
    int total;
    before.x += sum_before(mine.x, &total), before.y += sum_before(mine.y, &total);
    long long first = blockIdx.x * (long long)SELECTION + threadIdx.x * (SELECTION / 256);
    for (long long i = first; i < min(first + SELECTION / 256, (long long)length); i++) {
        unsigned m = magnitude(x[i]);
        if (m > selection.prefix || (m == selection.prefix && before.y < selection.remaining)) {
            int place = before.x + min(before.y, selection.remaining);
            found[1 + place] = (int)i;
            values[place] = x[i];
        }
        before.x += m > selection.prefix, before.y += m == selection.prefix;
    }
}
