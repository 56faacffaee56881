// Owns the calls of wrapped FFI handlers, and the part of XLA's API that they see.
#include "trampoline.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "device.h"
#include "ledger.h"

namespace standin {
namespace {

constexpr int kMaxHandlers = 32;

const XLA_FFI_Api* runtime = nullptr;  // the CPU plugin's
XLA_FFI_Api* offered = nullptr;        // the handlers': the same, with a device's functions

XLA_FFI_Error* MakeError(XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = code;
  return runtime->XLA_FFI_Error_Create(&args);
}

XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  XLA_FFI_DeviceOrdinal_Get_Args ordinal = {};
  ordinal.struct_size = XLA_FFI_DeviceOrdinal_Get_Args_STRUCT_SIZE;
  ordinal.ctx = args->ctx;
  if (XLA_FFI_Error* error = runtime->XLA_FFI_DeviceOrdinal_Get(&ordinal)) return error;
  args->stream = StreamOf(ordinal.device_ordinal);
  return nullptr;
}

XLA_FFI_Error* AllocateMemory(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  args->data = AllocateScratch(args->size, args->alignment);
  if (args->data != nullptr) return nullptr;
  return MakeError(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "the stand-in device is out of memory");
}

XLA_FFI_Error* FreeMemory(XLA_FFI_DeviceMemory_Free_Args* args) {
  FreeScratch(args->data);
  return nullptr;
}

XLA_FFI_Error* NoSchedule(XLA_FFI_ThreadPool_Schedule_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED, "a device has no CPU thread pool");
}

XLA_FFI_Error* NoNumThreads(XLA_FFI_ThreadPool_NumThreads_Args*) {
  return MakeError(XLA_FFI_Error_Code_UNIMPLEMENTED, "a device has no CPU thread pool");
}

void Prepare(const XLA_FFI_Api* api) {
  static std::once_flag once;
  std::call_once(once, [api] {
    runtime = api;
    const size_t size = std::max(api->struct_size, sizeof(XLA_FFI_Api));
    offered = static_cast<XLA_FFI_Api*>(calloc(1, size));
    memcpy(offered, api, api->struct_size);  // including the runtime's size and version
    offered->XLA_FFI_Stream_Get = GetStream;
    offered->XLA_FFI_DeviceMemory_Allocate = AllocateMemory;
    offered->XLA_FFI_DeviceMemory_Free = FreeMemory;
    offered->XLA_FFI_ThreadPool_Schedule = NoSchedule;
    offered->XLA_FFI_ThreadPool_NumThreads = NoNumThreads;
  });
}

// Asks the handler for its metadata. The CPU plugin has an older FFI than jaxlib and refuses newer
// handlers. The two FFIs do not differ in anything that a handler without state uses, so this
// reports the older version.
XLA_FFI_Error* AskMetadata(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  auto* const asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  XLA_FFI_Metadata metadata = {};
  memcpy(&metadata, asked->metadata, std::min(asked->metadata->struct_size, sizeof metadata));
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = *asked;
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.metadata = &metadata;

  XLA_FFI_CallFrame copy = *frame;
  copy.api = offered;
  copy.extension_start = &extension.extension_base;
  if (XLA_FFI_Error* error = handler(&copy)) return error;
  asked->metadata->api_version = metadata.api_version;
  asked->metadata->traits = metadata.traits;
  int& minor = asked->metadata->api_version.minor_version;
  minor = std::min(minor, runtime->api_version.minor_version);
  return nullptr;
}

// Copies of the call's buffers, with device addresses.
class DeviceBuffers {
 public:
  explicit DeviceBuffers(XLA_FFI_CallFrame* frame) {
    buffers_.reserve(frame->args.size + frame->rets.size);
    for (int64_t i = 0; i < frame->args.size; ++i) {
      args_.push_back(Tagged(frame->args.args[i], frame->args.types[i] == XLA_FFI_ArgType_BUFFER));
    }
    for (int64_t i = 0; i < frame->rets.size; ++i) {
      rets_.push_back(Tagged(frame->rets.rets[i], frame->rets.types[i] == XLA_FFI_RetType_BUFFER));
    }
    frame->args.args = args_.data();
    frame->rets.rets = rets_.data();
  }

 private:
  void* Tagged(void* value, bool is_buffer) {
    if (!is_buffer) return value;
    buffers_.push_back(*static_cast<XLA_FFI_Buffer*>(value));
    buffers_.back().data = ToDevice(buffers_.back().data);
    return &buffers_.back();
  }

  std::vector<XLA_FFI_Buffer> buffers_;
  std::vector<void*> args_;
  std::vector<void*> rets_;
};

XLA_FFI_Error* Dispatch(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  Prepare(frame->api);
  if (frame->extension_start != nullptr &&
      frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    return AskMetadata(handler, frame);
  }
  Ledger::Get().Count("handler");
  HandlerCall call;
  XLA_FFI_CallFrame copy = *frame;
  copy.api = offered;
  const DeviceBuffers buffers(&copy);
  XLA_FFI_Error* const error = handler(&copy);
  call.Finish();
  return error;
}

struct Table {
  std::mutex mutex;
  XLA_FFI_Handler* handlers[kMaxHandlers] = {};
};

Table& AllHandlers() {
  static Table* const table = new Table;
  return *table;
}

template <int I>
XLA_FFI_Error* Trampoline(XLA_FFI_CallFrame* frame) {
  return Dispatch(AllHandlers().handlers[I], frame);
}

template <int... I>
XLA_FFI_Handler* TrampolineAt(int index, std::integer_sequence<int, I...>) {
  static XLA_FFI_Handler* const trampolines[] = {&Trampoline<I>...};
  return trampolines[index];
}

}  // namespace

XLA_FFI_Handler* Wrap(XLA_FFI_Handler* handler) {
  Table& table = AllHandlers();
  const std::lock_guard<std::mutex> lock(table.mutex);
  for (int i = 0; i < kMaxHandlers; ++i) {
    if (table.handlers[i] == nullptr) table.handlers[i] = handler;
    if (table.handlers[i] == handler) {
      return TrampolineAt(i, std::make_integer_sequence<int, kMaxHandlers>{});
    }
  }
  return nullptr;
}

}  // namespace standin
