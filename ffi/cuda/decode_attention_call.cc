// Owns the checks that only the CUDA kernels of decode_attention need, and the division into
// blocks.
#include "cuda/decode_attention_call.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/checks.h"
#include "cuda/device.h"

namespace jax_kvcache::decode_attention::cuda {
namespace {

// What a block takes to begin and to end, in the rows that it could go through in that time.
constexpr int64_t kRowsOfOverhead = 64;

// Makes the checks in turn and fills the arguments as it goes.
class Maker : private Checks {
 public:
  Maker(const Call& call, const Shape& shape, const Tensor& scratch, Arguments* arguments)
      : Checks(kOperator), call_(call), shape_(shape), scratch_(scratch), a_(*arguments) {}

  std::string Run() {
    const bool ok = CheckHeadDim() && CheckSizes() && CheckAlignment() && CheckScratch();
    if (!ok) return error();
    Fill();
    return std::string();
  }

 private:
  bool CheckHeadDim() {
    for (const int64_t known : {64, 80, 96, 112, 128, 192, 256}) {
      if (shape_.head_dim == known) return true;
    }
    return Fail("q", "must have D = 64, 80, 96, 112, 128, 192 or 256 for the CUDA kernel, got " +
                         std::to_string(shape_.head_dim) + ".");
  }

  // Blocks of threads and elements of q are numbered in 32 bits.
  bool CheckSizes() {
    const int64_t elements = Rows() * shape_.head_dim;
    if (elements <= INT32_MAX) return true;
    return Fail("q", "must have at most 2147483647 elements for the CUDA kernel, got " +
                         std::to_string(elements) + ".");
  }

  bool CheckAlignment() {
    if (shape_.blocks * shape_.block_rows >= UINT32_MAX) {
      return Fail("k_cache", "must have fewer than 4294967295 rows for the CUDA kernel, got " +
                                 std::to_string(shape_.blocks * shape_.block_rows) + ".");
    }
    for (const Arg arg : {kKCache, kVCache, kScaleV, kOffsetV}) {
      if (reinterpret_cast<uintptr_t>(call_.args[arg].data) % 16 != 0) {
        return Fail(kArgNames[arg], "must begin at a multiple of 16 bytes for the CUDA kernel.");
      }
    }
    return true;
  }

  bool CheckScratch() {
    const int64_t per_split = Rows() * (shape_.head_dim + kExtras);
    const bool is_flat = scratch_.rank == 1 && scratch_.dtype == DType::kF32;
    if (!is_flat || scratch_.dims[0] % per_split != 0 || scratch_.dims[0] / per_split > INT32_MAX) {
      return FailShape("scratch", "[splits * " + std::to_string(per_split) + "] and dtype float32",
                       scratch_);
    }
    if (!HasMemory("scratch", scratch_)) return false;
    const int64_t splits = scratch_.dims[0] / per_split;
    a_.splits = splits < 1 ? 1 : static_cast<uint32_t>(splits);
    return true;
  }

  int64_t Rows() const {  // of q
    return shape_.groups.count * shape_.sequences * shape_.queries * shape_.num_q_heads;
  }

  void Fill() {
    const auto floats = [&](Arg arg) { return static_cast<const float*>(call_.args[arg].data); };
    a_.shape = shape_;
    a_.q = call_.args[kQ].data;
    a_.k_cache = static_cast<const int8_t*>(call_.args[kKCache].data);
    a_.v_cache = static_cast<const int8_t*>(call_.args[kVCache].data);
    a_.table = static_cast<const int32_t*>(call_.args[kTable].data);
    a_.positions = static_cast<const int32_t*>(call_.args[kPositions].data);
    a_.scale_k = floats(kScaleK);
    a_.scale_v = floats(kScaleV);
    if (shape_.has_offset) {
      a_.offset_k = floats(kOffsetK);
      a_.offset_v = floats(kOffsetV);
    }
    if (shape_.has_sinks) a_.sinks = floats(kSinks);
    a_.out = call_.rets[kOut].data;
    if (shape_.return_lse) a_.lse = static_cast<float*>(call_.rets[kLse].data);
    if (a_.splits > 1) a_.partials = static_cast<float*>(scratch_.data);
    a_.kv_heads = static_cast<uint32_t>(shape_.num_kv_heads);
    a_.queries_per_head = static_cast<uint32_t>(shape_.queries_per_kv_head());
    a_.sequences = static_cast<uint32_t>(shape_.sequences);
    a_.query_rows = static_cast<uint32_t>(shape_.queries) * a_.queries_per_head;
    a_.tiles = jax_kvcache::cuda::CeilDivide<uint32_t>(a_.query_rows, kTileRows);
  }

  const Call& call_;
  const Shape& shape_;
  const Tensor& scratch_;
  Arguments& a_;
};

}  // namespace

uint32_t ChooseSplits(const Arguments& arguments, int multiprocessors) {
  if (multiprocessors <= 0) return arguments.splits;
  const Shape& shape = arguments.shape;
  const int64_t at_once = int64_t{multiprocessors} * BlocksTogether(shape.head_dim);
  const int64_t blocks = arguments.Blocks() / arguments.splits;  // without splits
  int64_t rows = shape.table_blocks * shape.block_rows;
  if (shape.window > 0) rows = std::min(rows, shape.window + shape.queries);
  uint32_t best = 1;
  int64_t least = INT64_MAX;
  for (uint32_t splits = 1; splits <= arguments.splits; ++splits) {
    // Blocks come and go in waves, and each takes as long as it has rows.
    const int64_t waves = jax_kvcache::cuda::CeilDivide<int64_t>(blocks * splits, at_once);
    const int64_t of_block = jax_kvcache::cuda::CeilDivide<int64_t>(rows, splits);
    const int64_t cost = waves * (of_block + kRowsOfOverhead);
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

std::string MakeArguments(const Call& call, const Shape& shape, const Tensor& scratch,
                          Arguments* arguments) {
  *arguments = Arguments();
  return Maker(call, shape, scratch, arguments).Run();
}

}  // namespace jax_kvcache::decode_attention::cuda
