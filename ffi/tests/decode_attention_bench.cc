// Measures the attention kernel beside a plain read of the same codes, in turns. Not a test.
//
// decode_attention_bench [threads] [B rows Nq Nkv D S]...
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_plan.h"
#include "cpu/decode_attention_run.h"
#include "tests/pool.h"

namespace jax_kvcache::decode_attention {
namespace {

struct Sizes {
  int64_t sequences, rows, num_q, num_kv, head_dim, queries;
};

// With one thread, the time that it had a processor: others may use the machine, too.
double Now(int64_t threads) {
  if (threads == 1) {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Memory {
  explicit Memory(int64_t bytes)
      : data(static_cast<char*>(
            std::aligned_alloc(2 << 20, static_cast<size_t>((bytes + (2 << 20)) >> 21 << 21)))) {}
  ~Memory() { std::free(data); }
  char* data;
};

// The exclusive or of all whole 256 bytes.
uint64_t ReadOnce(const int8_t* from, int64_t bytes) {
  constexpr int kWords = 32;
  uint64_t sums[kWords] = {};
  for (int64_t at = 0; at + 8 * kWords <= bytes; at += 8 * kWords) {
    uint64_t words[kWords];
    std::memcpy(words, from + at, sizeof(words));
    for (int j = 0; j < kWords; ++j) sums[j] ^= words[j];
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum ^= part;
  return sum;
}

void Measure(const Sizes& z, int64_t threads, Pool& pool) {
  Shape shape;
  shape.groups.count = 1;
  shape.sequences = z.sequences;
  shape.queries = z.queries;
  shape.num_q_heads = z.num_q;
  shape.num_kv_heads = z.num_kv;
  shape.head_dim = z.head_dim;
  shape.blocks = z.sequences;
  shape.block_rows = z.rows;
  shape.table_blocks = 1;
  shape.scale = 0.08f;
  const int64_t cache = z.sequences * z.rows * z.num_kv * z.head_dim;
  // Enough caches that they are not all in the processor's caches, within reason.
  const char* const hot = std::getenv("HOT");
  const int64_t copies =
      hot != nullptr ? 1 : std::max<int64_t>(1, (int64_t{1} << 30) / (2 * cache));
  Memory k(cache * copies);
  Memory v(cache * copies);
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < cache * copies; i += 8) {
    const uint64_t bits = random();
    std::memcpy(k.data + i, &bits, 8);
    std::memcpy(v.data + i, &bits, 8);
  }
  const int64_t q_count = z.sequences * z.queries * z.num_q * z.head_dim;
  std::vector<float> q(static_cast<size_t>(q_count));
  std::vector<float> out(static_cast<size_t>(q_count));
  for (float& x : q) x = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
  std::vector<float> scale(static_cast<size_t>(z.num_kv * z.head_dim), 1.0f / 64);
  std::vector<int32_t> table;
  std::vector<int32_t> positions;
  for (int64_t b = 0; b < z.sequences; ++b) {
    table.push_back(static_cast<int32_t>(b));
    for (int64_t s = 0; s < z.queries; ++s) {
      positions.push_back(static_cast<int32_t>(z.rows - z.queries + s));
    }
  }
  Buffers b;
  b.q = q.data();
  b.table = table.data();
  b.positions = positions.data();
  b.scale_k = b.scale_v = scale.data();
  b.out = out.data();
  const auto schedule = [&](std::function<void()> task) { pool.Schedule(std::move(task)); };
  const Kernel& kernel = SelectKernel(ActiveSimd());
  std::vector<double> attention;
  std::vector<double> reading;
  volatile uint64_t sink = 0;
  const double begin = Now(threads);
  int64_t threads_used = 0;
  size_t parts = 0;
  for (int turn = 0; turn < 200 && (turn < 5 || Now(threads) - begin < 3); ++turn) {
    b.k_cache = reinterpret_cast<const int8_t*>(k.data) + turn % copies * cache;
    b.v_cache = reinterpret_cast<const int8_t*>(v.data) + turn % copies * cache;
    double start = Now(threads);
    const Plan plan = MakePlan(shape, positions.data(), threads);
    RunCall(kernel, shape, b, plan, schedule);
    attention.push_back(Now(threads) - start);
    threads_used = plan.threads;
    parts = plan.parts.size();
    b.k_cache = reinterpret_cast<const int8_t*>(k.data) + (turn + copies / 2) % copies * cache;
    b.v_cache = reinterpret_cast<const int8_t*>(v.data) + (turn + copies / 2) % copies * cache;
    start = Now(threads);
    constexpr int64_t kPart = 64 << 10;
    RunParts(2 * ((cache + kPart - 1) / kPart), plan.threads, schedule, [&](int64_t i) {
      const int8_t* const from = (i % 2 == 0 ? b.k_cache : b.v_cache) + i / 2 * kPart;
      const int64_t bytes = std::min(kPart, cache - i / 2 * kPart);
      sink = sink + ReadOnce(from, bytes);
    });
    reading.push_back(Now(threads) - start);
  }
  std::sort(attention.begin(), attention.end());
  std::sort(reading.begin(), reading.end());
  const double a = attention[attention.size() / 2];
  const double r = reading[reading.size() / 2];
  std::printf(
      "%3ld x %5ld, %2ld/%2ld, D %3ld, S %4ld: %9.1f us (least %9.1f) read %8.1f (%8.1f) ratio "
      "%5.2f "
      "(%5.2f), %5.2f codes/ns, threads %ld, parts %zu\n",
      z.sequences, z.rows, z.num_q, z.num_kv, z.head_dim, z.queries, a * 1e6, attention[0] * 1e6,
      r * 1e6, reading[0] * 1e6, a / r, attention[0] / reading[0],
      2e-9 * static_cast<double>(cache) / attention[0], threads_used, parts);
}

int Main(int argc, char** argv) {
  const int64_t threads = argc > 1 ? std::atoi(argv[1]) : 2;
  if (const char* const simd = std::getenv("SIMD")) UseSimd(simd);
  std::printf("%s, %ld threads\n", SimdName(ActiveSimd()), threads);
  Pool pool(static_cast<int>(threads) - 1);
  for (int i = 2; i + 5 < argc; i += 6) {
    Measure({std::atoi(argv[i]), std::atoi(argv[i + 1]), std::atoi(argv[i + 2]),
             std::atoi(argv[i + 3]), std::atoi(argv[i + 4]), std::atoi(argv[i + 5])},
            threads, pool);
  }
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) { return jax_kvcache::decode_attention::Main(argc, argv); }
