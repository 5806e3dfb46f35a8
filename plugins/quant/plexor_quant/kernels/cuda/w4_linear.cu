// The product of many rows over four-bit weights: y[T, N] = epilogue(x[T, K] W[N, K]^T).
//
//   device memory    W, row-major, two nibbles a byte       x, its features in the order of w4_prepare.cu
//        |  weight thread: a bulk tensor copy a stage,        |  activation thread: the same, but only after the
//        v  never waits for the previous kernel               v  previous kernel has ended
//   shared memory    ring of stages {weight tile 128 x 256, x tile COLUMNS x 256, ZERO: sums of x}
//        |  two warpgroups, each with 64 of the tile's rows: nibbles to registers, exactly widened to x's type
//        v
//   registers        wgmma with the weight as the A operand, from registers -> float32 sums of one group of k
//        |  times the group's scale
//        v
//   registers        float32 totals -> (SPLIT > 1: added up over a cluster through shared memory) -> epilogue
//
// A tile is two groups of 64 weight rows at a distance of PAIR rows, which lie in shared memory eight and eight by
// turns, as in the core's tiled_linear.cu. While the tensor cores multiply 128 k, the next 128 are widened.
//
// A nibble n means n - 8, or with ZERO n less a zero point of its group: then sums start at (8 - zero) * sum of x over
// the group, and not at 0.
//
// The compiler is given:
//   COLUMNS   rows of x of a tile: 32, 64 or 128
//   SPLIT     blocks of a cluster that share a tile, each with a part of k: 1 or 2
//   GROUP     k of a sum that is scaled: 128, 64 or 32
//   E4M3      x is e4m3 with a float32 scale for each row, else bfloat16, or with HALF float16
//   HALF, EPILOGUE, NARROW   as in the core's tiled_linear.cu
//   ZERO      groups have zero points

constexpr int ROWS = 64;
constexpr int CONSUMERS = 256;
constexpr int THREADS = CONSUMERS + 128;
constexpr int TILES_N = COLUMNS / 8;
constexpr int STAGE_K = 256;
constexpr int STEP_K = 128;  // of which a lane holds widened weights
constexpr int X_SIZE = E4M3 ? 1 : 2;
constexpr int BOX_K = 128 / X_SIZE;          // of x
constexpr int MULTIPLY_K = 32 / X_SIZE;      // of one wgmma
constexpr int STEP_MULTIPLIES = STEP_K / MULTIPLY_K;
constexpr int UNITS = STEP_K / GROUP;        // sums of a step
constexpr int STAGE_UNITS = STAGE_K / GROUP;
constexpr int UNIT_MULTIPLIES = GROUP / MULTIPLY_K;
constexpr int WEIGHT_BYTES = 2 * ROWS * STAGE_K / 2;
constexpr int X_BOX_BYTES = COLUMNS * 128;
constexpr int X_BYTES = STAGE_K / BOX_K * X_BOX_BYTES;
constexpr int SUM_BYTES = ZERO ? STAGE_UNITS * COLUMNS * 4 : 0;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES + (SUM_BYTES + 1023) / 1024 * 1024;
constexpr int MOST_STAGES = 16;
constexpr int BAND = 8;  // column tiles that are multiplied by all weights before the next: they stay in the L2

#define STAGED (SPLIT == 1 && COLUMNS >= 64)  // whether the epilogue goes through shared memory
constexpr int STAGED_COLUMNS = ZERO ? 64 : COLUMNS;  // at once
constexpr int STAGED_BYTES = STAGED_COLUMNS * 128;  // of a warpgroup

constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;

struct Coded {
  const u16* scale;           // bfloat16 [N, groups]
  const unsigned char* zero;  // ZERO: [N, groups]
  const float* token_scale;   // E4M3: [T]
  const float* sums;          // ZERO: of x, [units, sum_stride]
  int sum_stride;
  int num_groups;
  int group_units;  // units of GROUP k that share a scale
  int share_rows;   // between the first rows of the two warpgroups
};

