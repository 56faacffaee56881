// Owns the checks of one native call of decode_attention.
#include "core/decode_attention.h"

#include <cmath>
#include <initializer_list>
#include <string>

#include "core/checks.h"

namespace jax_kvcache::decode_attention {
namespace {

// Makes the checks in turn and fills the shape as it goes.
class Checker : private Checks {
 public:
  Checker(const Call& call, Shape* shape) : Checks(kOperator), call_(call), shape_(*shape) {}

  std::string Run() {
    const bool ok = CheckMemory() && CheckTable() && CheckQueries() && CheckCaches() &&
                    CheckDTypes() && CheckParameters() && CheckAttributes() && CheckResults();
    return ok ? std::string() : error();
  }

 private:
  bool CheckMemory() {
    for (int i = 0; i < kNumArgs; ++i) {
      if (!HasMemory(kArgNames[i], call_.args[i])) return false;
    }
    for (int i = 0; i < kNumRets; ++i) {
      if (!HasMemory(kRetNames[i], call_.rets[i])) return false;
    }
    return true;
  }

  // Reads g, B and M from table.
  bool CheckTable() {
    const Tensor& table = call_.args[kTable];
    if (!ReadGroups("table", table, "[*g, B, M]", 2, &shape_.groups)) return false;
    shape_.sequences = table.dims[shape_.groups.rank];
    shape_.table_blocks = table.dims[shape_.groups.rank + 1];
    return true;
  }

  // Reads S, Nq and D from q.
  bool CheckQueries() {
    const Tensor& q = call_.args[kQ];
    const int g = shape_.groups.rank;
    if (q.rank != g + 4) {
      return Fail("q", "must have rank " + std::to_string(g + 4) +
                           " ([*g, B, S, Nq, D]), got rank " + std::to_string(q.rank) + ".");
    }
    shape_.queries = q.dims[g + 1];
    shape_.num_q_heads = q.dims[g + 2];
    shape_.head_dim = q.dims[g + 3];
    return HasShape("q", q, QueryShape()) &&
           HasShape("positions", call_.args[kPositions],
                    PerGroup("[*g, B, S]", {shape_.sequences, shape_.queries}));
  }

  // Reads n, R and Nkv from k_cache.
  bool CheckCaches() {
    const Tensor& k = call_.args[kKCache];
    const Tensor& v = call_.args[kVCache];
    const int g = shape_.groups.rank;
    if (k.rank < g + 4) {
      return Fail("k_cache", "must have rank " + std::to_string(g + 4) +
                                 " or more ([*g', *n, R, Nkv, D]), got rank " +
                                 std::to_string(k.rank) + ".");
    }
    if (!HasNoEmptyDimension("k_cache", k)) return false;
    shape_.num_kv_heads = k.dims[k.rank - 2];
    shape_.block_rows = k.dims[k.rank - 3];
    shape_.blocks = 1;
    for (int64_t i = g; i < k.rank - 3; ++i) shape_.blocks *= k.dims[i];
    if (k.dims[k.rank - 1] != shape_.head_dim || shape_.num_q_heads % shape_.num_kv_heads != 0) {
      return FailShape("k_cache",
                       "[*g', *n, R, Nkv, D] with D = " + std::to_string(shape_.head_dim) +
                           " and Nkv a divisor of Nq = " + std::to_string(shape_.num_q_heads),
                       k);
    }
    if (!CacheGroups(kKCache)) return false;
    bool same = v.rank == k.rank;
    for (int64_t i = g; same && i < k.rank; ++i) same = v.dims[i] == k.dims[i];
    if (!same) {
      return FailShape("v_cache",
                       "[*g', *n, R, Nkv, D] with the dimensions of `k_cache` after the first " +
                           std::to_string(g) + ", " + DimsText(k.dims, k.rank),
                       v);
    }
    return CacheGroups(kVCache);
  }

  // The group dimensions of a cache, whose rank has been checked.
  bool CacheGroups(Arg arg) {
    const Tensor& cache = call_.args[arg];
    const Groups& groups = shape_.groups;
    for (int i = 0; i < groups.rank; ++i) {
      if (cache.dims[i] == 1) continue;
      if (cache.dims[i] != groups.dims[i]) {
        return FailShape(kArgNames[arg],
                         "[*g', *n, R, Nkv, D] with g' = " + DimsText(groups.dims, groups.rank) +
                             " (or 1 for any of g')",
                         cache);
      }
      shape_.group_mask[arg] |= 1U << i;
    }
    return true;
  }

