// Tasks over threads that live no longer than the call: nothing is left behind that a fork could lose, and calls from
// several threads of the process do not meet.
#pragma once

#include <functional>
#include <vector>

#include "problem.hpp"

namespace race {

// Memory of one thread. A few are kept for the next call: fresh memory costs a page fault for each of its pages, which
// for a short call is more than its arithmetic.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  Scratch(Scratch&& other) noexcept : block_(other.block_) { other.block_ = nullptr; }
  Scratch(const Scratch&) = delete;
  ~Scratch();
  void* aligned() const;

 private:
  void* block_;
};

class Team {
 public:
  // `seconds`: how long the call may take, roughly; a short one stays on the calling thread, a long one is watched.
  Team(const Args& args, std::size_t scratch_bytes, double seconds);

  // The threads it has: one for a short call.
  static i64 size(const Args& args, double seconds);

  // Runs task(n, scratch) for n in [0, count), each on one thread; false if the user interrupted.
  bool run(i64 count, const std::function<void(i64, void*)>& task);

  bool stopped() const { return __atomic_load_n(&stop_, __ATOMIC_RELAXED) != 0; }
  int* stop() { return &stop_; }

 private:
  bool interrupted();

  const Args& args_;
  std::size_t scratch_bytes_;
  bool watched_;
  i64 threads_;
  int stop_ = 0;  // accessed atomically
  std::vector<Scratch> scratch_;
};

}  // namespace race
