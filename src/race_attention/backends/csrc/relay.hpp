// Causal passes whose runs are spread over threads: a thread takes a run of every head at hand, so that it reads whole
// tokens as they lie in memory, does what needs no state, and takes the state over from the thread that has the run
// before it (behind it, in the backward) the moment that one hands it on.
//
// Runs are taken in order, so the one a thread waits for always has a thread that works on it. The state changes in
// the order of the runs and by the same operations as in a pass of one thread: results are the same, bit by bit.
#pragma once

#include <sched.h>

#include "causal.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

template <class T>
struct alignas(64) Leg {  // of one head
  Running<T> state;       // before run `turn`
  i64 turn = 0;           // runs that have handed the state on
  i64 joined = 0;         // runs whose gradients of hyperplanes and beta are joined
};
template <class T>
struct alignas(64) Baton {
  i64 taken = 0;  // runs
  Leg<T> legs[kMostLanes];
};

template <class T>
Baton<T>* lay_baton(const Problem& p, Cutter& cut) {
  Baton<T>* const baton = cut.take<Baton<T>>(1);
  if (baton) *baton = Baton<T>{};
  const i64 count = p.states * sizes<T>(p).ld;
  for (i64 n = 0; n < p.lanes; ++n) {
    double* const base = cut.take<double>(count);
    double* const acc = cut.take<double>(count);
    if (baton) baton->legs[n].state.place(nullptr, nullptr, base, acc, count);
  }
  return baton;
}

template <class T>
class Relay : public Causal<T> {
  using Causal<T>::p;
  using Causal<T>::a;
  using Causal<T>::g;
  using Causal<T>::room;
  using Causal<T>::row;
  using Causal<T>::work;

 public:
  using Causal<T>::Causal;

  void forward() {
    const Piece* piece = work.begin;
    for (i64 first = 0;;) {
      const i64 unit = __atomic_fetch_add(&baton.taken, 1, __ATOMIC_RELAXED);
      while (piece != work.end && unit - first >= runs(*piece)) first += runs(*piece++);
      if (piece == work.end || this->stopped()) return;
      this->enter(*piece);
      const i64 begin = piece->begin + (unit - first) * a.run;
      this->look_forward(begin + p.threads * a.run, a.run, false);
      this->for_heads([&] { forward_unit(*piece, unit, begin, min_of(begin + a.run, piece->end)); });
    }
  }
  void backward() {
    const Piece* piece = work.end - 1;
    for (i64 first = 0;;) {
      const i64 unit = __atomic_fetch_add(&baton.taken, 1, __ATOMIC_RELAXED);
      while (piece >= work.begin && unit - first >= runs(*piece)) first += runs(*piece--);
      if (piece < work.begin || this->stopped()) return;
      this->enter(*piece);
      const i64 begin = this->last_run(*piece) - (unit - first) * a.run;
      this->look_back(begin - (p.threads - 1) * a.run, 0);
      this->for_heads([&] { backward_unit(*piece, unit, begin, min_of(begin + a.run, piece->end)); });
    }
  }

 private:
  Baton<T>& baton = *static_cast<Baton<T>*>(p.relay);
  static constexpr i64 kSpins = 1 << 12;

  i64 runs(const Piece& piece) const { return max_of((piece.end - piece.begin + a.run - 1) / a.run, 1); }
  Leg<T>& leg() const { return baton.legs[g - work.g]; }
  // False if the call is to stop.
  bool await(const i64& turn, i64 unit) const {
    for (i64 spins = 0; __atomic_load_n(&turn, __ATOMIC_ACQUIRE) != unit; ++spins) {
      if (this->stopped()) return false;
#if defined(__SSE2__)
      _mm_pause();
#endif
      if (spins > kSpins) sched_yield();
    }
    return true;
  }
  static void hand_over(i64& turn, i64 unit) { __atomic_store_n(&turn, unit + 1, __ATOMIC_RELEASE); }

