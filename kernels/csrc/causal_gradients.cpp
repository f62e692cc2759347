// Gradients of causal attention of samples laid flat. Weights are computed anew from the logarithms of their sums: once
// by tiles of queries for the queries' gradients, once by tiles of keys for those of keys and values.
#include "causal.h"

using namespace shoal;

namespace {

struct Work {
  Layout layout;
  Scratch left[2], by_token[2], by_number[2], weights, gradients, logs, deltas;
};

Work& work() {
  static thread_local Work memory;
  return memory;
}

// What a head's gradients are made of.
struct Given {
  Rows q, k, v, dout;
  const float *logs, *deltas;  // of each token, filled up to whole panels
  long length;
  float scale;
};

// From a score, and the gradient of its weight, the weight and the gradient of the score; `scale` is not in it yet.
inline void differentiate(const float* score, float scale, V log, const float* dweight, V delta, float* weight,
                          float* dscore) {
  V w = exp(load(score) * set1(scale) - log);
  store(weight, w);
  store(dscore, w * (load(dweight) - delta));
}

// dq of all queries, a tile of them at a time.
void differentiate_queries(const Given& g, float* dq, long stride) {
  Work& memory = work();
  const float* queries = tiles_of(memory.left[0], memory.layout, g.q, g.length);
  const float* douts = tiles_of(memory.left[1], memory.layout, g.dout, g.length);
  const float* keys_by_token = panels_by_token(memory.by_token[0], g.k, g.length);
  const float* values_by_token = panels_by_token(memory.by_token[1], g.v, g.length);
  const float* keys_by_number = panels_by_number(memory.by_number[0], g.k, g.length);
  float* dscores = memory.gradients.take(padded_inner(g.length) * MAX_ROWS);
  alignas(64) float scores[MAX_ROWS * PANEL], dweights[MAX_ROWS * PANEL], weight[LANES], factor[MAX_ROWS];
  std::fill(factor, factor + MAX_ROWS, g.scale);
  for (const Tile& tile : memory.layout.tiles) {
    long keys = tile.first + tile.rows;
    for (long j = 0; j < padded_inner(keys); j += LANES) {
      if (j % PANEL == 0) {
        tile_product(keys_by_token + j * g.k.depth(), tile_at(queries, tile, g.q.width), tile.rows,
                     g.q.width, scores);
        tile_product(values_by_token + j * g.v.depth(), tile_at(douts, tile, g.v.width), tile.rows,
                     g.v.width, dweights);
      }
      for (int r = 0; r < tile.rows; r++) {
        long at = r * PANEL + j % PANEL, query = tile.first + r;
        float* to = dscores + j * tile.rows + r * LANES;
        differentiate(scores + at, g.scale, set1(g.logs[query]), dweights + at, set1(g.deltas[query]), weight, to);
        fill_lanes(to, query + 1 - j, LANES, 0.0f);
      }
    }
    sum_tokens(keys_by_number, g.k.width, g.length, 0, keys, dscores, tile.rows, factor,
               [&](int r) { return dq + (tile.first + r) * stride; });
  }
}

// dk and dv of all keys, a tile of them at a time.
void differentiate_keys(const Given& g, float* dk, long k_stride, float* dv, long v_stride) {
  Work& memory = work();
  const float* keys = tiles_of(memory.left[0], memory.layout, g.k, g.length);
  const float* values = tiles_of(memory.left[1], memory.layout, g.v, g.length);
  const float* queries_by_token = panels_by_token(memory.by_token[0], g.q, g.length);
  const float* douts_by_token = panels_by_token(memory.by_token[1], g.dout, g.length);
  const float* queries_by_number = panels_by_number(memory.by_number[0], g.q, g.length);
  const float* douts_by_number = panels_by_number(memory.by_number[1], g.dout, g.length);
  float* weights = memory.weights.take(padded_inner(g.length) * MAX_ROWS);
  float* dscores = memory.gradients.take(padded_inner(g.length) * MAX_ROWS);
  alignas(64) float scores[MAX_ROWS * PANEL], dweights[MAX_ROWS * PANEL], ones[MAX_ROWS], factor[MAX_ROWS];
  std::fill(ones, ones + MAX_ROWS, 1.0f);
  std::fill(factor, factor + MAX_ROWS, g.scale);
  for (const Tile& tile : memory.layout.tiles) {
    long first = tile.first / PANEL * PANEL;  // of the queries, those before it see none of these keys
    for (long i = first; i < padded_inner(g.length); i += LANES) {
      if (i % PANEL == 0) {
        tile_product(queries_by_token + i * g.q.depth(), tile_at(keys, tile, g.k.width), tile.rows,
                     g.k.width, scores);
        tile_product(douts_by_token + i * g.dout.depth(), tile_at(values, tile, g.v.width),
                     tile.rows, g.v.width, dweights);
      }
      for (int r = 0; r < tile.rows; r++) {
        long at = r * PANEL + i % PANEL, to = (i - first) * tile.rows + r * LANES;
        differentiate(scores + at, g.scale, load(g.logs + i), dweights + at, load(g.deltas + i), weights + to,
                      dscores + to);
        fill_lanes(weights + to, 0, tile.first + r - i, 0.0f);
        fill_lanes(dscores + to, 0, tile.first + r - i, 0.0f);
      }
    }
    sum_tokens(douts_by_number, g.v.width, g.length, first, g.length - first, weights, tile.rows, ones,
               [&](int r) { return dv + (tile.first + r) * v_stride; });
    sum_tokens(queries_by_number, g.k.width, g.length, first, g.length - first, dscores, tile.rows, factor,
               [&](int r) { return dk + (tile.first + r) * k_stride; });
  }
}

}  // namespace

