// Owns what the instructions do that nvcc compiles the kernels to, but for accesses to memory and
// what a warp does together.
#include "tests/ptx/instructions.h"

#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "cuda/numbers.h"
#include "tests/check.h"

namespace jax_kvcache::ptx {
namespace {

using cuda::BitCast;
using cuda::Half;

using Maker = std::function<Operation(const Operands&)>;
using Table = std::map<std::string, Maker>;

template <typename... From, typename Function, size_t... i>
Maker EachLaneImpl(const Function& function, std::index_sequence<i...> /*sources*/) {
  return [function](const Operands& operands) -> Operation {
    Check(operands.registers.size() == 1 + sizeof...(From), "another number of operands");
    return [function, operands](Warp& warp, Lanes lanes) {
      ForEach(lanes, [&](int lane) {
        warp.Set(operands[0], lane, function(warp.Get<From>(operands[1 + i], lane)...));
      });
    };
  };
}

// Each lane's first register becomes a function of its others, which have these types.
template <typename... From, typename Function>
Maker EachLane(const Function& function) {
  return EachLaneImpl<From...>(function, std::index_sequence_for<From...>());
}

// Every NaN that arithmetic gives has these bits.
float Canonical(float value) { return value == value ? value : BitCast<float>(0x7FFFFFFFU); }
float Flush(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

template <typename T>
void AddComparisons(Table* table, const std::string& type) {
  const auto add = [&](const std::string& name, auto compare) {
    (*table)["setp." + name + type] = EachLane<T, T>(compare);
  };
  add("eq", [](T a, T b) { return a == b; });
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {
    add("ne", [](T a, T b) { return a < b || a > b; });
    add("neu", [](T a, T b) { return !(a == b); });
    add("ltu", [](T a, T b) { return !(a >= b); });
    add("leu", [](T a, T b) { return !(a > b); });
    add("gtu", [](T a, T b) { return !(a <= b); });
    add("geu", [](T a, T b) { return !(a < b); });
    add("num", [](T a, T b) { return a == a && b == b; });
    add("nan", [](T a, T b) { return a != a || b != b; });
  } else {
    add("ne", [](T a, T b) { return a != b; });
  }
}

// What does not depend on what the bits mean.
template <typename T>
void AddLogic(Table* table, const std::string& type) {
  (*table)["mov" + type] = EachLane<T>([](T a) { return a; });
  (*table)["selp" + type] = EachLane<T, T, bool>([](T a, T b, bool p) { return p ? a : b; });
  (*table)["and" + type] = EachLane<T, T>([](T a, T b) { return static_cast<T>(a & b); });
  (*table)["or" + type] = EachLane<T, T>([](T a, T b) { return static_cast<T>(a | b); });
  (*table)["xor" + type] = EachLane<T, T>([](T a, T b) { return static_cast<T>(a ^ b); });
  if constexpr (std::is_same_v<T, bool>) {
    (*table)["not" + type] = EachLane<T>([](T a) { return !a; });
  } else {
    constexpr uint32_t kBits = 8 * sizeof(T);
    (*table)["not" + type] = EachLane<T>([](T a) { return static_cast<T>(~a); });
    (*table)["shl" + type] = EachLane<T, uint32_t>(
        [](T a, uint32_t by) { return by < kBits ? static_cast<T>(a << by) : T{0}; });
  }
}

template <typename T>
void AddIntegers(Table* table, const std::string& type) {
  using Unsigned = std::make_unsigned_t<T>;
  using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  const auto add = [&](const std::string& name, auto function) {
    (*table)[name + type] = EachLane<T, T>(function);
  };
  // Sums and products of unsigned integers have the same bits, and wrap.
  const auto wrapped = [](auto function) {
    return [function](T a, T b) {
      return static_cast<T>(function(static_cast<Unsigned>(a), static_cast<Unsigned>(b)));
    };
  };
  add("add", wrapped([](Unsigned a, Unsigned b) { return a + b; }));
  add("sub", wrapped([](Unsigned a, Unsigned b) { return a - b; }));
  add("mul.lo", wrapped([](Unsigned a, Unsigned b) { return a * b; }));
  add("min", [](T a, T b) { return a < b ? a : b; });
  add("max", [](T a, T b) { return a > b ? a : b; });
  const auto divided = [](auto function) {
    return [function](T a, T b) {
      if (b == 0) Fail("a division by zero");
      return static_cast<T>(function(a, b));
    };
  };
  add("div", divided([](T a, T b) { return a / b; }));
  add("rem", divided([](T a, T b) { return a % b; }));
  if constexpr (sizeof(T) == 4) {
    add("mul.wide", [](T a, T b) { return Wide{a} * b; });
    add("mul.hi", [](T a, T b) { return static_cast<T>((Wide{a} * b) >> 32); });
  }
  (*table)["neg" + type] = EachLane<Unsigned>([](Unsigned a) { return Unsigned{0} - a; });
  (*table)["mad.lo" + type] = EachLane<Unsigned, Unsigned, Unsigned>(
      [](Unsigned a, Unsigned b, Unsigned c) { return a * b + c; });
  (*table)["shr" + type] = EachLane<T, uint32_t>([](T a, uint32_t by) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    return static_cast<T>(by < kBits ? a >> by : a < 0 ? -1 : 0);
  });
}

template <typename To, typename From>
void AddConversion(Table* table, const std::string& to, const std::string& from) {
  (*table)["cvt" + to + from] = EachLane<From>([](From a) { return static_cast<To>(a); });
}

template <typename From>
void AddConversions(Table* table, const std::string& from) {
  AddConversion<uint16_t, From>(table, ".u16", from);
  AddConversion<int16_t, From>(table, ".s16", from);
  AddConversion<uint32_t, From>(table, ".u32", from);
  AddConversion<int32_t, From>(table, ".s32", from);
  AddConversion<uint64_t, From>(table, ".u64", from);
  AddConversion<int64_t, From>(table, ".s64", from);
}

void AddFloats(Table* table) {
  const auto add = [&](const std::string& name, auto function) {
    (*table)[name] =
        EachLane<float, float>([function](float a, float b) { return Canonical(function(a, b)); });
  };
  // With or without .rn they round to nearest even.
  for (const std::string type : {".f32", ".rn.f32"}) {
    add("add" + type, [](float a, float b) { return a + b; });
    add("sub" + type, [](float a, float b) { return a - b; });
    add("mul" + type, [](float a, float b) { return a * b; });
  }
  add("div.rn.f32", [](float a, float b) { return a / b; });
  add("max.f32", [](float a, float b) { return std::fmax(a, b); });
  add("min.f32", [](float a, float b) { return std::fmin(a, b); });
  add("copysign.f32", [](float sign, float magnitude) { return std::copysign(magnitude, sign); });
  (*table)["fma.rn.f32"] = EachLane<float, float, float>(
      [](float a, float b, float c) { return Canonical(std::fma(a, b, c)); });
  (*table)["neg.f32"] = EachLane<float>([](float a) { return -a; });
  (*table)["abs.f32"] = EachLane<float>([](float a) { return std::fabs(a); });
  (*table)["rcp.rn.f32"] = EachLane<float>([](float a) { return Canonical(1.0f / a); });
  // The approximations are those of the host, which are closer.
  (*table)["rcp.approx.ftz.f32"] =
      EachLane<float>([](float a) { return Canonical(Flush(1.0f / Flush(a))); });
  (*table)["ex2.approx.ftz.f32"] =
      EachLane<float>([](float a) { return Canonical(Flush(std::exp2(Flush(a)))); });
  (*table)["lg2.approx.ftz.f32"] =
      EachLane<float>([](float a) { return Canonical(std::log2(Flush(a))); });

  (*table)["cvt.rn.f16.f32"] = EachLane<float>([](float a) { return cuda::ToHalf(a); });
  (*table)["cvt.rn.bf16.f32"] = EachLane<float>([](float a) { return cuda::ToBFloat(a); });
  (*table)["cvt.f32.f16"] = EachLane<Half>([](Half a) { return cuda::ToFloat(a); });
  (*table)["cvt.rn.f32.s32"] = EachLane<int32_t>([](int32_t a) { return static_cast<float>(a); });
  (*table)["cvt.rni.s32.f32"] =
      EachLane<float>([](float a) { return a == a ? cuda::RoundToInt(a) : 0; });
}

void AddHalves(Table* table) {
  (*table)["add.rn.f16"] = EachLane<Half, Half>([](Half a, Half b) { return cuda::Add(a, b); });
  (*table)["mul.rn.f16"] =
      EachLane<Half, Half>([](Half a, Half b) { return cuda::Multiply(a, b); });
  (*table)["sub.f16x2"] = EachLane<uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
    const auto half = [&](int i) {
      return cuda::ToHalf(cuda::HalfOfWord(a, i) - cuda::HalfOfWord(b, i));
    };
    return cuda::PackHalves(half(0), half(1));
  });
}

