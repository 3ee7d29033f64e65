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
