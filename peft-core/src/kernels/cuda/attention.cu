// Causal attention over concatenated sequences, for training and for decoding with a cache.
//
// Layout. N tokens in all, H query heads, KV key/value heads (query head h uses h / (H / KV)), D = HEAD_DIM.
//   qkv  bf16 [N, (H + 2 KV) D]   projections: q heads, k heads, v heads
//   qk   bf16 [N, (H + KV) D]     q and k after head norm and rotation
//   o    bf16 [N, H D]            lse, delta  f32 [H, N]          d_qkv  as qkv
//   first, last  int32 [N]        token i sees key j iff first[i] <= j <= i and (window == 0 or i - j < window);
//                                 last[j] is the exclusive end of j's sequence. Both are nondecreasing. A padding token
//                                 has first[i] = i, last[i] = i + 1. One description for padded and packed batches.
//   order  int32 [tiles] or null  which tile a block takes (attention_prepare: most work first); null: by position.
// Row starts are 16-byte aligned (D % 16 == 0). scale > 0.
//
// Formulas (FlashAttention, arXiv 2205.14135 and 2307.08691), per head, over the visible j:
//   s_ij = scale q_i . k_j      lse_i = log sum_j exp s_ij      p_ij = exp(s_ij - lse_i)      o_i = sum_j p_ij v_j
//   delta_i = do_i . o_i        dp_ij = do_i . v_j              ds_ij = p_ij (dp_ij - delta_i)
//   dv_j = sum_i p_ij do_i      dk_j = scale sum_i ds_ij q_i    dq_i = scale sum_j ds_ij k_j
// Forward keeps a running maximum and denominator per query; s and p never leave registers. Backward reads qk, v, do, lse
// and delta, and recomputes p: once with queries as rows for dq, once transposed, with keys as rows, for dk and dv (summed
// over the group's query heads). Every sum has one owner and a fixed order, so results repeat bit for bit; there are no
// atomics but the arrival counter of attention_decode.
//
// cos, sin  f32 [N, D/2], q_norm, k_norm  bf16 [D]: null where a model has none. A head x becomes, in attention_prepare,
//   y = w bf16(x / sqrt(mean(x^2) + eps)), then (y_i cos_i - y_{i+D/2} sin_i, y_{i+D/2} cos_i + y_i sin_i).
// The backward kernels, given cos and sin, turn dq and dk back before they round them: with norms, or where SLICES = 2,
// pass null there and let attention_rotate_backward undo rotation and norm in place.
//
// Launch (grid; threads; dynamic shared bytes). Compile with -DHEAD_DIM=D, for sm_90a on Hopper (wgmma at D 64 and 128; a
// plain sm_90 or any sm_80 and later: mma.sync). Kernel attention_geometry (1; 1; 0) writes int32 [13]: rows, threads,
// shared of forward, of backward_q and of backward_kv, then LANES, SLICES, and threads, shared of decode. In formulas:
//   wgmma     rows = 64 groups, threads = 128 groups, shared = 3 * 2 * 128 D (three stages of two 64-row tiles)
//             + 256 D groups (backward: own rows; forward's borrow the third stage), + 1536 (backward_kv: lse, delta)
//   mma.sync  rows = 16 M_TILES WARPS, threads = 32 WARPS, shared = 2 (D + 8) (own rows + 4 KEYS), own rows = rows
//             (forward) or 2 rows (backward), + 16 QUERIES (backward_kv, KEYS = QUERIES)
//   attention_prepare          sum over what is asked for; 256; 0
//       each order               ceil(tiles / 256)              tiles = ceil(N / rows) of the kernel it is for
//       qk                       ceil(N (H + KV) LANES / 256)
//       delta                    ceil(N H LANES / 256)
//   attention_forward          (H, tiles); threads; shared
//   attention_backward_q       (H, tiles); threads; shared
//   attention_backward_kv      (KV, tiles, SLICES); threads; shared
//   attention_rotate_backward  ceil(N (H + KV) LANES / 256); 256; 0
//   attention_keep             ceil(N (H + 2 KV) LANES / 256); 256; 0
//       N / T rows of T new tokens, whose keys and values go to the slots from `length` on of k_cache and v_cache, bf16
//       [N / T, KV, capacity, D]; q, unless null, bf16 [N, H, D] gets the queries
//   attention_decode           (splits, KV ceil(T H / KV / 16), B); threads; shared
//       q bf16 [B, T, H, D], k_cache, v_cache bf16 [B, KV, capacity, D], first int32 [B]; the T new tokens fill slots
//       length - T .. length - 1. partial: f32 [units, splits, 16 (D + 2)], arrived: int32 [units], zero before the first
//       launch (each launch leaves it zero); units = B KV ceil(T H / KV / 16). About one split per 256 keys, 16 at most
//       per sequence of some thousands, does best while blocks are few.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
constexpr int D = HEAD_DIM;
static_assert(D % 16 == 0 && D <= 256, "head_dim must be a multiple of 16, at most 256");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA (HEAD_DIM == 64 || HEAD_DIM == 128)
#else
#define WGMMA 0
#endif

// Cards whose blocks get 99 KiB of shared memory at most; others of sm_80 and later have at least 163 KiB.
constexpr bool SMALL_SHARED = __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200;

constexpr int STRIDE = D + 8;         // elements from one shared-memory row to the next: an odd number of 16-byte
                                      // chunks, so that the 8 rows of an 8x8 matrix lie in distinct banks
constexpr int ROW_BYTES = STRIDE * 2;
constexpr int ROW_CHUNKS = D / 8;     // 16-byte chunks of data in a row
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---------------------------------------------------------------------------------------------------------------------
// Machine instructions

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float round_bf16(float x) { return __uint_as_float(pack_bf16(x, 0.f) << 16); }
__device__ __forceinline__ float low_bf16(u32 packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_bf16(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    u32 address;
    asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(pointer));
    return address;
}

// Asynchronous copies global -> shared; bytes not `valid` are filled with zero.
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async_4(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8]. Lane 4 g + t holds c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1].
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles

// Lane offsets, in bytes, of the row addresses that ldmatrix takes.
// [row][k] storage as left operand, or [k][n] storage as (transposed) right operand:
__device__ __forceinline__ u32 left_offset(int lane) { return (lane & 15) * ROW_BYTES + (lane >> 4) * 16; }
// [n][k] storage as right operand, two 8-column tiles at once:
__device__ __forceinline__ u32 right_offset(int lane) {
    return ((lane & 7) + ((lane >> 4) << 3)) * ROW_BYTES + ((lane >> 3) & 1) * 16;
}

// Rows row0.. of a matrix whose rows are `pitch` elements apart -> shared memory; rows from `end` on become zero.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(u32 shared, const u16* matrix, size_t pitch, int row0, int end, int thread) {
    constexpr int CHUNKS = ROWS * ROW_CHUNKS;
#pragma unroll
    for (int i = 0; i < (CHUNKS + THREADS - 1) / THREADS; ++i) {
        int row, chunk;
        if (THREADS % ROW_CHUNKS == 0) {
            row = thread / ROW_CHUNKS + i * (THREADS / ROW_CHUNKS);
            chunk = thread % ROW_CHUNKS;
        } else {
            row = (thread + i * THREADS) / ROW_CHUNKS;
            chunk = (thread + i * THREADS) % ROW_CHUNKS;
        }
        if (CHUNKS % THREADS == 0 || row < ROWS) {
            bool valid = row0 + row < end;
            const u16* source = matrix + (valid ? row0 + row : 0) * pitch + chunk * 8;
            copy_async_16(shared + row * ROW_BYTES + chunk * 16, source, valid);
        }
    }
}

// A warp's accumulator c[M_TILES * 16][COLUMNS] * factors -> bf16 rows row0.. of a matrix, through the warp's own rows of
// shared memory so that global memory sees 16-byte stores.
template <int M_TILES, int COLUMNS>
__device__ __forceinline__ void store_rows(u16* matrix, size_t pitch, int row0, int end, u32 shared_at,
                                           const float (&c)[M_TILES][COLUMNS / 8][4],
                                           const float (&factor)[M_TILES][2], int lane) {
    __syncwarp();
    u32 at = shared_at + (lane >> 2) * ROW_BYTES + (lane & 3) * 4;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 pair = pack_bf16(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + (m * 16 + half * 8) * ROW_BYTES + n * 16), "r"(pair)
                             : "memory");
            }
    __syncwarp();
    constexpr int CHUNKS = COLUMNS / 8;
#pragma unroll
    for (int i = lane; i < M_TILES * 16 * CHUNKS; i += 32) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        if (row0 + row < end) {
            uint4 v;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "r"(shared_at + row * ROW_BYTES + chunk * 16)
                         : "memory");
            *reinterpret_cast<uint4*>(matrix + (row0 + row) * pitch + chunk * 8) = v;
        }
    }
}

// Rotation by the negative angle of two neighbouring pairs (low[x], high[x]).
__device__ __forceinline__ void rotate_pairs_back(float* low, float* high, const float* cos, const float* sin) {
    const float2 c = *reinterpret_cast<const float2*>(cos), s = *reinterpret_cast<const float2*>(sin);
    const float low0 = low[0], low1 = low[1];
    low[0] = low0 * c.x + high[0] * s.x;
    low[1] = low1 * c.y + high[1] * s.y;
    high[0] = high[0] * c.x - low0 * s.x;
    high[1] = high[1] * c.y - low1 * s.y;
}

// A warp's rows of sums, from row0, rotated by the negatives of their tokens' angles.
template <int M_TILES, int TILES>
__device__ __forceinline__ void rotate_back(float (&c)[M_TILES][TILES][4], const float* cos, const float* sin, int row0,
                                            int n, int lane) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = min(row0 + m * 16 + half * 8 + (lane >> 2), n - 1);
#pragma unroll
            for (int j = 0; j < TILES / 2; ++j) {
                const size_t at = size_t(row) * (D / 2) + j * 8 + (lane & 3) * 2;
                rotate_pairs_back(&c[m][j][2 * half], &c[m][j + TILES / 2][2 * half], cos + at, sin + at);
            }
        }
}

// An accumulator's 16 columns at n-tiles (2 k, 2 k + 1) as the left operand of the next product.
__device__ __forceinline__ void as_left(u32 (&a)[4], const float (&c0)[4], const float (&c1)[4]) {
    a[0] = pack_bf16(c0[0], c0[1]);
    a[1] = pack_bf16(c0[2], c0[3]);
    a[2] = pack_bf16(c1[0], c1[1]);
    a[3] = pack_bf16(c1[2], c1[3]);
}

template <int M, int N> __device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0.f;
}

