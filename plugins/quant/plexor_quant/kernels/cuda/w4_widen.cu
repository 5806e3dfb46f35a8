// Four-bit weights as numbers that a product of very many rows takes as they are, where widening them for each tile of
// columns again would cost more than reading them once more: row-major, one thread for 32 of a row.
//
//   E4M3       n less its zero point, which e4m3 holds exactly, in the order of w4_prepare.cu; their groups' scales are
//              left to the product
//   16 bits    the same times the group's scale, rounded to bfloat16 or with HALF to float16
//
// The compiler is given E4M3, ZERO and HALF.

constexpr int THREADS = 256;
constexpr int EACH = 32;

struct Widening {
  const uint4* weight;        // [N, K / 32]
  const u16* scale;           // bfloat16 [N, groups]
  const unsigned char* zero;  // ZERO: [N, groups]
  uint4* out;                 // [N, K]
  long long num_parts;        // N * K / 32
  int row_parts;              // K / 32
  int num_groups;
  int group_parts;            // of 32 that share a scale
};

constexpr float MAGIC = 8388608.0f;  // 2^23: with a nibble as its last bits, 2^23 + n

// Two numbers as the product takes them, in the halves of a word: of e4m3, in the low half.
__device__ __forceinline__ u32 round_two(float low, float high) {
#if E4M3
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  u32 pair;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) w4_widen(const __grid_constant__ Widening w) {
  let_next_kernel_start();
  const long long part = (long long)blockIdx.x * THREADS + threadIdx.x;
  uint4 raw = {};
  float scale = 1.0f, zero = 8.0f;
  if (part < w.num_parts) {
    const long long row = part / w.row_parts;
    const long long group = row * w.num_groups + min((int)(part % w.row_parts) / w.group_parts, w.num_groups - 1);
    raw = w.weight[part];
    if (!E4M3) scale = __uint_as_float((u32)w.scale[group] << 16);
#if ZERO
    zero = w.zero[group];
#endif
  }
  wait_for_previous_kernel();  // which may read what lay in `out`
  if (part >= w.num_parts) return;
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
  u32 out[EACH / (E4M3 ? 4 : 2)];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float low = __uint_as_float((words[i] >> (8 * j) & 15) | __float_as_uint(MAGIC)) - (MAGIC + zero);
      const float high = __uint_as_float((words[i] >> (8 * j + 4) & 15) | __float_as_uint(MAGIC)) - (MAGIC + zero);
      pairs[j] = round_two(low * scale, high * scale);
    }
#if E4M3
    out[i] = pairs[0] | pairs[1] << 16;
    out[4 + i] = pairs[2] | pairs[3] << 16;
#else
#pragma unroll
    for (int j = 0; j < 4; j++) out[4 * i + j] = pairs[j];
#endif
  }
  constexpr int WORDS = E4M3 ? 2 : 4;
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    w.out[part * WORDS + i] = {out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]};
}
