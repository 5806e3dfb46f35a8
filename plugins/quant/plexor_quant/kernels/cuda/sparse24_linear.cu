// The product of a few rows with a 2:4 weight that is read once: y[T, N] = x[T, K] W[N, K]^T, T <= 8 * TILES_N.
//
// A block of threads takes tiles of 16 * TILES_M rows of W in turn, and its warps share out the input features, 64 at a
// time (a chunk):
//
//   device memory   kept [N, K / 2], index [N, K / 8]    x [T, K]
//        |  straight into registers, one step ahead, also    |  only after the previous kernel has ended: whole, once,
//        |  of the next tile; the first before the           v  in the order of the B operand (RESIDENT) ...
//        v  previous kernel has ended                    shared memory
//   registers       A: rows g and g + 8 of a chunk,          |  ... or with each step, halves of groups exchanged
//        |          16 bytes a lane (8 of e4m3)              v  between neighbours, where x is too large for that
//        v  mma.sp.m16n8k32: the tensor core picks of each four numbers of x the two that the index names
//   shared memory   one partial sum for each warp -> sum, scale -> device memory
//
// The instruction multiplies groups in eight slots; lane t of four holds A of slots t and 4 + t, and B of halves t % 2 of
// slots t / 2, 2 + t / 2, 4 + t / 2 and 6 + t / 2. Lane t reads A's groups 4 t to 4 t + 3 of a chunk, so that
//
//   instruction j = 0, 1:   slot t is group 4 t + 2 j, slot 4 + t is group 4 t + 2 j + 1
//
// and the nibbles of its index that lanes 2 j (slots 0 to 3) and 2 j + 1 (slots 4 to 7) give are those of groups t, 4 + t,
// 8 + t and 12 + t, t being the giving lane.
//
// The compiler is given: TILES_M (1 or 2), TILES_N (1 or 2), WARPS, CHUNKS (of a step of a warp), BLOCKS (of threads that
// a multiprocessor shall hold), RESIDENT, HALF (1 for float16, 0 for bfloat16) and NARROW_WEIGHT (the weight is e4m3).

struct SparseArguments {
  const void* x;
  const void* weight;
  const unsigned char* index;
  const float* scale;  // [N], of e4m3
  void* y;
  long long x_stride;
  int num_rows;     // T
  int num_outputs;  // N
  int num_inputs;   // K, a multiple of 64
};

constexpr int CHUNK = 64;
constexpr int ROWS = 16 * TILES_M;
constexpr int SUMS = TILES_M * TILES_N * 4 * 32;
// e4m3 becomes bfloat16 by moving bits, which leaves it 2^-120 too small. x takes half of that.
constexpr float UNDONE = NARROW_WEIGHT && !HALF ? 0x1p60f : 1.0f;

struct Fragment {
  u32 kept[4];  // of four groups
  uint2 index;  // of the row's sixteen groups
};

// A lane's eight of the features 0 to 31 and of 32 to 63 of a chunk of x.
struct Piece {
  uint4 first;
  uint4 last;
};

struct Step {
  Fragment rows[CHUNKS][TILES_M][2];
#if !RESIDENT
  Piece x[CHUNKS][TILES_N];
#endif
};

__device__ __forceinline__ uint4 load_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// A sector of 32 bytes holds the index of four chunks: it stays for the warps that take the others.
__device__ __forceinline__ uint2 load_index(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Past the L1, which waiting for the kernel that wrote x does not clear.
__device__ __forceinline__ uint4 load_x(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ Fragment load_fragment(const SparseArguments& a, int row, int chunk, int t) {
  Fragment f;
  const long long group = (long long)row * (a.num_inputs / 4) + chunk * 16;
  f.index = load_index(a.index + group / 2);
#if NARROW_WEIGHT
  const uint2 codes = load_8((const char*)a.weight + 2 * (group + 4 * t));
  f.kept[0] = codes.x, f.kept[1] = codes.y;
#else
  const uint4 kept = load_16((const char*)a.weight + 4 * (group + 4 * t));
  f.kept[0] = kept.x, f.kept[1] = kept.y, f.kept[2] = kept.z, f.kept[3] = kept.w;
#endif
  return f;
}

__device__ __forceinline__ void load_weight(const SparseArguments& a, Step& step, int tile, int first_chunk, int lane) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    // Beyond the end the last chunk is loaded once more, and multiplied by zeros.
    const int chunk = min(first_chunk + c, a.num_inputs / CHUNK - 1);
#pragma unroll
    for (int m = 0; m < TILES_M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = min(tile * ROWS + 16 * m + 8 * half + lane / 4, a.num_outputs - 1);
        step.rows[c][m][half] = load_fragment(a, row, chunk, lane % 4);
      }
  }
}

