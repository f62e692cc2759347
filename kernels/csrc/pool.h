// A fixed team of threads that shares out numbered tasks. Idle threads sleep: on a node whose cores several processes
// share, one that spins slows the others.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "float_mode.h"

namespace shoal {

class Pool {
 public:
  ~Pool() { resize(1, 0); }

  // `threads` in all, the caller's included. An idle one looks for work for `spin_ns` before it sleeps.
  void resize(int threads, long spin_ns);
  int threads() const { return threads_; }

  // Runs task(i) for every i below `count`, on any thread, in rising order of start. The caller takes part and never
  // waits for a thread that has not begun. Only one thread at a time has the team; others wait their turn.
  template <class Task>
  void run(long count, const Task& task) {
    if (count <= 0) return;
    if (count == 1 || threads_ == 1) {
      for (long i = 0; i < count; i++) task(i);
      return;
    }
    run_shared(count, [](const void* context, long i) { (*static_cast<const Task*>(context))(i); }, &task);
  }

 private:
  using Function = void (*)(const void*, long);
  void run_shared(long count, Function function, const void* context);
  void work();
  void take_tasks();

  std::mutex turn_;
  std::vector<std::thread> workers_;  // of whoever has the turn; others know how many by threads_
  std::atomic<int> threads_{1};
  std::atomic<long> spin_ns_{0};

  alignas(64) std::atomic<unsigned> round_{0};  // counts jobs; what sleepers wait on
  std::atomic<int> sleepers_{0};
  std::atomic<bool> ending_{false};
  alignas(64) std::atomic<bool> open_{false};   // a job may be joined
  alignas(64) std::atomic<int> joined_{0};      // threads inside the job, the caller not counted
  alignas(64) std::atomic<long> next_{0};
  long count_ = 0;
  Function function_ = nullptr;
  const void* context_ = nullptr;
  FloatMode mode_{};  // the caller's, so that it does not matter who does which task
};

Pool& pool();

constexpr long ROWS_ALONE = 1 << 14;  // numbers below which the caller does the rows itself

// Runs row(i) for every i below `rows`, each of which has so many `numbers` to go through.
template <class Row>
void each_row(long rows, long numbers, const Row& row) {
  if (rows * numbers <= ROWS_ALONE) {
    for (long r = 0; r < rows; r++) row(r);
  } else {
    pool().run(rows, row);
  }
}

}  // namespace shoal