// First key that query i sees, and end of the queries that see key j. Both are nondecreasing.
__device__ __forceinline__ int first_key(const int* first, int i, int window) {
    int key = first[i];
    return window > 0 ? max(key, i - window + 1) : key;
}
__device__ __forceinline__ int end_query(const int* last, int j, int window) {
    int query = last[j];
    return window > 0 ? min(query, j + window) : query;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: delta

// Threads that share one (token, head): a power of two, each with up to 16 elements.
constexpr int LANES = D <= 16 ? 1 : D <= 32 ? 2 : D <= 64 ? 4 : D <= 128 ? 8 : 16;

__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Eight consecutive bf16 <-> f32.
__device__ __forceinline__ void load_8(float (&x)[8], const u16* from) {
    uint4 v = *reinterpret_cast<const uint4*>(from);
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = low_bf16(words[i]);
        x[2 * i + 1] = high_bf16(words[i]);
    }
}
__device__ __forceinline__ void load_8(float (&x)[8], const float* from) {
    float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ __forceinline__ void store_8(u16* to, const float (&x)[8]) {
    uint4 v;
    v.x = pack_bf16(x[0], x[1]), v.y = pack_bf16(x[2], x[3]), v.z = pack_bf16(x[4], x[5]), v.w = pack_bf16(x[6], x[7]);
    *reinterpret_cast<uint4*>(to) = v;
}

__device__ __forceinline__ void delta_block(size_t block, float* __restrict__ delta, const u16* __restrict__ d_o,
                                            const u16* __restrict__ o, int n, int heads) {
    const size_t item = block * (256 / LANES) + threadIdx.x / LANES; // token * heads + head
    const int part = threadIdx.x % LANES;
    const bool valid = item < size_t(n) * heads;
    float sum = 0.f;
    if (valid && part < D / 16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float x[8], y[8];
            load_8(x, d_o + item * D + part * 16 + i * 8);
            load_8(y, o + item * D + part * 16 + i * 8);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum += x[e] * y[e];
        }
    }
    sum = sum_lanes(sum);
    if (valid && part == 0) delta[(item % heads) * n + item / heads] = sum;
}

#if WGMMA
// ---------------------------------------------------------------------------------------------------------------------
// Hopper: asynchronous warpgroup products (compiled for sm_90a, D 64 and 128)

// Shared memory holds matrices as panels of 64 columns, [panel][row][64], with 128-byte rows whose 16-byte chunks are
// permuted by the row (the 128-byte swizzle that wgmma descriptors name). A panel starts at a multiple of 1024 bytes.
constexpr int PANELS = D / 64;

__device__ __forceinline__ u32 swizzled(int row, int chunk, int rows) {
    return (chunk / 8 * rows + row) * 128 + (((chunk % 8) ^ (row % 8)) << 4);
}

template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_panels(u32 shared, const u16* matrix, size_t pitch, int row0, int end,
                                            int thread) {
    constexpr int CHUNKS = ROWS * ROW_CHUNKS, STEP = THREADS / ROW_CHUNKS;
    const int chunk = thread % ROW_CHUNKS, first_row = thread / ROW_CHUNKS;
    const u32 at = shared + swizzled(first_row, chunk, ROWS);   // STEP is a multiple of 8: the swizzle stays the same
    const u16* from = matrix + chunk * 8;
    static_assert(STEP % 8 == 0, "rows of a step share their swizzle");
#pragma unroll
    for (int i = 0; i < (CHUNKS + THREADS - 1) / THREADS; ++i) {
        int row = first_row + i * STEP;
        if (CHUNKS % THREADS == 0 || row < ROWS) {
            bool valid = row0 + row < end;
            copy_async_16(at + i * STEP * 128, from + (valid ? row0 + row : 0) * pitch, valid);
        }
    }
}

// Descriptor of a tile of 8-row groups that lie 1024 bytes apart, swizzled.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return u64((address & 0x3ffff) >> 4) | (u64(1) << 16) | (u64(1024 >> 4) << 32) | (u64(1) << 62);
}
// Columns 16 kk .. 16 kk + 15 of [rows][D] panels as the contracted dimension: left, or right with rows as columns.
__device__ __forceinline__ u64 across(u32 panels, int kk, int rows) {
    return descriptor(panels + kk / 4 * rows * 128 + kk % 4 * 32);
}
// Rows 16 kk .. of a panel as the contracted dimension: right, with the panel's 64 columns as columns.
__device__ __forceinline__ u64 down(u32 panels, int kk, int panel, int rows) {
    return descriptor(panels + (panel * rows + kk * 16) * 128);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Shared memory written by ordinary copies becomes visible to wgmma.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler must not move these registers across this point.
__device__ __forceinline__ void pin(float (&c)[8][4]) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) asm volatile("" : "+f"(c[j][x])::"memory");
}

// c[64, 64] = or += a[64, 16] b[16, 64]; each warp of the group holds 16 rows of c, as multiply_add lays them out.
// a: left fragments or a descriptor. b: [n][k] storage, or, `transposed`, [k][n].
__device__ __forceinline__ void set_product(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : "=f"(c[0][0]), "=f"(c[0][1]), "=f"(c[0][2]), "=f"(c[0][3]), "=f"(c[1][0]), "=f"(c[1][1]), "=f"(c[1][2]),
          "=f"(c[1][3]), "=f"(c[2][0]), "=f"(c[2][1]), "=f"(c[2][2]), "=f"(c[2][3]), "=f"(c[3][0]), "=f"(c[3][1]),
          "=f"(c[3][2]), "=f"(c[3][3]), "=f"(c[4][0]), "=f"(c[4][1]), "=f"(c[4][2]), "=f"(c[4][3]), "=f"(c[5][0]),
          "=f"(c[5][1]), "=f"(c[5][2]), "=f"(c[5][3]), "=f"(c[6][0]), "=f"(c[6][1]), "=f"(c[6][2]), "=f"(c[6][3]),
          "=f"(c[7][0]), "=f"(c[7][1]), "=f"(c[7][2]), "=f"(c[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void add_product(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void add_product_transposed(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void set_product(float (&c)[8][4], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
        : "=f"(c[0][0]), "=f"(c[0][1]), "=f"(c[0][2]), "=f"(c[0][3]), "=f"(c[1][0]), "=f"(c[1][1]), "=f"(c[1][2]),
          "=f"(c[1][3]), "=f"(c[2][0]), "=f"(c[2][1]), "=f"(c[2][2]), "=f"(c[2][3]), "=f"(c[3][0]), "=f"(c[3][1]),
          "=f"(c[3][2]), "=f"(c[3][3]), "=f"(c[4][0]), "=f"(c[4][1]), "=f"(c[4][2]), "=f"(c[4][3]), "=f"(c[5][0]),
          "=f"(c[5][1]), "=f"(c[5][2]), "=f"(c[5][3]), "=f"(c[6][0]), "=f"(c[6][1]), "=f"(c[6][2]), "=f"(c[6][3]),
          "=f"(c[7][0]), "=f"(c[7][1]), "=f"(c[7][2]), "=f"(c[7][3])
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void add_product(float (&c)[8][4], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
        : "l"(a), "l"(b));
}

// Left operands: 16 rows of a warp over all D columns, in registers or as descriptors of the group's 64 rows.
template <bool IN_REGISTERS> struct Left;
template <> struct Left<true> {
    u32 fragments[D / 16][4];
    __device__ __forceinline__ void load(u32 panels, int rows, int warp_row, int lane) {
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk)
            load_matrices(fragments[kk], panels + swizzled(warp_row + (lane & 15), kk * 2 + (lane >> 4), rows));
    }
    // c[64, 64] = left [64, D] right [64, D]^T
    __device__ __forceinline__ void times(float (&c)[8][4], u32 right) const {
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
            if (kk == 0) set_product(c, fragments[kk], across(right, kk, 64));
            else add_product(c, fragments[kk], across(right, kk, 64));
        }
    }
};
template <> struct Left<false> {
    u32 panels;
    int rows;
    __device__ __forceinline__ void load(u32 all, int all_rows, int warp_row, int) {
        panels = all + warp_row / 64 * 64 * 128;
        rows = all_rows;
    }
    __device__ __forceinline__ void times(float (&c)[8][4], u32 right) const {
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
            if (kk == 0) set_product(c, across(panels, kk, rows), across(right, kk, 64));
            else add_product(c, across(panels, kk, rows), across(right, kk, 64));
        }
    }
};

// sums[64, D] += weights[64, 64] rows[64, D], weights as left fragments.
__device__ __forceinline__ void add_products(float (&sums)[PANELS][8][4], const u32 (&weights)[4][4], u32 panels) {
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
            add_product_transposed(sums[panel], weights[kk], down(panels, kk, panel, 64));
}

__device__ __forceinline__ void pin(float (&sums)[PANELS][8][4]) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) pin(sums[panel]);
}

__device__ __forceinline__ void as_left(u32 (&weights)[4][4], const float (&c)[8][4]) {
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) as_left(weights[kk], c[2 * kk], c[2 * kk + 1]);
}

// A warp's 16 rows of sums, from row0, rotated by the negatives of their tokens' angles.
__device__ __forceinline__ void rotate_back(float (&c)[PANELS][8][4], const float* cos, const float* sin, int row0, int n,
                                            int lane) {
    constexpr int HALF_TILES = D / 16;                         // 8-column tiles of half a head
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = min(row0 + half * 8 + (lane >> 2), n - 1);
#pragma unroll
        for (int j = 0; j < HALF_TILES; ++j) {
            const size_t at = size_t(row) * (D / 2) + j * 8 + (lane & 3) * 2;
            rotate_pairs_back(&c[j / 8][j % 8][2 * half], &c[(j + HALF_TILES) / 8][(j + HALF_TILES) % 8][2 * half],
                              cos + at, sin + at);
        }
    }
}

// As store_rows: a warp's 16 rows, through its rows of shared panels.
__device__ __forceinline__ void store_panels(u16* matrix, size_t pitch, int row0, int end, u32 panels, int rows,
                                             int warp_row, const float (&c)[PANELS][8][4], const float (&factor)[2],
                                             int lane) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 pair = pack_bf16(c[panel][j][2 * half] * factor[half], c[panel][j][2 * half + 1] * factor[half]);
                u32 at = panels + swizzled(warp_row + half * 8 + (lane >> 2), panel * 8 + j, rows) + (lane & 3) * 4;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pair) : "memory");
            }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * ROW_CHUNKS; i += 32) {
        int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
        if (row0 + row < end) {
            uint4 v;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "r"(panels + swizzled(warp_row + row, chunk, rows))
                         : "memory");
            *reinterpret_cast<uint4*>(matrix + (row0 + row) * pitch + chunk * 8) = v;
        }
    }
}

constexpr int TILE_BYTES = 64 * D * 2;                         // 64 rows of k, v, q or do
constexpr int STAGES = 3;                                      // one being read, one whose products may still run, one
                                                               // being filled