  // The state that the run before has handed on, with this thread's memory for a run.
  static Running<T> taken_over(const Leg<T>& leg, const Running<T>& mine) {
    Running<T> state = leg.state;
    state.w = mine.w;
    state.sum = mine.sum;
    state.run_factor = mine.run_factor;
    return state;
  }

  void forward_unit(const Piece& piece, i64 unit, i64 begin, i64 end) {
    sum_keys(begin, end);
    if (!await(leg().turn, unit)) return;
    Running<T> state = taken_over(leg(), *room.state);
    if (begin == piece.begin) this->start_row_or_piece(state, false, piece.first, a.initial, false);
    state.read();
    if (end < row.klen || a.final_mass) state.end_run();
    if (end == row.klen && a.final_mass) {
      state.next_piece();
      this->write_state(state.base(), a.final_mass, a.final_value_sum);
    }
    leg().state = state;
    hand_over(leg().turn, unit);
    if (a.saved && begin > 0) this->gather(state.w, this->saved(begin / a.run));
    read_run(begin);
  }
  // What a run's keys alone add to the state: its `sum`; their buckets are kept.
  void sum_keys(i64 begin, i64 end) {
    Running<T>& state = *room.state;
    state.start_sum();
    room.block_count = 0;
    for (i64 t = begin; t < end; t += this->kChunk) this->add_blocks(t, min_of(t + this->kChunk, end), begin, state);
    for (i64 n = 0; n < room.block_count; ++n) {
      const Block<T>& b = room.blocks[n];
      const i64 rows = round_up(b.count, W<T>);
      this->next_block();
      if (b.before != T(1)) state.scale_sum(b.before);
      hold(n);
      this->take_keys(b, begin, rows, nullptr);
      const Tile<T> v = this->load_values(b, rows);
      this->add_to_state(state.sum, nullptr, room.pk, v.p, v.ld, b.count, nullptr, b.over);
    }
    room.pk = room.own_pk;
  }
  void read_run(i64 begin) {
    Running<T>& state = *room.state;
    state.second = nullptr;
    for (i64 n = 0; n < room.block_count; ++n) {
      const Block<T>& b = room.blocks[n];
      const i64 rows = round_up(b.count, W<T>);
      this->next_block();
      this->scale_before(state, b);
      if (hold(n))
        this->key_parts(b.begin, b.count, nullptr);
      else
        this->take_keys(b, begin, rows, nullptr);
      this->read_block(b, begin, rows, this->load_values(b, rows), n + 1 < room.block_count);
    }
    room.pk = room.own_pk;
  }
  // Points `pk` to where block n of the run keeps its buckets; false if there is no such place.
  bool hold(i64 n) {
    const bool kept = n < room.run_pk_blocks;
    room.pk = kept ? room.run_pk + n * p.states * C : room.own_pk;
    return kept;
  }

  void backward_unit(const Piece& piece, i64 unit, i64 begin, i64 end) {
    this->query_run(begin, end, true);
    swap(room.dw, room.dw_queries);
    swap(room.dbeta, room.dbeta_queries);
    this->sum_adjoints(begin, end);
    if (!await(leg().turn, unit)) return;
    Running<T> adjoint = taken_over(leg(), *room.adjoint);
    if (end == piece.end) this->start_row_or_piece(adjoint, false, piece.last, a.grad_final, false);
    adjoint.read();
    if (this->handed_on(begin)) adjoint.end_run();
    const double flow = a.dlog_decay ? this->decay_flow(begin, adjoint) : 0;
    if (begin == piece.begin) this->finish_backward(piece, adjoint);
    leg().state = adjoint;
    hand_over(leg().turn, unit);
    room.adjoint->second = nullptr;
    this->keys_of_run(begin);
    if (a.dlog_decay) this->decay_gradients(begin, end, flow);
    if (!this->wants_hash() || !await(leg().joined, unit)) return;
    this->add_hash_gradients(piece.slot, 0, room.dw_queries, room.dbeta_queries);
    this->add_hash_gradients(piece.slot, 1);
    hand_over(leg().joined, unit);
  }
  static void swap(T*& x, T*& y) {
    T* const z = x;
    x = y;
    y = z;
  }
};

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
