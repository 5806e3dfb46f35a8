// A 2:4 weight with its zeros put back, bit for bit: kept [N, K / 2] and index [N, K / 8] -> [N, K].
//
// A thread makes sixteen numbers of a row: four groups, whose nibbles are two bytes of the index.
//
// The compiler is given SIZE, the bytes of a number: 1 or 2.

struct WidenArguments {
  const void* kept;
  const u16* index;
  void* dense;
  long long num_pieces;  // N * K / 16
};

__device__ __forceinline__ u64 widen_group(u32 pair, u32 nibble) {
  const int width = 8 * SIZE, first = nibble & 3, second = nibble >> 2;
  const u64 low = pair & ((1u << width) - 1), high = pair >> width;
  return low << (width * first) | high << (width * second);
}

extern "C" __global__ void __launch_bounds__(256) sparse24_widen(const __grid_constant__ WidenArguments a) {
  wait_for_previous_kernel();
#pragma unroll 4
  for (long long piece = blockIdx.x * 256ll + threadIdx.x; piece < a.num_pieces; piece += gridDim.x * 256ll) {
    const u32 nibbles = a.index[piece];
#if SIZE == 2
    const uint4 kept = ((const uint4*)a.kept)[piece];
    ulonglong2* dense = (ulonglong2*)a.dense + 2 * piece;
    dense[0] = make_ulonglong2(widen_group(kept.x, nibbles & 15), widen_group(kept.y, nibbles >> 4 & 15));
    dense[1] = make_ulonglong2(widen_group(kept.z, nibbles >> 8 & 15), widen_group(kept.w, nibbles >> 12));
#else
    const uint2 kept = ((const uint2*)a.kept)[piece];
    const u64 first = widen_group(kept.x & 0xFFFF, nibbles & 15) | widen_group(kept.x >> 16, nibbles >> 4 & 15) << 32;
    const u64 last = widen_group(kept.y & 0xFFFF, nibbles >> 8 & 15) | widen_group(kept.y >> 16, nibbles >> 12) << 32;
    ((ulonglong2*)a.dense)[piece] = make_ulonglong2(first, last);
#endif
  }
}
