// How a thread rounds, and whether it keeps subnormal numbers.
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace shoal {

#if defined(__x86_64__)

using FloatMode = unsigned;
inline FloatMode float_mode() { return _mm_getcsr(); }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }

#else

using FloatMode = std::fenv_t;
inline FloatMode float_mode() {
  FloatMode mode;
  std::fegetenv(&mode);
  return mode;
}
inline void set_float_mode(const FloatMode& mode) { std::fesetenv(&mode); }

#endif

}  // namespace shoal
