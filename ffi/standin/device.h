// Owns the simulated hardware: device addresses that the host cannot use, and asynchronous streams.
#ifndef JAX_KVCACHE_FFI_STANDIN_DEVICE_H_
#define JAX_KVCACHE_FFI_STANDIN_DEVICE_H_

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace standin {

// A device address is the host address with bit 52 set. A host access to it faults on x86-64 and on
// AArch64 (which would ignore bits 56 to 63).
void* ToDevice(void* host);
void* ToHost(void* device);
bool IsDeviceAddress(const void* address);

class Stream;

// The one stream of a device.
Stream* StreamOf(int device);
// Null unless `handle` is a stream of this process.
Stream* StreamFromHandle(void* handle);
int DeviceOf(const Stream* stream);

// Enqueues work. Work that a handler enqueues starts after the handler has returned. That is the
// latest start that a device may choose, so a handler that needs an earlier start fails here every
// time.
void Enqueue(Stream* stream, std::function<void()> work);

// One call of a handler on this thread, from the plugin's side.
class HandlerCall {
 public:
  HandlerCall();
  ~HandlerCall();
  HandlerCall(const HandlerCall&) = delete;
  HandlerCall& operator=(const HandlerCall&) = delete;

  // Null outside a handler.
  static HandlerCall* Current();

  // Starts what the call enqueued and waits for it, then frees its scratch memory.
  void Finish();

  struct Job {
    Stream* stream;
    std::string launch;
    std::function<void()> work;
  };
  void Defer(Job job);
  void FreeLater(void* device) { scratch_.push_back(device); }

 private:
  HandlerCall* outer_;
  std::vector<Job> jobs_;
  std::vector<void*> scratch_;
};

// The most that XLA's runtime aligns scratch memory to; it refuses to be asked for more.
constexpr size_t kScratchAlignment = 16;

// Scratch memory with arbitrary contents, as a device's has; null if a failure was injected. The
// address is a multiple of kScratchAlignment and of no higher power of two.
void* AllocateScratch(size_t size);
// Records a fault if something was written before or after the memory.
void FreeScratch(void* device);
// Whether `size` bytes from `device` on are in scratch memory that has not been freed.
bool IsScratch(const void* device, size_t size);

}  // namespace standin

#endif  // JAX_KVCACHE_FFI_STANDIN_DEVICE_H_
