// The calls of the C interface: cuts a call into pieces, spreads them over threads, joins what they leave.
//
// The cut never depends on the number of threads, and sums over tokens are joined in the order of the cut, so that
// results are the same, bit by bit, whatever the threads.
#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.hpp"
#include "parallel.hpp"

namespace race {
namespace {

enum Result : int { kDone = 0, kNoMemory = 1, kInterrupted = 2, kOtherVersion = 3, kNoSuchIsa = 4 };

constexpr i64 kSlots = 64;           // at most about so many a key head
constexpr i64 kLarge = i64(1) << 23;  // bytes of a result that no cache is expected to keep for its reader
constexpr double kPerSecond = 2e10;  // multiplications and additions of one thread, roughly
// Passing over a row's pieces at the same time costs a further pass over keys and values (forward).
constexpr double kForwardCost = 1.5, kBackwardCost = 1.25;
// In a relay threads take the runs of a row in turns: a little more arithmetic, no further pass, but only as many threads
// as can hand the state on without waiting for each other. A row has so many runs a thread at least.
constexpr double kRelayCost = 1.15;
constexpr i64 kMostInRelay = 16, kRunsInRelay = 8;
// Heads passed over together: at most so many, so many bytes of a token's row, so many of their states.
constexpr i64 kMostLanes = 4, kMostRow = 2048, kMostStates = i64(5) << 15;
constexpr double kUneven = 1.05;

struct Range {
  i64 begin, end, size;  // pieces, tokens
};

// Asks for large pages behind a large result that nobody has touched yet: with pages of 4 KiB the system spends longer
// on handing out the memory than the kernels on filling it. Whoever does not listen loses nothing.
void ask_for_large_pages(const Tokens& x, i64 tokens, i64 heads, i64 size, i64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = std::uintptr_t(1) << 21;
  const auto begin = (reinterpret_cast<std::uintptr_t>(x.data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(x.data) + static_cast<std::uintptr_t>(tokens * heads * size * bytes)) / page * page;
  if (x.data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)x, (void)tokens, (void)heads, (void)size, (void)bytes;
#endif
}

class Call {
 public:
  explicit Call(const Args& args) : a(args), kernels(isa_kernels(static_cast<int>(args.isa))) {
    p.a = &a;
    p.heads_a_group = a.heads / a.groups;
    p.buckets = i64(1) << a.planes;
    p.states = a.tables * p.buckets;
    p.projections = a.tables * a.planes;
    p.bfloat16 = isa_narrows();
    cut_rows();
    p.rows = rows.data();
    state_size = p.states * (a.value_dim + 1);
  }

  int forward() {
    a.causal ? cut_causal() : cut_full();
    prepare(1, kForwardCost);
    if (!a.causal) return full({kFullRows, kFullReadout});
    if (p.relay) return run_relay(kRelay) ? kDone : kInterrupted;
    if (together(kForwardCost)) return run_chains(kForward) ? kDone : kInterrupted;
    make_room_for_states();
    return run_slots(kAccumulate, +1) && scan(kScan) && run_slots(kForward, 0) ? kDone : kInterrupted;
  }

  int backward() {
    a.causal ? cut_causal() : cut_full();
    if (a.causal) {
      const i64 wide = a.store == kFloat64 ? 8 : 4;
      inverse.reset(new char[static_cast<std::size_t>(std::max<i64>(a.batch * a.tq * a.heads * 3 * wide, 1))]);
      p.inverse = inverse.get();
    }
    prepare(3.5, kBackwardCost);
    const i64 LP = p.projections;
    partial.assign(static_cast<std::size_t>(a.dplanes || a.dbeta ? a.groups * p.slots * 2 * (LP * a.dim + 1) : 0), 0.0);
    p.partial = partial.data();
    int result;
    if (!a.causal) {
      result = full({kFullRowsBackward, kFullBackwardQuery, kFullBackwardKey});
    } else {
      if (p.relay) {
        result = run_relay(kRelayBackward) ? kDone : kInterrupted;
      } else if (together(kBackwardCost)) {
        result = run_chains(kBackward) ? kDone : kInterrupted;
      } else {
        make_room_for_states();
        const bool done = run_slots(kBackwardQuery, 0) && run_slots(kBackwardAccumulate, -1) && scan(kBackwardScan) &&
                          run_slots(kBackwardKey, 0);
        result = done ? kDone : kInterrupted;
      }
    }
    if (result == kDone) a.store == kFloat64 ? join_partial<double>() : join_partial<float>();
    return result;
  }

 private:
  const Args& a;
  const Kernels& kernels;
  Problem p{};
  i64 state_size = 0, threads = 1;
  std::vector<Row> rows;
  std::vector<Piece> pieces;
  std::vector<Range> slots, chains;           // causal: slots, and slots that lie in common rows
  std::vector<Range> key_parts, query_parts;  // not causal: pieces of rows, row by row (size: the row's place)
  std::vector<Range> parts_of_row_keys, parts_of_row_queries;
  std::vector<char> packed, baton;
  std::unique_ptr<char[]> inverse;
  std::vector<double> partial, carry, local, factor;
  std::unique_ptr<Team> team;

  // ---- cutting ---------------------------------------------------------------------------------------------

  void cut_rows() {
    i64 saved = 0;
    rows.resize(static_cast<std::size_t>(a.rows));
    for (i64 n = 0; n < a.rows; ++n) {
      Row& row = rows[static_cast<std::size_t>(n)];
      if (a.cu_seqlens) {
        row = {0, a.cu_seqlens[n], a.cu_seqlens[n + 1] - a.cu_seqlens[n], a.cu_seqlens_key[n],
               a.cu_seqlens_key[n + 1] - a.cu_seqlens_key[n], saved};
      } else {
        row = {n, 0, a.tq, 0, a.tk, saved};
      }
      saved += std::max<i64>((row.klen + a.run - 1) / a.run - 1, 0);
    }
  }

  // Tokens a slot: enough slots for many threads, few enough for their sums to be small beside the tokens.
  i64 slot_tokens(i64 total) const {
    const i64 count = std::min(kSlots, std::max<i64>(1, 2 * kSlots / a.groups));
    const i64 tokens = std::max((total + count - 1) / count, a.run);
    return (tokens + a.run - 1) / a.run * a.run;
  }

  void cut_causal() {
    const i64 most = slot_tokens(a.batch * a.tk);
    for (i64 n = 0; n < a.rows; ++n) {
      const i64 length = rows[static_cast<std::size_t>(n)].klen;
      for (i64 t = 0; t == 0 || t < length; t += most) {
        const i64 end = std::min(t + most, length);
        const bool fresh = slots.empty() || slots.back().size >= most || slots.back().size + (end - t) > 2 * most;
        const i64 at = static_cast<i64>(pieces.size());
        if (fresh) slots.push_back({at, at, 0});
        slots.back().end = at + 1;
        slots.back().size += end - t;
        pieces.push_back({n, t, end, t == 0, end == length, static_cast<i64>(slots.size()) - 1});
      }
    }
    p.slots = static_cast<i64>(slots.size());
    for (const Range& slot : slots) {
      if (chains.empty() || pieces[static_cast<std::size_t>(slot.begin)].first) chains.push_back({slot.begin, slot.begin, 0});
      chains.back().end = slot.end;
      chains.back().size += slot.size;
    }
  }

  void cut_full() {
    const i64 most = slot_tokens(a.batch * (a.tq + a.tk));
    i64 slot_count = 0, place = 0;
    std::vector<i64> long_rows;
    for (i64 n = 0; n < a.rows; ++n) {
      const Row& row = rows[static_cast<std::size_t>(n)];
      if (row.qlen + row.klen > most) {
        long_rows.push_back(n);
        continue;
      }
      const i64 at = static_cast<i64>(pieces.size());
      if (slots.empty() || slots.back().size >= most) slots.push_back({at, at, 0});
      slots.back().end = at + 1;
      slots.back().size += row.qlen + row.klen;
      pieces.push_back({n, 0, 0, 1, 1, static_cast<i64>(slots.size()) - 1});
    }
    slot_count = static_cast<i64>(slots.size());
    for (i64 n : long_rows) {
      cut_side(n, rows[static_cast<std::size_t>(n)].klen, most, place, slot_count, key_parts, parts_of_row_keys);
      cut_side(n, rows[static_cast<std::size_t>(n)].qlen, most, place, slot_count, query_parts, parts_of_row_queries);
      ++place;
    }
    p.slots = slot_count;
  }
  void cut_side(i64 n, i64 length, i64 most, i64 place, i64& slot_count, std::vector<Range>& parts,
                std::vector<Range>& of_row) {
    of_row.push_back({static_cast<i64>(pieces.size()), 0, place});
    for (i64 t = 0; t == 0 || t < length; t += most) {
      const i64 at = static_cast<i64>(pieces.size()), end = std::min(t + most, length);
      parts.push_back({at, at + 1, place});
      pieces.push_back({n, t, end, t == 0, end == length, slot_count++});
    }
    of_row.back().end = static_cast<i64>(pieces.size());
  }

  // ---- running ---------------------------------------------------------------------------------------------

  void prepare(double passes, double cost) {
    packed.resize(kernels.packed_bytes(p) + 64);
    const auto at = (reinterpret_cast<std::uintptr_t>(packed.data()) + 63) / 64 * 64;
    kernels.pack(p, reinterpret_cast<void*>(at));
    p.packed_planes = reinterpret_cast<void*>(at);
    const double a_query = static_cast<double>(p.states * a.value_dim + p.projections * a.dim + 30 * p.projections);
    const double tokens = static_cast<double>(a.batch) * static_cast<double>(a.tq * a.heads + a.tk * a.groups);
    const i64 bytes = a.store == kFloat64 ? 8 : a.store == kFloat32 ? 4 : 2;
    p.large = a.batch * std::max(a.tq * a.heads, a.tk * a.groups) * std::max(a.dim, a.value_dim) * bytes >= kLarge;
    const double seconds = passes * tokens * a_query / kPerSecond;
    threads = Team::size(a, seconds);
    p.threads = threads;
    choose_lanes(bytes, cost);
    if (a.causal && threads > 1 && threads <= kMostInRelay) choose_relay(bytes);
    team.reset(new Team(a, kernels.scratch_bytes(p), seconds));
    p.stop = team->stop();
    ask_for_large_pages(a.out, a.batch * a.tq, a.heads, a.value_dim, bytes);
    ask_for_large_pages(a.dq, a.batch * a.tq, a.heads, a.dim, bytes);
    ask_for_large_pages(a.dk, a.batch * a.tk, a.groups, a.dim, bytes);
    ask_for_large_pages(a.dv, a.batch * a.tk, a.groups, a.value_dim, bytes);
  }

  // Whether so many key heads are worth a thread's passing over them together: their tokens lie side by side, and their
  // states fit into the caches.
  bool side_by_side(i64 lanes, i64 bytes) const {
    return p.large && a.k.d == 1 && a.k.h == a.dim && a.groups % lanes == 0 && lanes * a.dim * bytes <= kMostRow &&
           lanes * state_size * 8 <= kMostStates;
  }
  // Several heads at once, unless threads would be left without work.
  void choose_lanes(i64 bytes, double cost) {
    p.lanes = 1;
    if (!a.causal) {
      const i64 tasks = static_cast<i64>(std::max(slots.size(), std::min(key_parts.size(), query_parts.size())));
      while (2 * p.lanes <= kMostLanes && side_by_side(2 * p.lanes, bytes) && tasks * a.groups >= 16 * p.lanes * threads)
        p.lanes *= 2;
      return;
    }
    const bool alone = together(cost);
    for (i64 lanes = 2; lanes <= kMostLanes && side_by_side(lanes, bytes); lanes *= 2) {
      p.lanes = lanes;
      const bool fits = alone ? longest_share() <= kUneven * even_share()
                              : static_cast<i64>(slots.size()) * lots() >= 8 * threads;
      if (fits) continue;
      p.lanes = lanes / 2;
      return;
    }
  }
  // A relay: where rows and heads are too few for the threads.
  void choose_relay(i64 bytes) {
    i64 most = 1;
    while (2 * most <= kMostLanes && side_by_side(2 * most, bytes)) most *= 2;
    i64 longest = 0;
    for (const Row& row : rows) longest = std::max(longest, row.klen);
    if (longest < kRunsInRelay * threads * a.run) return;
    if (longest_share() <= kRelayCost * even_share()) return;
    p.lanes = most;
    baton.resize(kernels.relay_bytes(p) + 64);
    p.relay = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(baton.data()) + 63) / 64 * 64);
  }
  i64 lots() const { return (a.groups + p.lanes - 1) / p.lanes; }

