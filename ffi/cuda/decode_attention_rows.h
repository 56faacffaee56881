// Owns how a warp of decode_attention reads a few cache rows: which rows they are and which exist,
// their codes in registers, and the codes as factors of matrix products.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_ROWS_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_ROWS_H_

#include <cstdint>

#include "cuda/decode_attention_queries.h"

namespace jax_kvcache::decode_attention::cuda {

using jax_kvcache::cuda::LoadCodes;

// The words of codes that are XORed with this hold code + 128 in each byte.
inline constexpr uint32_t kSignBits = 0x80808080U;

// Two bytes that hold code + 128 as float16 codes, exactly: 0x64 in the upper byte makes 1024 +
// byte of a byte, and 1152 = 1024 + 128 is subtracted. `selector` says which two bytes, as for
// SelectBytes.
JAX_KVCACHE_DEVICE uint32_t CodesAsHalves(uint32_t bytes, uint32_t selector) {
  return jax_kvcache::cuda::Subtract1152(
      jax_kvcache::cuda::SelectBytes(bytes, 0x64646464U, selector));
}
inline constexpr uint32_t kLowerBytes = 0x4140U;
inline constexpr uint32_t kUpperBytes = 0x4342U;

// Where a sequence's rows are in the cache.
struct RowFinder {
  const int32_t* table;  // [M]
  int64_t blocks;        // NB
  uint32_t block_rows;   // R
  bool has_one_block;    // M = 1
  int32_t first_block;   // table[0] if M = 1, which is not read again for each row

  JAX_KVCACHE_DEVICE RowFinder(const Arguments& a, const Place& place)
      : table(a.table + place.sequence * a.shape.table_blocks),
        blocks(a.shape.blocks),
        block_rows(static_cast<uint32_t>(a.shape.block_rows)),
        has_one_block(a.shape.table_blocks == 1),
        first_block(has_one_block ? table[0] : 0) {}

  // Finds row `row` of the sequence, which is less than M * R. Returns whether it exists; if not,
  // `found` is a row of the cache all the same, which may be read.
  JAX_KVCACHE_DEVICE bool Find(uint32_t row, uint32_t* found) const {
    const uint32_t entry = has_one_block ? 0 : row / block_rows;
    const int64_t block = has_one_block ? first_block : table[entry];
    const bool exists = block >= 0 && block < blocks;
    *found = exists ? static_cast<uint32_t>(block) * block_rows + (row - entry * block_rows) : 0;
    return exists;
  }
};

// Where kRows rows of a sequence are in the cache, each in the lane of its number.
template <int D>
struct PlacesOfRows {
  uint32_t exist;  // bit i: row i is there
  PerLane<uint32_t> row;

  PlacesOfRows() = default;
  // Rows [begin, begin + kRows), of which those from `end` on do not exist.
  JAX_KVCACHE_DEVICE PlacesOfRows(const RowFinder& finder, uint32_t begin, uint32_t end) {
    PerLane<bool> exists;
    EachLane([&](int lane) {
      row[lane] = 0;
      const uint32_t number = begin + static_cast<uint32_t>(lane);
      exists[lane] = lane < Geometry<D>::kRows && number < end && finder.Find(number, &row[lane]);
    });
    exist = jax_kvcache::cuda::Ballot(exists);
  }

  // Asks for the codes of the rows that exist.
  JAX_KVCACHE_DEVICE void Prefetch(const int8_t* k_codes, const int8_t* v_codes,
                                   int64_t row_size) const {
    EachLane([&](int lane) {
      if ((exist >> lane & 1U) == 0) return;
      jax_kvcache::cuda::Prefetch<D>(k_codes + row[lane] * row_size);
      jax_kvcache::cuda::Prefetch<D>(v_codes + row[lane] * row_size);
    });
  }
};

// kRows rows of K and V of one kv head, in the registers of a warp.
template <int D>
struct Rows {
  using G = Geometry<D>;
  using KeyPack = Pack<uint32_t, G::kKeyBytes / 4>;
  using ValuePack = Pack<uint32_t, G::kValueBytes / 4>;

