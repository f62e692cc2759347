// What a thread does between two looks at what another is about to change.
#pragma once
#include <thread>

namespace shoal {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace shoal