#if E4M3
#define KIND "k32.f32.e4m3.e4m3"
#define TAIL "adds, 1, 1"
#elif HALF
#define KIND "k16.f32.f16.f16"
#define TAIL "adds, 1, 1, 0"
#else
#define KIND "k16.f32.bf16.bf16"
#define TAIL "adds, 1, 1, 0"
#endif
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)

// Adds to d, or replaces it, the product of 64 rows and all columns over MULTIPLY_K k.
__device__ __forceinline__ void multiply(float* d, const u32* a, u64 b, int adds) {
#if COLUMNS == 32
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32" KIND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, " TAIL ";\n}"
      : SIXTEEN(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
#endif
#if COLUMNS == 64
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64" KIND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, " TAIL ";\n}"
      : SIXTEEN(d, 0),
        SIXTEEN(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
#endif
#if COLUMNS == 128
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128" KIND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, " TAIL ";\n}"
      : SIXTEEN(d, 0),
        SIXTEEN(d, 16),
        SIXTEEN(d, 32),
        SIXTEEN(d, 48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
#endif
}

// Where wgmma finds rows of 128 bytes under the 128-byte swizzle: eight rows are 1024 bytes.
__device__ __forceinline__ u64 operand(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Four words of each lane: word lane % 4 of row lane / 4 of four matrices of 8 rows of 16 bytes.
__device__ __forceinline__ void load_matrices(u32* words, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// Bytes of {high, low} by the four low nibbles of the selector. A nibble n beyond 7 gives the sign of byte n - 8, eight
// times.
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

#if E4M3
constexpr float UNIT_VALUE = 256.0f;  // widened numbers are 1/256 of what they mean

// Four nibbles, in order, to e4m3: n - 8, as a sign and 2 |n - 8|, which is linear up to 16.
// negative: nibbles, of which those below 8 count; positive: nibbles ^ 8, likewise.
__device__ __forceinline__ u32 widen_four(u32 negative, u32 positive) {
  const u32 below = permute(0x45464748, 0x41424344, negative);  // sign and 2 |n - 8|, halved; 0 for n > 7
  const u32 above = permute(0x06040200, 0x0E0C0A08, positive);  // 2 |n - 8|; 0 for n < 8
  return below * 2 + above;
}

// Eight nibbles of a row to its share of one wgmma, in the first or the last numbers of each pair of registers.
__device__ __forceinline__ void widen_word(u32* a, u32 word) {
  const u32 flipped = word ^ 0x88888888;
  a[0] = widen_four(word, flipped);
  a[2] = widen_four(word >> 16, flipped >> 16);
}
#else
constexpr float UNIT_VALUE = 1.0f;

// Nibbles 0 and 4 to n - 8: n is put behind a leading one that makes it 128 + n (float16: 1024 + n).
__device__ __forceinline__ u32 widen_two(u32 word) {
  u32 pair;
#if HALF
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"((word & 0x000F000F) | 0x64006400), "r"(0x64086408));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(pair)
      : "r"((word & 0x000F000F) | 0x43004300), "r"(0x3F803F80), "r"(0xC308C308));
#endif
  return pair;
}

// Eight nibbles of a row to its share of two wgmma.
__device__ __forceinline__ void widen_word(u32* a, u32 word) {
  a[0] = widen_two(word);
  a[2] = widen_two(word >> 4);
  a[4] = widen_two(word >> 8);
  a[6] = widen_two(word >> 12);
}
#endif

// A lane's share of a step's weights. rows: where the warp's 16 rows begin in shared memory; step: 0 or 1 of the stage.
__device__ __forceinline__ void load_weights(u32* a, u32 rows, int step, int lane) {
  u32 first[4], second[4];
  const u32 address = rows + lane % 8 * 128 + ((step * 4 + lane / 8) ^ (lane % 8)) * 16;
  load_matrices(first, address);
  load_matrices(second, address + 8 * 128);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    widen_word(a + i * STEP_MULTIPLIES, first[i]);
    widen_word(a + i * STEP_MULTIPLIES + 1, second[i]);
  }
}

__device__ __forceinline__ void copy_weight(
    u32 target, const TensorMap* map, int share, int box, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;"
      ::"r"(target), "l"(map), "r"(box * STAGE_K / 2), "r"(0), "r"(0), "r"(0), "r"(share), "r"(barrier), "l"(policy)
      : "memory");
}

// Rows of x of 128 bytes each.
__device__ __forceinline__ void copy_x(u32 target, const TensorMap* map, int place, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(target), "l"(map), "r"(place), "r"(row), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_sums(u32 target, const float* sums, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(target), "l"(sums), "n"(COLUMNS * 4), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 remote(u32 address, int rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Adds four numbers that lie in another block's memory.
__device__ __forceinline__ void add_remote(float* sums, u32 address) {
  float four[4];
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
               : "r"(address)
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; i++) sums[i] += four[i];
}

// A tile of weight rows and a tile of columns.
struct Tile {
  int row_tile;
  int column;
};

// The item-th of all tiles: a band of columns after the other.
__device__ __forceinline__ Tile tile_of(int item, int num_row_tiles, int num_column_tiles) {
  const int band = item / (num_row_tiles * BAND), rest = item - band * num_row_tiles * BAND;
  const int width = min(BAND, num_column_tiles - band * BAND);
  return {rest / width, band * BAND + rest % width};
}

// The first row of a tile. Pairs closer than half a tile lie in a tile two and two.
__device__ __forceinline__ int row_of(int row_tile, const Arguments& a) {
  return a.pair < ROWS ? row_tile * 2 * ROWS : tile_row(row_tile, ROWS, a.pair);
}

// Scales, and zero points, of a stage's units for the two rows of a lane, as they are stored.
struct Grid {
  u16 scale[STAGE_UNITS][2];
  unsigned char zero[ZERO ? STAGE_UNITS : 1][2];
};

__device__ __forceinline__ void load_grid(Grid& grid, const Coded& c, int row, int pair, int box) {
#pragma unroll
  for (int unit = 0; unit < STAGE_UNITS; unit++) {
    const int group = min((box * STAGE_UNITS + unit) / c.group_units, c.num_groups - 1);
    const long long first = (long long)row * c.num_groups + group, second = first + (long long)pair * c.num_groups;
    grid.scale[unit][0] = c.scale[first];
    grid.scale[unit][1] = c.scale[second];
#if ZERO
    grid.zero[unit][0] = c.zero[first];
    grid.zero[unit][1] = c.zero[second];
#endif
  }
}

__device__ __forceinline__ float from_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// What the sums of a unit begin with: (8 - zero) * sum of x.
__device__ __forceinline__ void start_sums(float* sums, const Grid& grid, int unit, const float* x_sums, int lane) {
#if ZERO
  const float first = (8.0f - grid.zero[unit][0]) / UNIT_VALUE, second = (8.0f - grid.zero[unit][1]) / UNIT_VALUE;
#pragma unroll
  for (int n = 0; n < TILES_N; n++) {
    const float2 x = *(const float2*)(x_sums + n * 8 + lane % 4 * 2);
    sums[n * 4] = first * x.x;
    sums[n * 4 + 1] = first * x.y;
    sums[n * 4 + 2] = second * x.x;
    sums[n * 4 + 3] = second * x.y;
  }
#endif
}

// Queues the products of one unit.
__device__ __forceinline__ void multiply_unit(float* sums, const u32* a, u32 x, int unit) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < UNIT_MULTIPLIES; i++) {
    const int k = unit * UNIT_MULTIPLIES + i;
    multiply(sums, a + 4 * k, operand(x + k / 4 * X_BOX_BYTES) + k % 4 * 2, ZERO || i > 0);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Adds scaled sums to the totals; their products must have been waited for.
__device__ __forceinline__ void fold(float* totals, float* sums, float first, float second) {
#pragma unroll
  for (int i = 0; i < TILES_N * 4; i++) asm volatile("" : "+f"(sums[i])::"memory");
#pragma unroll
  for (int i = 0; i < TILES_N * 4; i += 4) {
    totals[i] = fmaf(first, sums[i], totals[i]);
    totals[i + 1] = fmaf(first, sums[i + 1], totals[i + 1]);
    totals[i + 2] = fmaf(second, sums[i + 2], totals[i + 2]);
    totals[i + 3] = fmaf(second, sums[i + 3], totals[i + 3]);
  }
}

#if STAGED
// Eight rows of a token, in x's type.
__device__ __forceinline__ void widen_eight(float* values, uint4 raw) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = widen((u16)words[i]);
    values[2 * i + 1] = widen((u16)(words[i] >> 16));
  }
}

__device__ __forceinline__ u32 narrow_two(float low, float high) {
  u32 pair;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

__device__ __forceinline__ uint4 narrow_eight(const float* v) {
  return {narrow_two(v[0], v[1]), narrow_two(v[2], v[3]), narrow_two(v[4], v[5]), narrow_two(v[6], v[7])};
}

// What the epilogue of eight pairs of rows of a token needs: ADD: residuals; ROTARY: cosines and sines. What earlier
// kernels wrote is read from the L2, as in linear.cuh.
struct EightOperands {
  uint4 words[4];
  long long slot;
};

__device__ __forceinline__ EightOperands load_eight(const Arguments& a, int m, int row) {
  EightOperands operands = {};
#if EPILOGUE == ADD
  const u16* residual = (const u16*)a.residual + m * a.residual_stride + row;
  operands.words[0] = __ldcg((const uint4*)residual);
  operands.words[1] = __ldcg((const uint4*)(residual + a.pair));
#elif EPILOGUE == ROTARY
  const long long angle = __ldcg(a.positions + m) * a.pair + row % a.pair;
  operands.words[0] = ((const uint4*)(a.cos + angle))[0];
  operands.words[1] = ((const uint4*)(a.cos + angle))[1];
  operands.words[2] = ((const uint4*)(a.sin + angle))[0];
  operands.words[3] = ((const uint4*)(a.sin + angle))[1];
  operands.slot = __ldcg(a.slots + m);
#endif
  return operands;
}

#if EPILOGUE == ROTARY
__device__ __forceinline__ void store_eight_entries(void* cache, long long index, const float* v) {
#if NARROW
  u16 codes[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes[i]) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
  *(uint2*)((unsigned char*)cache + index) = {codes[0] | (u32)codes[1] << 16, codes[2] | (u32)codes[3] << 16};
#else
  *(uint4*)((u16*)cache + index) = narrow_eight(v);
#endif
}

// As store_head_pair of linear.cuh, for eight features.
__device__ __forceinline__ void store_head_eight(
    const Arguments& a, int m, int row, float* low, float* high, const EightOperands& operands) {
  const int half = a.pair, size = 2 * half, head = row / size, feature = row % size;
  if (head < a.num_heads + a.num_kv_heads) {
    const float* cosine = (const float*)operands.words;
    const float* sine = cosine + 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float turned = low[i] * cosine[i] - high[i] * sine[i];
      high[i] = widen(narrow(high[i] * cosine[i] + low[i] * sine[i]));
      low[i] = widen(narrow(turned));
    }
  }
  if (head < a.num_heads) {
    u16* target = (u16*)a.y + m * a.y_stride + row;
    *(uint4*)target = narrow_eight(low);
    *(uint4*)(target + half) = narrow_eight(high);
    return;
  }
  if (operands.slot < 0) return;
  const int kv_head = head - a.num_heads;
  const bool is_key = kv_head < a.num_kv_heads;
  void* cache = is_key ? a.keys : a.values;
  const long long entry =
      operands.slot * a.entry_stride + (is_key ? kv_head : kv_head - a.num_kv_heads) * size + feature;
  store_eight_entries(cache, entry, low);
  store_eight_entries(cache, entry + half, high);
}
#endif

// As store_pair of linear.cuh, for eight adjacent rows of each group, whose products are rounded and have their bias.
__device__ __forceinline__ void store_eight(
    const Arguments& a, int m, int row, uint4 first_raw, uint4 second_raw, const EightOperands& operands) {
  float first[8], second[8];
  widen_eight(first, first_raw);
  widen_eight(second, second_raw);
#if EPILOGUE == ROTARY
  store_head_eight(a, m, row, first, second, operands);
#else
  u16* target = (u16*)a.y + m * a.y_stride + row;
#if EPILOGUE == GATED
#pragma unroll
  for (int i = 0; i < 8; i++) first[i] = __fdividef(first[i], 1.0f + __expf(-first[i])) * second[i];
  *(uint4*)target = narrow_eight(first);
#else
#if EPILOGUE == ADD
  float residual[8];
  widen_eight(residual, operands.words[0]);
#pragma unroll
  for (int i = 0; i < 8; i++) first[i] += residual[i];
  widen_eight(residual, operands.words[1]);
#pragma unroll
  for (int i = 0; i < 8; i++) second[i] += residual[i];
#endif
  *(uint4*)target = narrow_eight(first);
  *(uint4*)(target + a.pair) = narrow_eight(second);
#endif
#endif
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// The epilogue of a warpgroup's share of a tile, through shared memory, so that 64 bytes of a token are stored at once.
//
// rows: where the warpgroup's first group begins; target: the warpgroup's memory, 128 bytes a token, 16 of which are
// eight rows: those of the first group, then those of the second, swizzled as the copy engine does it. All operands are
// asked for before the first is needed.
__device__ __forceinline__ void finish_staged(
    const Arguments& a, const Coded& c, const float* totals, int column, int rows, u32 target, int group, int warp,
    int lane) {
  const int thread = threadIdx.x % 128, row = rows + warp * 8 + lane / 4;
  float bias[2] = {};
  if (a.bias) {
    bias[0] = widen(((const u16*)a.bias)[row]);
    bias[1] = widen(((const u16*)a.bias)[row + a.pair]);
  }
  EightOperands operands[COLUMNS / 32];
#pragma unroll
  for (int i = 0; i < COLUMNS / 32; i++) {
    const int m = column + thread / 4 + i * 32;
    if (m < a.num_rows) operands[i] = load_eight(a, m, rows + thread % 4 * 8);
  }
  float scale[TILES_N][2];
#pragma unroll
  for (int n = 0; n < TILES_N; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int m = column + n * 8 + lane % 4 * 2 + e;
      scale[n][e] = !E4M3 ? UNIT_VALUE : m < a.num_rows ? UNIT_VALUE * __ldcg(c.token_scale + m) : 0.0f;
    }
#pragma unroll
  for (int part = 0; part < COLUMNS / STAGED_COLUMNS; part++) {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");  // what lay there before has been read
#pragma unroll
    for (int n = part * (STAGED_COLUMNS / 8); n < (part + 1) * (STAGED_COLUMNS / 8); n += 2) {
      u32 matrices[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* sum = totals + (n + i / 2) * 4 + i % 2 * 2;
        const float* own = scale[n + i / 2];
        matrices[i] = narrow_two(sum[0] * own[0] + bias[i % 2], sum[1] * own[1] + bias[i % 2]);
      }
      const int token = (n % (STAGED_COLUMNS / 8) + lane / 16) * 8 + lane % 8;
      const int chunk = (lane / 8 % 2 * 4 + warp) ^ (lane % 8);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                   ::"r"(target + token * 128 + chunk * 16), "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]),
                   "r"(matrices[3])
                   : "memory");
    }
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
#pragma unroll
    for (int i = 0; i < STAGED_COLUMNS / 32; i++) {
      const int token = thread / 4 + i * 32, m = column + part * STAGED_COLUMNS + token, chunk = thread % 4;
      const u32 address = target + token * 128;
      if (m < a.num_rows)
        store_eight(a, m, rows + chunk * 8, load_shared(address + (chunk ^ token % 8) * 16),
                    load_shared(address + ((chunk + 4) ^ token % 8) * 16), operands[part * (STAGED_COLUMNS / 32) + i]);
    }
  }
}

#else
// What the epilogue of COUNT times eight columns needs, asked for before the products are there.
template <int COUNT>
struct ColumnOperands {
  Operands operands[COUNT][2];
  float scale[COUNT][2];
};

template <int COUNT>
__device__ __forceinline__ void load_columns(
    ColumnOperands<COUNT>& columns, const Arguments& a, const Coded& c, int column, int row) {
#pragma unroll
  for (int n = 0; n < COUNT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int m = column + n * 8 + e;
      if (m >= a.num_rows) continue;
      columns.operands[n][e] = load_operands(a, m, row);
      columns.scale[n][e] = E4M3 ? UNIT_VALUE * __ldcg(c.token_scale + m) : UNIT_VALUE;
    }
}

template <int COUNT>
__device__ __forceinline__ void store_columns(
    const ColumnOperands<COUNT>& columns, const Arguments& a, const float* totals, int column, int row) {
#pragma unroll
  for (int n = 0; n < COUNT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int m = column + n * 8 + e;
      const float scale = columns.scale[n][e];
      if (m >= a.num_rows) continue;
      store_pair(a, m, row, totals[n * 4 + e] * scale, totals[n * 4 + e + 2] * scale, columns.operands[n][e]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) w4_linear(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    const __grid_constant__ Arguments a, const __grid_constant__ Coded c) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ __align__(8) u64 barriers[2 * MOST_STAGES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 base = shared_address(ring), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  const int num_row_tiles = a.num_outputs / (2 * ROWS), num_column_tiles = (a.num_rows + COLUMNS - 1) / COLUMNS;
  const int num_boxes = (a.num_inputs + STAGE_K - 1) / STAGE_K, num_items = num_row_tiles * num_column_tiles;
  const int rank = blockIdx.x % SPLIT;
  const int first_box = num_boxes * rank / SPLIT, end_box = num_boxes * (rank + 1) / SPLIT;
  const int first_item = blockIdx.x / SPLIT, item_step = gridDim.x / SPLIT;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; i++) {
      barrier_init(full + 8 * i, 2);
      barrier_init(empty + 8 * i, 2);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  let_next_kernel_start();
  int stage = 0;
  u32 phase = 0;
  const int group = warp / 4, row = group * c.share_rows + warp % 4 * 8 + lane / 4;
  if (warp >= CONSUMERS / 32) {
#if COLUMNS == 128
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    if (warp == CONSUMERS / 32 && lane == 0) {
      const u64 policy = num_column_tiles > 1 ? EVICT_NORMAL : EVICT_FIRST;  // weights may be wanted again
      for (int item = first_item; item < num_items; item += item_step) {
        const Tile tile = tile_of(item, num_row_tiles, num_column_tiles);
        const int first_share = row_of(tile.row_tile, a) / c.share_rows;
        for (int box = first_box; box < end_box; box++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(full + 8 * stage, WEIGHT_BYTES);
          copy_weight(base + stage * STAGE_BYTES, &weight_map, first_share, box, full + 8 * stage, policy);
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    } else if (warp == CONSUMERS / 32 + 1) {
      wait_for_previous_kernel();
      if (lane == 0) {
        asm volatile("fence.proxy.async;" ::: "memory");
        for (int item = first_item; item < num_items; item += item_step) {
          const int column = tile_of(item, num_row_tiles, num_column_tiles).column * COLUMNS;
          for (int box = first_box; box < end_box; box++) {
            const u32 barrier = full + 8 * stage, target = base + stage * STAGE_BYTES + WEIGHT_BYTES;
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_expect(barrier, X_BYTES + SUM_BYTES);
            for (int i = 0; i < STAGE_K / BOX_K; i++)
              copy_x(target + i * X_BOX_BYTES, &x_map, box * STAGE_K + i * BOX_K, column, barrier);
#if ZERO
            for (int unit = 0; unit < STAGE_UNITS; unit++)
              copy_sums(target + X_BYTES + unit * COLUMNS * 4,
                        c.sums + (long long)(box * STAGE_UNITS + unit) * c.sum_stride + column, barrier);
#endif
            if (++stage == a.stages) stage = 0, phase ^= 1;
          }
        }
      }
    }
    for (int i = 0; SPLIT > 1 && i < 2; i++) cluster_barrier();  // as the consumers do
  } else {
#if COLUMNS == 128
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
    float sums[TILES_N * 4];
    alignas(16) float totals[TILES_N * 4];
    u32 weights[2][4 * STEP_MULTIPLIES];
    Grid grid, next_grid;
    const u32 warp_rows = base + (group * 64 + warp % 4 * 16) * 128;
    if (first_item < num_items)
      load_grid(next_grid, c, row_of(tile_of(first_item, num_row_tiles, num_column_tiles).row_tile, a) + row, a.pair,
                first_box);
    wait_for_previous_kernel();
    for (int item = first_item; item < num_items; item += item_step) {
      const Tile tile = tile_of(item, num_row_tiles, num_column_tiles);
      const int first_row = row_of(tile.row_tile, a) + row;
#pragma unroll
      for (int i = 0; i < TILES_N * 4; i++) totals[i] = 0.0f;
      barrier_wait(full + 8 * stage, phase);
      load_weights(weights[0], warp_rows + stage * STAGE_BYTES, 0, lane);
      for (int box = first_box; box < end_box; box++) {
        grid = next_grid;
        if (box + 1 < end_box) {
          load_grid(next_grid, c, first_row, a.pair, box + 1);
        } else if (item + item_step < num_items) {
          const Tile next = tile_of(item + item_step, num_row_tiles, num_column_tiles);
          load_grid(next_grid, c, row_of(next.row_tile, a) + row, a.pair, first_box);
        }
        const u32 x = base + stage * STAGE_BYTES + WEIGHT_BYTES;
        const float* x_sums = (const float*)(ring + stage * STAGE_BYTES + WEIGHT_BYTES + X_BYTES);
        const int this_stage = stage;
        if (++stage == a.stages) stage = 0, phase ^= 1;
#pragma unroll
        for (int step = 0; step < 2; step++) {
          const u32 step_x = x + step * (STEP_K / BOX_K) * X_BOX_BYTES;
#pragma unroll
          for (int u = 0; u < UNITS; u++) {
            const int unit = step * UNITS + u;
            const float first = from_bfloat16(grid.scale[unit][0]), second = from_bfloat16(grid.scale[unit][1]);
            start_sums(sums, grid, unit, x_sums + unit * COLUMNS, lane);
            multiply_unit(sums, weights[step], step_x, u);
            if (u == UNITS - 1) {
              if (step == 0) {
                load_weights(weights[1], warp_rows + this_stage * STAGE_BYTES, 1, lane);
              } else if (box + 1 < end_box) {
                barrier_wait(full + 8 * stage, phase);
                load_weights(weights[0], warp_rows + stage * STAGE_BYTES, 0, lane);
              }
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (unit == STAGE_UNITS - 1 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * this_stage);
            fold(totals, sums, first, second);
          }
        }
      }
#if STAGED
      finish_staged(a, c, totals, tile.column * COLUMNS, row_of(tile.row_tile, a) + group * c.share_rows,
                    base + a.stages * STAGE_BYTES + group * STAGED_BYTES, group, warp % 4, lane);
#elif SPLIT == 1
      ColumnOperands<TILES_N> columns;
      const int column = tile.column * COLUMNS + lane % 4 * 2;
      load_columns(columns, a, c, column, first_row);
      store_columns(columns, a, totals, column, first_row);
#endif
    }
#if SPLIT > 1
    // The ring is drained: its memory holds each thread's totals for the other blocks of the cluster.
    constexpr int OWN = TILES_N / SPLIT;  // times eight columns that this block finishes
    const Tile tile = tile_of(first_item, num_row_tiles, num_column_tiles);
    const int first_row = row_of(tile.row_tile, a) + row;
    const int column = tile.column * COLUMNS + rank * OWN * 8 + lane % 4 * 2;
    ColumnOperands<OWN> columns;
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
    for (int n = 0; n < TILES_N; n++) ((float4*)ring)[n * CONSUMERS + threadIdx.x] = *(const float4*)(totals + n * 4);
    load_columns(columns, a, c, column, first_row);
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < OWN * 4; i++) sums[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < SPLIT; r++) {
      const u32 there = remote(base + (rank * OWN * CONSUMERS + threadIdx.x) * 16, r);
#pragma unroll
      for (int n = 0; n < OWN; n++) add_remote(sums + n * 4, there + n * CONSUMERS * 16);
    }
    store_columns(columns, a, sums, column, first_row);
    cluster_barrier();  // no block ends while another may still read its memory
#endif
  }
}
