// Memory for large results, kept for the next call.
//
// From some 32 MB on malloc gets fresh pages from the system at each call and gives them back when the result is freed.
// The system clears fresh pages, which for a forward in float32 takes a third as long as the kernels do. Blocks that a
// result has given back are kept here, a few, marked as free (MADV_FREE): the system takes their pages when it needs
// them and leaves them, uncleared, until then.
//
// A block leaves as a DLPack tensor, which returns it when its last reader is gone. That interface is plain C.
#include <atomic>
#include <cstdint>
#include <new>

#include "problem.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace race {
namespace {

// https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr std::int32_t kCpu = 1;
constexpr int kDimensions = 4;

#if defined(__linux__) && defined(MADV_FREE)

constexpr std::size_t kLargePage = std::size_t(1) << 21;

struct Block {
  std::size_t bytes;  // from `data` on
  char* data;         // at a large page
};
// Without a lock, which a fork could leave taken.
constexpr int kPlaces = 8;
std::atomic<Block*> kept[kPlaces];
std::atomic<unsigned> next_to_go{0};
std::atomic<std::size_t> kept_bytes{0};

// All that is kept: a quarter of the machine's memory at most.
std::size_t most_kept() {
  static const std::size_t most =
      static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) / 4 * static_cast<std::size_t>(sysconf(_SC_PAGE_SIZE));
  return most;
}

void unmap(Block* block) {
  if (block) munmap(block->data, block->bytes);
  delete block;
}

Block* map(std::size_t bytes) {
  const std::size_t all = bytes + kLargePage;
  void* const found = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(found);
  char* const data = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(begin) + kLargePage - 1) / kLargePage * kLargePage);
  const std::size_t before = static_cast<std::size_t>(data - begin);
  if (before) munmap(begin, before);
  munmap(data + bytes, kLargePage - before);
  madvise(data, bytes, MADV_HUGEPAGE);
  return new (std::nothrow) Block{bytes, data};
}

// A kept block that fits and wastes at most an eighth, or a new one.
Block* take(std::size_t bytes) {
  bytes = (bytes + kLargePage - 1) / kLargePage * kLargePage;
  for (std::atomic<Block*>& place : kept) {
    Block* const found = place.exchange(nullptr);
    const bool fits = found && found->bytes >= bytes && found->bytes <= bytes + bytes / 8;
    Block* none = nullptr;
    if (!found || (!fits && place.compare_exchange_strong(none, found))) continue;
    kept_bytes -= found->bytes;
    if (fits) return found;
    unmap(found);  // another has taken its place meanwhile
  }
  return map(bytes);
}

void keep(Block* block) {
  if ((kept_bytes += block->bytes) > most_kept()) {
    kept_bytes -= block->bytes;
    return unmap(block);
  }
  madvise(block->data, block->bytes, MADV_FREE);
  for (std::atomic<Block*>& place : kept) {
    Block* none = nullptr;
    if (place.compare_exchange_strong(none, block)) return;
  }
  Block* const gone = kept[next_to_go++ % kPlaces].exchange(block);
  if (gone) kept_bytes -= gone->bytes;
  unmap(gone);
}

struct Loan {
  DLManagedTensor managed;
  std::int64_t shape[kDimensions];
  Block* block;
};
void give_back(DLManagedTensor* managed) {
  Loan* const loan = static_cast<Loan*>(managed->context);
  keep(loan->block);
  delete loan;
}

DLManagedTensor* lend(const std::int64_t* shape, std::uint8_t code, std::uint8_t bits) {
  std::size_t bytes = bits / 8;
  for (int n = 0; n < kDimensions; ++n) bytes *= static_cast<std::size_t>(shape[n]);
  Block* const block = take(bytes);
  Loan* const loan = block ? new (std::nothrow) Loan{} : nullptr;
  if (!loan) {
    unmap(block);
    return nullptr;
  }
  for (int n = 0; n < kDimensions; ++n) loan->shape[n] = shape[n];
  loan->block = block;
  loan->managed = {{block->data, kCpu, 0, kDimensions, code, bits, 1, loan->shape, nullptr, 0}, loan, give_back};
  return &loan->managed;
}
void forget() {
  for (std::atomic<Block*>& place : kept) {
    Block* const found = place.exchange(nullptr);
    if (found) kept_bytes -= found->bytes;
    unmap(found);
  }
}

#else
DLManagedTensor* lend(const std::int64_t*, std::uint8_t, std::uint8_t) { return nullptr; }
void forget() {}
#endif

}  // namespace
}  // namespace race

#define RACE_EXPORT __attribute__((visibility("default")))

extern "C" {

// A contiguous result of four dimensions, uninitialised, as a DLManagedTensor; null where this is no system for it, or
// no memory was to be had. `code` and `bits` are DLPack's.
RACE_EXPORT void* race_cpu_lend(const std::int64_t* shape, int code, int bits) {
  return race::lend(shape, static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits));
}
// Gives the kept memory back to the system.
RACE_EXPORT void race_cpu_forget() { race::forget(); }
}
