// Threads for one call. Where the process has GNU OpenMP loaded for everyone to use (torch loads it
// so), they are those of its pool: its idle workers spin for milliseconds after a parallel region,
// and threads of our own would share the cores with them. In a forked child, whose pool is dead,
// and where there is none, they are started for the call and joined before it returns, at a price
// of 10 to 20 us each. Either way nothing of ours outlives a call, several calling threads at once
// are safe, and small problems use one thread.
#pragma once
#if defined(__unix__)
#include <dlfcn.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

namespace directclr {

// Spins for as long as a round of a small batch may be uneven, then sleeps: with more threads than
// free cores the one that is waited for must get to run, and one that only yields keeps the core.
template <class Condition>
void wait_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  for (int tries = 1; !condition(); ++tries) {
    if (tries % 64 == 0 && std::chrono::steady_clock::now() > end) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

class Team {
 public:
  explicit Team(int size) : size_(size) {}

  int size() const { return size_.load(std::memory_order_relaxed); }

  // What OpenMP granted, which a limit of the environment can make less. Every thread sets it before
  // anything else.
  void set_size(int size) { size_.store(size, std::memory_order_relaxed); }

  // All threads of the team arrive before any goes on.
  void barrier() {
    if (size() == 1) return;
    const int generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
  }

 private:
  std::atomic<int> size_;
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  long process = 0;  // the one whose pool it is
};

// Looked up at the first call with more than one thread, by then torch has loaded what it loads.
inline const OpenMP& openmp() {
  static const OpenMP of_process = [] {
    OpenMP omp;
#if defined(__unix__)
    omp.process = long(getpid());
    omp.parallel =
        reinterpret_cast<decltype(omp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    omp.thread_num =
        reinterpret_cast<decltype(omp.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    omp.num_threads =
        reinterpret_cast<decltype(omp.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (!omp.thread_num || !omp.num_threads) omp.parallel = nullptr;
#endif
    return omp;
  }();
  return of_process;
}

inline bool openmp_is_usable() {
#if defined(__unix__)
  return openmp().parallel && long(getpid()) == openmp().process;
#else
  return false;
#endif
}

// body(thread, team) on the OpenMP pool of the process.
template <class Body>
void run_on_openmp(int threads, const Body& body) {
  struct Job {
    const Body& body;
    Team team;
  } job{body, Team(threads)};
  openmp().parallel(
      [](void* data) {
        Job& mine = *static_cast<Job*>(data);
        mine.team.set_size(openmp().num_threads());
        mine.body(openmp().thread_num(), mine.team);
      },
      &job, unsigned(threads), 0);
}

// body(thread, team) on `threads` threads, the caller's included. False if they could not be
// started (body has then not run at all).
template <class Body>
bool run_team(int threads, const Body& body) {
  Team team(threads);
  if (threads == 1) {
    body(0, team);
    return true;
  }
  if (openmp_is_usable()) {
    run_on_openmp(threads, body);
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
