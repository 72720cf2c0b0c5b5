// The threads that compute a step together.
//
// A step is a sequence of phases, each a number of tasks that threads take one by one, with a
// barrier behind it: a thread that the system puts aside holds up the one task it has. Who waits
// looks for some microseconds before it lets others run or goes to sleep, since phases are that
// short.
#pragma once

#include <sched.h>

#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "arithmetic.hpp"

namespace crdt_llm {

class Team {
 public:
  explicit Team(int most) {
    try {
      for (int index = 1; index < std::min(most, int(CALL) - 1); ++index) {
        helpers_.emplace_back([this, index] { help(index); });
      }
    } catch (const std::system_error&) {  // the system allows no more: those that there are will do
    }
  }

  ~Team() {
    ended_ = true;
    call_.fetch_add(CALL, std::memory_order_release);
    call_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int most() const { return int(helpers_.size()) + 1; }

  // Run `body(index)` on `threads` threads, this one among them, and wait for all of them.
  void run(int threads, const std::function<void(int)>& body) {
    threads_ = std::min(std::max(threads, 1), most());
    if (threads_ > 1) {
      body_ = &body;
      const uint32_t number = call_.load(std::memory_order_relaxed) / CALL + 1;
      call_.store(number * CALL + uint32_t(threads_), std::memory_order_release);
      call_.notify_all();
    }
    const PlainFloats plain;
    body(0);
    wait_for_all();
  }

  // One phase: `task(n)` for each n below `count`, shared among the threads that run.
  template <typename Task>
  void each(int count, Task&& task) {
    for (int n; (n = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(n);
    wait_for_all();
  }

 private:
  static constexpr uint32_t CALL = 256;  // above it the number of a call, below how many are called
  static constexpr int LOOKS = 2000;     // some 20 us: longer than most phases
  static constexpr int YIELDS = 500;     // some 200 us: longer than what lies between two steps

  void wait_for_all() {
    if (threads_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    // Read before arriving: once all have, the next call may say otherwise.
    const int threads = threads_;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int looks = 0; phase_.load(std::memory_order_acquire) == phase; ++looks) {
      if (looks < LOOKS) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

  void help(int index) {
    const PlainFloats plain;
    uint32_t seen = 0;
    while (true) {
      uint32_t call;
      for (int looks = 0; (call = call_.load(std::memory_order_acquire)) == seen; ++looks) {
        if (looks < LOOKS) {
          _mm_pause();
        } else if (looks < LOOKS + YIELDS) {
          sched_yield();
        } else {
          call_.wait(seen, std::memory_order_acquire);
        }
      }
      seen = call;
      if (ended_) return;
      // Who is called is waited for, so what was called cannot change meanwhile.
      if (index < int(call % CALL)) {
        (*body_)(index);
        wait_for_all();
      }
    }
  }

  std::vector<std::thread> helpers_;
  const std::function<void(int)>* body_ = nullptr;
  int threads_ = 1;
  std::atomic<bool> ended_{false};
  alignas(64) std::atomic<uint32_t> call_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace crdt_llm
