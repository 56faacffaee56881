// Owns random calls of dequant_rope_quant_kvcache, together with their memory, and the comparison
// of their results.
#ifndef JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_RANDOM_CALL_H_
#define JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_RANDOM_CALL_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/dequant_rope_quant_kvcache.h"
#include "tests/check.h"
#include "tests/owned_tensor.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

struct RandomCall {
  OwnedTensor args[kNumArgs];
  OwnedTensor rets[kQOut + 3];
  bool kv_output = false;

  Call View() {
    Call call;
    for (int i = 0; i < kNumArgs; ++i) call.args[i] = args[i].View();
    for (int i = 0; i < 3; ++i) call.rets[i] = rets[i].View();
    call.rets[kKCacheOut] = call.args[kKCache];
    call.rets[kVCacheOut] = call.args[kVCache];
    call.kv_output = kv_output;
    return call;
  }
};

struct Sizes {
  std::vector<int64_t> groups;
  std::vector<int64_t> rows;
  int64_t tokens, num_q_heads, num_kv_heads, head_dim;
};

inline std::vector<int64_t> Join(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline Sizes RandomSizes(Random& random) {
  constexpr int64_t kHeadDims[] = {2, 6, 16, 34, 40, 64, 80, 96, 128, 130};
  Sizes s;
  for (int64_t i = Below(random, 3); i > 0; --i) s.groups.push_back(1 + Below(random, 3));
  for (int64_t i = 1 + Below(random, 3); i > 0; --i) s.rows.push_back(1 + Below(random, 5));
  s.tokens = 1 + Below(random, 6);
  s.num_q_heads = 1 + Below(random, 5);
  s.num_kv_heads = 1 + Below(random, 3);
  s.head_dim = kHeadDims[Below(random, 10)];
  return s;
}

// A valid call. Its slots are random: rows may occur twice, and some are out of range.
inline RandomCall MakeRandomCall(Random& random, const Sizes& s, bool any_bits) {
  constexpr DType kTables[] = {DType::kF16, DType::kBF16, DType::kF32};
  constexpr DType kBiases[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kS32};
  const DType table = kTables[Below(random, 3)];
  const bool x_is_accumulator = Below(random, 3) != 0;
  const int64_t fused_width = (s.num_q_heads + 2 * s.num_kv_heads) * s.head_dim;
  const auto token = [&](std::vector<int64_t> rest) {
    return Join(Join(s.groups, {s.tokens}), rest);
  };
  const auto parameter = [&](const std::vector<int64_t>& rest) {
    std::vector<int64_t> dims = s.groups;
    for (int64_t& dim : dims) dim = Below(random, 2) ? dim : 1;
    return Join(dims, rest);
  };
  const std::vector<int64_t> heads = {s.num_kv_heads, s.head_dim};
  RandomCall c;
  c.kv_output = Below(random, 2) == 1;
  c.args[kX].Reset(x_is_accumulator ? DType::kS32 : table, token({fused_width}));
  int64_t per_head = s.tokens * s.head_dim;  // elements
  for (const int64_t dim : s.groups) per_head *= dim;
  c.args[kCos].Reset(table, {per_head});
  c.args[kSin].Reset(table, {per_head});
  for (const Arg cache : {kKCache, kVCache}) {
    c.args[cache].Reset(DType::kS8, Join(Join(s.groups, s.rows), heads));
    for (uint8_t& byte : c.args[cache].bytes()) byte = static_cast<uint8_t>(random());
  }
  c.args[kSlots].Reset(DType::kS32, token({}));
  const bool offset = Below(random, 2) == 1;
  for (const Arg arg : {kScaleK, kScaleV, kOffsetK, kOffsetV}) {
    const bool absent = !offset && (arg == kOffsetK || arg == kOffsetV);
    c.args[arg].Reset(DType::kF32, absent ? std::vector<int64_t>{0} : parameter(heads));
  }
  const bool activation = x_is_accumulator && Below(random, 2) == 1;
  const bool bias = x_is_accumulator && Below(random, 5) != 0;
  c.args[kWeightScale].Reset(DType::kF32,
                             x_is_accumulator ? parameter({fused_width}) : std::vector<int64_t>{0});
  c.args[kActivationScale].Reset(DType::kF32, activation ? token({}) : std::vector<int64_t>{0});
  const DType bias_dtype = bias ? kBiases[Below(random, 4)] : DType::kF32;
  c.args[kBias].Reset(bias_dtype, bias ? parameter({fused_width}) : std::vector<int64_t>{0});
  c.rets[kQOut].Reset(table, {per_head * s.num_q_heads});
  for (const Ret ret : {kKOut, kVOut}) {
    c.rets[ret].Reset(table, {c.kv_output ? per_head * s.num_kv_heads : 0});
  }

  if (x_is_accumulator) {
    for (size_t i = 0; i < c.args[kX].Count(); ++i) {
      const int32_t value = static_cast<int32_t>(random());
      c.args[kX].Set(i, any_bits && Below(random, 8) == 0 ? value : value >> 15);
    }
  } else {
    FillFloats(random, &c.args[kX], -4, 4, any_bits);
  }
  FillFloats(random, &c.args[kCos], -1, 1, any_bits);
  FillFloats(random, &c.args[kSin], -1, 1, any_bits);
  FillFloats(random, &c.args[kScaleK], 0.01f, 0.1f, any_bits);
  FillFloats(random, &c.args[kScaleV], 0.01f, 0.1f, any_bits);
  FillFloats(random, &c.args[kOffsetK], -10, 10, any_bits);
  FillFloats(random, &c.args[kOffsetV], -10, 10, any_bits);
  FillFloats(random, &c.args[kWeightScale], 1e-5f, 1e-4f, any_bits);
  FillFloats(random, &c.args[kActivationScale], 0.5f, 2, any_bits);
  if (c.args[kBias].dtype() == DType::kS32) {
    for (size_t i = 0; i < c.args[kBias].Count(); ++i) {
      c.args[kBias].Set(i, static_cast<int32_t>(random()));
    }
  } else {
    FillFloats(random, &c.args[kBias], -1, 1, any_bits);
  }
  int64_t rows = 1;
  for (const int64_t dim : s.rows) rows *= dim;
  for (size_t i = 0; i < c.args[kSlots].Count(); ++i) {
    const int64_t near = Below(random, rows + 4) - 2;
    const bool use_random_bits = any_bits && Below(random, 16) == 0;
    c.args[kSlots].Set(
        i, use_random_bits ? static_cast<int32_t>(random()) : static_cast<int32_t>(near));
  }
  return c;
}

// Calls visit(name, tensor) for the results q, k, v and the two caches.
template <typename Visit>
void VisitResults(const RandomCall& call, const Visit& visit) {
  for (const Ret ret : {kQOut, kKOut, kVOut}) visit(kRetNames[ret], call.rets[ret]);
  for (const Arg arg : {kKCache, kVCache}) visit(kArgNames[arg], call.args[arg]);
}

inline uint64_t HashResults(const RandomCall& call) {
  uint64_t hash = kEmptyHash;
  VisitResults(call, [&](const char*, const OwnedTensor& t) { hash = Hash(t, hash); });
  return hash;
}

inline void CheckSameResults(const RandomCall& got, const RandomCall& expected,
                             const std::string& where) {
  std::vector<const OwnedTensor*> tensors;
  VisitResults(expected, [&](const char*, const OwnedTensor& t) { tensors.push_back(&t); });
  size_t i = 0;
  VisitResults(got, [&](const char* name, const OwnedTensor& t) {
    CheckSame(t, *tensors[i++], where + ": " + name);
  });
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_RANDOM_CALL_H_
