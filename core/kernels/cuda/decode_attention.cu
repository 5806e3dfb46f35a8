// Attention of one-row sequences: every number of the cache is read once, into registers, and partial results meet in
// shared memory, first a block's, then through the cluster.
//
//   tiles of the rows  |0 0 0 0 0 0|1 1|2 2 2 2 2 2 2 2|     those of one KV head stand in a row, GROUP heads read each
//   blocks             |0      |1      |2      |3      |     of a cluster take equal shares of them
//   warps              |0 1 2 3|0 1 2 3|0 1 0 1 ...          of a block take turns within a row
//
// A row that one block has whole (1) is written by it. Of one that is cut (0, 2), each block sends its part to all, to
// each the features that this one adds up: into its slot 1 where the row begins in its share, otherwise into slot 0.
//
// A tile's keys are asked for as soon as the products with those of the tile before are done, and its values likewise.
//
// A tile is SUB times 16 positions. Fragments are made of what a lane loads, 16 bytes at a time, without a detour: any
// order of the features will do that is the same for both operands. Eight lanes load a line of 128 bytes of a position,
// so that a key is in two columns of an operand: its even groups of four chunks, and its odd ones. The rows 8 to 15 of
// the queries, of which there are eight at most, meet the odd ones, and a score is the sum of two places of a fragment.
// Lane (g, t) has, of each four positions of a tile,
//
//   keys     position g / 2, chunks 4 (g % 2) + t, + 8      B operand of scores = queries keys^T
//   queries  head g, chunks t, + 8 (rows g); 4 + t, + 8     A operand
//   scores   head g, position t                             which is the B operand of out^T = values^T weights^T
//   values   position t, chunks g, + 8                      pairs of positions, picked from two registers, are its A
//
// The compiler is given: HEAD_SIZE (64 or 128), GROUP (at most 8), BLOCK_SIZE (a multiple of 16), STORAGE, HALF (q is
// float16, otherwise bfloat16), WINDOWED, SUB, WARPS, CLUSTER and REGISTERS.

#define SAME 0    // entries in the dtype of q
#define FLOAT8 1  // float8_e4m3fn
#define SCALED 2  // int8 times a float32 for each position and head

constexpr int BYTES = STORAGE == SAME ? 2 : 1;
constexpr int ENTRY = HEAD_SIZE * BYTES;
constexpr int TILE = 16 * SUB;
constexpr int WORDS = ENTRY / 32;                  // of a position's key or value that a lane loads
constexpr int RUN = WORDS >= 4 ? 16 / BYTES : 8;   // features of a chunk
constexpr int CHUNKS = HEAD_SIZE / 8 / RUN;        // that a lane loads
constexpr int PARTS = HEAD_SIZE / 16;              // groups of 16 features, 2 for each of 8 lanes
constexpr int THREADS = WARPS * 32;
constexpr int NUMBERS = GROUP * HEAD_SIZE;  // of a row's result
constexpr int PARTIAL_HALF = HALF || STORAGE != SAME;  // products are made of float16
constexpr int SCALES = (TILE + 31) / 32;               // of positions that a lane loads
constexpr float LOWEST = -1e30f;  // finite, so that it can be subtracted from itself
constexpr float FAINTEST = 7.8886e-31f;  // 2^-100, for the scale of a value of zeros

struct Decodes {
  const u16* q;
  const char* keys;
  const char* values;
  const float* key_scales;
  const float* value_scales;
  const int* block_table;
  const int* kv_length;
  u16* out;
  long long q_row_stride;
  long long q_head_stride;
  long long out_row_stride;
  long long table_stride;
  int entry_stride;  // of the cache, in bytes
  int num_rows;
  int num_kv_heads;
  int num_shifts;  // clusters of a KV head: one has every so many rows
  int window;
  float scale_log2;
};

struct Row {
  int length;
  int row;     // of q
  int lowest;  // position that is seen
  int start;   // number of its first tile
  int end;
  int skipped;  // tiles before the first that is seen
};

struct Tile {
  u32 keys[SUB][4][WORDS];
  u32 values[SUB][4][WORDS];
  float key_scales[SCALES];
  float value_scales[SCALES];
};

