// What causal attention of samples laid flat, and its gradients, are made of: a token sees its own sample up to itself.
//
// A head of a sample is a task of its own. Queries, or keys, are taken in tiles, the left side of a product; what they
// meet lies in panels. A tile's weights are written as the left side of the product that follows. Each sum runs in
// rising order of keys or queries, so that a row's bits are a function of its sample alone.
#pragma once
#include <limits>

#include "panels.h"
#include "pool.h"
#include "product.h"

namespace shoal {


constexpr float NEVER = -std::numeric_limits<float>::infinity();

// One head of one sample: `width` numbers a token side by side, and tokens `stride` apart.
struct Rows {
  const float* first;
  long stride, width;

  const float* operator()(long token) const { return first + token * stride; }
  long depth() const { return padded_inner(width); }
};

// A tensor [tokens][heads][width].
struct Heads {
  const float* first;
  long token, head, width;

  Rows rows(long start, long number) const { return {first + start * token + number * head, token, width}; }
};

struct Samples {
  const long* ends;
  long count, heads, tokens;

  // use(start, length, head) for every head of every sample.
  template <class Use>
  void each(const Use& use) const {
    pool().run(count * heads, [&](long task) {
      long sample = task / heads, start = sample ? ends[sample - 1] : 0;
      use(start, ends[sample] - start, task % heads);
    });
  }
};

static inline void cut(Layout& layout, long length) {
  layout.clear();
  layout.add(0, 0, length, 1);
}

// All tokens as the left side of a product over the width.
static inline const float* tiles_of(Scratch& scratch, const Layout& layout, const Rows& rows, long length) {
  float* packed = scratch.take(length * rows.depth());
  for (const Tile& tile : layout.tiles) pack_tile(tile_at(packed, tile, rows.width), tile, rows.width, rows);
  return packed;
}

// Panels whose outputs are tokens, summed over the width.
static inline const float* panels_by_token(Scratch& scratch, const Rows& rows, long length) {
  float* packed = scratch.take(panels_of(length) * rows.depth() * PANEL);
  for (long t = 0; t < length; t += PANEL)
    pack_panel(rows(t), std::min<long>(PANEL, length - t), rows.width, rows.depth(), packed + t * rows.depth(),
               rows.stride);
  return packed;
}

// Panels whose outputs are the numbers of a token, summed over tokens.
static inline const float* panels_by_number(Scratch& scratch, const Rows& rows, long length) {
  float* packed = scratch.take(panels_of(rows.width) * padded_inner(length) * PANEL);
  for (long c = 0; c < rows.width; c += PANEL)
    pack_columns_panel(rows.first + c, rows.stride, std::min<long>(PANEL, rows.width - c), length,
                       packed + c * padded_inner(length));
  return packed;
}

// to(r)[0, width) = (the left side's row r, of tokens [from, from + count), times panels by number) * factor[r].
template <class To>
static inline void sum_tokens(const float* panels, long width, long length, long from, long count, const float* left, int rows,
                const float* factor, const To& to) {
  alignas(64) float result[MAX_ROWS * PANEL];
  for (long c = 0; c < width; c += PANEL) {
    tile_product(panels + c * padded_inner(length) + from * PANEL, left, rows, count, result);
    for (int r = 0; r < rows; r++)
      for (long part = 0; part < std::min<long>(PANEL, width - c); part += LANES) {
        V value = load(result + r * PANEL + part) * set1(factor[r]);
        int lanes = static_cast<int>(std::min<long>(LANES, width - c - part));
        if (lanes == LANES) store(to(r) + c + part, value);
        else store_part(to(r) + c + part, value, lanes);
      }
  }
}

static inline void fill_lanes(float* lanes, long from, long to, float value) {
  for (long lane = std::max<long>(0, from); lane < std::min<long>(LANES, to); lane++) lanes[lane] = value;
}

}  // namespace shoal
