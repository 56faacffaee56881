// Owns what decode_attention means, one query row at a time in double precision, and how far from
// it a result may be.
#ifndef JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_EXPECTED_H_
#define JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_EXPECTED_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "standin/narrow_floats.h"
#include "tests/check.h"
#include "tests/decode_attention_random_call.h"

namespace jax_kvcache::decode_attention {

inline double ValueOf(const OwnedTensor& t, int64_t i) {
  const auto at = static_cast<size_t>(i);
  if (t.dtype() == DType::kF16) return standin::HalfToFloat(t.Get<uint16_t>(at));
  if (t.dtype() == DType::kBF16) return standin::BfloatToFloat(t.Get<uint16_t>(at));
  return t.Get<float>(at);
}

struct Expected {
  std::vector<double> out;  // as the result
  std::vector<double> lse;  // of all queries, wanted or not
  double greatest_score = 0;
};

class Rendering {
 public:
  Rendering(const RandomCall& call, const Shape& shape) : call_(call), shape_(shape) {}

  Expected Run() {
    const int64_t rows = shape_.groups.count * shape_.sequences * shape_.queries;
    expected_.out.assign(static_cast<size_t>(rows * shape_.num_q_heads * shape_.head_dim), 0.0);
    expected_.lse.assign(static_cast<size_t>(rows * shape_.num_q_heads),
                         -std::numeric_limits<double>::infinity());
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t head = 0; head < shape_.num_q_heads; ++head) Query(row, head);
    }
    return expected_;
  }

 private:
  // Element `channel` of row `cache_row` of a cache, as a real value.
  double Dequantized(bool is_k, int64_t group, int64_t cache_row, int64_t head,
                     int64_t channel) const {
    const int64_t cache = shape_.ParameterBlock(is_k ? kKCache : kVCache, group);
    const int64_t rows = shape_.blocks * shape_.block_rows;
    const int64_t at =
        ((cache * rows + cache_row) * shape_.num_kv_heads + head) * shape_.head_dim + channel;
    double value = call_.args[is_k ? kKCache : kVCache].Get<int8_t>(static_cast<size_t>(at));
    if (shape_.has_offset) {
      value -= Parameter(is_k ? kOffsetK : kOffsetV, group, head, channel);
    }
    return value * Parameter(is_k ? kScaleK : kScaleV, group, head, channel);
  }
  double Parameter(Arg arg, int64_t group, int64_t head, int64_t channel) const {
    const int64_t block = shape_.ParameterBlock(arg, group);
    return ValueOf(call_.args[arg],
                   (block * shape_.num_kv_heads + head) * shape_.head_dim + channel);
  }

  void Query(int64_t row, int64_t head) {
    const int64_t group = row / (shape_.sequences * shape_.queries);
    const int64_t sequence = row / shape_.queries;
    const int64_t kv_head = head / shape_.queries_per_kv_head();
    const int64_t position = call_.args[kPositions].Get<int32_t>(static_cast<size_t>(row));
    const int64_t result = row * shape_.num_q_heads + head;
    std::vector<int64_t> seen;  // rows of the caches
    std::vector<double> scores;
    for (int64_t m = 0; m < shape_.table_blocks; ++m) {
      const int64_t block =
          call_.args[kTable].Get<int32_t>(static_cast<size_t>(sequence * shape_.table_blocks + m));
      if (block < 0 || block >= shape_.blocks) continue;
      for (int64_t i = 0; i < shape_.block_rows; ++i) {
        const int64_t number = m * shape_.block_rows + i;
        if (number > position) break;
        if (shape_.window > 0 && number <= position - shape_.window) continue;
        seen.push_back(block * shape_.block_rows + i);
        double score = 0;
        for (int64_t c = 0; c < shape_.head_dim; ++c) {
          score += ValueOf(call_.args[kQ], result * shape_.head_dim + c) *
                   Dequantized(true, group, seen.back(), kv_head, c);
        }
        score *= static_cast<double>(shape_.scale);
        expected_.greatest_score = std::max(expected_.greatest_score, std::abs(score));
        const double cap = static_cast<double>(shape_.soft_cap);
        scores.push_back(cap == 0 ? score : cap * std::tanh(score / cap));
      }
    }
    if (seen.empty()) return;
    double most = *std::max_element(scores.begin(), scores.end());
    double sink = -std::numeric_limits<double>::infinity();
    if (shape_.has_sinks) {
      sink = ValueOf(call_.args[kSinks],
                     shape_.ParameterBlock(kSinks, group) * shape_.num_q_heads + head);
      most = std::max(most, sink);
    }
    double total = 0;
    for (const double score : scores) total += std::exp(score - most);
    expected_.lse[static_cast<size_t>(result)] = most + std::log(total);
    if (shape_.has_sinks) total += std::exp(sink - most);
    for (int64_t c = 0; c < shape_.head_dim; ++c) {
      double sum = 0;
      for (size_t i = 0; i < seen.size(); ++i) {
        sum += std::exp(scores[i] - most) * Dequantized(false, group, seen[i], kv_head, c);
      }
      expected_.out[static_cast<size_t>(result * shape_.head_dim + c)] = sum / total;
    }
  }

  const RandomCall& call_;
  const Shape& shape_;
  Expected expected_;
};

// The greatest error over the greatest value, in units of what is allowed for float32; a result in
// a narrower type is rounded once more.
inline double CheckNear(const RandomCall& got, const Shape& shape, const Expected& expected,
                        const std::string& where) {
  const double allowed = 1e-5 + 0x1p-22 * expected.greatest_score;
  double greatest = 0;
  for (const double value : expected.out) greatest = std::max(greatest, std::abs(value));
  double error = 0;
  for (size_t i = 0; i < expected.out.size(); ++i) {
    const double value = ValueOf(got.rets[kOut], static_cast<int64_t>(i));
    double slack = allowed * greatest;
    if (shape.q_dtype == DType::kF16) slack += std::abs(expected.out[i]) * 0x1p-11 + 0x1p-25;
    if (shape.q_dtype == DType::kBF16) slack += std::abs(expected.out[i]) * 0x1p-8;
    const double off = std::abs(value - expected.out[i]);
    Check(off <= slack || greatest == 0, where + ": out[" + std::to_string(i) + "]: expected " +
                                             std::to_string(expected.out[i]) + ", got " +
                                             std::to_string(value));
    if (greatest > 0) error = std::max(error, off / greatest);
  }
  for (size_t i = 0; shape.return_lse && i < expected.lse.size(); ++i) {
    const double value = ValueOf(got.rets[kLse], static_cast<int64_t>(i));
    if (value == expected.lse[i]) continue;  // infinities, too
    Check(std::abs(value - expected.lse[i]) <= 2 * allowed + 1e-6 * std::abs(expected.lse[i]),
          where + ": lse[" + std::to_string(i) + "]: expected " + std::to_string(expected.lse[i]) +
              ", got " + std::to_string(value));
  }
  return shape.q_dtype == DType::kF32 ? error / allowed : 0;
}

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_EXPECTED_H_
