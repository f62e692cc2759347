// Linear maps with packed weights: one, one a head, and the SwiGLU networks of many experts.
#include <vector>

#include "calls.h"
#include "panels.h"
#include "pool.h"
#include "product.h"

using namespace shoal;

namespace {

constexpr long BLOCK_FLOATS = 1 << 21;  // of a matrix that is packed to be used once, 8 MiB
constexpr long PACK_ALONE = 1 << 15;  // floats that the caller packs itself, sooner than the team would wake

template <class Row>
void pack_rows(float* packed, const Layout& layout, long inner, long rows, const Row& row) {
  long tiles = static_cast<long>(layout.tiles.size());
  auto pack = [&](long t) { pack_tile(tile_at(packed, layout.tiles[t], inner), layout.tiles[t], inner, row); };
  if (rows * inner <= PACK_ALONE) {
    for (long t = 0; t < tiles; t++) pack(t);
  } else {
    pool().run(tiles, pack);
  }
}

// Calls done(tile, panel, result[rows][PANEL]) for every tile of every chunk and every panel of weights(group).
template <class Weights, class Done>
void multiply(const Layout& layout, float* packed, long inner, long panels, const Weights& weights, const Done& done) {
  long chunks = static_cast<long>(layout.chunks.size());
  pool().run(chunks * panels, [&](long task) {
    const Chunk& chunk = layout.chunks[task / panels];
    long panel = task % panels;
    alignas(64) float result[MAX_ROWS * PANEL];
    with_type(weights(chunk.group), [&](const auto* first) {
      const auto* w = first + panel * padded_inner(inner) * PANEL;
      for (int t = chunk.first_tile; t < chunk.first_tile + chunk.tiles; t++) {
        const Tile& tile = layout.tiles[t];
        tile_product(w, tile_at(packed, tile, inner), tile.rows, inner, result);
        done(tile, panel, result);
      }
    });
  });
}

V silu(V x) { return x / (set1(1.0f) + exp(zero() - x)); }

struct Work {
  Layout layout;
  Scratch input, hidden, weights;
  std::vector<int> order, first;
};

Work& work() {
  static thread_local Work memory;
  return memory;
}

}  // namespace

