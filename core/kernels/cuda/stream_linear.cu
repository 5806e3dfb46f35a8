// The product of a few rows with a weight that is read once: y[T, N] = epilogue(x[T, K] W[N, K]^T), T <= COLUMNS.
//
//   device memory    W, row-major, gains                  x, row-major
//        |  weight warp: one bulk tensor copy a stage,       |  activation warp: only after the previous kernel
//        v  never waits for the previous kernel              v  has ended
//   shared memory    ring of stages {weight tile 2 x ROWS x DEPTH}, and gains and x, whole, once (RESIDENT)
//                    ring of stages {weight tile, x tile COLUMNS x DEPTH, gains}, where x is too large for that
//        |  WARPS consumer warps, each on its own slices of 32 k: mma.m16n8k16 with the weight as the A operand
//        v
//   shared memory    one partial sum for each warp -> sum, norm, epilogue -> device memory
//
// A tile is two groups of ROWS weight rows at a distance of PAIR rows, so that both numbers that an epilogue combines
// (gate and up; the two features that a rotation turns) end in one thread: fragment rows g and g + 8.
//
// One block of threads takes a whole multiprocessor: with room for a second one, those of the next kernel gather on few
// multiprocessors and the chain of products is slower (bench/NOTES.md).
//
// The compiler is given: COLUMNS (8 or 16), BLOCKS (ROWS = 8 * BLOCKS), DEPTH (k in a stage, a multiple of 256), RESIDENT,
// X_ROWS (rows of x that are copied), HALF (1 for float16, 0 for bfloat16), NORM, EPILOGUE and NARROW (the cache holds
// float8_e4m3fn).

constexpr int WARPS = 8;
constexpr int ROWS = 8 * BLOCKS;
constexpr int TILES_N = COLUMNS / 8;
constexpr int BOXES = DEPTH / 64;  // 64 k are 128 bytes, the width of a swizzled box
constexpr int WEIGHT_BYTES = 2 * ROWS * DEPTH * 2;
constexpr int X_BYTES = X_ROWS * DEPTH * 2;
constexpr int GAIN_BYTES = NORM ? DEPTH * 2 : 0;
constexpr int GAIN_ROOM = (GAIN_BYTES + 1023) / 1024 * 1024;  // stages begin at multiples of 1024 bytes
constexpr int STAGE_BYTES = WEIGHT_BYTES + (RESIDENT ? 0 : X_BYTES + GAIN_ROOM);
constexpr int MOST_STAGES = 16;
constexpr int MOST_STEPS = 64;  // of DEPTH k, with x resident
constexpr int SUMS = BLOCKS * TILES_N * 4 * 32;  // numbers in one warp's partial sum
static_assert(SUMS / 2 <= WARPS * 32, "each thread finishes one pair of numbers at most");
constexpr int BUFFERS = SUMS <= 128 ? 2 : 1;     // partial sums of two tiles, where there is room: one barrier less

