// Owns the rendering of decode_attention in float64, one query head after the other, and the error
// that an implementation in float32 may have.
#ifndef JAX_KVCACHE_FFI_TESTS_CUDA_DECODE_ATTENTION_EXPECTED_H_
#define JAX_KVCACHE_FFI_TESTS_CUDA_DECODE_ATTENTION_EXPECTED_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "core/decode_attention.h"
#include "standin/narrow_floats.h"
#include "tests/check.h"

namespace jax_kvcache::decode_attention {

inline double NumberAt(const Tensor& t, int64_t i) {
  if (t.dtype == DType::kF32) return static_cast<const float*>(t.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(t.data)[i];
  return t.dtype == DType::kF16 ? standin::HalfToFloat(bits) : standin::BfloatToFloat(bits);
}

// One query head of one query.
struct Expected {
  std::vector<double> out;  // [D]
  double lse = -INFINITY;
  double largest_score = 0;  // by size, with K's offset and without
  double largest_terms = 0;  // of a score: the sum of the sizes of what is added up for it
  double largest_value = 0;
};

class Rendering {
 public:
  Rendering(const Call& call, const Shape& shape) : c_(call), s_(shape) {}

  // sequence: in [0, G * B).
  Expected Row(int64_t sequence, int64_t query, int64_t q_head) const {
    const int64_t group = sequence / s_.sequences;
    const int64_t head = q_head / (s_.num_q_heads / s_.num_kv_heads);
    const int64_t d = s_.head_dim;
    const int64_t at_q = ((sequence * s_.queries + query) * s_.num_q_heads + q_head) * d;
    const int64_t position =
        static_cast<const int32_t*>(c_.args[kPositions].data)[sequence * s_.queries + query];
    const int64_t first = s_.window > 0 ? std::max<int64_t>(position - s_.window + 1, 0) : 0;
    const int64_t last = std::min(position, s_.table_blocks * s_.block_rows - 1);
    Expected e;
    e.out.assign(static_cast<size_t>(d), 0.0);
    std::vector<double> scores;
    std::vector<int64_t> rows;
    for (int64_t row = first; row <= last; ++row) {
      const int64_t block = static_cast<const int32_t*>(
          c_.args[kTable].data)[sequence * s_.table_blocks + row / s_.block_rows];
      if (block < 0 || block >= s_.blocks) continue;
      rows.push_back(block * s_.block_rows + row % s_.block_rows);
      double score = 0;
      double of_codes = 0;
      double terms = 0;
      for (int64_t i = 0; i < d; ++i) {
        const double scaled =
            NumberAt(c_.args[kQ], at_q + i) * s_.scale * Parameter(kScaleK, group, head, i);
        score += scaled *
                 (Code(kKCache, group, rows.back(), head, i) - Parameter(kOffsetK, group, head, i));
        const double code = Code(kKCache, group, rows.back(), head, i);
        of_codes += scaled * code;
        terms += std::fabs(scaled * code) + std::fabs(scaled * Parameter(kOffsetK, group, head, i));
      }
      e.largest_score = std::max({e.largest_score, std::fabs(score), std::fabs(of_codes)});
      e.largest_terms = std::max(e.largest_terms, terms);
      if (s_.soft_cap != 0) score = s_.soft_cap * std::tanh(score / s_.soft_cap);
      scores.push_back(score);
    }
    if (rows.empty()) return e;
    const double peak = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (const double score : scores) total += std::exp(score - peak);
    e.lse = peak + std::log(total);
    if (s_.has_sinks) total += std::exp(Sink(group, q_head) - peak);
    for (size_t r = 0; r < rows.size(); ++r) {
      const double weight = std::exp(scores[r] - peak) / total;
      for (int64_t i = 0; i < d; ++i) {
        const double value =
            (Code(kVCache, group, rows[r], head, i) - Parameter(kOffsetV, group, head, i)) *
            Parameter(kScaleV, group, head, i);
        e.out[static_cast<size_t>(i)] += weight * value;
        e.largest_value = std::max(e.largest_value, std::fabs(value));
      }
    }
    return e;
  }

 private:
  int64_t BlockOf(Arg arg, int64_t group) const {
    int64_t index[kMaxGroupRank] = {};
    for (int i = s_.groups.rank - 1; i >= 0; --i) {
      index[i] = group % s_.groups.dims[i];
      group /= s_.groups.dims[i];
    }
    int64_t block = 0;
    for (int i = 0; i < s_.groups.rank; ++i) {
      const int64_t dim = c_.args[arg].dims[i];
      block = block * dim + (dim == 1 ? 0 : index[i]);
    }
    return block;
  }
  double Code(Arg arg, int64_t group, int64_t row, int64_t head, int64_t i) const {
    const int64_t all = BlockOf(arg, group) * s_.blocks * s_.block_rows + row;
    return static_cast<const int8_t*>(
        c_.args[arg].data)[(all * s_.num_kv_heads + head) * s_.head_dim + i];
  }
  double Parameter(Arg arg, int64_t group, int64_t head, int64_t i) const {
    if (IsAbsent(c_.args[arg])) return 0;
    return NumberAt(c_.args[arg], (BlockOf(arg, group) * s_.num_kv_heads + head) * s_.head_dim + i);
  }
  double Sink(int64_t group, int64_t q_head) const {
    return NumberAt(c_.args[kSinks], BlockOf(kSinks, group) * s_.num_q_heads + q_head);
  }

  const Call& c_;
  const Shape& s_;
};

// The error that a result may have: float32-like arithmetic, and the rounding to q's type.
inline double Allowed(const Expected& e, double expected, DType dtype) {
  const double rounding = dtype == DType::kF32 ? 0 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  return (2e-5 + 0x1p-20 * e.largest_score) * e.largest_value * (1 + rounding) +
         rounding * std::fabs(expected) + (dtype == DType::kF16 ? 0x1p-25 : 1e-30);
}

// Compares all results with the rendering; returns the largest error of float32 results in units of
// what is allowed.
inline double CheckResults(const Call& call, const Shape& shape, const std::string& where) {
  const Rendering rendering(call, shape);
  double worst = 0;
  for (int64_t sequence = 0; sequence < shape.groups.count * shape.sequences; ++sequence) {
    for (int64_t query = 0; query < shape.queries; ++query) {
      for (int64_t head = 0; head < shape.num_q_heads; ++head) {
        const Expected e = rendering.Row(sequence, query, head);
        const int64_t row = (sequence * shape.queries + query) * shape.num_q_heads + head;
        const std::string at = where + ", sequence " + std::to_string(sequence) + ", query " +
                               std::to_string(query) + ", head " + std::to_string(head);
        for (int64_t i = 0; i < shape.head_dim; ++i) {
          const double got = NumberAt(call.rets[kOut], row * shape.head_dim + i);
          const double expected = e.out[static_cast<size_t>(i)];
          const double error = std::fabs(got - expected) / Allowed(e, expected, shape.q_dtype);
          Check(error <= 1, at + ", column " + std::to_string(i) + ": expected " +
                                std::to_string(expected) + ", got " + std::to_string(got));
          if (shape.q_dtype == DType::kF32) worst = std::max(worst, error);
        }
        if (!shape.return_lse) continue;
        const double lse = NumberAt(call.rets[kLse], row);
        // The log-sum-exp has the scores' own error, which is that of sums in float32.
        const double allowed = 2e-5 + 0x1p-20 * e.largest_score + 0x1p-22 * e.largest_terms;
        const bool same = std::isinf(e.lse) ? lse == e.lse : std::fabs(lse - e.lse) <= allowed;
        Check(same,
              at + ": lse: expected " + std::to_string(e.lse) + ", got " + std::to_string(lse));
      }
    }
  }
  return worst;
}

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_TESTS_CUDA_DECODE_ATTENTION_EXPECTED_H_
