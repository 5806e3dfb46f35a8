// The product of a few rows with a coded weight that is read once: y[T, N] = epilogue(x[T, K] W[N, K]^T), T <= COLUMNS.
//
//   device memory    codes of W, row-major, gains, scales      x, row-major
//        |  weight warp: one bulk tensor copy a stage,            |  activation warp: only after the previous kernel
//        v  never waits for the previous kernel                   v  has ended
//   shared memory    ring of stages {codes 2 x ROWS x DEPTH}, and x, whole, once, brought by the consumers (RESIDENT)
//                    ring of stages {codes, x tile COLUMNS x DEPTH, gains}, where x is too large for that
//                    ring of scales, and zero points, of a tile, where groups of features have their own (GROUP)
//        |  WARPS consumer warps, each on its own slices of k: x is prepared in its place, codes are widened in registers,
//        v  mma.m16n8k16 with the weight as the A operand
//   shared memory    one partial sum for each warp -> sum, norm, scale, epilogue -> device memory
//
// A tile is two groups of ROWS weight rows at a distance of PAIR rows, as in stream_linear.cu.
//
// Codes are widened by moving their bits, so what the tensor cores see is a power of two times the weight, subnormals
// among them, which they take exactly:
//
//   e4m3       sign, exponent and fraction in their places in half precision: 2^-120 (bfloat16), 2^-8 (float16)
//   int8       code + 128, in 0 .. 255, as the lowest bits: 2^-133, 2^-24; in bfloat16 the eighth bit is the exponent's
//              lowest, and numbers of the two smallest exponents lie equally far apart
//   4 bits     nibble, in 0 .. 15, in the same way; in bfloat16 each second one is left four bits higher, times 16
//
// Products with an A operand of ones, in the same power of two, give sums of x; these times 128, 8 or the zero point are
// taken off. x times a gain is rounded to half precision, as it is everywhere; in bfloat16 it is lifted by 2^80, so that
// no product is lost below float32's range. What is left of the powers is in FACTOR.
//
// The compiler is given: WARPS, CODE, GROUP (features that share a scale, 0: all of a row), ZEROS (zero points are stored),
// COLUMNS (8 or 16), BLOCKS (ROWS = 8 * BLOCKS), DEPTH (k in a stage), RESIDENT, X_ROWS (rows of x that are kept), HALF
// (1 for float16, 0 for bfloat16), NORM, EPILOGUE, NARROW (the cache holds float8_e4m3fn) and PER_SM (blocks of threads
// that a multiprocessor must have registers for).

#define E4M3 0
#define INT8 1
#define INT4 2

struct Codes {
  const void* scale;          // float32 [N], INT4: bfloat16 [N, groups]
  const unsigned char* zero;  // ZEROS: [N, groups]
  const void* x;              // [T, K]
  const void* gain;           // NORM: [K]
  long long x_stride;
  int groups;
  int buffers;                // GROUP: tiles whose scales fit
};

constexpr int ROWS = 8 * BLOCKS;
constexpr int TILES_N = COLUMNS / 8;
constexpr int BOX = CODE == INT4 ? 256 : 128;  // k in 128 bytes, the width of a swizzled box
constexpr int BOXES = DEPTH / BOX;
constexpr int SLICE = BOX / 2;                 // k that a warp takes at once, 16 bytes of a row's codes for each lane t
constexpr int SLICES = DEPTH / SLICE / WARPS;  // of a warp in a stage
constexpr int CHUNKS = SLICE / 32;             // of 8 activations, 16 bytes, for each lane t
constexpr int X_BOXES = SLICE / 64;            // boxes of x, 64 k, in a slice
constexpr int WEIGHT_BYTES = 2 * ROWS * BOXES * 128;
constexpr int X_BYTES = X_ROWS * DEPTH * 2;
constexpr int GAIN_BYTES = NORM ? DEPTH * 2 : 0;
constexpr int STAGE_BYTES = WEIGHT_BYTES + (RESIDENT ? 0 : X_BYTES + GAIN_BYTES);
constexpr int MOST_STAGES = 16;
constexpr int MOST_BUFFERS = 16;  // of scales
constexpr int SUMS = BLOCKS * TILES_N * 4 * 32;  // numbers in one warp's partial sum
constexpr int BUFFERS = SUMS <= 128 ? 2 : 1;     // partial sums of two tiles, where there is room: one barrier less
constexpr int OFFSET = CODE == E4M3 ? 0 : CODE == INT8 ? 128 : 8;
constexpr int PARTS = 0 < GROUP && GROUP < SLICE ? SLICE / GROUP : 1;  // groups that a slice belongs to
constexpr int CHAINS = PARTS == 1 && TILES_N == 1 ? 2 : 1;  // sums of a group, so that not each product waits for the last
// 8 lanes prepare the 8 chunks of a unit: a row's k of one box. UNITS_EACH: those of a slice, for four such lanes.
constexpr int UNITS = X_BOXES * X_ROWS;
constexpr int UNITS_EACH = UNITS > 4 ? UNITS / 4 : 1;
constexpr int AT_ONCE = UNITS_EACH > (NORM ? 4 : 8) ? UNITS_EACH : NORM ? 4 : 8;  // units that a lane asks for together
constexpr float FACTOR = CODE == E4M3 ? (HALF ? 0x1p8f : 0x1p40f) : (HALF ? 0x1p24f : 0x1p53f);

