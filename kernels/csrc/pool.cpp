#include "pool.h"

#include <pthread.h>

#include <chrono>

#include "pause.h"

namespace shoal {

namespace {

using Clock = std::chrono::steady_clock;

// Never destroyed: at exit its threads may be asleep in a process that is going anyway.
Pool* team = nullptr;

// A forked process has none of the threads, and whoever had the turn may be one of them: it begins with a new team.
void found_team() { team = new Pool; }

}  // namespace

void Pool::resize(int threads, long spin_ns) {
  std::lock_guard<std::mutex> turn(turn_);
  spin_ns_ = spin_ns;
  if (threads == this->threads()) return;
  ending_ = true;
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  ending_ = false;
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
  threads_ = threads;
}

void Pool::run_shared(long count, Function function, const void* context) {
  std::lock_guard<std::mutex> turn(turn_);
  count_ = count;
  function_ = function;
  context_ = context;
  mode_ = float_mode();
  next_ = 0;
  open_ = true;
  round_.fetch_add(1);
  if (sleepers_ > 0) round_.notify_all();
  take_tasks();
  open_ = false;
  // Whoever joined is within its last task; it may be off its core, so give way after a while.
  for (int looks = 0; joined_ > 0; looks++) {
    if (looks < 4096) pause_briefly();
    else std::this_thread::yield();
  }
}

void Pool::take_tasks() {
  for (long i; (i = next_.fetch_add(1)) < count_;) function_(context_, i);
}

void Pool::work() {
  unsigned seen = round_;
  while (!ending_) {
    joined_.fetch_add(1);
    if (open_) {
      set_float_mode(mode_);
      take_tasks();
    }
    joined_.fetch_sub(1);
    for (Clock::time_point until = Clock::now() + std::chrono::nanoseconds(spin_ns_); round_ == seen;) {
      for (int i = 0; i < 16 && round_ == seen; i++) pause_briefly();
      if (Clock::now() >= until) break;
    }
    if (round_ == seen) {
      sleepers_.fetch_add(1);
      round_.wait(seen);
      sleepers_.fetch_sub(1);
    }
    seen = round_;
  }
}

Pool& pool() {
  static const int founded = (found_team(), pthread_atfork(nullptr, nullptr, found_team));
  static_cast<void>(founded);
  return *team;
}

}  // namespace shoal
