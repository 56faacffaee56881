// Owns the stand-in's checks of descriptors, dtypes, shapes and attributes.
#include "validation.h"

#include <initializer_list>

#include "device.h"
#include "ledger.h"

namespace standin {
namespace {

constexpr int32_t kNullptr = 161001;
constexpr int32_t kInvalid = 161002;
constexpr int32_t kTiling = 561002;

using Dims = std::vector<int64_t>;

std::string Text(const Dims& dims) {
  std::string text;
  for (const int64_t dim : dims) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + text + "]";
}

bool IsEmpty(const aclTensor& tensor) {
  for (const int64_t dim : tensor.dims) {
    if (dim == 0) return true;
  }
  return false;
}

class Check {
 public:
  Check(const aclTensor* const* tensors, const Attributes& attributes)
      : tensors_(tensors), attributes_(attributes) {}

  int32_t Run(std::string* message) {
    const bool ok = Present() && Descriptors() && DTypes() && Modes() && Shapes() && Limits();
    *message = message_;
    return ok ? 0 : status_;
  }

 private:
  bool Fail(int32_t status, const std::string& what) {
    status_ = status;
    message_ = "EZ0000: " + what;
    return false;
  }

  const aclTensor& At(Operand i) const { return *tensors_[i]; }
  bool Given(Operand i) const { return tensors_[i] != nullptr; }

  bool Present() {
    for (const Operand i :
         {kX, kCos, kSin, kKCache, kVCache, kIndices, kScaleK, kScaleV, kQOut, kKOut, kVOut}) {
      if (!Given(i)) return Fail(kNullptr, std::string(kOperandNames[i]) + " is null");
    }
    if (attributes_.size_splits == nullptr) return Fail(kNullptr, "sizeSplits is null");
    if (At(kX).dtype == ACL_INT32 && !Given(kWeightScale)) {
      return Fail(kNullptr, "weight_scale is null, which an int32 x requires");
    }
    return true;
  }

  // A descriptor that no operator could accept is recorded as a fault of the caller.
  bool Malformed(int i, const std::string& what) {
    Ledger::Get().Fault(std::string(kOperandNames[i]) + " " + what);
    return Fail(kInvalid, std::string(kOperandNames[i]) + " " + what);
  }

  bool Descriptors() {
    for (int i = 0; i < kNumOperands; ++i) {
      if (tensors_[i] == nullptr) continue;
      if (!Ledger::Get().IsAlive("tensor", tensors_[i])) return Malformed(i, "is destroyed");
      const aclTensor& t = *tensors_[i];
      if (t.format != ACL_FORMAT_ND) return Malformed(i, "has another format than ND");
      if (t.offset != 0) return Malformed(i, "has an offset");
      if (t.storage_dims != t.dims) return Malformed(i, "has another storage shape");
      Dims strides(t.dims.size());
      int64_t stride = 1;
      for (size_t axis = t.dims.size(); axis-- > 0; stride *= t.dims[axis]) strides[axis] = stride;
      if (t.strides != strides) return Malformed(i, "has strides " + Text(t.strides));
      if (!IsEmpty(t) && !IsDeviceAddress(t.data)) return Malformed(i, "is not on the device");
    }
    return true;
  }

  bool DType(Operand i, std::initializer_list<int> allowed) {
    if (!Given(i)) return true;
    for (const int dtype : allowed) {
      if (At(i).dtype == dtype) return true;
    }
    return Fail(kInvalid,
                std::string(kOperandNames[i]) + " has data type " + std::to_string(At(i).dtype));
  }

  bool DTypes() {
    const int table = At(kCos).dtype;
    bool ok = DType(kX, {ACL_INT32, ACL_FLOAT16, ACL_BF16}) &&
              DType(kCos, {ACL_FLOAT16, ACL_BF16}) && DType(kSin, {table}) &&
              DType(kBias, {ACL_FLOAT, ACL_FLOAT16, ACL_BF16, ACL_INT32}) &&
              DType(kIndices, {ACL_INT32});
    for (const Operand i : {kKCache, kVCache}) ok = ok && DType(i, {ACL_INT8});
    for (const Operand i : {kQOut, kKOut, kVOut}) ok = ok && DType(i, {table});
    for (const Operand i : {kScaleK, kScaleV, kOffsetK, kOffsetV, kWeightScale, kActivationScale}) {
      ok = ok && DType(i, {ACL_FLOAT});
    }
    if (ok && At(kX).dtype != ACL_INT32 && At(kX).dtype != table) {
      return Fail(kInvalid, "x and cos have different data types");
    }
    return ok;
  }

  static bool Is(const char* text, const char* expected) {
    return text != nullptr && std::string(text) == expected;
  }

