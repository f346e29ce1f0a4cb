// Causal passes (Algorithm 2): a running state over blocks of tokens, masked scores inside a block.
//
// With phi' = phi exp(+-g) (pq carries exp(g), pk exp(-g), g the decay since before the block) and M the state
// before the block:
//   forward    num_i = pq_i M + sum_{j <= i} (pq_i . pk_j) v_j          out = num / den
//   backward   h_i = dout_i / den_i,  c_i = -(dout_i . num_i) / den_i^2  (adjoints of num and den)
//              dphi_q_i = M h_i + c_i m + sum_{j <= i} pk_j (v_j . h_i + c_i)
//   N, the adjoint of the state, runs backward:  N = sum_i pq_i (h_i, c_i)
//              dv_j = pk_j N + sum_{i >= j} (pq_i . pk_j) h_i
//              dphi_k_j = N (v_j, 1) + sum_{i >= j} pq_i (v_j . h_i + c_i)
// No state is ever found by subtraction.
#pragma once

#include "pass.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

template <class T>
class Causal : public Base<T> {
 protected:
  using Base<T>::p;
  using Base<T>::a;
  using Base<T>::f;
  using Base<T>::g;
  using Base<T>::room;
  using Base<T>::row;
  using Base<T>::work;

 public:
  using Base<T>::Base;

  void forward(bool only_state) {
    for (const Piece* piece = work.begin; piece != work.end && !this->stopped(); ++piece) {
      this->enter(*piece);
      if (only_state && piece + 1 != work.end) continue;
      this->for_heads([&] {
        start_row_or_piece(*room.state, piece == work.begin, piece->first, a.initial, only_state);
      });
      for (i64 t = piece->begin; t < piece->end && !this->stopped(); t += a.run)
        forward_run(t, min_of(t + a.run, piece->end), only_state);
      this->for_heads([&] {
        Running<T>& state = *room.state;
        if (only_state) {
          this->gather(state.acc(), this->left());
          work.left_factor[this->further()] = state.kept;
        } else if (piece->last && a.final_mass) {
          state.next_piece();
          this->write_state(state.base(), a.final_mass, a.final_value_sum);
        }
      });
    }
  }

  void backward() {  // whole rows, the runs of each from its end
    for (const Piece* piece = work.end; piece-- != work.begin && !this->stopped();) {
      this->enter(*piece);
      start_adjoints(*piece, piece + 1 == work.end);
      for (i64 t = last_run(*piece); t >= piece->begin && !this->stopped(); t -= a.run) {
        look_back(t, piece->begin);
        this->for_heads([&] {
          query_run(t, min_of(t + a.run, piece->end), true);
          this->add_hash_gradients(piece->slot, 0);
          key_run(t, min_of(t + a.run, piece->end), piece->slot);
        });
      }
      this->for_heads([&] { finish_backward(*piece, *room.adjoint); });
    }
  }
  void backward_query() {  // in the order of `backward`, so that sums over tokens come out the same
    for (const Piece* piece = work.end; piece-- != work.begin && !this->stopped();) {
      this->enter(*piece);
      for (i64 t = last_run(*piece); t >= piece->begin && !this->stopped(); t -= a.run) {
        look_back(t, piece->begin);
        this->for_heads([&] {
          query_run(t, min_of(t + a.run, piece->end), false);
          this->add_hash_gradients(piece->slot, 0);
        });
      }
    }
  }
  void backward_accumulate() {
    const Piece& piece = *work.begin;
    this->enter(piece);
    this->for_heads([&] { room.adjoint->clear(); });
    for (i64 t = last_run(piece); t >= piece.begin && !this->stopped(); t -= a.run)
      this->for_heads([&] {
        sum_adjoints(t, min_of(t + a.run, piece.end));
        room.adjoint->end_run();
      });
    this->for_heads([&] {
      this->gather(room.adjoint->acc(), this->left());
      work.left_factor[this->further()] = room.adjoint->kept;
    });
  }
  void backward_key() {
    for (const Piece* piece = work.end; piece-- != work.begin && !this->stopped();) {
      this->enter(*piece);
      start_adjoints(*piece, piece + 1 == work.end);
      for (i64 t = last_run(*piece); t >= piece->begin && !this->stopped(); t -= a.run) {
        look_back(t, piece->begin);
        this->for_heads([&] { key_run(t, min_of(t + a.run, piece->end), piece->slot); });
      }
      this->for_heads([&] { finish_backward(*piece, *room.adjoint); });
    }
  }
  // A slot that ends inside a row hands on factor * given + left; see Work.
  void scan() {
    const i64 size = p.states * (a.value_dim + 1);
    Running<T>& state = *room.state;
    for (const Piece* piece = work.begin; piece + 1 < work.end; ++piece) {
      if (piece[1].slot == piece->slot || piece[1].first) continue;
      this->enter(*piece);
      hand_on(state, *piece, piece->first, a.initial, work.left + piece[1].slot * size);
    }
  }
  void backward_scan() {
    const i64 size = p.states * (a.value_dim + 1);
    for (const Piece* piece = work.end - 1; piece > work.begin; --piece) {
      if (piece[-1].slot == piece->slot || piece->first) continue;
      this->enter(*piece);
      hand_on(*room.adjoint, *piece, piece->last, a.grad_final, work.left + piece[-1].slot * size);
    }
  }

