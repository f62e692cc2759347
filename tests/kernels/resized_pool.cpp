// Shares out sums while the team is resized: run under ThreadSanitizer, it ends well if nothing races.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "pool.h"

extern "C" void shoal_set_threads(int threads, long spin_ns);

int main() {
  constexpr long TASKS = 64;
  std::atomic<bool> over{false}, wrong{false};
  std::vector<std::thread> users;
  for (int user = 0; user < 2; user++) {
    users.emplace_back([&] {
      while (!over) {
        std::vector<long> done(TASKS);
        shoal::pool().run(TASKS, [&](long task) { done[task] += task + 1; });
        for (long task = 0; task < TASKS; task++)
          if (done[task] != task + 1) wrong = true;
      }
    });
  }
  for (int i = 0; i < 100; i++) {
    shoal_set_threads(1 + i % 4, i % 2 ? 0 : 20000);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  over = true;
  for (std::thread& user : users) user.join();
  return wrong;
}
