// The forward step of the Llama family on a CPU with AVX-512 VNNI and BF16, as one C interface.
//
// Rows of embeddings in; keys, values and the last hidden state of each row out, into the slots of
// a pool. Who calls owns the pool, knows the ids, and sees to it that no two chunks share a slot.
// See arithmetic.hpp, product.hpp and attention.hpp for why a row's result depends on the row and
// on what is before it alone, bit for bit.
#include <utility>
#include <vector>

#include "attention.hpp"
#include "product.hpp"
#include "team.hpp"

namespace crdt_llm {

// -- what crosses the interface; the same in native_step.py
// ---------------------------------------------

struct Sizes {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, format;
  float epsilon;
};

struct LayerWeights {
  const float* attention_norm;       // (hidden)
  const float* queries_keys_values;  // ((heads + 2 kv_heads) head_dim, hidden)
  const float* queries_keys_values_bias;
  const float* head_norm;  // (heads + kv_heads, head_dim), or null
  const float* output;     // (hidden, heads head_dim)
  const float* output_bias;
  const float* mlp_norm;  // (hidden)
  const float* gate_up;   // (2 intermediate, hidden): gates, then ups
  const float* gate_up_bias;
  const float* down;  // (hidden, intermediate)
  const float* down_bias;
};

struct Pool {
  int32_t* kv;   // (slots, layers, 2 kv_heads), each a tile in pairs: see attention.hpp
  Bf16* hidden;  // (slots, TILE, hidden)
};

struct Chunk {
  int64_t position, rows, tiles;
  const int64_t* slots;  // (tiles)
};

// -- the model
// --------------------------------------------------------------------------------------

namespace {

constexpr int FEW_ROWS = 2;      // each thread makes their operands for itself: no barrier
constexpr int ROWS_A_TASK = 24;  // of a product: a multiple of what is computed together, and of 2
constexpr int SPLIT_ROWS_MAX = 32;  // chunks of up to so many rows share their tiles out to threads
constexpr int ROWS_A_BLOCK = 48;    // of attention at most, in longer chunks

std::vector<float> copied(const float* values, size_t count) {
  return values ? std::vector<float>(values, values + count) : std::vector<float>();
}

const float* or_null(const std::vector<float>& values) {
  return values.empty() ? nullptr : values.data();
}

std::vector<int32_t> in_order(int count) {
  std::vector<int32_t> order(count);
  for (int n = 0; n < count; ++n) order[n] = n;
  return order;
}

// Gates and ups by panels in turn, so that who has computed a gate has its up next.
std::vector<int32_t> in_turn(int width) {
  std::vector<int32_t> order(2 * round_up(width, LANES), -1);
  for (int n = 0; n < width; ++n) {
    const int panel = n / LANES, lane = n % LANES;
    order[(2 * panel) * LANES + lane] = n;
    order[(2 * panel + 1) * LANES + lane] = width + n;
  }
  return order;
}

struct Layer {
  std::vector<float> attention_norm, head_norm, mlp_norm;
  Linear queries_keys_values, output, gate_up, down;

  Layer(const Sizes& sizes, const LayerWeights& from)
      : attention_norm(copied(from.attention_norm, sizes.hidden)),
        head_norm(copied(from.head_norm, size_t(sizes.heads + sizes.kv_heads) * sizes.head_dim)),
        mlp_norm(copied(from.mlp_norm, sizes.hidden)),
        queries_keys_values(linear(sizes, from.queries_keys_values, from.queries_keys_values_bias,
                                   in_order((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim),
                                   sizes.hidden)),
        output(linear(sizes, from.output, from.output_bias, in_order(sizes.hidden),
                      sizes.heads * sizes.head_dim)),
        gate_up(linear(sizes, from.gate_up, from.gate_up_bias, in_turn(sizes.intermediate),
                       sizes.hidden)),
        down(linear(sizes, from.down, from.down_bias, in_order(sizes.hidden), sizes.intermediate)) {
  }

 private:
  static Linear linear(const Sizes& sizes, const float* weights, const float* biases,
                       const std::vector<int32_t>& order, int inputs) {
    return Linear(Format(sizes.format), weights, biases, order.data(), int(order.size()), inputs);
  }
};

// Operands of the widest row, for some rows.
struct OperandRows {
  Buffer<uint8_t> data;
  int rows = 0;