 protected:
  static constexpr i64 kChunk = 64;  // tokens: the blocks of a forward do not reach over its bounds

  void hand_on(Running<T>& state, const Piece& piece, bool at_edge, const State& from, double* to) {
    if (at_edge) {
      state.clear();
      this->read_state(from, state);
    }
    this->spread(work.given + piece.slot * p.states * (a.value_dim + 1), state.acc());
    state.kept = work.left_factor[piece.slot];
    state.next_piece();
    this->gather(state.base(), to);
  }

  i64 last_run(const Piece& piece) const { return piece.begin + (max_of(piece.end - piece.begin, 1) - 1) / a.run * a.run; }

  // A row starts from the state given with the call, a piece inside it from the state before it.
  void start_row_or_piece(Running<T>& state, bool first_of_work, bool at_edge, const State& from, bool from_zero) {
    if (at_edge || from_zero) {
      state.clear();
      if (at_edge && !from_zero) this->read_state(from, state);
    } else if (first_of_work) {
      state.clear();
      this->spread(this->given(), state.base());
    } else {
      state.next_piece();
    }
  }
  void start_adjoints(const Piece& piece, bool last_of_work) {
    this->for_heads([&] { start_row_or_piece(*room.adjoint, last_of_work, piece.last, a.grad_final, false); });
  }

  // Heads take turns chunk by chunk, so that memory is read token by token.
  void forward_run(i64 begin, i64 end, bool only_state) {
    this->for_heads([&] {
      room.state->start_run();
      if (a.saved && begin > 0 && !only_state) this->gather(room.state->w, this->saved(begin / a.run));
    });
    for (i64 t = begin; t < end; t += kChunk) {
      look_forward(t + kChunk, kChunk, only_state);
      this->for_heads([&] { forward_chunk(t, min_of(t + kChunk, end), only_state); });
    }
    if (end == row.klen && !a.final_mass && !only_state) return;  // nobody asks what the row leaves
    this->for_heads([&] { room.state->end_run(); });
  }
  void look_forward(i64 begin, i64 count, bool only_state) {
    if (work.heads == 1 || !p.large) return;
    const i64 end = min_of(begin + count, row.klen);
    room.ahead.start();
    this->ask_far(a.k, row.k0, begin, end, 1, a.dim);
    this->ask_far(a.v, row.k0, begin, end, 1, a.value_dim);
    if (!only_state) this->ask_far(a.q, row.q0, begin, end, p.heads_a_group, a.dim);
    room.ahead.pace();
  }
  void look_back(i64 run_begin, i64 least) {
    if (work.heads == 1 || !p.large) return;
    const i64 begin = max_of(run_begin - a.run, least);
    room.ahead.start();
    this->ask_far(a.k, row.k0, begin, run_begin, 1, a.dim);
    this->ask_far(a.v, row.k0, begin, run_begin, 1, a.value_dim);
    this->ask_far(a.q, row.q0, begin, run_begin, p.heads_a_group, a.dim);
    this->ask_far(a.grad_out, row.q0, begin, run_begin, p.heads_a_group, a.value_dim);
    room.ahead.pace();
  }

  void forward_chunk(i64 begin, i64 end, bool only_state) {
    Running<T>& state = *room.state;
    this->cut_blocks(begin, end, state);
    for (i64 n = 0; n < room.block_count; ++n) {
      const Block<T>& b = room.blocks[n];
      const i64 rows = round_up(b.count, W<T>);
      this->next_block();
      scale_before(state, b);
      take_keys(b, begin, rows, nullptr);
      const Tile<T> v = this->load_values(b, rows);
      if (only_state)
        this->add_to_state(state.w, state.sum, room.pk, v.p, v.ld, b.count, nullptr, b.over);
      else
        read_block(b, begin, rows, v, a.final_mass || b.begin + b.count < row.klen);
    }
  }
  // Buckets of the state that a block reads: none where it begins its row, and no state was given.
  i64 states_before(const Block<T>& b) const { return b.begin > 0 || a.initial.mass ? p.states : 0; }

