// The product of 17 rows and more on the tensor cores: y[T, N] = epilogue(x[T, K] W[N, K]^T).
//
//   device memory    W, row-major                          x, row-major
//        |  weight thread: bulk tensor copies a stage,        |  activation thread: the same, but only after the
//        v  never waits for the previous kernel               v  previous kernel has ended
//   shared memory    ring of stages {x tile TOKENS x 128 bytes, weight tile OUTPUTS x 128 bytes}, as wgmma reads them
//        |  two warpgroups: wgmma with x as the A operand; of 64 tokens each takes half of the weight rows, else each
//        v  takes half of the tokens
//   registers        sums -> (SPLIT > 1: sent to the block that adds them up) -> epilogue
//
// Weight rows are wgmma's columns, so that a tile may have any multiple of 32 of them and a layer be cut evenly among the
// multiprocessors. They lie in shared memory eight and eight by turns, PAIR rows apart, so that both numbers that an
// epilogue combines end in one thread.
//
// A cluster is SPLIT teams of SHARE blocks. The blocks of a team multiply different weight rows with the same part of x:
// each copies a slice of it to all of them, and a stage is free when the consumers of the whole team have read it. The
// teams take a part of k each, and each finishes a part of the tile.
//
// The compiler is given: THREADS (320, or 384 where those who multiply need more registers than an even share), TOKENS
// (64, 128, 256), X_ROWS (of them that are copied), OUTPUTS, PIECE (weight rows of a copy), SPLIT, SHARE, QUADS (whether lanes trade
// numbers so that each stores sixteen bytes), SUM (the type of a sum), MULTIPLY(sums, a, b, adds) (64 tokens and COLUMNS weight rows over 32 bytes of
// k), SCALED, HALF, EPILOGUE and NARROW.

constexpr int CONSUMERS = 256;
constexpr int STRIPES = TOKENS == 256 ? 2 : 1;                // of 64 tokens, in a warpgroup
constexpr int COLUMNS = TOKENS == 64 ? OUTPUTS / 2 : OUTPUTS;  // weight rows of a warpgroup
constexpr int UNITS = COLUMNS / 16;                           // eight weight rows and their eight partners
constexpr int ALL_UNITS = STRIPES * UNITS;
constexpr int OWN_UNITS = (ALL_UNITS + SPLIT - 1) / SPLIT;    // that a team finishes
constexpr int CHUNK = STRIPES == 2 ? 2 : 4;                   // whose operands are asked for at once
constexpr int X_BYTES = TOKENS * 128;
constexpr int WEIGHT_BYTES = OUTPUTS * 128;
constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
constexpr int SLICE = X_ROWS / SHARE;
constexpr int CLUSTER = SPLIT * SHARE;
constexpr int MOST_STAGES = 16;
constexpr int BAND = 8;  // tiles of tokens that are multiplied with the same weights one after the other
constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;

struct Scales {
  const float* tokens;   // [T]
  const float* outputs;  // [N]
};

// Where wgmma finds rows of 128 bytes under the 128-byte swizzle: eight rows are 1024 bytes.
__device__ __forceinline__ u64 operand(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// The weight row of a pair's first number; octet counts pairs in eights.
__device__ __forceinline__ int first_row(int octet, int pair) {
  const int octets = pair / 8;
  return octet / octets * 2 * pair + octet % octets * 8;
}

__device__ __forceinline__ void copy_weight(u32 target, const TensorMap* map, int place, int box, u32 barrier, u64 keep) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;"
      ::"r"(target), "l"(map), "r"(0), "r"(0), "r"(0), "r"(place), "r"(box), "r"(barrier), "l"(keep)
      : "memory");
}

__device__ __forceinline__ void copy_x(u32 target, const TensorMap* map, int box, int token, u32 barrier, u32 team) {
#if SHARE > 1
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(target), "l"(map), "r"(box * 64), "r"(token), "r"(barrier), "h"((u16)team)
      : "memory");
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(target), "l"(map), "r"(box * 64), "r"(token), "r"(barrier)
      : "memory");
#endif
}