// Warpgroups of a block, each with 64 rows; blocks a multiprocessor holds. Chosen by timing on an H100. The left
// operands of backward come from shared memory: with both of them in registers results were wrong (found by the check).
constexpr int FORWARD_GROUPS = 1;
constexpr int FORWARD_BLOCKS = D == 64 ? 4 : 2;
constexpr bool Q_IN_REGISTERS = true;                          // forward only; then q borrows the last stage
constexpr int DQ_GROUPS = D == 64 ? 1 : 2;
constexpr int DQ_BLOCKS = D == 64 ? 3 : 1;
constexpr int DKV_GROUPS = D == 64 ? 1 : 2;
constexpr int DKV_BLOCKS = D == 64 ? 2 : 1;
constexpr int FORWARD_ROWS = FORWARD_GROUPS * 64, DQ_ROWS = DQ_GROUPS * 64, DKV_ROWS = DKV_GROUPS * 64;
constexpr int DKV_SLICES = 1;
constexpr int RING_BYTES = STAGES * 2 * TILE_BYTES;            // a block's own rows lie behind the ring
constexpr bool Q_IN_LAST_STAGE = Q_IN_REGISTERS && FORWARD_GROUPS == 1; // free until the third tile is loaded
constexpr int FORWARD_Q_OFFSET = Q_IN_LAST_STAGE ? RING_BYTES - 2 * TILE_BYTES : RING_BYTES;

__device__ __forceinline__ u32 stage_of(u32 ring, int t, int bytes) { return ring + t % STAGES * bytes; }

extern "C" __global__ void __launch_bounds__(FORWARD_GROUPS * 128, FORWARD_BLOCKS)
attention_forward(u16* __restrict__ o, float* __restrict__ lse, const u16* __restrict__ qk,
                  const u16* __restrict__ qkv, const int* __restrict__ first, const int* __restrict__ order, int n,
                  int heads, int kv_heads, int window, float scale) {
    constexpr int THREADS = FORWARD_GROUPS * 128, KEYS = 64;
    extern __shared__ __align__(1024) u16 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
    const int tile = order ? order[blockIdx.y] : gridDim.y - 1 - blockIdx.y;
    const int q0 = tile * FORWARD_ROWS, q_end = min(q0 + FORWARD_ROWS, n);
    const size_t qk_pitch = size_t(heads + kv_heads) * D, qkv_pitch = size_t(heads + 2 * kv_heads) * D;
    const u16* k = qk + size_t(heads + kv_head) * D;
    const u16* v = qkv + size_t(heads + kv_heads + kv_head) * D;

    const u32 ring = shared_address(shared);                   // stages of k, then v
    const u32 q_shared = ring + FORWARD_Q_OFFSET;
    const int key_begin = first_key(first, q0, window) / KEYS * KEYS;
    const int tiles = (q_end - key_begin + KEYS - 1) / KEYS;
    auto load_keys = [&](int t) {
        u32 stage = stage_of(ring, t, 2 * TILE_BYTES);
        copy_panels<KEYS, THREADS>(stage, k, qk_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_panels<KEYS, THREADS>(stage + TILE_BYTES, v, qkv_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_commit();
    };
    copy_panels<FORWARD_ROWS, THREADS>(q_shared, qk + size_t(head) * D, qk_pitch, q0, q_end, threadIdx.x);
    load_keys(0);

    const int warp_q = q0 + warp * 16;
    const int warp_key_full = warp_q < n ? first_key(first, min(warp_q + 16, n) - 1, window) : n;
    int row_first[2];
    float row_max[2], row_sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int i = warp_q + half * 8 + (lane >> 2);
        row_first[half] = i < n ? first_key(first, i, window) : n;
        row_max[half] = negative_infinity();
        row_sum[half] = 0.f;
    }
    float out[PANELS][8][4], s[8][4];
    clear(out);
    u32 p[4][4];
    Left<Q_IN_REGISTERS> q_left;
    const float scale_log2 = scale * LOG2_E;

    // Mask, maximum and exponentials of tile t: s becomes p. The maximum in use is raised, and sums are rescaled, only
    // when a row outgrows it by 2^8.
    float shrink[2];
    auto softmax = [&](int t) -> bool {
        const int key0 = key_begin + t * KEYS;
        if (key0 + KEYS - 1 > warp_q || key0 < warp_key_full) { // some pair is masked
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    int i = warp_q + (x / 2) * 8 + (lane >> 2);
                    int key = key0 + j * 8 + (lane & 3) * 2 + (x & 1);
                    if (key > i || key < row_first[x / 2]) s[j][x] = negative_infinity();
                }
        }
        float tile_max[2];
        bool outgrown = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = negative_infinity();
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            tile_max[half] = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale_log2;
            outgrown |= tile_max[half] > row_max[half] + 8.f;
        }
        outgrown = __any_sync(~0u, outgrown);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float raised = outgrown ? fmaxf(row_max[half], tile_max[half]) : row_max[half];
            shrink[half] = raised == negative_infinity() ? 1.f : exp2_fast(row_max[half] - raised);
            row_max[half] = raised;
            row_sum[half] *= shrink[half];
            float base = raised == negative_infinity() ? 0.f : raised;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int x = 2 * half; x < 2 * half + 2; ++x) {
                    s[j][x] = exp2_fast(s[j][x] * scale_log2 - base);
                    row_sum[half] += s[j][x];
                }
        }
        return outgrown;
    };
    auto next_tile = [&](int t) {
        copy_wait<0>();
        publish();
        __syncthreads();
        if (t + 1 < tiles) load_keys(t + 1);
    };

    next_tile(0);
    q_left.load(q_shared, FORWARD_ROWS, warp * 16, lane);
    products_begin();
    q_left.times(s, stage_of(ring, 0, 2 * TILE_BYTES));
    products_commit();
    products_wait<0>();
    pin(s);
    softmax(0);
    as_left(p, s);
    // Products of tile t with q run together with those of tile t - 1 with v.
    for (int t = 1; t < tiles; ++t) {
        next_tile(t);
        products_begin();
        q_left.times(s, stage_of(ring, t, 2 * TILE_BYTES));
        products_commit();
        add_products(out, p, stage_of(ring, t - 1, 2 * TILE_BYTES) + TILE_BYTES);
        products_commit();
        products_wait<1>();
        pin(s);
        const bool outgrown = softmax(t);
        products_wait<0>();
        pin(out);
        if (outgrown) {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
                for (int j = 0; j < 8; ++j)
#pragma unroll
                    for (int x = 0; x < 4; ++x) out[panel][j][x] *= shrink[x / 2];
        }
        as_left(p, s);
    }
    products_begin();
    add_products(out, p, stage_of(ring, tiles - 1, 2 * TILE_BYTES) + TILE_BYTES);
    products_commit();
    products_wait<0>();
    pin(out);

    float normalise[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = row_sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        normalise[half] = sum > 0.f ? 1.f / sum : 0.f;
        int i = warp_q + half * 8 + (lane >> 2);
        if (i < n && (lane & 3) == 0) lse[size_t(head) * n + i] = row_max[half] * LN_2 + __logf(sum);
    }
    __syncthreads();
    store_panels(o + size_t(head) * D, size_t(heads) * D, warp_q, n, q_shared, FORWARD_ROWS, warp * 16, out, normalise,
                 lane);
}

extern "C" __global__ void __launch_bounds__(DQ_GROUPS * 128, DQ_BLOCKS)
attention_backward_q(u16* __restrict__ d_qkv, const u16* __restrict__ d_o, const u16* __restrict__ qk,
                     const u16* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ delta,
                     const int* __restrict__ first, const int* __restrict__ order, const float* __restrict__ cos,
                     const float* __restrict__ sin, int n, int heads, int kv_heads, int window, float scale) {
    constexpr int THREADS = DQ_GROUPS * 128, KEYS = 64;
    extern __shared__ __align__(1024) u16 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
    const int tile = order ? order[blockIdx.y] : gridDim.y - 1 - blockIdx.y;
    const int q0 = tile * DQ_ROWS, q_end = min(q0 + DQ_ROWS, n);
    const size_t qk_pitch = size_t(heads + kv_heads) * D, qkv_pitch = size_t(heads + 2 * kv_heads) * D;
    const u16* k = qk + size_t(heads + kv_head) * D;
    const u16* v = qkv + size_t(heads + kv_heads + kv_head) * D;

    const u32 ring = shared_address(shared);                   // stages of k, then v
    const u32 q_shared = ring + RING_BYTES, do_shared = q_shared + DQ_ROWS * D * 2;
    const int key_begin = first_key(first, q0, window) / KEYS * KEYS;
    const int tiles = (q_end - key_begin + KEYS - 1) / KEYS;
    auto load_keys = [&](int t) {
        u32 stage = stage_of(ring, t, 2 * TILE_BYTES);
        copy_panels<KEYS, THREADS>(stage, k, qk_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_panels<KEYS, THREADS>(stage + TILE_BYTES, v, qkv_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_commit();
    };
    copy_panels<DQ_ROWS, THREADS>(q_shared, qk + size_t(head) * D, qk_pitch, q0, q_end, threadIdx.x);
    copy_panels<DQ_ROWS, THREADS>(do_shared, d_o + size_t(head) * D, size_t(heads) * D, q0, q_end, threadIdx.x);
    load_keys(0);

    const int warp_q = q0 + warp * 16;
    const int warp_key_full = warp_q < n ? first_key(first, min(warp_q + 16, n) - 1, window) : n;
    int row_first[2];
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int i = warp_q + half * 8 + (lane >> 2);
        row_first[half] = i < n ? first_key(first, i, window) : n;
        row_lse[half] = i < n ? lse[size_t(head) * n + i] * LOG2_E : 0.f;
        row_delta[half] = i < n ? delta[size_t(head) * n + i] : 0.f;
    }
    float d_q[PANELS][8][4], s[8][4], d_p[8][4];
    clear(d_q);
    u32 ds[4][4];
    Left<false> q_left, do_left;
    const float scale_log2 = scale * LOG2_E;

    copy_wait<0>();
    publish();
    __syncthreads();
    q_left.load(q_shared, DQ_ROWS, warp * 16, lane);
    do_left.load(do_shared, DQ_ROWS, warp * 16, lane);
    int t = 0;
    do { // at least one tile
        copy_wait<0>();
        publish();
        __syncthreads();
        if (t + 1 < tiles) load_keys(t + 1);
        const u32 k_shared = stage_of(ring, t, 2 * TILE_BYTES), v_shared = k_shared + TILE_BYTES;
        products_begin();
        q_left.times(s, k_shared);
        products_commit();
        do_left.times(d_p, v_shared);
        products_commit();
        products_wait<1>();                                    // s, and everything before it, is ready
        pin(s);

        const int key0 = key_begin + t * KEYS;
        if (key0 + KEYS - 1 > warp_q || key0 < warp_key_full) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    int i = warp_q + (x / 2) * 8 + (lane >> 2);
                    int key = key0 + j * 8 + (lane & 3) * 2 + (x & 1);
                    if (key > i || key < row_first[x / 2]) s[j][x] = negative_infinity();
                }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
            for (int x = 0; x < 4; ++x) s[j][x] = exp2_fast(s[j][x] * scale_log2 - row_lse[x / 2]);
        products_wait<0>();
        pin(d_p);
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
            for (int x = 0; x < 4; ++x) s[j][x] *= d_p[j][x] - row_delta[x / 2];
        as_left(ds, s);
        products_begin();
        add_products(d_q, ds, k_shared);                       // runs on while the next tile begins
        products_commit();
    } while (++t < tiles);
    products_wait<0>();
    pin(d_q);
    if (cos != nullptr) rotate_back(d_q, cos, sin, warp_q, n, lane);
    const float factor[2] = {scale, scale};
    __syncthreads();
    store_panels(d_qkv + size_t(head) * D, qkv_pitch, warp_q, n, q_shared, DQ_ROWS, warp * 16, d_q, factor, lane);
}