  // The outputs of a block whose keys have their buckets in `pk`, and, where it is read again, the state behind it.
  void read_block(const Block<T>& b, i64 run_begin, i64 rows, const Tile<T>& v, bool state_wanted) {
    if (p.heads_a_group == 1 && state_wanted) return forward_block(b, run_begin, rows, v);
    for (i64 h = g * p.heads_a_group; h < (g + 1) * p.heads_a_group; ++h) forward_queries(b, run_begin, h, rows, v);
    if (!state_wanted) return;
    this->add_to_state(room.state->w, room.state->second, room.pk, v.p, v.ld, b.count, nullptr, b.over);
  }

  // Outputs and state together, where a key head has one query head: values are read once.
  void forward_block(const Block<T>& b, i64 run_begin, i64 rows, const Tile<T>& v) {
    Running<T>& state = *room.state;
    const i64 states = states_before(b);
    take_queries(b, run_begin, g, rows, nullptr);
    this->score(b.count, rows);
    this->denominators(state.w, states, rows, b.count);
    const bool stored = this->emit_both(
        a.out, row.q0, b, room.size.value, room.out, {room.pq, C, 1, state.w, room.size.ld, states},
        {room.scores, C, 1, v.p, v.ld, b.count}, Terms::kUpToRow, room.inverse,
        {{state.w, room.size.ld, state.second, b.over}, {room.pk, 1, C, v.p, v.ld, b.count}, {}, Terms::kAll});
    this->add_masses(state.w, state.second, room.pk, b.count, nullptr, b.over);
    if (!stored) this->store(a.out, row.q0, b, g, a.value_dim, room.size.value, room.inverse);
  }

  void forward_queries(const Block<T>& b, i64 run_begin, i64 h, i64 rows, const Tile<T>& v) {
    const T* w = room.state->w;
    const i64 states = states_before(b);
    take_queries(b, run_begin, h, rows, nullptr);
    this->score(b.count, rows);
    this->denominators(w, states, rows, b.count);
    this->emit_product(a.out, row.q0, b, h, a.value_dim, room.size.value, {room.pq, C, 1, w, room.size.ld, states},
                       {room.scores, C, 1, v.p, v.ld, b.count}, Terms::kUpToRow, room.inverse);
  }

  // The state before the run, for reading.
  void start_state(i64 run) {
    if (run > 0) {
      this->spread(this->saved(run), room.state->w);
      return;
    }
    room.state->clear();
    this->read_state(a.initial, *room.state);
    room.state->start_run();
  }

  void query_run(i64 begin, i64 end, bool keys_follow) {
    start_state(begin / a.run);
    this->cut_blocks(begin, end, *room.state);
    room.begin_stash(keys_follow);
    this->clear_hash_gradients();
    for (i64 n = 0; n < room.block_count; ++n) {
      const Block<T>& b = room.blocks[n];
      const i64 rows = round_up(b.count, W<T>);
      this->next_block();
      scale_before(*room.state, b);
      room.stash_keys(p, n);
      take_keys(b, begin, rows, room.stashed ? &room.key_slopes : nullptr);
      const Tile<T> v = this->load_values(b, rows);
      for (i64 h = g * p.heads_a_group; h < (g + 1) * p.heads_a_group; ++h) backward_queries(b, begin, h, rows, v);
      if (n + 1 < room.block_count)  // the next run starts from a state of its own
        this->add_to_state(room.state->w, nullptr, room.pk, v.p, v.ld, b.count, nullptr, b.over);
    }
  }

