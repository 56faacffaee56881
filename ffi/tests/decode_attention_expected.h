// Owns what decode_attention means, one query head after the other in double precision, and how far
// from it a result may be.
#ifndef JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_EXPECTED_H_
#define JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_EXPECTED_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
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

// The results of one query head of one query, and the sizes that errors grow with.
struct Expected {
  std::vector<double> out;  // [D]
  double lse = -std::numeric_limits<double>::infinity();
  double largest_score = 0;       // by size, before the soft cap
  double largest_code_score = 0;  // the same without K's offset
  double largest_terms = 0;       // of a score: the sum of the sizes of what is added up for it
  double largest_value = 0;       // of V, by size
};

class Rendering {
 public:
  Rendering(const Call& call, const Shape& shape) : c_(call), s_(shape) {}

  // [G * B * S, Nq], in the order of the results.
  std::vector<Expected> Run() const {
    std::vector<Expected> all;
    for (int64_t query = 0; query < s_.groups.count * s_.sequences * s_.queries; ++query) {
      for (int64_t head = 0; head < s_.num_q_heads; ++head) all.push_back(QueryHead(query, head));
    }
    return all;
  }

 private:
  // One kv head of a group's cache, and how its codes become numbers.
  struct Codes {
    const int8_t* first;         // of row 0
    std::vector<double> scale;   // [D]
    std::vector<double> offset;  // [D]
  };

  Expected QueryHead(int64_t query, int64_t q_head) const {
    const int64_t sequence = query / s_.queries;
    const int64_t group = sequence / s_.sequences;
    const int64_t kv_head = q_head / (s_.num_q_heads / s_.num_kv_heads);
    const Codes k = CodesOf(kKCache, kScaleK, kOffsetK, group, kv_head);
    const Codes v = CodesOf(kVCache, kScaleV, kOffsetV, group, kv_head);
    const auto d = static_cast<size_t>(s_.head_dim);
    Expected e;
    e.out.assign(d, 0.0);
    const std::vector<int64_t> rows = RowsSeen(sequence, query);
    if (rows.empty()) return e;
    std::vector<double> q(d);
    for (size_t i = 0; i < d; ++i) {
      q[i] = NumberAt(c_.args[kQ],
                      (query * s_.num_q_heads + q_head) * s_.head_dim + static_cast<int64_t>(i));
      q[i] *= static_cast<double>(s_.scale);
    }
    std::vector<double> scores;
    for (const int64_t row : rows) scores.push_back(Score(q, k, row, &e));
    const double peak = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (const double score : scores) total += std::exp(score - peak);
    e.lse = peak + std::log(total);
    if (!IsAbsent(c_.args[kSinks])) {
      const int64_t sink = BlockOf(kSinks, group) * s_.num_q_heads + q_head;
      total += std::exp(NumberAt(c_.args[kSinks], sink) - peak);  // infinity: all weights are 0
    }
    for (size_t r = 0; r < rows.size(); ++r) {
      const double weight = std::exp(scores[r] - peak) / total;
      const int8_t* const codes = v.first + rows[r] * s_.row_size();
      for (size_t i = 0; i < d; ++i) {
        const double value = (codes[i] - v.offset[i]) * v.scale[i];
        e.out[i] += weight * value;
        e.largest_value = std::max(e.largest_value, std::fabs(value));
      }
    }
    return e;
  }

  // The rows of the caches that a query sees.
  std::vector<int64_t> RowsSeen(int64_t sequence, int64_t query) const {
    const auto* const table = static_cast<const int32_t*>(c_.args[kTable].data);
    const int64_t position = static_cast<const int32_t*>(c_.args[kPositions].data)[query];
    const int64_t first = s_.window > 0 ? std::max<int64_t>(position - s_.window + 1, 0) : 0;
    const int64_t last = std::min(position, s_.table_blocks * s_.block_rows - 1);
    std::vector<int64_t> rows;
    for (int64_t row = first; row <= last; ++row) {
      const int64_t block = table[sequence * s_.table_blocks + row / s_.block_rows];
      if (block < 0 || block >= s_.blocks) continue;
      rows.push_back(block * s_.block_rows + row % s_.block_rows);
    }
    return rows;
  }

  double Score(const std::vector<double>& q, const Codes& k, int64_t row, Expected* e) const {
    const int8_t* const codes = k.first + row * s_.row_size();
    double score = 0;
    double of_codes = 0;
    double terms = 0;
    for (size_t i = 0; i < q.size(); ++i) {
      const double scaled = q[i] * k.scale[i];
      score += scaled * (codes[i] - k.offset[i]);
      of_codes += scaled * codes[i];
      terms += std::fabs(scaled * codes[i]) + std::fabs(scaled * k.offset[i]);
    }
    e->largest_score = std::max(e->largest_score, std::fabs(score));
    e->largest_code_score = std::max(e->largest_code_score, std::fabs(of_codes));
    e->largest_terms = std::max(e->largest_terms, terms);
    const auto cap = static_cast<double>(s_.soft_cap);
    return cap == 0 ? score : cap * std::tanh(score / cap);
  }

