// Attention of query rows over tiles of keys and values in bf16.
//
// A tile is TILE positions of one KV head. It is kept in pairs: keys as (16 positions, pair of
// dimensions, position), values as (pair of positions, dimension), so that a register holds 16
// products of a pair and no sum runs across a register. native_step.py knows this layout too.
//
// What a query row finds in a tile is the largest score, the sum of exponentials and the sum of
// values weighted by them; tiles are put together in the order of positions (Flash-Decoding, Dao et
// al., 2023). For each row this is one sequence of operations, however many rows are computed
// together, whichever thread has which tile, and wherever a prompt was cut.
#pragma once

#include <limits>

#include "memory.hpp"

namespace crdt_llm {

constexpr int TILE = 256;
constexpr int QUERIES_MAX = 6;  // query rows computed together
constexpr int BLOCKS_MAX = 4;   // registers of keys, or of dimensions, beside them

// A tile in pairs, wherever it is.
struct Pairs {
  const int32_t* keys;    // (blocks of 16 positions, pairs of dimensions, 16)
  const int32_t* values;  // (pairs of positions, dimensions)
  int head_dim;

  const int32_t* keys_at(int block, int pair) const {
    return keys + (size_t(block) * (head_dim / 2) + pair) * LANES;
  }
  const int32_t* values_at(int pair, int dimension) const {
    return values + size_t(pair) * head_dim + dimension;
  }
};

// What rows found so far: of each query row its largest score, its sum, its values.
struct Found {
  float* peak;    // (queries), as a power of two
  float* sum;     // (queries)
  float* values;  // (queries, head_dim)
};

// Put a key where it belongs in its tile: `position` of TILE, head_dim values.
inline void put_key(const Bf16* key, int position, int head_dim, int32_t* keys) {
  const int half = head_dim / 2;
  int32_t* to = keys + size_t(position / LANES) * half * LANES + position % LANES;
  for (int pair = 0; pair < half; ++pair) {
    std::memcpy(to + size_t(pair) * LANES, key + 2 * pair, sizeof *to);
  }
}

// As put_key, of 16 of the dimensions of a value, from `at` on.
inline void put_value(__m256i some, int position, int at, int head_dim, int32_t* values) {
  int32_t* to = values + size_t(position / 2) * head_dim + at;
  if (position % 2) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
    _mm512_mask_storeu_epi16(to, 0xaaaaaaaa, upper);
  } else {
    _mm512_mask_storeu_epi16(to, 0x55555555, _mm512_cvtepu16_epi32(some));
  }
}

// Scores of Q query rows against B blocks of 16 keys.
template <int Q, int B>
inline void score(const Bf16* queries, const Pairs& pairs, int block, float (*scores)[TILE]) {
  const int head_dim = pairs.head_dim;
  __m512 sum[Q * B];
  unrolled<Q * B>([&](int n) INLINE { sum[n] = _mm512_setzero_ps(); });
  for (int at = 0; at < head_dim / 2; ++at) {
    __m512i keys[B];
    unrolled<B>([&](int b) INLINE { keys[b] = _mm512_load_si512(pairs.keys_at(block + b, at)); });
    unrolled<Q>([&](int q) INLINE {
      const __m512i both = repeated(queries + size_t(q) * head_dim + 2 * at);
      unrolled<B>([&](int b) INLINE { add_bf16(sum[q * B + b], both, keys[b]); });
    });
  }
  unrolled<Q>([&](int q) INLINE {
    unrolled<B>([&](int b)
                    INLINE { _mm512_store_ps(&scores[q][(block + b) * LANES], sum[q * B + b]); });
  });
}

// The sum of `count` values (a whole number of pairs) weighted by `weights`, for B registers of
// dimensions from `at` on.
template <int Q, int B>
inline void weigh(const Bf16 (*weights)[TILE], const Pairs& pairs, int count, int at, float* out) {
  const int head_dim = pairs.head_dim;
  __m512 sum[Q * B];
  unrolled<Q * B>([&](int n) INLINE { sum[n] = _mm512_setzero_ps(); });
  for (int pair = 0; pair < count / 2; ++pair) {
    __m512i values[B];
    unrolled<B>([&](int b) INLINE {
      values[b] = _mm512_load_si512(pairs.values_at(pair, at + b * LANES));
    });
    unrolled<Q>([&](int q) INLINE {
      const __m512i both = repeated(&weights[q][2 * pair]);
      unrolled<B>([&](int b) INLINE { add_bf16(sum[q * B + b], both, values[b]); });
    });
  }
  unrolled<Q>([&](int q) INLINE {
    unrolled<B>([&](int b) INLINE {
      _mm512_storeu_ps(out + size_t(q) * head_dim + at + b * LANES, sum[q * B + b]);
    });
  });
}

