// Owns the test of one instruction set's conversions and codes: all 16-bit inputs, and float32
// inputs around every rounding boundary, with and without flushing of subnormals. It is compiled
// once per instruction set.
#include "cpu/simd.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/simd_level.h"
#include "standin/narrow_floats.h"
#include "tests/check.h"

namespace jax_kvcache {
namespace {

// XLA's threads flush float32 subnormals. That must not change float16 results.
void SetFlush(bool on) {
#if defined(__x86_64__)
  _mm_setcsr(on ? _mm_getcsr() | 0x8040U : _mm_getcsr() & ~0x8040U);
#elif defined(__aarch64__)
  uint64_t fpcr = 0;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr));
  fpcr = on ? fpcr | (1ULL << 24) : fpcr & ~(1ULL << 24);
  asm volatile("msr fpcr, %0" : : "r"(fpcr));
#endif
}

template <int N, typename T>
void Convert(const float* from, T* to) {
  Store<N>(Load<N>(from), to);
}

// Calls visit(values) for blocks of float32 values: every sign, exponent and pattern of the upper
// mantissa bits, with lower bits around each rounding boundary of float16 and bfloat16.
template <typename Visit>
void ForFloats(const Visit& visit) {
  constexpr uint32_t kLow[] = {0,      1,      0x0FFF, 0x1000, 0x1001,
                               0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
  std::vector<float> block;
  for (uint32_t high = 0; high < 0x10000; ++high) {
    if ((high & 0x7F80) == 0 && (high & 0x7F) != 0) continue;  // subnormal float32
    for (const uint32_t low : kLow) {
      if ((high & 0x7F80) == 0 && low != 0) continue;
      block.push_back(standin::FloatFromBits(high << 16 | low));
    }
    if (block.size() >= 4096 || high == 0xFFFF) {
      while (block.size() % kLanes != 0) block.push_back(1.0f);
      visit(block);
      block.clear();
    }
  }
}

template <int N>
void TestWidth(bool flush) {
  const std::string where = std::to_string(N) + " lanes" + (flush ? ", flushing" : "");
  for (uint32_t first = 0; first < 0x10000; first += N) {
    Half halves[N];
    BFloat bfloats[N];
    float from_half[N];
    float from_bfloat[N];
    for (int i = 0; i < N; ++i) {
      halves[i].bits = static_cast<uint16_t>(first + static_cast<uint32_t>(i));
      bfloats[i].bits = halves[i].bits;
    }
    SetFlush(flush);
    Store<N>(Load<N>(halves), from_half);
    Store<N>(Load<N>(bfloats), from_bfloat);
    SetFlush(false);
    for (int i = 0; i < N; ++i) {
      const float half = standin::HalfToFloat(halves[i].bits);
      const float bfloat = standin::BfloatToFloat(bfloats[i].bits);
      Check(std::isnan(half) ? std::isnan(from_half[i]) : std::memcmp(&half, &from_half[i], 4) == 0,
            where + ": from float16 " + std::to_string(halves[i].bits));
      Check(std::isnan(bfloat) ? std::isnan(from_bfloat[i])
                               : std::memcmp(&bfloat, &from_bfloat[i], 4) == 0,
            where + ": from bfloat16 " + std::to_string(bfloats[i].bits));
    }
  }
  ForFloats([&](const std::vector<float>& values) {
    const size_t n = values.size();
    std::vector<Half> halves(n);
    std::vector<BFloat> bfloats(n);
    std::vector<int8_t> codes(n);
    SetFlush(flush);
    for (size_t i = 0; i < n; i += N) {
      Convert<N>(&values[i], &halves[i]);
      Convert<N>(&values[i], &bfloats[i]);
      StoreCodes<N>(Load<N>(&values[i]), &codes[i]);
    }
    SetFlush(false);
    for (size_t i = 0; i < n; ++i) {
      const float v = values[i];
      const std::string at = where + ": of " + std::to_string(v) + ": ";
      const bool nan = std::isnan(v);
      Check(nan ? std::isnan(standin::HalfToFloat(halves[i].bits))
                : halves[i].bits == standin::ToHalf(v),
            at + "float16");
      Check(nan ? std::isnan(standin::BfloatToFloat(bfloats[i].bits))
                : bfloats[i].bits == standin::ToBfloat(v),
            at + "bfloat16");
      const float code = nan ? 0 : std::min(std::max(std::nearbyint(v), -128.0f), 127.0f);
      Check(static_cast<float>(codes[i]) == code, at + "code " + std::to_string(codes[i]));
    }
  });
  // Codes of values halfway between two integers, and of their neighbours.
  for (int twice = -300; twice <= 300; ++twice) {
    for (const int64_t ulps : {-1, 0, 1}) {
      const float tie = static_cast<float>(twice) / 2;
      const float v = ulps == 0 ? tie : std::nextafter(tie, ulps < 0 ? -1e9f : 1e9f);
      int8_t codes[N];
      StoreCodes<N>(Floats<N>{} + v, codes);
      const float code = std::min(std::max(std::nearbyint(v), -128.0f), 127.0f);
      for (const int8_t got : codes) Check(static_cast<float>(got) == code, where + ": a tie");
    }
  }
}

}  // namespace
}  // namespace jax_kvcache

int main() {
#if defined(__AVX512BF16__)
  if (!jax_kvcache::SimdSupported(jax_kvcache::Simd::kAvx512Bf16)) return 77;  // ctest: skipped
#elif defined(__AVX512F__)
  if (!jax_kvcache::SimdSupported(jax_kvcache::Simd::kAvx512)) return 77;
#elif defined(__AVX2__)
  if (!jax_kvcache::SimdSupported(jax_kvcache::Simd::kAvx2)) return 77;
#endif
  for (const bool flush : {false, true}) {
    jax_kvcache::TestWidth<jax_kvcache::kLanes>(flush);
    jax_kvcache::TestWidth<1>(flush);
  }
  std::printf("%d lanes: conversions and codes agree\n", jax_kvcache::kLanes);
  return 0;
}