// All threads of the cluster come here; what they wrote is not made known, which would wait for all of it to be in memory.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 remote_address(u32 address, int rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// If this thread is the one that speaks for its warpgroup: the stage may be filled again, for all that the team knows of
// us. Without a branch, beside which the compiler would let no product of the next stage run; and not with the cluster's
// scope, which would wait for all that was written to be in memory, while only wgmma has read here, and has ended.
__device__ __forceinline__ void release(u32 barrier, int team_rank, bool speaks) {
#pragma unroll
  for (int i = 0; i < SHARE; i++)
    asm volatile(
        "{\n"
        ".reg .pred speaks;\n"
        ".reg .b32 remote;\n"
        "setp.ne.b32 speaks, %2, 0;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "@speaks mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}"
        ::"r"(barrier), "r"(team_rank + i), "r"((int)speaks)
        : "memory");
}

// Keeps the compiler from reading a sum before wgmma has written it.
__device__ __forceinline__ void settle(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
__device__ __forceinline__ void settle(int& sum) { asm volatile("" : "+r"(sum)::"memory"); }

// Four sums on their way into another block, whose barrier counts their bytes.
__device__ __forceinline__ void send(u32 target, u32 barrier, int rank, const SUM* four) {
  const u32* bits = (const u32*)four;
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(remote_address(target, rank)), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3]),
      "r"(remote_address(barrier, rank))
      : "memory");
}

__device__ __forceinline__ void add_sent(SUM* total, u32 address) {
  u32 bits[4];
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(address)
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; i++) total[i] += *(SUM*)&bits[i];
}

__device__ __forceinline__ float widen_low(u32 two) { return widen((u16)two); }
__device__ __forceinline__ float widen_high(u32 two) { return widen((u16)(two >> 16)); }
__device__ __forceinline__ u32 narrow_two(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }

// What a tile's finish needs to know of a token. What earlier kernels wrote is read from the L2: waiting for the previous
// kernel does not make the L1 forget.
struct Token {
  bool inside;
  float scale;
  long long angle;
  long long slot;
};

// What an epilogue needs of memory for two tokens, two adjacent weight rows and their two partners.
struct Extras {
  float2 scale[2];      // SCALED: of the rows, of their partners
  u32 bias[2];
  u32 residual[2][2];   // ADD: [token][first or second]
  float2 turn[2][2];    // ROTARY: [token][cosine or sine]
};

__device__ __forceinline__ Token load_token(const Arguments& a, const Scales& scales, int m) {
  Token token = {};
  token.inside = m < a.num_rows;
#if SCALED
  token.scale = token.inside ? __ldcg(scales.tokens + m) : 0.0f;
#endif
#if EPILOGUE == ROTARY
  token.angle = token.inside ? __ldcg(a.positions + m) * a.pair : 0;
  token.slot = token.inside ? __ldcg(a.slots + m) : -1;
#endif
  return token;
}

__device__ __forceinline__ Extras load_extras(
    const Arguments& a, const Scales& scales, const Token* tokens, int m, int row) {
  Extras extras = {};
#if SCALED
  extras.scale[0] = *(const float2*)(scales.outputs + row);
  extras.scale[1] = *(const float2*)(scales.outputs + row + a.pair);
#endif
  if (a.bias) {
    extras.bias[0] = *(const u32*)((const u16*)a.bias + row);
    extras.bias[1] = *(const u32*)((const u16*)a.bias + row + a.pair);
  }
#pragma unroll
  for (int t = 0; t < 2; t++) {
    if (!tokens[t].inside) continue;
#if EPILOGUE == ADD && !QUADS
    const u16* residual = (const u16*)a.residual + (m + t * 8) * a.residual_stride + row;
    extras.residual[t][0] = __ldcg((const u32*)residual);
    extras.residual[t][1] = __ldcg((const u32*)(residual + a.pair));
#elif EPILOGUE == ROTARY
    const long long angle = tokens[t].angle + row % a.pair;
    extras.turn[t][0] = *(const float2*)(a.cos + angle);
    extras.turn[t][1] = *(const float2*)(a.sin + angle);
#endif
  }
  return extras;
}

// Adjacent numbers in the dtype of y, two to a word.
template <int WORDS>
__device__ __forceinline__ void put(void* target, const u32* words) {
  if (WORDS == 4)
    *(uint4*)target = make_uint4(words[0], words[1], words[2], words[3]);
  else
    *(u32*)target = words[0];
}