// Scores of one row to weights, powers of two of what `scale` makes of them; returns (peak, sum).
// `visible` keys count, up to `count` are written.
inline void soften(const float* scores, int visible, int count, float scale, Bf16* weights,
                   float* peak, float* sum) {
  const int whole = visible / LANES * LANES;  // up to here no key is masked
  __m512 peaks = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int at = 0; at < whole; at += LANES) {
    peaks = _mm512_max_ps(peaks, _mm512_load_ps(scores + at));
  }
  if (whole < visible) {
    const __mmask16 lanes = first_lanes(visible - whole);
    peaks = _mm512_mask_max_ps(peaks, lanes, peaks, _mm512_load_ps(scores + whole));
  }
  const float largest = _mm512_reduce_max_ps(peaks) * scale;
  const __m512 less = _mm512_set1_ps(largest), by = _mm512_set1_ps(scale);
  __m512 sums = _mm512_setzero_ps();
  const auto weigh_keys = [&](int at, __mmask16 lanes) INLINE {
    const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + at), by, less);
    const __m256i rounded = narrow(_mm512_maskz_mov_ps(lanes, rough_power_of_two(x)));
    _mm256_storeu_si256((__m256i*)(weights + at), rounded);
    sums = _mm512_add_ps(sums, widen(rounded));  // what is summed is what weighs
  };
  for (int at = 0; at < whole; at += LANES) weigh_keys(at, 0xffff);
  for (int at = whole; at < count; at += LANES) weigh_keys(at, first_lanes(visible - at));
  *peak = largest;
  *sum = _mm512_reduce_add_ps(sums);
}

// Put what some rows found in one more tile to what they had.
inline void put_together(const Found& had, const Found& more, int queries, int head_dim) {
  for (int first = 0; first < queries; first += LANES) {
    const __mmask16 lanes = first_lanes(queries - first);
    const __m512 one = _mm512_maskz_loadu_ps(lanes, had.peak + first);
    const __m512 other = _mm512_maskz_loadu_ps(lanes, more.peak + first);
    const __m512 peak = _mm512_max_ps(one, other), to_nature = _mm512_set1_ps(LN_2);
    alignas(64) float keep[LANES], take[LANES];
    const __m512 kept = exponential(_mm512_mul_ps(_mm512_sub_ps(one, peak), to_nature));
    const __m512 taken = exponential(_mm512_mul_ps(_mm512_sub_ps(other, peak), to_nature));
    _mm512_store_ps(keep, kept);
    _mm512_store_ps(take, taken);
    const __m512 sum = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, had.sum + first), kept);
    const __m512 sums = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, more.sum + first), taken, sum);
    _mm512_mask_storeu_ps(had.sum + first, lanes, sums);
    _mm512_mask_storeu_ps(had.peak + first, lanes, peak);
    for (int q = first; q < std::min(first + LANES, queries); ++q) {
      const __m512 by = _mm512_set1_ps(keep[q - first]), with = _mm512_set1_ps(take[q - first]);
      float* mine = had.values + size_t(q) * head_dim;
      const float* theirs = more.values + size_t(q) * head_dim;
      for (int at = 0; at < head_dim; at += LANES) {
        const __m512 left = _mm512_mul_ps(_mm512_loadu_ps(mine + at), by);
        _mm512_storeu_ps(mine + at, _mm512_fmadd_ps(_mm512_loadu_ps(theirs + at), with, left));
      }
    }
  }
}

// What Q query rows find in a tile. Row q sees the keys up to visible[q].
template <int Q>
inline void attend_block(const Bf16* queries, const Pairs& pairs, const int* visible, float scale,
                         const Found& found) {
  const int head_dim = pairs.head_dim;
  alignas(64) float scores[Q][TILE];
  alignas(64) Bf16 weights[Q][TILE];
  const int blocks = ceil_div(*std::max_element(visible, visible + Q), LANES);
  int block = 0;
  for (; block + BLOCKS_MAX <= blocks; block += BLOCKS_MAX) {
    score<Q, BLOCKS_MAX>(queries, pairs, block, scores);
  }
  for (; block < blocks; ++block) score<Q, 1>(queries, pairs, block, scores);
  const int count = blocks * LANES;
  for (int q = 0; q < Q; ++q) {
    soften(scores[q], visible[q], count, scale, weights[q], found.peak + q, found.sum + q);
  }
  int at = 0;
  for (; at + BLOCKS_MAX * LANES <= head_dim; at += BLOCKS_MAX * LANES) {
    weigh<Q, BLOCKS_MAX>(weights, pairs, count, at, found.values);
  }
  for (; at < head_dim; at += LANES) weigh<Q, 1>(weights, pairs, count, at, found.values);
}

inline void attend(const Bf16* queries, const Pairs& pairs, const int* visible, int count,
                   float scale, Found found) {
  const int head_dim = pairs.head_dim;
  while (count > 0) {
    const int some = std::min(count, QUERIES_MAX);
    switch (some) {
      case 1:
        attend_block<1>(queries, pairs, visible, scale, found);
        break;
      case 2:
        attend_block<2>(queries, pairs, visible, scale, found);
        break;
      case 3:
        attend_block<3>(queries, pairs, visible, scale, found);
        break;
      case 4:
        attend_block<4>(queries, pairs, visible, scale, found);
        break;
      case 5:
        attend_block<5>(queries, pairs, visible, scale, found);
        break;
      default:
        attend_block<6>(queries, pairs, visible, scale, found);
        break;
    }
    count -= some;
    queries += size_t(some) * head_dim;
    visible += some;
    found = {found.peak + some, found.sum + some, found.values + size_t(some) * head_dim};
  }
}

}  // namespace crdt_llm
