// Rows of a product's left side, in tiles of up to MAX_ROWS: for each 16 columns, the rows' 16 numbers one after
// another. A tile is read from front to back by the product, and written a cache line at a time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace shoal {

constexpr int PANEL = 32;           // outputs whose weights lie side by side: [panel][inner][PANEL]
constexpr long CHUNK_FLOATS = 1 << 16;  // of tiles that stay in the second cache while panels pass by: 256 KiB

static inline long padded_inner(long inner) { return (inner + LANES - 1) / LANES * LANES; }
static inline long panels_of(long outputs) { return (outputs + PANEL - 1) / PANEL; }

struct Tile {
  int group;   // whose weights it meets
  int rows;    // 1 to MAX_ROWS
  long first;  // its first row, in the order of all groups' rows
};

struct Chunk {
  int group;
  int first_tile, tiles;
};

// How `groups` runs of rows are cut into tiles, nearly equal within a group, and tiles into chunks.
struct Layout {
  std::vector<Tile> tiles;
  std::vector<Chunk> chunks;

  void clear() { tiles.clear(); chunks.clear(); }

  void add(int group, long first, long rows, long inner) {
    long count = (rows + MAX_ROWS - 1) / MAX_ROWS;
    long a_chunk = std::max<long>(1, CHUNK_FLOATS / (padded_inner(inner) * MAX_ROWS));
    for (long t = 0; t < count; t++) {
      long begin = rows * t / count, end = rows * (t + 1) / count;
      if (t % a_chunk == 0) chunks.push_back({group, static_cast<int>(tiles.size()), 0});
      chunks.back().tiles++;
      tiles.push_back({group, static_cast<int>(end - begin), first + begin});
    }
  }
};

// Where a tile begins in the packed rows of a layout.
template <class Packed>
static inline Packed* tile_at(Packed* packed, const Tile& tile, long inner) {
  return packed + tile.first * padded_inner(inner);
}

// Packs one tile; row(i) is where the tile's row i lies, `inner` floats.
template <class Row>
static inline void pack_tile(float* packed, const Tile& tile, long inner, const Row& row) {
  for (int r = 0; r < tile.rows; r++) {
    const float* from = row(tile.first + r);
    float* to = packed + r * LANES;
    long k = 0;
    for (; k + LANES <= inner; k += LANES, to += tile.rows * LANES) store(to, load(from + k));
    if (k < inner) store(to, load_part(from + k, static_cast<int>(inner - k)));
  }
}

// One thread's memory for packed rows, kept between calls.
class Scratch {
 public:
  float* take(long floats) {
    if (static_cast<long>(memory_.size()) < floats + LANES) memory_.resize(floats + LANES);
    auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + ((64 - address % 64) % 64) / sizeof(float);
  }

 private:
  std::vector<float> memory_;
};

}  // namespace shoal