// A register of two halves, from them and to them.
template <typename Whole, typename Part>
void AddPacking(Table* table, const std::string& type) {
  constexpr int kBits = 8 * sizeof(Part);
  (*table)["pack" + type] = EachLane<Part, Part>(
      [](Part low, Part high) { return static_cast<Whole>(Whole{high} << kBits | low); });
  (*table)["unpack" + type] = [](const Operands& operands) -> Operation {
    return [operands](Warp& warp, Lanes lanes) {
      ForEach(lanes, [&](int lane) {
        const Whole whole = warp.Get<Whole>(operands[2], lane);
        warp.Set(operands[0], lane, static_cast<Part>(whole));
        warp.Set(operands[1], lane, static_cast<Part>(whole >> kBits));
      });
    };
  };
}

Table MakeTable() {
  Table table;
  AddLogic<bool>(&table, ".pred");
  for (const std::string kind : {".b", ".u", ".s"}) {
    AddLogic<uint16_t>(&table, kind + "16");
    AddLogic<uint32_t>(&table, kind + "32");
    AddLogic<uint64_t>(&table, kind + "64");
  }
  AddLogic<uint32_t>(&table, ".f32");
  AddComparisons<uint16_t>(&table, ".b16");
  AddComparisons<uint16_t>(&table, ".u16");
  AddComparisons<int16_t>(&table, ".s16");
  AddComparisons<uint32_t>(&table, ".b32");
  AddComparisons<uint32_t>(&table, ".u32");
  AddComparisons<int32_t>(&table, ".s32");
  AddComparisons<uint64_t>(&table, ".b64");
  AddComparisons<uint64_t>(&table, ".u64");
  AddComparisons<int64_t>(&table, ".s64");
  AddComparisons<float>(&table, ".f32");
  AddIntegers<uint32_t>(&table, ".u32");
  AddIntegers<int32_t>(&table, ".s32");
  AddIntegers<uint64_t>(&table, ".u64");
  AddIntegers<int64_t>(&table, ".s64");
  table["mul.wide.u16"] =
      EachLane<uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return uint32_t{a} * b; });
  AddConversions<uint16_t>(&table, ".u16");
  AddConversions<int16_t>(&table, ".s16");
  AddConversions<uint32_t>(&table, ".u32");
  AddConversions<int32_t>(&table, ".s32");
  AddConversions<uint64_t>(&table, ".u64");
  AddConversions<int64_t>(&table, ".s64");
  AddFloats(&table);
  AddHalves(&table);
  AddPacking<uint32_t, uint16_t>(&table, ".b32");
  AddPacking<uint64_t, uint32_t>(&table, ".b64");
  // A generic address of global memory is its address there.
  table["cvta.to.global.u64"] = EachLane<uint64_t>([](uint64_t a) { return a; });
  table["prmt.b32"] =
      EachLane<uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t selector) {
        if ((selector & 0x8888U) != 0) Fail("a selector of signs");
        return cuda::SelectBytes(low, high, selector);
      });
  return table;
}

}  // namespace

Operation MakeOperation(const std::string& name, const Operands& operands) {
  static const Table table = MakeTable();
  const auto found = table.find(name);
  if (found != table.end()) return found->second(operands);
  if (IsWarpWide(name)) return MakeWarpOperation(name, operands);
  return MakeMemoryOperation(name, operands);
}

}  // namespace jax_kvcache::ptx