  // Whether rows are better passed over one by one, each by one thread: true where there are rows and heads enough.
  bool together(double cost) const {
    return threads == 1 || slots.size() == chains.size() || longest_share() <= cost * even_share();
  }
  double even_share() const {
    double total = 0;
    for (const Range& chain : chains) total += static_cast<double>(chain.size * lots());
    return total / static_cast<double>(threads);
  }
  // Tokens of the thread that gets the most, of one lot of heads each.
  double longest_share() const {
    double longest = 0;
    for (const Range& chain : chains) longest = std::max(longest, static_cast<double>(chain.size));
    if (static_cast<i64>(chains.size()) * lots() > 64 * threads) return std::max(longest, even_share());
    std::vector<double> sizes;
    for (const Range& chain : chains) sizes.insert(sizes.end(), static_cast<std::size_t>(lots()), static_cast<double>(chain.size));
    std::sort(sizes.rbegin(), sizes.rend());
    std::vector<double> load(static_cast<std::size_t>(threads), 0.0);
    for (double size : sizes) *std::min_element(load.begin(), load.end()) += size;
    return *std::max_element(load.begin(), load.end());
  }

  Work work_of(int pass, i64 g, const Range& range) const {
    return {pass, g, std::min(p.lanes, a.groups - g), pieces.data() + range.begin, pieces.data() + range.end, nullptr, nullptr, nullptr};
  }