static_assert(SLICES >= 1 && SLICES * WARPS * SLICE == DEPTH, "each warp has the same slices");
static_assert(SUMS / 2 <= WARPS * 32, "each thread finishes one pair of numbers at most");
static_assert(X_BYTES % 1024 == 0 && GAIN_BYTES % 1024 == 0, "the swizzle counts from multiples of 1024 bytes");
static_assert(PARTS <= 4, "a group is no less than what one lane takes");

__device__ __forceinline__ void copy_bytes(u32 target, const void* source, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(target), "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ float load_bfloat16(u32 address) {
  u16 bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address));
  return __uint_as_float((u32)bits << 16);
}

__device__ __forceinline__ float load_byte(u32 address) {
  u32 bits;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(bits) : "r"(address));
  return (float)bits;
}

__device__ __forceinline__ u32 word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two registers of an A fragment, four k of a row: those of step m of the 2 * CHUNKS that 16 bytes of codes give.
__device__ __forceinline__ void widened(uint4 codes, int m, u32& first, u32& second) {
#if CODE == E4M3
  constexpr u32 REST = HALF ? 0x3F803F80 : 0x07F007F0;
  const u32 odd = word(codes, m), even = odd << 8;
  first = (odd & 0x80008000) | ((odd >> (HALF ? 1 : 4)) & REST);
  second = (even & 0x80008000) | ((even >> (HALF ? 1 : 4)) & REST);
#elif CODE == INT8
  const u32 shifted = word(codes, m) ^ 0x80808080;
  first = __byte_perm(shifted, 0, 0x4140);
  second = __byte_perm(shifted, 0, 0x4342);
#else
  const u32 nibbles = word(codes, m / 2) >> (m % 2 * 8);
  first = nibbles & 0x000F000F;
  second = HALF ? (nibbles >> 4) & 0x000F000F : nibbles & 0x00F000F0;
#endif
}

// Eight activations in the order in which `widened` gives weights, and lifted.
__device__ __forceinline__ uint4 arranged(uint4 v) {
#if CODE == E4M3
  v = make_uint4(__byte_perm(v.x, v.y, 0x7632), __byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x7632),
                 __byte_perm(v.z, v.w, 0x5410));
#elif CODE == INT4
  v = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
                 __byte_perm(v.y, v.w, 0x7632));
#endif
#if !HALF
  constexpr u32 LIFT = 0x67806780, LESS = CODE == INT4 ? 0x65806580 : LIFT;  // 2^80, and 2^76 for nibbles times 16
  v = make_uint4(multiply_pair(v.x, LIFT), multiply_pair(v.y, LESS), multiply_pair(v.z, LIFT), multiply_pair(v.w, LESS));
#endif
  return v;
}

// Where lane t of a column finds its chunk j of a slice, prepared: in the lines of the same row and slice, and so that
// neither those who store nor those who load meet a bank twice.
__device__ __forceinline__ u32 prepared_place(int slice, int row, int j, int t) {
  return ((slice * X_BOXES + j / 2) * X_ROWS + row) * 128 + ((j % 2 * 4 + t) ^ row % 2 * 4 ^ j / 2 * 2) * 16;
}

