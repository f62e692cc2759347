// silu(gate) · up of rows, which a network has between its products, and the gradients of it.
#include <algorithm>

#include "pool.h"
#include "vec.h"

using namespace shoal;

namespace {

void gate_row(const float* gate, const float* up, long width, float* out) {
  for (long k = 0; k < width; k += LANES) {
    int lanes = static_cast<int>(std::min<long>(LANES, width - k));
    V g = load_some(gate + k, lanes);
    store_some(out + k, g / (set1(1.0f) + exp(zero() - g)) * load_some(up + k, lanes), lanes);
  }
}

// With h = silu(g) u and s the sigmoid of g: du = w dh silu(g), dg = w dh u s (1 + g (1 - s)). Given `h`, w h is
// written there; the sum of dh h is returned.
float differentiate_row(const float* gate, const float* up, const float* dh, float weight, long width, float* dgate,
                        float* dup, float* h) {
  V one = set1(1.0f), w = set1(weight), total = zero();
  for (long k = 0; k < width; k += LANES) {
    int lanes = static_cast<int>(std::min<long>(LANES, width - k));
    V g = load_some(gate + k, lanes), u = load_some(up + k, lanes), d = load_some(dh + k, lanes);
    V s = one / (one + exp(zero() - g)), silu = g * s, made = silu * u;
    total = fma(d, made, total);
    d = d * w;
    store_some(dup + k, d * silu, lanes);
    store_some(dgate + k, d * u * (s * fma(g, one - s, one)), lanes);
    if (h) store_some(h + k, made * w, lanes);
  }
  return sum(total);
}

}  // namespace

extern "C" {

// out[rows][width] = silu(gate) · up, whose rows are `stride` apart.
void shoal_gated(const float* gate, const float* up, long stride, long rows, long width, float* out) {
  each_row(rows, width, [&](long r) { gate_row(gate + r * stride, up + r * stride, width, out + r * width); });
}

// Gradients of gate and up, side by side in dgate_up[rows][2 width], for dh[rows][width], each row times its weight
// (null: 1). What else is wanted may be null: h[rows][width], weighted too, and of each weight the gradient.
void shoal_gated_gradients(const float* gate, const float* up, long stride, const float* dh, const float* weight,
                           long rows, long width, float* dgate_up, float* h, float* dweight) {
  each_row(rows, width, [&](long r) {
    float* dgate = dgate_up + 2 * r * width;
    float found = differentiate_row(gate + r * stride, up + r * stride, dh + r * width, weight ? weight[r] : 1.0f,
                                    width, dgate, dgate + width, h ? h + r * width : nullptr);
    if (dweight) dweight[r] = found;
  });
}

}  // extern "C"