  // Every range for every lot of key heads, the largest first.
  template <class Fill>
  bool run_ranges(const std::vector<Range>& ranges, Fill&& fill) {
    std::vector<i64> order(ranges.size());
    std::iota(order.begin(), order.end(), i64(0));
    std::stable_sort(order.begin(), order.end(), [&](i64 x, i64 y) {
      return ranges[static_cast<std::size_t>(x)].size > ranges[static_cast<std::size_t>(y)].size;
    });
    return team->run(static_cast<i64>(ranges.size()) * lots(), [&](i64 n, void* scratch) {
      const i64 at = order[static_cast<std::size_t>(n / lots())];
      Work work{};
      if (fill(at, n % lots() * p.lanes, work)) kernels.work(p, work, scratch);
    });
  }

  bool run_chains(int pass) {
    return run_ranges(chains, [&](i64 at, i64 g, Work& work) {
      work = work_of(pass, g, chains[static_cast<std::size_t>(at)]);
      return true;
    });
  }

  bool run_relay(int pass) {
    for (i64 g = 0; g < a.groups; g += p.lanes) {
      kernels.begin_relay(p, p.relay);
      const Work work = work_of(pass, g, {0, static_cast<i64>(pieces.size()), 0});
      if (!team->run(threads, [&](i64, void* scratch) { kernels.work(p, work, scratch); })) return false;
    }
    return true;
  }

