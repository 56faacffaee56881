// An FFI handler that asks the runtime for scratch memory of several alignments and returns, as its
// error, what it got: "16: at 16 modulo 512" or the runtime's message.
#include <cstdint>
#include <string>

#include "xla/ffi/api/c_api.h"

namespace {

std::string Ask(XLA_FFI_CallFrame* frame, size_t alignment) {
  XLA_FFI_DeviceMemory_Allocate_Args args = {};
  args.struct_size = XLA_FFI_DeviceMemory_Allocate_Args_STRUCT_SIZE;
  args.ctx = frame->ctx;
  args.size = 1000;
  args.alignment = alignment;
  if (XLA_FFI_Error* error = frame->api->XLA_FFI_DeviceMemory_Allocate(&args)) {
#if XLA_FFI_API_MINOR < 5
    XLA_FFI_Error_GetMessage_Args text = {};
    text.struct_size = XLA_FFI_Error_GetMessage_Args_STRUCT_SIZE;
    text.error = error;
    frame->api->XLA_FFI_Error_GetMessage(&text);
#else
    XLA_FFI_Error_GetDetails_Args text = {};
    text.struct_size = XLA_FFI_Error_GetDetails_Args_STRUCT_SIZE;
    text.error = error;
    frame->api->XLA_FFI_Error_GetDetails(&text);
#endif
    const std::string message = text.message;
    XLA_FFI_Error_Destroy_Args destroy = {};
    destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    destroy.error = error;
    frame->api->XLA_FFI_Error_Destroy(&destroy);
    return message;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.data);
  XLA_FFI_DeviceMemory_Free_Args free = {};
  free.struct_size = XLA_FFI_DeviceMemory_Free_Args_STRUCT_SIZE;
  free.ctx = frame->ctx;
  free.size = args.size;
  free.data = args.data;
  frame->api->XLA_FFI_DeviceMemory_Free(&free);
  return "at " + std::to_string(address % 512) + " modulo 512";
}

}  // namespace

extern "C" XLA_FFI_Error* ask_for_scratch(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) {  // it asks for the handler's metadata
    auto* const asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
    asked->metadata->api_version = frame->api->api_version;
    asked->metadata->traits = 0;
    return nullptr;
  }
  std::string message;
  for (const size_t alignment : {0, 1, 16, 24, 32, 512}) {
    message += std::to_string(alignment) + ": " + Ask(frame, alignment) + "; ";
  }
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message.c_str();
  args.errc = XLA_FFI_Error_Code_UNAVAILABLE;
  return frame->api->XLA_FFI_Error_Create(&args);
}
