#include "parallel.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace race {

namespace {
constexpr double kWorthThreads = 3e-4;  // starting a thread takes 5e-5 s, more where the cores are busy
constexpr double kWorthWatching = 0.3;
constexpr auto kBetweenLooks = std::chrono::milliseconds(100);

struct Block {
  std::size_t bytes;
};
constexpr std::size_t kLargestKept = std::size_t(1) << 22;
// Without a lock, which a fork could leave taken.
std::atomic<Block*> kept[16];
}  // namespace

Scratch::Scratch(std::size_t bytes) : block_(nullptr) {
  for (std::atomic<Block*>& place : kept) {
    Block* const found = place.exchange(nullptr);
    if (found && found->bytes >= bytes) {
      block_ = found;
      return;
    }
    ::operator delete(found);
  }
  Block* const fresh = static_cast<Block*>(::operator new(bytes + 128));
  fresh->bytes = bytes;
  block_ = fresh;
}
Scratch::~Scratch() {
  Block* mine = static_cast<Block*>(block_);
  for (std::atomic<Block*>& place : kept) {
    if (!mine || mine->bytes > kLargestKept) break;
    Block* none = nullptr;
    if (place.compare_exchange_strong(none, mine)) mine = nullptr;
  }
  ::operator delete(mine);
}
void* Scratch::aligned() const {
  return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(block_) + sizeof(Block) + 63) / 64 * 64);
}

Team::Team(const Args& args, std::size_t scratch_bytes, double seconds)
    : args_(args), scratch_bytes_(scratch_bytes), watched_(args.check_signals != nullptr && seconds > kWorthWatching) {
  threads_ = size(args, seconds);
}

i64 Team::size(const Args& args, double seconds) {
  return seconds > kWorthThreads && args.threads > 1 ? args.threads : 1;
}

bool Team::interrupted() {
  const int held = args_.gil_ensure();
  const bool yes = args_.check_signals() != 0;
  if (yes) args_.clear_error();  // the caller raises KeyboardInterrupt in its place
  args_.gil_release(held);
  return yes;
}

bool Team::run(i64 count, const std::function<void(i64, void*)>& task) {
  if (stopped()) return false;
  const i64 workers = count < threads_ ? count : threads_;
  while (static_cast<i64>(scratch_.size()) < (workers > 1 ? workers : 1)) scratch_.emplace_back(scratch_bytes_);
  std::atomic<i64> next{0};
  const auto drain = [&](std::size_t worker) {
    void* scratch = scratch_[worker].aligned();
    for (i64 n = next++; n < count && !stopped(); n = next++) task(n, scratch);
  };
  if (workers <= 1 && !watched_) {
    drain(0);
    return !stopped();
  }
  std::mutex mutex;
  std::condition_variable done;
  i64 running = 0;
  std::vector<std::thread> team;
  team.reserve(static_cast<std::size_t>(workers));
  const std::size_t first = watched_ ? 0 : 1;  // a watching caller does nothing else
  try {
    for (std::size_t n = first; n < static_cast<std::size_t>(workers); ++n) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        ++running;
      }
      team.emplace_back([&, n] {
        drain(n);
        std::lock_guard<std::mutex> lock(mutex);
        --running;
        done.notify_one();
      });
    }
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
    std::lock_guard<std::mutex> lock(mutex);
    --running;
  }
  if (!watched_ || team.empty()) {
    drain(0);
  } else {
    std::unique_lock<std::mutex> lock(mutex);
    while (!done.wait_for(lock, kBetweenLooks, [&] { return running == 0; })) {
      lock.unlock();
      if (interrupted()) __atomic_store_n(&stop_, 1, __ATOMIC_RELAXED);
      lock.lock();
    }
  }
  for (std::thread& t : team) t.join();
  return !stopped();
}

}  // namespace race
