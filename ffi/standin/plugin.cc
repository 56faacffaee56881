// Owns the stand-in PJRT plugin: XLA's CPU plugin under the name of an Ascend device.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "pjrt_c_api.h"
#include "trampoline.h"

namespace {

// The FFI extension's structs, which the headers in the CPU plugin's wheel do not declare.
struct FfiRegisterArgs {
  size_t struct_size;
  const char* target_name;
  size_t target_name_size;
  void* handler;
  const char* platform_name;
  size_t platform_name_size;
  int traits;
};
constexpr size_t kFfiRegisterArgsSize = offsetof(FfiRegisterArgs, traits) + sizeof(int);
struct FfiExtension {
  PJRT_Extension_Base base;
  void* type_register;
  void* user_data_add;
  PJRT_Error* (*register_handler)(FfiRegisterArgs* args);
};

const PJRT_Api* cpu = nullptr;         // the CPU plugin's API
FfiExtension* cpu_ffi = nullptr;       // the CPU plugin's FFI extension
PJRT_Api* stand_in = nullptr;          // the CPU plugin's API with this file's functions
std::string* platform_name = nullptr;  // "ascend", or "ASCEND" as the public plugin's client says
const char kVersion[] = "Ascend stand-in on XLA:CPU";
const char kDeviceKind[] = "Ascend stand-in (CPU)";

PJRT_Error* ClientPlatformName(PJRT_Client_PlatformName_Args* args) {
  args->platform_name = platform_name->data();
  args->platform_name_size = platform_name->size();
  return nullptr;
}

PJRT_Error* ClientPlatformVersion(PJRT_Client_PlatformVersion_Args* args) {
  args->platform_version = kVersion;
  args->platform_version_size = sizeof kVersion - 1;
  return nullptr;
}

PJRT_Error* TopologyPlatformName(PJRT_TopologyDescription_PlatformName_Args* args) {
  args->platform_name = platform_name->data();
  args->platform_name_size = platform_name->size();
  return nullptr;
}

PJRT_Error* TopologyPlatformVersion(PJRT_TopologyDescription_PlatformVersion_Args* args) {
  args->platform_version = kVersion;
  args->platform_version_size = sizeof kVersion - 1;
  return nullptr;
}

PJRT_Error* DeviceKind(PJRT_DeviceDescription_Kind_Args* args) {
  args->device_kind = kDeviceKind;
  args->device_kind_size = sizeof kDeviceKind - 1;
  return nullptr;
}

// "ASCEND_0". The text lives as long as the process, which PJRT requires.
const std::string& DeviceName(PJRT_DeviceDescription* description) {
  static std::mutex mutex;
  static auto* const names = new std::map<PJRT_DeviceDescription*, std::string>;
  PJRT_DeviceDescription_Id_Args args = {};
  args.struct_size = PJRT_DeviceDescription_Id_Args_STRUCT_SIZE;
  args.device_description = description;
  cpu->PJRT_DeviceDescription_Id(&args);
  const std::lock_guard<std::mutex> lock(mutex);
  std::string& name = (*names)[description];
  if (name.empty()) name = "ASCEND_" + std::to_string(args.id);
  return name;
}

PJRT_Error* DeviceDebugString(PJRT_DeviceDescription_DebugString_Args* args) {
  const std::string& name = DeviceName(args->device_description);
  args->debug_string = name.data();
  args->debug_string_size = name.size();
  return nullptr;
}

PJRT_Error* DeviceToString(PJRT_DeviceDescription_ToString_Args* args) {
  const std::string& name = DeviceName(args->device_description);
  args->to_string = name.data();
  args->to_string_size = name.size();
  return nullptr;
}

// If this said true, jaxlib would make NumPy views of device memory, and copy arrays instead of
// donating them.
PJRT_Error* BufferIsOnCpu(PJRT_Buffer_IsOnCpu_Args* args) {
  args->is_on_cpu = false;
  return nullptr;
}

PJRT_Error* RegisterHandler(FfiRegisterArgs* args) {
  FfiRegisterArgs below = *args;
  auto* const handler = reinterpret_cast<XLA_FFI_Handler*>(args->handler);
  below.handler = reinterpret_cast<void*>(standin::Wrap(handler));
  std::string platform(args->platform_name, args->platform_name_size);
  std::transform(platform.begin(), platform.end(), platform.begin(), ::tolower);
  if (platform == "ascend") platform = "Host";
  below.platform_name = platform.data();
  below.platform_name_size = platform.size();
  return cpu_ffi->register_handler(&below);
}

void Present(bool with_ffi_extension) {
  stand_in = static_cast<PJRT_Api*>(calloc(1, std::max(cpu->struct_size, sizeof(PJRT_Api))));
  memcpy(stand_in, cpu, cpu->struct_size);
  stand_in->PJRT_Client_PlatformName = ClientPlatformName;
  stand_in->PJRT_Client_PlatformVersion = ClientPlatformVersion;
  stand_in->PJRT_TopologyDescription_PlatformName = TopologyPlatformName;
  stand_in->PJRT_TopologyDescription_PlatformVersion = TopologyPlatformVersion;
  stand_in->PJRT_DeviceDescription_Kind = DeviceKind;
  stand_in->PJRT_DeviceDescription_DebugString = DeviceDebugString;
  stand_in->PJRT_DeviceDescription_ToString = DeviceToString;
  stand_in->PJRT_Buffer_IsOnCpu = BufferIsOnCpu;
  PJRT_Extension_Base** tail = &stand_in->extension_start;
  *tail = nullptr;
  for (PJRT_Extension_Base* e = cpu->extension_start; e != nullptr; e = e->next) {
    if (e->type == PJRT_Extension_Type_FFI) {
      cpu_ffi = reinterpret_cast<FfiExtension*>(e);
      if (!with_ffi_extension) continue;
    }
    auto* const copy = static_cast<PJRT_Extension_Base*>(malloc(e->struct_size));
    memcpy(copy, e, e->struct_size);
    copy->next = nullptr;
    if (e->type == PJRT_Extension_Type_FFI) {
      reinterpret_cast<FfiExtension*>(copy)->register_handler = RegisterHandler;
    }
    *tail = copy;
    tail = &copy->next;
  }
}

}  // namespace

