// Vectors of 16 float32: loads, an exponential, and what turns a row into the operand of a product.
//
// Everything here treats each element, or each row, alike, in one order of operations that does not
// depend on what stands beside it. The compiler must not fuse a product with a sum where it likes
// (-ffp-contract=off): where two are fused it says so.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define INLINE __attribute__((always_inline))  // of a lambda

namespace crdt_llm {

// `body(0)` to `body(N - 1)`, written out before anything else is decided: only then do compilers
// keep an array of registers in registers.
template <int N, typename Body>
[[gnu::always_inline]] inline void unrolled(Body&& body) {
  [&]<int... n>(std::integer_sequence<int, n...>)
      INLINE { (body(n), ...); }(std::make_integer_sequence<int, N>{});
}

constexpr int LANES = 16;  // float32 in a register

// While it lives, this thread rounds to the nearest and keeps denormals, whatever a library has set
// it to meanwhile: which thread computes a row must not show.
class PlainFloats {
 public:
  PlainFloats() : before_(_mm_getcsr()) { _mm_setcsr(PLAIN); }
  ~PlainFloats() { _mm_setcsr(before_); }

  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  static constexpr unsigned PLAIN = 0x1f80;  // all exceptions masked, as a process begins
  unsigned before_;
};

using Bf16 = uint16_t;  // the upper half of a float32

constexpr float LN_2 = 0.69314718f;
constexpr float LOG2_E = 1.44269504f;

inline int ceil_div(int count, int size) { return (count + size - 1) / size; }
inline int round_up(int count, int size) { return ceil_div(count, size) * size; }

// Of the first `count` lanes.
inline __mmask16 first_lanes(int count) {
  return count >= LANES ? __mmask16(0xffff) : __mmask16((1u << std::max(count, 0)) - 1u);
}

inline __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// 4 bytes, 16 times.
inline __m512i repeated(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, sizeof value);
  return _mm512_set1_epi32(value);
}

// `sum += products` of unsigned with signed bytes, four by four, and of bf16, two by two. Written
// as instructions: given the intrinsics, GCC copies each sum to and fro (half of the speed).
inline void add_int8(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

inline void add_bf16(__m512& sum, __m512i ones, __m512i others) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(ones), "v"(others));
}

inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

inline Bf16 to_bf16(float value) {
  return Bf16(_mm256_extract_epi16(narrow(_mm512_set1_ps(value)), 0));
}

inline float to_float(Bf16 value) { return std::bit_cast<float>(uint32_t(value) << 16); }

// exp(x) for x <= 88, to about one unit in the last place; 0 for -inf and whatever underflows.
// Range reduction by Cody and Waite; the polynomial is the Taylor series on |r| <= ln(2) / 2, whose
// first omitted term is below half a unit.
inline __m512 exponential(__m512 x) {
  const __m512 tiny = _mm512_set1_ps(-87.0f);
  const __mmask16 vanishes = _mm512_cmp_ps_mask(x, tiny, _CMP_LT_OQ);
  x = _mm512_max_ps(tiny, x);  // in this order what is not a number stays so
  const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)),
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(twos, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 720));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_mask_mov_ps(_mm512_scalef_ps(sum, twos), vanishes, _mm512_setzero_ps());
}

// 2^x, to four digits: for numbers that are rounded to bf16, which has two and a half. The cubic
// with the least relative error (1e-4) on |f| <= 1 / 2 of those that are 1 at 0.
inline __m512 rough_power_of_two(__m512 x) {
  const __m512 twos = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, twos);
  __m512 sum = _mm512_set1_ps(5.500869e-2f);
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.4221063e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.9328292e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, twos);
}

// x / (1 + exp(-x)).
inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 negative =
      _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f));
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(negative)));
}