// Everything is transposed: a warp owns keys, so that p^T and ds^T are left operands straight from its registers.
extern "C" __global__ void __launch_bounds__(DKV_GROUPS * 128, DKV_BLOCKS)
attention_backward_kv(u16* __restrict__ d_qkv, const u16* __restrict__ d_o, const u16* __restrict__ qk,
                      const u16* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ delta,
                      const int* __restrict__ last, const int* __restrict__ order, const float* __restrict__ cos,
                      const float* __restrict__ sin, int n, int heads, int kv_heads, int window, float scale) {
    constexpr int THREADS = DKV_GROUPS * 128, QUERIES = 64;
    extern __shared__ __align__(1024) u16 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kv_head = blockIdx.x, group = heads / kv_heads;
    const int tile = order ? order[blockIdx.y] : blockIdx.y;
    const int key0 = tile * DKV_ROWS, key_end = min(key0 + DKV_ROWS, n);
    const size_t qk_pitch = size_t(heads + kv_heads) * D, qkv_pitch = size_t(heads + 2 * kv_heads) * D;
    const size_t o_pitch = size_t(heads) * D;

    const u32 ring = shared_address(shared);                   // stages of q, then do
    const u32 k_shared = ring + RING_BYTES, v_shared = k_shared + DKV_ROWS * D * 2;
    const u32 statistics = v_shared + DKV_ROWS * D * 2; // stages of lse, then delta
    const int query_end = end_query(last, key_end - 1, window);
    const int head_tiles = (query_end - key0 + QUERIES - 1) / QUERIES, tiles = head_tiles * group;
    int load_head = kv_head * group, load_query = key0;        // what the next load brings
    auto load_queries = [&](int t) {
        u32 stage = stage_of(ring, t, 2 * TILE_BYTES);
        copy_panels<QUERIES, THREADS>(stage, qk + size_t(load_head) * D, qk_pitch, load_query, n, threadIdx.x);
        copy_panels<QUERIES, THREADS>(stage + TILE_BYTES, d_o + size_t(load_head) * D, o_pitch, load_query, n,
                                      threadIdx.x);
        if (threadIdx.x < 2 * QUERIES) {
            const float* row = (threadIdx.x < QUERIES ? lse : delta) + size_t(load_head) * n;
            int query = load_query + threadIdx.x % QUERIES;
            copy_async_4(stage_of(statistics, t, 2 * QUERIES * 4) + threadIdx.x * 4, row + (query < n ? query : 0),
                         query < n);
        }
        copy_commit();
        load_query += QUERIES;
        if (load_query >= key0 + head_tiles * QUERIES) {
            load_query = key0;
            ++load_head;
        }
    };
    copy_panels<DKV_ROWS, THREADS>(k_shared, qk + size_t(heads + kv_head) * D, qk_pitch, key0, n, threadIdx.x);
    copy_panels<DKV_ROWS, THREADS>(v_shared, qkv + size_t(heads + kv_heads + kv_head) * D, qkv_pitch, key0, n,
                                   threadIdx.x);
    load_queries(0);

    const int warp_key = key0 + warp * 16, warp_last = min(warp_key + 16, n) - 1;
    const int warp_query_full = warp_key < n ? end_query(last, warp_key, window) : 0; // up to here: see all keys
    int row_end[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int j = warp_key + half * 8 + (lane >> 2);
        row_end[half] = j < n ? end_query(last, j, window) : 0;
    }
    float d_k[PANELS][8][4], d_v[PANELS][8][4], s[8][4], d_p[8][4];
    clear(d_k);
    clear(d_v);
    u32 p[4][4], ds[4][4];
    Left<false> k_left, v_left;
    const float scale_log2 = scale * LOG2_E;

    copy_wait<0>();
    publish();
    __syncthreads();
    k_left.load(k_shared, DKV_ROWS, warp * 16, lane);
    v_left.load(v_shared, DKV_ROWS, warp * 16, lane);
    int t = 0, tile_query = key0;
    do { // at least one tile
        copy_wait<0>();
        publish();
        __syncthreads();
        if (t + 1 < tiles) load_queries(t + 1);
        const int query0 = tile_query;
        tile_query += QUERIES;
        if (tile_query >= key0 + head_tiles * QUERIES) tile_query = key0;
        const u32 q_shared = stage_of(ring, t, 2 * TILE_BYTES), do_shared = q_shared + TILE_BYTES;
        products_begin();
        k_left.times(s, q_shared);
        products_commit();
        v_left.times(d_p, do_shared);
        products_commit();
        products_wait<1>();                                    // s, and everything before it, is ready
        pin(s);

        if (query0 < warp_last || query0 + QUERIES > warp_query_full) {
#pragma unroll
            for (int j = 0; j < QUERIES / 8; ++j)
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    int key = warp_key + (x / 2) * 8 + (lane >> 2);
                    int i = query0 + j * 8 + (lane & 3) * 2 + (x & 1);
                    if (key > i || i >= row_end[x / 2]) s[j][x] = negative_infinity();
                }
        }
        const u32 columns = stage_of(statistics, t, 2 * QUERIES * 4) + (lane & 3) * 8;
#pragma unroll
        for (int j = 0; j < QUERIES / 8; ++j) {
            float column_lse[2];
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(column_lse[0]), "=f"(column_lse[1])
                         : "r"(columns + j * 32)
                         : "memory");
            column_lse[0] *= LOG2_E;
            column_lse[1] *= LOG2_E;
#pragma unroll
            for (int x = 0; x < 4; ++x) s[j][x] = exp2_fast(s[j][x] * scale_log2 - column_lse[x & 1]);
        }
        as_left(p, s);
        products_begin();
        add_products(d_v, p, do_shared);
        products_commit();
        products_wait<1>();                                    // d_p is ready
        pin(d_p);
#pragma unroll
        for (int j = 0; j < QUERIES / 8; ++j) {
            float column_delta[2];
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(column_delta[0]), "=f"(column_delta[1])
                         : "r"(columns + QUERIES * 4 + j * 32)
                         : "memory");
#pragma unroll
            for (int x = 0; x < 4; ++x) d_p[j][x] = s[j][x] * (d_p[j][x] - column_delta[x & 1]);
        }
        as_left(ds, d_p);
        products_begin();
        add_products(d_k, ds, q_shared);                       // runs on while the next tile begins
        products_commit();
    } while (++t < tiles);
    products_wait<0>();
    pin(d_k);
    pin(d_v);
    __syncthreads();
    if (cos != nullptr) rotate_back(d_k, cos, sin, warp_key, n, lane);
    const float factor[2] = {scale, scale}, one[2] = {1.f, 1.f};
    store_panels(d_qkv + size_t(heads + kv_head) * D, qkv_pitch, warp_key, n, k_shared, DKV_ROWS, warp * 16, d_k, factor,
                 lane);
    store_panels(d_qkv + size_t(heads + kv_heads + kv_head) * D, qkv_pitch, warp_key, n, v_shared, DKV_ROWS, warp * 16,
                 d_v, one, lane);
}

// Of attention_forward, attention_backward_q, attention_backward_kv: rows, threads and dynamic shared bytes.
__device__ const int TILED[9] = {
    FORWARD_ROWS, FORWARD_GROUPS * 128, FORWARD_Q_OFFSET + FORWARD_ROWS * D * 2 + (Q_IN_LAST_STAGE ? TILE_BYTES : 0),
    DQ_ROWS,      DQ_GROUPS * 128,      RING_BYTES + 2 * DQ_ROWS * D * 2,
    DKV_ROWS,     DKV_GROUPS * 128,     RING_BYTES + 2 * DKV_ROWS * D * 2 + STAGES * 2 * 64 * 4};

#else
// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Warps of a block; 16-row tiles of a warp (M_TILES); rows of the other side in a stage, and how many of them backward takes
// through the softmax at once (CHUNK); blocks a multiprocessor should hold. Chosen by timing on an H100.
constexpr int FORWARD_WARPS = 4;
constexpr int FORWARD_M_TILES = D <= 128 ? 2 : 1;
constexpr int FORWARD_KEYS = D <= (SMALL_SHARED ? 64 : 128) ? 64 : 32;
constexpr int FORWARD_BLOCKS = 2;
constexpr int FORWARD_ROWS = FORWARD_WARPS * FORWARD_M_TILES * 16;

