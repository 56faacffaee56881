// Owns random calls of decode_attention, together with their memory.
#ifndef JAX_KVCACHE_FFI_TESTS_CUDA_DECODE_ATTENTION_RANDOM_CALL_H_
#define JAX_KVCACHE_FFI_TESTS_CUDA_DECODE_ATTENTION_RANDOM_CALL_H_

#include <cstdint>
#include <vector>

#include "core/decode_attention.h"
#include "tests/owned_tensor.h"

namespace jax_kvcache::decode_attention {

struct RandomCall {
  OwnedTensor args[kNumArgs];
  OwnedTensor rets[kNumRets];
  Call options;  // only its attributes are used

  Call View() {
    Call call = options;
    for (int i = 0; i < kNumArgs; ++i) call.args[i] = args[i].View();
    for (int i = 0; i < kNumRets; ++i) call.rets[i] = rets[i].View();
    return call;
  }
};

struct Sizes {
  std::vector<int64_t> groups;
  std::vector<int64_t> blocks;
  int64_t sequences, queries, q_heads_per_kv_head, num_kv_heads, head_dim, block_rows, table_blocks;
};

template <size_t N>
int64_t OneOf(Random& random, const int64_t (&values)[N]) {
  return values[Below(random, static_cast<int64_t>(N))];
}

inline Sizes RandomSizes(Random& random, int64_t head_dim) {
  Sizes s;
  for (int64_t i = Below(random, 3); i > 0; --i) s.groups.push_back(1 + Below(random, 2));
  for (int64_t i = 1 + Below(random, 2); i > 0; --i) s.blocks.push_back(1 + Below(random, 4));
  s.sequences = 1 + Below(random, 3);
  s.queries = 1 + Below(random, 4);
  s.q_heads_per_kv_head = OneOf(random, {1, 2, 3, 4, 7, 8, 17});
  s.num_kv_heads = 1 + Below(random, 2);
  s.head_dim = head_dim;
  s.block_rows = OneOf(random, {1, 3, 16, 24, 128, 200});
  const int64_t most = 200 / s.block_rows + 1;
  s.table_blocks = Below(random, 4) == 0 ? 1 : 1 + Below(random, most);
  return s;
}

inline std::vector<int64_t> Join(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Fills with values in [low, high) in any float type.
inline void FillUniform(Random& random, OwnedTensor* t, float low, float high) {
  for (size_t i = 0; i < t->Count(); ++i) {
    const float value = Uniform(random, low, high);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    if (t->dtype() == DType::kF32) {
      t->Set(i, value);
    } else if (t->dtype() == DType::kBF16) {
      t->Set(i, static_cast<uint16_t>(bits >> 16));
    } else {  // truncated; smaller ones than the smallest normal float16 become 0
      const int exponent = static_cast<int>(bits >> 23 & 0xFFU) - 112;
      const uint32_t half =
          exponent <= 0 ? 0 : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3FFU);
      t->Set(i, static_cast<uint16_t>(half | (bits >> 16 & 0x8000U)));
    }
  }
}

// A valid call. Some blocks of the table do not exist, and some positions are outside of the table.
// q_size: the size of q's numbers.
inline RandomCall MakeRandomCall(Random& random, const Sizes& s, float q_size) {
  constexpr DType kFloats[] = {DType::kF16, DType::kBF16, DType::kF32};
  const int64_t num_q_heads = s.num_kv_heads * s.q_heads_per_kv_head;
  const auto shared = [&](const std::vector<int64_t>& rest) {
    std::vector<int64_t> dims = s.groups;
    for (int64_t& dim : dims) dim = Below(random, 2) == 1 ? dim : 1;
    return Join(dims, rest);
  };
  RandomCall c;
  const std::vector<int64_t> rows = {s.sequences, s.queries, num_q_heads};
  c.args[kQ].Reset(kFloats[Below(random, 3)], Join(Join(s.groups, rows), {s.head_dim}));
  const std::vector<int64_t> cache = Join(s.blocks, {s.block_rows, s.num_kv_heads, s.head_dim});
  for (const Arg arg : {kKCache, kVCache}) {
    c.args[arg].Reset(DType::kS8, shared(cache));
    for (uint8_t& byte : c.args[arg].bytes()) byte = static_cast<uint8_t>(random());
  }
  c.args[kTable].Reset(DType::kS32, Join(s.groups, {s.sequences, s.table_blocks}));
  c.args[kPositions].Reset(DType::kS32, Join(s.groups, {s.sequences, s.queries}));
  const bool has_offset = Below(random, 2) == 1;
  const bool has_sinks = Below(random, 3) == 0;
  const std::vector<int64_t> heads = {s.num_kv_heads, s.head_dim};
  for (const Arg arg : {kScaleK, kScaleV, kOffsetK, kOffsetV}) {
    const bool absent = !has_offset && (arg == kOffsetK || arg == kOffsetV);
    c.args[arg].Reset(DType::kF32, absent ? std::vector<int64_t>{0} : shared(heads));
  }
  c.args[kSinks].Reset(DType::kF32, has_sinks ? shared({num_q_heads}) : std::vector<int64_t>{0});
  c.options.scale = Uniform(random, 0.05f, 0.2f);
  c.options.window = Below(random, 3) == 0 ? 1 + Below(random, 150) : 0;
  c.options.soft_cap = Below(random, 3) == 0 ? Uniform(random, 1.0f, 30.0f) : 0.0f;
  c.options.return_lse = Below(random, 2) == 1;
  c.rets[kOut].Reset(c.args[kQ].dtype(), Join(Join(s.groups, rows), {s.head_dim}));
  c.rets[kLse].Reset(DType::kF32,
                     c.options.return_lse ? Join(s.groups, rows) : std::vector<int64_t>{0});

  FillUniform(random, &c.args[kQ], -q_size, q_size);
  FillUniform(random, &c.args[kScaleK], 0.002f, 0.02f);
  FillUniform(random, &c.args[kScaleV], 0.002f, 0.02f);
  FillUniform(random, &c.args[kOffsetK], -20, 20);
  FillUniform(random, &c.args[kOffsetV], -20, 20);
  FillUniform(random, &c.args[kSinks], -3, 3);
  int64_t blocks = 1;
  for (const int64_t dim : s.blocks) blocks *= dim;
  for (size_t i = 0; i < c.args[kTable].Count(); ++i) {
    int64_t block = Below(random, blocks);
    if (Below(random, 8) == 0) block = OneOf(random, {-1, blocks, INT32_MAX, INT32_MIN});
    c.args[kTable].Set(i, static_cast<int32_t>(block));
  }
  const int64_t capacity = s.table_blocks * s.block_rows;
  for (size_t i = 0; i < c.args[kPositions].Count(); ++i) {
    int64_t position = Below(random, capacity);
    if (Below(random, 6) == 0) position = OneOf(random, {-1, INT32_MIN, INT32_MAX, capacity, 0});
    c.args[kPositions].Set(i, static_cast<int32_t>(position));
  }
  return c;
}

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_TESTS_CUDA_DECODE_ATTENTION_RANDOM_CALL_H_
