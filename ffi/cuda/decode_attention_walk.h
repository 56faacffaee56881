// Owns how a warp of decode_attention goes through its cache rows: scores, a running softmax, and
// the sums of weighted codes.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_WALK_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_WALK_H_

#include <cstdint>

#include "cuda/decode_attention_rows.h"

namespace jax_kvcache::decode_attention::cuda {

using jax_kvcache::cuda::Exp2;
using jax_kvcache::cuda::Mma;

// A weight is 2 ** (score - peak + 14): a weight that is a millionth of the largest one is still a
// normal float16, and one that float16 rounds to zero is less than 2 ** -38 of the largest.
inline constexpr float kWeightExponent = 14.0f;

// The part of the softmax that a warp has: of query rows g and g + 8 in each lane. Scores are in
// units of log(2).
template <int D>
class Walk {
 public:
  using G = Geometry<D>;

  PerLane<Pack<float, 2>> peak;
  PerLane<FragmentC> total;  // the same in all of its columns
  PerLane<FragmentC> sums[G::kColumnTiles];

  JAX_KVCACHE_DEVICE void Run(const Arguments& a, const Place& place, const Shared<D>& shared,
                              int warp) {
    Start(a, shared);
    const RowFinder finder(a, place);
    const int8_t* const k_codes = CodesOf(a, a.k_cache, kKCache, place);
    const int8_t* const v_codes = CodesOf(a, a.v_cache, kVCache, place);
    uint32_t begin;
    uint32_t end;
    FindPart(a, place, shared, warp, &begin, &end);
    for (; begin < end; begin += G::kRows) {
      Rows<D> rows;
      rows.Read(finder, begin, end, k_codes, v_codes, a.shape.num_kv_heads * D);
      Scores(rows, shared);
      Mask(rows.exist, begin, a.shape.soft_cap);
      Rescale();
      Accumulate(rows);
    }
  }

 private:
  static constexpr int kParts = G::kRows / 8;  // of the scores: products with eight rows

  JAX_KVCACHE_DEVICE void Start(const Arguments& a, const Shared<D>& shared) {
    const float unit = a.shape.soft_cap != 0.0f ? 1.0f : kLog2E;
    EachLane([&](int lane) {
      JAX_KVCACHE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = lane / 4 + 8 * h;
        peak[lane].at[h] = -kInfinity;
        factor_[lane].at[h] = shared.factor[row] * unit;
        bias_[lane].at[h] = shared.bias[row];
        low_[lane].at[h] = shared.low[row];
        high_[lane].at[h] = shared.high[row];
      }
      total[lane] = FragmentC{};
      JAX_KVCACHE_UNROLL
      for (int j = 0; j < G::kColumnTiles; ++j) sums[j][lane] = FragmentC{};
    });
    all_low_ = 0;
    all_high_ = UINT32_MAX;
    for (int row = 0; row < kTileRows; ++row) {
      if (shared.low[row] > all_low_) all_low_ = shared.low[row];
      if (shared.high[row] < all_high_) all_high_ = shared.high[row];
    }
  }

  // The rows that this warp goes through: of those that any query row sees, the split's part, and
  // of that the warp's part.
  JAX_KVCACHE_DEVICE static void FindPart(const Arguments& a, const Place& place,
                                          const Shared<D>& shared, int warp, uint32_t* begin,
                                          uint32_t* end) {
    int64_t first = UINT32_MAX;
    int64_t last = 0;  // the one after the last
    const int num_rows = place.NumQueryRows(a);
    for (int row = 0; row < num_rows; ++row) {
      if (shared.low[row] > shared.high[row]) continue;
      if (shared.low[row] < first) first = shared.low[row];
      if (int64_t{shared.high[row]} + 1 > last) last = int64_t{shared.high[row]} + 1;
    }
    const int64_t of_split = Whole(first, last, a.splits, a.fewest_rows);
    first += of_split * place.split;
    if (first + of_split < last) last = first + of_split;
    const int64_t of_warp = Whole(first, last, kWarps, 0);
    first += of_warp * warp;
    if (first + of_warp < last) last = first + of_warp;
    *begin = static_cast<uint32_t>(first < last ? first : 0);
    *end = static_cast<uint32_t>(first < last ? last : 0);
  }

  // The rows of each of `parts` parts of [first, last): a multiple of kRows and at least `fewest`.
  JAX_KVCACHE_DEVICE static int64_t Whole(int64_t first, int64_t last, int parts, int64_t fewest) {
    if (first >= last) return 0;
    int64_t rows = jax_kvcache::cuda::CeilDivide<int64_t>(last - first, parts);
    if (rows < fewest) rows = fewest;
    return jax_kvcache::cuda::CeilDivide<int64_t>(rows, G::kRows) * G::kRows;
  }

  JAX_KVCACHE_DEVICE void Scores(const Rows<D>& rows, const Shared<D>& shared) {
    JAX_KVCACHE_UNROLL
    for (int t = 0; t < kParts; ++t) EachLane([&](int lane) { scores_[t][lane] = FragmentC{}; });
    JAX_KVCACHE_UNROLL
    for (int step = 0; step < G::kSteps; ++step) {
      PerLane<FragmentA> q[2];
      JAX_KVCACHE_UNROLL
      for (int term = 0; term < 2; ++term) {
        EachLane([&](int lane) {
          const Pack<uint32_t, 4> words =
              jax_kvcache::cuda::LoadPack<4>(shared.q[term][step][lane]);
          JAX_KVCACHE_UNROLL
          for (int i = 0; i < 4; ++i) q[term][lane].word[i] = words.at[i];
        });
      }
      JAX_KVCACHE_UNROLL
      for (int t = 0; t < kParts; ++t) {
        const PerLane<FragmentB> codes = rows.KeyFactor(t, step);
        Mma(&scores_[t], q[0], codes);
        Mma(&scores_[t], q[1], codes);
      }
    }
  }

