// Owns the calls of wrapped FFI handlers, and the part of XLA's API that they see.
#include "trampoline.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "ledger.h"

namespace standin {
namespace {

constexpr int kMaxHandlers = 32;
constexpr size_t kGuardSize = 64;
constexpr uint8_t kGuardByte = 0x5A;

const XLA_FFI_Api* runtime = nullptr;  // the CPU plugin's
XLA_FFI_Api* offered = nullptr;        // the handlers': the same, with a device's functions
bool newest_ffi = false;

XLA_FFI_Error* MakeError(XLA_FFI_Error_Code code, const std::string& message) {
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message.c_str();
  args.errc = code;
  return runtime->XLA_FFI_Error_Create(&args);
}

uint64_t Now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::nanoseconds(now).count());
}

// Of the handler that runs on this thread: time in the runtime's functions.
thread_local uint64_t nanoseconds_in_runtime = 0;

class InRuntime {
 public:
  InRuntime() : start_(Now()) {}
  ~InRuntime() { nanoseconds_in_runtime += Now() - start_; }
  InRuntime(const InRuntime&) = delete;
  InRuntime& operator=(const InRuntime&) = delete;

 private:
  const uint64_t start_;
};

XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  const InRuntime in_runtime;
  XLA_FFI_DeviceOrdinal_Get_Args ordinal = {};
  ordinal.struct_size = XLA_FFI_DeviceOrdinal_Get_Args_STRUCT_SIZE;
  ordinal.ctx = args->ctx;
  if (XLA_FFI_Error* error = runtime->XLA_FFI_DeviceOrdinal_Get(&ordinal)) return error;
  args->stream = StreamOf(ordinal.device_ordinal);
  return nullptr;
}

// XLA's runtime makes this check first, with this text.
XLA_FFI_Error* AllocateMemory(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  const InRuntime in_runtime;
  const bool power_of_two = args->alignment != 0 && (args->alignment & (args->alignment - 1)) == 0;
  if (!power_of_two || args->alignment > kScratchAlignment) {
    return MakeError(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                     "Unsupported alignment: " + std::to_string(args->alignment));
  }
  args->data = AllocateScratch(args->size);
  if (args->data != nullptr) return nullptr;
  return MakeError(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "the stand-in device is out of memory");
}

XLA_FFI_Error* FreeMemory(XLA_FFI_DeviceMemory_Free_Args* args) {
  const InRuntime in_runtime;
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
    if (newest_ffi) offered->api_version.minor_version = XLA_FFI_API_MINOR;
    offered->XLA_FFI_Stream_Get = GetStream;
    offered->XLA_FFI_DeviceMemory_Allocate = AllocateMemory;
    offered->XLA_FFI_DeviceMemory_Free = FreeMemory;
    offered->XLA_FFI_ThreadPool_Schedule = NoSchedule;
    offered->XLA_FFI_ThreadPool_NumThreads = NoNumThreads;
  });
}

// Asks the handler for its metadata. The CPU plugin has FFI 0.2, as the public Ascend plugin has,
// and refuses handlers that report a newer version. A stand-in of the newest runtime offers its own
// version and hides the CPU plugin's from the handler.
XLA_FFI_Error* AskMetadata(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  auto* const asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  const size_t size = asked->metadata->struct_size;
  const size_t offered_size = newest_ffi ? std::max(size, sizeof(XLA_FFI_Metadata)) : size;
  std::vector<uint8_t> answer(offered_size + kGuardSize, kGuardByte);
  memcpy(answer.data(), asked->metadata, size);
  XLA_FFI_Metadata_Extension extension = *asked;
  extension.metadata = reinterpret_cast<XLA_FFI_Metadata*>(answer.data());

  XLA_FFI_CallFrame copy = *frame;
  copy.api = offered;
  copy.extension_start = &extension.extension_base;
  if (XLA_FFI_Error* error = handler(&copy)) return error;
  if (std::any_of(answer.begin() + static_cast<std::ptrdiff_t>(offered_size), answer.end(),
                  [](uint8_t byte) { return byte != kGuardByte; })) {
    Ledger::Get().Fault("wrote past the runtime's metadata");
  }
  memcpy(asked->metadata, answer.data(), size);
  int& minor = asked->metadata->api_version.minor_version;
  if (minor > offered->api_version.minor_version) {
    Ledger::Get().Count("handler too new");
  } else {
    minor = std::min(minor, runtime->api_version.minor_version);
  }
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
  nanoseconds_in_runtime = 0;
  const uint64_t start = Now();
  XLA_FFI_Error* const error = handler(&copy);
  Ledger::Get().Count("handler nanoseconds", Now() - start - nanoseconds_in_runtime);
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

void UseNewestFfi() { newest_ffi = true; }

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