  void reserve(int count, int bytes) {
    if (count <= rows) return;
    data = allocate<uint8_t>(size_t(count) * bytes);
    rows = count;
  }
};

// What a thread has to itself.
struct Desk {
  OperandRows operands;
  std::vector<float> row;
  std::vector<int> visible;
  std::vector<Bf16> head;
};

// A share of the attention of a chunk.
struct Share {
  int chunk, head, row, rows, tile, tiles;
  size_t found;  // query rows before it
};

// Where a chunk's rows and what they found begin.
struct Place {
  int row, parts;
  size_t found;
};

// The register at `at` of a head rolled by half its size.
inline __m512 rolled(const float* head, int at, int dim) {
  const int half = dim / 2;
  if (half % LANES == 0) return _mm512_loadu_ps(head + (at < half ? at + half : at - half));
  float other[LANES];
  for (int n = 0; n < LANES; ++n) other[n] = head[(at + n + half) % dim];
  return _mm512_loadu_ps(other);
}

class Model {
 public:
  Model(const Sizes& sizes, const float* cosines, const float* sines, int threads)
      : sizes_(sizes),
        group_(sizes.heads / sizes.kv_heads),
        width_(sizes.heads * sizes.head_dim),
        vector_(width_ + 2 * sizes.kv_heads * sizes.head_dim),
        cosines_(cosines),
        sines_(sines),
        team_(threads) {
    const Format format = Format(sizes.format);
    operand_bytes_ = std::max({operand_bytes(format, sizes.hidden), operand_bytes(format, width_),
                               operand_bytes(format, sizes.intermediate)});
    for (int index = 0; index < team_.most(); ++index) {
      desks_.emplace_back();
      desks_.back().operands.reserve(FEW_ROWS, operand_bytes_);
      desks_.back().head.resize(sizes.head_dim);
      desks_.back().row.resize(std::max(sizes.hidden, width_));
      desks_.back().visible.resize(size_t(ROWS_A_BLOCK) * group_);
    }
  }

  void add_layer(const LayerWeights& weights) {
    const PlainFloats plain;
    layers_.emplace_back(sizes_, weights);
  }

  void set_head(const float* norm, const float* weights) {
    const PlainFloats plain;
    norm_ = copied(norm, sizes_.hidden);
    head_ = std::make_unique<Linear>(Format(sizes_.format), weights, nullptr,
                                     in_order(sizes_.vocabulary).data(), sizes_.vocabulary,
                                     sizes_.hidden);
  }

  void forward(float* state, const Chunk* chunks, int count, const Pool& pool, int threads) {
    plan(chunks, count);
    team_.run(threads, [&](int index) { step(state, chunks, pool, desks_[index]); });
  }

  // In int8 a row is two operands here, what is rounded and what rounding left of it: the head is
  // read once for all of them, and a fifth of what int8 costs in quality was the rounding here.
  void logits(const Bf16* hidden, int rows, float* out, int threads) {
    const int parts = Format(sizes_.format) == Format::INT8 ? 2 : 1;
    rows_ = rows * parts;
    reserve();
    team_.run(threads, [&](int index) {
      const Operands operands =
          make_rows(desks_[index], sizes_.hidden, nullptr, [&](int row, float* to) {
            const Bf16* from = hidden + size_t(row / parts) * sizes_.hidden;
            for (int at = 0; at < sizes_.hidden; at += LANES) {
              const __mmask16 lanes = first_lanes(sizes_.hidden - at);
              _mm512_mask_storeu_ps(to + at, lanes,
                                    widen(_mm256_maskz_loadu_epi16(lanes, from + at)));
            }
            if (row % parts) leave_rest(to, sizes_.hidden);
            return Source{to, 1.0f};
          });
      product(*head_, operands, [&](int row, int panel, __m512 values) {
        float* to = out + size_t(row / parts) * sizes_.vocabulary + panel * LANES;
        const __mmask16 lanes = first_lanes(sizes_.vocabulary - panel * LANES);
        if (row % parts) values = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), values);
        _mm512_mask_storeu_ps(to, lanes, values);
      });
    });
  }

