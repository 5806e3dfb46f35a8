// What w4_linear.cu reads of x: normed or not, rounded to e4m3 with a scale for each row or not, features reordered.
//
// One block for each row of x, which it holds in registers. Of 32 features the lane that widens a word of eight nibbles
// has adjacent ones, while wgmma hands its registers' numbers to other places of k:
//
//   e4m3         place 16 h + 4 t + i             holds feature 8 t + 4 h + i
//   16 bits      place 16 j + 8 h + 2 t + e       holds feature 8 t + 2 j + h + 4 e
//
// The compiler is given: THREADS, CHUNKS (eight features each that a thread takes), NORM, E4M3, HALF, and UNIT:
// features whose sum is wanted, or 0.

struct Row {
  const void* x;     // [T, K]
  const void* gain;  // NORM: [K]
  void* out;         // [T, K]: e4m3, or x's type
  float* scale;      // E4M3: [T]
  float* sums;       // UNIT: [units, sum_stride]
  long long x_stride;
  int num_inputs;
  int num_units;
  int sum_stride;
  float eps;
};

constexpr float LARGEST = 448.0f;
constexpr float SMALLEST_SCALE = 1.17549435e-38f;

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

// The larger magnitudes of two pairs of numbers of x's type; the first has no signs.
__device__ __forceinline__ u32 larger_two(u32 largest, u32 pair) {
#if HALF
  asm("max.f16x2 %0, %0, %1;" : "+r"(largest) : "r"(pair & 0x7FFF7FFF));
#else
  asm("max.bf16x2 %0, %0, %1;" : "+r"(largest) : "r"(pair & 0x7FFF7FFF));
#endif
  return largest;
}

// As a division, but for the last bit of few quotients.
__device__ __forceinline__ float divide(float value, float divisor, float inverse) {
  const float quotient = value * inverse;
  return fmaf(fmaf(-quotient, divisor, value), inverse, quotient);
}

// Of all threads of the block, with the sum or the maximum of two.
template <bool LARGER>
__device__ __forceinline__ float reduce(float value, float* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(~0u, value, distance);
    value = LARGER ? fmaxf(value, other) : value + other;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = shared[0];
  for (int warp = 1; warp < THREADS / 32; warp++) total = LARGER ? fmaxf(total, shared[warp]) : total + shared[warp];
  return total;
}

__device__ __forceinline__ u32 round_two(float low, float high) {
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

__device__ __forceinline__ float sum_two(u32 codes) {
  u32 halves;
  float low, high;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)codes));
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  return low + high;
}

extern "C" __global__ void __launch_bounds__(THREADS) w4_prepare(const __grid_constant__ Row r) {
  __shared__ float shared[2][THREADS / 32];
  uint4 raw[CHUNKS];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u16* x = (const u16*)r.x + blockIdx.x * r.x_stride;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int feature = (c * THREADS + threadIdx.x) * 8;
    raw[c] = feature < r.num_inputs ? __ldcg((const uint4*)(x + feature)) : uint4{};
  }
#if NORM
  uint4 gains[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int feature = (c * THREADS + threadIdx.x) * 8;
    gains[c] = feature < r.num_inputs ? *(const uint4*)((const u16*)r.gain + feature) : uint4{};
  }
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    float values[8];
    widen_eight(values, raw[c]);
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(values[i], values[i], squares);
  }
  const float inverse_norm = rsqrtf(reduce<false>(squares, shared[0]) / r.num_inputs + r.eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    float values[8], gain[8];
    widen_eight(values, raw[c]);
    widen_eight(gain, gains[c]);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = widen(narrow(values[i] * inverse_norm)) * gain[i];
    raw[c] = {narrow_two(values[0], values[1]), narrow_two(values[2], values[3]), narrow_two(values[4], values[5]),
              narrow_two(values[6], values[7])};
  }
#endif
#if E4M3
  u32 largest = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    largest = larger_two(larger_two(larger_two(larger_two(largest, raw[c].x), raw[c].y), raw[c].z), raw[c].w);
  const float magnitude = reduce<true>(fmaxf(widen((u16)largest), widen((u16)(largest >> 16))), shared[1]);
  const float scale = fmaxf(magnitude * (1.0f / LARGEST), SMALLEST_SCALE);  // as torch divides by a number on the host
  const float inverse = __fdiv_rn(1.0f, scale);
  if (threadIdx.x == 0) r.scale[blockIdx.x] = scale;
#endif
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int feature = (c * THREADS + threadIdx.x) * 8, place = feature / 32 * 32, t = feature / 8 % 4;
    const long long start = (long long)blockIdx.x * r.num_inputs + place;
    float values[8], sum = 0.0f;
    widen_eight(values, raw[c]);
#if E4M3
    u32 codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      codes[i] = round_two(divide(values[2 * i], scale, inverse), divide(values[2 * i + 1], scale, inverse));
      if (UNIT) sum += sum_two(codes[i]);
    }
    if (feature < r.num_inputs) {
      u32* out = (u32*)((char*)r.out + start) + t;
      out[0] = codes[0] | codes[1] << 16;
      out[4] = codes[2] | codes[3] << 16;
    }
#else
#pragma unroll
    for (int i = 0; i < 8; i++) sum += values[i];
    if (feature < r.num_inputs) {
      u32* out = (u32*)((u16*)r.out + start) + t;
#pragma unroll
      for (int i = 0; i < 4; i++) out[4 * i] = narrow_two(values[i], values[i + 4]);
    }
#endif
#if UNIT
#pragma unroll
    for (int distance = UNIT / 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const int unit = feature / UNIT;
    if (feature % UNIT == 0 && unit < r.num_units) r.sums[(long long)unit * r.sum_stride + blockIdx.x] = sum;
#endif
  }
}
