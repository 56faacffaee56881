// Owns the checks of one native call of dequant_rope_quant_kvcache.
#include "core/dequant_rope_quant_kvcache.h"

#include <initializer_list>
#include <limits>
#include <string>

#include "core/checks.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

// Makes the checks in turn and fills the shape as it goes.
class Checker : private Checks {
 public:
  Checker(const Call& call, Shape* shape) : Checks(kOperator), call_(call), shape_(*shape) {}

  std::string Run() {
    const bool ok = CheckMemory() && CheckSlots() && CheckCaches() && CheckTokens() &&
                    CheckDTypes() && CheckParameters() && CheckResults() && CheckAliasing();
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

  // Reads g and T from slots.
  bool CheckSlots() {
    const Tensor& slots = call_.args[kSlots];
    if (!ReadGroups("slots", slots, "[*g, T]", 1, &shape_.groups)) return false;
    shape_.tokens = slots.dims[shape_.groups.rank];
    return true;
  }

  // Reads r, Nkv and D from k_cache.
  bool CheckCaches() {
    const Tensor& k = call_.args[kKCache];
    const Groups& groups = shape_.groups;
    if (k.rank < groups.rank + 3) {
      return Fail("k_cache", "must have rank " + std::to_string(groups.rank + 3) +
                                 " or more ([*g, *r, Nkv, D]), got rank " + std::to_string(k.rank) +
                                 ".");
    }
    if (!HasNoEmptyDimension("k_cache", k)) return false;
    for (int i = 0; i < groups.rank; ++i) {
      if (k.dims[i] != groups.dims[i]) {
        return FailShape("k_cache",
                         "[*g, *r, Nkv, D] with g = " + DimsText(groups.dims, groups.rank), k);
      }
    }
    shape_.rows = 1;
    for (int64_t i = groups.rank; i < k.rank - 2; ++i) shape_.rows *= k.dims[i];
    if (shape_.rows > std::numeric_limits<int32_t>::max()) {
      return Fail("k_cache", "must have at most 2147483647 rows per group, got " +
                                 std::to_string(shape_.rows) + ".");
    }
    shape_.num_kv_heads = k.dims[k.rank - 2];
    shape_.head_dim = k.dims[k.rank - 1];
    if (shape_.head_dim % 2 != 0) {
      return Fail("k_cache", "must have an even last dimension D, got D = " +
                                 std::to_string(shape_.head_dim) + ".");
    }
    return IsLike("v_cache", call_.args[kVCache], "k_cache", k);
  }

  // Reads H, and with it Nq, from x.
  bool CheckTokens() {
    const Tensor& x = call_.args[kX];
    const int64_t d = shape_.head_dim;
    const int64_t num_kv_heads = shape_.num_kv_heads;
    if (x.rank != shape_.groups.rank + 2) {
      return Fail("x", "must have rank " + std::to_string(shape_.groups.rank + 2) +
                           " ([*g, T, H]), got rank " + std::to_string(x.rank) + ".");
    }
    const int64_t fused_width = x.dims[x.rank - 1];
    if (!HasShape("x", x, PerGroup("[*g, T, H]", {shape_.tokens, fused_width}))) return false;
    // 2 * Nkv cannot overflow: a cache, whose size fits, has Nkv * D elements or more, and D >= 2.
    if (fused_width % d != 0 || fused_width / d <= 2 * num_kv_heads) {
      return Fail("x", "must have H = (Nq + 2*Nkv) * D with Nq >= 1, Nkv = " +
                           std::to_string(num_kv_heads) + ", D = " + std::to_string(d) +
                           ", got H = " + std::to_string(fused_width) + ".");
    }
    shape_.num_q_heads = fused_width / d - 2 * num_kv_heads;
    // Each of the flat arrays has at most as many elements as x, whose number fits int64_t.
    const ExpectedShape table = {"[G * T * D]", {shape_.all_tokens() * d}, 1};
    return HasShape("cos", call_.args[kCos], table) && HasShape("sin", call_.args[kSin], table);
  }

  bool CheckDTypes() {
    const DType table = call_.args[kCos].dtype;
    const bool ok = Typed(kX, {DType::kS32, DType::kF16, DType::kBF16, DType::kF32}) &&
                    Typed(kCos, {DType::kF16, DType::kBF16, DType::kF32}) && Typed(kSin, {table}) &&
                    Typed(kKCache, {DType::kS8}) && Typed(kVCache, {DType::kS8}) &&
                    Typed(kSlots, {DType::kS32}) && Typed(kScaleK, {DType::kF32}) &&
                    Typed(kScaleV, {DType::kF32}) && Typed(kOffsetK, {DType::kF32}) &&
                    Typed(kOffsetV, {DType::kF32}) && Typed(kWeightScale, {DType::kF32}) &&
                    Typed(kActivationScale, {DType::kF32}) &&
                    Typed(kBias, {DType::kF32, DType::kF16, DType::kBF16, DType::kS32});
    if (!ok) return false;
    shape_.x_dtype = call_.args[kX].dtype;
    shape_.table_dtype = table;
    shape_.bias_dtype = call_.args[kBias].dtype;
    if (!shape_.x_is_accumulator() && shape_.x_dtype != table) {
      return Fail("cos", "must have the dtype of `x` unless that is int32, " +
                             DTypeName(shape_.x_dtype) + ", got " + DTypeName(table) + ".");
    }
    return true;
  }

  bool CheckParameters() {
    const ExpectedShape per_head =
        PerGroup("[*g', Nkv, D]", {shape_.num_kv_heads, shape_.head_dim});
    const ExpectedShape per_column = PerGroup("[*g', H]", {shape_.fused_width()});
    shape_.has_offset = !IsAbsent(call_.args[kOffsetK]);
    if (shape_.has_offset == IsAbsent(call_.args[kOffsetV])) {
      const bool has_k = shape_.has_offset;
      return Fail(has_k ? "offset_v" : "offset_k", std::string("must be given together with `") +
                                                       (has_k ? "offset_k" : "offset_v") +
                                                       "`, got shape [0].");
    }
    if (!Parameter(kScaleK, per_head) || !Parameter(kScaleV, per_head)) return false;
    if (shape_.has_offset && !(Parameter(kOffsetK, per_head) && Parameter(kOffsetV, per_head))) {
      return false;
    }
    if (!shape_.x_is_accumulator()) {
      return Absent(kWeightScale) && Absent(kActivationScale) && Absent(kBias);
    }
    shape_.has_activation_scale = !IsAbsent(call_.args[kActivationScale]);
    shape_.has_bias = !IsAbsent(call_.args[kBias]);
    if (!Parameter(kWeightScale, per_column)) return false;
    if (shape_.has_activation_scale && !HasShape("activation_scale", call_.args[kActivationScale],
                                                 PerGroup("[*g, T]", {shape_.tokens}))) {
      return false;
    }
    return !shape_.has_bias || Parameter(kBias, per_column);
  }

  bool CheckResults() {
    const int64_t zero = 0;
    shape_.kv_output = call_.kv_output;
    for (const Ret ret : {kQOut, kKOut, kVOut}) {
      const Tensor& t = call_.rets[ret];
      if (t.dtype != shape_.table_dtype) {
        return Fail(kRetNames[ret], "must have the dtype of `cos`, " +
                                        DTypeName(shape_.table_dtype) + ", got " +
                                        DTypeName(t.dtype) + ".");
      }
      if (ret != kQOut && !shape_.kv_output) {
        if (!IsAbsent(t)) return FailShape(kRetNames[ret], DimsText(&zero, 1), t);
        continue;
      }
      const int64_t heads = ret == kQOut ? shape_.num_q_heads : shape_.num_kv_heads;
      const int64_t count = shape_.all_tokens() * heads * shape_.head_dim;
      const char* symbols = ret == kQOut ? "[G * T * Nq * D]" : "[G * T * Nkv * D]";
      if (!HasShape(kRetNames[ret], t, {symbols, {count}, 1})) return false;
    }
    const Tensor& cache = call_.args[kKCache];
    return IsLike(kRetNames[kKCacheOut], call_.rets[kKCacheOut], "k_cache", cache) &&
           IsLike(kRetNames[kVCacheOut], call_.rets[kVCacheOut], "k_cache", cache);
  }

  bool CheckAliasing() {
    if (call_.args[kKCache].data != call_.rets[kKCacheOut].data) return FailAliasing("k_cache");
    if (call_.args[kVCache].data != call_.rets[kVCacheOut].data) return FailAliasing("v_cache");
    if (call_.args[kKCache].data == call_.args[kVCache].data) {
      return Fail("v_cache", "must be another array than `k_cache`, got the same memory.");
    }
    return true;
  }

  bool FailAliasing(const char* name) {
    return Fail(
        name, "must be the memory of its result: give the call input_output_aliases {3: 3, 4: 4}.");
  }

  bool Typed(Arg arg, std::initializer_list<DType> allowed) {
    return HasDType(kArgNames[arg], call_.args[arg], allowed);
  }

  bool Absent(Arg arg) {
    const Tensor& t = call_.args[arg];
    if (IsAbsent(t)) return true;
    return Fail(kArgNames[arg], "goes with an int32 `x` only: it must have shape [0], got " +
                                    DimsText(t.dims, t.rank) + ".");
  }

  bool Parameter(Arg arg, const ExpectedShape& expected) {
    return HasParameterShape(kArgNames[arg], call_.args[arg], expected, shape_.groups,
                             &shape_.group_mask[arg]);
  }

  ExpectedShape PerGroup(const char* symbols, std::initializer_list<int64_t> rest) const {
    return WithGroups(shape_.groups, symbols, rest);
  }

  const Call& call_;
  Shape& shape_;
};

}  // namespace

bool Shape::SharesParameters() const {
  uint32_t any = 0;
  for (const uint32_t mask : group_mask) any |= mask;
  return any == 0;
}

std::string Validate(const Call& call, Shape* shape) {
  *shape = Shape();
  return Checker(call, shape).Run();
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
