// What kernels share that stream weights past few rows: copies into shared memory, and the tensor cores.
//
// Compiled behind linear.cuh and in front of each of them.

__device__ __forceinline__ void copy_weight(u32 target, const TensorMap* map, int row, int box, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
      ::"r"(target), "l"(map), "r"(0), "r"(row), "r"(box), "r"(0), "r"(barrier), "l"(EVICT_FIRST)
      : "memory");
}

__device__ __forceinline__ void copy_x(u32 target, const TensorMap* map, int box, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(target), "l"(map), "r"(0), "r"(0), "r"(box), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_gain(u32 target, const TensorMap* map, int box, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(target), "l"(map), "r"(0), "r"(box), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// Gives a stage back to the copy engine once its words have arrived. Loads under way do not hold up an arrival that nothing
// ties to them, and the engine would overwrite what they read: `loaded` is of a word of each load, and `none` is 0, which
// the compiler does not know.
__device__ __forceinline__ void release(u32 barrier, u32 loaded, u32 none) { barrier_arrive(barrier + (loaded & none)); }

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
  u32 product;
#if HALF
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#endif
  return product;
}

__device__ __forceinline__ float square_pair(float sum, u32 pair) {
  const float low = widen((u16)pair), high = widen((u16)(pair >> 16));
  return fmaf(high, high, fmaf(low, low, sum));
}

__device__ __forceinline__ float square_all(float sum, uint4 v) {
  return square_pair(square_pair(square_pair(square_pair(sum, v.x), v.y), v.z), v.w);
}
