// Owns what the CUDA kernels of decode_attention are given, and how a call is divided among blocks
// of threads.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_CALL_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_CALL_H_

#include <cstdint>
#include <string>

#include "core/decode_attention.h"

namespace jax_kvcache::decode_attention::cuda {

inline constexpr int kWarps = 4;      // of a block of threads
inline constexpr int kTileRows = 16;  // query rows that a block has: the rows of one matrix product
// What a partial result has beside its D sums; four, so that four columns can be read together.
inline constexpr int kExtras = 4;

// A query row is one query head of one query. The query rows of a kv head are numbered query by
// query. A partial result is that of some of the cache rows: D sums of weighted codes, the peak of
// the scores, the total of the weights, and what K's offset adds to every score.
struct Arguments {
  Shape shape;
  const void* q = nullptr;             // [*g, B, S, Nq, D]
  const int8_t* k_cache = nullptr;     // [*g', NB, R, Nkv, D]
  const int8_t* v_cache = nullptr;     // [*g', NB, R, Nkv, D]
  const int32_t* table = nullptr;      // [*g, B, M]
  const int32_t* positions = nullptr;  // [*g, B, S]
  const float* scale_k = nullptr;      // [*g', Nkv, D]
  const float* scale_v = nullptr;      // [*g', Nkv, D]
  const float* offset_k = nullptr;     // [*g', Nkv, D], optional
  const float* offset_v = nullptr;     // [*g', Nkv, D], optional
  const float* sinks = nullptr;        // [*g', Nq], optional
  void* out = nullptr;                 // [*g, B, S, Nq, D]
  float* lse = nullptr;                // [*g, B, S, Nq], optional
  float* partials = nullptr;           // [*g, B, S, Nq, splits, D + kExtras], where splits > 1

  // Sizes in 32 bits, in which a GPU divides several times faster than in 64.
  uint32_t kv_heads = 1;          // Nkv
  uint32_t queries_per_head = 1;  // Nq / Nkv, query heads of a kv head
  uint32_t sequences = 1;         // B
  uint32_t query_rows = 1;        // S * Nq / Nkv, of a kv head
  uint32_t tiles = 1;             // of query rows, per kv head
  uint32_t splits = 1;            // of the cache rows of a sequence
  uint32_t fewest_rows = 128;     // of a split, if the sequence has so many

  // Blocks of threads: those of one sequence, kv head and split are neighbours, because they read
  // the same codes.
  int64_t Blocks() const {
    return shape.groups.count * shape.sequences * shape.num_kv_heads * splits * tiles;
  }
};

// How many blocks of threads share the registers of one multiprocessor.
constexpr int BlocksTogether(int64_t head_dim) { return head_dim <= 64 ? 3 : 2; }

// Over how many splits the rows are spread: at most `arguments.splits`, for which there is scratch.
// It follows from shapes and from the card alone.
uint32_t ChooseSplits(const Arguments& arguments, int multiprocessors);

// Fills the arguments of a checked call. `scratch` is the result that holds the partial results,
// [0] or [splits * G*B*S*Nq * (D + kExtras)] float32. Returns an empty string, or what the CUDA
// kernel does not take, which begins with the operator's name.
std::string MakeArguments(const Call& call, const Shape& shape, const Tensor& scratch,
                          Arguments* arguments);

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_CALL_H_