extern "C" __global__ void __launch_bounds__(FORWARD_WARPS * 32, FORWARD_BLOCKS)
attention_forward(u16* __restrict__ o, float* __restrict__ lse, const u16* __restrict__ qk,
                  const u16* __restrict__ qkv, const int* __restrict__ first, const int* __restrict__ order, int n,
                  int heads, int kv_heads, int window, float scale) {
    constexpr int M_TILES = FORWARD_M_TILES, KEYS = FORWARD_KEYS, THREADS = FORWARD_WARPS * 32;
    constexpr bool Q_IN_REGISTERS = D <= 64;
    extern __shared__ __align__(128) u16 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
    const int tile = order ? order[blockIdx.y] : gridDim.y - 1 - blockIdx.y;
    const int q0 = tile * FORWARD_ROWS, q_end = min(q0 + FORWARD_ROWS, n);
    const size_t qk_pitch = size_t(heads + kv_heads) * D, qkv_pitch = size_t(heads + 2 * kv_heads) * D;
    const u16* q = qk + size_t(head) * D;
    const u16* k = qk + size_t(heads + kv_head) * D;
    const u16* v = qkv + size_t(heads + kv_heads + kv_head) * D;

    const u32 q_shared = shared_address(shared);
    const u32 ring = q_shared + FORWARD_ROWS * ROW_BYTES;       // two stages of KEYS rows of k, then KEYS rows of v
    const int key_begin = first_key(first, q0, window) / KEYS * KEYS;
    const int tiles = (q_end - key_begin + KEYS - 1) / KEYS;
    auto load_keys = [&](int t) {
        u32 stage = ring + (t & 1) * (2 * KEYS * ROW_BYTES);
        copy_rows<KEYS, THREADS>(stage, k, qk_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_rows<KEYS, THREADS>(stage + KEYS * ROW_BYTES, v, qkv_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_commit();
    };
    copy_rows<FORWARD_ROWS, THREADS>(q_shared, q, qk_pitch, q0, q_end, threadIdx.x);
    load_keys(0);

    const int warp_q = q0 + warp * M_TILES * 16;               // this warp's queries
    const int warp_last = min(warp_q + M_TILES * 16, n) - 1;
    const u32 warp_q_shared = q_shared + warp * M_TILES * 16 * ROW_BYTES;
    const bool warp_idle = warp_q >= n;
    const int warp_key_begin = warp_idle ? n : first_key(first, warp_q, window);
    const int warp_key_full = warp_idle ? n : first_key(first, warp_last, window); // keys from here on: seen by all
    int row_first[M_TILES][2];
    float row_max[M_TILES][2], row_sum[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int i = warp_q + m * 16 + half * 8 + (lane >> 2);
            row_first[m][half] = i < n ? first_key(first, i, window) : n;
            row_max[m][half] = negative_infinity();
            row_sum[m][half] = 0.f;
        }
    float out[M_TILES][D / 8][4];
    clear(out);
    u32 q_left[Q_IN_REGISTERS ? M_TILES : 1][Q_IN_REGISTERS ? D / 16 : 1][4];
    const float scale_log2 = scale * LOG2_E;

    for (int t = 0; t < tiles; ++t) {
        copy_wait<0>();
        __syncthreads();
        if (t + 1 < tiles) load_keys(t + 1);
        if (Q_IN_REGISTERS && t == 0) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int kk = 0; kk < D / 16; ++kk)
                    load_matrices(q_left[Q_IN_REGISTERS ? m : 0][Q_IN_REGISTERS ? kk : 0],
                                  warp_q_shared + left_offset(lane) + m * 16 * ROW_BYTES + kk * 32);
        }
        const int key0 = key_begin + t * KEYS;
        if (key0 > warp_last || key0 + KEYS <= warp_key_begin) continue; // nothing here that this warp's queries see
        const u32 k_shared = ring + (t & 1) * (2 * KEYS * ROW_BYTES), v_shared = k_shared + KEYS * ROW_BYTES;

        float s[M_TILES][KEYS / 8][4];
        clear(s);
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
            u32 a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                if (Q_IN_REGISTERS) {
#pragma unroll
                    for (int x = 0; x < 4; ++x) a[m][x] = q_left[Q_IN_REGISTERS ? m : 0][Q_IN_REGISTERS ? kk : 0][x];
                } else {
                    load_matrices(a[m], warp_q_shared + left_offset(lane) + m * 16 * ROW_BYTES + kk * 32);
                }
            }
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                u32 b[4];
                load_matrices(b, k_shared + right_offset(lane) + j * 16 * ROW_BYTES + kk * 32);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply_add(s[m][2 * j], a[m], b[0], b[1]);
                    multiply_add(s[m][2 * j + 1], a[m], b[2], b[3]);
                }
            }
        }
        if (key0 + KEYS - 1 > warp_q || key0 < warp_key_full) { // some pair is masked
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                    for (int x = 0; x < 4; ++x) {
                        int i = warp_q + m * 16 + (x / 2) * 8 + (lane >> 2);
                        int key = key0 + j * 8 + (lane & 3) * 2 + (x & 1);
                        if (key > i || key < row_first[m][x / 2]) s[m][j][x] = negative_infinity();
                    }
        }
        // Online softmax. The maximum in use is raised, and sums rescaled, only when a row outgrows it by 2^8.
        float tile_max[M_TILES][2];
        bool outgrown = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = negative_infinity();
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j) top = fmaxf(top, fmaxf(s[m][j][2 * half], s[m][j][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale_log2;
                tile_max[m][half] = top;
                outgrown |= top > row_max[m][half] + 8.f;
            }
        if (__any_sync(~0u, outgrown)) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float raised = fmaxf(row_max[m][half], tile_max[m][half]);
                    float shrink = raised == negative_infinity() ? 1.f : exp2_fast(row_max[m][half] - raised);
                    row_max[m][half] = raised;
                    row_sum[m][half] *= shrink;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) {
                        out[m][j][2 * half] *= shrink;
                        out[m][j][2 * half + 1] *= shrink;
                    }
                }
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float base = row_max[m][half] == negative_infinity() ? 0.f : row_max[m][half];
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                    for (int x = 2 * half; x < 2 * half + 2; ++x) {
                        s[m][j][x] = exp2_fast(s[m][j][x] * scale_log2 - base);
                        row_sum[m][half] += s[m][j][x];
                    }
            }
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; ++kk) {
            u32 p[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) as_left(p[m], s[m][2 * kk], s[m][2 * kk + 1]);
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                u32 b[4];
                load_matrices_transposed(b, v_shared + left_offset(lane) + kk * 16 * ROW_BYTES + j * 32);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply_add(out[m][2 * j], p[m], b[0], b[1]);
                    multiply_add(out[m][2 * j + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

    float normalise[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[m][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            normalise[m][half] = sum > 0.f ? 1.f / sum : 0.f;
            int i = warp_q + m * 16 + half * 8 + (lane >> 2);
            if (i < n && (lane & 3) == 0) lse[size_t(head) * n + i] = row_max[m][half] * LN_2 + __logf(sum);
        }
    store_rows<M_TILES, D>(o + size_t(head) * D, size_t(heads) * D, warp_q, n, warp_q_shared, out, normalise, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: queries

constexpr int DQ_WARPS = D <= 64 ? 4 : D <= 128 ? (SMALL_SHARED ? 4 : 8) : (SMALL_SHARED ? 2 : 4);
constexpr int DQ_M_TILES = D <= 64 ? 2 : 1;
constexpr int DQ_KEYS = D <= (SMALL_SHARED ? 64 : 128) ? 64 : 32;
constexpr int DQ_CHUNK = 16;
constexpr int DQ_BLOCKS = D <= 64 ? 2 : 1;
constexpr int DQ_ROWS = DQ_WARPS * DQ_M_TILES * 16;

extern "C" __global__ void __launch_bounds__(DQ_WARPS * 32, DQ_BLOCKS)
attention_backward_q(u16* __restrict__ d_qkv, const u16* __restrict__ d_o, const u16* __restrict__ qk,
                     const u16* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ delta,
                     const int* __restrict__ first, const int* __restrict__ order, const float* __restrict__ cos,
                     const float* __restrict__ sin, int n, int heads, int kv_heads, int window, float scale) {
    constexpr int M_TILES = DQ_M_TILES, KEYS = DQ_KEYS, THREADS = DQ_WARPS * 32, CHUNK = DQ_CHUNK;
    constexpr bool IN_REGISTERS = D * M_TILES <= 128;
    extern __shared__ __align__(128) u16 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
    const int tile = order ? order[blockIdx.y] : gridDim.y - 1 - blockIdx.y;
    const int q0 = tile * DQ_ROWS, q_end = min(q0 + DQ_ROWS, n);
    const size_t qk_pitch = size_t(heads + kv_heads) * D, qkv_pitch = size_t(heads + 2 * kv_heads) * D;
    const u16* k = qk + size_t(heads + kv_head) * D;
    const u16* v = qkv + size_t(heads + kv_heads + kv_head) * D;

    const u32 q_shared = shared_address(shared), do_shared = q_shared + DQ_ROWS * ROW_BYTES;
    const u32 ring = do_shared + DQ_ROWS * ROW_BYTES;          // two stages of KEYS rows of k, then KEYS rows of v
    const int key_begin = first_key(first, q0, window) / KEYS * KEYS;
    const int tiles = (q_end - key_begin + KEYS - 1) / KEYS;
    auto load_keys = [&](int t) {
        u32 stage = ring + (t & 1) * (2 * KEYS * ROW_BYTES);
        copy_rows<KEYS, THREADS>(stage, k, qk_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_rows<KEYS, THREADS>(stage + KEYS * ROW_BYTES, v, qkv_pitch, key_begin + t * KEYS, q_end, threadIdx.x);
        copy_commit();
    };
    copy_rows<DQ_ROWS, THREADS>(q_shared, qk + size_t(head) * D, qk_pitch, q0, q_end, threadIdx.x);
    copy_rows<DQ_ROWS, THREADS>(do_shared, d_o + size_t(head) * D, size_t(heads) * D, q0, q_end, threadIdx.x);
    load_keys(0);

    const int warp_q = q0 + warp * M_TILES * 16;
    const int warp_last = min(warp_q + M_TILES * 16, n) - 1;
    const u32 own_offset = warp * M_TILES * 16 * ROW_BYTES + left_offset(lane);
    const bool warp_idle = warp_q >= n;
    const int warp_key_begin = warp_idle ? n : first_key(first, warp_q, window);
    const int warp_key_full = warp_idle ? n : first_key(first, warp_last, window);
    int row_first[M_TILES][2];
    float row_lse[M_TILES][2], row_delta[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int i = warp_q + m * 16 + half * 8 + (lane >> 2);
            row_first[m][half] = i < n ? first_key(first, i, window) : n;
            row_lse[m][half] = i < n ? lse[size_t(head) * n + i] * LOG2_E : 0.f;
            row_delta[m][half] = i < n ? delta[size_t(head) * n + i] : 0.f;
        }
    float d_q[M_TILES][D / 8][4];
    clear(d_q);
    u32 q_left[IN_REGISTERS ? M_TILES : 1][IN_REGISTERS ? D / 16 : 1][4];
    u32 do_left[IN_REGISTERS ? M_TILES : 1][IN_REGISTERS ? D / 16 : 1][4];
    const float scale_log2 = scale * LOG2_E;

    for (int t = 0; t < tiles; ++t) {
        copy_wait<0>();
        __syncthreads();
        if (t + 1 < tiles) load_keys(t + 1);
        if (IN_REGISTERS && t == 0) {
#pragma unroll
            for (int m = 0; m < (IN_REGISTERS ? M_TILES : 1); ++m)
#pragma unroll
                for (int kk = 0; kk < (IN_REGISTERS ? D / 16 : 1); ++kk) {
                    load_matrices(q_left[m][kk], q_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                    load_matrices(do_left[m][kk], do_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                }
        }
        const int tile_key = key_begin + t * KEYS;
        const u32 stage = ring + (t & 1) * (2 * KEYS * ROW_BYTES);
        if (tile_key > warp_last || tile_key + KEYS <= warp_key_begin) continue;
        const bool masked = tile_key + KEYS - 1 > warp_q || tile_key < warp_key_full;
#pragma unroll
        for (int chunk = 0; chunk < KEYS / CHUNK; ++chunk) {
            const int key0 = tile_key + chunk * CHUNK;
            const u32 k_shared = stage + chunk * CHUNK * ROW_BYTES, v_shared = k_shared + KEYS * ROW_BYTES;
            float s[M_TILES][CHUNK / 8][4], d_p[M_TILES][CHUNK / 8][4];
            clear(s);
            clear(d_p);
#pragma unroll
            for (int kk = 0; kk < D / 16; ++kk) {
                u32 a[M_TILES][4], b[4], a2[M_TILES][4], b2[4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    if (IN_REGISTERS) {
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            a[m][x] = q_left[IN_REGISTERS ? m : 0][IN_REGISTERS ? kk : 0][x];
                            a2[m][x] = do_left[IN_REGISTERS ? m : 0][IN_REGISTERS ? kk : 0][x];
                        }
                    } else {
                        load_matrices(a[m], q_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                        load_matrices(a2[m], do_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                    }
                }
#pragma unroll
                for (int j = 0; j < CHUNK / 16; ++j) {
                    load_matrices(b, k_shared + right_offset(lane) + j * 16 * ROW_BYTES + kk * 32);
                    load_matrices(b2, v_shared + right_offset(lane) + j * 16 * ROW_BYTES + kk * 32);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        multiply_add(s[m][2 * j], a[m], b[0], b[1]);
                        multiply_add(s[m][2 * j + 1], a[m], b[2], b[3]);
                        multiply_add(d_p[m][2 * j], a2[m], b2[0], b2[1]);
                        multiply_add(d_p[m][2 * j + 1], a2[m], b2[2], b2[3]);
                    }
                }
            }
            if (masked) {
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            int i = warp_q + m * 16 + (x / 2) * 8 + (lane >> 2);
                            int key = key0 + j * 8 + (lane & 3) * 2 + (x & 1);
                            if (key > i || key < row_first[m][x / 2]) s[m][j][x] = negative_infinity();
                        }
            }
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
                    for (int x = 0; x < 4; ++x) // s becomes ds
                        s[m][j][x] = exp2_fast(s[m][j][x] * scale_log2 - row_lse[m][x / 2]) *
                                     (d_p[m][j][x] - row_delta[m][x / 2]);
#pragma unroll
            for (int kk = 0; kk < CHUNK / 16; ++kk) {
                u32 ds[M_TILES][4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) as_left(ds[m], s[m][2 * kk], s[m][2 * kk + 1]);
#pragma unroll
                for (int j = 0; j < D / 16; ++j) {
                    u32 b[4];
                    load_matrices_transposed(b, k_shared + left_offset(lane) + kk * 16 * ROW_BYTES + j * 32);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        multiply_add(d_q[m][2 * j], ds[m], b[0], b[1]);
                        multiply_add(d_q[m][2 * j + 1], ds[m], b[2], b[3]);
                    }
                }
            }
        }
    }
    if (cos != nullptr) rotate_back(d_q, cos, sin, warp_q, n, lane);
    float factor[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) factor[m][0] = factor[m][1] = scale;
    store_rows<M_TILES, D>(d_qkv + size_t(head) * D, qkv_pitch, warp_q, n, q_shared + warp * M_TILES * 16 * ROW_BYTES,
                           d_q, factor, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: keys and values

constexpr int DKV_WARPS = D <= 64 ? 4 : D <= 128 ? (SMALL_SHARED ? 4 : 8) : (SMALL_SHARED ? 2 : 4);
constexpr int DKV_M_TILES = 1;
constexpr int DKV_QUERIES = D <= (SMALL_SHARED ? 64 : 128) ? 64 : D <= 128 || !SMALL_SHARED ? 32 : 16;
constexpr int DKV_CHUNK = 16;
constexpr int DKV_BLOCKS = D <= 64 ? 2 : 1;
constexpr int DKV_ROWS = DKV_WARPS * DKV_M_TILES * 16;
constexpr int DKV_SLICES = D <= 128 ? 1 : 2;                   // blocks that share the columns of dk and dv
constexpr int DKV_COLUMNS = DKV_SLICES == 1 ? D : (D / 16 + 1) / 2 * 16;

// Everything is transposed: a warp owns keys, so that p^T and ds^T are left operands straight from its registers.
extern "C" __global__ void __launch_bounds__(DKV_WARPS * 32, DKV_BLOCKS)
attention_backward_kv(u16* __restrict__ d_qkv, const u16* __restrict__ d_o, const u16* __restrict__ qk,
                      const u16* __restrict__ qkv, const float* __restrict__ lse, const float* __restrict__ delta,
                      const int* __restrict__ last, const int* __restrict__ order, const float* __restrict__ cos,
                      const float* __restrict__ sin, int n, int heads, int kv_heads, int window, float scale) {
    constexpr int M_TILES = DKV_M_TILES, QUERIES = DKV_QUERIES, THREADS = DKV_WARPS * 32, CHUNK = DKV_CHUNK;
    constexpr bool IN_REGISTERS = D * M_TILES <= 128;
    constexpr int STAGE_BYTES = 2 * QUERIES * ROW_BYTES + 2 * QUERIES * 4; // q, do, lse, delta
    extern __shared__ __align__(128) u16 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kv_head = blockIdx.x, group = heads / kv_heads;
    const int tile = order ? order[blockIdx.y] : blockIdx.y;
    const int column0 = blockIdx.z == 0 ? 0 : D - DKV_COLUMNS;
    const int key0 = tile * DKV_ROWS, key_end = min(key0 + DKV_ROWS, n);
    const size_t qk_pitch = size_t(heads + kv_heads) * D, qkv_pitch = size_t(heads + 2 * kv_heads) * D;
    const size_t o_pitch = size_t(heads) * D;

    const u32 k_shared = shared_address(shared), v_shared = k_shared + DKV_ROWS * ROW_BYTES;
    const u32 ring = v_shared + DKV_ROWS * ROW_BYTES;
    const int query_end = end_query(last, key_end - 1, window);
    const int head_tiles = (query_end - key0 + QUERIES - 1) / QUERIES, tiles = head_tiles * group;
    int load_head = kv_head * group, load_query = key0;        // what the next load brings
    auto load_queries = [&](int t) {
        u32 stage = ring + (t & 1) * STAGE_BYTES;
        copy_rows<QUERIES, THREADS>(stage, qk + size_t(load_head) * D, qk_pitch, load_query, n, threadIdx.x);
        copy_rows<QUERIES, THREADS>(stage + QUERIES * ROW_BYTES, d_o + size_t(load_head) * D, o_pitch, load_query, n,
                                    threadIdx.x);
        for (int i = threadIdx.x; i < 2 * QUERIES; i += THREADS) {
            const float* row = (i < QUERIES ? lse : delta) + size_t(load_head) * n;
            int query = load_query + i % QUERIES;
            copy_async_4(stage + 2 * QUERIES * ROW_BYTES + i * 4, row + (query < n ? query : 0), query < n);
        }
        copy_commit();
        load_query += QUERIES;
        if (load_query >= key0 + head_tiles * QUERIES) {
            load_query = key0;
            ++load_head;
        }
    };
    copy_rows<DKV_ROWS, THREADS>(k_shared, qk + size_t(heads + kv_head) * D, qk_pitch, key0, n, threadIdx.x);
    copy_rows<DKV_ROWS, THREADS>(v_shared, qkv + size_t(heads + kv_heads + kv_head) * D, qkv_pitch, key0, n,
                                 threadIdx.x);
    load_queries(0);

    const int warp_key = key0 + warp * M_TILES * 16;
    const int warp_last = min(warp_key + M_TILES * 16, n) - 1;
    const u32 own_offset = warp * M_TILES * 16 * ROW_BYTES + left_offset(lane);
    const bool warp_idle = warp_key >= n;
    const int warp_query_full = warp_idle ? 0 : end_query(last, warp_key, window); // up to here: see all keys
    const int warp_query_end = warp_idle ? 0 : end_query(last, warp_last, window);
    int row_end[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int j = warp_key + m * 16 + half * 8 + (lane >> 2);
            row_end[m][half] = j < n ? end_query(last, j, window) : 0;
        }
    float d_k[M_TILES][DKV_COLUMNS / 8][4], d_v[M_TILES][DKV_COLUMNS / 8][4];
    clear(d_k);
    clear(d_v);
    u32 k_left[IN_REGISTERS ? M_TILES : 1][IN_REGISTERS ? D / 16 : 1][4];
    u32 v_left[IN_REGISTERS ? M_TILES : 1][IN_REGISTERS ? D / 16 : 1][4];
    const float scale_log2 = scale * LOG2_E;

    int tile_query = key0;
    for (int t = 0; t < tiles; ++t) {
        copy_wait<0>();
        __syncthreads();
        if (t + 1 < tiles) load_queries(t + 1);
        if (IN_REGISTERS && t == 0) {
#pragma unroll
            for (int m = 0; m < (IN_REGISTERS ? M_TILES : 1); ++m)
#pragma unroll
                for (int kk = 0; kk < (IN_REGISTERS ? D / 16 : 1); ++kk) {
                    load_matrices(k_left[m][kk], k_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                    load_matrices(v_left[m][kk], v_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                }
        }
        const int this_query = tile_query;
        tile_query += QUERIES;
        if (tile_query >= key0 + head_tiles * QUERIES) tile_query = key0;
        if (this_query + QUERIES <= warp_key || this_query >= warp_query_end) continue;
        const bool masked = this_query < warp_last || this_query + QUERIES > warp_query_full;
        const u32 stage = ring + (t & 1) * STAGE_BYTES;
        const u32 lse_shared = stage + 2 * QUERIES * ROW_BYTES, delta_shared = lse_shared + QUERIES * 4;
#pragma unroll
        for (int chunk = 0; chunk < QUERIES / CHUNK; ++chunk) {
            const int query0 = this_query + chunk * CHUNK;
            const u32 q_shared = stage + chunk * CHUNK * ROW_BYTES, do_shared = q_shared + QUERIES * ROW_BYTES;
            float s[M_TILES][CHUNK / 8][4], d_p[M_TILES][CHUNK / 8][4];
            clear(s);
            clear(d_p);
#pragma unroll
            for (int kk = 0; kk < D / 16; ++kk) {
                u32 a[M_TILES][4], b[4], a2[M_TILES][4], b2[4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    if (IN_REGISTERS) {
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            a[m][x] = k_left[IN_REGISTERS ? m : 0][IN_REGISTERS ? kk : 0][x];
                            a2[m][x] = v_left[IN_REGISTERS ? m : 0][IN_REGISTERS ? kk : 0][x];
                        }
                    } else {
                        load_matrices(a[m], k_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                        load_matrices(a2[m], v_shared + own_offset + m * 16 * ROW_BYTES + kk * 32);
                    }
                }
#pragma unroll
                for (int j = 0; j < CHUNK / 16; ++j) {
                    load_matrices(b, q_shared + right_offset(lane) + j * 16 * ROW_BYTES + kk * 32);
                    load_matrices(b2, do_shared + right_offset(lane) + j * 16 * ROW_BYTES + kk * 32);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        multiply_add(s[m][2 * j], a[m], b[0], b[1]);
                        multiply_add(s[m][2 * j + 1], a[m], b[2], b[3]);
                        multiply_add(d_p[m][2 * j], a2[m], b2[0], b2[1]);
                        multiply_add(d_p[m][2 * j + 1], a2[m], b2[2], b2[3]);
                    }
                }
            }
            if (masked) {
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            int key = warp_key + m * 16 + (x / 2) * 8 + (lane >> 2);
                            int i = query0 + j * 8 + (lane & 3) * 2 + (x & 1);
                            if (key > i || i >= row_end[m][x / 2]) s[m][j][x] = negative_infinity();
                        }
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 8; ++j) {
                float column_lse[2], column_delta[2];
                u32 column = (chunk * CHUNK + j * 8 + (lane & 3) * 2) * 4;
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                             : "=f"(column_lse[0]), "=f"(column_lse[1])
                             : "r"(lse_shared + column)
                             : "memory");
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                             : "=f"(column_delta[0]), "=f"(column_delta[1])
                             : "r"(delta_shared + column)
                             : "memory");
                column_lse[0] *= LOG2_E;
                column_lse[1] *= LOG2_E;
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int x = 0; x < 4; ++x) { // s becomes p, d_p becomes ds
                        s[m][j][x] = exp2_fast(s[m][j][x] * scale_log2 - column_lse[x & 1]);
                        d_p[m][j][x] = s[m][j][x] * (d_p[m][j][x] - column_delta[x & 1]);
                    }
            }
#pragma unroll
            for (int kk = 0; kk < CHUNK / 16; ++kk) {
                u32 p[M_TILES][4], ds[M_TILES][4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    as_left(p[m], s[m][2 * kk], s[m][2 * kk + 1]);
                    as_left(ds[m], d_p[m][2 * kk], d_p[m][2 * kk + 1]);
                }
#pragma unroll
                for (int j = 0; j < DKV_COLUMNS / 16; ++j) {
                    u32 b[4];
                    u32 at = left_offset(lane) + kk * 16 * ROW_BYTES + j * 32 + column0 * 2;
                    load_matrices_transposed(b, do_shared + at);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        multiply_add(d_v[m][2 * j], p[m], b[0], b[1]);
                        multiply_add(d_v[m][2 * j + 1], p[m], b[2], b[3]);
                    }
                    load_matrices_transposed(b, q_shared + at);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        multiply_add(d_k[m][2 * j], ds[m], b[0], b[1]);
                        multiply_add(d_k[m][2 * j + 1], ds[m], b[2], b[3]);
                    }
                }
            }
        }
    }
    if (DKV_SLICES == 1 && cos != nullptr) rotate_back(d_k, cos, sin, warp_key, n, lane);
    float factor[M_TILES][2];
    const u32 own = warp * M_TILES * 16 * ROW_BYTES;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) factor[m][0] = factor[m][1] = scale;
    store_rows<M_TILES, DKV_COLUMNS>(d_qkv + size_t(heads + kv_head) * D + column0, qkv_pitch, warp_key, n,
                                     k_shared + own, d_k, factor, lane);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) factor[m][0] = factor[m][1] = 1.f;
    store_rows<M_TILES, DKV_COLUMNS>(d_qkv + size_t(heads + kv_heads + kv_head) * D + column0, qkv_pitch, warp_key, n,
                                     v_shared + own, d_v, factor, lane);
}

// Of attention_forward, attention_backward_q, attention_backward_kv: rows, threads and dynamic shared bytes.
__device__ const int TILED[9] = {
    FORWARD_ROWS, FORWARD_WARPS * 32, (FORWARD_ROWS + 4 * FORWARD_KEYS) * ROW_BYTES,
    DQ_ROWS,      DQ_WARPS * 32,      (2 * DQ_ROWS + 4 * DQ_KEYS) * ROW_BYTES,
    DKV_ROWS,     DKV_WARPS * 32,     (2 * DKV_ROWS + 4 * DKV_QUERIES) * ROW_BYTES + 16 * DKV_QUERIES};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Order of tiles: most work first

// order[rank] = tile; ties by index. `limits` is first (queries: work is keys seen) or last (keys: queries that see).
__device__ __forceinline__ void order_block(int block, int* __restrict__ order, const int* __restrict__ limits, int n,
                                            int rows, int window, int of_keys) {
    const int tiles = (n + rows - 1) / rows, tile = block * 256 + threadIdx.x;
    if (tile >= tiles) return;
    auto work = [&](int t) {
        int begin = t * rows, end = min(begin + rows, n);
        return of_keys ? end_query(limits, end - 1, window) - begin : end - first_key(limits, begin, window);
    };
    const int own = work(tile);
    int rank = 0;
    for (int t = 0; t < tiles; ++t) {
        int other = work(t);
        rank += other > own || (other == own && t < tile);
    }
    order[rank] = tile;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotation and head norm

// One thread holds 8 pairs (i, i + D/2) of one (token, head).
struct Pairs {
    float low[8], high[8];
};

__device__ __forceinline__ void load_pairs(Pairs& x, const u16* head, int part) {
    load_8(x.low, head + part * 8);
    load_8(x.high, head + D / 2 + part * 8);
}
__device__ __forceinline__ void store_pairs(u16* head, const Pairs& x, int part) {
    store_8(head + part * 8, x.low);
    store_8(head + D / 2 + part * 8, x.high);
}

// 1 / rms of a head; every lane of it must call.
__device__ __forceinline__ float inverse_rms(const Pairs& x, float epsilon) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
    return rsqrtf(sum_lanes(sum) * (1.f / D) + epsilon);
}

// Rotation by the token's angles, or by their negatives (direction -1).
__device__ __forceinline__ void rotate(Pairs& x, const float* cos, const float* sin, size_t token, int part,
                                       float direction) {
    float c[8], s[8];
    load_8(c, cos + token * (D / 2) + part * 8);
    load_8(s, sin + token * (D / 2) + part * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float low = x.low[i], high = x.high[i], sine = direction * s[i];
        x.low[i] = low * c[i] - high * sine;
        x.high[i] = high * c[i] + low * sine;
    }
}

// Norm, where there is one, and rotation of a query's or key's head; every lane of it must call.
__device__ __forceinline__ void turn(Pairs& x, const u16* norm, const float* cos, const float* sin, size_t token, int part,
                                     float epsilon, bool valid) {
    if (norm != nullptr) {
        const float r = inverse_rms(x, epsilon);
        if (valid) {
            Pairs weight;
            load_pairs(weight, norm, part);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x.low[i] = round_bf16(weight.low[i] * round_bf16(x.low[i] * r));
                x.high[i] = round_bf16(weight.high[i] * round_bf16(x.high[i] * r));
            }
        }
    }
    if (valid && cos != nullptr) rotate(x, cos, sin, token, part, 1.f);
}