 private:
  struct Source {
    const float* row;
    float factor;
  };

  // Lay out the rows of a step: who begins where, and how attention is shared out.
  void plan(const Chunk* chunks, int count) {
    places_.clear();
    shares_.clear();
    placed_together_.clear();
    rows_ = 0;
    size_t found = 0;
    for (int chunk = 0; chunk < count; ++chunk) {
      const int rows = int(chunks[chunk].rows), tiles = int(chunks[chunk].tiles);
      const bool split = rows <= SPLIT_ROWS_MAX;
      const int parts = split ? tiles : 1;
      places_.push_back({rows_, parts, found});
      const int blocks = ceil_div(rows, ROWS_A_BLOCK);
      const int most = round_up(ceil_div(rows, blocks), 2);  // alike, so that threads end together
      for (int head = 0; head < sizes_.kv_heads; ++head) {
        for (int part = 0; part < parts; ++part) {
          for (int row = 0; row < rows; row += most) {
            const int some = std::min(most, rows - row);
            shares_.push_back(
                {chunk, head, row, some, part, split ? 1 : tiles, found + size_t(row) * group_});
          }
          found += size_t(rows) * group_;
        }
      }
      for (int row = 0, some; row < rows; row += some) {
        some = std::min(rows - row, LANES - int((chunks[chunk].position + row) % LANES));
        placed_together_.push_back({rows_ + row, rows_ + row + some});
      }
      rows_ += rows;
    }
    chunk_of_.clear();
    for (int chunk = 0; chunk < count; ++chunk)
      chunk_of_.insert(chunk_of_.end(), chunks[chunk].rows, chunk);
    reserve();
    if (found > found_room_) {
      found_room_ = found;
      found_peak_ = allocate<float>(found);
      found_sum_ = allocate<float>(found);
      found_values_ = allocate<float>(found * sizes_.head_dim);
    }
  }

  void reserve() {
    operands_.reserve(rows_, operand_bytes_);
    if (rows_ <= room_) return;
    room_ = rows_;
    vectors_ = allocate<float>(size_t(rows_) * vector_);
    queries_ = allocate<Bf16>(size_t(rows_) * width_);
    gated_ = allocate<float>(size_t(rows_) * round_up(sizes_.intermediate, LANES));
  }

