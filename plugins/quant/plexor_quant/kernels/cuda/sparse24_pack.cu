// The index of a 2:4 weight in the order in which cuSPARSELt keeps it behind the numbers: [N, K / 8] -> N * K / 8 bytes.
//
// Blocks of 64 rows follow one another, in each of them blocks of 8 groups (32 features), and in these, from the highest
// bits of a nibble's place down:   row / 16 % 4,  row % 8,  group % 4,  group / 4 % 2,  row / 8 % 2.
// So a byte holds the nibbles of one group in rows r and r + 8. A thread takes two blocks of groups of such a pair of rows.

struct PackArguments {
  const unsigned char* index;
  void* packed;
  int num_outputs;  // N, a multiple of 64
  int num_inputs;   // K, a multiple of 64
};

// Nibbles of eight groups of two rows -> eight bytes, groups 0, 4, 1, 5, 2, 6, 3, 7.
__device__ __forceinline__ u64 paired(u32 low, u32 high) {
  u64 bytes = 0;
#pragma unroll
  for (int place = 0; place < 8; place++) {
    const int group = place / 2 + place % 2 * 4;
    const u32 both = (low >> (4 * group) & 15) | (high >> (4 * group) & 15) << 4;
    bytes |= (u64)both << (8 * place);
  }
  return bytes;
}

extern "C" __global__ void __launch_bounds__(256) sparse24_pack(const __grid_constant__ PackArguments a) {
  wait_for_previous_kernel();
  const int columns = a.num_inputs / 64, blocks = a.num_inputs / 32;
  const long long num_pairs = (long long)a.num_outputs / 2 * columns;
  for (long long i = blockIdx.x * 256ll + threadIdx.x; i < num_pairs; i += gridDim.x * 256ll) {
    const int pair = i % 32, column = i / 32 % columns, block = i / 32 / columns;
    const int row = 64 * block + pair / 8 * 16 + pair % 8;
    const uint2 low = ((const uint2*)a.index)[(long long)row * columns + column];
    const uint2 high = ((const uint2*)a.index)[(long long)(row + 8) * columns + column];
    u64* target = (u64*)a.packed + ((long long)block * blocks + 2 * column) * 32 + pair;
    target[0] = paired(low.x, high.x);
    target[32] = paired(low.y, high.y);
  }
}
