// The product of a tile of rows with one panel of weights. Each output is summed over the inner dimension in rising
// order, one multiply-add a step, whatever the number of rows: that makes a row's bits its own.
#pragma once
#include "rows.h"

namespace shoal {

// Weights are asked for so far ahead, into the second cache: the hardware's own looking ahead ends with a page.
constexpr long AHEAD_BYTES = 8192;

template <int ROWS, int VECTORS, class Weight>
static inline void accumulate(const Weight* panel, const float* packed, long steps, float* out) {
  V sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = zero();
  for (long block = 0; block < steps; block++) {
#pragma GCC unroll 4
    for (int k = 0; k < LANES; k++) {
      V weights[VECTORS];
      for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + k * PANEL + v * LANES);
      if constexpr (ROWS >= LOOKING_AHEAD) {  // of the whole line of outputs, for the passes that follow
        const char* ahead = reinterpret_cast<const char*>(panel + k * PANEL) + AHEAD_BYTES;
        for (size_t byte = 0; byte < PANEL * sizeof(Weight); byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
      }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        V x = set1(packed[r * LANES + k]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[r][v] = fma(x, weights[v], sums[r][v]);
      }
    }
    panel += LANES * PANEL;
    packed += ROWS * LANES;
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) store(out + r * PANEL + v * LANES, sums[r][v]);
}

constexpr int pass_vectors(int rows) { return rows <= FEW_ROWS ? PANEL / LANES : PASS_VECTORS; }

// out[rows][PANEL] = the tile's rows times one panel, of floats or Bf16. One copy a file is enough of so much code.
template <class Weight>
[[gnu::noinline]] static void tile_product(const Weight* panel, const float* packed, int rows, long inner, float* out) {
  long steps = padded_inner(inner) / LANES;
  for (int pass = 0; pass < PANEL; pass += pass_vectors(rows) * LANES) {
    switch (rows) {
#define SHOAL_CASE(n) \
  case n: if constexpr (n <= MAX_ROWS) accumulate<n, pass_vectors(n)>(panel + pass, packed, steps, out + pass); break
      SHOAL_CASE(1); SHOAL_CASE(2); SHOAL_CASE(3); SHOAL_CASE(4); SHOAL_CASE(5); SHOAL_CASE(6);
      SHOAL_CASE(7); SHOAL_CASE(8); SHOAL_CASE(9); SHOAL_CASE(10); SHOAL_CASE(11); SHOAL_CASE(12);
#undef SHOAL_CASE
    }
  }
}

// Copies a result tile's columns [0, count) to out, each row `stride` apart, adding `add` (same layout as out) if given.
static inline void put_columns(const float* result, int rows, int count, float* out, const float* add, long stride) {
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < count; c += LANES) {
      V value = load(result + r * PANEL + c);
      int lanes = std::min(LANES, count - c);
      if (lanes == LANES) {
        if (add) value = value + load(add + r * stride + c);
        store(out + r * stride + c, value);
      } else {
        if (add) value = value + load_part(add + r * stride + c, lanes);
        store_part(out + r * stride + c, value, lanes);
      }
    }
  }
}

}  // namespace shoal
