// The product of a few dozen rows on the tensor cores: y[T, N] = epilogue(x[T, K] W[N, K]^T), T <= COLUMNS.
//
//   device memory    W, row-major                          x, row-major
//        |  weight thread: a bulk tensor copy a stage,        |  activation thread: the same, but only after the
//        v  never waits for the previous kernel               v  previous kernel has ended
//   shared memory    ring of stages {weight tile 128 x 64, x tile COLUMNS x 64}, both as wgmma reads them
//        |  two warpgroups, each with 64 of the tile's rows: wgmma with the weight as the A operand
//        v
//   registers        float32 sums -> (SPLIT > 1: added up over a cluster through shared memory) -> epilogue
//
// A tile is two groups of 64 weight rows at a distance of PAIR rows. They lie in shared memory eight and eight by turns,
// so that both numbers that an epilogue combines end in one thread, as in stream_linear.cu. With SPLIT > 1 the blocks of a
// cluster share one tile, each takes a part of k, and each finishes a part of the columns: layers with few outputs would
// otherwise leave multiprocessors idle.
//
// The compiler is given: COLUMNS (32, 64, 128, 256), SPLIT (1 or 2), HALF, EPILOGUE and NARROW, as in stream_linear.cu.

constexpr int ROWS = 64;
constexpr int CONSUMERS = 256;
constexpr int TILES_N = COLUMNS / 8;
constexpr int WEIGHT_BYTES = 2 * ROWS * 128;
constexpr int X_BYTES = COLUMNS * 128;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int MOST_STAGES = 16;

#define PART (COLUMNS < 128 ? COLUMNS : 128)  // columns of one wgmma
#if HALF
#define KIND "f16"
#else
#define KIND "bf16"
#endif
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)

// Adds to d, or replaces it, the product of 64 rows and PART columns over 16 k.
__device__ __forceinline__ void multiply(float* d, u64 a, u64 b, int adds) {
#if PART == 32
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." KIND "." KIND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, adds, 1, 1, 0, 0;\n}"
      : SIXTEEN(d, 0)
      : "l"(a), "l"(b), "r"(adds));
#endif
#if PART == 64
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND "." KIND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, adds, 1, 1, 0, 0;\n}"
      : SIXTEEN(d, 0),
        SIXTEEN(d, 16)
      : "l"(a), "l"(b), "r"(adds));
#endif
#if PART == 128
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, adds, 1, 1, 0, 0;\n}"
      : SIXTEEN(d, 0),
        SIXTEEN(d, 16),
        SIXTEEN(d, 32),
        SIXTEEN(d, 48)
      : "l"(a), "l"(b), "r"(adds));
#endif
}

// Where wgmma finds rows of 64 numbers under the 128-byte swizzle: eight rows are 1024 bytes.
__device__ __forceinline__ u64 operand(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void copy_weight(u32 target, const TensorMap* map, int octet, int box, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;"
      ::"r"(target), "l"(map), "r"(0), "r"(0), "r"(0), "r"(octet), "r"(box), "r"(barrier), "l"(EVICT_FIRST)
      : "memory");
}

__device__ __forceinline__ void copy_x(u32 target, const TensorMap* map, int box, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(target), "l"(map), "r"(box * 64), "r"(0), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ float load_remote(u32 address, int rank) {
  u32 remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 64, 1) wide_linear(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ __align__(8) u64 barriers[2 * MOST_STAGES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 base = shared_address(ring), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  const int num_tiles = a.num_outputs / (2 * ROWS), num_boxes = a.num_inputs / 64;
  const int rank = blockIdx.x % SPLIT, first_box = num_boxes * rank / SPLIT, end_box = num_boxes * (rank + 1) / SPLIT;
  const int first_tile = blockIdx.x / SPLIT, tile_step = gridDim.x / SPLIT;
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
  if (warp == CONSUMERS / 32) {
    if (lane == 0) {
      for (int tile = first_tile; tile < num_tiles; tile += tile_step) {
        const int octet = tile_row(tile, ROWS, a.pair) / 8;
        for (int box = first_box; box < end_box; box++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(full + 8 * stage, WEIGHT_BYTES);
          copy_weight(base + stage * STAGE_BYTES, &weight_map, octet, box, full + 8 * stage);
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
  } else if (warp == CONSUMERS / 32 + 1) {
    wait_for_previous_kernel();
    if (lane == 0) {
      asm volatile("fence.proxy.async;" ::: "memory");
      for (int tile = first_tile; tile < num_tiles; tile += tile_step) {
        for (int box = first_box; box < end_box; box++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(full + 8 * stage, X_BYTES);
          copy_x(base + stage * STAGE_BYTES + WEIGHT_BYTES, &x_map, box, full + 8 * stage);
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    wait_for_previous_kernel();
  }
  __syncwarp();
  float sums[TILES_N * 4];
  const int group = warp / 4, row = group * 32 + warp % 4 * 8 + lane / 4;
  for (int tile = first_tile; tile < num_tiles && warp < CONSUMERS / 32; tile += tile_step) {
    int last_stage = -1;
    for (int box = first_box; box < end_box; box++) {
      barrier_wait(full + 8 * stage, phase);
      const u32 weights = base + stage * STAGE_BYTES + group * 64 * 128;
      const u64 left = operand(weights), right = operand(base + stage * STAGE_BYTES + WEIGHT_BYTES);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int part = 0; part < COLUMNS / PART; part++)
          multiply(sums + part * PART / 2, left + k * 2, right + k * 2 + part * PART * 128 / 16, box > first_box || k > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (last_stage >= 0) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * last_stage);
      }
      last_stage = stage;
      if (++stage == a.stages) stage = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < TILES_N * 4; i++) asm volatile("" : "+f"(sums[i])::"memory");
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * last_stage);
    if (SPLIT > 1) break;
    const int first_row = tile_row(tile, ROWS, a.pair) + row;
#pragma unroll
    for (int n = 0; n < TILES_N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int m = n * 8 + lane % 4 * 2 + e;
        if (m < a.num_rows) store_pair(a, m, first_row, sums[n * 4 + e], sums[n * 4 + e + 2], load_operands(a, m, first_row));
      }
  }
#if SPLIT > 1
  // The ring is drained: its memory holds each thread's sums for the other blocks of the cluster.
  if (warp < CONSUMERS / 32) {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
    for (int i = 0; i < TILES_N * 4; i++) ((float*)ring)[i * CONSUMERS + threadIdx.x] = sums[i];
  }
  __syncwarp();
  cluster_barrier();
  if (warp < CONSUMERS / 32) {
    const int first_row = tile_row(first_tile, ROWS, a.pair) + row;
    for (int n = TILES_N * rank / SPLIT; n < TILES_N * (rank + 1) / SPLIT; n++) {
      float total[4] = {};
#pragma unroll
      for (int r = 0; r < SPLIT; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[i] += load_remote(base + ((n * 4 + i) * CONSUMERS + threadIdx.x) * 4, r);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int m = n * 8 + lane % 4 * 2 + e;
        if (m < a.num_rows) store_pair(a, m, first_row, total[e], total[e + 2], load_operands(a, m, first_row));
      }
    }
  }
  __syncwarp();
  cluster_barrier();
#endif
}