// Past the L1, which waiting for the previous kernel does not clear. What is not there stays as it is.
__device__ __forceinline__ void load_words(u32* target, const void* source, bool there) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %5, 0;\n"
      "@there ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(target[0]), "+r"(target[1]), "+r"(target[2]), "+r"(target[3])
      : "l"(source), "r"((int)there)
      : "memory");
}

__device__ __forceinline__ void load_two_words(u32* target, const void* source, bool there) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %3, 0;\n"
      "@there ld.global.cg.v2.u32 {%0, %1}, [%2];\n"
      "}"
      : "+r"(target[0]), "+r"(target[1])
      : "l"(source), "r"((int)there)
      : "memory");
}

__device__ __forceinline__ void load_scale(float& target, const float* source, bool there) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %2, 0;\n"
      "@there ld.global.cg.f32 %0, [%1];\n"
      "}"
      : "+f"(target)
      : "l"(source), "r"((int)there)
      : "memory");
}

__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#define MULTIPLY(dtype)                                                                                              \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." dtype "." dtype ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "        \
      "{%0,%1,%2,%3};"                                                                                               \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if (PARTIAL_HALF)
    MULTIPLY("f16");
  else
    MULTIPLY("bf16");
#undef MULTIPLY
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
  if (PARTIAL_HALF)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four bytes of the cache as float16, in their order.
