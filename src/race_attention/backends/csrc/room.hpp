// The memory of one thread: running states, tiles of one block, factors of one run.
#pragma once

#include "tokens.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

// Cuts arrays off a block of memory; without one it only counts.
class Cutter {
 public:
  explicit Cutter(void* memory) : at_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(i64 count) {
    char* mine = at_ ? at_ + used_ : nullptr;
    used_ += static_cast<std::size_t>(round_up(count * i64(sizeof(T)), 64)) + 64;
    return reinterpret_cast<T*>(mine);
  }
  std::size_t used() const { return used_; }

 private:
  char* at_;
  std::size_t used_ = 0;
};

struct Sizes {
  i64 dim, value, ld;  // padded D and Dv, and a state's row: values, filling, mass at `value`
};

template <class T>
RACE_INLINE Sizes sizes(const Problem& p) {
  const i64 line = 64 / sizeof(T);
  Sizes s{round_up(p.a->dim, W<T>), round_up(p.a->value_dim, W<T>), 0};
  s.ld = round_up(s.value + 1, line);
  if (s.ld / line % 2 == 0) s.ld += line;  // an odd number of cache lines: rows fall into different cache sets
  return s;
}

constexpr i64 kMostLanes = 4;

// A state that runs over tokens. A token in float32 would vanish in a sum over 2^24 others, so three sums are kept:
//   base   before the piece, float64; `kept` is what decay leaves of it
//   acc    the piece's runs so far, float64
//   sum    the run so far, in T, from zero
// and w = kept * base + acc + sum in T for reading, which is renewed at each run.
template <class T>
class Running {
 public:
  T *w = nullptr, *sum = nullptr, *second = nullptr;  // second: sum, or null where only w is wanted
  double kept = 1, run_factor = 1;  // run_factor: decay over the run so far
  i64 size = 0;

  void place(T* of_w, T* of_sum, double* of_base, double* of_acc, i64 count) {
    w = of_w;
    sum = second = of_sum;
    base_ = of_base;
    acc_ = of_acc;
    size = count;
  }
  // Both are 0 after `clear`, and written to only where somebody asks: a short row never does.
  double* base() { return owned(base_, has_base_); }
  double* acc() { return owned(acc_, has_acc_); }

  RACE_INLINE void clear() {
    has_base_ = has_acc_ = false;
    kept = 1;
  }
  RACE_INLINE void start_run() {
    start_sum();
    read();
  }
  RACE_INLINE void start_sum() {
    run_factor = 1;
    for (i64 i = 0; i < size; ++i) sum[i] = 0;
  }
  RACE_INLINE void read() {
    if (!has_base_ && !has_acc_)
      for (i64 i = 0; i < size; ++i) w[i] = 0;
    else if (!has_base_)
      add(w, acc_, 1.0);
    else
      add(w, base_, kept, has_acc_ ? acc_ : nullptr);
  }
  RACE_INLINE void end_run() {
    if (has_acc_)
      add(acc_, acc_, run_factor, sum);
    else
      add(acc_, sum, 1.0);
    has_acc_ = true;
    kept *= run_factor;
  }
  RACE_INLINE void next_piece() {
    if (!has_base_ && has_acc_) {
      double* const settled = acc_;
      acc_ = base_;
      base_ = settled;
      has_base_ = true;
    } else if (has_base_) {
      add(base_, base_, kept, acc());
    }
    has_acc_ = false;
    kept = 1;
  }
  RACE_INLINE void scale(T factor) {
    for (i64 i = 0; i < size; ++i) w[i] *= factor;
    if (second) scale_sum(factor);
  }
  RACE_INLINE void scale_sum(T factor) {
    for (i64 i = 0; i < size; ++i) sum[i] *= factor;
  }

 private:
  // to = factor * x + y. The factor comes by value: as a member it might be one of the numbers written, and no loop over
  // them would become vectors. `to` is `x` or apart from it.
  template <class Into, class From, class More = double>
  __attribute__((noinline)) void add(Into* to, const From* x, double factor, const More* y = nullptr) const {
    const i64 n = size;
    if (y)
      for (i64 i = 0; i < n; ++i) to[i] = static_cast<Into>(factor * static_cast<double>(x[i]) + static_cast<double>(y[i]));
    else
      for (i64 i = 0; i < n; ++i) to[i] = static_cast<Into>(factor * static_cast<double>(x[i]));
  }
  double* owned(double* x, bool& mine) {
    for (i64 i = 0; !mine && i < size; ++i) x[i] = 0;
    mine = true;
    return x;
  }
  double *base_ = nullptr, *acc_ = nullptr;
  bool has_base_ = false, has_acc_ = false;
};

// Tokens that are handled together: their decays are counted from the state before the first.
template <class T>
struct Block {
  i64 begin, count;
  T before, over;  // factors of the state: before the block (almost always 1), and over it
};