  bool CheckDTypes() {
    shape_.q_dtype = call_.args[kQ].dtype;
    return Typed(kQ, {DType::kF16, DType::kBF16, DType::kF32}) && Typed(kKCache, {DType::kS8}) &&
           Typed(kVCache, {DType::kS8}) && Typed(kTable, {DType::kS32}) &&
           Typed(kPositions, {DType::kS32}) && Typed(kScaleK, {DType::kF32}) &&
           Typed(kScaleV, {DType::kF32}) && Typed(kOffsetK, {DType::kF32}) &&
           Typed(kOffsetV, {DType::kF32}) && Typed(kSinks, {DType::kF32});
  }

  bool CheckParameters() {
    const ExpectedShape per_channel =
        PerGroup("[*g', Nkv, D]", {shape_.num_kv_heads, shape_.head_dim});
    shape_.has_offset = !IsAbsent(call_.args[kOffsetK]);
    if (shape_.has_offset == IsAbsent(call_.args[kOffsetV])) {
      const bool has_k = shape_.has_offset;
      return Fail(has_k ? "offset_v" : "offset_k", std::string("must be given together with `") +
                                                       (has_k ? "offset_k" : "offset_v") +
                                                       "`, got shape [0].");
    }
    if (!Parameter(kScaleK, per_channel) || !Parameter(kScaleV, per_channel)) return false;
    if (shape_.has_offset &&
        !(Parameter(kOffsetK, per_channel) && Parameter(kOffsetV, per_channel))) {
      return false;
    }
    shape_.has_sinks = !IsAbsent(call_.args[kSinks]);
    return !shape_.has_sinks || Parameter(kSinks, PerGroup("[*g', Nq]", {shape_.num_q_heads}));
  }

  bool CheckAttributes() {
    shape_.scale = call_.scale;
    shape_.window = call_.window;
    shape_.soft_cap = call_.soft_cap;
    shape_.return_lse = call_.return_lse;
    if (call_.window < 0) {
      return Fail("window",
                  "must be 0 (no window) or more rows, got " + std::to_string(call_.window) + ".");
    }
    if (!(call_.soft_cap >= 0.0f) || std::isinf(call_.soft_cap)) {
      return Fail("soft_cap", "must be 0 (no cap) or a finite number above 0, got " +
                                  std::to_string(call_.soft_cap) + ".");
    }
    return true;
  }

  bool CheckResults() {
    const Tensor& out = call_.rets[kOut];
    const Tensor& lse = call_.rets[kLse];
    if (!HasDType("out", out, {shape_.q_dtype}) || !HasDType("lse", lse, {DType::kF32}) ||
        !HasShape("out", out, QueryShape())) {
      return false;
    }
    if (shape_.return_lse) {
      return HasShape(
          "lse", lse,
          PerGroup("[*g, B, S, Nq]", {shape_.sequences, shape_.queries, shape_.num_q_heads}));
    }
    return IsAbsent(lse) || FailShape("lse", "[0]", lse);
  }

  bool Typed(Arg arg, std::initializer_list<DType> allowed) {
    return HasDType(kArgNames[arg], call_.args[arg], allowed);
  }

  bool Parameter(Arg arg, const ExpectedShape& expected) {
    return HasParameterShape(kArgNames[arg], call_.args[arg], expected, shape_.groups,
                             &shape_.group_mask[arg]);
  }

  ExpectedShape QueryShape() const {
    return PerGroup("[*g, B, S, Nq, D]",
                    {shape_.sequences, shape_.queries, shape_.num_q_heads, shape_.head_dim});
  }

  ExpectedShape PerGroup(const char* symbols, std::initializer_list<int64_t> rest) const {
    return WithGroups(shape_.groups, symbols, rest);
  }

  const Call& call_;
  Shape& shape_;
};

}  // namespace

std::string Validate(const Call& call, Shape* shape) {
  *shape = Shape();
  return Checker(call, shape).Run();
}

}  // namespace jax_kvcache::decode_attention