__device__ __forceinline__ void widen_four(u32 bytes, u32& low, u32& high) {
#if STORAGE == SCALED
  // 0x6400 is 1024, at which float16 counts in ones.
  const u32 shifted = bytes ^ 0x80808080u;
  low = __byte_perm(shifted, 0x64646464u, 0x4140);
  high = __byte_perm(shifted, 0x64646464u, 0x4342);
  asm("sub.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480u));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480u));
#else
  asm("{\n"
      ".reg .b16 first, second;\n"
      "mov.b32 {first, second}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, first;\n"
      "cvt.rn.f16x2.e4m3x2 %1, second;\n"
      "}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
#endif
}

// Which feature of a head a lane's i-th number of a value is.
__device__ __forceinline__ int feature_of(int g, int i) { return i / RUN * 8 * RUN + g * RUN + i % RUN; }

struct Reader {
  const char* keys;  // of the KV head, and of this lane's chunk
  const char* values;
  const float* key_scales;
  const float* value_scales;
  const int* blocks;  // of the row
  int entry_stride;
  int scale_stride;
  int g, t, lane;

  __device__ __forceinline__ void find(int* blocks_of, int start, int length) const {
#pragma unroll
    for (int s = 0; s < SUB; s++) blocks_of[s] = start + 16 * s < length ? blocks[(start + 16 * s) / BLOCK_SIZE] : 0;
  }

  __device__ __forceinline__ long long entry(const int* blocks_of, int s, int start) const {
    return (long long)blocks_of[s] * BLOCK_SIZE + (start + 16 * s) % BLOCK_SIZE;
  }

  // Positions from `lowest`, below `end`; what lies elsewhere stays as it is.
  __device__ __forceinline__ void load_keys(Tile& tile, const int* blocks_of, int start, int lowest, int end) const {
    load(tile.keys, keys, g / 2, blocks_of, start, lowest, end);
    if (STORAGE == SCALED) load_scales(tile.key_scales, key_scales, blocks_of, start, lowest, end);
  }

  __device__ __forceinline__ void load_values(Tile& tile, const int* blocks_of, int start, int lowest, int end) const {
    load(tile.values, values, t, blocks_of, start, lowest, end);
    if (STORAGE == SCALED) load_scales(tile.value_scales, value_scales, blocks_of, start, lowest, end);
  }

  // own: this lane's position of each four.
  __device__ __forceinline__ void load(
      u32 (*target)[4][WORDS], const char* entries, int own, const int* blocks_of, int start, int lowest,
      int end) const {
#pragma unroll
    for (int s = 0; s < SUB; s++) {
      const char* source = entries + (entry(blocks_of, s, start) + own) * entry_stride;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int position = start + 16 * s + 4 * j + own;
        const bool there = position >= lowest && position < end;
        if (WORDS == 2)
          load_two_words(target[s][j], source + 4 * j * entry_stride, there);
        else
#pragma unroll
          for (int i = 0; i < CHUNKS; i++)
            load_words(target[s][j] + 4 * i, source + 4 * j * entry_stride + 128 * i, there);
      }
    }
  }

  __device__ __forceinline__ void load_scales(
      float* target, const float* scales, const int* blocks_of, int start, int lowest, int end) const {
#pragma unroll
    for (int n = 0; n < SCALES; n++) {
      const int position = start + 32 * n + lane, half = min(2 * n + 1, SUB - 1);
      const int block = lane < 16 ? blocks_of[2 * n] : blocks_of[half];
      const long long entry = (long long)block * BLOCK_SIZE + position % BLOCK_SIZE;
      load_scale(target[n], scales + entry * scale_stride, position >= lowest && position < min(end, start + TILE));
    }
  }

  // What lies beyond is multiplied by weights of zero: it must be finite.
  __device__ __forceinline__ void clear_values(Tile& tile) const {
#pragma unroll
    for (int s = 0; s < SUB; s++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < WORDS; i++) tile.values[s][j][i] = 0;
  }
};

// Queries of head g as the first operand of the scores; gives what the scores are still to be multiplied by.
__device__ __forceinline__ float load_queries(
    u32 (*queries)[CHUNKS][RUN / 2], const u16* source, bool there, int t, float scale) {
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
#pragma unroll
      for (int word = 0; word < RUN / 2; word += 4) {
        u32* target = queries[odd][i] + word;
        target[0] = target[1] = target[2] = target[3] = 0;
        load_words(target, source + (8 * i + 4 * odd + t) * RUN + 2 * word, there);
      }
  if (HALF || STORAGE == SAME) return scale;
  // float16 is exact for the stored entries, but its range may be too small for queries: bring them below one.
  u32* words = queries[0][0];
  float peak = 0;
#pragma unroll
  for (int i = 0; i < HEAD_SIZE / 8; i++)
    peak = fmaxf(peak, fmaxf(fabsf(__uint_as_float(words[i] << 16)), fabsf(__uint_as_float(words[i] & 0xffff0000u))));
  peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
  peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
  if (!(peak > 0)) peak = 1;
  const float inverse = 1 / peak;
#pragma unroll
  for (int i = 0; i < HEAD_SIZE / 8; i++)
    words[i] = pack(__uint_as_float(words[i] << 16) * inverse, __uint_as_float(words[i] & 0xffff0000u) * inverse);
  return scale * peak;
}

// scores[s][j]: of head g with position 16 s + 4 j + t.
__device__ __forceinline__ void score(
    float (*scores)[4], const Tile& tile, const u32 (*queries)[CHUNKS][RUN / 2]) {
#pragma unroll
  for (int s = 0; s < SUB; s++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float sums[4] = {};
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) {
        const u32* words = tile.keys[s][j] + 4 * i;
        const u32 *even = queries[0][i], *odd = queries[1][i];
#pragma unroll
        for (int k = 0; k < RUN / 4; k++) {
          u32 low, high;
          if (STORAGE == SAME)
            low = words[2 * k], high = words[2 * k + 1];
          else
            widen_four(words[k], low, high);
          multiply(sums, even[2 * k], odd[2 * k], even[2 * k + 1], odd[2 * k + 1], low, high);
        }
      }
      scores[s][j] = sums[0] + sums[3];
    }
}

// sums[m]: of features 2 m and 2 m + 1 of those that lane g loads (rows g and g + 8), for heads 2 t and 2 t + 1.
__device__ __forceinline__ void add_values(float (*sums)[4], const Tile& tile, const float (*weights)[4]) {
#pragma unroll
  for (int s = 0; s < SUB; s++) {
    const u32 first = pack(weights[s][0], weights[s][1]), second = pack(weights[s][2], weights[s][3]);
    const u32(*v)[WORDS] = tile.values[s];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if (STORAGE == SAME) {
        multiply(sums[i], __byte_perm(v[0][i], v[1][i], 0x5410), __byte_perm(v[0][i], v[1][i], 0x7632),
                 __byte_perm(v[2][i], v[3][i], 0x5410), __byte_perm(v[2][i], v[3][i], 0x7632), first, second);
      } else {
        u32 a[4], b[4];
        widen_four(__byte_perm(v[0][i], v[1][i], 0x5140), a[0], a[1]);
        widen_four(__byte_perm(v[2][i], v[3][i], 0x5140), a[2], a[3]);
        widen_four(__byte_perm(v[0][i], v[1][i], 0x7362), b[0], b[1]);
        widen_four(__byte_perm(v[2][i], v[3][i], 0x7362), b[2], b[3]);
        multiply(sums[2 * i], a[0], a[1], a[2], a[3], first, second);
        multiply(sums[2 * i + 1], b[0], b[1], b[2], b[3], first, second);
      }
    }
  }
}