  void backward_queries(const Block<T>& b, i64 run_begin, i64 h, i64 rows, const Tile<T>& v) {
    const T* w = room.state->w;
    room.stash_queries(p, h - g * p.heads_a_group);
    const Tile<T> x = take_queries(b, run_begin, h, rows, &room.slopes);
    const Tile<T> grad = this->load_grad_out(b, h, rows, room.grad);
    this->score(b.count, rows);
    this->denominators(w, p.states, rows, b.count);
    this->drop_gradients_out_of_range(b.count);
    dots<T>(room.other, C, v.p, v.ld, b.count, {grad.p, grad.ld}, rows, room.size.value, nullptr, true);
    dots<T>(room.dphi, C, w, room.size.ld, p.states, {grad.p, grad.ld}, rows, room.size.value, &room.ahead);
    for (i64 t = 0; t < rows; t += W<T>) {
      const V<T> dot = this->column_dot(room.pq, room.dphi, t, p.states) +
                       this->column_dot(room.scores, room.other, t, b.count);  // dout_i . num_i
      const V<T> inverse = load(room.inverse + t);
      const V<T> c = -(dot * inverse) * inverse;
      put<T>(room.den_adjoint + t, c);
      for (i64 s = 0; s < p.states; ++s) {
        const T mass = w[s * room.size.ld + room.size.value];
        T* d = room.dphi + s * C + t;
        put<T>(d, load(d) * inverse + c * mass);
      }
    }
    weigh_inside(b.count, rows);
    add_product<T>(room.dphi, C, p.states, rows, {room.pk, 1, C, room.other, C, b.count});
    if (room.stashed) turn_across(b.count);
    for (i64 i = 0; i < b.count; ++i) {
      T* kept = this->inverse_of(b.begin + i, h);
      kept[0] = room.inverse[i];
      kept[1] = room.den_adjoint[i];
      kept[2] = room.lift[i];
    }
    if (!a.dq.data && !this->wants_hash() && !a.dlog_decay) return;
    this->hash_gradients(room.pq, room.slopes, x, a.dq, row.q0, b, h, rows);
    for (i64 i = 0; a.dlog_decay && i < b.count; ++i) {
      T& term = decay_gradient(b.begin + i);
      term = h == g * p.heads_a_group ? room.total[i] : term + room.total[i];
    }
  }

  void key_run(i64 begin, i64 end, i64 slot) {
    Running<T>& adjoint = *room.adjoint;
    adjoint.start_run();
    this->cut_blocks(begin, end, adjoint);
    keys_of_run(begin);
    if (handed_on(begin)) adjoint.end_run();
    this->add_hash_gradients(slot, 1);
    if (a.dlog_decay) decay_gradients(begin, end, decay_flow(begin, adjoint));
  }
  // The gradients of a run's keys from its last block to its first, and the adjoint of the state along with them.
  void keys_of_run(i64 begin) {
    Running<T>& adjoint = *room.adjoint;
    this->clear_hash_gradients();
    this->from_the_end = true;
    for (i64 n = room.block_count - 1; n >= 0; --n) {
      const Block<T>& b = room.blocks[n];
      this->next_block();
      if (b.over != T(1)) adjoint.scale(b.over);
      backward_keys(b, begin, n, n > 0 || (adjoint.second && handed_on(begin)));
      if (b.before != T(1)) adjoint.scale(b.before);
    }
    this->from_the_end = false;
    room.end_stash();
  }
  // Whether anybody asks for the adjoint before the run that begins here.
  bool handed_on(i64 begin) const { return begin > 0 || a.dinitial_mass || a.dinitial_value_sum || a.dlog_decay; }

  // What a run's queries alone add to the adjoint of the state: its `sum`.
  void sum_adjoints(i64 begin, i64 end) {
    Running<T>& adjoint = *room.adjoint;
    adjoint.start_sum();
    this->cut_blocks(begin, end, adjoint);
    this->from_the_end = true;
    for (i64 n = room.block_count - 1; n >= 0; --n) {
      const Block<T>& b = room.blocks[n];
      const i64 rows = round_up(b.count, W<T>);
      this->next_block();
      if (b.over != T(1)) adjoint.scale_sum(b.over);
      room.stash_keys(p, n);
      for (i64 h = g * p.heads_a_group; h < (g + 1) * p.heads_a_group; ++h) {
        take_queries_again(b, begin, h, rows);
        take_grad_out(b, h, rows);
        this->add_to_state(adjoint.sum, nullptr, room.pq, room.scaled, room.size.value, b.count, room.den_adjoint, T(1));
      }
      if (b.before != T(1)) adjoint.scale_sum(b.before);
    }
    this->from_the_end = false;
  }