#if EPILOGUE == ROTARY
__device__ __forceinline__ u32 narrow_word(u32 two) {
  u16 bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(widen_high(two)), "f"(widen_low(two)));
  return bits;
}

template <int WORDS>
__device__ __forceinline__ void put_entry(void* cache, long long index, const u32* words) {
#if NARROW
  unsigned char* target = (unsigned char*)cache + index;
  if (WORDS == 4)
    *(uint2*)target = make_uint2(
        narrow_word(words[0]) | narrow_word(words[1]) << 16, narrow_word(words[2]) | narrow_word(words[3]) << 16);
  else
    *(u16*)target = (u16)narrow_word(words[0]);
#else
  put<WORDS>((u16*)cache + index, words);
#endif
}

// Two adjacent features of a head and their partners, turned unless they are values.
__device__ __forceinline__ void turn(const Arguments& a, int row, float* first, float* second, const float2* turn) {
  const bool turns = row / (2 * a.pair) < a.num_heads + a.num_kv_heads;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float low = widen(narrow(first[e])), high = widen(narrow(second[e]));
    const float c = e ? turn[0].y : turn[0].x, s = e ? turn[1].y : turn[1].x;
    first[e] = turns ? low * c - high * s : low;
    second[e] = turns ? high * c + low * s : high;
  }
}

template <int WORDS>
__device__ __forceinline__ void store_heads(
    const Arguments& a, const Token& token, int m, int row, const u32* first, const u32* second) {
  const int half = a.pair, size = 2 * half, head = row / size, feature = row % size;
  if (head < a.num_heads) {
    u16* target = (u16*)a.y + m * a.y_stride + row;
    put<WORDS>(target, first);
    put<WORDS>(target + half, second);
    return;
  }
  if (token.slot < 0) return;
  const int kv_head = head - a.num_heads;
  const bool is_key = kv_head < a.num_kv_heads;
  void* cache = is_key ? a.keys : a.values;
  const long long entry = token.slot * a.entry_stride + (is_key ? kv_head : kv_head - a.num_kv_heads) * size + feature;
  put_entry<WORDS>(cache, entry, first);
  put_entry<WORDS>(cache, entry + half, second);
}
#endif

// sums: as wgmma leaves them, of eight columns and of their partners: {token, token + 8} x {column, column + 1}.
// first, second: what is stored of token t, two columns of each.
__device__ __forceinline__ void finish(
    const Arguments& a, const Token& token, int row, const SUM* sums, int t, const Extras& extras, u32& first, u32& second) {
  float x[2] = {(float)sums[t * 2], (float)sums[t * 2 + 1]};
  float y[2] = {(float)sums[t * 2 + 4], (float)sums[t * 2 + 5]};
#if SCALED
  x[0] *= token.scale * extras.scale[0].x, x[1] *= token.scale * extras.scale[0].y;
  y[0] *= token.scale * extras.scale[1].x, y[1] *= token.scale * extras.scale[1].y;
#endif
  if (a.bias) {
    x[0] += widen_low(extras.bias[0]), x[1] += widen_high(extras.bias[0]);
    y[0] += widen_low(extras.bias[1]), y[1] += widen_high(extras.bias[1]);
  }
#if EPILOGUE == ADD
  x[0] += widen_low(extras.residual[t][0]), x[1] += widen_high(extras.residual[t][0]);
  y[0] += widen_low(extras.residual[t][1]), y[1] += widen_high(extras.residual[t][1]);
#elif EPILOGUE == GATED
#pragma unroll
  for (int e = 0; e < 2; e++) x[e] = x[e] / (1.0f + __expf(-x[e])) * y[e];
#elif EPILOGUE == ROTARY
  turn(a, row, x, y, extras.turn[t]);
#endif
  first = narrow_two(x[0], x[1]);
  second = narrow_two(y[0], y[1]);
}

template <int WORDS>
__device__ __forceinline__ void store(
    const Arguments& a, const Token& token, int m, int row, const u32* first, const u32* second) {
#if EPILOGUE == ROTARY
  store_heads<WORDS>(a, token, m, row, first, second);
#else
  u16* target = (u16*)a.y + m * a.y_stride + row;
  put<WORDS>(target, first);
#if EPILOGUE != GATED
  put<WORDS>(target + a.pair, second);
#endif
#endif
}