  void make_room_for_states() {
    carry.resize(static_cast<std::size_t>(a.groups * p.slots * state_size));
    local.resize(carry.size());
    factor.resize(static_cast<std::size_t>(a.groups * p.slots));
  }
  double* of_slot(std::vector<double>& states, i64 g, i64 slot) {
    return states.data() + (g * p.slots + slot) * state_size;
  }

  // hands_on: +1 where a slot leaves something only if its row goes on behind it, -1 if before it, 0 for all slots.
  bool run_slots(int pass, int hands_on) {
    return run_ranges(slots, [&](i64 at, i64 g, Work& work) {
      const Range& slot = slots[static_cast<std::size_t>(at)];
      const Piece& first = pieces[static_cast<std::size_t>(slot.begin)];
      const Piece& last = pieces[static_cast<std::size_t>(slot.end - 1)];
      if ((hands_on > 0 && last.last) || (hands_on < 0 && first.first)) return false;
      work = work_of(pass, g, slot);
      work.given = of_slot(carry, g, at);
      work.left = of_slot(local, g, at);
      work.left_factor = &factor[static_cast<std::size_t>(g * p.slots + at)];
      return true;
    });
  }
  bool scan(int pass) {
    return team->run(a.groups, [&](i64 g, void* scratch) {
      Work work = work_of(pass, g, {0, static_cast<i64>(pieces.size()), 0});
      work.heads = 1;
      work.given = of_slot(local, g, 0);
      work.left = of_slot(carry, g, 0);
      work.left_factor = &factor[static_cast<std::size_t>(g * p.slots)];
      kernels.work(p, work, scratch);
    });
  }