  void backward_keys(const Block<T>& b, i64 run_begin, i64 n, bool state_wanted) {
    const i64 rows = round_up(b.count, W<T>), ld = room.size.ld, Vp = room.size.value;
    const T* w = room.adjoint->w;
    const Tile<T> x = take_keys_again(b, run_begin, n, rows);
    const Tile<T> v = this->load_values(b, rows);
    const bool single = p.heads_a_group == 1;
    bool stored = false;
    // dv is gathered in `grad`: `out` is needed for dk before all heads are done.
    if (!single) set_product<T>(room.grad, Vp, b.count, Vp, {room.pk, C, 1, w, ld, p.states});
    dots<T>(room.dphi, C, w, ld, p.states, {v.p, v.ld}, rows, Vp, &room.ahead);
    for (i64 s = 0; s < p.states; ++s)
      for (i64 i = 0; i < rows; ++i) room.dphi[s * C + i] += w[s * ld + Vp];
    for (i64 h = g * p.heads_a_group; h < (g + 1) * p.heads_a_group; ++h) {
      take_queries_again(b, run_begin, h, rows);
      take_grad_out(b, h, rows);
      if (!room.stashed) score_again(b, h, v, rows);
      if (!single) add_product<T>(room.grad, Vp, b.count, Vp, {room.scores, 1, C, room.scaled, Vp, b.count});
      add_product<T>(room.dphi, C, p.states, rows, {room.pq, 1, C, room.across, C, b.count});
      if (single)
        stored = value_gradients(b, state_wanted);
      else if (state_wanted)
        this->add_to_state(room.adjoint->w, room.adjoint->second, room.pq, room.scaled, Vp, b.count, room.den_adjoint, T(1));
    }
    if (a.dv.data && !stored)
      store_tile<T>(p, a.dv, row.batch, row.k0 + b.begin, g, b.count, a.value_dim, room.grad, Vp, nullptr);
    if (!a.dk.data && !this->wants_hash() && !a.dlog_decay) return;
    this->hash_gradients(room.pk, room.key_slopes, x, a.dk, row.k0, b, g, rows);
    for (i64 i = 0; i < b.count; ++i) room.key_term[b.begin + i - run_begin] = room.total[i];
  }

  // The scores of a block, and its matrix of v_j . h_i + c_i, which the queries' pass may have kept.
  void score_again(const Block<T>& b, i64 h, const Tile<T>& v, i64 rows) {
    this->score(b.count, rows);
    const Tile<T> grad = this->load_grad_out(b, h, rows, room.out);
    dots<T>(room.other, C, v.p, v.ld, b.count, {grad.p, grad.ld}, rows, room.size.value, nullptr, true);
    weigh_inside(b.count, rows);
    turn_across(b.count);
  }
  // From v_j . dout_i to v_j . h_i + c_i where i sees j, else 0.
  void weigh_inside(i64 count, i64 rows) {
    for (i64 t = 0; t < rows; t += W<T>) {
      const V<T> inverse = load(room.inverse + t), c = load(room.den_adjoint + t);
      for (i64 j = 0; j < count; ++j) {
        T* e = room.other + j * C + t;
        put<T>(e, load(e) * inverse + c);
      }
    }
    keep_later<T>(room.other, count, rows);
  }
  void turn_across(i64 count) {
    for (i64 i = 0; i < count; ++i)
      for (i64 j = 0; j < C; ++j) room.across[i * C + j] = j < count ? room.other[j * C + i] : T(0);
  }

  // dv and the state's adjoint together, where a key head has one query head. Whether dv is where it belongs.
  bool value_gradients(const Block<T>& b, bool state_wanted) {
    const Running<T>& n = *room.adjoint;
    const i64 ld = room.size.ld, Vp = room.size.value;
    const Pair<T> behind{room.pk, C, 1, n.w, ld, p.states}, inside{room.scores, 1, C, room.scaled, Vp, b.count};
    if (!state_wanted) {
      set_product<T>(room.grad, Vp, b.count, Vp, behind, inside, Terms::kFromRow, &room.ahead);
      return false;
    }
    const bool stored = this->emit_both(
        a.dv, row.k0, b, Vp, room.grad, behind, inside, Terms::kFromRow, nullptr,
        {{n.w, ld, n.second, T(1)}, {room.pq, 1, C, room.scaled, Vp, b.count}, {}, Terms::kAll});
    this->add_masses(n.w, n.second, room.pq, b.count, room.den_adjoint, T(1));
    return stored;
  }

