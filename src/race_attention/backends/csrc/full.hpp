// Passes that are not causal (Algorithm 1): every query of a row reads the sum over all its keys.
#pragma once

#include "pass.hpp"

namespace race {
namespace RACE_NAMESPACE {
namespace {

template <class T>
class Full : public Base<T> {
  using Base<T>::p;
  using Base<T>::a;
  using Base<T>::f;
  using Base<T>::g;
  using Base<T>::room;
  using Base<T>::row;
  using Base<T>::work;

 public:
  using Base<T>::Base;

  // ---- whole rows: pieces are rows, their begin and end unused -----------------------------------------

  void rows_forward() {
    for (const Piece* piece = work.begin; piece != work.end && !this->stopped(); ++piece) {
      this->enter(*piece);
      sum_keys_of_row();
      this->for_heads([&] {
        if (a.final_mass) this->write_state(room.state->base(), a.final_mass, a.final_value_sum);
      });
      readout(0, row.qlen);
    }
  }
  void rows_backward() {
    for (const Piece* piece = work.begin; piece != work.end && !this->stopped(); ++piece) {
      this->enter(*piece);
      sum_keys_of_row();
      this->for_heads([&] {
        room.adjoint->clear();
        this->read_state(a.grad_final, *room.adjoint);
      });
      backward_query(0, row.qlen, piece->slot);
      this->for_heads([&] {
        room.adjoint->next_piece();
        this->write_state(room.adjoint->base(), a.dinitial_mass, a.dinitial_value_sum);
        room.adjoint->start_run();
      });
      backward_key(0, row.klen, piece->slot);
    }
  }

  // ---- rows in pieces --------------------------------------------------------------------------------------

  void accumulate() {
    this->enter(*work.begin);
    this->for_heads([&] { room.state->clear(); });
    sum_keys(work.begin->begin, work.begin->end);
    this->for_heads([&] { this->gather(room.state->acc(), this->left()); });
  }
  void readout() {
    this->enter(*work.begin);
    this->for_heads([&] { start_from(*room.state); });
    readout(work.begin->begin, work.begin->end);
  }
  void backward_query() {
    this->enter(*work.begin);
    this->for_heads([&] {
      start_from(*room.state);
      room.adjoint->clear();
    });
    backward_query(work.begin->begin, work.begin->end, work.begin->slot);
    this->for_heads([&] { this->gather(room.adjoint->acc(), this->left()); });
  }
  void backward_key() {
    this->enter(*work.begin);
    this->for_heads([&] { start_from(*room.adjoint); });
    backward_key(work.begin->begin, work.begin->end, work.begin->slot);
  }
  void reduce() {
    sum_pieces(*room.state, a.initial);
    if (a.final_mass) this->write_state(room.state->base(), a.final_mass, a.final_value_sum);
  }
  void reduce_adjoint() {
    sum_pieces(*room.adjoint, a.grad_final);
    this->write_state(room.adjoint->base(), a.dinitial_mass, a.dinitial_value_sum);
  }

 private:
  void sum_pieces(Running<T>& state, const State& from) {
    this->enter(*work.begin);
    state.clear();
    this->read_state(from, state);
    const i64 size = p.states * (a.value_dim + 1);
    for (const Piece* piece = work.begin; piece != work.end; ++piece) {
      this->spread(work.given + piece->slot * size, state.acc());
      state.next_piece();
    }
    this->gather(state.base(), work.left);
  }
  void start_from(Running<T>& state) {
    state.clear();
    this->spread(work.given + (g - work.g) * 2 * p.states * (a.value_dim + 1), state.base());
    state.start_run();
  }
  void sum_keys_of_row() {
    this->for_heads([&] {
      room.state->clear();
      this->read_state(a.initial, *room.state);
    });
    sum_keys(0, row.klen);
    this->for_heads([&] {
      room.state->next_piece();
      room.state->start_run();
    });
  }
  // Asks for tokens [begin, end) of what a pass reads, of all heads at hand, while it works on those before.
  void look(const Tokens& x, const Tokens* y, i64 first, i64 begin, i64 end, i64 heads_each) {
    if (work.heads == 1 || !p.large || begin >= end) return;
    room.ahead.start();
    this->ask_far(x, first, begin, end, heads_each, a.dim);
    if (y) this->ask_far(*y, first, begin, end, heads_each, a.value_dim);
    room.ahead.pace();
  }
  static constexpr i64 kChunk = 64;  // tokens after which the next head takes its turn

  template <class Do>
  void blocks(i64 begin, i64 end, Do&& work_on) {
    for (i64 t = begin; t < end; t += C) {
      this->next_block();
      const Block<T> b{t, min_of(C, end - t), T(1), T(1)};
      work_on(b, round_up(b.count, W<T>));
    }
  }

  void sum_keys(i64 begin, i64 end) {
    for (i64 t = begin; t < end && !this->stopped(); t += a.run) {
      this->for_heads([&] { room.state->start_sum(); });
      const i64 behind = min_of(t + a.run, end);
      for (i64 c = t; c < behind; c += kChunk) {
        look(a.k, &a.v, row.k0, c + kChunk, min_of(c + 2 * kChunk, end), 1);
        this->for_heads([&] {
          blocks(c, min_of(c + kChunk, behind), [&](const Block<T>& b, i64 rows) {
            take_keys(b, rows, nullptr);
            const Tile<T> v = this->load_values(b, rows);
            this->add_to_state(room.state->sum, nullptr, room.pk, v.p, v.ld, b.count, nullptr, T(1));
          });
        });
      }
      this->for_heads([&] { room.state->end_run(); });
    }
  }