  // ---- not causal --------------------------------------------------------------------------------------------

  int full(const std::vector<int>& passes) {
    const bool backward = passes.size() == 3;
    if (!run_ranges(slots, [&](i64 at, i64 g, Work& work) {
          work = work_of(passes[0], g, slots[static_cast<std::size_t>(at)]);
          return true;
        }))
      return kInterrupted;
    if (parts_of_row_keys.empty()) return kDone;
    const std::size_t long_rows = parts_of_row_keys.size();
    carry.resize(long_rows * static_cast<std::size_t>(a.groups * state_size) * 2);
    local.resize(static_cast<std::size_t>(a.groups * p.slots * state_size));
    bool done = leave(kFullAccumulate, key_parts, 0) && reduce(kFullReduce, parts_of_row_keys, 0);
    if (!backward) {
      done = done && leave(kFullReadout, query_parts, 0);
    } else {
      done = done && leave(kFullBackwardQuery, query_parts, 0) && reduce(kFullReduceAdjoint, parts_of_row_queries, 1) &&
             leave(kFullBackwardKey, key_parts, 1);
    }
    return done ? kDone : kInterrupted;
  }
  double* of_row(i64 place, i64 g, int adjoint) { return carry.data() + ((place * a.groups + g) * 2 + adjoint) * state_size; }
  bool leave(int pass, const std::vector<Range>& parts, int adjoint) {
    return team->run(static_cast<i64>(parts.size()) * lots(), [&](i64 n, void* scratch) {
      const Range& part = parts[static_cast<std::size_t>(n / lots())];
      const i64 g = n % lots() * p.lanes;
      Work work = work_of(pass, g, part);
      work.given = of_row(part.size, g, adjoint);
      work.left = of_slot(local, g, pieces[static_cast<std::size_t>(part.begin)].slot);
      kernels.work(p, work, scratch);
    });
  }
  bool reduce(int pass, const std::vector<Range>& parts, int adjoint) {
    return team->run(static_cast<i64>(parts.size()) * a.groups, [&](i64 n, void* scratch) {
      const Range& row = parts[static_cast<std::size_t>(n / a.groups)];
      const i64 g = n % a.groups;
      Work work = work_of(pass, g, row);
      work.heads = 1;
      work.given = of_slot(local, g, 0);
      work.left = of_row(row.size, g, adjoint);
      kernels.work(p, work, scratch);
    });
  }

  template <class T>
  void join_partial() {
    const i64 size = p.projections * a.dim;
    for (i64 g = 0; g < a.groups && !partial.empty(); ++g) {
      double* total = partial.data() + g * p.slots * 2 * (size + 1);
      for (i64 n = 1; n < 2 * p.slots; ++n)
        for (i64 i = 0; i <= size; ++i) total[i] += total[n * (size + 1) + i];
      const bool any = p.slots > 0;
      for (i64 i = 0; i < size && a.dplanes; ++i) static_cast<T*>(a.dplanes)[g * size + i] = any ? static_cast<T>(total[i]) : T(0);
      if (a.dbeta) static_cast<T*>(a.dbeta)[g] = any ? static_cast<T>(total[size]) : T(0);
    }
  }
};

int guarded(const Args* args, int (Call::*what)()) {
  if (!args || args->fields != static_cast<i64>(sizeof(Args) / 8)) return kOtherVersion;
  if (!isa_runs(static_cast<int>(args->isa))) return kNoSuchIsa;
  try {
    Call call(*args);
    return (call.*what)();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace race

#define RACE_EXPORT __attribute__((visibility("default")))

extern "C" {

// Both return 0, or: 1 no memory, 2 interrupted, 3 arguments of another version, 4 no such instruction set.
RACE_EXPORT int race_cpu_forward(const race::Args* args) { return race::guarded(args, &race::Call::forward); }
RACE_EXPORT int race_cpu_backward(const race::Args* args) { return race::guarded(args, &race::Call::backward); }
RACE_EXPORT std::int64_t race_cpu_fields() { return static_cast<std::int64_t>(sizeof(race::Args) / 8); }
}