__device__ __forceinline__ void rotate_block(size_t block, u16* __restrict__ qk, const u16* __restrict__ qkv,
                                             const float* __restrict__ cos, const float* __restrict__ sin,
                                             const u16* __restrict__ q_norm, const u16* __restrict__ k_norm, int n,
                                             int heads, int kv_heads, float epsilon) {
    const size_t item = block * (256 / LANES) + threadIdx.x / LANES; // token * (H + KV) + head
    const int part = threadIdx.x % LANES;
    const bool valid = item < size_t(n) * (heads + kv_heads) && part < D / 16;
    const size_t token = item / (heads + kv_heads);
    const int head = item % (heads + kv_heads);
    Pairs x = {};
    if (valid) load_pairs(x, qkv + (token * (heads + 2 * kv_heads) + head) * D, part);
    turn(x, head < heads ? q_norm : k_norm, cos, sin, token, part, epsilon, valid);
    if (valid) store_pairs(qk + item * D, x, part);
}

// What the tiled kernels read besides their inputs, in one launch: up to two orders of tiles, queries and keys after norm and
// rotation, delta. Null for what is not asked for. The orders come first, as their blocks take longest.
extern "C" __global__ void __launch_bounds__(256)
attention_prepare(u16* __restrict__ qk, const u16* __restrict__ qkv, const float* __restrict__ cos,
                  const float* __restrict__ sin, const u16* __restrict__ q_norm, const u16* __restrict__ k_norm, int n,
                  int heads, int kv_heads, float epsilon, float* __restrict__ delta, const u16* __restrict__ d_o,
                  const u16* __restrict__ o, int window, int* __restrict__ q_order, const int* __restrict__ first,
                  int q_rows, int* __restrict__ kv_order, const int* __restrict__ last, int kv_rows) {
    auto of_order = [&](int rows) { return ((n + rows - 1) / rows + 255) / 256; };
    long long block = blockIdx.x;
    if (q_order != nullptr) {
        if (block < of_order(q_rows)) return order_block(int(block), q_order, first, n, q_rows, window, 0);
        block -= of_order(q_rows);
    }
    if (kv_order != nullptr) {
        if (block < of_order(kv_rows)) return order_block(int(block), kv_order, last, n, kv_rows, window, 1);
        block -= of_order(kv_rows);
    }
    if (qk != nullptr) {
        const long long blocks = (size_t(n) * (heads + kv_heads) * LANES + 255) / 256;
        if (block < blocks)
            return rotate_block(block, qk, qkv, cos, sin, q_norm, k_norm, n, heads, kv_heads, epsilon);
        block -= blocks;
    }
    if (delta != nullptr) delta_block(block, delta, d_o, o, n, heads);
}

