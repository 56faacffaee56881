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

  // Finds the warp's rows and asks for the first of them. `shared` has what each query row sees.
  JAX_KVCACHE_DEVICE void Begin(const Arguments& a, const Place& place, const Shared<D>& shared,
                                int warp) {
    FindPart(a, place, shared, warp);
    k_codes_ = CodesOf(a, a.k_cache, kKCache, place);
    v_codes_ = CodesOf(a, a.v_cache, kVCache, place);
    row_size_ = int64_t{a.kv_heads} * D;
    AskFor(RowFinder(a, place), begin_);
  }

  // Goes through the rows. `shared` has the query rows as factors too.
  JAX_KVCACHE_DEVICE void Run(const Arguments& a, const Place& place, const Shared<D>& shared) {
    Start(a, shared);
    const RowFinder finder(a, place);
    const float one_over_cap = 1.0f / a.shape.soft_cap;
    for (; begin_ < end_; begin_ += G::kRows) {
      const uint32_t exist = places_.exist;
      rows_.Read(places_, k_codes_, v_codes_, row_size_);
      // The next rows come from memory while these are in use, so that reading them takes little.
      AskFor(finder, begin_ + G::kRows);
      Scores(shared);
      if (a.shape.soft_cap != 0.0f) Cap(shared, a.shape.soft_cap, one_over_cap);
      if (!AllAreSeen(exist)) Mask(shared, exist);
      Rescale();
      Accumulate();
    }
  }

 private:
  static constexpr int kParts = G::kRows / 8;  // of the scores: products with eight rows

  // Finds the places of the rows from `begin` on and asks for their codes.
  JAX_KVCACHE_DEVICE void AskFor(const RowFinder& finder, uint32_t begin) {
    places_ = PlacesOfRows<D>(finder, begin, end_);
    places_.Prefetch(k_codes_, v_codes_, row_size_);
  }

  JAX_KVCACHE_DEVICE void Start(const Arguments& a, const Shared<D>& shared) {
    const float unit = a.shape.soft_cap != 0.0f ? 1.0f : kLog2E;
    EachLane([&](int lane) {
      JAX_KVCACHE_UNROLL
      for (int h = 0; h < 2; ++h) {
        peak[lane].at[h] = -kInfinity;
        factor_[lane].at[h] = shared.factor[RowOf(lane, 2 * h)] * unit;
      }
      total[lane] = FragmentC{};
      JAX_KVCACHE_UNROLL
      for (int j = 0; j < G::kColumnTiles; ++j) sums[j][lane] = FragmentC{};
    });
  }

  // The rows that this warp goes through: of those that any query row sees, the split's part, and
  // of that the warp's part.
  JAX_KVCACHE_DEVICE void FindPart(const Arguments& a, const Place& place, const Shared<D>& shared,
                                   int warp) {
    PerLane<uint32_t> low;  // of all query rows
    PerLane<uint32_t> high;
    PerLane<uint32_t> first;  // of those that exist and see something
    PerLane<uint32_t> last;   // the one after the last
    const int num_rows = place.NumQueryRows(a);
    EachLane([&](int lane) {
      low[lane] = lane < kTileRows ? shared.low[lane] : 0;
      high[lane] = lane < kTileRows ? shared.high[lane] : UINT32_MAX;
      const bool sees = lane < num_rows && low[lane] <= high[lane];
      first[lane] = sees ? low[lane] : UINT32_MAX;
      last[lane] = sees ? high[lane] + 1 : 0;
    });
    all_low_ = jax_kvcache::cuda::Largest(low);
    all_high_ = jax_kvcache::cuda::Smallest(high);
    begin_ = jax_kvcache::cuda::Smallest(first);
    end_ = jax_kvcache::cuda::Largest(last);
    TakePart(place.split, a.splits, a.fewest_rows);
    TakePart(static_cast<uint32_t>(warp), kWarps, 0);
  }

  // Leaves part `part` of `parts` parts of the rows: a multiple of kRows, at least `fewest`.
  JAX_KVCACHE_DEVICE void TakePart(uint32_t part, uint32_t parts, uint32_t fewest) {
    if (begin_ >= end_) return;
    uint32_t rows = jax_kvcache::cuda::CeilDivide(end_ - begin_, parts);
    if (rows < fewest) rows = fewest;
    rows = (rows + (G::kRows - 1)) / G::kRows * G::kRows;
    const uint64_t begin = begin_ + uint64_t{rows} * part;
    if (begin >= end_) {
      begin_ = end_;
      return;
    }
    begin_ = static_cast<uint32_t>(begin);
    if (end_ - begin_ > rows) end_ = begin_ + rows;
  }

  JAX_KVCACHE_DEVICE void Scores(const Shared<D>& shared) {
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
        const PerLane<FragmentB> codes = rows_.KeyFactor(t, step);
        Mma(&scores_[t], q[0], codes);
        Mma(&scores_[t], q[1], codes);
      }
    }
    EachScore([&](int lane, int, int i, float& score) { score *= factor_[lane].at[i / 2]; });
  }

  JAX_KVCACHE_DEVICE void Cap(const Shared<D>& shared, float soft_cap, float one_over_cap) {
    EachScore([&](int lane, int, int i, float& score) {
      const float bias = shared.bias[RowOf(lane, i)];
      score = soft_cap * tanhf((score + bias) * one_over_cap) * kLog2E;
    });
  }

  JAX_KVCACHE_DEVICE bool AllAreSeen(uint32_t exist) const {
    return exist == (G::kRows == 32 ? UINT32_MAX : (1U << G::kRows % 32) - 1) &&
           begin_ >= all_low_ && begin_ + (G::kRows - 1) <= all_high_;
  }

  // The score of a row that the query does not see becomes -infinity.
  JAX_KVCACHE_DEVICE void Mask(const Shared<D>& shared, uint32_t exist) {
    EachScore([&](int lane, int t, int i, float& score) {
      const uint32_t offset = static_cast<uint32_t>(t * 8 + lane % 4 * 2 + i % 2);
      const int row = RowOf(lane, i);
      const bool seen = (exist >> offset & 1U) != 0 && begin_ + offset >= shared.low[row] &&
                        begin_ + offset <= shared.high[row];
      if (!seen) score = -kInfinity;
    });
  }

  // The query row of element `i` of a lane's products.
  JAX_KVCACHE_DEVICE static int RowOf(int lane, int i) { return lane / 4 + 8 * (i / 2); }

  // Calls body(lane, t, i, score) for each score: element `i` of the product with the rows 8t on.
  template <typename Body>
  JAX_KVCACHE_DEVICE void EachScore(const Body& body) {
    EachLane([&](int lane) {
      JAX_KVCACHE_UNROLL
      for (int t = 0; t < kParts; ++t) {
        JAX_KVCACHE_UNROLL
        for (int i = 0; i < 4; ++i) body(lane, t, i, scores_[t][lane].at[i]);
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
  JAX_KVCACHE_DEVICE void Accumulate() {
    PerLane<FragmentB> ones;
    PerLane<Pack<float, 2>> base;  // the peak; 0 where no row was seen, whose weights are then 0
    EachLane([&](int lane) {
      ones[lane] = {{0x3C003C00U, 0x3C003C00U}};
      JAX_KVCACHE_UNROLL
      for (int h = 0; h < 2; ++h) {
        base[lane].at[h] = peak[lane].at[h] == -kInfinity ? 0.0f : peak[lane].at[h];
      }
    });
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
            // The difference is taken first: it is exact where it matters, however large the
            // scores are.
            const float weight = Exp2((score - base[lane].at[word % 2]) + kWeightExponent);
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
          rows_.ValueFactors(t, w, p, codes);
          JAX_KVCACHE_UNROLL
          for (int e = 0; e < 2; ++e) {
            Mma(&sums[4 * w + 2 * p + e], weights[0], codes[e]);
            Mma(&sums[4 * w + 2 * p + e], weights[1], codes[e]);
          }
        }
      }
    }
  }

  uint32_t begin_;  // the rows that are left
  uint32_t end_;
  const int8_t* k_codes_;
  const int8_t* v_codes_;
  int64_t row_size_;        // Nkv * D
  PlacesOfRows<D> places_;  // of the rows that are read next
  Rows<D> rows_;
  PerLane<FragmentC> scores_[kParts];
  PerLane<Pack<float, 2>> factor_;
  uint32_t all_low_;  // rows from all_low_ to all_high_ are seen by every query row
  uint32_t all_high_;
};

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_WALK_H_
