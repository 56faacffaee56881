// Owns what a kv head does before it reads rows (its queries in the order of the products, with K's
// scale in them) and after (V's scale, sinks, the results).
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_QUERIES_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_QUERIES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_kernel_layout.h"
#include "cpu/decode_attention_kernel_math.h"

namespace jax_kvcache::decode_attention {
namespace {

template <typename T>
void ReadFloats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreVector(Load<kLanes>(from + i), to + i);
  for (; i < count; ++i) Store<1>(Load<1>(from + i), to + i);
}
template <typename T>
void WriteFloats(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store<kLanes>(LoadVector(from + i), to + i);
  for (; i < count; ++i) Store<1>(Load<1>(from + i), to + i);
}

// Elements [first, first + count) of an array of the type `dtype`, as float32.
inline void Read(const void* array, DType dtype, int64_t first, int64_t count, float* to) {
  if (dtype == DType::kF16) {
    ReadFloats(static_cast<const Half*>(array) + first, count, to);
  } else if (dtype == DType::kBF16) {
    ReadFloats(static_cast<const BFloat*>(array) + first, count, to);
  } else {
    ReadFloats(static_cast<const float*>(array) + first, count, to);
  }
}
inline void Write(const float* from, int64_t count, void* array, DType dtype, int64_t first) {
  if (dtype == DType::kF16) {
    WriteFloats(from, count, static_cast<Half*>(array) + first);
  } else if (dtype == DType::kBF16) {
    WriteFloats(from, count, static_cast<BFloat*>(array) + first);
  } else {
    WriteFloats(from, count, static_cast<float*>(array) + first);
  }
}

// Codes lose an integer, the centre, which is as near to the offset as a code can be: (code -
// centre) is exact and no larger than it has to be. Only the rest of the offset is put right
// afterwards.
template <int N>
JAX_KVCACHE_INLINE Floats<N> Centre(Floats<N> offset) {
  const Floats<N> least = Floats<N>{} - 128.0f;
  const Floats<N> most = Floats<N>{} + 127.0f;
  Floats<N> clipped = offset < least ? least : offset;
  clipped = clipped > most ? most : clipped;
  return (clipped + 0x1.8p23f) - 0x1.8p23f;  // rounds to an integer
}

// The parameters of one kv head: [D] each but for sinks, [Nq / Nkv]; absent ones null.
struct HeadParameters {
  HeadParameters(const Shape& shape, const Buffers& b, int64_t group, int64_t head) {
    const auto of_head = [&](const float* array, Arg arg) {
      if (array == nullptr) return array;
      return array +
             (shape.ParameterBlock(arg, group) * shape.num_kv_heads + head) * shape.head_dim;
    };
    scale_k = of_head(b.scale_k, kScaleK);
    scale_v = of_head(b.scale_v, kScaleV);
    offset_k = of_head(b.offset_k, kOffsetK);
    offset_v = of_head(b.offset_v, kOffsetV);
    if (b.sinks != nullptr) {
      sinks = b.sinks + shape.ParameterBlock(kSinks, group) * shape.num_q_heads +
              head * shape.queries_per_kv_head();
    }
  }

