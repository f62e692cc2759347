// What happens to one row at a time: norms, rotary embedding, the gate, and the weighted sum of experts' answers.
#include <algorithm>
#include <cmath>
#include <vector>

#include "calls.h"
#include "pool.h"
#include "rows.h"

using namespace shoal;

namespace {

constexpr long NORM_BLOCK = 64;  // rows of which one thread sums the gradient of a norm's weight

void norm_row(const float* x, const float* weight, long width, float eps, float* out) {
  V squares = zero();
  long k = 0;
  for (; k + LANES <= width; k += LANES) { V v = load(x + k); squares = fma(v, v, squares); }
  if (k < width) { V v = load_part(x + k, static_cast<int>(width - k)); squares = fma(v, v, squares); }
  V scale = set1(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
  for (k = 0; k + LANES <= width; k += LANES) store(out + k, load(x + k) * scale * load(weight + k));
  if (k < width) {
    int lanes = static_cast<int>(width - k);
    store_part(out + k, load_part(x + k, lanes) * scale * load_part(weight + k, lanes), lanes);
  }
}

// dx = s (g - x s^2 mean(g x)) with s = 1 / sqrt(mean(x^2) + eps) and g = dout weight; dweight gains dout x s.
void differentiate_norm_row(const float* dout, const float* x, const float* weight, long width, float eps, float* dx,
                            float* dweight) {
  V squares = zero(), products = zero();
  for (long k = 0; k < width; k += LANES) {
    int lanes = static_cast<int>(std::min<long>(LANES, width - k));
    V v = load_some(x + k, lanes);
    squares = fma(v, v, squares);
    products = fma(load_some(dout + k, lanes) * load_some(weight + k, lanes), v, products);
  }
  float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
  V s = set1(scale), shift = set1(scale * scale * (sum(products) / static_cast<float>(width)));
  for (long k = 0; k < width; k += LANES) {
    int lanes = static_cast<int>(std::min<long>(LANES, width - k));
    V v = load_some(x + k, lanes), d = load_some(dout + k, lanes);
    store_some(dx + k, s * (d * load_some(weight + k, lanes) - v * shift), lanes);
    store_some(dweight + k, fma(d, v * s, load_some(dweight + k, lanes)), lanes);
  }
}

// Interleaved pairs times cos + i sin, as complex numbers.
void rotate_row(const float* x, const float* cos, const float* sin, long pairs, float* out) {
  for (long i = 0; i < pairs; i++) {
    float even = x[2 * i], odd = x[2 * i + 1];
    out[2 * i] = even * cos[i] - odd * sin[i];
    out[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

}  // namespace

extern "C" {

void shoal_rms_norm(const float* x, long x_stride, const float* weight, long rows, long width, float eps, float* out,
                    long out_stride) {
  each_row(rows, width, [&](long r) { norm_row(x + r * x_stride, weight, width, eps, out + r * out_stride); });
}

// Gradients of x [rows][width] and of the weight for that of what shoal_rms_norm gives. Rows are dense. The weight's is
// summed over blocks of rows, and over these in turn, whatever threads there are.
void shoal_rms_norm_gradients(const float* dout, const float* x, const float* weight, long rows, long width, float eps,
                              float* dx, float* dweight) {
  static thread_local Scratch of_caller;
  long blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
  float* parts = of_caller.take(blocks * width);
  std::fill(parts, parts + blocks * width, 0.0f);
  pool().run(blocks, [&](long block) {
    for (long r = block * NORM_BLOCK; r < std::min(rows, (block + 1) * NORM_BLOCK); r++)
      differentiate_norm_row(dout + r * width, x + r * width, weight, width, eps, dx + r * width,
                             parts + block * width);
  });
  std::fill(dweight, dweight + width, 0.0f);
  for (long block = 0; block < blocks; block++)
    for (long k = 0; k < width; k++) dweight[k] += parts[block * width + k];
}

// Rotates the last `rotary` numbers of each of `heads` queries into the last numbers of out's heads.
void shoal_rotate_heads(const float* q, long q_head, long rows, long heads, long rotary, const float* cos,
                        const float* sin, float* out, long out_head) {
  each_row(rows, heads * rotary, [&](long t) {
    for (long h = 0; h < heads; h++) {
      long at = t * heads + h;
      rotate_row(q + (at + 1) * q_head - rotary, cos + t * (rotary / 2), sin + t * (rotary / 2), rotary / 2,
                 out + (at + 1) * out_head - rotary);
    }
  });
}

// The latent (normalised) and the rotated shared key of each token, to its slot of the cache.
void shoal_write_latents(const float* kv, long kv_stride, const float* weight, const float* cos, const float* sin,
                         const long* slot, long rows, long latent, long rotary, float eps, float* cache) {
  each_row(rows, latent + rotary, [&](long t) {
    float* to = cache + slot[t] * (latent + rotary);
    norm_row(kv + t * kv_stride, weight, latent, eps, to);
    rotate_row(kv + t * kv_stride + latent, cos + t * (rotary / 2), sin + t * (rotary / 2), rotary / 2, to + latent);
  });
}

// The gate: softmax over all experts, the `kept` groups with the largest single affinity, the `top` best experts of
// these in falling order, ties to the lower index. Weights are normalised, or scaled.
void shoal_route(const float* logits, long rows, long experts, long groups, long kept, long top, int normalise,
                 float scale, long* chosen, float* weights) {
  each_row(rows, 8 * experts, [&](long t) {
    static thread_local std::vector<float> score;
    static thread_local std::vector<int> order;
    score.resize(padded_inner(experts));
    const float* row = logits + t * experts;
    std::fill(score.begin(), score.end(), -INFINITY);
    std::copy(row, row + experts, score.begin());
    V best = set1(*std::max_element(row, row + experts)), total = zero();
    for (long e = 0; e < experts; e += LANES) {
      V value = exp(load(&score[e]) - best);
      total = total + value;
      store(&score[e], value);
    }
    V share = set1(sum(total));
    for (long e = 0; e < experts; e += LANES) store(&score[e], load(&score[e]) / share);
    auto better = [&](int a, int b) { return score[a] > score[b] || (score[a] == score[b] && a < b); };
    if (kept < groups) {
      long size = experts / groups;
      std::vector<int>& names = order;
      std::vector<float> most(groups);
      names.resize(groups);
      for (long g = 0; g < groups; g++) {
        names[g] = static_cast<int>(g);
        most[g] = *std::max_element(&score[g * size], &score[g * size] + size);
      }
      std::sort(names.begin(), names.end(),
                [&](int a, int b) { return most[a] > most[b] || (most[a] == most[b] && a < b); });
      for (long g = kept; g < groups; g++) std::fill_n(&score[names[g] * size], size, 0.0f);
    }
    order.resize(experts);
    for (long e = 0; e < experts; e++) order[e] = static_cast<int>(e);
    std::partial_sort(order.begin(), order.begin() + top, order.end(), better);
    float sum_of_chosen = 1e-20f;
    for (long k = 0; k < top; k++) {
      chosen[t * top + k] = order[k];
      sum_of_chosen += score[order[k]];
    }
    for (long k = 0; k < top; k++)
      weights[t * top + k] = normalise ? score[order[k]] / sum_of_chosen : score[order[k]] * scale;
  });
}

// out[t] = residual[t] (+ other[t]) + Σ over slots, in their order, of weights[t][k] · the slot's answer. Answers come in
// parts: part i has counts[i] slots, slots[i] (null: 0, 1, 2 …), and their answers one after another at y[i].
void shoal_combine(const long* const* slots, const float* const* y, const long* counts, long parts,
                   const float* weights, long rows, long top, long width, const float* residual, const float* other,
                   float* out) {
  static thread_local std::vector<const float*> of_caller;
  std::vector<const float*>& answer = of_caller;
  answer.resize(rows * top);
  for (long i = 0; i < parts; i++)
    for (long p = 0; p < counts[i]; p++) answer[slots[i] ? slots[i][p] : p] = y[i] + p * width;
  each_row(rows, top * width, [&](long t) {
    const float* const* slots = answer.data() + t * top;
    for (long c = 0; c < width; c += LANES) {
      int lanes = static_cast<int>(std::min<long>(LANES, width - c));
      auto at = [&](const float* p) { return lanes == LANES ? load(p + c) : load_part(p + c, lanes); };
      V total = set1(weights[t * top]) * at(slots[0]);
      for (long k = 1; k < top; k++) total = fma(set1(weights[t * top + k]), at(slots[k]), total);
      if (other) total = total + at(other + t * width);
      if (residual) total = at(residual + t * width) + total;
      if (lanes == LANES) store(out + t * width + c, total);
      else store_part(out + t * width + c, total, lanes);
    }
  });
}

// Splits `count` slots, in rising order, by the owner of each one's group: owner[group[slot]]. For each owner, in turn:
// the rows (slot / top) that it gets, each once, and for each of its slots the slot itself, the group, and the row's
// place among the owner's rows. first_slot and first_row have owners + 1 entries. Returns 0, or 1 + a group that has
// no owner (below 0).
long shoal_split_slots(const long* group_of_slot, const long* slots, long count, long top, const int* owner,
                       long owners, long* rows, long* kept_slots, int* slot_row, int* slot_group, long* first_row,
                       long* first_slot) {
  static thread_local std::vector<long> next_slot, last_row, rows_of;
  std::fill(first_slot, first_slot + owners + 1, 0);
  rows_of.assign(owners, 0);
  last_row.assign(owners, -1);
  for (long i = 0; i < count; i++) {
    long slot = slots ? slots[i] : i, group = group_of_slot[slot], row = slot / top;
    int who = owner[group];
    if (who < 0) return 1 + group;
    first_slot[who + 1]++;
    if (last_row[who] != row) rows_of[who]++, last_row[who] = row;
  }
  first_row[0] = 0;
  for (long o = 0; o < owners; o++) first_slot[o + 1] += first_slot[o], first_row[o + 1] = first_row[o] + rows_of[o];
  next_slot.assign(first_slot, first_slot + owners);
  rows_of.assign(owners, 0);
  last_row.assign(owners, -1);
  for (long i = 0; i < count; i++) {
    long slot = slots ? slots[i] : i, group = group_of_slot[slot], row = slot / top;
    int who = owner[group];
    if (last_row[who] != row) rows[first_row[who] + rows_of[who]++] = row, last_row[who] = row;
    long at = next_slot[who]++;
    kept_slots[at] = slot;
    slot_row[at] = static_cast<int>(rows_of[who] - 1);
    slot_group[at] = static_cast<int>(group);
  }
  return 0;
}

}  // extern "C"
