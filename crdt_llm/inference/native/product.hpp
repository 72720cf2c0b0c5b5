// Products of rows with a weight matrix, `y = x W^T + b`, in two weight formats.
//
// A weight lies in panels of 16 outputs, in the order in which a product reads it: for each group
// of inputs (4 in int8, 2 in bf16) the 16 outputs side by side, which is one register. Panels are
// padded with zeros to a whole number of groups and outputs.
//
// int8: sums of whole numbers, exact in any order. bf16: each output is one chain of additions
// along the inputs, whatever the number of rows or panels computed together. Either way a row's
// result depends on the row alone.
#pragma once

#include "memory.hpp"

namespace crdt_llm {

constexpr int LEVEL_MAX = 127;   // of an int8 weight; symmetric, so that none needs a zero point
constexpr int PANELS_MAX = 4;    // computed together
constexpr int GROUP_BYTES = 64;  // a group of inputs of one panel: a register

struct Linear {
  Format format;
  int inputs;
  int outputs;
  int panels;
  int groups;              // of inputs
  Buffer<uint8_t> weight;  // (panels, groups, GROUP_BYTES)
  Buffer<float> scale;     // int8: (panels * 16): what a level of an output is worth
  Buffer<int32_t> zero;    // int8: (panels * 16): what the zero points of the rows add to a sum
  Buffer<float> bias;      // (panels * 16), or null

  // `weights`: float32 (outputs, inputs); `biases`: (outputs) or null. `order[n]` is which of them
  // becomes output n, or -1 for one of zeros.
  Linear(Format format, const float* weights, const float* biases, const int32_t* order, int count,
         int inputs)
      : format(format),
        inputs(inputs),
        outputs(count),
        panels(ceil_div(count, LANES)),
        groups(format == Format::INT8 ? round_up(inputs, 64) / 4 : round_up(inputs, 32) / 2),
        weight(allocate<uint8_t>(size_t(panels) * groups * GROUP_BYTES)),
        scale(allocate<float>(panels * LANES)),
        zero(allocate<int32_t>(panels * LANES)),
        bias(biases ? allocate<float>(panels * LANES) : nullptr) {
    std::memset(weight.get(), 0, size_t(panels) * groups * GROUP_BYTES);
    for (int output = 0; output < panels * LANES; ++output) {
      const int from = output < count ? order[output] : -1;
      scale[output] = 0.0f;
      zero[output] = 0;
      if (bias) bias[output] = from < 0 ? 0.0f : biases[from];
      if (from >= 0) fill(output, weights + size_t(from) * inputs);
    }
  }

  __m512 with_bias(__m512 values, int output) const {
    return bias ? _mm512_add_ps(values, _mm512_load_ps(bias.get() + output)) : values;
  }

 private:
  void fill(int output, const float* row) {
    uint8_t* panel = weight.get() + size_t(output / LANES) * groups * GROUP_BYTES;
    const int lane = output % LANES;
    if (format == Format::BF16) {
      for (int at = 0; at < inputs; ++at) {
        const Bf16 rounded = Bf16(_mm256_extract_epi16(narrow(_mm512_set1_ps(row[at])), 0));
        std::memcpy(panel + at / 2 * GROUP_BYTES + lane * 4 + at % 2 * 2, &rounded, sizeof rounded);
      }
      return;
    }
    float peak = PEAK_MIN;
    for (int at = 0; at < inputs; ++at) peak = std::max(peak, __builtin_fabsf(row[at]));
    scale[output] = peak / LEVEL_MAX;
    int32_t sum = 0;
    for (int at = 0; at < inputs; ++at) {
      const int level = int(__builtin_rintf(row[at] / scale[output]));
      panel[at / 4 * GROUP_BYTES + lane * 4 + at % 4] = uint8_t(int8_t(level));
      sum += level;
    }
    zero[output] = ZERO * sum;
  }
};

// The operands of some rows: `bytes` each.
struct Operands {
  const uint8_t* data;
  const float* scale;
  int bytes;
};

// Multiply R rows with P panels, and hand each register of results on as (row, panel, values).
template <int R, int P, typename Take>
inline void multiply_int8(const Linear& linear, const Operands& rows, int first_row,
                          int first_panel, Take&& take) {
  __m512i low[R * P], high[R * P];
  unrolled<R * P>([&](int n) INLINE { low[n] = high[n] = _mm512_setzero_si512(); });
  const size_t panel = size_t(linear.groups) * GROUP_BYTES;
  const uint8_t* weights = linear.weight.get() + first_panel * panel;
  const uint8_t* row = rows.data + size_t(first_row) * rows.bytes;
  const size_t bytes = rows.bytes, plane = bytes / 2;
  for (int group = 0; group < linear.groups; ++group, weights += GROUP_BYTES, row += 4) {
    __m512i weight[P];
    unrolled<P>([&](int p) INLINE { weight[p] = _mm512_load_si512(weights + p * panel); });
    unrolled<R>([&](int r) INLINE {
      const __m512i lows = repeated(row + r * bytes), highs = repeated(row + r * bytes + plane);
      unrolled<P>([&](int p) INLINE {
        add_int8(low[r * P + p], lows, weight[p]);
        add_int8(high[r * P + p], highs, weight[p]);
      });
    });
  }
  unrolled<P>([&](int p) INLINE {
    const int output = (first_panel + p) * LANES;
    const __m512i zero = _mm512_load_si512(linear.zero.get() + output);
    const __m512 scale = _mm512_load_ps(linear.scale.get() + output);
    unrolled<R>([&](int r) INLINE {
      const __m512 lows = _mm512_cvtepi32_ps(_mm512_sub_epi32(low[r * P + p], zero));
      const __m512 highs = _mm512_cvtepi32_ps(_mm512_sub_epi32(high[r * P + p], zero));
      const __m512 sum = _mm512_fmadd_ps(highs, _mm512_set1_ps(float(PLANE)), lows);
      const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scale[first_row + r]));
      const __m512 result = _mm512_mul_ps(sum, by);
      take(first_row + r, first_panel + p, linear.with_bias(result, output));
    });
  });
}