extern "C" __global__ void __launch_bounds__((WARPS + 2) * 32, 1) stream_linear(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    const __grid_constant__ TensorMap gain_map, const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ __align__(8) u64 barriers[2 * MOST_STAGES + (RESIDENT ? MOST_STEPS : 0)];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_tiles = a.num_outputs / (2 * ROWS), num_steps = (a.num_inputs + DEPTH - 1) / DEPTH;
  const u32 full = shared_address(barriers), empty = full + 8 * MOST_STAGES, arrived = empty + 8 * MOST_STAGES;
  const u32 base = shared_address(ring), end = base + a.stages * STAGE_BYTES;
  // Where a step's x and gains lie: resident ones by the step, others by the stage.
  const u32 x_base = RESIDENT ? end : base + WEIGHT_BYTES, x_stride = RESIDENT ? X_BYTES : STAGE_BYTES;
  const u32 gain_base = x_base + (RESIDENT ? num_steps * X_BYTES : X_BYTES), gain_stride = RESIDENT ? GAIN_BYTES : STAGE_BYTES;
  const u32 resident = RESIDENT ? (num_steps * (X_BYTES + GAIN_BYTES) + 1023) & ~1023u : 0;
  float(*partial)[WARPS][SUMS] = (float(*)[WARPS][SUMS])(ring + a.stages * STAGE_BYTES + resident);
#if NORM
  float(*squares)[WARPS][COLUMNS] = (float(*)[WARPS][COLUMNS])(partial + BUFFERS);
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; i++) {
      barrier_init(full + 8 * i, RESIDENT ? 1 : 2);
      barrier_init(empty + 8 * i, WARPS);
    }
    if (RESIDENT)
      for (int i = 0; i < num_steps; i++) barrier_init(arrived + 8 * i, NORM ? 2 : 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  let_next_kernel_start();
  int stage = 0;
  u32 phase = 0;
  if (warp == WARPS) {
    if (lane == 0) {
      bool first = RESIDENT && NORM;
      for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x, first = false) {
        const int row = tile_row(tile, ROWS, a.pair);
        for (int step = 0; step < num_steps; step++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          const u32 done = full + 8 * stage;
          barrier_expect(done, WEIGHT_BYTES + (RESIDENT ? 0 : GAIN_BYTES));
          copy_weight(base + stage * STAGE_BYTES, &weight_map, row, step * BOXES, done);
          if (NORM && !RESIDENT) copy_gain(gain_base + stage * gain_stride, &gain_map, step * BOXES, done);
          if (first) {
            barrier_expect(arrived + 8 * step, GAIN_BYTES);
            copy_gain(gain_base + step * gain_stride, &gain_map, step * BOXES, arrived + 8 * step);
          }
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }
  wait_for_previous_kernel();
  if (warp == WARPS + 1) {
    if (lane == 0) {
      asm volatile("fence.proxy.async;" ::: "memory");
      const int last = RESIDENT ? blockIdx.x + 1 : num_tiles;
      for (int tile = blockIdx.x; tile < last; tile += gridDim.x) {
        for (int step = 0; step < num_steps; step++) {
          const int place = RESIDENT ? step : stage;
          const u32 done = (RESIDENT ? arrived : full) + 8 * place;
          if (!RESIDENT) barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(done, X_BYTES);
          copy_x(x_base + place * x_stride, &x_map, step * BOXES, done);
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }
  // Lane (g, t) of a consumer holds rows g and g + 8 of the weight's fragments, column g of those of x, and of each
  // box of 64 k the 16-byte chunks 2 t and 2 t + 1: any order of k will do that is the same for both operands, and this
  // one meets no bank twice under the 128-byte swizzle.
  const int g = lane / 4, t = lane % 4;
  const u32 none = (u32)a.num_rows >> 30;
  // The pair of numbers that this thread finishes in each tile: column `mine` of x, row g + 8 b of both groups.
  const int e = threadIdx.x / 32 % 2, n = threadIdx.x / 64 % TILES_N, b = threadIdx.x / 64 / TILES_N;
  const int index = ((b * TILES_N + n) * 4 + e) * 32 + lane, mine = n * 8 + t * 2 + e;
  const bool finishes = threadIdx.x < SUMS / 2 && mine < a.num_rows;
  int buffer = 0;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int row = tile_row(tile, ROWS, a.pair) + b * 8 + g;
    Operands operands = {};
    if (finishes) operands = load_operands(a, mine, row);
    float sums[BLOCKS][TILES_N][4] = {};
#if NORM
    float square[TILES_N] = {};
#endif
    for (int step = 0; step < num_steps; step++) {
      barrier_wait(full + 8 * stage, phase);
      if (RESIDENT) barrier_wait(arrived + 8 * step, 0);
      const u32 weights = base + stage * STAGE_BYTES, place = RESIDENT ? step : stage;
      u32 loaded = 0;
#pragma unroll
      for (int u = 0; u < DEPTH / 256; u++) {
        const int box = (u * WARPS + warp) / 2, chunk = 2 * t + warp % 2;
        const u32 swizzled = g * 128 + (chunk ^ g) * 16;
        uint4 x[TILES_N];
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
          // Columns without a row of x repeat another's: their products are dropped.
          const u32 row = box * X_ROWS + (n * 8 + g) % X_ROWS, shift = RESIDENT ? step * BOXES * X_ROWS : 0;
          x[n] = load_shared(x_base + place * x_stride + row * 128 + (chunk ^ (row + shift) % 8) * 16);
          loaded ^= x[n].x;
        }
#if NORM
        const u32 gain_row = box + (RESIDENT ? num_steps * BOXES * X_ROWS + step * BOXES : 0);
        const uint4 gain = load_shared(gain_base + place * gain_stride + box * 128 + (chunk ^ gain_row % 8) * 16);
        loaded ^= gain.x;
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
          square[n] = square_all(square[n], x[n]);
          x[n].x = multiply_pair(x[n].x, gain.x);
          x[n].y = multiply_pair(x[n].y, gain.y);
          x[n].z = multiply_pair(x[n].z, gain.z);
          x[n].w = multiply_pair(x[n].w, gain.w);
        }
#endif
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          const u32 source = weights + box * ROWS * 128 + b * 1024 + swizzled;
          const uint4 low = load_shared(source), high = load_shared(source + BOXES * ROWS * 128);
          loaded ^= low.x ^ high.x;
#pragma unroll
          for (int n = 0; n < TILES_N; n++) {
            mma(sums[b][n], low.x, high.x, low.y, high.y, x[n].x, x[n].y);
            mma(sums[b][n], low.z, high.z, low.w, high.w, x[n].z, x[n].w);
          }
        }
      }
      __syncwarp();
      if (lane == 0) release(empty + 8 * stage, loaded, none);
      if (++stage == a.stages) stage = 0, phase ^= 1;
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
      for (int n = 0; n < TILES_N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) partial[buffer][warp][((b * TILES_N + n) * 4 + e) * 32 + lane] = sums[b][n][e];
#if NORM
#pragma unroll
    for (int n = 0; n < TILES_N; n++) {
      square[n] += __shfl_xor_sync(~0u, square[n], 1);
      square[n] += __shfl_xor_sync(~0u, square[n], 2);
      if (t == 0) squares[buffer][warp][n * 8 + g] = square[n];
    }
#endif
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
    if (finishes) {
      float first = 0, second = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        first += partial[buffer][w][index];
        second += partial[buffer][w][index + 64];
      }
#if NORM
      float total = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) total += squares[buffer][w][mine];
      const float scale = rsqrtf(total / a.num_inputs + a.eps);
      first *= scale;
      second *= scale;
#endif
      store_pair(a, mine, row, first, second, operands);
    }
    if (BUFFERS == 2)
      buffer ^= 1;
    else
      asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  }
}