  // Turns products into scores; -infinity for a row that the query does not see.
  JAX_KVCACHE_DEVICE void Mask(uint32_t exist, uint32_t begin, float soft_cap) {
    const bool all = exist == (G::kRows == 32 ? UINT32_MAX : (1U << G::kRows % 32) - 1) &&
                     begin >= all_low_ && begin + (G::kRows - 1) <= all_high_;
    EachLane([&](int lane) {
      JAX_KVCACHE_UNROLL
      for (int t = 0; t < kParts; ++t) {
        JAX_KVCACHE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& score = scores_[t][lane].at[i];
          score *= factor_[lane].at[i / 2];
          if (soft_cap != 0.0f) {
            score += bias_[lane].at[i / 2];
            score = soft_cap * tanhf(score / soft_cap) * kLog2E;
          }
          const uint32_t offset = static_cast<uint32_t>(t * 8 + lane % 4 * 2 + i % 2);
          const bool seen =
              all || ((exist >> offset & 1U) != 0 && begin + offset >= low_[lane].at[i / 2] &&
                      begin + offset <= high_[lane].at[i / 2]);
          if (!seen) score = -kInfinity;
        }
      }
    });
  }

  // Moves the peaks up to these scores, and what was summed with them.
  JAX_KVCACHE_DEVICE void Rescale() {
    JAX_KVCACHE_UNROLL
    for (int h = 0; h < 2; ++h) {
      PerLane<float> top;
      EachLane([&](int lane) {
        top[lane] = peak[lane].at[h];
        JAX_KVCACHE_UNROLL
        for (int t = 0; t < kParts; ++t) {
          top[lane] = fmaxf(top[lane], scores_[t][lane].at[2 * h]);
          top[lane] = fmaxf(top[lane], scores_[t][lane].at[2 * h + 1]);
        }
      });
      jax_kvcache::cuda::MaxOf<4>(&top);
      EachLane([&](int lane) {
        if (!(top[lane] > peak[lane].at[h])) return;
        const float kept = Exp2(peak[lane].at[h] - top[lane]);
        peak[lane].at[h] = top[lane];
        JAX_KVCACHE_UNROLL
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          total[lane].at[i] *= kept;
          JAX_KVCACHE_UNROLL
          for (int j = 0; j < G::kColumnTiles; ++j) sums[j][lane].at[i] *= kept;
        }
      });
    }
  }

  // Adds the weights to the totals and the weighted codes to the sums, by the same products, so
  // that an error of a weight is in both. A weight is a float16 and the float16 nearest to the
  // remainder.
  JAX_KVCACHE_DEVICE void Accumulate(const Rows<D>& rows) {
    PerLane<FragmentB> ones;
    EachLane([&](int lane) { ones[lane] = {{0x3C003C00U, 0x3C003C00U}}; });
    JAX_KVCACHE_UNROLL
    for (int t = 0; t < kParts / 2; ++t) {
      PerLane<FragmentA> weights[2];
      EachLane([&](int lane) {
        JAX_KVCACHE_UNROLL
        for (int word = 0; word < 4; ++word) {
          Half high[2];
          Half low[2];
          JAX_KVCACHE_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float score = scores_[2 * t + word / 2][lane].at[word % 2 * 2 + i];
            const float weight = Weight(score, peak[lane].at[word % 2]);
            high[i] = ToHalf(weight);
            low[i] = ToHalf(weight - ToFloat(high[i]));
          }
          weights[0][lane].word[word] = jax_kvcache::cuda::PackHalves(high[0], high[1]);
          weights[1][lane].word[word] = jax_kvcache::cuda::PackHalves(low[0], low[1]);
        }
      });
      Mma(&total, weights[0], ones);
      Mma(&total, weights[1], ones);
      JAX_KVCACHE_UNROLL
      for (int w = 0; w < G::kColumnTiles / 4; ++w) {
        JAX_KVCACHE_UNROLL
        for (int p = 0; p < 2; ++p) {
          PerLane<FragmentB> codes[2];
          rows.ValueFactors(t, w, p, codes);
          JAX_KVCACHE_UNROLL
          for (int e = 0; e < 2; ++e) {
            Mma(&sums[4 * w + 2 * p + e], weights[0], codes[e]);
            Mma(&sums[4 * w + 2 * p + e], weights[1], codes[e]);
          }
        }
      }
    }
  }

  // The difference is taken first: it is exact where it matters, however large the scores are.
  JAX_KVCACHE_DEVICE static float Weight(float score, float peak_of_row) {
    if (score == -kInfinity) return 0.0f;
    return Exp2((score - peak_of_row) + kWeightExponent);
  }

  PerLane<FragmentC> scores_[kParts];
  PerLane<Pack<float, 2>> factor_;
  PerLane<Pack<float, 2>> bias_;
  PerLane<Pack<uint32_t, 2>> low_;
  PerLane<Pack<uint32_t, 2>> high_;
  uint32_t all_low_;  // rows from all_low_ to all_high_ are seen by every query row
  uint32_t all_high_;
};

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_WALK_H_