extern "C" __global__ void __launch_bounds__(256)
attention_keep(u16* __restrict__ q, u16* __restrict__ k_cache, u16* __restrict__ v_cache, const u16* __restrict__ qkv,
               const float* __restrict__ cos, const float* __restrict__ sin, const u16* __restrict__ q_norm,
               const u16* __restrict__ k_norm, int n, int tokens, int heads, int kv_heads, int capacity, int length,
               float epsilon) {
    const size_t item = size_t(blockIdx.x) * (256 / LANES) + threadIdx.x / LANES; // token * (H + 2 KV) + head
    const int part = threadIdx.x % LANES, all = heads + 2 * kv_heads;
    const bool valid = item < size_t(n) * all && part < D / 16;
    const size_t token = item / all, row = token / tokens, slot = length + token % tokens;
    const int head = item % all;
    Pairs x = {};
    if (valid) load_pairs(x, qkv + item * D, part);
    const bool of_value = head >= heads + kv_heads;
    // A warp may hold heads of both kinds, and the norm's sums need all its lanes.
    Pairs turned = x;
    turn(turned, head < heads ? q_norm : k_norm, cos, sin, token, part, epsilon, valid && !of_value);
    if (!valid) return;
    if (head < heads) {
        if (q != nullptr) store_pairs(q + (token * heads + head) * D, turned, part);
        return;
    }
    const int kv_head = (head - heads) % kv_heads;
    u16* cache = of_value ? v_cache : k_cache;
    store_pairs(cache + ((row * kv_heads + kv_head) * capacity + slot) * D, of_value ? x : turned, part);
}

extern "C" __global__ void __launch_bounds__(256)
attention_rotate_backward(u16* __restrict__ d_qkv, const u16* __restrict__ qkv, const float* __restrict__ cos,
                          const float* __restrict__ sin, const u16* __restrict__ q_norm,
                          const u16* __restrict__ k_norm, int n, int heads, int kv_heads, float epsilon) {
    const size_t item = size_t(blockIdx.x) * (256 / LANES) + threadIdx.x / LANES;
    const int part = threadIdx.x % LANES;
    const bool valid = item < size_t(n) * (heads + kv_heads) && part < D / 16;
    const size_t token = item / (heads + kv_heads);
    const int head = item % (heads + kv_heads);
    const size_t at = (token * (heads + 2 * kv_heads) + head) * D;
    Pairs g = {}, x = {};
    if (valid) {
        load_pairs(g, d_qkv + at, part);
        if (cos != nullptr) rotate(g, cos, sin, token, part, -1.f);
    }
    if (q_norm != nullptr) {
        if (valid) {
            Pairs weight;
            load_pairs(x, qkv + at, part);
            load_pairs(weight, head < heads ? q_norm : k_norm, part);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                g.low[i] *= weight.low[i];
                g.high[i] *= weight.high[i];
            }
        }
        const float r = inverse_rms(x, epsilon);
        float along = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) along += g.low[i] * x.low[i] + g.high[i] * x.high[i];
        along = sum_lanes(along) * (1.f / D) * r * r;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            g.low[i] = r * (g.low[i] - along * x.low[i]);
            g.high[i] = r * (g.high[i] - along * x.high[i]);
        }
    }
    if (valid) store_pairs(d_qkv + at, g, part);
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding with a cache