// Weights of the scores, in their place; best and mass (of this lane's positions) go on.
__device__ __forceinline__ float weigh(
    float (*scores)[4], const float* key_scales, const float* value_scales, const Row& row, int start, int t,
    float scale, float& best, float& mass) {
  float peak = best;
  float inverse[SUB][4];
#pragma unroll
  for (int s = 0; s < SUB; s++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int offset = 16 * s + 4 * j + t, position = start + offset;
      float x = scores[s][j] * scale;
      if (STORAGE == SCALED) {
        // A value's scale is in its weight: best is of the two together, so that float16 can hold the weights.
        float faint = __shfl_sync(~0u, value_scales[s / 2], offset % 32);
        faint = faint < FAINTEST ? FAINTEST : faint;
        x = x * __shfl_sync(~0u, key_scales[s / 2], offset % 32) + __log2f(faint);
        inverse[s][j] = __fdividef(1, faint);
      }
      x = position >= row.lowest && position < row.length ? x : __int_as_float(0xff800000);
      scores[s][j] = x;
      peak = fmaxf(peak, x);
    }
  peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
  peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
  const float fade = power_of_two(best - peak);
  mass *= fade;
#pragma unroll
  for (int s = 0; s < SUB; s++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float weight = power_of_two(scores[s][j] - peak);
      scores[s][j] = weight;
      if (STORAGE != SCALED)
        mass += weight;
      else if (weight != 0)  // unseen positions have any scale; NaN is not zero
        mass += weight * inverse[s][j];
    }
  best = peak;
  return fade;
}

__device__ __forceinline__ void store_four(u16* target, float4 v) {
  const u32 low = (u32)narrow(v.x) | (u32)narrow(v.y) << 16, high = (u32)narrow(v.z) | (u32)narrow(v.w) << 16;
  *(uint2*)target = make_uint2(low, high);
}

__device__ __forceinline__ float4 scaled(float4 v, float f) { return make_float4(v.x * f, v.y * f, v.z * f, v.w * f); }

__device__ __forceinline__ float4 added(float4 sum, float4 v, float f) {
  return make_float4(fmaf(v.x, f, sum.x), fmaf(v.y, f, sum.y), fmaf(v.z, f, sum.z), fmaf(v.w, f, sum.w));
}

__device__ __forceinline__ u32 address_in(int rank, u32 place) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(place), "r"(rank));
  return address;
}

struct Mark {
  float best;
  float mass;
};

// Four numbers of a part and their mark, on their way into another block, whose barrier counts their bytes.
__device__ __forceinline__ void send(u32 target, u32 mark_target, u32 barrier, float4 sum, Mark mark) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(target), "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w), "r"(barrier)
      : "memory");
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      ::"r"(mark_target), "f"(mark.best), "f"(mark.mass), "r"(barrier)
      : "memory");
}

constexpr int UNITS = NUMBERS / 4 / CLUSTER;  // of four numbers of a row, that each block adds up
constexpr int UNIT_BYTES = sizeof(float4) + sizeof(Mark);
static_assert(UNITS * 4 * CLUSTER == NUMBERS, "each block adds up as many numbers");

struct Shared {
  float parts[WARPS][NUMBERS];
  float4 sums[2 * CLUSTER][UNITS];  // of the parts of rows that are cut: blocks' slots 0 and 1
  Mark sum_marks[2 * CLUSTER][UNITS];
  Mark marks[WARPS][GROUP];
  u64 arrived;
};

