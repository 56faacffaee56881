// Owns the implementation of the record, and the functions with which tests read and control it.
#include "ledger.h"

#include <cstring>

namespace standin {
namespace {

// More than any test looks at. A long run drops later events.
constexpr size_t kMaxEvents = 10000;

thread_local std::string recent_message;

std::string JsonList(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ", ") + Quoted(item);
  return "[" + text + "]";
}

template <typename Map, typename Value>
std::string JsonMap(const Map& map, Value value) {
  std::string text;
  for (const auto& [key, entry] : map) {
    text += (text.empty() ? "" : ", ") + Quoted(key) + ": " + std::to_string(value(entry));
  }
  return "{" + text + "}";
}

}  // namespace

Ledger& Ledger::Get() {
  static Ledger* const ledger = new Ledger;  // never destroyed: threads may use it at exit
  return *ledger;
}

int32_t Ledger::Enter(const char* function) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++counts_[function];
  const auto found = injections_.find(function);
  if (found == injections_.end()) return 0;
  if (found->second.skip > 0) {
    --found->second.skip;
    return 0;
  }
  const int32_t status = found->second.status;
  injections_.erase(found);
  recent_message = std::string("EZ9999: injected failure of ") + function;
  return status;
}

void Ledger::Inject(const std::string& function, uint64_t skip, int32_t status) {
  const std::lock_guard<std::mutex> lock(mutex_);
  injections_[function] = {skip, status};
}

void Ledger::Created(const char* kind, const void* object) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++counts_[std::string(kind) + " created"];
  alive_[kind].insert(object);
}

bool Ledger::Destroyed(const char* kind, const void* object) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (alive_[kind].erase(object) == 1) {
    ++counts_[std::string(kind) + " destroyed"];
    return true;
  }
  faults_.push_back(std::string("destroyed a ") + kind + " that is not alive");
  return false;
}

bool Ledger::IsAlive(const char* kind, const void* object) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return alive_[kind].count(object) == 1;
}

void Ledger::Count(const std::string& name, uint64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  counts_[name] += number;
}

void Ledger::Fault(const std::string& what) {
  const std::lock_guard<std::mutex> lock(mutex_);
  faults_.push_back(what);
}

void Ledger::SetDescriptors(std::string json) {
  const std::lock_guard<std::mutex> lock(mutex_);
  descriptors_ = std::move(json);
}

void Ledger::Event(const std::string& what) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (events_.size() < kMaxEvents) events_.push_back(what);
}

uint64_t Ledger::NextLaunch() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return launches_++;
}

std::string Ledger::Json() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return "{\"counts\": " + JsonMap(counts_, [](uint64_t n) { return n; }) +
         ", \"alive\": " + JsonMap(alive_, [](const auto& objects) { return objects.size(); }) +
         ", \"pending\": " + JsonMap(injections_, [](const Injection& i) { return i.status; }) +
         ", \"faults\": " + JsonList(faults_) + ", \"events\": " + JsonList(events_) +
         ", \"descriptors\": " + (descriptors_.empty() ? "null" : descriptors_) + "}";
}

void Ledger::Reset() {
  const std::lock_guard<std::mutex> lock(mutex_);
  counts_.clear();
  injections_.clear();
  faults_.clear();
  events_.clear();
  descriptors_.clear();
  launches_ = 0;
}

void SetRecentMessage(const std::string& message) { recent_message = message; }
const char* RecentMessage() { return recent_message.c_str(); }

std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c < ' ' ? ' ' : c;
  }
  return quoted + "\"";
}

}  // namespace standin

extern "C" void standin_inject(const char* function, uint64_t skip, int32_t status) {
  standin::Ledger::Get().Inject(function, skip, status);
}

extern "C" void standin_reset() { standin::Ledger::Get().Reset(); }

// The record as JSON. The caller frees it with standin_free.
extern "C" char* standin_ledger() { return strdup(standin::Ledger::Get().Json().c_str()); }

extern "C" void standin_free(char* text) { free(text); }
