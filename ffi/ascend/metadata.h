// Owns a handler's answer to a runtime whose FFI is older than the headers of this build.
#ifndef JAX_KVCACHE_FFI_ASCEND_METADATA_H_
#define JAX_KVCACHE_FFI_ASCEND_METADATA_H_

#include <algorithm>

#include "xla/ffi/api/c_api.h"

namespace jax_kvcache {

inline bool AsksForMetadata(const XLA_FFI_CallFrame& frame) {
  return frame.extension_start != nullptr &&
         frame.extension_start->type == XLA_FFI_Extension_Metadata;
}

// Reports the older of the two FFI versions. A runtime refuses a handler that is newer than itself,
// and a plugin brings a runtime of its own: the public Ascend plugin's has FFI 0.2, whose structs
// and functions that a handler without state uses are those of every later minor version so far.
inline XLA_FFI_Error* AnswerMetadata(XLA_FFI_CallFrame* frame) {
  constexpr int kFirstMinorWithState = 3;
  const auto* const extension =
      reinterpret_cast<const XLA_FFI_Metadata_Extension*>(frame->extension_start);
  const int runtime_minor = frame->api->api_version.minor_version;
  XLA_FFI_Metadata* const metadata = extension->metadata;
  metadata->api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  metadata->api_version.extension_start = nullptr;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = std::min(XLA_FFI_API_MINOR, runtime_minor);
  metadata->traits = 0;
  // An older runtime's struct ends before this field.
  if (runtime_minor >= kFirstMinorWithState) metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return nullptr;
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_ASCEND_METADATA_H_
