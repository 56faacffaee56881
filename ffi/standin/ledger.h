// Owns the stand-in device's record of calls, live objects and descriptors, and the failures to
// inject.
#ifndef JAX_KVCACHE_FFI_STANDIN_LEDGER_H_
#define JAX_KVCACHE_FFI_STANDIN_LEDGER_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace standin {

// There is one per process, which the plugin and the CANN libraries share. Every function locks it.
class Ledger {
 public:
  static Ledger& Get();

  // Counts a call of `function` and returns the status it must fail with, or 0.
  int32_t Enter(const char* function);

  // After `skip` more calls of `function`, one call fails with `status`.
  void Inject(const std::string& function, uint64_t skip, int32_t status);

  // Objects of a kind: "tensor", "int_array", "executor", "scratch".
  void Created(const char* kind, const void* object);
  // Returns false, and records a fault, if the object is not alive.
  bool Destroyed(const char* kind, const void* object);
  bool IsAlive(const char* kind, const void* object);

  void Count(const std::string& name, uint64_t number = 1);
  // Records something that no correct caller does. Tests expect none.
  void Fault(const std::string& what);
  void SetDescriptors(std::string json);
  // Appends to the ordered list of events: "launch 3", "return 3", "execute 3".
  void Event(const std::string& what);
  uint64_t NextLaunch();

  // All of the record, as a JSON object.
  std::string Json();
  // Clears everything except the live objects.
  void Reset();

 private:
  struct Injection {
    uint64_t skip;
    int32_t status;
  };

  std::mutex mutex_;
  std::map<std::string, uint64_t> counts_;
  std::map<std::string, Injection> injections_;
  std::map<std::string, std::set<const void*>> alive_;
  std::vector<std::string> faults_;
  std::vector<std::string> events_;
  std::string descriptors_;
  uint64_t launches_ = 0;
};

// CANN's message about the calling thread's last failure.
void SetRecentMessage(const std::string& message);
const char* RecentMessage();

std::string Quoted(const std::string& text);

}  // namespace standin

#endif  // JAX_KVCACHE_FFI_STANDIN_LEDGER_H_
