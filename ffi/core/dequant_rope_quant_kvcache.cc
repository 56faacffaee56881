// Owns the checks of a call in canonical form.
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "canonical.h"

namespace jax_kvcache {
namespace {

// a * b, or nothing where int64_t cannot hold it. Both are >= 0.
std::optional<int64_t> Product(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

bool IsAbsent(const Tensor& t) { return t.rank == 1 && t.dims[0] == 0; }

bool IsOneOf(DType dtype, std::initializer_list<DType> allowed) {
  for (const DType candidate : allowed) {
    if (candidate == dtype) return true;
  }
  return false;
}

std::string DTypesText(std::initializer_list<DType> allowed) {
  std::string text;
  size_t left = allowed.size();
  for (const DType dtype : allowed) {
    text += DTypeName(dtype);
    --left;
    if (left > 0) text += left == 1 ? " or " : ", ";
  }
  return text;
}

// One expected shape, written as the user would: `symbols` = "[*g, T, D]"; `dims` the numbers.
struct Expected {
  const char* symbols;
  int64_t dims[kMaxGroupRank + 2];
  int64_t rank;
};

// Runs the checks in turn; the first failure stays, and later checks are not made.
class Checker {
 public:
  Checker(const Call& call, Shape* shape) : call_(call), shape_(*shape) {}

  std::string Run() {
    const bool ok = Buffers() && Groups() && Caches() && Tokens() && DTypes() && Parameters() &&
                    Results() && Aliasing();
    return ok ? std::string() : error_;
  }

 private:
  bool Fail(const char* name, const std::string& what) {
    error_ = std::string(kOperator) + ": `" + name + "` " + what;
    return false;
  }

  bool FailShape(const char* name, const std::string& expected, const Tensor& got) {
    return Fail(name,
                "must have shape " + expected + ", got " + DimsText(got.dims, got.rank) + ".");
  }

  // No dimension is negative, and every array's size in bytes fits int64_t.
  bool Buffer(const char* name, const Tensor& t) {
    std::optional<int64_t> bytes = ItemSize(t.dtype);
    for (int64_t i = 0; i < t.rank; ++i) {
      if (t.dims[i] < 0)
        return Fail(name, "has a negative dimension: " + DimsText(t.dims, t.rank) + ".");
      bytes = Product(*bytes, t.dims[i]);
      if (!bytes) return Fail(name, "is too large: " + DimsText(t.dims, t.rank) + ".");
    }
    if (*bytes > 0 && t.data == nullptr) return Fail(name, "has no memory.");
    return true;
  }

  bool Buffers() {
    for (int i = 0; i < kNumArgs; ++i) {
      if (!Buffer(kArgNames[i], call_.args[i])) return false;
    }
    for (int i = 0; i < kNumRets; ++i) {
      if (!Buffer(kRetNames[i], call_.rets[i])) return false;
    }
    return true;
  }

  bool NoZero(const char* name, const Tensor& t) {
    for (int64_t i = 0; i < t.rank; ++i) {
      if (t.dims[i] == 0) {
        return Fail(name,
                    "must have no dimension of size 0, got " + DimsText(t.dims, t.rank) + ".");
      }
    }
    return true;
  }

  // g and T, from slots.
  bool Groups() {
    const Tensor& slots = call_.args[kSlots];
    if (slots.rank < 1 || slots.rank > kMaxGroupRank + 1) {
      return Fail("slots", "must have rank 1 to " + std::to_string(kMaxGroupRank + 1) +
                               " ([*g, T]), got rank " + std::to_string(slots.rank) + ".");
    }
    if (!NoZero("slots", slots)) return false;
    shape_.group_rank = static_cast<int>(slots.rank - 1);
    shape_.groups = 1;
    for (int i = 0; i < shape_.group_rank; ++i) {
      shape_.group_dims[i] = slots.dims[i];
      shape_.groups *= slots.dims[i];
    }
    shape_.tokens = slots.dims[shape_.group_rank];
    return true;
  }

  // r, Nkv and D, from k_cache.
  bool Caches() {
    const Tensor& k = call_.args[kKCache];
    const int g = shape_.group_rank;
    if (k.rank < g + 3) {
      return Fail("k_cache", "must have rank " + std::to_string(g + 3) +
                                 " or more ([*g, *r, Nkv, D]), got rank " + std::to_string(k.rank) +
                                 ".");
    }
    if (!NoZero("k_cache", k)) return false;
    for (int i = 0; i < g; ++i) {
      if (k.dims[i] != shape_.group_dims[i]) {
        return FailShape(
            "k_cache",
            "[*g, *r, Nkv, D] with g = " + DimsText(shape_.group_dims, shape_.group_rank), k);
      }
    }
    shape_.rows = 1;
    for (int64_t i = g; i < k.rank - 2; ++i) shape_.rows *= k.dims[i];
    if (shape_.rows > std::numeric_limits<int32_t>::max()) {
      return Fail("k_cache", "must have at most 2147483647 rows per group, got " +
                                 std::to_string(shape_.rows) + ".");
    }
    shape_.num_kv = k.dims[k.rank - 2];
    shape_.head_dim = k.dims[k.rank - 1];
    if (shape_.head_dim % 2 != 0) {
      return Fail("k_cache", "must have an even last dimension D, got D = " +
                                 std::to_string(shape_.head_dim) + ".");
    }
    return Same("v_cache", call_.args[kVCache], "k_cache", k);
  }

  // x, cos and sin: H, Nq. What is flat has at most as many elements as x, whose number fits.
  bool Tokens() {
    const Tensor& x = call_.args[kX];
    const int64_t d = shape_.head_dim;
    if (x.rank != shape_.group_rank + 2) {
      return Fail("x", "must have rank " + std::to_string(shape_.group_rank + 2) +
                           " ([*g, T, H]), got rank " + std::to_string(x.rank) + ".");
    }
    const int64_t hidden = x.dims[x.rank - 1];
    if (!Exact("x", x, WithGroups("[*g, T, H]", {shape_.tokens, hidden}))) return false;
    // Nkv * D fits, being part of a cache that fits; three times that may not.
    const int64_t kv_width = shape_.num_kv * d;
    if (hidden % d != 0 || hidden / d <= 2 * (kv_width / d)) {
      return Fail("x", "must have H = (Nq + 2*Nkv) * D with Nq >= 1, Nkv = " +
                           std::to_string(shape_.num_kv) + ", D = " + std::to_string(d) +
                           ", got H = " + std::to_string(hidden) + ".");
    }
    shape_.num_q = hidden / d - 2 * shape_.num_kv;
    const Expected table = {"[G * T * D]", {shape_.groups * shape_.tokens * d}, 1};
    return Exact("cos", call_.args[kCos], table) && Exact("sin", call_.args[kSin], table);
  }

  bool DTypes() {
    const Call& c = call_;
    const bool ok = Typed(kX, {DType::kS32, DType::kF16, DType::kBF16, DType::kF32}) &&
                    Typed(kCos, {DType::kF16, DType::kBF16, DType::kF32}) &&
                    Typed(kSin, {c.args[kCos].dtype}) && Typed(kKCache, {DType::kS8}) &&
                    Typed(kVCache, {DType::kS8}) && Typed(kSlots, {DType::kS32}) &&
                    Typed(kScaleK, {DType::kF32}) && Typed(kScaleV, {DType::kF32}) &&
                    Typed(kOffsetK, {DType::kF32}) && Typed(kOffsetV, {DType::kF32}) &&
                    Typed(kWeightScale, {DType::kF32}) && Typed(kActivationScale, {DType::kF32}) &&
                    Typed(kBias, {DType::kF32, DType::kF16, DType::kBF16, DType::kS32});
    if (!ok) return false;
    shape_.x = c.args[kX].dtype;
    shape_.table = c.args[kCos].dtype;
    shape_.bias = c.args[kBias].dtype;
    if (shape_.x != DType::kS32 && shape_.x != shape_.table) {
      return Fail("cos", "must have the dtype of `x` unless that is int32, " + DTypeName(shape_.x) +
                             ", got " + DTypeName(shape_.table) + ".");
    }
    return true;
  }

  bool Parameters() {
    const int64_t n = shape_.num_kv;
    const int64_t d = shape_.head_dim;
    const Expected per_head = WithGroups("[*g', Nkv, D]", {n, d});
    const Expected per_column = WithGroups("[*g', H]", {shape_.hidden()});
    shape_.has_offset = !IsAbsent(call_.args[kOffsetK]);
    if (shape_.has_offset == IsAbsent(call_.args[kOffsetV])) {
      const bool k = shape_.has_offset;
      return Fail(k ? "offset_v" : "offset_k", std::string("must be given together with `") +
                                                   (k ? "offset_k" : "offset_v") +
                                                   "`, got shape [0].");
    }
    if (!Parameter(kScaleK, per_head) || !Parameter(kScaleV, per_head)) return false;
    if (shape_.has_offset && !(Parameter(kOffsetK, per_head) && Parameter(kOffsetV, per_head))) {
      return false;
    }
    if (shape_.x != DType::kS32) {
      return Without(kWeightScale) && Without(kActivationScale) && Without(kBias);
    }
    shape_.has_activation_scale = !IsAbsent(call_.args[kActivationScale]);
    shape_.has_bias = !IsAbsent(call_.args[kBias]);
    if (!Parameter(kWeightScale, per_column)) return false;
    if (shape_.has_activation_scale && !Exact("activation_scale", call_.args[kActivationScale],
                                              WithGroups("[*g, T]", {shape_.tokens}))) {
      return false;
    }
    return !shape_.has_bias || Parameter(kBias, per_column);
  }

  bool Results() {
    const int64_t zero = 0;
    shape_.kv_output = call_.kv_output;
    for (const Ret ret : {kQOut, kKOut, kVOut}) {
      const Tensor& t = call_.rets[ret];
      if (t.dtype != shape_.table) {
        return Fail(kRetNames[ret], "must have the dtype of `cos`, " + DTypeName(shape_.table) +
                                        ", got " + DTypeName(t.dtype) + ".");
      }
      if (ret != kQOut && !shape_.kv_output) {
        if (!IsAbsent(t)) return FailShape(kRetNames[ret], DimsText(&zero, 1), t);
        continue;
      }
      const int64_t heads = ret == kQOut ? shape_.num_q : shape_.num_kv;
      const int64_t count = shape_.groups * shape_.tokens * heads * shape_.head_dim;
      const char* symbols = ret == kQOut ? "[G * T * Nq * D]" : "[G * T * Nkv * D]";
      if (!Exact(kRetNames[ret], t, {symbols, {count}, 1})) return false;
    }
    return Same(kRetNames[kKCacheOut], call_.rets[kKCacheOut], "k_cache", call_.args[kKCache]) &&
           Same(kRetNames[kVCacheOut], call_.rets[kVCacheOut], "k_cache", call_.args[kKCache]);
  }

  bool Aliasing() {
    if (call_.args[kKCache].data != call_.rets[kKCacheOut].data) return NotInPlace("k_cache");
    if (call_.args[kVCache].data != call_.rets[kVCacheOut].data) return NotInPlace("v_cache");
    if (call_.args[kKCache].data == call_.args[kVCache].data) {
      return Fail("v_cache", "must be another array than `k_cache`, got the same memory.");
    }
    return true;
  }

  bool NotInPlace(const char* name) {
    return Fail(
        name, "must be the memory of its result: give the call input_output_aliases {3: 3, 4: 4}.");
  }

  bool Typed(Arg arg, std::initializer_list<DType> allowed) {
    const DType got = call_.args[arg].dtype;
    if (IsOneOf(got, allowed)) return true;
    return Fail(kArgNames[arg],
                "must have dtype " + DTypesText(allowed) + ", got " + DTypeName(got) + ".");
  }

  bool Without(Arg arg) {
    if (IsAbsent(call_.args[arg])) return true;
    return Fail(kArgNames[arg], "goes with an int32 `x` only: it must have shape [0], got " +
                                    DimsText(call_.args[arg].dims, call_.args[arg].rank) + ".");
  }

  bool Same(const char* name, const Tensor& t, const char* of_name, const Tensor& of) {
    bool same = t.rank == of.rank && t.dtype == of.dtype;
    for (int64_t i = 0; same && i < of.rank; ++i) same = t.dims[i] == of.dims[i];
    if (same) return true;
    return Fail(name, std::string("must have the shape and dtype of `") + of_name + "`, " +
                          DimsText(of.dims, of.rank) + " " + DTypeName(of.dtype) + ", got " +
                          DimsText(t.dims, t.rank) + " " + DTypeName(t.dtype) + ".");
  }

  Expected WithGroups(const char* symbols, std::initializer_list<int64_t> rest) const {
    Expected e = {symbols, {}, 0};
    for (int i = 0; i < shape_.group_rank; ++i) e.dims[e.rank++] = shape_.group_dims[i];
    for (const int64_t dim : rest) e.dims[e.rank++] = dim;
    return e;
  }

  bool Exact(const char* name, const Tensor& t, const Expected& e) {
    bool same = t.rank == e.rank;
    for (int64_t i = 0; same && i < e.rank; ++i) same = t.dims[i] == e.dims[i];
    if (!same) {
      return FailShape(name, std::string(e.symbols) + " = " + DimsText(e.dims, e.rank), t);
    }
    return NoZero(name, t);
  }

  // As Exact, but a group dimension may also be 1; remembers which are full.
  bool Parameter(Arg arg, const Expected& e) {
    const Tensor& t = call_.args[arg];
    bool same = t.rank == e.rank;
    uint32_t mask = 0;
    for (int64_t i = 0; same && i < e.rank; ++i) {
      const bool group = i < shape_.group_rank;
      if (group && t.dims[i] == e.dims[i] && e.dims[i] != 1) mask |= 1U << i;
      same = t.dims[i] == e.dims[i] || (group && t.dims[i] == 1);
    }
    if (!same) {
      std::string expected = std::string(e.symbols) + " = " + DimsText(e.dims, e.rank);
      if (shape_.group_rank > 0) expected += " (or 1 for any of g')";
      return FailShape(kArgNames[arg], expected, t);
    }
    shape_.group_mask[arg] = mask;
    return true;
  }

  const Call& call_;
  Shape& shape_;
  std::string error_;
};

}  // namespace

std::string Validate(const Call& call, Shape* shape) {
  *shape = Shape();
  return Checker(call, shape).Run();
}

}  // namespace jax_kvcache