// Loads the CPU plugin. Returns null, or the error.
extern "C" const char* standin_load(const char* cpu_plugin, const char* platform,
                                    int with_ffi_extension, int newest_ffi) {
  if (newest_ffi != 0) standin::UseNewestFfi();
  void* const library = dlopen(cpu_plugin, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  const auto get = reinterpret_cast<const PJRT_Api* (*)()>(dlsym(library, "GetPjrtApi"));
  if (get == nullptr) return "it has no GetPjrtApi";
  cpu = get();
  platform_name = new std::string(platform);
  Present(with_ffi_extension != 0);
  return cpu_ffi == nullptr ? "it has no FFI extension" : nullptr;
}

extern "C" const PJRT_Api* GetPjrtApi() { return stand_in; }

// Registers a handler, as the Python part of a plugin does. Returns null, or the error.
extern "C" const char* standin_register(const char* name, void* handler) {
  static thread_local std::string message;
  const std::string platform = "ASCEND";
  FfiRegisterArgs args = {kFfiRegisterArgsSize, name, strlen(name), handler, platform.data(),
                          platform.size(),      0};
  PJRT_Error* const error = RegisterHandler(&args);
  if (error == nullptr) return nullptr;
  PJRT_Error_Message_Args text = {};
  text.struct_size = PJRT_Error_Message_Args_STRUCT_SIZE;
  text.error = error;
  cpu->PJRT_Error_Message(&text);
  message.assign(text.message, text.message_size);
  PJRT_Error_Destroy_Args destroy = {};
  destroy.struct_size = PJRT_Error_Destroy_Args_STRUCT_SIZE;
  destroy.error = error;
  cpu->PJRT_Error_Destroy(&destroy);
  return message.c_str();
}
