// Owns what a kv head of a part prepares before it reads rows (its queries in the order of the
// products, with K's scale in them) and what it does after (V's scale, sinks, the results).
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_QUERIES_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_QUERIES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_math.h"
#include "cpu/decode_attention_softmax.h"

namespace jax_kvcache::decode_attention {
namespace {

// Reads or writes `count` elements of the type that `dtype` names, as float32.
template <typename T>
void ReadAs(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreVector(Load<kLanes>(from + i), to + i);
  for (; i < count; ++i) Store<1>(Load<1>(from + i), to + i);
}
inline void Read(const void* from, DType dtype, int64_t first, int64_t count, float* to) {
  if (dtype == DType::kF16) return ReadAs(static_cast<const Half*>(from) + first, count, to);
  if (dtype == DType::kBF16) return ReadAs(static_cast<const BFloat*>(from) + first, count, to);
  ReadAs(static_cast<const float*>(from) + first, count, to);
}
template <typename T>
void WriteAs(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store<kLanes>(LoadVector(from + i), to + i);
  for (; i < count; ++i) Store<1>(Load<1>(from + i), to + i);
}
inline void Write(const float* from, int64_t count, void* to, DType dtype, int64_t first) {
  if (dtype == DType::kF16) return WriteAs(from, count, static_cast<Half*>(to) + first);
  if (dtype == DType::kBF16) return WriteAs(from, count, static_cast<BFloat*>(to) + first);
  WriteAs(from, count, static_cast<float*>(to) + first);
}

// Codes lose an integer, the centre, which is as near to the offset as a code can be: (code - centre)
// is exact and no larger than it has to be, and only the rest of the offset has to be put right
// afterwards.
template <int N>
JAX_KVCACHE_INLINE Floats<N> Centre(Floats<N> offset) {
  const Floats<N> least = Floats<N>{} - 128.0f;
  const Floats<N> most = Floats<N>{} + 127.0f;
  Floats<N> clipped = offset < least ? least : offset;
  clipped = clipped > most ? most : clipped;
  return (clipped + 0x1.8p23f) - 0x1.8p23f;  // to the nearest integer
}

// The parameters of one kv head.
struct HeadParameters {
  HeadParameters(const Shape& shape, const Buffers& b, int64_t group, int64_t head) {
    const auto at = [&](const float* array, Arg arg) {
      if (array == nullptr) return array;
      return array +
             (shape.ParameterBlock(arg, group) * shape.num_kv_heads + head) * shape.head_dim;
    };
    scale_k = at(b.scale_k, kScaleK);
    scale_v = at(b.scale_v, kScaleV);
    offset_k = at(b.offset_k, kOffsetK);
    offset_v = at(b.offset_v, kOffsetV);
    if (b.sinks != nullptr) {
      sinks = b.sinks + shape.ParameterBlock(kSinks, group) * shape.num_q_heads +
              head * shape.queries_per_kv_head();
    }
  }

  const float* scale_k = nullptr;   // [D]
  const float* scale_v = nullptr;   // [D]
  const float* offset_k = nullptr;  // [D], or null
  const float* offset_v = nullptr;  // [D], or null
  const float* sinks = nullptr;     // [Nq / Nkv], or null
};

// What a score in its natural unit is multiplied with to be in ours: units of log2, or the argument
// of TanhOfHalf.
inline float ScoreUnit(const Shape& shape) {
  return shape.soft_cap == 0.0f ? kLog2E : 2 * kLog2E / shape.soft_cap;
}

// Writes the results of one query row.
class ResultWriter {
 public:
  ResultWriter(const Shape& shape, const Buffers& b, const HeadParameters& head, float* scratch)
      : shape_(shape), b_(b), head_(head), row_(scratch) {}

  static int64_t ScratchSize(const Shape& shape) { return AccumulatorSize(shape.head_dim); }

  // `query` in [0, G * B * S), `q_head` in [0, Nq). sums: [slots, kLanes], as the products leave
  // them; `constant` is what softmax does not see of the scores, in units of log2.
  void Put(int64_t query, int64_t q_head, const float* sums, float peak, float total,
           float constant) {
    const int64_t d = shape_.head_dim;
    const int64_t row = query * shape_.num_q_heads + q_head;
    const bool seen = peak != -kInfinity;
    if (b_.lse != nullptr) {
      b_.lse[row] =
          seen ? static_cast<float>((static_cast<double>(peak) + std::log2(double{total}) +
                                     static_cast<double>(constant)) *
                                    kLn2)
               : -kInfinity;
    }
    float factor = 1.0f / total;
    float share = 1.0f;  // of the weights that have a value
    if (head_.sinks != nullptr) {
      // The sink is one more score, whose value is 0.
      const double sink = double{head_.sinks[q_head % shape_.queries_per_kv_head()]} / kLn2 -
                          static_cast<double>(constant);
      const double most = std::max(sink, double{peak});
      const double shrink = std::exp2(double{peak} - most);
      const double all = double{total} * shrink + std::exp2(sink - most);
      factor = static_cast<float>(shrink / all);
      share = static_cast<float>(double{total} * shrink / all);
    }
    const int64_t whole = d / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      PutChannels<kLanes>(i, sums + i, seen, factor, share);
    }
    // The last slot ends with the last channel.
    const float* const tail = d < kLanes ? sums : sums + whole + kLanes - d;
    for (int64_t i = whole; i < d; ++i) PutChannels<1>(i, tail + i, seen, factor, share);
    Write(row_, d, b_.out, shape_.q_dtype, row * d);
  }

 private:
  template <int N>
  JAX_KVCACHE_INLINE void PutChannels(int64_t channel, const float* sums, bool seen,
                                      float factor, float share) {
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

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_QUERIES_H_