// A lane's part of unit `index`: units follow one another by boxes, rows, slices and steps, and `chunk` by lanes.
struct Part {
  int row, box, step;  // of x; box: of 64 k in the step
  u32 target;          // behind the step's x, prepared
};

__device__ __forceinline__ Part part_of(int index, int chunk) {
  const int slice = index / UNITS % SLICES * WARPS + threadIdx.x / 32, place = index % X_BOXES * 8 + chunk;
  Part part;
  part.row = index / X_BOXES % X_ROWS;
  part.box = slice * X_BOXES + index % X_BOXES;
  part.step = index / UNITS / SLICES;
  part.target = prepared_place(slice, part.row, place % CHUNKS, place / CHUNKS);
  return part;
}

__device__ __forceinline__ uint4 times(uint4 v, uint4 gain) {
  return make_uint4(multiply_pair(v.x, gain.x), multiply_pair(v.y, gain.y), multiply_pair(v.z, gain.z),
                    multiply_pair(v.w, gain.w));
}

__device__ __forceinline__ uint4 load_global(const void* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// This warp's part of x comes from the previous kernel through the L2 to its prepared place, once; with the sums of its
// squares, where there is a norm. What comes first of the gains is asked for before that kernel has ended.
__device__ __forceinline__ void keep_x(const Arguments& a, const Codes& codes, u32 x, float* square) {
  const int lane = threadIdx.x % 32, chunk = lane % 8;
  const int end = (a.num_inputs + DEPTH - 1) / DEPTH * SLICES * UNITS;
  uint4 gains[AT_ONCE];
  for (int first = 0; first < end; first += 4 * AT_ONCE) {
    uint4 v[AT_ONCE];
#if NORM
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const Part part = part_of(first + 4 * i + lane / 8, chunk);
      const int k = part.step * DEPTH + part.box * 64 + chunk * 8;
      gains[i] = make_uint4(0, 0, 0, 0);
      if (k < a.num_inputs) gains[i] = load_global((const u16*)codes.gain + k);
    }
#endif
    if (first == 0) wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const Part part = part_of(first + 4 * i + lane / 8, chunk);
      const int k = part.step * DEPTH + part.box * 64 + chunk * 8;
      v[i] = make_uint4(0, 0, 0, 0);
      if (k < a.num_inputs && part.row < a.num_rows) v[i] = load_global((const u16*)codes.x + part.row * codes.x_stride + k);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int index = first + 4 * i + lane / 8;
      const Part part = part_of(index, chunk);
      if (NORM) square[i % UNITS_EACH] = square_all(square[i % UNITS_EACH], v[i]);
      if (index < end) store_shared(x + part.step * X_BYTES + part.target, arranged(NORM ? times(v[i], gains[i]) : v[i]));
    }
  }
  __syncwarp();
}