__device__ __forceinline__ void store_unit(
    const Arguments& a, const Token* tokens, int m, int row, const SUM* sums, const Extras& extras) {
#pragma unroll
  for (int t = 0; t < 2; t++) {
    u32 first, second;
    finish(a, tokens[t], row, sums, t, extras, first, second);
    if (tokens[t].inside) store<1>(a, tokens[t], m + t * 8, row, &first, &second);
  }
}

#if QUADS
// Lane i of four gives word j to lane j, as its word i.
__device__ __forceinline__ void transpose(u32* words) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 given = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? given : words[i];
    words[i + 1] = odd ? words[i + 1] : given;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 given = __shfl_xor_sync(~0u, high ? words[i] : words[i + 2], 2);
    words[i] = high ? given : words[i];
    words[i + 2] = high ? words[i + 2] : given;
  }
}

// Four units, one of which each of four lanes loads and stores whole, eight numbers and their partners at once.
__device__ __forceinline__ void store_quad(
    const Arguments& a, const Scales& scales, const Token* tokens, int m, int octet, const SUM* sums) {
  const int lane = threadIdx.x % 4, own_row = first_row(octet + lane, a.pair);
  const bool inside = own_row < a.num_outputs;
  Extras extras[4];
  int rows[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    rows[i] = first_row(octet + i, a.pair) + lane * 2;
    if (rows[i] < a.num_outputs) extras[i] = load_extras(a, scales, tokens, m, rows[i]);
  }
#if EPILOGUE == ADD
  u32 residual[2][2][4] = {};
#pragma unroll
  for (int t = 0; t < 2; t++) {
    if (!inside || !tokens[t].inside) continue;
    const u16* place = (const u16*)a.residual + (m + t * 8) * a.residual_stride + own_row;
    *(uint4*)residual[t][0] = __ldcg((const uint4*)place);
    *(uint4*)residual[t][1] = __ldcg((const uint4*)(place + a.pair));
  }
#endif
#pragma unroll
  for (int t = 0; t < 2; t++) {
#if EPILOGUE == ADD
    transpose(residual[t][0]);
    transpose(residual[t][1]);
#pragma unroll
    for (int i = 0; i < 4; i++) extras[i].residual[t][0] = residual[t][0][i], extras[i].residual[t][1] = residual[t][1][i];
#endif
    u32 first[4], second[4];
#pragma unroll
    for (int i = 0; i < 4; i++) finish(a, tokens[t], rows[i], sums + i * 8, t, extras[i], first[i], second[i]);
    transpose(first);
    if (EPILOGUE != GATED) transpose(second);
    if (inside && tokens[t].inside) store<4>(a, tokens[t], m + t * 8, own_row, first, second);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) tiled_linear(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    const __grid_constant__ Arguments a, const __grid_constant__ Scales scales) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ __align__(8) u64 barriers[2 * MOST_STAGES + 1];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // known to be the same in a warp
  const u32 base = shared_address(ring), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  const u32 arrived = empty + 8 * MOST_STAGES;  // the sums that other teams have sent
  const int rank = blockIdx.x % CLUSTER, member = rank % SHARE, part = rank / SHARE, team_rank = part * SHARE;
  const int num_tiles = (a.num_outputs + OUTPUTS - 1) / OUTPUTS, num_teams = (num_tiles + SHARE - 1) / SHARE;
  const int num_bands = (a.num_rows + TOKENS - 1) / TOKENS, num_items = num_teams * num_bands;
  const int num_boxes = a.num_inputs / 64;
  const int first_box = num_boxes * part / SPLIT, end_box = num_boxes * (part + 1) / SPLIT;
  const int first_item = blockIdx.x / CLUSTER, item_step = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; i++) {
      barrier_init(full + 8 * i, 2);
      barrier_init(empty + 8 * i, 2 * SHARE);
    }
    if (SPLIT > 1) barrier_init(arrived, 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
    if (SPLIT > 1)
      barrier_expect(arrived, min(max(ALL_UNITS - part * OWN_UNITS, 0), OWN_UNITS) * (SPLIT - 1) * 32 * CONSUMERS);
  }
  __syncthreads();
  if (CLUSTER > 1) meet_cluster();
  let_next_kernel_start();
  // Items in turn: BAND tiles of tokens with the first weight rows, the same with the next ones, and so on.
  const auto tile_of = [&](int item, int& tile, int& token) {
    const int band = item / (BAND * num_teams), in_band = item % (BAND * num_teams);
    const int width = min(BAND, num_bands - band * BAND);
    tile = in_band / width * SHARE + member;
    token = (band * BAND + in_band % width) * TOKENS;
  };
  if (warp >= CONSUMERS / 32) {
    if (THREADS == 384) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");  // for those who multiply
    int stage = 0;
    u32 phase = 0;
    if (warp == CONSUMERS / 32 && lane == 0) {
      const u64 keep = num_bands > 1 ? EVICT_NORMAL : EVICT_FIRST;
      for (int item = first_item; item < num_items; item += item_step) {
        int tile, token;
        tile_of(item, tile, token);
        const int octet = min(tile, num_tiles - 1) * (OUTPUTS / 16);
        for (int box = first_box; box < end_box; box++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(full + 8 * stage, WEIGHT_BYTES);
          const u32 target = base + stage * STAGE_BYTES + X_BYTES;
#pragma unroll
          for (int piece = 0; piece < OUTPUTS / PIECE; piece++) {
            const int row = first_row(octet + piece * (PIECE / 16), a.pair);
            copy_weight(target + piece * PIECE * 128, &weight_map, row / (a.pair == 8 ? 16 : 8), box, full + 8 * stage, keep);
          }
          if (++stage == a.stages) stage = 0, phase ^= 1;
        }
      }
    }
    if (warp == CONSUMERS / 32 + 1) {
      wait_for_previous_kernel();
      if (lane == 0) {
        asm volatile("fence.proxy.async;" ::: "memory");
        for (int item = first_item; item < num_items; item += item_step) {
          int tile, token;
          tile_of(item, tile, token);
          for (int box = first_box; box < end_box; box++) {
            barrier_wait(empty + 8 * stage, phase ^ 1);
            barrier_expect(full + 8 * stage, X_ROWS * 128);
            const u32 target = base + stage * STAGE_BYTES + member * SLICE * 128;
            copy_x(target, &x_map, box, token + member * SLICE, full + 8 * stage, ((1u << SHARE) - 1) << team_rank);
            if (++stage == a.stages) stage = 0, phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
    if (SHARE > 1) meet_cluster();
    return;
  }
  if (THREADS == 384) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  wait_for_previous_kernel();
  SUM sums[STRIPES * COLUMNS / 2];
  const int group = warp / 4;
  const int left_offset = TOKENS == 64 ? 0 : group * STRIPES * 64 * 128;
  const int right_offset = X_BYTES + (TOKENS == 64 ? group * COLUMNS * 128 : 0);
  const int own_token = (TOKENS == 64 ? 0 : group * STRIPES * 64) + warp % 4 * 16 + lane / 4;
  const int own_octet = TOKENS == 64 ? group * UNITS : 0;
  int ready = 0;  // stage that is multiplied next
  u32 ready_phase = 0;
  const auto multiply_tile = [&] {
    int last_stage = -1;
    for (int box = first_box; box < end_box; box++) {
      barrier_wait(full + 8 * ready, ready_phase);
      const u64 left = operand(base + ready * STAGE_BYTES + left_offset);
      const u64 right = operand(base + ready * STAGE_BYTES + right_offset);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int stripe = 0; stripe < STRIPES; stripe++)
          MULTIPLY((sums + stripe * COLUMNS / 2), left + k * 2 + stripe * 512, right + k * 2, box > first_box || k > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      release(empty + 8 * last_stage, team_rank, threadIdx.x % 128 == 0 && last_stage >= 0);
      last_stage = ready;
      if (++ready == a.stages) ready = 0, ready_phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < STRIPES * COLUMNS / 2; i++) settle(sums[i]);
    release(empty + 8 * last_stage, team_rank, threadIdx.x % 128 == 0);
  };
#if SPLIT == 1
  for (int item = first_item; item < num_items; item += item_step) {
    multiply_tile();
    int tile, tile_token;
    tile_of(item, tile, tile_token);
    if (tile >= num_tiles) continue;
    const int tile_octet = tile * (OUTPUTS / 16) + own_octet;
#pragma unroll
    for (int stripe = 0; stripe < STRIPES; stripe++) {
      const int m = tile_token + own_token + stripe * 64;
      const Token tokens[2] = {load_token(a, scales, m), load_token(a, scales, m + 8)};
#if QUADS
#pragma unroll
      for (int unit = 0; unit < UNITS; unit += 4)
        store_quad(a, scales, tokens, m, tile_octet + unit, sums + stripe * COLUMNS / 2 + unit * 8);
#else
#pragma unroll
      for (int chunk = 0; chunk < UNITS; chunk += CHUNK) {
        Extras extras[CHUNK];
        int rows[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK && chunk + i < UNITS; i++) {
          rows[i] = first_row(tile_octet + chunk + i, a.pair) + lane % 4 * 2;
          if (rows[i] < a.num_outputs) extras[i] = load_extras(a, scales, tokens, m, rows[i]);
        }
#pragma unroll
        for (int i = 0; i < CHUNK && chunk + i < UNITS; i++)
          if (rows[i] < a.num_outputs) store_unit(a, tokens, m, rows[i], sums + stripe * COLUMNS / 2 + (chunk + i) * 8, extras[i]);
      }
#endif
    }
  }
#else
  multiply_tile();
  // Each team keeps the sums that it finishes, and sends the others to those who finish them.
  const u32 exchange = base + a.stages * STAGE_BYTES;
  SUM own[OWN_UNITS * 8];
#pragma unroll
  for (int p = 0; p < SPLIT; p++)
#pragma unroll
    for (int i = 0; i < OWN_UNITS * 2 && p * OWN_UNITS * 2 + i < ALL_UNITS * 2; i++) {
      const SUM* four = sums + (p * OWN_UNITS * 2 + i) * 4;
      if (p == part) {
#pragma unroll
        for (int j = 0; j < 4; j++) own[i * 4 + j] = four[j];
      } else {
        const int place = (part - (part > p)) * OWN_UNITS * 2 + i;
        send(exchange + (place * CONSUMERS + threadIdx.x) * 16, arrived, p * SHARE + member, four);
      }
    }
  int tile, tile_token;
  tile_of(first_item, tile, tile_token);
  const int tile_octet = tile * (OUTPUTS / 16) + own_octet;
#pragma unroll
  for (int chunk = 0; chunk < OWN_UNITS; chunk += CHUNK) {
    Extras extras[CHUNK];
    Token tokens[CHUNK][2];
    bool inside[CHUNK];
    int m[CHUNK], rows[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK && chunk + i < OWN_UNITS; i++) {
      const int unit = part * OWN_UNITS + chunk + i;
      m[i] = tile_token + own_token + unit / UNITS * 64;
      rows[i] = first_row(tile_octet + unit % UNITS, a.pair) + lane % 4 * 2;
      inside[i] = unit < ALL_UNITS && tile < num_tiles && rows[i] < a.num_outputs;
      if (!inside[i]) continue;
      tokens[i][0] = load_token(a, scales, m[i]), tokens[i][1] = load_token(a, scales, m[i] + 8);
    }
#pragma unroll
    for (int i = 0; i < CHUNK && chunk + i < OWN_UNITS; i++)
      if (inside[i]) extras[i] = load_extras(a, scales, tokens[i], m[i], rows[i]);
    if (chunk == 0) barrier_wait(arrived, 0);  // also where nothing is stored: others write here until then
#pragma unroll
    for (int i = 0; i < CHUNK && chunk + i < OWN_UNITS; i++) {
      if (!inside[i]) continue;
#pragma unroll
      for (int j = 0; j < 2 * (SPLIT - 1); j++) {
        const int place = (j / 2 * OWN_UNITS + chunk + i) * 2 + j % 2;
        add_sent(own + (chunk + i) * 8 + j % 2 * 4, exchange + (place * CONSUMERS + threadIdx.x) * 16);
      }
      store_unit(a, tokens[i], m[i], rows[i], own + (chunk + i) * 8, extras[i]);
    }
  }
#endif
  if (SHARE > 1) meet_cluster();  // nobody leaves whose barriers others still use
}