__device__ __forceinline__ void load_tokens(const SparseArguments& a, Step& step, int first_chunk, int lane) {
#if !RESIDENT
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int n = 0; n < TILES_N; n++) {
      const int token = 8 * n + lane / 4, chunk = first_chunk + c;
      step.x[c][n] = {};
      if (chunk < a.num_inputs / CHUNK && token < a.num_rows) {
        const u16* x = (const u16*)a.x + token * a.x_stride + chunk * CHUNK + 8 * (lane % 4);
        step.x[c][n].first = load_x(x);
        step.x[c][n].last = load_x(x + 32);
      }
    }
#endif
}

// e4m3 in four bytes to two pairs of x's dtype, in their order.
__device__ __forceinline__ uint2 widen_codes(u32 codes) {
  uint2 pairs;
#if HALF
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs.x), "=r"(pairs.y) : "r"(codes));
#else
  const u32 odd = (codes & 0x80008000u) | ((codes >> 4) & 0x07F007F0u);
  const u32 shifted = codes << 8;
  const u32 even = (shifted & 0x80008000u) | ((shifted >> 4) & 0x07F007F0u);
  pairs.x = __byte_perm(even, odd, 0x5410);
  pairs.y = __byte_perm(even, odd, 0x7632);
#endif
  return pairs;
}

// The index of groups t, 4 + t, 8 + t and 12 + t of a row, in the low 16 bits; above them anything.
__device__ __forceinline__ u32 own_nibbles(uint2 index, int t) {
  const u32 low = (index.x >> (4 * t)) & 0x000F000Fu, high = (index.y >> (4 * t)) & 0x000F000Fu;
  const u32 spread = low | (high << 8);  // groups at bits 0, 16, 8 and 24
  return spread | (spread >> 12);
}

struct Tokens {
  u32 pair[2][4];  // halves of the groups of features 0 to 31 and of 32 to 63 that this lane gives
};

__device__ __forceinline__ uint4 scaled_x(uint4 v) {
#if NARROW_WEIGHT && !HALF
  u32* words = (u32*)&v;
#pragma unroll
  for (int i = 0; i < 4; i++) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(words[i]) : "r"(0x5D805D80u));  // 2^60
#endif
  return v;
}

#if RESIDENT
// Numbers from one token's x to the next: 16 bytes more, so that two tokens' are in different banks.
__device__ __forceinline__ int token_stride(const SparseArguments& a) { return a.num_inputs + 8; }

// A chunk of a token becomes 32 bytes for each lane t: what it gives of the first 32 features, then of the others.
__device__ __forceinline__ void keep_tokens(const SparseArguments& a, u16* kept) {
  const int pieces = a.num_inputs / 8;
#pragma unroll 8
  for (int i = threadIdx.x; i < a.num_rows * pieces; i += WARPS * 32) {
    const int token = i / pieces, feature = i % pieces * 8, place = feature % CHUNK / 8;
    const uint4 v = scaled_x(load_x((const u16*)a.x + token * a.x_stride + feature));
    u16* target = kept + token * token_stride(a) + feature / CHUNK * CHUNK;
    target += 32 * (place / 2 % 2) + 8 * (place / 4) + 4 * (place % 2);  // of lane t = 2 * (place / 2 % 2)
    *(uint2*)target = make_uint2(v.x, v.z);
    *(uint2*)(target + 16) = make_uint2(v.y, v.w);
  }
}

__device__ __forceinline__ Tokens take_tokens(const SparseArguments& a, const u16* kept, int token, int chunk, int lane) {
  Tokens tokens = {};
  if (chunk < a.num_inputs / CHUNK && token < a.num_rows) {
    const uint4* source = (const uint4*)(kept + token * token_stride(a) + chunk * CHUNK + 16 * (lane % 4));
    *(uint4*)tokens.pair[0] = source[0];
    *(uint4*)tokens.pair[1] = source[1];
  }
  return tokens;
}
#else
// x of one token: 32 features, of which the lane has eight, so that it gets the half t % 2 of each of four groups.
__device__ __forceinline__ void exchange(u32* pairs, uint4 v, bool second) {
  const u32 own_first = second ? v.y : v.x, own_last = second ? v.w : v.z;
  const u32 first = __shfl_xor_sync(0xFFFFFFFFu, second ? v.x : v.y, 1);
  const u32 last = __shfl_xor_sync(0xFFFFFFFFu, second ? v.z : v.w, 1);
  pairs[0] = second ? first : own_first;
  pairs[1] = second ? last : own_last;
  pairs[2] = second ? own_first : first;
  pairs[3] = second ? own_last : last;
}

