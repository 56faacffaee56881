// Owns random calls of decode_attention, together with their memory.
#ifndef JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_RANDOM_CALL_H_
#define JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_RANDOM_CALL_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/decode_attention.h"
#include "standin/narrow_floats.h"
#include "tests/check.h"
#include "tests/owned_tensor.h"

namespace jax_kvcache::decode_attention {

struct RandomCall {
  OwnedTensor args[kNumArgs];
  OwnedTensor rets[kNumRets];
  float scale = 1.0f;
  int64_t window = 0;
  float soft_cap = 0.0f;
  bool return_lse = false;

  Call View() {
    Call call;
    for (int i = 0; i < kNumArgs; ++i) call.args[i] = args[i].View();
    for (int i = 0; i < kNumRets; ++i) call.rets[i] = rets[i].View();
    call.scale = scale;
    call.window = window;
    call.soft_cap = soft_cap;
    call.return_lse = return_lse;
    return call;
  }
};

// The shape of a valid call.
inline Shape ShapeOf(RandomCall* call) {
  Shape shape;
  const std::string error = Validate(call->View(), &shape);
  Check(error.empty(), error);
  return shape;
}

struct Sizes {
  std::vector<int64_t> groups;
  int64_t sequences, queries, num_q_heads, num_kv_heads, head_dim;
  std::vector<int64_t> blocks;
  int64_t block_rows, table_blocks;
};

struct Options {
  DType dtype = DType::kF32;
  bool offset = false;
  bool sinks = false;
  bool return_lse = false;
  int64_t window = 0;
  float soft_cap = 0;
  float q_factor = 1;  // q's numbers, which are below 2, are multiplied by it
  float outlier = 1;   // and one in each query head by this
  // Any 32 bits in the table and the positions, and any bits in the floating point operands.
  bool hostile = false;
};

// What RandomSizes chooses from.
struct SizeChoices {
  std::vector<int64_t> head_dims = {1, 3, 7, 8, 12, 16, 17, 31, 33, 64, 80, 96, 128, 144};
  std::vector<int64_t> queries = {1, 1, 1, 2, 3, 5, 9, 40};
  std::vector<int64_t> q_heads_per_kv_head = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  std::vector<int64_t> block_rows = {1, 2, 16, 33, 128, 600};
  int64_t rows = 300;  // of a sequence, where its blocks are smaller
};

inline int64_t OneOf(Random& random, const std::vector<int64_t>& values) {
  return values[static_cast<size_t>(Below(random, static_cast<int64_t>(values.size())))];
}

inline Sizes RandomSizes(Random& random, const SizeChoices& choices = SizeChoices()) {
  Sizes s;
  for (int64_t i = Below(random, 3); i > 0; --i) s.groups.push_back(1 + Below(random, 2));
  s.sequences = 1 + Below(random, 3);
  s.queries = OneOf(random, choices.queries);
  s.num_kv_heads = 1 + Below(random, 3);
  s.num_q_heads = s.num_kv_heads * OneOf(random, choices.q_heads_per_kv_head);
  s.head_dim = OneOf(random, choices.head_dims);
  s.block_rows = OneOf(random, choices.block_rows);
  s.table_blocks = 1;
  if (Below(random, 8) != 0) s.table_blocks += Below(random, 1 + choices.rows / s.block_rows);
  if (Below(random, 3) == 0) s.blocks.push_back(2);
  s.blocks.push_back(1 + Below(random, 1 + s.table_blocks * s.sequences));
  return s;
}

// `rows`: of a sequence.
inline Options RandomOptions(Random& random, int64_t rows) {
  constexpr DType kDTypes[] = {DType::kF32, DType::kF32, DType::kBF16, DType::kF16};
  Options o;
  o.dtype = kDTypes[Below(random, 4)];
  o.offset = Below(random, 2) == 0;
  o.sinks = Below(random, 3) == 0;
  o.return_lse = Below(random, 2) == 0;
  if (Below(random, 3) == 0) o.window = 1 + Below(random, rows + 2);
  if (Below(random, 3) == 0) o.soft_cap = Uniform(random, 1, 50);
  return o;
}

// Multiplies a number and rounds it to its type.
inline void Multiply(OwnedTensor* t, size_t i, float factor) {
  if (t->dtype() == DType::kF32) {
    t->Set(i, t->Get<float>(i) * factor);
  } else if (t->dtype() == DType::kBF16) {
    t->Set(i, standin::ToBfloat(standin::BfloatToFloat(t->Get<uint16_t>(i)) * factor));
  } else {
    t->Set(i, standin::ToHalf(standin::HalfToFloat(t->Get<uint16_t>(i)) * factor));
  }
}

// A valid call. Some of the table's blocks do not exist, some positions see nothing or more rows
// than there are.
inline RandomCall MakeRandomCall(Random& random, const Sizes& s, const Options& o) {
  const auto join = [](std::vector<int64_t> a, const std::vector<int64_t>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  const auto all = [&](const std::vector<int64_t>& rest) { return join(s.groups, rest); };
  const auto shared = [&](const std::vector<int64_t>& rest) {
    std::vector<int64_t> dims = s.groups;
    for (int64_t& dim : dims) dim = Below(random, 2) == 0 ? 1 : dim;
    return join(dims, rest);
  };
  const std::vector<int64_t> absent = {0};
  const std::vector<int64_t> per_channel = {s.num_kv_heads, s.head_dim};
  RandomCall c;
  c.scale = Uniform(random, 0.05f, 0.2f) * (s.head_dim < 16 ? 3.0f : 1.0f);
  c.window = o.window;
  c.soft_cap = o.soft_cap;
  c.return_lse = o.return_lse;
  c.args[kQ].Reset(o.dtype, all({s.sequences, s.queries, s.num_q_heads, s.head_dim}));
  FillFloats(random, &c.args[kQ], -2, 2, o.hostile);
  for (size_t i = 0; o.q_factor != 1 && i < c.args[kQ].Count(); ++i) {
    Multiply(&c.args[kQ], i, o.q_factor);
  }
  for (size_t i = 0; o.outlier != 1 && i < c.args[kQ].Count();
       i += static_cast<size_t>(s.head_dim)) {
    Multiply(&c.args[kQ], i + static_cast<size_t>(Below(random, s.head_dim)), o.outlier);
  }
  for (const Arg arg : {kKCache, kVCache}) {
    c.args[arg].Reset(DType::kS8,
                      shared(join(s.blocks, {s.block_rows, s.num_kv_heads, s.head_dim})));
    for (uint8_t& byte : c.args[arg].bytes()) byte = static_cast<uint8_t>(random() >> 8);
  }
  int64_t blocks = 1;
  for (const int64_t n : s.blocks) blocks *= n;
  c.args[kTable].Reset(DType::kS32, all({s.sequences, s.table_blocks}));
  for (size_t i = 0; i < c.args[kTable].Count(); ++i) {
    const bool any = o.hostile && Below(random, 4) == 0;
    int64_t block = Below(random, blocks);
    if (Below(random, 8) == 0) block = OneOf(random, {-1, blocks, INT32_MAX, INT32_MIN});
    c.args[kTable].Set(i, static_cast<int32_t>(any ? random() : block));
  }
  const int64_t rows = s.table_blocks * s.block_rows;
  c.args[kPositions].Reset(DType::kS32, all({s.sequences, s.queries}));
  for (size_t i = 0; i < c.args[kPositions].Count(); ++i) {
    const bool any = o.hostile && Below(random, 4) == 0;
    int64_t position = Below(random, rows);
    if (Below(random, 6) == 0) position = OneOf(random, {-1, 0, rows, INT32_MAX, INT32_MIN});
    c.args[kPositions].Set(i, static_cast<int32_t>(any ? random() : position));
  }
  for (const Arg arg : {kScaleK, kScaleV}) {
    c.args[arg].Reset(DType::kF32, shared(per_channel));
    FillFloats(random, &c.args[arg], 1.0f / 64, 1.0f / 32, o.hostile);
  }
  for (const Arg arg : {kOffsetK, kOffsetV}) {
    c.args[arg].Reset(DType::kF32, o.offset ? shared(per_channel) : absent);
    FillFloats(random, &c.args[arg], -100, 100, o.hostile);
  }
  c.args[kSinks].Reset(DType::kF32, o.sinks ? shared({s.num_q_heads}) : absent);
  FillFloats(random, &c.args[kSinks], -4, 4, o.hostile);
  c.rets[kOut].Reset(o.dtype, all({s.sequences, s.queries, s.num_q_heads, s.head_dim}));
  c.rets[kLse].Reset(DType::kF32,
                     o.return_lse ? all({s.sequences, s.queries, s.num_q_heads}) : absent);
  return c;
}

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_RANDOM_CALL_H_
