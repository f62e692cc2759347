// Two processes that map each other's memory: slots for frames, a line a slot that says what came, and a bell.
// experts/lane.py makes what is here from Python's side.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

#include "pause.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace shoal {

constexpr long MOST_SLOTS = 16;

// What stands in a slot: whoever writes the slot writes its line last.
struct Line {
  std::atomic<uint64_t> correlation, length;
  char rest[48];
};
static_assert(sizeof(Line) == 64);

// The page of a bell, as experts/bell.py has it: rings so far, whether Python sleeps there, on which core, native sleepers.
struct Bell {
  std::atomic<uint32_t> rings, asleep, core, sleepers;
};

struct Lane {
  char *out_lines, *out, *in_lines, *in;  // the peer's arena, then ours
  long out_slot_bytes, in_slot_bytes, slots;
  Bell* bell;               // the peer's
  std::atomic<long> over;   // nothing will come any more
  uint64_t seen[MOST_SLOTS];  // correlations that were told

  Line& out_line(long slot) const { return reinterpret_cast<Line*>(out_lines)[slot]; }
  Line& in_line(long slot) const { return reinterpret_cast<Line*>(in_lines)[slot]; }
  char* out_slot(long slot) const { return out + slot * out_slot_bytes; }
  char* in_slot(long slot) const { return in + slot * in_slot_bytes; }

  void announce(long slot, uint64_t length, uint64_t correlation) const {
    out_line(slot).length.store(length, std::memory_order_relaxed);
    out_line(slot).correlation.store(correlation, std::memory_order_release);
  }
};

inline uint32_t this_core() {
#if defined(__linux__)
  return static_cast<uint32_t>(sched_getcpu());
#else
  return 0;
#endif
}

// Whoever sleeps looks once more after it said so, and whoever rings has announced before it asks.
inline void ring(Bell* bell, bool always = false) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!always && !bell->asleep.load() && !bell->sleepers.load()) return;
  bell->rings.fetch_add(1);
#if defined(__linux__)
  syscall(SYS_futex, &bell->rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

inline void sleep_on(Bell* bell, uint32_t rings, long nanoseconds) {
#if defined(__linux__)
  timespec limit{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, &bell->rings, FUTEX_WAIT, rings, &limit, nullptr, 0);
#endif
}

inline long now_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Until `found`: looking for `look_ns`, then asleep by the bell, for `timeout_ns` in all. Whether it was found.
template <class Found>
bool wait_at(Bell* bell, long look_ns, long timeout_ns, bool& slept, const Found& found) {
  constexpr long NAP_NS = 100'000'000;  // a ring ends it, and no peer that spoils a bell can make it longer
  slept = false;
  if (found()) return true;
  long began = now_ns(), look_until = began + std::min(look_ns, timeout_ns), until = began + timeout_ns;
  while (now_ns() < look_until) {
    for (int i = 0; i < 32; i++) pause_briefly();
    if (found()) return true;
  }
  slept = true;
  bell->sleepers.fetch_add(1);
  bell->core.store(this_core());
  bool there;
  while (true) {
    uint32_t rings = bell->rings.load();
    std::atomic_thread_fence(std::memory_order_seq_cst);
    there = found();
    long left = until - now_ns();
    if (there || left <= 0) break;
    sleep_on(bell, rings, std::min(left, NAP_NS));
  }
  bell->sleepers.fetch_sub(1);
  return there;
}

}  // namespace shoal
