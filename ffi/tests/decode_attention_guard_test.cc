// Owns the test that the attention kernel reads no byte before or behind a cache, whatever the
// table and the positions: the caches lie against pages that nobody may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_plan.h"
#include "cpu/decode_attention_run.h"
#include "tests/check.h"
#include "tests/decode_attention_random_call.h"

namespace jax_kvcache::decode_attention {
namespace {

// Memory between two pages without any access, at its end or at its beginning.
class GuardedMemory {
 public:
  GuardedMemory(const void* bytes, size_t count, bool at_end) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t whole = (count + page - 1) / page * page;
    size_ = whole + 2 * page;
    void* const map =
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    Check(map != MAP_FAILED, "mmap");
    map_ = static_cast<char*>(map);
    data_ = map_ + page + (at_end ? whole - count : 0);
    std::memcpy(data_, bytes, count);
    Check(mprotect(map_, page, PROT_NONE) == 0, "mprotect");
    Check(mprotect(map_ + page + whole, page, PROT_NONE) == 0, "mprotect");
  }
  ~GuardedMemory() { munmap(map_, size_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return data_; }

 private:
  char* map_ = nullptr;
  char* data_ = nullptr;
  size_t size_ = 0;
};

int Main(int cases) {
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    const Sizes sizes = RandomSizes(random);
    Options options = RandomOptions(random, sizes.block_rows * sizes.table_blocks);
    options.hostile = true;
    RandomCall owner = MakeRandomCall(random, sizes, options);
    const Shape shape = ShapeOf(&owner);
    for (const bool at_end : {false, true}) {
      Call call = owner.View();
      const GuardedMemory k(call.args[kKCache].data, owner.args[kKCache].Count(), at_end);
      const GuardedMemory v(call.args[kVCache].data, owner.args[kVCache].Count(), at_end);
      const GuardedMemory q(call.args[kQ].data, owner.args[kQ].bytes().size(), at_end);
      const GuardedMemory table(call.args[kTable].data, owner.args[kTable].bytes().size(), at_end);
      call.args[kKCache].data = k.data();
      call.args[kVCache].data = v.data();
      call.args[kQ].data = q.data();
      call.args[kTable].data = table.data();
      const Buffers buffers = ToBuffers(call, shape);
      for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
        const Simd simd = static_cast<Simd>(i);
        if (!SimdSupported(simd)) continue;
        const Plan plan = MakePlan(shape, buffers.positions, 1 + Below(random, 4));
        Check(RunCall(SelectKernel(simd), shape, buffers, plan, [](auto) {}), "memory");
      }
    }
  }
  std::printf("%d calls read nothing outside\n", cases);
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) {
  return jax_kvcache::decode_attention::Main(argc > 1 ? std::atoi(argv[1]) : 500);
}