  // dL/dlog_decay of a run's first token is (adjoint before it) . (state before it); from there on it changes by
  // phi_k . dphi_k - phi_q . dphi_q at each token. The latter is 0, for a normalised output does not change when phi_q is
  // scaled, but for roundings: where a token sees hardly more than itself, v_j . h_j + c_j is the difference of two equal
  // numbers, and what is left of it is in both terms. At -6 a token it would be 2e-4 of the gradient, at -12 a tenth.
  // Starting afresh at each run keeps the rounding of long sums out. The queries' pass leaves its term in the gradient's place.
  double decay_flow(i64 begin, Running<T>& n) {
    start_state(begin / a.run);
    const double *base = n.base(), *acc = n.acc();
    double flow = 0;
    for (i64 s = 0; s < p.states; ++s)
      for (i64 d = 0; d <= room.size.value; ++d) {
        if (d >= a.value_dim && d < room.size.value) continue;
        const i64 i = s * room.size.ld + d;
        flow += (n.kept * base[i] + acc[i]) * static_cast<double>(room.state->w[i]);
      }
    return flow;
  }
  void decay_gradients(i64 begin, i64 end, double flow) {
    for (i64 t = begin; t < end; ++t) {
      T& gradient = decay_gradient(t);
      const T query_term = gradient;
      gradient = static_cast<T>(flow);
      flow += static_cast<double>(room.key_term[t - begin]) - static_cast<double>(query_term);
    }
  }
  T& decay_gradient(i64 t) const {
    return static_cast<T*>(a.dlog_decay)[(row.batch * a.tk + row.k0 + t) * a.groups + g];
  }

  void finish_backward(const Piece& piece, Running<T>& adjoint) {
    if (!piece.first || !(a.dinitial_mass || a.dinitial_value_sum) || this->stopped()) return;
    adjoint.next_piece();
    this->write_state(adjoint.base(), a.dinitial_mass, a.dinitial_value_sum);
  }

  void scale_before(Running<T>& state, const Block<T>& b) {
    if (b.before != T(1)) state.scale(b.before);
  }
  Tile<T> take_keys(const Block<T>& b, i64 run_begin, i64 rows, const Slopes<T>* slopes) {
    this->key_parts(b.begin, b.count, a.log_decay ? room.key_factor + (b.begin - run_begin) : nullptr);
    const Tile<T> x = this->load_keys(b, rows);
    hash<T>(f, x, rows, room.part_k, room.y, room.dy, room.pk, slopes, &room.ahead);
    return x;
  }
  Tile<T> take_queries(const Block<T>& b, i64 run_begin, i64 h, i64 rows, const Slopes<T>* slopes) {
    this->query_parts(b.count, a.log_decay ? room.query_factor + (b.begin - run_begin) : nullptr);
    const Tile<T> x = this->load_queries(b, h, rows);
    hash<T>(f, x, rows, room.part_q, room.y, room.dy, room.pq, slopes, &room.ahead);
    return x;
  }
  // The same in the keys' pass, where the queries' pass may have kept the buckets.
  Tile<T> take_keys_again(const Block<T>& b, i64 run_begin, i64 n, i64 rows) {
    room.stash_keys(p, n);
    if (!room.stashed) return take_keys(b, run_begin, rows, &room.key_slopes);
    this->key_parts(b.begin, b.count, a.log_decay ? room.key_factor + (b.begin - run_begin) : nullptr);
    return a.dplanes ? this->load_keys(b, rows) : Tile<T>{nullptr, 0};
  }
  void take_queries_again(const Block<T>& b, i64 run_begin, i64 h, i64 rows) {
    room.stash_queries(p, h - g * p.heads_a_group);
    if (!room.stashed) take_queries(b, run_begin, h, rows, nullptr);
  }
  // h and c of a block of queries, into `scaled` and `den_adjoint`; their buckets are lifted as they were.
  void take_grad_out(const Block<T>& b, i64 h, i64 rows) {
    const i64 Vp = room.size.value;
    const Tile<T> grad = this->load_grad_out(b, h, rows, room.scaled);
    for (i64 i = b.count; i < C; ++i) room.den_adjoint[i] = room.inverse[i] = 0;
    for (i64 i = 0; i < b.count; ++i) {
      const T* kept = this->inverse_of(b.begin + i, h);
      room.inverse[i] = kept[0];
      room.den_adjoint[i] = kept[1];
      if (kept[2] != T(1) && !room.stashed)
        for (i64 s = 0; s < p.states; ++s) room.pq[s * C + i] *= kept[2];
      const T inverse = kept[0];
      const T* from = grad.row(i);
      T* to = room.scaled + i * Vp;
      for (i64 d = 0; d < Vp; d += W<T>) put<T>(to + d, load(from + d) * inverse);
    }
  }
};

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
