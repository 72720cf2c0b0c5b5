// Products of rows with a weight matrix, `y = x W^T + b`, in two weight formats.
//
// A weight lies in panels of 16 outputs, in the order in which a product reads it: for each step
// along the inputs (4 of them in int8, 2 in bf16) the 16 outputs side by side, which is one
// register. Panels are padded with zeros to a whole number of groups and outputs.
//
// int8: within a group sums of whole numbers, exact in any order; along the groups, and in bf16
// along the inputs, each output is one chain of additions, whatever the number of rows or panels
// computed together. Either way a row's result depends on the row alone.
#pragma once

#include "memory.hpp"

namespace crdt_llm {

constexpr int PANELS_MAX = 4;   // computed together
constexpr int STEP_BYTES = 64;  // a step along the inputs of one panel: a register
constexpr int STEPS_A_GROUP = GROUP / 4;
constexpr int WEIGHT_GROUP = 64;  // inputs of an output that share a scale: two groups of a row

// The largest blocks whose sums fit 32 registers beside the operands.
constexpr int ROWS_INT8 = 3;
constexpr int ROWS_BF16 = 6;

constexpr int rows_together(Format format) {
  return format == Format::INT8 ? ROWS_INT8 : ROWS_BF16;
}

// Weights that are wanted next, brought nearer bit by bit while others are in use: those of a new
// panel come from memory otherwise, while all who compute wait for them.
class Ahead {
 public:
  Ahead() = default;  // none: what is read once, one behind the other, the processor sees coming

  // In so many parts.
  Ahead(const uint8_t* first, const uint8_t* end, int parts)
      : next_(first),
        end_(end),
        part_(round_up(ceil_div(int(end - first), std::max(parts, 1)), int(CACHE_LINE))) {}

  void bring_some() {
    const uint8_t* stop = std::min(next_ + part_, end_);
    for (; next_ < stop; next_ += CACHE_LINE) _mm_prefetch(next_, _MM_HINT_T1);
  }

 private:
  const uint8_t *next_ = nullptr, *end_ = nullptr;
  int part_ = 0;
};

struct Linear {
  Format format;
  int inputs;
  int panels;
  int steps;               // along the inputs
  Buffer<uint8_t> weight;  // (panels, steps, STEP_BYTES)
  Buffer<Bf16> scale;      // int8: (panels, scales, 16): what a level is worth
  Buffer<float> bias;      // (panels * 16), or null

  // `weights`: float32 (outputs, inputs); `biases`: (outputs) or null. `order[n]` is which of them
  // becomes output n, or -1 for one of zeros.
  Linear(Format format, const float* weights, const float* biases, const int32_t* order, int count,
         int inputs)
      : format(format),
        inputs(inputs),
        panels(ceil_div(count, LANES)),
        steps(format == Format::INT8 ? Int8Row(inputs).padded / 4 : round_up(inputs, 32) / 2),
        weight(allocate<uint8_t>(size_t(panels) * steps * STEP_BYTES)),
        scale(allocate<Bf16>(size_t(panels) * scales() * LANES)),
        bias(biases ? allocate<float>(panels * LANES) : nullptr) {
    std::memset(weight.get(), 0, size_t(panels) * steps * STEP_BYTES);
    std::memset(scale.get(), 0, sizeof(Bf16) * panels * scales() * LANES);
    for (int output = 0; output < panels * LANES; ++output) {
      const int from = output < count ? order[output] : -1;
      if (bias) bias[output] = from < 0 ? 0.0f : biases[from];
      if (from >= 0) fill(output, weights + size_t(from) * inputs);
    }
  }

  // Of an output, in int8.
  int scales() const { return steps * 4 / WEIGHT_GROUP; }

  // The share `part` of `parts` of some panels, for who multiplies `rows` rows.
  Ahead ahead(int panel, int count, int part, int parts, int rows) const {
    const size_t bytes = size_t(steps) * STEP_BYTES;
    const uint8_t* first = weight.get() + std::min(panel, panels) * bytes;
    const size_t all = size_t(std::clamp(panels - panel, 0, count)) * steps;
    const int blocks = ceil_div(rows, rows_together(format));
    return {first + all * part / parts * STEP_BYTES, first + all * (part + 1) / parts * STEP_BYTES,
            blocks * (steps / STEPS_A_GROUP)};
  }

  __m512 with_bias(__m512 values, int output) const {
    return bias ? _mm512_add_ps(values, _mm512_load_ps(bias.get() + output)) : values;
  }