  bool Modes() {
    if (!Is(attributes_.quant_mode, "static")) return Fail(kInvalid, "quantMode is not static");
    if (!Is(attributes_.layout, "BSND")) return Fail(kInvalid, "layout is not BSND");
    if (!Is(attributes_.cache_mode, "page") || At(kX).dims.size() != 2) {
      return Fail(kTiling, "the stand-in has page mode with 2-D x only");
    }
    return true;
  }

  bool Shape(Operand i, const Dims& expected) {
    if (!Given(i) || At(i).dims == expected) return true;
    return Fail(kInvalid, std::string(kOperandNames[i]) + " has shape " + Text(At(i).dims) +
                              ", not " + Text(expected));
  }

  bool Shapes() {
    const Dims& splits = attributes_.size_splits->values;
    const Dims& cache = At(kKCache).dims;
    if (cache.size() != 4) return Fail(kInvalid, "k_cache is not 4-D");
    const int64_t tokens = At(kX).dims[0];
    const int64_t fused_width = At(kX).dims[1];
    const int64_t n = cache[2];
    const int64_t d = cache[3];
    if (splits.size() != 3 || splits[0] + splits[1] + splits[2] != fused_width ||
        splits[1] != n * d || splits[2] != n * d || splits[0] % d != 0) {
      return Fail(kInvalid, "sizeSplits is " + Text(splits));
    }
    const Dims kv = attributes_.kv_output ? Dims{tokens, n, d} : Dims{0};
    return Shape(kCos, {tokens, d}) && Shape(kSin, {tokens, d}) && Shape(kVCache, cache) &&
           Shape(kIndices, {tokens}) && Shape(kScaleK, {n, d}) && Shape(kScaleV, {n, d}) &&
           Shape(kOffsetK, {n, d}) && Shape(kOffsetV, {n, d}) &&
           Shape(kWeightScale, {fused_width}) && Shape(kActivationScale, {tokens}) &&
           Shape(kBias, {fused_width}) && Shape(kQOut, {tokens, splits[0] / d, d}) &&
           Shape(kKOut, kv) && Shape(kVOut, kv);
  }

  // The documented limits, and shapes for which the published kernel computes wrong results.
  bool Limits() {
    const int64_t fused_width = At(kX).dims[1];
    const int64_t d = At(kKCache).dims[3];
    const int64_t row_size = At(kKCache).dims[2] * d;
    if (fused_width > 4096 || fused_width % 64 != 0) {
      return Fail(kTiling, "H = " + std::to_string(fused_width));
    }
    if (d % 16 != 0) return Fail(kTiling, "D = " + std::to_string(d));
    if (row_size % 64 != 0 || row_size >= 2048 || (At(kCos).dtype == ACL_FLOAT16 && d % 32 != 0)) {
      Ledger::Get().Fault("a shape for which the published kernel is wrong");
      return Fail(kTiling, "Nkv * D = " + std::to_string(row_size) + ", D = " + std::to_string(d));
    }
    return true;
  }

  const aclTensor* const* tensors_;
  const Attributes& attributes_;
  int32_t status_ = 0;
  std::string message_;
};

}  // namespace

int32_t CheckCall(const aclTensor* const* tensors, const Attributes& attributes,
                  std::string* message) {
  return Check(tensors, attributes).Run(message);
}

std::string DescriptorsJson(const aclTensor* const* tensors, const Attributes& attributes) {
  std::string json;
  for (int i = 0; i < kNumOperands; ++i) {
    json += std::string("\"") + kOperandNames[i] + "\": ";
    if (tensors[i] == nullptr) {
      json += "null, ";
      continue;
    }
    const aclTensor& t = *tensors[i];
    json += "{\"dtype\": " + std::to_string(t.dtype) + ", \"dims\": " + Text(t.dims) +
            ", \"strides\": " + Text(t.strides) + ", \"storage_dims\": " + Text(t.storage_dims) +
            ", \"format\": " + std::to_string(t.format) +
            ", \"offset\": " + std::to_string(t.offset) +
            ", \"data\": " + std::to_string(reinterpret_cast<uintptr_t>(t.data)) + "}, ";
  }
  const auto text = [](const char* s) { return s == nullptr ? "null" : Quoted(s); };
  return "{" + json + "\"size_splits\": " +
         (attributes.size_splits == nullptr ? "null" : Text(attributes.size_splits->values)) +
         ", \"quant_mode\": " + text(attributes.quant_mode) +
         ", \"layout\": " + text(attributes.layout) +
         ", \"kv_output\": " + (attributes.kv_output ? "true" : "false") +
         ", \"cache_mode\": " + text(attributes.cache_mode) + "}";
}

}  // namespace standin
