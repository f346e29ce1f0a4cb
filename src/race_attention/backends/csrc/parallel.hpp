// Tasks over threads that live no longer than the call: nothing is left behind that a fork could lose, and calls from
// several threads of the process do not meet.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "problem.hpp"

namespace race {

class Team {
 public:
  // `seconds`: how long the call may take, roughly; a short one stays on the calling thread, a long one is watched.
  Team(const Args& args, std::size_t scratch_bytes, double seconds);

  // Runs task(n, scratch) for n in [0, count), each on one thread; false if the user interrupted.
  bool run(i64 count, const std::function<void(i64, void*)>& task);

  bool stopped() const { return __atomic_load_n(&stop_, __ATOMIC_RELAXED) != 0; }
  i64 threads() const { return threads_; }
  int* stop() { return &stop_; }

 private:
  bool interrupted();

  const Args& args_;
  std::size_t scratch_bytes_;
  bool watched_;
  i64 threads_;
  int stop_ = 0;  // accessed atomically
  std::vector<std::unique_ptr<char[]>> scratch_;
};

}  // namespace race
