// Owns the stand-in's addresses, streams and scratch memory.
#include "device.h"

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "ledger.h"

namespace standin {
namespace {

constexpr uintptr_t kDeviceBit = uintptr_t{1} << 52;
constexpr uint8_t kArbitraryByte = 0xA5;
constexpr size_t kFilledBytes = 1 << 16;  // filling all 16 MiB would take longer than the call
constexpr uint8_t kGuardByte = 0x5A;
constexpr size_t kPageSize = 4096;

thread_local HandlerCall* current_call = nullptr;

}  // namespace

void* ToDevice(void* host) {
  if (host == nullptr) return nullptr;
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) | kDeviceBit);
}

void* ToHost(void* device) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(device) & ~kDeviceBit);
}

bool IsDeviceAddress(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & kDeviceBit) != 0;
}

// An ordered queue with a thread of its own.
class Stream {
 public:
  explicit Stream(int device) : device_(device) {}

  int device() const { return device_; }

  void Push(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!started_) {
      started_ = true;
      // Never joined, because XLA may call until the process ends.
      std::thread([this] { Run(); }).detach();
    }
    queue_.push_back(std::move(work));
    wake_.notify_one();
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return queue_.empty() && !busy_; });
  }

 private:
  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !queue_.empty(); });
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      work();
      lock.lock();
      busy_ = false;
      if (queue_.empty()) idle_.notify_all();
    }
  }

  const int device_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::deque<std::function<void()>> queue_;
  bool started_ = false;
  bool busy_ = false;
};

namespace {

struct Streams {
  std::mutex mutex;
  std::map<int, Stream*> by_device;
};

Streams& AllStreams() {
  static Streams* const streams = new Streams;
  return *streams;
}

}  // namespace

Stream* StreamOf(int device) {
  Streams& streams = AllStreams();
  const std::lock_guard<std::mutex> lock(streams.mutex);
  Stream*& stream = streams.by_device[device];
  if (stream == nullptr) stream = new Stream(device);
  return stream;
}

Stream* StreamFromHandle(void* handle) {
  Streams& streams = AllStreams();
  const std::lock_guard<std::mutex> lock(streams.mutex);
  for (const auto& [device, stream] : streams.by_device) {
    if (stream == handle) return stream;
  }
  return nullptr;
}

int DeviceOf(const Stream* stream) { return stream->device(); }

void Enqueue(Stream* stream, std::function<void()> work) {
  const std::string launch = std::to_string(Ledger::Get().NextLaunch());
  Ledger::Get().Event("launch " + launch + " on " + std::to_string(stream->device()));
  std::function<void()> logged = [launch, work = std::move(work)] {
    Ledger::Get().Event("execute " + launch);
    work();
  };
  if (HandlerCall* call = HandlerCall::Current()) {
    call->Defer({stream, launch, std::move(logged)});
  } else {
    stream->Push(std::move(logged));
  }
}

namespace {

struct ScratchBlocks {
  std::mutex mutex;
  std::map<void*, size_t> size_of;  // by device address
};

ScratchBlocks& AllScratch() {
  static ScratchBlocks* const blocks = new ScratchBlocks;
  return *blocks;
}

bool IsGuard(const uint8_t* guard) {
  return std::all_of(guard, guard + kScratchAlignment, [](uint8_t b) { return b == kGuardByte; });
}

// Gives scratch memory that the stream no longer needs back to the host.
void Release(void* device) {
  size_t size = 0;
  {
    ScratchBlocks& blocks = AllScratch();
    const std::lock_guard<std::mutex> lock(blocks.mutex);
    size = blocks.size_of[device];
    blocks.size_of.erase(device);
  }
  auto* const memory = static_cast<uint8_t*>(ToHost(device));
  uint8_t* const block = memory - kScratchAlignment;
  if (!IsGuard(block) || !IsGuard(memory + size)) {
    Ledger::Get().Fault("wrote outside scratch memory");
  }
  free(block);
}

}  // namespace

HandlerCall::HandlerCall() : outer_(current_call) { current_call = this; }

HandlerCall::~HandlerCall() { current_call = outer_; }

HandlerCall* HandlerCall::Current() { return current_call; }

void HandlerCall::Defer(Job job) { jobs_.push_back(std::move(job)); }

void HandlerCall::Finish() {
  for (Job& job : jobs_) {
    Ledger::Get().Event("return " + job.launch);
    job.stream->Push(std::move(job.work));
  }
  for (const Job& job : jobs_) job.stream->Wait();
  jobs_.clear();
  for (void* device : scratch_) Release(device);
  scratch_.clear();
}

void* AllocateScratch(size_t size) {
  if (Ledger::Get().Enter("scratch") != 0) return nullptr;
  // A page, of which the last kScratchAlignment bytes before the memory are a guard, the memory,
  // and a guard of the same size after it.
  const size_t total = kScratchAlignment + size + kScratchAlignment;
  auto* const block = static_cast<uint8_t*>(
      aligned_alloc(kPageSize, (total + kPageSize - 1) / kPageSize * kPageSize));
  if (block == nullptr) return nullptr;
  uint8_t* const memory = block + kScratchAlignment;
  memset(block, kGuardByte, kScratchAlignment);
  memset(memory, kArbitraryByte, std::min(size, kFilledBytes));
  memset(memory + size, kGuardByte, kScratchAlignment);
  void* const device = ToDevice(memory);
  ScratchBlocks& blocks = AllScratch();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  blocks.size_of[device] = size;
  Ledger::Get().Created("scratch", device);
  return device;
}

void FreeScratch(void* device) {
  if (!Ledger::Get().Destroyed("scratch", device)) return;
  if (HandlerCall* call = HandlerCall::Current()) {
    call->FreeLater(device);
  } else {
    Release(device);
  }
}

bool IsScratch(const void* device, size_t size) {
  ScratchBlocks& blocks = AllScratch();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  const auto address = reinterpret_cast<uintptr_t>(device);
  for (const auto& [start, length] : blocks.size_of) {
    const auto begin = reinterpret_cast<uintptr_t>(start);
    if (address >= begin && address + size <= begin + length) return true;
  }
  return false;
}

}  // namespace standin
