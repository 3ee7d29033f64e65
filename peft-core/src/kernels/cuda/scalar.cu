// Row-wise and elementwise kernels. Compiled once for each type of the activations, `scalar`: with BF16 defined it is
// bf16, else f32. Arithmetic is in f32; every kernel reads and writes each element once where it can.
//
// Rows of V·n elements are read V at a time; `columns` is a multiple of V where a launch passes `vectors = 1`, and rows
// then start at multiples of 16 bytes.

#ifdef BF16
typedef unsigned short scalar;
__device__ __forceinline__ float to_float(scalar x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ scalar to_scalar(float x) { return (scalar)(pack(x, 0.f) & 0xffffu); }
#define V 8
__device__ __forceinline__ void load(const scalar* p, float* x) {
    uint4 u = *(const uint4*)p;
    unsigned words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void store(scalar* p, const float* x) {
    *(uint4*)p = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
#else
typedef float scalar;
__device__ __forceinline__ float to_float(scalar x) { return x; }
__device__ __forceinline__ scalar to_scalar(float x) { return x; }
#define V 4
__device__ __forceinline__ void load(const scalar* p, float* x) {
    float4 u = *(const float4*)p;
    x[0] = u.x; x[1] = u.y; x[2] = u.z; x[3] = u.w;
}
__device__ __forceinline__ void store(scalar* p, const float* x) { *(float4*)p = make_float4(x[0], x[1], x[2], x[3]); }
#endif

// The value as it is after being stored.
__device__ __forceinline__ float rounded(float x) { return to_float(to_scalar(x)); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The sum over a block of at most 1024 threads, the same in all of them.
__device__ float block_sum(float x) {
    __shared__ float sums[33];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float total = warp_sum(lane < warps ? sums[lane] : 0.f);
        if (lane == 0) sums[32] = total;
    }
    __syncthreads();
    return sums[32];
}

// Calls `body(column, lanes)` for the pieces of a row that this thread has.
template <class Body>
__device__ __forceinline__ void over_row(int columns, int vectors, Body body) {
    if (vectors) {
        for (int c = threadIdx.x * V; c < columns; c += blockDim.x * V) body(c, V);
    } else {
        for (int c = threadIdx.x; c < columns; c += blockDim.x) body(c, 1);
    }
}

__device__ __forceinline__ void read(const scalar* p, int lanes, float* x) {
    if (lanes == V) load(p, x);
    else x[0] = to_float(*p);
}

__device__ __forceinline__ void write(scalar* p, int lanes, const float* x) {
    if (lanes == V) store(p, x);
    else *p = to_scalar(x[0]);
}
