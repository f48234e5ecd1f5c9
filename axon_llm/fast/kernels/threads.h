// PyTorch's threads, and how they share work: in pieces, that whoever is done takes next.
//
// Read next: strips.h.

#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

namespace {

inline int64_t pieces_of(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Parts 0 … count, which threads take in pieces as they get done: on a shared machine one may be held up, and with
// fixed halves everybody would wait for it. A piece is three quarters of a fair share of the rest, so first ones
// are large and last ones small; but not less than `least`, for it takes a while until memory delivers a new piece.
class Pieces {
 public:
  Pieces(int64_t count, int64_t least)
      : count_(count), least_(std::max<int64_t>(least, 1)), threads_(torch::stable::get_num_threads()) {}

  // The next piece; none is left if false.
  bool take(int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= count_) return false;
      end = std::min(count_, begin + std::max(least_, (count_ - begin) / threads_ * 3 / 4));
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_, least_, threads_;
};

// A number that threads wait for: they look at it for longer than most parts of a step take, and then sleep. Looking on
// and yielding would hand the processor to a busy neighbour for milliseconds, many times a step. Where there is such a
// neighbour they sleep almost at once: whoever sleeps much is woken before it, whoever looks on has to wait for it.
class Awaited {
 public:
  int32_t value() const { return value_.load(std::memory_order_acquire); }
  // While nobody waits.
  void begin(int32_t value) { value_.store(value, std::memory_order_relaxed); }

  void set(int32_t value) {
    value_.store(value);
    wake();
  }
  void add(int32_t count) {
    value_.fetch_add(count);
    wake();
  }

  // Returns when come(value).
  void until(const auto& come) {
    const uint64_t begun = __rdtsc();
    int patience = begun < crowded_until_.load(std::memory_order_relaxed) ? 100 : 5000;  // the latter 0.1 to 0.3 ms
    for (; patience > 0 && !come(value()); patience--) _mm_pause();
    if (patience == 0) {
      asleep_.fetch_add(1);
      for (int32_t seen; !come(seen = value());) sleep(seen);
      asleep_.fetch_sub(1);
    }
    const uint64_t now = __rdtsc();
    if (now - begun > LONG && now < held_up_.exchange(now, std::memory_order_relaxed) + A_WHILE)
      crowded_until_.store(now + A_WHILE, std::memory_order_relaxed);
  }

 private:
  // In cycles. After some 2 ms somebody else had the processor; twice in a tenth of a second is a neighbour, and he is
  // taken for granted for as long again.
  static constexpr uint64_t LONG = 6'000'000, A_WHILE = 300'000'000;
  static inline std::atomic<uint64_t> crowded_until_{0}, held_up_{0};
  alignas(64) std::atomic<int32_t> value_{0};
  std::atomic<int32_t> asleep_{0};

  // For as long as the value is this one; a change that was missed in between makes it return at once.
  void sleep([[maybe_unused]] int32_t seen) {
#ifdef __linux__
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::this_thread::yield();
#endif
  }
  void wake() {
#ifdef __linux__
    if (asleep_.load() > 0) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
  }
};

// PyTorch's threads, at hand for a whole step. To set them to work and to wait for them takes 5 to 10 µs, much of it
// for fetching the code that does it: the weights that went through the caches have driven it out. The threads of a
// team look at one number meanwhile, and it takes 2 to 4.
//
// Parts of PyTorch's `parallel_for` have to run at the same time, each on a thread of its own, as they do with OpenMP,
// with which it is built. Within a team its own operators run on one thread; nothing large is left to them.
class Team {
 public:
  // work() on this thread; the others are at hand for what `everybody` does meanwhile. Within another `lead` it is just
  // a call.
  template <class Work>
  static void lead(const Work& work) {
    const int64_t threads = torch::stable::get_num_threads();
    if (threads == 1 || led_ != nullptr) return work();
    Team team;
    std::exception_ptr failure;  // through PyTorch it would lose its message
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (begin > 0) return team.serve();
      // Parts are as large as this one, and each has a thread.
      team.others_ = static_cast<int32_t>(pieces_of(threads, end)) - 1;
      led_ = &team;
      try {
        work();
      } catch (...) {
        failure = std::current_exception();
      }
      led_ = nullptr;
      team.task_.set(OVER);
    });
    if (failure) std::rethrow_exception(failure);
  }

  // work() on every thread; the first failure is everybody's. What one of them shares within it is its own.
  template <class Work>
  static void everybody(const Work& work) {
    if (within_task_)
      work();
    else if (led_ == nullptr)
      torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) { work(); });
    else
      led_->run([](const void* that) { (*static_cast<const Work*>(that))(); }, &work);
  }

 private:
  static constexpr int32_t OVER = -1;
  static inline thread_local Team* led_ = nullptr;       // by this thread
  static inline thread_local bool within_task_ = false;  // this thread is: attention prepares its rows there

  Awaited task_;  // how many there have been
  void (*call_)(const void*) = nullptr;
  const void* work_ = nullptr;
  int32_t others_ = 0;
  Awaited done_;  // of the others, with the task
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;

  void run(void (*call)(const void*), const void* work) {
    call_ = call, work_ = work;
    done_.begin(0);
    failed_.store(false, std::memory_order_relaxed);
    task_.add(1);
    attempt();
    done_.until([&](int32_t done) { return done == others_; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  void serve() {
    for (int32_t last = 0;; done_.add(1)) {
      task_.until([&](int32_t task) { return task != last; });
      last = task_.value();
      if (last == OVER) return;
      attempt();
    }
  }

  void attempt() {
    within_task_ = true;
    try {
      call_(work_);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
    within_task_ = false;
  }
};

// Calls work(pieces) on all threads.
template <class Work>
void share(int64_t count, int64_t least, const Work& work) {
  Pieces pieces(count, least);
  Team::everybody([&] { work(pieces); });
}

// Calls work(begin, end) on parts of 0 … count, on this thread alone if there are only `few`.
template <class Work>
void share_out(int64_t count, int64_t few, const Work& work) {
  if (count == 0) return;
  if (count <= few) return work(int64_t{0}, count);
  share(pieces_of(count, few), 1, [&](Pieces& pieces) {
    for (int64_t begin, end; pieces.take(begin, end);) work(begin * few, std::min(count, end * few));
  });
}

}  // namespace