 private:
  void fill(int output, const float* row) {
    uint8_t* panel = weight.get() + size_t(output / LANES) * steps * STEP_BYTES;
    const int lane = output % LANES;
    if (format == Format::BF16) {
      for (int at = 0; at < inputs; ++at) {
        const Bf16 rounded = to_bf16(row[at]);
        std::memcpy(panel + at / 2 * STEP_BYTES + lane * 4 + at % 2 * 2, &rounded, sizeof rounded);
      }
      return;
    }
    for (int first = 0; first < inputs; first += WEIGHT_GROUP) {
      const int end = std::min(first + WEIGHT_GROUP, inputs);
      float peak = PEAK_MIN;
      for (int at = first; at < end; ++at) peak = std::max(peak, __builtin_fabsf(row[at]));
      const Bf16 rounded = to_bf16(peak / LEVEL_MAX);
      scale[(size_t(output / LANES) * scales() + first / WEIGHT_GROUP) * LANES + lane] = rounded;
      for (int at = first; at < end; ++at) {
        const int level = int(__builtin_rintf(row[at] / to_float(rounded)));
        panel[at / 4 * STEP_BYTES + lane * 4 + at % 4] =
            uint8_t(std::clamp(level, -LEVEL_MAX, LEVEL_MAX) + ZERO);
      }
    }
  }
};

// The operands of some rows: `bytes` each.
struct Operands {
  const uint8_t* data;
  int bytes;
};

// Multiply R rows with P panels, and hand each register of results on as (row, panel, values).
template <int R, int P, typename Take>
inline void multiply_int8(const Linear& linear, const Operands& rows, int first_row,
                          int first_panel, Ahead& ahead, Take&& take) {
  __m512 sum[R * P];
  unrolled<R * P>([&](int n) INLINE { sum[n] = _mm512_setzero_ps(); });
  const size_t panel = size_t(linear.steps) * STEP_BYTES;
  const uint8_t* weights = linear.weight.get() + first_panel * panel;
  const size_t bytes = rows.bytes;
  const uint8_t* levels = rows.data + first_row * bytes;
  const Int8Row parts(linear.inputs);
  const uint8_t* scales = levels + parts.scales();
  const uint8_t* begins = levels + parts.begins();
  const size_t panel_scales = size_t(linear.scales()) * LANES;
  const Bf16* weight_scales = linear.scale.get() + first_panel * panel_scales;
  for (int group = 0; group < parts.groups(); ++group, scales += 4, begins += 4) {
    ahead.bring_some();
    __m512i part[R * P];
    unrolled<R>([&](int r) INLINE {
      const __m512i begin = repeated(begins + r * bytes);
      unrolled<P>([&](int p) INLINE { part[r * P + p] = begin; });
    });
#pragma GCC unroll 8
    for (int step = 0; step < STEPS_A_GROUP; ++step, weights += STEP_BYTES, levels += 4) {
      __m512i weight[P];
      unrolled<P>([&](int p) INLINE { weight[p] = _mm512_load_si512(weights + p * panel); });
      unrolled<R>([&](int r) INLINE {
        const __m512i four = repeated(levels + r * bytes);
        unrolled<P>([&](int p) INLINE { add_int8(part[r * P + p], weight[p], four); });
      });
    }
    __m512 weight_scale[P];
    unrolled<P>([&](int p) INLINE {
      const Bf16* from = weight_scales + p * panel_scales + group / 2 * LANES;
      weight_scale[p] = widen(_mm256_load_si256((const __m256i*)from));
    });
    unrolled<R>([&](int r) INLINE {
      const __m512 scale = _mm512_castsi512_ps(repeated(scales + r * bytes));
      unrolled<P>([&](int p) INLINE {
        const int n = r * P + p;
        const __m512 by = _mm512_mul_ps(scale, weight_scale[p]);
        sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[n]), by, sum[n]);
      });
    });
  }
  unrolled<P>([&](int p) INLINE {
    const int output = (first_panel + p) * LANES;
    unrolled<R>([&](int r) INLINE {
      take(first_row + r, first_panel + p, linear.with_bias(sum[r * P + p], output));
    });
  });
}

template <int R, int P, typename Take>
inline void multiply_bf16(const Linear& linear, const Operands& rows, int first_row,
                          int first_panel, Ahead& ahead, Take&& take) {
  __m512 sum[R * P];
  unrolled<R * P>([&](int n) INLINE { sum[n] = _mm512_setzero_ps(); });
  const size_t panel = size_t(linear.steps) * STEP_BYTES;
  const uint8_t* weights = linear.weight.get() + first_panel * panel;
  const uint8_t* row = rows.data + size_t(first_row) * rows.bytes;
  const size_t bytes = rows.bytes;
  for (int step = 0; step < linear.steps; ++step, weights += STEP_BYTES, row += 4) {
    if (step % STEPS_A_GROUP == 0) ahead.bring_some();
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

template <int R, int P, typename Take>
inline void multiply_block(const Linear& linear, const Operands& rows, int row, int panel,
                           Ahead& ahead, Take&& take) {
  if (linear.format == Format::INT8) {
    if constexpr (R <= ROWS_INT8) multiply_int8<R, P>(linear, rows, row, panel, ahead, take);
  } else {
    multiply_bf16<R, P>(linear, rows, row, panel, ahead, take);
  }
}

template <int P, typename Take>
inline void multiply_rows(const Linear& linear, const Operands& rows, int row, int end, int panel,
                          Ahead ahead, Take&& take) {
  const int most = rows_together(linear.format);
  while (row < end) {
    const int count = std::min(most, end - row);
    switch (count) {
      case 1:
        multiply_block<1, P>(linear, rows, row, panel, ahead, take);
        break;
      case 2:
        multiply_block<2, P>(linear, rows, row, panel, ahead, take);
        break;
      case 3:
        multiply_block<3, P>(linear, rows, row, panel, ahead, take);
        break;
      case 4:
        multiply_block<4, P>(linear, rows, row, panel, ahead, take);
        break;
      case 5:
        multiply_block<5, P>(linear, rows, row, panel, ahead, take);
        break;
      default:
        multiply_block<6, P>(linear, rows, row, panel, ahead, take);
        break;
    }
    row += count;
  }
}

// Multiply the rows [row, end) with `panels` panels from `panel` on.
template <typename Take>
inline void multiply(const Linear& linear, const Operands& rows, int row, int end, int panel,
                     int panels, Ahead ahead, Take&& take) {
  switch (panels) {
    case 1:
      multiply_rows<1>(linear, rows, row, end, panel, ahead, take);
      break;
    case 2:
      multiply_rows<2>(linear, rows, row, end, panel, ahead, take);
      break;
    case 3:
      multiply_rows<3>(linear, rows, row, end, panel, ahead, take);
      break;
    default:
      multiply_rows<4>(linear, rows, row, end, panel, ahead, take);
      break;
  }
}

}  // namespace crdt_llm
