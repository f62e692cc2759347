// Causal attention of samples laid flat.
#include "causal.h"

#include <cmath>

using namespace shoal;

namespace {

struct Work {
  Layout layout;
  Scratch queries, keys, values, weights;
};

Work& work() {
  static thread_local Work memory;
  return memory;
}

// Scores of one tile of queries become weights that are not yet divided by their sum; each row's maximum and sum.
void weigh(const Tile& tile, const float* queries, const float* key_panels, const Rows& k, float scale, float* weights,
           float* top, float* total) {
  alignas(64) float result[MAX_ROWS * PANEL];
  long keys = tile.first + tile.rows;
  V best[MAX_ROWS];
  for (int r = 0; r < tile.rows; r++) best[r] = set1(NEVER);
  for (long j = 0; j < padded_inner(keys); j += LANES) {
    if (j % PANEL == 0) tile_product(key_panels + j * k.depth(), queries, tile.rows, k.width, result);
    for (int r = 0; r < tile.rows; r++) {
      float* to = weights + j * tile.rows + r * LANES;
      store(to, load(result + r * PANEL + j % PANEL) * set1(scale));
      fill_lanes(to, tile.first + r + 1 - j, LANES, NEVER);
      best[r] = vmax(best[r], load(to));
    }
  }
  for (int r = 0; r < tile.rows; r++) {
    alignas(64) float lanes[LANES];
    store(lanes, best[r]);
    top[r] = *std::max_element(lanes, lanes + LANES);
    V sums = zero();
    for (long j = 0; j < padded_inner(keys); j += LANES) {
      float* at = weights + j * tile.rows + r * LANES;
      V weight = exp(load(at) - set1(top[r]));
      store(at, weight);
      sums = sums + weight;
    }
    total[r] = sum(sums);
  }
}

}  // namespace

extern "C" {

// out = softmax(scale * q · k) · v over each token's own sample up to itself, [tokens][heads][values]; `logs` gets the
// logarithm of each sum of exponentials, [heads][tokens]. Samples end at `ends`. Of q, k and v, the numbers of a head lie
// side by side; heads and tokens are as far apart as is said.
void shoal_causal_attention(const float* q, long q_token, long q_head, const float* k, long k_token, long k_head,
                            const float* v, long v_token, long v_head, const long* ends, long count, long heads,
                            long width, long values, float scale, float* out, float* logs) {
  Samples samples{ends, count, heads, ends[count - 1]};
  Heads of_q{q, q_token, q_head, width}, of_k{k, k_token, k_head, width}, of_v{v, v_token, v_head, values};
  samples.each([&](long start, long length, long head) {
    Work& memory = work();
    Rows rows_k = of_k.rows(start, head), rows_v = of_v.rows(start, head), rows_q = of_q.rows(start, head);
    cut(memory.layout, length);
    const float* queries = tiles_of(memory.queries, memory.layout, rows_q, length);
    const float* key_panels = panels_by_token(memory.keys, rows_k, length);
    const float* value_panels = panels_by_number(memory.values, rows_v, length);
    float* weights = memory.weights.take(padded_inner(length) * MAX_ROWS);
    float top[MAX_ROWS], total[MAX_ROWS];
    for (const Tile& tile : memory.layout.tiles) {
      weigh(tile, tile_at(queries, tile, width), key_panels, rows_k, scale, weights, top, total);
      for (int r = 0; r < tile.rows; r++) {
        logs[head * samples.tokens + start + tile.first + r] = top[r] + std::log(total[r]);
        total[r] = 1.0f / total[r];
      }
      sum_tokens(value_panels, values, length, 0, tile.first + tile.rows, weights, tile.rows, total,
                 [&](int r) { return out + ((start + tile.first + r) * heads + head) * values; });
    }
  });
}

}  // extern "C"