  Codes CodesOf(Arg cache, Arg scale, Arg offset, int64_t group, int64_t kv_head) const {
    const int64_t rows = BlockOf(cache, group) * s_.blocks * s_.block_rows;
    Codes codes;
    codes.first = static_cast<const int8_t*>(c_.args[cache].data) + rows * s_.row_size() +
                  kv_head * s_.head_dim;
    for (int64_t i = 0; i < s_.head_dim; ++i) {
      codes.scale.push_back(Parameter(scale, group, kv_head, i));
      codes.offset.push_back(IsAbsent(c_.args[offset]) ? 0 : Parameter(offset, group, kv_head, i));
    }
    return codes;
  }

  double Parameter(Arg arg, int64_t group, int64_t kv_head, int64_t i) const {
    const int64_t row = BlockOf(arg, group) * s_.num_kv_heads + kv_head;
    return NumberAt(c_.args[arg], row * s_.head_dim + i);
  }

  // Which of an operand's blocks a group has, by its dimensions and not by the mask that the
  // kernels read.
  int64_t BlockOf(Arg arg, int64_t group) const {
    int64_t block = 0;
    int64_t stride = 1;
    for (int i = s_.groups.rank - 1; i >= 0; --i) {
      const int64_t dim = c_.args[arg].dims[i];
      if (dim > 1) block += group % s_.groups.dims[i] * stride;
      stride *= dim;
      group /= s_.groups.dims[i];
    }
    return block;
  }

  const Call& c_;
  const Shape& s_;
};

// How far from the rendering a result may be, before it is rounded to its type: a part of a size,
// and more of it the larger the scores are, whose errors become factors of the weights.
struct Tolerance {
  double least;
  double per_score;
  double per_code_score;
  double per_term;  // of the log-sum-exp's error, which is that of the scores: of sums in float32
  // The size: the largest value of V that the query head sees, or the largest result of the call,
  // which is smaller where many values cancel out.
  bool is_of_values;

  double Of(const Expected& e) const {
    return least + per_score * e.largest_score + per_code_score * e.largest_code_score;
  }
};

// Compares all results with the rendering. Returns the largest error of float32 results in units of
// what is allowed.
inline double CheckResults(const Call& got, const Shape& shape, const std::vector<Expected>& all,
                           const Tolerance& tolerance, const std::string& where) {
  const DType dtype = shape.q_dtype;
  const double rounding = dtype == DType::kF32 ? 0 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  // Half of the last bit of subnormal float16 numbers, or what keeps 0 from being divided by 0.
  const double smallest = dtype == DType::kF16 ? 0x1p-25 : 1e-30;
  double largest_out = 0;
  for (const Expected& e : all) {
    for (const double value : e.out) largest_out = std::max(largest_out, std::fabs(value));
  }
  double worst = 0;
  for (size_t row = 0; row < all.size(); ++row) {
    const Expected& e = all[row];
    const std::string at = where + ", query " +
                           std::to_string(row / static_cast<size_t>(shape.num_q_heads)) +
                           ", head " + std::to_string(row % static_cast<size_t>(shape.num_q_heads));
    const double size = tolerance.is_of_values ? e.largest_value : largest_out;
    for (size_t i = 0; i < e.out.size(); ++i) {
      const double value = NumberAt(got.rets[kOut], static_cast<int64_t>(row * e.out.size() + i));
      const double allowed =
          tolerance.Of(e) * size * (1 + rounding) + rounding * std::fabs(e.out[i]) + smallest;
      const double error = std::fabs(value - e.out[i]) / allowed;
      if (!(error <= 1)) {  // NaN, too
        Fail(at + ": out[" + std::to_string(i) + "]: expected " + std::to_string(e.out[i]) +
             ", got " + std::to_string(value));
      }
      if (dtype == DType::kF32) worst = std::max(worst, error);
    }
    if (!shape.return_lse) continue;
    const double lse = NumberAt(got.rets[kLse], static_cast<int64_t>(row));
    const double allowed = tolerance.Of(e) + tolerance.per_term * e.largest_terms;
    const bool is_near = std::isinf(e.lse) ? lse == e.lse : std::fabs(lse - e.lse) <= allowed;
    if (!is_near) {
      Fail(at + ": lse: expected " + std::to_string(e.lse) + ", got " + std::to_string(lse));
    }
  }
  return worst;
}

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_EXPECTED_H_