// One over the root of the mean square (RMS norm, Zhang and Sennrich, 2019).
inline float inverse_norm(const float* row, int width, float epsilon) {
  __m512 squares = _mm512_setzero_ps();
  for (int at = 0; at < width; at += LANES) {
    const __m512 x = _mm512_maskz_loadu_ps(first_lanes(width - at), row + at);
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / float(width);
  return 1.0f / __builtin_sqrtf(mean + epsilon);
}

// -- operands ------------------------------------------------------------------------------------
//
// A row of float32 becomes what the product of a weight format takes. For bf16 its values rounded
// to bf16. For int8 its values in groups of 32, each with a scale of its own, so that one large
// value makes none but its neighbours coarse (as llama.cpp's Q8_0 does): `row = level * scale`.
// Weights are held above 128, as unsigned bytes; what that adds to the sum of a group, 128 times
// the sum of its levels, is taken off where the sum begins.

constexpr int GROUP = 32;       // values that share a scale
constexpr int LEVEL_MAX = 127;  // of an int8; symmetric, so that none needs a zero point of its own
constexpr int ZERO = 128;       // what is added to the level of a weight
constexpr float PEAK_MIN = 1e-30f;  // values of zero are divided by something

enum class Format : int { INT8 = 0, BF16 = 1 };

// Where the parts of an operand row in int8 lie: levels, then a scale of each group, then where its
// sum begins.
struct Int8Row {
  int padded;  // values, of whole groups

  explicit Int8Row(int width) : padded(round_up(width, 2 * GROUP)) {}

  int groups() const { return padded / GROUP; }
  int scales() const { return padded; }
  int begins() const { return scales() + 4 * groups(); }
  int bytes() const { return round_up(begins() + 4 * groups(), 64); }
};

// Bytes of an operand row; a multiple of a register, so that no read goes beyond it.
inline int operand_bytes(Format format, int width) {
  return format == Format::INT8 ? Int8Row(width).bytes() : 2 * round_up(width, 32);
}

// A group as levels of its scale.
struct Levels {
  __m512i ones, others;
  float scale;

  Levels(__m512 values, __m512 more) {
    // As whole numbers, magnitudes have the same order, and what is not a number is the largest:
    // then the scale is none, nor is any product.
    const __m512i peaks = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(values)),
                                           _mm512_castps_si512(_mm512_abs_ps(more)));
    const float peak = std::max(std::bit_cast<float>(_mm512_reduce_max_epu32(peaks)), PEAK_MIN);
    const __m512 steps = _mm512_set1_ps(LEVEL_MAX / peak);
    ones = _mm512_cvtps_epi32(_mm512_mul_ps(values, steps));
    others = _mm512_cvtps_epi32(_mm512_mul_ps(more, steps));
    scale = peak * (1.0f / LEVEL_MAX);
  }
};

// Turn `row * gain * factor` into an operand. `gain` may be null. For int8 the factor joins the
// scales, since rounding by the largest value does not see it.
inline void make_operand(Format format, const float* row, const float* gain, float factor,
                         int width, uint8_t* operand) {
  auto value = [&](int at) {
    const __mmask16 lanes = first_lanes(width - at);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, row + at);
    return gain ? _mm512_mul_ps(x, _mm512_maskz_loadu_ps(lanes, gain + at)) : x;
  };
  if (format == Format::BF16) {
    const __m512 times = _mm512_set1_ps(factor);
    for (int at = 0; at < round_up(width, 32); at += LANES) {
      _mm256_storeu_si256((__m256i*)(operand + 2 * at), narrow(_mm512_mul_ps(value(at), times)));
    }
    return;
  }
  const Int8Row parts(width);
  float* scales = (float*)(operand + parts.scales());
  int32_t* begins = (int32_t*)(operand + parts.begins());
  for (int group = 0; group < parts.groups(); ++group) {
    const int at = group * GROUP;
    const Levels levels(value(at), value(at + LANES));
    _mm_storeu_si128((__m128i*)(operand + at), _mm512_cvtepi32_epi8(levels.ones));
    _mm_storeu_si128((__m128i*)(operand + at + LANES), _mm512_cvtepi32_epi8(levels.others));
    scales[group] = factor * levels.scale;
    begins[group] = -ZERO * _mm512_reduce_add_epi32(_mm512_add_epi32(levels.ones, levels.others));
  }
}

// Leave of a row what an operand in int8 does not have of it.
inline void leave_rest(float* row, int width) {
  for (int at = 0; at < width; at += GROUP) {
    const __mmask16 lanes = first_lanes(width - at), more_lanes = first_lanes(width - at - LANES);
    const __m512 values = _mm512_maskz_loadu_ps(lanes, row + at);
    const __m512 more = _mm512_maskz_loadu_ps(more_lanes, row + at + LANES);
    const Levels levels(values, more);
    const __m512 scale = _mm512_set1_ps(levels.scale);
    _mm512_mask_storeu_ps(row + at, lanes,
                          _mm512_fnmadd_ps(_mm512_cvtepi32_ps(levels.ones), scale, values));
    _mm512_mask_storeu_ps(row + at + LANES, more_lanes,
                          _mm512_fnmadd_ps(_mm512_cvtepi32_ps(levels.others), scale, more));
  }
}

}  // namespace crdt_llm