extern "C" {

// Gradients of q, k and v, each [tokens][heads][its width], for those of `out`, which lie as `out` does.
void shoal_causal_gradients(const float* dout, const float* q, long q_token, long q_head, const float* k, long k_token,
                            long k_head, const float* v, long v_token, long v_head, const float* out,
                            const float* logs, const long* ends, long count, long heads, long width, long values,
                            float scale, float* dq, float* dk, float* dv) {
  Samples samples{ends, count, heads, ends[count - 1]};
  Heads of_q{q, q_token, q_head, width}, of_k{k, k_token, k_head, width}, of_v{v, v_token, v_head, values};
  Heads of_out{out, heads * values, values, values}, of_dout{dout, heads * values, values, values};
  samples.each([&](long start, long length, long head) {
    Work& memory = work();
    cut(memory.layout, length);
    long filled = panels_of(length) * PANEL;
    float *own_logs = memory.logs.take(filled), *deltas = memory.deltas.take(filled);
    const float* from = logs + head * samples.tokens + start;
    std::copy(from, from + length, own_logs);
    std::fill(own_logs + length, own_logs + filled, -NEVER);  // no weight
    std::fill(deltas + length, deltas + filled, 0.0f);
    Rows outs = of_out.rows(start, head), douts = of_dout.rows(start, head);
    for (long t = 0; t < length; t++) {
      V products = zero();
      long c = 0;
      for (; c + LANES <= values; c += LANES) products = fma(load(outs(t) + c), load(douts(t) + c), products);
      int lanes = static_cast<int>(values - c);
      if (lanes) products = fma(load_part(outs(t) + c, lanes), load_part(douts(t) + c, lanes), products);
      deltas[t] = sum(products);
    }
    Given given{of_q.rows(start, head), of_k.rows(start, head), of_v.rows(start, head), douts, own_logs, deltas, length,
                scale};
    long at = start * heads + head;
    differentiate_queries(given, dq + at * width, heads * width);
    differentiate_keys(given, dk + at * width, heads * width, dv + at * values, heads * values);
  });
}

}  // extern "C"