template <class T>
struct Room {
  Sizes size;
  Running<T> states[kMostLanes], adjoints[kMostLanes];
  Running<T> *state, *adjoint;  // of the head at hand
  Block<T>* blocks;
  i64 block_count, run_pk_blocks;
  T *query_factor, *key_factor;  // [run] exp(g) and exp(-g)
  T *x, *v, *q, *grad, *scaled, *out;
  T *pk, *pq, *dphi, *y, *dy;
  Slopes<T> slopes;
  T *scores, *other, *across;  // [C][C]
  T *part_k, *part_q, *den, *inverse, *den_adjoint, *lift, *total;
  T *key_term;  // [run]
  T *run_pk;    // in a relay: the buckets of a run's keys, block after block
  T *dw, *dbeta, *dw_queries, *dbeta_queries;  // in a relay those of queries wait for their turn
  Ahead ahead;
  // What the keys' pass over a run would compute again: pk and the keys' slopes, and of each head pq, scores and `across`,
  // block after block.
  // Kept only where it fits into the caches.
  static constexpr i64 kMostStash = i64(1) << 17;
  T *stash, *own_pk, *own_pq, *own_scores, *own_across;
  Slopes<T> key_slopes, own_slopes;
  i64 stash_stride;
  bool stashed, relay, some_absent;  // some_absent: of the block's keys

  Room(const Problem& p, Cutter& cut) : size(sizes<T>(p)) {
    const i64 S = p.states, LP = p.projections, run = p.a->run;
    T* shared[2] = {nullptr, nullptr};
    const i64 lanes = p.relay ? 1 : p.lanes;  // in a relay heads take turns run by run
    for (i64 n = 0; n < lanes; ++n) {
      const i64 count = S * size.ld;
      Running<T>* const both[] = {&states[n], &adjoints[n]};
      for (Running<T>* r : both) {
        // Causal, heads take turns with the adjoint run by run: what lives in a run only is theirs together.
        const bool own = r == &states[n] || n == 0 || !p.a->causal;
        T* const w = own ? cut.take<T>(count) : shared[0];
        T* const sum = own ? cut.take<T>(count) : shared[1];
        double* const base = cut.take<double>(count);
        r->place(w, sum, base, cut.take<double>(count), count);
        shared[0] = w;
        shared[1] = sum;
      }
      shared[0] = adjoints[0].w;
      shared[1] = adjoints[0].sum;
    }
    relay = p.relay != nullptr;
    use(0);
    blocks = cut.take<Block<T>>(run);
    query_factor = cut.take<T>(run);
    key_factor = cut.take<T>(run);
    key_term = cut.take<T>(run);
    x = cut.take<T>(C * size.dim);
    q = cut.take<T>(C * size.dim);
    v = cut.take<T>(C * size.value);
    grad = cut.take<T>(C * size.value);
    scaled = cut.take<T>(C * size.value);
    out = cut.take<T>(C * max_of(size.dim, size.value));
    pk = cut.take<T>(S * C);
    pq = cut.take<T>(S * C);
    dphi = cut.take<T>(S * C);
    T** const of_planes[] = {&y, &dy, &slopes.inverse_up, &slopes.inverse_down, &slopes.to_projection, &slopes.to_beta};
    for (T** a : of_planes)
      *a = cut.take<T>(LP * C);
    scores = cut.take<T>(C * C);
    other = cut.take<T>(C * C);
    across = cut.take<T>(C * C);
    T** const of_tokens[] = {&part_k, &part_q, &den, &inverse, &den_adjoint, &lift, &total};
    for (T** a : of_tokens) *a = cut.take<T>(C);
    dw = cut.take<T>(LP * size.dim);
    dbeta = cut.take<T>(W<T>);
    dw_queries = cut.take<T>(p.relay ? LP * size.dim : 0);
    dbeta_queries = cut.take<T>(p.relay ? W<T> : 0);
    run_pk_blocks = p.relay ? 2 * (run / C + 1) : 0;  // strong decays make shorter blocks, and more
    run_pk = cut.take<T>(run_pk_blocks * S * C);
    stash_stride = C * (S * (1 + p.heads_a_group) + 2 * C * p.heads_a_group + 4 * LP);
    const bool wanted = p.inverse != nullptr && stash_stride * (run / C) <= kMostStash;
    stash = cut.take<T>(wanted ? kMostStash : 0);
    if (!wanted) stash_stride = kMostStash;  // no run fits
    own_pk = pk;
    own_pq = pq;
    own_scores = scores;
    own_across = across;
    key_slopes = own_slopes = slopes;
    stashed = some_absent = false;
    block_count = 0;
  }

  RACE_INLINE void use(i64 lane) {
    if (relay) lane = 0;
    state = &states[lane];
    adjoint = &adjoints[lane];
  }

  // Whether the blocks at hand are kept from here on; then where block n keeps the keys' part, and query head h's.
  RACE_INLINE void begin_stash(bool wanted) { stashed = wanted && block_count * stash_stride <= kMostStash && stash_stride < kMostStash; }
  RACE_INLINE void stash_keys(const Problem& p, i64 n) {
    if (!stashed) return;
    pk = stash + n * stash_stride;
    T* at = pk + C * (p.states * (1 + p.heads_a_group) + 2 * C * p.heads_a_group);
    const i64 size = C * p.projections;
    key_slopes = {at, at + size, at + 2 * size, at + 3 * size};
  }
  RACE_INLINE void stash_queries(const Problem& p, i64 h) {
    if (!stashed) return;
    pq = pk + C * p.states + C * (p.states + 2 * C) * h;
    scores = pq + C * p.states;
    across = scores + C * C;
  }
  RACE_INLINE void end_stash() {
    stashed = false;
    pk = own_pk;
    pq = own_pq;
    scores = own_scores;
    across = own_across;
    key_slopes = own_slopes;
  }
};

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
