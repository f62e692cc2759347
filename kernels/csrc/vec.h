// Sixteen floats as one value, on three instruction sets. Every operation works lane by lane in one fixed way, so a
// lane's bits never depend on its neighbours.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace shoal {

constexpr int LANES = 16;

struct Bf16 { uint16_t bits; };  // the upper half of a float's bits, so that it widens exactly

#if defined(__AVX512F__)

constexpr int PASS_VECTORS = 2;  // vectors of outputs in one pass of the product: with MAX_ROWS they fill the registers
constexpr int MAX_ROWS = 12;
constexpr int FEW_ROWS = 12;  // up to so many, a panel is read in one pass
constexpr int LOOKING_AHEAD = 9;  // from so many on, multiplying leaves time to ask for the weights to come
struct V { __m512 a; };
static inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline V load(const Bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v.a); }
static inline V set1(float x) { return {_mm512_set1_ps(x)}; }
static inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.a, b.a, c.a)}; }
static inline V operator+(V a, V b) { return {_mm512_add_ps(a.a, b.a)}; }
static inline V operator-(V a, V b) { return {_mm512_sub_ps(a.a, b.a)}; }
static inline V operator*(V a, V b) { return {_mm512_mul_ps(a.a, b.a)}; }
static inline V operator/(V a, V b) { return {_mm512_div_ps(a.a, b.a)}; }
static inline V vmax(V a, V b) { return {_mm512_max_ps(a.a, b.a)}; }
static inline V vmin(V a, V b) { return {_mm512_min_ps(a.a, b.a)}; }
static inline V round_nearest(V a) { return {_mm512_roundscale_ps(a.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline V times_power_of_two(V a, V n) {
  __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.a), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.a, _mm512_castsi512_ps(bits))};
}

#elif defined(__AVX2__)

constexpr int PASS_VECTORS = 1;
constexpr int MAX_ROWS = 6;
constexpr int FEW_ROWS = 3;
constexpr int LOOKING_AHEAD = 4;
struct V { __m256 a, b; };
static inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline __m256 widen(const Bf16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline V load(const Bf16* p) { return {widen(p), widen(p + 8)}; }
static inline void store(float* p, V v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
static inline V set1(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
static inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
static inline V operator+(V a, V b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
static inline V operator-(V a, V b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
static inline V operator*(V a, V b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
static inline V operator/(V a, V b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
static inline V vmax(V a, V b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
static inline V vmin(V a, V b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
static inline V round_nearest(V v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, mode), _mm256_round_ps(v.b, mode)};
}
static inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V times_power_of_two(V v, V n) {
  return {_mm256_mul_ps(v.a, power_of_two(n.a)), _mm256_mul_ps(v.b, power_of_two(n.b))};
}

#else

constexpr int PASS_VECTORS = 1;
constexpr int MAX_ROWS = 2;
constexpr int FEW_ROWS = 0;
constexpr int LOOKING_AHEAD = MAX_ROWS + 1;
struct V { float a[LANES]; };
#define SHOAL_LANES(expression) V r; for (int i = 0; i < LANES; i++) r.a[i] = (expression); return r
static inline V load(const float* p) { V r; std::memcpy(r.a, p, sizeof r.a); return r; }
static inline V load(const Bf16* p) {
  uint32_t wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = static_cast<uint32_t>(p[i].bits) << 16;
  V r;
  std::memcpy(r.a, wide, sizeof r.a);
  return r;
}
static inline void store(float* p, V v) { std::memcpy(p, v.a, sizeof v.a); }
static inline V set1(float x) { SHOAL_LANES(x); }
static inline V fma(V a, V b, V c) { SHOAL_LANES(a.a[i] * b.a[i] + c.a[i]); }
static inline V operator+(V a, V b) { SHOAL_LANES(a.a[i] + b.a[i]); }
static inline V operator-(V a, V b) { SHOAL_LANES(a.a[i] - b.a[i]); }
static inline V operator*(V a, V b) { SHOAL_LANES(a.a[i] * b.a[i]); }
static inline V operator/(V a, V b) { SHOAL_LANES(a.a[i] / b.a[i]); }
static inline V vmax(V a, V b) { SHOAL_LANES(a.a[i] > b.a[i] ? a.a[i] : b.a[i]); }
static inline V vmin(V a, V b) { SHOAL_LANES(a.a[i] < b.a[i] ? a.a[i] : b.a[i]); }
static inline V round_nearest(V v) { SHOAL_LANES(std::nearbyintf(v.a[i])); }
static inline float times_power(float x, float n) {
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x * power;
}
static inline V times_power_of_two(V v, V n) { SHOAL_LANES(times_power(v.a[i], n.a[i])); }
#undef SHOAL_LANES

#endif

static inline V zero() { return set1(0.0f); }

// e^x for x <= 88, within 2 units in the last place; below -87 it is 0. Cephes' polynomial after reduction by ln 2.
static inline V exp(V x) {
  V clamped = vmin(set1(88.0f), vmax(set1(-87.0f), x));  // the second where one is no number
  V n = round_nearest(vmax(clamped, set1(-87.0f)) * set1(1.44269504088896341f));
  V r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  V value = times_power_of_two(p, n);
#if defined(__AVX512F__)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.a, _mm512_set1_ps(-87.0f), _CMP_LT_OQ), value.a, _mm512_setzero_ps())};
#elif defined(__AVX2__)
  __m256 least = _mm256_set1_ps(-87.0f);
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, least, _CMP_LT_OQ), value.a),
          _mm256_andnot_ps(_mm256_cmp_ps(x.b, least, _CMP_LT_OQ), value.b)};
#else
  for (int i = 0; i < LANES; i++) if (x.a[i] < -87.0f) value.a[i] = 0.0f;
  return value;
#endif
}

// Sum of the lanes, always as the same tree of additions.
static inline float sum(V v) {
  float lane[LANES];
  store(lane, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

// The first `count` lanes of p; the others are 0.
static inline V load_part(const float* p, int count) {
  float lane[LANES] = {};
  std::memcpy(lane, p, sizeof(float) * count);
  return load(lane);
}

static inline void store_part(float* p, V v, int count) {
  float lane[LANES];
  store(lane, v);
  std::memcpy(p, lane, sizeof(float) * count);
}

static inline V load_some(const float* p, int lanes) { return lanes == LANES ? load(p) : load_part(p, lanes); }

static inline void store_some(float* p, V v, int lanes) {
  if (lanes == LANES) store(p, v);
  else store_part(p, v, lanes);
}

}  // namespace shoal
