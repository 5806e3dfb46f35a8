// What the kernels of linear layers share: barriers, the way kernels overlap, and what is done with a finished product.
//
// Compiled in front of each of them.

#define STORE 0   // y = product
#define ADD 1     // y = residual + product
#define GATED 2   // y = silu(product of group 0) * product of group 1
#define ROTARY 3  // queries turned into y; keys turned, and values, into the cache

typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr u64 EVICT_FIRST = 0x12F0000000000000ull;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct Arguments {
  const void* bias;      // [N] or null
  const void* residual;  // ADD: [T, N]
  void* y;               // [T, N], GATED [T, N / 2], ROTARY [T, heads * head_size]
  const float* cos;      // ROTARY: [P, head_size / 2]
  const float* sin;
  const long long* positions;  // [T]
  const long long* slots;      // [T], -1 stores nothing
  void* keys;
  void* values;
  long long entry_stride;  // of the cache, in numbers
  long long y_stride;
  long long residual_stride;
  int num_rows;      // T
  int num_outputs;   // N
  int num_inputs;    // K
  int pair;          // distance of the two groups
  int stages;
  int num_heads;     // ROTARY: query heads
  int num_kv_heads;
  float eps;
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}"
      ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ float widen(u16 bits) {
#if HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ u16 narrow(float f) {
  u16 bits;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
  return bits;
}

// The first row of a tile's first group: tiles of 2 x `rows` rows follow one another in blocks of 2 x `pair`.
__device__ __forceinline__ int tile_row(int tile, int rows, int pair) {
  const int tiles_in_block = pair / rows;
  return tile / tiles_in_block * 2 * pair + tile % tiles_in_block * rows;
}

// What an epilogue needs besides the product's two numbers, so that it can be asked for before they are there.
struct Operands {
  u32 first;  // ADD: bits of the residual; ROTARY: of cosine and sine
  u32 second;
  long long slot;
};

// As it lies: what is done with a number waits for it.
__device__ __forceinline__ u32 load_half(const void* numbers, long long index) {
  u32 bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=r"(bits) : "l"((const u16*)numbers + index));
  return bits;
}

// What earlier kernels wrote is read from the L2: waiting for the previous kernel does not make the L1 forget.
__device__ __forceinline__ Operands load_operands(const Arguments& a, int m, int row, long long position, long long slot) {
  Operands operands = {};
#if EPILOGUE == ADD
  const long long index = m * a.residual_stride + row;
  operands.first = load_half(a.residual, index);
  operands.second = load_half(a.residual, index + a.pair);
#elif EPILOGUE == ROTARY
  const long long angle = position * a.pair + row % a.pair;
  operands.first = __float_as_uint(a.cos[angle]);
  operands.second = __float_as_uint(a.sin[angle]);
  operands.slot = slot;
#endif
  return operands;
}

__device__ __forceinline__ Operands load_operands(const Arguments& a, int m, int row) {
#if EPILOGUE == ROTARY
  return load_operands(a, m, row, __ldcg(a.positions + m), __ldcg(a.slots + m));
#else
  return load_operands(a, m, row, 0, 0);
#endif
}

#if EPILOGUE == ROTARY
__device__ __forceinline__ void store_entry(void* cache, long long index, float value) {
#if NARROW
  u16 bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(0.0f), "f"(value));
  ((unsigned char*)cache)[index] = (unsigned char)bits;
#else
  ((u16*)cache)[index] = narrow(value);
#endif
}

__device__ __forceinline__ void store_head_pair(
    const Arguments& a, int m, int row, float first, float second, Operands operands) {
  const int half = a.pair, size = 2 * half, head = row / size, feature = row % size;
  float low = widen(narrow(first)), high = widen(narrow(second));
  if (head < a.num_heads + a.num_kv_heads) {
    const float cosine = __uint_as_float(operands.first), sine = __uint_as_float(operands.second);
    const float turned = low * cosine - high * sine;
    high = high * cosine + low * sine;
    low = turned;
  }
  if (head < a.num_heads) {
    u16* target = (u16*)a.y + m * a.y_stride + row;
    target[0] = narrow(low);
    target[half] = narrow(high);
    return;
  }
  if (operands.slot < 0) return;
  const int kv_head = head - a.num_heads;
  const bool is_key = kv_head < a.num_kv_heads;
  void* cache = is_key ? a.keys : a.values;
  const long long entry = operands.slot * a.entry_stride + (is_key ? kv_head : kv_head - a.num_kv_heads) * size + feature;
  store_entry(cache, entry, widen(narrow(low)));
  store_entry(cache, entry + half, widen(narrow(high)));
}
#endif

__device__ __forceinline__ void store_pair(
    const Arguments& a, int m, int row, float first, float second, Operands operands) {
  if (a.bias) {
    first += widen(((const u16*)a.bias)[row]);
    second += widen(((const u16*)a.bias)[row + a.pair]);
  }
#if EPILOGUE == ROTARY
  store_head_pair(a, m, row, first, second, operands);
#elif EPILOGUE == GATED
  ((u16*)a.y)[m * a.y_stride + row] = narrow(first / (1.0f + __expf(-first)) * second);
#else
  u16* target = (u16*)a.y + m * a.y_stride + row;
#if EPILOGUE == ADD
  first += widen((u16)operands.first);
  second += widen((u16)operands.second);
#endif
  target[0] = narrow(first);
  target[a.pair] = narrow(second);
#endif
}