  const float* scale_k = nullptr;
  const float* scale_v = nullptr;
  const float* offset_k = nullptr;
  const float* offset_v = nullptr;
  const float* sinks = nullptr;
};

// Number `s` of the part's positions, in [0, G * B * S).
inline int64_t QueryNumber(const Shape& shape, const Part& part, int64_t s) {
  return (part.group * shape.sequences + part.sequence) * shape.queries + part.query_begin + s;
}

// Fills centre [slots, kLanes].
inline void PackCentre(const PartSizes& sizes, const float* offset, int64_t head_dim,
                       float* centre) {
  for (int64_t i = 0; i < sizes.slots * kLanes; ++i) {
    const int64_t channel = sizes.ChannelsFrom(0).At(i / kLanes) + i % kLanes;
    if (channel < head_dim) Store<1>(Centre<1>(Load<1>(offset + channel)), centre + i);
  }
}

// Multiplies a query row [D] with K's scale, so that scores come out multiplied by log2(e), or with
// a soft cap as TanhOfHalf wants them. Returns what the scores lack, see TileState.
inline float ScaleQuery(const Shape& shape, const HeadParameters& head, float* row) {
  const float unit = shape.soft_cap == 0.0f ? kLog2E : 2 * kLog2E / shape.soft_cap;
  const float factor = shape.scale * unit;
  for (int64_t c = 0; c < shape.head_dim; ++c) {
    const float value = row[c] * (head.scale_k[c] * factor);
    row[c] = value + (value - value);  // an infinity makes the whole row NaN, as it should
  }
  if (head.offset_k == nullptr) return 0.0f;
  if (shape.soft_cap == 0.0f && !shape.has_sinks && !shape.return_lse) return 0.0f;
  double constant = 0;
  for (int64_t c = 0; c < shape.head_dim; ++c) {
    const Floats<1> offset = Load<1>(head.offset_k + c);
    constant += double{row[c]} * double{(Centre<1>(offset) - offset)[0]};
  }
  return static_cast<float>(constant);
}

// Puts a scaled query row into column `query` of a tile: packed [slots, W, kLanes] or [D, W]. The
// row has zeros behind D.
inline void PackQuery(const PartSizes& sizes, const float* row, int64_t width, int64_t query,
                      float* packed) {
  if (sizes.many) {
    for (int64_t c = 0; c < sizes.head_dim; ++c) packed[c * width + query] = row[c];
    return;
  }
  for (int64_t slot = 0; slot < sizes.slots; ++slot) {
    const int64_t at = sizes.ChannelsFrom(0).At(slot);
    float* const to = packed + (slot * width + query) * kLanes;
    StoreVector(LoadVector(row + at), to);
    std::fill_n(to, slot * kLanes - at, 0.0f);  // what the slot before has already
  }
}

// Writes the results of single query rows.
class ResultWriter {
 public:
  // row: [stride] of scratch memory.
  ResultWriter(const Shape& shape, const Buffers& b, const HeadParameters& head, float* row)
      : shape_(shape), b_(b), head_(head), row_(row) {}

  // `query` in [0, G * B * S), `q_head` in [0, Nq); sums [slots, kLanes].
  void Put(int64_t query, int64_t q_head, const float* sums, float peak, float total,
           float constant) const {
    const int64_t d = shape_.head_dim;
    const int64_t result = query * shape_.num_q_heads + q_head;
    const bool seen = peak != -kInfinity;
    if (b_.lse != nullptr) {
      const double log2 = double{peak} + std::log2(double{total}) + double{constant};
      b_.lse[result] = seen ? static_cast<float>(log2 * kLn2) : -kInfinity;
    }
    float factor = 1.0f / total;
    float share = 1.0f;  // of the weights, those that have a value
    if (head_.sinks != nullptr) {
      const double sink =
          double{head_.sinks[q_head % shape_.queries_per_kv_head()]} / kLn2 - double{constant};
      const double most = std::max(sink, double{peak});
      const double shrink = std::exp2(double{peak} - most);
      const double all = double{total} * shrink + std::exp2(sink - most);
      factor = static_cast<float>(shrink / all);
      share = static_cast<float>(double{total} * shrink / all);
    }
    const int64_t whole = d / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) {
      PutChannels<kLanes>(c, sums + c, seen, factor, share);
    }
    // The last slot ends with the last channel.
    const float* const tail = d < kLanes ? sums : sums + whole + kLanes - d;
    for (int64_t c = whole; c < d; ++c) PutChannels<1>(c, tail + c, seen, factor, share);
    Write(row_, d, b_.out, shape_.q_dtype, result * d);
  }

 private:
  template <int N>
  JAX_KVCACHE_INLINE void PutChannels(int64_t channel, const float* sums, bool seen, float factor,
                                      float share) const {
    Floats<N> mean = Load<N>(sums) * factor;
    if (head_.offset_v != nullptr) {
      const Floats<N> offset = Load<N>(head_.offset_v + channel);
      mean -= (offset - Centre<N>(offset)) * share;
    }
    Store<N>(seen ? mean * Load<N>(head_.scale_v + channel) : Floats<N>{}, row_ + channel);
  }

  const Shape& shape_;
  const Buffers& b_;
  const HeadParameters& head_;
  float* row_;
};

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_QUERIES_H_