  void step(float* state, const Chunk* chunks, const Pool& pool, Desk& desk) {
    const int hidden = sizes_.hidden, gated = round_up(sizes_.intermediate, LANES);
    const auto add_to_state = [&](int row, int panel, __m512 values) {
      float* to = state + size_t(row) * hidden + panel * LANES;
      const __mmask16 lanes = first_lanes(hidden - panel * LANES);
      _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), values));
    };
    const auto normed = [&](int row, float*) {
      const float* from = state + size_t(row) * hidden;
      return Source{from, inverse_norm(from, hidden, sizes_.epsilon)};
    };
    for (int index = 0; index < sizes_.layers; ++index) {
      const Layer& layer = layers_[index];
      product(layer.queries_keys_values,
              make_rows(desk, hidden, layer.attention_norm.data(), normed),
              [&](int row, int panel, __m512 values) {
                _mm512_mask_storeu_ps(vectors_.get() + size_t(row) * vector_ + panel * LANES,
                                      first_lanes(vector_ - panel * LANES), values);
              });
      team_.each(int(placed_together_.size()), [&](int n) {
        const auto [first, end] = placed_together_[n];
        for (int row = first; row < end; ++row) {
          place(row, index, or_null(layer.head_norm), chunks, pool, desk);
        }
      });
      team_.each(int(shares_.size()),
                 [&](int n) { attend_share(shares_[n], index, chunks, pool, desk); });
      product(layer.output,
              make_rows(desk, width_, nullptr,
                        [&](int row, float* to) {
                          gather(row, to);
                          return Source{to, 1.0f};
                        }),
              add_to_state);
      product(layer.gate_up, make_rows(desk, hidden, layer.mlp_norm.data(), normed),
              [&](int row, int panel, __m512 values) {
                float* to = gated_.get() + size_t(row) * gated + panel / 2 * LANES;
                _mm512_storeu_ps(
                    to, panel % 2 ? _mm512_mul_ps(_mm512_loadu_ps(to), values) : silu(values));
              });
      product(layer.down,
              make_rows(desk, sizes_.intermediate, nullptr,
                        [&](int row, float*) {
                          return Source{gated_.get() + size_t(row) * gated, 1.0f};
                        }),
              add_to_state);
    }
    team_.each(rows_, [&](int row) { finish(state + size_t(row) * hidden, row, chunks, pool); });
  }

  // Operands of all rows: `source(row, scratch)` says what of. Few rows are made by every thread
  // for itself, which is quicker than to wait for each other.
  template <typename Of>
  Operands make_rows(Desk& desk, int width, const float* gain, Of&& source) {
    const Format format = Format(sizes_.format);
    const int bytes = operand_bytes(format, width);
    const bool few = rows_ <= FEW_ROWS;
    OperandRows& to = few ? desk.operands : operands_;
    const auto make = [&](int row) {
      const Source from = source(row, desk.row.data());
      make_operand(format, from.row, gain, from.factor, width, to.data.get() + size_t(row) * bytes);
    };
    if (few) {
      for (int row = 0; row < rows_; ++row) make(row);
    } else {
      team_.each(rows_, make);
    }
    return {to.data.get(), bytes};
  }

  // One product of all rows; `take` sees panels of a row in ascending order.
  template <typename Take>
  void product(const Linear& linear, const Operands& operands, Take&& take) {
    const int some = rows_ <= FEW_ROWS ? 2 : PANELS_MAX;
    const int blocks = ceil_div(rows_, ROWS_A_TASK);
    team_.each(ceil_div(linear.panels, some) * blocks, [&](int n) {
      const int panel = n / blocks * some, block = n % blocks;
      const int row = block * ROWS_A_TASK, end = std::min(row + ROWS_A_TASK, rows_);
      multiply(
          linear, operands, row, end, panel, std::min(some, linear.panels - panel),
          rows_ <= FEW_ROWS ? Ahead() : linear.ahead(panel + some, some, block, blocks, end - row),
          take);
    });
  }

  // Keys of a head, and behind those of all heads their values.
  int32_t* kv_at(const Pool& pool, int64_t slot, int layer, int head) const {
    const size_t tile = size_t(TILE) * sizes_.head_dim / 2;
    return pool.kv + ((size_t(slot) * sizes_.layers + layer) * 2 * sizes_.kv_heads + head) * tile;
  }

  Pairs pairs_at(const Pool& pool, int64_t slot, int layer, int head) const {
    return {kv_at(pool, slot, layer, head), kv_at(pool, slot, layer, sizes_.kv_heads + head),
            sizes_.head_dim};
  }

  // Norm and rotate the heads of a row, and put them where attention finds them.
  void place(int row, int layer, const float* head_norm, const Chunk* chunks, const Pool& pool,
             Desk& desk) {
    const int dim = sizes_.head_dim, chunk = chunk_of_[row];
    const int64_t position = chunks[chunk].position + row - places_[chunk].row;
    const int64_t slot = chunks[chunk].slots[chunks[chunk].tiles - 1];
    const int in_tile = int(position % TILE);
    const float* cosines = cosines_ + size_t(position) * dim;
    const float* sines = sines_ + size_t(position) * dim;
    float* heads = vectors_.get() + size_t(row) * vector_;
    for (int head = 0; head < sizes_.heads + 2 * sizes_.kv_heads; ++head) {
      float* from = heads + size_t(head) * dim;
      const int kv_head = head - sizes_.heads;
      if (kv_head >= sizes_.kv_heads) {  // a value: as it is
        int32_t* values = kv_at(pool, slot, layer, kv_head);
        for (int at = 0; at < dim; at += LANES) {
          put_value(narrow(_mm512_loadu_ps(from + at)), in_tile, at, dim, values);
        }
        continue;
      }
      if (head_norm) {
        const __m512 factor = _mm512_set1_ps(inverse_norm(from, dim, sizes_.epsilon));
        for (int at = 0; at < dim; at += LANES) {
          const __m512 gain = _mm512_loadu_ps(head_norm + size_t(head) * dim + at);
          const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + at), factor);
          _mm512_storeu_ps(from + at, _mm512_mul_ps(x, gain));
        }
      }
      Bf16* turned =
          kv_head >= 0 ? desk.head.data()
                       : queries_.get() +
                             ((size_t(head / group_) * rows_ + row) * group_ + head % group_) * dim;
      for (int at = 0; at < dim; at += LANES) {
        const __m512 other = _mm512_mul_ps(rolled(from, at, dim), _mm512_loadu_ps(sines + at));
        const __m512 x =
            _mm512_fmadd_ps(_mm512_loadu_ps(from + at), _mm512_loadu_ps(cosines + at), other);
        _mm256_storeu_si256((__m256i*)(turned + at), narrow(x));
      }
      if (kv_head >= 0) put_key(turned, in_tile, dim, kv_at(pool, slot, layer, kv_head));
    }
  }

  Found found_at(size_t query) {
    return {found_peak_.get() + query, found_sum_.get() + query,
            found_values_.get() + query * sizes_.head_dim};
  }

  void attend_share(const Share& share, int layer, const Chunk* chunks, const Pool& pool,
                    Desk& desk) {
    const Chunk& chunk = chunks[share.chunk];
    const int dim = sizes_.head_dim, queries = share.rows * group_;
    const int row = places_[share.chunk].row + share.row;
    const Bf16* query = queries_.get() + (size_t(share.head) * rows_ + row) * group_ * dim;
    const float scale = LOG2_E / __builtin_sqrtf(float(dim));
    const Found found = found_at(share.found);
    for (int tile = share.tile; tile < share.tile + share.tiles; ++tile) {
      // Of the first row; every further one sees one key more, as far as the tile goes.
      const int64_t first = chunk.position + share.row + 1 - int64_t(tile) * TILE;
      for (int n = 0, q = 0; n < share.rows; ++n) {
        const int visible = int(std::min<int64_t>(first + n, TILE));
        for (int head = 0; head < group_; ++head) desk.visible[q++] = visible;
      }
      const Pairs pairs = pairs_at(pool, chunk.slots[tile], layer, share.head);
      if (tile == share.tile) {
        attend(query, pairs, desk.visible.data(), queries, scale, found);
      } else {
        const Found more = more_at(desk, queries);
        attend(query, pairs, desk.visible.data(), queries, scale, more);
        put_together(found, more, queries, dim);
      }
    }
  }

  Found more_at(Desk& desk, int queries) {
    desk.row.resize(std::max(desk.row.size(), size_t(queries) * (sizes_.head_dim + 2)));
    float* values = desk.row.data();
    float* peak = values + size_t(queries) * sizes_.head_dim;
    return {peak, peak + queries, values};
  }

  // What all heads of a row found, put together and divided by its sum.
  void gather(int row, float* to) {
    const int chunk = chunk_of_[row], dim = sizes_.head_dim;
    const Place& place = places_[chunk];
    const size_t rows = chunk + 1 < int(places_.size()) ? size_t(places_[chunk + 1].row - place.row)
                                                        : size_t(rows_ - place.row);
    for (int head = 0; head < sizes_.heads; ++head) {
      float* values = to + size_t(head) * dim;
      float peak = 0.0f, sum = 0.0f;
      for (int part = 0; part < place.parts; ++part) {
        const size_t before =
            (size_t(head / group_) * place.parts + part) * rows + (row - place.row);
        const Found found = found_at(place.found + before * group_ + head % group_);
        if (part == 0) {
          peak = *found.peak;
          sum = *found.sum;
          std::memcpy(values, found.values, sizeof(float) * dim);
        } else {
          put_together({&peak, &sum, values}, found, 1, dim);
        }
      }
      const __m512 share = _mm512_set1_ps(1.0f / sum);
      for (int at = 0; at < dim; at += LANES) {
        _mm512_storeu_ps(values + at, _mm512_mul_ps(_mm512_loadu_ps(values + at), share));
      }
    }
  }

  // The last norm, into the pool.
  void finish(const float* from, int row, const Chunk* chunks, const Pool& pool) {
    const int hidden = sizes_.hidden, chunk = chunk_of_[row];
    const int64_t position = chunks[chunk].position + row - places_[chunk].row;
    const int64_t slot = chunks[chunk].slots[chunks[chunk].tiles - 1];
    Bf16* to = pool.hidden + (size_t(slot) * TILE + size_t(position % TILE)) * hidden;
    const __m512 factor = _mm512_set1_ps(inverse_norm(from, hidden, sizes_.epsilon));
    for (int at = 0; at < hidden; at += LANES) {
      const __mmask16 lanes = first_lanes(hidden - at);
      const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, from + at), factor);
      const __m512 y = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(lanes, norm_.data() + at));
      _mm256_mask_storeu_epi16(to + at, lanes, narrow(y));
    }
  }

  Sizes sizes_;
  int group_, width_, vector_, operand_bytes_ = 0;
  const float *cosines_, *sines_;  // (positions, head_dim); whoever made the model keeps them
  std::vector<Layer> layers_;
  std::vector<float> norm_;
  std::unique_ptr<Linear> head_;
  Team team_;
  std::vector<Desk> desks_;

  // Of the step at hand.
  int rows_ = 0, room_ = 0;
  std::vector<Place> places_;
  std::vector<Share> shares_;
  std::vector<std::pair<int, int>> placed_together_;  // rows whose keys share cache lines
  std::vector<int> chunk_of_;                         // by row
  OperandRows operands_;
  Buffer<float> vectors_, gated_;
  Buffer<Bf16> queries_;  // (kv_heads, rows, group, head_dim)
  size_t found_room_ = 0;
  Buffer<float> found_peak_, found_sum_, found_values_;
};

}  // namespace
}  // namespace crdt_llm

extern "C" {

using crdt_llm::Model;

Model* crdt_llm_new(const crdt_llm::Sizes* sizes, const float* cosines, const float* sines,
                    int threads) {
  return new Model(*sizes, cosines, sines, threads);
}

void crdt_llm_free(Model* model) { delete model; }

void crdt_llm_add_layer(Model* model, const crdt_llm::LayerWeights* weights) {
  model->add_layer(*weights);
}

void crdt_llm_set_head(Model* model, const float* norm, const float* weights) {
  model->set_head(norm, weights);
}

// `state`: (rows, hidden), the embeddings of all chunks one after the other; it is used up.
void crdt_llm_forward(Model* model, float* state, const crdt_llm::Chunk* chunks, int count,
                      const crdt_llm::Pool* pool, int threads) {
  model->forward(state, chunks, count, *pool, threads);
}

// `hidden`: (rows, hidden) of a pool; `out`: (rows, vocabulary).
void crdt_llm_logits(Model* model, const uint16_t* hidden, int rows, float* out, int threads) {
  model->logits(hidden, rows, out, threads);
}
}
