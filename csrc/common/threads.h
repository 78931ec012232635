// Threads for one call. They are started for the call and joined before it returns: nothing
// outlives it, so forked children and several calling threads at once are safe by construction, at
// a price of 10 to 20 us per thread and call, which small problems avoid by using one thread.
#pragma once
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

namespace directclr {

// Spins for a few microseconds, then gives way, then sleeps: with more threads than free cores the
// one that is waited for must get to run.
template <class Condition>
void wait_until(const Condition& condition) {
  for (int tries = 0; !condition(); ++tries) {
    if (tries < 2000) continue;
    if (tries < 2020) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

class Team {
 public:
  explicit Team(int size) : size_(size) {}

  int size() const { return size_; }

  // All threads of the team arrive before any goes on.
  void barrier() {
    if (size_ == 1) return;
    const int generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
  }

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

// body(thread, team) on `threads` threads, the caller's included. False if they could not be
// started (body has then not run at all).
template <class Body>
bool run_team(int threads, const Body& body) {
  Team team(threads);
  if (threads == 1) {
    body(0, team);
    return true;
  }
  enum : int { kWait, kGo, kCancel };
  std::atomic<int> start{kWait};
  std::vector<std::thread> others;
  try {
    others.reserve(size_t(threads) - 1);
    for (int t = 1; t < threads; ++t) {
      others.emplace_back([&, t] {
        wait_until([&] { return start.load(std::memory_order_acquire) != kWait; });
        if (start.load(std::memory_order_relaxed) == kGo) body(t, team);
      });
    }
  } catch (const std::exception&) {
    start.store(kCancel, std::memory_order_release);
    for (auto& o : others) o.join();
    return false;
  }
  start.store(kGo, std::memory_order_release);
  body(0, team);
  for (auto& o : others) o.join();
  return true;
}

}  // namespace directclr