  void readout(i64 begin, i64 end) {
    for (i64 t = begin; t < end && !this->stopped(); t += kChunk) {
      look(a.q, nullptr, row.q0, t + kChunk, min_of(t + 2 * kChunk, end), p.heads_a_group);
      this->for_heads([&] {
        blocks(t, min_of(t + kChunk, end), [&](const Block<T>& b, i64 rows) {
          for (i64 h = g * p.heads_a_group; h < (g + 1) * p.heads_a_group; ++h) read_block(b, h, rows);
        });
      });
    }
  }
  void read_block(const Block<T>& b, i64 h, i64 rows) {
    const T* w = room.state->w;
    take_queries(b, h, rows, nullptr);
    this->denominators(w, p.states, rows, 0);
    this->emit_product(a.out, row.q0, b, h, a.value_dim, room.size.value, {room.pq, C, 1, w, room.size.ld, p.states}, {},
                       Terms::kAll, room.inverse);
  }

  void backward_query(i64 begin, i64 end, i64 slot) {
    for (i64 t = begin; t < end && !this->stopped(); t += a.run) {
      look(a.q, &a.grad_out, row.q0, t + a.run, min_of(t + 2 * a.run, end), p.heads_a_group);
      this->for_heads([&] {
        room.adjoint->start_sum();
        this->clear_hash_gradients();
        blocks(t, min_of(t + a.run, end), [&](const Block<T>& b, i64 rows) {
          for (i64 h = g * p.heads_a_group; h < (g + 1) * p.heads_a_group; ++h) backward_queries(b, h, rows);
        });
        room.adjoint->end_run();
        this->add_hash_gradients(slot, 0);
      });
    }
  }

  void backward_queries(const Block<T>& b, i64 h, i64 rows) {
    const T* w = room.state->w;
    const i64 ld = room.size.ld, Vp = room.size.value;
    const Tile<T> x = take_queries(b, h, rows, &room.slopes);
    const Tile<T> grad = this->load_grad_out(b, h, rows, room.grad);
    this->denominators(w, p.states, rows, 0);
    this->drop_gradients_out_of_range(b.count);
    dots<T>(room.dphi, C, w, ld, p.states, {grad.p, grad.ld}, rows, Vp, &room.ahead);
    for (i64 t = 0; t < rows; t += W<T>) {
      const V<T> dot = this->column_dot(room.pq, room.dphi, t, p.states);
      const V<T> inverse = load(room.inverse + t);
      const V<T> c = -(dot * inverse) * inverse;
      put<T>(room.den_adjoint + t, c);
      for (i64 s = 0; s < p.states; ++s) {
        T* d = room.dphi + s * C + t;
        put<T>(d, load(d) * inverse + c * w[s * ld + Vp]);
      }
    }
    for (i64 i = 0; i < b.count; ++i)
      for (i64 d = 0; d < Vp; d += W<T>)
        put<T>(room.scaled + i * Vp + d, load(grad.row(i) + d) * room.inverse[i]);
    this->add_to_state(room.adjoint->sum, nullptr, room.pq, room.scaled, Vp, b.count, room.den_adjoint, T(1));
    if (a.dq.data || this->wants_hash()) this->hash_gradients(room.pq, room.slopes, x, a.dq, row.q0, b, h, rows);
  }

  void backward_key(i64 begin, i64 end, i64 slot) {
    for (i64 t = begin; t < end && !this->stopped(); t += a.run) {
      look(a.k, &a.v, row.k0, t + a.run, min_of(t + 2 * a.run, end), 1);
      this->for_heads([&] { key_run(t, min_of(t + a.run, end), slot); });
    }
  }
  void key_run(i64 begin, i64 end, i64 slot) {
    const T* w = room.adjoint->w;
    const i64 ld = room.size.ld, Vp = room.size.value;
    this->clear_hash_gradients();
    blocks(begin, end, [&](const Block<T>& b, i64 rows) {
      const Tile<T> x = take_keys(b, rows, &room.slopes);
      if (a.dv.data) {
        this->emit_product(a.dv, row.k0, b, g, a.value_dim, Vp, {room.pk, C, 1, w, ld, p.states});
      }
      if (!a.dk.data && !this->wants_hash()) return;
      const Tile<T> v = this->load_values(b, rows);
      dots<T>(room.dphi, C, w, ld, p.states, {v.p, v.ld}, rows, Vp, &room.ahead);
      for (i64 s = 0; s < p.states; ++s)
        for (i64 i = 0; i < rows; ++i) room.dphi[s * C + i] += w[s * ld + Vp];
      this->hash_gradients(room.pk, room.slopes, x, a.dk, row.k0, b, g, rows);
    });
    this->add_hash_gradients(slot, 1);
  }

  Tile<T> take_keys(const Block<T>& b, i64 rows, const Slopes<T>* slopes) {
    this->key_parts(b.begin, b.count, nullptr);
    const Tile<T> x = this->load_keys(b, rows);
    hash<T>(f, x, rows, room.part_k, room.y, room.dy, room.pk, slopes, &room.ahead);
    return x;
  }
  Tile<T> take_queries(const Block<T>& b, i64 h, i64 rows, const Slopes<T>* slopes) {
    this->query_parts(b.count, nullptr);
    const Tile<T> x = this->load_queries(b, h, rows);
    hash<T>(f, x, rows, room.part_q, room.y, room.dy, room.pq, slopes, &room.ahead);
    return x;
  }
};

}  // namespace
}  // namespace RACE_NAMESPACE
}  // namespace race