  PerLane<KeyPack> keys[G::kRows / 8][G::kKeyLoads];
  PerLane<ValuePack> values[G::kRows / 4][G::kValueLoads];

  // What is read for a row that does not exist is a row of the cache all the same.
  JAX_KVCACHE_DEVICE void Read(const PlacesOfRows<D>& places, const int8_t* k_codes,
                               const int8_t* v_codes, int64_t row_size) {
    JAX_KVCACHE_UNROLL
    for (int t = 0; t < G::kRows / 8; ++t) {
      const PerLane<uint32_t> from =
          jax_kvcache::cuda::Shuffle(places.row, [=](int lane) { return t * 8 + lane / 4; });
      EachLane([&](int lane) {
        const int8_t* const codes = k_codes + from[lane] * row_size + lane % 4 * G::kKeyBytes;
        JAX_KVCACHE_UNROLL
        for (int i = 0; i < G::kKeyLoads; ++i) {
          keys[t][i][lane] = LoadCodes<G::kKeyBytes>(codes + i * 4 * G::kKeyBytes);
        }
      });
    }
    JAX_KVCACHE_UNROLL
    for (int t = 0; t < G::kRows / 4; ++t) {
      const PerLane<uint32_t> from = jax_kvcache::cuda::Shuffle(
          places.row, [=](int lane) { return t / 2 * 8 + lane % 4 * 2 + t % 2; });
      EachLane([&](int lane) {
        const int8_t* const codes = v_codes + from[lane] * row_size;
        JAX_KVCACHE_UNROLL
        for (int i = 0; i < G::kValueLoads; ++i) {
          const int column = G::ValueColumn(lane / 4, i * G::kValueBytes);
          values[t][i][lane] = ValuePack{};
          if (G::kValueLoads * 8 * G::kValueBytes == D || column < D) {
            values[t][i][lane] = LoadCodes<G::kValueBytes>(codes + column);
          }
        }
      });
    }
  }

  // Factor B of step `step` of the scores of rows 8t to 8t + 7.
  JAX_KVCACHE_DEVICE PerLane<FragmentB> KeyFactor(int t, int step) const {
    PerLane<FragmentB> factor;
    EachLane([&](int lane) {
      const uint32_t word = keys[t][4 * step / G::kKeyBytes][lane].at[step % (G::kKeyBytes / 4)];
      factor[lane].word[0] = CodesAsHalves(word ^ kSignBits, kLowerBytes);
      factor[lane].word[1] = CodesAsHalves(word ^ kSignBits, kUpperBytes);
    });
    return factor;
  }

  // Factors B of the sums over rows 16t to 16t + 15: those of the column tiles 4w + 2p and
  // 4w + 2p + 1.
  JAX_KVCACHE_DEVICE void ValueFactors(int t, int w, int p,
                                       PerLane<FragmentB> (&factors)[2]) const {
    constexpr int kWords = G::kValueBytes / 4;
    EachLane([&](int lane) {
      const uint32_t selector = p == 0 ? 0x5140U : 0x7362U;
      JAX_KVCACHE_UNROLL
      for (int h = 0; h < 2; ++h) {  // rows 2c and 2c + 1, then rows 2c + 8 and 2c + 9
        const uint32_t even = values[4 * t + 2 * h][w / kWords][lane].at[w % kWords];
        const uint32_t odd = values[4 * t + 2 * h + 1][w / kWords][lane].at[w % kWords];
        // Of two columns the codes of both rows: even, odd, even, odd.
        const uint32_t codes = jax_kvcache::cuda::SelectBytes(even, odd, selector) ^ kSignBits;
        factors[0][lane].word[h] = CodesAsHalves(codes, kLowerBytes);
        factors[1][lane].word[h] = CodesAsHalves(codes, kUpperBytes);
      }
    });
  }
};

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_ROWS_H_
