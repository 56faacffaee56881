// Owns random calls for the tests: a canonical call together with the memory that it points into.
#ifndef JAX_KVCACHE_FFI_TESTS_RANDOM_CALL_H_
#define JAX_KVCACHE_FFI_TESTS_RANDOM_CALL_H_

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../canonical.h"

namespace jax_kvcache {

// Exactly as many bytes as the array has, from malloc, so that a sanitizer sees every overrun.
class OwnedTensor {
 public:
  void Reset(DType dtype, std::vector<int64_t> dims) {
    dims_ = std::move(dims);
    dtype_ = dtype;
    size_t count = 1;
    for (const int64_t dim : dims_) count *= static_cast<size_t>(dim);
    bytes_.assign(count * ItemSize(), 0);
    bytes_.shrink_to_fit();
  }

  size_t ItemSize() const {
    if (dtype_ == DType::kS8) return 1;
    return dtype_ == DType::kF16 || dtype_ == DType::kBF16 ? 2 : 4;
  }
  size_t Count() const { return bytes_.size() / ItemSize(); }
  DType dtype() const { return dtype_; }
  std::vector<uint8_t>& bytes() { return bytes_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  template <typename T>
  T Get(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void Set(size_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }

  Tensor View() {
    return {bytes_.empty() ? nullptr : bytes_.data(), dims_.data(),
            static_cast<int64_t>(dims_.size()), dtype_};
  }

 private:
  std::vector<int64_t> dims_;
  std::vector<uint8_t> bytes_;
  DType dtype_ = DType::kF32;
};

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
  int64_t tokens, num_q, num_kv, head_dim;
};

using Random =
    std::mt19937;  // its sequence is the same everywhere; the library's distributions are not

inline int64_t Below(Random& random, int64_t bound) {
  return static_cast<int64_t>(random() % static_cast<uint32_t>(bound));
}
inline float Uniform(Random& random, float low, float high) {
  return low + (high - low) * (static_cast<float>(random() >> 8) * 0x1p-24f);
}

// Fills with values that a network has, and now and then with any bits but subnormal float32 and
// bfloat16 ones, which the semantics leaves open.
inline void FillFloats(Random& random, OwnedTensor* t, float low, float high, bool any_bits) {
  for (size_t i = 0; i < t->Count(); ++i) {
    float value = Uniform(random, low, high);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    const bool wild = any_bits && Below(random, 8) == 0;
    if (t->dtype() == DType::kF32) {
      if (wild) bits = random();
      if ((bits & 0x7F800000U) == 0) bits &= 0x80000000U;
      t->Set(i, bits);
    } else if (t->dtype() == DType::kBF16) {
      uint16_t half = static_cast<uint16_t>(wild ? random() : bits >> 16);
      if ((half & 0x7F80U) == 0) half &= 0x8000U;
      t->Set(i, half);
    } else {
      // Any float16 of small exponent; its subnormals count.
      const uint16_t half = static_cast<uint16_t>(random());
      t->Set(i, wild ? half : static_cast<uint16_t>(half & 0xBFFFU));
    }
  }
}

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
  s.num_q = 1 + Below(random, 5);
  s.num_kv = 1 + Below(random, 3);
  s.head_dim = kHeadDims[Below(random, 10)];
  return s;
}

// A valid call. Slots may be anything, duplicates included.
inline RandomCall MakeRandomCall(Random& random, const Sizes& s, bool any_bits) {
  constexpr DType kTables[] = {DType::kF16, DType::kBF16, DType::kF32};
  constexpr DType kBiases[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kS32};
  const DType table = kTables[Below(random, 3)];
  const bool quantized = Below(random, 3) != 0;
  const int64_t hidden = (s.num_q + 2 * s.num_kv) * s.head_dim;
  const auto token = [&](std::vector<int64_t> rest) {
    return Join(Join(s.groups, {s.tokens}), rest);
  };
  const auto parameter = [&](const std::vector<int64_t>& rest) {
    std::vector<int64_t> dims = s.groups;
    for (int64_t& dim : dims) dim = Below(random, 2) ? dim : 1;
    return Join(dims, rest);
  };
  const std::vector<int64_t> heads = {s.num_kv, s.head_dim};
  RandomCall c;
  c.kv_output = Below(random, 2) == 1;
  c.args[kX].Reset(quantized ? DType::kS32 : table, token({hidden}));
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
  const bool activation = quantized && Below(random, 2) == 1;
  const bool bias = quantized && Below(random, 5) != 0;
  c.args[kWeightScale].Reset(DType::kF32,
                             quantized ? parameter({hidden}) : std::vector<int64_t>{0});
  c.args[kActivationScale].Reset(DType::kF32, activation ? token({}) : std::vector<int64_t>{0});
  const DType bias_dtype = bias ? kBiases[Below(random, 4)] : DType::kF32;
  c.args[kBias].Reset(bias_dtype, bias ? parameter({hidden}) : std::vector<int64_t>{0});
  c.rets[kQOut].Reset(table, {per_head * s.num_q});
  for (const Ret ret : {kKOut, kVOut}) {
    c.rets[ret].Reset(table, {c.kv_output ? per_head * s.num_kv : 0});
  }

  if (quantized) {
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
    const bool wild = any_bits && Below(random, 16) == 0;
    c.args[kSlots].Set(i, wild ? static_cast<int32_t>(random()) : static_cast<int32_t>(near));
  }
  return c;
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_RANDOM_CALL_H_