template <int R, int P, typename Take>
inline void multiply_bf16(const Linear& linear, const Operands& rows, int first_row,
                          int first_panel, Take&& take) {
  __m512 sum[R * P];
  unrolled<R * P>([&](int n) INLINE { sum[n] = _mm512_setzero_ps(); });
  const size_t panel = size_t(linear.groups) * GROUP_BYTES;
  const uint8_t* weights = linear.weight.get() + first_panel * panel;
  const uint8_t* row = rows.data + size_t(first_row) * rows.bytes;
  const size_t bytes = rows.bytes;
  for (int group = 0; group < linear.groups; ++group, weights += GROUP_BYTES, row += 4) {
    __m512i weight[P];
    unrolled<P>([&](int p) INLINE { weight[p] = _mm512_load_si512(weights + p * panel); });
    unrolled<R>([&](int r) INLINE {
      const __m512i both = repeated(row + r * bytes);
      unrolled<P>([&](int p) INLINE { add_bf16(sum[r * P + p], both, weight[p]); });
    });
  }
  unrolled<P>([&](int p) INLINE {
    const int output = (first_panel + p) * LANES;
    unrolled<R>([&](int r) INLINE {
      take(first_row + r, first_panel + p, linear.with_bias(sum[r * P + p], output));
    });
  });
}

// The largest blocks whose sums fit 32 registers beside the operands.
constexpr int ROWS_INT8 = 3;
constexpr int ROWS_BF16 = 6;

template <int R, int P, typename Take>
inline void multiply_block(const Linear& linear, const Operands& rows, int row, int panel,
                           Take&& take) {
  if (linear.format == Format::INT8) {
    if constexpr (R <= ROWS_INT8) multiply_int8<R, P>(linear, rows, row, panel, take);
  } else {
    multiply_bf16<R, P>(linear, rows, row, panel, take);
  }
}

template <int P, typename Take>
inline void multiply_rows(const Linear& linear, const Operands& rows, int row, int end, int panel,
                          Take&& take) {
  const int most = linear.format == Format::INT8 ? ROWS_INT8 : ROWS_BF16;
  while (row < end) {
    const int count = std::min(most, end - row);
    switch (count) {
      case 1:
        multiply_block<1, P>(linear, rows, row, panel, take);
        break;
      case 2:
        multiply_block<2, P>(linear, rows, row, panel, take);
        break;
      case 3:
        multiply_block<3, P>(linear, rows, row, panel, take);
        break;
      case 4:
        multiply_block<4, P>(linear, rows, row, panel, take);
        break;
      case 5:
        multiply_block<5, P>(linear, rows, row, panel, take);
        break;
      default:
        multiply_block<6, P>(linear, rows, row, panel, take);
        break;
    }
    row += count;
  }
}

// Multiply the rows [row, end) with `panels` panels from `panel` on.
template <typename Take>
inline void multiply(const Linear& linear, const Operands& rows, int row, int end, int panel,
                     int panels, Take&& take) {
  switch (panels) {
    case 1:
      multiply_rows<1>(linear, rows, row, end, panel, take);
      break;
    case 2:
      multiply_rows<2>(linear, rows, row, end, panel, take);
      break;
    case 3:
      multiply_rows<3>(linear, rows, row, end, panel, take);
      break;
    default:
      multiply_rows<4>(linear, rows, row, end, panel, take);
      break;
  }
}

}  // namespace crdt_llm