constexpr int DECODE_WARPS = SMALL_SHARED && D > 128 ? 2 : 4;
constexpr int DECODE_KEYS = D <= 64 ? 32 : 16;                 // keys a warp takes at a time
constexpr int DECODE_ROWS = 16;                                // rows (token t, head of the group g), row = t * group + g
constexpr int DECODE_PARTIAL = DECODE_ROWS * (D + 2);          // f32 a block leaves: sums [16][D], maxima, denominators

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * 32)
attention_decode(u16* __restrict__ out, float* __restrict__ partial, int* __restrict__ arrived,
                 const u16* __restrict__ q, const u16* __restrict__ k_cache, const u16* __restrict__ v_cache,
                 const int* __restrict__ first, int length, int tokens, int heads, int kv_heads, int capacity,
                 int window, float scale) {
    constexpr int KEYS = DECODE_KEYS;
    constexpr int STAGE_BYTES = 2 * KEYS * ROW_BYTES;
    extern __shared__ __align__(128) u16 shared[];
    __shared__ float warp_max[DECODE_WARPS][DECODE_ROWS], warp_sum[DECODE_WARPS][DECODE_ROWS];
    __shared__ bool is_last;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int splits = gridDim.x, split = blockIdx.x, kv_head = blockIdx.y % kv_heads, row_tile = blockIdx.y / kv_heads;
    const int sequence = blockIdx.z, group = heads / kv_heads;
    const int row0 = row_tile * DECODE_ROWS, rows = min(tokens * group - row0, DECODE_ROWS);
    const size_t cache = (size_t(sequence) * kv_heads + kv_head) * capacity * D;
    auto row_at = [&](int row) { // elements from q, or out, to a row of this block
        return ((size_t(sequence) * tokens + (row0 + row) / group) * heads + kv_head * group + (row0 + row) % group) * D;
    };

    // Rows of q into shared memory; the rest of the 16 are zero.
    const u32 q_shared = shared_address(shared);
    for (int i = threadIdx.x; i < DECODE_ROWS * ROW_CHUNKS; i += DECODE_WARPS * 32) {
        int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
        copy_async_16(q_shared + row * ROW_BYTES + chunk * 16, q + (row < rows ? row_at(row) + chunk * 8 : 0),
                      row < rows);
    }

    // This split's keys, dealt to the warps KEYS at a time.
    const int position0 = length - tokens;                     // of the first new token
    const int begin = max(first[sequence], window > 0 ? position0 - window + 1 : 0);
    const int share = ((length - begin + splits - 1) / splits + KEYS - 1) / KEYS * KEYS;
    const int key_begin = begin + split * share, key_end = min(key_begin + share, length);
    const u32 ring = q_shared + DECODE_ROWS * ROW_BYTES + warp * 2 * STAGE_BYTES;
    auto load_keys = [&](int t) {
        int key0 = key_begin + (t * DECODE_WARPS + warp) * KEYS;
        u32 stage = ring + (t & 1) * STAGE_BYTES;
        if (key0 < key_end) {
            copy_rows<KEYS, 32>(stage, k_cache + cache, D, key0, key_end, lane);
            copy_rows<KEYS, 32>(stage + KEYS * ROW_BYTES, v_cache + cache, D, key0, key_end, lane);
        }
        copy_commit();
    };
    load_keys(0);
    load_keys(1);

    int row_first[2], row_last[2];
    float row_max[2] = {negative_infinity(), negative_infinity()}, row_sum[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = half * 8 + (lane >> 2);
        row_last[half] = row < rows ? position0 + (row0 + row) / group : -1;
        row_first[half] = max(begin, window > 0 ? row_last[half] - window + 1 : 0);
    }
    float sums[1][D / 8][4];
    clear(sums);
    const float scale_log2 = scale * LOG2_E;
    copy_wait<1>();
    __syncthreads();                                           // q has come

    for (int t = 0; key_begin + (t * DECODE_WARPS + warp) * KEYS < key_end; ++t) {
        copy_wait<1>();
        __syncwarp();
        const int key0 = key_begin + (t * DECODE_WARPS + warp) * KEYS;
        const u32 k_shared = ring + (t & 1) * STAGE_BYTES, v_shared = k_shared + KEYS * ROW_BYTES;
        float s[1][KEYS / 8][4];
        clear(s);
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
            u32 a[4], b[4];
            load_matrices(a, q_shared + left_offset(lane) + kk * 32);
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                load_matrices(b, k_shared + right_offset(lane) + j * 16 * ROW_BYTES + kk * 32);
                multiply_add(s[0][2 * j], a, b[0], b[1]);
                multiply_add(s[0][2 * j + 1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = negative_infinity();
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int x = 2 * half; x < 2 * half + 2; ++x) {
                    int key = key0 + j * 8 + (lane & 3) * 2 + (x & 1);
                    bool seen = key >= row_first[half] && key <= row_last[half];
                    s[0][j][x] = seen ? s[0][j][x] * scale_log2 : negative_infinity();
                    top = fmaxf(top, s[0][j][x]);
                }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            float raised = fmaxf(row_max[half], top);
            float base = raised == negative_infinity() ? 0.f : raised;
            float shrink = exp2_fast(row_max[half] - base);
            row_max[half] = raised;
            row_sum[half] *= shrink;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int x = 2 * half; x < 2 * half + 2; ++x) {
                    s[0][j][x] = exp2_fast(s[0][j][x] - base);
                    row_sum[half] += s[0][j][x];
                }
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                sums[0][j][2 * half] *= shrink;
                sums[0][j][2 * half + 1] *= shrink;
            }
        }
#pragma unroll
        for (int kk = 0; kk < KEYS / 16; ++kk) {
            u32 p[4], b[4];
            as_left(p, s[0][2 * kk], s[0][2 * kk + 1]);
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                load_matrices_transposed(b, v_shared + left_offset(lane) + kk * 16 * ROW_BYTES + j * 32);
                multiply_add(sums[0][2 * j], p, b[0], b[1]);
                multiply_add(sums[0][2 * j + 1], p, b[2], b[3]);
            }
        }
        __syncwarp();
        load_keys(t + 2);
    }
    copy_wait<0>();
    __syncthreads();                                           // the rings are free: they take the warps' results

    float* warp_sums = reinterpret_cast<float*>(shared);       // [DECODE_WARPS][DECODE_ROWS][D]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = half * 8 + (lane >> 2);
        float sum = row_sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        warp_max[warp][row] = row_max[half];
        warp_sum[warp][row] = sum;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            float* to = warp_sums + (warp * DECODE_ROWS + row) * D + j * 8 + (lane & 3) * 2;
            *reinterpret_cast<float2*>(to) = make_float2(sums[0][j][2 * half], sums[0][j][2 * half + 1]);
        }
    }
    __syncthreads();

    // The union of the warps: straight to `out` if this is the only split, else to `partial`.
    const size_t unit = (size_t(sequence) * gridDim.y + blockIdx.y);
    float* own = partial + (unit * splits + split) * DECODE_PARTIAL;
    for (int i = threadIdx.x; i < rows * D; i += DECODE_WARPS * 32) {
        int row = i / D, column = i % D;
        float top = warp_max[0][row], denominator = 0.f, sum = 0.f;
#pragma unroll
        for (int w = 1; w < DECODE_WARPS; ++w) top = fmaxf(top, warp_max[w][row]);
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; ++w) {
            float weight = warp_max[w][row] == negative_infinity() ? 0.f : exp2_fast(warp_max[w][row] - top);
            denominator += weight * warp_sum[w][row];
            sum += weight * warp_sums[(w * DECODE_ROWS + row) * D + column];
        }
        if (splits == 1) {
            sum = denominator > 0.f ? sum / denominator : 0.f;
            out[row_at(row) + column] = u16(pack_bf16(sum, 0.f));
        } else {
            own[row * D + column] = sum;
            if (column == 0) {
                own[DECODE_ROWS * D + row] = top;
                own[DECODE_ROWS * D + DECODE_ROWS + row] = denominator;
            }
        }
    }
    if (splits == 1) return;

    // The block that arrives last unites the splits, always in the same order, and leaves the counter at zero.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived + unit, 1) == splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) arrived[unit] = 0;
    const float* all = partial + unit * splits * DECODE_PARTIAL;
    for (int i = threadIdx.x; i < rows * D / 2; i += DECODE_WARPS * 32) {
        int row = i / (D / 2), column = i % (D / 2) * 2;
        float top = negative_infinity(), denominator = 0.f;
        float2 sum = make_float2(0.f, 0.f);
        for (int split0 = 0; split0 < splits; split0 += 8) {   // eight at a time: their loads run together
            float maximum[8], part[8], raised = top;
            float2 x[8];
#pragma unroll
            for (int s = 0; s < 8; ++s) {
                const float* from = all + min(split0 + s, splits - 1) * DECODE_PARTIAL;
                maximum[s] = __ldcg(from + DECODE_ROWS * D + row);
                part[s] = __ldcg(from + DECODE_ROWS * (D + 1) + row);
                x[s] = __ldcg(reinterpret_cast<const float2*>(from + row * D + column));
                if (split0 + s >= splits) maximum[s] = negative_infinity();
                raised = fmaxf(raised, maximum[s]);
            }
            float base = raised == negative_infinity() ? 0.f : raised, shrink = exp2_fast(top - base);
            top = raised;
            sum.x *= shrink, sum.y *= shrink, denominator *= shrink;
#pragma unroll
            for (int s = 0; s < 8; ++s) {
                float weight = exp2_fast(maximum[s] - base);
                denominator += weight * part[s];
                sum.x += weight * x[s].x;
                sum.y += weight * x[s].y;
            }
        }
        float inverse = denominator > 0.f ? 1.f / denominator : 0.f;
        *reinterpret_cast<u32*>(out + row_at(row) + column) = pack_bf16(sum.x * inverse, sum.y * inverse);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch geometry, for the host to read once: one block of one thread

extern "C" __global__ void attention_geometry(int* __restrict__ geometry) {
    for (int i = 0; i < 9; ++i) geometry[i] = TILED[i];
    geometry[9] = LANES;
    geometry[10] = DKV_SLICES;
    geometry[11] = DECODE_WARPS * 32;
    geometry[12] = (DECODE_ROWS + DECODE_WARPS * 4 * DECODE_KEYS) * ROW_BYTES;
}
