// Weights in panels of PANEL outputs, [depth][PANEL] each, and the ways of matrices into them and out of them.
#pragma once
#include "pool.h"
#include "rows.h"

namespace shoal {

// Panels of weights, one after another, as floats or as Bf16: the same products with half the memory.
struct Panels {
  const void* first;
  bool narrow;
};

template <class Use>
static inline void with_type(const Panels& panels, const Use& use) {
  if (panels.narrow) {
    use(static_cast<const Bf16*>(panels.first));
  } else {
    use(static_cast<const float*>(panels.first));
  }
}

// One panel of up to PANEL outputs, each of `inner` numbers side by side and `row` after the last.
template <class Weight>
static inline void pack_panel(const Weight* weight, long outputs, long inner, long depth, Weight* to, long row) {
  for (long k0 = 0; k0 < depth; k0 += LANES, to += LANES * PANEL) {  // a block stays in the first cache
    long count = std::clamp<long>(inner - k0, 0, LANES);
    if (count < LANES || outputs < PANEL) std::fill(to, to + LANES * PANEL, Weight{});
    for (long o = 0; o < outputs; o++) {
      const Weight* from = weight + o * row + k0;
      for (long k = 0; k < count; k++) to[k * PANEL + o] = from[k];
    }
  }
}

template <class Weight>
static inline void pack_panels(const Weight* weight, long outputs, long inner, long depth, Weight* packed, long stride,
                               long row) {
  pool().run(panels_of(outputs), [&](long panel) {
    pack_panel(weight + panel * PANEL * row, std::min<long>(PANEL, outputs - panel * PANEL), inner, depth,
               packed + panel * stride * depth * PANEL, row);
  });
}

template <class Weight>
static inline void unpack_panels(const Weight* packed, long outputs, long inner, long depth, Weight* weight,
                                 long stride) {
  pool().run(panels_of(outputs), [&](long panel) {
    const Weight* from = packed + panel * stride * depth * PANEL;
    for (long o = 0; o < std::min<long>(PANEL, outputs - panel * PANEL); o++)
      for (long k = 0; k < inner; k++) weight[(panel * PANEL + o) * inner + k] = from[k * PANEL + o];
  });
}

// One panel of outputs that lie side by side, [inner][outputs], each input `stride` after the last.
static inline void pack_columns_panel(const float* matrix, long stride, long outputs, long inner, float* to) {
  for (long k = 0; k < padded_inner(inner); k++, to += PANEL) {
    std::fill(to + (k < inner ? outputs : 0), to + PANEL, 0.0f);
    if (k < inner) std::memcpy(to, matrix + k * stride, outputs * sizeof(float));
  }
}

// All panels of such a matrix.
static inline void pack_columns(const float* matrix, long stride, long outputs, long inner, float* packed) {
  pool().run(panels_of(outputs), [&](long panel) {
    pack_columns_panel(matrix + panel * PANEL, stride, std::min<long>(PANEL, outputs - panel * PANEL), inner,
                       packed + panel * padded_inner(inner) * PANEL);
  });
}

// Packs one tile of rows that are columns of a matrix: number k of the tile's row r is matrix[k * stride + r].
static inline void pack_tile_of_columns(float* packed, const Tile& tile, const float* matrix, long stride, long inner) {
  for (long k0 = 0; k0 < padded_inner(inner); k0 += LANES, packed += tile.rows * LANES) {
    for (long k = 0; k < LANES; k++) {
      const float* from = matrix + (k0 + k) * stride + tile.first;
      for (int r = 0; r < tile.rows; r++) packed[r * LANES + k] = k0 + k < inner ? from[r] : 0.0f;
    }
  }
}

}  // namespace shoal