extern "C" {

// [outputs][inner] -> panels of PANEL outputs, [depth][PANEL] each; what is added is 0. Both sides are floats, or Bf16
// if `narrow`. `stride` is the distance of two panels in panels: 2 interleaves two matrices, as gate and up are.
void shoal_pack(const void* weight, long outputs, long inner, long depth, void* packed, long stride, int narrow) {
  if (narrow) {
    pack_panels(static_cast<const Bf16*>(weight), outputs, inner, depth, static_cast<Bf16*>(packed), stride, inner);
  } else {
    pack_panels(static_cast<const float*>(weight), outputs, inner, depth, static_cast<float*>(packed), stride, inner);
  }
}

void shoal_unpack(const void* packed, long outputs, long inner, long depth, void* weight, long stride, int narrow) {
  if (narrow) {
    unpack_panels(static_cast<const Bf16*>(packed), outputs, inner, depth, static_cast<Bf16*>(weight), stride);
  } else {
    unpack_panels(static_cast<const float*>(packed), outputs, inner, depth, static_cast<float*>(weight), stride);
  }
}

// `heads` maps, head h from x + h * x_head to out + h * out_head: out[r] = x[r] · weight_hᵀ (+ add[r]).
// Rows of x are x_stride apart, those of out and add out_stride; packed weights of the heads, Bf16 if `narrow`, follow
// one another.
void shoal_linear(const float* x, long x_stride, long x_head, long rows, const void* packed, int narrow, long heads,
                  long inner, long outputs, float* out, long out_stride, long out_head, const float* add) {
  if (rows == 0) return;
  Work& memory = work();
  Layout& layout = memory.layout;
  layout.clear();
  for (long h = 0; h < heads; h++) layout.add(static_cast<int>(h), h * rows, rows, inner);
  float* input = memory.input.take(heads * rows * padded_inner(inner));
  pack_rows(input, layout, inner, heads * rows, [&](long row) {
    return x + (row / rows) * x_head + (row % rows) * x_stride;
  });
  long panels = panels_of(outputs);
  long head_bytes = panels * padded_inner(inner) * PANEL * static_cast<long>(narrow ? sizeof(Bf16) : sizeof(float));
  multiply(
      layout, input, inner, panels,
      [&](int head) { return Panels{static_cast<const char*>(packed) + head * head_bytes, narrow != 0}; },
      [&](const Tile& tile, long panel, const float* result) {
        long at = tile.group * out_head + (tile.first - tile.group * rows) * out_stride + panel * PANEL;
        int count = static_cast<int>(std::min<long>(PANEL, outputs - panel * PANEL));
        put_columns(result, tile.rows, count, out + at, add ? add + at : nullptr, out_stride);
      });
}

// out = a · b, [rows][inner] times [inner][outputs], of matrices that are used once and so packed here. Either
// is `turned` where its numbers along `inner` are a stride apart and the others side by side: a, where a column of
// memory is a row of it, b, where a row of memory is a row of it.
void shoal_product(const float* a, long a_stride, int a_turned, long rows, const float* b, long b_stride, int b_turned,
                   long inner, long outputs, float* out, long out_stride) {
  if (rows == 0) return;
  Work& memory = work();
  Layout& layout = memory.layout;
  layout.clear();
  layout.add(0, 0, rows, inner);
  float* input = memory.input.take(rows * padded_inner(inner));
  if (a_turned) {
    pool().run(static_cast<long>(layout.tiles.size()), [&](long t) {
      const Tile& tile = layout.tiles[t];
      pack_tile_of_columns(tile_at(input, tile, inner), tile, a, a_stride, inner);
    });
  } else {
    pack_rows(input, layout, inner, rows, [&](long row) { return a + row * a_stride; });
  }
  long block = std::max<long>(1, BLOCK_FLOATS / (padded_inner(inner) * PANEL)) * PANEL;
  float* weights = memory.weights.take(std::min(block, panels_of(outputs) * PANEL) * padded_inner(inner));
  for (long first = 0; first < outputs; first += block) {
    long count = std::min(block, outputs - first);
    if (b_turned) {
      pack_columns(b + first, b_stride, count, inner, weights);
    } else {
      pack_panels(b + first * b_stride, count, inner, padded_inner(inner), weights, 1, b_stride);
    }
    multiply(
        layout, input, inner, panels_of(count), [&](int) { return Panels{weights, false}; },
        [&](const Tile& tile, long panel, const float* result) {
          long at = tile.first * out_stride + first + panel * PANEL;
          int columns = static_cast<int>(std::min<long>(PANEL, count - panel * PANEL));
          put_columns(result, tile.rows, columns, out + at, nullptr, out_stride);
        });
  }
}

// SwiGLU of many experts: out[p] = down_e(silu(gate_e(x)) * up_e(x)) with e = pair_expert[p], x = x[pair_row[p]].
// gate_up[e] and down[e] are addresses of packed weights, gate's and up's panels in turn, Bf16 if narrow[e]. Pairs
// without pair_row are the rows themselves. Adds add[p] if given. Returns 0, or 1 + p for the first pair whose expert or
// row is not there.
long shoal_experts(const float* x, long x_stride, long rows, long pairs, const int* pair_row, const int* pair_expert,
                   const void* const* gate_up, const void* const* down, const long* narrow, long experts, long width,
                   long inner, float* out, long out_stride, const float* add) {
  if (pairs == 0) return 0;
  Work& memory = work();
  Layout& layout = memory.layout;
  layout.clear();
  std::vector<int>&order = memory.order, &first = memory.first;
  first.assign(experts + 1, 0);
  for (long p = 0; p < pairs; p++) {
    int expert = pair_expert ? pair_expert[p] : 0, row = pair_row ? pair_row[p] : static_cast<int>(p);
    if (expert < 0 || expert >= experts || !gate_up[expert] || row < 0 || row >= rows) return p + 1;
    first[expert + 1]++;
  }
  for (long e = 0; e < experts; e++) {
    if (first[e + 1]) layout.add(static_cast<int>(e), first[e], first[e + 1], std::max(width, inner));
    first[e + 1] += first[e];
  }
  order.resize(pairs);
  for (long p = 0; p < pairs; p++) order[first[pair_expert ? pair_expert[p] : 0]++] = static_cast<int>(p);

  float* input = memory.input.take(pairs * padded_inner(width));
  float* hidden = memory.hidden.take(pairs * padded_inner(panels_of(inner) * PANEL));
  pack_rows(input, layout, width, pairs, [&](long row) {
    int p = order[row];
    return x + (pair_row ? pair_row[p] : p) * x_stride;
  });
  long panels = panels_of(inner), depth = panels * PANEL, panel_numbers = padded_inner(width) * PANEL;
  long chunks = static_cast<long>(layout.chunks.size());
  pool().run(chunks * panels, [&](long task) {
    const Chunk& chunk = layout.chunks[task / panels];
    long panel = task % panels;
    alignas(64) float gate[MAX_ROWS * PANEL], up[MAX_ROWS * PANEL];
    with_type({gate_up[chunk.group], narrow[chunk.group] != 0}, [&](const auto* first) {
      const auto* weights = first + 2 * panel * panel_numbers;
      for (int t = chunk.first_tile; t < chunk.first_tile + chunk.tiles; t++) {
        const Tile& tile = layout.tiles[t];
        const float* packed = tile_at(input, tile, width);
        tile_product(weights, packed, tile.rows, width, gate);
        tile_product(weights + panel_numbers, packed, tile.rows, width, up);
        float* to = tile_at(hidden, tile, depth) + panel * PANEL * tile.rows;  // packed, as the second product reads it
        for (int part = 0; part < PANEL; part += LANES)
          for (int r = 0; r < tile.rows; r++)
            store(to + part * tile.rows + r * LANES,
                  silu(load(gate + r * PANEL + part)) * load(up + r * PANEL + part));
      }
    });
  });
  multiply(
      layout, hidden, depth, panels_of(width), [&](int expert) { return Panels{down[expert], narrow[expert] != 0}; },
      [&](const Tile& tile, long panel, const float* result) {
        int count = static_cast<int>(std::min<long>(PANEL, width - panel * PANEL));
        for (int r = 0; r < tile.rows; r++) {
          long at = order[tile.first + r] * out_stride + panel * PANEL;
          put_columns(result + r * PANEL, 1, count, out + at, add ? add + at : nullptr, out_stride);
        }
      });
  return 0;
}

}  // extern "C"
