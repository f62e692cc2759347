// Absorbed latent attention over a paged cache: multi-query attention whose keys are the cache's rows and whose values
// are the rows' first `latent` numbers.
//
// Query rows (token, head) lie in the lanes: a tile is 16 of them, of one sequence. Keys are taken in segments of
// SEGMENT positions counted from the sequence's beginning; within one, scores, softmax and sum run in rising order, and
// segments are merged in order. So a query's bits depend on its position and its past alone, whether the segments of a
// tile were computed one after another by one thread or at once by several.
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"
#include "rows.h"

using namespace shoal;

namespace {

constexpr int SEGMENT = 128;
constexpr int KEYS = 8;  // keys scored in one pass

struct Problem {
  const float* q;      // [T][heads][width]
  const float* cache;  // [blocks][block_size][width]
  const int* tables;   // [sequences][table_stride]
  long heads, width, latent, block_size, table_stride;
  float scale;
};

struct QueryTile {
  int sequence;
  long first_row;  // of token * heads + head
  int rows;        // 1 to LANES, of tokens at adjoining positions
  long keys;       // of the tile's last query: 1 + its position
  long first_partial;
};

struct Segment {
  int tile;
  long index;
};

struct Partial {  // of one tile and segment
  float* best;    // [LANES]
  float* total;   // [LANES]
  float* sum;     // [LANES][latent]
};

inline const float* key_at(const Problem& p, int sequence, long position) {
  long block = p.tables[sequence * p.table_stride + position / p.block_size];
  return p.cache + (block * p.block_size + position % p.block_size) * p.width;
}

// The tile's queries with rows in the lanes, [width][LANES]; lanes without a row are 0.
void transpose_queries(const Problem& p, const QueryTile& tile, float* q_WL) {
  const float* from = p.q + tile.first_row * p.width;
  if (tile.rows < LANES) std::fill(q_WL, q_WL + p.width * LANES, 0.0f);
  constexpr long STRIP = 64;
  for (long w0 = 0; w0 < p.width; w0 += STRIP)
    for (int r = 0; r < tile.rows; r++)
      for (long w = w0; w < std::min(p.width, w0 + STRIP); w++) q_WL[w * LANES + r] = from[r * p.width + w];
}

template <int COUNT>
inline void score_keys(const float* const* keys, const float* q_WL, long width, V scale, V* scores) {
  V sums[COUNT];
  for (int j = 0; j < COUNT; j++) sums[j] = zero();
#pragma GCC unroll 4
  for (long w = 0; w < width; w++) {
    V q = load(q_WL + w * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; j++) sums[j] = fma(q, set1(keys[j][w]), sums[j]);
  }
  for (int j = 0; j < COUNT; j++) scores[j] = sums[j] * scale;
}

constexpr int SUM_ROWS = PASS_VECTORS == 2 ? 8 : 4;

// sum[r][c .. c + 2 vectors) over the keys, for ROWS rows: each key's weight times its latent.
template <int ROWS>
inline void sum_latents(const float* const* keys, int count, const float* weights_JL, float* sum, long stride) {
  V sums[ROWS][PASS_VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < PASS_VECTORS; v++) sums[r][v] = zero();
  for (int j = 0; j < count; j++) {
    V latent[PASS_VECTORS];
    for (int v = 0; v < PASS_VECTORS; v++) latent[v] = load(keys[j] + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      V weight = set1(weights_JL[j * LANES + r]);
#pragma GCC unroll 2
      for (int v = 0; v < PASS_VECTORS; v++) sums[r][v] = fma(weight, latent[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < PASS_VECTORS; v++) store(sum + r * stride + v * LANES, sums[r][v]);
}

inline void sum_some_rows(int rows, const float* const* keys, int count, const float* weights, float* sum, long stride) {
  switch (rows) {
#define SHOAL_CASE(n) case n: if constexpr (n <= SUM_ROWS) sum_latents<n>(keys, count, weights, sum, stride); break
    SHOAL_CASE(1); SHOAL_CASE(2); SHOAL_CASE(3); SHOAL_CASE(4); SHOAL_CASE(5); SHOAL_CASE(6); SHOAL_CASE(7); SHOAL_CASE(8);
#undef SHOAL_CASE
  }
}

// The tail of a latent whose width is no multiple of the vectors, one number at a time in the same order of keys.
void sum_tail(int rows, const float* const* keys, int count, const float* weights, float* sum, long stride, long from,
              long to) {
  for (int r = 0; r < rows; r++)
    for (long c = from; c < to; c++) {
      V total = zero();  // the same operations as a lane of the vectors
      for (int j = 0; j < count; j++) total = fma(set1(weights[j * LANES + r]), set1(keys[j][c]), total);
      float lanes[LANES];
      store(lanes, total);
      sum[r * stride + c] = lanes[0];
    }
}

void attend_segment(const Problem& p, const QueryTile& tile, const float* q_WL, long segment, const Partial& out) {
  long begin = segment * SEGMENT;
  int count = static_cast<int>(std::min<long>(SEGMENT, tile.keys - begin));
  const float* keys[SEGMENT];
  for (int j = 0; j < count; j++) keys[j] = key_at(p, tile.sequence, begin + j);

  alignas(64) float weights_JL[SEGMENT * LANES];
  V scale = set1(p.scale), scores[KEYS];
  int j = 0;
  for (; j + KEYS <= count; j += KEYS) {
    score_keys<KEYS>(keys + j, q_WL, p.width, scale, scores);
    for (int i = 0; i < KEYS; i++) store(weights_JL + (j + i) * LANES, scores[i]);
  }
  for (; j < count; j++) {
    score_keys<1>(keys + j, q_WL, p.width, scale, scores);
    store(weights_JL + j * LANES, scores[0]);
  }
  // A query sees the keys up to its own position. Only the last keys of a tile are beyond some of its queries.
  constexpr float NEVER = -std::numeric_limits<float>::infinity();
  long last_token = (tile.first_row + tile.rows - 1) / p.heads;
  for (int r = 0; r < tile.rows; r++) {
    long visible = tile.keys - (last_token - (tile.first_row + r) / p.heads) - begin;
    for (long hidden = std::max<long>(0, visible); hidden < count; hidden++) weights_JL[hidden * LANES + r] = NEVER;
  }
  V best = set1(NEVER);
  for (int i = 0; i < count; i++) best = vmax(best, load(weights_JL + i * LANES));
  V from = vmax(best, set1(-std::numeric_limits<float>::max()));  // finite where nothing is visible
  V total = zero();
  for (int i = 0; i < count; i++) {
    V weight = exp(load(weights_JL + i * LANES) - from);
    total = total + weight;
    store(weights_JL + i * LANES, weight);
  }
  store(out.best, best);
  store(out.total, total);

  constexpr long PASS = PASS_VECTORS * LANES;
  long whole = p.latent / PASS * PASS;
  for (int r = 0; r < tile.rows; r += SUM_ROWS) {
    int rows = std::min(SUM_ROWS, tile.rows - r);
    const float* shifted[SEGMENT];
    std::copy(keys, keys + count, shifted);
    for (long c = 0; c < whole; c += PASS) {
      sum_some_rows(rows, shifted, count, weights_JL + r, out.sum + r * p.latent + c, p.latent);
      for (int i = 0; i < count; i++) shifted[i] += PASS;
    }
    sum_tail(rows, keys, count, weights_JL + r, out.sum + r * p.latent, p.latent, whole, p.latent);
  }
}

// running <- running merged with the next segment's partial; the first one replaces it.
void merge(const Problem& p, int rows, const Partial& running, const Partial& next) {
  alignas(64) float keep[LANES], add[LANES];
  V a = load(running.best), b = load(next.best), best = vmax(a, b);
  V kept = exp(a - best), added = exp(b - best);
  store(keep, kept);
  store(add, added);
  store(running.best, best);
  store(running.total, load(running.total) * kept + load(next.total) * added);
  for (int r = 0; r < rows; r++) {
    float* into = running.sum + r * p.latent;
    const float* from = next.sum + r * p.latent;
    V k = set1(keep[r]), d = set1(add[r]);
    long c = 0;
    for (; c + LANES <= p.latent; c += LANES) store(into + c, fma(load(into + c), k, load(from + c) * d));
    if (c < p.latent) {
      int lanes = static_cast<int>(p.latent - c);
      store_part(into + c, fma(load_part(into + c, lanes), k, load_part(from + c, lanes) * d), lanes);
    }
  }
}

void finish(const Problem& p, const QueryTile& tile, const Partial& whole, float* out) {
  alignas(64) float share[LANES];
  store(share, set1(1.0f) / load(whole.total));
  for (int r = 0; r < tile.rows; r++) {
    const float* from = whole.sum + r * p.latent;
    float* to = out + (tile.first_row + r) * p.latent;
    V s = set1(share[r]);
    long c = 0;
    for (; c + LANES <= p.latent; c += LANES) store(to + c, load(from + c) * s);
    if (c < p.latent) {
      int lanes = static_cast<int>(p.latent - c);
      store_part(to + c, load_part(from + c, lanes) * s, lanes);
    }
  }
}

long partial_floats(const Problem& p) { return LANES * (2 + p.latent); }

Partial partial_at(const Problem& p, float* memory, long index) {
  float* at = memory + index * partial_floats(p);
  return {at, at + LANES, at + 2 * LANES};
}

struct Work {
  std::vector<QueryTile> tiles;
  std::vector<Segment> segments;
  Scratch partials;
};

}  // namespace

extern "C" {

// out[t][head] = softmax(q · key · scale) · key[:latent] over positions 0..position[t] of token t's sequence.
// Tokens of one sequence follow one another in rising position.
void shoal_latent_attention(const float* q, const float* cache, const int* tables, long table_stride, long block_size,
                            const int* sequence, const int* position, long tokens, long heads, long width, long latent,
                            float scale, float* out) {
  static thread_local Work of_caller;
  Work& memory = of_caller;  // by reference, as the name means another one in another thread
  Problem p{q, cache, tables, heads, width, latent, block_size, table_stride, scale};
  memory.tiles.clear();
  memory.segments.clear();
  long partials = 0;
  for (long t = 0; t < tokens;) {
    long end = t + 1;
    while (end < tokens && sequence[end] == sequence[t] && position[end] == position[end - 1] + 1) end++;
    for (long row = t * heads; row < end * heads; row += LANES) {
      int rows = static_cast<int>(std::min<long>(LANES, end * heads - row));
      long keys = position[(row + rows - 1) / heads] + 1;
      memory.tiles.push_back({sequence[t], row, rows, keys, partials});
      partials += (keys + SEGMENT - 1) / SEGMENT;
    }
    t = end;
  }
  long tiles = static_cast<long>(memory.tiles.size());
  if (tiles >= 4 * pool().threads()) {  // enough to share out: a thread takes all segments of a tile
    pool().run(tiles, [&](long i) {
      static thread_local Scratch queries, sums;
      const QueryTile& tile = memory.tiles[i];
      float* q_WL = queries.take(width * LANES);
      transpose_queries(p, tile, q_WL);
      float* space = sums.take(2 * partial_floats(p));
      Partial whole = partial_at(p, space, 0), next = partial_at(p, space, 1);
      attend_segment(p, tile, q_WL, 0, whole);
      for (long s = 1; s * SEGMENT < tile.keys; s++) {
        attend_segment(p, tile, q_WL, s, next);
        merge(p, tile.rows, whole, next);
      }
      finish(p, tile, whole, out);
    });
    return;
  }
  for (long i = 0; i < tiles; i++)
    for (long s = 0; s * SEGMENT < memory.tiles[i].keys; s++) memory.segments.push_back({static_cast<int>(i), s});
  float* space = memory.partials.take(partials * partial_floats(p));
  pool().run(static_cast<long>(memory.segments.size()), [&](long i) {
    static thread_local Scratch queries;
    const Segment& segment = memory.segments[i];
    const QueryTile& tile = memory.tiles[segment.tile];
    float* q_WL = queries.take(width * LANES);
    transpose_queries(p, tile, q_WL);
    attend_segment(p, tile, q_WL, segment.index, partial_at(p, space, tile.first_partial + segment.index));
  });
  for (const QueryTile& tile : memory.tiles) {
    Partial whole = partial_at(p, space, tile.first_partial);
    for (long s = 1; s * SEGMENT < tile.keys; s++) merge(p, tile.rows, whole, partial_at(p, space, tile.first_partial + s));
    finish(p, tile, whole, out);
  }
}

}  // extern "C"