extern "C" __global__ void __maxnreg__(REGISTERS) decode_attention(const __grid_constant__ Decodes a) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *(Shared*)memory;
  let_next_kernel_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % CLUSTER, kv_head = blockIdx.x / CLUSTER % a.num_kv_heads;
  const int shift = blockIdx.x / CLUSTER / a.num_kv_heads;
  // Lane i knows the cluster's row i.
  const int own = shift + lane * a.num_shifts;
  const int own_length = own < a.num_rows ? a.kv_length[own] : 0;
  const int own_skipped = WINDOWED ? max(own_length - a.window, 0) / TILE : 0;
  // An empty sequence has a tile as well, in which nothing is seen: its row becomes zeros.
  const int own_tiles = own < a.num_rows ? max((own_length + TILE - 1) / TILE - own_skipped, 1) : 0;
  int own_end = own_tiles;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, own_end, step);
    if (lane >= step) own_end += before;
  }
  const int num_tiles = __shfl_sync(~0u, own_end, 31), num_own = __popc(__ballot_sync(~0u, own_tiles > 0));
  const int share = (num_tiles + CLUSTER - 1) / CLUSTER;
  const int last = min((rank + 1) * share, num_tiles);
  const int own_first = (own_end - own_tiles) / share, own_last = (own_end - 1) / share;
  const bool own_cut = own_tiles > 0 && own_first != own_last;
  const bool cut = CLUSTER > 1 && __any_sync(~0u, own_cut);
  const u32 arrived = shared_address(&shared.arrived);
  if (cut) {
    const int num_parts = __reduce_add_sync(~0u, own_cut ? own_last - own_first + 1 : 0);
    if (threadIdx.x == 0) {
      barrier_init(arrived, 1);
      asm volatile("fence.mbarrier_init.release.cluster;");
      barrier_expect(arrived, num_parts * UNITS * UNIT_BYTES);
    }
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }

  Reader reader;
  reader.keys = a.keys + (long long)kv_head * ENTRY + (4 * (g % 2) + t) * RUN * BYTES;
  reader.values = a.values + (long long)kv_head * ENTRY + g * RUN * BYTES;
  reader.key_scales = a.key_scales + kv_head;
  reader.value_scales = a.value_scales + kv_head;
  reader.entry_stride = a.entry_stride;
  reader.scale_stride = a.num_kv_heads;
  reader.g = g, reader.t = t, reader.lane = lane;

  int tile_index = min(rank * share, num_tiles);
  if (cut) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  wait_for_previous_kernel();
  while (tile_index < last) {
    const int owner = __ffs(__ballot_sync(~0u, own_end > tile_index)) - 1;
    Row row;
    row.row = shift + owner * a.num_shifts;
    row.length = __shfl_sync(~0u, own_length, owner);
    row.skipped = __shfl_sync(~0u, own_skipped, owner);
    row.end = __shfl_sync(~0u, own_end, owner);
    row.start = row.end - __shfl_sync(~0u, own_tiles, owner);
    row.lowest = WINDOWED ? max(row.length - a.window, 0) : 0;
    const int stop = min(last, row.end);
    const int first_start = (row.skipped + tile_index - row.start) * TILE, step = WARPS * TILE;
    const int stop_start = (row.skipped + stop - row.start) * TILE;
    reader.blocks = a.block_table + row.row * a.table_stride;

    int start = first_start + warp * TILE;
    const bool busy = start < stop_start;
    Tile tile;
    int blocks[SUB], next_blocks[SUB];
    if (busy) {
      reader.find(blocks, start, row.length);
      reader.find(next_blocks, start + step, row.length);
      reader.clear_values(tile);
      reader.load_keys(tile, blocks, start, row.lowest, row.length);
      reader.load_values(tile, blocks, start, row.lowest, row.length);
      u32 queries[2][CHUNKS][RUN / 2];
      const u16* source = a.q + row.row * a.q_row_stride + (kv_head * GROUP + g) * a.q_head_stride;
      const float scale = load_queries(queries, source, g < GROUP, t, a.scale_log2);
      float best = LOWEST, mass = 0;
      float sums[PARTS][4] = {};
      while (true) {
        const int next = start + step;
        const bool more = next < stop_start;
        float scores[SUB][4];
        score(scores, tile, queries);
        float key_scales[SCALES];
#pragma unroll
        for (int n = 0; n < SCALES; n++) key_scales[n] = tile.key_scales[n];
        if (more) reader.load_keys(tile, next_blocks, next, row.lowest, row.length);
        const float fade = weigh(scores, key_scales, tile.value_scales, row, start, t, scale, best, mass);
        if (__any_sync(~0u, fade != 1)) {
          const float even = __shfl_sync(~0u, fade, 8 * t), odd = __shfl_sync(~0u, fade, 8 * t + 4);
#pragma unroll
          for (int m = 0; m < PARTS; m++) sums[m][0] *= even, sums[m][1] *= odd, sums[m][2] *= even, sums[m][3] *= odd;
        }
        add_values(sums, tile, scores);
        if (!more) break;
        if (next + TILE > row.length) reader.clear_values(tile);
        reader.load_values(tile, next_blocks, next, row.lowest, row.length);
        start = next;
        reader.find(next_blocks, start + step, row.length);
      }
      mass += __shfl_xor_sync(~0u, mass, 1);
      mass += __shfl_xor_sync(~0u, mass, 2);
      if (t == 0 && g < GROUP) shared.marks[warp][g] = {best, mass};
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (2 * t + e >= GROUP) continue;
        float* target = shared.parts[warp] + (2 * t + e) * HEAD_SIZE;
#pragma unroll
        for (int m = 0; m < PARTS; m += 2)
          *(float4*)(target + feature_of(g, 2 * m)) =
              make_float4(sums[m][e], sums[m][2 + e], sums[m + 1][e], sums[m + 1][2 + e]);
      }
    }
    __syncthreads();
    const bool whole = tile_index == row.start && stop == row.end;
    const int num_busy = min(WARPS, stop - tile_index);
    for (int number = 4 * threadIdx.x; number < NUMBERS; number += 4 * THREADS) {
      const int head = number / HEAD_SIZE;
      float best = LOWEST, mass = 0;
      float4 sum = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++)
        if (w < num_busy) best = fmaxf(best, shared.marks[w][head].best);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (w >= num_busy) continue;
        const float weight = power_of_two(shared.marks[w][head].best - best);
        mass = fmaf(shared.marks[w][head].mass, weight, mass);
        sum = added(sum, *(const float4*)(shared.parts[w] + number), weight);
      }
      if (whole) {
        u16* target = a.out + row.row * a.out_row_stride + kv_head * NUMBERS + number;
        store_four(target, scaled(sum, mass == 0 ? 0.0f : 1 / mass));
      } else {
        const int receiver = number / 4 / UNITS, unit = number / 4 % UNITS, slot = 2 * rank + (tile_index == row.start);
        send(address_in(receiver, shared_address(&shared.sums[slot][unit])),
             address_in(receiver, shared_address(&shared.sum_marks[slot][unit])), address_in(receiver, arrived), sum,
             {best, mass});
      }
    }
    tile_index = stop;
    if (tile_index < last) __syncthreads();
  }
  if (!cut) return;
  barrier_wait(arrived, 0);
  for (int base = 0; base < num_own * UNITS; base += THREADS) {
    const int index = base + threadIdx.x, unit = index % UNITS, owner = min(index / UNITS, 31);
    const int first = __shfl_sync(~0u, own_first, owner), final = __shfl_sync(~0u, own_last, owner);
    if (owner >= num_own || first == final) continue;
    float best = LOWEST, mass = 0;
    float4 sum = {};
    for (int block = first; block <= final; block++)
      best = fmaxf(best, shared.sum_marks[2 * block + (block == first)][unit].best);
#pragma unroll 4
    for (int block = first; block <= final; block++) {
      const int slot = 2 * block + (block == first);
      const Mark mark = shared.sum_marks[slot][unit];
      const float weight = power_of_two(mark.best - best);
      mass = fmaf(mark.mass, weight, mass);
      sum = added(sum, shared.sums[slot][unit], weight);
    }
    const int target_row = shift + owner * a.num_shifts, number = 4 * (rank * UNITS + unit);
    u16* target = a.out + target_row * a.out_row_stride + kv_head * NUMBERS + number;
    store_four(target, scaled(sum, mass == 0 ? 0.0f : 1 / mass));
  }
}