__device__ __forceinline__ Tokens exchanged(const Piece& x, int lane) {
  Tokens tokens;
  exchange(tokens.pair[0], scaled_x(x.first), lane & 1);
  exchange(tokens.pair[1], scaled_x(x.last), lane & 1);
  return tokens;
}
#endif

// j: which of the two instructions of a chunk, and which lanes give its index.
template <int j>
__device__ __forceinline__ void mma_sparse(float* c, const u32* low_row, const u32* high_row, const Tokens& b, u32 index) {
#if HALF
#define SPARSE_MMA "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
#else
#define SPARSE_MMA "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
#endif
  asm(SPARSE_MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(low_row[2 * j]), "r"(high_row[2 * j]), "r"(low_row[2 * j + 1]), "r"(high_row[2 * j + 1]),
        "r"(b.pair[0][2 * j]), "r"(b.pair[1][2 * j]), "r"(b.pair[0][2 * j + 1]), "r"(b.pair[1][2 * j + 1]), "r"(index),
        "n"(j));
}

__device__ __forceinline__ void widen_fragment(u32* pairs, const Fragment& f) {
#if NARROW_WEIGHT
  const uint2 first = widen_codes(f.kept[0]), last = widen_codes(f.kept[1]);
  pairs[0] = first.x, pairs[1] = first.y, pairs[2] = last.x, pairs[3] = last.y;
#else
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = f.kept[i];
#endif
}

// One partial sum for each warp -> y.
__device__ __forceinline__ void finish(const SparseArguments& a, int tile, const float (*partial)[SUMS]) {
  for (int place = threadIdx.x; place < SUMS; place += WARPS * 32) {
    const int owner = place % 32, i = place / 32 % 4, n = place / 128 % TILES_N, m = place / 128 / TILES_N;
    const int row = tile * ROWS + 16 * m + 8 * (i / 2) + owner / 4, token = 8 * n + 2 * (owner % 4) + i % 2;
    if (row >= a.num_outputs || token >= a.num_rows) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[w][place];
#if NARROW_WEIGHT
    sum *= a.scale[row] * UNDONE;
#endif
    ((u16*)a.y)[(long long)token * a.num_outputs + row] = narrow(sum);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    sparse24_linear(const __grid_constant__ SparseArguments a) {
  extern __shared__ __align__(16) u16 kept_x[];
  __shared__ float partial[2][WARPS][SUMS];  // of two tiles: a barrier less
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_chunks = a.num_inputs / CHUNK, num_tiles = (a.num_outputs + ROWS - 1) / ROWS;
  const int first_chunk = warp * CHUNKS;
  let_next_kernel_start();
  Step step;
  if (first_chunk < num_chunks) load_weight(a, step, blockIdx.x, first_chunk, lane);
  wait_for_previous_kernel();
#if RESIDENT
  keep_tokens(a, kept_x);
  __syncthreads();
#endif
  load_tokens(a, step, first_chunk, lane);
  int buffer = 0;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x, buffer ^= 1) {
    float sums[TILES_M][TILES_N][4] = {};
    for (int chunk = first_chunk; chunk < num_chunks; chunk += WARPS * CHUNKS) {
      const bool last = chunk + WARPS * CHUNKS >= num_chunks;
      const int next_tile = last ? tile + gridDim.x : tile, next_chunk = last ? first_chunk : chunk + WARPS * CHUNKS;
      Step next;
      if (next_tile < num_tiles) {
        load_weight(a, next, next_tile, next_chunk, lane);
        load_tokens(a, next, next_chunk, lane);
      }
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        Tokens tokens[TILES_N];
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#if RESIDENT
          tokens[n] = take_tokens(a, kept_x, 8 * n + lane / 4, chunk + c, lane);
#else
          tokens[n] = exchanged(step.x[c][n], lane);
#endif
#pragma unroll
        for (int m = 0; m < TILES_M; m++) {
          u32 low_row[4], high_row[4];
          widen_fragment(low_row, step.rows[c][m][0]);
          widen_fragment(high_row, step.rows[c][m][1]);
          const u32 index = __byte_perm(
              own_nibbles(step.rows[c][m][0].index, lane % 4), own_nibbles(step.rows[c][m][1].index, lane % 4), 0x5410);
#pragma unroll
          for (int n = 0; n < TILES_N; n++) {
            mma_sparse<0>(sums[m][n], low_row, high_row, tokens[n], index);
            mma_sparse<1>(sums[m][n], low_row, high_row, tokens[n], index);
          }
        }
      }
      step = next;
    }
#pragma unroll
    for (int i = 0; i < TILES_M * TILES_N * 4; i++) partial[buffer][warp][i * 32 + lane] = (&sums[0][0][0])[i];
    __syncthreads();
    finish(a, tile, partial[buffer]);
  }
}