// This warp's part of a stage's x, which the copy engine brought, is put in its prepared place.
__device__ __forceinline__ void prepare_stage(u32 x, u32 gain, float* square) {
  const int lane = threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
  for (int first = 0; first < SLICES * UNITS_EACH; first += 2) {
    uint4 v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Part part = part_of(4 * (first + i) + lane / 8, chunk);
      const int line = part.box * X_ROWS + part.row;
      v[i] = load_shared(x + line * 128 + (chunk ^ line % 8) * 16);
      if (NORM) {
        float& own = square[(first + i) % UNITS_EACH];
        own = square_all(own, v[i]);
        v[i] = times(v[i], load_shared(gain + part.box * 128 + (chunk ^ part.box % 8) * 16));
      }
    }
    __syncwarp();  // what is stored now lay elsewhere in the same lines
#pragma unroll
    for (int i = 0; i < 2; i++) store_shared(x + part_of(4 * (first + i) + lane / 8, chunk).target, arranged(v[i]));
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__((WARPS + 2) * 32, PER_SM) stream_coded(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    const __grid_constant__ TensorMap gain_map, const __grid_constant__ Arguments a, const __grid_constant__ Codes codes) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ __align__(8) u64 barriers[2 * MOST_STAGES + (GROUP ? 2 * MOST_BUFFERS : 0)];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_tiles = a.num_outputs / (2 * ROWS), num_steps = (a.num_inputs + DEPTH - 1) / DEPTH;
  const u32 full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  const u32 scales_full = empty + 8 * MOST_STAGES, scales_empty = scales_full + 8 * MOST_BUFFERS;
  const u32 base = shared_address(ring);
  // Where a step's x lies: resident by the step, otherwise by the stage, with its gains behind it.
  const u32 x_base = base + (RESIDENT ? a.stages * STAGE_BYTES : WEIGHT_BYTES), x_stride = RESIDENT ? X_BYTES : STAGE_BYTES;
  // Of a tile: scales of both groups of rows, then their zero points.
  const int scale_bytes = GROUP ? 2 * ROWS * codes.groups * (ZEROS ? 3 : 2) : 0;
  const u32 scale_base = base + a.stages * STAGE_BYTES + (RESIDENT ? num_steps * X_BYTES : 0);
  const u32 scale_end = scale_base - base + (GROUP ? codes.buffers * scale_bytes : 0);
  float(*partial)[WARPS][SUMS] = (float(*)[WARPS][SUMS])(ring + scale_end);
#if NORM
  float(*squares)[WARPS][COLUMNS] = (float(*)[WARPS][COLUMNS])(partial + BUFFERS);
#endif
  if (warp == WARPS) {
    if (lane < a.stages) {
      barrier_init(full + 8 * lane, RESIDENT ? 1 : 2);
      barrier_init(empty + 8 * lane, WARPS);
    }
    if (GROUP && lane < codes.buffers) {
      barrier_init(scales_full + 8 * lane, 1);
      barrier_init(scales_empty + 8 * lane, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
    __syncwarp();
    // Its copies begin before the others know of the barriers.
    asm volatile("bar.arrive 2, %0;" ::"n"((WARPS + 2) * 32) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"((WARPS + 2) * 32) : "memory");
  }
  let_next_kernel_start();
  int stage = 0, buffer = 0;
  u32 phase = 0, buffer_phase = 0;
  if (warp == WARPS) {
    if (lane == 0) {
      for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const int row = tile_row(tile, ROWS, a.pair);
        if (GROUP) {
          const u32 done = scales_full + 8 * buffer, target = scale_base + buffer * scale_bytes;
          const int bytes = 2 * ROWS * codes.groups;  // of one group of rows
          const char* scale = (const char*)codes.scale + (long long)row * codes.groups * 2;
          barrier_wait(scales_empty + 8 * buffer, buffer_phase ^ 1);
          barrier_expect(done, scale_bytes);
          copy_bytes(target, scale, bytes, done);
          copy_bytes(target + bytes, scale + (long long)a.pair * codes.groups * 2, bytes, done);
          if (ZEROS) {
            const unsigned char* zero = codes.zero + (long long)row * codes.groups;
            copy_bytes(target + 2 * bytes, zero, bytes / 2, done);
            copy_bytes(target + 2 * bytes + bytes / 2, zero + (long long)a.pair * codes.groups, bytes / 2, done);
          }
          if (++buffer == codes.buffers) buffer = 0, buffer_phase ^= 1;
        }
        for (int step = 0; step < num_steps; step++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          const u32 done = full + 8 * stage;
          barrier_expect(done, WEIGHT_BYTES + (RESIDENT ? 0 : GAIN_BYTES));
          copy_weight(base + stage * STAGE_BYTES, &weight_map, row, step * BOXES, done);
          if (NORM && !RESIDENT) copy_gain(x_base + X_BYTES + stage * STAGE_BYTES, &gain_map, step * (DEPTH / 64), done);
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }
  if (warp == WARPS + 1) {
    if (!RESIDENT && lane == 0) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
      wait_for_previous_kernel();
      asm volatile("fence.proxy.async;" ::: "memory");
      for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        for (int step = 0; step < num_steps; step++) {
          const u32 done = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(done, X_BYTES);
          copy_x(x_base + stage * x_stride, &x_map, step * (DEPTH / 64), done);
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }
  // Lane (g, t) of a consumer holds rows g and g + 8 of the weight's fragments and column g of those of x, and takes the
  // t-th quarter of a slice's k: any order of k will do that is the same for both operands. Fragment row g is row `own` of
  // eight in shared memory, so that the 16 bytes that eight lanes load together lie in different banks.
  const int g = lane / 4, t = lane % 4, own = g % 2 * 4 + g / 2;
  const u32 none = (u32)a.num_rows >> 30;
  // The pair of numbers that this thread finishes in each tile: column `mine` of x, row own + 8 b of both groups.
  const int e = threadIdx.x / 32 % 2, n = threadIdx.x / 64 % TILES_N, b = threadIdx.x / 64 / TILES_N;
  const int index = ((b * TILES_N + n) * 4 + e) * 32 + lane, mine = n * 8 + t * 2 + e;
  const bool finishes = threadIdx.x < SUMS / 2 && mine < a.num_rows;
  float square[UNITS_EACH] = {};
  if (RESIDENT)
    keep_x(a, codes, x_base, square);
  else
    wait_for_previous_kernel();
  float ones[TILES_N][4] = {};  // sums of x, where all of a row's features share a scale
  int sums_buffer = 0;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int tile_first = tile_row(tile, ROWS, a.pair), row = tile_first + b * 8 + own;
    Operands operands = {};
#if GROUP == 0 && CODE == INT4
    u16 first_scale = 0, second_scale = 0;  // asked for here, and widened where they are wanted
    const u16* row_scales = (const u16*)codes.scale;
#elif GROUP == 0
    float first_scale = 0, second_scale = 0;
    const float* row_scales = (const float*)codes.scale;
#endif
    if (finishes) {
      operands = load_operands(a, mine, row);
#if GROUP == 0
      first_scale = row_scales[row];
      second_scale = row_scales[row + a.pair];
#endif
    }
    float sums[BLOCKS][TILES_N][4] = {};
    if (!RESIDENT) {
#pragma unroll
      for (int i = 0; i < UNITS_EACH; i++) square[i] = 0;
#pragma unroll
      for (int n = 0; n < TILES_N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) ones[n][e] = 0;
    }
#if GROUP
    const u32 scales = scale_base + buffer * scale_bytes;
    barrier_wait(scales_full + 8 * buffer, buffer_phase);
#endif
    for (int step = 0; step < num_steps; step++) {
      barrier_wait(full + 8 * stage, phase);
      const u32 weights = base + stage * STAGE_BYTES, here = x_base + (RESIDENT ? step : stage) * x_stride;
      u32 loaded = 0;
      if (!RESIDENT) prepare_stage(here, here + X_BYTES, square);
#pragma unroll
      for (int u = 0; u < SLICES; u++) {
        const int slice = u * WARPS + warp;
        const u32 source = weights + slice / 2 * ROWS * 128 + own * 128 + ((slice % 2 * 4 + t) ^ own) * 16;
        uint4 x[TILES_N][CHUNKS], low[BLOCKS], high[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          low[b] = load_shared(source + b * 1024);
          high[b] = load_shared(source + b * 1024 + BOXES * ROWS * 128);
          loaded ^= low[b].x ^ high[b].x;
        }
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
          for (int j = 0; j < CHUNKS; j++) {  // columns without a row of x repeat another's: their products are dropped
            x[n][j] = load_shared(here + prepared_place(slice, (n * 8 + g) % X_ROWS, j, t));
            if (!RESIDENT) loaded ^= x[n][j].x;
          }
#if GROUP
        float total[CHAINS][PARTS][BLOCKS][TILES_N][4] = {}, part_ones[CHAINS][PARTS][TILES_N][4] = {};
#endif
#pragma unroll
        for (int m = 0; m < 2 * CHUNKS; m++) {
          constexpr u32 ONE = 0x00010001, SECOND_ONE = CODE == INT4 && !HALF ? 0x00100010 : ONE;
          u32 f[BLOCKS][4];
#pragma unroll
          for (int b = 0; b < BLOCKS; b++) {
            widened(low[b], m, f[b][0], f[b][2]);
            widened(high[b], m, f[b][1], f[b][3]);
          }
#pragma unroll
          for (int n = 0; n < TILES_N; n++) {
            const uint4 chunk = x[n][m / 2];
            const u32 x0 = m % 2 ? chunk.z : chunk.x, x1 = m % 2 ? chunk.w : chunk.y;
#if GROUP
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
              const bool is_in = PARTS == 1 || t * PARTS / 4 == p;
              const u32 y0 = is_in ? x0 : 0, y1 = is_in ? x1 : 0;
              mma(part_ones[m % CHAINS][p][n], ONE, ONE, SECOND_ONE, SECOND_ONE, y0, y1);
#pragma unroll
              for (int b = 0; b < BLOCKS; b++)
                mma(total[m % CHAINS][p][b][n], f[b][0], f[b][1], f[b][2], f[b][3], y0, y1);
            }
#else
            // Those of a resident x are the same for every tile.
            if (OFFSET && (!RESIDENT || tile == blockIdx.x)) mma(ones[n], ONE, ONE, SECOND_ONE, SECOND_ONE, x0, x1);
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) mma(sums[b][n], f[b][0], f[b][1], f[b][2], f[b][3], x0, x1);
#endif
          }
        }
#if GROUP
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
          // Beyond the last feature all products are 0, whatever the scale.
          const int group = min((step * DEPTH + slice * SLICE) / GROUP + p, codes.groups - 1);
#pragma unroll
          for (int b = 0; b < BLOCKS; b++) {
            const int place = (b * 8 + own) * codes.groups + group, far = ROWS * codes.groups;
            const float low_scale = load_bfloat16(scales + 2 * place), high_scale = load_bfloat16(scales + 2 * (place + far));
            float low_zero = OFFSET, high_zero = OFFSET;
            if (ZEROS) {
              low_zero = load_byte(scales + 4 * far + place);
              high_zero = load_byte(scales + 4 * far + place + far);
            }
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) {
                float value = total[0][p][b][n][e], one = part_ones[0][p][n][e];
                if (CHAINS == 2) value += total[CHAINS - 1][p][b][n][e], one += part_ones[CHAINS - 1][p][n][e];
                value = fmaf(e < 2 ? -low_zero : -high_zero, one, value);
                sums[b][n][e] = fmaf(e < 2 ? low_scale : high_scale, value, sums[b][n][e]);
              }
          }
        }
#endif
      }
      if (!RESIDENT) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine writes here next
      __syncwarp();
      if (lane == 0) release(empty + 8 * stage, loaded, none);
      if (++stage == a.stages) stage = 0, phase ^= 1;
    }
    if (GROUP) {
      u32 loaded = 0;  // the last sums follow from the last scales
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) loaded ^= __float_as_uint(sums[b][0][0]) ^ __float_as_uint(sums[b][0][2]);
      if (lane == 0) release(scales_empty + 8 * buffer, loaded, none);
      if (++buffer == codes.buffers) buffer = 0, buffer_phase ^= 1;
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      float low_zero = OFFSET, high_zero = OFFSET;
#if GROUP == 0 && ZEROS
      low_zero = codes.zero[tile_first + b * 8 + own];
      high_zero = codes.zero[tile_first + b * 8 + own + a.pair];
#endif
#pragma unroll
      for (int n = 0; n < TILES_N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float value = sums[b][n][e];
          if (!GROUP && OFFSET) value = fmaf(e < 2 ? -low_zero : -high_zero, ones[n][e], value);
          partial[sums_buffer][warp][((b * TILES_N + n) * 4 + e) * 32 + lane] = value;
        }
    }
#if NORM
    if (!RESIDENT || tile == blockIdx.x) {
      // Lanes that prepared another chunk, box or slice of a row hold the rest of its squares.
#pragma unroll
      for (int i = 0; i < UNITS_EACH; i++) {
        float total = square[i];
        for (int distance = 1; distance < 8; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
        if (X_BOXES == 2 || X_ROWS == 1) total += __shfl_xor_sync(~0u, total, 8);
        if (UNITS < 4) total += __shfl_xor_sync(~0u, total, 16);
        if (lane % 8 == 0) squares[RESIDENT ? 0 : sums_buffer][warp][(4 * i + lane / 8) / X_BOXES % X_ROWS] = total;
      }
    }
#endif
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
    if (finishes) {
      float first = 0, second = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        first += partial[sums_buffer][w][index];
        second += partial[sums_buffer][w][index + 64];
      }
#if NORM
      float total = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) total += squares[RESIDENT ? 0 : sums_buffer][w][mine];
      const float factor = FACTOR * rsqrtf(total / a.num_inputs + a.eps);
#else
      const float factor = FACTOR;
#endif
      first *= factor;
      second *= factor;
#if GROUP == 0 && CODE == INT4
      first *= __uint_as_float((u32)first_scale << 16);
      second *= __uint_as_float((u32)second_scale << 16);
#elif GROUP == 0
      first *= first_scale;
      second *= second_scale;
#endif
      store_pair(a, mine, row, first, second, operands);
    }
    if (BUFFERS == 2)
      sums_buffer ^= 1;
    else
      asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  }
}
